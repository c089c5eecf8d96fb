"""A list of what a model got wrong, as a CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from thaw.run.files import atomic

WRONG_IMAGES = "wrong_images.csv"


def write_wrong_images(indices: Tensor, logits: Tensor, labels: Tensor, classes: Sequence[str], path: Path) -> None:
    """Write index, label, answer and confidence of every image whose answer is wrong, in the order of the indices.

    Args:
        indices: (N,), the images' places in their split.
        logits: (N, K).
        labels: (N,).
        classes: names of the K classes.
        path: of the file.
    """
    confidences, answers = logits.softmax(dim=1).max(dim=1)
    order = indices.argsort()
    wrong = order[(answers != labels)[order]]
    with atomic(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["index", "label", "answer", "confidence"])
        for n in wrong.tolist():
            label, answer = classes[int(labels[n])], classes[int(answers[n])]
            rows.writerow([int(indices[n]), label, answer, f"{float(confidences[n]):.6f}"])
