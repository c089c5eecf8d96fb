"""Progress that can be read where it goes: a bar on a terminal, a line for each epoch in a log file."""

import logging
import sys
import time
import warnings
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar


def progress(refresh_rate: int) -> ProgressBar:
    """A tqdm bar if standard output is a terminal, else `EpochLines`.

    Args:
        refresh_rate: batches between two updates of the bar.
    """
    return TQDMProgressBar(refresh_rate=refresh_rate, leave=True) if sys.stdout.isatty() else EpochLines()


class EpochLines(ProgressBar):
    """Prints the metrics of an epoch in one line when it has been validated."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.started = 0.0

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.monotonic()  # a run resumed within an epoch starts no epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            metrics = self.get_metrics(trainer, pl_module)
            numbers = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "v_num")
            seconds = time.monotonic() - self.started
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {numbers}  ({seconds:.1f} s)", flush=True)


def quiet() -> None:
    """Silence what libraries say of themselves and of choices that are meant; its warnings of real trouble stay."""
    logging.getLogger("lightning").handlers.clear()  # Hydra's handlers print what is left, once
    for name in ("lightning.pytorch", "lightning.fabric", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for meant in (
        "does not have many workers",  # a batch is one indexing operation
        "in eval mode at the start of training",  # frozen
        "isinstance\\(treespec, LeafSpec\\)",
        "The number of training batches .* is smaller than the logging interval",
        "Checkpoint directory .* exists and is not empty",
        "The `srun` command is available",
        "The dirpath has changed",  # a resumed run has its own folder
        "`trainer.*` .* was configured so ",
        "could not find the monitored key",  # nothing was validated yet; later it is an error
    ):
        warnings.filterwarnings("ignore", f".*{meant}")
