"""The patches a vision transformer attends to: attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928).

Shapes: B batch, H heads, T tokens, h x w the grid of patches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """The share of each input token in each output token, (B, T, T); rows sum to 1.

    The residual connection gives each token half of itself and half of its attention, averaged over heads (section 3 of
    the paper). Successive blocks multiply these matrices. `maps` are attention (B, H, T, T) of each block, in order.
    """
    total = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)  # (T, T)
    for attention in maps:
        mean = attention.mean(dim=1)  # (B, T, T)
        total = mean @ total / 2 + total / 2
    return total


def attention_layers(backbone: Any) -> list[nn.Module]:
    """The attention layer of each block; an empty list where tokens do not see all others, as in Swin and in CNNs."""
    model = backbone.model
    layers = [getattr(block, "attn", None) for block in getattr(model, "blocks", ())]
    has_grid = hasattr(getattr(model, "patch_embed", None), "grid_size") and hasattr(model, "num_prefix_tokens")
    return layers if has_grid and all(hasattr(layer, "attn_drop") for layer in layers) else []  # type: ignore[return-value]


@contextmanager
def recorded_attention(backbone: Any) -> Iterator[list[Tensor]]:
    """Collect the attention maps (B, H, T, T) of the backbone's forward passes in a list.

    Only passes of this thread are recorded. Other threads may use the backbone meanwhile, but not record. Tokens that a
    policy adds to a block's input, after the class token and registers, are left out: they come from no image.
    """
    thread = get_ident()
    layers: list[Any] = attention_layers(backbone)
    maps: list[Tensor] = []
    fused = [layer.fused_attn for layer in layers]

    def record(module: nn.Module, inputs: Any, attention: Tensor) -> None:
        if get_ident() == thread:
            first, added = backbone.model.num_prefix_tokens, attention.shape[-1] - backbone.num_tokens
            own = [*range(first), *range(first + added, attention.shape[-1])]
            maps.append(F.normalize(attention[..., own, :][..., own], p=1, dim=-1) if added else attention)

    hooks = [layer.attn_drop.register_forward_hook(record) for layer in layers]
    for layer in layers:
        layer.fused_attn = False  # torch's fused attention never forms the whole map
    try:
        yield maps
    finally:
        for layer, was_fused, hook in zip(layers, fused, hooks, strict=True):
            layer.fused_attn = was_fused
            hook.remove()


def share_of_patches(backbone: Any, maps: Sequence[Tensor]) -> Tensor:
    """The share of each patch in the pooled features, (B, h, w); each image's shares sum to 1.

    As the backbone pools: the class token's row of the rollout, the mean of the patches' rows, or the mean of both.
    `maps` are those of `recorded_attention`.
    """
    model = backbone.model
    flow = rollout([attention.float() for attention in maps])  # (B, T, T)
    prefix = model.num_prefix_tokens
    pooled = flow[:, prefix:].mean(dim=1)  # (B, T)
    if backbone.pool == "class_and_mean":
        pooled = (flow[:, 0] + pooled) / 2
    elif model.global_pool == "token":
        pooled = flow[:, 0]
    patches = pooled[:, prefix:]  # (B, h w)
    return (patches / patches.sum(dim=1, keepdim=True)).unflatten(1, model.patch_embed.grid_size)
