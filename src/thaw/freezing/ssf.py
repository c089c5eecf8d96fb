"""Scaling and shifting features (Lian et al. 2022, arXiv:2210.08823): y -> gamma y + beta after frozen layers."""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from thaw.freezing.added import Added, named_layers
from thaw.models.backbone import Backbone


class Scale(Added):
    """A layer's weight W (D, ...) -> gamma W with gamma (D,), which starts at 1."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.ssf_scale = nn.Parameter(weight.new_ones(len(weight)))

    def forward(self, weight: Tensor) -> Tensor:
        return self.ssf_scale.view(-1, *[1] * (weight.ndim - 1)) * weight


class Shift(Added):
    """The layer's bias b (D,) -> gamma b + beta with beta (D,), which starts at 0."""

    def __init__(self, bias: Tensor, scale: Scale) -> None:
        super().__init__()
        self.ssf_shift = nn.Parameter(bias.new_zeros(len(bias)))
        self.scale = (scale,)  # in a tuple, so that gamma is a parameter of the weight's parametrization alone

    def forward(self, bias: Tensor) -> Tensor:
        return self.scale[0].ssf_scale * bias + self.ssf_shift


def add_ssf(backbone: Backbone, match: str, last: int | None) -> None:
    """Scale and shift the output of the backbone's linear, convolution and norm layers.

    The paper draws gamma from N(1, 0.02) and beta from N(0, 0.02); here they start at 1 and 0, and the model as it was.
    A layer without a bias is only scaled: merged, the weights must be those of the same architecture. (The norm behind
    a convolution without bias has a shift.)

    Args:
        backbone: changed in place; its tensors are then called `<layer>.parametrizations.weight.original`.
        match: regular expression for the whole name of a layer.
        last: only in the last so many layers of the backbone, so that what lies below can be cached; None is all.

    Raises:
        UserError: no such layer has such a name, or a number out of its range.
    """
    for layer in named_layers(backbone, "ssf", match, last, can_be_scaled, "linear, convolution or norm layer"):
        scale = Scale(layer.weight)
        parametrize.register_parametrization(layer, "weight", scale)
        if layer.bias is not None:
            parametrize.register_parametrization(layer, "bias", Shift(layer.bias, scale))


def can_be_scaled(layer: nn.Module) -> bool:
    """Whether a layer is linear, a convolution, or a norm with a scale."""
    weight = layer._parameters.get("weight")
    return isinstance(layer, nn.Linear | nn.Conv2d) or (weight is not None and weight.ndim == 1)
