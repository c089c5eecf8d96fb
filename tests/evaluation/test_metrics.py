import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import binom
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support, top_k_accuracy_score
from torch import Tensor

from thaw.evaluation.metrics import (
    BINS,
    accuracy_facts,
    accuracy_interval,
    calibration_error,
    class_scores,
    fit_temperature,
    highest_losses,
    least_certain,
    mcnemar,
    other_accuracies,
    reliability,
)


@pytest.fixture
def predicted() -> tuple[Tensor, Tensor]:
    """Logits that are too sure of themselves, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(700, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return 3 * logits, labels  # right at temperature 3


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (487, 500), (9921, 10_000)])
def test_interval_equals_wilsons_formula(correct: int, total: int) -> None:
    """Wilson 1927: the proportions whose distance from the one found is 1.96 of their own standard errors."""
    z, share = 1.9599639845400545, correct / total
    centre, scale = share + z * z / (2 * total), 1 + z * z / total
    spread = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    assert accuracy_interval(correct, total) == pytest.approx(((centre - spread) / scale, (centre + spread) / scale))


def test_accuracy_facts() -> None:
    low, high = accuracy_interval(3, 4)
    facts = accuracy_facts(torch.tensor([1, 2, 3, 0]), torch.tensor([1, 2, 3, 4]))
    assert facts == {"test/acc": 0.75, "test/acc_low": low, "test/acc_high": high, "n_test": 4}
    with pytest.raises(ValueError, match=r"There are no test images.*give a test split"):
        accuracy_facts(torch.tensor([]), torch.tensor([]))


@pytest.mark.parametrize("absent", [[], [3, 29]])
def test_top5_and_balanced_accuracy_equal_scikit_learns(absent: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.arange(1, 31).float(), 400, replacement=True, generator=generator)
    labels = labels[~torch.isin(labels, torch.tensor(absent))]
    logits = torch.randn(len(labels), 30, generator=generator) + 1.5 * F.one_hot(labels, 30)
    facts = accuracy_facts(logits, labels)
    expected = top_k_accuracy_score(labels, logits, k=5, labels=range(30))
    assert facts["test/top5"] == pytest.approx(expected) and facts["test/acc"] < expected < 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of predicted classes that are absent
        assert facts["test/balanced_acc"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(dim=1)))
    assert facts["test/balanced_acc"] != pytest.approx(facts["test/acc"])
    answers = accuracy_facts(logits.argmax(dim=1), labels)  # as a probe gives them
    assert "test/top5" not in answers and answers == {key: facts[key] for key in answers}


def test_which_accuracies_are_of_interest() -> None:
    """Top-5 above 20 classes; balanced accuracy above 1.5 times the images of the smallest class that has any."""
    assert "test/top5" not in accuracy_facts(torch.eye(20), torch.arange(20))
    assert accuracy_facts(torch.eye(21), torch.arange(21).roll(1))["test/top5"] < 1
    three_to_two, two_to_one = torch.tensor([0, 0, 0, 4, 4]), torch.tensor([0, 0, 4])
    assert "test/balanced_acc" not in accuracy_facts(three_to_two, three_to_two)
    assert accuracy_facts(torch.zeros(3), two_to_one)["test/balanced_acc"] == 0.5
    assert (
        other_accuracies({"test/acc": 0.1, "test/top5": 0.5, "test/balanced_acc": 0.25})
        == ", top-5 50.00%, balanced 25.00%"
    )
    assert other_accuracies({"test/acc": 0.1}) == ""
    listed = accuracy_facts(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 1]), listed=[2])
    assert listed["test/acc_unlisted"] == 2 / 3 and listed["test/acc"] == 0.5 and listed["n_test"] == 4
    assert "test/acc_unlisted" not in accuracy_facts(torch.zeros(2), torch.zeros(2).long(), listed=[0, 1])


@pytest.mark.parametrize("label", [0, 1])
def test_a_split_of_one_image(label: int) -> None:
    logits, labels = torch.tensor([[0.0, 2.0]]), torch.tensor([label])
    facts = accuracy_facts(logits, labels)
    assert facts["test/acc"] == label and facts["n_test"] == 1 and "test/balanced_acc" not in facts
    assert calibration_error(logits, labels) == pytest.approx(abs(label - float(logits.softmax(dim=1).amax())))
    assert 0 < fit_temperature(logits, labels) < 0.2 if label else fit_temperature(logits, labels) == 1e3
    assert fit_temperature(logits[:0], labels[:0]) == 1


def test_highest_losses() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0], [1.0, 0.0], [0.0, 9.0]])
    assert highest_losses(logits, torch.tensor([0, 0, 0, 0]), count=2).tolist() == [3, 1]
    assert len(highest_losses(logits, torch.tensor([0, 0, 0, 0]), count=9)) == 4


def test_least_certain() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.2, 0.0], [0.0, 1.0]])
    assert least_certain(logits, count=2).tolist() == [1, 2]


def test_class_scores_equal_scikit_learns(predicted: tuple[Tensor, Tensor]) -> None:
    logits, labels = predicted
    precision, recall, _, _ = precision_recall_fscore_support(labels, logits.argmax(dim=1))
    found = class_scores(logits, labels)
    assert found[0].numpy() == pytest.approx(precision)
    assert found[1].numpy() == pytest.approx(recall)


def test_scores_of_classes_without_images_are_undefined(predicted: tuple[Tensor, Tensor]) -> None:
    """Class 3 is never there and 7 never predicted: neither 0 nor 1 would be true."""
    logits, labels = predicted
    logits[:, 7] = -torch.inf
    kept = labels != 3
    precision, recall, _, _ = precision_recall_fscore_support(
        labels[kept], logits[kept].argmax(dim=1), labels=range(10), zero_division=np.nan
    )
    found = class_scores(logits[kept], labels[kept])
    assert found[0].isnan().nonzero().tolist() == [[7]] and found[1].isnan().nonzero().tolist() == [[3]]
    assert found[0].numpy() == pytest.approx(precision, nan_ok=True)
    assert found[1].numpy() == pytest.approx(recall, nan_ok=True)


def test_calibration_error_is_the_gap_of_the_reliability_diagram(predicted: tuple[Tensor, Tensor]) -> None:
    """By the definition, digit for digit; and the bars of the diagram give the same number."""
    logits, labels = predicted
    gaps = [[0.0, 0.0] for _ in range(BINS)]
    for row, label in zip(logits.softmax(dim=1), labels, strict=True):
        confidence = float(row.max())
        bin = min(int(confidence * BINS), BINS - 1)
        gaps[bin][0] += confidence
        gaps[bin][1] += float(row.argmax() == label)
    expected = sum(abs(confidence - right) for confidence, right in gaps) / len(labels)
    assert calibration_error(logits, labels) == pytest.approx(expected, abs=1e-5)
    confidence, accuracy, counts = reliability(logits, labels)
    drawn = float(((confidence - accuracy).abs() * counts).nan_to_num().sum() / counts.sum())
    assert drawn == pytest.approx(expected, abs=1e-5)


def test_temperature_equals_a_search_of_one_number(predicted: tuple[Tensor, Tensor]) -> None:
    logits, labels = predicted
    best = minimize_scalar(lambda t: float(F.cross_entropy(logits / t, labels)), bounds=(0.1, 20), method="bounded")
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(best.x, rel=1e-3)
    assert temperature == pytest.approx(3, rel=0.15)
    assert calibration_error(logits / temperature, labels) < calibration_error(logits, labels) / 2


def test_temperature_of_a_model_without_errors_is_finite() -> None:
    labels = torch.arange(100) % 10
    assert 0 < fit_temperature(F.one_hot(labels, 10).float(), labels) < 0.1


def test_mcnemar_equals_the_sum_of_the_binomial() -> None:
    first = torch.tensor([True] * 90 + [True] * 9 + [False] * 3 + [False] * 5)
    second = torch.tensor([True] * 90 + [False] * 9 + [True] * 3 + [False] * 5)
    assert mcnemar(first, second) == (9, 3, pytest.approx(2 * binom.cdf(3, 12, 0.5)))
    assert mcnemar(second, first)[:2] == (3, 9)
    assert mcnemar(first, first) == (0, 0, 1.0)
