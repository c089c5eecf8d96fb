"""From files of digits to lines of CSV or JSON: what predict.py does."""

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from PIL import Image

from thaw.data.digit_image import PICTURE_FORMATS, Digit, read_digits
from thaw.predict.predictor import DigitModel
from thaw.run.console import ESCAPES, results
from thaw.run.files import atomic

# Of the files that are taken from a folder. Each of the second line gets a row that says that it is not read.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"),
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".ico", ".tga", ".pcx", ".pdf", ".eps"),
    *(".pbm", ".pgm", ".ppm", ".pnm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".xcf"),
    *(".idx", "-ubyte", ".gz"),
)
LARGEST = 100_000_000  # bytes of a file
AT_ONCE = 500  # digits that are predicted together
FIRST, LAST = ("file", "index", "class", "confidence"), ("error", "warning")  # columns before the probabilities, after
NOT_FINITE = "The model's probabilities are not finite: its weights are damaged; use another checkpoint."


class Read(NamedTuple):
    """One digit of a file, or why there is none."""

    file: str
    number: int  # of the digit in the file
    digit: Digit


def printable(name: object) -> str:
    """A file's name as text of any encoding can hold it: a byte that is not UTF-8 becomes \\xff."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def find_files(inputs: Iterable[str]) -> tuple[list[Path], list[str]]:
    """The files that are meant, and what was left out.

    Of a folder, at any depth, those with one of `SUFFIXES` and those that begin as a picture or an IDX file does;
    hidden ones and all others are left out and counted. A file that is named is always taken.

    Raises:
        ValueError: nothing of that name, or nothing in a folder.
    """
    files, left_out = [], []
    for name in inputs:
        path = Path(name).expanduser()
        if os.path.isdir(path):  # noqa: PTH112, Path.is_dir raises an error for what is too long to be a name
            hidden, inside, others = sort_folder(path)
            counts = [f"{len(hidden):,} hidden"] if hidden else []
            if others:
                counts.append(f"{len(others):,} that are no pictures ({named(others)})")
            if not inside:
                raise ValueError(
                    f"{printable(path)} holds no picture and no IDX file"
                    f"{', but files ' + ' and '.join(counts) if counts else ''}; name files, or another folder."
                )
            if counts:
                left_out.append(f"files of {printable(path)} left out: {' and '.join(counts)}")
            files += inside
        elif os.path.exists(path):  # noqa: PTH110, as above
            files.append(path)
        else:
            raise ValueError(
                f"{printable(name)!r} is neither a file nor a folder; give {', '.join(PICTURE_FORMATS)} or IDX files, "
                "or folders of them."
            )
    if not files:
        raise ValueError("Nothing to predict: name pictures, IDX files, or folders of them, after ckpt=...")
    return list(dict.fromkeys(files)), left_out


def sort_folder(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The files below a folder: the hidden ones, those that are pictures or IDX files, the others."""
    hidden, inside, others = list[Path](), list[Path](), list[Path]()
    for file in sorted(folder.rglob("*")):
        if file.is_dir():
            continue
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            hidden.append(file)
        elif file.name.lower().endswith(SUFFIXES) or begins_as_picture(file):
            inside.append(file)
        else:
            others.append(file)
    return hidden, inside, others


def begins_as_picture(file: Path) -> bool:
    """Whether the first bytes are those of a picture or of an IDX file of images."""
    try:
        with file.open("rb") as opened:
            if opened.read(4) == b"\0\0\x08\x03":
                return True
            opened.seek(0)
            Image.open(opened, formats=PICTURE_FORMATS)
    except Exception:  # what Pillow raises for a damaged head has no end
        return False
    return True


def named(files: Sequence[Path]) -> str:
    """The first names, and how many more there are."""
    names = ", ".join(printable(file.name) for file in files[:5])
    return names if len(files) <= 5 else f"{names} and {len(files) - 5:,} more"


def read_file(path: Path) -> Iterator[Read]:
    """The digits of one file; of one that cannot be read, what is wrong with it."""
    name = printable(path)
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{name} has {path.stat().st_size:,} bytes; at most {LARGEST:,} are read.")
        for index, digit in enumerate(read_digits(path.read_bytes(), name)):
            yield Read(name, index, digit)
    except (ValueError, OSError) as error:
        yield Read(name, 0, Digit(None, printable(error)))


def predictions(model: DigitModel, read: Sequence[Read], classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each digit, in their order: file, index in it, class, confidence, probabilities; or the error."""
    images = [one.digit.image for one in read if one.digit.image is not None]
    chances = iter(model(torch.from_numpy(np.stack(images))).tolist() if images else [])
    for file, number, digit in read:
        row: dict[str, Any] = {"file": file, "index": number, "class": None, "confidence": None, "probabilities": None}
        row |= {"error": digit.error or None, "warning": digit.warning or None}
        if digit.image is not None:
            probabilities = [round(chance, 6) for chance in next(chances)]
            if not all(map(math.isfinite, probabilities)):
                yield {**row, "error": NOT_FINITE}
                continue
            confidence = max(probabilities)
            row |= {"class": classes[probabilities.index(confidence)], "confidence": confidence}
            row["probabilities"] = probabilities
        yield row


class Writer:
    """Writes rows as CSV, with a column for each class, or as JSON lines.

    Args:
        file: open for text.
        format: `csv` or `jsonl`.
        classes: names of the classes.
    """

    def __init__(self, file: TextIO, format: str, classes: Sequence[str]) -> None:
        self.file, self.is_csv, self.classes = file, format == "csv", classes
        if self.is_csv:
            self.table = csv.writer(file, lineterminator="\n")
            self.table.writerow([*FIRST, *(f"p({c})" for c in classes), *LAST])

    def write(self, row: dict[str, Any]) -> None:
        if not self.is_csv:
            self.file.write(json.dumps(row) + "\n")
            return
        chances = row["probabilities"] or [None] * len(self.classes)
        self.table.writerow([*(row[key] for key in FIRST), *chances, *(row[key] for key in LAST)])


@contextmanager
def open_output(output: str | None, format: str) -> Iterator[tuple[TextIO, str]]:
    """Standard output, or a file that gets its name when all is written; with the format that its name asks for.

    Raises:
        ValueError: an unknown format.
    """
    wanted = format if output is None else Path(output).suffix.removeprefix(".")
    if wanted not in ("csv", "jsonl"):
        key = f"format={format!r}" if output is None else f"output={output!r}"
        raise ValueError(f"{key} is unknown; choose csv or jsonl, for a file as its suffix.")
    if output is None:
        with results() as file:
            yield file, wanted
        return
    with (
        atomic(Path(output).expanduser()) as part,
        part.open("w", encoding="utf-8", errors=ESCAPES, newline="") as file,
    ):
        yield file, wanted


def in_batches(read: Iterable[Read]) -> Iterator[list[Read]]:
    """Lists of at most `AT_ONCE`."""
    batch = []
    for one in read:
        batch.append(one)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
