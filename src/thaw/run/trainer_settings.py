"""Lightning's Trainer from its settings; what it would refuse late, misread or ignore is refused before training."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from thaw.run.config import build

if TYPE_CHECKING:  # takes seconds
    from lightning import LightningDataModule, Trainer

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
PROFILERS = ("simple", "advanced", "pytorch")
DURATION = "a duration as DD:HH:MM:SS or {minutes: 10}"
SOME = "a whole number of batches, or a fraction above 0 and at most 1"


def seconds(value: Any) -> float:
    """Of a duration as Lightning takes it, `DD:HH:MM:SS` or arguments of `timedelta`; 0 for anything else."""
    if isinstance(value, dict):
        try:
            return timedelta(**value).total_seconds()
        except TypeError:
            return 0.0
    parts = re.fullmatch(r"(\d+):(\d+):(\d+):(\d+)", str(value))
    if not parts:
        return 0.0
    days, hours, minutes, rest = map(int, parts.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=rest).total_seconds()


def at_least(lowest: float) -> Callable[[Any], bool]:
    return lambda value: value >= lowest


def batches(value: Any) -> bool:
    return 0 < value <= 1 or (value > 1 and value % 1 == 0)


# What each argument may be; null is Lightning's default.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "accelerator": (lambda value: value in ACCELERATORS, f"one of {', '.join(ACCELERATORS)}"),
    "strategy": (lambda value: value in STRATEGIES, f"one of {', '.join(STRATEGIES)}; trainer=fsdp shards parameters"),
    "num_nodes": (at_least(1), "1 or more"),
    "precision": (lambda value: value != "16-true", "16-mixed, bf16-mixed or bf16-true, as Adam divides by 0 in fp16"),
    "fast_dev_run": (at_least(0), "true, false or a number of batches"),
    "max_epochs": (lambda value: value == -1 or value >= 1, "1 or more, or -1 beside +trainer.max_steps=<steps>"),
    "min_epochs": (at_least(0), "0 or more"),
    "max_steps": (lambda value: value == -1 or value >= 1, "1 or more, or -1 for no limit"),
    "min_steps": (at_least(0), "0 or more"),
    "max_time": (lambda value: seconds(value) > 0, DURATION),
    "limit_train_batches": (batches, SOME),
    "limit_val_batches": (lambda value: value == 0 or batches(value), f"{SOME}, or 0 for no validation"),
    "limit_test_batches": (batches, f"{SOME}; test=false leaves the test out"),
    "limit_predict_batches": (lambda value: value == 0 or batches(value), SOME),
    "overfit_batches": (lambda value: value == 0, "0; to overfit, train on few digits, e.g. debug=overfit"),
    "val_check_interval": (
        lambda value: batches(value) if isinstance(value, int | float) else seconds(value) > 0,
        f"{SOME}, or {DURATION}",
    ),
    "check_val_every_n_epoch": (at_least(1), "1 or more, or null"),
    "num_sanity_val_steps": (at_least(-1), "a number of batches, or -1 for all"),
    "log_every_n_steps": (at_least(0), "0 or more"),
    "accumulate_grad_batches": (at_least(1), "1 or more"),
    "gradient_clip_val": (at_least(0), "0 or more, or null"),
    "gradient_clip_algorithm": (lambda value: value in ("norm", "value"), "norm or value"),
    "profiler": (lambda value: value in PROFILERS, f"one of {', '.join(PROFILERS)}, or null"),
    "reload_dataloaders_every_n_epochs": (at_least(0), "0 or more"),
    "barebones": (lambda value: not value, "false, as a run without logging has no accuracy; debug=profile times one"),
    "model_registry": (lambda value: not value, "null; logger.wandb.log_model=true keeps the best checkpoint in W&B"),
    "logger": (lambda value: False, "left out; logger= chooses loggers"),
    "callbacks": (lambda value: False, "left out; +callbacks.<name>._target_=<class> adds one"),
}


def check_trainer(trainer: DictConfig) -> None:
    """Compare every argument with what it may be, and those that depend on each other.

    Args:
        trainer: of a run, of the right types (`thaw.run.config.check_types`).

    Raises:
        ValueError: names each wrong key, its value and what was allowed.
    """
    given = OmegaConf.to_container(trainer, resolve=True)
    assert isinstance(given, dict)
    built = {key for key, value in given.items() if isinstance(value, dict) and "_target_" in value}
    wrong = [
        f"trainer.{key}={given[key]} must be {allowed}"
        for key, (is_right, allowed) in RULES.items()
        if given.get(key) is not None and key not in built and not is_right(given[key])
    ]
    devices, max_epochs, interval = given.get("devices"), given.get("max_epochs"), given.get("val_check_interval")
    on_cpu = given.get("accelerator") == "cpu"
    form = r"auto|[1-9]\d*" if on_cpu else r"auto|-1|[1-9]\d*|\d+(,\d+)+|\[\d+(, \d+)*\]"
    if not re.fullmatch(form, str(devices)):
        kinds = "a number of processes or auto on a CPU" if on_cpu else "a number, a list of GPUs' numbers, -1 or auto"
        wrong.append(f"trainer.devices={devices} must be {kinds}")
    if max_epochs == -1 and given.get("max_steps", -1) == -1 and not given.get("fast_dev_run"):
        wrong.append(
            "trainer.max_epochs=-1 has no end, which the cosine of the learning rate needs; it must be a number of "
            "epochs, or stand beside +trainer.max_steps=<steps>"
        )
    if max_epochs and 0 < max_epochs < (given.get("min_epochs") or 0):
        wrong.append(f"trainer.min_epochs={given['min_epochs']} must be at most trainer.max_epochs={max_epochs}")
    if given.get("check_val_every_n_epoch", 1) is None and isinstance(interval, float):
        wrong.append(
            f"trainer.val_check_interval={interval} must be a whole number of batches or {DURATION}, as "
            "trainer.check_val_every_n_epoch=null counts across epochs"
        )
    if wrong:
        raise ValueError("; ".join(wrong) + ".")


def build_trainer(cfg: DictConfig, callbacks: Sequence[Any], loggers: Sequence[Any]) -> "Trainer":
    """The trainer of a run; `trainer.enable_checkpointing=false` and `trainer.fast_dev_run` keep no checkpoint."""
    from lightning.pytorch.callbacks import Checkpoint

    if cfg.trainer.get("fast_dev_run") or cfg.trainer.get("enable_checkpointing") is False:
        print("checkpoints: none, as trainer.fast_dev_run or trainer.enable_checkpointing=false asks for", flush=True)
        callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
    trainer = build(cfg.trainer, callbacks=[*callbacks], logger=[*loggers])
    if not hasattr(trainer, "val_check_interval"):  # a duration, for which Lightning's EarlyStopping is not prepared
        trainer.val_check_interval = None
    return trainer


def check_test_batches(trainer: "Trainer", datamodule: "LightningDataModule") -> None:
    """Refuse before training a fraction of the test split that holds no batch, which Lightning sees after it."""
    share = trainer.limit_test_batches
    if isinstance(share, float) and share < 1:
        datamodule.prepare_data()
        count = len(datamodule.test_dataloader())
        if int(share * count) < 1:
            raise ValueError(
                f"trainer.limit_test_batches={share} leaves no batch of the {count} there are; set it to at least "
                f"{1 / count:.3g}, to a number of batches, or lower data.eval_batch_size."
            )


@contextmanager
def lightning_errors() -> Iterator[None]:
    """Turn what Lightning says of settings into a user's error.

    Raises:
        ValueError: with Lightning's own message.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (InstantiationException, MisconfigurationException) as error:
        cause = (error.__cause__ or error) if isinstance(error, InstantiationException) else error
        if not isinstance(cause, MisconfigurationException | ModuleNotFoundError):
            raise
        place = re.search(r"full_key: (\S+)", str(error))
        raise ValueError(f"{place[1]}: {cause}" if place else str(cause)) from error
