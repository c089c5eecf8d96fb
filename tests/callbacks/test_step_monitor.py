"""What StepMonitor logs, against norms that are computed one by one; training is the same to the last bit."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from thaw.callbacks.step_monitor import StepMonitor, peak_flops
from thaw.classifier import Classifier
from thaw.data.loader import Batch


class Kept(Logger):
    name = version = "kept"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        if "grad_norm/all" in metrics:
            self.rows.append(metrics)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class Naive(L.Callback):
    """The gradients of each step, and the weights around it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        named = dict(pl_module.named_parameters())
        self.gradients.append({name: each.grad.clone() for name, each in named.items() if each.grad is not None})
        self.weights.append({name: each.detach().clone() for name, each in named.items()})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights.append({name: each.detach().clone() for name, each in pl_module.named_parameters()})


def norm(tensors: dict[str, Tensor], model: Classifier, depth: int | None = None) -> float:
    chosen = [each.flatten() for name, each in tensors.items() if depth in (None, model.depths()[name])]
    return float(torch.cat(chosen).norm())


def run(build: Callable[..., Classifier], fit: Callable, batch: Batch, monitor: bool, **changes: Any) -> Any:
    torch.manual_seed(0)
    model, kept, naive, seen = build("last_blocks", optim={"lr": 0.1}), Kept(), Naive(), StepMonitor()
    callbacks = [naive, *([seen] if monitor else [])]
    settings = {"logger": kept, "log_every_n_steps": 2, "callbacks": callbacks, "gradient_clip_val": 0.01} | changes
    fit(model, [batch] * 4, epochs=2, **settings)
    return model, kept.rows, naive, seen


@pytest.mark.parametrize("accumulated", [1, 2])
def test_norms_are_those_of_each_tensor(
    classifier: Callable[..., Classifier],
    fit: Callable,
    batch: Batch,
    accumulated: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("thaw.callbacks.step_monitor.FEWEST_STEPS", 1)
    changes = {"accumulate_grad_batches": accumulated}
    model, rows, naive, seen = run(classifier, fit, batch, True, **changes)
    assert len(rows) == 4 // accumulated
    top = max(model.depths().values())
    for number, row in enumerate(rows):
        step = 2 * number + 1
        gradients, before = naive.gradients[step], naive.weights[step]
        trained = {name: each for name, each in before.items() if name in gradients}
        after = {name: naive.weights[step + 1][name] for name in gradients}
        change = {name: after[name] - trained[name] for name in gradients}
        assert row["grad_norm/all"] == pytest.approx(norm(gradients, model), rel=1e-5)  # more than it is clipped to
        assert row["grad_norm/all"] > 0.01
        assert row["weight_norm/all"] == pytest.approx(norm(after, model), rel=1e-5)
        for key, depth in (("all", None), (f"layer{top}", top), (f"layer{top - 1}", top - 1)):
            expected = norm(change, model, depth) / norm(trained, model, depth)
            assert row[f"update_ratio/{key}"] == pytest.approx(expected, rel=1e-4)
        assert f"grad_norm/layer{top - 3}" not in row  # frozen
        assert row["train/images_per_second"] > 0 and row["train/share_of_peak"] > 0
    assert len(seen.spikes.recent) == len(naive.gradients)  # type: ignore[union-attr]
    without, *_ = run(classifier, fit, batch, False, **changes)
    for name, weights in without.state_dict().items():
        assert torch.equal(weights, model.state_dict()[name]), name


def test_flops_are_those_of_the_products(
    classifier: Callable[..., Classifier], fit: Callable, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear head: B D K multiplications and as many additions forward, as many for the weights' gradient."""
    monkeypatch.setattr("thaw.callbacks.step_monitor.FEWEST_STEPS", 1)
    model, seen = classifier("linear_probe"), StepMonitor()
    features = torch.randn(16, 32)
    cached = Batch(batch.images, batch.labels, batch.indices, features=features)
    model.cut = len(model.backbone.layers)
    monkeypatch.setattr(Classifier, "features", lambda self, batch: batch.features)
    fit(model, [cached] * 2, logger=Kept(), callbacks=[seen])
    assert seen.flops == 2 * 2 * 32 * 10
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e6


def test_the_state_continues() -> None:
    seen, later = StepMonitor(), StepMonitor()
    seen.validations = [{"epoch": 1, "val/acc": 0.5}]
    later.load_state_dict(seen.state_dict())
    assert later.validations == seen.validations
