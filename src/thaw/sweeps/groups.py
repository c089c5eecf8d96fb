"""Runs grouped into settings, which are equal in everything but seed and fold, and ordered by validation accuracy."""

import json
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from thaw.sweeps.runs import ACCURACY, DONE, NUMBERS, Run

SeedScore = tuple[
    float, float | None, int
]  # mean, sample standard deviation (None for one seed), number of seeds or folds
Mark = Literal["", "best", "Pareto"]
ABSENT = "-"


@dataclass
class Group:
    """The runs of one setting; `tokens`, such as `optim.lr=0.1`, are what distinguishes it from the others."""

    runs: list[Run]
    tokens: list[str]
    mark: Mark = ""  # `best`, or `Pareto` in a search with several objectives; see `mark_winners`

    def __post_init__(self) -> None:
        self.val, self.test, self.seconds = map(self.score, ("val_acc", "test_acc", "seconds"))

    @property
    def done(self) -> list[Run]:
        return [run for run in self.runs if run.state == DONE]

    @property
    def label(self) -> str:
        return " ".join(self.tokens) or self.runs[0].name

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Key and value of each token; the key of an experiment's name is `name`, and `~key` is its own value."""
        split = [token.lstrip("+").partition("=") for token in self.tokens]
        return [(key, value) if equals else (key if key[0] == "~" else "name", key) for key, equals, value in split]

    @property
    def folds(self) -> int | None:
        """How many folds its data are cut into; None without cross-validation."""
        return None if self.runs[0].fold is None else self.runs[0].folds

    @property
    def trainable_params(self) -> int | None:
        return next((run.trainable_params for run in self.done if run.trainable_params is not None), None)

    def score(self, field: str) -> SeedScore | None:
        """A field of the finished runs over folds, else over seeds; several runs of one count once, with their mean."""
        repeats: dict[Any, list[float]] = {}
        for run in self.done:
            if (value := getattr(run, field)) is not None:
                repeats.setdefault(run.repeat, []).append(value)
        if not repeats:
            return None
        values = [statistics.mean(of_one) for of_one in repeats.values()]
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def group_runs(runs: Sequence[Run], objectives: Sequence[str] = ACCURACY) -> list[Group]:
    """Runs by setting: the best mean validation accuracy first, then fewer trained parameters, then the name.

    Within a setting the finished runs come first, the best of them at the head. `mark_winners` marks groups.
    """
    settled = {(run.name, run.overrides): run.identity for run in runs if not run.has_auto}
    members: dict[str, list[Run]] = {}
    for run in runs:
        identity = settled.get((run.name, run.overrides), run.identity) if run.has_auto else run.identity
        members.setdefault(identity, []).append(run)
    for group in members.values():
        group.sort(key=lambda run: (run.state != DONE, run.val_acc is None, -(run.val_acc or 0.0), str(run.folder)))
    groups = [*members.values()]
    ordered = sorted(map(Group, groups, distinguish(groups)), key=best_first)
    mark_winners(ordered, objectives)
    return ordered


def mark_winners(groups: Sequence[Group], objectives: Sequence[str]) -> None:
    """Mark the settings that a sweep is about: they are tested, and stand out in the table and in pictures.

    With one objective that is the first of the best settings in the order of the groups. With several objectives it is
    every setting of the Pareto front: no other one is better in one objective and at least as good in the others.
    """
    costs = [(group, [cost(group, metric) for metric in objectives]) for group in groups]
    measured = [(group, own) for group, own in costs if None not in own]
    front = [group for group, own in measured if not any(dominates(other, own) for _, other in measured)]
    for group in front if len(objectives) > 1 else front[:1]:
        group.mark = "Pareto" if len(objectives) > 1 else "best"


def cost(group: Group, metric: str) -> float | None:
    """The mean of a metric over seeds or folds, negative for an accuracy: less is better."""
    score = group.score(NUMBERS.get(metric, metric))
    mean = score and round(score[0], 9)  # so that the order of a sum decides no tie
    return mean if mean is None or metric not in ACCURACY else -mean


def dominates(costs: Sequence[Any], others: Sequence[Any]) -> bool:
    return costs != others and all(one <= other for one, other in zip(costs, others, strict=True))


def best_first(group: Group) -> tuple[Any, ...]:
    accuracy, params = cost(group, "val/acc"), group.trainable_params
    return not group.done, accuracy is None, accuracy or 0.0, params is None, params or 0, group.label


def distinguish(groups: list[list[Run]]) -> list[list[str]]:
    """For each group the name and overrides that not all groups share, and keys of the configuration if need be."""
    names = len({runs[0].name for runs in groups}) > 1
    overrides = [[token for token in runs[0].overrides if not token.startswith("name=")] for runs in groups]
    tokens = [[runs[0].name] * names + own for runs, own in zip(groups, overrides, strict=True)]
    tokens = without_shared(tokens)
    alike: dict[tuple[str, ...], list[int]] = {}
    for place, own in enumerate(tokens):
        alike.setdefault(tuple(own), []).append(place)
    for places in alike.values():
        settings = [{key: short_value(value) for key, value in groups[place][0].settings.items()} for place in places]
        for key in distinguishing_keys(settings):
            for place, one in zip(places, settings, strict=True):
                tokens[place].append(f"{key}={one.get(key, ABSENT)}")
    return tokens


def without_shared(lists: Sequence[Sequence[str]]) -> list[list[str]]:
    """Lists without what all of them share; a single one stays whole."""
    shared = set.intersection(*map(set, lists)) if len(lists) > 1 else set()
    return [[token for token in own if token not in shared] for own in lists]


def distinguishing_keys(settings: list[dict[str, str]]) -> list[str]:
    """A few keys whose values are different for any two of these settings."""
    chosen: list[str] = []
    different = 1
    for key in sorted({key for one in settings for key in one}):
        now = len({tuple(one.get(name, ABSENT) for name in [*chosen, key]) for one in settings})
        if now > different:
            chosen, different = [*chosen, key], now
    return chosen


def short_value(value: Any) -> str:
    return textwrap.shorten(json.dumps(value, default=str).replace('"', ""), 60, placeholder=" ...")
