from pathlib import Path

import matplotlib.image
import torch

from thaw.evaluation.pictures import save_confusion_matrix, save_contact_sheet, save_digits


def test_pictures_are_written_whole(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (9, 28, 28), dtype=torch.uint8)
    labels = torch.arange(9)
    save_confusion_matrix(labels, labels.roll(1), 12, tmp_path / "new" / "confusion.png")
    save_digits(images, torch.randn(9, 10), labels, "Worst first", tmp_path / "new" / "worst.png")
    save_contact_sheet([images, images], ["as it is", "augmented"], tmp_path / "new" / "sheet.png")
    written = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in written] == ["confusion.png", "sheet.png", "worst.png"]
    for path in written:
        assert matplotlib.image.imread(path).std() > 0.05  # something is drawn
