"""serve.py in a process of its own, and what it holds."""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT
from processes import Forked

CHECKPOINT = ROOT / "tests" / "checkpoints" / "linear_probe.ckpt"


class Served(NamedTuple):
    process: Forked
    address: str
    log: Path  # stdout and stderr

    @property
    def proc(self) -> Path:
        return Path(f"/proc/{self.process.pid}")

    def megabytes(self) -> float:
        """Of memory that it has."""
        found = re.search(r"VmRSS:\s+(\d+) kB", (self.proc / "status").read_text())
        return int(found[1]) / 1000 if found else 0.0

    def descriptors(self) -> int:
        """Open files and connections."""
        return len(list((self.proc / "fd").iterdir()))


@contextmanager
def started(folder: Path, *overrides: str) -> Iterator[Served]:
    """Start serve.py in `folder`; it must print nothing after its first lines."""
    log = folder / "printed"
    command = [sys.executable, str(ROOT / "serve.py"), "port=0", *overrides]
    with log.open("w") as output:
        process = Forked(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output)
    try:
        while "is ready; Ctrl-C stops it\n" not in (printed := log.read_text()):
            assert process.poll() is None, printed
            time.sleep(0.05)
        found = re.search(r"^page    (http://\S+)\nAPI     \1/docs$", printed, re.MULTILINE)
        assert found and f"loading {overrides[0].removeprefix('ckpt=')}\n" in printed, printed
        yield Served(process, found[1], log)
        assert log.read_text() == printed, "it says nothing more"
    finally:
        process.kill()
        process.wait()
