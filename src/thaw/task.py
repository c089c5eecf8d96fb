"""The task: which loss is trained, which metric is shown, and how logits become probabilities.

Another loss is a subclass of `SingleLabel`, named by `model.task._target_`. Another task, such as several labels an
image, is a class with these methods and `class_weights`; its labels are int64 (N, K), 1 for each label of an image.
`eval.py`, `export.py`, `probe.py`, `head=lr_bank` and `mix` are for one class an image.
"""

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from thaw.run.errors import UserError


class SingleLabel:
    """Each image has one of K classes: cross-entropy, accuracy, softmax.

    Args:
        label_smoothing: share of each label spread over all classes in training (Szegedy et al. 2016, section 7).

    Attributes:
        class_weights: (K,) of the classes in the training loss, or None; see `data.class_weights`.
    """

    def __init__(self, num_classes: int, label_smoothing: float) -> None:
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.class_weights: Tensor | None = None

    def training_loss(self, logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Of logits (B, K) and labels (B,), or shares of the classes (B, K): the mean, or with `none` (B,)."""
        if self.class_weights is not None and reduction == "mean":  # torch's mean divides by the sum of the weights
            return self.training_loss(logits, targets, "none").mean()
        return F.cross_entropy(
            logits, targets, self.class_weights, reduction=reduction, label_smoothing=self.label_smoothing
        )

    def loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Of validation and test images: neither smoothed nor weighted."""
        return F.cross_entropy(logits, labels, reduction=reduction)

    def metric(self) -> Metric:
        # validate_args would make the host wait for a GPU in every step
        return MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K) -> (B, K)."""
        return logits.softmax(dim=1)


def is_single_label(task: object) -> bool:
    """Whether logits are those of one class an image; `getattr` as pretraining has no task."""
    return getattr(type(task), "probabilities", None) is SingleLabel.probabilities


def check_single_label(task: object, wants: str) -> None:
    """Raise UserError for a task that `wants`, a command or setting, does not know."""
    if not is_single_label(task):
        raise UserError(f"{wants} is for one class an image, and this model's task is {type(task).__name__}.")
