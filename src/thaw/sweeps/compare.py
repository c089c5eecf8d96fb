"""A comparison of freezing policies: each gets the learning rate that suits it, then more seeds, then the test.

The jobs are those of a sweep, launched in stages. What a stage runs depends on the results of the stages before it
alone, never on which job ended first, so that an interrupted comparison comes to the same numbers.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from thaw.run.command_line import override_key, quoted
from thaw.run.config import build, settle
from thaw.run.console import plural, say
from thaw.run.errors import UserError
from thaw.run.files import read_json, write_json, write_text
from thaw.run.folders import NO_JOBS
from thaw.run.jobs import refuse_chdir
from thaw.run.ranks import is_launched, num_processes
from thaw.run.suggestions import did_you_mean, nearest_word
from thaw.run.targets import targets
from thaw.run.values import Positive, check_types, find_problem
from thaw.sweeps import machine
from thaw.sweeps.cells import format_seconds
from thaw.sweeps.compare_policies import NOT_A_POLICY, Candidates, bind_policies
from thaw.sweeps.compare_time import ImageCounts, Timing, predict, too_long
from thaw.sweeps.compare_tries import CompareSettings, best_try, is_at_edge
from thaw.sweeps.ending import say_how_to_resume, test_runs
from thaw.sweeps.grid import INTERRUPTED, GridSweep, Job, check_jobs, compose_job
from thaw.sweeps.runs import DONE, Run, is_run, read_run

if TYPE_CHECKING:  # takes seconds
    from thaw.plan.speed import Speed

PLAN = "plan.json"  # what the time budget has decided: the same when the comparison is resumed
OVER = (DONE, "pruned")  # states of a try that is not run again
SET_HERE = {  # keys that a comparison sets itself, and what to type instead
    "freeze": "compare.policies=[...] names the policies",
    "optim.lr": "compare.lr.<policy>=... is the first of its learning rates",
    "seed": "compare.seeds=... is the number of seeds",
    "callbacks.early_stopping": "all jobs see the same number of images; trainer.max_epochs=... says how many",
    "resume": "the same command as before continues a comparison",
}


@dataclass
class Policy:
    """A policy of the comparison: its tries by learning rate, in their order, and its runs by seed."""

    name: str
    tries: dict[float, Job] = field(default_factory=dict)
    lr: float | None = None
    runs: list[Job] = field(default_factory=list)

    @property
    def first(self) -> Job:
        return next(iter(self.tries.values()))

    def tried(self) -> dict[float, Run]:
        return {lr: record(job) for lr, job in self.tries.items()}


class CompareSweep(GridSweep):
    """The stages of a comparison: a first learning rate of each policy, a second, ..., more seeds, the test."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the comparison as far as it is not done; exits with status 1 if a policy has no result.

        Raises:
            UserError: settings that cannot work, before the first job starts.
        """
        refuse_chdir(self.config.hydra)
        self.typed = check_arguments(arguments)
        check_types(self.config.compare, "compare.")
        self.settings: CompareSettings = build(self.config.compare)
        check_rates(self.settings)
        candidates = self.candidates()
        self.left_out = candidates.left_out
        with only_here(self.folder):
            self.policies = [Policy(name) for name in self.plan(candidates)]
            check_jobs([self.next_try(policy) for policy in self.policies], self.on_this_machine)
            write_text(OmegaConf.to_yaml(self.config), self.folder / "multirun.yaml")
            self.keep()
            self.end(*self.run_stages())

    @property
    def on_this_machine(self) -> bool:
        return "slurm" not in self.config.hydra.launcher._target_.lower()

    # The stages

    def run_stages(self) -> tuple[Any, int]:
        """Run all stages; returns an exit status and how many runs cannot be tested."""
        self.ran, self.total = 0, len(self.policies) * (self.settings.tries + self.settings.seeds - 1)
        try:
            self.run_jobs([policy.first for policy in self.policies])
            self.leave_out_what_is_late()
            for _ in range(1, self.settings.tries):
                self.run_jobs([self.next_try(policy) for policy in self.policies])
            for policy in self.policies:
                policy.lr = best_try(policy.tried())
                if policy.lr is not None:
                    more = [self.job(policy.name, policy.lr, seed) for seed in range(1, self.settings.seeds)]
                    policy.runs = [policy.tries[policy.lr], *more]
            self.run_jobs([job for policy in self.policies for job in policy.runs[1:]])
            return 0, self.test()
        except KeyboardInterrupt:
            return INTERRUPTED, 0
        except SystemExit as leaving:  # of a job in this process, at Ctrl-C
            return leaving.code, 0
        finally:
            self.keep()

    def run_jobs(self, jobs: Sequence[Job]) -> None:
        """Run the jobs of a stage that are not over."""
        states = {job.folder: record(job).state for job in jobs}
        if running := [folder for folder, state in states.items() if state == "running"]:
            raise UserError(f"{running[0]} is written by another process; wait until it ends, then run this again.")
        todo = [self.with_reference(job) for job in jobs if states[job.folder] not in OVER]
        self.ran += len(jobs) - len(todo)
        self.launch(todo, self.ran, self.total)
        self.ran += len(todo)
        self.keep()

    def with_reference(self, job: Job) -> Job:
        """A try with the name of the policy's best try before it, which may end it early."""
        for policy in self.policies:
            if job in policy.tries.values() and (best := best_try(policy.tried())):
                name = quoted(policy.tries[best].folder.name)  # which may look like a number
                return Job((*job.overrides, f"callbacks.pruning.reference={name}"), job.cfg, job.folder)
        return job

    def leave_out_what_is_late(self) -> None:
        """Leave out policies that no longer fit into the minutes, now that each has been timed."""
        if self.settings.minutes is None or self.timing is None:
            return
        known = read_json(self.folder / PLAN)
        if known.get("minutes") != self.settings.minutes or "late" not in known:
            records = {policy.name: record(policy.first) for policy in self.policies}
            measured = {name: run.seconds for name, run in records.items() if run.seconds is not None}
            late = too_long(self.timing, [*records], measured, self.settings.minutes)
            known |= {"minutes": self.settings.minutes}
            known["late"] = {
                name: f"it needs {format_seconds(needed)} more, by the time of its first try, and "
                f"{format_seconds(left)} of compare.minutes={self.settings.minutes:g} are left for it"
                for name, (needed, left) in late.items()
            }
            write_json(known, self.folder / PLAN)
        for name, reason in known["late"].items():
            say(f"left out: {name}: {reason}", "yellow")
        self.left_out |= known["late"]
        self.policies = [policy for policy in self.policies if policy.name not in known["late"]]
        self.total = self.ran + len(self.policies) * (self.settings.tries + self.settings.seeds - 2)

    def test(self) -> int:
        """Test the runs at the chosen learning rates; returns how many cannot be tested."""
        jobs = [job for policy in self.policies for job in policy.runs]
        allow = sorted({target for job in jobs for target in targets(job.cfg)})
        runs = [run for run in map(record, jobs) if run.state == DONE]
        return test_runs(runs, allow, jobs[0].cfg.cache) if any(job.cfg.test for job in jobs) else 0

    def end(self, status: Any, untested: int) -> None:
        """Print the answer as far as there is one, and exit if something is not done."""
        from thaw.sweeps.compare_answer import report_comparison

        without = [policy.name for policy in self.policies if not is_finished(policy, self.settings.seeds)]
        if any(is_run(policy.first.folder) for policy in self.policies):
            report_comparison(self.folder)
        for policy in self.policies:
            for lr, run in policy.tried().items():
                if run.failed:  # a rate that is too high may diverge, so that the comparison is done without it
                    say(f"{policy.name} with optim.lr={lr:g} failed: {run.reason}", "yellow")
        if without or untested:
            say_how_to_resume(f"not done: {', '.join(without)}." if without else f"not tested: {untested} runs.")
        if status or without or untested:
            sys.exit(status or 1)

    # Before the first job

    def candidates(self) -> Candidates:
        """The policies that can be compared, the cheapest first.

        Raises:
            UserError: a policy that does not exist or does not apply, or fewer than two of them.
        """
        options = self.hydra_context.config_loader.get_group_options("freeze")
        named = self.settings.policies
        names = [name for name in options if name != NOT_A_POLICY] if named == "all" else list(named)
        check_names(names, options)
        configs = {name: self.job(name, self.optimizer_lr, 0).cfg for name in names}
        check_jobs([Job((), cfg, Path(cfg.run_dir)) for cfg in configs.values()], self.on_this_machine)
        first = configs[names[0]]
        check_run_of(first)
        classes, self.images, self.shape = read_data(first)
        for cfg in configs.values():
            settle(cfg)
            cfg.model.num_classes = classes
        self.configs = configs
        found = bind_policies(configs, "cuda" if first.trainer.accelerator in ("gpu", "cuda") else "cpu")
        if named != "all" and found.left_out:
            name, reason = next(iter(found.left_out.items()))
            raise UserError(
                f"compare.policies: {name} does not apply to backbone={self.config.hydra.runtime.choices.backbone}: "
                f"{reason} Leave it out; compare.policies=all takes those that apply."
            )
        if len(found.work) < 2:
            reasons = "".join(f"\n{name}: {shortly(reason)}" for name, reason in found.left_out.items())
            raise UserError(
                f"{' and '.join(found.work) or 'No policy'} alone applies to this backbone, which leaves nothing to "
                f"compare; choose another backbone, or backbone.weights.{reasons}"
            )
        return found

    def plan(self, candidates: Candidates) -> list[str]:
        """Say what will run and how long it will take; returns the policies that fit into the minutes."""
        policies = [*candidates.work]
        for name, reason in self.left_out.items():
            say(f"left out: {name}: {shortly(reason)}", "yellow")
        cfg = self.configs[policies[0]]
        self.timing = None
        if self.on_this_machine:
            speed = self.speed(candidates)
            costs = {name: predict(work, speed, cfg, self.images) for name, work in candidates.work.items()}
            self.timing = Timing(costs, self.settings.tries, self.settings.seeds, self.jobs_at_once(cfg.trainer))
            if self.settings.minutes is not None:
                policies = self.timing.fitting(self.settings.minutes)
            for name in (name for name in costs if name not in policies):
                seconds = format_seconds(self.timing.seconds(name))
                self.left_out[name] = (
                    f"about {seconds} more than compare.minutes={self.settings.minutes:g} has room for"
                )
                say(f"left out: {name}: {self.left_out[name]}", "yellow")
        elif self.settings.minutes is not None:
            raise UserError(
                "compare.minutes is planned by steps that are timed here, but SLURM runs the jobs on other machines; "
                "leave it out, and name fewer policies if time is short: compare.policies=[linear_probe,lora]."
            )
        epochs, images = cfg.trainer.max_epochs, self.images.train
        say(
            f"{len(policies)} policies, {plural(self.settings.tries, 'learning rate')} and "
            f"{plural(self.settings.seeds, 'seed')} each, in {os.path.relpath(self.folder)}"
        )
        say(f"equal budget: every job trains on {plural(epochs, 'epoch')} of {images:,} images, without early stopping")
        if self.timing:
            self.timing.show(policies)
        return policies

    def speed(self, candidates: Candidates) -> "Speed":
        """What this machine was measured to do, now or when the comparison was started."""
        from thaw.plan.speed import Speed, measure_speed

        if (self.folder / PLAN).is_file():
            return Speed(**read_json(self.folder / PLAN)["speed"])
        least, most = next(iter(candidates.work)), max(candidates.work, key=lambda name: candidates.work[name].train)
        steps = candidates.work[least].step, candidates.work[most].step
        speed = measure_speed(self.configs[least], self.configs[most], steps, self.shape)
        write_json({"speed": vars(speed)}, self.folder / PLAN)
        return speed

    def jobs_at_once(self, trainer: DictConfig) -> int:
        """How many jobs share the time: those of a queue over GPUs. Jobs on cores take longer, the more there are."""
        if "QueueLauncher" not in self.config.hydra.launcher._target_ or trainer.accelerator not in ("gpu", "cuda"):
            return 1
        return max(1, len(machine.free_gpus(self.config.hydra.launcher.gpus)) // num_processes(trainer))

    # Jobs and records

    def next_try(self, policy: Policy) -> Job:
        """The job of the learning rate that the search for a policy's tries next, which joins its tries."""
        lr = self.settings.next_rate(policy.name, self.optimizer_lr, policy.tried())
        policy.tries[lr] = self.job(policy.name, lr, 0)
        return policy.tries[lr]

    @cached_property
    def optimizer_lr(self) -> float:
        """The learning rate in the file of the chosen optimizer, whatever an experiment or the command line says."""
        chosen = self.config.hydra.runtime.choices["optim"]
        return float(compose_job(self.hydra_context, self.config, [f"optim={chosen}"]).cfg.optim.lr)

    def job(self, policy: str, lr: float, seed: int) -> Job:
        overrides = [*self.typed, f"freeze={policy}", f"optim.lr={lr}", f"seed={seed}"]
        return compose_job(self.hydra_context, self.config, overrides)

    def keep(self) -> None:
        """Write what is known of the comparison so far."""
        from thaw.sweeps.compare_results import COMPARISON

        epochs = self.policies[0].first.cfg.trainer.max_epochs
        settings = self.settings
        budget = {"epochs": epochs, "images": epochs * self.images.train, "tries": settings.tries}
        budget |= {"seeds": settings.seeds, "minutes": settings.minutes}
        left_out = [{"policy": name, "reason": shortly(reason)} for name, reason in self.left_out.items()]
        policies = [facts_of(policy) | {"train": self.train_overrides(policy)} for policy in self.policies]
        facts = {"policies": policies, "left_out": left_out, "budget": budget, "typed": self.typed}
        write_json(facts, self.folder / COMPARISON)

    def train_overrides(self, policy: Policy) -> list[str]:
        """What train.py has to be told to train a policy as here."""
        chosen = [f"optim.lr={policy.lr}"] if policy.lr is not None else []
        return [*self.typed, "callbacks.early_stopping=null", f"freeze={policy.name}", *chosen]


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """The settings of every job among those that were typed.

    Raises:
        UserError: a list of values, or a key that the comparison sets itself.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if is_launched():
        raise UserError(
            "compare.py starts the processes of its jobs itself: start it as `python compare.py ...`; "
            "hydra/launcher=queue or submitit_slurm runs several jobs at once."
        )
    typed = [each for each in arguments if override_key(each).split(".")[0] not in NO_JOBS]
    for argument in typed:
        if instead := SET_HERE.get(override_key(argument)):
            raise UserError(f"{argument}: a comparison sets this itself; {instead}.")
        if OverridesParser.create().parse_override(argument).is_sweep_override():
            key, _, value = argument.partition("=")
            raise UserError(
                f"{argument} holds several values, but a comparison has one for all of its jobs. Name one; "
                "compare.policies=[...] takes several policies, compare.tries and compare.seeds a number. For a list: "
                f"{key}=[{value}]."
            )
    return typed


def check_names(names: Sequence[str], options: Sequence[str]) -> None:
    """Refuse policies that do not exist, and fewer than two."""
    for name in names:
        if name not in options:
            near = nearest_word(name, options)
            raise UserError(
                f"compare.policies: {name} does not exist{did_you_mean(near)}\noptions: {', '.join(options)}"
            )
    if len(set(names)) < len(names):
        raise UserError(f"compare.policies=[{','.join(names)}] names a policy twice; name each once.")
    if len(names) < 2:
        one = next(iter(names), "full")
        raise UserError(
            f"compare.policies=[{','.join(names)}] leaves nothing to compare; name two or more of "
            f"{', '.join(options)}. To train with one: python train.py freeze={one}"
        )


def check_rates(settings: CompareSettings) -> None:
    problems = [line for key, lr in settings.lr.items() for line in find_problem(f"compare.lr.{key}", lr, Positive)]
    if problems:
        raise UserError(f"{'. '.join(problems)}.")


def check_run_of(cfg: DictConfig) -> None:
    """Refuse runs that have no freezing policy, no number of epochs, or several learning rates of their own."""
    if "num_classes" not in cfg.model:
        raise UserError(f"{cfg.name} trains without labels, so that there is no policy to compare; leave it out.")
    epochs = cfg.trainer.max_epochs
    if not isinstance(epochs, int) or epochs < 1:
        raise UserError(
            f"trainer.max_epochs={epochs} is no equal budget; give a number, such as trainer.max_epochs=10."
        )
    if "lrs" in (cfg.get("head") or {}):
        raise UserError(
            "head=lr_bank tries learning rates itself, and those of a comparison have no effect; leave it out."
        )


def read_data(cfg: DictConfig) -> tuple[int, ImageCounts, tuple[int, ...]]:
    """How many classes and images a run has, and the shape of an image."""
    from thaw.data.module import count_classes

    datamodule = build(cfg.data)
    classes = count_classes(cfg.model.num_classes, datamodule)
    source = datamodule.load()
    images, limit = len(source.train.labels), cfg.trainer.limit_train_batches
    if isinstance(limit, int):
        images = min(images, limit * cfg.data.batch_size * num_processes(cfg.trainer))
    elif limit is not None:
        images = int(limit * images)
    return classes, ImageCounts(images, len(source.val.labels), len(source.test.labels)), source.shape


def record(job: Job) -> Run:
    """What the files of a job say."""
    return read_run(job.folder, []) if is_run(job.folder) else Run(job.folder, "waiting")


def facts_of(policy: Policy) -> dict[str, Any]:
    """What `comparison.json` says of a policy."""
    runs = {lr: record(job) for lr, job in policy.tries.items()}
    tries = [{"lr": lr, "state": run.state, "val/acc": run.val_acc, "run": run.folder.name} for lr, run in runs.items()]
    at_edge = policy.lr is not None and is_at_edge(policy.lr, [*runs])
    names = [job.folder.name for job in policy.runs]
    return {"policy": policy.name, "lr": policy.lr, "at_edge": at_edge, "tries": tries, "runs": names}


def shortly(reason: str) -> str:
    """The first sentence."""
    return re.split(r"(?<!e\.g)\. ", reason)[0].removesuffix(".")


def is_finished(policy: Policy, seeds: int) -> bool:
    return len(policy.runs) == seeds and all(record(job).state == DONE for job in policy.runs)


@contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Keep other processes from the same comparison: what a stage runs depends on the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".comparing.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder} is a comparison that another process is running; wait until it ends.") from error
    try:
        yield
    finally:
        lock.release()
