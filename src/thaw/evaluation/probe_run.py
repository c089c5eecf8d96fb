"""What surrounds a probe: the frozen backbone, its features of a split, and the record of the result."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import nn

from thaw.callbacks.run_record import count_parameters, git_commit
from thaw.data.datamodule import change_settings
from thaw.data.preprocess import Preprocess
from thaw.data.sources import dataset_name
from thaw.evaluation.probes import Choice, Labelled, Score
from thaw.evaluation.summary import NOT_TESTED, peak_memory_gb
from thaw.freezing.features import FeatureCache
from thaw.freezing.frozen_features import frozen_features
from thaw.run import checkpoint as checkpoints
from thaw.run.command_line import override_key
from thaw.run.config import backbone_name
from thaw.run.files import write_json
from thaw.run.targets import targets


def checkpoint_backbone(cfg: DictConfig, overrides: Sequence[str]) -> Any:
    """The backbone of the run that `cfg.ckpt` means; `cfg` gets its backbone and its data, the latter as overridden.

    Args:
        cfg: changed in place.
        overrides: the command line's, e.g. `["ckpt=last", "data.source=official"]`.

    Raises:
        ValueError: no such checkpoint, one of a model without a backbone, or settings of a backbone next to it. (Only
            `backbone.weights` may say where frozen weights lie that the checkpoint refers to.)
    """
    typed = [override_key(override) for override in overrides]
    path = checkpoints.find_checkpoint(cfg.ckpt, Path("logs"), "best.ckpt")
    checkpoint = checkpoints.read_checkpoint(path, [*cfg.allow, *targets(cfg)])
    refers = "frozen" in checkpoint  # to a file that holds what never trained
    wrong = [key for key in typed if key.split(".")[0] == "backbone" and not (refers and key == "backbone.weights")]
    if wrong:
        raise ValueError(f"ckpt={cfg.ckpt} brings its own backbone; leave out {', '.join(wrong)}, or ckpt.")
    if "backbone.weights" in typed:
        checkpoint["config"]["backbone"]["weights"] = cfg.backbone.weights
    model = checkpoints.load_model(checkpoint)
    if not hasattr(model, "backbone"):
        raise ValueError(f"{path} holds a {type(model).__name__}, which has no backbone; give the run of a classifier.")
    saved = OmegaConf.create(checkpoint["config"])
    if "data" not in typed:
        data = OmegaConf.select(cfg, "data")
        cfg.data = saved.data
        keys = [key.removeprefix("data.") for key in typed if key.startswith("data.")]
        change_settings(cfg.data, {key: OmegaConf.select(data, key) for key in keys})
    cfg.backbone, cfg.ckpt = saved.backbone, str(path)
    return model.backbone


def probe_features(
    split: str, datamodule: LightningDataModule, backbone: Any, cache: FeatureCache, trainer: Trainer
) -> Labelled:
    """The features of a split in float32 and its labels, on the trainer's device.

    Training and validation features are those that a run with a frozen backbone keeps and reuses; the test split
    always starts from pixels, and so does what `cache` keeps nothing of.
    """
    device = trainer.strategy.root_device
    images, labels = (part.to(device) for part in getattr(datamodule.load(), split))  # type: ignore[attr-defined]
    preprocess = Preprocess(backbone.image_size, backbone.channels, backbone.mean, backbone.std)
    preprocess.to(device)
    in_memory = FeatureCache("memory", "", float("inf"), views=None)
    worth_keeping = split != "test" and any(True for _ in backbone.parameters())
    caches = [cache, in_memory] if worth_keeping and cache.num_views(False, trainer) else [in_memory]
    for keeper in caches:
        features = frozen_features(split, images, preprocess, None, 1, backbone, len(backbone.layers), keeper, trainer)
        if features is not None:
            break
    assert features is not None  # memory keeps all
    return Labelled(features[0].to(device).float(), labels)  # (1, N, D) -> (N, D)


def report_probe(
    cfg: DictConfig,
    datamodule: LightningDataModule,
    backbone: nn.Module,
    choice: Choice,
    score: Score | None,
    seconds: float,
) -> None:
    """Write `summary.json`, with the keys of a training run's and what validation chose, and print it.

    Args:
        cfg: of the probe.
        datamodule: of the digits.
        backbone: frozen.
        choice: of validation.
        score: of the test, None if that was not wanted.
        seconds: since the probe started.
    """
    source = datamodule.load()  # type: ignore[attr-defined]
    fitted = choice.num_parameters
    tested = {}
    if score is not None:
        tested = {"test/acc": score.acc, "test/acc_low": score.low, "test/acc_high": score.high, "n_test": score.n}
    facts = {
        "name": cfg.name,
        "overrides": cfg.overrides,
        **NOT_TESTED,
        **tested,
        "val/acc": round(choice.candidates[choice.chosen], 6),
        "probe": cfg.probe._target_.rpartition(".")[2],
        "chosen": {choice.setting: choice.chosen},
        "candidates": [{choice.setting: value, "val/acc": acc} for value, acc in choice.candidates.items()],
        **source.facts(),
        "dataset": dataset_name(cfg.data),
        "n_train": len(source.train.labels),
        "n_val": len(source.val.labels),
        "backbone": backbone_name(cfg.backbone),
        "weights": cfg.ckpt or cfg.backbone.get("weights", "none"),
        "trainable_params": fitted,
        "total_params": count_parameters(backbone)["total_params"] + fitted,
        "epochs": 0,
        "peak_memory_gb": peak_memory_gb(datamodule.trainer),  # type: ignore[arg-type]  # probe.py has set it
        "checkpoint_mb": None,
        "seconds": round(seconds, 2),
        "seed": cfg.seed,
        "git_commit": git_commit(),
        "resumed_from": None,
        "checkpoint": cfg.ckpt,
        "run_dir": cfg.run_dir,
    }
    write_json(facts, Path(cfg.run_dir) / "summary.json")
    print(format_probe(facts), flush=True)


def format_probe(facts: dict[str, Any]) -> str:
    """The summary of a probe as aligned lines, from what `summary.json` holds."""
    ((setting, chosen),) = facts["chosen"].items()
    sizes = f"{facts['n_train']:,} to train, {facts['n_val']:,} to validate"
    lines = {
        "probe": f"{facts['probe']}, {setting} = {chosen:g}, the best of {len(facts['candidates'])} on validation",
        "data": f"{facts['dataset']}, {facts['data_title']}: {sizes}",
        "backbone": f"{facts['backbone']}, weights: {facts['weights']}",
        "trainable": f"{facts['trainable_params']:,} of {facts['total_params']:,} parameters",
        "validation": f"{facts['val/acc']:.2%} accuracy",
    }
    if facts["test/acc"] is not None:
        interval = f"95 % interval {facts['test/acc_low']:.2%} to {facts['test/acc_high']:.2%}"
        lines["test"] = f"{facts['test/acc']:.2%} accuracy, {interval}, n = {facts['n_test']:,}"
    lines["time"] = f"{facts['seconds']:.1f} s"
    lines["run"] = os.path.relpath(facts["run_dir"])
    body = "\n".join(f"  {name:<12}{value}" for name, value in lines.items())
    rule = "-" * 88
    return f"\n{rule}\n{body}\n{rule}"
