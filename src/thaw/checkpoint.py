"""From a checkpoint back to a run: find it, read it safely, rebuild its model, go on with its configuration.

A checkpoint is self-contained: it holds the composed configuration as plain values, so that nothing else is needed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from thaw.command_line import setting


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


def start_from(model: Any, wanted: str, runs: Path) -> None:
    """Let a new run start from the weights of an earlier one; its policy, optimizer and schedule are its own.

    Args:
        model: changed in place; may have LoRA where the earlier one had none, and the other way round.
        wanted: as for `find`; of a run, its best checkpoint counts.
        runs: the folder below which `last` looks.

    Raises:
        ValueError: no such checkpoint, or one of another architecture.
    """
    from thaw.models.lora import merge_lora, plain_name

    path = find(wanted, runs, "best.ckpt")
    source = load_model(read(path))
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


def read_config(path: Path) -> DictConfig:
    """The configuration in a run's `config.yaml`.

    Raises:
        ValueError: it cannot be read, or is none of a run.
    """
    try:
        config = OmegaConf.load(path)
    except (OSError, YAMLError) as error:
        raise ValueError(f"{path} cannot be read as a configuration ({error}).") from error
    if not isinstance(config, DictConfig) or "trainer" not in config:
        raise ValueError(f"{path} is not the configuration of a run; give the folder of a run of train.py.")
    return config


def find_saved(wanted: str, runs: Path) -> tuple[DictConfig, Path | None, dict[str, Any]]:
    """The configuration of the run that `resume` means, its last checkpoint's file and what that holds.

    A folder without a checkpoint is that of a run that was ended before its first one: its own `config.yaml` says how
    it had started, from the beginning or from the checkpoint of another run.

    Raises:
        ValueError: no such run.
    """
    config = Path(wanted).expanduser() / "config.yaml"
    if wanted != "last" and config.is_file() and not (config.parent / "checkpoints" / "last.ckpt").is_file():
        saved = read_config(config)
        path = find(saved.resume, runs, "last.ckpt") if saved.resume else None
        return saved, path, read(path) if path else {}
    path = find(wanted, runs, "last.ckpt")
    checkpoint = read(path)
    return OmegaConf.create(checkpoint["config"]), path, checkpoint


def resumed_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration of the run to go on with, changed only where the command line says so.

    Args:
        cfg: as composed from the command line, with `resume` set.
        overrides: the command line's overrides, e.g. `["resume=last", "trainer.max_epochs=20"]`.

    Returns:
        the saved configuration with these overrides, a folder of its own, and `resume` as the checkpoint's path, or
        null for a run that starts from the beginning.

    Raises:
        ValueError: no such run, or another experiment than the saved one.
    """
    typed = [override.lstrip("+~").split("=", 1)[0].split("@")[0] for override in overrides]
    runs = Path(cfg.run_dir).parent  # logs/runs/<name>
    saved, path, checkpoint = find_saved(cfg.resume, runs if {"experiment", "name"} & set(typed) else runs.parent)
    if "debug" in typed or ("experiment" in typed and cfg.name != saved.name):
        raise ValueError(
            f"{path or cfg.resume} is a run of experiment {saved.name} and goes on with its own configuration; leave "
            "out experiment= and debug=, and override single keys or groups instead, e.g. trainer.max_epochs=20 or "
            "trainer=gpu."
        )
    before = OmegaConf.to_container(saved.get("freeze") or OmegaConf.create(), resolve=True)
    for key in typed:
        if key != "experiment":
            place = key.replace("/", ".")
            OmegaConf.update(saved, place, OmegaConf.select(cfg, place), merge=False, force_add=True)
    if path and OmegaConf.to_container(saved.get("freeze") or OmegaConf.create(), resolve=True) != before:
        raise ValueError(
            f"{path} was trained under another freezing policy than freeze={cfg.freeze} says: its optimizer holds "
            "other parameters. Leave freeze out to go on, or start a new run from its weights alone: "
            f"{setting('start_from', path)} instead of resume=."
        )
    saved.run_dir, saved.resume = cfg.run_dir, path and str(path)
    if saved.logger and "wandb" in saved.logger:
        saved.logger.wandb.id = checkpoint.get("wandb_id")
    if path is None:
        print(f"{cfg.resume} holds no checkpoint: its configuration starts from the beginning, in {cfg.run_dir}")
    elif ended := why_ended(checkpoint, saved):
        reason, longer = ended
        print(f"{path}: {reason}. To train longer: python train.py {setting('resume', path)} {longer}")
    return saved


def why_ended(checkpoint: dict[str, Any], cfg: DictConfig) -> tuple[str, str] | None:
    """Why a run would train no step more from its last checkpoint, and a setting that makes it; None if it would."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    most, steps = OmegaConf.select(cfg, "trainer.max_epochs"), OmegaConf.select(cfg, "trainer.max_steps")
    if most is not None and 0 <= most <= epochs:
        return f"training has ended, after all of trainer.max_epochs={most}", f"trainer.max_epochs={2 * most}"
    if steps is not None and 0 <= steps <= checkpoint["global_step"]:
        return f"training has ended, after all of trainer.max_steps={steps}", f"+trainer.max_steps={2 * steps}"
    patience = OmegaConf.select(cfg, "callbacks.early_stopping.patience")
    states = [state for key, state in checkpoint["callbacks"].items() if key.startswith("EarlyStopping")]
    if patience is not None and states and states[0]["wait_count"] >= max(1, patience):
        return f"early stopping has ended training, after {epochs} epochs", "callbacks.early_stopping=null"
    return None
