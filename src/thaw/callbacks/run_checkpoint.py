"""Checkpoints of a run that may resume in another folder, and how often they are written."""

import io
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from pydantic import Field
from torch import Tensor
from torch.utils._pytree import tree_map_only

from thaw.run.errors import UserError
from thaw.run.files import atomic, write_bytes


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, except that a resumed run copies the best checkpoint so far into its own folder.

    Otherwise the resumed run would forget the best score and keep a worse model as its best.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = Path(state_dict["best_model_path"])
        if not best.is_file():  # the best is chosen among the epochs to come
            return
        assert self.dirpath is not None
        moved = Path(self.dirpath) / best.name
        if moved != best:
            with atomic(moved) as part:
                shutil.copyfile(best, part)
        paths = {path: str(moved) for path in (str(best), state_dict["kth_best_model_path"])}
        super().load_state_dict(
            state_dict
            | {
                "dirpath": self.dirpath,
                "best_model_path": str(moved),
                "best_k_models": {paths.get(path, path): score for path, score in state_dict["best_k_models"].items()},
                "kth_best_model_path": paths[state_dict["kth_best_model_path"]],
                "last_model_path": "",
            }
        )


def ends_epoch(trainer: Any) -> bool:
    """Whether a checkpoint is saved at the end of an epoch, which a run that resumes from it does not end again."""
    epochs = trainer.fit_loop.epoch_progress.current
    return trainer.training and epochs.processed == epochs.ready


class PacedCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint file at most once in so many seconds, and delayed checkpoints when the loop ends.

    Writing takes longer than an epoch on cached features. A run that is interrupted or fails still writes its delayed
    checkpoints; one that is killed loses the work of these seconds. A load gets the newest checkpoint.

    Lightning's own writer puts a file into $TMPDIR first and copies it from there: a full $TMPDIR, or an end in the
    middle of the copy, leaves no file. With 0 `seconds` everything is written at once.
    """

    def __init__(self, seconds: Annotated[float, Field(ge=0)]) -> None:
        self.seconds = seconds
        self.started = time.monotonic()
        self.written: dict[str, float] = {}
        self.held: dict[str, dict[str, Any]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        check_readable(checkpoint)
        path = str(path)
        if time.monotonic() - self.written.get(path, self.started) >= self.seconds:
            self.held.pop(path, None)
            self.teardown()  # last.ckpt names best.ckpt, which may not be older
            write_checkpoint(checkpoint, path)
            self.written[path] = time.monotonic()
        else:  # a copy, as training continues
            self.held[path] = tree_map_only(Tensor, lambda tensor: tensor.to("cpu", copy=True), checkpoint)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        self.teardown()
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self.held.pop(str(path), None)
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        """Write the delayed checkpoints; Lightning calls this at the end of every loop, also after an exception."""
        held, self.held = self.held, {}
        for path, checkpoint in held.items():
            write_checkpoint(checkpoint, path)


def write_checkpoint(checkpoint: dict[str, Any], path: str) -> None:
    content = io.BytesIO()  # a write that fails inside torch's own writer may abort the process
    torch.save(checkpoint, content)
    write_bytes(content.getbuffer(), Path(path))


def check_readable(checkpoint: dict[str, Any]) -> None:
    """Raise UserError for the first value that `torch.load(..., weights_only=True)` would not read."""
    for place, kind in unreadable(checkpoint, "checkpoint"):
        raise UserError(
            f"{place} is of type {kind.__module__}.{kind.__qualname__}, with which the checkpoint could not be read "
            "again; it was not written. Allowed are tensors, numbers, strings, None, and dicts, lists and tuples of "
            "them. Give plain values to the optimizer, callback or module that keeps it: `_convert_: all` beside its "
            "_target_ in the YAML, or list(...), dict(...), float(...), str(...) in its code."
        )


def unreadable(value: Any, place: str) -> Iterator[tuple[str, type]]:
    """Place and type of each part of a value that a checkpoint cannot hold."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, inner in value.items():
            yield from unreadable(key, f"a key of {place}")
            yield from unreadable(inner, f"{place}[{key!r}]")
    elif kind in (list, tuple):
        for number, inner in enumerate(value):
            yield from unreadable(inner, f"{place}[{number}]")
    elif kind not in (Tensor, str, bytes, int, float, bool, type(None)) and not reads_back(value):
        yield place, kind


def reads_back(value: Any) -> bool:
    content = io.BytesIO()
    try:
        torch.save(value, content)
        content.seek(0)
        torch.load(content, weights_only=True)
    except Exception:  # pickling and unpickling fail in many ways
        return False
    return True
