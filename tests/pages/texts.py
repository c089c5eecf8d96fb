"""Texts of a figure that cannot be read."""

from itertools import combinations

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that touch in a figure as it is saved."""
    figure.draw_without_rendering()
    drawn = {label for axis in figure.findobj(Axis) for label in axis.get_ticklabels(which="both")}  # type: ignore[attr-defined]
    ticks = {label for axis in figure.findobj(Axis) for tick in all_ticks(axis) for label in (tick.label1, tick.label2)}
    texts = [text for text in figure.findobj(Text) if text not in ticks - drawn]
    shown = [text for text in texts if isinstance(text, Text) and text.get_visible() and text.get_text().strip()]
    shown = [text for text in shown if text.axes is None or text.axes.axison]
    boxes = {text: Text.get_window_extent(text) for text in shown}  # of an annotation without its arrow
    return [(a.get_text(), b.get_text()) for a, b in combinations(shown, 2) if boxes[a].overlaps(boxes[b])]


def all_ticks(axis: Axis) -> list:
    return [*axis.get_major_ticks(), *axis.get_minor_ticks()]
