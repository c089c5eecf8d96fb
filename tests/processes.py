"""Root scripts in processes that are forked after the imports: 0.3 s each, where a new Python takes 5 s."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from thaw.run.ranks import PARENT

FORKING = multiprocessing.get_context("forkserver")  # one server a pytest worker; it has no threads when it forks
FORKING.set_forkserver_preload(
    [
        *("lightning.pytorch", "timm", "torchmetrics", "wandb.apis.public", "matplotlib.figure", "jinja2"),
        *("thaw.classifier", "thaw.evaluation.pictures", "thaw.evaluation.assessment", "thaw.run.jobs"),
        *("thaw.callbacks.progress", "thaw.models.heads", "thaw.sweeps.search", "thaw.sweeps.run_table"),  # if there
    ]
)


class Forked:
    """`subprocess.Popen([sys.executable, <script>, ...])`, as far as thaw uses it."""

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: Any = None,
        start_new_session: bool = False,
        **_: Any,
    ) -> None:
        """`stdout` is an open file, which gets stderr too; None: the output goes to that of the test."""
        output = None if stdout is None else Path(stdout.name).absolute()
        settings = (list(map(str, command[1:])), cwd or Path.cwd(), dict(os.environ if env is None else env), output)
        self.process: BaseProcess = FORKING.Process(target=run, args=(*settings, start_new_session), daemon=True)
        self.process.start()
        self.pid, self.kill, self.terminate = self.process.pid, self.process.kill, self.process.terminate
        self.lock = threading.Lock()  # thaw waits in one thread and polls in another

    def poll(self) -> int | None:
        with self.lock:
            return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (timeout or 300)
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), until)
            time.sleep(0.01)
        return status


FORKED = SimpleNamespace(**(vars(subprocess) | {"Popen": Forked}))  # the module, for monkeypatch


def run(arguments: list[str], cwd: Path, environment: dict[str, str], output: Path | None, session: bool) -> None:
    """In the new process: what `python <arguments>` does."""
    import torch
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()  # of a forked process that forks
    if session:
        os.setsid()
    threading.Thread(target=end_with_parent, daemon=True).start()
    if output is not None:
        with output.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if os.isatty(1):
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, "utf-8", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    if PARENT in environment:
        os.environ[PARENT] = str(os.getppid())
    os.chdir(cwd)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = arguments
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    runpy.run_path(arguments[0], run_name="__main__")


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
