"""A learning-rate range test (Smith 2017, arXiv:1506.01186, section 3.3): the loss while the learning rate rises."""

import copy
import math
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig

from thaw.lr_bank import BankClassifier
from thaw.optim import OptimizerRecipe
from thaw.run.command_line import override_key
from thaw.run.config import build
from thaw.run.console import progress, say
from thaw.run.errors import UserError
from thaw.run.files import write_text
from thaw.run.jobs import is_sweep_job
from thaw.run.trainer_settings import new_trainer

LOWEST, HIGHEST, STEPS = 1e-6, 10.0, 300
SMOOTH = 6.0  # steps, the standard deviation of the Gaussian that smooths the losses
HARDLY = 0.95  # of its first value, what a loss has to fall below
DIVERGED = 3.0  # the test ends when the loss is so many times its first value


def find_lr(cfg: DictConfig, model: Any, datamodule: LightningDataModule, callbacks: Sequence[Callback] = ()) -> None:
    """Train for `STEPS` steps while the learning rate rises from `LOWEST` to `HIGHEST`; nothing trained is kept.

    Writes `lr_find.csv` and `report/lr_find.png` to the run's folder, and prints the suggested rate with the command
    that trains with it. Groups, layer decay, weight decay, clipping and cached features are those of the run.

    Raises:
        UserError: a run for which one learning rate of all that trains is not meaningful.
    """
    refuse(cfg, model)
    model.optim = rising(model.optim)
    losses = RangeLosses()
    changed: dict[str, Any] = {"max_epochs": -1, "max_steps": STEPS, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    changed |= {"enable_checkpointing": False, "enable_progress_bar": False, "profiler": None, "logger": False}
    trainer = new_trainer(cfg.trainer, **changed, callbacks=[build(cfg.callbacks.step_seed), losses, *callbacks])
    with progress("learning rates", STEPS, "steps", hidden=not trainer.is_global_zero) as losses.advance:
        trainer.fit(model, datamodule)
    if trainer.is_global_zero:
        show_range(cfg, losses.rates, losses.losses)


def refuse(cfg: DictConfig, model: Any) -> None:
    if isinstance(model, BankClassifier):
        raise UserError(
            "lr_find=true tests the rate of one head, and head=lr_bank trains a head for each rate of head.lrs; leave "
            "lr_find out, or set head=linear."
        )
    if cfg.resume:
        raise UserError("lr_find=true starts a test of its own, and resume continues a run; leave one of them out.")
    if is_sweep_job():
        raise UserError("lr_find=true is a test of one configuration and no job of a sweep; leave -m out.")
    if isinstance(model, LightningModule) and hasattr(model, "generator"):
        raise UserError("lr_find=true needs a loss that falls as the model learns, which model=gan has not.")
    thaw = getattr(model, "thaw", None)
    if thaw and thaw.after(1):
        raise UserError(
            "lr_find=true tests what trains together from the start, but the freezing policy thaws after "
            f"{min(thaw.after(1))} epochs; test its parts, with freeze=linear_probe and freeze=full."
        )


def rising(recipe: OptimizerRecipe) -> OptimizerRecipe:
    """The recipe, still of its own class, with a learning rate that rises by a constant factor at each step."""
    recipe = copy.copy(recipe)
    recipe.lr = LOWEST
    recipe.lr_fraction = lambda step, total_steps, thaw_step: (HIGHEST / LOWEST) ** (step / (STEPS - 1))  # type: ignore
    return recipe


class RangeLosses(Callback):
    """Learning rate at the head, and mean training loss over all processes, of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.parts: list[float] = []  # of the step's accumulated batches
        self.advance: Callable[[int], None] = lambda steps: None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        self.parts.append(float(loss) * trainer.accumulate_grad_batches)  # which Lightning divides it by
        if trainer.global_step == len(self.rates):
            return
        self.rates.append(LOWEST * (HIGHEST / LOWEST) ** (len(self.rates) / (STEPS - 1)))
        self.losses.append(sum(self.parts) / len(self.parts))
        self.parts = []
        self.advance(1)
        if not self.losses[-1] < DIVERGED * self.losses[0]:
            trainer.should_stop = True


def show_range(cfg: DictConfig, rates: Sequence[float], losses: Sequence[float]) -> None:
    """Write the curve as CSV and picture, print the suggestion and the command that trains with it."""
    from thaw.pages.lr_range import save_lr_range  # matplotlib, only for pictures

    smoothed = smooth(losses)
    suggested = suggest(rates, smoothed)
    run_dir = Path(cfg.run_dir)
    lines = [f"{rate:.6g},{loss:.6g},{mean:.6g}" for rate, loss, mean in zip(rates, losses, smoothed, strict=True)]
    write_text("\n".join(["lr,loss,smoothed", *lines]) + "\n", run_dir / "lr_find.csv")
    save_lr_range(rates, losses, smoothed.tolist(), suggested, run_dir / "report" / "lr_find.png")
    folder = os.path.relpath(run_dir)
    say(f"\n  {'curve':<12}{folder}/report/lr_find.png, {folder}/lr_find.csv")
    if suggested is None:
        raise UserError(
            f"The loss did not fall while the learning rate rose from {rates[0]:g} to {rates[-1]:g}, so that no rate "
            "can be suggested; look at the curve."
        )
    say(f"  {'suggestion':<12}optim.lr={suggested:g}; train with it by:")
    say(command_with(suggested), "cyan")


def command_with(lr: float) -> str:
    """The command that was typed, with a learning rate in place of the test."""
    typed = [each for each in HydraConfig.get().overrides.task if override_key(each) not in ("lr_find", "optim.lr")]
    return shlex.join(["python", "train.py", *typed, f"optim.lr={lr:g}"])


def smooth(losses: Sequence[float]) -> np.ndarray:
    from scipy.ndimage import gaussian_filter1d  # takes 0.1 s

    return gaussian_filter1d(np.asarray(losses), SMOOTH, mode="nearest")


def suggest(rates: Sequence[float], smoothed: np.ndarray) -> float | None:
    """The rate half way, in its logarithm, between the steepest fall of the loss and its minimum, to two digits.

    At the minimum training is about to diverge; at the steepest fall it is still slow. None where the loss hardly
    falls.
    """
    lowest = int(smoothed.argmin())
    if not smoothed[lowest] < HARDLY * smoothed[0]:
        return None
    steepest = int(np.gradient(smoothed[: lowest + 1]).argmin())
    return float(f"{math.sqrt(rates[steepest] * rates[lowest]):.1e}")
