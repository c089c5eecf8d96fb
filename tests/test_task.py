"""The loss of one class an image against its definition."""

import pytest
import torch

from thaw.task import SingleLabel

LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1, 1, 1, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([2.0, 0.5, 2.0])])
def test_training_loss(smoothing: float, weights: torch.Tensor | None) -> None:
    task = SingleLabel(3, smoothing)
    task.class_weights = weights
    by_hand = []
    for row, label in zip(LOGITS.log_softmax(dim=1), LABELS.tolist(), strict=True):
        share = torch.full((3,), smoothing / 3)
        share[label] += 1 - smoothing
        by_hand.append(-(share * row * (1 if weights is None else weights)).sum())
    assert torch.allclose(task.training_loss(LOGITS, LABELS, reduction="none"), torch.stack(by_hand))
    assert torch.allclose(task.training_loss(LOGITS, LABELS), torch.stack(by_hand).mean())


def test_validation_is_neither_smoothed_nor_weighted() -> None:
    task = SingleLabel(3, 0.1)
    task.class_weights = torch.tensor([2.0, 0.5, 2.0])
    wanted = -LOGITS.log_softmax(dim=1)[torch.arange(6), LABELS]
    assert torch.allclose(task.loss(LOGITS, LABELS, reduction="none"), wanted)


def test_accuracy_and_probabilities() -> None:
    task = SingleLabel(3, 0.0)
    metric = task.metric()
    metric.update(LOGITS, LABELS)
    assert metric.compute() == (LOGITS.argmax(dim=1) == LABELS).float().mean()
    assert torch.allclose(task.probabilities(LOGITS).sum(dim=1), torch.ones(6))
