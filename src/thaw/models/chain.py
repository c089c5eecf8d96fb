"""A timm model as a chain of layers: its stem, its blocks and its final norm.

ViT, EVA (with DINOv3), Swin and ConvNeXt are such chains; `count_tokens` tries whether a model is one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from thaw.run.errors import UserError

TimmModel: TypeAlias = Any  # an nn.Module with forward_features, pretrained_cfg, group_matcher and more
Layer: TypeAlias = Callable[[Tensor], Tensor]


def chain(model: TimmModel) -> tuple[Layer, list[Layer], Layer]:
    """The stem, the blocks and the final norm, which `forward_features` applies one after the other."""
    if hasattr(model, "stages"):  # ConvNeXt
        return model.stem, [in_turn(block) for block in blocks_of(model)], model.norm_pre
    rope = getattr(model, "rope", None)
    if rope is None:
        names = ("patch_embed", "_pos_embed", "patch_drop", "norm_pre")
        stem = in_turn([step for name in names if (step := getattr(model, name, None)) is not None])
        return stem, [in_turn(block) for block in blocks_of(model)], model.norm
    # EVA: each block rotates its queries and keys by the rotary embedding of the grid (Fang et al. 2023, section 2.1)
    if model.patch_drop is not None or getattr(rope, "aug_active", False):
        raise UserError("this rotary embedding is random in every batch")
    angles = rope.get_embed(model.patch_embed.grid_size if model.dynamic_img_size else None)
    stem = in_turn([model.patch_embed, lambda patches: model._pos_embed(patches)[0], model.norm_pre])
    return stem, [partial(block, rope=angles) for block in model.blocks], model.norm


def in_turn(steps: Sequence[Layer]) -> Layer:
    """One layer that applies several in order."""

    def run(tokens: Tensor) -> Tensor:
        for step in steps:
            tokens = step(tokens)
        return tokens

    return run


def blocks_of(model: TimmModel) -> list[list[nn.Module]]:
    """The modules of each block, in the order in which an image passes them.

    The downsampling at the start of a stage belongs to the stage's first block, as in timm's `group_matcher`.
    """
    if hasattr(model, "blocks"):
        return [[block] for block in model.blocks]
    stages = model.stages if hasattr(model, "stages") else model.layers
    return [
        [stage.downsample, block] if number == 0 else [block]
        for stage in stages
        for number, block in enumerate(stage.blocks)
    ]


def places(model: TimmModel) -> dict[str, int]:
    """The layer of every parameter above the stem, by the beginning of its name: `blocks.0.` is layer 1."""
    blocks = blocks_of(model)
    layers = {module: 1 + number for number, block in enumerate(blocks) for module in block}
    after = ("norm_pre" if hasattr(model, "stages") else "norm", "fc_norm", "attn_pool", "head")
    layers |= {getattr(model, name): 1 + len(blocks) for name in after if getattr(model, name, None) is not None}
    return {f"{name}.": layers[module] for name, module in model.named_modules() if module in layers}


def count_tokens(model: TimmModel, images: Tensor) -> int:
    """The tokens that the stem makes of an image; 0 if the chain does not give exactly `forward_features`."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            stem, blocks, norm = chain(model)
            tokens = embedded = stem(images)
            for block in blocks:
                tokens = block(tokens)
            same = torch.equal(norm(tokens), model.forward_features(images))
            width = embedded.shape[1 if hasattr(model, "stages") else -1]  # (1, D, H, W) in a ConvNeXt
            return embedded.numel() // width if same else 0
    except Exception:  # other architectures raise nearly anything here
        return 0
    finally:
        model.train(mode)
