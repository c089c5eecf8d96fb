"""Images of a batch mixed in pairs, labels in the same shares: mixup and cutmix."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2


class Mix(nn.Module):
    """Mixes each image with its neighbour in the shuffled batch, and their labels alike.

    One share for the whole batch is drawn from Beta(alpha, alpha), as in the papers: an alpha near 0 leaves one image
    almost as it is, 1 makes all shares as likely. With both, each batch is mixed by one of them, either as likely.

    Args:
        mixup: alpha for blending whole images (Zhang et al. 2018, section 2); None is off.
        cutmix: alpha for pasting a rectangle, whose area is the share (Yun et al. 2019, section 3.1); None is off.
        probability: that a batch is mixed.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, mixup: float | None, cutmix: float | None, probability: float) -> None:
        super().__init__()
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if alpha is not None and not alpha > 0:
                raise ValueError(
                    f"mix.{name}={alpha} must be above 0, the alpha of Beta(alpha, alpha), e.g. 0.2; null is off."
                )
        if not 0 < probability <= 1:
            raise ValueError(f"mix.probability={probability} must be above 0 and at most 1; mix=none is off.")
        self.transforms = [
            transform(alpha=alpha) for transform, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha is not None
        ]
        self.probability = probability
        self.is_on = bool(self.transforms)

    def forward(self, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Mix a batch; one that stays as it is keeps its labels (B,).

        Args:
            images: (B, C, S, S) floats; a single image has no partner and stays as it is.
            labels: (B,).
            num_classes: K.

        Returns:
            images (B, C, S, S) and the shares of the classes (B, K).
        """
        if not self.is_on or len(labels) == 1 or torch.rand(()) >= self.probability:
            return images, labels
        transform = self.transforms[int(torch.randint(len(self.transforms), ()))]
        shares = F.one_hot(labels, num_classes).to(torch.promote_types(images.dtype, torch.float32))
        return transform(images, shares)


def main_labels(targets: Tensor) -> Tensor:
    """Labels (B,) as they are, or of shares (B, K) the label with the larger one."""
    return targets.argmax(dim=1) if targets.ndim == 2 else targets
