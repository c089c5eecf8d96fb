"""Computing on many images: in batches, or on an evenly spread part of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from thaw.run.console import progress

EVAL_BATCH = 500  # images computed together without gradients, unless a setting says otherwise


def by_batches(
    compute: Callable[[Tensor], Tensor], images: Tensor, size: int = EVAL_BATCH, title: str | None = None
) -> Tensor:
    """Apply `compute`, (B, ...) -> (B, ...), to all images (N, ...), `size` of them at a time.

    With a `title` the progress is shown.
    """
    parts = []
    with progress(title or "", len(images), hidden=title is None) as advance:
        for batch in images.split(size):
            parts.append(compute(batch))
            advance(len(batch))
    return torch.cat(parts)


def evenly_spread(total: int, wanted: int | None) -> Tensor:
    """Evenly spread indices of at most `wanted` of `total` images, or of all; of every class if sorted by class."""
    return torch.arange(total) if wanted is None else torch.linspace(0, total - 1, min(wanted, total)).round().long()
