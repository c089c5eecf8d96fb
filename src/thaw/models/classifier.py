"""The model that is fine-tuned: backbone, head, and what one training step does.

Shapes: B batch, C channels, S image side, D feature width.
"""

from collections.abc import Callable

import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from thaw.data.datamodule import Batch
from thaw.data.preprocess import Preprocess
from thaw.models.backbone import Backbone
from thaw.models.freezing import FreezePolicy
from thaw.models.optim import OptimizerRecipe


class Classifier(LightningModule):
    """A backbone and a head, trained with cross-entropy as far as the freezing policy allows.

    Args:
        backbone: images (B, C, S, S) -> features (B, D).
        head: called with the width D, gives a module (B, D) -> logits (B, 10).
        augment: uint8 (B, 28, 28) -> uint8 (B, 28, 28), in training only.
        freeze: decides what trains.
        optim: groups, optimizer and schedule.
        num_classes: number of classes.
        label_smoothing: share of each label spread over all classes (Szegedy et al. 2016, section 7).
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Callable[..., nn.Module],
        augment: nn.Module,
        freeze: FreezePolicy,
        optim: OptimizerRecipe,
        num_classes: int,
        label_smoothing: float,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"model.label_smoothing={label_smoothing} must be from 0 to 1.")
        self.augment = augment
        self.preprocess = Preprocess(backbone.image_size, backbone.channels, backbone.mean, backbone.std)
        self.backbone = backbone
        self.head = head(in_features=backbone.num_features, num_classes=num_classes)
        self.freeze_policy = freeze
        self.optim = optim
        self.label_smoothing = label_smoothing
        self.train_acc = MulticlassAccuracy(num_classes, average="micro")
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 28, 28) -> logits (B, 10)."""
        return self.head(self.backbone(self.preprocess(images)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = self.preprocess(self.augment(batch.images))  # (B, 28, 28) uint8 -> (B, C, S, S)
        logits = self.head(self.backbone(images))  # (B, D) -> (B, 10)
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        self.train_acc(logits, batch.labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self(batch.images)
        self.val_acc(logits, batch.labels)
        size = len(batch.labels)
        self.log("val/loss", F.cross_entropy(logits, batch.labels), sync_dist=True, batch_size=size)
        self.log("val/acc", self.val_acc, prog_bar=True, batch_size=size)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self(batch.images)
        self.test_acc(logits, batch.labels)
        self.log("test/acc", self.test_acc, batch_size=len(batch.labels))
        return logits

    def setup(self, stage: str) -> None:
        if stage == "fit":
            fresh = frozenset(f"backbone.{name}" for name in self.backbone.fresh)
            self.freeze_policy.apply(self, self.depths(), fresh)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return self.optim.build(self.named_parameters(), self.depths(), self.trainer.estimated_stepping_batches)

    def depths(self) -> dict[str, int]:
        """Depth of every parameter: 0 for the backbone's stem, 1 for its first block, ...; the head is the deepest."""
        depths = {f"backbone.{name}": depth for name, depth in self.backbone.depths().items()}
        num_layers = max(depths.values()) + 1
        return depths | {f"head.{name}": num_layers for name, _ in self.head.named_parameters()}
