import csv
from pathlib import Path

import pytest
import torch

from thaw.evaluation.predictions import PREDICTIONS, WRONG_IMAGES, read_predictions, write_predictions
from thaw.run.errors import UserError

CLASSES = ["a", "b", "c, d"]


def test_predictions_read_back_and_wrong_ones_are_listed_once_more(tmp_path: Path) -> None:
    """As several processes gather them: in no order."""
    indices, labels = torch.tensor([7, 2, 9, 0]), torch.tensor([1, 0, 2, 1])
    logits = torch.tensor([[3.0, 0, 0], [0, 0, 5], [0, 0, 4], [2, 1, 0]])  # answers 0, 2, 2, 0
    files = [f"{n}.jpg" for n in range(10)]
    write_predictions(indices, logits, labels, CLASSES, files, tmp_path / "report")
    found = read_predictions(tmp_path / "report" / PREDICTIONS, CLASSES)
    assert [each.tolist() for each in found] == [[0, 2, 7, 9], [1, 0, 1, 2], [0, 2, 0, 2]]
    assert found.right.tolist() == [False, False, False, True]
    with (tmp_path / "report" / WRONG_IMAGES).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["index"], row["label"], row["answer"], row["file"]) for row in rows] == [
        ("0", "b", "a", "0.jpg"),
        ("2", "a", "c, d", "2.jpg"),
        ("7", "b", "a", "7.jpg"),
    ]
    chances = logits.softmax(dim=1).amax(dim=1)
    assert [float(row["confidence"]) for row in rows] == [round(float(chances[n]), 6) for n in (3, 1, 0)]


@pytest.mark.parametrize("text", ["", "index,label,answer,confidence\n0,a,zebra,0.5\n", "index\n0,a,b\n"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (path := tmp_path / PREDICTIONS).write_text(text)
    with pytest.raises(UserError, match=PREDICTIONS):
        read_predictions(path, CLASSES)
