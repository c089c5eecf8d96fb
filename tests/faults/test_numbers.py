"""A loss that is no number stops the run with its step, batch and cause, and leaves the weights as they were."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thaw.callbacks.finite_loss import FiniteLoss
from thaw.callbacks.run_checkpoint import PacedCheckpointIO
from thaw.data.module import Batch


class Model(L.LightningModule):
    """The loss is the mean squared output, times `factors[step]`."""

    def __init__(self, factors: list[float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(784, 4).requires_grad_(False)
        self.head = nn.Linear(4, 1)
        self.factors = factors
        self.weights: list[Tensor] = []
        self.validated = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.weights.append(self.head.weight.detach().clone())
        outputs = self.head(self.frozen(batch.images.flatten(1) / 255))
        return outputs.square().mean() * self.factors[self.global_step]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=0.125, weight_decay=0.1)


class Delayed(FiniteLoss):
    """Takes every loss for one on a GPU."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), detach=loss.detach)
        super().on_before_backward(trainer, pl_module, on_gpu)


def fit(model: Model, check: FiniteLoss | None = None, validate: bool = False, **changes: Any) -> None:
    images = torch.full((40, 1, 28, 28), 100, dtype=torch.uint8)
    batches = [Batch(part, torch.zeros(10), torch.arange(10) + 10 * i) for i, part in enumerate(images.split(10))]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": 2, "devices": 1}
    callbacks = [check or FiniteLoss(), *changes.pop("callbacks", [])]
    trainer = L.Trainer(callbacks=callbacks, **quiet | changes)  # type: ignore[arg-type]
    loader: DataLoader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader, loader if validate else None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_run_stops_before_the_weights_change(bad: float) -> None:
    model = Model([1.0] * 6 + [bad, 1.0])
    with pytest.raises(ValueError) as caught:
        fit(model)
    message = str(caught.value)
    assert f"The loss is {bad} at step 6 (epoch 1, batch 2, " in message
    assert "training images [20, 21, 22, 23, 24, 25, 26, 27] ...)" in message
    assert "activations overflow; lower optim.lr" in message
    assert len(model.weights) == 7 and not torch.equal(model.weights[5], model.weights[6])  # it was training
    assert torch.equal(model.head.weight, model.weights[6])
    assert model.head.weight.grad is None


def test_a_finite_loss_goes_on() -> None:
    model = Model([1.0, 1e10, -1e10] + [1.0] * 5)
    fit(model)
    assert len(model.weights) == 8


def test_cause_in_loaded_weights() -> None:
    model = Model([1.0] * 8)
    model.frozen.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the weights that were loaded are not finite, e\.g\. frozen\.weight"):
        fit(model)


def test_cause_in_diverged_weights() -> None:
    class Diverging(Model):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 3:
                self.head.weight.data.fill_(float("inf"))

    with pytest.raises(
        ValueError, match=r"at step 3 .*diverged \(head\.weight is not finite\); lower optim\.lr \(now 1\.2"
    ):
        fit(Diverging([1.0] * 8))


# On an accelerator: losses are looked at together


def test_a_delayed_look_names_the_first_bad_step() -> None:
    model = Model([1.0] * 5 + [float("nan"), 1.0, 1.0])  # the weights are spoiled, so that steps 6 and 7 are bad too
    with pytest.raises(ValueError, match=r"The loss is nan at step 5 \(epoch 1, batch 1, training images \[10, 11, "):
        fit(model, Delayed())
    assert len(model.weights) == 8  # seen when the epoch ended


def test_a_delayed_look_comes_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thaw.callbacks.finite_loss.EVERY", 3)
    model = Model([1.0] * 4 + [float("inf")] + [1.0] * 3)
    with pytest.raises(ValueError, match=r"at step 4 \(epoch 1, batch 0,"):
        fit(model, Delayed(), limit_train_batches=4)
    assert len(model.weights) == 7  # after steps 2, 3 (the end of an epoch) and 6


def test_a_delayed_look_comes_before_validation_and_checkpoint(tmp_path: Path) -> None:
    model = Model([1.0, 1.0, float("nan"), 1.0, 1.0, 1.0, 1.0, 1.0])
    saved = {"callbacks": [ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)], "enable_checkpointing": True}
    with pytest.raises(ValueError, match="at step 2 "):
        fit(model, Delayed(), validate=True, val_check_interval=2, **saved)
    assert len(model.weights) == 4 and model.validated == 4  # after step 1, not after step 3
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"]


def test_delayed_finite_losses_go_on() -> None:
    model, check = Model([1.0] * 8), Delayed()
    fit(model, check, validate=True)
    assert len(model.weights) == model.validated == 8 and not check.unchecked


# What was saved before


def saving(folder: Path) -> dict[str, Any]:
    return {"callbacks": [ModelCheckpoint(folder, "last", enable_version_counter=False)], "enable_checkpointing": True}


@pytest.mark.parametrize("seconds", [None, 0.0, 1e6], ids=["Lightning's files", "written", "held back"])
def test_the_message_names_the_last_good_checkpoint(tmp_path: Path, seconds: float | None) -> None:
    plugins = [] if seconds is None else [PacedCheckpointIO(seconds)]
    with pytest.raises(ValueError) as caught:
        fit(Model([1.0] * 6 + [float("nan"), 1.0]), plugins=plugins, **saving(tmp_path))
    path = tmp_path / "last.ckpt"
    assert f"weights are in {path}; continue with resume={path} optim.lr=<less>." in str(caught.value)
    assert torch.load(path, weights_only=True)["global_step"] == 4  # there once the run has ended


def test_without_a_checkpoint_the_message_names_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No checkpoint was saved before"):
        fit(Model([1.0, 1.0, float("nan"), 1.0]), **saving(tmp_path))
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """The last gradient of an epoch is NaN and its loss is not."""

    class Spoiled(Model):
        def on_before_optimizer_step(self, *_: Any) -> None:
            if self.global_step == 7:
                assert self.head.weight.grad is not None
                self.head.weight.grad.fill_(float("nan"))

    path = tmp_path / "last.ckpt"
    with pytest.raises(ValueError) as caught:
        fit(Spoiled([1.0] * 8), **saving(tmp_path))
    message = str(caught.value)
    assert "The weights after step 8 are not finite and were not saved" in message and f"resume={path} " in message
    assert "training diverged (head.weight is not finite); lower optim.lr" in message
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 4 and all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
