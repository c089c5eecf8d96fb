"""The model that is fine-tuned: backbone, head, and what one training step does.

Shapes: B batch, C channels, S image side, D feature width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from thaw.data.augment import Augment
from thaw.data.datamodule import Batch, DigitDataset
from thaw.data.preprocess import Preprocess
from thaw.models.backbone import Backbone
from thaw.models.feature_cache import FeatureCache, digest
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
        cache: keeps what the layers that never train give for each digit.
        compile: compile the backbone's layers with torch.compile.

    Attributes:
        cut: how many of the backbone's layers, counted from the stem, never train.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Callable[..., nn.Module],
        augment: Augment,
        freeze: FreezePolicy,
        optim: OptimizerRecipe,
        num_classes: int,
        label_smoothing: float,
        cache: FeatureCache,
        compile: bool,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"model.label_smoothing={label_smoothing} must be from 0 to 1.")
        self.augment: Augment = augment
        self.preprocess = Preprocess(backbone.image_size, backbone.channels, backbone.mean, backbone.std)
        self.backbone = backbone
        if compile:
            backbone.compile_layers()
        self.head = head(in_features=backbone.num_features, num_classes=num_classes)
        self.freeze_policy = freeze
        self.optim = optim
        self.label_smoothing = label_smoothing
        self.cache = cache
        self.cut = 0
        self.kept: list[DigitDataset] = []  # those whose batches carry features
        # validate_args would make the host wait for a GPU in every step
        self.train_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 28, 28) -> logits (B, 10)."""
        return self.head(self.backbone(self.preprocess(images)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch.features is None:
            images = self.preprocess(self.augment(batch.images))  # (B, 28, 28) uint8 -> (B, C, S, S)
            features = self.backbone(images)  # (B, D)
        else:  # the layers that never train have run already
            features = self.backbone.suffix(batch.features.to(self.dtype), self.cut)  # (B, T, D) or (B, D) -> (B, D)
        logits = self.head(features)  # (B, 10)
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        self.train_acc.update(logits, batch.labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
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
            fresh = frozenset(f"backbone.{name}" for name in self.backbone.fresh)
            self.freeze_policy.apply(self, self.depths(), fresh)
            trains = [self.backbone.layer_of(name) for name, p in self.backbone.named_parameters() if p.requires_grad]
            self.cut = min(trains, default=len(self.backbone.layers))

    def on_train_start(self) -> None:
        """Run the layers that never train once over the digits; training and validation batches carry their output."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it at run time
        if datamodule is None:
            return
        if not self.cut:
            some_frozen = not all(parameter.requires_grad for parameter in self.backbone.parameters())
            self.cache.nothing_to_keep(some_frozen, self.trainer)
            return
        views = self.cache.num_views(self.augment.is_random, self.trainer)
        if views:
            self.keep_features(
                "train", datamodule.split_dataset("train"), views, self.augment if self.augment.is_random else None
            )
            self.keep_features("val", datamodule.split_dataset("val"), 1, None)

    def keep_features(self, split: str, dataset: DigitDataset, views: int, augment: Augment | None) -> None:
        """Give a split's batches the output of the first `cut` layers."""
        tokens = self.cut < len(self.backbone.layers)
        autocast = self.trainer.precision_plugin.forward_context

        @torch.no_grad()
        def compute(indices: Tensor) -> Tensor:  # (B,) -> (B, T, D) or (B, D)
            images = dataset.digits.images  # on the CPU where worker processes fetch batches
            images = images[indices.to(images.device)].to(self.device)
            with autocast():
                features = self.backbone.prefix(self.preprocess(augment(images) if augment else images), self.cut)
            return features.bfloat16() if tokens and "bf16" in self.trainer.precision else features.contiguous()

        facts = {
            "backbone": self.backbone.architecture,
            "layers": self.cut,
            "weights": digest(self.backbone.layers_state(self.cut)),
            "digits": digest({split: dataset.digits.images}),
            "augment": augment and augment.settings,
            "precision": self.trainer.precision,
        }
        features = self.cache.features(
            split, len(dataset), views, compute, self.backbone.num_tokens, facts, self.trainer
        )
        if features is not None and self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            features = features.to(self.device) if features.nbytes < free / 2 else features
        dataset.features = features
        if features is not None:
            self.kept.append(dataset)

    def on_train_epoch_start(self) -> None:
        """Refuse to train on kept features what their layers would change."""
        if not self.kept:
            return
        for name, parameter in self.backbone.named_parameters():
            if parameter.requires_grad and self.backbone.layer_of(name) < self.cut:
                raise ValueError(
                    f"backbone.{name} trains now, but lies in the {self.cut} layers that were frozen when their output "
                    "was kept. Let the freezing policy name it from the start, or set cache.mode=off."
                )

    def on_train_end(self) -> None:
        """What is validated and tested from here on starts from pixels."""
        while self.kept:
            self.kept.pop().features = None

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return self.optim.build(self.named_parameters(), self.depths(), self.trainer.estimated_stepping_batches)

    def depths(self) -> dict[str, int]:
        """Depth of every parameter: 0 for the backbone's stem, 1 for its first block, ...; the head is the deepest."""
        depths = {f"backbone.{name}": depth for name, depth in self.backbone.depths().items()}
        num_layers = max(depths.values()) + 1
        return depths | {f"head.{name}": num_layers for name, _ in self.head.named_parameters()}
