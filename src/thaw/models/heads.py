"""Classification heads: pooled features (B, D) -> logits (B, num_classes)."""

from typing import Annotated, Literal, TypeAlias

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from thaw.run.values import Count

DropRate: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class FeatureNorm(nn.BatchNorm1d):
    """torch's BatchNorm1d of (B, D), except that one image alone, which has no variance, takes the running statistics.

    They are not updated then. The last batch has one image if the number of images leaves a remainder of 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and len(input) == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


class LinearHead(nn.Module):
    """A linear layer on normalised features.

    Features of frozen backbones differ in scale by orders of magnitude, between models and between dimensions;
    normalisation without a learned scale lets one learning rate serve all of them.

    Args:
        in_features: D, filled in from the backbone.
        num_classes: number of logits.
        norm: `layer` normalises each image's features on their own, so that logits depend on that image alone;
            `batch` standardises every dimension over the batch, as the linear probes of MAE do (He et al. 2021,
            appendix A), for frozen backbones whose dimensions differ much; `none` does not normalise, so that the head
            on pixels is multinomial logistic regression.
    """

    def __init__(self, in_features: int, num_classes: int, norm: Literal["layer", "batch", "none"]) -> None:
        super().__init__()
        if norm == "layer":
            self.norm: nn.Module = nn.LayerNorm(in_features, elementwise_affine=False)
        elif norm == "batch":  # statistics of the last few thousand images
            self.norm = FeatureNorm(in_features, affine=False, momentum=0.01)
        else:
            self.norm = nn.Identity()
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

    def __init__(self, in_features: int, num_classes: int, hidden_features: Count, dropout: DropRate) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_features, elementwise_affine=False)
        self.hidden = nn.Linear(in_features, hidden_features)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.hidden(self.norm(features)))  # (B, hidden_features)
        return self.linear(self.dropout(hidden))
