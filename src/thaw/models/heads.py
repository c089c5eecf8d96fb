"""Classification heads: pooled features (B, D) -> logits (B, num_classes)."""

from typing import Literal

from torch import Tensor, nn

from thaw.models.batch_norm import FeatureNorm


class LinearHead(nn.Module):
    """A linear layer on features, normalised without learned scale unless told otherwise.

    Features of frozen backbones differ in scale by orders of magnitude, between models and between dimensions; the
    normalisation lets one learning rate serve all of them.

    Args:
        in_features: D, filled in from the backbone.
        num_classes: number of logits.
        norm: `layer` normalises each digit's features on their own, so that logits depend on that digit alone;
            `batch` standardises every dimension over the batch, as the linear probes of MAE do (He et al. 2021,
            appendix A), which serves frozen backbones whose dimensions differ much; `none` leaves them as they are,
            so that the head on pixels is multinomial logistic regression.
    """

    def __init__(self, in_features: int, num_classes: int, norm: Literal["layer", "batch", "none"]) -> None:
        super().__init__()
        if norm == "layer":
            self.norm: nn.Module = nn.LayerNorm(in_features, elementwise_affine=False)
        elif norm == "batch":  # statistics of the last few thousand digits
            self.norm = FeatureNorm(in_features, affine=False, momentum=0.01)
        elif norm == "none":
            self.norm = nn.Identity()
        else:
            raise ValueError(f"head.norm={norm!r} is unknown; choose layer, batch or none.")
        self.linear = nn.Linear(in_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.norm(features))


class MLPHead(nn.Module):
    """One hidden layer with GELU and dropout on normalised features.

    Args:
        in_features: D, filled in from the backbone.
        num_classes: number of logits.
        hidden_features: width of the hidden layer.
        dropout: probability of zeroing a hidden unit in training.
    """

    def __init__(self, in_features: int, num_classes: int, hidden_features: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_features, elementwise_affine=False)
        self.hidden = nn.Linear(in_features, hidden_features)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.hidden(self.norm(features)))  # (B, hidden_features)
        return self.linear(self.dropout(hidden))
