"""Mixup and cutmix: the images of a batch mixed in pairs, and their labels in the same shares."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms import v2

from thaw.run.values import Positive


class Mix(nn.Module):
    """Mixes each image with its neighbour in the shuffled batch, and their labels in the same shares.

    One share for the whole batch is drawn from Beta(alpha, alpha), as in the papers: with an alpha near 0 one image
    dominates, with 1 all shares are equally likely. If both transforms are on, each batch draws one of them.

    Args:
        mixup: alpha for blending whole images (Zhang et al. 2018, section 2); None is off.
        cutmix: alpha for pasting a rectangle, whose area is the share (Yun et al. 2019, section 3.1); None is off.
        probability: that a batch is mixed.
    """

    def __init__(
        self,
        mixup: Positive | None,
        cutmix: Positive | None,
        probability: Annotated[float, Field(gt=0, le=1, description="mix=none is off")],
    ) -> None:
        super().__init__()
        self.transforms = [
            transform(alpha=alpha) for transform, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha is not None
        ]
        self.probability = probability
        self.is_on = bool(self.transforms)

    def forward(self, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Mixed images, floats (B, C, S, S), and shares of the classes (B, K); or the batch as it is, with labels (B,).

        Labels that are shares already, floats (B, M), are mixed as they are. A single image has no partner and stays.
        """
        if not self.is_on or len(labels) == 1 or torch.rand(()) >= self.probability:
            return images, labels
        transform = self.transforms[int(torch.randint(len(self.transforms), ()))]
        shares = labels if labels.is_floating_point() else F.one_hot(labels, num_classes)
        return transform(images, shares.to(torch.promote_types(images.dtype, torch.float32)))


def main_labels(targets: Tensor) -> Tensor:
    """Labels (B,), or several an image (B, K), unchanged; of shares, floats (B, K), the label with the largest one."""
    return targets.argmax(dim=1) if targets.is_floating_point() else targets
