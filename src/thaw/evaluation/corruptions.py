"""Images made harder in six ways and at chosen strengths, to see how accuracy falls.

Every corruption takes uint8 (N, C, H, W) and a strength and returns the same. Lengths are in 28ths of the shorter
side, which are pixels for MNIST. Only noise is random, and it is the same in every run.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms


def affine(images: Tensor, angle: float = 0.0, shift: Sequence[int] = (0, 0), scale: float = 1.0) -> Tensor:
    bilinear = InterpolationMode.BILINEAR
    return transforms.affine(images, angle, list(shift), scale, [0.0, 0.0], interpolation=bilinear)


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Every other image to the left, the others to the right."""
    rotated = affine(images, angle=degrees)
    rotated[1::2] = affine(images[1::2], angle=-degrees)
    return rotated


def to_pixels(length: float, images: Tensor) -> float:
    """A length in 28ths of the shorter side of images (..., H, W)."""
    return length * min(images.shape[-2:]) / 28


def shift_images(images: Tensor, length: float) -> Tensor:
    """In turn to the right, to the left, down and up."""
    moved, pixels = images.clone(), to_pixels(length, images)
    for number, (x, y) in enumerate(((1, 0), (-1, 0), (0, 1), (0, -1))):
        moved[number::4] = affine(images[number::4], shift=(round(x * pixels), round(y * pixels)))
    return moved


def add_noise(images: Tensor, deviation: float) -> Tensor:
    """Gaussian noise; its standard deviation is a share of full brightness."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return noise.mul_(255 * deviation).add_(images).round_().clamp_(0, 255).to(torch.uint8)


def blur(images: Tensor, deviation: float) -> Tensor:
    """By a Gaussian, along the rows and then the columns."""
    deviation = to_pixels(deviation, images)
    radius, blurred = min(round(3 * deviation), min(images.shape[-2:]) - 1), images.float()
    for kernel in ([2 * radius + 1, 1], [1, 2 * radius + 1]):
        blurred = transforms.gaussian_blur(blurred, kernel, [deviation] * 2)
    return blurred.round().to(torch.uint8)


def reduce_contrast(images: Tensor, share: float) -> Tensor:
    """Keep this share of each pixel's distance from the mean grey of its image."""
    return transforms.adjust_contrast(images, share)


class Corruption(NamedTuple):
    """A way to make images harder; `harmless` is the strength that changes nothing."""

    apply: Callable[[Tensor, float], Tensor]
    unit: str
    harmless: float


CORRUPTIONS = {
    "rotation": Corruption(rotate, "degrees, left and right", 0.0),
    "shift": Corruption(shift_images, "28ths of the side, in four directions", 0.0),
    "scale": Corruption(lambda images, factor: affine(images, scale=factor), "factor", 1.0),
    "noise": Corruption(add_noise, "standard deviation, full brightness is 1", 0.0),
    "blur": Corruption(blur, "standard deviation in 28ths of the side", 0.0),
    "contrast": Corruption(reduce_contrast, "share that is left", 1.0),
}
