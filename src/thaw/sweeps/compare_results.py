"""What a comparison of policies has found so far, read from `comparison.json` and its run folders.

Shapes: N test images, K classes, P policies.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from thaw.evaluation.predictions import PREDICTIONS, Predictions, read_predictions
from thaw.run.console import plural
from thaw.run.errors import UserError
from thaw.run.files import read_json
from thaw.sweeps.groups import Group, SeedScore, best_first
from thaw.sweeps.runs import read_mapping, read_run

COMPARISON = "comparison.json"


@dataclass
class PolicyResult:
    """A policy at its chosen learning rate, over seeds.

    `tries` are those of `comparison.json`. `predictions` are those of the tested seeds; all policies have the same
    indices and labels.
    """

    name: str
    lr: float | None
    at_edge: bool
    tries: list[dict[str, Any]]
    group: Group
    train: list[str] = field(default_factory=list)  # what train.py is told to train it
    predictions: list[Predictions] = field(default_factory=list)

    @property
    def val(self) -> SeedScore | None:
        return self.group.val

    @property
    def seconds(self) -> float | None:
        return self.group.seconds and self.group.seconds[0]

    @property
    def params(self) -> int | None:
        return self.group.trainable_params

    @property
    def memory(self) -> float | None:
        """In 1e9 bytes."""
        score = self.group.score("peak_memory_gb")
        return score and score[0]

    @property
    def right(self) -> np.ndarray:
        """How many of the tested seeds classify each image correctly, (N,)."""
        return np.sum([each.right for each in self.predictions], axis=0)

    @property
    def test_acc(self) -> float | None:
        """The mean over the tested seeds."""
        return self.group.test and self.group.test[0]

    @property
    def test_interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of the test accuracy: the mean of those of the seeds, a little wide for their mean."""
        low, high = self.group.score("test_low"), self.group.score("test_high")
        return (low[0], high[0]) if low and high else None

    @property
    def edge(self) -> str:
        """`the lowest`, `the highest` or `the only one` of the learning rates that were tried."""
        rates = sorted({each["lr"] for each in self.tries})
        return "the only one" if len(rates) == 1 else "the lowest" if self.lr == rates[0] else "the highest"

    @property
    def what_happened(self) -> str:
        """Why the policy has no result: the states of its tries and runs, and the first reason that a run gives."""
        states = Counter(str(each.get("state")) for each in self.tries)
        runs = Counter(run.state for run in self.group.runs)
        counts = [
            f"{plural(sum(counted.values()), noun)}: {', '.join(f'{n} {state}' for state, n in counted.items())}"
            for counted, noun in ((states, "learning rate"), (runs, "seed"))
            if counted
        ]
        reason = next((run.reason for run in self.group.runs if run.failed), "")
        return "; ".join(filter(None, [*counts, reason])) or "not started"


@dataclass
class Comparison:
    """All policies of a comparison: those with a validation accuracy first, the best at the head."""

    folder: Path
    policies: list[PolicyResult]
    left_out: list[dict[str, str]]
    budget: dict[str, Any]
    typed: list[str]
    classes: list[str]
    data: str
    warnings: list[str]

    @property
    def finished(self) -> list[PolicyResult]:
        return [policy for policy in self.policies if policy.val]

    @property
    def tested(self) -> list[PolicyResult]:
        return [policy for policy in self.finished if policy.predictions]

    @property
    def labels(self) -> np.ndarray:
        """True classes of the test images, (N,); none if no policy is tested."""
        return self.tested[0].predictions[0].labels if self.tested else np.zeros(0, dtype=np.int64)


def read_comparison(folder: Path) -> Comparison:
    """Read `comparison.json`, the runs that it names and their predictions; what cannot be read is a warning."""
    facts = read_json(folder / COMPARISON)
    warnings: list[str] = []
    summaries = [
        summary
        for entry in facts["policies"]
        for name in entry.get("runs", ())
        if (summary := read_mapping(folder / name / "summary.json", []))
    ]
    classes = [str(name) for name in summaries[0].get("classes", ())] if summaries else []
    policies = [read_policy(folder, entry, classes, warnings) for entry in facts["policies"]]
    policies.sort(key=lambda policy: best_first(policy.group))
    keep_same_images(policies, warnings)
    data = next((run.data for policy in policies for run in policy.group.done), "")
    rest = (facts.get("left_out", []), facts.get("budget", {}), facts.get("typed", []))
    return Comparison(folder, policies, *rest, classes, data, warnings)


def read_policy(folder: Path, entry: dict[str, Any], classes: Sequence[str], warnings: list[str]) -> PolicyResult:
    runs = [read_run(folder / name, warnings) for name in entry.get("runs", ())]
    policy = PolicyResult(
        name=entry["policy"],
        lr=entry.get("lr"),
        at_edge=bool(entry.get("at_edge")),
        tries=entry.get("tries", []),
        group=Group(runs, [entry["policy"]]),
        train=entry.get("train", []),
    )
    for run in policy.group.done:
        path = run.folder / "report" / PREDICTIONS
        if run.test_acc is not None and path.is_file():
            try:
                policy.predictions.append(read_predictions(path, classes))
            except (UserError, OSError) as error:
                warnings.append(str(error))
    return policy


def keep_same_images(policies: Sequence[PolicyResult], warnings: list[str]) -> None:
    """Drop the predictions on other test images than the first policy's: pairs of images need both."""
    found = [each for policy in policies for each in policy.predictions]
    for policy in policies:
        same = [
            each
            for each in policy.predictions
            if np.array_equal(each.indices, found[0].indices) and np.array_equal(each.labels, found[0].labels)
        ]
        if len(same) < len(policy.predictions):
            warnings.append(f"{policy.name} was tested on other images than {policies[0].name}; its test is left out.")
        policy.predictions = same
