"""From a checkpoint back to a model: find it, read it safely, rebuild it.

A checkpoint is self-contained: it holds the composed configuration as plain values.
"""

import os
import re
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from traceback import extract_tb
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thaw.run.claims import check_torch_zip
from thaw.run.command import LIBRARIES, cause_of
from thaw.run.command_line import setting
from thaw.run.config import build
from thaw.run.console import warn_once
from thaw.run.errors import UserError
from thaw.run.migrations import migrate
from thaw.run.places import confine
from thaw.run.record import replaced
from thaw.run.targets import check_plain, check_targets

RUNS = Path("logs", "runs")
UNITS = {"day": 86_400, "hour": 3_600, "minute": 60}
RUN_ID = re.compile(r"(?!\.)[^/\\$\x00-\x1f\x7f]{1,1000}")  # part of a path, of an address and of a configuration
SLACK = 2**30  # bytes of a model beyond its file


def find_checkpoint(wanted: str, name: str, experiment: str = "") -> Path:
    """The checkpoint file that a setting such as `resume`, `start_from` or `ckpt` means.

    Args:
        wanted: a checkpoint file, a run's folder, or `last`: the newest run in `logs/runs` that has such a file. Jobs
            of sweeps and searches lie elsewhere, so that only their own folders name them.
        name: of the file in a run's folder, `last.ckpt` or `best.ckpt`.
        experiment: that `last` has to be a run of; empty for any.

    Raises:
        UserError: there is no such checkpoint.
    """
    if wanted == "last":
        runs = RUNS / experiment
        found = max(runs.glob(f"**/checkpoints/{name}"), key=lambda path: path.stat().st_mtime, default=None)
        if found is None:
            raise UserError(
                f"`last` means the newest run in {runs}, but none there has a {name}; give a run's folder (that of a "
                "sweep's job, too) or a .ckpt file."
            )
        return found.resolve()
    path = Path(wanted).expanduser()
    if path.is_dir():
        file = path / "checkpoints" / name
        if file.is_file():
            return file.resolve()
        if (path / "backbone.safetensors").is_file():
            raise UserError(pretraining_hint(path))
        raise UserError(f"{path} holds no checkpoints/{name}; give a run folder that has one, or a .ckpt file.")
    if not path.is_file():
        raise UserError(f"{wanted!r} is neither `last`, a run folder nor a checkpoint file; give one of these.")
    return path.resolve()


def pretraining_hint(run_dir: Path) -> str:
    weights = os.path.relpath(run_dir / "backbone.safetensors")
    return (
        f"{run_dir} is a pretraining run, whose model has no classes. First train a classifier on the backbone that it "
        f"wrote: python train.py experiment=vit_finetune {setting('backbone.weights', weights)}"
    )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's tensors and plain values; pickled code in it is not run.

    Raises:
        UserError: it is damaged, holds pickled code, or was not written by thaw.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a checkpoint that train.py wrote.")
    import torch  # takes a second, in which a wrong path is told

    try:
        if is_zip := zipfile.is_zipfile(path):
            check_torch_zip(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not is_zip:  # an old format of torch, without checksums
            raise zipfile.BadZipFile
    except Exception as error:  # torch raises many classes for files that are not its own
        raise UserError(f"{path} {what_is_wrong(path, error)}") from error
    parts = [checkpoint.get(key) for key in ("config", "state_dict")] if isinstance(checkpoint, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(
            f"{path} is not a checkpoint of thaw: it has no config and state_dict. Give one from train.py; weights "
            "alone are for backbone.weights=<file>."
        )
    return checkpoint


def read_checkpoint(path: Path, allow: Sequence[str] = ()) -> dict[str, Any]:
    """Load a checkpoint and check its configuration, in which `run_dir` becomes the folder where the file lies now.

    `allow` holds packages, modules or classes beside thaw's that the configuration may name.

    Raises:
        UserError: as `load_checkpoint`, or it names code that is not allowed.
    """
    checkpoint = load_checkpoint(path)
    commit = checkpoint["git_commit"] = str(checkpoint.get("git_commit", "unknown"))
    wandb_id, tracker_ids = checkpoint.setdefault("wandb_id", None), checkpoint.setdefault("tracker_ids", {})
    if wandb_id is not None and not is_run_id(wandb_id):
        raise UserError(
            f"{path}: wandb_id={wandb_id!r} is not the id of a W&B run; give a checkpoint that train.py wrote."
        )
    if not isinstance(tracker_ids, dict) or any(
        not isinstance(each, str) or "${" in each for each in tracker_ids.values()
    ):
        raise UserError(f"{path}: tracker_ids={tracker_ids!r} names no runs; give a checkpoint that train.py wrote.")
    checkpoint["tracker_ids"] = {kind: each for kind, each in tracker_ids.items() if is_run_id(each)}
    config, unfollowed = checked_config(checkpoint["config"], path, allow, commit)
    config = replaced(config, {"~/": os.path.join(Path.home(), "")})  # noqa: PTH118  (with a slash at its end)
    config["run_dir"] = str(run_folder(path))
    return checkpoint | {"config": config, "path": str(path), "unfollowed": unfollowed, "allow": list(allow)}


def is_run_id(value: Any) -> bool:
    return isinstance(value, str) and RUN_ID.fullmatch(value) is not None


def continue_logged(cfg: DictConfig, checkpoint: dict[str, Any]) -> None:
    """Let the loggers that keep runs by an id continue those of a checkpoint."""
    ids = {"wandb": checkpoint.get("wandb_id"), **checkpoint.get("tracker_ids", {})}
    elsewhere = " ".join(checkpoint.get("unfollowed", ()))  # where those runs are
    for kind in ("wandb", "mlflow", "trackio"):
        if cfg.logger and cfg.logger.get(kind):
            cfg.logger[kind].id = None if f"logger.{kind}.tracking_uri=" in elsewhere else ids.get(kind)


def checked_config(
    config: dict[str, Any], path: Path, allow: Sequence[str], commit: str
) -> tuple[dict[str, Any], list[str]]:
    """A configuration from a file, brought up to date and checked against the allow-list of `thaw.run.targets`.

    Also returns the settings that are not followed, see `thaw.run.places.confine`.
    """
    check_plain(config, path, allow)
    with understood(path, commit):
        config, changed = migrate(config, path, commit)
    config = {key: value for key, value in config.items() if key != "hydra"} | {"allow": []}  # typed alone
    check_targets(config, path, allow, commit)
    if changed:
        warn_once(f"{path} was written by commit {commit} of thaw. Taken from today's configs: {', '.join(changed)}.")
    return config, confine(config, allow)


@contextmanager
def understood(path: Path, commit: str) -> Iterator[None]:
    """Turn every error of a file that holds other values than a run's into a UserError; those of other code pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = cause_of(error)
        if isinstance(cause, UserError):
            raise cause from error
        own = str(Path(__file__).parents[1])
        if not all(each.filename.startswith((own, *LIBRARIES)) for each in extract_tb(cause.__traceback__)):
            raise
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise UserError(
            f"{path} cannot be rebuilt: {reason}. Commit {commit} wrote it; check that out to use it."
        ) from error


def origin(checkpoint: dict[str, Any]) -> str:
    """One line about a checkpoint that `read_checkpoint` returned: its file, run, age and validation accuracy."""
    path, config = Path(checkpoint["path"]), checkpoint["config"]
    overrides = shorten(str(config.get("overrides", "")), 60, placeholder=" ...")
    facts = [f"{config.get('name')} {overrides}".strip(), ago(time.time() - path.stat().st_mtime)]
    with understood(path, checkpoint["git_commit"]):
        states = [state for state in checkpoint.get("callbacks", {}).values() if state.get("monitor") == "val/acc"]
        if states and states[0]["best_model_score"] is not None:
            facts.append(f"best validation accuracy {float(states[0]['best_model_score']):.2%}")
    return f"checkpoint: {os.path.relpath(path)} ({', '.join(facts)})"


def ago(seconds: float) -> str:
    for unit, size in UNITS.items():
        if (count := int(seconds / size)) > 0:
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "less than a minute ago"


def run_folder(path: Path) -> Path:
    """The folder of the run that a checkpoint file lies in."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def what_is_wrong(path: Path, error: Exception) -> str:
    """Why torch could not read a checkpoint file, and the next step."""
    with path.open("rb") as file:
        start = file.read(4)
    is_zip = start == b"PK\3\4"
    if isinstance(error, UnpicklingError) and (start[:1] == b"\x80" or (is_zip and ends_as_zip(path))):
        code = re.search(r"GLOBAL (\S+)", str(error))
        return (
            f"holds pickled code{f' ({code[1]})' if code else ''}, which was not run; a checkpoint holds tensors and "
            "plain values. Give one that train.py wrote."
        )
    if start and not is_zip:
        return f"is not a checkpoint: it starts with {start!r}. Give a checkpoint that train.py wrote."
    damage = "is damaged" if ends_as_zip(path) else f"is cut off after {path.stat().st_size:,} bytes"
    whole = [name for name in ("best.ckpt", "last.ckpt") if name != path.name and is_whole(path.with_name(name))]
    instead = f"Beside it {whole[0]} is whole; give that one" if whole else "Give another checkpoint of the run"
    return f"{damage if start else 'is empty'}. {instead}."


def ends_as_zip(path: Path) -> bool:
    """Whether the end of a file is that of a zip file, so that it is not cut off."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # a damaged end
        return True


def is_whole(path: Path) -> bool:
    """Whether a file's checksums hold."""
    with suppress(OSError, UserError, zipfile.BadZipFile, zlib.error):
        check_torch_zip(path)
        return True
    return False


@contextmanager
def bounded(checkpoint: dict[str, Any], weights: str) -> Iterator[None]:
    """Stop a model that is built from a configuration as soon as it is far larger than its files are.

    Both have the same tensors, but a file may hold them in fewer bits, and published weights are resampled.
    """
    from torch.nn.modules.module import (
        register_module_buffer_registration_hook,
        register_module_parameter_registration_hook,
    )

    path, file = Path(checkpoint["path"]), Path(weights).expanduser()
    most = 4 * (path.stat().st_size + (file.stat().st_size if file.is_file() else 0)) + SLACK
    total = 0

    def count(_: Any, name: str, tensor: Any) -> None:
        nonlocal total
        total += 0 if tensor is None else tensor.nbytes
        if total > most and weights != "hub":  # whose size is not known yet
            raise UserError(
                f"{path} describes a model of more than {total / 1e9:.1f} GB, which its weights do not fill; give a "
                "checkpoint that train.py wrote."
            )

    hooks = [
        register(count)
        for register in (register_module_parameter_registration_hook, register_module_buffer_registration_hook)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def load_model(checkpoint: dict[str, Any]) -> Any:
    """Rebuild the model of a checkpoint that `read_checkpoint` returned, in eval mode.

    A checkpoint that holds only the trained weights refers to the frozen rest, which is then read from the
    `backbone.weights` of its configuration.

    Raises:
        UserError: the frozen weights cannot be found or are others, some weights are not finite, or the model is of
            another version of the code.
    """
    path = Path(checkpoint["path"])
    with understood(path, checkpoint["git_commit"]):
        cfg = OmegaConf.create(checkpoint["config"])
        if "frozen" not in checkpoint and "weights" in cfg.backbone:
            cfg.backbone.weights = "none"
        if "compile" in cfg.model:
            cfg.model.compile = False  # takes longer than an evaluation
        weights = cfg.backbone.get("weights", "none")
        if weights not in ("none", "bundled", "hub") and not Path(weights).expanduser().is_file():
            raise UserError(
                f"{path} refers to frozen weights in {weights}, which is not a file here. "
                "Say where they lie now: weights=<file>, for train.py and probe.py backbone.weights=<file>."
            )
        with bounded(checkpoint, weights):
            model = build(cfg.model)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"], strict=True)
    state = model.state_dict()
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{path} holds weights that are not finite ({len(broken)} of {len(state)} tensors, e.g. {broken[0]}), as "
            "after training that diverged; give another checkpoint."
        )
    return model.eval()
