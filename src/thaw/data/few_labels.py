"""Training on few labels: those of a stratified draw of images are kept, all other labels are erased."""

import hashlib
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from thaw.data.images import Images, Source
from thaw.run.console import say, some
from thaw.run.errors import UserError

UNLABELLED = -1  # as in scikit-learn


def draw_labelled(images: Images, per_class: int, draw: int) -> Tensor:
    """Indices of so many images of each class, in ascending order: a function of `draw` and the images' content.

    The images of a class are ordered by the SHA-256 of draw and pixels, so a larger draw contains a smaller one.
    """
    prefix = f"{draw} ".encode()
    hashes = [hashlib.sha256(prefix + image.contiguous().numpy().tobytes()).digest() for image in images.images]
    labels = images.labels.tolist()
    order = sorted(range(len(labels)), key=lambda number: (labels[number], hashes[number]))
    by_class = images.labels[order]  # (N,), ascending
    starts = torch.searchsorted(by_class, by_class)  # (N,) where the class of each begins
    return torch.tensor(order)[torch.arange(len(order)) - starts < per_class].sort().values


def keep_labels(source: Source, per_class: int, draw: int) -> Source:
    """A source that knows few labels: it trains on these images and validates on none; its test split stays as it is.

    Its `pool` holds all images of training and validation in their order, with the label -1 except for those drawn.

    Raises:
        UserError: a class has fewer training images than are drawn, or an image has several classes.
    """
    train = source.train
    if train.labels.ndim == 2:
        raise UserError(
            f"data.labels_per_class={per_class} is for one class an image; set data.labels_per_class=null, or take "
            "fewer images by data.train_size."
        )
    counts = enumerate(torch.bincount(train.labels).tolist())
    if small := [f"{source.classes[label]} ({count})" for label, count in counts if 0 < count < per_class]:
        raise UserError(
            f"data.labels_per_class={per_class} is more than the training images that {source.title} has of "
            f"{some(small, most=5)}. Choose fewer, or add images."
        )
    drawn = draw_labelled(train, per_class, draw)
    labels = torch.full((len(train.labels) + len(source.val.labels),), UNLABELLED)
    labels[drawn] = train.labels[drawn]
    rank_zero_only(say)(
        f"few labels: {len(drawn):,} of {len(train.labels):,} training images keep their label (draw {draw}); those of "
        f"the {len(source.val.labels):,} validation images are not used"
    )
    pool = Images(torch.cat([train.images, source.val.images]), labels)
    return source._replace(train=train.take(drawn), val=source.val.take(slice(0)), pool=pool)


def check_few_labels(per_class: int | None, draw: int, others: dict[str, Any]) -> None:
    """Raise UserError for settings that do not go together; `others` choose training images in another way."""
    if per_class is None and draw:
        raise UserError(f"data.labels_draw={draw} draws nothing without data.labels_per_class; set that, too.")
    if per_class is not None and (given := {name: value for name, value in others.items() if value is not None}):
        name, value = given.popitem()
        raise UserError(f"data.labels_per_class={per_class} cannot go with data.{name}={value}; set one to null.")
