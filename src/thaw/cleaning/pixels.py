"""Checks of the pixels alone: blank, dark and bright images, and whether two images are copies of each other.

Ours: cleanvision checks picture files one by one, and the images are arrays already.
Shapes: images uint8 (N, C, H, W).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

PIXELS_AT_ONCE = 2**24  # pixels at once
BLANK = 2.0  # grey levels: an image with a smaller standard deviation shows nothing
DARK, BRIGHT = 40, 215  # grey levels: 99 % of a dark image's pixels are below, 99 % of a bright one's above


def exposure_issues(images: Tensor) -> Iterator[tuple[int, str, float]]:
    """Yields index, kind and score of each image that is `blank`, `dark` or `bright`; the worst score is 0."""
    size = max(1, PIXELS_AT_ONCE // images[0].numel()) if len(images) else 1
    for start in range(0, len(images), size):
        grey = images[start : start + size].float().mean(dim=1).flatten(1)  # (B, H W)
        ordered, count = grey.sort(dim=1).values, grey.shape[1]
        low, high = ordered[:, count // 100].tolist(), ordered[:, -1 - count // 100].tolist()
        for number, spread in enumerate(grey.std(dim=1, correction=0).tolist()):
            if spread < BLANK:
                yield start + number, "blank", spread / 255
            elif high[number] < DARK:
                yield start + number, "dark", high[number] / 255
            elif low[number] > BRIGHT:
                yield start + number, "bright", 1 - low[number] / 255


def pixel_correlation(images: Tensor, others: Tensor) -> Tensor:
    """Pearson correlation (N,) of the pixels of image i and other i; 0 where one of them is constant."""
    parts = []
    size = max(1, PIXELS_AT_ONCE // images[0].numel()) if len(images) else 1
    for pair in zip(images.split(size), others.split(size), strict=True):
        one, two = (F.normalize(without_mean(part), dim=1) for part in pair)
        parts.append((one * two).sum(dim=1))
    return torch.cat(parts) if parts else torch.zeros(0)


def without_mean(images: Tensor) -> Tensor:
    flat = images.flatten(1).float()  # (N, C H W)
    return flat - flat.mean(dim=1, keepdim=True)
