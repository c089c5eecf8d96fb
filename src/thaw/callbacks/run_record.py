"""What a run needs to be understood and rebuilt later: in its folder and in every checkpoint."""

import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer

PACKAGES = ("torch", "torchvision", "lightning", "timm", "hydra-core", "torchmetrics", "wandb")


class RunRecord(Callback):
    """Writes `record.yaml` (command, commit, versions) and puts the composed configuration into each checkpoint.

    A checkpoint is self-contained: `checkpoint["config"]` is a plain dict from which the model is rebuilt, and
    `checkpoint["wandb_id"]` lets a resumed run go on in the same W&B run.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = Path(run_dir)
        self.config: Mapping[str, Any] = {}  # set by train.py, which has composed it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            record = {
                "command": " ".join(sys.argv),
                "git_commit": git_commit(),
                "python": sys.version.split()[0],
                "packages": {name: version(name) for name in PACKAGES},
                "device": str(trainer.strategy.root_device),
                "threads": torch.get_num_threads(),
            }
            (self.run_dir / "record.yaml").write_text(yaml.safe_dump(record, sort_keys=False))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = dict(self.config)
        checkpoint["wandb_id"] = wandb_id(trainer)


def wandb_id(trainer: Trainer) -> str | None:
    """The id of the run's W&B logger, if it has one."""
    for logger in trainer.loggers:
        if type(logger).__name__ == "WandbLogger":
            return str(logger.experiment.id)
    return None


def git_commit() -> str:
    """The commit of the code that runs, `-dirty` where it was changed since; `unknown` outside a checkout."""
    root = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("-dirty" if status.stdout.strip() else "")
