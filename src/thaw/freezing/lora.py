"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): frozen weights that learn an update of low rank."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from thaw.freezing.added import Added, named_layers
from thaw.models.backbone import Backbone
from thaw.run.errors import UserError
from thaw.run.values import Positive


class LoRA(Added):
    """W (out, in) -> W + alpha / r B A, with B (out, r) and A (r, in). B starts at 0, and the model as it was.

    A convolution's kernel (out, in / groups, h, w) counts as a matrix (out, in / groups * h * w).
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        out_features, in_features = weight.flatten(1).shape
        self.lora_A = nn.Parameter(weight.new_empty(rank, in_features))
        self.lora_B = nn.Parameter(weight.new_zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear draws its weight
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # so that merging changes nothing
            if weight.ndim == 2:
                return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.scale)
            update = (self.lora_B @ self.lora_A).view(weight.shape)
            return torch.add(weight, update, alpha=self.scale)  # in the memory format of the kernel


def add_lora(backbone: Backbone, match: str, last: int | None, rank: int, alpha: Positive) -> None:
    """Give the backbone's linear layers a low-rank update; its convolutions if it has no linear layer.

    Args:
        backbone: changed in place; its weights are then called `<layer>.parametrizations.weight.original`.
        match: regular expression for the whole name of a layer, e.g. `.*\\.attn\\.(qkv|proj)`.
        last: only in the last so many layers of the backbone, so that what lies below can be cached; None is all.
        rank: r, from 1 to the smaller side of the matrices.
        alpha: scale of the update.

    Raises:
        UserError: no such layer has such a name, or a number out of its range.
    """
    for layer in low_rank_layers(backbone, "lora", match, last, rank):
        parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank, alpha))


def low_rank_layers(backbone: Backbone, method: str, match: str, last: int | None, rank: int) -> list[Any]:
    """The linear layers, or convolutions, for low-rank updates; arguments and errors are those of `add_lora`."""
    is_linear = any(isinstance(module, nn.Linear) for module in backbone.modules())
    kind, noun = (nn.Linear, "linear layer") if is_linear else (nn.Conv2d, "convolution")
    layers = named_layers(backbone, method, match, last, lambda module: isinstance(module, kind), noun)
    smallest = min(min(layer.weight.flatten(1).shape) for layer in layers)
    if not 1 <= rank <= smallest:
        raise UserError(f"freeze.{method}.rank={rank} must be from 1 to {smallest}, the smallest side of a matrix.")
    return layers
