"""The rule by which a missing split is taken from the training images: a fixed function of them, never of the seed."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from thaw.data.images import Images
from thaw.run.console import say

T = TypeVar("T")
FOR = {1: "are the validation split", 2: "are the test split, as many the validation split"}  # by number of splits
HELD_OUT = 0.1  # of each class: the share of the remaining training images that a missing split takes


def divide(digests: Sequence[str], labels: Tensor, missing: Sequence[str]) -> dict[str, Tensor]:
    """Indices, in their order, of the images that stay in `train` and of those that make up each missing split.

    digests: a hash of each image's content (N), labels: (N,).
    """
    rest, parts = torch.arange(len(labels)), {}
    for split in missing:
        held = held_out([digests[index] for index in rest.tolist()], labels[rest])
        parts[split], rest = rest[held], rest[~held]
    return {"train": rest, **parts}


def held_out(digests: Sequence[str], labels: Tensor) -> Tensor:
    """Which images (N,) a split takes: those with the lowest digests of each class, at least one of two or more.

    Equal images have equal digests and go together, even where their labels differ.
    """
    label_of: dict[str, int] = {}
    for digest, label in zip(digests, labels.tolist(), strict=True):
        label_of[digest] = min(label, label_of.get(digest, label))
    by_class = defaultdict(list)
    for digest in sorted(label_of):
        by_class[label_of[digest]].append(digest)
    taken = {
        digest
        for same in by_class.values()
        for digest in same[: max(1, round(HELD_OUT * len(same))) if len(same) > 1 else 0]
    }
    return torch.tensor([digest in taken for digest in digests], dtype=torch.bool)


def name_splits(present: Mapping[str, T], name: str) -> tuple[dict[str, T], list[str]]:
    """The splits by their use, and the names of those to take from `train`; a line says what is taken from where.

    A validation split without a test split, as ImageNet has, is what results are reported on: it is the test split.
    """
    splits, note = dict(present), ""
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
        note = "its validation images are the test split, and "
    missing = [split for split in ("test", "val") if split not in splits]
    if missing:
        say(f"{name}: {note}{HELD_OUT:.0%} of each class of its training images, fixed, {FOR[len(missing)]}")
    return splits, missing


def complete(splits: Mapping[str, Images], name: str) -> tuple[Images, Images, Images]:
    """Train, val and test of images in memory; what is missing is taken from `train` by the content of the images."""
    splits, missing = name_splits(splits, name)
    train = splits["train"]
    digests = [hashlib.sha256(image.contiguous().numpy().data).hexdigest() for image in train.images]
    parts = divide(digests, train.labels, missing)
    whole = {**splits, **{split: train.take(which) for split, which in parts.items()}}
    return whole["train"], whole["val"], whole["test"]
