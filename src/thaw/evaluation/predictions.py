"""The predictions of a model on its test images, as CSV: all of them, and the wrong ones alone.

Shapes: N images, K classes; logits (N, K), labels (N,).
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from thaw.run.errors import UserError
from thaw.run.files import atomic

PREDICTIONS, WRONG_IMAGES = "predictions.csv", "wrong_images.csv"


class Predictions(NamedTuple):
    """What a model said of N test images, in the order of their places in the test split, `indices` (N,).

    `labels` and `answers` (N,) are the numbers of the true and the predicted classes.
    """

    indices: np.ndarray
    labels: np.ndarray
    answers: np.ndarray

    @property
    def right(self) -> np.ndarray:
        return self.labels == self.answers


def write_predictions(
    indices: Tensor, logits: Tensor, labels: Tensor, classes: Sequence[str], files: Sequence[str], folder: Path
) -> None:
    """Write index, label, answer and confidence of each image, in order of the indices; the wrong ones once more.

    The wrong ones have the names of their files, too, if the images of the test split have `files`.
    """
    confidences, answers = logits.softmax(dim=1).max(dim=1)
    order = indices.argsort()
    columns = (column[order].tolist() for column in (indices, labels, answers, confidences))
    rows = [
        (n, classes[label], classes[answer], f"{share:.6f}") for n, label, answer, share in zip(*columns, strict=True)
    ]
    wrong = [(*row, *files[row[0] : row[0] + 1]) for row in rows if row[1] != row[2]]
    header = ["index", "label", "answer", "confidence"]
    for name, head, lines in ((PREDICTIONS, header, rows), (WRONG_IMAGES, header + ["file"] * bool(files), wrong)):
        with atomic(folder / name) as part, part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *lines])


def read_predictions(path: Path, classes: Sequence[str]) -> Predictions:
    """Read back all predictions that `write_predictions` wrote, of a model with these classes.

    Raises:
        UserError: the file is damaged, or names other classes.
        OSError: it cannot be read.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            next(rows)
            table = [(int(index), numbers[label], numbers[answer]) for index, label, answer, _ in rows]
    except (ValueError, KeyError, StopIteration, csv.Error) as error:
        raise UserError(f"{path} is damaged, or of other classes ({error!r}); test that run again.") from error
    return Predictions(*np.array(table, dtype=np.int64).reshape(-1, 3).T)
