"""The record from which a run is understood and rebuilt later: in its folder and in every checkpoint."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from omegaconf import OmegaConf

from thaw.callbacks.run_checkpoint import ends_epoch
from thaw.data.images import check_same_classes
from thaw.evaluation.summary import count_parameters
from thaw.freezing.table import layer_table
from thaw.run.checkpoint import run_folder
from thaw.run.config import yaml_text
from thaw.run.console import as_text, say_fitted
from thaw.run.csv_log import RunCSV
from thaw.run.errors import UserError
from thaw.run.files import write_text
from thaw.run.loggers import link_earlier_folders
from thaw.run.ranks import from_all_ranks
from thaw.run.record import portable_paths, replaced, software_facts
from thaw.run.targets import config_leaves
from thaw.run.trackers import tracker_ids


class RunRecord(Callback):
    """Records configuration, command, commit and versions; prints the table of frozen and trainable parameters.

    Before that it checks that all processes of the run have the same configuration.

    A checkpoint is self-contained: `checkpoint["config"]` holds plain values from which the run is rebuilt,
    `checkpoint["git_commit"]` names the code, `checkpoint["data"]` the dataset, its classes, the shape of its images
    and their reader, and `checkpoint["wandb_id"]` the W&B run that a resumed run continues.

    Args:
        run_dir: the run's folder, gets `config.yaml`, `record.yaml` and `parameters.txt`.
        config: the composed configuration, see `thaw.run.config.plain`.
    """

    def __init__(self, run_dir: str, config: dict[str, Any]) -> None:
        self.run_dir, self.config = Path(run_dir), config
        self.software = software_facts()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_same_config(self.config)

    @cached_property
    def portable_config(self) -> dict[str, Any]:
        return replaced(self.config, portable_paths(self.run_dir)) | {"run_dir": ".", "resume": None}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        computer = {"device": str(trainer.strategy.root_device), "threads": torch.get_num_threads()}
        record = self.software | computer | corrections_of(trainer)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        table = layer_table(pl_module, pl_module.depths(), groups, trainer.current_epoch)
        say_fitted(table)
        write_text(as_text(table) + "\n", self.run_dir / "parameters.txt")
        write_text(yaml_text(record), self.run_dir / "record.yaml")
        write_text(yaml_text(self.config), self.run_dir / "config.yaml")
        resolved = OmegaConf.to_container(OmegaConf.create(self.config), resolve=True)
        for logger in trainer.loggers if trainer.enable_autolog_hparams else []:
            counts = count_parameters(pl_module, trainer.max_epochs)
            logger.log_hyperparams({**resolved, **record, **counts})  # type: ignore[dict-item]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        portable = portable_paths(self.run_dir)
        checkpoint["callbacks"] = replaced(checkpoint["callbacks"], portable)
        checkpoint["config"] = self.portable_config
        checkpoint["git_commit"] = self.software["git_commit"]
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it at run time
        if hasattr(datamodule, "load"):
            source, reader = datamodule.load(), getattr(datamodule, "reader", "photo")
            record = {"name": source.name, "origin": source.origin, "classes": list(source.classes)}
            checkpoint["data"] = record | {"shape": list(source.shape), "reader": reader}
            checkpoint["data"] |= replaced(corrections_of(trainer), portable)
        checkpoint["tracker_ids"] = tracker_ids(trainer.loggers)
        checkpoint["wandb_id"] = checkpoint["tracker_ids"].pop("wandb", None)
        checkpoint["csv_rows"] = next(
            (csv_rows(trainer, each) for each in trainer.loggers if isinstance(each, RunCSV)), None
        )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Runs before Lightning gives the callbacks their states."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it at run time
        if "data" in checkpoint and hasattr(datamodule, "load"):
            check_same_classes(checkpoint["data"]["classes"], datamodule.load(), trainer.ckpt_path)
            check_same_corrections(checkpoint["data"].get("corrections"), datamodule.load().corrections)
        folder = run_folder(Path(str(trainer.ckpt_path)).resolve())
        checkpoint["callbacks"] = replaced(checkpoint["callbacks"], {"${run_dir}/": f"{folder}/"})
        for state in checkpoint["callbacks"].values():
            forget_others(state, folder)
        link_earlier_folders(trainer.loggers, folder)


def corrections_of(trainer: Any) -> dict[str, Any]:
    """What `data.exclude` and `data.relabel` have done, under the key `corrections`; empty without them."""
    source = trainer.datamodule.load() if hasattr(trainer.datamodule, "load") else None
    return {"corrections": dict(source.corrections)} if source and source.corrections else {}


def check_same_corrections(before: dict[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """Raise UserError where a file of `data.exclude` or `data.relabel` is not the one that the resumed run had."""
    for setting in ("exclude", "relabel"):
        had, has = ((each or {}).get(setting, {}) for each in (before, now))
        if had.get("sha256") != has.get("sha256"):
            raise UserError(
                f"data.{setting}={has.get('file', 'null')} is not the file that the run to be resumed had "
                f"({had.get('file', 'null')}, SHA-256 {had.get('sha256', '-')[:16]}). Give that file, or start_from "
                "in place of resume."
            )


def csv_rows(trainer: Any, logger: RunCSV) -> int:
    """How many rows of metrics belong to a checkpoint that is saved now.

    At the end of an epoch Lightning logs the epoch's metrics after it has saved, and a run that resumes from there does
    not log them: they are logged here.
    """
    if ends_epoch(trainer) and (metrics := trainer._logger_connector.metrics["log"]):
        row = convert_tensors_to_scalars(metrics) | {"epoch": trainer.current_epoch}
        logger.log_metrics(row, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
    return logger.write_all()


def forget_others(state: Any, folder: Path) -> None:
    """Drop files outside of a run's folder from the state of a ModelCheckpoint, which loads, copies or removes them."""

    def is_own(path: Any) -> bool:
        return Path(str(path)).is_file() and Path(str(path)).resolve().is_relative_to(folder)

    if isinstance(state, dict) and "best_model_path" in state:
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = state[key] if is_own(state.get(key)) else ""
        known = state.get("best_k_models") or {}
        state["best_k_models"] = {path: score for path, score in known.items() if is_own(path)}


def check_same_config(config: dict[str, Any]) -> None:
    """Compare this process's configuration, plain values, with that of all others; every process calls it.

    Raises:
        UserError: on every process, if they differ; it names each key that does and its value on each rank.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    own = by_dotted_key(OmegaConf.to_container(OmegaConf.create(config), resolve=True))
    hashes = from_all_ranks(hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest())
    if len(set(hashes)) == 1:
        return
    configs = from_all_ranks(own)
    problems: dict[str, str] = {}
    for key in sorted({key for each in configs for key in each}, key=lambda key: (key.count("."), key)):
        ranks_with: dict[str, list[str]] = defaultdict(list)
        for rank, each in enumerate(configs):
            ranks_with[each.get(key, "missing")].append(str(rank))
        if len(ranks_with) > 1 and not key.endswith(tuple(f".{other}" for other in problems)):  # model.optim.lr
            values = (
                f"{value if len(value) <= 80 else f'{value[:77]}...'} on rank {', '.join(ranks)}"
                for value, ranks in ranks_with.items()
            )
            problems[key] = f"{key} is {' and '.join(values)}"
    raise UserError(
        f"The {len(configs)} processes of this run have different configurations, so that none of them trains: "
        f"{'; '.join(problems.values())}. Start all of them with the same command line and the same code; run_dir too "
        "must be one folder for all (hydra.run.dir=<folder>)."
    )


def by_dotted_key(value: Any) -> dict[str, str]:
    """Nested values by their dotted keys, each as JSON."""
    return {key: json.dumps(leaf, default=str) for key, leaf in config_leaves(value, "")}
