"""Faults of one process of a run, for configurations to name; as a script it runs a root script with forked ranks."""

import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L

from thaw.data.images import Source
from thaw.data.mnist import MNISTData

GRACE = 3.0  # seconds, in place of `ranks.RANK_GRACE`


def strike(how: str) -> None:
    """What befalls this process."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "loop":
        while True:
            sum(range(1000))
    elif how == "sleep":
        time.sleep(1000)
    elif how == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        bytearray(2**31)
    elif how == "worker":
        for worker in multiprocessing.active_children():
            worker.kill()
    else:
        raise RuntimeError("the fault of this test")


class Strike(L.Callback):
    """Strikes once, on one rank and in one phase of the run; where the phase has epochs, in epoch 1."""

    def __init__(self, rank: int, phase: str, how: str) -> None:
        self.rank, self.phase, self.how = rank, phase, how
        self.at("build")

    def at(self, phase: str, epoch: int = 1) -> None:
        if phase == self.phase and epoch == 1 and int(os.environ.get("LOCAL_RANK", 0)) == self.rank:
            self.phase = "over"
            strike(self.how)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.at("setup")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        compute = pl_module.backbone.prefix

        def prefix(*arguments: Any) -> Any:
            self.at("cache")
            return compute(*arguments)

        pl_module.backbone.prefix = prefix

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.at("step", trainer.current_epoch)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self.at("update", trainer.current_epoch)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.at("validation", trainer.current_epoch)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.at("checkpoint", trainer.current_epoch)

    def on_test_batch_start(self, *_: Any) -> None:
        self.at("test")


class FaultyDigits(MNISTData):
    """Digits whose reading strikes on one rank, given as FAULT_IN_DATA=<rank>,<how>."""

    def read(self) -> Source:
        rank, _, how = os.environ["FAULT_IN_DATA"].partition(",")
        if os.environ.get("LOCAL_RANK", "0") == rank:
            strike(how)
        return super().read()


if __name__ == "__main__":
    import processes
    from matplotlib.figure import Figure

    from thaw.run import ranks

    Figure.savefig = lambda self, path, **_: Path(str(path)).touch()  # type: ignore[method-assign,assignment]
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have children
    processes.FORKING = multiprocessing.get_context("fork")  # type: ignore[assignment]
    multiprocessing.set_start_method("fork", force=True)  # of workers that fetch data, as in a new process
    ranks.subprocess, ranks.RANK_GRACE = processes.FORKED, GRACE  # type: ignore[attr-defined]
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
