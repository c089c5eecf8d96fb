"""A resumed run equals one that was never interrupted, to the last bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from torch import Tensor

from thaw.models.classifier import Classifier

RUN = [
    *("experiment=vit_last_blocks", *SMALL, "trainer.max_epochs=3", "trainer.val_check_interval=0.5"),
    *("backbone.arguments.drop_path_rate=0.2", "callbacks.early_stopping=null"),
]


def weights(run_dir: Path, name: str = "last") -> dict[str, Tensor]:
    return torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    ("crash_at", "saved_at", "augment"),
    [(9, 8, "affine"), (14, 12, "affine"), (14, 12, "none")],
    ids=["after an epoch", "mid-epoch", "mid-epoch on kept features"],
)
def test_resume_equals_uninterrupted(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, crash_at: int, saved_at: int, augment: str
) -> None:
    """8 steps an epoch, a checkpoint every 4: the crash comes a little later than the last checkpoint."""
    run = [*RUN, f"augment={augment}"]
    whole = train(*run, name="whole")
    assert (whole.parents[2] / "cache").exists() == (augment == "none")

    step = Classifier.training_step

    def crash(self: Classifier, batch: object, batch_idx: int) -> Tensor:
        if self.global_step == crash_at:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)  # type: ignore[arg-type]

    monkeypatch.setattr(Classifier, "training_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train(*run, name="cut")
    monkeypatch.undo()
    cut = whole.parent / "cut"
    assert torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == saved_at

    resumed = train(f"resume={cut}", name="resumed")

    expected, got = weights(whole), weights(resumed)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    for name, tensor in weights(whole, "best").items():
        assert torch.equal(tensor, weights(resumed, "best")[name]), name


def test_pretraining_starts_from_the_weights_of_another_run(train: Callable[..., Path], tiny_run: list[str]) -> None:
    run = ["experiment=pretrain_mae", *tiny_run, "trainer.max_epochs=1"]
    first = train(*run, name="first")
    second = train(*run, f"start_from={first}/checkpoints/last.ckpt", "optim.lr=1e-12", name="second")
    expected, got = weights(first), weights(second)
    assert all(torch.allclose(tensor, got[name], atol=1e-6) for name, tensor in expected.items())


def test_a_resumed_run_has_the_learning_rate_that_is_typed(train: Callable[..., Path], tiny_run: list[str]) -> None:
    first = train(*tiny_run, "freeze=full", "trainer.max_epochs=2", name="first")
    typed = [f"resume={first}", "trainer.max_epochs=4", "optim.lr=5e-4", "optim.weight_decay=0.2"]
    resumed = train(*typed, name="resumed")
    groups = {
        run: torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
        for run in (first, resumed)
    }
    for before, after in zip(groups[first], groups[resumed], strict=True):
        assert after["initial_lr"] == pytest.approx(before["initial_lr"] / 2)  # tiny_run's is 1e-3
        assert after["weight_decay"] == (0.2 if before["weight_decay"] else 0)
