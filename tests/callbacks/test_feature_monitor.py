"""What a pretraining run says of its features: neighbours against scikit-learn, collapse, pictures."""

import csv
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from thaw.callbacks.feature_monitor import effective_rank, feature_std, knn_accuracy
from thaw.run.values import check_types

Train = Callable[..., Path]
MONITOR = "callbacks.feature_monitor"
SMALL = [
    "trainer.max_epochs=2",
    "trainer.check_val_every_n_epoch=1",
    "data.batch_size=16",
    "trainer.limit_val_batches=1",
]


@pytest.fixture
def pretrain(train: Train, tiny_run: list[str]) -> Callable[..., Path]:
    """A short SimCLR or other run of a tiny ViT on 64 digits."""

    if not (ROOT / "configs" / "experiment" / "pretrain_mae.yaml").is_file():
        pytest.skip("thaw.pretrain is removed")

    def run(name: str, *overrides: str) -> Path:
        return train(f"experiment=pretrain_{name}", *tiny_run, *SMALL, "logger=csv", *overrides)

    return run


def logged(run_dir: Path) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {}
    for row in csv.DictReader((run_dir / "csv" / "metrics.csv").open()):
        for name, value in row.items():
            if value:
                columns.setdefault(name, []).append(float(value))
    return columns


@pytest.mark.parametrize("number", [9, 60])
def test_knn_accuracy_equals_scikit_learns(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thaw.callbacks.feature_monitor.EVAL_BATCH", 7)  # images at a time
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 3
    features = torch.randn(number, 8, generator=generator) + torch.eye(8)[labels]
    k, right = min(20, number - 1), 0
    for i in range(number):
        others = [j for j in range(number) if j != i]
        neighbours = KNeighborsClassifier(k, metric="cosine").fit(features[others], labels[others])
        right += int(neighbours.predict(features[[i]])[0] == labels[i])
    assert knn_accuracy(features, labels).item() == pytest.approx(right / number)


def test_it_is_logged_and_drawn_while_a_run_goes_on(pretrain: Callable[..., Path]) -> None:
    run_dir = pretrain("mae", f"{MONITOR}.every_n_steps=2", "trainer.log_every_n_steps=1")
    columns = logged(run_dir)
    assert len(columns["val/knn_acc"]) == len(columns["val/loss"]) == len(columns["val/feature_std"]) == 2
    assert len(set(columns["train/feature_std"])) == len(set(columns["train/effective_rank"])) == 4  # of 8 steps
    assert all(0 < value <= 1.2 for value in columns["val/feature_std"] + columns["train/feature_std"])
    assert all(1 < value <= 32 for value in columns["val/effective_rank"])
    for epoch in (1, 2):
        with Image.open(run_dir / "report" / f"epoch_000{epoch}.png") as picture:
            assert picture.width > 600


def test_watching_changes_nothing(pretrain: Callable[..., Path], tmp_path: Path) -> None:
    watched = pretrain("simclr", f"{MONITOR}.every_n_steps=1")
    weights = torch.load(watched / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    watched.rename(tmp_path / "watched")
    alone = pretrain("simclr", f"{MONITOR}=null")
    others = torch.load(alone / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_collapse_is_warned_of_once_and_early(pretrain: Callable[..., Path]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pretrain("simclr", f"{MONITOR}.every_n_steps=1", f"{MONITOR}.min_std=2")
    told = [str(warning.message) for warning in caught if "collapsed" in str(warning.message)]
    assert len(told) == 1
    assert "at step 1 their feature_std is" in told[0] and "of 32" in told[0] and "lower optim.lr" in told[0]


@pytest.mark.parametrize(("name", "value", "least"), [("every_n_steps", 0, 1), ("images", 1, 2)])
def test_settings_out_of_range(name: str, value: int, least: int) -> None:
    block = OmegaConf.create({"_target_": "thaw.callbacks.feature_monitor.FeatureMonitor", name: value})
    with pytest.raises(ValueError, match=rf"^feature_monitor\.{name}={value} must be a whole number, {least} or more"):
        check_types(block, "feature_monitor.")


def test_features_in_all_directions() -> None:
    features = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(0))
    assert feature_std(features) == pytest.approx(1, abs=0.01)
    assert effective_rank(features) == pytest.approx(32, rel=0.01)
    assert feature_std(7 * features) == pytest.approx(feature_std(features))  # on the sphere
    assert effective_rank(features + 100) == pytest.approx(effective_rank(features), rel=1e-3)  # centred


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_constant_features(value: float) -> None:
    features = torch.full((100, 16), value)
    assert feature_std(features) == pytest.approx(0, abs=1e-4)
    assert effective_rank(features) == 0


def test_features_on_a_line_and_in_a_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q.T  # (2, 16)
    line = torch.randn(1000, 1, generator=generator) * directions[:1]
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    corners = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]) @ directions
    assert effective_rank(corners) == pytest.approx(2, rel=1e-5)


def test_effective_rank_equals_roy_and_vetterlis_formula() -> None:
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 9)
    values = np.linalg.svd(features.numpy() - features.numpy().mean(axis=0), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(features) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
