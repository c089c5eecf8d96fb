"""Figures about models, each a PNG.

Shapes: N images of uint8 (N, C, H, W), K classes; logits (N, K), labels (N,). Images are drawn as they are; `on_paper`
turns bright ink on black into dark ink on paper.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from thaw.data.images import Source
from thaw.evaluation.metrics import BINS, MANY, accuracy_interval, calibration_error, highest_losses, reliability
from thaw.evaluation.predictions import write_predictions
from thaw.pages.figures import (
    ACCENT,
    COLORS,
    FILL,
    INK,
    SMALL,
    new_figure,
    plain_axes,
    save_figure,
)

MOST_EXAMPLES = 32  # images in a figure
MOST_NAMED, MOST_COUNTED = 60, 30  # classes of a confusion matrix with names at its sides, with numbers in its cells
MOST_PAIRS = 25  # of classes that are listed beside it
ARROW = "\N{RIGHTWARDS ARROW}"


def draw_errors(source: Source, logits: Tensor, indices: Tensor, reader: str, folder: Path) -> None:
    """Write `predictions.csv`, `wrong_images.csv`, `confusion_matrix.png` and `worst_images.png` into a folder.

    `indices` (N,) are the images' places in the test split, `reader` is as in `on_paper`.
    """
    classes, labels = source.classes, source.test.labels[indices]
    write_predictions(indices, logits, labels, classes, source.files, folder)
    save_confusion_matrix(labels, logits.argmax(dim=1), classes, folder / "confusion_matrix.png")
    worst = highest_losses(logits, labels, MOST_EXAMPLES)
    shown = (on_paper(source.test.images[indices[worst]], reader), logits[worst], labels[worst], indices[worst])
    save_images(*shown, classes, "Highest loss first", folder / "worst_images.png")


def save_confusion_matrix(labels: Tensor, predictions: Tensor, classes: Sequence[str], path: Path) -> None:
    """Counts by true class (rows) and predicted class (columns), both by number; `classes` are the names of all.

    Colour shows the errors, not the many correct answers. Of many classes the most confused pairs are listed beside it.
    """
    size = len(classes)
    # 15 times as fast as torchmetrics' confusion matrix, on 10,000 images
    counts = torch.bincount(size * labels + predictions, minlength=size**2).reshape(size, size)
    errors, present = counts.clone().fill_diagonal_(0), counts.sum(dim=1) > 0
    many = size > MANY
    side = min(max(6.0, 0.5 * size), 10.5)
    figure = new_figure(side + 4 * many, side)
    left, *beside = figure.subfigures(1, 1 + many, width_ratios=[side, 4][: 1 + many], squeeze=False)[0]
    axes = left.add_subplot()
    most = int(errors.max())
    axes.imshow(errors.numpy(), cmap="Oranges", vmin=0, vmax=max(1, most), interpolation="nearest")
    text = {"ha": "center", "va": "center", "fontsize": SMALL}
    for row, column in (counts + present.diag()).nonzero().tolist() if size <= MOST_COUNTED else ():
        count = int(counts[row, column])
        colour = "white" if row != column and count > 0.6 * most else INK
        axes.text(column, row, str(count), **text, color=colour, weight="bold" if row == column else "normal")
    axes.set_title(f"{int(errors.sum()):,} of {len(labels):,} images wrong", fontsize=12)
    axes.set(xlabel="predicted", ylabel="true", xticks=[], yticks=[])
    if size <= MOST_NAMED:
        names, small = [shorten_name(name) for name in classes], {"fontsize": SMALL}
        axes.set_xticks(range(size), names, rotation=90 if many or max(map(len, names)) > 4 else 0, **small)
        rows = zip(names, present.tolist(), strict=True)
        axes.set_yticks(range(size), [name if found else f"{name} (absent)" for name, found in rows], **small)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for right in beside:
        list_pairs(right.add_subplot(), errors, classes)
    save_figure(figure, path)


def list_pairs(axes: Axes, errors: Tensor, classes: Sequence[str]) -> None:
    """Write down which pairs of a true and a predicted class have the most errors (K, K), two or more if any has."""
    lines = [f"Most often confused (true {ARROW} predicted):", ""]
    names = [shorten_name(name, 25) for name in classes]
    for place in errors.flatten().argsort(descending=True, stable=True)[:MOST_PAIRS].tolist():
        label, answer = divmod(place, len(names))
        if (count := int(errors[label, answer])) >= min(2, int(errors.max())) > 0:
            lines.append(f"{count:4}  {names[label]} {ARROW} {names[answer]}")
    axes.text(0, 1, "\n".join(lines), va="top", fontsize=SMALL, in_layout=False)
    axes.axis("off")


def save_images(
    images: Tensor, logits: Tensor, labels: Tensor, indices: Tensor, classes: Sequence[str], order: str, path: Path
) -> None:
    """The given images in a grid, each with its index, the model's confidence, its label and the model's answer.

    `indices` and `classes` are as in `draw_errors`; `order` says how the images are sorted.
    """
    confidences, answers = logits.softmax(dim=1).max(dim=1)
    names = [[shorten_name(classes[n]) for n in pair] for pair in zip(labels.tolist(), answers.tolist(), strict=True)]
    short = all(len(label + answer) < 12 for label, answer in names)
    gap, text, columns = (" ", 0.45, 8) if short else ("\n", 0.6, 8)
    rows = max(1, -(-len(images) // columns))
    cell, top = (1.25, text + 1.2), 0.4  # inches
    figure = new_figure(cell[0] * columns, cell[1] * rows + top)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1 - top / figure.get_figheight()))  # one for all: an axes each takes a second
    axes.axis("off")
    facts = zip(images, indices.tolist(), confidences.tolist(), names, (answers != labels).tolist(), strict=True)
    for place, (image, index, confidence, (label, answer), wrong) in enumerate(facts):
        x, y = (place % columns + 0.5) * cell[0], place // columns * cell[1] + text
        height, width = (1.1 * side / max(image.shape[1:]) for side in image.shape[1:])
        show_image(axes, image, (x - width / 2, x + width / 2, y + height, y))
        title = f"#{index}  {confidence:.0%}\n{label}{gap}{ARROW} {answer}"
        axes.text(x, y - 0.05, title, ha="center", va="bottom", fontsize=SMALL, color=ACCENT if wrong else INK)
    axes.set(xlim=(0, cell[0] * columns), ylim=(cell[1] * rows, 0))
    figure.suptitle(f"{order}: #index, confidence, true {ARROW} predicted (orange: wrong)", fontsize=11)
    save_figure(figure, path)


def shorten_name(name: str, most: int = 14) -> str:
    """The name of a class in at most so many characters."""
    return name if len(name) <= most else f"{name[: most - 3]}..."


def on_paper(images: Tensor, reader: str) -> Tensor:
    """Images as a person sees them: inverted if their `reader` is `digit`; what `photo` reads, grey or not, stays."""
    return 255 - images if reader == "digit" else images


def show_image(axes: Axes, image: Tensor, extent: tuple[float, float, float, float] | None = None) -> None:
    """An image (C, H, W), grey or RGB, at left, right, bottom and top of the axes' data; None: its size in pixels."""
    height, width = image.shape[1:]
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=255, extent=extent or (0, width, height, 0))


def save_contact_sheet(rows: list[Tensor], titles: list[str], path: Path) -> None:
    """Rows of equally many images, one title a row."""
    figure = new_figure(0.62 * len(rows[0]) + 1.2, 0.66 * len(rows))
    for panel, row, title in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, titles, strict=True):
        margins = [max(1, row.shape[-1] // 28)] * 4
        show_image(panel, torch.cat(list(F.pad(row, margins, value=255)), dim=2))
        panel.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=SMALL)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    save_figure(figure, path)


def save_reliability(logits: Tensor, labels: Tensor, temperature: float, path: Path) -> None:
    """Accuracy against confidence, before and after division by the temperature, which validation chose."""
    figure = new_figure(9, 4.2)
    titles = ("as trained", f"with temperature {temperature:.2f}")
    for axes, scaled, title in zip(figure.subplots(1, 2), (logits, logits / temperature), titles, strict=True):
        confidence, accuracy, counts = (values.numpy() for values in reliability(scaled, labels))
        edges = np.arange(BINS) / BINS
        filled = counts > 0
        axes.bar(edges[filled], accuracy[filled], 1 / BINS, align="edge", color=FILL, edgecolor="white")
        axes.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1)
        axes.scatter(confidence[filled], accuracy[filled], s=14, color=ACCENT, zorder=3)
        for edge, height, count in zip(edges[filled], accuracy[filled], counts[filled], strict=True):
            inside = height > 0.12
            y, colour, side = (height - 0.01, "white", "top") if inside else (height + 0.01, INK, "bottom")
            text = {"ha": "center", "va": side, "rotation": 90, "fontsize": SMALL, "color": colour}
            axes.text(edge + 0.5 / BINS, y, f"{count:,}", **text)
        error = calibration_error(scaled, labels)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", title=f"{title}: ECE {error:.2%}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(xmax=1.0))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy (bars: number of images)")
    save_figure(figure, path)


def save_attention(images: Tensor, shares: Tensor, titles: list[str], path: Path) -> None:
    """Titled images, and below each the share (N, h, w) of its patches in what the head sees, as a map over it."""
    figure = new_figure(1.15 * len(images), 2.75)
    panels = figure.subplots(2, len(images), squeeze=False).T
    for (above, below), image, share, title in zip(panels, images, shares, titles, strict=True):
        show_image(above, image)
        above.set_title(shorten_name(title), fontsize=SMALL)
        show_image(below, image)
        over = {"extent": above.images[0].get_extent(), "interpolation": "bicubic"}
        below.imshow(share.numpy(), cmap="inferno", alpha=0.65, **over)
        above.axis("off")
        below.axis("off")
    save_figure(figure, path)


def save_robustness(models: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Mean accuracy under each corruption, a dot for each model on a line from its best to its worst severity, and
    beside it the mean over corruptions against severity.

    `models` has what `robustness_facts` returns for each.
    """
    names = list(dict.fromkeys(name for facts in models.values() for name in facts["means"]))
    figure = new_figure(8.8, 1.6 + (0.24 + 0.03 * len(models)) * max(6, len(names)))
    rows, severities = figure.subplots(1, 2, width_ratios=[3, 2])
    for place, (label, facts) in enumerate(models.items()):
        color = COLORS[place % len(COLORS)]
        curves = {name: dict(curve) for name, curve in facts["curves"].items()}
        for name, mean in facts["means"].items():
            y = names.index(name) + (place - (len(models) - 1) / 2) * 0.7 / len(models)
            worse = [acc for severity, acc in curves[name].items() if severity]
            rows.plot([min(worse), max(worse)], [y, y], color=color, alpha=0.35, linewidth=3, solid_capstyle="round")
            rows.plot(mean, y, "o", color=color, markersize=5)
        graded = [curve for curve in curves.values() if len(curve) > 2]
        steps = sorted(set.intersection(*map(set, graded))) if graded else []
        heights = [sum(curve[step] for curve in graded) / len(graded) for step in steps]
        severities.plot(steps, heights, marker="o", markersize=4, color=color, label=label)
    rows.set(
        yticks=range(len(names)),
        yticklabels=names,
        ylim=(len(names) - 0.4, -0.6),
        xlim=(0, 1.02),
        xlabel="mean, and the line from the best to the worst severity",
    )
    rows.set_title("accuracy under each corruption", fontsize=10, loc="left")
    severities.set(xlabel="severity, 0: as they are", xlim=(-0.2, 5.2), ylim=(0, 1.02), xticks=range(6))
    severities.set_title("mean over those with several severities", fontsize=10, loc="left")
    for axes, axis in ((rows, rows.xaxis), (severities, severities.yaxis)):
        axis.set_major_formatter(PercentFormatter(xmax=1.0))
        plain_axes(axes)
    if len(models) > 1:
        labels = severities.get_legend_handles_labels()
        figure.legend(*labels, loc="outside upper center", ncols=4, frameon=False)
    save_figure(figure, path)


def save_corruptions(images: Mapping[str, Tensor], path: Path) -> None:
    """An image (C, H, W) under each corruption, by name."""
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(1.25 * columns, 1.5 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.axis("off")
    for panel, (name, each) in zip(panels, images.items(), strict=False):
        show_image(panel, each)
        panel.set_title(name, fontsize=SMALL)
    save_figure(figure, path)


def save_between(combined: Mapping[str, Any], number: int, path: Path) -> None:
    """Accuracy of the models between two against alpha, beside it that on corrupted images, where it was measured.

    `combined` are facts of `thaw.evaluation.mixture.Mixture.choose_alpha`; `number` counts the validation images, and
    the band is their 95 % interval.
    """
    rows = combined["between"]
    titles = {"val/acc": "validation images", "corrupted": "corrupted validation images"}
    keys = [key for key in titles if key in rows[0]]
    figure = new_figure(4.8 * len(keys), 3.8)
    first, second = (shorten_name(name, 40) for name in combined["members"])
    figure.supxlabel(f"alpha: 0 is {first}, 1 is {second}; dotted: chosen, {combined['alpha']:g}", fontsize=10)
    figure.supylabel("accuracy", fontsize=10)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        alphas, accuracies = ([row[name] for row in rows] for name in ("alpha", key))
        axes.plot(alphas, accuracies, marker="o", markersize=3.5, color=COLORS[0])
        if key == "val/acc":
            low, high = zip(*(accuracy_interval(round(each * number), number) for each in accuracies), strict=True)
            axes.fill_between(alphas, low, high, color=COLORS[0], alpha=0.15, linewidth=0)
        axes.axvline(combined["alpha"], color=INK, linewidth=0.8, linestyle=":")
        axes.set_title(titles[key], fontsize=11)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=1))
        plain_axes(axes)
    save_figure(figure, path)


def save_feature_map(points: Tensor, labels: Tensor, classes: Sequence[str], path: Path) -> None:
    """Features in two dimensions (N, 2), coloured by class; a class's name stands at its median, if they are few."""
    figure = new_figure(7, 6)
    axes = figure.add_subplot()
    x, y = points.T.numpy()
    few = len(classes) <= 10
    many = colormaps["gist_rainbow"](np.linspace(0, 1, len(classes)))
    colours = np.array([to_rgba(color) for color in COLORS]) if few else many
    axes.scatter(x, y, c=colours[labels.numpy()], s=7, alpha=0.7, linewidths=0)
    for number, name in enumerate(classes if len(classes) <= MOST_NAMED else ()):
        if (chosen := labels == number).any():
            x, y = points[chosen].median(dim=0).values.tolist()
            box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "#888888", "alpha": 0.85}
            size = 10 if few else SMALL
            axes.text(x, y, shorten_name(name), ha="center", va="center", weight="bold", fontsize=size, bbox=box)
    axes.axis("off")
    save_figure(figure, path)
