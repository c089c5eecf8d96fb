"""What a program prints: lines, tables and progress, in colour on a terminal and plain in a file.

Printing never ends a program, whether the console lacks a character or its reader has left.
"""

import io
import logging
import math
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, Progress
from rich.segment import Segment

from thaw.run.files import write_errors

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0  # between two lines about the progress of a task, where there is no terminal
FRAME_SECONDS = 0.1  # at least between two updates of a bar
UNBOUNDED = 10_000  # columns of a file
ESCAPES = "backslashreplace"  # in place of characters that the console's encoding lacks
EXPECTED_WARNINGS = (
    "does not have many workers",  # a batch is one indexing operation
    "in eval mode at the start of training",  # frozen
    "isinstance\\(treespec, LeafSpec\\)",
    "The number of training batches .* is smaller than the logging interval",
    "Checkpoint directory .* exists and is not empty",
    "The `srun` command is available",
    "The dirpath has changed",  # a resumed run has its own folder
    "callbacks used to create the checkpoint need",  # it may go on without early stopping
    "`trainer.*` .* was configured so ",
    "could not find the monitored key",  # nothing was validated yet; later it is an error
)


@cache
def stream_console(stderr: bool) -> Console:
    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


def console(stderr: bool = False) -> Console:
    """The console of all that this process prints, so that lines stay apart from a bar that is open on it.

    Where both standard streams are a terminal, one console prints for both: a bar on one is torn by lines of the other.
    """
    out, err = stream_console(False), stream_console(True)
    return err if stderr and not (out.file.isatty() and err.file.isatty()) else out


def redraws(out: Console) -> bool:
    """Whether a console can draw over what it has printed, as bars do; TERM=dumb says that it cannot."""
    return out.is_terminal and not out.is_dumb_terminal


def harmless(text: str) -> str:
    """Text in which control characters, which a terminal would obey, are shown as `\\x1b`."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: ascii(found[0])[1:-1], text)


def say(text: RenderableType = "", style: str | None = None, stderr: bool = False) -> None:
    """Print a line, above any open bar. The terminal wraps long ones, so that a path can be copied."""
    if LogLines.brief and not stderr:
        for line in as_text(text).splitlines():
            logging.getLogger("thaw").info(line)
    else:
        console(stderr).print(harmless(text) if isinstance(text, str) else text, style=style)


class Shown:
    """A table or a panel without control characters in its cells."""

    def __init__(self, content: RenderableType) -> None:
        self.content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for part in console.render(self.content, options):
            yield part if part.control else Segment(harmless(part.text), part.style)


def say_fitted(content: RenderableType) -> None:
    """Print a table or a panel in the width of the terminal; in a file it is as wide as it needs to be."""
    if LogLines.brief or not console().is_terminal:
        say(as_text(content))
    else:
        console().print(Shown(content), soft_wrap=False)


def as_text(content: RenderableType) -> str:
    """What `say_fitted` prints in a file."""
    file = io.StringIO()
    Console(file=file, highlight=False, markup=False, width=UNBOUNDED, color_system=None).print(Shown(content))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def plural(count: int, noun: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def some(names: Sequence[str], separator: str = ", ", most: int = 10) -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - most
    return separator.join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


@contextmanager
def brief() -> Iterator[None]:
    """Keep off the screen what one of many runs says or logs as information; it goes to the log file alone.

    Bars, warnings and errors stay.
    """
    LogLines.brief = True
    try:
        yield
    finally:
        LogLines.brief = False


@contextmanager
def progress(
    title: str, total: int, unit: str = "images", stderr: bool = False, hidden: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show how far a long task is, as a `Bar` does.

    Yields a function that adds to what is done. `hidden` is for processes whose progress another one shows.
    """
    bar, done = Bar(LINE_SECONDS, "about", stderr), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if not hidden and done < total:
            bar.show(f"{title}: ", done / total, f"{done:,} of {total:,} {unit}")

    try:
        advance(0)
        yield advance
    finally:
        bar.close()


class OneLine(Progress):
    """A progress bar that leaves room for the `^C` of the terminal, which would break a line of its whole width."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield Constrain(self.make_tasks_table(self.tasks), console().width - 2)


class Bar:
    """How far a task is: a bar on a terminal, elsewhere a line every `seconds`; `word` stands before the time left."""

    def __init__(self, seconds: float, word: str, stderr: bool = False) -> None:
        self.seconds, self.word, self.stderr = seconds, word, stderr
        self.bar: OneLine | None = None
        self.began: tuple[float, float] | None = None  # time and share at the first call
        self.drawn = 0.0  # when the last frame or line was

    def show(self, title: str, share: float, facts: str) -> None:
        """Draw a frame or print a line, if that is due; `share` of the task is done, from 0 to 1."""
        now, out, title = time.monotonic(), console(self.stderr), harmless(title)
        if self.began is None:
            self.began, self.drawn = (now, share), 0.0 if redraws(out) else now
        if now - self.drawn <= (FRAME_SECONDS if redraws(out) else self.seconds):
            return
        self.drawn = now
        if share > self.began[1]:
            left = (now - self.began[0]) * (1 - share) / (share - self.began[1])
            facts += f", {self.word} {duration(left)} left"
        if not redraws(out):
            say(title + facts, stderr=self.stderr)
            return
        if self.bar is None:
            columns = "{task.description}", BarColumn(bar_width=None), "{task.fields[facts]}"
            self.bar = OneLine(*columns, console=out, auto_refresh=False, transient=True, expand=True)
            self.bar.add_task(title, total=1.0, facts=facts)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], description=title, completed=share, facts=facts, refresh=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar = self.began = None


def duration(seconds: float) -> str:
    minutes, hours = math.ceil(seconds / 60), math.ceil(seconds / 3600)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 120 else f"{hours} h"


class LogLines(logging.Handler):
    """Prints log records as lines of the console: a warning with that word before it, information as it is."""

    brief = False  # see the function of this name

    def __init__(self, stderr: bool) -> None:
        super().__init__()
        self.stderr = stderr

    def emit(self, record: logging.LogRecord) -> None:
        warns = record.levelno >= logging.WARNING
        if warns or not self.brief:
            style = {logging.WARNING: "yellow", logging.ERROR: "red"}.get(record.levelno)
            level = f"{record.levelname.lower()}: " if warns else ""
            console(self.stderr).print(harmless(level + self.format(record)), style=style)


class LogFile(logging.FileHandler):
    """A log file whose failed writes are ignored, as `Stream` does: logging would print a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class Stream(io.FileIO):
    """A standard stream that ignores failed writes: the results of a run are files, not printed lines.

    Writes fail after the reader has left (`| head`), the terminal is closed, or the disk of a log is full.
    """

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


@contextmanager
def lenient() -> Iterator[None]:
    """Let standard output and standard error take every text and outlive their reader.

    Where file names are ASCII (LC_ALL=C PYTHONUTF8=0), the program starts again in Python's UTF-8 mode: Python would
    replace other characters by surrogates, which YAML and ONNX refuse.
    """
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = now = lenient_stream(sys.stdout), lenient_stream(sys.stderr)
    try:
        yield
    finally:
        for stream in now:
            stream.flush()
        sys.stdout, sys.stderr = before


def lenient_stream(stream: TextIO | None) -> TextIO:
    if stream is None:  # closed by whoever started the program
        return Path(os.devnull).open("w", errors=ESCAPES)
    try:
        raw = Stream(stream.fileno(), "w", closefd=False)
    except (OSError, AttributeError):  # the stream of a notebook or a test is not a file
        return stream
    lines = getattr(stream, "line_buffering", False) or getattr(stream, "write_through", False)
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, ESCAPES, line_buffering=lines)


@contextmanager
def results() -> Iterator[TextIO]:
    """Standard output for results: a failed write is an error. When the reader leaves, it ends as by SIGPIPE."""
    try:
        number = sys.stdout.fileno()
    except OSError:
        yield sys.stdout
        return
    sys.stdout.flush()
    options: Any = {"encoding": sys.stdout.encoding, "errors": ESCAPES, "newline": "", "closefd": False}
    try:
        with write_errors(Path("/dev/stdout")), os.fdopen(number, "w", **options) as exact:
            yield exact
    except BrokenPipeError:
        raise SystemExit(128 + signal.SIGPIPE) from None


@cache
def warn_once(line: str) -> None:
    """Log a warning once in this process, however often a file is read or a job of a sweep starts."""
    log.warning(line)


def quiet_libraries() -> None:
    """Silence libraries' progress messages and warnings about deliberate choices; other warnings stay."""
    logging.getLogger("lightning").handlers.clear()  # Hydra's handlers print what is left, once
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}")
