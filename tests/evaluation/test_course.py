"""Which runs count as overfitted: series that real runs had, and their mirror images."""

import pytest

from thaw.evaluation.course import judge_course, say_course

NO_SPIKES = {"gradient_spikes": 0, "first_spike": None, "largest_spike": None}


def course(accuracies: list[float], losses: list[float], train: list[float]) -> dict:
    rows = zip(accuracies, losses, train, strict=True)
    seen = [
        {"epoch": n, "val/acc": acc, "val/loss": loss, "train/acc": fit} for n, (acc, loss, fit) in enumerate(rows, 1)
    ]
    return {"validations": seen} | NO_SPIKES


OVERFITTED = course([0.61, 0.75, 0.784, 0.78, 0.77, 0.76], [1.4, 1.0, 0.93, 0.99, 1.3, 1.5], [0.2, 0.9, 0.99, 1, 1, 1])
STEADY = course(
    [0.968, 0.982, 0.988, 0.986, 0.984, 0.982], [0.13, 0.06, 0.041, 0.041, 0.042, 0.044], [0.6] + 5 * [0.98]
)
NOISY = course(  # of one lucky validation the loss is half of the others'
    [0.98, 0.992, 0.986, 0.98, 0.996, 0.988, 0.986, 0.988], [0.1, 0.03, 0.07, 0.1, 0.024, 0.05, 0.046, 0.05], 8 * [0.99]
)
FELL = course([0.9, 0.95, 0.95, 0.95, 0.9, 0.9, 0.9], 7 * [0.2], 7 * [1.0])
DIVERGED = course([0.9, 0.95, 0.95, 0.95, 0.1, 0.1, 0.1], [0.3, 0.2, 0.2, 0.2, 2.3, 2.3, 2.3], 4 * [0.9] + 3 * [0.1])


@pytest.mark.parametrize(
    ("run", "overfitted"),
    [(OVERFITTED, True), (STEADY, False), (NOISY, False), (FELL, True), (DIVERGED, False)],
)
def test_overfitting(run: dict, overfitted: bool) -> None:
    facts = judge_course(run, 500)["training"]
    assert facts["overfitted"] is overfitted
    assert facts["best"]["val/acc"] == max(each["val/acc"] for each in run["validations"])
    assert say_course(facts).startswith("overfitted after epoch" if overfitted else "not overfitted")


def test_what_is_unknown_is_not_said() -> None:
    few = {"validations": STEADY["validations"][:3]}
    assert say_course(judge_course(few, 500)["training"]) == ""
    assert say_course(judge_course({}, 500)["training"]) == say_course({"gradient_spikes": None}) == ""
    spiked = {"gradient_spikes": 3, "first_spike": 1412, "largest_spike": 31.4}
    assert "in 3 steps, first in step 1,412, to at most 31 times" in say_course(judge_course(spiked, 500)["training"])
