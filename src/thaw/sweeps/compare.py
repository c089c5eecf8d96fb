"""A comparison of freezing policies: each gets the learning rate that suits it, then more seeds, then the test.

The jobs are those of a sweep, launched in stages. What a stage runs depends on the results of the stages before it
alone, never on which job ended first, so that an interrupted comparison comes to the same numbers.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from thaw.run.command_line import override_key
from thaw.run.config import build, settle
from thaw.run.console import plural, say
from thaw.run.errors import UserError
from thaw.run.files import write_json, write_text
from thaw.run.folders import NO_JOBS
from thaw.run.jobs import refuse_chdir
from thaw.run.ranks import is_launched
from thaw.run.suggestions import did_you_mean, nearest_word
from thaw.run.targets import targets
from thaw.run.values import Positive, check_types, find_problem
from thaw.sweeps.compare_answer import report_comparison
from thaw.sweeps.compare_policies import NOT_A_POLICY, Candidates, bind_policies
from thaw.sweeps.compare_tries import CompareSettings, best_try, is_at_edge
from thaw.sweeps.ending import say_how_to_resume, test_runs
from thaw.sweeps.grid import INTERRUPTED, GridSweep, Job, check_jobs, compose_job
from thaw.sweeps.runs import DONE, Run, is_run, read_run

COMPARISON = "comparison.json"
OVER = (DONE, "pruned")  # states of a try that is not run again
SET_HERE = {  # keys that a comparison sets itself, and what to type instead
    "freeze": "compare.policies=[...] names the policies",
    "optim.lr": "compare.lr.<policy>=... is the first of its learning rates",
    "seed": "compare.seeds=... is the number of seeds",
}


@dataclass
class Policy:
    """A policy of the comparison: its tries by learning rate, in their order, and its runs by seed."""

    name: str
    tries: dict[float, Job] = field(default_factory=dict)
    lr: float | None = None
    runs: list[Job] = field(default_factory=list)

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
        self.policies = [Policy(name) for name in candidates.flops]
        jobs = [self.next_try(policy) for policy in self.policies]
        check_jobs(jobs, on_this_machine="slurm" not in self.config.hydra.launcher._target_.lower())
        self.ran, self.total = 0, len(self.policies) * (self.settings.tries + self.settings.seeds - 1)
        self.announce()
        with only_here(self.folder):
            write_text(OmegaConf.to_yaml(self.config), self.folder / "multirun.yaml")
            self.keep()
            status: Any = 0
            try:
                self.run_stages()
            except KeyboardInterrupt:
                status = INTERRUPTED
            except SystemExit as leaving:  # of a job in this process, at Ctrl-C
                status = leaving.code
            finally:
                self.keep()
            without = [policy.name for policy in self.policies if not is_finished(policy, self.settings.seeds)]
            untested = 0
            if not status:
                untested = self.test()
            if any(is_run(job.folder) for job in jobs):
                report_comparison(self.folder)
            if without or untested:
                say_how_to_resume(f"not done: {', '.join(without)}." if without else f"not tested: {untested} runs.")
            if status or without or untested:
                sys.exit(status or 1)

    def run_stages(self) -> None:
        self.run_jobs([job for policy in self.policies for job in policy.tries.values()])
        for _ in range(1, self.settings.tries):
            self.run_jobs([self.next_try(policy) for policy in self.policies])
        for policy in self.policies:
            policy.lr = best_try(policy.tried())
            if policy.lr is not None:
                more = [self.job(policy.name, policy.lr, seed) for seed in range(1, self.settings.seeds)]
                policy.runs = [policy.tries[policy.lr], *more]
        self.run_jobs([job for policy in self.policies for job in policy.runs[1:]])

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
                pruning = f"callbacks.pruning.reference={policy.tries[best].folder.name}"
                return Job((*job.overrides, pruning), job.cfg, job.folder)
        return job

    def test(self) -> int:
        """Test the runs at the chosen learning rates; returns how many cannot be tested."""
        runs = [record(job) for policy in self.policies for job in policy.runs]
        wanted = any(job.cfg.test for policy in self.policies for job in policy.runs)
        allow = sorted({target for policy in self.policies for job in policy.runs for target in targets(job.cfg)})
        return test_runs([run for run in runs if run.state == DONE], allow) if wanted else 0

    def candidates(self) -> Candidates:
        """The policies that are compared, the cheapest first.

        Raises:
            UserError: a policy that does not exist or does not apply, or fewer than two of them.
        """
        options = self.hydra_context.config_loader.get_group_options("freeze")
        named = self.settings.policies
        names = [name for name in options if name != NOT_A_POLICY] if named == "all" else list(named)
        for name in names:
            if name not in options:
                near = nearest_word(name, options)
                raise UserError(
                    f"compare.policies: {name} is not a policy{did_you_mean(near)}\nallowed: {', '.join(options)}"
                )
        if len(set(names)) < len(names):
            raise UserError(f"compare.policies={names} names a policy twice; name each once.")
        if len(names) < 2:
            raise UserError(
                f"compare.policies={names} leaves nothing to compare; name two or more of {', '.join(options)}, or "
                f"train the one: python train.py freeze={(names or ['full'])[0]}"
            )
        configs = {name: self.job(name, 1e-3, 0).cfg for name in names}
        first = configs[names[0]]
        check_types(first)
        check_budget(first)
        classes, self.images = self.read_data(first)
        for cfg in configs.values():
            settle(cfg)
            cfg.model.num_classes = classes
        found = bind_policies(configs, "cuda" if first.trainer.accelerator in ("gpu", "cuda") else "cpu")
        if named != "all" and found.left_out:
            name, reason = next(iter(found.left_out.items()))
            others = [each for each in names if each not in found.left_out]
            raise UserError(f"compare.policies: {name} does not apply to this backbone: {reason} Others: {others}")
        if len(found.flops) < 2:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in found.left_out.items())
            raise UserError(
                f"Only {', '.join(found.flops) or 'no policy'} applies to this backbone, so that there is "
                f"nothing to compare. {reasons}"
            )
        return found

    def read_data(self, cfg: DictConfig) -> tuple[int, int]:
        """The number of classes, and of images in an epoch."""
        from thaw.data.module import count_classes

        datamodule = build(cfg.data)
        classes = count_classes(cfg.model.num_classes, datamodule)
        images, limit = len(datamodule.load().train.labels), cfg.trainer.limit_train_batches
        if isinstance(limit, int):
            images = min(images, limit * cfg.data.batch_size)
        elif limit is not None:
            images = int(limit * images)
        return classes, images

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

    def announce(self) -> None:
        epochs = self.policies[0].tries[next(iter(self.policies[0].tries))].cfg.trainer.max_epochs
        for name, reason in self.left_out.items():
            say(f"left out: {name}: {reason}", "yellow")
        say(
            f"{len(self.policies)} policies with {plural(self.settings.tries, 'learning rate')} and "
            f"{plural(self.settings.seeds, 'seed')}: at most {self.total} jobs. Each sees the same images: {epochs} "
            f"epochs of {self.images:,}."
        )

    def keep(self) -> None:
        """Write what is known of the comparison so far."""
        policies = [self.facts(policy) for policy in self.policies]
        left_out = [{"policy": name, "reason": reason} for name, reason in self.left_out.items()]
        first = next(iter(self.policies[0].tries.values())).cfg
        budget = {"epochs": first.trainer.max_epochs, "images": self.images * first.trainer.max_epochs}
        budget |= {key: value for key, value in asdict(self.settings).items() if key in ("tries", "seeds", "minutes")}
        facts = {"policies": policies, "left_out": left_out, "budget": budget, "typed": self.typed}
        write_json(facts, self.folder / COMPARISON)

    def facts(self, policy: Policy) -> dict[str, Any]:
        tries = []
        for lr, job in policy.tries.items():
            run = record(job)
            tries.append({"lr": lr, "state": run.state, "val/acc": run.val_acc, "run": job.folder.name})
        at_edge = policy.lr is not None and is_at_edge(policy.lr, [*policy.tries])
        runs = [job.folder.name for job in policy.runs]
        return {"policy": policy.name, "lr": policy.lr, "at_edge": at_edge, "tries": tries, "runs": runs}


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """The settings of every job among those that were typed.

    Raises:
        UserError: a list of values, or a key that the comparison sets itself.
    """
    typed = [each for each in arguments if override_key(each).split(".")[0] not in NO_JOBS]
    for argument in typed:
        if instead := SET_HERE.get(override_key(argument)):
            raise UserError(f"{argument}: a comparison sets this itself; {instead}.")
    if is_launched():
        raise UserError(
            "compare.py starts the processes of its jobs itself: start it as `python compare.py ...`; "
            "hydra/launcher=queue or submitit_slurm runs several jobs at once."
        )
    return typed


def check_rates(settings: CompareSettings) -> None:
    problems = [
        line for key, value in settings.lr.items() for line in find_problem(f"compare.lr.{key}", value, Positive)
    ]
    if problems:
        raise UserError(f"{'. '.join(problems)}.")


def check_budget(cfg: DictConfig) -> None:
    epochs = cfg.trainer.max_epochs
    if not isinstance(epochs, int) or epochs < 1:
        raise UserError(
            f"trainer.max_epochs={epochs} is no equal budget; give a number of epochs: trainer.max_epochs=10"
        )


def record(job: Job) -> Run:
    """What the files of a job say."""
    return read_run(job.folder, []) if is_run(job.folder) else Run(job.folder, "waiting")


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
