"""The state of a queue as lines; on a terminal the lines of running jobs are kept up to date."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from thaw.run.files import read_json
from thaw.run.jobs import FAILURE, SUMMARY

EPOCH = re.compile(r"epoch \d+/\d+.*")  # a line of thaw.callbacks.progress.EpochLines
TAIL = 4000  # bytes at the end of a log that are searched for it


class Status:
    """Prints when jobs start and end, and on a terminal the progress of each.

    Args:
        total: number of jobs.
    """

    def __init__(self, total: int) -> None:
        self.total, self.over = total, 0
        self.console = Console(highlight=False, soft_wrap=True)
        self.can_redraw = self.console.is_terminal and not self.console.is_dumb_terminal
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.shown = 0.0

    def __enter__(self) -> "Status":
        if self.can_redraw:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def started(self, name: str, kind: str, units: Sequence[str]) -> None:
        if not self.can_redraw:
            self.say(f"{'':{self.width}} {name}: starts on {units_in_words(kind, units)}")

    def ended(self, name: str, folder: Path, seconds: float) -> None:
        self.over += 1
        if (folder / SUMMARY).is_file():
            accuracy = read_json(folder / SUMMARY)["val/acc"]
            outcome = "done" if accuracy is None else f"done, val/acc {accuracy:.2%}"
        else:
            failure = read_json(folder / FAILURE)
            outcome = f"{failure['status']}: {failure['reason']}"
        self.say(f"{f'{self.over}/{self.total}':>{self.width}} {name}: {outcome} ({seconds:.0f} s)")

    def elsewhere(self, name: str, state: str) -> None:
        """Print that another process has started, or finished, a job meanwhile."""
        self.over += 1
        self.say(f"{f'{self.over}/{self.total}':>{self.width}} {name}: {state} in another process")

    def show(self, jobs: Sequence[tuple[str, Sequence[str], float, Path]]) -> None:
        """Update the lines of the running jobs, at most twice a second.

        Args:
            jobs: name, GPUs or cores, seconds so far and log file of each.
        """
        if not self.can_redraw or time.monotonic() - self.shown < 0.5:
            return
        self.shown = time.monotonic()
        table = Table.grid(padding=(0, 2))
        for name, units, seconds, log in jobs:
            table.add_row(f"  {name}", f"on {','.join(units)}", f"{seconds:.0f} s", last_epoch_line(log))
        self.live.update(table, refresh=True)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    @property
    def width(self) -> int:
        return 2 * len(str(self.total)) + 1


def units_in_words(kind: str, units: Sequence[str]) -> str:
    word = "GPU" if kind == "gpu" else "core"
    return f"{word}{'s' * (len(units) > 1)} {','.join(units)}"


def last_epoch_line(log: Path) -> str:
    """The last line about an epoch in a log file."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = EPOCH.findall(file.read().decode(errors="replace"))
    except OSError:
        return ""
    return lines[-1] if lines else ""
