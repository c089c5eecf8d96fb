"""A tiny ViT, a classifier on it, and a few steps of training that tests share."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from thaw.classifier import Classifier
from thaw.data.augment import Augment
from thaw.data.loader import Batch
from thaw.data.mix import Mix
from thaw.data.mnist import MNISTData
from thaw.freezing.cache import FeatureCache
from thaw.freezing.policy import FreezePolicy
from thaw.models.backbone import Backbone
from thaw.models.heads import LinearHead
from thaw.optim import OptimizerRecipe
from thaw.task import Distillation, SingleLabel

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = {"patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 2}
AVERAGED = {"class_token": False, "global_pool": "avg"}  # as in configs/backbone/digits_vit.yaml

LINEAR = partial(LinearHead, norm="layer")
COSINE = {"schedule": "cosine", "step_at": [0.5, 0.75], "step_factor": 0.1}


def augmentation(**settings: Any) -> Augment:
    """augment=none but for these settings."""
    none: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "augment" / "none.yaml"))
    none.pop("_target_")
    return Augment(**none | settings)


AS_IT_IS = augmentation()
NO_MIX = Mix(None, None, probability=1)
NO_CACHE = FeatureCache("off", dir="nowhere", max_gb=1)


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Arguments that make a timm ViT tiny."""
    return dict(TINY)


@pytest.fixture
def backbone() -> Callable[..., Backbone]:
    """Builds a Backbone in eval mode: by default a tiny ViT with random weights at 28 px."""

    def build(name: str = "vit_tiny_patch16_224", arguments: Mapping | None = None, **changes: Any) -> Backbone:
        torch.manual_seed(0)
        settings: dict[str, Any] = {"weights": "none", "image_size": 28, "channels": 1, "pool": "model"}
        settings |= {"mean": None, "std": None, "fused_attention": False} | changes
        return Backbone(name, arguments=TINY | AVERAGED if arguments is None else arguments, **settings).eval()

    return build


@pytest.fixture
def policy() -> Callable[..., FreezePolicy]:
    """Builds the policy of configs/freeze/<name>.yaml."""

    def build(name: str, **changes: Any) -> FreezePolicy:
        cfg = OmegaConf.create({"freeze": OmegaConf.load(CONFIGS / "freeze" / f"{name}.yaml")})
        cfg.freeze.merge_with({"chosen": [2]} if name == "surgical" else {}, changes)
        rules: Any = OmegaConf.to_container(cfg.freeze.rules, resolve=True)
        return FreezePolicy(rules, add=instantiate(cfg.freeze.get("add")))

    return build


@pytest.fixture
def classifier(backbone: Callable[..., Backbone], policy: Callable[..., FreezePolicy]) -> Callable[..., Classifier]:
    """Builds a Classifier whose backbone counts as pretrained; `optim` changes single settings of the recipe."""

    def build(
        freeze: str | FreezePolicy = "linear_probe",
        head: Callable[..., nn.Module] = LINEAR,
        optim: Mapping[str, Any] | None = None,
        loaded: bool = True,
        augment: Augment = AS_IT_IS,
        cache: FeatureCache = NO_CACHE,
        **changes: Any,
    ) -> Classifier:
        base = backbone(**changes).train()
        if loaded:
            base.fresh = frozenset()
        settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "layer_decay": 1.0}
        settings |= (
            {"warmup_fraction": 0.0, "final_lr_fraction": 0.0, "lr_scaling": "none"} | COSINE | dict(optim or {})
        )
        recipe = OptimizerRecipe(partial(torch.optim.AdamW, foreach=True), **settings)
        chosen = policy(freeze) if isinstance(freeze, str) else freeze
        values: dict[str, Any] = {
            "num_classes": 10,
            "label_smoothing": 0.0,
            "task": SingleLabel,
            "distillation": Distillation(temperature=2.0, share=0.7),
            "compile": False,
            "self_contained": True,
        }
        return Classifier(base, head, augment, NO_MIX, chosen, recipe, cache=cache, **values)

    return build


def parametrized(layer: Any, name: str, *parts: nn.Module) -> None:
    """Parametrize a layer's tensor, with random values in place of those that change nothing."""
    for part in parts:
        parametrize.register_parametrization(layer, name, part)
        for parameter in part.parameters():
            nn.init.normal_(parameter)


def assert_same(got: Tensor, expected: Tensor, leaves: Sequence[Tensor], theirs: Sequence[Tensor] = ()) -> None:
    """Two outputs, and the gradients of a random sum of them at equal leaves, differ by 1e-5 of the largest value."""
    weights = torch.randn(expected.shape)
    own, other = ((each * weights).sum() for each in (got, expected))
    gradients = torch.autograd.grad(own, leaves), torch.autograd.grad(other, theirs or leaves)
    for one, two in [(got, expected), *zip(*gradients, strict=True)]:
        assert (one.flatten() - two.flatten()).abs().max() <= 1e-5 * two.abs().max()


def mnist_data(**changes: Any) -> MNISTData:
    """The bundled sample, in batches of 32."""
    places: dict[str, Any] = {"dataset": "MNIST", "dir": "nowhere", "source": "sample", "mirrors": None}
    batches = {"train_size": None, "batch_size": 32, "eval_batch_size": 100, "num_workers": 0, "seed": 0}
    batches |= {"fold": None, "folds": 5, "exclude": None, "relabel": None, "labels_per_class": None, "labels_draw": 0}
    return MNISTData(**places, **batches | {"reader": "digit", "class_weights": None, "sampler": "shuffled"} | changes)


@pytest.fixture
def batch() -> Batch:
    """16 random images whose label is the height of a bright bar."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 10
    images = torch.randint(0, 100, (16, 28, 28), dtype=torch.uint8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[2 * label : 2 * label + 6] = 255
    return Batch(images[:, None], labels, torch.arange(16))


@pytest.fixture
def fit() -> Callable[..., L.Trainer]:
    """Trains on batches for some epochs, validating on the same batches after each."""

    def run(model: L.LightningModule, batches: list[Batch], epochs: int = 1, **changes: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu", "devices": 1}
        trainer = L.Trainer(max_epochs=epochs, **(quiet | changes))
        loader: DataLoader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        trainer.fit(model, loader, loader)
        return trainer

    return run
