"""One process of several is killed, fails or hangs: the others end, say which it was, and leave nothing behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from fault_counts import sized
from processes import Forked

from thaw.run import ranks

Tries = Callable[..., AbstractContextManager[Any]]
pytestmark = pytest.mark.usefixtures("undrawn")

TIMEOUT = 6.0  # seconds, in place of `rank_timeout`
ENDS = TIMEOUT + 60.0  # in which a run ends, on a busy machine
KILLED, FAILED, HANGS = "was ended by SIGKILL", "ended with exit status 1", "hangs: rank 0 has waited 6 s"
# Rank, phase, what befalls it there, and what is said of it.
FAULTS: list[tuple[int, str, str, str]] = [
    (1, "step", "kill", f"Rank 1 {KILLED}"),
    *((1, phase, "kill", f"Rank 1 {KILLED}") for phase in ("data", "build", "setup", "cache", "update")),
    *((1, phase, "kill", f"Rank 1 {KILLED}") for phase in ("validation", "checkpoint", "test")),
    *((1, phase, "raise", f"Rank 1 {FAILED}") for phase in ("data", "step")),
    (1, "step", "memory", f"Rank 1 {FAILED}"),
    *((1, phase, "loop", f"Rank 1 {HANGS}") for phase in ("data", "step")),
    (1, "validation", "sleep", f"Rank 1 {HANGS}"),
    (1, "step", "stop", f"Rank 1 {HANGS}"),
    (0, "data", "raise", "the fault of this test"),
    (0, "step", "raise", "the fault of this test"),
    (0, "step", "kill", ""),  # nobody is left to say it; nothing else is left, either
    (0, "step", "loop", "Rank 0 hangs where its stack above says. Rank 1 ended"),
    (0, "build", "sleep", "Rank 0 hangs where its stack above says. Rank 1 ended"),
]


@pytest.fixture
def environment() -> dict[str, str]:
    """For a process that imports the files beside this one."""
    folders = [ROOT / "src", ROOT / "tests", ROOT / "tests" / "faults"]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "FAULT_IN_DATA": "none"}


def start(folder: Path, environment: dict[str, str], *overrides: str) -> Forked:
    """`python train.py <overrides>` in a session of its own; its ranks are forked, and its output is in `output`."""
    command = [sys.executable, str(ROOT / "tests" / "faults" / "faulty_rank.py"), str(ROOT / "train.py"), *overrides]
    with (folder / "output").open("w") as output:
        return Forked(command, cwd=folder, env=environment, stdout=output, start_new_session=True)


def in_session(session: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            state, _, _, own = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            found += [int(folder.name)] if int(own) == session and state != "Z" else []
    return found


def check_gone(process: Forked, seconds: float = 8.0) -> None:
    """Nothing of a run is left; a worker of a DataLoader looks every 5 s whether its parent lives."""
    assert process.pid is not None
    until = time.monotonic() + seconds
    while (left := in_session(process.pid)) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, f"processes are left: {left}"


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (value := what()) and time.monotonic() < until:
        time.sleep(0.02)
    assert value
    return value


def two_ranks(run_dir: Path, tiny_run: list[str], *overrides: str) -> list[str]:
    """Settings of a run of two epochs of 4 steps, which saves after each."""
    return [
        *(
            "experiment=vit_linear_probe",
            *tiny_run,
            "trainer=ddp_cpu",
            "trainer.precision=32-true",
            "data.batch_size=8",
        ),
        *("trainer.enable_progress_bar=false", "trainer.max_epochs=2", "trainer.plugins.0.seconds=0"),
        *(f"rank_timeout={TIMEOUT}", f"hydra.run.dir={run_dir}", f"cache.dir={run_dir}/cache", *overrides),
    ]


def strikes(rank: int, phase: str, how: str) -> str:
    return f"+callbacks.strike={{_target_:faulty_rank.Strike,rank:{rank},phase:{phase},how:{how}}}"


def check_checkpoint(run_dir: Path, expected: bool) -> None:
    """The checkpoint of epoch 0 is whole, if the fault came later."""
    path = run_dir / "checkpoints" / "last.ckpt"
    assert path.is_file() or not expected
    if expected:
        assert torch.load(path, weights_only=True)["global_step"] in (4, 8)
    assert not list(run_dir.glob(".rank*"))


@pytest.mark.parametrize("number", range(sized(1, len(FAULTS))))
def test_a_rank_is_lost(tries: Tries, tmp_path: Path, tiny_run: list[str], environment: dict[str, str], number: int):
    rank, phase, how, said = FAULTS[number]
    own = [strikes(rank, phase, how)] if phase != "data" else ["data._target_=faulty_rank.FaultyDigits"]
    environment["FAULT_IN_DATA"] = f"{rank},{how}"
    run_dir = tmp_path / "run"
    with (
        tries("one process of a run killed, failing or hanging", harm="lost") as attempt,
        attempt(f"{rank} {phase} {how}"),
    ):
        process = start(tmp_path, environment, *two_ranks(run_dir, tiny_run, *own))
        status = process.wait(ENDS)
        output = (tmp_path / "output").read_text()
        assert status != 0 and said in output, output
        assert how == "raise" or "Traceback" not in output or said == f"Rank 1 {FAILED}", output
        check_gone(process)
        if (rank, how) != (0, "kill"):
            check_checkpoint(run_dir, phase in ("step", "update", "validation", "checkpoint", "test"))


@pytest.mark.long
def test_the_next_job_of_a_sweep_runs(tries: Tries, tmp_path: Path, tiny_run: list[str], environment: dict[str, str]):
    """In one process, whose main thread is that of rank 0."""
    sweep = [each for each in two_ranks(tmp_path, tiny_run) if not each.startswith("hydra.run.dir")]
    sweep += ["+callbacks.strike._target_=faulty_rank.Strike", "-m"]
    faults = [(1, "build", "kill"), (1, "step", "kill"), (0, "step", "loop")]
    with tries("one process of a job killed or hanging: the sweep goes on", harm="lost") as attempt:
        for rank, phase, how in faults:
            with attempt(f"{rank} {phase} {how}"):
                own = [f"+callbacks.strike.{key}={value}" for key, value in (("rank", rank), ("how", how))]
                own += [f"+callbacks.strike.phase={phase},never", f"hydra.sweep.dir={tmp_path / phase / how}"]
                process = start(tmp_path, environment, *sweep, *own)
                process.wait(2 * ENDS)
                output = (tmp_path / "output").read_text()
                trained = re.findall(r"^  val/acc \d", output, re.MULTILINE)
                assert "error: Rank 1" in output and len(trained) == 1, output
                check_gone(process)


@pytest.mark.long
def test_ctrl_c_ends_both_ranks(tries: Tries, tmp_path: Path, tiny_run: list[str], environment: dict[str, str]):
    """Once, at the end of a step, which is saved; twice at once."""
    with tries("Ctrl-C on several processes", harm="lost") as attempt:
        for times in (1, 2):
            with attempt(f"{times} times"):
                run_dir = tmp_path / f"run{times}"
                process = start(tmp_path, environment, *two_ranks(run_dir, tiny_run, "trainer.max_epochs=10000"))
                assert process.pid is not None
                wait_for((run_dir / "checkpoints" / "last.ckpt").is_file)
                for _ in range(times):
                    os.killpg(process.pid, signal.SIGINT)
                    time.sleep(0.05)
                assert process.wait(ENDS) == 130, (tmp_path / "output").read_text()
                check_gone(process)
                assert "To resume: python train.py" in (tmp_path / "output").read_text()


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_outlives_the_first_process(
    tries: Tries, tmp_path: Path, tiny_run: list[str], environment: dict[str, str], workers: int
) -> None:
    """Killed by SIGKILL, it can end nothing itself: neither a rank that is stopped, nor workers that fetch data."""
    faults = ["trainer.max_epochs=10000", f"data.num_workers={workers}", "cache.mode=off"]
    faults += ["trainer.devices=1"] if workers else [strikes(1, "step", "stop"), "rank_timeout=100"]
    with tries("nothing outlives a killed process", harm="lost") as attempt, attempt(f"{workers} workers"):
        process = start(tmp_path, environment, *two_ranks(tmp_path / "run", tiny_run, *faults))
        wait_for((tmp_path / "run" / "checkpoints" / "last.ckpt").is_file)
        time.sleep(1)
        process.kill()
        process.wait(ENDS)
        check_gone(process)


@pytest.mark.long
def test_a_killed_data_worker_is_named(
    tries: Tries, tmp_path: Path, tiny_run: list[str], environment: dict[str, str]
) -> None:
    run = two_ranks(
        tmp_path / "run", tiny_run, "trainer.devices=1", "data.num_workers=1", "cache.mode=off", "data.batch_size=16"
    )
    with tries("a worker of a DataLoader killed", harm="lost") as attempt, attempt("in epoch 1"):
        process = start(tmp_path, environment, *run, strikes(0, "step", "worker"))
        assert process.wait(ENDS) == 1
        output = (tmp_path / "output").read_text()
        assert "error: One of the processes of data.num_workers was lost" in output and "Traceback" not in output
        assert "lower data.num_workers. To continue from the last checkpoint: python train.py" in output
        check_gone(process)
        check_checkpoint(tmp_path / "run", expected=True)


def child(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-Sc", code])


def test_which_rank_is_named(tries: Tries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several: one that was killed rather than those that then lost it, and those that hang after a time."""
    monkeypatch.setattr(ranks, "NOTICE_SECONDS", 0.3)
    monkeypatch.setattr(ranks, "STACK_SECONDS", 0.0)
    end, kill, hang = "raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)", "import time; time.sleep(60)"
    cases = [
        ([end, kill, hang], False, "Rank 2 was ended by SIGKILL. Perhaps memory ran out"),
        ([hang, end], False, "Rank 2 ended with exit status 1; its own error is above"),
        ([end, hang, hang], True, "Rank 2, 3 hangs: rank 0 has waited 7 s"),
        ([end, end], True, "Rank 1 ended with exit status 1"),
    ]
    with tries("one process of a run killed, failing or hanging", harm="lost") as attempt:
        for codes, late, message in cases:
            with attempt(message):
                others = ranks.OtherRanks(tmp_path, 1 + len(codes), 7, [child(code) for code in codes])
                for code, process in zip(codes, others.children, strict=True):
                    if code != hang:
                        process.wait()
                try:
                    assert str(others.lost(late)).startswith(message)
                finally:
                    others.kill()
