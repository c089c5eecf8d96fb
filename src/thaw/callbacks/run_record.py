"""What a run needs to be understood and rebuilt later: in its folder and in every checkpoint."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from omegaconf import OmegaConf

from thaw.callbacks.same_config import check_same_config
from thaw.classifier import Classifier
from thaw.freezing.policy import NEVER
from thaw.freezing.table import format_table
from thaw.run.checkpoint import run_folder
from thaw.run.files import write_text
from thaw.run.loggers import wandb_run

PACKAGES = ("torch", "torchvision", "lightning", "timm", "hydra-core", "torchmetrics", "wandb")


class RunRecord(Callback):
    """Keeps configuration, command, commit and versions; prints what is frozen and what trains.

    Before that it sees to it that all processes of the run have the same configuration.

    A checkpoint is self-contained: `checkpoint["config"]` holds plain values from which the run is rebuilt, and
    `checkpoint["git_commit"]` names the code, `checkpoint["classes"]` the classes, and `checkpoint["wandb_id"]` lets a
    resumed run go on in the same W&B run.

    Args:
        run_dir: the run's folder, gets `config.yaml`, `record.yaml` and `parameters.txt`.
        config: the composed configuration, see `thaw.run.config.plain`.
    """

    def __init__(self, run_dir: str, config: dict[str, Any]) -> None:
        self.run_dir, self.config = Path(run_dir), config
        self.git_commit = git_commit()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_same_config(self.config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        record = {
            "command": " ".join(sys.argv),
            "git_commit": self.git_commit,
            "python": sys.version.split()[0],
            "packages": {name: version(name) for name in PACKAGES},
            "device": str(trainer.strategy.root_device),
            "threads": torch.get_num_threads(),
        }
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        table = format_table(pl_module, pl_module.depths(), groups, trainer.current_epoch)  # type: ignore[operator]
        print(table, flush=True)
        write_text(table + "\n", self.run_dir / "parameters.txt")
        write_text(yaml.safe_dump(record, sort_keys=False), self.run_dir / "record.yaml")
        write_text(OmegaConf.to_yaml(self.config), self.run_dir / "config.yaml")
        resolved = OmegaConf.to_container(OmegaConf.create(self.config), resolve=True)
        for logger in trainer.loggers if trainer.enable_autolog_hparams else []:
            counts = count_parameters(pl_module, trainer.max_epochs)
            logger.log_hyperparams({**resolved, **record, **counts})  # type: ignore[dict-item]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        portable = portable_paths(self.run_dir)
        checkpoint["callbacks"] = replaced(checkpoint["callbacks"], portable)
        checkpoint["config"] = replaced(self.config, portable) | {"run_dir": ".", "resume": None}
        checkpoint["git_commit"] = self.git_commit
        if hasattr(trainer.datamodule, "load"):  # type: ignore[attr-defined]  # Lightning sets it at run time
            checkpoint["classes"] = list(trainer.datamodule.load().classes)  # type: ignore[attr-defined]
        run = wandb_run(trainer.loggers)
        checkpoint["wandb_id"] = run and str(run.id)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Comes before Lightning gives the callbacks their states."""
        folder = run_folder(Path(str(trainer.ckpt_path)).resolve())
        checkpoint["callbacks"] = replaced(checkpoint["callbacks"], {"${run_dir}/": f"{folder}/"})


def portable_paths(run_dir: Path) -> dict[str, str]:
    """What stands for the folders of this machine and its user in a checkpoint, which may be moved and shared."""
    here, home = Path.cwd(), Path.home()
    short = {f"{run_dir}/": "${run_dir}/"}
    if run_dir.is_relative_to(here):
        short[f"{here}/"] = f"${{run_dir}}/{os.path.relpath(here, run_dir)}/"
    return short if home == home.parent else short | {f"{home}/": "~/"}


def replaced(value: Any, paths: Mapping[str, str]) -> Any:
    """Nested plain values with other beginnings of the paths in them, keys included."""
    if isinstance(value, dict):
        return {replaced(key, paths): replaced(inner, paths) for key, inner in value.items()}
    if isinstance(value, list):
        return [replaced(inner, paths) for inner in value]
    if isinstance(value, str):
        for path, other in paths.items():
            value = re.sub(rf"(?<![\w./~-]){re.escape(path)}", other.replace("\\", r"\\"), f"{value}/")[:-1]
    return value


def count_parameters(module: torch.nn.Module, epochs: int | None = None) -> dict[str, int]:
    """How many numbers train, and how many there are.

    Args:
        module: a model.
        epochs: of the run: what would thaw later does not train. None or -1 for a run without such an end.
    """
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    if isinstance(module, Classifier):
        end = NEVER if epochs is None or epochs < 0 else epochs
        trainable = module.thaw.count(end)
    else:
        trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return {"trainable_params": trainable, "total_params": sum(sizes.values())}


def git_commit() -> str:
    """The commit of the code that runs, `-dirty` where it was changed since; `unknown` outside a checkout."""
    root = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("-dirty" if status.stdout.strip() else "")
