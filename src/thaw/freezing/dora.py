"""Weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353): a magnitude and a direction to learn."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from thaw.freezing.lora import LoRA, low_rank_layers
from thaw.models.backbone import Backbone
from thaw.run.values import Positive


class DoRA(LoRA):
    """W (out, in) -> m V / |V| with V = W + alpha / r B A (equation 5) and the norm |V| of each row.

    The magnitude m (out,) starts as |W|, B at 0, and so the model as it was. |V| has no gradient (section 4.3).
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__(weight, rank, alpha)
        self.magnitude = nn.Parameter(row_norms(weight.detach()))

    def forward(self, weight: Tensor) -> Tensor:
        direction = super().forward(weight)
        scale = self.magnitude / row_norms(direction.detach()).clamp(min=torch.finfo(weight.dtype).tiny)
        return scale.view(-1, *[1] * (weight.ndim - 1)) * direction


def row_norms(weight: Tensor) -> Tensor:
    """(out, ...) -> (out,)"""
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)


def add_dora(backbone: Backbone, match: str, last: int | None, rank: int, alpha: Positive) -> None:
    """Give linear layers a low-rank update and a magnitude; arguments and errors are those of `add_lora`."""
    for layer in low_rank_layers(backbone, "dora", match, last, rank):
        parametrize.register_parametrization(layer, "weight", DoRA(layer.weight, rank, alpha))
