"""What people would rather look at than read: confusion matrix, worst digits, contact sheet. Each writes a PNG."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from thaw.evaluation.axes import save


def save_confusion_matrix(labels: Tensor, predictions: Tensor, path: Path) -> None:
    """Counts by true class (rows) and predicted class (columns); colour shows the errors, not the many right ones.

    Args:
        labels, predictions: (N,) classes 0 to 9.
    """
    counts = torch.zeros(10, 10, dtype=torch.long).index_put_((labels, predictions), torch.tensor(1), accumulate=True)
    errors = counts.clone().fill_diagonal_(0)
    figure = Figure(figsize=(6, 6), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    axes.imshow(errors.numpy(), cmap="Reds", vmin=0, vmax=max(1, int(errors.max())))
    top = errors.max().item()
    for row in range(10):
        for column in range(10):
            count = int(counts[row, column])
            if row == column:
                axes.text(column, row, str(count), ha="center", va="center", color="#2a6f2a", weight="bold")
            elif count:
                color = "white" if count > 0.6 * top else "#333333"
                axes.text(column, row, str(count), ha="center", va="center", color=color)
    right = int(counts.diagonal().sum())
    axes.set_title(f"{len(labels) - right} of {len(labels):,} digits wrong", fontsize=12)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_xticks(range(10))
    axes.set_yticks(range(10))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save(figure, path)


def save_worst_digits(images: Tensor, logits: Tensor, labels: Tensor, path: Path) -> None:
    """The given digits in a grid, each with its label and what the model said instead.

    Args:
        images: uint8 (K, 28, 28).
        logits: (K, 10).
        labels: (K,).
    """
    chances = logits.softmax(dim=1)
    columns = 8
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(1.25 * columns, 1.55 * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    for place, panel in enumerate(axes.flat):
        panel.axis("off")
        if place >= len(images):
            continue
        label, prediction = int(labels[place]), int(chances[place].argmax())
        panel.imshow(images[place].numpy(), cmap="gray_r", vmin=0, vmax=255)
        wrong = label != prediction
        panel.set_title(
            f"{label} \N{RIGHTWARDS ARROW} {prediction} ({chances[place, prediction]:.0%})",
            fontsize=9,
            color="#b2182b" if wrong else "#333333",
        )
    figure.suptitle("Highest loss first: true \N{RIGHTWARDS ARROW} predicted (confidence)", fontsize=11)
    save(figure, path)


def save_contact_sheet(rows: list[Tensor], titles: list[str], path: Path) -> None:
    """Rows of digits, one title a row; every row is uint8 (K, 28, 28)."""
    figure = Figure(figsize=(0.62 * len(rows[0]) + 1.2, 0.66 * len(rows)), layout="constrained", dpi=110)
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for panel, row, title in zip(axes, rows, titles, strict=True):
        padded = torch.nn.functional.pad(row, (1, 1, 1, 1))
        panel.imshow(torch.cat(list(padded), dim=1).numpy(), cmap="gray_r", vmin=0, vmax=255)
        panel.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_visible(False)
    save(figure, path)
