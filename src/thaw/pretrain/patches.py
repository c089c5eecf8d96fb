"""An image as patches, and a plain ViT as an encoder of any of them: for objectives that hide some.

Shapes: B batch, T patches, D width, p patch side, S image side, C channels.
"""

from typing import Any

import torch
from torch import Tensor

from thaw.data.preprocess import Preprocess
from thaw.models.backbone import Backbone


def patch_side(backbone: Backbone, objective: str) -> int:
    """Side p of the square patches of a plain ViT.

    Raises:
        ValueError: the backbone is none (windows, stages, rotary positions or an attention pool).
    """
    model: Any = getattr(backbone, "model", None)
    is_vit = hasattr(model, "pos_embed") and hasattr(model, "blocks") and hasattr(model, "patch_embed")
    if not is_vit or getattr(model, "rope", None) is not None or getattr(model, "attn_pool", None) is not None:
        raise ValueError(
            f"model={objective} hides patches of a plain vision transformer, which backbone.name="
            f"{getattr(backbone, 'architecture', {}).get('name', type(backbone).__name__)} is not; "
            "choose e.g. backbone=digits_vit, or model=simclr."
        )
    return int(model.patch_embed.patch_size[0])


def patchify(images: Tensor, side: int) -> Tensor:
    """(B, C, S, S) -> patches (B, T, p * p * C), row by row."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // side, side, width // side, side)  # (B, C, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)


def unpatchify(patches: Tensor, side: int, channels: int) -> Tensor:
    """The inverse of `patchify`, of a square image."""
    grid = round(patches.shape[1] ** 0.5)
    x = patches.reshape(len(patches), grid, grid, side, side, channels)  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), channels, grid * side, grid * side)


def target(images: Tensor, side: int, normalize_pixels: bool) -> Tensor:
    """What a model should draw: patches (B, T, p * p * C), each in units of its own mean and deviation if wanted."""
    patches = patchify(images, side)
    if not normalize_pixels:
        return patches
    mean, std = scale(patches)
    return (patches - mean) / std


def scale(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch, (B, T, 1); the deviation of a uniform one is not quite 0."""
    return patches.mean(dim=2, keepdim=True), (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()


def embed(backbone: Backbone, images: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, prefix + T, D): class or register tokens, then patches with their positions."""
    return backbone.prefix(images, 1)


def encode(backbone: Backbone, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
    """Tokens through the ViT's blocks and norms, not pooled: (B, T, D) -> (B, T, D).

    Args:
        tokens: any of what `embed` gave.
        visible: bool, broadcast to (B, 1, T, T): which tokens (columns) each token (row) attends to; None is all.
    """
    model = backbone.model
    for block in model.blocks:
        tokens = block(tokens) if visible is None else block(tokens, attn_mask=visible)
    return model.fc_norm(model.norm(tokens))


def to_pixels(images: Tensor, preprocess: Preprocess) -> Tensor:
    """What `Preprocess` made, or a model's imitation of it, (B, C, S, S) -> uint8 (B, S, S)."""
    x = (images.float() * preprocess.std + preprocess.mean).mean(dim=1)  # (B, S, S)
    return (255 * x).round().clamp(0, 255).to(torch.uint8)
