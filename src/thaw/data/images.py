"""The two types that all other code speaks: labelled images, and a dataset in its splits."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thaw.run.console import some
from thaw.run.errors import UserError


class Images(NamedTuple):
    """N labelled images: images uint8 (N, C, H, W), labels int64 (N,).

    Several labels an image are int64 (N, K), 1 for each of the K classes that an image has, else 0.
    """

    images: Tensor
    labels: Tensor

    def take(self, which: slice | Tensor) -> "Images":
        """Some of them, by a slice, by indices or by a mask (N,)."""
        return Images(self.images[which], self.labels[which])


class Source(NamedTuple):
    """Images by split, and how summaries and reports speak of them.

    Attributes:
        train: images to train on.
        val: images to validate on.
        test: images to test on.
        classes: their names in the order of the labels; they decide how many classes a model has.
        name: of the dataset, as it is printed.
        origin: where the images come from, as it is printed after the name; empty if the name says all.
        files: of the test images, where each has one.
        listed: the test images that `data.exclude` or `data.relabel` lists, by index; they stay.
        corrections: the files of these settings, their SHA-256 and how many images of each split they list.
        pool: where few labels are known (`thaw.data.few_labels`) all images of train and val, most with the label -1.
    """

    train: Images
    val: Images
    test: Images
    classes: Sequence[str]
    name: str
    origin: str = ""
    files: Sequence[str] = ()
    listed: Sequence[int] = ()
    corrections: Mapping[str, Any] | None = None
    pool: Images | None = None

    @property
    def title(self) -> str:
        return f"{self.name}, {self.origin}" if self.origin else self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return tuple(self.train.images.shape[1:])

    def facts(self) -> dict[str, Any]:
        """Name, origin and corrections, if there are any, for a summary or report, as values of JSON."""
        corrections = {"corrections": self.corrections} if self.corrections else {}
        return {"dataset": self.name, "data_source": self.origin, **corrections}


def check_source(source: Source) -> None:
    """Refuse images of other shapes and types than all code expects, labels without a class, and odd class names.

    Raises:
        UserError: names the split, and the shape or the label, or the class.
    """
    for name, count in Counter(source.classes).items():
        if count > 1 or (not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name)):
            wrong = "is there twice" if count > 1 else "is not valid UTF-8"
            raise UserError(f"{source.title}: the class name {name!r} {wrong}; rename its folder or label.")
    for split in ("train", "val", "test"):
        images, labels = getattr(source, split)
        fits = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] in (1, 3)
        if not fits or images.shape[1:] != source.shape:
            raise UserError(
                f"The {split} images of {source.title} are {images.dtype} {tuple(images.shape)}; all images must be "
                f"uint8 (N, 1, H, W) or (N, 3, H, W), of one shape (training: {source.shape})."
            )
        shapes = (len(images),), (len(images), len(source.classes))
        if labels.dtype != torch.int64 or labels.shape not in shapes:
            raise UserError(
                f"The {split} labels of {source.title} are {labels.dtype} {tuple(labels.shape)}; they must be int64 "
                f"{shapes[0]}, one for each image, or {shapes[1]} of 0 and 1, one for each image and class."
            )
        wrong = labels[(labels < 0) | (labels >= (len(source.classes) if labels.ndim == 1 else 2))]
        if len(wrong):
            if labels.ndim == 2:
                raise UserError(f"The {split} labels of {source.title} hold {int(wrong[0])}; (N, K) are of 0 and 1.")
            raise UserError(
                f"The {split} split of {source.title} has the label {int(wrong[0])}, but its {len(source.classes)} "
                f"classes have the labels 0 to {len(source.classes) - 1}; correct the labels, or name all classes."
            )


def absent_classes(source: Source) -> list[str]:
    """A line about each split that lacks some classes; a split without images has none."""
    effects = {"train": "cannot be learned", "val": "do not count in val/acc", "test": "have no recall"}
    lines = []
    for split, effect in effects.items():
        labels = getattr(source, split).labels
        present = set((labels if labels.ndim == 1 else labels.any(dim=0).nonzero()).unique().tolist())
        names = [name for number, name in enumerate(source.classes) if number not in present]
        if present and names:
            these = f"{len(names)} of {len(source.classes)} classes have no {split} images and {effect}"
            lines.append(f"{source.title}: {these}: {some(names, most=5)}")
    return lines


def check_same_classes(known: Sequence[str], source: Source, model: Any) -> None:
    """Raise UserError unless a dataset has the classes that `model`, a checkpoint, was trained on."""
    if list(known) == list(source.classes):
        return
    missing, unknown = sorted({*known} - {*source.classes}), sorted({*source.classes} - {*known})
    parts = [f"the data lacks {', '.join(missing[:5])}"] * bool(missing)
    parts += [f"the model does not know {', '.join(unknown[:5])}"] * bool(unknown)
    raise UserError(
        f"{model} was trained on {len(known)} classes, {source.title} has {len(source.classes)}: "
        f"{'; '.join(parts) or 'they have another order'}. Give data of the same classes, or train a model on these."
    )
