"""Images as patches, and a plain ViT as an encoder of any of them: for objectives that hide some.

Shapes: B batch, T patches, D width, p patch side, S image side, C channels.
"""

from typing import Any

import torch
from torch import Tensor

from thaw.data.preprocess import Preprocess
from thaw.models.backbone import Backbone
from thaw.run.errors import UserError


def patchify(images: Tensor, side: int) -> Tensor:
    """(B, C, S, S) -> patches (B, T, p * p * C), row by row."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // side, side, width // side, side)  # (B, C, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)


def unpatchify(patches: Tensor, side: int, channels: int) -> Tensor:
    """The inverse of `patchify` for square images."""
    grid = round(patches.shape[1] ** 0.5)
    x = patches.reshape(len(patches), grid, grid, side, side, channels)  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), channels, grid * side, grid * side)


def patch_targets(images: Tensor, side: int, normalize_pixels: bool) -> Tensor:
    """The patches to draw, (B, T, p * p * C): each normalized by itself (He et al. 2021), or as they are."""
    patches = patchify(images, side)
    if not normalize_pixels:
        return patches
    mean, std = patch_scale(patches)
    return (patches - mean) / std


def patch_scale(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, (B, T, 1); the latter is never 0."""
    return patches.mean(dim=2, keepdim=True), (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()


def encode(backbone: Backbone, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
    """Embedded tokens through the ViT's blocks and norms, without pooling: (B, T, D) -> (B, T, D).

    Args:
        visible: bool, broadcast to (B, 1, T, T): which tokens (columns) each token (row) attends to; None is all.
    """
    model = backbone.model
    for block in model.blocks:
        tokens = block(tokens) if visible is None else block(tokens, attn_mask=visible)
    return model.fc_norm(model.norm(tokens))


def patch_side(backbone: Backbone, objective: str) -> int:
    """Side p of the square patches of a plain ViT.

    Raises:
        UserError: the backbone is not a plain ViT (it has windows, stages, rotary positions or an attention pool).
    """
    model: Any = getattr(backbone, "model", None)
    is_vit = hasattr(model, "pos_embed") and hasattr(model, "blocks") and hasattr(model, "patch_embed")
    if not is_vit or getattr(model, "rope", None) is not None or getattr(model, "attn_pool", None) is not None:
        raise UserError(
            f"model={objective} hides patches of a plain vision transformer, which backbone.name="
            f"{getattr(backbone, 'architecture', {}).get('name', type(backbone).__name__)} is not; "
            "choose e.g. backbone=digits_vit, or model=simclr."
        )
    return int(model.patch_embed.patch_size[0])


def grey(preprocess: Preprocess) -> Tensor:
    """The value of a medium grey pixel after `Preprocess`."""
    return (0.5 - preprocess.mean.flatten()[0]) / preprocess.std.flatten()[0]


def show_patches(patches: Tensor, side: int, preprocess: Preprocess) -> Tensor:
    """True or drawn patches (B, T, p * p * C) -> uint8 images (B, C, S, S), with `Preprocess` undone."""
    images = unpatchify(patches, side, preprocess.channels).float()
    x = images * preprocess.std + preprocess.mean  # (B, C, S, S)
    return (255 * x).round().clamp(0, 255).to(torch.uint8)
