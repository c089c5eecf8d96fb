"""Random transforms with their own parameters for every image, applied to a whole batch on the batch's device."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from thaw.run.values import NonNegative, Positive, Probability


class Augment(nn.Module):
    """uint8 (B, C, S, S) -> uint8 (B, C, S, S), each image transformed on its own.

    Affine map and elastic displacement (Simard et al. 2003, section 2) are one sampling grid, so that pixels are
    interpolated once. A setting of 0 switches its transform off. The affine map alone runs about 2.4 times as fast as
    kornia's RandomAffine on two CPU threads (benchmarks/once.md).

    Args:
        degrees: rotation up to so many degrees either way.
        translate: shift up to this fraction of the side, in x and y.
        scale: zoom by a factor between 1 - scale and 1 + scale.
        shear: horizontal shear up to so many degrees.
        elastic: standard deviation of the smooth displacement, in pixels.
        elastic_sigma: smoothness of that displacement, in pixels.
        thickness: strokes grow or shrink by up to this fraction of a 3 x 3 dilation or erosion.
        erase: probability that a random rectangle of 5 to 15 pixels a side is set to 0 (Zhong et al. 2017).
    """

    def __init__(
        self,
        degrees: NonNegative,
        translate: NonNegative,
        scale: Annotated[float, Field(ge=0, lt=1)],
        shear: NonNegative,
        elastic: NonNegative,
        elastic_sigma: Positive,
        thickness: NonNegative,
        erase: Probability,
    ) -> None:
        super().__init__()
        self.settings = {
            **{"degrees": degrees, "translate": translate, "scale": scale, "shear": shear},
            **{"elastic": elastic, "elastic_sigma": elastic_sigma, "thickness": thickness, "erase": erase},
        }
        self.degrees, self.translate, self.scale, self.shear = degrees, translate, scale, shear
        self.elastic, self.elastic_sigma, self.thickness, self.erase = elastic, elastic_sigma, thickness, erase
        self.warps = any((degrees, translate, scale, shear, elastic))
        self.is_random = bool(self.warps or thickness or erase)

    def forward(self, images: Tensor) -> Tensor:
        if not self.is_random:
            return images
        return self.transform(images.float()).round().clamp(0, 255).to(torch.uint8)

    def transform(self, x: Tensor) -> Tensor:
        """As `forward`, for float pixels (B, C, S, S) of any scale whose background is 0; gradients pass through."""
        if self.warps:
            grid = affine_grid(self.random_affine(x), x.shape[-1])  # (B, S, S, 2)
            if self.elastic:
                grid = grid + self.random_displacement(x)
            x = F.grid_sample(x, grid, align_corners=False)
        if self.thickness:
            x = self.random_thickness(x)
        if self.erase:
            x = x * self.random_rectangles(x)
        return x

    def random_affine(self, x: Tensor) -> Tensor:
        """(B, 2, 3) maps from output to input coordinates in [-1, 1]: scale, rotation, shear, then shift."""
        angle = math.radians(self.degrees) * uniform(x)
        shear = torch.tan(math.radians(self.shear) * uniform(x))
        zoom = 1 / (1 + self.scale * uniform(x))
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        shift_x, shift_y = 2 * self.translate * uniform(x), 2 * self.translate * uniform(x)
        rows = [cos, cos * shear - sin, shift_x, sin, sin * shear + cos, shift_y]
        return torch.stack(rows, dim=1).reshape(-1, 2, 3)

    def random_displacement(self, x: Tensor) -> Tensor:
        """(B, S, S, 2) displacement in [-1, 1] units: white noise blurred, scaled to the wanted deviation."""
        side = x.shape[-1]
        radius = math.ceil(3 * self.elastic_sigma)
        offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
        kernel = torch.exp(-0.5 * (offsets / self.elastic_sigma) ** 2)
        kernel = kernel / kernel.norm()  # unit norm keeps the variance of white noise
        columns = torch.arange(-radius, side + radius, device=x.device)
        taps = (torch.arange(side, device=x.device)[:, None] - columns).abs()
        blur = torch.where(taps <= radius, kernel[radius:][taps.clamp(max=radius)], 0.0)  # (S, S + 2 radius)
        noise = torch.randn(2, len(x), side + 2 * radius, side + 2 * radius, device=x.device, dtype=x.dtype)
        smooth = blur @ noise @ blur.T  # (2, B, S, S)
        return (2 * self.elastic / side) * smooth.permute(1, 2, 3, 0)

    def random_thickness(self, x: Tensor) -> Tensor:
        """Blend towards the 3 x 3 maximum (thicker) or minimum (thinner)."""
        amount = (self.thickness * uniform(x))[:, None, None, None]
        thicker = F.max_pool2d(x, 3, stride=1, padding=1)
        thinner = -F.max_pool2d(-x, 3, stride=1, padding=1)
        return x + amount.clamp(min=0) * (thicker - x) + amount.clamp(max=0) * (x - thinner)

    def random_rectangles(self, x: Tensor) -> Tensor:
        """(B, 1, S, S) of 1, with 0 inside one rectangle of each chosen image."""
        positions = torch.arange(x.shape[-1], device=x.device)
        length = torch.randint(5, 16, (2, len(x), 1), device=x.device)  # rows, columns
        start = (torch.rand(2, len(x), 1, device=x.device) * (x.shape[-1] - length + 1)).long()
        rows, columns = (positions >= start) & (positions < start + length)  # (B, S) each
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, 1, S, S)
        chosen = (torch.rand(len(x), device=x.device) < self.erase)[:, None, None, None]
        return (~(inside & chosen)).to(x.dtype)


def affine_grid(maps: Tensor, side: int) -> Tensor:
    """(B, 2, 3) -> (B, S, S, 2): F.affine_grid, but ten times as fast, and in full precision even under autocast."""
    centres = (2 * torch.arange(side, device=maps.device, dtype=maps.dtype) + 1) / side - 1  # (S,) pixels in [-1, 1]
    maps = maps[..., None, None]
    grid = maps[:, :, 0] * centres + (maps[:, :, 1] * centres[:, None] + maps[:, :, 2])  # (B, 2, S, S)
    return grid.permute(0, 2, 3, 1)


def uniform(x: Tensor) -> Tensor:
    """(B,) numbers in [-1, 1), one for each image."""
    return 2 * torch.rand(len(x), device=x.device, dtype=x.dtype) - 1
