"""Cross-validation: the images that are not tested on, in stratified folds; a fixed function of the data."""

import hashlib
from typing import Annotated, TypeAlias

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from pydantic import Field
from torch import Tensor

from thaw.data.images import Images, Source
from thaw.run.console import say, some
from thaw.run.errors import UserError

FoldCount: TypeAlias = Annotated[int, Field(ge=2, strict=True)]


def deal_folds(labels: Tensor, contents: Tensor, folds: int) -> Tensor:
    """The fold of each image (N,): the different images, in the order of their classes, go to the folds in turn.

    So the folds differ by at most one image in all, and by at most one of each class, as scikit-learn's
    StratifiedKFold has it. Equal images go to one fold, even if their classes differ; these come on top.

    Args:
        labels: (N,)
        contents: (N,) as `number_contents` gives them.
    """
    firsts = torch.from_numpy(
        np.unique(contents.numpy(), return_index=True)[1]
    )  # (M,) where each content appears first
    fold_of = torch.zeros(len(firsts), dtype=torch.long)  # (M,)
    fold_of[labels[firsts].argsort(stable=True)] = torch.arange(len(firsts)) % folds
    return fold_of[contents]


def number_contents(images: Tensor) -> Tensor:
    """The number of each image's content (N,), counted from 0 as they first appear: equal images have one number."""
    known: dict[bytes, int] = {}
    hashes = (hashlib.sha256(image.contiguous().numpy().data).digest() for image in images)
    return torch.tensor([known.setdefault(content, len(known)) for content in hashes], dtype=torch.long)


def take_fold(source: Source, fold: int, folds: int) -> Source:
    """A source whose validation split is one fold of its training and validation images; the others train.

    The order of the images is the source's: first those of its training split. The test split stays as it is.

    Raises:
        UserError: a class has fewer different images than there are folds, or an image has several classes.
    """
    check_fold(fold, folds)
    if source.train.labels.ndim == 2:
        raise UserError(f"data.fold={fold}: folds are for one class an image; set data.fold=null.")
    images, labels = (torch.cat(parts) for parts in zip(source.train, source.val, strict=True))
    if (source.train.labels.diff() >= 0).all():  # as `train_size` expects
        order = labels.argsort(stable=True)
        images, labels = images[order], labels[order]
    fold_of = deal_folds(labels, number_contents(images), folds)
    check_classes(source, labels, fold_of, folds)
    pool, held_out = Images(images, labels), fold_of == fold
    share = f"{int(held_out.sum()):,} of the {len(labels):,} images of train and val"
    rank_zero_only(say)(f"cross-validation: fold {fold} of 0 to {folds - 1} validates, {share}")
    return source._replace(train=pool.take(~held_out), val=pool.take(held_out))


def check_fold(fold: int | None, folds: int) -> None:
    """Raise UserError unless there is such a fold."""
    if fold is not None and fold >= folds:
        raise UserError(
            f"data.fold={fold} but data.folds={folds}: folds count from 0 to {folds - 1}. Choose one of them, or more "
            "data.folds."
        )


def check_classes(source: Source, labels: Tensor, fold_of: Tensor, folds: int) -> None:
    """Raise UserError if a class that has images is missing in a fold."""
    counts = {label: len(fold_of[labels == label].unique()) for label in labels.unique().tolist()}
    if small := [f"{source.classes[label]} ({count})" for label, count in counts.items() if count < folds]:
        raise UserError(
            f"data.folds={folds} needs {folds} different images of each class to train and validate on; {source.title} "
            f"has fewer of {some(small, most=5)}. Choose fewer data.folds, or add images."
        )
