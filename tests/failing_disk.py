"""Runs a root script on a disk that fails: python failing_disk.py '<JSON of Fault>' train.py <overrides>

Writes of C libraries fail, too: the limit on the size of files is the kernel's.
"""

import json
import os
import resource
import runpy
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NO_BYTE = 0
CHANGES = ("os.mkdir", "os.rename", "os.symlink", "os.link", "os.truncate")


@dataclass
class Fault:
    """What goes wrong when a program writes below `folder`.

    Args:
        folder: whose files count.
        code: of the error that opening a file for writing, making a folder or renaming raises; NO_BYTE: these work,
            but writing any byte to any file fails.
        first, last: number, from 0, of the first and the last of these operations that fail.
        log: gets a line for each operation.
    """

    folder: str
    code: int
    first: int
    last: int
    log: str

    def install(self) -> None:
        count, changing, log = 0, False, os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count, changing
            if changing or not (event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))):
                return
            name = arguments[0]
            if not isinstance(name, str | bytes | os.PathLike):
                return  # a descriptor
            path = os.path.abspath(os.fsdecode(name))  # noqa: PTH100  (pathlib would raise events)
            if not path.startswith(self.folder) or (event == "os.mkdir" and os.path.isdir(path)):  # noqa: PTH112
                return
            number, count = count, count + 1
            if self.code or count <= self.first + 1:
                os.write(log, f"{number} {event} {path}\n".encode())
            if self.code and self.first <= number <= self.last:
                raise OSError(self.code, os.strerror(self.code), path)
            if not self.code:
                failing = self.first <= number <= self.last
                limit = 0 if failing else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.addaudithook(watch)


def command(fault: Fault, *words: str) -> list[str]:
    return [sys.executable, __file__, json.dumps(asdict(fault)), *words]


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    sys.argv[:] = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    Fault(**settings).install()
    runpy.run_path(sys.argv[0], run_name="__main__")
