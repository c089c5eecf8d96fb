"""Policies in whole runs: resumed anywhere in a schedule, on kept features, and on two processes."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import ROOT
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from thaw.data.datamodule import Batch

POLICIES = sorted(path.stem for path in (ROOT / "configs" / "freeze").glob("*.yaml"))
SCHEDULED = {"gradual": 5, "lp_ft": 5}  # epochs until all of the tiny ViT trains, and one more
EVERY = ["trainer.val_check_interval=0.5", "callbacks.last_checkpoint.filename='{step}'"]
EVERY += ["callbacks.last_checkpoint.save_top_k=-1"]  # a checkpoint in the middle and at the end of each epoch

Train = Callable[..., Path]


def states(run_dir: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same(expected: Any, got: Any, place: str = "") -> None:
    """Equal to the last bit, tensors in nested containers too."""
    assert type(expected) is type(got), place
    if isinstance(expected, dict):
        assert expected.keys() == got.keys(), place
        for key in expected:
            assert_same(expected[key], got[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(expected) == len(got), place
        for number, (one, other) in enumerate(zip(expected, got, strict=True)):
            assert_same(one, other, f"{place}[{number}]")
    elif isinstance(expected, Tensor):
        assert torch.equal(expected, got), place
    else:
        assert expected == got, place


@pytest.mark.parametrize("name", POLICIES)
def test_resumed_equals_uninterrupted(train: Train, tiny_run: list[str], name: str) -> None:
    """From the middle and the end of the epochs before, at and after a thaw: weights, moments and schedule."""
    epochs = SCHEDULED.get(name, 2)
    run = [*tiny_run, *EVERY, f"freeze={name}", f"trainer.max_epochs={epochs}", "test=false"]
    if name in SCHEDULED:
        run += ["backbone.arguments.drop_path_rate=0.2", "augment=affine"]
    whole = train(*run, name="whole")
    steps = {"gradual": [2, 4, 6, 14, 18], "lp_ft": [8, 10, 12, 14]}.get(name, [2])
    last = states(whole, f"step={4 * epochs}")
    for step in steps:
        resumed = train(f"resume='{whole}/checkpoints/step={step}.ckpt'", name=f"from {step}")
        got = states(resumed, f"step={4 * epochs}")
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "frozen"):
            assert_same(last.get(part), got.get(part), f"{name}: {part} from {step}")


# Kept features


class FeatureCheck(L.Callback):
    """Kept features are those of the layers that are frozen in this epoch; counts the batches that carry some."""

    kept: list[tuple[int, int]] = []  # noqa: RUF012  # (epoch, cut) of each such batch

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        assert pl_module.cut == pl_module.thaw.cut(trainer.current_epoch)
        if batch.features is not None:
            expected = pl_module.backbone.prefix(pl_module.preprocess(batch.images), pl_module.cut)
            torch.testing.assert_close(batch.features, expected, rtol=1e-5, atol=1e-6)
            self.kept.append((trainer.current_epoch, pl_module.cut))


@pytest.mark.parametrize(
    ("policy", "epochs", "kept"),
    [
        (["freeze=lp_ft", "freeze.probe_epochs=2"], 4, [(0, 5), (1, 5)]),
        (["freeze=gradual", "freeze.epochs=2"], 7, [(0, 5), (1, 5), (2, 3), (3, 3), (4, 2), (5, 2)]),
        (["freeze=gradual", "freeze.blocks=2"], 3, [(0, 5)]),  # a pass for a single epoch is not worth it
        (["freeze=last_blocks", "freeze.k=1"], 2, [(0, 3), (1, 3)]),
        (["freeze=lora", "freeze.lora.last=2"], 2, [(0, 2), (1, 2)]),
    ],
    ids=["lp_ft", "gradual", "gradual by twos", "last_blocks", "lora"],
)
def test_kept_features_change_nothing(
    train: Train, tiny_run: list[str], policy: list[str], epochs: int, kept: list[tuple[int, int]]
) -> None:
    """Memory and disk agree to the bit; with pixels to float32 rounding, as sums differ with the size of a batch."""
    run = [*tiny_run, *policy, f"trainer.max_epochs={epochs}", "test=false", "optim=sgd", "optim.lr=0.05"]
    weights = {}
    for mode in ("off", "memory", "disk"):
        FeatureCheck.kept = []
        check = f"+callbacks.check._target_={__name__}.FeatureCheck"
        weights[mode] = states(train(*run, f"cache.mode={mode}", check, name=mode))["state_dict"]
        assert sorted(set(FeatureCheck.kept)) == ([] if mode == "off" else kept)
        assert len(FeatureCheck.kept) == 4 * len(set(FeatureCheck.kept))
    assert_same(weights["memory"], weights["disk"])
    for name, tensor in weights["off"].items():
        torch.testing.assert_close(weights["memory"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


# Two processes


class RankRecord(L.Callback):
    """Writes what each rank holds after every epoch, and what gathers its gradients."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        gc.collect()
        wrapped = [each for each in gc.get_objects() if type(each) is DistributedDataParallel]
        record = {
            "weights": dict(pl_module.state_dict()),
            "gradients": self.gradients,
            "wrappers": len(wrapped),
        }
        torch.save(record, self.folder / f"rank{trainer.global_rank}_epoch{trainer.current_epoch}.pt")
        self.gradients = []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epochs"), [("gradual", 5), ("lp_ft", 2), ("lora", 2)])
def test_two_processes_equal_one(
    train: Train, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, epochs: int
) -> None:
    """At the same global batch; gradients are averaged once over the processes, also after each thaw."""
    changes = ["freeze.probe_epochs=1"] if name == "lp_ft" else []
    run = [*tiny_run, f"freeze={name}", *changes, "test=false", "optim=sgd", "optim.lr=0.05"]
    run += [f"trainer.max_epochs={epochs}", f"+callbacks.record._target_={__name__}.RankRecord"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py")])  # what the other rank runs
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests'}{os.pathsep}{ROOT}", prepend=os.pathsep)
    for ranks, settings in ((1, ["data.batch_size=16"]), (2, ["data.batch_size=8", "trainer=ddp_cpu"])):
        folder = tmp_path / f"ranks{ranks}"
        folder.mkdir()
        settings += ["trainer.precision=32-true", "trainer.enable_progress_bar=false"]
        train(*run, *settings, f"+callbacks.record.folder={folder}", name=f"ranks{ranks}")
    for epoch in range(epochs):
        one, first, second = (
            torch.load(tmp_path / f"ranks{ranks}" / f"rank{rank}_epoch{epoch}.pt", weights_only=True)
            for ranks, rank in ((1, 0), (2, 0), (2, 1))
        )
        assert_same(first["weights"], second["weights"], f"epoch {epoch}")
        assert len(one["gradients"]) == 4
        for step, expected in enumerate(one["gradients"]):
            got = first["gradients"][step]
            assert_same(got, second["gradients"][step], f"epoch {epoch} step {step}")
            assert expected.keys() == got.keys()
            for parameter, gradient in expected.items():
                torch.testing.assert_close(got[parameter], gradient, rtol=1e-3, atol=1e-5, msg=f"{epoch} {parameter}")
        for parameter, tensor in one["weights"].items():
            torch.testing.assert_close(first["weights"][parameter], tensor, rtol=1e-4, atol=1e-5, msg=parameter)
        assert first["wrappers"] == second["wrappers"] == 1, "an earlier wrapper and its hooks are still there"
