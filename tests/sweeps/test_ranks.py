"""Runs of two processes (gloo) against one process at the same global batch, and however they are started."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import ROOT

Train = Callable[..., Path]

FSDP = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py")]
PROBE = ["experiment=vit_linear_probe", "trainer=ddp_cpu", "data.source=sample", "data.train_size=65"]
PROBE += ["data.batch_size=16", "trainer.max_epochs=2"]


class Seen(L.Callback):
    """Writes which digits each rank trains on in an epoch, and in how many steps."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.digits: list[list[int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, _: int) -> None:
        self.digits.append(batch.indices.tolist())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = self.folder / f"rank{trainer.global_rank}_epoch{trainer.current_epoch}.json"
        path.write_text(json.dumps(self.digits))
        self.digits = []


def check_each_digit_once(folder: Path, count: int, epochs: int) -> None:
    orders = []
    for epoch in range(epochs):
        first, second = (json.loads((folder / f"rank{rank}_epoch{epoch}.json").read_text()) for rank in (0, 1))
        assert len(first) == len(second), "ranks that take different numbers of steps wait for each other"
        orders.append(list(chain(*first, *second)))
        assert sorted(orders[-1]) == list(range(count))
    assert orders[0] != orders[1]


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other rank runs, and where it finds what this file imports."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py")])
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)


def compare(one: Path, two: Path) -> None:
    """Gradients are summed in another order, so to about 1e-5."""
    weights, others = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (one, two)
    )
    trained = {name for name in others if name in weights}  # a checkpoint of fsdp holds the frozen ones too
    assert trained == weights.keys()
    for name in trained:
        torch.testing.assert_close(others[name], weights[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "freeze"),
    [(["trainer=ddp_cpu"], "full"), *((FSDP, freeze) for freeze in ("full", "linear_probe", "lora"))],
)
def test_two_processes_equal_one(
    train: Train, tiny_run: list[str], tmp_path: Path, two_ranks: None, trainer: list[str], freeze: str
) -> None:
    """With clipped gradients."""
    run = [*tiny_run, f"freeze={freeze}", "optim=sgd"]
    run += ["optim.lr=0.05", "optim.optimizer.fused=false", "trainer.max_epochs=2"]
    after = ["trainer.precision=32-true", "trainer.enable_progress_bar=false", "trainer.gradient_clip_val=0.5"]
    seen = [f"+callbacks.seen._target_={__name__}.Seen", f"+callbacks.seen.folder={tmp_path}"]
    two = train(*run, "data.batch_size=8", *trainer, *after, *seen, name="two")
    check_each_digit_once(tmp_path, 64, epochs=2)
    one = train(*run, "data.batch_size=16", *after, name="one")
    compare(one, two)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    for key in ("val/acc", "test/acc", "n_test", "trainable_params", "total_params"):
        assert summaries[0][key] == summaries[1][key], key


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("one", "fsdp"), ("fsdp", "one")])
def test_a_run_goes_on_sharded_or_whole(
    train: Train, tiny_run: list[str], two_ranks: None, before: str, after: str
) -> None:
    """A checkpoint of whole tensors, which refers to frozen weights, continues in shards, and the other way round."""
    kinds = {"one": ["data.batch_size=16", "trainer=cpu"], "fsdp": ["data.batch_size=8", *FSDP]}
    fixed = ["trainer.precision=32-true", "trainer.enable_progress_bar=false", "trainer.max_epochs=2"]
    run = [*tiny_run, "freeze=last_blocks", "freeze.k=1", "+optim.optimizer.eps=1e-3", "test=false"]
    run += ["callbacks.last_checkpoint.filename='{epoch}'", "callbacks.last_checkpoint.save_top_k=-1"]
    whole = train(*run, *kinds["one"], *fixed, name="whole")
    first = train(*run, *kinds[before], *fixed, name="first") if before == "fsdp" else whole
    second = train(f"resume='{first}/checkpoints/epoch=0.ckpt'", *kinds[after], *fixed, name="second")
    weights, others = (
        torch.load(folder / "checkpoints" / "epoch=1.ckpt", weights_only=True) for folder in (whole, second)
    )
    for name, tensor in weights["state_dict"].items():
        torch.testing.assert_close(others["state_dict"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert others["global_step"] == weights["global_step"] == 8


def start(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command as a user types it, in an empty folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment["PYTHONPATH"] = str(ROOT / "tests")
    return subprocess.run(
        [sys.executable, *arguments, f"cache.dir={folder / 'cache'}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_torchrun_makes_one_run(tmp_path: Path) -> None:
    """One folder, one W&B run, every digit once (65 are no whole number of batches)."""
    seen = [f"+callbacks.seen._target_={__name__}.Seen", f"+callbacks.seen.folder={tmp_path}"]
    done = start(*TORCHRUN, *PROBE, *seen, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "logs" / "runs" / "vit_linear_probe").iterdir()
    assert len(list(run_dir.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert done.stdout.count("1,930 of 2,684,170 parameters train") == 1
    check_each_digit_once(tmp_path, 65, epochs=2)


@pytest.mark.slow
def test_ranks_with_different_settings_do_not_train(tmp_path: Path) -> None:
    """The learning rate differs once it is resolved; whoever is first to say so ends the run, and nobody waits.

    Ranks that rank 0 starts cannot differ: it writes out for them what resolvers give.
    """
    rates = ["+rates=[0.1,0.2]", "optim.lr='${rates.${oc.env:LOCAL_RANK,0}}'"]
    run_dir = tmp_path / "run"
    done = start(*TORCHRUN, *PROBE, *rates, "logger=csv", f"hydra.run.dir={run_dir}", folder=tmp_path)
    assert done.returncode != 0
    assert "optim.lr is 0.1 on rank 0 and 0.2 on rank 1" in done.stderr
    assert "Start all of them with the same command line" in done.stderr
    assert not (run_dir / "checkpoints").exists() and not (run_dir / "summary.json").exists()
    assert json.loads((run_dir / "failure.json").read_text())["status"] == "failed"
