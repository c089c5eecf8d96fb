"""Cross-validation in a sweep: its data must have enough images, which is checked before the first job."""

import json
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thaw.run.config import build
from thaw.run.errors import UserError


def check_folds(configs: Sequence[DictConfig], on_this_machine: bool) -> None:
    """Check the folds of a sweep's jobs; with `on_this_machine` also that their data, read here, fill them.

    Raises:
        UserError: a fold that does not exist, a class too small for the folds, or fewer images than seeds x folds.
    """
    same_data: dict[str, list[DictConfig]] = {}
    for cfg in configs:
        if OmegaConf.select(cfg, "data.fold") is not None:
            from thaw.data.folds import check_fold  # imports torch

            check_fold(cfg.data.fold, cfg.data.folds)
            facts: Any = OmegaConf.to_container(cfg.data, resolve=True)
            same_data.setdefault(json.dumps(facts | {"fold": None, "seed": None}, sort_keys=True), []).append(cfg)
    for members in same_data.values() if on_this_machine else ():
        folds, seeds = members[0].data.folds, len({cfg.seed for cfg in members})
        source = build(members[0].data).load()
        images = len(source.train.labels) + len(source.val.labels)
        if images < seeds * folds:
            raise UserError(
                f"{seeds} seeds x data.folds={folds} are more than the {images} images of {source.title} to train and "
                "validate on: their mean would say nothing more. Choose fewer seeds, or add images."
            )
