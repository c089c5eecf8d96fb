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
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, needs
from fault_counts import FULL, sized
from PIL import Image
from processes import Forked
from test_resumed_runs import SPEED, assert_same_training

MARK = "THAW_TEST_OF_KILLS"  # in the environment of all processes of one try
KILL: list[tuple[int, float]] = [(signal.SIGKILL, 0.0)]  # signals, and seconds before each
TERM: list[tuple[int, float]] = [(signal.SIGTERM, 0.0)]
BOTH = [(signal.SIGKILL, 0.05), *TERM]
FAULTS = {  # how often each is tried
    "SIGKILL at a random moment": (KILL, sized(1, 12)),
    "SIGTERM at a random moment": (TERM, sized(1, 9)),
    **({"SIGTERM, and SIGKILL 50 ms later": (BOTH, 4)} if FULL else {}),
}
ENDED = {signal.SIGKILL: (-9,), signal.SIGTERM: (-15, 143)}  # a shell says 143 for both
OWN_NUMBERS = ("seconds", "peak_memory_gb", "checkpoint_mb", "run_dir", "resumed_from", "overrides", "git_commit")

RUN = [
    *("data=folder", "data.image_size=28", "data.channels=1", "data.batch_size=16", "data.val_share=0.2"),
    *("data.test_share=0.2", "logger=[csv,wandb]", "logger.wandb.mode=offline", "trainer.log_every_n_steps=1"),
    *("trainer.max_epochs=3", "trainer.plugins.0.seconds=0", "freeze=last_blocks"),
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
        (folder / "logs" / "runs").mkdir(parents=True, exist_ok=True)
        killer = [str(ROOT / "tests" / "faults" / "self_kill.py"), json.dumps(plan)]
        program = [str(ROOT / self.program), *(arguments or self.arguments)]
        environment = {**os.environ, MARK: str(folder), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        with (folder / "output.log").open("ab") as output:
            command = [sys.executable, *killer, *(each.replace("<try>", str(folder)) for each in program)]
            process = Forked(command, cwd=folder, env=environment, stdout=output)
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
        ".yaml": lambda path: yaml.load(path.read_text(), yaml.CSafeLoader),
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
def tiny(tiny_run: list[str]) -> list[str]:
    return [each for each in tiny_run if not each.startswith(("logger=", "validate"))]


@pytest.fixture
def killed(tmp_path: Path, pictures: Path, tiny: list[str]) -> Tries:
    places = [f"data.dir={pictures}", "cache.dir=<try>/cache", "hydra.run.dir=<try>/run"]
    return Tries(tmp_path, "train.py", [*(each for each in tiny if not each.startswith("data.")), *RUN, *places])


def drawn(moments: Sequence[str], count: int, seed: int) -> Iterator[int]:
    """Moments at random, one in each of `count` equal parts of a program."""
    generator = random.Random(seed)
    for part in range(count):
        yield int((part + generator.random()) / count * len(moments))


@pytest.mark.parametrize("interval", [0.5, pytest.param(1.0, marks=pytest.mark.long)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run(killed: Tries, tries: Callable[..., Any], fault: str, interval: float) -> None:
    """Pictures are decoded, features cached, checkpoints written in the middle and at the end of an epoch, or there."""
    killed.arguments.append(f"trainer.val_check_interval={interval}")
    assert killed.run("whole") == 0, killed.output("whole")
    moments, (signals, count), seed = killed.moments("whole"), FAULTS[fault], [*FAULTS].index(fault)
    with tries(fault, harm="lost") as attempt:
        for number, at in enumerate(drawn(moments, count, seed)):
            with attempt(f"moment {at} with val_check_interval={interval}: {moments[at]}"):
                survive(killed, str(number), at, signals, in_its_folder=(number + seed) % 2 == 0)


def survive(killed: Tries, name: str, at: int, signals: list[tuple[int, float]], in_its_folder: bool) -> None:
    """Kill a run at a moment; resume it by the same command, or by its folder."""
    whole, moments = killed.folder / "whole" / "run", killed.moments("whole")
    run, resumed = killed.folder / name / "run", killed.folder / name / "resumed"
    status = killed.run(name, at=at, signals=signals)
    allowed = {number for signal_number, _ in signals for number in ENDED[signal_number]}
    assert status in (0, *allowed), f"ended with status {status}"
    assert_whole_files(run.parent)
    has_config, has_checkpoint = (run / "config.yaml").exists(), (run / "checkpoints" / "last.ckpt").exists()
    assert has_checkpoint or status != 143 or at <= moments.index("training_step")
    before = wandb_ids(run)
    if in_its_folder:
        assert killed.run(name) == 0, killed.output(name)
        assert_same_run(whole, run)
        after = wandb_ids(run)[len(before) :]
    else:
        status = killed.run(name, f"resume={run}", "hydra.run.dir=<try>/resumed", "cache.dir=<try>/cache")
        said = killed.output(name)
        if not has_config:
            assert status == 1 and "error: " in said and ("Type the command" in said or "give a run" in said), said
            return
        assert status == 0 and ("starts from the beginning" in said) != has_checkpoint, said
        assert_same_run(whole, run, resumed)
        after = wandb_ids(resumed)
        assert not before or not has_checkpoint or f"offline-run-*-{before[0]}*" in said, "a W&B folder is not named"
    assert not has_checkpoint or {*before} == {*after}, "another W&B run"
    left = [path for path in (run.parent if in_its_folder else resumed).rglob("*.thaw.part")]
    assert not left, left


EARLY = (
    *("os.mkdir run", "open run/job.lock", "os.rename run/.job.json", "open run/.config.yaml", "open_picture"),
    *("os.rename run/.config.yaml", "os.rename cache/images/", "frozen_features", "os.rename cache/.", "training_step"),
    *("os.mkdir run/checkpoints", "os.rename run/checkpoints/.best", "os.rename run/checkpoints/.last"),
)


@pytest.mark.long
def test_before_the_first_checkpoint(killed: Tries, tries: Callable[..., Any]) -> None:
    """`resume=last` starts that run anew, or says what to type."""
    runs = "logs/runs/train"
    killed.arguments = [each for each in killed.arguments if not each.startswith("logger")]
    killed.arguments += ["trainer.max_epochs=1", "logger=csv", f"hydra.run.dir={runs}/killed"]
    assert killed.run("whole") == 0, killed.output("whole")
    whole, moments = killed.folder / "whole" / runs / "killed", killed.moments("whole")
    with tries("SIGKILL before the first checkpoint", harm="lost") as attempt:
        for number, what in enumerate(EARLY):
            at = next(at for at, each in enumerate(moments) if each.startswith(what.replace(" run", f" {runs}/killed")))
            with attempt(f"moment {at}: {moments[at]}"):
                name = str(number)
                assert killed.run(name, at=at) == -signal.SIGKILL
                run = killed.folder / name / runs / "killed"
                status = killed.run(name, "resume=last", "cache.dir=<try>/cache", f"hydra.run.dir={runs}/resumed")
                said = killed.output(name)
                if (run / "config.yaml").exists():
                    assert status == 0 and f"{runs}/killed holds no checkpoint: its configuration starts" in said, said
                    assert_same_run(whole, run.with_name("resumed"))
                else:
                    wanted = (
                        "Type the command of that run again" if (run / "job.json").exists() else "give a run's folder"
                    )
                    assert status == 1 and wanted in said, said


# Programs that train several runs


def assert_same_jobs(whole: Path, killed: Path) -> None:
    """The same jobs with the same weights and numbers, and the same answer over them."""
    jobs = sorted(path.parent.name for path in whole.glob("*/summary.json"))
    assert jobs == sorted(path.parent.name for path in killed.glob("*/summary.json"))
    for job in jobs:
        expected, got = checkpoints(whole / job), checkpoints(killed / job)
        assert expected.keys() == got.keys(), job
        for name in expected:
            assert_same_training(expected[name], got[name], f"{job}: {name}")
        assert numbers(whole / job) == numbers(killed / job), job
        assert rows(whole / job) == rows(killed / job), job
    for name in ("comparison.json", "report.csv", "report/report.csv"):
        if (whole / name).is_file():
            assert answer(whole / name) == answer(killed / name), name


def answer(path: Path) -> Any:
    """What a table over runs says, without times and places."""
    if path.suffix == ".json":
        return json.loads(path.read_text().replace(str(path.parents[1]), "<try>"))
    with path.open(newline="") as file:
        return [
            {key: row[key] for key in row if key.endswith(("acc", "lr", "seed", "state"))}
            for row in csv.DictReader(file)
        ]


SMALL = ["logger=csv", "trainer.max_epochs=2", "trainer.plugins.0.seconds=0", "cache.dir=<try>/cache"]
PROGRAMS = {
    "a sweep": ("train.py", ["-m", "optim.lr=1e-3,1e-2", "hydra.sweep.dir=<try>/run"]),
    "a search": ("sweep.py", ["sweep=lr_tpe", "sweep.trials=3", "hydra.run.dir=<try>/run"]),
    "a comparison": (
        "compare.py",
        [
            "compare.policies=[linear_probe,last_blocks]",
            "compare.tries=2",
            "compare.seeds=2",
            "hydra.sweep.dir=<try>/run",
        ],
    ),
}


@needs("sweeps")
@pytest.mark.long
@pytest.mark.parametrize("kind", PROGRAMS)
def test_several_runs(kind: str, tmp_path: Path, tiny: list[str], tries: Callable[..., Any]) -> None:
    """The same command again comes to the same numbers, however often it is killed."""
    program, arguments = PROGRAMS[kind]
    if kind == "a comparison":  # which sets that itself
        tiny.remove("callbacks.early_stopping=null")
    killed = Tries(tmp_path, program, [*arguments, *tiny, *SMALL])
    assert killed.run("whole") == 0, killed.output("whole")
    moments = killed.moments("whole")
    for seed, signals in enumerate((KILL, TERM)):
        with tries(f"{signal.Signals(signals[0][0]).name} during {kind}", harm="lost") as attempt:
            for number, at in enumerate(drawn(moments, sized(1, 6), seed)):
                with attempt(f"moment {at}: {moments[at]}"):
                    name = f"{seed}_{number}"
                    assert killed.run(name, at=at, signals=signals) != 1, killed.output(name)
                    assert_whole_files(tmp_path / name)
                    killed.run(name, at=at // 2, signals=signals)  # and once more, before it is as far
                    assert killed.run(name) == 0, killed.output(name)
                    assert_same_jobs(tmp_path / "whole" / "run", tmp_path / name / "run")
                    assert not list((tmp_path / name).rglob("*.thaw.part"))
