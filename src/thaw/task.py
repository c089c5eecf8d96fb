"""The task: which loss is trained, which metric is shown, and how logits become probabilities.

Another loss is a subclass of `SingleLabel`, named by `model.task._target_`. Another task, such as several labels an
image, is a class with these methods and `class_weights`; its labels are int64 (N, K), 1 for each label of an image.
`eval.py`, `export.py`, `probe.py`, `head=lr_bank` and `mix` are for one class an image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from thaw.run.errors import UserError
from thaw.run.values import Positive, Probability


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


class Distillation:
    """Lets a student learn the probabilities of its teachers beside the labels (Hinton et al. 2015, arXiv:1503.02531).

    The loss is (1 - a) L + a T^2 KL(q || p), with L the loss on the labels, q the teachers' probabilities and p the
    student's, both at temperature T. The factor T^2 keeps the size of the gradient where T is changed.

    Args:
        temperature: T; above 1 the small probabilities count more.
        share: a; 1 leaves the labels out.
    """

    def __init__(self, temperature: Positive, share: Probability) -> None:
        self.temperature, self.share = temperature, share

    def soften(self, probabilities: Tensor) -> Tensor:
        """Probabilities (N, K) at temperature T: softmax(log(probabilities) / T)."""
        tiny = torch.finfo(probabilities.dtype).tiny
        return (probabilities.clamp(min=tiny).log() / self.temperature).softmax(dim=1)

    def loss(self, label_loss: Tensor, logits: Tensor, soft_targets: Tensor) -> Tensor:
        """Of L (), the student's logits (B, K) and q (B, K), which `soften` gave."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        student = (logits / self.temperature).log_softmax(dim=1)
        divergence = F.kl_div(student, soft_targets.to(student.dtype), reduction="batchmean")
        return (1 - self.share) * label_loss + self.share * self.temperature**2 * divergence


def is_single_label(task: object) -> bool:
    """Whether logits are those of one class an image; `getattr` as pretraining has no task."""
    return getattr(type(task), "probabilities", None) is SingleLabel.probabilities


def check_single_label(task: object, wants: str) -> None:
    """Raise UserError for a task that `wants`, a command or setting, does not know."""
    if not is_single_label(task):
        raise UserError(f"{wants} is for one class an image, and this model's task is {type(task).__name__}.")
