"""Checkpoints of earlier versions load: tests/checkpoints/ holds some, with the accuracy they had when written."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, compose_config

from thaw.data.mnist import load_mnist
from thaw.predict.predictor import load_predictor
from thaw.run import checkpoint as checkpoints
from thaw.run import migrations

FOLDER = ROOT / "tests" / "checkpoints"
FIRST_WEIGHTS = FOLDER / "digits_vit_1.safetensors"  # those that were bundled before
ACCURACY = {
    "linear_probe": 0.988,
    "linear_probe_1": 0.962,
    "gradual_ema": 0.136,
    "lora": 0.16,
    "lr_bank": 0.402,
}


@pytest.fixture
def config() -> dict[str, Any]:
    return torch.load(FOLDER / "linear_probe_1.ckpt", weights_only=True)["config"]


@pytest.mark.parametrize("name", ACCURACY)
def test_earlier_checkpoints_give_the_accuracy_that_they_had(name: str) -> None:
    test = load_mnist("MNIST", "data", "sample", None).test
    weights = str(FIRST_WEIGHTS) if name == "linear_probe_1" else None  # the others are of random ones
    predictor = load_predictor(str(FOLDER / f"{name}.ckpt"), weights=weights, accelerator="cpu")
    assert predictor.cfg.trainer.precision == "32-true"
    right = (predictor(test.images).argmax(1) == test.labels).double().mean()
    assert float(right) == pytest.approx(ACCURACY[name], abs=1e-9)


def without(config: dict[str, Any], *place: str) -> dict[str, Any]:
    config = copy.deepcopy(config)
    node = config
    for key in place[:-1]:
        node = node[key]
    del node[place[-1]]
    return config


MISSING = ["model.label_smoothing", "model.mix", "data.num_workers", "head.norm", "optim.lr_scaling", "cache.max_gb"]
MISSING += ["callbacks.preemption.run_dir", "mix", "average", "cache", "start_from"]


@pytest.mark.parametrize("place", MISSING)
def test_a_key_that_is_missing_is_that_of_today(config: dict[str, Any], place: str) -> None:
    """Each is what composing gives today."""
    today, changed = migrations.migrate(without(config, *place.split(".")), Path("run.ckpt"), "abc")
    expected: Any = compose_config("train", "run_dir=x", "overrides=''")
    for key in place.split("."):
        today, expected = today[key], expected._get_node(key)
    assert today == (expected._value() if hasattr(expected, "_value") else expected)
    assert (place in " ".join(changed)) == (place not in ("average", "start_from"))


def test_what_is_missing_is_said_once(config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = torch.load(FOLDER / "linear_probe.ckpt", weights_only=True)
    torch.save({**checkpoint, "config": without(config, "model", "label_smoothing")}, tmp_path / "old.ckpt")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            checkpoints.load_model(checkpoints.read_checkpoint(tmp_path / "old.ckpt"))
    (said,) = [record.getMessage() for record in caplog.records if "old.ckpt" in record.getMessage()]
    assert "model.label_smoothing=0.0" in said and checkpoint["git_commit"] in said


def test_the_tables(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A class and a key that were renamed, a key that went, and one whose default is not what the code did before."""
    model, optim = "thaw.classifier.Classifier", "thaw.optim.OptimizerRecipe"
    config["model"]["_target_"] = "thaw.models.net.Net"
    config["model"]["smoothing"] = config["model"].pop("label_smoothing")
    config["optim"]["nesterov"] = True
    del config["optim"]["lr_scaling"]
    monkeypatch.setitem(migrations.RENAMED, "thaw.models.net.Net", model)
    monkeypatch.setattr(migrations, "RENAMED_KEYS", migrations.RENAMED_KEYS | {(model, "smoothing"): "label_smoothing"})
    monkeypatch.setattr(migrations, "REMOVED_KEYS", {(optim, "nesterov"): True})
    monkeypatch.setitem(migrations.ADDED_KEYS, (optim, "lr_scaling"), "sqrt")
    migrated, changed = migrations.migrate(config, Path("run.ckpt"), "abc")
    assert migrated["model"]["_target_"] == model
    assert migrated["model"]["label_smoothing"] == 0.0 and "smoothing" not in migrated["model"]
    assert "nesterov" not in migrated["optim"] and migrated["optim"]["lr_scaling"] == "sqrt"
    assert (
        len([line for line in changed if line.startswith(("model.", "optim."))]) == 9
    )  # with task, distillation, add, schedule
    config["optim"]["nesterov"] = False
    with pytest.raises(ValueError, match=r"commit abc .* optim\.nesterov=True alone"):
        migrations.migrate(config, Path("run.ckpt"), "abc")


def test_a_later_version_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    """A key or a class that today's code does not know."""
    checkpoint = torch.load(FOLDER / "linear_probe.ckpt", weights_only=True)
    for changed, said in (
        ({**config, "model": {**config["model"], "new": 1}}, "unexpected keyword argument 'new'"),
        ({**config, "model": {**config["model"], "_target_": "thaw.models.new.Model"}}, "No module named"),
    ):
        torch.save({**checkpoint, "config": changed}, tmp_path / "new.ckpt")
        with pytest.raises(ValueError, match=said) as raised:
            checkpoints.load_model(checkpoints.read_checkpoint(tmp_path / "new.ckpt"))
        assert "new.ckpt" in str(raised.value) and checkpoint["git_commit"] in str(raised.value)


def test_a_run_with_swa_loads_without_it(config: dict[str, Any]) -> None:
    """Its weights are the average already."""
    config["average"] = {"_target_": "thaw.callbacks.weight_averaging.SWA", "start": 0.5}
    migrated, changed = migrations.migrate(config, Path("run.ckpt"), "abc")
    assert migrated["average"] is None
    assert "average=null, as thaw.callbacks.weight_averaging.SWA is gone" in changed
