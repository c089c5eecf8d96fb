"""What the frozen layers of a backbone make of a split's digits: kept features where there are some, else computed."""

from collections.abc import Callable
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from thaw.freezing.features import FeatureCache, digest
from thaw.models.backbone import Backbone


def frozen_features(
    split: str,
    images: Tensor,
    prepare: Callable[[Tensor], Tensor],
    augment: Any,
    views: int,
    backbone: Backbone,
    cut: int,
    cache: FeatureCache,
    trainer: Trainer,
) -> Tensor | None:
    """The output of the first `cut` layers for all digits, in the trainer's precision and on its device.

    Args:
        split: its name, for what is printed and as part of the key.
        images: uint8 (N, 28, 28), on any device.
        prepare: uint8 (B, 28, 28) -> (B, C, S, S), as the backbone takes it.
        augment: what the key says of the augmentation within `prepare`, as values of JSON; None without.
        views: K of each digit.
        backbone: in eval mode, on the trainer's device.
        cut: how many layers.
        cache: where features are kept.
        trainer: of the ranks that call this together.

    Returns:
        (K, N, T, D) tokens, (K, N, D) if all layers are meant, or None where `FeatureCache.features` keeps none.
    """
    tokens = cut < len(backbone.layers)
    device, autocast = trainer.strategy.root_device, trainer.precision_plugin.forward_context

    @torch.no_grad()
    def compute(indices: Tensor) -> Tensor:  # (B,) -> (B, T, D) or (B, D)
        batch = images[indices.to(images.device)].to(device)  # on the CPU where worker processes fetch batches
        with autocast():
            features = backbone.prefix(prepare(batch), cut)
        return features.bfloat16() if tokens and "bf16" in trainer.precision else features.contiguous()

    facts = {
        "backbone": backbone.architecture,
        "layers": cut,
        "weights": digest(backbone.layers_state(cut)),
        "digits": digest({split: images}),
        "augment": augment,
        "precision": trainer.precision,
    }
    return cache.features(split, len(images), views, compute, backbone.num_tokens, facts, trainer)
