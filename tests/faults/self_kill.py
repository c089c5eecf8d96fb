"""Runs a root script that sends itself signals at a chosen moment.    python self_kill.py <settings> train.py ...

A moment is the number of an event: a file or folder of the run is opened, renamed, made, removed or synced, or one of
`CALLS` is called. In what a run leaves on the disk, all moments between two events are the same.
"""

import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

CALLS = (
    *(("thaw.classifier", f"Classifier.{name}") for name in ("training_step", "validation_step", "test_step")),
    *(("thaw.data.decode", "open_picture"), ("thaw.freezing.features", "frozen_features"), ("os", "fsync")),
)
ON_DISK = ("open", "os.rename", "os.mkdir", "os.remove", "os.symlink", "os.truncate", "shutil.rmtree")


class Moments:
    """Counts the events of this process, and sends itself `signals`, each with a pause before it, at number `at`.

    Without `at`, the events are written to `log` at the end of the process, a line each.
    """

    def __init__(self, folder: str, at: int | None, signals: list[tuple[int, float]], log: str) -> None:
        self.folder, self.at, self.signals, self.log = folder, at, signals, Path(log)
        self.seen: list[str] = []
        self.lock = threading.RLock()

    def event(self, what: str) -> None:
        with self.lock:
            self.seen.append(what)
            if len(self.seen) - 1 != self.at:
                return
        self.log.write_text(f"{what}\n")
        for number, pause in self.signals:
            if pause:
                threading.Thread(target=send_later, args=(number, pause), daemon=True).start()
            else:
                os.kill(os.getpid(), number)

    def audit(self, name: str, args: tuple[Any, ...]) -> None:
        if name in ON_DISK and isinstance(args[0], str | os.PathLike):
            path = os.path.abspath(os.fsdecode(args[0]))  # noqa: PTH100
            if path.startswith(self.folder):
                self.event(f"{name} {os.path.relpath(path, self.folder)}")

    def watch(self, module: str, name: str) -> None:
        """Let a function be an event."""
        *owner, last = name.split(".")
        place = import_module(module)
        for part in owner:
            place = getattr(place, part)
        call: Callable[..., Any] = getattr(place, last)

        @wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.event(last)
            return call(*args, **kwargs)

        setattr(place, last, watched)


def send_later(number: int, pause: float) -> None:
    time.sleep(pause)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    moments = Moments(**settings)
    for place in CALLS:
        moments.watch(*place)
    sys.addaudithook(moments.audit)
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if moments.at is None:
            moments.log.write_text("\n".join(moments.seen))
