"""The features of all images of a dataset, as they are and in augmented views."""

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from thaw.data.augment import Augment
from thaw.data.images import Images
from thaw.evaluation.probe_run import probe_features
from thaw.freezing.cache import FeatureCache
from thaw.run.command_line import override_key
from thaw.run.console import say
from thaw.run.errors import UserError

PARTS = ("fold", "train_size", "exclude", "relabel")  # settings that change which images there are, or their labels
BATCH = 512  # images augmented at once


def use_whole_data(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Set what takes a part of the data, or corrects it, to null: rows name images of the data as they are.

    Raises:
        UserError: such a setting was typed.
    """
    typed = {override_key(override) for override in overrides}
    for key in PARTS:
        if f"data.{key}" in typed and cfg.data[key] is not None:
            raise UserError(f"data.{key}={cfg.data[key]}: clean.py looks at all images as they are; leave it out.")
        if cfg.data.get(key) is not None:
            say(f"data.{key}={cfg.data[key]} of the checkpoint's run is left out: clean.py looks at all images")
            cfg.data[key] = None


def features_of_views(
    split: str, number: int, augment: Augment, trainer: Any, backbone: Any, cache: FeatureCache
) -> list[Tensor]:
    """Features (N, D) of each view of a split's images: first of the images as they are, which `cache` caches.

    Raises:
        UserError: further views are wanted, but the augmentation changes nothing.
    """
    if number > 1 and not augment.is_random:
        raise UserError(
            f"views={number} needs an augmentation that draws views: augment=affine for digits, augment=natural or "
            "padded for photographs."
        )
    datamodule, in_memory = trainer.datamodule, FeatureCache("memory", "", float("inf"))
    source = datamodule.load()
    views = [probe_features(split, trainer, backbone, cache).features]
    for _ in range(number - 1):
        images = getattr(source, split).images
        drawn = torch.cat([augment(part) for part in images.split(BATCH)])  # each image on its own
        datamodule.loaded = source._replace(**{split: Images(drawn, getattr(source, split).labels)})
        views.append(probe_features(split, trainer, backbone, in_memory).features)
    datamodule.loaded = source
    return views
