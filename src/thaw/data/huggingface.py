"""Datasets of the Hugging Face hub, or a folder of parquet files in their form, decoded once to one size."""

from dataclasses import dataclass

from thaw.data.decoded import DecodedData
from thaw.data.images import Source
from thaw.run.console import say
from thaw.run.errors import UserError

SPLIT_ALIASES = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")


@dataclass(kw_only=True, eq=False)
class HuggingFaceData(DecodedData):
    """A dataset of images and labels, read by the library `datasets`, which runs no code of the dataset.

    The splits train, validation and test are taken by their names; see `thaw.data.splits.plan_splits` for those that
    are missing.

    Args:
        name: on the hub, as `cifar10` or `owner/name`, or a local folder of parquet files.
        subset: its configuration on the hub; None where it has one.
        image_column, label_column: None stands for the usual names.
    """

    name: str | None
    subset: str | None
    image_column: str | None
    label_column: str | None

    def read(self) -> Source:
        """See `DecodedData.decode`.

        Raises:
            UserError: the library is not installed, or the dataset has no images with labels of classes.
            UnreachableError: it is neither on this machine nor can be downloaded.
        """
        if self.name is None:
            raise UserError("data.name is missing: set it to a dataset on the hub or to a folder of parquet files.")
        splits = {SPLIT_ALIASES[split]: rows for split, rows in self.load_splits().items() if split in SPLIT_ALIASES}
        if "train" not in splits:
            raise UserError(f"data.name={self.name} has no split train.")
        image = self.column(splits["train"], "image_column", IMAGE_COLUMNS)
        label = self.column(splits["train"], "label_column", LABEL_COLUMNS)
        labels = {split: rows[label] for split, rows in splits.items()}
        hidden = [split for split, values in labels.items() if {*values} <= {-1, None}]  # as the hub marks a challenge
        if hidden and "train" not in hidden:
            say(f"{self.name}: passed over {', '.join(hidden)}, whose labels are not published")
        splits = {split: rows for split, rows in splits.items() if split not in hidden}
        present = sorted({value for split in splits for value in labels[split]})
        classes = getattr(splits["train"].features[label], "names", None) or [str(value) for value in present]
