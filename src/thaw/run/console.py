"""Printing never ends a program, whether the console lacks a character or its reader has left."""

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from thaw.run.files import write_errors

ESCAPES = "backslashreplace"  # in place of characters that the console's encoding lacks
EXPECTED_WARNINGS = (
    "does not have many workers",  # a batch is one indexing operation
    "in eval mode at the start of training",  # frozen
    "isinstance\\(treespec, LeafSpec\\)",
    "The number of training batches .* is smaller than the logging interval",
    "Checkpoint directory .* exists and is not empty",
    "The `srun` command is available",
    "The dirpath has changed",  # a resumed run has its own folder
    "`trainer.*` .* was configured so ",
    "could not find the monitored key",  # nothing was validated yet; later it is an error
)


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


def quiet_libraries() -> None:
    """Silence libraries' progress messages and warnings about deliberate choices; other warnings stay."""
    logging.getLogger("lightning").handlers.clear()  # Hydra's handlers print what is left, once
    for name in ("lightning.pytorch", "lightning.fabric", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}")
