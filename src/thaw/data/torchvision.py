"""The classification datasets of torchvision: arrays as they are, pictures decoded once to one size."""

import inspect
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from filelock import FileLock
from torch import Tensor
from torch.utils.data import ConcatDataset
from torchvision.datasets import VisionDataset

from thaw.data.arrays import to_images, to_labels
from thaw.data.decode import DecodedData
from thaw.data.images import Images, Source
from thaw.data.mnist import OFFICIAL
from thaw.data.pictures import picture_content
from thaw.data.splits import SPLIT_WORDS, ListedFile, split_images
from thaw.run.errors import UnreachableError, UserError, UserFileError
from thaw.run.suggestions import did_you_mean, nearest_word

SPLIT_VALUES = {**SPLIT_WORDS, "trainval": "train", "train-standard": "train"}  # Oxford's pets, Places365
LABELS = ("targets", "labels", "_labels", "y")  # where datasets keep them


@dataclass(kw_only=True, eq=False)
class TorchvisionData(DecodedData):
    """A dataset of `torchvision.datasets` that gives an image and its class.

    Where the dataset holds its images as one array (CIFAR10, SVHN, STL10, EMNIST), they keep their size; others are
    decoded.

    Args:
        name: of its class, as `CIFAR10` or `OxfordIIITPet`.
        dir: its root, where its files lie as torchvision downloads them.
        download: fetch what is missing.
        options: further arguments of its class.
    """

    name: str | None = field()  # without the default that Lightning's class has
    dir: str
    download: bool
    options: dict[str, Any]

    def read(self) -> Source:
        known = getattr(torchvision.datasets, str(self.name), None)
        if self.name is None:
            raise UserError("data.name is missing: set it to one of torchvision's datasets, such as CIFAR10.")
        if not (isinstance(known, type) and issubclass(known, VisionDataset)):
            near = did_you_mean(nearest_word(self.name, torchvision.datasets.__all__))
            raise UserError(f"data.name={self.name} is not one of torchvision's datasets, such as CIFAR10{near}")
        if wrong := sorted({"root", "download", "loader"} & self.options.keys()):
            raise UserError(
                f"data.options.{wrong[0]} is not set there; the folder is data.dir, and data.download fetches."
            )
        datasets = self.open_splits(known)
        title = " ".join([self.name, *(value for value in self.options.values() if isinstance(value, str))])
        classes = class_names_of(datasets["train"])
        if all(isinstance(getattr(each, "data", None), np.ndarray | Tensor) for each in datasets.values()):
            splits = {split: images_of(each, f"{split} of {title}") for split, each in datasets.items()}
            if classes[:1] == ["N/A"]:  # EMNIST's letters have the labels 1 to 26
                classes, splits = classes[1:], {split: Images(x, y - 1) for split, (x, y) in splits.items()}
            classes = classes or [str(label) for label in range(int(splits["train"].labels.max()) + 1)]
            return Source(*split_images(splits, self.val_share, self.test_share, title), classes, title, OFFICIAL)
        items = [(split, *item) for split, each in datasets.items() for item in items_of(each, f"{split} of {title}")]
        classes = classes or [str(label) for label in range(1 + max(label for _, _, label in items))]
        files = [ListedFile(name, classes[label], split) for split, name, label in items]
        whole: ConcatDataset = ConcatDataset(datasets.values())

        def content(number: int) -> bytes:
            picture = whole[number][0]
            if isinstance(picture, Path):
                return picture_content(picture)
            picture.save(buffer := io.BytesIO(), "TIFF")
            return buffer.getvalue()

        place = str(Path(self.dir).expanduser().resolve())
        return self.decode(files, content, classes, title, dir=place, options=self.options)._replace(origin=OFFICIAL)

    def open_splits(self, known: Any) -> dict[str, Any]:
        """The splits of a dataset, of whatever arguments it tells them by; one without splits is all `train`."""
        parameters = dict(inspect.signature(known).parameters)
        if "kwargs" in parameters:
            parameters |= inspect.signature(known.__base__).parameters
        settings = {"root": str(Path(self.dir).expanduser()), "download": False, "loader": Path}
        settings = {key: value for key, value in settings.items() if key in parameters} | self.options
        if "train" in parameters:
            return {split: self.open(known, settings | {"train": split == "train"}) for split in ("train", "test")}
        if "split" not in parameters or "split" in self.options:
            return {"train": self.open(known, settings)}
        found: dict[str, Any] = {}
        for value, split in SPLIT_VALUES.items():
            try:
                found[split] = found.get(split) or self.open(known, settings | {"split": value})
            except ValueError as error:
                if "Unknown value" not in str(error):
                    raise
        return found

    def open(self, known: Any, settings: dict[str, Any]) -> Any:
        """A dataset of torchvision; processes that start together download once."""
        folder = Path(self.dir).expanduser()
        missing: type[UserFileError] = UserFileError
        try:
            try:
                return known(**settings)
            except (OSError, RuntimeError):  # not there, or not whole
                if not self.download or "download" not in settings:
                    raise
            missing = UnreachableError
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".download.lock"):
                return known(**settings | {"download": True})
        except TypeError as error:
            raise UserError(f"data.name={self.name}: {error}; data.options gives its arguments.") from error
        except Exception as error:  # damaged files fail in any way
            if isinstance(error, ValueError) and "Unknown value" in str(error):
                raise  # of a split
            reason = str(error).partition("\n")[0].partition(" You can use")[0].rstrip(".") or type(error).__name__
            place = getattr(known, "url", "its files")
            again = "run this again" if missing is UnreachableError else "set data.download=true"
            raise missing(
                f"data.dir={self.dir} does not hold {self.name} as torchvision keeps it ({reason}). Set data.dir to "
                f"where it lies, or {again} where there is a network, or put {place} there."
            ) from error


def class_names_of(dataset: Any) -> list[str]:
    """The names of its classes, made different where two are the same; none if it names none."""
    found = getattr(dataset, "classes", None) or getattr(dataset, "categories", [])
    names = [
        ", ".join(name) if isinstance(name, tuple) else str(name) for name in found
    ]  # ImageNet has synonyms, and two cranes
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names)]


def images_of(dataset: Any, place: str) -> Images:
    """Images and labels of a dataset that holds them as arrays."""
    labels = next(getattr(dataset, name) for name in LABELS if hasattr(dataset, name))
    images = to_images(np.asarray(dataset.data), f"{place} (data)")
    if isinstance(dataset, torchvision.datasets.EMNIST):  # its files have them transposed
        images = images.transpose(2, 3).contiguous()
    return Images(images, to_labels(np.asarray(labels), f"{place} (labels)"))


def items_of(dataset: Any, place: str) -> list[tuple[str, int]]:
    """Name and label of each picture; UserError if a label is not the number of a class."""
    rows = range(len(dataset))
    labels = next((getattr(dataset, name) for name in LABELS if hasattr(dataset, name)), None)
    if getattr(dataset, "loader", None) is Path:
        items = [dataset[row] for row in rows]
    else:  # opening a picture for its label alone takes long
        items = [(f"{place}, image {row}", dataset[row][1] if labels is None else labels[row]) for row in rows]
    for _, label in items:
        if not isinstance(label, int | np.integer):
            raise UserError(
                f"{place} has the label {label!r} instead of a class's number: it is not for classification."
            )
    return [(str(name), int(label)) for name, label in items]
