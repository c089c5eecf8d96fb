"""Several checkpoints, or several views of an image, as one model.

Averaged probabilities cost as much as all models together, averaged weights (`thaw.evaluation.mixture`) as much as one.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thaw.data.augment import Augment
from thaw.data.images import Source
from thaw.data.store import tensors_sha256
from thaw.evaluation.mixture import Mixture
from thaw.predict.average import Views
from thaw.predict.predictor import Predictor, average
from thaw.run.config import build
from thaw.run.console import say, some
from thaw.run.errors import UserError
from thaw.task import check_single_label


def combine(cfg: DictConfig, predictors: Sequence[Predictor], source: Source, path: Path | None) -> Predictor:
    """One model of several checkpoints, or of several views; its `combined` says how it was made.

    Args:
        cfg: of eval.py or export.py, checked by `thaw.evaluation.combine_settings.check_combination`.
        predictors: of the checkpoints.
        source: their images, from `common_source`.
        path: where a soup or a WiSE-FT model is written as a checkpoint; None writes none.

    Raises:
        UserError: the checkpoints cannot be combined, or the augmentation has no views for these images.
    """
    names = labels(predictors)
    facts: dict[str, Any] = {"how": cfg.combine or "views", "members": names}
    if cfg.combine in ("soup", "wise"):
        mixture = Mixture(predictors, source, f"combine={cfg.combine}", path or predictors[0].checkpoint)
        if cfg.combine == "soup":
            facts |= mixture.choose_soup(names)
        else:
            facts |= mixture.choose_alpha(cfg.alphas, middle_severity(cfg))
        say(f"{cfg.combine}: {told(facts)}")
        if path:
            mixture.save(cfg.allow, f"combine={cfg.combine} of {some(names)}")
            say(f"checkpoint written: {os.path.relpath(path)}")
        result = mixture.predictor
    else:
        views = Views(view_augmentation(cfg, predictors), cfg.tta, predictors[0].data["shape"])
        result = average(predictors, views, " ".join([cfg.combine or names[0], *[f"tta={cfg.tta}"] * (cfg.tta > 1)]))
        facts["views"] = cfg.tta
    result.combined = facts
    return result


def told(facts: Mapping[str, Any]) -> str:
    """How averaged weights were chosen."""
    if facts["how"] == "wise":
        best = next(row for row in facts["between"] if row["alpha"] == facts["alpha"])
        return f"alpha {facts['alpha']:g} of {len(facts['between'])} is the best by validation, {best['val/acc']:.2%}"
    stays = [row for row in facts["tried"] if row["stays"]]
    before, after = stays[0]["val/acc"], stays[-1]["val/acc of the soup"]
    names = some([row["model"] for row in stays])
    kept = f"{len(stays)} of {len(facts['tried'])} checkpoints are averaged ({names})"
    return f"{kept}, validation {after:.2%}; the best alone {before:.2%}"


def middle_severity(cfg: DictConfig) -> dict[str, Any]:
    """eval.py's `robustness` at the middle one of its severities; nothing in export.py, which has none."""
    given: Any = OmegaConf.to_container(cfg.get("robustness") or OmegaConf.create())
    return given and {**given, "severities": [sorted(given["severities"])[len(given["severities"]) // 2]]}


def labels(predictors: Sequence[Predictor]) -> list[str]:
    """The names of runs, numbered where several have the same."""
    names = [str(predictor.cfg.name) for predictor in predictors]
    counts = Counter(names)
    return [name + (f" {number}" if counts[name] > 1 else "") for number, name in enumerate(names, start=1)]


def common_source(cfg: DictConfig, predictors: Sequence[Predictor], sources: Sequence[Source]) -> Source:
    """The images on which models are combined and measured, after a check that all of them are for these.

    Raises:
        UserError: names what differs.
    """
    wanted, source = f"combine={cfg.combine}" if cfg.combine else f"tta={cfg.tta}", sources[0]
    chooses = cfg.combine in ("soup", "wise")
    first, *others = predictors
    for predictor in predictors:
        check_single_label(predictor.model.task, wanted)
    if chooses and not len(source.val.labels):
        raise UserError(f"{wanted} is chosen on validation images, and {source.title} has none; use combine=average.")
    for number, (other, own) in enumerate(zip(others, sources[1:], strict=True), start=1):
        pair = f"{first.where} and {other.where}"
        if other.checkpoint in [each.checkpoint for each in predictors[:number]]:
            raise UserError(f"ckpt names {other.where} twice; give each checkpoint once.")
        for key in ("classes", "shape", "reader"):
            if first.data[key] != other.data[key]:
                values = " and ".join(shorten(str(each.data[key]), 60) for each in (first, other))
                raise UserError(
                    f"{wanted} makes one model, but the data of {pair} have another {key} ({values}); give runs on the "
                    "same data."
                )
        for split in ("test", "val") if chooses else ("test",):
            if images_sha256(source, split) != images_sha256(own, split):
                raise UserError(
                    f"{pair} have other {split} images ({source.title}; {own.title}), so that {wanted} cannot be "
                    "measured; give runs with the same settings of the data."
                )
    if all(images_sha256(source, "val") == images_sha256(own, "val") for own in sources[1:]):
        return source
    return source._replace(val=source.val.take(slice(0)))  # which another model was trained on


def images_sha256(source: Source, split: str) -> str:
    return tensors_sha256(getattr(source, split)._asdict())


def view_augmentation(cfg: DictConfig, predictors: Sequence[Predictor]) -> Augment:
    """What the views are drawn from: `augment`, or the augmentation that the models were trained with.

    Raises:
        UserError: it changes nothing, mirrors digits, or differs between models.
    """
    own = [OmegaConf.to_container(predictor.cfg.augment, resolve=True) for predictor in predictors]
    chosen = cfg.get("augment")
    augment: Augment = build(chosen or predictors[0].cfg.augment)
    if cfg.tta == 1:
        return augment
    wanted, options = f"tta={cfg.tta}", "augment=affine for digits, augment=natural or padded for photographs"
    if not chosen and any(each != own[0] for each in own):
        raise UserError(f"{wanted}: the checkpoints were trained with different augmentations; choose one: {options}.")
    if not augment.is_random:
        raise UserError(f"{wanted} draws views from the run's augmentation, which changes nothing; add {options}.")
    if augment.flip and predictors[0].data["reader"] == "digit":
        raise UserError(f"{wanted}: augment.flip={augment.flip} mirrors digits, which are then others; set it to 0.")
    return augment
