"""Progress that can be read where it goes: a line for each epoch, a bar on a terminal, logged values."""

import math
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from thaw.run.console import Bar, console, redraws, say

FIRST = ("train/loss", "val/loss", "val/acc")  # of the metrics in an epoch's line
SLOWEST_SECONDS = 1.0  # at most between two updates of the bar, if a batch has ended
FILE_SECONDS = 60.0  # between two lines about a long epoch, where there is no terminal


class RunProgress(ProgressBar):
    """Prints the metrics of an epoch in one line, and shows how far the run is: by a bar below, if on a terminal.

    Args:
        refresh_rate: batches between two updates of the bar; 0: no bar.
    """

    def __init__(self, refresh_rate: int) -> None:
        super().__init__()
        self.refresh_rate, self.enabled, self.validated = refresh_rate, True, False
        self.epoch_began = self.share = 0.0  # time, and how much of the run is done
        self.bar = Bar(FILE_SECONDS, "at most")

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def print(self, *args: Any, **_: Any) -> None:
        say(" ".join(map(str, args)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch_began, self.validated = time.monotonic(), False  # a run resumed within an epoch starts no epoch
        self.bar.began = None  # the sanity check is not part of the run
        self.share = share_of_run(trainer, 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch_began, self.validated = time.monotonic(), False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        total, done = trainer.num_training_batches, args[-1] + 1
        self.share = share_of_run(trainer, done / total)
        self.show(position(trainer), done, total, self.share)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        done, total = args[2] + 1, batches[args[3] if len(args) > 3 else 0]
        if trainer.state.fn == "fit":
            self.show(f"{position(trainer)}, validating", done, total, self.share)
        else:
            self.show("validating", done, total, done / total)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        done, total = args[2] + 1, trainer.num_test_batches[args[3] if len(args) > 3 else 0]
        self.show("testing", done, total, done / total)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            say(epoch_line(trainer, self.validated, time.monotonic() - self.epoch_began, console().width))

    def show(self, title: str, done: int, total: float, share: float) -> None:
        """Update the bar after `done` of `total` batches, which may be infinite; `share` of the run is done."""
        is_due = self.refresh_rate and done % self.refresh_rate == 0
        is_late = time.monotonic() - self.bar.drawn > SLOWEST_SECONDS
        if self.enabled and (is_due or is_late) and (self.refresh_rate or not redraws(console())):
            facts = f"{done:,} batches" if math.isinf(total) else f"{done:,}/{total:,} batches"
            self.bar.show(f"{title}  ", share, facts)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.bar.close()
        self.share = 0.0

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")


def position(trainer: Trainer) -> str:
    """Where a run is: `epoch 3/10`, or `epoch 3, step 120/5,000` where `max_steps` ends it."""
    last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
    steps = "" if trainer.max_steps == -1 else f", step {trainer.global_step:,}/{trainer.max_steps:,}"
    return f"epoch {trainer.current_epoch + 1}{last}{steps}"


def share_of_run(trainer: Trainer, of_epoch: float) -> float:
    """How much of a run is done at most: early stopping may end it sooner."""
    epochs = 0.0 if trainer.max_epochs in (None, -1) else (trainer.current_epoch + of_epoch) / trainer.max_epochs
    return max(epochs, 0.0 if trainer.max_steps == -1 else trainer.global_step / trainer.max_steps)


def epoch_line(trainer: Trainer, validated: bool, seconds: float, width: int) -> str:
    """The metrics of an epoch, those that matter most first, as many as fit into `width` columns."""
    logged, end = trainer.callback_metrics, f"  {seconds:.{2 if seconds < 1 else 1}f} s"
    others = sorted(trainer.progress_bar_metrics.keys() - set(FIRST), key=lambda name: (name[:4] != "val/", name))
    missing = len(str(trainer.max_epochs)) - len(str(trainer.current_epoch + 1))
    line = position(trainer) + " " * (missing if trainer.max_steps == -1 else 0)
    parts = [metric_text(name, float(logged[name])) for name in (*FIRST, *others) if name in logged]
    parts = [part for part in parts if validated or not part.startswith("val/")]
    for part in parts:
        if len(line) + 2 + len(part) + len(end) <= width:
            line += f"  {part}"
    return line + end


def metric_text(name: str, value: float) -> str:
    """`val/acc 98.80%`, `train/loss 0.0519`."""
    is_share = name.endswith("acc")
    number = f"{value:6.2%}" if is_share else f"{value:6.4f}" if abs(value) < 10 else f"{value:6.4g}"
    return f"{name} {number}"


class LogInterval(Callback):
    """Shortens `trainer.log_every_n_steps` to the optimizer steps of an epoch where these are fewer.

    Loggers then get losses and learning rates at least once an epoch.
    """

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches  # infinite for a stream
        trainer.log_every_n_steps = math.ceil(min(trainer.log_every_n_steps, steps))
