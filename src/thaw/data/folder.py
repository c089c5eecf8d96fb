"""Photographs of one's own: a folder for each class, in splits or not, or a table of files and labels."""

import csv
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field

from thaw.data.decode import PictureFiles, decode_once, some
from thaw.data.images import Images, Source
from thaw.data.module import ImageDataModule
from thaw.data.pictures import PICTURE_SUFFIXES
from thaw.data.splits import SPLITS, ListedFile, split_files
from thaw.run.console import plural, say
from thaw.run.errors import UserError, UserFileError
from thaw.run.values import Count, Positive

log = logging.getLogger(__name__)

SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SplitShare: TypeAlias = Annotated[float, Field(gt=0, lt=1, strict=True)]


@dataclass(kw_only=True, eq=False)
class FolderData(ImageDataModule):
    """Pictures in `dir/<class>/**`, in `dir/{train,val,test}/<class>/**`, or listed in a table.

    Each file is decoded once, see `thaw.data.decode`. A split that is missing is taken from the training pictures, a
    share of each class by the hash of the files' content: the same in every run, and equal files lie in one split.
    Where train and val are given but no test, val is what is tested on, as nothing may be chosen on the test split, and
    validation is taken from train.

    Args:
        table: a CSV or parquet file with the columns file (relative to `dir`), label and, if splits are given, split.
        image_size: S, pixels; the central square of each picture is kept at C x S x S.
        channels: C, 3 for RGB, 1 for grey.
        val_share, test_share: of the training pictures, where that split is missing.
        skip_unreadable: leave out what cannot be read; otherwise it is an error.
        cache_dir, max_gb: decoded images are kept in `cache_dir`/images, of at most this size in all.
    """

    dir: str | None
    table: str | None
    image_size: Count
    channels: Literal[1, 3]
    val_share: SplitShare
    test_share: SplitShare
    skip_unreadable: bool
    cache_dir: str
    max_gb: Positive

    def read(self) -> Source:
        """The images by split; prints what is left out, and how splits are made.

        Raises:
            UserError: fewer than two classes, a split without a picture, a class that is not in train, or unreadable
                pictures.
            UserFileError: the folder, or the table, cannot be read.
        """
        if self.dir is None:
            raise UserError("data.dir is missing: set it to a folder that holds a folder of pictures for each class.")
        folder = Path(self.dir).expanduser()
        files = read_table(Path(self.table).expanduser(), folder) if self.table else list_folder(folder)
        labels = {file.label for file in files}
        classes = sorted(labels, key=lambda label: (label.isdigit() and len(label), label))  # numbers by their value
        if len(classes) < 2:
            raise UserError(
                f"data.dir={self.dir} holds {f'one class, {classes[0]}' if classes else 'no picture of a class'}; a "
                "classifier needs two classes. Each folder in data.dir, or in its folder train, is a class."
            )
        files, shares = self.plan_splits(files)
        facts = {"dir": str(folder.resolve()), "files": hashlib.sha256(repr(files).encode()).hexdigest(), **shares}
        wanted = PictureFiles(
            folder=folder,
            names=[file.name for file in files],
            facts=facts,
            arrange=partial(split_files, files, shares),
            skip_unreadable=self.skip_unreadable,
        )
        cache = Path(self.cache_dir).expanduser() / "images"
        images, order, doubts = decode_once(wanted, self.channels, self.image_size, cache, self.max_gb)
        for doubt in doubts:
            log.warning("%s", doubt)
        numbers = {label: number for number, label in enumerate(classes)}
        targets = torch.tensor([numbers[file.label] for file in files])
        parts = images.split([len(order[split]) for split in SPLITS])
        splits = {split: Images(part, targets[order[split]]) for split, part in zip(SPLITS, parts, strict=True)}
        check_classes_of_splits(splits, classes)
        return Source(**splits, classes=classes, name=folder.resolve().name, origin=f"the folder {self.dir}")

    def plan_splits(self, files: Sequence[ListedFile]) -> tuple[list[ListedFile], dict[str, float]]:
        """The files with the splits that they will have, and the shares of missing splits; prints what it decides."""
        given = {file.split for file in files} - {""}
        if given and "train" not in given:
            raise UserError(f"data.dir={self.dir} has the splits {', '.join(sorted(given))}, but no train.")
        if self.val_share + self.test_share >= 1:
            raise UserError(
                f"data.val_share={self.val_share} and data.test_share={self.test_share} leave nothing to train on; "
                "their sum must be below 1."
            )
        lines = []
        if given == {"train", "val"}:
            files = [file._replace(split=file.split.replace("val", "test")) for file in files]
            given = {"train", "test"}
            lines.append("what lies in val is tested on, as there is no test")
        shares = {"test": self.test_share, "val": self.val_share}
        shares = {split: share for split, share in shares.items() if split not in given}
        place = "in train" if given else ""
        lines += [f"{split} takes {share:.0%} of each class {place}".strip() for split, share in shares.items()]
        if lines:
            say(f"splits: {'; '.join(lines)}")
        return [*files], shares


def list_folder(folder: Path) -> list[ListedFile]:
    """The pictures in `folder/<class>/**`, or in `folder/<split>/<class>/**` if it has a folder train.

    Prints what it passes over.

    Raises:
        UserFileError: it cannot be read.
    """
    files: list[ListedFile] = []
    strays: list[str] = []
    has_splits = (folder / "train").is_dir()
    for name in walk(folder, "", frozenset(), strays):
        split, *parts = name.split("/") if has_splits else ["", *name.split("/")]
        if len(parts) < 2 or (has_splits and split not in SPLIT_WORDS):
            strays.append(name)
        else:
            files.append(list_file(folder, name, parts[0], SPLIT_WORDS.get(split, "")))
    if strays:
        say(f"passed over {plural(len(strays), 'file')} in {folder}, not a picture in a class: {some(strays)}")
    return files


def walk(folder: Path, name: str, above: frozenset[tuple[int, int]], strays: list[str]) -> Iterator[str]:
    """The name of each file at any depth with the suffix of a picture; others, and hidden ones, go to `strays`.

    `name` is the folder's own, and `above` are the folders that it lies in: a link to one of them leads in a circle.
    """
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserFileError(f"{folder} cannot be read as a folder ({error.strerror}); data.dir must be one.") from error
    here = status.st_dev, status.st_ino
    if here in above:
        strays.append(f"{name} (a link in a circle)")
        return
    for entry in entries:
        place = f"{name}/{entry.name}" if name else entry.name
        if entry.name.startswith("."):
            strays.append(place)
        elif Path(entry).is_dir() if entry.is_symlink() else entry.is_dir():
            yield from walk(folder / entry.name, place, above | {here}, strays)
        elif entry.name.lower().endswith(PICTURE_SUFFIXES):
            yield place
        else:
            strays.append(place)


def list_file(folder: Path, name: str, label: str, split: str) -> ListedFile:
    try:
        status = os.stat(os.path.join(folder, name))  # noqa: PTH116, PTH118  # a Path takes three times as long
    except OSError:  # it is gone, or a link that leads nowhere: reading it will tell
        return ListedFile(name, label, split)
    return ListedFile(name, label, split, status.st_size, status.st_mtime_ns)


def read_table(table: Path, folder: Path) -> list[ListedFile]:
    """The pictures that a CSV or parquet file lists.

    Raises:
        UserError: a column is missing, a row lacks its file or label, or a split is none.
        UserFileError: it cannot be read.
    """
    rows: list[dict[str, Any]]
    try:
        if table.suffix == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(table).to_pylist()
        else:
            rows = list(csv.DictReader(table.read_text(encoding="utf-8-sig").splitlines()))
    except ModuleNotFoundError as error:
        raise UserError(f"data.table={table} needs pyarrow: pip install pyarrow, or give a CSV file.") from error
    except OSError as error:
        raise UserFileError(f"data.table={table} cannot be read ({error.strerror or error}).") from error
    except (ValueError, csv.Error) as error:  # pyarrow's, and text that is not UTF-8
        raise UserError(f"data.table={table} is neither CSV in UTF-8 nor parquet ({error}).") from error
    files = []
    for number, row in enumerate(rows, start=1):
        if missing := [column for column in ("file", "label") if row.get(column) in (None, "")]:
            raise UserError(
                f"data.table={table}: row {number} has no {missing[0]}; its columns are {', '.join(map(str, row))}, "
                "and file, label and perhaps split are needed."
            )
        split = row.get("split", "")
        if "split" in row and split not in SPLIT_WORDS:
            raise UserError(f"data.table={table}: row {number} has the split {split!r}; it must be train, val or test.")
        files.append(list_file(folder, str(row["file"]), str(row["label"]), SPLIT_WORDS.get(split, "")))
    return files


def check_classes_of_splits(splits: Mapping[str, Images], classes: Sequence[str]) -> None:
    """Name classes without a picture in a split.

    Raises:
        UserError: a split has none at all, or a class none to train on.
    """
    for split, (_, labels) in splits.items():
        present = set(labels.tolist())
        absent = [name for number, name in enumerate(classes) if number not in present]
        if absent and (split == "train" or not present):
            raise UserError(
                f"The {split} split has no picture of {some(absent)}. Add some: of a class of three or more different "
                "pictures, at least one is taken for each split that is missing."
            )
        if absent:
            log.warning("the %s split has no picture of %s", split, some(absent))
