"""A small ViT, an optimizer and a few images for the tests of every pretraining objective."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from small_models import COSINE

from thaw.data.loader import Batch
from thaw.models.backbone import Backbone
from thaw.optim import OptimizerRecipe
from thaw.pretrain.objective import Objective
from thaw.run.values import check_types

VIT = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}
CLASS_TOKEN = VIT | {"class_token": True, "global_pool": "token"}


def backbone(arguments: dict | None = None, name: str = "vit_tiny_patch16_224", **changes: Any) -> Backbone:
    settings: dict[str, Any] = {"weights": "none", "image_size": 28, "channels": 1, "pool": "model"}
    settings |= {"mean": [0.1307], "std": [0.3081], "fused_attention": False} | changes
    return Backbone(name, arguments=VIT if arguments is None else arguments, **settings)


def recipe() -> OptimizerRecipe:
    settings: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.0, "layer_decay": 1.0, "warmup_fraction": 0.0}
    settings |= {"final_lr_fraction": 1.0, "lr_scaling": "none"} | COSINE
    return OptimizerRecipe(partial(torch.optim.AdamW, foreach=True), **settings)


def digits(number: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (number, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(number) % 3
    images[:, :14] += (25 * labels).to(torch.uint8)[:, None, None]
    return Batch(images[:, None], labels, torch.arange(number))


def losses_of_training(model: Objective, batch: Batch, steps: int) -> list[float]:
    """Train on one batch; at each step the gradient reaches every parameter."""
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    model.gather = lambda rows: rows  # type: ignore[method-assign]  # there is one process
    optimizer = torch.optim.AdamW(model.optim.groups(model.named_parameters(), model.depths(), {}))
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.training_step(batch, step)
        loss.backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        optimizer.step()
        losses.append(loss.item())
    return losses


def refused(objective: type[Objective], key: str, value: Any, allowed: str) -> None:
    """A setting is refused before anything is built, with a message that says what is allowed."""
    block = OmegaConf.create({"_target_": f"{objective.__module__}.{objective.__name__}", key: value})
    with pytest.raises(ValueError, match=re.escape(f"model.{key}={value!r} must be {allowed}.")):
        check_types(block, "model.")
