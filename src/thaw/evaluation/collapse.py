"""Whether features still tell images apart, without labels; features are (N, D)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_std(features: Tensor) -> float:
    """Deviation of the features on the unit sphere, times the square root of their width (Chen & He 2020, section 4.1).

    1 for features that point in all directions alike, 0 for a constant.
    """
    z = F.normalize(features.float(), dim=1)
    return float(z.std(dim=0).mean() * z.shape[1] ** 0.5)


def effective_rank(features: Tensor) -> float:
    """In how many directions features vary: the exponential of the entropy of their singular values.

    Roy & Vetterli 2007; the features are centred. From 1, a line, to D; 0 for a constant.
    """
    centred = (features - features.mean(dim=0)).double()
    values = torch.linalg.svdvals(centred)
    if values.sum() <= 1e-6 * features.double().norm():  # rounding alone
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())
