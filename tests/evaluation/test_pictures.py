import csv
from pathlib import Path

import matplotlib.image
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pages.texts import unreadable
from sklearn.metrics import confusion_matrix

from thaw.data.images import Images, Source
from thaw.evaluation.pictures import (
    draw_errors,
    on_paper,
    save_confusion_matrix,
    save_contact_sheet,
    save_feature_map,
    save_images,
)


def test_pictures_are_written_whole(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (9, 3, 28, 28), dtype=torch.uint8)
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
        torch.zeros(10, 1, 28, 28, dtype=torch.uint8),
        torch.arange(10),
        [*map(name.format, "abcdefghij")],
    )
    logits = 9 * torch.eye(10).roll(1, dims=1)
    save_images(images, logits, labels, 9000 + labels, classes, "Worst first", tmp_path / "worst.png")
    save_confusion_matrix(labels, labels.roll(1), classes, tmp_path / "confusion.png")
    grid, matrix = drawn
    text = " ".join(grid.axes[0].texts[1].get_text().split())
    assert text == (
        "#9001 100% " + (f"{classes[1]} → {classes[2]}" if len(name) < 15 else "Leptodactyl... → Leptodactyl...")
    )
    assert not unreadable(grid) and not unreadable(matrix)


@pytest.mark.parametrize("size", [2, 10, 30, 37, 60, 200])
def test_a_confusion_matrix_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Counts and names as far as there is room, and the most confused pairs beside many classes."""
    drawn: list[Figure] = []
    monkeypatch.setattr("thaw.evaluation.pictures.save_figure", lambda figure, path: drawn.append(figure))
    classes = [f"{chr(97 + number % 26)}_long_name_{number}" for number in range(size)]
    labels = torch.arange(size).repeat(120)
    labels[labels == 0] = 1  # class 0 is absent
    answers = torch.cat([torch.zeros(3).long(), labels[3:]])
    answers[labels == size - 1] = 0
    save_confusion_matrix(labels, answers, classes, tmp_path / "confusion.png")
    (figure,) = drawn
    matrix, *pairs = figure.findobj(Axes)
    assert not unreadable(figure) and max(figure.get_size_inches()) < 15
    counts = confusion_matrix(labels, answers, labels=range(size))
    cells = {(text.get_position()[1], text.get_position()[0]): int(text.get_text()) for text in matrix.texts}
    present = {(row, row) for row in range(1, size)}  # 0 correct ones of a class that is there are shown
    filled = {(row, column) for row, column in zip(*counts.nonzero(), strict=True)}
    assert cells == ({place: counts[place] for place in filled | present} if size <= 30 else {})
    names = [label.get_text() for label in matrix.get_yticklabels()]
    assert names[:2] == (["a_long_name_0 (absent)", "b_long_name_1"] if size <= 60 else [])
    assert bool(pairs) == (size > 20)
    if pairs:
        (text,) = pairs[0].texts
        assert text.get_text().splitlines()[2:] == [
            f" 120  {classes[-1]} → {classes[0]}",
            f"   2  {classes[1]} → {classes[0]}",
        ]


def test_photographs_keep_their_colours_and_digits_are_ink_on_paper(tmp_path: Path) -> None:
    colour = torch.tensor([200, 30, 60], dtype=torch.uint8)[:, None, None]
    save_contact_sheet([colour.expand(3, 3, 50, 50)], ["red"], tmp_path / "colour.png")
    shown = (255 * matplotlib.image.imread(tmp_path / "colour.png")[..., :3]).round()
    assert (shown == [200, 30, 60]).all(axis=2).mean() > 0.3
    grey = torch.full((3, 1, 50, 50), 40, dtype=torch.uint8)
    for reader, value in (("photo", 40), ("digit", 215)):
        save_contact_sheet([on_paper(grey, reader)], ["grey"], tmp_path / "grey.png")
        shown = (255 * matplotlib.image.imread(tmp_path / "grey.png")[..., 0]).round()
        assert (abs(shown - value) <= 1).mean() > 0.3


def test_a_sheet_of_large_photographs_is_a_small_file(tmp_path: Path) -> None:
    photos = torch.randint(0, 256, (16, 3, 224, 224), dtype=torch.uint8)
    save_contact_sheet([photos] * 3, ["a", "b", "c"], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size < 1e6


def test_the_worst_images_are_found_by_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of a split of four are tested, in no order."""
    shown: list[torch.Tensor] = []
    monkeypatch.setattr("thaw.evaluation.pictures.save_images", lambda *arguments: shown.extend(arguments[:4]))
    split = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2)
    logits, indices = torch.tensor([[3.0, 0], [0, 5]]), torch.tensor([3, 1])
    test = Images(split, torch.zeros(4).long())
    source = Source(test, test, test, ["a", "b"], "mine", files=["w.png", "x.png", "y.png", "z.png"])
    draw_errors(source, logits, indices, "digit", tmp_path)
    images, _, _, places = shown
    assert places.tolist() == [1, 3] and images[:, 0, 0, 0].tolist() == [254, 252]
    with (tmp_path / "wrong_images.csv").open(newline="") as file:
        assert [(row["index"], row["file"]) for row in csv.DictReader(file)] == [("1", "x.png")]


@pytest.mark.parametrize("size", [2, 10, 37, 200])
def test_classes_of_a_feature_map_have_colours_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("thaw.evaluation.pictures.save_figure", lambda figure, path: drawn.append(figure))
    labels = torch.arange(1, size).repeat(2)  # class 0 is absent
    save_feature_map(torch.randn(len(labels), 2), labels, [f"name {n}" for n in range(size)], tmp_path / "map.png")
    (axes,) = drawn[0].axes
    colours = {tuple(colour) for colour in axes.collections[0].get_facecolor()}  # type: ignore[attr-defined]
    assert len(colours) == size - 1
    assert len(axes.texts) == (size - 1 if size <= 60 else 0)
