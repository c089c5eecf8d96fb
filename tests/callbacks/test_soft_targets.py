"""Soft targets against what predict.py says of the same images; the cache, mixing, resuming, processes and errors."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from omegaconf import OmegaConf
from own_task import MultiLabel
from small_models import mnist_data
from torch import Tensor

from thaw.callbacks import soft_targets
from thaw.callbacks.soft_targets import SoftTargets, find_teachers
from thaw.classifier import Classifier
from thaw.data.loader import Batch
from thaw.data.mix import Mix
from thaw.freezing import cache as feature_cache
from thaw.freezing.cache import FeatureCache
from thaw.predict.predictor import load_predictor
from thaw.run.errors import UserError
from thaw.run.places import reads
from thaw.task import Distillation

Train = Callable[..., Path]
TEACHERS = [str(ROOT / "tests" / "checkpoints" / f"{name}.ckpt") for name in ("gradual_ema", "lr_bank")]
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
T2 = Distillation(temperature=2.0, share=0.7)


def targets_of(folder: Path, teachers: list[str], size: int = 64, mode: Any = "auto") -> Tensor:
    """(N, K) that a run's batches would have, as another process would get them."""
    feature_cache.VERIFIED.clear()
    trainer: Any = L.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **QUIET)
    trainer.datamodule = mnist_data(train_size=size)
    callback = SoftTargets(teachers, FeatureCache(mode, str(folder), 1.0), [])
    callback.on_train_start(trainer, SimpleNamespace(distillation=T2))
    return callback.dataset.soft_targets


def mean_of_predictions(teachers: list[str], size: int = 64) -> Tensor:
    images = mnist_data(train_size=size).load().train.images
    return torch.stack([load_predictor(teacher, accelerator="cpu")(images) for teacher in teachers]).mean(dim=0)


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_they_are_the_mean_of_the_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    state = torch.get_rng_state()
    got = targets_of(tmp_path, TEACHERS, mode=mode)
    assert torch.equal(torch.get_rng_state(), state)
    mean = mean_of_predictions(TEACHERS)
    by_hand = mean.double().sqrt() / mean.double().sqrt().sum(dim=1, keepdim=True)  # at temperature 2
    torch.testing.assert_close(got.double(), by_hand, rtol=1e-5, atol=1e-6)
    right = (mean.argmax(dim=1) == mnist_data(train_size=64).load().train.labels).double().mean()
    assert f"distill: 2 teachers, {float(right):.2%} of the training labels" in capsys.readouterr().out


def test_they_are_computed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again for other teachers or images."""
    first = targets_of(tmp_path, TEACHERS)
    asked: list[str] = []
    compute_all = feature_cache.compute_all
    monkeypatch.setattr(feature_cache, "compute_all", lambda *given: (asked.append(given[1]), compute_all(*given))[1])
    assert torch.equal(targets_of(tmp_path, TEACHERS[::-1]), first) and not asked
    assert "cached soft targets: 64 train images, 0 MB in" in capsys.readouterr().out
    assert not torch.equal(targets_of(tmp_path, TEACHERS[:1]), first) and len(asked) == 1
    assert len(targets_of(tmp_path, TEACHERS, size=32)) == 32 and asked == ["soft targets of train images"] * 2


@pytest.mark.parametrize("mix", [None, "mixup", "cutmix"])
def test_a_step(classifier: Callable[..., Classifier], batch: Batch, mix: str | None) -> None:
    """Labels and soft targets are mixed in the same shares, also where the frozen layers are not cached."""
    net = classifier("full").eval()
    if mix:
        net.mix = Mix(**{"mixup": None, "cutmix": None, mix: 1.0}, probability=1)
    soft = torch.rand(16, 10, generator=torch.Generator().manual_seed(2)).softmax(dim=1)
    images, both = net.preprocess(batch.images), [F.one_hot(batch.labels, 10).float(), soft]
    if mix:
        torch.manual_seed(3)
        images, labels = net.mix(images, batch.labels, 10)
        lam = labels[0, batch.labels[0]]  # its neighbour, image 15, has another label
        assert 0.01 < lam < 0.99
        both = [lam * each + (1 - lam) * each.roll(1, 0) for each in both]
    logits = net.head(net.backbone(images))
    logs, student = logits.log_softmax(dim=1), (logits / 2).log_softmax(dim=1)
    expected = 0.3 * -(both[0] * logs).sum(1).mean() + 0.7 * 4 * (both[1] * (both[1].log() - student)).sum(1).mean()
    torch.manual_seed(3)
    torch.testing.assert_close(net.training_step(batch._replace(soft_targets=soft), 0), expected)
    if not mix:
        features = net.backbone.prefix(net.preprocess(batch.images), 2)
        net.cut = 2
        cached = batch._replace(features=features, soft_targets=soft)
        torch.testing.assert_close(net.training_step(cached, 0), expected)


class Seen(L.Callback):
    """Compares the soft targets of every batch with `wanted` (N, K)."""

    wanted: Tensor
    batches = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        assert batch.soft_targets is not None
        torch.testing.assert_close(batch.soft_targets, Seen.wanted[batch.indices])
        Seen.batches += 1


@pytest.mark.usefixtures("undrawn")
def test_a_run(train: Train, tiny_run: list[str], tmp_path: Path) -> None:
    """Its batches have them in their own order; its record names the teachers by their files."""
    Seen.wanted, Seen.batches = Distillation(1.0, 0.5).soften(mean_of_predictions(TEACHERS)), 0
    record = f"+callbacks.seen={{_target_:{__name__}.Seen}}"
    short = ["trainer.max_epochs=1", "freeze=full", "test=false", record]
    run_dir = train(*tiny_run, *short, f"distill=[{','.join(TEACHERS)}]", "mix=both")
    assert Seen.batches == 4
    assert f"distill:\n- {TEACHERS[0]}\n- {TEACHERS[1]}\n" in (run_dir / "config.yaml").read_text()


@pytest.mark.long
@pytest.mark.usefixtures("undrawn")
def test_a_resumed_run(train: Train, tiny_run: list[str], tmp_path: Path) -> None:
    """Equals one that was not interrupted, also with another cache; to the last bit."""
    often = ["trainer.val_check_interval=0.5", "callbacks.last_checkpoint.filename='{step}'", "freeze=full", "mix=both"]
    often += ["callbacks.last_checkpoint.save_top_k=-1", "trainer.plugins.0.seconds=0", "augment=affine", "test=false"]
    whole = train(*tiny_run, *often, "trainer.max_epochs=2", f"distill={TEACHERS[0]}", name="whole")
    for path in (tmp_path / "cache").glob("*"):
        path.unlink()
    resumed = train(f"resume='{whole}/checkpoints/step=2.ckpt'", name="resumed")
    one, other = (
        torch.load(run / "checkpoints" / "step=8.ckpt", weights_only=True)["state_dict"] for run in (whole, resumed)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
@pytest.mark.usefixtures("undrawn")
def test_two_processes(train: Train, tiny_run: list[str]) -> None:
    """Train what one process trains on the same global batches."""
    run = [*tiny_run, "optim=sgd", "optim.optimizer.fused=false", "optim.lr=0.05", "trainer.max_epochs=2"]
    run += ["freeze=full", "test=false", f"distill=[{','.join(TEACHERS)}]"]
    runs = [train(*run, name="one"), train(*run, "trainer=ddp_cpu", "data.batch_size=8", name="two")]
    one, two = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for path in runs)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_teachers_that_are_not_there(tmp_path: Path) -> None:
    assert find_teachers(None) is None and find_teachers(TEACHERS[0]) == TEACHERS[:1]
    with pytest.raises(UserError, match="'nowhere' is neither `last`, a run folder nor a checkpoint file"):
        find_teachers(["nowhere"])
    with pytest.raises(UserError, match=r"distill names .*lr_bank\.ckpt twice; give each teacher once"):
        find_teachers([TEACHERS[1], TEACHERS[0], TEACHERS[1]])
    (tmp_path / "backbone.safetensors").touch()
    with pytest.raises(UserError, match="is a pretraining run, whose model has no classes"):
        find_teachers(str(tmp_path))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"classes": [*"abcdefghij"]}, r"distill=.*was trained on 10 classes, .* the data lacks a, b, c, d, e"),
        ({"shape": [1, 32, 32]}, r"was trained on images of \(1, 32, 32\) .* are \(1, 28, 28\); give a teacher of"),
    ],
)
def test_a_teacher_of_other_data(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    checkpoint = torch.load(TEACHERS[0], weights_only=True)
    record = {"name": "MNIST", "origin": "", "classes": [*"0123456789"], "shape": [1, 28, 28], "reader": "digit"}
    torch.save({**checkpoint, "data": record | changed}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=said):
        targets_of(tmp_path, [str(tmp_path / "other.ckpt")])


def test_another_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classifier: Callable[..., Classifier]) -> None:
    """Of several labels an image, of a teacher or the student; and what is no classifier with one head."""
    callback, trainer = SoftTargets(TEACHERS, FeatureCache("off", "nowhere", 1.0), []), SimpleNamespace()
    net: Any = classifier()
    callback.setup(trainer, net, "fit")  # type: ignore[arg-type]
    net.task = MultiLabel(10, 0.0)
    with pytest.raises(UserError, match=r"distill= is for one class an image, .* MultiLabel"):
        callback.setup(trainer, net, "fit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="distill= trains a classifier with one head, and this run trains a Linear"):
        callback.setup(trainer, torch.nn.Linear(1, 1), "fit")  # type: ignore[arg-type]
    monkeypatch.setattr(soft_targets, "load_model", lambda checkpoint: net)
    with pytest.raises(UserError, match=r"distill=.*gradual_ema\.ckpt is for one class an image"):
        targets_of(tmp_path, TEACHERS)
    monkeypatch.setattr(soft_targets, "load_model", lambda checkpoint: torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="has no classes"):
        targets_of(tmp_path, TEACHERS)


def test_a_resumed_run_says_which_teachers_its_file_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cfg = OmegaConf.create({"distill": [TEACHERS[0], "/elsewhere/best.ckpt"], "run_dir": "runs"})
    assert reads(cfg, ["distill"], []) == [f"distill={[TEACHERS[0], '/elsewhere/best.ckpt']}"]
    assert not reads(cfg, ["distill"], ["distill"])
    cfg.distill = TEACHERS[:1]  # in the working folder
    assert not reads(cfg, ["distill"], [])


def test_more_than_the_cache_may_hold(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill= needs .* raise cache\.max_gb=1e-09"):
        trainer: Any = L.Trainer(accelerator="cpu", devices=1, **QUIET)
        trainer.datamodule = mnist_data(train_size=64)
        SoftTargets(TEACHERS, FeatureCache("auto", str(tmp_path), 1e-9), []).on_train_start(trainer, None)
