"""The inputs of a probe: a frozen backbone, and its features of a split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from thaw.data.module import change_settings
from thaw.data.preprocess import Preprocess
from thaw.evaluation.probes import Labelled
from thaw.freezing.cache import FeatureCache
from thaw.freezing.features import frozen_features
from thaw.run import checkpoint as checkpoints
from thaw.run.command_line import override_key
from thaw.run.console import say
from thaw.run.errors import UserError
from thaw.run.places import READ, keep_from_downloading, reads
from thaw.run.targets import targets


def checkpoint_backbone(cfg: DictConfig, overrides: Sequence[str]) -> Any:
    """The backbone of the checkpoint `cfg.ckpt`; `cfg` gets the run's settings of backbone and data.

    Overrides of the data stay in force. Of the backbone only `backbone.weights` may be overridden, to say where frozen
    weights lie that the checkpoint refers to.

    Raises:
        UserError: no such checkpoint, one of a model without a backbone, or overrides of the backbone.
    """
    typed = [override_key(override) for override in overrides]
    pretrained = (Path(cfg.ckpt).expanduser() / "backbone.safetensors").is_file()  # whose validation chooses nothing
    path = checkpoints.find_checkpoint(cfg.ckpt, "last.ckpt" if pretrained else "best.ckpt")
    checkpoint = checkpoints.read_checkpoint(path, [*cfg.allow, *targets(cfg)])
    with checkpoints.understood(path, checkpoint["git_commit"]):
        return take_backbone(cfg, path, checkpoint, typed)


def take_backbone(cfg: DictConfig, path: Path, checkpoint: dict[str, Any], typed: Sequence[str]) -> Any:
    """What `checkpoint_backbone` returns, of a checkpoint that is read."""
    say(checkpoints.origin(checkpoint))
    refers = "frozen" in checkpoint  # to a file that holds what never trained
    wrong = [key for key in typed if key.split(".")[0] == "backbone" and not (refers and key == "backbone.weights")]
    if wrong:
        raise UserError(f"ckpt={cfg.ckpt} brings its own backbone; leave out {', '.join(wrong)}, or ckpt.")
    if "backbone.weights" in typed:
        checkpoint["config"]["backbone"]["weights"] = cfg.backbone.weights
    model = checkpoints.load_model(checkpoint)
    if not hasattr(model, "backbone"):
        raise UserError(f"{path} holds a {type(model).__name__}, which has no backbone; give the run of a classifier.")
    saved = OmegaConf.create(checkpoint["config"])
    if "data" not in typed:
        data = OmegaConf.select(cfg, "data")
        cfg.data = saved.data
        keys = [key.removeprefix("data.") for key in typed if key.startswith("data.")]
        change_settings(cfg.data, {key: OmegaConf.select(data, key) for key in keys})
        if "dir" not in keys:
            keep_from_downloading(cfg.data)
        if named := reads(saved, READ if refers else READ[1:], typed):
            say(f"reading {', '.join(named)}, as {path} says")
    cfg.backbone, cfg.ckpt = saved.backbone, str(path)
    return model.backbone


def probe_features(split: str, trainer: Any, backbone: Any, cache: FeatureCache) -> Labelled:
    """The features of a split in float32 and its labels, on the trainer's device.

    Of few labels (`data.labels_per_class`) the training split is the pool, whose features serve every draw.
    Training and validation features are those that a run with a frozen backbone caches and reuses; the test split, and
    whatever `cache` does not cache, starts from pixels.
    """
    device = trainer.strategy.root_device
    source = trainer.datamodule.load()
    split = "pool" if split == "train" and source.pool else split
    images, labels = (part.to(device) for part in getattr(source, split))
    if labels.ndim == 2:
        raise UserError("probe.py and clean.py are for one class an image; these images have several labels.")
    if not len(labels):
        return Labelled(torch.empty(0, backbone.num_features, device=device), labels)
    preprocess = Preprocess(backbone.image_size, backbone.channels, backbone.mean, backbone.std)
    preprocess.to(device)
    in_memory = FeatureCache("memory", "", float("inf"))
    worth_caching = split != "test" and any(True for _ in backbone.parameters())
    for each in [cache, in_memory] if worth_caching and cache.mode != "off" else [in_memory]:
        features = frozen_features(split, images, preprocess, backbone, len(backbone.layers), each, trainer)
        if features is not None:
            break
    assert features is not None  # memory holds all
    return Labelled(features.to(device).float(), labels)  # (N, D)
