"""Reads the images in files and writes a row of CSV or JSON for each; used by predict.py."""

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

from thaw.data.pictures import LARGEST, PICTURE_FORMATS
from thaw.data.readers import ImageReader, Reading
from thaw.predict.predictor import ImageModel
from thaw.run.console import ESCAPES, results
from thaw.run.errors import UserError
from thaw.run.files import atomic

# Files with these endings are taken from a folder. Formats that Pillow does not read here get a row with an error.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"),
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".ico", ".tga", ".pcx", ".pdf", ".eps"),
    *(".pbm", ".pgm", ".ppm", ".pnm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".xcf"),
    *(".idx", "-ubyte", ".gz"),
)
COLUMNS, LAST_COLUMNS = ("file", "index", "class", "confidence"), ("error", "warning")  # the probabilities lie between
NOT_FINITE = "The model's probabilities are not finite: its weights are damaged; use another checkpoint."


class Read(NamedTuple):
    """One image of a file, or the error that says why it has none."""

    file: str
    number: int  # place of the image in the file
    reading: Reading


def printable(name: object) -> str:
    """A file's name as valid text: a byte that is not UTF-8 becomes \\xff."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def find_files(inputs: Iterable[str]) -> tuple[list[Path], list[str]]:
    """The files to read, and a line for each folder in which files were left out.

    From a folder, at any depth, files are taken that end in one of `SUFFIXES` or begin as a picture or an IDX file.
    Hidden and other files are left out and counted. A file that is named is always taken.

    Raises:
        UserError: a name does not exist, or a folder holds nothing to read.
    """
    files, left_out = [], []
    for name in inputs:
        path = Path(name).expanduser()
        if os.path.isdir(path):  # noqa: PTH112, Path.is_dir raises an error for a text longer than a name can be
            below = [file for file in sorted(path.rglob("*")) if not file.is_dir()]
            seen = [file for file in below if not any(part[0] == "." for part in file.relative_to(path).parts)]
            plain = [file for file in seen if file.is_file() or not file.exists()]  # a pipe may never end
            inside = [file for file in plain if file.name.lower().endswith(SUFFIXES) or begins_as_picture(file)]
            others = sorted({*seen} - {*inside})
            counts = [f"{len(below) - len(seen):,} hidden"] if len(below) > len(seen) else []
            counts += [f"{len(others):,} that are not pictures ({first_names(others)})"] if others else []
            rest = " and ".join(counts)
            if not inside:
                raise UserError(
                    f"{printable(path)} holds no picture and no IDX file{', but files ' + rest if rest else ''}; "
                    "name files, or another folder."
                )
            left_out += [f"files of {printable(path)} left out: {rest}"] if rest else []
            files += inside
        elif os.path.exists(path):  # noqa: PTH110, as above
            files.append(path)
        else:
            raise UserError(
                f"{printable(name)!r} is neither a file nor a folder; give {', '.join(PICTURE_FORMATS)} or IDX files, "
                "or folders of them."
            )
    if not files:
        raise UserError("Nothing to predict: name pictures, IDX files, or folders of them, after ckpt=...")
    return list(dict.fromkeys(files)), left_out


def begins_as_picture(file: Path) -> bool:
    """Whether the first bytes are those of a picture or of an IDX file with images."""
    try:
        with file.open("rb") as opened:
            if opened.read(4) != b"\0\0\x08\x03":
                opened.seek(0)
                Image.open(opened, formats=PICTURE_FORMATS)
    except Exception:  # Pillow raises many kinds of exception for a damaged head
        return False
    return True


def first_names(files: Sequence[Path]) -> str:
    """The first five names, and how many more there are."""
    names = ", ".join(printable(file.name) for file in files[:5])
    return names if len(files) <= 5 else f"{names} and {len(files) - 5:,} more"


def read_file(path: Path, reader: ImageReader) -> Iterator[Read]:
    """The images of one file, or an error in their place where it cannot be read."""
    name = printable(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(f"{name} has more than {LARGEST:,} bytes; split it.")
        for index, reading in enumerate(reader.file(content, name)):
            yield Read(name, index, reading)
    except (ValueError, OSError) as error:
        yield Read(name, 0, Reading(None, printable(error)))


def predictions(model: ImageModel, read: Sequence[Read], classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each image, in their order: file, index, class, confidence and probabilities, or an error."""
    images = [one.reading.image for one in read if one.reading.image is not None]
    chances = iter(model(torch.from_numpy(np.stack(images))).tolist() if images else [])
    for file, number, reading in read:
        row: dict[str, Any] = {"file": file, "index": number, "class": None, "confidence": None, "probabilities": None}
        row |= {"error": reading.error or None, "warning": reading.warning or None}
        if reading.image is not None:
            probabilities = [round(chance, 6) for chance in next(chances)]
            if all(map(math.isfinite, probabilities)):
                confidence = max(probabilities)
                row |= {"class": classes[probabilities.index(confidence)], "confidence": confidence}
                row["probabilities"] = probabilities
            else:
                row["error"] = NOT_FINITE
        yield row


class RowWriter:
    """Writes rows as CSV, with a column for each class, or as JSON lines (`jsonl`)."""

    def __init__(self, file: TextIO, format: str, classes: Sequence[str]) -> None:
        self.file, self.is_csv, self.classes = file, format == "csv", classes
        if self.is_csv:
            self.table = csv.writer(file, lineterminator="\n")
            self.table.writerow([*COLUMNS, *(f"p({c})" for c in classes), *LAST_COLUMNS])

    def write(self, row: dict[str, Any]) -> None:
        if not self.is_csv:
            self.file.write(json.dumps(row) + "\n")
            return
        chances = row["probabilities"] or [None] * len(self.classes)
        self.table.writerow([*(row[key] for key in COLUMNS), *chances, *(row[key] for key in LAST_COLUMNS)])


@contextmanager
def open_output(output: str | None, format: str) -> Iterator[tuple[TextIO, str]]:
    """Open standard output, or a file that appears under its name once it is complete; also gives the format."""
    wanted = format if output is None else Path(output).suffix.removeprefix(".")
    if wanted not in ("csv", "jsonl"):
        key = f"format={format!r}" if output is None else f"output={output!r}"
        raise UserError(f"{key} is unknown; choose csv or jsonl, for a file as its suffix.")
    if output is None:
        with results() as file:
            yield file, wanted
        return
    with (
        atomic(Path(output).expanduser()) as part,
        part.open("w", encoding="utf-8", errors=ESCAPES, newline="") as file,
    ):
        yield file, wanted
