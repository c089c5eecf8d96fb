"""The whole run on real digits: accuracy gates, one and two processes, sweeps, what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from conftest import ROOT, SMALL, needs
from processes import FORKED

from thaw.data.mnist import SAMPLE

PROBE = "experiment=vit_linear_probe"
Command = Callable[..., int]


def test_linear_probe_on_the_sample(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main job as a user types it, and its evaluation."""
    typed = [PROBE, "data.source=sample", f"hydra.run.dir={tmp_path}", f"cache.dir={tmp_path / 'cache'}"]
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    started = [sys.executable, ROOT / "train.py", *typed]
    done = subprocess.run(started, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "did not end" not in done.stderr, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0.96 <= summary["test/acc"] < 1.0, "100 % of 500 would be too good to be true"
    assert summary["test/acc_low"] < summary["test/acc"] < summary["test/acc_high"]
    assert summary["n_test"] == 500
    assert summary["data_source"] == SAMPLE
    assert summary["weights"] == "bundled"
    assert summary["trainable_params"] == 192 * 10 + 10
    assert {"val/acc", "total_params", "seconds", "seed", "git_commit"} <= summary.keys()
    for part in (f"{summary['test/acc']:.2%}", "95 % interval", "n = 500", "1,930 of 2,", "wandb sync"):
        assert part in done.stdout
    for file in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "record.yaml", "parameters.txt"):
        assert (tmp_path / file).exists()
    assert list(tmp_path.glob("wandb/offline-run-*"))
    few = ["robustness.images=20", "robustness.severities=[3]", f"hydra.run.dir={tmp_path / 'eval'}"]
    assert command("eval.py", f"ckpt={tmp_path}", *few) == 0
    assert f"test/acc {summary['test/acc']:.2%}, 95 % interval" in capsys.readouterr().out


@pytest.mark.long
@needs("sweeps")
def test_sweep_of_two_processes(tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """One folder a job, compared on validation, only the winner tested; a child rank does not run the sweep again."""
    sweep = tmp_path / "sweep"
    run = ["-m", PROBE, "trainer=ddp_cpu", "trainer.max_epochs=1", "data.source=sample", "data.train_size=256"]
    run += ["data.batch_size=16", "optim.lr=1e-5,1e-2", f"hydra.sweep.dir={sweep}", f"cache.dir={tmp_path / 'cache'}"]
    assert command("train.py", *run) == 0
    printed = capsys.readouterr().out + "".join(log.read_text() for log in sweep.glob("*/train.log"))
    assert printed.count("cached features:") == 2 and printed.count("(reused)") == 1  # the second job takes the first's
    jobs = {path.parent: json.loads(path.read_text()) for path in sweep.glob("*/summary.json")}
    assert len(jobs) == len(list(sweep.glob("*/config.yaml"))) == 2
    worse, better = sorted(jobs.values(), key=lambda job: job["val/acc"])
    assert [job["overrides"].split("optim.lr=")[1].split()[0] for job in (better, worse)] == ["0.01", "1e-05"]
    assert better["n_test"] == 500
    assert worse["test/acc"] is None
    assert any(line.split()[:2] == ["best", "0.01"] for line in printed.splitlines())
    for job in jobs:
        (run_id,) = {path.name.split("-")[3] for path in (job / "wandb").glob("offline-run-*")}
        assert run_id
        assert yaml.safe_load((job / "config.yaml").read_text())["run_dir"] == str(job)


class Fault(L.Callback):
    """After two epochs, once for each seed: seed 1 is killed, seed 4 raises an error."""

    def __init__(self, marks: str, seed: int) -> None:
        self.mark, self.seed = Path(marks) / str(seed), seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch < 2 or self.seed == 0 or self.mark.exists():
            return
        self.mark.touch()
        if self.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("a fault")


@needs("sweeps")
def test_a_disturbed_sweep_ends_as_an_undisturbed_one(
    tmp_path: Path,
    tiny_run: list[str],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One job is killed and one raises after two of four epochs; the same command runs these to their end."""
    (tmp_path / "calm").mkdir()
    (tmp_path / "disturbed").mkdir()
    for seed in (1, 4):  # have had their fault
        (tmp_path / "calm" / str(seed)).touch()
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)  # of the jobs, which import this file
    monkeypatch.setattr("thaw.sweeps.job_queue.subprocess", FORKED)
    states = {}
    for name in ("disturbed", "calm"):
        run = ["-m", *tiny_run, "trainer.max_epochs=4", "seed=0,1,4", "test=false", "trainer.plugins.0.seconds=0"]
        run += [f"hydra.sweep.dir={tmp_path}/to", f"cache.dir={tmp_path / 'cache'}"]
        run += [f"+callbacks.fault={{_target_:{__name__}.Fault,marks:'{tmp_path / name}',seed:'${{seed}}'}}"]
        if name == "disturbed":
            assert command("train.py", *run, "hydra/launcher=queue") == 1
            said = capsys.readouterr()
            assert "seed=1: killed" in said.out and "seed=4: failed: RuntimeError: a fault" in said.out
            done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("to/*/summary.json")}
            assert len(done) == 1
        assert command("train.py", *run) == 0  # in one process
        if name == "disturbed":
            assert "1 done already, 2 failed" in capsys.readouterr().out
            assert all(path.stat().st_mtime_ns == before for path, before in done.items())
        for path in tmp_path.glob("to/*/summary.json"):
            seed = json.loads(path.read_text())["seed"]
            last = torch.load(path.parent / "checkpoints" / "last.ckpt", weights_only=True)
            states[name, seed] = last["state_dict"], json.loads(path.read_text())["val/acc"]
        (tmp_path / "to").rename(tmp_path / f"was_{name}")
    for seed in (0, 1, 4):
        (weights, accuracy), (expected, expected_accuracy) = states["disturbed", seed], states["calm", seed]
        assert accuracy == expected_accuracy
        assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())


def test_early_stopping_fires(train: Callable[..., Path]) -> None:
    """A learning rate too small to change a prediction: the second validation is no better, patience 1 ends it."""
    run_dir = train(PROBE, *SMALL, "optim.lr=1e-12", "trainer.max_epochs=9", "callbacks.early_stopping.patience=1")
    assert json.loads((run_dir / "summary.json").read_text())["epochs"] == 2


def test_last_checkpoint_follows_every_epoch(train: Callable[..., Path]) -> None:
    """Also when no epoch is better than the first."""
    run_dir = train(PROBE, *SMALL, "optim.lr=1e-12", "trainer.max_epochs=3")
    steps = {
        name: torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"]
        for name in ("best", "last")
    }
    assert steps == {"best": 8, "last": 24}


def test_without_a_logger(train: Callable[..., Path]) -> None:
    small = ["data.source=sample", "data.train_size=64", "data.batch_size=32", "trainer.max_epochs=1"]
    run_dir = train(PROBE, *small, "logger=none")
    assert (run_dir / "summary.json").exists() and (run_dir / "checkpoints" / "last.ckpt").exists()
    assert not (run_dir / "csv").exists() and not (run_dir / "wandb").exists()


@pytest.mark.long
def test_overfits_few_digits(train: Callable[..., Path]) -> None:
    run_dir = train("experiment=vit_last_blocks", "debug=overfit", "data.source=sample", "trainer.max_epochs=25")
    rows = (run_dir / "csv" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/acc")
    assert [row.split(",")[column] for row in rows if row.split(",")[column]][-1] == "1.0"
