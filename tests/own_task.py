"""Tasks and parts as docs/fork.md has them: several labels an image, another loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAccuracy

from thaw.data.images import Images, Source
from thaw.data.mnist import MNISTData
from thaw.task import SingleLabel

TAGS = {"even": [0, 2, 4, 6, 8], "round": [0, 6, 8, 9], "large": [5, 6, 7, 8, 9]}


class Focal(SingleLabel):
    """Lin et al. 2017, with gamma = 2."""

    def training_loss(self, logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        losses = super().training_loss(logits, targets, "none")
        return (losses * (1 - (-losses).exp()) ** 2).mean()


class MultiLabel:
    """Each image has any of K labels: binary cross-entropy, mean accuracy of the labels, sigmoid."""

    class_weights = None

    def __init__(self, num_classes: int, label_smoothing: float) -> None:
        self.num_classes = num_classes

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels.float())

    training_loss = loss

    def metric(self) -> Metric:
        return MultilabelAccuracy(self.num_classes)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


def tagged(images: Images) -> Images:
    return images._replace(
        labels=torch.stack([torch.isin(images.labels, torch.tensor(digits)) for digits in TAGS.values()], dim=1).long()
    )


@dataclass(kw_only=True, eq=False)
class TaggedDigits(MNISTData):
    def read(self) -> Source:
        source = super().read()
        train, val, test = map(tagged, (source.train, source.val, source.test))
        return source._replace(train=train, val=val, test=test, classes=list(TAGS))
