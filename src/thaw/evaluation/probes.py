"""How good features are without training a network on them: nearest neighbours and logistic regression.

A probe learns from training features, chooses its one setting on validation features and returns a `Choice`; it never
sees the test split. Without validation images, as with `data.labels_per_class`, the setting has the value that the
probe's configuration fixes for that case. Shapes: N images, D features, K classes, Q queries.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from thaw.evaluation.metrics import accuracy_facts
from thaw.models.logistic import fit_logistic, standardisation
from thaw.run.console import progress, say
from thaw.run.errors import UserError
from thaw.run.values import Count, Positive

SIMILARITIES = 2**25  # that are held at a time: 128 MiB


class Labelled(NamedTuple):
    """features float (N, D), labels int64 (N,), -1 for an unknown one, on one device."""

    features: Tensor
    labels: Tensor

    def known(self) -> "Labelled":
        """Those with a label."""
        return Labelled(*(part[self.labels >= 0] for part in self))


@dataclass(frozen=True)
class Choice:
    """The value that validation chose for a probe's one setting, or that its configuration fixes."""

    setting: str | None  # its name, `k` or `C`; None: the probe has none
    candidates: dict[float, float | None]  # validation accuracy of each value, the values in ascending order
    chosen: float  # the value with the highest; the smallest of equals
    predict: Callable[[Tensor], Tensor]  # features (Q, D) -> labels (Q,), with the chosen value
    num_parameters: int  # fitted


def score(choice: Choice, test: Labelled, listed: Sequence[int] = ()) -> dict[str, Any]:
    """The test accuracy of the chosen candidate, as `accuracy_facts` gives it."""
    check_finite("test", test.features)
    return accuracy_facts(choice.predict(test.features), test.labels, listed)


def knn(
    train: Labelled,
    val: Labelled,
    k: Annotated[Sequence[Count], Field(min_length=1)],
    fixed_k: Count,
    metric: Literal["cosine", "euclidean"],
    vote: Literal["majority", "weighted"],
    temperature: Annotated[Positive, Field(description="0.07 is common")],
) -> Choice:
    """The k nearest training images vote for an image's class; of classes with equal votes the lowest wins.

    Ours, like the regression below: scikit-learn is as fast on a CPU, but computes there alone.

    Args:
        k: candidates; validation chooses.
        fixed_k: the one candidate where there are no validation images.
        metric: of the distance.
        vote: where `weighted`, each vote counts exp(s / temperature) of the cosine similarity s.
        temperature: of the weighted vote.

    Raises:
        UserError: settings that do not go together, features that are not finite, labels of one class only.
    """
    train, name = train.known(), "k" if len(val.labels) else "fixed_k"
    candidates = sorted(set(k)) if len(val.labels) else [fixed_k]
    if candidates[-1] > len(train.labels):
        raise UserError(
            f"probe.{name}={candidates[-1]} is more than the {len(train.labels):,} training images; choose that or "
            "less."
        )
    if vote == "weighted" and metric != "cosine":
        raise UserError(f"probe.vote=weighted needs probe.metric=cosine, not {metric}; or set probe.vote=majority.")
    check_data(train, val)
    classes, targets = train.labels.unique(return_inverse=True)  # (K,), (N,)

    def predict(queries: Tensor, wanted: Sequence[int], name: str) -> list[Tensor]:
        """Labels (Q,) for each wanted k, from one search."""
        parts = []
        for similarities, indices in nearest(queries, train.features, max(wanted), metric, name):  # (B, k), best first
            votes = torch.ones_like(similarities)
            if vote == "weighted":  # Wu et al. 2018, section 3.4; relative to the best one's weight, against overflow
                votes = ((similarities - similarities[:, :1]) / temperature).exp()
            none, named = votes.new_zeros(len(votes), len(classes)), targets[indices]  # (B, K), (B, k)
            sums = (none.scatter_add(1, named[:, :k], votes[:, :k]) for k in wanted)
            parts.append(torch.stack([classes[each.argmax(dim=1)] for each in sums]))
        return list(torch.cat(parts, dim=1))

    accuracies: dict[float, float | None] = {fixed_k: None}
    if len(val.labels):
        pairs = zip(candidates, predict(val.features, candidates, "validation"), strict=True)
        accuracies = {value: accuracy(labels, val.labels) for value, labels in pairs}
    for value, acc in accuracies.items():
        say_candidate("k", value, acc)
    chosen = int(best_candidate(accuracies))
    return Choice("k", accuracies, chosen, lambda queries: predict(queries, [chosen], "test")[0], num_parameters=0)


def nearest(queries: Tensor, references: Tensor, k: int, metric: str, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields similarities (B, k) and indices (B, k) of the references nearest to B queries at a time, best first.

    Similarity is the cosine, or something that orders references as the negative Euclidean distance does.
    """
    if metric == "cosine":
        queries, references = F.normalize(queries, dim=1), F.normalize(references, dim=1)
        offset = references.new_zeros(len(references))
    else:  # -|q - r|^2 / 2 = q.r - |r|^2 / 2 - |q|^2 / 2, whose last term is the same for all references
        centre = references.mean(dim=0)  # moving the origin there changes no distance and keeps the terms small
        queries, references = queries - centre, references - centre
        offset = references.square().sum(dim=1) / 2  # (N,)
    with progress(f"neighbours of {name} images", len(queries)) as advance:
        for chunk in queries.split(max(1, SIMILARITIES // (len(references) + 4 * k))):
            top = (chunk @ references.T - offset).topk(k, dim=1)  # (B, D) -> (B, N) -> (B, k)
            yield top.values, top.indices
            advance(len(chunk))


def logistic_regression(
    train: Labelled,
    val: Labelled,
    C: Annotated[Sequence[Positive], Field(min_length=1)],  # noqa: N803  # scikit-learn's name
    fixed_C: Positive,  # noqa: N803
    max_iterations: Count,
    tolerance: Annotated[Positive, Field(description="e.g. 1e-5")],
) -> Choice:
    """Multinomial logistic regression with an L2 penalty, on features standardised by the training images.

    Args:
        C: candidates of the inverse strength of the penalty; validation chooses. Each fit starts at the one before.
        fixed_C: the one candidate where there are no validation images.
        max_iterations: of L-BFGS for each candidate.
        tolerance: the largest entry of the gradient at which a fit has converged.

    Raises:
        UserError: features that are not finite, labels of one class only.
    """
    train, candidates = train.known(), sorted(set(C)) if len(val.labels) else [fixed_C]
    check_data(train, val)
    classes, targets = train.labels.unique(return_inverse=True)  # (K,), (N,)
    mean, std = standardisation(train.features)
    features, val_features = ((split.features - mean) / std for split in (train, val))  # (N, D)
    weight, bias = features.new_zeros(len(classes), features.shape[1]), features.new_zeros(len(classes))
    accuracies: dict[float, float | None] = {}
    fits = {}
    with progress("logistic regression", len(candidates), "fits") as advance:
        for value in candidates:
            weight, bias, gradient = fit_logistic(features, targets, value, weight, bias, max_iterations, tolerance)
            fits[value] = weight, bias
            answers = classes[(val_features @ weight.T + bias).argmax(dim=1)]
            accuracies[value] = accuracy(answers, val.labels) if len(val.labels) else None
            note = "" if gradient <= tolerance else f"  not converged: the gradient is {gradient:.1e} at the end"
            say_candidate("C", value, accuracies[value], note)
            advance(1)
    chosen = best_candidate(accuracies)
    weight, bias = fits[chosen]

    def predict(queries: Tensor) -> Tensor:
        return classes[((queries - mean) / std @ weight.T + bias).argmax(dim=1)]  # (Q, D) -> (Q, K) -> (Q,)

    return Choice("C", accuracies, chosen, predict, num_parameters=weight.numel() + bias.numel())


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    return int((predictions == labels).sum()) / len(labels)


def accuracy_if_any(predict: Callable[[Tensor], Tensor], images: Labelled) -> float | None:
    """None where there are no images."""
    return accuracy(predict(images.features), images.labels) if len(images.labels) else None


def best_candidate(accuracies: Mapping[float, float | None]) -> float:
    """The value with the highest validation accuracy, the first of equals."""
    return max(accuracies, key=lambda value: accuracies[value] or 0)


def say_candidate(setting: str, value: float, acc: float | None, note: str = "") -> None:
    say(f"{setting} = {value:<8g} " + (f"fixed{note}" if acc is None else f"val/acc {acc:.2%}{note}"))


def check_data(train: Labelled, val: Labelled) -> None:
    check_finite("training", train.features)
    check_finite("validation", val.features)
    known = train.known().labels
    if len(found := known.unique()) < 2:
        raise UserError(
            f"All {len(known):,} training images are of class {int(found[0])}; a probe needs two: raise "
            "data.train_size."
        )


def check_finite(split: str, features: Tensor) -> None:
    """Raise UserError for features (N, D) that are not finite; `split` names their images."""
    if bad := int((~features.isfinite().all(dim=1)).sum()):
        raise UserError(
            f"{bad:,} of {len(features):,} {split} images have features that are not finite. Check the backbone's "
            "weights, or compute in full precision with trainer.precision=32-true."
        )
