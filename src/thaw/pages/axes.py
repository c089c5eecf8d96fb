"""An axis for accuracies on which those near 100 % can be told apart,."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from thaw.run.files import atomic

NEARLY = 1.001  # keeps 100 % at a finite height
TICKS = (0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 1.0)


def stretch(accuracy: Any) -> Any:
    """Height of an accuracy: the logarithm of the errors, by which accuracies near the best can be told apart."""
    return -np.log(np.maximum(NEARLY - accuracy, 1e-9))


def squeeze(height: Any) -> Any:
    """The inverse of `stretch`."""
    return NEARLY - np.exp(-height)


def accuracy_axis(axes: Axes, lowest: float, highest: float) -> None:
    """Stretch the y axis, for accuracies from `lowest` to `highest`, from 0 to 1."""
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
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    with atomic(path) as part:
        figure.savefig(part, format="png")
