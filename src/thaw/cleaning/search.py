"""The search for what may be wrong in a dataset, from its pixels and the features of a frozen backbone.

Train and val are one pool: each of its images is judged by models that were fitted to the other folds. Test images are
judged by a model of the whole pool, which has not seen them either.
Shapes: N images of the pool, M test images, D features, K classes, k neighbours.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from thaw.cleaning.findings import Finding, sort_findings
from thaw.cleaning.label_issues import label_issues, label_scores
from thaw.cleaning.pixels import exposure_issues, pixel_correlation
from thaw.cleaning.probabilities import logistic, neighbours, out_of_fold, votes
from thaw.data.corrections import image_hash
from thaw.data.folds import FoldCount, deal_folds, number_contents
from thaw.data.images import Source
from thaw.data.splits import SPLITS
from thaw.evaluation.probes import check_finite
from thaw.run.console import some
from thaw.run.errors import UserError
from thaw.run.values import Count, Positive, Probability

COPIES = 5  # neighbours whose pixels are compared
Near: TypeAlias = tuple[Tensor, Tensor]  # cosine similarities and indices (N, k) of nearest images, best first


@dataclass(kw_only=True)
class Search:
    """The settings of a search.

    Args:
        folds: each image of train and val is judged by a logistic regression on the other folds.
        C: inverse strength of its L2 penalty, as in scikit-learn.
        neighbours: k, which vote on the label of an image, are compared with it, and tell how far off it lies.
        label_threshold: of the probability of a given label, below which it is listed; None leaves the choice to
            confident learning.
        copy_correlation: of the pixels of two neighbours, from which on they count as copies.
        outlier_z: an image is an outlier if the logarithm of its mean cosine distance from its neighbours is so many
            robust standard deviations above the median (Iglewicz & Hoaglin 1993).
    """

    folds: FoldCount
    C: Positive
    neighbours: Count
    label_threshold: Probability | None
    copy_correlation: Annotated[float, Field(gt=0, le=1)]
    outlier_z: Positive

    def near(self, pool: Sequence[Tensor], test: Sequence[Tensor]) -> tuple[list[Near], list[Near]]:
        """The nearest images in the pool to each image of the pool and of the test split, from each view of it.

        Args:
            pool, test: features (N, D) and (M, D) of each view, first those of the images as they are.
        """
        check_finite("training and validation", pool[0])
        check_finite("test", test[0])
        k = min(self.neighbours, len(pool[0]) - 1)
        of_pool = [neighbours(view, pool[0], k, "train and val", own=True) for view in pool]
        return of_pool, [neighbours(view, pool[0], k, "test", own=False) for view in test]

    def judge(
        self,
        pool: Sequence[Tensor],
        test: Sequence[Tensor],
        near: tuple[Sequence[Near], Sequence[Near]],
        labels: Tensor,
        contents: Tensor,
        classes: int,
    ) -> tuple[Tensor, Tensor]:
        """Probabilities (N, K) of the pool's images, independent of their own labels, and (M, K) of the test images.

        They are the mean of a logistic regression's and of the shares of the neighbours' votes, over all views.

        Args:
            pool, test, near: see `near`.
            labels: (N,) of the pool.
            contents: (N,) see `thaw.data.folds.number_contents`; copies are in one fold.
            classes: K.
        """
        fold_of = deal_folds(labels.cpu(), contents, self.folds).to(labels.device)
        predict = logistic(pool[0], labels, classes, self.C)
        of_pool = out_of_fold(pool, labels, fold_of, classes, self.C)
        of_test = torch.stack([predict(view) for view in test]).mean(dim=0)
        voted = [
            torch.stack([votes(similar, labels[at], classes) for similar, at in each]).mean(dim=0) for each in near
        ]
        return (of_pool + voted[0]) / 2, (of_test + voted[1]) / 2

    def findings(
        self,
        source: Source,
        names: Mapping[str, Sequence[str]],
        unreadable: Sequence[str],
        pool: Sequence[Tensor],
        test: Sequence[Tensor],
    ) -> tuple[list[Finding], dict[str, float]]:
        """All that may be wrong, and the share of labels by split with which the evidence agrees.

        Args:
            names: of the files of the images by split, where they have any.
            unreadable: names of files that were left out as they cannot be read.
            pool, test: as for `judge`; the pool's images are those of train, then those of val.

        Raises:
            UserError: a class has fewer images than there are folds, or features are not finite.
        """
        splits = {split: getattr(source, split) for split in SPLITS}
        images = [splits[split].images for split in SPLITS]
        labels = torch.cat([splits[split].labels for split in SPLITS])  # (N + M,)
        places = [(split, index) for split in SPLITS for index in range(len(splits[split].labels))]
        size = len(labels) - len(splits["test"].labels)  # N
        whole = torch.cat(images)  # (N + M, C, H, W)
        contents = number_contents(whole)  # (N + M,)
        check_counts(labels[:size], source.classes, self.folds)
        near = self.near(pool, test)
        on_device = labels[:size].to(pool[0].device)
        judged = self.judge(pool, test, near, on_device, contents[:size], len(source.classes))

        def finding(at: int, kind: str, score: float, suggested: str = "", like: int | None = None) -> Finding:
            (split, index), given = places[at], source.classes[int(labels[at])]
            file = names[split][index] if names else ""
            other = "" if like is None else name_of(places[like], names)
            return Finding(split, index, file, kind, given, suggested, score, other, image_hash(whole[at]))

        found = [Finding("", None, name, "unreadable", "", "", 0.0, "", "") for name in unreadable]
        found += [finding(at, kind, score) for at, kind, score in exposure_issues(whole)]
        blank = {(each.split, each.index) for each in found}
        agreed = {}
        for start, probabilities in zip((0, size), (each.cpu() for each in judged), strict=True):
            if not len(probabilities):
                continue  # no test images
            given = labels[start : start + len(probabilities)]
            scores, answers = label_scores(given, probabilities), probabilities.argmax(dim=1)
            for at in label_issues(given, probabilities, self.label_threshold).tolist():
                suggested = source.classes[int(answers[at])] if answers[at] != given[at] else ""
                found.append(finding(start + at, "label", float(scores[at]), suggested))
            agreed["test" if start else "train and val"] = float((answers == given).double().mean())
        similarities, indices = (torch.cat(parts).cpu() for parts in zip(near[0][0], near[1][0], strict=True))
        distance = mean_distance(similarities)  # (N + M,)
        for at in (robust_z(distance, distance[:size]) > self.outlier_z).nonzero()[:, 0].tolist():
            found.append(finding(at, "outlier", float(distance[:size].median() / distance[at])))
        for at, like, correlation in copies(whole, places, contents, indices[:, :COPIES], self.copy_correlation):
            if places[at] not in blank:
                found.append(finding(at, "duplicate", 1 - correlation, like=like))
        return sort_findings(found), agreed


def name_of(place: tuple[str, int], names: Mapping[str, Sequence[str]]) -> str:
    """The file of an image, or its split and index."""
    split, index = place
    return names[split][index] if names else f"{split} {index}"


def check_counts(labels: Tensor, classes: Sequence[str], folds: int) -> None:
    """Raise UserError if a class that has images has fewer than there are folds."""
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    if small := [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if 0 < count < folds]:
        raise UserError(
            f"search.folds={folds} needs {folds} train and val images of each class; there are fewer of "
            f"{some(small, most=5)}. Choose fewer search.folds, or add images."
        )


def mean_distance(similarities: Tensor) -> Tensor:
    """Mean cosine distance (N,) from the neighbours, of their similarities (N, k): Kuan & Mueller 2022."""
    return (1 - similarities.double()).mean(dim=1).clamp_min(1e-9)


def robust_z(distances: Tensor, usual: Tensor) -> Tensor:
    """How many robust standard deviations the logarithms of distances (N,) lie above the median of the usual ones."""
    median = usual.log().median()
    spread = 1.4826 * (usual.log() - median).abs().median()  # of a normal distribution that is the standard deviation
    return (distances.log() - median) / spread.clamp_min(1e-6)


def copies(
    images: Tensor, places: Sequence[tuple[str, int]], contents: Tensor, near: Tensor, least: float
) -> Iterator[tuple[int, int, float]]:
    """Yields each image that is a copy, its original, and the correlation of their pixels, which is at least `least`.

    Of two copies the test image is the original, then the validation image, then the one that comes first.

    Args:
        images: (N, C, H, W) of all splits; `places` says where each is.
        contents: (N,) see `number_contents`; equal images are copies whatever their neighbours are.
        near: (N, k) the numbers of images that may be copies of image i.
    """
    rank = {"test": 0, "val": 1, "train": 2}
    order = sorted(range(len(places)), key=lambda at: (rank[places[at][0]], places[at][1]))  # originals first
    position = torch.empty(len(places), dtype=torch.long)
    position[order] = torch.arange(len(places))
    original: dict[int, tuple[int, float]] = {}
    first: dict[int, int] = {}
    for at in order:
        content = int(contents[at])
        if first.setdefault(content, at) != at:
            original[at] = first[content], 1.0
    pairs = torch.stack([torch.arange(len(near))[:, None].expand_as(near), near], dim=-1).flatten(0, 1)  # (N k, 2)
    swap = position[pairs[:, 0]] < position[pairs[:, 1]]
    pairs[swap] = pairs[swap].flip(1)  # the copy, then its original
    pairs = pairs.unique(dim=0)
    for part in pairs.split(2**16):
        correlation = pixel_correlation(images[part[:, 0]], images[part[:, 1]])
        for number in (correlation >= least).nonzero()[:, 0].tolist():
            at, like = part[number].tolist()
            if float(correlation[number]) > original.get(at, (like, 0.0))[1]:
                original[at] = like, min(1.0, float(correlation[number]))
    for at, (like, value) in original.items():
        yield at, like, value
