"""All processes of a run train the same thing, or none does."""

import hashlib
import json
from collections import defaultdict
from typing import Any

import torch.distributed
from omegaconf import OmegaConf


def check_same_config(config: dict[str, Any]) -> None:
    """Compare this rank's configuration with that of all others; every rank calls it, and every rank raises.

    Args:
        config: as plain values; interpolations are resolved here.

    Raises:
        ValueError: they differ; it names each key that does and what each rank has there.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    own = flat(OmegaConf.to_container(OmegaConf.create(config), resolve=True))
    hashes = gather(hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest())
    if len(set(hashes)) == 1:
        return
    configs = gather(own)
    problems: dict[str, str] = {}
    for key in sorted({key for each in configs for key in each}, key=lambda key: (key.count("."), key)):
        ranks_with: dict[str, list[str]] = defaultdict(list)
        for rank, each in enumerate(configs):
            ranks_with[each.get(key, "missing")].append(str(rank))
        if len(ranks_with) > 1 and not key.endswith(tuple(f".{other}" for other in problems)):  # model.optim.lr
            said = (f"{shorten(value)} on rank {', '.join(ranks)}" for value, ranks in ranks_with.items())
            problems[key] = f"{key} is {' and '.join(said)}"
    raise ValueError(
        f"The {len(configs)} processes of this run have different configurations, so that none of them trains: "
        f"{'; '.join(problems.values())}. Start all of them with the same command line and the same code; run_dir too "
        "must be one folder for all (hydra.run.dir=<folder>)."
    )


def shorten(value: str) -> str:
    return value if len(value) <= 80 else f"{value[:77]}..."


def gather(value: Any) -> list[Any]:
    """What every rank gives, in the order of ranks."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def flat(value: Any, key: str = "") -> dict[str, str]:
    """Nested values by their dotted keys, each as JSON."""
    if isinstance(value, dict) and value:
        return {name: leaf for part in value for name, leaf in flat(value[part], f"{key}.{part}".lstrip(".")).items()}
    return {key: json.dumps(value, default=str)}
