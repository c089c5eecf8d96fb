"""Policies in whole runs on cached features."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from thaw.data.datamodule import Batch

Train = Callable[..., Path]


def states(run_dir: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)


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
    for name, tensor in weights["off"].items():
        assert torch.equal(weights["memory"][name], weights["disk"][name]), name
        torch.testing.assert_close(weights["memory"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
