"""The loss of one class an image against its definition."""

import json
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ROOT, compose_config
from own_task import TAGS, Focal

from thaw.data.mnist import load_mnist
from thaw.predict.predictor import load_predictor
from thaw.run.errors import UserError
from thaw.task import Distillation, SingleLabel

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


@pytest.mark.long
def test_several_labels_an_image(train: Callable[..., Path]) -> None:
    """By configuration alone: trained, tested, and predicted with; what is for one class an image says so."""
    data = ["data.source=sample", "data._target_=own_task.TaggedDigits", "model.task._target_=own_task.MultiLabel"]
    probe = ["experiment=vit_linear_probe", *data, "data.train_size=400", "data.batch_size=40", "logger=none"]
    run_dir = train(*probe, "trainer.max_epochs=3", "trainer.precision=32-true")
    facts = json.loads((run_dir / "summary.json").read_text())
    test = load_mnist("MNIST", "nowhere", "sample", None).test
    predictor = load_predictor(str(run_dir), None, "cpu", None, ["own_task"])
    answers = predictor(test.images) > 0.5
    right = [answers[:, k] == torch.isin(test.labels, torch.tensor(digits)) for k, digits in enumerate(TAGS.values())]
    assert facts["test/acc"] == pytest.approx(float(torch.stack(right).double().mean()), abs=1e-6)
    assert facts["test/acc"] > 0.85 and facts["test/acc_low"] is None and predictor.classes == list(TAGS)
    with pytest.raises(UserError, match=r"own_task\.\w+' is refused and was not run"):
        load_predictor(str(run_dir), None, "cpu", None)
    for script, settings in {"eval": [f"run_dir={run_dir}"], "export": []}.items():
        if not (ROOT / f"{script}.py").is_file():  # a fork may have removed it
            continue
        with pytest.raises(UserError, match=rf"{script}\.py is for one class an image, .* MultiLabel"):
            import_module(script).main(compose_config(script, f"ckpt={run_dir}", "allow=[own_task]", *settings))
    with pytest.raises(UserError, match="mix is for one class"):
        train(*probe, "mix=mixup", name="mixed")


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.3), (4.0, 0.9), (2.0, 1.0)])
def test_distillation(temperature: float, share: float) -> None:
    """Against the formula of Hinton et al. 2015, in float64, and autograd's gradient against the one in section 2.1."""
    generator = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(2, 6, 3, generator=generator).double()
    task, logits = Distillation(temperature, share), student.float().requires_grad_()
    soft = [[math.exp(z / temperature) for z in row] for row in teacher.tolist()]
    q = torch.tensor([[z / sum(row) for z in row] for row in soft], dtype=torch.float64)
    torch.testing.assert_close(task.soften(teacher.softmax(dim=1)), q)
    p = (student / temperature).softmax(dim=1)
    wanted = (1 - share) * 0.25 + share * temperature**2 * (q * (q / p).log()).sum(dim=1).mean()
    loss = task.loss(torch.tensor(0.25), logits, task.soften(teacher.softmax(dim=1).float()))
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    loss.backward()
    torch.testing.assert_close(logits.grad.double(), share * temperature * (p - q) / 6, rtol=1e-4, atol=1e-6)


def test_a_teacher_that_is_certain() -> None:
    """Zeros of a sum in 32 bits: the loss is finite, and that of the label."""
    task, certain = Distillation(1.0, 1.0), torch.eye(3)[[0, 2]]
    loss = task.loss(torch.tensor(9.0), LOGITS[[0, 5]], task.soften(certain))
    torch.testing.assert_close(loss, SingleLabel(3, 0.0).training_loss(LOGITS[[0, 5]], LABELS[[0, 5]]))


def test_another_loss() -> None:
    """Against equation 4 of Lin et al. 2017."""
    losses = torch.nn.functional.cross_entropy(LOGITS, LABELS, reduction="none")
    wanted = ((1 - (-losses).exp()) ** 2 * losses).mean()
    assert torch.allclose(Focal(3, 0.0).training_loss(LOGITS, LABELS), wanted)
