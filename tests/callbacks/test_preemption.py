"""A run that gets a signal ends at once, and resumes as if it had not."""

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from processes import Forked
from torch import Tensor

from thaw.callbacks.preemption import requeue
from thaw.classifier import Classifier

TRAINING_STEP, VALIDATION_STEP = Classifier.training_step, Classifier.validation_step
CALLBACK = ["++callbacks.preemption._target_=thaw.callbacks.preemption.Preemption"]
CALLBACK += ["++callbacks.preemption.run_dir=${run_dir}"]
RUN = [*CALLBACK, "trainer.max_epochs=3", "augment=affine", "logger=csv", "test=false"]  # 4 steps an epoch


class Left(BaseException):
    """Stands for the end of the process."""

    @property
    def code(self) -> int:
        return self.args[0]


def checkpoint(run_dir: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def validations(run_dir: Path) -> list[tuple[str, str]]:
    metrics = run_dir / "csv" / "metrics.csv"
    if not metrics.exists():  # none was due
        return []
    with metrics.open() as file:
        return [(row["step"], row["val/acc"]) for row in csv.DictReader(file) if row.get("val/acc")]


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let this process send itself signals in the middle of a batch, counted from 0."""

    def at(batch: int, *numbers: signal.Signals) -> None:
        batches = iter(range(1000))

        def interrupted(self: Classifier, *args: Any) -> Tensor:
            if next(batches) == batch:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return TRAINING_STEP(self, *args)

        monkeypatch.setattr(Classifier, "training_step", interrupted)

    return at


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is there before, and has to be there afterwards; the process does not really end."""

    def leave(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(os, "_exit", leave)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("number", "batch", "saved", "settings"),
    [
        (signal.SIGINT, 5, 6, []),
        (signal.SIGTERM, 3, 4, []),
        (signal.SIGINT, 11, 12, []),
        (signal.SIGTERM, 5, 6, ["trainer.val_check_interval=0.5"]),
        (signal.SIGINT, 7, 8, ["trainer.val_check_interval=0.5"]),
        (signal.SIGTERM, 4, 5, ["trainer.val_check_interval=1"]),
        (signal.SIGINT, 3, 4, ["trainer.check_val_every_n_epoch=2"]),
        (signal.SIGTERM, 4, 3, ["trainer.accumulate_grad_batches=2"]),
        (signal.SIGINT, 5, 6, ["average=ema"]),
        (signal.SIGTERM, 5, 6, ["freeze=gradual"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_goes_on_to_the_same_weights(
    train: Callable[..., Path],
    tiny_run: list[str],
    signalled: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    batch: int,
    saved: int,
    settings: list[str],
) -> None:
    """The step is completed, saved although checkpoints are written seconds apart, and nothing after it is done."""
    run = [*tiny_run, *RUN, *settings]
    whole = train(*run, name="whole")
    signalled(batch, number)
    with pytest.raises((Left, KeyboardInterrupt)) as ended:
        train(*run, name="cut")
    monkeypatch.setattr(Classifier, "training_step", TRAINING_STEP)
    cut = whole.parent / "cut"
    said = capsys.readouterr().out
    if number == signal.SIGINT:
        assert ended.type is KeyboardInterrupt
        assert f"Ctrl-C: step {saved} is in {os.path.relpath(cut)}/checkpoints/last.ckpt\n" in said
        assert f"To resume: python train.py resume={os.path.relpath(cut)}\n" in said
    else:
        assert ended.value.code == 128 + signal.SIGTERM and "To resume" not in said
    assert checkpoint(cut)["global_step"] == saved
    assert not list(cut.glob("hpc_ckpt*")) and not (cut / "summary.json").exists()

    resumed = train(f"resume={cut}", name="resumed")

    for name, run_dir in (("last", resumed if saved < 12 else cut), ("best", resumed)):  # after 12 nothing is left
        expected, got = checkpoint(whole, name), checkpoint(run_dir, name)
        for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers"):
            assert equal(expected[key], got[key]), (name, key)
    assert validations(whole) == validations(resumed)


@pytest.mark.usefixtures("handlers")
def test_a_second_ctrl_c_ends_at_once(
    train: Callable[..., Path], tiny_run: list[str], signalled: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the last validation saved stays, and the first one says so."""
    signalled(5, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(*tiny_run, *RUN)
    said = capsys.readouterr().out
    assert "a second Ctrl-C ends it at once" in said and "To resume: python train.py resume=" in said
    assert "step 6" not in said


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_all_ranks_save_the_same_step_and_end(
    train: Callable[..., Path],
    tiny_run: list[str],
    signalled: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """Rank 0 alone gets the signal; the other rank ends by itself, before it is killed."""
    others: list[Forked] = []

    class Counted(Forked):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            others.append(self)
            self.kill = lambda: self.wait(20)

    monkeypatch.setattr("thaw.run.ranks.subprocess.Popen", Counted)
    signalled(1, number)  # of two steps an epoch
    with pytest.raises((Left, KeyboardInterrupt)):
        train(*tiny_run, *RUN, "trainer=ddp_cpu")
    assert checkpoint(tmp_path / "runs" / "test" / "run")["global_step"] == 2
    assert "step 2 is in " in capsys.readouterr().out
    assert [other.poll() for other in others] == [0]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("place", "trained"),
    [
        ("thaw.freezing.features.frozen_features", None),
        ("thaw.classifier.Classifier.validation_step", 5),  # the ranks agree after a step
        ("thaw.classifier.Classifier.test_step", 12),
    ],
)
def test_ctrl_c_outside_training_steps(
    train: Callable[..., Path],
    tiny_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    trained: int | None,
) -> None:
    """The first feature pass and the test end at once, a validation is completed."""

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return VALIDATION_STEP(*arguments)

    monkeypatch.setattr(place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(*tiny_run, *CALLBACK, "trainer.max_epochs=3", *(["cache.mode=off"] if trained else []))
    monkeypatch.undo()
    run_dir = tmp_path / "runs" / "test" / "run"
    assert capsys.readouterr().out.endswith(f"To resume: python train.py resume={os.path.relpath(run_dir, ROOT)}\n")
    if trained is None:
        assert not (run_dir / "checkpoints").exists()
    else:
        assert checkpoint(run_dir)["global_step"] == trained and not (run_dir / "summary.json").exists()


def test_an_ignored_ctrl_c_stays_ignored(
    train: Callable[..., Path], tiny_run: list[str], signalled: Callable[..., None]
) -> None:
    """As in the background of a shell without job control."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signalled(2, signal.SIGINT)
        assert (train(*tiny_run, *RUN, "trainer.max_epochs=1") / "summary.json").exists()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """A program of that name which keeps its arguments, in SLURM's job 7; it knows no job 8."""
    asked = tmp_path / "bin" / "asked"
    asked.parent.mkdir()
    program = asked.with_name("scontrol")
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n[ "$2" = 7 ] || {{ echo Invalid job id >&2; exit 1; }}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return lambda: asked.read_text() if asked.exists() else ""


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("numbers", "asked"),
    [
        ([signal.SIGUSR1], "requeue 7\n"),
        ([signal.SIGUSR2], "requeue 7\n"),
        ([signal.SIGUSR1, signal.SIGUSR1], "requeue 7\n"),
        ([signal.SIGTERM], ""),
        ([signal.SIGUSR1, signal.SIGTERM], ""),
        ([signal.SIGTERM, signal.SIGUSR1], ""),
    ],
    ids=lambda value: " ".join(number.name for number in value) if isinstance(value, list) else "",
)
def test_requeues_unless_it_is_to_end(
    train: Callable[..., Path],
    tiny_run: list[str],
    signalled: Callable[..., None],
    scontrol: Callable[[], str],
    numbers: list[signal.Signals],
    asked: str,
) -> None:
    signalled(5, *numbers)
    with pytest.raises(Left) as ended:
        train(*tiny_run, *RUN)
    assert scontrol() == asked
    assert ended.value.code == 128 + max(numbers, key=(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM).index)


@pytest.mark.usefixtures("handlers")
def test_says_what_to_do_if_the_job_is_not_requeued(
    scontrol: Callable[[], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    requeue()
    assert scontrol() == "requeue 8\n"
    assert "SLURM job 8 was not requeued (Invalid job id). Submit it again" in capsys.readouterr().err


@pytest.mark.usefixtures("handlers")
def test_submitit_requeues_its_own_jobs(
    train: Callable[..., Path],
    tiny_run: list[str],
    signalled: Callable[..., None],
    scontrol: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its handler is there before training; it saves the job's function, requeues the job and leaves."""
    seen: list[int] = []

    def checkpoint_and_try_requeue(number: int, frame: Any) -> None:
        seen.append(checkpoint(tmp_path / "runs" / "test" / "run")["global_step"])
        raise SystemExit(-1)

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    signal.signal(signal.SIGUSR2, before := checkpoint_and_try_requeue)
    signalled(5, signal.SIGUSR2)
    with pytest.raises(Left) as ended:
        train(*tiny_run, *RUN)
    assert (ended.value.code, seen, scontrol()) == (-1, [6], "")
    assert signal.getsignal(signal.SIGUSR2) == before
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)


@pytest.mark.usefixtures("handlers")
def test_a_run_that_is_being_tested_is_requeued_at_once(
    train: Callable[..., Path],
    tiny_run: list[str],
    scontrol: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        pytest.fail("not reached")

    monkeypatch.setattr(Classifier, "test_step", interrupted)
    with pytest.raises(Left):
        train(*tiny_run, *RUN, "test=true")
    run_dir = tmp_path / "runs" / "test" / "run"
    assert scontrol() == "requeue 7\n"
    assert checkpoint(run_dir)["global_step"] == 12 and not (run_dir / "summary.json").exists()
