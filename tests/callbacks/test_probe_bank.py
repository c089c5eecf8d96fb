"""Linear probes of a sweep that take their steps from a bank, against the same sweep of runs alone."""

import csv
import json
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from lightning import Callback
from omegaconf import OmegaConf

from thaw.callbacks.probe_bank import BANKS, ProbeBank
from thaw.evaluation.evaluate import evaluate_checkpoint
from thaw.run.checkpoint import read_checkpoint

PROBES = ["experiment=vit_linear_probe", *SMALL, "trainer.precision=32-true", "test=false", "cache.mode=memory"]
RATES = ["optim.lr=1e-2,1e38", "optim.weight_decay=0.0,0.5"]  # the last rate diverges


class OwnStep(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        pass


def read_runs(folder: Path) -> dict[tuple[float, float], dict[str, Any]]:
    """By learning rate and weight decay: the last checkpoint, the logged rows, and why the run failed."""
    runs = {}
    for config in folder.glob("*/config.yaml"):
        optim, run, facts = OmegaConf.load(config).optim, config.parent, {}
        if (run / "failure.json").is_file():
            facts["failure"] = json.loads((run / "failure.json").read_text())["reason"].split(" Likely")[0]
        else:
            facts["checkpoint"] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
            with next(run.glob("csv/**/metrics.csv")).open() as file:
                facts["rows"] = list(csv.DictReader(file))
        runs[optim.lr, optim.weight_decay] = facts
    return runs


def test_probes_equal_runs_alone(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Weights, the optimizer's state, counters, rates and logged values; also where clipping is at work."""
    own = [*PROBES, *RATES, "trainer.max_epochs=3", "trainer.log_every_n_steps=3", "trainer.gradient_clip_val=0.5"]
    own += ["callbacks.early_stopping=null", "model.label_smoothing=0.1"]
    command("train.py", "-m", *own, f"hydra.sweep.dir={tmp_path / 'bank'}")
    assert "the steps of all 4 linear probes are computed together" in capsys.readouterr().out
    command("train.py", "-m", *own, "callbacks.shared_steps=null", f"hydra.sweep.dir={tmp_path / 'alone'}")
    assert "computed together" not in capsys.readouterr().out
    together, alone = read_runs(tmp_path / "bank"), read_runs(tmp_path / "alone")
    assert together.keys() == alone.keys() and len(alone) == 4
    for setting, expected in alone.items():
        found = together[setting]
        assert found.keys() == expected.keys(), setting
        if "failure" in expected:
            assert found == expected
            continue
        before, now = expected["checkpoint"], found["checkpoint"]
        for key in ("epoch", "global_step", "loops"):
            assert now[key] == before[key], key
        torch.testing.assert_close(now["state_dict"], before["state_dict"], rtol=1e-3, atol=1e-5)
        (state,), (wanted) = now["optimizer_states"], before["optimizer_states"][0]
        torch.testing.assert_close(state["state"], wanted["state"], rtol=2e-3, atol=1e-6)
        assert state["param_groups"] == wanted["param_groups"]
        assert now["lr_schedulers"] == before["lr_schedulers"]
        compare_rows(found["rows"], expected["rows"])


def compare_rows(found: list[dict[str, str]], expected: list[dict[str, str]]) -> None:
    """The same columns but for the speed, which is of no run alone, and the same values up to rounding."""
    assert set(expected[0]) - set(found[0]) == {"train/images_per_second"}
    for row, wanted in zip(found, expected, strict=True):
        for key, value in row.items():
            assert bool(value) == bool(wanted[key]), key
            if value:
                assert float(value) == pytest.approx(float(wanted[key]), rel=5e-3, abs=1e-6), key


@pytest.mark.parametrize(
    "setting",
    [
        "head=mlp",
        "+callbacks.own._target_=test_probe_bank.OwnStep",
        *(
            pytest.param(each, marks=pytest.mark.long)
            for each in ("head.norm=batch", "optim=sgd", "average=ema", "freeze=last_blocks", "cache.mode=off")
        ),
    ],
)
def test_other_runs_stay_alone(
    setting: str, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(ProbeBank, "train_epoch")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    own = [*PROBES, setting, "optim.lr=1e-3,1e-2", "trainer.max_epochs=1", f"hydra.sweep.dir={tmp_path}"]
    assert command("train.py", "-m", *own, "allow=[test_probe_bank]") == 0
    assert len(BANKS[str(tmp_path / next(tmp_path.glob("*/summary.json")).parent.name)].settings) == 2


def test_the_winner_is_tested_on_features_of_the_same_cache(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("thaw.freezing.cache.VERIFIED", {})  # what earlier tests have at hand
    folders = [f"cache.dir={tmp_path / 'cache'}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    own = [*PROBES, *folders, "test=true", "cache.mode=disk", "optim.lr=1e-3,1e-2", "trainer.max_epochs=1"]
    assert command("train.py", "-m", *own) == 0
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3  # of each split
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("sweep/*/summary.json")]
    winner = max(summaries, key=itemgetter("val/acc"))
    checkpoint = read_checkpoint(Path(winner["run_dir"]) / "checkpoints" / "best.ckpt", [])
    pixels = evaluate_checkpoint(checkpoint, OmegaConf.create(checkpoint["config"]), tmp_path / "pixels", [])
    assert (pixels["val/acc"], pixels["test/acc"]) == (winner["val/acc"], winner["test/acc"])
