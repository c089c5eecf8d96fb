"""Cells of the table over runs: the text of each, and the value that it is sorted by."""

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from thaw.sweeps.groups import ABSENT, Group, SeedScore
from thaw.sweeps.runs import ACCURACY, Run

Cell = tuple[str, float | str | None]

MAX_KEYS = 4  # that settings may differ in and still have a column each
MEASURES = ["val/acc", "n", "test/acc", "trained", "time"]
RUN_COLUMNS = ["setting", "seed", "state", "val/acc", "test/acc", "95 % interval", "epochs", "time", "folder"]
RUN_TEXTS = ("setting", "state", "folder")


def setting_columns(groups: Sequence[Group]) -> list[str]:
    """A column for each key in which settings differ, or `setting` for all of them if there are many."""
    keys = list(dict.fromkeys(key for group in groups for key, _ in group.parts))
    return keys if 0 < len(keys) <= MAX_KEYS else ["setting"]


def group_cells(group: Group, columns: Sequence[str]) -> list[Cell]:
    """The cells of a setting: for `columns`, see `setting_columns`, and then for `MEASURES`."""
    parts, val, test, seconds = dict(group.parts), group.val, group.test, group.seconds
    settings = [group.label if key == "setting" else parts.get(key, ABSENT) for key in columns]
    params = group.trainable_params
    return [
        *((cell, None if cell == ABSENT else cell) for cell in settings),
        (format_score(val), val and val[0]),
        (format_count(group), val[2] if val else 0),
        (format_test(group), test and test[0]),
        (shown(params, ","), params),
        (format_seconds(seconds and seconds[0]), seconds and seconds[0]),
    ]


def run_cells(run: Run, label: str, above: Path) -> list[Cell]:
    """The cells of a run for `RUN_COLUMNS`, for a page; its folder is shown relative to `above`."""
    folder = os.path.relpath(run.folder, above)
    return [
        (label, label),
        (shown(run.seed) if run.fold is None else run.repeat_name, run.seed if run.fold is None else run.fold),
        (Markup('<span class="{0}">{0}</span>').format(run.state), run.state),
        (shown(run.val_acc, ".2%"), run.val_acc),
        (shown(run.test_acc, ".2%"), run.test_acc),
        (format_interval(run), run.test_low),
        (shown(run.epochs), run.epochs),
        (format_seconds(run.seconds), run.seconds),
        (Markup("<code>{}</code>").format(folder), folder),
    ]


def shown(value: float | None, spec: str = "") -> str:
    return ABSENT if value is None else f"{value:{spec}}"


def format_score(score: SeedScore | None) -> str:
    """`97.50% ± 0.21`: mean and sample standard deviation, in percent."""
    if score is None:
        return ABSENT
    mean, spread, _ = score
    return f"{mean:.2%}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def format_count(group: Group) -> str:
    """The number of seeds in the mean, `2 of 3` where runs of the setting are not done; or of folds, `3 of 5 folds`."""
    seeds = group.val[2] if group.val else 0
    if group.folds:
        return f"{seeds} folds" if seeds == group.folds else f"{seeds} of {group.folds} folds"
    lost = len(group.runs) - len(group.done)
    return f"{seeds} of {seeds + lost}" if lost else str(seeds)


def format_test(group: Group) -> str:
    """Mean and spread over the tested seeds or folds, or the accuracy of the only tested run with its 95 % interval."""
    if group.test is None:
        return ABSENT
    if group.test[2] == 1:
        run = next(run for run in group.done if run.test_acc is not None)
        return f"{run.test_acc:.2%}" + (f" [{format_interval(run)}]" if run.test_low is not None else "")
    fewer = group.val is not None and group.test[2] != group.val[2]
    return format_score(group.test) + (f" (n = {group.test[2]})" if fewer else "")


def format_interval(run: Run) -> str:
    return ABSENT if run.test_low is None or run.test_high is None else f"{run.test_low:.2%}, {run.test_high:.2%}"


def format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d}"


def format_measure(metric: str, value: float) -> str:
    """`val/acc 98.80%`, `trainable_params 1,930`."""
    return f"{metric} {f'{value:.2%}' if metric in ACCURACY else f'{value:,}'}"


def about_left(started: float, done: float, rest: float) -> str:
    """`, about 40 s left`, to be added to a line; empty before anything is done.

    `started` is a time of `time.monotonic`; `done` jobs have ended since, and `rest` are to come.
    """
    if not done:
        return ""
    seconds = (time.monotonic() - started) * rest / done
    return f", about {f'{seconds:.0f} s' if seconds < 60 else format_seconds(seconds)} left"


def shortened(setting: str) -> str:
    """A setting for the screen, its numbers with four digits; the report's files have all of them."""
    return re.sub(r"(?<![\w.])\d+\.\d{4,}(?:e[+-]?\d+)?(?![\w.])", lambda found: f"{float(found[0]):.4g}", setting)
