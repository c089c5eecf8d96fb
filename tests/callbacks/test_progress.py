"""Epochs as lines, the bar below them, and losses that are logged in every epoch, whatever its number of steps."""

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch.utils.data import DataLoader

from thaw.callbacks import progress
from thaw.callbacks.progress import RunProgress, epoch_line
from thaw.classifier import Classifier
from thaw.data.loader import Batch

Build = Callable[..., Classifier]
EPOCHS = 3


def trainer(**changes: Any) -> Any:
    logged = {"train/loss": 0.05194, "val/loss": 12.3456, "val/acc": 0.988, "val/acc_a": 0.5, "v_num": 3.0}
    facts = {"callback_metrics": logged, "progress_bar_metrics": {"train/loss": 0.05194, "val/acc": 0.988}}
    facts |= {"current_epoch": 2, "max_epochs": 10, "max_steps": -1, "global_step": 12}
    return SimpleNamespace(**facts | changes)


@pytest.mark.parametrize(
    ("changes", "validated", "width", "line"),
    [
        ({}, True, 80, "epoch 3/10   train/loss 0.0519  val/loss  12.35  val/acc 98.80%  1.2 s"),
        ({}, False, 80, "epoch 3/10   train/loss 0.0519  1.2 s"),  # older values are not repeated
        ({}, True, 60, "epoch 3/10   train/loss 0.0519  val/loss  12.35  1.2 s"),
        ({"current_epoch": 9}, False, 80, "epoch 10/10  train/loss 0.0519  1.2 s"),
        ({"max_epochs": -1, "max_steps": 5000}, False, 80, "epoch 3, step 12/5,000  train/loss 0.0519  1.2 s"),
        (
            {"callback_metrics": {"val/fid": 312.1234, "train/x_loss": 1.0}, "progress_bar_metrics": {"val/fid", "x"}},
            *(True, 80, "epoch 3/10   val/fid  312.1  1.2 s"),
        ),
    ],
)
def test_line_of_an_epoch(changes: dict[str, Any], validated: bool, width: int, line: str) -> None:
    if isinstance(changes.get("progress_bar_metrics"), set):
        changes = changes | {"progress_bar_metrics": dict.fromkeys(changes["progress_bar_metrics"])}
    assert epoch_line(trainer(**changes), validated, 1.23, width) == line


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Collects what a terminal of 80 columns gets, each update of the bar included."""
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    shown = Console(file=file, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("thaw.run.console.stream_console", lambda _: shown)
    monkeypatch.setattr("thaw.run.console.FRAME_SECONDS", 0.0)
    yield file
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") > 0  # the cursor is back


def run_with_bar(build: Build, batch: Batch, refresh_rate: int, **settings: Any) -> None:
    class Talker(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            print("a line of a user")

    limits = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    made = L.Trainer(accelerator="cpu", callbacks=[RunProgress(refresh_rate), Talker()], **{**limits, **settings})
    four, three, two = (DataLoader([batch] * count, batch_size=None) for count in (4, 3, 2))  # type: ignore[arg-type]
    made.fit(build("full"), four, three)
    made.validate(made.lightning_module, two, verbose=False)


def test_bar_of_the_whole_run(terminal: io.StringIO, classifier: Build, batch: Batch) -> None:
    run_with_bar(classifier, batch, refresh_rate=2)
    frames = [re.sub(r"\x1b\[.*?[A-Za-z]", "", frame) for frame in re.split("[\r\n]+", terminal.getvalue())]
    bars = [frame for frame in frames if "\u2501" in frame]
    assert all(len(frame) <= 80 for frame in frames)
    assert {re.sub("[\u2501\u2578\u257a ]+", " ", bar).split(", at most")[0] for bar in bars} >= {
        *("epoch 1/2 2/4 batches", "epoch 1/2 4/4 batches", "epoch 1/2, validating 2/3 batches"),
        *("epoch 2/2 2/4 batches", "epoch 2/2, validating 2/3 batches", "validating 2/2 batches"),
    }
    assert sum(re.match("epoch 1/2  train/loss .* val/acc .* s$", frame) is not None for frame in frames) == 1
    assert frames.count("a line of a user") == 8


def test_no_bar_where_none_is_wanted(
    classifier: Build, batch: Batch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file an epoch has its line, and a long one a line every now and then."""
    run_with_bar(classifier, batch, refresh_rate=2)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(said) == 2
    monkeypatch.setattr(progress, "FILE_SECONDS", 0.0)
    run_with_bar(classifier, batch, refresh_rate=4, limit_val_batches=0)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(said) == 4 and re.fullmatch("epoch 1/2  4/4 batches, at most .* left", said[0])


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


@pytest.mark.parametrize("settings", [{}, {"max_steps": 5}, {"val_check_interval": 2}, {"accumulate_grad_batches": 2}])
def test_a_loss_is_logged_where_it_is_read(
    settings: dict, classifier: Build, batch: Batch, fit: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What loggers, and callbacks at validations and ends of epochs, see is what logging in every step gives."""

    class Seen(L.Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

        on_train_epoch_end = on_validation_start

    def losses(name: str) -> tuple[list[float], str]:
        seen, log = Seen(), CSVLogger(tmp_path, name=name)
        batches = [Batch(*(part[place::4] for part in batch[:3])) for place in range(4)]
        fit(classifier("full"), batches, 2, callbacks=[seen], logger=log, log_every_n_steps=3, **settings)
        return seen.losses, Path(log.log_dir, "metrics.csv").read_text()

    few = losses("few")
    monkeypatch.setattr("thaw.classifier.is_logged", lambda trainer: True)
    assert len(few[0]) > 2 and few == losses("all")
