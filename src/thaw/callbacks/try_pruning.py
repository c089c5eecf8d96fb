"""Ends a try of a comparison that has fallen behind an earlier one of the same policy."""

import math
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from thaw.run.errors import RunPrunedError
from thaw.run.files import read_json, write_json
from thaw.run.values import Probability

CURVE = "val_curve.json"  # in a run's folder: epoch -> best validation accuracy so far
STANDARD_ERRORS = 2.0  # two equally good tries are rarely farther apart


def is_behind(accuracy: float, reference: float, images: int) -> bool:
    """Whether an accuracy on so many images is lower than another one by more than chance explains.

    The standard error of the difference is that of two independent samples; the images are the same, so that it is
    less, and good tries are spared.
    """
    mean = (accuracy + reference) / 2
    return reference - accuracy > STANDARD_ERRORS * math.sqrt(2 * mean * (1 - mean) / images)


class TryPruning(Callback):
    """Writes the best validation accuracy up to each epoch, and compares it with that of a finished run, if named.

    Whether a try is pruned is a function of the two curves, so that it does not depend on what else runs, and is the
    same after an interruption.

    Args:
        run_dir: the run's folder, gets `val_curve.json`.
        reference: the name of the finished run's folder, beside this one; None prunes nothing.
        after: share of the epochs that every try trains.
    """

    def __init__(self, run_dir: str, reference: str | None, after: Probability) -> None:
        self.file = Path(run_dir) / CURVE
        self.reference = Path(run_dir).parent / reference / CURVE if reference else None
        self.after = after
        self.best: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.best = read_json(self.file) if trainer.ckpt_path and self.file.is_file() else {}

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if (
            trainer.state.fn != TrainerFn.FITTING
            or trainer.sanity_checking
            or "val/acc" not in trainer.callback_metrics
        ):
            return
        epoch, accuracy = trainer.current_epoch, float(trainer.callback_metrics["val/acc"])
        earlier = [best for number, best in self.best.items() if int(number) <= epoch]
        self.best[str(epoch)] = max([accuracy, *earlier])
        if trainer.is_global_zero:  # before checkpoints are saved, which are the last callbacks
            write_json(self.best, self.file)

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        epoch, epochs = trainer.current_epoch, trainer.max_epochs or 0
        if self.reference is None or epoch + 1 < self.after * epochs or epoch + 1 >= epochs:
            return
        reference = read_json(self.reference).get(str(epoch))
        own, images = self.best.get(str(epoch)), len(trainer.datamodule.split_dataset("val"))
        if own is not None and reference is not None and is_behind(own, reference, images):
            raise RunPrunedError(
                f"after {epoch + 1} of {epochs} epochs val/acc was {own:.2%}, that of the best try before it "
                f"{reference:.2%}"
            )
