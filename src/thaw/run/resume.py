"""Resuming: find the run to resume, change its configuration as typed, and say whether it had ended."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from thaw.run.checkpoint import (
    RUNS,
    checked_config,
    continue_logged,
    find_checkpoint,
    origin,
    read_checkpoint,
    understood,
)
from thaw.run.command_line import override_key, setting
from thaw.run.console import say
from thaw.run.errors import UserError
from thaw.run.files import without_aliases
from thaw.run.folders import is_locked
from thaw.run.jobs import FAILURE, JOB, LAST_CHECKPOINT, SUMMARY
from thaw.run.places import READ, keep_from_downloading, reads, sends
from thaw.run.targets import targets


def read_config(path: Path, allow: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """The configuration in a run's `config.yaml`, if it names only code that is allowed, as `checked_config` does."""
    try:
        config = OmegaConf.create(without_aliases(path.read_text(encoding="utf-8")))
        if "trainer" not in config:
            raise UserError("it has no trainer")
    except (OSError, YAMLError, ValueError, RecursionError) as error:
        hint = "give the folder of a run of train.py"
        raise UserError(f"{path} cannot be read as a configuration of a run ({error}); {hint}.") from error
    values: Any = OmegaConf.to_container(config, resolve=False)
    checked, unfollowed = checked_config(values, path, allow, "unknown")
    return OmegaConf.create(checked), unfollowed


def find_saved(wanted: str, experiment: str, allow: Sequence[str]) -> tuple[DictConfig, Path | None, dict[str, Any]]:
    """The configuration of the run that `resume` means, its last checkpoint's file and content, with its `path`.

    A folder without a checkpoint is that of a run that ended before its first one: its own `config.yaml` says how it
    had started, from the beginning or from the checkpoint of another run.

    Raises:
        UserError: no such run.
    """
    folder = ended_early(experiment) if wanted == "last" else Path(wanted).expanduser()
    if folder is not None and folder.is_dir() and not (folder / LAST_CHECKPOINT).is_file():
        config = folder / "config.yaml"
        if config.is_file():
            saved, unfollowed = read_config(config, allow)
            path = find_checkpoint(str(saved.resume), "last.ckpt") if saved.get("resume") else None
            known = read_checkpoint(path, allow) if path else {"path": str(config)}
            return saved, path, known | {"unfollowed": unfollowed}
        if (folder / JOB).is_file():
            raise UserError(
                f"{folder} holds neither a checkpoint nor config.yaml: the run ended as soon as it had started. Type "
                "the command of that run again, or name another run: resume=<run folder>."
            )
    path = find_checkpoint(wanted, "last.ckpt", experiment)
    checkpoint = read_checkpoint(path, allow)
    return OmegaConf.create(checkpoint["config"]), path, checkpoint


def ended_early(experiment: str) -> Path | None:
    """The folder of the newest run in `logs/runs`, if it was cut off before its first checkpoint."""

    def newest_first(pattern: str) -> list[tuple[float, Path]]:
        return sorted(((path.stat().st_mtime, path) for path in (RUNS / experiment).glob(pattern)), reverse=True)

    saved, _ = next(iter(newest_first(f"**/{LAST_CHECKPOINT}")), (0.0, None))
    ends = (LAST_CHECKPOINT, SUMMARY, FAILURE, "lr_find.csv")
    for started, job in newest_first(f"**/{JOB}"):
        if started < saved:
            return None
        if not any((job.parent / name).is_file() for name in ends) and not is_locked(job.parent):
            return job.parent
    return None


def resumed_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration of the run that `cfg.resume` means, changed only where the command line says so.

    It has a folder of its own, and `resume` is the checkpoint's path, or null for a run that starts from the beginning.

    Raises:
        UserError: no such run, or another experiment or freezing policy than the saved one.
    """
    typed = {override_key(override) for override in overrides}
    experiment = cfg.name if {"experiment", "name"} & typed else ""
    saved, path, checkpoint = find_saved(cfg.resume, experiment, [*cfg.allow, *targets(cfg)])
    with understood(Path(checkpoint["path"]), checkpoint.get("git_commit", "unknown")):
        return changed_config(saved, path, checkpoint, cfg, overrides)


def changed_config(
    saved: DictConfig, path: Path | None, checkpoint: dict[str, Any], cfg: DictConfig, overrides: Sequence[str]
) -> DictConfig:
    """What `resumed_config` returns, of a run that is found; says which places it names, and whether it had ended."""
    typed = [override_key(override) for override in overrides]
    if "debug" in typed or ("experiment" in typed and cfg.name != saved.name):
        raise UserError(
            f"{checkpoint['path']} is a run of experiment {saved.name} and continues with its own configuration; leave "
            "out experiment= and debug=, and override single keys or groups instead, e.g. trainer.max_epochs=20 or "
            "trainer=gpu."
        )
    before = OmegaConf.to_container(saved.get("freeze") or OmegaConf.create(), resolve=True)
    for key in typed:
        if key != "experiment":
            place = key.replace("/", ".")
            OmegaConf.update(saved, place, OmegaConf.select(cfg, place), merge=False, force_add=True)
    if path and OmegaConf.to_container(saved.get("freeze") or OmegaConf.create(), resolve=True) != before:
        policy = " ".join(each for each in overrides if override_key(each).split(".")[0] == "freeze")
        raise UserError(
            f"{path} was trained under another freezing policy than {policy} says: its optimizer holds other "
            "parameters. Leave freeze out to resume, or start a new run from its weights alone: "
            f"{setting('start_from', path)} instead of resume=."
        )
    saved.run_dir, saved.resume, saved.allow = cfg.run_dir, path and str(path), cfg.allow
    if "data" not in typed and "data.dir" not in typed:
        keep_from_downloading(saved.data)
    say_places(saved, Path(checkpoint["path"]), checkpoint.get("unfollowed", ()), typed)
    continue_logged(saved, checkpoint)
    if path is None:
        folder = os.path.relpath(Path(checkpoint["path"]).parent)
        say(f"{folder} holds no checkpoint: its configuration starts from the beginning, in {cfg.run_dir}")
        return saved
    say(origin(checkpoint))
    if ended := why_ended(checkpoint, saved):
        reason, longer = ended
        say(f"{reason}. To train longer: python train.py {setting('resume', path)} {longer}")
    return saved


def say_places(cfg: DictConfig, file: Path, unfollowed: Sequence[str], typed: Sequence[str]) -> None:
    """Say which places a run's file names that are not typed, and which of them are not followed."""
    typed = [*typed, *(key for key in READ if key.partition(".")[0] in typed)]
    if named := [*reads(cfg, [*READ, "start_from", "distill"], typed), *sends(cfg, typed)]:
        say(f"{file} names {', '.join(named)}; type another value to change that")
    if left := [each for each in unfollowed if not {each.partition("=")[0], each.partition(".")[0]} & {*typed}]:
        say(f"{file} names {', '.join(left)}, which is not followed: a file does not decide where others are written")


def why_ended(checkpoint: dict[str, Any], cfg: DictConfig) -> tuple[str, str] | None:
    """Why a run would not train further from its last checkpoint, and a setting that makes it; None if it would."""
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
