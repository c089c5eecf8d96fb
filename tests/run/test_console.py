"""A program ends as its work does, whatever becomes of what it prints."""

import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from thaw.run.console import LogLines, brief, console, progress, say, say_fitted

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from thaw.run.command import clear_errors
with clear_errors():
    for _ in range(20000):
        print("m\\u00fc \\u2500 \\udcfc", flush=True)
        print("m\\u00fc \\u2500 \\udcfc", file=sys.stderr)
    open(sys.argv[1], "w").write("done")
"""
PLACES = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def start(program: str, *arguments: object, **options: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("place", PLACES)
def test_characters_that_the_console_lacks(tmp_path: Path, place: str) -> None:
    done = start(PROGRAM, tmp_path / "m\u00fc", env=os.environ | PLACES[place], stdout=subprocess.PIPE, stderr=-1)
    out, err = done.communicate()
    assert done.returncode == 0 and (tmp_path / "m\u00fc").read_text() == "done"
    expected = {"cp1252": b"m\xfc \\u2500 \\udcfc", "ascii": b"m\\xfc \\u2500 \\udcfc"}
    first = expected.get(place, "m\u00fc \u2500 \\udcfc".encode())
    assert out.splitlines()[0] == err.splitlines()[0] == first


@pytest.mark.parametrize("reader", ["leaves", "is a full disk", "is closed"])
def test_nobody_reads(tmp_path: Path, reader: str) -> None:
    """`| head -1`, `> /dev/full`, `>&-`"""
    end = {"leaves": "2>&1 | head -1", "is a full disk": ">/dev/full 2>&1", "is closed": ">&- 2>&-"}[reader]
    (tmp_path / "program.py").write_text(PROGRAM)
    script = f"set -o pipefail; '{sys.executable}' '{tmp_path}/program.py' '{tmp_path}/done' {end}"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "") and (tmp_path / "done").read_text() == "done"


RESULTS = """
from thaw.run.command import clear_errors
from thaw.run.console import results
with clear_errors(), results() as file:
    for _ in range(20000):
        file.write("a line of results\\n")
"""


@pytest.mark.parametrize(("end", "status", "said"), [("| head -1", 141, ""), (">/dev/full", 1, "/dev/stdout cannot")])
def test_results_that_nobody_reads_end_the_program(end: str, status: int, said: str) -> None:
    """As other tools end: without a word where the reader has left, with an error where the disk is full."""
    script = f'set -o pipefail; "$0" -c "$1" {end}'
    ended = subprocess.run(["bash", "-c", script, sys.executable, RESULTS], capture_output=True, text=True)
    assert ended.returncode == status and "Traceback" not in ended.stderr
    assert said in ended.stderr if said else not ended.stderr


def test_every_program_starts_so() -> None:
    """A script of the root or of benchmarks that is not wrapped would die of a name that the console lacks."""
    for script in (
        *ROOT.glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        ROOT / "src" / "thaw" / "plan" / "__main__.py",
    ):
        text = script.read_text(encoding="utf-8")
        if "import thaw" not in text and "from thaw" not in text:  # a script that thaw is compared with
            continue
        assert "with clear_errors():" in text or "with lenient():" in text or "@command(" in text, script


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """thaw's logger, whose records are printed as configs/hydra/job_logging/lines.yaml says."""
    handler, logger, before = LogLines(stderr=False), logging.getLogger("thaw"), logging.root.handlers[:]
    logging.root.handlers[:] = [each for each in before if not isinstance(each, LogLines)]  # of a command run before
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)
    logging.root.handlers[:] = before


def test_one_of_many_runs_speaks_to_its_log_file(
    log: logging.Logger, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("a", "b")
    with caplog.at_level(logging.INFO):
        with brief():
            say("an epoch")
            say_fitted(table)
            log.info("a download")
            log.warning("careful")
            say("wrong", stderr=True)
        log.info("after")
        say_fitted(table)
    said = capsys.readouterr()
    assert said.out == "warning: careful\nafter\na  b\n" and said.err == "wrong\n"
    assert caplog.messages == ["an epoch", "a  b", "a download", "careful", "after"]


@pytest.mark.parametrize("both", [True, False])
def test_lines_of_both_streams_stay_apart_from_a_bar(both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    files = {False: Terminal() if both else io.StringIO(), True: Terminal()}
    consoles = {stderr: Console(file=file) for stderr, file in files.items()}
    monkeypatch.setattr("thaw.run.console.stream_console", consoles.__getitem__)
    assert (console(stderr=True) is console()) == both


def test_a_terminal_that_cannot_redraw_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thaw.run.console.LINE_SECONDS", 0.0)
    printed = {}
    for term in ("dumb", "xterm"):
        monkeypatch.setenv("TERM", term)
        out = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
        monkeypatch.setattr("thaw.run.console.stream_console", lambda _, out=out: out)
        with progress("features", 10) as advance:
            advance(5)
        printed[term] = out.file.getvalue()  # type: ignore[attr-defined]
    assert re.fullmatch(r"features: 5 of 10 images, about \d+ s left\n", printed["dumb"])
    assert "\x1b[" in printed["xterm"]
