"""A run that is killed at any moment resumes to the numbers of a run that was not; so do sweeps and comparisons.

Moments are counted in what a run does on the disk and in its steps (`self_kill.py`), and drawn by a seeded generator.
"""

import csv
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from fault_counts import sized
from PIL import Image
from processes import Forked
from test_resumed_runs import SPEED, assert_same_training

MARK = "THAW_TEST_OF_KILLS"  # in the environment of all processes of one try
KILL: list[tuple[int, float]] = [(signal.SIGKILL, 0.0)]  # signals, and seconds before each
TERM: list[tuple[int, float]] = [(signal.SIGTERM, 0.0)]
BOTH = [*TERM, (signal.SIGKILL, 0.05)]
ENDED = {signal.SIGKILL: (-9,), signal.SIGTERM: (-15, 143)}  # a shell says 143 for both
OWN_NUMBERS = ("seconds", "peak_memory_gb", "run_dir", "resumed_from", "overrides")  # of a run in summary.json

RUN = [
    *("data=folder", "data.image_size=28", "data.channels=1", "data.batch_size=16", "data.val_share=0.2"),
    *("data.test_share=0.2", "logger=[csv,wandb]", "logger.wandb.mode=offline", "trainer.log_every_n_steps=1"),
    *("trainer.max_epochs=3", "trainer.val_check_interval=0.5", "trainer.plugins.0.seconds=0", "freeze=last_blocks"),
    *("freeze.k=1", "backbone.arguments.drop_path_rate=0.2", "average=ema"),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 pictures of noise for each of three classes, of which each is brighter than the one before."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label in range(3):
        (folder / str(label)).mkdir()
        for number in range(32):
            noise = generator.integers(0, 60 * label + 60, (40, 40), dtype=np.uint8)
            Image.fromarray(noise).save(folder / str(label) / f"{number}.png")
    return folder


class Tries:
    """Programs that are killed: each try in a folder of its own."""

    def __init__(self, folder: Path, program: str, arguments: Sequence[str]) -> None:
        self.folder, self.program, self.arguments = folder, program, list(arguments)

    def run(self, name: str, *arguments: str, at: int | None = None, signals: Any = KILL) -> int:
        """The exit status of the program with these arguments, or with its own; killed at a moment, if there is one."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        plan = {"folder": str(folder), "at": at, "signals": signals, "log": str(folder / "moments.log")}
        killer = [str(ROOT / "tests" / "faults" / "self_kill.py"), json.dumps(plan)]
        program = [str(ROOT / self.program), *(arguments or self.arguments)]
        environment = {**os.environ, MARK: str(folder), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        with (folder / "output.log").open("ab") as output:
            command = [sys.executable, *killer, *(each.replace("<try>", str(folder)) for each in program)]
            process = Forked(command, cwd=ROOT, env=environment, stdout=output)
        status = process.wait(120)
        assert not orphans(folder), f"processes are left: {orphans(folder)}"
        return status

    def moments(self, name: str) -> list[str]:
        return (self.folder / name / "moments.log").read_text().splitlines()

    def output(self, name: str) -> str:
        return (self.folder / name / "output.log").read_text()


def orphans(folder: Path, seconds: float = 10.0) -> list[str]:
    """Commands of the processes that are left of a try after some seconds."""
    mark, end, found = f"{MARK}={folder}\0".encode(), time.monotonic() + seconds, [""]
    while found and time.monotonic() < end:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes() + b"\0":
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it has ended, or is another user's
                continue
        if found:
            time.sleep(0.02)
    return found


def checkpoints(*folders: Path) -> dict[str, dict[str, Any]]:
    """Of several folders of a run that went on, the newest of each name."""
    files = {path.name: path for folder in folders for path in (folder / "checkpoints").glob("*.ckpt")}
    return {name: torch.load(path, weights_only=True) for name, path in files.items()}


def rows(run_dir: Path) -> list[dict[str, str]]:
    """Of the metrics, as far as they have a value, without the speed."""
    with (run_dir / "csv" / "metrics.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    found = [{key: value for key, value in row.items() if value and key not in SPEED} for row in read]
    return [row for row in found if row.keys() - {"step", "epoch"}]


def numbers(run_dir: Path) -> dict[str, Any]:
    summary = json.loads((run_dir / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in OWN_NUMBERS}


def assert_same_run(whole: Path, *resumed: Path) -> None:
    """The same weights, metrics, numbers and predictions; `resumed` are the folders of one run, the last one ended."""
    expected, got = checkpoints(whole), checkpoints(*resumed)
    assert expected.keys() == got.keys()
    for name in expected:
        assert_same_training(expected[name], got[name], name)
    for key, value in numbers(whole).items():
        assert numbers(resumed[-1])[key] == value, key
    for one, other in zip_longest(rows(whole), rows(resumed[-1])):
        assert one == other
    table = Path("report", "predictions.csv")
    assert (whole / table).read_bytes() == (resumed[-1] / table).read_bytes()


def assert_whole_files(folder: Path) -> None:
    """Every file under its own name can be read."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda path: json.loads(path.read_text()),
        ".yaml": lambda path: yaml.safe_load(path.read_text()),
        ".ckpt": lambda path: torch.load(path, weights_only=True),
        ".npy": lambda path: np.load(path),
        ".png": lambda path: Image.open(path).load(),
    }
    for path in folder.rglob("*"):
        if path.suffix in readers and path.is_file() and not {"wandb", ".hydra"} & set(path.parts):
            try:
                readers[path.suffix](path)
            except Exception as error:
                pytest.fail(f"{path} is not whole: {error!r}")


def wandb_ids(*folders: Path) -> list[str]:
    """Of the W&B runs, in the order of their starts."""
    found = [path for folder in folders for path in (folder / "wandb").glob("offline-run-*") if not path.is_symlink()]
    return [path.name.split("-")[3] for path in sorted(found)]


@pytest.fixture
def killed(tmp_path: Path, pictures: Path, tiny_run: list[str]) -> Tries:
    tiny = [each for each in tiny_run if not each.startswith(("data.", "logger=", "validate"))]
    places = [f"data.dir={pictures}", "cache.dir=<try>/cache", "hydra.run.dir=<try>/run"]
    return Tries(tmp_path, "train.py", [*tiny, *RUN, *places])


def test_a_run(killed: Tries, tries: Callable[..., Any]) -> None:
    assert killed.run("whole") == 0, killed.output("whole")
    whole, moments = killed.folder / "whole" / "run", killed.moments("whole")
    assert_same_run(whole, whole)
    generator = random.Random(0)
    for fault, signals in {"SIGKILL at a random moment": KILL, "SIGTERM at a random moment": TERM}.items():
        with tries(fault, harm="lost") as attempt:
            for number in range(sized(2, 25)):
                at = generator.randrange(len(moments))
                with attempt(f"moment {at}: {moments[at]}"):
                    survive(killed, f"{signals[0][0].name} {at}", at, signals, in_its_folder=bool(number % 2))


def survive(killed: Tries, name: str, at: int, signals: list[tuple[int, float]], in_its_folder: bool) -> None:
    """Kill a run at a moment, and resume it."""
    whole = killed.folder / "whole" / "run"
    run, resumed = killed.folder / name / "run", killed.folder / name / "resumed"
    status = killed.run(name, at=at, signals=signals)
    assert_whole_files(run.parent)
    had_config, had_checkpoint = (run / "config.yaml").exists(), (run / "checkpoints" / "last.ckpt").exists()
    before = wandb_ids(run)
    assert status in (0, *ENDED[signals[0][0]]), status
    if in_its_folder:
        assert killed.run(name) == 0, killed.output(name)
        assert_same_run(whole, run)
        assert not list(run.parent.rglob("*.thaw.part"))
        after = wandb_ids(run)[len(before) :]
    else:
        status = killed.run(name, f"resume={run}", "hydra.run.dir=<try>/resumed")
        if not had_config:
            assert status == 1 and "command" in killed.output(name), killed.output(name)
            return
        assert status == 0, killed.output(name)
        assert_same_run(whole, run, resumed)
        after = wandb_ids(resumed)
    if had_checkpoint:
        assert set(before) == set(after)
