import pytest
import torch
from scipy.stats import binomtest

from thaw.evaluation.metrics import accuracy_interval, worst_digits


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (487, 500), (9921, 10_000)])
def test_interval_equals_scipys(correct: int, total: int) -> None:
    expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert accuracy_interval(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-7)


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_impossible_counts(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{correct} correct of {total}"):
        accuracy_interval(correct, total)


def test_worst_digits() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0], [1.0, 0.0], [0.0, 9.0]])
    assert worst_digits(logits, torch.tensor([0, 0, 0, 0]), count=2).tolist() == [3, 1]
    assert len(worst_digits(logits, torch.tensor([0, 0, 0, 0]), count=9)) == 4
