"""The end of a search: the winner is tested, pictures are drawn, the table is written and printed."""

import os
import shlex
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import optuna
from filelock import FileLock
from matplotlib.ticker import MaxNLocator, PercentFormatter
from optuna.trial import FrozenTrial, TrialState

from thaw.run.console import console, plural, say
from thaw.run.targets import targets
from thaw.sweeps.curves import COLORS, GREY, RED, new_axes, save_picture
from thaw.sweeps.ending import measure_winners, say_where, show_run_table
from thaw.sweeps.run_table import write_run_table
from thaw.sweeps.search_plan import SearchPlan
from thaw.sweeps.study import OPEN, STATES, counted


def report_study(plan: SearchPlan, study: optuna.Study) -> int:
    """Test the winner or the Pareto front, or with `test=always` every trial; write and print the table.

    They are tested once no worker can overtake them any more. The table goes to `report` in the study's folder.

    Returns:
        how many trials have failed, or cannot be tested.
    """
    folder, report, trials = plan.folder, plan.folder / "report", counted(study)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    running = sum(trial.state in OPEN for trial in trials)
    untested = 0
    with FileLock(folder / ".report.lock"):
        if plan.cfg.test and done and not running:
            untested = measure_winners(folder, targets(plan.base), plan.cfg.test == "always")
        with console().status("drawing pictures, writing the report"):
            table = write_run_table([folder], report, draw_study(study, plan.objectives, report))
    show_run_table(table)
    states = Counter(trial.state for trial in trials)
    counts = ", ".join(
        f"{states[state]} {name}" for state, name in STATES.items() if states[state] and state not in OPEN
    )
    say(f"{plural(len(trials), 'trial')}: {counts or 'none done'}.")
    if running:
        say(f"{running} more run elsewhere; the worker that ends last tests the winner and writes the last report.")
    address = f"{'sqlite:///' if plan.storage.suffix == '.db' else ''}{os.path.relpath(plan.storage)}"
    dashboard = f"optuna-dashboard {shlex.quote(address)}"
    say_where(table, [folder], report, {"To see the study (pip install optuna-dashboard)": [dashboard]})
    return states[TrialState.FAIL] + untested


def draw_study(study: optuna.Study, objectives: Mapping[str, str], out: Path) -> list[tuple[str, Path]]:
    """Draw what the trials allow: history, importance, and the Pareto front of two objectives.

    Returns:
        title and file of each picture.
    """
    trials = [trial for trial in counted(study) if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in counted(study) if trial.state == TrialState.PRUNED and trial.values]
    varied = {key for trial in trials for key in trial.params if trial.params[key] != trials[0].params[key]}
    pictures = []
    for place, (metric, direction) in enumerate(objectives.items()):
        short, values = metric.replace("/", "_"), [trial.values[place] for trial in trials]
        if trials:
            pictures.append((f"Optimisation history of {metric}", out / f"history_{short}.png"))
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
    """The value of each trial in the order of their numbers, and the best so far; of pruned trials the last value.

    Optuna's plot_optimization_history leaves out pruned trials, often most of them, and cannot stretch accuracies.
    """
    values, ends = [trial.values[place] for trial in trials], [trial.values[place] for trial in pruned]
    axes = new_axes(values + ends if metric == "val/acc" else ())
    numbers, best = [trial.number for trial in trials], accumulate(values, max if direction == "maximize" else min)
    axes.plot(numbers, [*best], drawstyle="steps-post", color=RED, linewidth=1.6, label="best so far")
    axes.plot(numbers, values, "o", color=COLORS[0], markersize=5, label="trial")
    if pruned:
        axes.plot([trial.number for trial in pruned], ends, "x", color=GREY, label="pruned, at its last epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel=metric)
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
    bars = axes.barh([*shares][::-1], [*shares.values()][::-1], color=COLORS[0], height=0.6)
    axes.bar_label(bars, fmt="{:.0%}", padding=4)
    axes.set_xlim(0, 1.08 * max(shares.values()))
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    save_picture(axes, path, 0)


def save_front(
    trials: Sequence[FrozenTrial], best: Sequence[FrozenTrial], place: int, metrics: Sequence[str], path: Path
) -> None:
    """The first objective against another, with the Pareto front of all in red.

    Optuna's plot_pareto_front cannot name the points of the front by their settings, such as the policy.
    """
    across, heights = ([trial.values[index] for trial in trials] for index in (place, 0))
    axes = new_axes(heights if metrics[0] == "val/acc" else ())
    axes.plot(across, heights, "o", color=GREY, markersize=5, label="trial")
    front = {(trial.values[place], trial.values[0]): trial for trial in best}
    axes.plot(*zip(*sorted(front), strict=True), "o-", color=RED, markersize=7, linewidth=1, label="Pareto front")
    for point, trial in front.items():
        chosen = " ".join(value for value in trial.params.values() if isinstance(value, str))
        axes.annotate(chosen, point, xytext=(6, -11), textcoords="offset points", fontsize=8, color=RED)
    if min(across) > 0 and max(across) >= 20 * min(across):
        axes.set_xscale("log")
    axes.set(xlabel=metrics[place], ylabel=metrics[0])
    save_picture(axes, path, 2)
