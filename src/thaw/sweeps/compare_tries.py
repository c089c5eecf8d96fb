"""The arithmetic of a comparison: which learning rates a policy is tried with, and which of them it gets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from thaw.run.values import Count, Positive
from thaw.sweeps.runs import DONE, Run

OTHER = "other"  # policy in `CompareSettings.lr` that stands for all that are not named
OF_ADAMW = 1e-3  # optim.lr of configs/optim/adamw.yaml, for which `CompareSettings.lr` is meant


@dataclass(frozen=True)
class CompareSettings:
    """The block `compare` of configs/compare.yaml, which explains each key."""

    policies: Literal["all"] | list[str]
    tries: Count
    lr_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)]
    seeds: Count
    minutes: Positive | None
    lr: dict[str, Any]

    def next_rate(self, policy: str, optimizer_lr: float, tried: Mapping[float, Run]) -> float:
        """The learning rate of a policy's next try, with two digits: a line search on a logarithmic scale.

        The first is the one in `lr`, the second is higher. Then the search goes on beyond the best try so far, or,
        once that lies between two others, halfway to the better of its neighbours. So the tries reach farther than a
        grid of as many, on the side on which it is of use.

        Args:
            optimizer_lr: the learning rate in the optimizer's own file.
            tried: the tries so far, which are over, by their learning rate.
        """
        if not tried:
            rate = float(self.lr.get(policy, self.lr[OTHER])) * optimizer_lr / OF_ADAMW
        elif (best := best_try(tried)) is None:  # all have diverged
            rate = min(tried) / self.lr_factor
        elif best == max(tried):
            rate = best * self.lr_factor
        elif best == min(tried):
            rate = best / self.lr_factor
        else:
            rates = sorted(tried)
            below, above = (rates[rates.index(best) + step] for step in (-1, 1))
            rate = math.sqrt(best * max(below, above, key=lambda lr: tried[lr].val_acc or 0.0))
        return float(f"{rate:.1e}")


def best_try(runs: Mapping[float, Run]) -> float | None:
    """The learning rate with the best validation accuracy; of equal ones the first. None if no try is done."""
    done = {lr: run.val_acc for lr, run in runs.items() if run.state == DONE and run.val_acc is not None}
    return max(done, key=lambda lr: done[lr]) if done else None


def is_at_edge(lr: float, rates: Sequence[float]) -> bool:
    """Whether a better learning rate may lie beyond those that were tried."""
    return len(rates) > 1 and lr in (min(rates), max(rates))
