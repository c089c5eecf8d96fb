"""Axes of accuracies and of numbers, names at the ends of lines, and figures that are written whole."""

from itertools import combinations
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from pages.texts import unreadable
from skimage.color import rgb2lab

from thaw.pages.figures import COLORS, accuracy_axis, label_ends, new_figure, number_axis, save_figure, squeeze, stretch
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
    accuracy_axis(axes.yaxis, lowest, highest, "validation accuracy")
    assert axes.get_ylabel() == "validation accuracy\n(log scale of the error)"
    low, high = axes.get_ylim()
    ticks = axes.get_yticks()
    assert low < lowest <= highest < high and len(ticks) >= 2
    assert all(low <= tick <= min(high, 1) for tick in ticks)
    labels = [axes.yaxis.get_major_formatter()(tick) for tick in ticks]
    assert len(set(labels)) == len(labels) and all(label.endswith("%") for label in labels)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 9, 50])
@pytest.mark.parametrize("log", [True, False])
def test_labels_of_ticks_never_overlap(count: int, log: bool) -> None:
    random = np.random.default_rng(count)
    spreads = [10 ** random.uniform(-4, 0, count), 0.05 + 1e-4 * np.arange(count), 1e5 + np.arange(count)]
    for values in spreads:
        for ticks in (sorted(values.tolist()), []):
            axes = new_figure(8, 4).add_subplot()
            axes.plot(values, values, "o")
            axes.set_yticks([])
            number_axis(axes.xaxis, log, ticks)
            assert not unreadable(axes.figure)  # type: ignore[arg-type]
            if ticks and count <= 8:
                assert axes.get_xticks() == pytest.approx(ticks), "a label may be missing, but no tick"


def test_names_at_the_ends_of_lines_lie_apart_and_in_their_order() -> None:
    axes = new_figure(8, 3).add_subplot()
    heights = [0.5, 0.501, 0.502, 0.503, 0.9, 0.1, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    axes.plot([0] * 12, heights, "o")
    label_ends(axes, [(0, height, "black", f"line {place}") for place, height in enumerate(heights)])
    assert not unreadable(axes.figure)  # type: ignore[arg-type]
    texts = sorted(axes.texts, key=lambda text: text.get_position()[1])
    ordered = [heights[int(text.get_text().split()[1])] for text in texts]
    assert ordered == sorted(heights)


def test_figures_are_drawn(tmp_path: Path) -> None:
    settings = [(lr, decay) for lr in (1e-3, 1e-2) for decay in (0.0, 0.1)]
    save_lr_curve(settings, [0.9, 0.95, 0.97, 0.99], 3, tmp_path / "new" / "lr_bank.png")
    figure = new_figure(4, 3)
    figure.add_subplot().plot([0, 1])
    save_figure(figure, tmp_path / "new" / "other.png")
    for path in (tmp_path / "new").iterdir():
        assert matplotlib.image.imread(path).std() > 0.03
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"lr_bank.png", "other.png"}


# Machado, Oliveira & Fernandes 2009, severity 1: what red-blind and green-blind eyes see of linear RGB.
COLOR_BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("kind", [None, *COLOR_BLIND])
def test_the_colors_are_told_apart_by_all_eyes(kind: str | None) -> None:
    """CIELAB distances; 2.3 is just noticeable, and matplotlib's own first seven come to 4 for red-blind eyes."""
    linear = np.array([to_rgb(color) for color in COLORS]) ** 2.2
    seen = (linear @ np.transpose(COLOR_BLIND[kind])).clip(0, 1) if kind else linear
    lab = rgb2lab((seen ** (1 / 2.2))[None])[0]
    assert min(np.linalg.norm(a - b) for a, b in combinations(lab, 2)) > 12
