"""Classifiers with random weights, as predictors, for the tests of this folder."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import compose_run
from hydra.utils import instantiate
from torch import Tensor, nn

from thaw.data.images import Images, Source
from thaw.data.mnist import class_names, load_mnist
from thaw.export.export_file import export_file
from thaw.freezing.added import added_names
from thaw.predict.predictor import Predictor
from thaw.run.config import plain, settle

TINY = ["backbone.arguments.depth=2", "+backbone.arguments.embed_dim=32", "+backbone.arguments.num_heads=2"]

KINDS: dict[str, list[str]] = {
    "vit": [],
    "vit_56px_rgb": [
        "freeze=dora",
        "backbone.image_size=56",
        "backbone.arguments.patch_size=14",
        "backbone.channels=3",
    ],
    "lora_class_and_mean": [
        *("freeze=lora", "backbone.arguments.class_token=true", "backbone.arguments.global_pool=token"),
        *("backbone.pool=class_and_mean", "head.norm=batch"),
    ],
    "prompt": ["freeze=prompt", "backbone.arguments.class_token=true", "backbone.arguments.global_pool=token"],
    "mlp_head": ["head=mlp", "freeze=adapter"],
    "bank": ["head=lr_bank", "freeze=full", "head.lrs=[1e-3,1e-2]"],
    "convnet": ["experiment=baseline/convnet", "backbone.widths=[8,16]"],
    "lenet5": ["experiment=baseline/lenet5"],
    "mlp": ["experiment=baseline/mlp", "backbone.hidden=[32]"],
    "lstm": ["experiment=baseline/rnn", "backbone.hidden_size=16"],
    "gru": ["experiment=baseline/rnn", "backbone.hidden_size=16", "backbone.cell=gru", "backbone.num_layers=2"],
    "pixels": ["experiment=baseline/logistic_regression"],
    "photo_vit": ["freeze=ssf", "backbone.channels=3", "backbone.image_size=56", "backbone.arguments.patch_size=14"],
    "photo_in_grey": [],
    "photo_convnet": [
        *("experiment=baseline/convnet", "backbone.widths=[8,16]", "backbone.channels=3"),
        *("freeze=lora", "freeze.lora.match='.*'", "freeze.lora.rank=2"),
    ],
}
PHOTOS = {"photo_vit": (2, (3, 32, 48)), "photo_in_grey": (10, (3, 32, 32)), "photo_convnet": (37, (3, 32, 32))}


def photos(classes: int, shape: tuple[int, ...]) -> Source:
    """Random images of a shape (C, H, W) and classes with odd names."""
    generator = torch.Generator().manual_seed(classes)

    def images(count: int) -> Images:
        pixels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
        return Images(pixels, torch.arange(count) % classes)

    names = ['a, b "c"', "<b>ü数</b>", *map(str, range(classes - 2))]
    return Source(images(501), images(60), images(60), names, "my pictures", "the folder my pictures")


@pytest.fixture(scope="session")
def source() -> Source:
    """The bundled sample with 60 digits in validation and test."""
    sample = load_mnist("MNIST", "nowhere", "sample", None)
    val, test = (split.take(slice(0, 480, 8)) for split in (sample.val, sample.test))
    return sample._replace(val=val, test=test)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Predictor]:
    """Builds the model of a command line, with random weights in every tensor, and saves it as a checkpoint."""

    def predictor(*overrides: str, photos: Source | None = None) -> Predictor:
        folder = tmp_path_factory.mktemp("model")
        classes = photos.classes if photos else class_names("MNIST")
        fixed = ["data.source=sample", "logger=none", "trainer.precision=32-true", f"model.num_classes={len(classes)}"]
        cfg = compose_run(folder, *fixed, *overrides)
        settle(cfg)
        torch.manual_seed(0)
        model: Any = instantiate(cfg.model).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        for name in added_names(model):
            model.get_parameter(name).data += 0.1 * torch.randn_like(model.get_parameter(name))
        for name, parameter in model.named_parameters():
            if name.startswith("head") and parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.3)  # probabilities that differ
        if hasattr(model.head, "chosen"):
            model.head.chosen.fill_(1)
        path = folder / "checkpoints" / "best.ckpt"
        path.parent.mkdir()
        torch.save({"config": plain(cfg), "state_dict": model.state_dict(), "epoch": 1, "git_commit": "c0ffee"}, path)
        data = {"name": "MNIST", "origin": "sample", "classes": classes, "shape": [1, 28, 28], "reader": "digit"}
        if photos:
            data |= {"name": photos.name, "origin": photos.origin, "shape": [*photos.shape], "reader": "photo"}
        return Predictor(model, cfg, path, "c0ffee", data)

    return predictor


@pytest.fixture(scope="session")
def tiny_vit(build: Callable[..., Predictor]) -> Callable[..., Predictor]:
    """Builds a classifier on a ViT of two narrow blocks."""
    return lambda *overrides, **photos: build(
        "experiment=vit_from_scratch", "augment=none", *TINY, *overrides, **photos
    )


@pytest.fixture(scope="session")
def made(
    build: Callable[..., Predictor], tiny_vit: Callable[..., Predictor], source: Source
) -> Callable[[str], tuple[Predictor, Source]]:
    """Builds one of `KINDS`, with the images that it is for."""

    def make(name: str) -> tuple[Predictor, Source]:
        given = photos(*PHOTOS[name]) if name in PHOTOS else None
        return (build if "experiment=" in "".join(KINDS[name]) else tiny_vit)(
            *KINDS[name], photos=given
        ), given or source

    return make


LONG = ("vit_56px_rgb", "mlp_head", "convnet", "lenet5", "gru", "photo_in_grey")  # made of the layers of the others


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.long if kind in LONG else ()) for kind in KINDS])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


class Exported(NamedTuple):
    """A written file. wanted: the predictor's probabilities for 501 training images, before the export changes it."""

    predictor: Predictor
    wanted: Tensor
    facts: dict[str, Any]
    path: Path
    source: Source


@pytest.fixture(scope="session")
def exported(
    made: Callable[[str], tuple[Predictor, Source]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Exported]:
    """Exports one of `KINDS`, once in a session for each format."""

    @cache
    def write(name: str, format: str, quantize: str | None = None) -> Exported:
        predictor, source = made(name)
        wanted = predictor(source.train.images[:501])
        path = tmp_path_factory.mktemp("export") / ("model.onnx" if format == "onnx" else "model.pt2")
        return Exported(predictor, wanted, export_file(predictor, source, format, quantize, path), path, source)

    return write
