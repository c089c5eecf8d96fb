"""The common style of all figures: axes of accuracies, ticks that do not overlap, names at the ends of lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from thaw.run.files import atomic

NEARLY_1 = 1.001  # keeps 100 % at a finite height
TICKS = (0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 1.0)
SMALL = 9  # points, the smallest text in a figure
# Told apart with any colour vision; the first seven are those of Okabe & Ito 2008, without their yellow.
COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"),
    *("#882255", "#999933", "#332288", "#8c510a", "#88ccee"),
)
FILL, ACCENT = COLORS[:2]
INK, GREY = "#333333", "#9aa5b1"
FEW = 8  # values on an axis that have a tick each
LINE_HEIGHT = 12.0  # of a name at the end of a line, in points


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def new_axes(width: float = 8.0, height: float = 4.4) -> Axes:
    """Plain axes of a new figure; sizes in inches."""
    axes = new_figure(width, height).add_subplot()
    plain_axes(axes)
    return axes


def plain_axes(axes: Axes) -> None:
    """A light grid, and no frame above and to the right."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def stretch(accuracy: Any) -> Any:
    """Height of an accuracy: the logarithm of its error."""
    return -np.log(np.maximum(NEARLY_1 - accuracy, 1e-9))


def squeeze(height: Any) -> Any:
    """The inverse of `stretch`."""
    return NEARLY_1 - np.exp(-height)


def accuracy_axis(axis: Axis, lowest: float, highest: float, label: str) -> None:
    """Stretch an axis, for accuracies from `lowest` to `highest`, both from 0 to 1; its label says so."""
    axes = axis.axes
    assert isinstance(axes, Axes)
    across = axis is axes.xaxis
    (axes.set_xscale if across else axes.set_yscale)("function", functions=(stretch, squeeze))
    margin = 0.05 * (stretch(highest) - stretch(lowest)) + 0.02
    low, high = squeeze(stretch(lowest) - margin), squeeze(stretch(highest) + margin)
    (axes.set_xlim if across else axes.set_ylim)(low, high)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    if len(ticks) < 3:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= min(high, 1.0)]
    axis.set_ticks(ticks)
    decimals = max(len(f"{100 * tick:.2f}".rstrip("0").partition(".")[2]) for tick in ticks)
    axis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=decimals))
    axis.set_label_text(f"{label}{' ' if across else chr(10)}(log scale of the error)")
    if across:
        thin_labels(axis)


def number_axis(axis: Axis, log: bool, ticks: Sequence[float] = ()) -> None:
    """Scale an axis, with a tick at each of `ticks`, or if there are none or many, at round numbers.

    Labels are left out where they would overlap, so the figure must have its size, its data and its other texts.
    """
    axes = axis.axes
    assert isinstance(axes, Axes)
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log" if log else "linear")
    low, high = sorted(axis.get_view_interval())
    if not 0 < len(ticks) <= FEW:
        wide = np.log10(high / low) if log else 0.0  # in decades
        steps = (1, 2, 5) if wide < 2.5 else (1, 3) if wide < 5 else (1,)
        locator = LogLocator(subs=steps, numticks=50) if wide > 1 else MaxNLocator(FEW, steps=[1, 2, 5, 10])
        ticks = [tick for tick in map(float, locator.tick_values(low, high)) if low <= tick <= high]
    axis.set_ticks(ticks, [f"{tick:,.0f}" if tick == round(tick) else f"{tick:g}" for tick in ticks])
    axis.set_minor_locator(NullLocator())
    thin_labels(axis)


def thin_labels(axis: Axis) -> None:
    """Hide each label of a tick that would touch the one before; the tick stays."""
    figure = axis.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    end, texts = -np.inf, []
    for label in axis.get_ticklabels():
        box = label.get_window_extent().padded(3)
        start, stop = (box.x0, box.x1) if axis is axis.axes.xaxis else (box.y0, box.y1)
        fits = start > end
        texts.append(label.get_text() if fits else "")
        end = stop if fits else end
    axis.set_ticks(axis.get_majorticklocs(), texts)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names to the right of the axes, apart from each other, and join each to the end of its line.

    Args:
        axes: with their size, labels and data.
        ends: x, y, color and name of each line's end.
    """
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    box = axes.get_window_extent()
    gap = LINE_HEIGHT / 72 * figure.dpi / box.height  # as a share of the axes' height
    ordered = sorted(ends, key=lambda end: end[1])
    wished = [(axes.transData.transform((x, y))[1] - box.y0) / box.height for x, y, *_ in ordered]
    from scipy.optimize import isotonic_regression  # takes 0.1 s

    apart = isotonic_regression(np.subtract(wished, gap * np.arange(len(ends)))).x  # the nearest that never fall
    heights = np.clip(apart, 0, max(0.0, 1 - gap * (len(ends) - 1)))
    for place, ((x, y, color, name), height) in enumerate(zip(ordered, heights, strict=True)):
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "alpha": 0.5, "relpos": (0, 0.5), "shrinkB": 0}
        style: Any = {"fontsize": SMALL, "color": color, "va": "center", "arrowprops": line, "annotation_clip": False}
        axes.annotate(name, (x, y), (1.03, height + place * gap), textcoords="axes fraction", **style)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG; nobody sees half a file."""
    with atomic(path) as part:
        figure.savefig(part, format="png")
