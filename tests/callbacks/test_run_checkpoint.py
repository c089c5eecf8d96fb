"""Checkpoints that are written now and then are those that would have been written at once."""

import io
import pickle
import re
import signal
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thaw.callbacks.run_checkpoint import PacedCheckpointIO
from thaw.run.values import check_types

LONG = 3600.0


def holding(value: float) -> dict[str, Any]:
    return {"state_dict": OrderedDict(w=torch.full((3,), value)), "n": [value]}


def value(path: Path) -> float:
    saved = torch.load(path, weights_only=True)
    assert saved["n"] == saved["state_dict"]["w"].unique().tolist()
    return saved["n"][0]


def test_what_is_held_back_does_not_change_with_training(tmp_path: Path) -> None:
    """As the checkpoints of a trainer, which refer to the weights and moments that the next step changes in place."""
    writer, path, weight = PacedCheckpointIO(LONG), tmp_path / "deep" / "last.ckpt", torch.zeros(3)
    moments = {"state": {0: {"exp_avg": weight, "step": torch.tensor(4.0)}}, "param_groups": [{"params": [0]}]}
    checkpoint = {"state_dict": OrderedDict(w=weight), "optimizer_states": [moments], "loops": {"done": [4]}}
    writer.save_checkpoint(checkpoint, path)
    assert not path.parent.exists()
    weight += 1
    moments["state"][0]["step"] += 1  # type: ignore[index]
    checkpoint["loops"]["done"].append(5)  # type: ignore[index, call-overload]
    writer.teardown()
    saved = torch.load(path, weights_only=True)
    assert saved.keys() == checkpoint.keys() and saved["loops"] == {"done": [4]}
    assert saved["state_dict"]["w"].tolist() == [0, 0, 0]
    (state,) = saved["optimizer_states"]
    assert state["state"][0]["exp_avg"].tolist() == [0, 0, 0] and state["state"][0]["step"] == 4
    path.unlink()
    writer.teardown()
    assert not path.exists()  # once


def test_a_file_is_written_once_in_so_many_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("thaw.callbacks.run_checkpoint.time.monotonic", lambda: now)
    writer, path, seen = PacedCheckpointIO(5.0), tmp_path / "last.ckpt", []
    for now in (101.0, 104.9, 105.0, 106.0, 109.9, 110.0, 111.0, 120.0):
        writer.save_checkpoint(holding(now), path)
        seen.append(value(path) if path.exists() else None)
    assert seen == [None, None, 105, 105, 105, 110, 110, 120]
    writer.teardown()
    assert value(path) == 120  # nothing older was left


def test_a_file_is_not_older_than_what_another_says_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """last.ckpt holds the best score: a run that is killed must not resume with that score and older weights."""
    now = 0.0
    monkeypatch.setattr("thaw.callbacks.run_checkpoint.time.monotonic", lambda: now)
    writer, best, last = PacedCheckpointIO(5.0), tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    for now in (6.0, 8.0):
        writer.save_checkpoint(holding(now), best)
    now = 9.0
    writer.save_checkpoint(holding(now), last)
    assert (value(best), value(last)) == (8, 9)


def test_nothing_is_held_back_for_0_seconds(tmp_path: Path) -> None:
    writer, path = PacedCheckpointIO(0), tmp_path / "last.ckpt"
    for number in (1.0, 2.0):
        writer.save_checkpoint(holding(number), path)
        assert value(path) == number


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_seconds_out_of_range(seconds: float) -> None:
    plugin = {"_target_": "thaw.callbacks.run_checkpoint.PacedCheckpointIO", "seconds": seconds}
    with pytest.raises(ValueError, match=rf"^trainer\.plugins\.0\.seconds={seconds} must be a number, 0 or more"):
        check_types(OmegaConf.create({"plugins": [plugin]}), "trainer.")


def test_whoever_loads_gets_the_newest(tmp_path: Path) -> None:
    writer, path = PacedCheckpointIO(LONG), tmp_path / "last.ckpt"
    for number in (1.0, 2.0):
        writer.save_checkpoint(holding(number), path)
        assert writer.load_checkpoint(path)["n"] == [number]


def test_what_is_removed_does_not_come_back(tmp_path: Path) -> None:
    writer = PacedCheckpointIO(LONG)
    for name in ("old.ckpt", "new.ckpt"):
        writer.save_checkpoint(holding(1.0), tmp_path / name)
    writer.remove_checkpoint(tmp_path / "old.ckpt")
    PacedCheckpointIO(0).save_checkpoint(holding(1.0), tmp_path / "older.ckpt")
    writer.remove_checkpoint(tmp_path / "older.ckpt")
    writer.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["new.ckpt"]


class Named(NamedTuple):
    n: int


UNREADABLE = {
    "betas": ({"optimizer_states": [{"param_groups": [{"betas": OmegaConf.create([0.9, 0.99])}]}]}, "ListConfig"),
    "numpy": ({"callbacks": {"Mine": {"best": np.float64(0.5)}}}, "float64"),
    "path": ({"hyper_parameters": {"folder": Path("x")}}, "PosixPath"),
    "key": ({"loops": {Path("x"): 1}}, "PosixPath"),
    "function": ({"lr_schedulers": [{"lr_lambdas": (lambda step: step,)}]}, "function"),
    "own class": ({"callbacks": {"Mine": [1, Named(2)]}}, "Named"),
}
PLACES = {
    "betas": "checkpoint['optimizer_states'][0]['param_groups'][0]['betas']",
    "numpy": "checkpoint['callbacks']['Mine']['best']",
    "path": "checkpoint['hyper_parameters']['folder']",
    "key": "a key of checkpoint['loops']",
    "function": "checkpoint['lr_schedulers'][0]['lr_lambdas'][0]",
    "own class": "checkpoint['callbacks']['Mine'][1]",
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("seconds", [0, LONG])
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, seconds: float, kind: str) -> None:
    """Not what is held back either, so that the run ends here and not after its last epoch."""
    path, (wrong, name) = tmp_path / "last.ckpt", UNREADABLE[kind]
    with pytest.raises(ValueError, match=f"^{re.escape(PLACES[kind])} is of type .*{name}, .*Allowed are .*Give plain"):
        PacedCheckpointIO(seconds).save_checkpoint(holding(1.0) | wrong, path)
    torch_says = io.BytesIO()
    try:
        torch.save(wrong, torch_says)
    except (pickle.PicklingError, AttributeError):
        return
    torch_says.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(torch_says, weights_only=True)
    assert not list(tmp_path.iterdir())


def test_all_that_torch_reads_again_is_written(tmp_path: Path) -> None:
    weights = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    saved = {
        "state_dict": weights.state_dict(),
        "parameter": weights[0].weight,
        "counts": Counter("aab"),
        "plain": [None, True, 1, 0.5, 1j, "\udcfc", b"x", (1, [2]), {3}, torch.Size([2]), torch.bfloat16],
        "device": torch.device("cpu"),
    }
    PacedCheckpointIO(0).save_checkpoint(saved, tmp_path / "last.ckpt")
    read = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert read["plain"] == saved["plain"] and read["counts"] == saved["counts"]


class Model(L.LightningModule):
    """Its weight counts steps, 2 an epoch."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.zeros(())), error

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.error and self.global_step == 5:
            raise self.error
        return -self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize(
    ("error", "raised", "steps"),
    [(None, None, 6), (RuntimeError("power cut"), RuntimeError, 4), (KeyboardInterrupt(), SystemExit, 4)],
    ids=["end", "error", "Ctrl+C"],
)
def test_a_run_leaves_its_last_checkpoint(
    tmp_path: Path, error: BaseException | None, raised: type[BaseException] | None, steps: int
) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    last = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", devices=1, callbacks=[last], plugins=[PacedCheckpointIO(LONG)], **quiet
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        if raised is None:
            trainer.fit(Model(error), DataLoader(torch.zeros(2)))  # type: ignore[arg-type]
        else:
            with pytest.raises(raised):
                trainer.fit(Model(error), DataLoader(torch.zeros(2)))  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGINT, on_interrupt)  # which Lightning ignores from the first Ctrl+C on
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == saved["state_dict"]["weight"] == steps
