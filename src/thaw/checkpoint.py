"""From a checkpoint back to a run: find it, read it safely, rebuild its model, go on with its configuration.

A checkpoint is self-contained: it holds the composed configuration as plain values, so that nothing else is needed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf


def find(wanted: str, runs: Path, name: str) -> Path:
    """The checkpoint file that a `resume` or `ckpt` setting means.

    Args:
        wanted: `last` for the newest run with a checkpoint, a run's folder, or a checkpoint file.
        runs: the folder below which `last` looks.
        name: which of a run's checkpoints is meant, `last.ckpt` or `best.ckpt`.

    Raises:
        ValueError: there is no such checkpoint.
    """
    if wanted == "last":
        found = sorted(runs.glob(f"**/checkpoints/{name}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ValueError(
                f"`last` was asked for, but no run below {runs} has a {name}; give a run folder or a .ckpt file."
            )
        return found[-1].resolve()
    path = Path(wanted).expanduser()
    if path.is_dir():
        inside = path / "checkpoints" / name
        if not inside.is_file():
            raise ValueError(f"{path} holds no checkpoints/{name}; give a run folder that has one, or a .ckpt file.")
        return inside.resolve()
    if not path.is_file():
        raise ValueError(f"{wanted!r} is neither `last`, a run folder nor a checkpoint file.")
    return path.resolve()


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint without executing code.

    Raises:
        ValueError: it holds pickled code, is no checkpoint, or none of thaw's.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a checkpoint that train.py wrote.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many classes for files that are not its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values, pickled code is refused ({reason}). "
            "Give a checkpoint that train.py wrote."
        ) from error
    if not isinstance(checkpoint, dict) or not {"config", "state_dict"} <= checkpoint.keys():
        raise ValueError(
            f"{path} is not a checkpoint of thaw: it has no config and state_dict. Give one from train.py."
        )
    return checkpoint


def load_model(checkpoint: dict[str, Any]) -> Any:
    """Rebuild the model of a checkpoint that `read` returned, in eval mode.

    Args:
        checkpoint: holds all weights, or what was trained and a reference to the frozen rest, which is then read
            from the `backbone.weights` of its configuration.

    Raises:
        ValueError: the frozen weights cannot be found, or are others.
    """
    from hydra.utils import instantiate

    cfg = OmegaConf.create(checkpoint["config"])
    if "frozen" not in checkpoint and "weights" in cfg.backbone:
        cfg.backbone.weights = "none"
    if "compile" in cfg.model:
        cfg.model.compile = False  # takes longer than an evaluation
    model = instantiate(cfg.model)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"], strict=True)
    return model.eval()


def start_from(model: Any, wanted: str, runs: Path) -> str:
    """Let a new run start from the weights of an earlier one; its policy, optimizer and schedule are its own.

    Args:
        model: changed in place; may have LoRA where the earlier one had none, and the other way round.
        wanted: as for `find`; of a run, its best checkpoint counts.
        runs: the folder below which `last` looks.

    Returns:
        the earlier run's `backbone.weights`, from which those of the new one descend, too.

    Raises:
        ValueError: no such checkpoint, or one of another architecture.
    """
    from thaw.models.lora import merge_lora, plain_name

    path = find(wanted, runs, "best.ckpt")
    checkpoint = read(path)
    source = load_model(checkpoint)
    merge_lora(source)
    theirs, own = source.state_dict(), model.state_dict()
    given = {name: theirs.pop(plain_name(name), None) for name in own}
    differ = [name for name, tensor in given.items() if tensor is None and "lora_" not in name]
    differ += [name for name, tensor in given.items() if tensor is not None and tensor.shape != own[name].shape]
    differ += list(theirs)
    if differ:
        raise ValueError(
            f"start_from={wanted}: {path} holds another model ({len(differ)} tensors differ, e.g. {differ[0]}). "
            "Choose the backbone and head that it was trained with."
        )
    model.load_state_dict({name: own[name] if tensor is None else tensor for name, tensor in given.items()})
    model.backbone.fresh = frozenset()
    return checkpoint["config"]["backbone"].get("weights", "none")


def resumed_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration of the run to go on with, changed only where the command line says so.

    Args:
        cfg: as composed from the command line, with `resume` set.
        overrides: the command line's overrides, e.g. `["resume=last", "trainer.max_epochs=20"]`.

    Returns:
        the saved configuration with these overrides, a folder of its own, and `resume` as the checkpoint's path.

    Raises:
        ValueError: no such checkpoint, or another experiment than the saved one.
    """
    typed = [override.lstrip("+~").split("=", 1)[0].split("@")[0] for override in overrides]
    runs = Path(cfg.run_dir).parent  # logs/runs/<name>
    path = find(cfg.resume, runs if {"experiment", "name"} & set(typed) else runs.parent, "last.ckpt")
    checkpoint = read(path)
    saved = OmegaConf.create(checkpoint["config"])
    if "debug" in typed or ("experiment" in typed and cfg.name != saved.name):
        raise ValueError(
            f"{path} is a run of experiment {saved.name} and goes on with its own configuration; leave out experiment= "
            "and debug=, and override single keys or groups instead, e.g. trainer.max_epochs=20 or trainer=gpu."
        )
    before = OmegaConf.to_container(saved.get("freeze") or OmegaConf.create(), resolve=True)
    for key in typed:
        if key != "experiment":
            place = key.replace("/", ".")
            OmegaConf.update(saved, place, OmegaConf.select(cfg, place), merge=False, force_add=True)
    if OmegaConf.to_container(saved.get("freeze") or OmegaConf.create(), resolve=True) != before:
        raise ValueError(
            f"{path} was trained under another freezing policy than freeze={cfg.freeze} says: its optimizer holds "
            "other parameters. Leave freeze out to go on, or start a new run from its weights alone: "
            f"start_from={path} instead of resume=."
        )
    saved.run_dir, saved.resume = cfg.run_dir, str(path)
    if saved.logger and "wandb" in saved.logger:
        saved.logger.wandb.id = checkpoint["wandb_id"]
    return saved
