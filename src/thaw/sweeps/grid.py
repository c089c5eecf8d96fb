"""A grid of jobs: all are checked, those that are not done are run, and then the table is written.

Hydra's own sweeper checks no types and devices beforehand, runs finished jobs again and compares nothing.
"""

import copy
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from thaw.run.command_line import override_key, quoted
from thaw.run.config import check_devices, plain
from thaw.run.console import plural, say
from thaw.run.errors import UserError
from thaw.run.files import write_text
from thaw.run.folders import NO_JOBS
from thaw.run.jobs import is_first_rank, read_state, refuse_chdir
from thaw.run.targets import targets
from thaw.run.trainer_settings import check_trainer
from thaw.run.values import check_types
from thaw.sweeps.cells import about_left, shortened
from thaw.sweeps.ending import measure_winners, report_runs, say_how_to_resume
from thaw.sweeps.fold_check import check_folds
from thaw.sweeps.groups import without_shared
from thaw.sweeps.runs import UNFINISHED, Run, is_run, settings_of, split_overrides

if TYPE_CHECKING:
    from thaw.callbacks.probe_bank import ProbeBank

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
INTERRUPTED = 128 + signal.SIGINT  # exit status


@dataclass(frozen=True)
class Job:
    overrides: tuple[str, ...]  # as typed, with one value of each list
    cfg: DictConfig  # composed
    folder: Path


class ConfigSnapshot(CachingConfigRepository):
    """The configuration files as they were when the sweep was checked: later edits reach none of its jobs."""

    def __deepcopy__(self, memo: dict) -> "ConfigSnapshot":  # Hydra copies it to compose a job
        return self

    def load_config(self, config_path: str) -> ConfigResult | None:
        return copy.deepcopy(super().load_config(config_path))


class ComposedOnce:
    """`load_sweep_config` of Hydra's loader, which the launcher calls again for each job that has been checked."""

    def __init__(self, compose: Callable[[DictConfig, list[str]], DictConfig]) -> None:
        self.compose = compose
        self.composed: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        if (key := tuple(sweep_overrides)) not in self.composed:
            self.composed[key] = self.compose(master_config, sweep_overrides)
            return copy.deepcopy(self.composed[key])
        return self.composed.pop(key)


class GridSweep(Sweeper):
    """Every combination of the values on the command line, each as a job in a folder of its own.

    The sweep's folder is written into its overrides: its name depends on the whole command, which a job does not know.
    """

    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        loader: Any = hydra_context.config_loader
        loader.repository = ConfigSnapshot(loader.repository)
        loader.load_sweep_config = ComposedOnce(loader.load_sweep_config)
        self.folder = Path(str(config.hydra.sweep.dir)).resolve()
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(self.folder)}")
        if config.hydra.launcher._target_ not in Plugins.instance().class_name_to_class:
            raise UserError(
                f"hydra/launcher={config.hydra.runtime.choices['hydra/launcher']} is not installed; for clusters run: "
                "pip install -e '.[slurm]', for one machine choose basic or queue."
            )
        if "SlurmLauncher" in config.hydra.launcher._target_ and shutil.which("sbatch") is None:
            raise UserError(
                "hydra/launcher=submitit_slurm needs SLURM's sbatch, which is not installed here; choose queue or "
                "submitit_local."
            )
        check_types(config.hydra.launcher, "hydra.launcher.")
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs of a command line; exits with status 1 if one of them has failed.

        Raises:
            UserError: a job that cannot run, before the first one starts.
        """
        refuse_chdir(self.config.hydra)
        jobs = self.jobs(arguments)
        check_jobs(jobs, on_this_machine="slurm" not in self.config.hydra.launcher._target_.lower())
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(OmegaConf.to_yaml(self.config), self.folder / "multirun.yaml")
        todo = to_be_run(jobs, self.folder)
        status: Any = 0
        try:
            self.launch(todo)
        except KeyboardInterrupt:
            status = INTERRUPTED
        except SystemExit as leaving:  # of a job in this process, at Ctrl-C
            status = leaving.code
        finally:  # under torchrun and srun every rank comes here
            unfinished = report_sweep(jobs, self.folder) if is_first_rank() else 0
        if unfinished:
            say_how_to_resume(f"not done: {unfinished} of {plural(len(jobs), 'job')}.")
        if status or unfinished:
            sys.exit(status or 1)

    def launch(self, jobs: Sequence[Job], before: int = 0, total: int | None = None) -> None:
        """Run jobs; those that the basic launcher runs in this process are announced, one by one.

        `before` is how many jobs came earlier, of `total` in all.
        """
        overrides = [job.overrides for job in jobs]
        if jobs and "submitit" in self.config.hydra.launcher._target_:  # which says nothing while it waits
            say(f"waiting for {plural(len(jobs), 'job')}; output in {os.path.relpath(self.folder / '.submitit')}")
        if self.config.hydra.launcher._target_ != BASIC_LAUNCHER:  # its class may be loaded twice
            ended = self.launcher.launch(overrides, initial_job_idx=0) if jobs else []
            _ = [job.return_value for job in ended]  # raises the error of a job that left no record
            return
        logging.getLogger(BASIC_LAUNCHER.rpartition(".")[0]).setLevel(logging.WARNING)  # it calls each job #0
        started = time.monotonic()
        names, banks = names_of(jobs), share_steps(jobs)
        total = before + len(jobs) if total is None else total
        for done, (name, of_job) in enumerate(zip(names, overrides, strict=True)):
            if is_first_rank():
                left = about_left(started, done, total - before - done)
                say(f"job {before + done + 1} of {total}{left}: {shortened(name)}", "bold")
            for job in self.launcher.launch([of_job], initial_job_idx=before + done):
                _ = job.return_value
            for bank in [bank for bank in banks if bank.epochs]:
                say(f"  the steps of all {len(bank.settings)} linear probes are computed together")
                banks.remove(bank)

    def jobs(self, arguments: list[str]) -> list[Job]:
        """Every job of the grid, composed.

        Raises:
            UserError: a list of values that is empty, or a range.
        """
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides(arguments)
        for override in overrides:
            if override.is_sweep_override() and not override.is_discrete_sweep():
                raise UserError(
                    f"{override.input_line} is a range, but a grid needs values: name them, as in optim.lr=1e-3,1e-2; "
                    "sweep.py searches ranges."
                )
            if override.is_discrete_sweep() and not list(override.sweep_string_iterator()):
                raise UserError(f"{override.input_line} gives no value at all; name at least one.")
        (batch,) = BasicSweeper.split_arguments(overrides, None)
        return [compose_job(self.hydra_context, self.config, overrides) for overrides in batch]


def share_steps(jobs: Sequence[Job]) -> "list[ProbeBank]":
    """Banks for the jobs that differ in optim.lr and optim.weight_decay alone; linear probes take their steps there."""
    from thaw.callbacks.probe_bank import BANKS, ProbeBank  # torch takes a second

    groups: dict[str, list[tuple[Job, Any]]] = defaultdict(list)  # with the rate and the decay of each job
    for job in jobs:
        same, optim = plain(job.cfg), job.cfg.get("optim") or {}
        setting = optim.get("lr"), optim.get("weight_decay")
        if all(isinstance(value, int | float) for value in setting):  # a recipe of your own may have neither
            del same["optim"]["lr"], same["optim"]["weight_decay"], same["run_dir"], same["overrides"]
            groups[json.dumps(same, sort_keys=True)].append((job, setting))
    banks = []
    for group in groups.values():
        if len(group) > 1:
            banks.append(ProbeBank([setting for _, setting in group]))
            BANKS.update((str(job.folder), banks[-1]) for job, _ in group)
    return banks


def names_of(jobs: Sequence[Job]) -> list[str]:
    """What tells the jobs of a launch apart: the overrides that not all of them share."""
    own = [[each for each in job.overrides if not override_key(each).startswith("callbacks.pruning")] for job in jobs]
    return [" ".join(each) for each in without_shared(own)]


def compose_job(hydra_context: HydraContext, config: DictConfig, overrides: Sequence[str]) -> Job:
    """Compose a job from its own overrides and the sweep's context and configuration, which names the folder."""
    cfg = hydra_context.config_loader.load_sweep_config(config, list(overrides))
    folder = Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir
    ignored = cfg.hydra.job.config.override_dirname.exclude_keys
    named = [override for override in overrides if override_key(override) not in ignored]
    cfg.run_dir, cfg.overrides = str(folder), " ".join(named)  # which Hydra itself knows only inside the job
    with open_dict(cfg):
        for block in NO_JOBS:
            cfg.pop(block, None)
    return Job(tuple(overrides), cfg, folder)


def check_jobs(jobs: Sequence[Job], on_this_machine: bool) -> None:
    """Check all jobs of a sweep before the first one starts. With `on_this_machine` their devices must be here.

    Raises:
        UserError: two jobs are the same, a value has the wrong type, or a job needs devices that are not there.
    """
    counts = Counter(job.folder for job in jobs)
    for job in jobs:
        if (count := counts[job.folder]) > 1:
            same = " ".join(job.overrides)
            raise UserError(f"The sweep holds the same job {count} times: {same}. Name each value once.")
    for job in jobs:
        if missing := OmegaConf.missing_keys(job.cfg):
            raise UserError(f"{', '.join(sorted(missing))} must be given a value: {min(missing)}=...")
        check_run(job.cfg, on_this_machine)
    check_folds([job.cfg for job in jobs], on_this_machine)


def check_run(cfg: DictConfig, on_this_machine: bool) -> None:
    check_types(cfg)
    check_trainer(cfg.trainer, cfg.optim)
    if on_this_machine:
        check_devices(cfg.trainer)


def to_be_run(jobs: Sequence[Job], folder: Path) -> list[Job]:
    """The jobs that are neither done nor running elsewhere; prints the states that were found in the sweep's folder."""
    states = [read_state(job.folder) for job in jobs]
    counts: Counter[str] = Counter(states)
    found = {
        "done": "{} done already",
        "running": "{} running in another process",
        "cut off": "{} cut off: they resume from their last checkpoint",
        "failed": "{} failed: they are retried",
        "new": "{} to be run",
    }
    summary = ", ".join(text.format(counts[state]) for state, text in found.items() if counts[state])
    if is_first_rank():
        say(f"{plural(len(jobs), 'job')} in {os.path.relpath(folder)}: {summary}")
    return [job for job, state in zip(jobs, states, strict=True) if state not in ("done", "running")]


def report_sweep(jobs: Sequence[Job], folder: Path) -> int:
    """Test the winner, or all jobs if one says `test=always`; write and print the table.

    The winner is the setting with the best validation accuracy; all its seeds are tested, once every job is done or has
    failed, so that none can overtake it any more. A test that fails counts as a job that is not done.

    Returns:
        how many jobs are not done.
    """
    states = [read_state(job.folder) for job in jobs]
    wanted = {job.cfg.test for job in jobs}  # an experiment may set it for its own jobs
    untested = 0
    if "done" in states and any(wanted) and set(states) <= {"done", "failed"}:
        allow = sorted({target for job in jobs for target in targets(job.cfg)})
        untested = measure_winners(folder, allow, jobs[0].cfg.cache, "always" in wanted)
    waiting = [waiting_run(job) for job in jobs if not is_run(job.folder)]
    if len(waiting) < len(jobs):
        report_runs([folder], folder, waiting=waiting)
    return len(jobs) - states.count("done") + untested


def waiting_run(job: Job) -> Run:
    """The record of a job that has not started."""
    cfg, reason = job.cfg, UNFINISHED["waiting"]
    overrides, settings = split_overrides(cfg.overrides), settings_of(plain(cfg))
    folds = {key: OmegaConf.select(cfg, f"data.{key}") for key in ("fold", "folds")}
    return Run(job.folder, "waiting", cfg.name, overrides, cfg.seed, **folds, reason=reason, settings=settings)
