"""Checkpoints are found, are safe, and rebuild the run from themselves alone."""

import io
import json
import os
import pickle
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL, compose_config, compose_run, needs, train_once
from omegaconf import OmegaConf
from small_models import mnist_data

from thaw.evaluation.evaluate import evaluate_checkpoint
from thaw.evaluation.probe_run import checkpoint_backbone
from thaw.models.pretrained import BUNDLED
from thaw.predict.predictor import load_predictor
from thaw.run.checkpoint import ago, find_checkpoint, load_model, origin, read_checkpoint
from thaw.run.resume import resumed_config

PROBE = ROOT / "tests" / "checkpoints" / "linear_probe.ckpt"
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, undrawn: None) -> Path:
    run = ["experiment=vit_linear_probe", *SMALL, "trainer.precision=32-true", "model.self_contained=true"]
    return train_once(tmp_path_factory.mktemp("trained"), *run)


def test_evaluation_needs_the_file_alone(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same accuracy to the last digit, from another folder, without the configs or the backbone's own weights."""
    summary = json.loads((run_dir / "summary.json").read_text())
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes((run_dir / "checkpoints" / "best.ckpt").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("thaw.models.backbone.locate", lambda *_: pytest.fail("loaded weights"))
    checkpoint = read_checkpoint(moved)
    results = evaluate_checkpoint(checkpoint, OmegaConf.create(checkpoint["config"]), tmp_path / "out", loggers=[])
    for key in ("test/acc", "test/acc_low", "test/acc_high", "n_test", "data_source"):
        assert results[key] == summary[key]
    assert (tmp_path / "out" / "report" / "worst_images.png").exists()


def test_accuracy_equals_a_plain_loop(run_dir: Path) -> None:
    checkpoint = read_checkpoint(run_dir / "checkpoints" / "best.ckpt")
    model = load_model(checkpoint)
    data = mnist_data().load()
    with torch.no_grad():
        right = (model(data.test.images).argmax(1) == data.test.labels).sum().item()
    assert json.loads((run_dir / "summary.json").read_text())["test/acc"] == right / len(data.test.labels)


@needs("pretrain")
def test_a_pretraining_has_no_test_but_a_backbone_to_probe(train: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = train("experiment=pretrain_simclr", *SMALL, "trainer.max_epochs=1", "trainer.limit_train_batches=1")
    checkpoint = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match="SimCLR has no test"):
        evaluate_checkpoint(checkpoint, OmegaConf.create(checkpoint["config"]), tmp_path, loggers=[])
    probed = checkpoint_backbone(compose_config("probe", f"ckpt={run_dir}"), []).state_dict()
    assert all(torch.equal(probed[name], checkpoint["state_dict"][f"backbone.{name}"]) for name in probed)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (marker,))

    evil = tmp_path / "evil.ckpt"
    torch.save({"config": {}, "state_dict": {}, "x": Payload()}, evil)
    with pytest.raises(ValueError, match="pickled code"):
        read_checkpoint(evil)
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="pickled code"):
        read_checkpoint(tmp_path / "raw.ckpt")
    assert not marker.exists()


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("<html>")
    with pytest.raises(ValueError, match="is not a checkpoint: it starts with b'<htm'"):
        read_checkpoint(tmp_path / "text.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no config and state_dict"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_damaged_files(tmp_path: Path) -> None:
    """Each is said for what it is, with the file beside it that is whole; torch's advice to run code is not given."""
    whole = PROBE.read_bytes()
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.ckpt").write_bytes(whole[:9000] + bytes(b ^ 255 for b in whole[9000:12000]) + whole[12000:])
    torch.save(torch.load(PROBE, weights_only=True) | {"x": {1, 2}, "y": Path("x")}, tmp_path / "objects.ckpt")
    wrong = {"empty": "is empty", "cut": "is cut off after", "flipped": "is damaged|pickled", "objects": "pathlib"}
    for beside in ("Give another checkpoint of the run", r"Beside it last\.ckpt is whole"):
        for name, said in wrong.items():
            with pytest.raises(ValueError, match=said) as raised:
                read_checkpoint(tmp_path / f"{name}.ckpt")
            assert "weights_only" not in str(raised.value) and "Errno" not in str(raised.value)
            if name in ("empty", "cut"):
                assert re.search(beside, str(raised.value))
        (tmp_path / "last.ckpt").write_bytes(whole)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    checkpoint = torch.load(PROBE, weights_only=True)
    checkpoint["state_dict"]["head.linear.bias"][3] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    with pytest.raises(
        ValueError, match=r"nan\.ckpt holds weights that are not finite \(1 of \d+ tensors, e\.g\. head\.linear"
    ):
        load_predictor(str(tmp_path / "nan.ckpt"))


@pytest.mark.parametrize("misfit", ["missing", "unknown", "another shape"])
def test_weights_that_do_not_fit_the_model(tmp_path: Path, misfit: str) -> None:
    checkpoint = torch.load(PROBE, weights_only=True) | {"git_commit": "abc"}
    state = checkpoint["state_dict"]
    bias = state.pop("head.linear.bias")
    state |= {"missing": {}, "unknown": {"head.linear.bias": bias, "head.new": bias}}.get(
        misfit, {"head.linear.bias": bias[:3]}
    )
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"cannot be rebuilt: .*head\.(linear\.bias|new).* Commit abc wrote it; check"):
        load_predictor(str(tmp_path / "other.ckpt"))


def test_a_backbone_that_has_no_weights_to_find(tmp_path: Path) -> None:
    checkpoint = torch.load(PROBE, weights_only=True)
    del checkpoint["frozen"]
    mlp = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "backbone" / "mlp.yaml"))
    checkpoint["config"]["backbone"] = mlp
    torch.save(checkpoint, tmp_path / "mlp.ckpt")
    with pytest.raises(ValueError, match=r"cannot be rebuilt: .*backbone\.model"):
        load_predictor(str(tmp_path / "mlp.ckpt"))


@pytest.mark.parametrize(
    ("trained", "precision"),
    [
        ({"accelerator": "gpu", "devices": "auto", "strategy": "ddp", "precision": "16-mixed"}, None),
        ({"accelerator": "mps", "precision": "32-true"}, None),
        ({"accelerator": "cpu", "devices": 2, "strategy": "ddp", "precision": "bf16-mixed"}, "bf16-mixed"),
        ({"accelerator": "auto", "devices": [0, 1], "num_nodes": 4, "precision": "32-true"}, "32-true"),
    ],
)
def test_training_settings_bind_nobody(tmp_path: Path, trained: dict[str, Any], precision: str | None) -> None:
    """A model is used on the device that is here; on one of the kind it was trained on in its own precision."""
    checkpoint = torch.load(PROBE, weights_only=True)
    checkpoint["config"]["trainer"] |= trained
    torch.save(checkpoint, tmp_path / "elsewhere.ckpt")
    predictor = load_predictor(str(tmp_path / "elsewhere.ckpt"))
    assert predictor(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, 10)
    if not torch.accelerator.is_available():
        assert predictor.fabric.device.type == "cpu"
        assert predictor.cfg.trainer.precision == precision or precision is None
        with pytest.raises(ValueError, match=r"use trainer\.accelerator=cpu"):
            load_predictor(str(tmp_path / "elsewhere.ckpt"), accelerator="gpu")


def test_frozen_weights_that_have_moved(tmp_path: Path) -> None:
    checkpoint = torch.load(PROBE, weights_only=True)
    checkpoint["config"]["backbone"]["weights"] = "/nowhere/backbone.safetensors"
    torch.save(checkpoint, tmp_path / "moved.ckpt")
    with pytest.raises(ValueError, match=r"/nowhere/backbone\.safetensors, which is not a file here.*weights=<file>"):
        load_predictor(str(tmp_path / "moved.ckpt"))
    assert load_predictor(str(tmp_path / "moved.ckpt"), weights=str(BUNDLED)).classes[9] == "9"


def test_a_pretraining_run_points_to_its_backbone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "backbone.safetensors").touch()
    command = re.escape(
        f"python train.py experiment=vit_finetune backbone.weights={os.path.relpath(tmp_path)}/backbone.safetensors"
    )
    with pytest.raises(ValueError, match=rf"is a pretraining run.*: {command}$"):
        load_predictor(str(tmp_path))


def test_a_checkpoint_tells_no_folder_and_moves_with_its_run(
    train: Callable[..., Path], tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the user's home nor the run's folder is in the file; after a move it resumes with its best so far."""
    monkeypatch.setenv("HOME", str(tmp_path))
    run_dir = train(*tiny_run, "trainer.max_epochs=2", "optim.lr=1e-12", f"+note='x={tmp_path}/y'")
    for name in ("best", "last"):
        raw = (run_dir / "checkpoints" / f"{name}.ckpt").read_bytes()
        with zipfile.ZipFile(io.BytesIO(raw)) as file:
            assert not any(str(tmp_path).encode() in file.read(part) for part in file.namelist())
    moved = run_dir.rename(tmp_path / "elsewhere")
    best = read_checkpoint(moved / "checkpoints" / "best.ckpt")
    assert best["config"]["run_dir"] == str(moved)
    assert best["config"]["backbone"]["weights"] == str(tmp_path / "tiny.safetensors")  # ~ in the file
    again = train(f"resume={moved}", "trainer.max_epochs=3", name="again")
    steps = [read_checkpoint(again / "checkpoints" / f"{name}.ckpt")["global_step"] for name in ("best", "last")]
    assert steps == [4, 12]


def test_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`last` is the newest run for all commands, and never a job of a sweep."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"`last` means the newest run in logs/runs, but none there has a last\.ckpt"):
        find_checkpoint("last", "last.ckpt")
    files = [
        tmp_path / "logs" / folder / "checkpoints" / "last.ckpt" for folder in ("runs/a/1", "runs/b/2", "sweeps/b/3")
    ]
    for age, file in enumerate(reversed(files)):
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (time.time() - age, time.time() - age))
    assert find_checkpoint("last", "last.ckpt") == files[1]
    assert find_checkpoint("last", "last.ckpt", "a") == files[0]
    for wanted in ("logs/sweeps/b/3", str(files[2])):
        assert find_checkpoint(wanted, "last.ckpt") == files[2]
    with pytest.raises(ValueError, match=r"holds no checkpoints/best\.ckpt"):
        find_checkpoint("logs/runs/a/1", "best.ckpt")
    with pytest.raises(ValueError, match="neither `last`, a run folder nor"):
        find_checkpoint("none.ckpt", "last.ckpt")


def test_which_checkpoint_is_used(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its file, which can be copied whole, its run, its age and its validation accuracy."""
    best = run_dir / "checkpoints" / "best.ckpt"
    accuracy = f"best validation accuracy {json.loads((run_dir / 'summary.json').read_text())['val/acc']:.2%}"
    expected = f"checkpoint: {os.path.relpath(best)} (vit_linear_probe, less than a minute ago, {accuracy})\n"
    load_predictor(str(run_dir))
    assert capsys.readouterr().out == expected
    load_predictor(str(run_dir), stderr=True)
    assert capsys.readouterr().err == expected
    probed = compose_config("probe", "probe=knn", f"ckpt={run_dir}")
    checkpoint_backbone(probed, [])
    assert capsys.readouterr().out == expected

    old = read_checkpoint(best) | {"callbacks": {}}
    old["config"]["overrides"] = "optim.lr=0.01 " + "x" * 200
    os.utime(best, (time.time() - 130, time.time() - 130))
    assert origin(old) == f"checkpoint: {os.path.relpath(best)} (vit_linear_probe optim.lr=0.01 ..., 2 minutes ago)"
    del old["config"]["overrides"]
    assert origin(old) == f"checkpoint: {os.path.relpath(best)} (vit_linear_probe, 2 minutes ago)"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "less than a minute ago"), (3600, "1 hour ago"), (3e5, "3 days ago"), (-5, "less than")]
)
def test_ages(seconds: float, said: str) -> None:
    assert said in ago(seconds)


def test_resumed_config_is_the_saved_one_plus_the_command_line(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = [f"resume={run_dir}", "trainer.max_epochs=7", "optim=sgd"]
    cfg = resumed_config(compose_run(tmp_path / "next", *typed), typed)
    assert cfg.name == "vit_linear_probe"
    assert cfg.data.train_size == 256  # saved
    assert cfg.trainer.max_epochs == 7  # typed
    assert cfg.model.optim.optimizer._target_ == "torch.optim.SGD"  # a typed group reaches what refers to it
    assert cfg.run_dir == str(tmp_path / "next")
    assert Path(cfg.resume).name == "last.ckpt"
    runs = tmp_path / "logs" / "runs"
    shutil.copytree(run_dir / "checkpoints", runs / cfg.name / "1" / "checkpoints")
    (runs / "other" / "2" / "checkpoints").mkdir(parents=True)
    (runs / "other" / "2" / "checkpoints" / "last.ckpt").touch()  # the newest
    typed = ["resume=last", f"experiment={cfg.name}"]
    monkeypatch.chdir(tmp_path)
    assert resumed_config(compose_run(tmp_path / "next", *typed), typed).resume.startswith(f"{runs / cfg.name}/")
    own = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    own["config"]["callbacks"]["own"] = {"_target_": "own_task.Focal"}
    torch.save(own, tmp_path / "own.ckpt")
    typed = [f"resume={tmp_path}/own.ckpt", "allow=[own_task]"]
    assert resumed_config(compose_run(tmp_path / "next", *typed), typed).callbacks.own
    with pytest.raises(ValueError, match=r"own_task.* is refused"):
        resumed_config(compose_run(tmp_path / "next", *typed[:1]), typed[:1])
    cfg = compose_run(tmp_path / "next", f"resume={run_dir}", "freeze=full")
    for typed, refused in (
        (["experiment=vit_finetune"], "is a run of experiment vit_linear_probe .* leave out experiment= and debug="),
        (["debug=fast"], "is a run of experiment vit_linear_probe"),
        (["freeze=full", "optim.lr=1"], "was trained under another freezing policy than freeze=full says"),
    ):
        with pytest.raises(ValueError, match=refused):
            resumed_config(OmegaConf.merge(cfg, {"name": "vit_finetune"}), typed)  # type: ignore[arg-type]
