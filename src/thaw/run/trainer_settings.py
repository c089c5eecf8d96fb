"""Lightning's Trainer from its settings. Values that it would refuse late, misread or ignore are refused first."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import BeforeValidator, Field

from thaw.run.config import build
from thaw.run.console import say
from thaw.run.deferred import is_deferred
from thaw.run.errors import UserError
from thaw.run.steps import skip_empty_hooks
from thaw.run.values import Count, CountOrZero, NonNegative, find_problem

if TYPE_CHECKING:  # takes seconds
    from lightning import LightningDataModule, Trainer


def as_duration(value: Any) -> timedelta:
    """A duration as Lightning takes it: `DD:HH:MM:SS` or arguments of `timedelta`."""
    if not isinstance(value, dict):
        value = dict(zip(("days", "hours", "minutes", "seconds"), map(int, str(value).split(":")), strict=True))
    with suppress(TypeError):  # an unknown unit
        if (length := timedelta(**value)) > timedelta(0):
            return length
    raise ValueError(value)  # pydantic says what is allowed


Share = Annotated[float, Field(gt=0, le=1)]
OF_BATCHES = "batches, or a share of them"
Batches = Annotated[Count | Share, Field(description=OF_BATCHES)]
Duration = Annotated[timedelta, BeforeValidator(as_duration)]
Strategy = Literal["auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"]

RULES: dict[str, Any] = {  # the values of each argument; null is Lightning's default
    "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps"],
    "strategy": Annotated[Strategy, Field(description="trainer=fsdp shards parameters")],
    "num_nodes": Count,
    "fast_dev_run": Annotated[bool | CountOrZero, Field(description="a number of batches")],
    "max_epochs": Annotated[Literal[-1] | Count, Field(description="-1 beside +trainer.max_steps=<steps>")],
    "min_epochs": CountOrZero,
    "max_steps": Annotated[Literal[-1] | Count, Field(description="-1 for no limit")],
    "min_steps": CountOrZero,
    "max_time": Duration,
    "limit_train_batches": Batches,
    "limit_val_batches": Annotated[CountOrZero | Share, Field(description=f"{OF_BATCHES}, 0 for no validation")],
    "limit_test_batches": Annotated[Count | Share, Field(description=f"{OF_BATCHES}; test=false leaves the test out")],
    "limit_predict_batches": Annotated[CountOrZero | Share, Field(description=OF_BATCHES)],
    "overfit_batches": Annotated[Literal[0], Field(description="to overfit, train on few images, as debug=overfit")],
    "val_check_interval": Annotated[Count | Share | Duration, Field(description=OF_BATCHES)],
    "check_val_every_n_epoch": Count,
    "num_sanity_val_steps": Annotated[int, Field(ge=-1, description="-1 for all batches")],
    "log_every_n_steps": CountOrZero,
    "accumulate_grad_batches": Count,
    "gradient_clip_val": NonNegative,
    "gradient_clip_algorithm": Literal["norm", "value"],
    "profiler": Literal["simple", "advanced", "pytorch"],
    "reload_dataloaders_every_n_epochs": CountOrZero,
    "barebones": Annotated[Literal[False], Field(description="it logs no accuracy; debug=profile times a run")],
    "model_registry": Annotated[None, Field(description="logger.wandb.log_model=true keeps the best checkpoint")],
    "logger": Annotated[None, Field(description="leave it out; logger= chooses loggers")],
    "callbacks": Annotated[None, Field(description="leave it out; +callbacks.<name>._target_=<class> adds one")],
}


def needs_end(schedule: str, warmup_fraction: float) -> str:
    """What in a schedule of the learning rate is a share of all steps; empty where nothing is."""
    if schedule != "constant":
        return f"optim.schedule={schedule}"
    return f"optim.warmup_fraction={warmup_fraction:g}" if warmup_fraction else ""


def check_trainer(trainer: DictConfig, optim: DictConfig) -> None:
    """Refuse wrong arguments of the right types: each wrong key is named with its value and what is allowed."""
    given: Any = OmegaConf.to_container(trainer, resolve=True)
    wrong = []
    for key, value in given.items():
        if key in RULES and value is not None and not (isinstance(value, dict) and "_target_" in value):
            wrong += find_problem(f"trainer.{key}", value, RULES[key])
    devices, max_epochs, interval = given.get("devices"), given.get("max_epochs"), given.get("val_check_interval")
    on_cpu = given.get("accelerator") == "cpu"
    form = r"auto|[1-9]\d*" if on_cpu else r"auto|-1|[1-9]\d*|\d+(,\d+)+|\[\d+(, \d+)*\]"
    if not re.fullmatch(form, str(devices)):
        kinds = "a number of processes or auto on a CPU" if on_cpu else "a number, a list of GPUs' numbers, -1 or auto"
        wrong.append(f"trainer.devices={devices} must be {kinds}")
    if given.get("precision") == "16-true":
        wrong.append("trainer.precision='16-true' must be 16-mixed, bf16-mixed or bf16-true: Adam divides by 0 in fp16")
    endless = max_epochs == -1 and given.get("max_steps", -1) == -1 and not given.get("fast_dev_run")
    if endless and (reason := needs_end(optim.schedule, optim.warmup_fraction)):
        wrong.append(
            f"trainer.max_epochs=-1 has no end, which {reason} needs; it must be a number of epochs, or stand beside "
            "+trainer.max_steps=<steps> or beside optim.schedule=constant optim.warmup_fraction=0.0"
        )
    if max_epochs and 0 < max_epochs < (given.get("min_epochs") or 0):
        wrong.append(f"trainer.min_epochs={given['min_epochs']} must be at most trainer.max_epochs={max_epochs}")
    if given.get("check_val_every_n_epoch", 1) is None and isinstance(interval, float):
        wrong.append(
            f"trainer.val_check_interval={interval} must be a whole number of batches or a duration, as "
            "trainer.check_val_every_n_epoch=null counts across epochs"
        )
    if wrong:
        raise UserError("; ".join(wrong) + ".")


def new_trainer(settings: DictConfig, **arguments: Any) -> Any:
    """The Trainer of a block like configs/trainer/cpu.yaml; `arguments` replace or complete its settings."""
    import torch

    warns = settings.get("deterministic") == "warn"
    if imports_nothing := warns and is_deferred("torch._dynamo"):
        arguments["deterministic"] = None
    trainer = build(settings, **arguments)
    if imports_nothing:  # as Lightning does, but for torch's function, which imports the compiler to set a flag there
        torch._C._set_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = bool(settings.get("benchmark"))
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if warns:  # else torch fills each new tensor, 3 % of a step on a CPU
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return trainer


def build_trainer(cfg: DictConfig, callbacks: Sequence[Any], loggers: Sequence[Any]) -> "Trainer":
    """The trainer of a run; `trainer.enable_checkpointing=false` and `trainer.fast_dev_run` keep no checkpoint."""
    from lightning.pytorch.callbacks import Checkpoint

    if cfg.trainer.get("fast_dev_run") or cfg.trainer.get("enable_checkpointing") is False:
        say("checkpoints: none, as trainer.fast_dev_run or trainer.enable_checkpointing=false asks for")
        callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
    skip_empty_hooks(callbacks)
    trainer = new_trainer(cfg.trainer, callbacks=[*callbacks], logger=[*loggers])
    if hasattr(trainer.strategy, "_timeout"):  # of several processes
        trainer.strategy._timeout = timedelta(seconds=cfg.rank_timeout)
    if not hasattr(trainer, "val_check_interval"):  # a duration; Lightning's EarlyStopping reads it all the same
        trainer.val_check_interval = None
    return trainer


def check_interval(trainer: "Trainer", batches: int) -> None:
    """Refuse a validation after more batches than an epoch's; Lightning's error would come with a traceback."""
    interval, limit = getattr(trainer, "val_check_interval", None), getattr(trainer, "limit_train_batches", 1.0)
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (limit or 1.0))
    if isinstance(interval, int) and trainer.check_val_every_n_epoch and interval > batches:
        raise UserError(
            f"trainer.val_check_interval={interval} is more than the {batches} batches of an epoch; lower it, or count "
            "across epochs with trainer.check_val_every_n_epoch=null."
        )


def check_test_batches(trainer: "Trainer", datamodule: "LightningDataModule") -> None:
    """Refuse to test on no image, or a share that holds no batch; Lightning would see it only after training."""
    if hasattr(datamodule, "load") and not len((source := datamodule.load()).test.labels):
        raise UserError(f"{source.title} has no test images; give a test split, or set test=false.")
    share = trainer.limit_test_batches
    if isinstance(share, float) and share < 1:
        datamodule.prepare_data()
        count = len(datamodule.test_dataloader())
        if int(share * count) < 1:
            raise UserError(
                f"trainer.limit_test_batches={share} leaves no batch of the {count} there are; set it to at least "
                f"{1 / count:.3g}, to a number of batches, or lower data.eval_batch_size."
            )
