"""A run in its folder: done, cut off, failed, or someone else's."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import compose_run
from filelock import FileLock
from omegaconf import DictConfig

from thaw.run import jobs


def done(cfg: DictConfig) -> float:
    (Path(cfg.run_dir) / "summary.json").write_text(json.dumps({"val/acc": 0.5}))
    return 0.5


def raising(cfg: DictConfig) -> float:
    raise ValueError("a bad day")


def never(cfg: DictConfig) -> float:
    raise AssertionError("trained again")


def test_what_is_done_is_not_trained_again(tmp_path: Path) -> None:
    cfg = compose_run(tmp_path)
    assert jobs.run_job(cfg, done) == 0.5
    assert jobs.run_job(compose_run(tmp_path), never) == 0.5
    assert jobs.read_state(tmp_path) == "done"


def test_a_failure_is_recorded_until_a_later_success(tmp_path: Path) -> None:
    assert jobs.read_state(tmp_path) == "new"
    with pytest.raises(ValueError, match="a bad day"):
        jobs.run_job(compose_run(tmp_path, "seed=3"), raising)
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["status"], failure["reason"], failure["seed"]) == ("failed", "ValueError: a bad day", 3)
    assert "in raising" in failure["traceback"]
    assert jobs.read_state(tmp_path) == "failed"
    jobs.run_job(compose_run(tmp_path, "seed=3"), done)
    assert not (tmp_path / "failure.json").exists()
    assert jobs.read_state(tmp_path) == "done"


def test_what_has_a_summary_has_not_failed(tmp_path: Path) -> None:
    """Although an error came after it, in closing a logger."""

    def late(cfg: DictConfig) -> float:
        done(cfg)
        raise OSError("no connection")

    with pytest.raises(ValueError, match="a bad day"):
        jobs.run_job(compose_run(tmp_path), raising)
    with pytest.raises(OSError, match="no connection"):
        jobs.run_job(compose_run(tmp_path), late)
    assert (tmp_path / "summary.json").exists() and not (tmp_path / "failure.json").exists()


def test_a_failure_that_cannot_be_recorded_is_still_the_one_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(facts: object, path: Path) -> None:
        raise OSError(f"{path} cannot be written")

    def train(cfg: DictConfig) -> float:
        monkeypatch.setattr(jobs, "write_json", full)
        raise OSError("last.ckpt cannot be written")

    with pytest.raises(OSError, match=r"last\.ckpt cannot be written"):
        jobs.run_job(compose_run(tmp_path), train)
    assert "failure.json cannot be written" in caplog.text


def checkpoint(cfg: DictConfig) -> None:
    path = Path(cfg.run_dir) / "checkpoints" / "last.ckpt"
    path.parent.mkdir(exist_ok=True)
    torch.save({"config": {}, "state_dict": {}, "wandb_id": "abc"}, path)


def test_what_was_cut_off_goes_on_and_what_failed_starts_anew(tmp_path: Path) -> None:
    resumed = []

    def train(cfg: DictConfig) -> float:
        resumed.append((cfg.resume, cfg.logger.wandb.id))
        checkpoint(cfg)
        raise errors.pop(0)

    errors: list[BaseException] = [KeyboardInterrupt(), OSError("full"), ValueError("a bad day"), KeyboardInterrupt()]
    while errors:
        with pytest.raises((KeyboardInterrupt, ValueError, OSError)):
            jobs.run_job(compose_run(tmp_path), train)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    assert resumed == [(None, None), (last, "abc"), (last, "abc"), (None, None)]
    for status, goes_on in (("killed", True), ("timeout", True), ("failed", False)):
        jobs.record_failure(compose_run(tmp_path), status, "", "", 0.0)
        cfg = compose_run(tmp_path)
        jobs.go_on(cfg)
        assert (cfg.resume == last) == goes_on, status


def test_a_damaged_checkpoint_is_not_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = compose_run(tmp_path)
    checkpoint(cfg)
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:100])
    assert jobs.read_state(tmp_path) == "cut off"
    assert jobs.run_job(cfg, done) == 0.5
    assert cfg.resume is None and "Starting from scratch" in caplog.text


@pytest.mark.parametrize("text", ["", '{"val/', "[]", "{}"])
def test_a_damaged_summary_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text)
    assert jobs.read_state(tmp_path) == "new"
    assert jobs.run_job(compose_run(tmp_path), done) == 0.5


def test_lightnings_way_to_end_at_ctrl_c_is_an_interruption(tmp_path: Path) -> None:
    """It raises SystemExit(1) and ignores a second Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)

    def train(cfg: DictConfig) -> float:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.exit(1)

    with pytest.raises(KeyboardInterrupt):
        jobs.run_job(compose_run(tmp_path), train)
    assert signal.getsignal(signal.SIGINT) == before
    assert not (tmp_path / "failure.json").exists()


def test_an_interruption_is_no_failure(tmp_path: Path) -> None:
    def interrupted(cfg: DictConfig) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.run_job(compose_run(tmp_path), interrupted)
    assert not (tmp_path / "failure.json").exists()


def test_another_configuration_is_kept_out(tmp_path: Path) -> None:
    jobs.run_job(compose_run(tmp_path), done)
    with pytest.raises(ValueError, match="another configuration"):
        jobs.run_job(compose_run(tmp_path, "optim.lr=0.5"), done)
    assert not (tmp_path / "failure.json").exists()


def test_another_process_is_kept_out(tmp_path: Path) -> None:
    with FileLock(tmp_path / "job.lock"):
        assert jobs.read_state(tmp_path) == "running"
    assert jobs.read_state(tmp_path) == "new"
    with FileLock(tmp_path / "job.lock"), pytest.raises(ValueError, match="another process"):
        jobs.run_job(compose_run(tmp_path), never)


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="a bad day"):
        jobs.run_job(compose_run(tmp_path), raising)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),  # torchrun's second machine
        ({"SLURM_PROCID": "1"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # started by rank 0 within an allocation
    ],
)
def test_first_rank(variables: dict, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert jobs.is_first_rank() == first
