"""The stretched axis of accuracies, and figures that are written whole."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from thaw.pages.figures import accuracy_axis, new_figure, save_figure, squeeze, stretch
from thaw.pages.lr_curve import save_lr_curve


def test_stretching_can_be_undone_and_keeps_the_order() -> None:
    accuracies = np.array([0.0, 0.1, 0.9, 0.99, 0.999, 1.0])
    assert squeeze(stretch(accuracies)) == pytest.approx(accuracies)
    assert (np.diff(stretch(accuracies)) > 0).all()
    assert stretch(0.99) - stretch(0.98) > 10 * (stretch(0.2) - stretch(0.1)) / 2


@pytest.mark.parametrize(("lowest", "highest"), [(0.1, 1.0), (0.97, 0.993), (0.9911, 0.9913), (0.5, 0.5)])
def test_ticks_lie_within_the_axis(lowest: float, highest: float) -> None:
    axes = new_figure(4, 3).add_subplot()
    axes.plot([0, 1], [lowest, highest])
    accuracy_axis(axes, lowest, highest)
    low, high = axes.get_ylim()
    ticks = axes.get_yticks()
    assert low < lowest <= highest < high and len(ticks) >= 2
    assert all(low <= tick <= min(high, 1) for tick in ticks)
    labels = [axes.yaxis.get_major_formatter()(tick) for tick in ticks]
    assert len(set(labels)) == len(labels)


def test_figures_are_drawn(tmp_path: Path) -> None:
    settings = [(lr, decay) for lr in (1e-3, 1e-2) for decay in (0.0, 0.1)]
    save_lr_curve(settings, [0.9, 0.95, 0.97, 0.99], 3, tmp_path / "new" / "lr_bank.png")
    figure = new_figure(4, 3)
    figure.add_subplot().plot([0, 1])
    save_figure(figure, tmp_path / "new" / "other.png")
    for path in (tmp_path / "new").iterdir():
        assert matplotlib.image.imread(path).std() > 0.03
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"lr_bank.png", "other.png"}
