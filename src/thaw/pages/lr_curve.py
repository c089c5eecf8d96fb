"""Accuracy against the learning rate, as head=lr_bank measures it."""

from collections.abc import Sequence
from pathlib import Path

from thaw.pages.figures import ACCENT, COLORS, accuracy_axis, new_figure, number_axis, plain_axes, save_figure


def save_lr_curve(
    settings: Sequence[tuple[float, float]], accuracies: Sequence[float], chosen: int, path: Path
) -> None:
    """Best validation accuracy of each head of a bank against its learning rate, a line for each weight decay.

    Args:
        settings: learning rate and weight decay of each head.
        accuracies: of each head, from 0 to 1.
        chosen: index of the head that gets a ring.
    """
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    plain_axes(axes)
    decays = sorted({weight_decay for _, weight_decay in settings})
    for place, decay in enumerate(decays):
        points = sorted((lr, acc) for (lr, own), acc in zip(settings, accuracies, strict=True) if own == decay)
        color = COLORS[place % len(COLORS)]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=f"{decay:g}")
    accuracy_axis(axes.yaxis, min(accuracies), max(accuracies), "best validation accuracy")
    lr, decay = settings[chosen]
    axes.plot(lr, accuracies[chosen], "o", markersize=12, markerfacecolor="none", color=ACCENT)
    axes.set_title(f"Best of {len(settings)} heads: learning rate {lr:g}, weight decay {decay:g}", fontsize=12)
    axes.set_xlabel("peak learning rate")
    if len(decays) > 1:
        axes.legend(title="weight decay", frameon=False)
    number_axis(axes.xaxis, log=True)
    save_figure(figure, path)
