"""A page's blocks of code are run in a copy of the checkout, and their output is compared with the page."""

import os
import re
import shutil
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import nbformat
import pytest
from markdown_pages import PLACEHOLDER, Block, Page
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

PREAMBLE = """
set -eu -o pipefail
trap 'echo "this command failed: $BASH_COMMAND" >&2' ERR
pip() { :; }
python() {
  if [ "$1" != serve.py ]; then command python "$@"; return; fi
  command python "$@" >serve.log 2>&1 &
  for _ in $(seq 600); do
    if grep -q http:// serve.log; then return; fi
    if ! kill -0 $! 2>/dev/null; then cat serve.log; return 1; fi
    sleep 0.1
  done
  cat serve.log
  return 1
}
"""


class PageRun:
    """The blocks of a page are run in a copy of the checkout, in their order."""

    def __init__(self, page: Page, place: Path) -> None:
        self.page, self.place = page, place
        self.groups: list[int] = []  # processes that may have left servers behind
        self.output = place.parent / "output"
        self.preamble = place.parent / "preamble"
        self.preamble.write_text(PREAMBLE)
        self.kernels = ExitStack()
        self.client: NotebookClient | None = None
        no_server = "http://127.0.0.1:9"  # so that pages show what they show without a network
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {
            "BASH_ENV": str(self.preamble),
            "PATH": f"{place / '.venv' / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(place / "src"),
            "HOME": str(place.parent),
            "COLUMNS": "80",
            "HF_HUB_OFFLINE": "1",
            **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), no_server),
            **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost"),
        }

    def run(self) -> None:
        try:
            for block in self.page.blocks:
                for setup in block.setup:
                    self.shell(setup, block.line)
                if not block.not_run:
                    self.run_block(block)
        finally:
            self.kernels.close()
            for group in self.groups:
                if subprocess.run(["pgrep", "-g", str(group)], capture_output=True).returncode == 0:
                    os.killpg(group, signal.SIGKILL)

    def run_block(self, block: Block) -> None:
        if block.file:
            path = self.place / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.language == "python":
            self.python(block)
        elif block.language == "bash":
            self.shell(block.text, block.line)
        elif block.language == "console":
            for line, command, expected in block.steps:
                printed = self.shell(command, line, must_work=False)
                if problem := difference(expected, printed.splitlines()):
                    self.fail(line, f"$ {command}\n{problem}")

    def fail(self, line: int, problem: str) -> None:
        __tracebackhide__ = True
        pytest.fail(f"{self.page.path}:{line}: {problem}", pytrace=False)

    def shell(self, text: str, line: int, must_work: bool = True) -> str:
        """Run a script of bash; returns what it prints."""
        __tracebackhide__ = True
        for each in set(PLACEHOLDER.findall(text)):
            text = text.replace(each, self.filled_in(each, line))
        with self.output.open("w") as output:  # a file, which a server may keep open
            process = subprocess.Popen(
                ["bash", "-c", text],
                cwd=self.place,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.groups.append(process.pid)
            status = process.wait(timeout=1800)
        printed = self.output.read_text(encoding="utf-8", errors="replace").replace(f"{self.place}/", "")
        if status and must_work:
            self.fail(line, f"{text.strip()}\nends with status {status} and prints\n{printed}")
        return printed

    def filled_in(self, placeholder: str, line: int) -> str:
        runs = [path.parent for path in self.place.glob("logs/runs/**/checkpoints")]
        sweeps = [path for path in self.place.glob("logs/sweeps/*") if path.is_dir()]
        known = {"<run folder>": runs, "<run>": runs, "<sweep folder>": sweeps, "<sweep>": sweeps}
        if not known.get(placeholder):
            self.fail(
                line, f"{placeholder} means nothing here; there is {', '.join(key for key in known if known[key])}"
            )
        newest = max(known[placeholder], key=lambda path: path.stat().st_mtime)
        return newest.name if placeholder in ("<run>", "<sweep>") else str(newest.relative_to(self.place))

    def python(self, block: Block) -> None:
        """Python of a page is one session."""
        __tracebackhide__ = True
        if self.client is None:
            resources = {"metadata": {"path": str(self.place)}}
            self.client = NotebookClient(nbformat.v4.new_notebook(), timeout=1800, resources=resources)
            self.kernels.enter_context(self.client.setup_kernel(env=self.environment))
        self.client.nb.cells = [cell := nbformat.v4.new_code_cell(block.text)]
        try:
            self.client.execute_cell(cell, 0, store_history=False)
        except CellExecutionError as error:
            self.fail(block.line, str(error))


MASKED = (  # differs from run to run
    r"\d{4}-\d\d-\d\d([_ T][\d:.-]+)?",
    r"offline-run-\S+",
    r"\b(?=[a-z]*\d)[0-9a-f]{7,64}\b",
    r"[\d,.]+ ?(us|ms|s|seconds?|min|minutes?|h|hours?|(\w+ )?(images|it|requests|steps)?/s)(?=\W|$)",
    r"[\d,.]+ ?(bytes|[kKMGT]i?B)\b",
    r"[ -]{2,}",
)
NUMBER = re.compile(r"(\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)")


def difference(expected: list[str], printed: list[str]) -> str | None:
    """What is wrong with what was printed; `...` stands for any lines, or within a line for any text."""
    start, is_open = 0, False
    for line in [each for each in expected if each.strip()]:
        if line.strip() == "...":
            is_open = True
            continue
        rest = [number for number in range(start, len(printed)) if printed[number].strip()]
        found = next((number for number in (rest if is_open else rest[:1]) if alike(line, printed[number])), None)
        if found is None:
            return f"prints no line like\n    {line}\nat the place of\n    " + "\n    ".join(printed[start:])
        start, is_open = found + 1, False
    if not is_open and any(line.strip() for line in printed[start:]):
        return "prints more than the page shows (a line of ... stands for lines left out):\n    " + "\n    ".join(
            printed[start:]
        )
    return None


def alike(expected: str, printed: str) -> bool:
    """Whether two lines say the same: times, sizes, dates and ids may differ, numbers with a point by a tenth."""
    for pattern in MASKED:
        expected, printed = re.sub(pattern, " ", expected), re.sub(pattern, " ", printed)
    if "..." in expected:
        return re.fullmatch(".*".join(map(re.escape, expected.strip().split("..."))), printed.strip()) is not None
    parts = [NUMBER.split(line.strip()) for line in (expected, printed)]
    return len(parts[0]) == len(parts[1]) and all(map(near, *parts))


def near(expected: str, printed: str) -> bool:
    if NUMBER.fullmatch(expected) and NUMBER.fullmatch(printed) and "." in expected:
        wanted, got = (float(number.replace(",", "")) for number in (expected, printed))
        return abs(wanted - got) <= abs(wanted) / 10
    return expected == printed


def run_page(page: Page, checkout: Path, folder: Path) -> None:
    __tracebackhide__ = True
    shutil.copytree(checkout, folder / "thaw", symlinks=True)
    PageRun(page, folder / "thaw").run()
