"""Jobs of a sweep as processes of their own, as many at once as there is room for.

submitit and joblib start all jobs at once, or a fixed number of them, and give none its own GPUs or cores.
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from thaw.run.config import plain, yaml_text
from thaw.run.console import plural, say
from thaw.run.errors import UserError
from thaw.run.files import write_text
from thaw.run.jobs import FAILURE, SUMMARY, read_state, record_failure, sigterm_interrupts
from thaw.run.ranks import CONFIG_NAME, PARENT, run_command
from thaw.run.values import Count, Positive
from thaw.sweeps import machine
from thaw.sweeps.grid import Job, compose_job, names_of
from thaw.sweeps.status import Status, outcome_of

OUTPUT = "output.log"  # the output of a job, in its folder
STOP_SECONDS = 30.0  # in which a job that is told to end may write its checkpoint
POLL_SECONDS = 0.2


@dataclass
class Running:
    job: Job
    name: str
    process: subprocess.Popen
    kind: machine.Kind
    units: list[str]  # GPUs or cores
    started: float
    failure: float | None  # when an earlier try wrote its failure.json
    late: bool = False  # told to end after its time limit

    @property
    def output(self) -> Path:
        return self.job.folder / OUTPUT

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class JobQueue(Launcher):
    """A launcher that gives every job a process, a share of the machine and a log file.

    A job runs its composed configuration from its own folder, without `-m`, and may have several processes.

    Args:
        gpus: `auto` or numbers, see `machine.free_gpus`.
        threads: of each process of a job that trains on the CPU.
        max_jobs: at once; None is as many as there is room for.
        minutes: after which a job is stopped; None is never.
    """

    config: DictConfig
    hydra_context: HydraContext

    def __init__(
        self, gpus: Literal["auto"] | list[int], threads: Count, max_jobs: Count | None, minutes: Positive | None
    ) -> None:
        self.gpus, self.threads, self.max_jobs, self.minutes = gpus, threads, max_jobs, minutes

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs in their order, each as soon as there is room; the result of each is in its folder."""
        waiting = [compose_job(self.hydra_context, self.config, overrides) for overrides in job_overrides]
        self.cores, self.devices = machine.free_cores(), machine.free_gpus(self.gpus)
        self.free: dict[machine.Kind, list[str]] = {"core": list(self.cores), "gpu": list(self.devices)}
        for job in waiting:
            kind, count = machine.needs(job.cfg.trainer, self.threads, len(self.cores))
            if count > len(self.free[kind]):
                raise UserError(
                    f"{' '.join(job.overrides)} needs {plural(count, 'GPU')}; free here: {len(self.free['gpu'])}; "
                    "lower trainer.devices, or name GPUs to share: hydra.launcher.gpus=[0,1]."
                )
        queue = list(zip(waiting, names_of(waiting), strict=True))
        running: list[Running] = []
        with Status(len(queue)) as status, sigterm_interrupts():
            try:
                while queue or running:
                    running = [job for job in running if not self.has_ended(job, status)]
                    self.start_what_fits(queue, running, status)
                    status.show(
                        [(job.name, job.kind, job.units, job.seconds, job.job.folder / OUTPUT) for job in running]
                    )
                    time.sleep(POLL_SECONDS)
            except BaseException:
                stop([job.process for job in running])
                raise
        return []

    def start_what_fits(self, queue: list[tuple[Job, str]], running: list[Running], status: Status) -> None:
        """Start waiting jobs in their order; jobs that wait for a GPU do not hold up those that train on the CPU."""
        full: set[machine.Kind] = set()
        for entry in list(queue):
            job, name = entry
            kind, count = machine.needs(job.cfg.trainer, self.threads, len(self.cores))
            if len(running) == self.max_jobs:
                return
            if kind in full or count > len(self.free[kind]):
                full.add(kind)
                continue
            queue.remove(entry)
            if (state := read_state(job.folder)) in ("done", "running"):
                status.ended(name, f"{state} in another process")
                continue
            units, self.free[kind] = self.free[kind][:count], self.free[kind][count:]
            before = failed_at(job.folder)
            process = self.start(job, kind, units)
            running.append(Running(job, name, process, kind, units, time.monotonic(), before))
            status.started(name, kind, units)

    def start(self, job: Job, kind: machine.Kind, units: list[str]) -> subprocess.Popen:
        job.folder.mkdir(parents=True, exist_ok=True)
        job.cfg.validate = job.cfg.test = False  # only the winner is tested, at the end
        write_text(yaml_text(plain(job.cfg)), job.folder / CONFIG_NAME)
        share = machine.environment(kind, units, len(self.cores), len(self.devices))
        with (job.folder / OUTPUT).open("ab") as output:
            process = subprocess.Popen(
                run_command(job.folder, "train"),
                env=os.environ | share | {PARENT: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the jobs
            )
        if kind == "core":
            machine.pin(process.pid, units)
        return process

    def has_ended(self, running: Running, status: Status) -> bool:
        """Whether a job is over; if so, free its share of the machine, record its end and print it."""
        code = running.process.poll()
        if code is None:
            over = running.seconds - 60 * self.minutes if self.minutes is not None else 0.0
            if over > 0 and not running.late:
                running.late = True
                running.process.terminate()
            elif over > STOP_SECONDS:
                kill(running.process)
            return False
        kill(running.process)  # and ranks that it may have left
        self.free[running.kind] += running.units
        folder = running.job.folder
        if not (folder / SUMMARY).is_file() and (running.late or failed_at(folder) == running.failure):
            late = "timeout", f"took more than {self.minutes} minutes"
            how, reason = late if running.late else explain_exit(code)
            record_failure(running.job.cfg, how, reason, tail(folder / OUTPUT), running.seconds)
        status.ended(running.name, outcome_of(folder), running.seconds)
        return True


def failed_at(folder: Path) -> float | None:
    """When the failure of a run was recorded; None if it was not."""
    return (folder / FAILURE).stat().st_mtime if (folder / FAILURE).is_file() else None


def explain_exit(code: int) -> tuple[str, str]:
    """Status and reason of a process that ended without a record, by its exit status."""
    number = -code if code < 0 else code - 128  # as shells and thaw.callbacks.preemption report a signal
    if number in set(signal.Signals):
        hint = "; perhaps memory ran out" if number == signal.SIGKILL else ""
        return "killed", f"ended by {signal.Signals(number).name}{hint}"
    return "failed", f"ended with exit status {code}; see {OUTPUT}"


def tail(output: Path) -> str:
    """The last lines of a job's output."""
    text = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
    return "\n".join(text.splitlines()[-30:])


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """End processes and their children; all together have `STOP_SECONDS` to write their checkpoints."""
    say(f"stopping {plural(len(processes), 'job')}, which may take {STOP_SECONDS:.0f} s: each saves a checkpoint")
    for process in processes:
        process.terminate()
    ends = time.monotonic() + STOP_SECONDS
    for process in processes:
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(max(0.0, ends - time.monotonic()))
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kill a process and its children, as far as they still run."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
