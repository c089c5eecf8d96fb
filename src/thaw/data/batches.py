"""Computing on many images: in batches, or on an evenly spread part of them."""

from collections.abc import Callable

import torch
from torch import Tensor

EVAL_BATCH = 500  # images computed together without gradients, unless a setting says otherwise


def by_batches(compute: Callable[[Tensor], Tensor], images: Tensor, size: int = EVAL_BATCH) -> Tensor:
    """Apply `compute`, (B, ...) -> (B, ...), to all images (N, ...), `size` of them at a time."""
    return torch.cat([compute(batch) for batch in images.split(size)])


def evenly_spread(total: int, wanted: int | None) -> Tensor:
    """Evenly spread indices of at most `wanted` of `total` images, or of all; of every class if sorted by class."""
    return torch.arange(total) if wanted is None else torch.linspace(0, total - 1, min(wanted, total)).round().long()
