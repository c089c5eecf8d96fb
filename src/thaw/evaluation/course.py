"""How training went: whether the run overfitted, from its validations, and whether its gradients spiked."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

FEWEST_VALIDATIONS = 4  # fewer say nothing about overfitting
RISE, LEAST_RISE = 1.25, 0.02  # of the validation loss above its lowest, relative and absolute
ERRORS = 2.0  # standard errors of the accuracy that a fall has to exceed


def judge_course(course: Mapping[str, Any], num_val: int) -> dict[str, Any]:
    """What `summary.json` says of a run's course; empty where nothing was validated or compared.

    A run overfitted if validation got worse from its best on while training did not: if the validation loss rose by
    more than a quarter and 0.02, or the accuracy fell by more than two of its standard errors on `num_val` images.
    Single validations vary, so medians of three in a row are compared. The best epoch is that of the highest accuracy.

    Args:
        course: see `thaw.callbacks.step_monitor.StepMonitor`.
    """
    seen = [each for each in course.get("validations", ()) if "val/acc" in each]
    facts: dict[str, Any] = {"gradient_spikes": course.get("gradient_spikes")}
    facts |= {key: course.get(key) for key in ("first_spike", "largest_spike")}
    if seen:
        best, last = max(seen, key=lambda each: each["val/acc"]), seen[-1]
        facts |= {"best_epoch": best["epoch"], "overfitted": None, "best": best, "last": last}
        if len(seen) >= FEWEST_VALIDATIONS:
            facts["overfitted"] = trained_on(best, last) and validated_worse(seen, num_val)
    return {"training": facts}


def trained_on(best: Mapping[str, float], last: Mapping[str, float]) -> bool:
    """Whether training accuracy is at least what it was; unknown counts as yes."""
    return last.get("train/acc", 1.0) >= best.get("train/acc", 0.0)


def validated_worse(seen: Sequence[Mapping[str, float]], num_val: int) -> bool:
    accuracies = medians_of_three([each["val/acc"] for each in seen])
    losses = medians_of_three([each["val/loss"] for each in seen if "val/loss" in each])
    best = max(accuracies)
    error = (max(best * (1 - best), 0) / max(num_val, 1)) ** 0.5
    rises = bool(losses) and losses[-1] > max(RISE * min(losses), LEAST_RISE + min(losses))
    return rises or best - accuracies[-1] > ERRORS * error


def medians_of_three(values: Sequence[float]) -> list[float]:
    return [median(values[number : number + 3]) for number in range(len(values) - 2)]


def say_course(facts: Mapping[str, Any]) -> str:
    """One line about that, empty where nothing is known."""
    parts = []
    if (overfitted := facts.get("overfitted")) is not None:
        best, last = facts["best"], facts["last"]
        parts.append(overfitting(best, last) if overfitted else f"not overfitted{gap(best)}")
    if (count := facts.get("gradient_spikes")) is not None:
        steps = "1 step" if count == 1 else f"{count:,} steps"
        parts.append(
            f"the gradient norm spiked in {steps}, first in step {facts['first_spike']:,}, to at most "
            f"{facts['largest_spike']:.0f} times the usual; a lower optim.lr or trainer.gradient_clip_val may help"
            if count
            else "no gradient spikes"
        )
    return "; ".join(parts)


def gap(best: Mapping[str, float]) -> str:
    if "train/acc" not in best:
        return ""
    return f" ({best['train/acc']:.2%} on training images in epoch {best['epoch']}, the best)"


def overfitting(best: Mapping[str, float], last: Mapping[str, float]) -> str:
    """How accuracy on both splits, and the validation loss, changed after the best epoch."""
    changes = [
        f"{title} from {form(best[key])} to {form(last[key])}"
        for key, title, form in (
            ("val/acc", "validation accuracy went", "{:.2%}".format),
            ("val/loss", "loss", "{:.4f}".format),
            ("train/acc", "training accuracy", "{:.2%}".format),
        )
        if key in best and key in last
    ]
    return (
        f"overfitted after epoch {best['epoch']}, the best, of {last['epoch']}: {', '.join(changes)}; augmentation, "
        "fewer epochs or a policy that trains less may help"
    )
