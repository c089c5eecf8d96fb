"""Images made harder in six ways and at chosen strengths, to see how accuracy falls.

Every corruption takes uint8 (N, C, H, W) and a strength and returns the same. Only noise is random, and it is
the same in every run.
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


def shift_images(images: Tensor, pixels: float) -> Tensor:
    """In turn to the right, to the left, down and up."""
    moved = images.clone()
    for number, (x, y) in enumerate(((1, 0), (-1, 0), (0, 1), (0, -1))):
        moved[number::4] = affine(images[number::4], shift=(round(x * pixels), round(y * pixels)))
    return moved


def add_noise(images: Tensor, deviation: float) -> Tensor:
    """Gaussian noise; its standard deviation is a share of full ink."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 255 * deviation * noise).round().clamp(0, 255).to(torch.uint8)


def blur(images: Tensor, deviation: float) -> Tensor:
    """By a Gaussian; its standard deviation is in pixels."""
    return transforms.gaussian_blur(images, kernel_size=[2 * round(3 * deviation) + 1] * 2, sigma=[deviation] * 2)


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
    "shift": Corruption(shift_images, "pixels, to each side", 0.0),
    "scale": Corruption(lambda images, factor: affine(images, scale=factor), "factor", 1.0),
    "noise": Corruption(add_noise, "standard deviation, full ink is 1", 0.0),
    "blur": Corruption(blur, "standard deviation in pixels", 0.0),
    "contrast": Corruption(reduce_contrast, "share that is left", 1.0),
}
