"""Checkpoints are found, are safe, and rebuild the run from themselves alone."""

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL, compose_run
from omegaconf import OmegaConf

from thaw import checkpoint as checkpoints
from thaw.data.datamodule import MNISTDataModule
from thaw.evaluation.evaluate import evaluate

RUN = ["experiment=vit_linear_probe", *SMALL, "trainer.precision=32-true"]


@pytest.fixture
def run_dir(train: Callable[..., Path]) -> Path:
    return train(*RUN)


def test_evaluation_needs_the_file_alone(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same accuracy to the last digit, from another folder, without the configs or the backbone's own weights."""
    run_dir = train(*RUN, "model.self_contained=true")
    summary = json.loads((run_dir / "summary.json").read_text())
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes((run_dir / "checkpoints" / "best.ckpt").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("thaw.models.backbone.locate", lambda *_: pytest.fail("loaded weights"))
    checkpoint = checkpoints.read(moved)
    results = evaluate(checkpoint, OmegaConf.create(checkpoint["config"]), tmp_path / "out", loggers=[])
    for key in ("test/acc", "test/acc_low", "test/acc_high", "n_test", "data_source"):
        assert results[key] == summary[key]
    assert (tmp_path / "out" / "report" / "worst_digits.png").exists()


def test_accuracy_equals_a_plain_loop(run_dir: Path) -> None:
    checkpoint = checkpoints.read(run_dir / "checkpoints" / "best.ckpt")
    model = checkpoints.load_model(checkpoint)
    data = MNISTDataModule("MNIST", "data", "sample", None, None, 32, 100, 0, 0).load()
    with torch.no_grad():
        right = (model(data.test.images).argmax(1) == data.test.labels).sum().item()
    assert json.loads((run_dir / "summary.json").read_text())["test/acc"] == right / len(data.test.labels)


def test_a_pretraining_has_no_test(train: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = train("experiment=pretrain_simclr", *SMALL, "trainer.max_epochs=1", "trainer.limit_train_batches=1")
    checkpoint = checkpoints.read(run_dir / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match="SimCLR has no test"):
        evaluate(checkpoint, OmegaConf.create(checkpoint["config"]), tmp_path, loggers=[])


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (marker,))

    evil = tmp_path / "evil.ckpt"
    torch.save({"config": {}, "state_dict": {}, "x": Payload()}, evil)
    with pytest.raises(ValueError, match="pickled code"):
        checkpoints.read(evil)
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="pickled code"):
        checkpoints.read(tmp_path / "raw.ckpt")
    assert not marker.exists()


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("<html>")
    with pytest.raises(ValueError, match="is not a checkpoint: it starts with b'<htm'"):
        checkpoints.read(tmp_path / "text.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no config and state_dict"):
        checkpoints.read(tmp_path / "other.ckpt")


def test_find(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run below .* has a last\.ckpt"):
        checkpoints.find("last", tmp_path, "last.ckpt")
    for name in ("old", "new"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "last.ckpt").touch()
        time.sleep(0.02)
    new = tmp_path / "new" / "checkpoints" / "last.ckpt"
    assert checkpoints.find("last", tmp_path, "last.ckpt") == new
    assert checkpoints.find(str(tmp_path / "new"), tmp_path, "last.ckpt") == new
    assert checkpoints.find(str(new), tmp_path, "last.ckpt") == new
    with pytest.raises(ValueError, match=r"holds no checkpoints/best\.ckpt"):
        checkpoints.find(str(tmp_path / "new"), tmp_path, "best.ckpt")
    with pytest.raises(ValueError, match="neither `last`, a run folder nor"):
        checkpoints.find(str(tmp_path / "none.ckpt"), tmp_path, "last.ckpt")


def test_resumed_config_is_the_saved_one_plus_the_command_line(run_dir: Path, tmp_path: Path) -> None:
    typed = [f"resume={run_dir}", "trainer.max_epochs=7", "optim=sgd"]
    cfg = checkpoints.resumed_config(compose_run(tmp_path / "next", *typed), typed)
    assert cfg.name == "vit_linear_probe"
    assert cfg.data.train_size == 256  # saved
    assert cfg.trainer.max_epochs == 7  # typed
    assert cfg.model.optim.optimizer._target_ == "torch.optim.SGD"  # a typed group reaches what refers to it
    assert cfg.run_dir == str(tmp_path / "next")
    assert Path(cfg.resume).name == "last.ckpt"
    typed = [f"resume={run_dir}", "experiment=vit_finetune"]
    with pytest.raises(ValueError, match="is a run of experiment vit_linear_probe"):
        checkpoints.resumed_config(compose_run(tmp_path / "next", *typed), typed)
