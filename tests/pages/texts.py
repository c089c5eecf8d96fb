"""Texts of a figure that cannot be read: too small, or over each other."""

from itertools import combinations
from typing import Any

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text

from thaw.pages.figures import SMALL


def unreadable(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that touch in a figure as it is saved, and texts below `SMALL`, each paired with its size."""
    figure.draw_without_rendering()
    axes: list[Any] = figure.findobj(Axis)
    drawn = {label for axis in axes if axis.axes.axison for label in axis.get_ticklabels(which="both")}
    ticks = [tick for axis in axes for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())]
    hidden = {label for tick in ticks for label in (tick.label1, tick.label2)} - drawn
    texts: list[Any] = [text for text in figure.findobj(Text) if text not in hidden and text.get_visible()]
    boxes = {text: Text.get_window_extent(text) for text in texts if text.get_text().strip()}  # without arrows
    small = [(text.get_text(), f"{text.get_fontsize():g} pt") for text in boxes if text.get_fontsize() < SMALL]
    return small + [(a.get_text(), b.get_text()) for a, b in combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
