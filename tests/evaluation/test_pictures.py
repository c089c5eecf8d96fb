import csv
from pathlib import Path

import matplotlib.image
import torch

from thaw.evaluation.pictures import save_confusion_matrix, save_contact_sheet, save_images, write_wrong_images


def test_pictures_are_written_whole(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (9, 28, 28), dtype=torch.uint8)
    labels = torch.arange(9)
    save_confusion_matrix(labels, labels.roll(1), 12, tmp_path / "new" / "confusion.png")
    save_images(images, torch.randn(9, 10), labels, "Worst first", tmp_path / "new" / "worst.png")
    save_contact_sheet([images, images], ["as it is", "augmented"], tmp_path / "new" / "sheet.png")
    written = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in written] == ["confusion.png", "sheet.png", "worst.png"]
    for path in written:
        assert matplotlib.image.imread(path).std() > 0.05  # something is drawn


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
