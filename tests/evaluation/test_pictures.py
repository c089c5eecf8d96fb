import csv
from pathlib import Path

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure
from pages.texts import overlapping

from thaw.evaluation.pictures import save_confusion_matrix, save_contact_sheet, save_images, write_wrong_images


def test_pictures_are_written_whole(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (9, 28, 28), dtype=torch.uint8)
    labels = torch.arange(9)
    classes = [str(number) for number in range(12)]
    save_confusion_matrix(labels, labels.roll(1), classes, tmp_path / "new" / "confusion.png")
    save_images(images, torch.randn(9, 12), labels, labels, classes, "Worst first", tmp_path / "new" / "worst.png")
    save_contact_sheet([images, images], ["as it is", "augmented"], tmp_path / "new" / "sheet.png")
    written = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in written] == ["confusion.png", "sheet.png", "worst.png"]
    for path in written:
        assert matplotlib.image.imread(path).std() > 0.05  # something is drawn


@pytest.mark.parametrize("name", ["{}", "Ankle boot {}", "Leptodactylus_fuscus_{}"])
def test_images_are_named_by_index_label_answer_and_confidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("thaw.evaluation.pictures.save_figure", lambda figure, path: drawn.append(figure))
    images, labels, classes = (
        torch.zeros(10, 28, 28, dtype=torch.uint8),
        torch.arange(10),
        [*map(name.format, "abcdefghij")],
    )
    logits = 9 * torch.eye(10).roll(1, dims=1)
    save_images(images, logits, labels, 9000 + labels, classes, "Worst first", tmp_path / "worst.png")
    save_confusion_matrix(labels, labels.roll(1), classes, tmp_path / "confusion.png")
    grid, matrix = drawn
    text = " ".join(grid.axes[1].get_title().split())
    assert text == (
        "#9001 100% " + (f"{classes[1]} → {classes[2]}" if len(name) < 15 else "Leptodactyl... → Leptodactyl...")
    )
    assert not overlapping(grid) and not overlapping(matrix)


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
