"""The two types that all other code speaks: labelled images, and a dataset in its splits."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Images(NamedTuple):
    """N labelled images: images uint8 (N, 28, 28), labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def take(self, which: slice | Tensor) -> "Images":
        """Some of them, by a slice, by indices or by a mask (N,)."""
        return Images(self.images[which], self.labels[which])


class Source(NamedTuple):
    """Images by split, and how reports speak of them.

    name: `official`, `sample`, or the name that a data module of one's own gives its data.
    title: the name that people read; `name` where it is empty.
    classes: names of the classes in the order of the labels; see `with_numbers`.
    """

    train: Images
    val: Images
    test: Images
    name: str
    title: str = ""
    classes: Sequence[str] = ()

    def facts(self) -> dict[str, str]:
        """The origin for a summary or report, as values of JSON."""
        return {"data_source": self.name, "data_title": self.title or self.name}


def with_numbers(names: Sequence[str], classes: int) -> list[str]:
    """The names of so many classes; a class without a name is called by its number."""
    return [*names, *map(str, range(len(names), classes))]


def dataset_name(data: Mapping[str, Any]) -> str:
    """The name of the dataset in a block `data` of a configuration, or else of the class of its data module."""
    return data.get("dataset") or data["_target_"].rpartition(".")[2]
