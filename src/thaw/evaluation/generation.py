"""How good generated images are: their distribution against that of real images, in a backbone's features.

Shapes: N images, D feature width.
"""

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from thaw.data.batches import by_batches
from thaw.data.preprocess import Preprocess
from thaw.models.backbone import Backbone


@torch.no_grad()
def image_features(backbone: Backbone, images: Tensor, title: str | None = None) -> Tensor:
    """uint8 (N, C, H, W) -> float32 (N, D), in eval mode, on the images' device; with a `title` progress is shown."""
    backbone.eval().to(images.device)
    preprocess = Preprocess(backbone.image_size, backbone.channels, backbone.mean, backbone.std).to(images.device)
    return by_batches(lambda batch: backbone(preprocess(batch)).float(), images, title=title)


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Squared Fréchet distance of two normal distributions with the moments of the features (Heusel et al. 2017).

    0 is best; few images raise it, so that only sets of equal sizes compare. Both sets need two images or more.
    """
    features = nn.Identity()
    features.num_features = real.shape[1]  # type: ignore[assignment]
    distance = FrechetInceptionDistance(features, sync_on_compute=False)  # every process holds all features
    distance.update(real.cpu(), real=True)  # in float64, which MPS lacks
    distance.update(fake.cpu(), real=False)
    return float(distance.compute())


def precision_and_recall(real: Tensor, fake: Tensor, neighbours: int) -> tuple[float, float]:
    """Share of generated images that look real, and of real ones that could be generated (Kynkäänniemi et al. 2019).

    Precision is the share of `fake` in the manifold of `real`: within the distance of any real image to its k-th
    nearest other real image (equations 1 and 2 there). Recall is the same with the sets exchanged.
    The paper takes 3 neighbours.
    """
    return inside(real, fake, neighbours), inside(fake, real, neighbours)


def inside(manifold: Tensor, points: Tensor, neighbours: int) -> float:
    """Share of the points (M, D) within the k-th neighbour's distance of any row of the manifold (N, D)."""
    k = min(neighbours, len(manifold) - 1)
    own = distances(manifold, manifold).fill_diagonal_(0)
    radii = own.kthvalue(k + 1, dim=1).values  # (N,), the nearest being itself
    return float((distances(points, manifold) <= radii).any(dim=1).float().mean())


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, (M, N); the expansion |a|^2 - 2ab + |b|^2 would lose the decimals of small ones."""
    return torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist")
