"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): frozen matrices that learn an update of low rank."""

import math
import re

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from thaw.freezing.added import Added, lowest_layer
from thaw.models.backbone import Backbone
from thaw.run.errors import UserError
from thaw.run.values import Positive


class LoRA(Added):
    """W (out, in) -> W + alpha / r B A, with B (out, r) and A (r, in). B starts at 0, and the model as it was."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.lora_A = nn.Parameter(weight.new_empty(rank, in_features))
        self.lora_B = nn.Parameter(weight.new_zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear draws its weight
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # so that merging changes nothing
            return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.scale)


def add_lora(backbone: Backbone, match: str, last: int | None, rank: int, alpha: Positive) -> None:
    """Give the backbone's linear layers a low-rank update.

    Args:
        backbone: changed in place; its weights are then called `<layer>.parametrizations.weight.original`.
        match: regular expression for the whole name of a layer, e.g. `.*\\.attn\\.(qkv|proj)`.
        last: only in the last so many layers of the backbone, so that what lies below can be cached; None is all.
        rank: r, from 1 to the smaller side of the matrices.
        alpha: scale of the update.

    Raises:
        UserError: no linear layer has such a name, or a number out of its range.
    """
    depths, lowest = backbone.depths(), lowest_layer(backbone, "lora", last)
    linear = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    chosen = {
        name: module
        for name, module in linear.items()
        if re.fullmatch(match, name) and depths[f"{name}.weight"] >= lowest
    }
    if not chosen:
        kinds = sorted({re.sub(r".*\.\d+\.", "", name) for name in linear})
        raise UserError(
            f"freeze.lora.match={match!r} is the name of no linear layer"
            f"{'' if last is None else f' in the last {last} layers'}; this backbone has "
            f"{', '.join(kinds) or 'none: choose another policy, e.g. freeze=last_blocks, or a transformer'}."
        )
    smallest = min(min(module.weight.shape) for module in chosen.values())
    if not 1 <= rank <= smallest:
        raise UserError(f"freeze.lora.rank={rank} must be from 1 to {smallest}, the smallest side of a matrix.")
    for module in chosen.values():
        parametrize.register_parametrization(module, "weight", LoRA(module.weight, rank, alpha))
