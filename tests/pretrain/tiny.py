"""A small ViT, an optimizer and a few digits for the tests of every pretraining objective."""

from functools import partial
from typing import Any

import torch

from thaw.data.datamodule import Batch
from thaw.models.backbone import Backbone
from thaw.optim import OptimizerRecipe

VIT = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}


def backbone(name: str = "vit_tiny_patch16_224", arguments: dict | None = None, weights: str = "none") -> Backbone:
    arguments = VIT if arguments is None else arguments
    settings: dict[str, Any] = {"pool": "model", "mean": None, "std": None, "fused_attention": False}
    return Backbone(name, weights, image_size=28, channels=1, arguments=arguments, **settings)


def recipe() -> OptimizerRecipe:
    settings: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.0, "layer_decay": 1.0, "warmup_fraction": 0.0}
    settings |= {"final_lr_fraction": 1.0, "lr_scaling": "none"}
    return OptimizerRecipe(partial(torch.optim.AdamW, foreach=True), **settings)


def digits(number: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (number, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(number) % 3
    images[:, :14] += (25 * labels).to(torch.uint8)[:, None, None]
    return Batch(images, labels, torch.arange(number))
