"""The state of a queue as lines; on a terminal the lines of running jobs are kept up to date."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group as Lines
from rich.live import Live
from rich.table import Column, Table

from thaw.run.console import console, plural, redraws, say_fitted
from thaw.run.files import read_json
from thaw.run.jobs import FAILURE, SUMMARY
from thaw.sweeps.cells import about_left, shortened

EPOCH = re.compile(r"epoch (\d+)/(\d+).*")  # an epoch's line of thaw.callbacks.progress.RunProgress
TAIL = 4000  # bytes at the end of a log that are searched for it
NAME_WIDTH = 32  # columns of a running job's name


class Status:
    """Prints when jobs start and end, and on a terminal the progress of each."""

    def __init__(self, total: int) -> None:
        self.total, self.over, self.ran = total, 0, 0  # jobs in all, those that are over, and those that ran here
        self.started_at, self.updated = time.monotonic(), 0.0
        self.can_redraw = redraws(console())
        self.live = Live(console=console(), auto_refresh=False, transient=True)

    def __enter__(self) -> "Status":
        if self.can_redraw:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def started(self, name: str, kind: str, units: Sequence[str]) -> None:
        if not self.can_redraw:
            self.say_job("", f"{shortened(name)}: starts on {units_text(kind, units)}")

    def ended(self, name: str, outcome: str, seconds: float | None = None) -> None:
        self.over += 1
        if seconds is not None:
            self.ran += 1
            outcome += f" ({seconds:.0f} s)"
        self.say_job(f"{self.over}/{self.total}", f"{shortened(name)}: {outcome}")

    def say_job(self, place: str, text: str) -> None:
        width = 2 * len(str(self.total)) + 1
        row = Table.grid(Column(justify="right", width=width), Column(overflow="fold"), padding=(0, 1, 0, 0))
        row.add_row(place, text)
        say_fitted(row)

    def show(self, jobs: Sequence[tuple[str, str, Sequence[str], float, Path]]) -> None:
        """Update the lines of the running jobs, at most twice a second.

        `jobs` are name, `core` or `gpu`, their numbers, seconds so far and log file of each.
        """
        if not self.can_redraw or time.monotonic() - self.updated < 0.5:
            return
        self.updated = time.monotonic()
        columns = Column(max_width=NAME_WIDTH), Column(), Column(justify="right"), Column(ratio=1)
        table = Table.grid(*columns, padding=(0, 2, 0, 0), expand=True)
        for column in table.columns:
            column.no_wrap, column.overflow = True, "ellipsis"
        epochs = [last_epoch_line(log) for *_, log in jobs]
        for (name, kind, units, seconds, _), epoch in zip(jobs, epochs, strict=True):
            table.add_row(f"  {shortened(name)}", units_text(kind, units), f"{seconds:.0f} s", epoch)
        done = sum(int(found[1]) / int(found[2]) for found in map(EPOCH.match, epochs) if found)  # of the running ones
        left = about_left(self.started_at, self.ran + done, self.total - self.over - done)
        self.live.update(Lines(table, f"{self.over} of {plural(self.total, 'job')} ended{left}"), refresh=True)


def units_text(kind: str, units: Sequence[str]) -> str:
    """`GPUs 0,1` or `core 3`."""
    return f"{'GPU' if kind == 'gpu' else kind}{'s' * (len(units) > 1)} {','.join(units)}"


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
            lines = [found[0] for found in EPOCH.finditer(file.read().decode(errors="replace"))]
    except OSError:
        return ""
    return lines[-1] if lines else ""
