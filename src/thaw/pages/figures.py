"""The common style of all figures, and an axis on which accuracies near 100 % can be told apart."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from thaw.run.files import atomic

NEARLY_1 = 1.001  # keeps 100 % at a finite height
TICKS = (0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 1.0)
INK, ACCENT, FILL = "#333333", "#b2182b", "#4878a8"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


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


def accuracy_axis(axes: Axes, lowest: float, highest: float) -> None:
    """Stretch the y axis, for accuracies from `lowest` to `highest`, both from 0 to 1."""
    axes.set_yscale("function", functions=(stretch, squeeze))
    margin = 0.05 * (stretch(highest) - stretch(lowest)) + 0.02
    axes.set_ylim(squeeze(stretch(lowest) - margin), squeeze(stretch(highest) + margin))
    low, high = axes.get_ylim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    if len(ticks) < 3:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= min(high, 1.0)]
    axes.set_yticks(ticks)
    fine = any(round(100 * tick, 1) != round(100 * tick, 6) for tick in ticks)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=2 if fine else 1))
    plain_axes(axes)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG; nobody sees half a file."""
    with atomic(path) as part:
        figure.savefig(part, format="png")
