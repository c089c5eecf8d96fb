"""From files of digits to lines of CSV or JSON: what predict.py does."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from thaw.console import ESCAPES, results
from thaw.data.digit_image import read_digits
from thaw.files import atomic
from thaw.predictor import DigitModel

SUFFIXES = (".png", ".jpg", ".jpeg", ".idx", "-ubyte", ".gz")  # of the files that are taken from a folder
LARGEST = 100_000_000  # bytes of a file
AT_ONCE = 500  # digits that are predicted together


class Read(NamedTuple):
    """One digit of a file, or why there is none."""

    file: Path
    number: int  # of the digit in the file
    image: Tensor | None  # uint8 (28, 28)
    error: str


def find_files(inputs: Iterable[str]) -> list[Path]:
    """The files that are meant: those named, and in folders, at any depth, those with one of `SUFFIXES`.

    Raises:
        ValueError: nothing of that name, or nothing in a folder.
    """
    files = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and file.name.lower().endswith(SUFFIXES))
            if not inside:
                raise ValueError(
                    f"{path} holds no file that ends in {', '.join(SUFFIXES)}; name files, or another folder."
                )
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(
                f"{name!r} is neither a file nor a folder; give PNG, JPEG or IDX files, or folders of them."
            )
    if not files:
        raise ValueError("Nothing to predict: name PNG, JPEG or IDX files, or folders of them, after ckpt=...")
    return list(dict.fromkeys(files))


def read_file(path: Path) -> Iterator[Read]:
    """The digits of one file; of one that cannot be read, what is wrong with it."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {LARGEST:,} are read.")
        images = read_digits(path.read_bytes(), str(path))
    except (ValueError, OSError) as error:
        yield Read(path, 0, None, str(error))
        return
    for index, image in enumerate(images):
        yield Read(path, index, image, "")


def predictions(model: DigitModel, read: Sequence[Read], classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each digit, in their order: file, index in it, class, confidence, probabilities; or the error."""
    images = [one.image for one in read if one.image is not None]
    chances = iter(model(torch.stack(images)).tolist() if images else [])
    for one in read:
        row: dict[str, Any] = {"file": str(one.file), "index": one.number, "class": None, "confidence": None}
        if one.image is None:
            yield {**row, "probabilities": None, "error": one.error}
            continue
        probabilities = [round(chance, 6) for chance in next(chances)]
        confidence = max(probabilities)
        row |= {"class": classes[probabilities.index(confidence)], "confidence": confidence}
        yield {**row, "probabilities": probabilities, "error": None}


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
            self.table.writerow(["file", "index", "class", "confidence", *(f"p({c})" for c in classes), "error"])

    def write(self, row: dict[str, Any]) -> None:
        if not self.is_csv:
            self.file.write(json.dumps(row) + "\n")
            return
        chances = row["probabilities"] or [None] * len(self.classes)
        self.table.writerow([*(row[key] for key in ("file", "index", "class", "confidence")), *chances, row["error"]])


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
