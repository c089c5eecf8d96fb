"""The model that is fine-tuned: backbone, head, and what one training step does.

Shapes: B batch, C channels, S image side, D feature width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics.classification import MulticlassAccuracy

from thaw.data.augment import Augment
from thaw.data.datamodule import Batch, ImageDataset
from thaw.data.mix import Mix, main_labels
from thaw.data.preprocess import Preprocess
from thaw.freezing.features import FeatureCache
from thaw.freezing.frozen_features import frozen_features
from thaw.freezing.lora import plain_name
from thaw.freezing.policy import FreezePolicy
from thaw.freezing.slim import drop_frozen, fill_frozen, frozen_names, refer_to_frozen
from thaw.freezing.table import span
from thaw.models.backbone import Backbone
from thaw.optim import OptimizerRecipe


class Classifier(LightningModule):
    """A backbone and a head, trained with cross-entropy as far as the freezing policy allows.

    Args:
        backbone: images (B, C, S, S) -> features (B, D).
        head: called with the width D, gives a module (B, D) -> logits (B, 10).
        augment: uint8 (B, 28, 28) -> uint8 (B, 28, 28), in training only.
        mix: images (B, C, S, S) and labels (B,) -> images and shares of the classes (B, 10), in training only.
        freeze: decides what trains.
        optim: groups, optimizer and schedule.
        num_classes: number of classes.
        label_smoothing: share of each label spread over all classes (Szegedy et al. 2016, section 7).
        cache: keeps what the layers that never train give for each digit.
        compile: compile the backbone's layers with torch.compile.
        self_contained: checkpoints hold the frozen tensors too, instead of a reference to `backbone.weights`.

    Attributes:
        cut: how many of the backbone's layers, counted from the stem, are frozen in the present epoch.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Callable[..., nn.Module],
        augment: Augment,
        mix: Mix,
        freeze: FreezePolicy,
        optim: OptimizerRecipe,
        num_classes: int,
        label_smoothing: float,
        cache: FeatureCache,
        compile: bool,
        self_contained: bool,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"model.label_smoothing={label_smoothing} must be from 0 to 1.")
        self.augment: Augment = augment
        self.mix: Mix = mix
        self.num_classes = num_classes
        self.preprocess = Preprocess(backbone.image_size, backbone.channels, backbone.mean, backbone.std)
        self.backbone = backbone
        if freeze.lora:
            freeze.lora(backbone)
        if compile:
            backbone.compile_layers()
        self.head = head(in_features=backbone.num_features, num_classes=num_classes)
        self.freeze_policy = freeze
        self.optim = optim
        self.label_smoothing = label_smoothing
        self.cache = cache
        self.self_contained = self_contained
        self.reference: dict[str, Any] | None = None  # to the frozen tensors, in checkpoints
        self.cut = 0
        self.kept: list[ImageDataset] = []  # those whose batches carry features
        # validate_args would make the host wait for a GPU in every step
        self.train_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 28, 28) -> logits (B, 10)."""
        return self.head(self.backbone(self.preprocess(images)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        targets = batch.labels  # (B,), or (B, 10) where images are mixed
        if batch.features is None:
            images = self.preprocess(self.augment(batch.images))  # (B, 28, 28) uint8 -> (B, C, S, S)
            images, targets = self.mix(images, targets, self.num_classes)
            features = self.backbone(images)  # (B, D)
        else:  # the layers that never train have run already
            features = self.backbone.suffix(batch.features.to(self.dtype), self.cut)  # (B, T, D) or (B, D) -> (B, D)
        logits = self.head(features)  # (B, 10)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        self.train_acc.update(logits, main_labels(targets))  # of a mixed image the label with the larger share
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        if self.train_acc.update_called:  # a run that goes on from the end of an epoch ends it once more
            self.log("train/acc", self.train_acc)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if batch.features is None:
            logits = self(batch.images)
        else:
            logits = self.head(self.backbone.suffix(batch.features.to(self.dtype), self.cut))
        self.val_acc.update(logits, batch.labels)
        loss = F.cross_entropy(logits, batch.labels)
        self.log("val/loss", loss, sync_dist=True, batch_size=len(batch.labels))

    def on_validation_epoch_end(self) -> None:
        self.log("val/acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self(batch.images)
        self.test_acc.update(logits, batch.labels)
        return logits

    def on_test_epoch_end(self) -> None:
        self.log("test/acc", self.test_acc)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.reference = None
            self.thaw()
            self.cut, _ = self.frozen_layers()

    def thaw(self) -> list[str]:
        """Do what the freezing policy says of the present epoch; returns the names of the parameters it changed."""
        depths = self.depths()
        random = {f"backbone.{name}" for name in self.backbone.fresh}
        fresh = frozenset(name for name in depths if plain_name(name) in random)
        thaw_epochs = self.freeze_policy.thaw_epochs(depths)
        useless = [name for name, epoch in thaw_epochs.items() if "lora_" in name and epoch == math.inf]
        if useless:
            raise ValueError(
                f"freeze.lora adds {useless[0]} and {len(useless) - 1} more, but freeze.rules never train them; add "
                r"the rule {match: '.*\.lora_[AB]', train: true}, or set freeze.lora to null."
            )
        return self.freeze_policy.apply(self, depths, fresh, self.current_epoch)

    def frozen_layers(self) -> tuple[int, float]:
        """How many of the backbone's layers are frozen below all that trains, and in which epoch that will change."""
        thaw_epochs = self.freeze_policy.thaw_epochs(self.depths())
        lowest = {len(self.backbone.layers): 0.0}  # layer -> the epoch from which it is the lowest that trains
        for name, _ in self.backbone.named_parameters():
            layer = self.backbone.layer_of(name)
            lowest[layer] = min(lowest.get(layer, math.inf), thaw_epochs[f"backbone.{name}"])
        cut = min(layer for layer, epoch in lowest.items() if epoch <= self.current_epoch)
        return cut, min((epoch for layer, epoch in lowest.items() if layer < cut), default=math.inf)

    def on_train_start(self) -> None:
        self.thaw()
        if self.current_epoch:  # resumed
            self.sum_gradients_anew()
        self.say_what_stays_frozen()
        self.cut, _ = self.frozen_layers()
        self.keep_frozen()

    def on_train_epoch_start(self) -> None:
        due = self.current_epoch in self.freeze_policy.thaw_epochs(self.depths()).values()
        if due and (thawed := self.thaw()):
            self.say_thawed(thawed)
            self.sum_gradients_anew()
            cut, until = self.frozen_layers()
            if cut != self.cut:
                self.forget_features()
                self.cut = cut
                if min(until, self.trainer.max_epochs or math.inf) - self.current_epoch > 1:  # else not worth a pass
                    self.keep_frozen()
        self.check_kept()

    def say_thawed(self, names: list[str]) -> None:
        if self.trainer.is_global_zero:
            depths = sorted({depth for name, depth in self.depths().items() if name in names})
            numbers = sum(self.get_parameter(name).numel() for name in names)
            print(
                f"after {self.current_epoch} epochs: depth {span(depths[0], depths[-1])} thaws, {numbers:,} parameters"
            )

    def say_what_stays_frozen(self) -> None:
        last = self.trainer.max_epochs or math.inf
        late = [e for e in self.freeze_policy.thaw_epochs(self.depths()).values() if last <= e < math.inf]
        if late and last > 0 and self.trainer.is_global_zero:
            print(
                f"freeze: {len(late)} tensors would thaw after {min(late)} epochs or more; training ends after {last}"
            )

    def sum_gradients_anew(self) -> None:
        """DistributedDataParallel sums the gradients of what trained when it was built over the processes."""
        strategy: Any = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            strategy.model = self
            strategy.configure_ddp()

    def keep_frozen(self) -> None:
        """Run the frozen layers once over the digits; training and validation batches carry their output."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it at run time
        if datamodule is None:
            return
        if self.mix.is_on and datamodule.batch_size == 1:
            raise ValueError("data.batch_size=1 leaves no image to mix with; set it to 2 or more, or mix=none.")
        if isinstance(getattr(self.head, "norm", None), _BatchNorm) and datamodule.batch_size == 1:
            raise ValueError("data.batch_size=1 has no statistics for head.norm=batch; set it to 2 or more.")
        if not self.cut:
            some_frozen = not all(parameter.requires_grad for parameter in self.backbone.parameters())
            self.cache.nothing_to_keep(some_frozen, self.trainer)
            return
        if self.mix.is_on:
            self.cache.keep_nothing("images are mixed anew in every step (mix=none would keep features)", self.trainer)
            return
        views = self.cache.num_views(self.augment.is_random, self.trainer)
        if views:
            self.keep_features(
                "train", datamodule.split_dataset("train"), views, self.augment if self.augment.is_random else None
            )
            self.keep_features("val", datamodule.split_dataset("val"), 1, None)

    def keep_features(self, split: str, dataset: ImageDataset, views: int, augment: Augment | None) -> None:
        """Give a split's batches the output of the first `cut` layers."""

        def prepare(images: Tensor) -> Tensor:  # (B, 28, 28) uint8 -> (B, C, S, S)
            return self.preprocess(augment(images) if augment else images)

        features = frozen_features(
            split,
            dataset.data.images,
            prepare,
            augment and augment.settings,
            views,
            self.backbone,
            self.cut,
            self.cache,
            self.trainer,
        )
        if features is not None and self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            features = features.to(self.device) if features.nbytes < free / 2 else features
        dataset.features = features
        if features is not None:
            self.kept.append(dataset)

    def check_kept(self) -> None:
        """Refuse to train on kept features what their layers would change."""
        if not self.kept:
            return
        for name, parameter in self.backbone.named_parameters():
            if parameter.requires_grad and self.backbone.layer_of(name) < self.cut:
                raise ValueError(
                    f"backbone.{name} trains now, but lies in the {self.cut} layers that were frozen when their output "
                    "was kept. Let the freezing policy name it (from_epoch says when), or set cache.mode=off."
                )

    def on_train_end(self) -> None:
        """What is validated and tested from here on starts from pixels."""
        self.forget_features()

    def forget_features(self) -> None:
        while self.kept:
            self.kept.pop().features = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rounded = self.dtype in (torch.float64, torch.bfloat16)  # trainer.precision=64-true: not the file's own bits
        if self.self_contained or rounded or self.backbone.weights == "none":
            return
        if self.reference is None:
            names = frozen_names(self, self.freeze_policy.thaw_epochs(self.depths()))
            self.reference = refer_to_frozen(names, self.state_dict(), self.backbone.weights)
        drop_frozen(checkpoint, self.reference)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fill_frozen(checkpoint, self.state_dict())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        depths = self.depths()
        return self.optim.build(self.named_parameters(), depths, self.freeze_policy.thaw_epochs(depths), self.trainer)

    def depths(self) -> dict[str, int]:
        """Depth of every parameter: 0 for the backbone's stem, 1 for its first block, ...; the head is the deepest."""
        depths = {f"backbone.{name}": depth for name, depth in self.backbone.depths().items()}
        num_layers = max(depths.values()) + 1
        return depths | {f"head.{name}": num_layers for name, _ in self.head.named_parameters()}
