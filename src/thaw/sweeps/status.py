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
        self.total, self.over, self.updated = total, 0, 0.0
        self.width = 2 * len(str(total)) + 1
        self.console = Console(highlight=False, soft_wrap=True)
        self.can_redraw = self.console.is_terminal and not self.console.is_dumb_terminal
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Status":
        if self.can_redraw:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def started(self, name: str, kind: str, units: Sequence[str]) -> None:
        if not self.can_redraw:
            word = {"gpu": "GPU", "core": "core"}[kind] + "s" * (len(units) > 1)
            self.console.print(f"{'':{self.width}} {name}: starts on {word} {','.join(units)}", markup=False)

    def ended(self, name: str, outcome: str) -> None:
        self.over += 1
        self.console.print(f"{f'{self.over}/{self.total}':>{self.width}} {name}: {outcome}", markup=False)

    def show(self, jobs: Sequence[tuple[str, Sequence[str], float, Path]]) -> None:
        """Update the lines of the running jobs, at most twice a second.

        Args:
            jobs: name, GPUs or cores, seconds so far and log file of each.
        """
        if not self.can_redraw or time.monotonic() - self.updated < 0.5:
            return
        self.updated = time.monotonic()
        table = Table.grid(padding=(0, 2))
        for name, units, seconds, log in jobs:
            table.add_row(f"  {name}", f"on {','.join(units)}", f"{seconds:.0f} s", last_epoch_line(log))
        self.live.update(table, refresh=True)


def outcome_of(folder: Path) -> str:
    """How the job in a folder ended."""
    if (folder / SUMMARY).is_file():
        accuracy = read_json(folder / SUMMARY)["val/acc"]
        return "done" if accuracy is None else f"done, val/acc {accuracy:.2%}"
    failure = read_json(folder / FAILURE)
    return f"{failure['status']}: {failure['reason']}"


def last_epoch_line(log: Path) -> str:
    """The last line about an epoch in a log file."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = EPOCH.findall(file.read().decode(errors="replace"))
    except OSError:
        return ""
    return lines[-1] if lines else ""
