"""The settings of a search, checked before its first trial: space, sampler, objectives, and the runs to come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from optuna.pruners import BasePruner, NopPruner

from thaw.run.command import explain
from thaw.run.command_line import override_key
from thaw.run.config import build
from thaw.run.errors import UserError
from thaw.run.folders import job_key
from thaw.run.ranks import is_launched
from thaw.sweeps.grid import check_run
from thaw.sweeps.runs import ACCURACY, COSTS
from thaw.sweeps.space import Space, as_overrides, corners, read_space, readable
from thaw.sweeps.study import make_sampler

Train = Callable[..., float | None]  # of a configuration, and of callbacks that it does not name

OBJECTIVES = dict.fromkeys(ACCURACY, "maximize") | dict.fromkeys(COSTS, "minimize")


@dataclass(frozen=True)
class SearchPlan:
    """A search that has been checked."""

    cfg: DictConfig  # a run of `configs/train.yaml`, with a `sweep` block
    typed: list[str]  # overrides of the command line that hold for every trial
    folder: Path  # of the study and its trials
    train: Train

    @cached_property
    def base(self) -> DictConfig:
        """The run without any searched key."""
        return self.compose({})

    @cached_property
    def space(self) -> Space:
        return read_space(self.cfg.sweep.space, self.base)

    @cached_property
    def pruner(self) -> BasePruner:
        return build(self.cfg.sweep.pruner) or NopPruner()

    @property
    def name(self) -> str:
        return f"{self.cfg.name}_{self.cfg.sweep.study}"

    @property
    def storage(self) -> Path:
        return Path(self.cfg.sweep.storage).expanduser().resolve()

    @property
    def objectives(self) -> dict[str, str]:
        """The direction of each metric."""
        return {metric: OBJECTIVES[metric] for metric in self.cfg.sweep.objectives}

    @property
    def asking(self) -> FileLock:
        """Held while a worker asks for a trial."""
        return FileLock(self.folder / ".asking.lock")

    def compose(self, params: dict[str, Any]) -> DictConfig:
        """The run of a trial, with its folder."""
        cfg = compose("train", [*self.typed, *as_overrides(params)], return_hydra_config=True)
        ignored = cfg.hydra.job.config.override_dirname.exclude_keys
        with open_dict(cfg):
            del cfg["hydra"]
        named = [override for override in self.typed if override_key(override) not in ignored]
        cfg.overrides = " ".join([*named, readable(params)]).strip()
        cfg.validate = cfg.test = False  # only the winner is tested, at the end
        cfg.run_dir = str(self.folder / job_key(cfg))
        return cfg


def prepare(cfg: DictConfig, overrides: Sequence[str], train: Train) -> SearchPlan:
    """Check whatever can be known before the first trial.

    Raises:
        UserError: names the wrong setting and what is allowed.
    """
    if is_launched():
        raise UserError(
            "sweep.py starts the processes of its trials itself: start each worker as `python sweep.py ...`, on a "
            "cluster as a task of its own (srun --ntasks=1)."
        )
    if cfg.resume:
        raise UserError(
            f"resume={cfg.resume} continues one run; leave it out: the same command as before continues a search."
        )
    trials = cfg.sweep.trials
    if not isinstance(trials, int) or trials < 1:
        raise UserError(f"sweep.trials={trials!r} must be a whole number, 1 or more.")
    typed = [override for override in overrides if override_key(override).replace("/", ".").split(".")[0] != "sweep"]
    plan = SearchPlan(cfg, typed, Path(cfg.run_dir).resolve(), train)
    check_run(plan.base, on_this_machine=True)
    check_objectives(plan)
    both = [override for override in typed if override_key(override) in plan.space]
    if both:
        raise UserError(f"{both[0]} was typed, but sweep.space searches it; leave one of them out.")
    for params in corners(plan.space):
        try:
            check_run(plan.compose(params), on_this_machine=True)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            raise UserError(f"sweep.space leads to {readable(params)}, which cannot run: {explain(error)}") from error
    directions: Sequence[Any] = list(plan.objectives.values())
    sampler = make_sampler(cfg.sweep.sampler, plan.space, drawn=0)
    study = optuna.create_study(directions=directions, sampler=sampler)  # in memory
    try:
        study.ask(plan.space)
    except (ValueError, ImportError) as error:
        raise UserError(f"sweep.sampler cannot draw: {error}. Choose another sweep/sampler.") from error
    return plan


def check_objectives(plan: SearchPlan) -> None:
    objectives = plan.cfg.sweep.objectives
    if not OmegaConf.is_list(objectives) or not objectives or len(set(objectives)) < len(objectives):
        raise UserError(f"sweep.objectives={objectives} must be a list of different metrics, such as [val/acc].")
    for metric in objectives:
        if metric not in OBJECTIVES:
            raise UserError(f"sweep.objectives: {metric} is not an objective; choose from {', '.join(OBJECTIVES)}.")
    if not isinstance(plan.pruner, NopPruner) and [*objectives] != [*ACCURACY]:
        raise UserError(
            f"sweep.pruner looks at validation accuracy alone, but the objectives are {', '.join(objectives)}; choose "
            "sweep/pruner=none."
        )
