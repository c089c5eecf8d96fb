"""Labels that are probably wrong: confident learning (Northcutt et al. 2021) by cleanlab."""

from typing import Any

import numpy as np
from torch import Tensor

from thaw.run.errors import UserError


def check_cleanlab() -> None:
    """Raise UserError where cleanlab is not installed."""
    try:
        import cleanlab.filter
        import cleanlab.rank  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("clean.py needs cleanlab, which is not installed; run: pip install -e '.[clean]'.") from error


def label_scores(labels: Tensor, probabilities: Tensor) -> np.ndarray:
    """The probability (N,) of each given label, cleanlab's self-confidence: the lowest are the first to check."""
    from cleanlab.rank import get_label_quality_scores

    return get_label_quality_scores(*as_arrays(labels, probabilities), method="self_confidence")


def label_issues(labels: Tensor, probabilities: Tensor, threshold: float | None) -> np.ndarray:
    """Indices of the images whose labels (N,) are probably wrong, the most certain first.

    Args:
        probabilities: (N, K), of models that have not seen the image's label.
        threshold: of the given label's probability, below which it counts as wrong; None stands for confident learning,
            which estimates for each pair of classes how many labels are wrong. Where all labels are of one class, those
            of images that another one fits better count as wrong.
    """
    scores = label_scores(labels, probabilities)
    if threshold is not None:
        order = np.argsort(scores, kind="stable")
        return order[scores[order] < threshold]
    if len(labels.unique()) < 2:  # which cleanlab refuses
        order = np.argsort(scores, kind="stable")
        return order[(probabilities.argmax(dim=1) != labels).cpu().numpy()[order]]
    from cleanlab.filter import find_label_issues

    by: Any = {"return_indices_ranked_by": "self_confidence", "n_jobs": 1}
    return find_label_issues(*as_arrays(labels, probabilities), **by)


def as_arrays(labels: Tensor, probabilities: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return labels.cpu().numpy(), probabilities.cpu().double().numpy()
