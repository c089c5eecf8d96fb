"""Seconds of the parts of a command, from the start of its process."""

import os
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path


class Stopwatch:
    """Adds up the seconds of named parts. A part that starts within another one pauses it.

    The first part runs from the start of the process, on systems that say when that was.
    """

    def __init__(self, first: str) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.parts = [first]
        self.since = time.monotonic()
        with suppress(OSError, AttributeError):  # only Linux
            ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine started
            age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
            self.since -= age

    def lap(self) -> None:
        now = time.monotonic()
        self.seconds[self.parts[-1]] += now - self.since
        self.since = now

    def start(self, part: str) -> None:
        self.lap()
        self.parts.append(part)

    def stop(self) -> None:
        self.lap()
        self.parts.pop()

    def follow(self, part: str) -> None:
        """End the outermost part, and begin another one in its place."""
        self.lap()
        self.parts[0] = part


STOPWATCH = Stopwatch("start of Python, composing")
