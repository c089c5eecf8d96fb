"""Photographs of one's own: a folder for each class, in splits or not, or a table of files and labels."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from thaw.data.decode import some
from thaw.data.decoded import DecodedData
from thaw.data.images import Source
from thaw.data.pictures import PICTURE_SUFFIXES
from thaw.data.splits import ListedFile
from thaw.run.console import plural, say
from thaw.run.errors import UserError, UserFileError

SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(kw_only=True, eq=False)
class FolderData(DecodedData):
    """Pictures in `dir/<class>/**`, in `dir/{train,val,test}/<class>/**`, or listed in a table.

    Args:
        table: a CSV or parquet file with the columns file (relative to `dir`), label and, if splits are given, split.
    """

    dir: str | None
    table: str | None

    def read(self) -> Source:
        """See `DecodedData.decode`.

        Raises:
            UserError: fewer than two classes.
            UserFileError: the folder, or the table, cannot be read.
        """
        if self.dir is None:
            raise UserError("data.dir is missing: set it to a folder that holds a folder of pictures for each class.")
        folder = Path(self.dir).expanduser()
        files = list_table(Path(self.table).expanduser(), folder) if self.table else list_folder(folder)
        labels = {file.label for file in files}
        classes = sorted(labels, key=lambda label: (label.isdigit() and len(label), label))  # numbers by their value
        if len(classes) < 2:
            raise UserError(
                f"data.dir={self.dir} holds {f'one class, {classes[0]}' if classes else 'no picture of a class'}; a "
                "classifier needs two classes. Each folder in data.dir, or in its folder train, is a class."
            )

        def content(number: int) -> bytes:
            return (folder / files[number].name).read_bytes()

        source = self.decode(files, content, classes, folder.resolve().name, dir=str(folder.resolve()))
        return source._replace(origin=f"the folder {self.dir}")


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
        rank_zero_only(say)(
            f"passed over {plural(len(strays), 'file')} in {folder}, not a picture in a class: {some(strays)}"
        )
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


def list_table(table: Path, folder: Path) -> list[ListedFile]:
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
