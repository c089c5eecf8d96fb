"""Numbers about predictions; pure functions of tensors."""

import math

import torch.nn.functional as F
from torch import Tensor


def accuracy_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), at 95 % for the default z.

    It keeps its coverage near 100 % correct, where the normal approximation does not.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total}: expected 0 <= correct <= total and total > 0.")
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def worst_digits(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Indices (count,) of the digits with the highest cross-entropy, worst first.

    Args:
        logits: (N, 10).
        labels: (N,).
    """
    losses = F.cross_entropy(logits, labels, reduction="none")  # (N,)
    return losses.topk(min(count, len(labels))).indices
