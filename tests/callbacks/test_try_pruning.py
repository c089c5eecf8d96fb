"""A try ends when it is behind a finished one by more than chance explains, and only then."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.trainer.states import TrainerFn
from scipy.stats import binom

from thaw.callbacks.try_pruning import CURVE, TryPruning, is_behind
from thaw.run.errors import RunPrunedError


def test_equal_tries_are_rarely_behind() -> None:
    """Of two tries with a true accuracy of 90 % on 500 independent images each, one is behind in 2.3 % of cases."""
    chances = binom.pmf(range(501), 500, 0.9)
    likely = [(count, chance) for count, chance in enumerate(chances) if chance > 1e-7]
    behind = sum(p * q for a, p in likely for b, q in likely if is_behind(a / 500, b / 500, 500))
    assert 0.018 < behind < 0.028
    assert not is_behind(1.0, 1.0, 10) and not is_behind(0.9, 0.8, 10)


def train(callback: TryPruning, accuracies: list[float], resume_at: int = 0) -> int:
    """Go through epochs as Lightning does; returns how many were trained."""
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        sanity_checking=False,
        is_global_zero=True,
        max_epochs=len(accuracies),
        ckpt_path="last.ckpt" if resume_at else None,
        datamodule=SimpleNamespace(split_dataset=lambda split: range(500)),
    )
    model: Any = None
    callback.on_fit_start(trainer, model)
    for epoch in range(resume_at, len(accuracies)):
        trainer.current_epoch, trainer.callback_metrics = epoch, {"val/acc": accuracies[epoch]}
        callback.on_validation_end(trainer, model)
        callback.on_train_epoch_end(trainer, model)
    return len(accuracies)


def test_pruning(tmp_path: Path) -> None:
    def callback(name: str, reference: str | None) -> TryPruning:
        (tmp_path / name).mkdir(exist_ok=True)
        return TryPruning(str(tmp_path / name), reference, after=0.25)

    middle = [0.5, 0.8, 0.9, 0.88, 0.95, 0.96, 0.96, 0.97]
    assert train(callback("middle", None), middle) == 8
    curve = json.loads((tmp_path / "middle" / CURVE).read_text())
    assert list(curve.values()) == [0.5, 0.8, 0.9, 0.9, 0.95, 0.96, 0.96, 0.97]  # the best so far
    assert train(callback("close", "middle"), [0.1, 0.78, 0.88, 0.9, 0.94, 0.95, 0.95, 0.95]) == 8
    with pytest.raises(RunPrunedError, match=r"after 2 of 8 epochs val/acc was 60.00%, that of the best try"):
        train(callback("far", "middle"), [0.1, 0.6] + [0.9] * 6)
    late = [0.5, 0.8, 0.9, 0.9, 0.95, 0.95, 0.85, 0.2]
    assert train(callback("ending", "middle"), late) == 8  # the best counts, and the last epoch is not cut
    assert train(callback("resumed", "middle"), [0.9, 0.9, 0.9], 0) == 3
    with pytest.raises(RunPrunedError, match="after 5 of 8"):  # its first epochs are read from its folder
        train(callback("resumed", "middle"), [0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1], resume_at=3)
    with pytest.raises(RunPrunedError):  # which a run that starts anew does not count
        train(callback("resumed", "middle"), [0.1] * 8)
