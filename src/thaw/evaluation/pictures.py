"""What people would rather look at than read: where a model errs, how sure it is, where it looks. Each writes a PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from thaw.evaluation.corruptions import CORRUPTIONS
from thaw.evaluation.metrics import BINS, accuracy_interval, calibration_error, reliability
from thaw.pages.axes import save


def save_confusion_matrix(labels: Tensor, predictions: Tensor, classes: int, path: Path) -> None:
    """Counts by true class (rows) and predicted class (columns); colour shows the errors, not the many right ones.

    Args:
        labels, predictions: (N,) from 0 to `classes` - 1.
        classes: how many there are.
    """
    counts = torch.bincount(classes * labels + predictions, minlength=classes**2).reshape(classes, classes)
    errors = counts.clone().fill_diagonal_(0)
    side = max(6.0, 0.5 * classes)
    figure = Figure(figsize=(side, side), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    axes.imshow(errors.numpy(), cmap="Reds", vmin=0, vmax=max(1, int(errors.max())))
    top = errors.max().item()
    for row in range(classes):
        for column in range(classes):
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
    axes.set_xticks(range(classes))
    axes.set_yticks(range(classes))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save(figure, path)


def save_digits(images: Tensor, logits: Tensor, labels: Tensor, order: str, path: Path) -> None:
    """The given digits in a grid, each with its label and what the model said instead.

    Args:
        images: uint8 (K, 28, 28).
        logits: (K, 10).
        labels: (K,).
        order: in which they come, for the title.
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
    figure.suptitle(f"{order}: true \N{RIGHTWARDS ARROW} predicted (confidence)", fontsize=11)
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


def save_reliability(logits: Tensor, labels: Tensor, temperature: float, path: Path) -> None:
    """Accuracy against confidence, as the model says it and after division by the temperature.

    Args:
        logits, labels: (N, 10) and (N,) of test digits.
        temperature: chosen on validation.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=110)
    titles = ("as trained", f"with temperature {temperature:.2f}")
    for axes, scaled, title in zip(figure.subplots(1, 2), (logits, logits / temperature), titles, strict=True):
        confidence, accuracy, counts = (values.numpy() for values in reliability(scaled, labels))
        error = calibration_error(scaled, labels)
        edges = np.arange(BINS) / BINS
        filled = counts > 0
        axes.bar(edges[filled], accuracy[filled], 1 / BINS, align="edge", color="#4878a8", edgecolor="white")
        axes.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1)
        axes.scatter(confidence[filled], accuracy[filled], s=14, color="#b2182b", zorder=3)
        for edge, height, count in zip(edges[filled], accuracy[filled], counts[filled], strict=True):
            inside = height > 0.12
            x, y = edge + 0.5 / BINS, height - 0.01 if inside else height + 0.01
            colour, side = ("white", "top") if inside else ("#333333", "bottom")
            axes.text(x, y, f"{count:,}", ha="center", va=side, rotation=90, fontsize=8, color=colour)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", title=f"{title}: ECE {error:.2%}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy (bars: number of digits)")
    save(figure, path)


def save_attention(images: Tensor, shares: Tensor, titles: list[str], path: Path) -> None:
    """Digits above the share of each patch in what the head sees, as a map over the digit.

    Args:
        images: uint8 (K, 28, 28).
        shares: (K, h, w).
        titles: of each digit.
    """
    figure = Figure(figsize=(1.15 * len(images), 2.75), layout="constrained", dpi=110)
    for number, (above, below) in enumerate(figure.subplots(2, len(images), squeeze=False).T):
        above.imshow(images[number].numpy(), cmap="gray_r", vmin=0, vmax=255)
        above.set_title(titles[number], fontsize=9)
        below.imshow(images[number].numpy(), cmap="gray_r", vmin=0, vmax=255, extent=(0, 28, 28, 0))
        below.imshow(shares[number].numpy(), cmap="inferno", alpha=0.65, extent=(0, 28, 28, 0), interpolation="bicubic")
        for panel in (above, below):
            panel.axis("off")
    save(figure, path)


def save_robustness(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], digits: int, path: Path) -> None:
    """Accuracy against the strength of each corruption, a line for each model with its 95 % interval.

    Args:
        curves: of each model, by corruption: pairs of strength and accuracy.
        digits: how many each accuracy is of.
    """
    figure = Figure(figsize=(11, 6), layout="constrained", dpi=110)
    for axes, (name, corruption) in zip(figure.subplots(2, 3).flat, CORRUPTIONS.items(), strict=True):
        for number, (label, curve) in enumerate(curves.items()):
            strengths, accuracies = zip(*curve[name], strict=True)
            low, high = zip(*(accuracy_interval(round(x * digits), digits) for x in accuracies), strict=True)
            axes.plot(strengths, accuracies, marker="o", markersize=3.5, color=f"C{number}", label=label)
            axes.fill_between(strengths, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        axes.axvline(corruption.harmless, color="#aaaaaa", linewidth=0.8, linestyle=":")
        axes.set(title=name, xlabel=corruption.unit, ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "contrast":
            axes.invert_xaxis()  # harder to the right
    if len(curves) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    save(figure, path)


def save_feature_map(points: Tensor, labels: Tensor, classes: Sequence[str], path: Path) -> None:
    """Features in two dimensions, coloured by class and named where each class has its middle.

    Args:
        points: (N, 2).
        labels: (N,).
        classes: names of the classes.
    """
    figure = Figure(figsize=(7, 6), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    x, y = points.T.numpy()
    axes.scatter(x, y, c=labels.numpy(), cmap="tab10", s=7, alpha=0.7, linewidths=0)
    for number, name in enumerate(classes):
        if (chosen := labels == number).any():
            x, y = points[chosen].median(dim=0).values.tolist()
            box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "#888888", "alpha": 0.85}
            axes.text(x, y, name, ha="center", va="center", weight="bold", bbox=box)
    axes.axis("off")
    save(figure, path)
