"""Computing on many images: in batches, or on some of them that stand for all."""

from collections.abc import Callable

import torch
from torch import Tensor

EVAL_BATCH = 500  # images computed together without gradients, where no setting says


def by_batches(compute: Callable[[Tensor], Tensor], images: Tensor, size: int = EVAL_BATCH) -> Tensor:
    """What `compute`, (B, ...) -> (B, ...), gives for all images (N, ...), `size` of them at a time."""
    return torch.cat([compute(batch) for batch in images.split(size)])


def evenly_spread(total: int, wanted: int | None) -> Tensor:
    """Indices of at most `wanted` of `total` images, None for all: of every class, where they are sorted by class."""
    return torch.arange(total) if wanted is None else torch.linspace(0, total - 1, min(wanted, total)).round().long()
