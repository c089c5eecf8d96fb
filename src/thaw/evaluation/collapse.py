"""Whether features still tell digits apart, without labels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_std(features: Tensor) -> float:
    """Deviation of the features on the unit sphere, times the square root of their width (Chen & He 2020, section 4.1).

    1 for features that point in all directions alike, 0 for a constant.

    Args:
        features: (N, D).
    """
    z = F.normalize(features.float(), dim=1)
    return float(z.std(dim=0).mean() * z.shape[1] ** 0.5)


def effective_rank(features: Tensor) -> float:
    """In how many directions features vary: the exponential of the entropy of their singular values.

    Roy & Vetterli 2007; the features are centred. From 1, a line, to D; 0 for a constant.

    Args:
        features: (N, D).
    """
    centred = (features - features.mean(dim=0)).double()
    values = torch.linalg.svdvals(centred)
    scale = features.double().norm()
    if values.sum() <= 1e-6 * scale:  # rounding alone
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
