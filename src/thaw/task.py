"""The task: which loss is trained, which metric is shown, and how logits become probabilities.

Another task, such as multi-label classification or regression, is another class with these methods.
"""

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy


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

    def training_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch, of logits (B, K) and labels (B,), or shares of the classes (B, K)."""
        if self.class_weights is not None:  # torch would divide by the weights' sum, which differs between batches
            return self.training_losses(logits, targets).mean()
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def training_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """As `training_loss`, but of each image (B,)."""
        weights, smoothing = self.class_weights, self.label_smoothing
        return F.cross_entropy(logits, targets, weights, reduction="none", label_smoothing=smoothing)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each validation or test image (B,), neither smoothed nor weighted."""
        return F.cross_entropy(logits, labels, reduction="none")

    def metric(self) -> Metric:
        # validate_args would make the host wait for a GPU in every step
        return MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K) -> (B, K)."""
        return logits.softmax(dim=1)
