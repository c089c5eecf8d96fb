"""Fine-tuning on pseudo-labels: label propagation gives the pool labels, and the most confident are trained on."""

from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

import torch
from lightning import Callback, LightningModule
from pydantic import Field
from torch import Tensor

from thaw.callbacks.soft_targets import SoftTargets
from thaw.data.batches import by_batches
from thaw.data.loader import ImageDataset
from thaw.evaluation.propagation import balance, normalised_graph, spread
from thaw.run.console import say
from thaw.run.errors import UserError
from thaw.run.values import Count

RoundShare: TypeAlias = Annotated[float, Field(gt=0, le=1, strict=True)]


class PseudoLabels(Callback):
    """Trains on all images of few labels (`data.labels_per_class`), in rounds of equally many epochs.

    A round begins with label propagation on the features that the backbone has by then (Iscen et al. 2019). The share
    of the images whose labels it is most sure of trains until the next round; images with a true label always train.

    Args:
        shares: of each round.
        k: see `thaw.evaluation.propagation.propagation`, as for alpha.
    """

    def __init__(
        self,
        shares: Annotated[Sequence[RoundShare], Field(min_length=1, description="e.g. [0.85,0.95]")],
        k: Count,
        alpha: Annotated[float, Field(gt=0, lt=1, strict=True)],
    ) -> None:
        self.shares, self.k, self.alpha = list(shares), k, alpha
        self.dataset: ImageDataset | None = None
        self.round = -1  # of the labels

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.datamodule.load().pool is None:
            raise UserError(
                "callbacks.pseudo_labels needs images without labels: set data.labels_per_class, e.g. to 10."
            )
        if any(isinstance(each, SoftTargets) for each in trainer.callbacks):
            raise UserError(
                "distill= gives the labelled images targets, and callbacks.pseudo_labels all; leave one out."
            )
        if not trainer.fast_dev_run and (trainer.max_epochs < 1 or trainer.max_epochs % len(self.shares)):
            raise UserError(
                f"trainer.max_epochs={trainer.max_epochs} cannot be divided into the {len(self.shares)} rounds of "
                "callbacks.pseudo_labels.shares; set a multiple."
            )
        if trainer.world_size > 1:
            raise UserError(f"trainer.devices={trainer.world_size}: pseudo-labels are for one process; set 1.")
        self.dataset = trainer.datamodule.train_on_pool()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a round; a run that resumes at the end of an epoch does not start the next one by another hook."""
        number = trainer.current_epoch // max(1, trainer.max_epochs // len(self.shares))
        if number != self.round and number < len(self.shares):
            self.label(trainer, pl_module, number)
            self.round = number

    on_train_epoch_start = on_train_start

    def label(self, trainer: Any, pl_module: Any, number: int) -> None:
        """Give all images of the pool a label, and the weight 1 to those that train in this round, else 0."""
        pool = trainer.datamodule.split_dataset("pool").data
        features = backbone_features(trainer, pl_module, pool.images)
        scores = spread(normalised_graph(features, self.k), pool.labels.cpu(), self.alpha)
        confidence, labels = balance(scores).to(pool.labels.device).max(dim=1)
        is_known = pool.labels >= 0
        confidence[is_known] = 1.0
        count = round(self.shares[number] * len(labels))
        self.fill(torch.where(is_known, pool.labels, labels), confidence.topk(count).indices)
        say(f"pseudo-labels, round {number + 1} of {len(self.shares)}: the surest {count:,} of {len(labels):,} train")

    def fill(self, labels: Tensor, chosen: Tensor) -> None:
        assert self.dataset is not None and self.dataset.weights is not None
        self.dataset.data.labels.copy_(labels)
        self.dataset.weights.zero_()[chosen.to(self.dataset.weights.device)] = 1

    def state_dict(self) -> dict[str, Any]:
        if self.dataset is None or self.dataset.weights is None:
            return {}
        return {"round": self.round, "labels": self.dataset.data.labels, "chosen": self.dataset.weights.nonzero()[:, 0]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.dataset is not None:
            self.round = state_dict["round"]
            self.fill(state_dict["labels"], state_dict["chosen"])


@torch.no_grad()
def backbone_features(trainer: Any, pl_module: Any, images: Tensor) -> Tensor:
    """Features (N, D) in float32 of images (N, C, H, W) in eval mode; every module keeps the mode it has."""
    modes = {module: module.training for module in pl_module.backbone.modules()}
    pl_module.backbone.eval()

    def compute(batch: Tensor) -> Tensor:  # (B, C, H, W) -> (B, D)
        return pl_module.backbone(pl_module.preprocess(batch.to(pl_module.device))).float()

    with trainer.precision_plugin.forward_context():
        features = by_batches(compute, images, title="features of the pool")
    for module, mode in modes.items():
        module.training = mode
    return features
