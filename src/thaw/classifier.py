"""The model that is fine-tuned: backbone, head, and one training step.

Shapes: B batch, T tokens, D feature width, C channels, S image side, K classes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thaw.data.augment import Augment
from thaw.data.loader import Batch
from thaw.data.mix import Mix, main_labels
from thaw.data.preprocess import Preprocess
from thaw.freezing.cache import FeatureCache
from thaw.freezing.features import FrozenFeatures
from thaw.freezing.policy import FreezePolicy
from thaw.freezing.schedule import FreezeSchedule
from thaw.freezing.slim import drop_frozen, fill_frozen, refer_to_frozen
from thaw.models.backbone import Backbone
from thaw.models.parallel import forward_in_threads
from thaw.optim import OptimizerRecipe
from thaw.run.errors import UserError
from thaw.run.steps import is_logged
from thaw.run.values import Count, Probability
from thaw.task import Distillation, SingleLabel, check_single_label


class Classifier(LightningModule):
    """A backbone and a head, trained for a task as far as the freezing policy allows."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        features, targets, soft_targets = self.training_features(batch)  # (B, D); (B,) or mixed (B, K); (B, K)
        logits = self.head(features)  # (B, K)
        loss = self.task.training_loss(logits, targets)
        if soft_targets is not None:  # of the teachers that distill= names
            loss = self.distillation.loss(loss, logits, soft_targets)
        self.train_acc.update(logits, main_labels(targets))  # of a mixed image the label with the larger share
        if is_logged(self._trainer):
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def training_features(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        targets, soft_targets = batch.labels, batch.soft_targets
        if batch.features is not None:  # the frozen layers have run already
            return self.features(batch), targets, soft_targets
        images = self.preprocess(self.augment(batch.images))  # (B, C, H, W) uint8 -> (B, C, S, S)
        if soft_targets is None:
            images, targets = self.mix(images, targets, self.num_classes)
        elif self.mix.is_on:  # both in the same shares
            both = torch.cat([F.one_hot(targets, self.num_classes), soft_targets], dim=1)  # (B, 2 K)
            images, both = self.mix(images, both, self.num_classes)
            targets, soft_targets = both.split(self.num_classes, dim=1)
        return self.backbone(images), targets, soft_targets

    def features(self, batch: Batch) -> Tensor:
        """(B, D) of images as they are, for validation and test, or of cached features (B, T, D) or (B, D)."""
        if batch.features is None:
            return forward_in_threads(self.encode, batch.images, self._trainer)
        return self.backbone.suffix(batch.features.to(self.dtype), self.cut)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self.head(self.features(batch))
        self.val_acc.update(logits, batch.labels)
        self.log("val/loss", self.task.loss(logits, batch.labels), sync_dist=True, batch_size=len(batch.labels))

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.head(self.features(batch))
        self.test_acc.update(logits, batch.labels)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> logits (B, K)."""
        return self.head(self.encode(images))

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> (B, D)."""
        return self.backbone(self.preprocess(images))

    def __init__(
        self,
        backbone: Backbone,
        head: Callable[..., nn.Module],
        augment: Augment,
        mix: Mix,
        freeze: FreezePolicy,
        optim: OptimizerRecipe,
        num_classes: Count,
        label_smoothing: Probability,
        task: Callable[..., SingleLabel],
        distillation: Distillation,
        cache: FeatureCache,
        compile: bool,
        self_contained: bool,
    ) -> None:
        """
        Args:
            backbone: images (B, C, S, S) -> features (B, D).
            head: called with the width D, gives a module (B, D) -> logits (B, K).
            augment: uint8 (B, C, H, W) -> uint8 (B, C, H, W), in training only.
            mix: images (B, C, S, S) and labels (B,) -> images and shares of the classes (B, K), in training only.
            freeze: the freezing policy, which is bound to this model as `self.thaw`.
            num_classes: K.
            label_smoothing: see `thaw.task.SingleLabel`.
            task: called with `num_classes` and `label_smoothing`, gives the loss, the metric and the probabilities.
            distillation: the loss where the batches of a run have soft targets.
            cache: for the output of the layers that never train.
            self_contained: checkpoints hold the frozen tensors too, instead of a reference to `backbone.weights`.
        """
        super().__init__()
        self.augment: Augment = augment
        self.mix: Mix = mix
        self.num_classes = num_classes
        self.preprocess = Preprocess(backbone.image_size, backbone.channels, backbone.mean, backbone.std)
        self.backbone = backbone
        if freeze.add:
            freeze.add(backbone)
        if compile:
            backbone.compile_layers()
        self.head = head(in_features=backbone.num_features, num_classes=num_classes)
        self.thaw = freeze.bind(self, self.depths())
        self.cut = 0  # layers of the backbone, counted from the stem, that cached features have passed
        self.optim = optim
        self.task = task(num_classes=num_classes, label_smoothing=label_smoothing)
        self.distillation = distillation
        self.cache = cache
        self.frozen_features = FrozenFeatures(cache)  # kept, as Lightning asks for callbacks again before a test
        self.self_contained = self_contained
        self.reference: dict[str, Any] | None = None  # to the frozen tensors, in checkpoints
        self.train_acc, self.val_acc, self.test_acc = (self.task.metric() for _ in range(3))

    def depths(self) -> dict[str, int]:
        """Depth of every parameter: 0 for the backbone's stem, 1 for its first block, ...; the head is the deepest."""
        depths = {f"backbone.{name}": depth for name, depth in self.backbone.depths().items()}
        num_layers = max(depths.values()) + 1
        return depths | {f"head.{name}": num_layers for name, _ in self.head.named_parameters()}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return self.optim.build(self.named_parameters(), self.thaw.depths, self.thaw.epochs, self.trainer)

    def configure_callbacks(self) -> list[Callback]:
        return [FreezeSchedule(), self.frozen_features]

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        self.reference = None
        if self.mix.is_on:
            check_single_label(self.task, "mix")
        trainer: Any = self.trainer
        if getattr(trainer.datamodule, "batch_size", None) == 1:
            if self.mix.is_on:
                raise UserError("data.batch_size=1 leaves no image to mix with; set it to 2 or more, or mix=none.")
            if isinstance(getattr(self.head, "norm", None), _BatchNorm):
                raise UserError("data.batch_size=1 has no statistics for head.norm=batch; set it to 2 or more.")

    def on_fit_start(self) -> None:
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it at run time
        if getattr(datamodule, "class_weights", None):
            self.task.class_weights = datamodule.shares().to(self.device, self.dtype)

    def on_train_epoch_start(self) -> None:  # not where a run resumes within an epoch, or at its end
        self.train_acc.reset()

    def on_train_epoch_end(self) -> None:
        if self.train_acc.update_called:
            self.log("train/acc", self.train_acc)

    def on_validation_epoch_end(self) -> None:
        self.log("val/acc", self.val_acc, prog_bar=True)

    def on_test_epoch_end(self) -> None:
        self.log("test/acc", self.test_acc)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["epoch_so_far"] = self.epoch_so_far()
        rounded = self.dtype in (torch.float64, torch.bfloat16)  # trainer.precision=64-true: not the file's own bits
        if self.self_contained or rounded or self.backbone.weights == "none":
            return
        if self.reference is None:
            self.reference = refer_to_frozen(self.thaw.constant(), self.state_dict(), self.backbone.weights)
        drop_frozen(checkpoint, self.reference)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fill_frozen(checkpoint, self.state_dict())
        if self._trainer is not None and "epoch_so_far" in checkpoint:
            self.continue_epoch(checkpoint["epoch_so_far"])

    def epoch_so_far(self) -> dict[str, Any]:
        """The training metric of the epoch that is not over, of all processes together."""
        with self.train_acc.sync_context():
            return {"updates": self.train_acc.update_count, "state": dict(self.train_acc.metric_state)}

    def continue_epoch(self, so_far: dict[str, Any]) -> None:
        """Let the first process continue with `epoch_so_far`: at the end of the epoch all are taken together again."""
        self.train_acc._update_count = so_far["updates"]
        for name, value in so_far["state"].items() if self.trainer.is_global_zero else ():
            is_list = isinstance(self.train_acc._defaults[name], list)
            setattr(self.train_acc, name, [value] if is_list and isinstance(value, Tensor) else value)
        self.train_acc.to(self.device)
