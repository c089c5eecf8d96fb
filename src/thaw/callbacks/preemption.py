"""A run that is stopped, by its cluster or by Ctrl-C, saves its state, and can be resumed from there."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch.distributed
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn

from thaw.run.console import say

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)  # of several, the last of these counts
CTRL_C = "\nCtrl-C: the run completes this step and saves it; a second Ctrl-C ends it at once."
CLOSING_SECONDS = 20.0  # for loggers: a cluster does not wait long


class Preemption(Checkpoint):
    """On a signal, completes the step, writes `checkpoints/last.ckpt` and ends the process; all ranks at the same step.

    SIGUSR1 and SIGUSR2 announce the end of the job's time (`#SBATCH --signal=USR1@90`, submitit): the job is put back
    into the queue. SIGTERM comes from `scancel`, `kill` and preemption, which requeues by itself: the process ends.
    SIGINT is Ctrl-C, which raises KeyboardInterrupt after that, and at once when it comes a second time.
    The same command in the same folder resumes from last.ckpt, with the same weights as a run without a signal.

    Ours rather than Lightning's handler of SIGUSR1, which saves in the middle of a step, another file for each signal.
    """

    def __init__(self, run_dir: str) -> None:
        self.last = Path(run_dir) / "checkpoints" / "last.ckpt"
        self.received = 0  # by this process: place of a signal in SIGNALS from 1, 0 for none
        self.agreed = 0  # by any rank; the same on all
        self.training = False
        self.step = 0
        self.whole = True  # no accumulated gradients that a checkpoint would lose
        self.submitit: Callable[[int, FrameType | None], Any] | None = None
        if "SUBMITIT_EXECUTOR" in os.environ:
            name = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")
            handler = signal.getsignal(signal.Signals[f"SIG{name}"])
            self.submitit = handler if callable(handler) else None  # in a process that submitit did not start

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen(trainer)  # the first pass over the frozen layers may be long

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training, self.step, self.whole = True, trainer.global_step, True
        self.listen(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self.listen(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen(trainer)

    def listen(self, trainer: Trainer) -> None:
        """Handle the signals from here on; `thaw.run.jobs.interruptible` restores the handlers before."""
        if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
            return

        def remember(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.received:
                raise KeyboardInterrupt
            self.received = max(self.received, 1 + SIGNALS.index(number))
            if not self.training:
                self.end(trainer, self.received)
            if number == signal.SIGINT and trainer.is_global_zero:  # in a thread: this one may be printing a line
                threading.Thread(target=say, args=(CTRL_C,)).start()

        saves_at_ctrl_c = self.training and signal.getsignal(signal.SIGINT) != signal.SIG_IGN  # ignored in background
        for number in SIGNALS if saves_at_ctrl_c else SIGNALS[1:]:
            signal.signal(number, remember)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.whole = trainer.global_step != self.step
        self.step = trainer.global_step
        self.agreed = self.received
        if trainer.world_size > 1:
            place = torch.tensor(self.received, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(place, torch.distributed.ReduceOp.MAX)
            self.agreed = int(place)
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        validates_next = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if self.ends_now(trainer) and not trainer.is_last_batch and not validates_next:
            trainer._logger_connector.update_train_step_metrics()  # else they come after this hook
            self.save(trainer)

    # Lightning can resume only from a checkpoint that is saved after the validation of a step or the end of an epoch,
    # where one of these follows. As a Checkpoint, this callback runs after those which use the metrics there.

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ends_now(trainer) and trainer.state.fn == TrainerFn.FITTING and not trainer.is_last_batch:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ends_now(trainer):
            self.save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training = False
        if self.received:  # since the last step; its checkpoint is written
            self.end(trainer, self.received)

    def ends_now(self, trainer: Trainer) -> bool:
        """Whether a signal has come, the step is complete and training would continue."""
        return self.agreed > 0 and self.whole and not trainer.should_stop  # no checkpoint knows that it should stop

    def save(self, trainer: Trainer) -> NoReturn:
        trainer.save_checkpoint(self.last)
        trainer.strategy.checkpoint_io.teardown()  # writes what PacedCheckpointIO holds back
        trainer.strategy.barrier()
        self.end(trainer, self.agreed)

    def end(self, trainer: Trainer, place: int) -> NoReturn:
        """Exit at once; for the signals that announce the end of the job's time, put it back into the queue before.

        After an exception, loggers and process groups would tidy up while the cluster ends their processes. At Ctrl-C
        they do: a sweep around the run has to print its own last lines.
        """
        number = SIGNALS[place - 1]
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        if trainer.is_global_zero:
            saved = f"step {trainer.global_step} is in {os.path.relpath(self.last)}"
            say(f"{name}: {saved if self.last.is_file() else 'the run has no checkpoint yet'}")
        if number == signal.SIGINT and trainer.is_global_zero:
            raise KeyboardInterrupt
        for each in SIGNALS:  # from now on they are the cluster's answer
            signal.signal(each, signal.SIG_IGN)
        status = 128 + number  # as a shell says that a signal ended a program
        if trainer.is_global_zero:
            closing = threading.Thread(target=close_loggers, args=(trainer.loggers,), daemon=True)
            closing.start()
            closing.join(CLOSING_SECONDS)
        if number in (signal.SIGUSR1, signal.SIGUSR2):
            if self.submitit is not None:
                try:
                    self.submitit(number, None)
                except SystemExit as leaving:  # on the first rank; its status may ask for the next try
                    status = int(leaving.code or 0)
            elif trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:
                requeue()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if trainer.is_global_zero else 0)  # an error would have the others killed


def close_loggers(loggers: list[Logger]) -> None:
    """Flush the loggers, and tell W&B, MLflow and trackio that the run is preempted, not failed."""
    for logger in loggers:
        logger.finalize("preempted")


def requeue() -> None:
    """Put the SLURM job that this process belongs to back into the queue."""
    job = os.environ["SLURM_JOB_ID"]
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        reason = f"SLURM job {job} was not requeued ({done.stderr.strip()})"
        step = "start the same command in the same run folder: it resumes from last.ckpt"
        say(f"error: {reason}. Submit it again with `#SBATCH --requeue`, or {step}.", stderr=True)
