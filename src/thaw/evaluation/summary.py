"""The few facts of a run that a person wants first, as `summary.json` and as text."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from omegaconf import DictConfig

from thaw.callbacks.run_record import count_parameters, git_commit
from thaw.callbacks.test_report import TestReport
from thaw.data.sources import dataset_name
from thaw.run.command_line import setting
from thaw.run.config import backbone_name
from thaw.run.files import write_json
from thaw.run.loggers import add_to_summary, where_to_look

NOT_TESTED = {"test/acc": None, "test/acc_low": None, "test/acc_high": None, "n_test": None}


def report_run(cfg: DictConfig, trainer: Trainer, val_acc: float | None, seconds: float) -> None:
    """Write `summary.json` of a finished run and print it.

    Args:
        cfg: of the run.
        trainer: that fitted, and tested if that was wanted.
        val_acc: best validation accuracy, None if none was measured.
        seconds: since the run started.
    """
    if not trainer.is_global_zero:
        return
    tested = next(
        (
            callback.results
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, TestReport)
        ),
        {},
    )
    source = trainer.datamodule.load()  # type: ignore[attr-defined]
    facts = {
        "name": cfg.name,
        "overrides": cfg.overrides,
        **NOT_TESTED,
        **tested,
        "val/acc": val_acc,
        **getattr(trainer.lightning_module, "winner", {}),  # of head=lr_bank
        **pretrained_facts(trainer),
        **source.facts(),
        "dataset": dataset_name(cfg.data),
        "n_train": len(source.train.labels),
        "n_val": len(source.val.labels),
        "backbone": backbone_name(cfg.backbone),
        "weights": cfg.backbone.get("weights", "none"),
        **count_parameters(trainer.lightning_module, trainer.max_epochs),
        "epochs": trainer.current_epoch,
        "peak_memory_gb": peak_memory_gb(trainer),
        "checkpoint_mb": checkpoint_mb(trainer),
        "chosen": getattr(trainer.checkpoint_callback, "best_model_score", None) is not None,  # else the last weights
        "seconds": round(seconds, 2),
        "seed": cfg.seed,
        "git_commit": git_commit(),
        "resumed_from": cfg.resume,
        "run_dir": cfg.run_dir,
    }
    told = ("val/acc", "val/knn_acc", "test/acc", "trainable_params", "seconds", "peak_memory_gb", "checkpoint_mb")
    add_to_summary(trainer.loggers, {key: facts[key] for key in told if key in facts})
    write_json(facts, Path(cfg.run_dir) / "summary.json")
    print(format_summary(facts, where_to_look(trainer.loggers)), flush=True)


def pretrained_facts(trainer: Trainer) -> dict[str, Any]:
    """Of a pretraining run: the file that it wrote, and how good its features were at the last look."""
    output = getattr(trainer.lightning_module, "output", None)
    if output is None:
        return {}
    metrics = {key: trainer.callback_metrics.get(key) for key in ("val/loss", "val/knn_acc")}
    rounded = {key: None if value is None else round(float(value), 6) for key, value in metrics.items()}
    return {**rounded, "backbone_file": output}


def peak_memory_gb(trainer: Trainer) -> float | None:
    """Most memory that this process held so far, in 1e9 bytes: of the GPU where one trains; None where unknown."""
    if trainer.strategy.root_device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(trainer.strategy.root_device) / 1e9, 3)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def checkpoint_mb(trainer: Trainer) -> float | None:
    """Size of the best checkpoint in 1e6 bytes."""
    best = Path(getattr(trainer.checkpoint_callback, "best_model_path", ""))
    return round(best.stat().st_size / 1e6, 3) if best.is_file() else None


def format_summary(facts: Mapping[str, Any], wandb: str | None) -> str:
    """The summary as aligned lines.

    Args:
        facts: what `summary.json` holds.
        wandb: how to see the run there, if it is logged there.
    """
    share = facts["trainable_params"] / facts["total_params"]
    sizes = f"{facts['n_train']:,} to train, {facts['n_val']:,} to validate"
    lines = {
        "data": f"{facts['dataset']}, {facts['data_title']}: {sizes}",
        "backbone": f"{facts['backbone']}, weights: {facts['weights']}",
        "trainable": f"{facts['trainable_params']:,} of {facts['total_params']:,} parameters ({share:.2%})",
    }
    if facts["val/acc"] is not None:
        which = f"best of {facts['epochs']} epochs" if facts.get("chosen", True) else "of the last step's weights"
        lines["validation"] = f"{facts['val/acc']:.2%} accuracy, {which}"
    if facts.get("val/knn_acc") is not None:
        lines["neighbours"] = f"{facts['val/knn_acc']:.2%} of validation digits have the label of their 20 nearest"
    if "backbone_file" in facts:
        lines["for later"] = setting("backbone.weights", os.path.relpath(facts["backbone_file"]))
    if "heads" in facts:
        best = f"lr {facts['best_lr']:g}, weight decay {facts['best_weight_decay']:g}"
        lines["head"] = f"{best}, best of {facts['heads']} on validation"
    if facts["test/acc"] is not None:
        interval = f"95 % interval {facts['test/acc_low']:.2%} to {facts['test/acc_high']:.2%}"
        which = "" if facts.get("chosen", True) else ", of the last step's weights"
        lines["test"] = f"{facts['test/acc']:.2%} accuracy, {interval}, n = {facts['n_test']:,}{which}"
    lines["cost"] = f"{facts['seconds']:.1f} s"
    if facts["peak_memory_gb"] is not None:
        lines["cost"] += f", at most {facts['peak_memory_gb']:.1f} GB of memory"
    if facts["checkpoint_mb"] is not None:
        lines["cost"] += f", a checkpoint of {facts['checkpoint_mb']:.2f} MB"
    lines["run"] = os.path.relpath(facts["run_dir"])
    if wandb:
        lines["W&B"] = wandb
    body = "\n".join(f"  {name:<12}{value}" for name, value in lines.items())
    rule = "-" * 88
    return f"\n{rule}\n{body}\n{rule}"
