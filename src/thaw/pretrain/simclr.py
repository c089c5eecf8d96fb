"""Self-supervised pretraining by SimCLR (Chen et al. 2020, arXiv:2002.05709): two views of an image should agree.

Shapes: B batch, D feature width, P projection width, N images.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thaw.data.augment import Augment
from thaw.models.backbone import Backbone
from thaw.optim import OptimizerRecipe
from thaw.pretrain.objective import Objective
from thaw.run.errors import UserError
from thaw.run.values import Count, Positive

ALONE = (
    "A step on 1 image has nothing to contrast it with: choose data.batch_size (256 is common) and "
    "data.eval_batch_size of 2 or more that leave no single image over."
)


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (Chen et al. 2020, equation 1 and algorithm 1).

    Args:
        projections: (2B, P), rows i and i + B being two views of the same image.
        temperature: divides the cosine similarities.

    Returns:
        the mean over all 2B rows of -log(exp(positive) / sum of exp over the other 2B - 1 rows).

    Raises:
        UserError: a single image, which leaves nothing to contrast.
    """
    if len(projections) < 4:
        raise UserError(ALONE)
    z = F.normalize(projections.float(), dim=1)
    with torch.autocast(z.device.type, enabled=False):  # a product in bf16 would be off by 0.004 / temperature
        similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # (2B, 2B)
    half = len(z) // 2
    positives = torch.arange(2 * half, device=z.device).roll(half)  # row i pairs with i + B, and i + B with i
    return F.cross_entropy(similarity, positives)


class SimCLR(Objective):
    """A projection head on the backbone, trained with NT-Xent on two augmented views.

    The negatives of an image are all other images of the step, on every process.

    Args:
        hidden: width of the projection head's hidden layer.
        projection: width P of the projection head's output.
        temperature: of NT-Xent; 0.1 to 0.5 is common.
    """

    def loss(self, images: Tensor) -> Tensor:
        views = self.augment(images.repeat(2, 1, 1, 1))  # (2B, C, H, W) uint8
        projections = self.projector(self.features(views))  # (2B, P)
        first, second = (self.gather(z) for z in projections.chunk(2))  # (B, P) of all processes
        return nt_xent(torch.cat([first, second]), self.temperature)

    def __init__(
        self,
        backbone: Backbone,
        augment: Augment,
        optim: OptimizerRecipe,
        output: str,
        hidden: Count,
        projection: Count,
        temperature: Positive,
    ) -> None:
        super().__init__(backbone, augment, optim, output)
        if not augment.is_random:
            raise UserError(
                "model=simclr compares two views of an image, and augment=none makes them equal; "
                "choose augment=strong or augment=affine."
            )
        width = backbone.num_features
        self.projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, projection))
        self.temperature = temperature

    def on_fit_start(self) -> None:
        """Refuse a last batch of one image; several processes get it with the batch before."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it at run time
        sizes = {"train": getattr(data, "batch_size", 2), "val": getattr(data, "eval_batch_size", 2)}
        for split, size in sizes.items() if self.trainer.world_size == 1 and hasattr(data, "split_dataset") else ():
            if (count := len(data.split_dataset(split))) and 1 in (size, count % size):
                raise UserError(f"{count:,} {split} images in batches of {size}: {ALONE}")

    def contact_sheet(self, images: Tensor) -> tuple[list[Tensor], list[str]]:
        """Images, and below each its nearest neighbours among the others by the cosine of the features."""
        z = F.normalize(self.features(images).float(), dim=1)  # (N, D)
        similarity = (z @ z.T).fill_diagonal_(-torch.inf)[:16]  # (16, N)
        nearest = similarity.topk(min(5, len(images) - 1)).indices.T  # (5, 16)
        return [images[:16], *images[nearest]], ["image", *(f"nearest {n + 1}" for n in range(len(nearest)))]
