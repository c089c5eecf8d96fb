"""The loss while the learning rate rises, as lr_find=true measures it."""

from collections.abc import Sequence
from pathlib import Path

from thaw.pages.figures import ACCENT, FILL, GREY, new_axes, number_axis, save_figure


def save_lr_range(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], suggested: float | None, path: Path
) -> None:
    """Training loss of each step against its learning rate, the smoothed loss, and a line at the suggested rate."""
    axes = new_axes(7, 4.5)
    axes.plot(rates, losses, ".", markersize=3, color=GREY, label="loss of a step")
    axes.plot(rates, smoothed, color=FILL, label="smoothed")
    if suggested is not None:
        axes.axvline(suggested, color=ACCENT, label=f"suggested: {suggested:g}")
    low, first = min(smoothed), smoothed[0]
    axes.set_ylim(max(0.0, low - 0.1 * first), 1.5 * first)
    axes.set_title("Learning-rate range test", fontsize=12)
    axes.set_xlabel("learning rate at the head")
    axes.set_ylabel("training loss")
    axes.legend(frameon=False)
    number_axis(axes.xaxis, log=True)
    figure = axes.get_figure(root=True)
    assert figure is not None
    save_figure(figure, path)
