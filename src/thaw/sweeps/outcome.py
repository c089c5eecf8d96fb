"""What a search ends with: the winner tested, pictures, the sweep's report, and what to do with it."""

import os
import shlex
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import optuna
from filelock import FileLock
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from optuna.trial import FrozenTrial, TrialState

from thaw.pages.figures import accuracy_axis, save_figure
from thaw.run.files import read_json
from thaw.run.jobs import SUMMARY
from thaw.sweeps.space import as_overrides
from thaw.sweeps.study import OPEN, SAID, counted

BLUE, GREY, RED = "#2166ac", "#9aa5b1", "#b2182b"


def report_study(
    study: optuna.Study,
    folder: Path,
    storage: Path,
    objectives: Mapping[str, str],
    test: bool | str,
    allow: Sequence[str],
) -> int:
    """Test the winner of one objective, or with `test=always` every trial; write and print the report.

    The winner is tested once no worker can overtake it any more.

    Args:
        study: with at least one trial.
        folder: of the study and its trials; the report goes to `report` in it.
        storage: the study's file.
        objectives: as in `thaw.sweeps.study.open_study`.
        test: of the configuration.
        allow: classes that checkpoints of the trials may name, as for `thaw.run.checkpoint.read_checkpoint`.

    Returns:
        how many trials have failed.
    """
    from thaw.evaluation.evaluate import test_run
    from thaw.sweeps.report import write_report

    trials = counted(study)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    running = sum(trial.state in OPEN for trial in trials)
    with FileLock(folder / ".report.lock"):
        if test and done and not running:
            winners = study.best_trials[:1] if len(objectives) == 1 else []
            for trial in done if test == "always" else winners:
                run = trial.user_attrs["folder"]
                if read_json(folder / run / SUMMARY)["test/acc"] is None:
                    test_run(folder / run, allow)
        print(write_report([folder], folder / "report", draw(study, objectives, folder / "report")).text)
    states = Counter(trial.state for trial in trials)
    counts = ", ".join(f"{states[state]} {name}" for state, name in SAID.items() if states[state] and state not in OPEN)
    print(f"\n{len(trials)} trials: {counts or 'none done'}")
    if running:
        print(f"{running} more are at work; whoever ends last tests the winner and writes the last report.")
    best = study.best_trials if done else []
    if len(objectives) > 1 and best:
        print("Pareto front: no trial is better in one objective and not worse in another")
        best = sorted(best, key=lambda trial: trial.values)
    for trial in best if len(objectives) > 1 else best[:1]:
        print(describe(trial, objectives, folder))
    print(f"look      optuna-dashboard {shlex.quote(address(storage))}", flush=True)
    return states[TrialState.FAIL]


def describe(trial: FrozenTrial, objectives: Mapping[str, str], folder: Path) -> str:
    values = "  ".join(f"{name} {value:.6g}" for name, value in zip(objectives, trial.values, strict=True))
    where = os.path.relpath(folder / trial.user_attrs["folder"])
    return f"best      trial {trial.number}: {values}  {shlex.join(as_overrides(trial.params))}\n          {where}"


def address(storage: Path) -> str:
    """Of a storage, for Optuna's own programs."""
    relative = os.path.relpath(storage)
    return f"sqlite:///{relative}" if storage.suffix == ".db" else relative


def draw(study: optuna.Study, objectives: Mapping[str, str], out: Path) -> list[tuple[str, Path]]:
    """Title and file of the pictures that these trials allow: history, importance, and the front of two objectives."""
    trials = [trial for trial in counted(study) if trial.state == TrialState.COMPLETE]
    varied = {key for trial in trials for key in trial.params if trial.params[key] != trials[0].params[key]}
    pictures = []
    for place, (metric, direction) in enumerate(objectives.items()):
        short, values = metric.replace("/", "_"), [trial.values[place] for trial in trials]
        if trials:
            pictures.append((f"Optimisation history of {metric}", out / f"history_{short}.png"))
            pruned = [trial for trial in counted(study) if trial.state == TrialState.PRUNED and trial.values]
            save_history(trials, pruned, place, metric, direction, pictures[-1][1])
        if len(varied) > 1 and len(set(values)) > 1:
            pictures.append((f"Importance for {metric}", out / f"importance_{short}.png"))
            save_importance(study, place, direction, pictures[-1][1])
        if trials and place > 0:
            pictures.append((f"{next(iter(objectives))} against {metric}", out / f"front_{short}.png"))
            save_front(trials, study.best_trials, place, list(objectives), pictures[-1][1])
    if trials and len(varied) < 2:
        print(f"No importance is drawn: it takes two keys that vary, not {', '.join(varied) or 'none'}.")
    return pictures


def save_history(
    trials: Sequence[FrozenTrial],
    pruned: Sequence[FrozenTrial],
    place: int,
    metric: str,
    direction: str,
    path: Path,
) -> None:
    """The value of each trial in the order they were asked for, and the best so far; of pruned ones the last value."""
    figure, axes = new_picture([trial.values[place] for trial in [*trials, *pruned]], metric)
    numbers, values = [trial.number for trial in trials], [trial.values[place] for trial in trials]
    best = list(accumulate(values, max if direction == "maximize" else min))
    axes.plot(numbers, best, drawstyle="steps-post", color=RED, linewidth=1.6, label="best so far")
    axes.plot(numbers, values, "o", color=BLUE, markersize=5, label="trial")
    if pruned:
        ends = [trial.values[place] for trial in pruned]
        axes.plot([trial.number for trial in pruned], ends, "x", color=GREY, label="pruned, at its last epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial")
    axes.set_ylabel(metric)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


def save_importance(study: optuna.Study, place: int, direction: str, path: Path) -> None:
    """Shares of each key in what tells good trials from the rest: PED-ANOVA (Watanabe et al. 2023)."""
    sign = -1 if direction == "maximize" else 1  # with a target of its own, PED-ANOVA takes the lowest for the best
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*low `target` values")
        shares = optuna.importance.get_param_importances(study, target=lambda trial: sign * trial.values[place])
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(shares)), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    bars = axes.barh([*shares][::-1], [*shares.values()][::-1], color=BLUE, height=0.6)
    axes.bar_label(bars, fmt="{:.0%}", padding=4)
    axes.set_xlim(0, 1.08 * max(shares.values()))
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def save_front(
    trials: Sequence[FrozenTrial], best: Sequence[FrozenTrial], place: int, metrics: Sequence[str], path: Path
) -> None:
    """The first objective against another; the Pareto front of all is red, and named by what was chosen there."""
    figure, axes = new_picture([trial.values[0] for trial in trials], metrics[0])
    across = [trial.values[place] for trial in trials]
    axes.plot(across, [trial.values[0] for trial in trials], "o", color=GREY, markersize=5, label="trial")
    front = sorted({(trial.values[place], trial.values[0]) for trial in best})
    axes.plot(*zip(*front, strict=True), "o-", color=RED, markersize=7, linewidth=1, label="Pareto front")
    named = {(trial.values[place], trial.values[0]): chosen(trial) for trial in best}
    for point, name in named.items():
        axes.annotate(name, point, xytext=(6, -11), textcoords="offset points", fontsize=8, color=RED)
    if min(across) > 0 and max(across) >= 20 * min(across):
        axes.set_xscale("log")
    axes.set_xlabel(metrics[place])
    axes.set_ylabel(metrics[0])
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, path)


def chosen(trial: FrozenTrial) -> str:
    return " ".join(value for value in trial.params.values() if isinstance(value, str))


def new_picture(heights: Sequence[float], metric: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.4), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    if metric == "val/acc":
        accuracy_axis(axes, min(heights), max(heights))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
