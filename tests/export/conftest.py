"""Classifiers with random weights, as predictors, for the tests of this folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose_run
from hydra.utils import instantiate
from torch import nn

from thaw.data.images import Source
from thaw.data.mnist import class_names, load_mnist
from thaw.predict.predictor import Predictor
from thaw.run.config import plain, settle

TINY = ["backbone.arguments.depth=2", "+backbone.arguments.embed_dim=32", "+backbone.arguments.num_heads=2"]


@pytest.fixture(scope="session")
def source() -> Source:
    """The bundled sample with 60 digits in validation and test."""
    sample = load_mnist("MNIST", "nowhere", "sample", None)
    val, test = (split.take(slice(0, 480, 8)) for split in (sample.val, sample.test))
    return sample._replace(val=val, test=test)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Predictor]:
    """Builds what a command line means, with random weights in every tensor, and keeps it as a checkpoint."""

    def predictor(*overrides: str) -> Predictor:
        fixed = ["data.source=sample", "logger=none", "trainer.precision=32-true"]
        cfg = compose_run(tmp_path, *fixed, *overrides)
        settle(cfg)
        torch.manual_seed(0)
        model: Any = instantiate(cfg.model).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
            if name.startswith("head") and parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.3)  # probabilities that differ
        if hasattr(model.head, "chosen"):
            model.head.chosen.fill_(1)
        path = tmp_path / "checkpoints" / "best.ckpt"
        path.parent.mkdir(exist_ok=True)
        torch.save({"config": plain(cfg), "state_dict": model.state_dict(), "epoch": 1, "git_commit": "c0ffee"}, path)
        return Predictor(model, cfg, path, "c0ffee", class_names(cfg.data.dataset))

    return predictor


@pytest.fixture
def tiny_vit(build: Callable[..., Predictor]) -> Callable[..., Predictor]:
    """Builds a classifier on a ViT of two narrow blocks."""
    return lambda *overrides: build("experiment=vit_from_scratch", "augment=none", *TINY, *overrides)
