"""A timm model as a chain of layers: its stem, its blocks and what follows them, mostly a norm.

ViT, EVA (with DINOv3), Swin, ConvNeXt, ResNet, EfficientNet and MobileNet are such chains; `count_tokens` tries whether
a model is one.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from thaw.run.errors import UserError

TimmModel: TypeAlias = Any  # an nn.Module with forward_features, pretrained_cfg, group_matcher and more
Layer: TypeAlias = Callable[[Tensor], Tensor]

HOLDERS = {"blocks", "stages", "layers", "layer1", "layer2", "layer3", "layer4"}  # of blocks, by timm's names


def chain(model: TimmModel) -> tuple[Layer, list[Layer], Layer]:
    """The stem, the blocks and what follows them, which `forward_features` applies one after the other."""
    if is_convolutional(model):
        before, _, after = parts(model)
        tail = takewhile(lambda name: name not in ("global_pool", "head"), after)
        blocks = [in_turn(block) for block in blocks_of(model)]
        return in_turn(list(before.values())), blocks, in_turn([after[name] for name in tail])
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


def is_convolutional(model: TimmModel) -> bool:
    return not hasattr(model, "patch_embed")


def in_turn(steps: Sequence[Layer]) -> Layer:
    """One layer that applies several in order."""

    def run(tokens: Tensor) -> Tensor:
        for step in steps:
            tokens = step(tokens)
        return tokens

    return run


def parts(model: TimmModel) -> tuple[dict[str, nn.Module], dict[str, nn.Module], dict[str, nn.Module]]:
    """A model's children by name: those before the blocks, those that hold the blocks, and those after them.

    timm defines them in the order in which an image passes them.
    """
    children = list(model.named_children())
    holders = [number for number, (name, _) in enumerate(children) if name in HOLDERS]
    first, end = holders[0], holders[-1] + 1
    return dict(children[:first]), dict(children[first:end]), dict(children[end:])


def blocks_of(model: TimmModel) -> list[list[nn.Module]]:
    """The modules of each block, in the order in which an image passes them.

    The downsampling at the start of a stage belongs to the stage's first block, as in timm's `group_matcher`.
    """
    blocks: list[list[nn.Module]] = []
    children: list[Any] = [child for holder in parts(model)[1].values() for child in holder.children()]
    for child in children:
        if isinstance(child, nn.Sequential):  # a stage of EfficientNet or MobileNet
            blocks += [[block] for block in child]
        elif "blocks" in child._modules:  # a stage of Swin or ConvNeXt
            first, *others = child.blocks
            blocks += [[child.downsample, first], *([block] for block in others)]
        else:
            blocks.append([child])
    return blocks


def places(model: TimmModel) -> dict[str, int]:
    """The layer of every parameter above the stem, by the beginning of its name: `blocks.0.` is layer 1."""
    blocks = blocks_of(model)
    layers = {module: 1 + number for number, block in enumerate(blocks) for module in block}
    layers |= dict.fromkeys(parts(model)[2].values(), 1 + len(blocks))
    return {f"{name}.": layers[module] for name, module in model.named_modules() if module in layers}


def count_tokens(model: TimmModel, images: Tensor) -> int:
    """The tokens that the stem makes of an image; in a convolutional net, the number of positions at a stride of 16.

    0 if the chain does not give exactly `forward_features`.
    """
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            stem, blocks, after = chain(model)
            tokens = embedded = stem(images)
            for block in blocks:
                tokens = block(tokens)
            if not torch.equal(after(tokens), model.forward_features(images)):
                return 0
        return math.ceil(images.shape[-1] / 16) ** 2 if is_convolutional(model) else embedded[..., 0].numel()
    except Exception:  # other architectures raise nearly anything here
        return 0
    finally:
        model.train(mode)
