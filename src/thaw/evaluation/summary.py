"""The few facts of a run or a probe that a person wants first, as `summary.json` and as text."""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from omegaconf import DictConfig
from rich.table import Table
from torch import nn

from thaw.classifier import Classifier
from thaw.data.corrections import say_corrections
from thaw.evaluation.course import judge_course, say_course
from thaw.evaluation.final_test import FinalTest
from thaw.evaluation.metrics import OTHER_ACCURACIES, other_accuracies
from thaw.evaluation.probes import Choice
from thaw.freezing.policy import NEVER
from thaw.run.command_line import setting
from thaw.run.config import backbone_name
from thaw.run.console import console, plural, say, say_fitted
from thaw.run.files import write_json
from thaw.run.loggers import add_to_summary, where_to_look
from thaw.run.record import git_commit

LOSSES = {"train/loss": "training", "val/loss": "validation"}  # of pretraining
NOT_TESTED = {"test/acc": None, "test/acc_low": None, "test/acc_high": None, "n_test": None}
LOGGED = ("val/acc", "val/knn_acc", "test/acc", *OTHER_ACCURACIES.values())
LOGGED += ("trainable_params", "seconds", "peak_memory_gb", "checkpoint_mb")


def report_run(cfg: DictConfig, trainer: Any, val_acc: float | None, seconds: float) -> None:
    """Write `summary.json` of a run and print it; `val_acc` is the best, None if none was measured."""
    if not trainer.is_global_zero:
        return
    tests = [each for each in trainer.callbacks if isinstance(each, FinalTest)]
    results = {
        **(tests[0].results if tests else {}),
        "val/acc": val_acc,
        **getattr(trainer.lightning_module, "winner", {}),  # of head=lr_bank
        **pretraining_facts(trainer),
        **judge_course(getattr(trainer.lightning_module, "course", {}), len(trainer.datamodule.load().val.labels)),
        "weights": cfg.backbone.get("weights", "none"),
        **count_parameters(trainer.lightning_module, trainer.max_epochs),
        "epochs": trainer.current_epoch,
        "checkpoint_mb": checkpoint_mb(trainer),
        "chosen": getattr(trainer.checkpoint_callback, "best_model_score", None) is not None,  # else the last weights
        "resumed_from": cfg.resume,
    }
    write_summary(cfg, trainer, results, seconds)


def report_probe(
    cfg: DictConfig, trainer: Trainer, backbone: nn.Module, choice: Choice, tested: Mapping[str, Any], seconds: float
) -> None:
    """Write `summary.json` of a probe, with the keys of a training run's, and print it.

    `tested` is the accuracy on the test split, empty if that was not wanted.
    """
    results = {
        **tested,
        "val/acc": None if (acc := choice.candidates[choice.chosen]) is None else round(acc, 6),
        "probe": cfg.probe._target_.rpartition(".")[2],
        "chosen": {choice.setting: choice.chosen} if choice.setting else {},
        "candidates": [{choice.setting or "none": value, "val/acc": acc} for value, acc in choice.candidates.items()],
        "weights": cfg.ckpt or cfg.backbone.get("weights", "none"),
        "trainable_params": choice.num_parameters,
        "total_params": count_parameters(backbone)["total_params"] + choice.num_parameters,
        "epochs": 0,
        "checkpoint_mb": None,
        "resumed_from": None,
        "checkpoint": cfg.ckpt,
    }
    write_summary(cfg, trainer, results, seconds)


def write_summary(cfg: DictConfig, trainer: Any, results: Mapping[str, Any], seconds: float) -> None:
    """Add to the results what runs and probes share, and write, log and print that."""
    source = trainer.datamodule.load()
    facts = {
        "name": cfg.name,
        "overrides": cfg.overrides,
        **NOT_TESTED,
        **results,
        **source.facts(),
        "classes": list(source.classes),
        "n_train": len(source.train.labels),
        "n_val": len(source.val.labels),
        "backbone": backbone_name(cfg.backbone),
        "peak_memory_gb": peak_memory_gb(trainer),
        "seconds": round(seconds, 2),
        "seed": cfg.seed,
        "git_commit": git_commit(),
        "run_dir": cfg.run_dir,
    }
    add_to_summary(trainer.loggers, {key: facts[key] for key in LOGGED if key in facts})
    say_summary(facts, where_to_look(trainer.loggers))
    write_json(facts, Path(cfg.run_dir) / "summary.json")  # on a full disk the numbers have been told


def count_parameters(module: nn.Module, epochs: int | None = None) -> dict[str, int]:
    """How many numbers of a model train within so many epochs (None or -1: a run without end), and how many it has.

    Of a bank of heads only the chosen one counts.
    """
    if isinstance(module, Classifier):
        trainable = module.thaw.count(NEVER if epochs is None or epochs < 0 else epochs)
    else:
        trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    spare = getattr(module, "spare_params", 0)
    total = sum(parameter.numel() for parameter in module.parameters())
    return {"trainable_params": trainable - spare, "total_params": total - spare}


def pretraining_facts(trainer: Trainer) -> dict[str, Any]:
    """Of a pretraining run: the file that it wrote, and its last losses and accuracy of the features."""
    output = getattr(trainer.lightning_module, "output", None)
    if output is None:
        return {}
    metrics = {key: trainer.callback_metrics.get(key) for key in (*LOSSES, "val/knn_acc")}
    rounded = {key: None if value is None else round(float(value), 6) for key, value in metrics.items()}
    return {**rounded, "backbone_file": output}


def forget_peak_memory() -> None:
    """Let `peak_memory_gb` count from now on: a sweep trains one job after another in a process."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # another system than Linux
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb(trainer: Trainer) -> float | None:
    """Most memory that this process held in the run, in 1e9 bytes: of the GPU where one trains; None where unknown."""
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


def say_summary(facts: Mapping[str, Any], wandb: Sequence[str]) -> None:
    """Print the `summary.json` of a run or a probe: aligned lines, then what a person copies, each on its own line.

    `wandb` holds the commands that show and upload an offline run, or the address of another; empty without W&B.
    """
    lines = {}
    if is_probe := "probe" in facts:
        how = "fixed" if facts["val/acc"] is None else f"the best of {len(facts['candidates'])} on validation"
        chosen = [f", {name} = {value:g}, {how}" for name, value in facts["chosen"].items()]
        lines["probe"] = facts["probe"] + "".join(chosen)
    sizes = f"{len(facts['classes'])} classes, {facts['n_train']:,} to train, {facts['n_val']:,} to validate"
    lines["data"] = f"{', '.join(filter(None, (facts['dataset'], facts['data_source'])))}: {sizes}"
    if facts.get("corrections"):
        lines["data"] += f"; {say_corrections(facts['corrections'])}"
    lines["backbone"] = f"{facts['backbone']}, weights: {facts['weights']}"
    share = f" ({facts['trainable_params'] / facts['total_params']:.2%})" if facts["total_params"] else ""
    lines["trainable"] = f"{facts['trainable_params']:,} of {facts['total_params']:,} parameters{share}"
    if "heads" in facts:
        lines["trainable"] += f" with one of {facts['heads']} heads"
    of_last = "" if facts.get("chosen", True) else ", of the last step's weights"
    epochs = plural(facts["epochs"], "epoch")
    if facts["val/acc"] is not None:
        which = "" if is_probe else of_last or f", best of {epochs}"
        lines["validation"] = f"{facts['val/acc']:.2%} accuracy{which}"
    if "backbone_file" in facts:
        lost = ", ".join(f"{facts[key]:.4f} in {split}" for key, split in LOSSES.items() if facts[key] is not None)
        lines["loss"] = f"{lost or 'none'}, after {epochs}"
    if facts.get("val/knn_acc") is not None:
        lines["neighbours"] = f"{facts['val/knn_acc']:.2%} of validation images have the label of their 20 nearest"
    if "heads" in facts:
        best = f"learning rate {facts['best_lr']:g}, weight decay {facts['best_weight_decay']:g}"
        lines["head"] = f"{best}: the best of {plural(facts['heads'], 'head')} on validation"
    if facts["test/acc"] is not None:
        lines["test"] = f"{facts['test/acc']:.2%} accuracy"
        if facts["test/acc_low"] is not None:  # as of one class an image
            lines["test"] += f", 95 % interval {facts['test/acc_low']:.2%} to {facts['test/acc_high']:.2%}"
        lines["test"] += f"{other_accuracies(facts)}, n = {facts['n_test']:,}{of_last}"
    if course := say_course(facts.get("training", {})):
        lines["training"] = course
    memory, size = facts["peak_memory_gb"], facts["checkpoint_mb"]
    lines["cost"] = f"{facts['seconds']:.1f} s" + (f", at most {memory:.1f} GB of memory" if memory else "")
    lines["cost"] += f", a checkpoint of {size:.2f} MB" if size else ""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=12)
    for name, value in lines.items():
        table.add_row(f"  {name}", value)
    rule = "-" * min(88, console().width)
    say(f"\n{rule}")
    say_fitted(table)
    say(f"  {'run':<12}{os.path.relpath(facts['run_dir'])}")
    if "heads" in facts:
        say(f"  {'picture':<12}{os.path.relpath(facts['run_dir'])}/report/lr_bank.png")
    if "backbone_file" in facts:
        same = [each for each in facts["overrides"].split() if re.match(r"backbone(?!\.weights)", each)]
        weights = setting("backbone.weights", os.path.relpath(facts["backbone_file"]))
        command = shlex.join(["python", "train.py", "experiment=few_labels", *same])
        say_commands("next", "fine-tune these weights", [f"{command} {weights}"])
    if len(wandb) > 1:
        say_commands("W&B", "offline; look at the run, or upload it", wandb)
    elif wandb:
        say(f"  {'W&B':<12}{wandb[0]}")
    say(rule)


def say_commands(name: str, purpose: str, commands: Sequence[str]) -> None:
    """Print commands on lines of their own, which can be copied."""
    say(f"  {name:<12}{purpose}:")
    for command in commands:
        say(command, "cyan")
