"""The frozen layers of a backbone run once over the images, instead of in every epoch and in every job of a sweep."""

import logging
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from thaw.data.store import tensors_sha256
from thaw.freezing.cache import FeatureCache
from thaw.models.backbone import Backbone
from thaw.models.packed import can_pack, packed_prefix
from thaw.run.errors import UserError

log = logging.getLogger(__name__)

POOLED_BATCH = 8192  # images in a batch of pooled features in validation and test: Lightning's loop costs 2 ms a batch
CHECKED, LARGEST_DIFFERENCE = 64, 0.02  # images, and the most that their features may differ from pixels' (bf16: 0.004)


class FrozenFeatures(Callback):
    """Gives training and validation batches the output of the layers that are frozen below all that trains.

    `pl_module.cut` says how many layers those are: `pl_module.backbone.suffix(batch.features, cut)` continues from
    there. The validation and test at the end of a run or of a sweep use the cache, too, after a check that pixels give
    the same features. `eval.py` starts from pixels.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache
        self.datasets: list[Any] = []  # those whose batches carry features
        self.trained = False  # on features, to its end

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.cut = pl_module.thaw.cut(trainer.current_epoch)
        self.compute(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch
        cut = pl_module.thaw.cut(epoch)
        if cut != pl_module.cut:
            self.drop()
            pl_module.cut = cut
            until = min(pl_module.thaw.next_cut_epoch(epoch), trainer.max_epochs or math.inf)
            if until - epoch > 1:  # a pass over the images for a single epoch saves nothing
                self.compute(trainer, pl_module)
        if self.datasets:
            check_frozen(pl_module.backbone, cut)

    def after_training(self, pl_module: Any, epoch: int) -> None:
        """Let the validation and test of weights that were trained until `epoch`, by another trainer, use the cache."""
        pl_module.cut = pl_module.thaw.cut(epoch)
        changing = pl_module.mix.is_on or pl_module.augment.is_random
        self.trained = pl_module.cut > 0 and not changing and self.cache.mode != "off"

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.trained = bool(self.datasets)
        self.drop()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.compute_again("val", trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.compute_again("test", trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            self.drop()

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.drop()

    def compute_again(self, split: str, trainer: Any, pl_module: Any) -> None:
        """The features of a split whose model trained on features before, if they are what pixels give."""
        if trainer.state.fn == "fit" or not self.trained:
            return
        try:
            self.attach(split, trainer, pl_module)
        except UserError as error:  # of cache.mode=disk; training is over, and its result is not lost for that
            log.warning("The %s images start from pixels, as their features cannot be cached: %s", split, error)
        self.cache.summarise(trainer)
        for dataset in self.datasets:
            batch = dataset[torch.arange(min(len(dataset), CHECKED))]
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                images = pl_module.preprocess(dataset.data.images[batch.indices].to(pl_module.device))
                pixels = pl_module.backbone.prefix(images, pl_module.cut).float()
            difference = (pixels - batch.features.to(pl_module.device)).norm() / pixels.norm()
            if not difference < LARGEST_DIFFERENCE:
                log.warning(
                    "The cached %s features differ by %.0e from those of pixels, which count.", split, difference
                )
                self.drop()

    def drop(self) -> None:
        while self.datasets:
            dataset = self.datasets.pop()
            dataset.drop_features()

    def compute(self, trainer: Any, pl_module: Any) -> None:
        datamodule = trainer.datamodule
        if datamodule is None:
            return
        if not pl_module.cut:
            some_frozen = not all(parameter.requires_grad for parameter in pl_module.backbone.parameters())
            self.cache.explain_no_layer(some_frozen, trainer)
        elif pl_module.mix.is_on:
            self.cache.refuse("images are mixed at random (mix=none would cache features)", trainer)
        elif pl_module.augment.is_random:
            self.cache.refuse("images are augmented at random (augment=none would cache features)", trainer)
        elif self.cache.mode != "off":
            for split in ("train", "val"):
                self.attach(split, trainer, pl_module)
            self.cache.summarise(trainer)

    def attach(self, split: str, trainer: Any, pl_module: Any) -> None:
        dataset = trainer.datamodule.split_dataset(split)
        layers = pl_module.preprocess, pl_module.backbone, pl_module.cut
        dataset.features = frozen_features(split, dataset.data.images, *layers, self.cache, trainer)
        if dataset.features is None:
            return
        self.datasets.append(dataset)
        limit = getattr(trainer, f"limit_{split}_batches")
        if dataset.features.ndim == 2 and isinstance(limit, float) and limit == 1.0:  # all batches, however many
            dataset.eval_batch_size = POOLED_BATCH


def check_frozen(backbone: Backbone, cut: int) -> None:
    """Refuse to train on cached features when one of the layers that they come from trains."""
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad and backbone.layer_of(name) < cut:
            raise UserError(
                f"backbone.{name} trains now, but lies in the {cut} layers that were frozen when their output was "
                "cached. Name it in the freezing policy (from_epoch says when), or set cache.mode=off."
            )


def frozen_features(
    split: str,
    images: Tensor,
    preprocess: Callable[[Tensor], Tensor],
    backbone: Backbone,
    cut: int,
    cache: FeatureCache,
    trainer: Trainer,
) -> Tensor | None:
    """The output of the first `cut` layers for all images, in the trainer's precision and on its device.

    Args:
        images: uint8 (N, C, H, W), on any device; the name of their split is a part of the key.
        preprocess: uint8 (B, C, H, W) -> (B, C, S, S), as the backbone takes it.
        backbone: in eval mode, on the trainer's device.
        trainer: of the processes that call this together.

    Returns (N, T, D) tokens, (N, D) if the cut is above all layers, or None where `FeatureCache.features` caches
    nothing. They lie on the GPU where they fill less than half of its free memory.
    """
    is_tokens = cut < len(backbone.layers)
    device, autocast = trainer.strategy.root_device, trainer.precision_plugin.forward_context
    is_packed = device.type == "cpu" and trainer.precision == "bf16-mixed" and can_pack(backbone, cut)

    @lru_cache
    def prefix() -> Callable[[Tensor], Tensor]:
        return packed_prefix(backbone, cut) if is_packed else lambda images: backbone.prefix(images, cut)

    @torch.no_grad()
    def compute(indices: Tensor) -> Tensor:  # (B,) -> (B, T, D) or (B, D)
        batch = images[indices.to(images.device)].to(device)  # on the CPU where worker processes fetch batches
        with autocast():
            features = prefix()(preprocess(batch))
        return features.bfloat16() if is_tokens and "bf16" in trainer.precision else features.contiguous()

    facts = {
        "backbone": backbone.architecture,
        "layers": cut,
        "weights": tensors_sha256(backbone.layers_state(cut)),
        "images": tensors_sha256({split: images}),
        "precision": trainer.precision,
        **({"packed": True} if is_packed else {}),
    }
    features = cache.features(split, len(images), compute, backbone.num_tokens, facts, trainer)
    if features is not None and device.type == "cuda" and features.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return features.to(device)
    return features
