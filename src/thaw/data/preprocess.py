"""From stored images to the backbone's input; part of the model, so that serving cannot drift."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Preprocess(nn.Module):
    """uint8 (B, 28, 28) -> float (B, C, S, S): scaled to [0, 1], resized, then the backbone's own mean and std.

    The grey image is repeated for each of the C channels. `mean` and `std`, in the [0, 1] scale, are one number or one
    for each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, image_size: int, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.image_size, self.channels = image_size, channels
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        precise = torch.promote_types(self.mean.dtype, torch.float32)  # bf16 cannot tell 256 greys apart
        x = images[:, None].to(precise) / 255  # (B, 1, 28, 28)
        if x.shape[-1] != self.image_size:
            x = F.interpolate(x, self.image_size, mode="bilinear", antialias=True)  # (B, 1, S, S)
        x = ((x - self.mean) / self.std).to(self.mean.dtype)
        return x.expand(-1, self.channels, -1, -1)  # (B, C, S, S)
