"""Pictures of a sweep, as PNG files: accuracy against each number that was swept, and over the epochs."""

import csv
import json
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from thaw.pages.figures import (
    ACCENT,
    COLORS,
    FILL,
    GREY,
    SMALL,
    accuracy_axis,
    label_ends,
    new_axes,
    number_axis,
    save_figure,
)
from thaw.sweeps.groups import Group, Mark, without_shared
from thaw.sweeps.runs import DONE, Run

LEARNING_RATE = "optim.lr"
MARKERS = "os^Dv<>PXhp*"
MARKS: dict[Mark, str] = {"best": "best", "Pareto": "on the Pareto front"}
EPOCH_LINES = 20
MOST_SETTINGS = 40  # rows of a picture


class Point(NamedTuple):
    """Accuracy over the seeds of one setting, at `x`."""

    x: float
    mean: float
    low: float
    high: float
    seeds: int
    mark: Mark


@dataclass(frozen=True)
class SweptCurve:
    """Settings along one swept number. If they differ in nothing else, a line joins them."""

    tokens: list[str]
    points: list[Point]
    joined: bool
    lost: list[float]  # x of the settings of which no run finished

    @property
    def label(self) -> str:
        return " ".join(self.tokens)


def swept_keys(groups: Sequence[Group]) -> list[str]:
    """Numeric keys that vary among settings in which all other values are equal: the learning rate first."""
    numbers = numeric_keys(groups)
    varied = {
        key
        for members in grouped_by(groups, lambda group: without(group, numbers))
        for key in numbers
        if len({value(group, key) for group in members} - {None}) > 1
    }
    return sorted(varied, key=lambda key: (key != LEARNING_RATE, key))


def swept_curves(groups: Sequence[Group], key: str) -> list[SweptCurve]:
    """Validation accuracy against `key`: a curve for each combination of the other settings, the highest first."""
    numbers, swept = numeric_keys(groups), swept_keys(groups)
    curves = []
    having = [group for group in groups if value(group, key) is not None]
    for members in grouped_by(having, lambda group: without(group, numbers)):
        lines = grouped_by(members, lambda group: without(group, {key}))
        if len(members) >= 2 * len(lines):
            curves += [curve(line, key, True, [key]) for line in lines]
        else:  # a random search: hardly any two settings share all other numbers
            curves.append(curve(members, key, False, swept))
    curves = [one for one in curves if one.points]
    curves.sort(key=lambda one: -max(point.mean for point in one.points))
    tokens = without_shared([one.tokens for one in curves])
    return [replace(one, tokens=own or one.tokens) for one, own in zip(curves, tokens, strict=True)]


def curve(groups: Sequence[Group], key: str, joined: bool, swept: list[str]) -> SweptCurve:
    points, lost = [], []
    for group in sorted(groups, key=lambda group: value(group, key) or 0.0):
        x, accuracies = value(group, key), [run.val_acc for run in group.done if run.val_acc is not None]
        assert x is not None
        if group.val is None:
            lost.append(x)
        else:
            points.append(Point(x, group.val[0], min(accuracies), max(accuracies), group.val[2], group.mark))
    tokens = [token for token, (key, _) in zip(groups[0].tokens, groups[0].parts, strict=True) if key not in swept]
    return SweptCurve(tokens or [groups[0].runs[0].name], points, joined, lost)


def numeric_keys(groups: Sequence[Group]) -> set[str]:
    keys = {key for group in groups for key in group.runs[0].settings}
    return {key for key in keys if len({value(group, key) for group in groups} - {None}) > 1}


def value(group: Group, key: str) -> float | None:
    found = group.runs[0].settings.get(key)
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None


def without(group: Group, keys: set[str]) -> str:
    settings = group.runs[0].settings
    return json.dumps({key: settings[key] for key in sorted(settings) if key not in keys}, default=str)


def grouped_by(groups: Sequence[Group], identity: Callable[[Group], str]) -> list[list[Group]]:
    """Lists of groups of the same identity, in the order of the first of each; groups without settings are left out."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group.runs[0].settings:
            found.setdefault(identity(group), []).append(group)
    return list(found.values())


def save_picture(axes: Axes, path: Path, legend_columns: int) -> None:
    figure = axes.figure
    assert isinstance(figure, Figure)
    if legend_columns:
        figure.legend(loc="outside lower left", ncols=legend_columns, frameon=False, fontsize=SMALL)
    save_figure(figure, path)


def save_swept(curves: Sequence[SweptCurve], key: str, path: Path) -> None:
    """Draw `swept_curves`: the first twelve in colors, the rest in grey. Rings mark the best settings."""
    columns = 1 if max(len(one.label) for one in curves[: len(COLORS)]) > 40 else 2
    rows = -(-min(len(curves), len(COLORS) + 1) // columns)  # of the legend
    points = [point for one in curves for point in one.points]
    axes = new_axes(height=4.3 + 0.2 * rows)
    accuracies = [accuracy for point in points for accuracy in (point.low, point.high)]
    accuracy_axis(axes.yaxis, min(accuracies), max(accuracies), "best validation accuracy")
    for place, one in enumerate(curves):
        named = place < len(COLORS)
        color, marker = (COLORS[place], MARKERS[place]) if named else (GREY, ".")
        style: dict[str, Any] = {"color": color, "zorder": 3 - place / len(curves)}  # the highest on top
        x, y = [point.x for point in one.points], [point.mean for point in one.points]
        low, high = [point.low for point in one.points], [point.high for point in one.points]
        label = textwrap.shorten(one.label, 100, placeholder=" ...") if named else None
        line = "-" if one.joined else "none"
        axes.plot(x, y, linestyle=line, marker=marker, markersize=5, linewidth=1.6, label=label, **style)
        if one.joined and len(x) > 1:
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        else:
            axes.vlines(x, low, high, color=color, alpha=0.4)
        along = axes.get_xaxis_transform()  # x in data units, y as a share of the height
        axes.plot(one.lost, [0.03] * len(one.lost), "x", transform=along, **style)
    if len(curves) > len(COLORS):
        axes.plot([], [], ".-", color=GREY, label=f"{len(curves) - len(COLORS)} others")
    marked = [point for point in points if point.mark]
    ring: dict[str, Any] = {"markersize": 13, "markerfacecolor": "none", "color": ACCENT, "zorder": 5}
    axes.plot([point.x for point in marked], [point.mean for point in marked], "o", **ring)
    axes.set_xlabel("peak learning rate (optim.lr)" if key == LEARNING_RATE else key)
    band = "mean; band: lowest to highest run" if max(point.seeds for point in points) > 1 else "one run"
    lost = "; x: no run finished" if any(one.lost for one in curves) else ""
    rings = f"; ring: {MARKS[marked[0].mark]}" if marked else ""
    axes.set_title(f"{band}{lost}{rings}", fontsize=10, loc="left", color="#555555")
    values = sorted({point.x for point in points} | {x for one in curves for x in one.lost})
    log = values[0] > 0 and (key == LEARNING_RATE or values[-1] >= 20 * values[0])
    typed = all(x == float(f"{x:.3g}") or x == round(x) for x in values)  # and not drawn at random
    number_axis(axes.xaxis, log, values if typed else ())
    save_picture(axes, path, columns)


def save_settings(groups: Sequence[Group], path: Path) -> bool:
    """Draw validation accuracy of each run (dot) and their mean (bar), a row for each setting, the best above.

    Returns:
        False, and draws nothing, if the settings differ in numbers only, or fewer than two have finished.
    """
    rows = [group for group in groups if group.val][:MOST_SETTINGS]
    if len(rows) < 2 or not {key for group in rows for key, _ in group.parts} - numeric_keys(rows):
        return False
    axes = new_axes(height=1.1 + 0.24 * len(rows))
    axes.invert_yaxis()
    accuracies = [[run.val_acc for run in group.done if run.val_acc is not None] for group in rows]
    for place, (group, seeds) in enumerate(zip(rows, accuracies, strict=True)):
        color = ACCENT if group.mark else FILL
        axes.plot(seeds, [place] * len(seeds), "o", color=color, alpha=0.55, markersize=5, markeredgewidth=0)
        axes.plot(statistics.mean(seeds), place, "|", color=color, markersize=11, markeredgewidth=2)
    axes.set_yticks(range(len(rows)), [textwrap.shorten(group.label, 60, placeholder=" ...") for group in rows])
    axes.tick_params(axis="y", length=0, labelsize=SMALL)
    accuracy_axis(axes.xaxis, min(map(min, accuracies)), max(map(max, accuracies)), "best validation accuracy")
    axes.set_title("dot: a run; bar: mean", fontsize=10, loc="left", color="#555555")
    save_picture(axes, path, 0)
    return True


def epoch_curve(run: Run) -> list[tuple[float, float]]:
    """Validation accuracy over the epochs, from the run's `csv/metrics.csv`; several in an epoch are spread over it."""
    path = run.folder / "csv" / "metrics.csv"
    by_epoch: dict[int, list[float]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row.get("val/acc") and row.get("epoch"):
                    by_epoch.setdefault(int(row["epoch"]), []).append(float(row["val/acc"]))
    except (OSError, ValueError, csv.Error):
        return []
    # A finished run validates its best checkpoint once more, which is logged in the epoch after the last.
    epochs = {epoch: found for epoch, found in by_epoch.items() if run.epochs is None or epoch < run.epochs}
    return [
        (epoch + (part + 1) / len(found), accuracy)
        for epoch, found in sorted(epochs.items())
        for part, accuracy in enumerate(found)
    ]


class EpochLine(NamedTuple):
    """Validation accuracy over the epochs, of the seeds of a setting or of a single run."""

    label: str
    mark: Mark
    finished: bool
    points: list[tuple[float, list[float]]]  # epoch, accuracy of each seed


def epoch_lines(groups: Sequence[Group]) -> list[EpochLine]:
    """A line for each of the first settings of which runs have logged accuracies, or for each seed of the only one."""
    members = [(group.label, group.mark, group.done or group.runs) for group in groups]
    if len(groups) == 1:
        members = [(run.repeat_name, "", [run]) for run in groups[0].runs]
    lines = []
    for label, mark, runs in members[: 10 * EPOCH_LINES]:
        curves = [dict(logged) for run in runs if (logged := epoch_curve(run))]
        epochs = sorted(set.intersection(*map(set, curves))) if curves else []
        points = [(epoch, [accuracies[epoch] for accuracies in curves]) for epoch in epochs]
        if points:
            lines.append(EpochLine(label, mark, runs[0].state == DONE, points))
    return lines[:EPOCH_LINES]


def save_epochs(groups: Sequence[Group], path: Path) -> bool:
    """Draw `epoch_lines`: up to twelve in colors, with their names; of more, the best in color and the others in grey.

    Returns:
        False, and draws nothing, if no line has two points, as after a single epoch.
    """
    lines = epoch_lines(groups)
    if not any(len(line.points) > 1 for line in lines):
        return False
    few = len(lines) <= len(COLORS)
    named = [line for line in lines if few or line.mark]
    names = [textwrap.shorten(line.label, 60, placeholder=" ...") for line in named]
    axes = new_axes(7 + 0.08 * max(map(len, names), default=0))
    accuracies = [accuracy for line in lines for _, seeds in line.points for accuracy in seeds]
    accuracy_axis(axes.yaxis, min(accuracies), max(accuracies), "validation accuracy")
    ends = []
    for place, line in enumerate(lines):
        color = COLORS[place] if few else ACCENT if line.mark else GREY
        width, dashes = (2.6 if line.mark else 1.4), ("-o" if line.finished else "--o")
        epochs, seeds = zip(*line.points, strict=True)
        style: dict[str, Any] = {"color": color, "linewidth": width, "markersize": 1.5 * width}
        means = [*map(statistics.mean, seeds)]
        axes.plot(epochs, means, dashes, zorder=3 - place / 100, **style)
        if few:
            axes.fill_between(epochs, [*map(min, seeds)], [*map(max, seeds)], color=color, alpha=0.12, linewidth=0)
        ends.append((epochs[-1], means[-1], color))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epochs")
    several = max(len(seeds) for line in lines for _, seeds in line.points) > 1
    notes = ["mean over runs" + "; band: lowest to highest" * few] * several
    notes += [f"thick: {MARKS[line.mark]}" for line in lines if line.mark][:1]
    notes += ["dashed: not finished"] * any(not line.finished for line in lines)
    notes += ["grey: other settings"] * (not few)
    axes.set_title("; ".join(notes), fontsize=10, loc="left", color="#555555")
    label_ends(axes, [(*ends[lines.index(line)], name) for line, name in zip(named, names, strict=True)])
    save_picture(axes, path, 0)
    return True
