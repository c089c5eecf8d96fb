"""Datasets of the Hugging Face hub, or a folder of parquet files in their form, decoded once to one size."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from thaw.data.decode import DecodedData
from thaw.data.images import Source
from thaw.data.pictures import picture_content
from thaw.data.splits import SPLIT_WORDS, ListedFile
from thaw.run.console import say
from thaw.run.errors import UnreachableError, UserError

LABEL_COLUMNS = ("label", "labels", "fine_label")
REACH_SECONDS = 5.0  # without an answer before the hub counts as out of reach


@dataclass(kw_only=True, eq=False)
class HuggingFaceData(DecodedData):
    """A dataset of images and labels, read by the library `datasets`, which runs no code of a dataset.

    Args:
        name: on the hub, as `owner/name`, or a local folder of parquet files.
        subset: which of its configurations; None where it has one.
        image_column, label_column: None stands for the usual names.
    """

    name: str | None = field()  # without the default that Lightning's class has
    subset: str | None
    image_column: str | None
    label_column: str | None

    def read(self) -> Source:
        if self.name is None:
            raise UserError("data.name is missing: set it to a dataset of the hub or to a folder of parquet files.")
        splits = {SPLIT_WORDS[word]: rows for word, rows in self.load_splits(self.name).items() if word in SPLIT_WORDS}
        if "train" not in splits:
            raise UserError(f"data.name={self.name} has no split train; name a dataset that has one.")
        columns = splits["train"].column_names
        image = self.image_column or next((name for name in ("image", "img") if name in columns), "image")
        label = self.label_column or next((name for name in LABEL_COLUMNS if name in columns), "label")
        for key, name in (("image_column", image), ("label_column", label)):
            if name not in columns:
                raise UserError(
                    f"data.name={self.name} has no column {name}; set data.{key} to one of {', '.join(columns)}."
                )
        labels = {split: rows[label][:] for split, rows in splits.items()}
        if hidden := [split for split, values in labels.items() if all(value in (-1, None) for value in values)]:
            rank_zero_only(say)(f"{self.name}: passed over {', '.join(hidden)}, whose labels are not published")
        labels = {split: values for split, values in labels.items() if split not in hidden}
        values = [*chain(*labels.values())]
        names = getattr(splits["train"].features[label], "names", None)
        end = len(names) if names else math.inf
        wrong = [value for value in values if type(value) is not str and not (type(value) is int and 0 <= value < end)]
        if wrong or len({*map(type, values)}) > 1:
            raise UserError(
                f"data.name={self.name}: the column {label} holds {repr((wrong or values)[0])[:60]}; labels "
                f"must be names, or whole numbers from 0{f' to {end - 1}' if names else ''}. Choose another by "
                "data.label_column."
            )
        names = names or {value: str(value) for value in {*values}}
        classes = names if isinstance(names, list) else [names[value] for value in sorted(names)]
        from datasets import Image, concatenate_datasets

        parts = [splits[split].select_columns(image).cast_column(image, Image(decode=False)) for split in labels]
        rows = concatenate_datasets(parts)
        files = [
            ListedFile(f"{split} of {self.name}, row {row}", names[value], split)
            for split, values in labels.items()
            for row, value in enumerate(values)
        ]

        def content(number: int) -> bytes:
            cell = rows[number][image]
            return cell["bytes"] or picture_content(Path(cell["path"]))

        path = Path(self.name).expanduser()
        title = path.resolve().name if path.is_dir() else self.name
        prints = [rows._fingerprint for rows in parts]  # of their content and of all that was done to them
        return self.decode(files, content, classes, title, prints=prints)

    def load_splits(self, name: str) -> Mapping[str, Any]:
        """The splits of a local folder or of the hub; where that is out of reach, of what was downloaded before."""
        try:
            import datasets
            import huggingface_hub
        except ModuleNotFoundError as error:
            raise UserError("data=huggingface needs the library datasets: pip install -e '.[huggingface]'.") from error
        if not sys.stderr.isatty():  # a file would get every state of a bar
            datasets.disable_progress_bars()
        path = Path(name).expanduser()
        if not path.is_dir():
            try:
                huggingface_hub.HfApi().dataset_info(name, timeout=REACH_SECONDS)
            except (huggingface_hub.errors.HfHubHTTPError, ValueError):
                pass  # load_dataset says what is wrong
            except Exception:  # of the network, of many classes; load_dataset would try again for 24 s
                datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        try:
            return datasets.load_dataset(str(path) if path.is_dir() else name, self.subset)
        except ConnectionError as error:
            raise UnreachableError(
                f"data.name={name} was not downloaded to this machine before, and the hub cannot be reached ({error}). "
                "Download it where there is a network, and set data.name to the folder of its parquet files."
            ) from error
        except Exception as error:  # damaged files fail in any way
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"data.name={name} cannot be loaded: {reason} Set data.name to a dataset "
                "of the hub or to a folder of parquet files, and data.subset to a configuration if it has several."
            ) from error
