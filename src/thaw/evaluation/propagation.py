"""Probes for few labels: label propagation over a graph of neighbours, and class means.

Shapes: N images, n of them labelled, D features, K classes, Q queries.
"""

from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy import sparse
from scipy.sparse.linalg import cg
from torch import Tensor

from thaw.evaluation.probes import Choice, Labelled, accuracy_if_any, check_data, nearest
from thaw.run.errors import UserError
from thaw.run.values import Count

TOLERANCE = 1e-6  # of the residual, relative to the labels
BALANCING_STEPS = 50  # few: classes seldom have exactly equal shares
SHARPNESS = 4  # at a low one, balancing changes how sure all images are; at a high one, the class of the least sure


def propagation(
    train: Labelled,
    val: Labelled,
    k: Count,
    alpha: Annotated[float, Field(gt=0, lt=1, strict=True, description="0.99 is common")],
) -> Choice:
    """Labels spread from the labelled to the unlabelled images; a query takes those of its nearest images.

    The scores of a query are the mean of its k neighbours' class probabilities, weighted by their cosine similarity:
    queries are classified one by one and are no part of the graph.

    Args:
        k: neighbours of each image.
        alpha: share of an image's scores that comes from its neighbours; the rest comes from its own label.

    Raises:
        UserError: no image without a label, fewer images than neighbours, features that are not finite.
    """
    check_data(train, val)
    size = len(train.labels)
    if (train.labels >= 0).all():
        raise UserError(
            "probe=propagation spreads labels to images without one: set data.labels_per_class, e.g. to 10."
        )
    if k >= size:
        raise UserError(f"probe.k={k} must be less than the {size:,} images of the graph.")
    scores = spread(normalised_graph(train.features, k), train.labels.cpu(), alpha)
    probabilities = balance(scores).to(train.features)  # (N, K)

    def predict(queries: Tensor) -> Tensor:
        return neighbours_mean(queries, train.features, probabilities, k).argmax(dim=1)

    return Choice("k", {k: accuracy_if_any(predict, val)}, k, predict, num_parameters=0)


def spread(links: sparse.csr_matrix, labels: Tensor, alpha: float) -> Tensor:
    """Scores (N, K) float64 of each class: the solution F of (I - alpha S) F = Y (Zhou et al. 2004, equation 5).

    S is `links`, the normalised graph (N, N). Y is 1 / (the number of labelled images of a class) at each of them, so
    that classes with more labels are not preferred. Each class is solved by conjugate gradients.
    """
    system = sparse.identity(len(labels)) - alpha * links
    scores = torch.zeros(len(labels), int(labels.max()) + 1, dtype=torch.float64)
    for label in labels[labels >= 0].unique().tolist():
        known = (labels == label).double()  # (N,)
        scores[:, label] = torch.from_numpy(cg(system, (known / known.sum()).numpy(), rtol=TOLERANCE)[0])
    return scores.clamp_min(0)


def neighbours_mean(queries: Tensor, references: Tensor, values: Tensor, k: int) -> Tensor:
    """The values (N, V) of each query's k nearest references (N, D), in proportion to their similarity: (Q, V)."""
    parts = []
    for similarities, indices in nearest(queries, references, k, "cosine", "query"):  # (B, k)
        weights = similarities.clamp_min(0)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12)
        parts.append((weights[:, :, None] * values[indices]).sum(dim=1))  # (B, k, V) -> (B, V)
    return torch.cat(parts)


def normalised_graph(features: Tensor, k: int) -> sparse.csr_matrix:
    """D^-1/2 (A + A^T) D^-1/2 (N, N): A has the positive cosine similarities of each image (N, D) to its k nearest."""
    size = len(features)
    found = [(pair[0].cpu(), pair[1].cpu()) for pair in nearest(features, features, k + 1, "cosine", "unlabelled")]
    similarities, columns = (torch.cat(parts).flatten().double().numpy() for parts in zip(*found, strict=True))
    rows = np.repeat(np.arange(size), k + 1)
    is_other = rows != columns  # an image is its own nearest
    weights = similarities.clip(min=0)[is_other], (rows[is_other], columns[is_other].astype(int))
    links = sparse.csr_matrix(weights, (size, size))
    links = links + links.T
    scale = sparse.diags(1 / np.sqrt(np.maximum(links.sum(axis=1).A1, np.finfo(float).tiny)))
    return scale @ links @ scale


def balance(scores: Tensor) -> Tensor:
    """Probabilities (N, K) from scores: rows sum to 1, and classes have nearly equal shares (Sinkhorn & Knopp 1967).

    Where a style of one class has no labelled image, its images would join another class, which then has too many.
    A class without any score stays without.
    """
    present = scores.any(dim=0)  # (K,)
    shares = scores / scores.sum(dim=1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    balanced = (shares + 1e-6 * present) ** SHARPNESS
    for _ in range(BALANCING_STEPS):
        balanced = balanced / balanced.sum(dim=0).clamp_min(1e-12)
        balanced = balanced / balanced.sum(dim=1, keepdim=True)
    return balanced


def prototype(train: Labelled, val: Labelled) -> Choice:
    """The class whose mean of normalised features has the highest cosine similarity (Snell et al. 2017, section 2.3).

    Raises:
        UserError: features that are not finite, labels of one class only.
    """
    train = train.known()
    check_data(train, val)
    classes, targets = train.labels.unique(return_inverse=True)  # (K,), (n,)
    sums = train.features.new_zeros(len(classes), train.features.shape[1])
    means = sums.index_add(0, targets, F.normalize(train.features, dim=1))  # (K, D); their lengths do not matter
    means = F.normalize(means, dim=1)

    def predict(queries: Tensor) -> Tensor:
        return classes[(queries @ means.T).argmax(dim=1)]  # (Q, D) -> (Q, K) -> (Q,)

    return Choice(None, {0: accuracy_if_any(predict, val)}, 0, predict, num_parameters=means.numel())
