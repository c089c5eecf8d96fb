"""Pictures of a search: its history, the importance of its keys, and the Pareto front of two objectives."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import optuna
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter
from optuna.trial import FrozenTrial, TrialState

from thaw.pages.figures import ACCENT, FILL, GREY, accuracy_axis, label_ends, new_axes, number_axis
from thaw.run.console import say
from thaw.sweeps.curves import save_picture
from thaw.sweeps.study import counted


def draw_study(study: optuna.Study, objectives: Mapping[str, str], out: Path) -> list[tuple[str, Path]]:
    """Draw what the trials allow: history, importance, and the Pareto front; returns title and file of each picture."""
    trials = [trial for trial in counted(study) if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in counted(study) if trial.state == TrialState.PRUNED and trial.values]
    varied = {key for trial in trials for key in trial.params if trial.params[key] != trials[0].params[key]}
    pictures = []

    def add(title: str, file: str) -> Path:
        pictures.append((title, out / file))
        return out / file

    for place, (metric, direction) in enumerate(objectives.items() if trials else ()):
        name = f"{metric.replace('/', '_')}.png"
        path = add(f"Optimisation history of {metric}", f"history_{name}")
        save_history(trials, pruned, place, metric, direction, path)
        if len(varied) > 1 and len({trial.values[place] for trial in trials}) > 1:
            save_importance(study, place, direction, add(f"Importance for {metric}", f"importance_{name}"))
        if place > 0:
            path = add(f"{next(iter(objectives))} against {metric}", f"front_{name}")
            save_front(trials, study.best_trials, place, list(objectives), path)
    if trials and len(varied) < 2:
        say(f"No importance is drawn: it takes two keys that vary, not {', '.join(varied) or 'none'}.")
    return pictures


def value_axis(axes: Axes, metric: str, values: Sequence[float]) -> None:
    """The y axis of an objective; the figure must have all else."""
    if metric == "val/acc":
        accuracy_axis(axes.yaxis, min(values), max(values), "validation accuracy (val/acc)")
    else:
        axes.set_ylabel(metric)
        number_axis(axes.yaxis, spans_decades(values))


def spans_decades(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) >= 20 * min(values)


def save_history(
    trials: Sequence[FrozenTrial], pruned: Sequence[FrozenTrial], place: int, metric: str, direction: str, path: Path
) -> None:
    """The value of each trial in the order of their numbers, and the best so far; of pruned trials the last value.

    Optuna's plot_optimization_history leaves out pruned trials, often most of them, and cannot stretch accuracies.
    """
    values, ends = [trial.values[place] for trial in trials], [trial.values[place] for trial in pruned]
    axes = new_axes()
    numbers, best = [trial.number for trial in trials], accumulate(values, max if direction == "maximize" else min)
    axes.plot(numbers, [*best], drawstyle="steps-post", color=ACCENT, linewidth=1.6, label="best so far")
    axes.plot(numbers, values, "o", color=FILL, markersize=5, label="trial")
    if pruned:
        axes.plot([trial.number for trial in pruned], ends, "x", color=GREY, label="pruned, at its last epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial")
    value_axis(axes, metric, values + ends)
    save_picture(axes, path, 3)


def save_importance(study: optuna.Study, place: int, direction: str, path: Path) -> None:
    """The share of each key in what separates good trials from the rest: PED-ANOVA (Watanabe et al. 2023).

    Optuna's plot_param_importances changes pyplot's style for the whole process, and its labels run into the bars.
    """
    sign = -1 if direction == "maximize" else 1  # with a target of its own, PED-ANOVA takes the lowest for the best
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*low `target` values")
        shares = optuna.importance.get_param_importances(study, target=lambda trial: sign * trial.values[place])
    axes = new_axes(height=1.2 + 0.4 * len(shares))
    axes.grid(visible=False)
    bars = axes.barh([*shares][::-1], [*shares.values()][::-1], color=FILL, height=0.6)
    axes.bar_label(bars, fmt="{:.0%}", padding=4)
    axes.set_xlim(0, 1.08 * max(shares.values()))
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    axes.set_xlabel("importance (PED-ANOVA)")
    save_picture(axes, path, 0)


def save_front(
    trials: Sequence[FrozenTrial], best: Sequence[FrozenTrial], place: int, metrics: Sequence[str], path: Path
) -> None:
    """The first objective against another, with the Pareto front of all in colour.

    Optuna's plot_pareto_front cannot name the points of the front by their settings, such as the policy.
    """
    across, heights = ([trial.values[index] for trial in trials] for index in (place, 0))
    axes = new_axes()
    axes.plot(across, heights, "o", color=GREY, markersize=5, label="trial")
    front = {(trial.values[place], trial.values[0]): trial for trial in best}
    axes.plot(*zip(*sorted(front), strict=True), "o-", color=ACCENT, markersize=7, linewidth=1, label="Pareto front")
    axes.set_xlabel(metrics[place])
    value_axis(axes, metrics[0], heights)
    number_axis(axes.xaxis, spans_decades(across))
    chosen = {
        point: [value for value in trial.params.values() if isinstance(value, str)] for point, trial in front.items()
    }
    label_ends(axes, [(*point, ACCENT, " ".join(names)) for point, names in chosen.items() if names])
    save_picture(axes, path, 2)
