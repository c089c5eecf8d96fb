"""Progress that can be read where it goes: a bar on a terminal, a line for each epoch in a log file, logged values."""

import math
import sys
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar


def progress_bar(refresh_rate: int) -> ProgressBar:
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


class LogInterval(Callback):
    """Shortens `trainer.log_every_n_steps` to the optimizer steps of an epoch where these are fewer.

    Loggers then get losses and learning rates at least once an epoch.
    """

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches  # infinite for a stream
        trainer.log_every_n_steps = math.ceil(min(trainer.log_every_n_steps, steps))
