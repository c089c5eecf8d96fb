"""Photographs of one's own: a folder for each class, in splits or not, or a table of files and labels."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from thaw.data.decode import DecodedData
from thaw.data.images import Source
from thaw.data.pictures import PICTURE_SUFFIXES, picture_content
from thaw.data.splits import SPLIT_WORDS, ListedFile
from thaw.run.console import plural, say, some
from thaw.run.errors import UserError, UserFileError

ROWS_PER_BYTE = 10  # in a byte of a parquet file; each row names another file


@dataclass(kw_only=True, eq=False)
class FolderData(DecodedData):
    """Pictures in `dir/<class>/**`, in `dir/{train,val,test}/<class>/**`, or listed in a table.

    Args:
        table: a CSV or parquet file with the columns file (relative to `dir`), label and, if splits are given, split.
    """

    dir: str | None
    table: str | None

    def read(self) -> Source:
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
            return picture_content(folder / files[number].name)

        source = self.decode(files, content, classes, folder.resolve().name, dir=str(folder.resolve()))
        return source._replace(origin=f"the folder {self.dir}")


def list_folder(folder: Path) -> list[ListedFile]:
    """The pictures in `folder/<class>/**`, or in `folder/<split>/<class>/**` if it has a folder train.

    Prints what it passes over: hidden files, other suffixes, pictures outside of classes, links in a circle.
    """

    def refuse(error: OSError) -> None:
        raise UserFileError(
            f"{error.filename} cannot be read as a folder ({error.strerror}); data.dir must be one."
        ) from error

    files, strays = [], []
    above: dict[str, set[str]] = {}  # each folder, and those that it lies in, without links
    has_splits = (folder / "train").is_dir()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        prefix = "" if place == str(folder) else f"{os.path.relpath(place, folder)}/"
        real, outer = os.path.realpath(place), above.get(os.path.dirname(place), set())  # noqa: PTH120
        if real in outer:
            strays.append(f"{prefix[:-1]} (a link in a circle)")
            folders.clear()
            continue
        above[place] = {*outer, real}
        folders.sort()
        for name in sorted(names):
            split, *parts = (prefix + name if has_splits else f"/{prefix}{name}").split("/")
            is_picture = name.lower().endswith(PICTURE_SUFFIXES) and "/." not in f"/{prefix}{name}"
            if is_picture and len(parts) > 1 and (split in SPLIT_WORDS or not has_splits):
                files.append(list_file(folder, prefix + name, parts[0], SPLIT_WORDS.get(split, "")))
            else:
                strays.append(prefix + name)
    if strays:
        which = f"{plural(len(strays), 'file')} in {folder}, not a picture in a class: {some(sorted(strays))}"
        rank_zero_only(say)(f"passed over {which}")
    check_depth(files, folder)
    return files


def check_depth(files: list[ListedFile], folder: Path) -> None:
    """Print that all pictures lie in folders within those of the classes, which may be a folder too high.

    Raises:
        UserError: these folders are splits.
    """
    within = {Path(file.name).parts[1 + bool(file.split) : -1][:1] for file in files}
    inner = sorted(part for parts in within for part in parts)
    if not files or () in within:
        return
    if "train" in inner and {*inner} <= {*SPLIT_WORDS}:
        raise UserError(
            f"data.dir={folder} holds no folder train, but {folder / files[0].label} does: set data.dir to that one."
        )
    labels = sorted({file.label for file in files})
    rank_zero_only(say)(
        f"the classes are the folders {some(labels)} of {folder}, though all pictures lie deeper, in folders "
        f"{some(inner)}; if those are the classes, set data.dir one folder deeper"
    )


def list_file(folder: Path, name: str, label: str, split: str) -> ListedFile:
    try:
        status = os.stat(os.path.join(folder, name))  # noqa: PTH116, PTH118  # a Path takes three times as long
    except OSError:  # it is gone, or a link that leads nowhere: reading it will tell
        return ListedFile(name, label, split)
    return ListedFile(name, label, split, status.st_size, status.st_mtime_ns)


def list_table(table: Path, folder: Path) -> list[ListedFile]:
    """The pictures that a CSV or parquet file lists."""
    rows: list[dict[str, Any]]
    try:
        if table.suffix == ".parquet":
            rows = parquet_rows(table)
        else:
            rows = list(csv.DictReader(table.read_text(encoding="utf-8-sig").splitlines()))
    except UserError:
        raise
    except Exception as error:  # damaged files fail in any way
        reason = getattr(error, "strerror", None) or error
        raise UserFileError(
            f"data.table={table} cannot be read ({reason}); give CSV in UTF-8, or parquet and pip install pyarrow."
        ) from error
    files = []
    for number, row in enumerate(rows, start=1):
        file, label = row.get("file"), row.get("label")
        usable = isinstance(file, str) and file and "\0" not in file and isinstance(label, str | int) and label != ""
        if not usable or str(row.get("split", "train")) not in SPLIT_WORDS:
            raise UserError(
                f"data.table={table}: row {number} is {str(row)[:300]}; it must have a file, a label and, if "
                "there is a column split, train, val or test there."
            )
        files.append(list_file(folder, str(file), str(label), SPLIT_WORDS.get(row.get("split", ""), "")))
    return files


def parquet_rows(table: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file, of the columns that a table of pictures may have."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(table) as opened:
        count, size = opened.metadata.num_rows, table.stat().st_size
        if count > ROWS_PER_BYTE * size:
            raise ValueError(f"{count:,} rows in {size:,} bytes")
        columns = [name for name in ("file", "label", "split") if name in opened.schema_arrow.names]
        return opened.read(columns).to_pylist()
