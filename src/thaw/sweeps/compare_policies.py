"""Which freezing policies apply to a backbone, found on fake tensors: no weights are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from thaw.run.errors import UserError

NOT_A_POLICY = "patterns"  # of configs/freeze: its rules are the user's


@dataclass
class Candidates:
    """Policies that apply, the cheapest first, with the cost of a training image; and why the others do not."""

    flops: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def bind_policies(configs: Mapping[str, DictConfig], device: str) -> Candidates:
    """Bind policies to the backbone, and count what a training image costs under each.

    A policy that trains the same parameters in the same epochs as an earlier one is left out.

    Args:
        configs: a run of each policy, with `model.num_classes`.

    Raises:
        UserError, InstantiationException: the model cannot be built, whatever the policy.
    """
    from thaw.plan.dry_step import dry_step, fake_model

    found = Candidates()
    known: dict[Any, str] = {}
    for policy, cfg in configs.items():
        try:
            with fake_model(cfg) as model:
                check_model(model, cfg)
                what = what_trains(model, cfg)
            step = dry_step(cfg, device)
        except (UserError, InstantiationException) as error:
            cause = error.__cause__ if isinstance(error, InstantiationException) else error
            if not isinstance(cause, UserError) or not str(cause).startswith("freeze"):
                raise
            found.left_out[policy] = str(cause)
            continue
        if what in known:
            found.left_out[policy] = f"trains what {known[what]} trains"
            continue
        known[what] = policy
        found.flops[policy] = step.forward_flops + step.backward_flops
    found.flops = dict(sorted(found.flops.items(), key=lambda item: item[1]))
    return found


def check_model(model: Any, cfg: DictConfig) -> None:
    if not hasattr(model, "thaw"):
        raise UserError(f"model._target_={cfg.model._target_} has no freezing policy to compare; leave model out.")


def what_trains(model: Any, cfg: DictConfig) -> tuple:
    """Equal for two policies that train the same parameters in the same epochs, and add the same ones."""
    epochs = model.thaw.epochs.items()
    trained = frozenset((name, epoch) for name, epoch in epochs if epoch < cfg.trainer.max_epochs)
    blocks = OmegaConf.to_container(cfg.freeze, resolve=True)
    assert isinstance(blocks, dict)
    return trained, repr([block for block in blocks.values() if isinstance(block, dict)])
