"""The classifier: it learns, its metrics equal counting, and gradients reach what trains and nothing else."""

from collections.abc import Callable
from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from thaw.classifier import Classifier
from thaw.data.loader import Batch
from thaw.models.heads import MLPHead
from thaw.run.values import check_types

Build = Callable[..., Classifier]


class Losses(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, _trainer: L.Trainer, _module: L.LightningModule, outputs: dict, *_: object) -> None:
        self.seen.append(outputs["loss"].item())


@pytest.mark.parametrize("freeze", ["linear_probe", "full"])
def test_training_lowers_the_loss(classifier: Build, batch: Batch, fit: Callable, freeze: str) -> None:
    losses = Losses()
    fit(classifier(freeze), [batch] * 5, epochs=6, callbacks=[losses])
    assert losses.seen[-1] < 0.6 * losses.seen[0]


def test_logged_metrics_equal_counting(classifier: Build, batch: Batch, fit: Callable) -> None:
    halves = [Batch(*(part[places] for part in batch[:3])) for places in (slice(5), slice(5, None))]  # unequal
    model = classifier("full")
    trainer = fit(model, halves)
    logits = model.eval()(batch.images)
    right = sum(int(row.argmax()) == int(label) for row, label in zip(logits, batch.labels, strict=True))
    assert trainer.callback_metrics["val/acc"].item() == pytest.approx(right / 16)
    expected = -logits.log_softmax(dim=1)[range(16), batch.labels].mean().item()
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(expected, abs=1e-5)
    assert {"train/loss", "train/acc"} <= trainer.callback_metrics.keys()


def test_test_step_counts_and_returns_logits(classifier: Build, batch: Batch, fit: Callable) -> None:
    model = classifier("full")
    trainer = fit(model, [batch])
    loader = torch.utils.data.DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    (metrics,) = trainer.test(model, loader, verbose=False)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    logits = model.eval().test_step(batch, 0)
    assert torch.equal(logits, model(batch.images))
    assert metrics["test/acc"] == pytest.approx((logits.argmax(dim=1) == batch.labels).float().mean().item())


def loss_of(model: Classifier, batch: Batch) -> Tensor:
    """The loss of a training step outside a trainer."""
    model.thaw.apply(0)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return model.training_step(batch, 0)


@pytest.mark.parametrize("pool", ["model", "class_and_mean"])
@pytest.mark.parametrize("freeze", ["linear_probe", "last_blocks", "full"])
def test_gradient_reaches_every_trainable_parameter(
    classifier: Build, batch: Batch, tiny: dict, freeze: str, pool: str
) -> None:
    head = partial(MLPHead, hidden_features=16, dropout=0.0)
    model = classifier(freeze, head=head, arguments=tiny, pool=pool)
    loss_of(model, batch).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("freeze", ["linear_probe", "last_blocks"])
def test_no_graph_is_kept_for_the_frozen_part(classifier: Build, batch: Batch, freeze: str) -> None:
    model, graphs = classifier(freeze), []
    hook = lambda _module, _inputs, output: graphs.append(output.requires_grad)  # noqa: E731
    for module in (*model.backbone.model.blocks, model.backbone, model.head):
        module.register_forward_hook(hook)
    loss_of(model, batch)
    assert graphs == ([False] * 4 + [True] if freeze == "linear_probe" else [False] + [True] * 4)


def test_loss_is_the_cross_entropy_of_the_augmented_digits(classifier: Build, batch: Batch) -> None:
    class Inverted(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 255 - images

    model = classifier("full")
    model.augment, model.task.label_smoothing = Inverted(), 0.1
    inverted = model(255 - batch.images)
    torch.testing.assert_close(
        loss_of(model, batch), F.cross_entropy(inverted, batch.labels, label_smoothing=0.1), rtol=1e-5, atol=1e-6
    )


def test_the_head_is_the_deepest_layer(classifier: Build) -> None:
    depths = classifier().depths()
    assert depths.keys() == dict(classifier().named_parameters()).keys()
    assert {name for name, depth in depths.items() if depth == 4} == {"head.linear.weight", "head.linear.bias"}
    assert max(depths.values()) == 4


def test_label_smoothing_out_of_range() -> None:
    block = OmegaConf.create({"_target_": "thaw.classifier.Classifier", "label_smoothing": 1.5})
    with pytest.raises(ValueError, match=r"model\.label_smoothing=1\.5 must be a number from 0 to 1"):
        check_types(block, "model.")
