"""What features say of an image's class without its own label: logistic regression and nearest neighbours.

Shapes: N images, D features, K classes, k neighbours.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thaw.evaluation.probes import nearest
from thaw.models.logistic import fit_logistic, standardisation

FIT_ITERATIONS, FIT_TOLERANCE = 300, 1e-4  # of L-BFGS
TEMPERATURE = 0.07  # of the neighbours' votes, as in configs/probe/knn.yaml


def logistic(features: Tensor, labels: Tensor, classes: int, c: float) -> Callable[[Tensor], Tensor]:
    """Fit a logistic regression to features (N, D); returns a function, features (Q, D) -> probabilities (Q, K)."""
    mean, std = standardisation(features)
    start = features.new_zeros(classes, features.shape[1]), features.new_zeros(classes)
    weight, bias, _ = fit_logistic((features - mean) / std, labels, c, *start, FIT_ITERATIONS, FIT_TOLERANCE)
    return lambda queries: ((queries - mean) / std @ weight.T + bias).softmax(dim=1)


def out_of_fold(views: Sequence[Tensor], labels: Tensor, fold_of: Tensor, classes: int, c: float) -> Tensor:
    """Probabilities (N, K) of each image from a logistic regression that was fitted to the other folds.

    Args:
        views: features (N, D) of the images as they are, which are fitted, and of augmented ones; the mean counts.
        labels, fold_of: (N,)
        c: inverse strength of the L2 penalty, as in scikit-learn.
    """
    probabilities = views[0].new_zeros(len(labels), classes)
    for fold in fold_of.unique():
        held_out = fold_of == fold
        predict = logistic(views[0][~held_out], labels[~held_out], classes, c)
        probabilities[held_out] = torch.stack([predict(view[held_out]) for view in views]).mean(dim=0)
    return probabilities


def neighbours(queries: Tensor, references: Tensor, k: int, name: str, own: bool) -> tuple[Tensor, Tensor]:
    """Cosine similarities (Q, k) and indices (Q, k) of the nearest references, best first.

    `own` says that query i is reference i, or a view of it, which does not count as its neighbour; `name` is of the
    queries, for a line about the progress.
    """
    parts = [*nearest(queries, references, k + own, "cosine", name)]
    similarities, indices = (torch.cat(part) for part in zip(*parts, strict=True))  # (Q, k + own)
    if not own:
        return similarities, indices
    drop = indices == torch.arange(len(queries), device=indices.device)[:, None]
    drop[:, -1] |= ~drop.any(dim=1)  # an image with so many copies that it was not among its own neighbours
    return tuple(part[~drop].view(len(queries), k) for part in (similarities, indices))  # type: ignore[return-value]


def votes(similarities: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Shares (Q, K) of the neighbours' votes, weighted by similarity (Q, k) as in Wu et al. 2018; labels are (Q, k)."""
    weights = ((similarities - similarities[:, :1]) / TEMPERATURE).exp()
    sums = weights.new_zeros(len(weights), classes).scatter_add(1, labels, weights)
    return sums / sums.sum(dim=1, keepdim=True)
