"""Numbers about predictions; pure functions of tensors."""

import math

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_precision,
    multiclass_recall,
)

BINS = 15  # of confidence, as in Guo et al. 2017


def accuracy_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), at 95 % for the default z.

    It keeps its coverage near 100 % correct, where the normal approximation does not.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total}: expected 0 <= correct <= total and total > 0.")
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def worst_digits(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Indices (count,) of the digits with the highest cross-entropy, worst first.

    Args:
        logits: (N, 10).
        labels: (N,).
    """
    losses = F.cross_entropy(logits, labels, reduction="none")  # (N,)
    return losses.topk(min(count, len(labels))).indices


def least_certain(logits: Tensor, count: int) -> Tensor:
    """Indices (count,) of the digits whose best class has the lowest probability, least certain first."""
    return logits.softmax(dim=1).amax(dim=1).topk(min(count, len(logits)), largest=False).indices


def class_scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of each class, (C,) both; NaN for a class that is never predicted, or never there.

    Args:
        logits: (N, C).
        labels: (N,).
    """
    classes, undefined = logits.shape[1], float("nan")
    precision = multiclass_precision(logits, labels, classes, average="none", zero_division=undefined)
    return precision, multiclass_recall(logits, labels, classes, average="none", zero_division=undefined)


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error (Naeini et al. 2015): the mean gap between confidence and accuracy, over bins."""
    error = multiclass_calibration_error(logits.softmax(dim=1), labels, logits.shape[1], n_bins=BINS, norm="l1")
    return float(error)


def reliability(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean confidence, accuracy and count of the digits in each of `BINS` bins of confidence; NaN in empty ones."""
    confidence, predictions = logits.softmax(dim=1).max(dim=1)
    places = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)  # (0, 1/15], (1/15, 2/15], ...
    counts = torch.bincount(places, minlength=BINS)
    sums = (
        torch.bincount(places, weights=values.double(), minlength=BINS)
        for values in (confidence, predictions == labels)
    )
    means = [total / counts for total in sums]
    return means[0], means[1], counts


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The number T for which softmax(logits / T) has the lowest cross-entropy (Guo et al. 2017, section 4.2).

    Args:
        logits, labels: (N, 10) and (N,) of validation digits.
    """
    log_inverse = torch.zeros((), dtype=torch.float64, requires_grad=True)  # log 1/T
    logits = logits.double()
    optimizer = torch.optim.LBFGS([log_inverse], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(log_inverse.exp() * logits, labels)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return min(max(math.exp(-log_inverse.item()), 1e-3), 1e3)


def mcnemar(first: Tensor, second: Tensor) -> tuple[int, int, float]:
    """Whether two models err equally often on the same digits (McNemar 1947), by the exact binomial test.

    Args:
        first, second: bool (N,), whether each model is right.

    Returns:
        how many digits only the first has right, how many only the second, and the two-sided p-value.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    return only_first, only_second, float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
