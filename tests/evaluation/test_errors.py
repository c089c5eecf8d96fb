import csv
from pathlib import Path

import torch

from thaw.evaluation.errors import write_wrong_images


def test_every_wrong_image_is_listed_by_its_place(tmp_path: Path) -> None:
    """As several processes gather them: in no order."""
    indices, labels = torch.tensor([7, 2, 9, 0]), torch.tensor([1, 0, 2, 1])
    logits = torch.tensor([[3.0, 0, 0], [0, 0, 5], [0, 0, 4], [2, 1, 0]])  # answers 0, 2, 2, 0
    write_wrong_images(indices, logits, labels, ["a", "b", "c, d"], tmp_path / "report" / "wrong.csv")
    with (tmp_path / "report" / "wrong.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    chances = logits.softmax(dim=1).amax(dim=1)
    assert [(row["index"], row["label"], row["answer"]) for row in rows] == [
        ("0", "b", "a"),
        ("2", "a", "c, d"),
        ("7", "b", "a"),
    ]
    assert [float(row["confidence"]) for row in rows] == [round(float(chances[n]), 6) for n in (3, 1, 0)]
