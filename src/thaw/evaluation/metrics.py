"""Numbers about predictions: pure functions of tensors.

Shapes: N images, C classes; logits (N, C), labels (N,).
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_precision, multiclass_recall

from thaw.run.errors import UserError

BINS = 15  # of confidence, as in Guo et al. 2017
MANY = 20  # classes, above which it counts, too, whether the label is among the best 5
UNEVEN = 1.5  # the images of the largest class over those of the smallest, above which the mean recall counts, too
OTHER_ACCURACIES = {
    "top-5": "test/top5",
    "balanced": "test/balanced_acc",
    "without listed images": "test/acc_unlisted",
}  # keys of `accuracy_facts` by their names


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion at 95 % (Wilson 1927), which keeps its coverage near 100 % correct."""
    share, z = correct / total, NormalDist().inv_cdf(0.975)  # scipy.stats has it, and takes 0.5 s to import
    center, half = share + z**2 / (2 * total), z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    low, high = ((center + side) / (1 + z**2 / total) for side in (-half, half))
    return (low if correct else 0.0), (high if correct < total else 1.0)


def accuracy_facts(predictions: Tensor, labels: Tensor, listed: Sequence[int] = ()) -> dict[str, Any]:
    """Accuracy of predictions, (N,) or logits (N, C), on test images with its 95 % interval, as values of JSON.

    `test/top5` is there for logits of more than 20 classes, `test/balanced_acc`, the mean recall of the classes, where
    the largest has more than 1.5 times the images of the smallest, and `test/acc_unlisted` that without the images
    `listed` by `data.exclude` or `data.relabel`.

    Raises:
        UserError: there are no images.
    """
    if not (total := len(labels)):
        raise UserError("There are no test images, so there is no accuracy; give a test split, or set test=false.")
    answers = predictions if predictions.ndim == 1 else predictions.argmax(dim=1)
    counts = torch.bincount(labels)  # of each class
    correct = torch.bincount(labels[answers == labels], minlength=len(counts)).double()
    low, high = accuracy_interval(int(correct.sum()), total)
    facts = {"test/acc": float(correct.sum()) / total, "test/acc_low": low, "test/acc_high": high}
    if predictions.ndim == 2 and predictions.shape[1] > MANY:
        facts["test/top5"] = float((predictions.topk(5).indices == labels[:, None]).any(dim=1).double().mean())
    if counts.max() > UNEVEN * counts[counts > 0].min():
        facts["test/balanced_acc"] = float((correct / counts)[counts > 0].mean())  # of classes that have images
    if 0 < len(listed) < total:
        unlisted = torch.ones(total, dtype=torch.bool)
        unlisted[list(listed)] = False
        facts["test/acc_unlisted"] = float((answers == labels).cpu()[unlisted].double().mean())
    return {**facts, "n_test": total}


def other_accuracies(facts: Mapping[str, Any]) -> str:
    """`, top-5 99.10%, balanced 97.00%` where `accuracy_facts` has them, to be added to a line."""
    return "".join(f", {name} {facts[key]:.2%}" for name, key in OTHER_ACCURACIES.items() if key in facts)


def highest_losses(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Indices (count,) of the images with the highest cross-entropy, worst first."""
    losses = F.cross_entropy(logits, labels, reduction="none")  # (N,)
    return losses.topk(min(count, len(labels))).indices


def least_certain(logits: Tensor, count: int) -> Tensor:
    """Indices (count,) of the images whose best class has the lowest probability, least certain first."""
    return logits.softmax(dim=1).amax(dim=1).topk(min(count, len(logits)), largest=False).indices


def class_scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of each class, (C,) both; NaN for a class that is never predicted, or never there."""
    classes, undefined = logits.shape[1], float("nan")
    precision = multiclass_precision(logits, labels, classes, average="none", zero_division=undefined)
    return precision, multiclass_recall(logits, labels, classes, average="none", zero_division=undefined)


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error (Naeini et al. 2015): the mean gap between confidence and accuracy, over bins."""
    error = multiclass_calibration_error(logits.softmax(dim=1), labels, logits.shape[1], n_bins=BINS, norm="l1")
    return float(error)


def reliability(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean confidence, accuracy and count of the images in each of `BINS` bins of confidence; NaN in empty ones."""
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
    """The T for which softmax(logits / T) has the lowest cross-entropy on validation images (Guo et al. 2017, 4.2).

    Without images it is 1.
    """
    if not len(labels):
        return 1.0
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
    """Whether two models err equally often on the same images (McNemar 1947), by the exact binomial test.

    `first` and `second`, bool (N,), say whether a model is correct. Returns how many images only the first classifies
    correctly, how many only the second, and the two-sided p-value.
    """
    from scipy.stats import binomtest  # takes 0.5 s

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    return only_first, only_second, float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
