"""What stands above the table over runs: which experiment, with which settings and data, and how to repeat it."""

import os
from collections.abc import Sequence
from pathlib import Path

from thaw.sweeps.groups import Group

MOST = 6  # names or values in a line


def title_of(groups: Sequence[Group]) -> str:
    """The experiments, and the keys in which their settings differ."""
    names = list(dict.fromkeys(run.name for group in groups for run in group.runs))
    keys = [*differing(groups)]
    shown = ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} other experiments"
    return f"{shown}: {', '.join(keys)}" if 0 < len(keys) <= MOST else shown


def describe_runs(groups: Sequence[Group], folders: Sequence[Path]) -> list[tuple[str, str]]:
    """Name and text of each fact about the runs of a table; facts that their files do not hold are left out."""
    runs = [run for group in groups for run in group.runs]
    shared = set.intersection(*(set(run.overrides) for run in runs))
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    folds = sorted({run.fold for run in runs if run.fold is not None})
    varied = differing(groups) | {"seed": [*map(str, seeds)], "data.fold": [*map(str, folds)]}
    starts = sorted(run.started for run in runs if run.started)
    best = [group.runs[0].folder / "checkpoints" / "best.ckpt" for group in groups if group.mark]
    facts = [
        ("experiment", listed([run.name for run in runs])),
        ("overrides", " ".join(token for token in runs[0].overrides if token in shared)),
        ("varied", "; ".join(f"{key}: {range_of(values)}" for key, values in varied.items() if len(values) > 1)),
        ("data", listed([run.data for run in runs])),
        ("best checkpoint", listed([os.path.relpath(path) for path in best if path.is_file()])),
        ("started", " to ".join(dict.fromkeys([*starts[:1], *starts[-1:]]))),
        ("folder", listed([os.path.relpath(folder) for folder in folders])),
        ("command", listed([run.command for run in runs], "\n")),
    ]
    return [(name, text) for name, text in facts if text]


def differing(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The values of each key that tells settings of an experiment apart, those of the best setting first."""
    found: dict[str, dict[str, None]] = {}
    for group in groups:
        for key, value in group.parts:
            found.setdefault(key, {})[value] = None
    return {key: [*values] for key, values in found.items() if key != "name"}


def range_of(values: Sequence[str]) -> str:
    """All values if they are few, of many numbers the lowest and the highest."""
    try:
        numbers = sorted(values, key=float)
    except ValueError:
        return listed(values)
    return listed(values) if len(values) <= MOST else f"{numbers[0]} to {numbers[-1]} ({len(values)} values)"


def listed(texts: Sequence[str], separator: str = ", ") -> str:
    """Each text once, or the first few."""
    once = [text for text in dict.fromkeys(texts) if text]
    more = f" and {len(once) - MOST} more" if len(once) > MOST else ""
    return separator.join(once[:MOST]) + more
