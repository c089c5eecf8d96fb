"""The arithmetic of a comparison: which learning rates a policy is tried with, and which of them it gets."""

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

    def rates(self, policy: str, optimizer_lr: float) -> list[float]:
        """The learning rates of a policy with two digits, the middle one first, then alternately lower and higher.

        `optimizer_lr` is the learning rate in the optimizer's own file.
        """
        middle = float(self.lr.get(policy, self.lr[OTHER])) * optimizer_lr / OF_ADAMW
        steps = sorted(range(-(self.tries // 2), self.tries // 2 + 1), key=lambda step: (abs(step), step))
        return [float(f"{middle * self.lr_factor**step:.1e}") for step in steps[: self.tries]]


def best_try(runs: Mapping[float, Run]) -> float | None:
    """The learning rate with the best validation accuracy; of equal ones the first. None if no try is done."""
    done = {lr: run.val_acc for lr, run in runs.items() if run.state == DONE and run.val_acc is not None}
    return max(done, key=lambda lr: done[lr]) if done else None


def is_at_edge(lr: float, rates: Sequence[float]) -> bool:
    """Whether a better learning rate may lie beyond those that were tried."""
    return len(rates) > 1 and lr in (min(rates), max(rates))
