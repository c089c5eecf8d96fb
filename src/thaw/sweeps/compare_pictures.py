"""Pictures of a comparison of policies: accuracy against its costs, and where the policies differ.

Shapes: N test images, K classes, P policies.
"""

from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from thaw.evaluation.pictures import shorten_name
from thaw.pages.figures import (
    COLORS,
    INK,
    SMALL,
    accuracy_axis,
    new_figure,
    number_axis,
    plain_axes,
    save_figure,
)
from thaw.sweeps.compare_results import Comparison, PolicyResult
from thaw.sweeps.curves import MARKERS, Point, SweptCurve, save_swept

COST_AXES = {"trained parameters": "params", "training time in seconds": "seconds", "peak memory in GB": "memory"}
MOST_ROWS = 30  # classes of a heat map


def save_costs(
    policies: Sequence[PolicyResult],
    marks: Sequence[str],
    accuracies: Sequence[tuple[float, float, float]],
    label: str,
    path: Path,
) -> None:
    """Accuracy of each policy against each of its costs; the panels share the axis of the accuracy.

    Args:
        marks: for each policy what its name is followed by, such as `best`.
        accuracies: accuracy and the ends of its interval.
        label: of the accuracy.
    """
    columns = {title: [getattr(policy, name) for policy in policies] for title, name in COST_AXES.items()}
    columns = {title: values for title, values in columns.items() if any(values)}
    figure = new_figure(10.4, max(4.6, 1.7 + 0.19 * len(policies)))
    panels: list[Axes] = [*figure.subplots(1, max(1, len(columns)), sharey=True, squeeze=False)[0]]
    accuracy_axis(panels[0].yaxis, min(low for _, low, _ in accuracies), max(high for *_, high in accuracies), label)
    for panel, (title, values) in zip(panels, columns.items(), strict=False):
        plain_axes(panel)
        given = [value for value in values if value]
        panel.set_xscale("log" if max(given) > 5 * min(given) else "linear")
        panel.set_xlabel(title)
        for place, (x, (accuracy, low, high)) in enumerate(zip(values, accuracies, strict=True)):
            if x:
                color, marker = style_of(place)
                panel.vlines(x, low, high, color=color, alpha=0.4, linewidth=1.4)
                panel.plot(x, accuracy, marker, color=color, markersize=7, markeredgecolor="white", markeredgewidth=0.6)
    handles = []
    for place in np.argsort([-accuracy for accuracy, *_ in accuracies], kind="stable").tolist():
        color, marker = style_of(place)
        name, mark = policies[place].name, marks[place]
        handles.append(
            Line2D([], [], linestyle="", color=color, marker=marker, label=f"{name} ({mark})" if mark else name)
        )
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=SMALL)
    for panel in panels[: len(columns)]:
        number_axis(panel.xaxis, log=panel.get_xscale() == "log")
    save_figure(figure, path)


def style_of(place: int) -> tuple[str, str]:
    """Color and marker of a policy; no two of 144 have both in common."""
    color, marker = place % len(COLORS), place + place // len(COLORS)
    return COLORS[color], MARKERS[marker % len(MARKERS)]


def save_tries(policies: Sequence[PolicyResult], path: Path) -> bool:
    """Validation accuracy against the learning rates that were tried; False, and no picture, if there is one each."""
    curves = []
    for policy in policies:
        tries = sorted((each["lr"], each.get("val/acc")) for each in policy.tries)
        points = [
            Point(lr, acc, acc, acc, 1, "best" if lr == policy.lr else "") for lr, acc in tries if acc is not None
        ]
        lost = [lr for lr, acc in tries if acc is None]
        if points:
            curves.append(SweptCurve([policy.name], points, True, lost))
    if max((len(curve.points) for curve in curves), default=0) < 2:
        return False
    save_swept(curves, "optim.lr", path)
    return True


def class_accuracies(comparison: Comparison) -> np.ndarray:
    """Accuracy of each tested policy on the test images of each class, (K, P); NaN for a class without images."""
    labels, size = comparison.labels, len(comparison.classes)
    counts = np.bincount(labels, minlength=size)
    with np.errstate(invalid="ignore"):
        columns = [
            np.bincount(labels, weights=policy.right / len(policy.predictions), minlength=size) / counts
            for policy in comparison.tested
        ]
    return np.stack(columns, axis=1)


def save_class_accuracies(comparison: Comparison, path: Path) -> int:
    """A heat map of `class_accuracies`; of many classes those that differ most. Returns how many are shown."""
    table, counts = class_accuracies(comparison), np.bincount(comparison.labels, minlength=len(comparison.classes))
    present = np.flatnonzero(counts)
    apart = table.max(axis=1) - table.min(axis=1)
    if len(present) > MOST_ROWS:
        present = present[np.argsort(-apart[present], kind="stable")][:MOST_ROWS]
    names = [f"{shorten_name(comparison.classes[row], 24)}  ({counts[row]:,})" for row in present]
    save_heat_map(table[present], names, [policy.name for policy in comparison.tested], "{:.0f}", path)
    return len(present)


def agreements(comparison: Comparison) -> np.ndarray:
    """The share of test images with the same answer, (P, P), over all pairs of models.

    On the diagonal are the seeds of a policy among themselves, NaN where it has one.
    """
    answers = [[each.answers for each in policy.predictions] for policy in comparison.tested]
    shares = np.full((len(answers), len(answers)), np.nan)
    for row, column in product(range(len(answers)), repeat=2):
        pairs = [*(combinations(answers[row], 2) if row == column else product(answers[row], answers[column]))]
        if pairs and column <= row:
            shares[row, column] = shares[column, row] = np.mean([(one == other).mean() for one, other in pairs])
    return shares


def save_agreements(comparison: Comparison, path: Path) -> None:
    """A heat map of `agreements`."""
    names = [policy.name for policy in comparison.tested]
    save_heat_map(agreements(comparison), names, names, "{:.1f}", path)


def save_heat_map(shares: np.ndarray, rows: Sequence[str], columns: Sequence[str], spec: str, path: Path) -> None:
    """Shares from 0 to 1 (rows, columns) in percent; NaN is an empty cell."""
    figure = new_figure(0.5 + 0.075 * max(map(len, rows)) + 0.45 * len(columns), 1.6 + 0.27 * len(rows))
    axes = figure.add_subplot()
    low, high = np.nanmin(shares), np.nanmax(shares)
    axes.imshow(shares, cmap="Blues", vmin=low - 0.1 * (high - low), vmax=high + 1e-9, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            color = "white" if share > low + 0.6 * (high - low) else INK
            axes.text(column, row, spec.format(100 * share), ha="center", va="center", fontsize=SMALL, color=color)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=SMALL)
    axes.set_yticks(range(len(rows)), rows, fontsize=SMALL)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save_figure(figure, path)
