"""Loss and learning rate are logged in every epoch, whatever its number of steps."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

EPOCHS = 3


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (["data.train_size=64"], [0, 1, 2]),  # 4 steps an epoch
        (["data.train_size=16"], [0, 1, 2]),  # 1
        (["data.train_size=64", "trainer.accumulate_grad_batches=3"], [0, 1, 2]),  # 2, of 3 batches and of 1
        (["data.train_size=64", "trainer.limit_train_batches=3"], [0, 1, 2]),
        (["data.train_size=64", "trainer.log_every_n_steps=2"], [0, 0, 1, 1, 2, 2]),  # as it was
        (["data.train_size=64", "trainer.log_every_n_steps=0"], []),
    ],
)
def test_every_epoch_logs_loss_and_learning_rate(
    settings: list[str], wanted: list[int], train: Callable[..., Path], tiny_run: list[str]
) -> None:
    on = [setting for setting in tiny_run if setting not in ("logger=none", "callbacks.lr_monitor=null")]
    run = train(*on, "logger=csv", "cache.mode=off", "test=false", f"trainer.max_epochs={EPOCHS}", *settings)
    with (run / "csv/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["step"]): int(row["epoch"]) for row in rows if row.get("train/loss")}
    rates = {int(row["step"]) for row in rows if any(value for key, value in row.items() if key.startswith("lr-"))}
    assert list(losses.values()) == wanted
    assert rates == set(losses)
