"""The range test of the learning rate: what it does in each step, suggests, writes and refuses."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from thaw.callbacks import lr_find
from thaw.callbacks.lr_find import smooth, suggest

Train = Callable[..., Path]
RATES = np.geomspace(1e-6, 10, 300)


def test_suggests_between_the_steepest_fall_and_the_minimum() -> None:
    """A loss that falls along a logistic curve around 1e-3 and explodes above 1e-1."""
    log = np.log10(RATES)
    losses = 2.3 / (1 + np.exp(6 * (log + 3))) + np.exp(8 * (log + 1)) + 0.1
    lowest = RATES[losses.argmin()]
    assert 1e-2 < lowest < 1e-1
    assert suggest(RATES, smooth(losses)) == pytest.approx(math.sqrt(1e-3 * lowest), rel=0.2)


def test_a_loss_that_does_not_fall_suggests_nothing() -> None:
    assert suggest(RATES, smooth(np.full(300, 2.3))) is None
    assert suggest(RATES, smooth(np.linspace(2.3, 9, 300))) is None


def read(run_dir: Path) -> np.ndarray:
    """Columns lr, loss and smoothed."""
    return np.loadtxt(run_dir / "lr_find.csv", delimiter=",", skiprows=1)


def test_a_run(
    train: Train, tiny_run: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of accumulated batches, with cached features; the first losses are those of a step of size 0."""
    monkeypatch.setattr(lr_find, "STEPS", 40)
    monkeypatch.setattr(lr_find, "SMOOTH", 2.0)
    run = [*tiny_run, "freeze=last_blocks", "freeze.k=1", "lr_find=true"]
    first = train(*run, name="first")
    printed = capsys.readouterr().out
    content = read(first)
    factors = content[1:, 0] / content[:-1, 0]
    assert content[0, 0] == pytest.approx(1e-6) and factors == pytest.approx(factors[0], rel=1e-3)
    assert factors[0] == pytest.approx((10 / 1e-6) ** (1 / 39), rel=1e-3)
    assert f"optim.lr={suggest(content[:, 0], content[:, 2]):g}" in printed.splitlines()[-1]
    assert (first / "report" / "lr_find.png").is_file()
    assert not list(first.glob("**/*.ckpt")) and not (first / "summary.json").exists()
    again = train(*run, "trainer.accumulate_grad_batches=2", "data.batch_size=8", name="again")
    assert read(again)[:5, 1] == pytest.approx(content[:5, 1], rel=1e-3)  # the same images in each step


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["head=lr_bank"], "head=lr_bank trains a head for each rate of head.lrs"),
        (["freeze=lp_ft"], "thaws after 3 epochs; test its parts"),
    ],
)
def test_what_has_no_single_rate_is_refused(train: Train, tiny_run: list[str], settings: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train(*tiny_run, *settings, "lr_find=true")
