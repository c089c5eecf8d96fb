"""Batch norm over features that copes with a last batch of one digit."""

import torch.nn.functional as F
from torch import Tensor, nn


class FeatureNorm(nn.BatchNorm1d):
    """torch's BatchNorm1d of (B, D), except that one digit alone, which has no variance, takes the running statistics.

    They stay as they are then. A batch of one remains where the number of digits is not a multiple of the batch size.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and len(input) == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)
