"""How long the policies of a comparison take, before it starts and after its first jobs, and which of them fit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from rich.table import Table

from thaw.run.console import plural, say_fitted
from thaw.run.errors import UserError
from thaw.run.ranks import num_processes
from thaw.sweeps.cells import format_seconds
from thaw.sweeps.compare_policies import Work

if TYPE_CHECKING:  # takes seconds
    from thaw.plan.speed import Speed

START_SECONDS = 0.5  # of a job, beside building its model: data, callbacks, its first and last files
EPOCH_SECONDS = 0.05  # beside its steps: a validation, a checkpoint
STEP_SECONDS = 0.0015  # Lightning's own, beside those that `thaw.plan.speed` measures
LEAST = 2  # policies of a comparison


@dataclass(frozen=True)
class ImageCounts:
    """How many there are: in an epoch of training, to validate and to test."""

    train: int
    validate: int
    test: int


@dataclass(frozen=True)
class Costs:
    """Seconds of a policy: of a job, of filling the cache that has so many layers, of a run's test."""

    job: float
    fill: float
    cut: int
    test: float


def predict(work: Work, speed: "Speed", cfg: DictConfig, images: ImageCounts) -> Costs:
    """The costs of a policy by its FLOPs."""
    batch = cfg.data.batch_size * num_processes(cfg.trainer)
    step = STEP_SECONDS + speed.step + cfg.data.batch_size * work.train * speed.train
    epoch = EPOCH_SECONDS + math.ceil(images.train / batch) * step + images.validate * work.validate * speed.forward
    return Costs(
        job=START_SECONDS + speed.build + cfg.trainer.max_epochs * epoch,
        fill=(images.train + images.validate) * work.fill * speed.forward,
        cut=work.cut,
        test=START_SECONDS + speed.build + images.test * work.forward * speed.forward,
    )


@dataclass(frozen=True)
class Timing:
    """The seconds of a comparison from the costs of its policies, the cheapest first."""

    costs: Mapping[str, Costs]
    tries: int
    seeds: int
    at_once: int  # jobs

    @property
    def jobs(self) -> int:
        """Of each policy."""
        return self.tries + self.seeds - 1

    def seconds(self, policy: str) -> float:
        """Of all jobs of a policy, without the cache, which others may share."""
        return (self.jobs * self.costs[policy].job + self.seeds * self.costs[policy].test) / self.at_once

    def total(self, policies: Sequence[str]) -> float:
        fills = {self.costs[name].cut: self.costs[name].fill for name in policies}
        return sum(map(self.seconds, policies)) + sum(fills.values())

    def fitting(self, minutes: float) -> list[str]:
        """The policies that take no longer together; the most expensive ones are left out first.

        Raises:
            UserError: not even the two cheapest ones fit.
        """
        order = sorted(self.costs, key=self.seconds)
        kept = list(order)
        while len(kept) > LEAST and self.total(kept) > 60 * minutes:
            kept.pop()
        if self.total(kept) > 60 * minutes:
            least = math.ceil(self.total(kept) / 6) / 10
            raise UserError(
                f"compare.minutes={minutes:g} is too little: {' and '.join(kept)}, the cheapest policies, take about "
                f"{least:g} minutes with {plural(self.tries, 'learning rate')} and {plural(self.seeds, 'seed')}. Set "
                f"compare.minutes={math.ceil(1.2 * least)}, or lower compare.tries, compare.seeds or "
                "trainer.max_epochs."
            )
        return [name for name in self.costs if name in kept]

    def show(self, policies: Sequence[str]) -> None:
        """Print the plan."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("policy", "jobs", "a job", "all jobs and tests"):
            table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
        for name in policies:
            table.add_row(name, str(self.jobs), *map(format_seconds, (self.costs[name].job, self.seconds(name))))
        if fill := self.total(policies) - sum(map(self.seconds, policies)):
            table.add_row("cached features", "", "", format_seconds(fill))
        table.add_row("in all, about", str(self.jobs * len(policies)), "", format_seconds(self.total(policies)))
        say_fitted(table)


def too_long(
    timing: Timing, policies: Sequence[str], measured: Mapping[str, float], minutes: float
) -> dict[str, tuple[float, float]]:
    """The policies that no longer fit once the first try of each has been timed, the most expensive first.

    Args:
        measured: seconds of the first tries; a policy without one counts as predicted.

    Returns seconds of what is left of each, and how many there were for it.
    """
    spent = sum(measured.values()) / timing.at_once
    rest = {}
    for name in policies:
        costs = timing.costs[name]
        jobs = (timing.jobs - 1) * measured.get(name, costs.job) + timing.seeds * costs.test
        rest[name] = jobs / timing.at_once
    out: dict[str, tuple[float, float]] = {}
    while len(rest) > LEAST and spent + sum(rest.values()) > 60 * minutes:
        name = max(rest, key=lambda each: rest[each])
        others = spent + sum(rest.values()) - rest[name]
        out[name] = rest.pop(name), max(0.0, 60 * minutes - others)
    return out
