"""From stored images to the backbone's input; part of the model, so that serving cannot drift."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import center_crop

LUMA = 0.299, 0.587, 0.114  # of red, green and blue in grey (ITU-R BT.601)


class Preprocess(nn.Module):
    """uint8 (B, C', H, W) -> float (B, C, S, S): scaled to [0, 1], resized, then the backbone's own mean and std.

    Of images that are not square the centre is taken. A grey image is repeated for each of the C channels, a colour
    image becomes grey for a backbone of one. `mean` and `std`, in the [0, 1] scale, are one number or one for each
    channel.
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
        height, width = images.shape[2:]
        side = min(height, width)
        if height != width:
            images = center_crop(images, [side, side])
        x = images.to(precise) / 255  # (B, C', side, side)
        if x.shape[1] > self.channels:
            x = (x * x.new_tensor(LUMA).reshape(3, 1, 1)).sum(dim=1, keepdim=True)
        if side != self.image_size:
            x = F.interpolate(x, self.image_size, mode="bilinear", antialias=True)  # (B, C', S, S)
        x = ((x - self.mean) / self.std).to(self.mean.dtype)
        return x.expand(-1, self.channels, -1, -1)  # (B, C, S, S)
