"""The processes of one run: rank 0 starts the others with exactly the configuration that it composed itself.

Lightning's own launcher repeats the command line instead, and under `-m` each child would then run the whole sweep.
"""

import ctypes
import faulthandler
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thaw.run.command_line import quoted, setting
from thaw.run.config import yaml_text
from thaw.run.errors import LostProcessError, UserError
from thaw.run.files import write_text

CONFIG_NAME = "config.yaml"  # in the run's folder; what the other ranks run
RANK_GRACE = 20.0  # seconds that ranks get to end by themselves once one has failed
NOTICE_SECONDS = 5.0  # in which other ranks end that have noticed the same
STACK_SECONDS = 1.0  # in which a rank that hangs prints its stack
INTERRUPT = signal.SIGVTALRM  # shows where a rank hangs, and ends rank 0
PR_SET_PDEATHSIG = 1  # of prctl
PARENT = "THAW_PARENT"  # in the environment of a rank or of a queued job: id of the process that started it
# What a run of several processes changes in the environment; SLURM_NTASKS would tell Lightning that srun started it.
RANK_VARIABLES = (
    *("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMP_NUM_THREADS", "SLURM_NTASKS"),
)
# Variables by which a launcher tells a process its place. Lightning looks at each of them on its own.
PLACE = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
SLURM_PLACE = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS")


def is_launched() -> bool:
    """Whether rank 0, torchrun or srun started this process as one of several ranks.

    A batch script has SLURM_PROCID and SLURM_NTASKS too, but is not a step of its job: processes that it starts itself
    are alone.
    """
    tasks = int(os.environ.get("SLURM_NTASKS", 1)) if "SLURM_STEP_ID" in os.environ else 1
    return "LOCAL_RANK" in os.environ or ("SLURM_PROCID" in os.environ and tasks > 1)


def drop_stray_ranks() -> None:
    """Remove variables that would make this process a rank of a run that nothing started, and say so.

    Shells in containers and on clusters inherit such variables from jobs. torchrun and rank 0 set several at once.
    """
    stray = [name for name in PLACE if name in os.environ]
    if {"LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() or is_child():
        stray = []
    if not {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS"} <= os.environ.keys():
        stray += [name for name in SLURM_PLACE if name in os.environ]
    if stray:
        shown = " ".join(f"{name}={os.environ.pop(name)}" for name in stray)
        print(f"warning: {shown} in the environment is ignored: no launcher started this process.", file=sys.stderr)


def is_child() -> bool:
    """Whether rank 0 of this run started this process; its configuration is then decided already."""
    return PARENT in os.environ and "LOCAL_RANK" in os.environ


def num_processes(trainer: DictConfig) -> int:
    """How many processes on this machine the trainer's `devices` mean."""
    devices = trainer.devices
    if OmegaConf.is_list(devices):
        return len(devices)
    if devices in ("auto", -1, "-1"):
        import torch

        return max(1, torch.cuda.device_count()) if trainer.accelerator in ("gpu", "cuda", "auto") else 1
    return len(devices.split(",")) if isinstance(devices, str) and "," in devices else int(devices)


@contextmanager
def ranks(cfg: DictConfig, config: dict) -> Iterator[Callable[[], None]]:
    """Run the body as rank 0 of as many processes as `cfg.trainer` asks for; the others run `config`, its plain values.

    One process needs nothing, and ranks that torchrun or srun started are left alone. Afterwards the environment, the
    number of threads and the process group are as before, so that the next job of a sweep starts clean.

    Yields a function that every process calls when it is ready to train: rank 0 waits there for the others. (If it
    waited inside torch, it could not end when one of them has failed.)

    Raises:
        UserError: another process has failed, or hangs; it names the rank.
    """
    count = num_processes(cfg.trainer)
    others = OtherRanks(Path(cfg.run_dir), count, cfg.rank_timeout, [])
    check_world(count, cfg.trainer.get("num_nodes", 1))
    if is_launched() or (count == 1 and int(os.environ.get("SLURM_NTASKS", 1)) == 1):
        with others.noticed():
            yield others.ready_file(os.environ["LOCAL_RANK"]).touch if is_child() else lambda: None
        return
    import torch
    import torch.distributed

    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    threads = torch.get_num_threads()
    try:
        os.environ.pop("SLURM_NTASKS", None)
        if count > 1:
            others.forget_ready()  # of a run that was killed in this folder
            others.children += start_ranks(count, others.run_dir, config)
        with others.watched(), others.noticed():
            yield others.wait_until_ready
        others.wait_for_end()
    finally:
        others.kill()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.set_num_threads(threads)
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


@dataclass
class OtherRanks:
    """The other processes of a run, and how this one notices that one of them has failed or hangs.

    Args:
        count: of all processes on this machine, this one among them.
        seconds: for which one rank waits for another.
        children: of rank 0, which has started them; otherwise empty.
    """

    run_dir: Path
    count: int
    seconds: float
    children: list[subprocess.Popen]

    def numbered(self) -> Iterable[tuple[int, subprocess.Popen]]:
        return enumerate(self.children, start=1)

    def ready_file(self, rank: int | str) -> Path:
        """What a child writes when it is ready to train."""
        return self.run_dir / f".rank{rank}.ready"

    def wait_until_ready(self) -> None:
        until = time.monotonic() + self.seconds
        while not all(self.ready_file(rank).exists() for rank, _ in self.numbered()):
            if self.failed() or time.monotonic() > until:
                raise self.lost(late=not self.failed())
            time.sleep(0.05)
        self.forget_ready()

    def forget_ready(self) -> None:
        for rank in range(1, self.count):
            self.ready_file(rank).unlink(missing_ok=True)

    def wait_for_end(self) -> None:
        for rank, child in self.numbered():
            try:
                if status := child.wait(RANK_GRACE):
                    print(f"warning: rank {rank} {how_ended(status)} after the last step.", file=sys.stderr)
            except subprocess.TimeoutExpired:
                print(f"warning: rank {rank} did not end with rank 0; ending it.", file=sys.stderr)

    def kill(self) -> None:
        """End the children at once, so that they print no error about the end of rank 0."""
        for child in self.children:
            child.kill()
            with suppress(subprocess.TimeoutExpired):
                child.wait(RANK_GRACE)
        if self.children:
            self.forget_ready()

    def failed(self) -> tuple[int, int] | None:
        """Rank and exit status of a failed child; by a signal rather than by an error, which may follow from that."""
        failed = [(rank, status) for rank, child in self.numbered() if (status := child.poll())]
        return min(failed, key=lambda each: each[1]) if failed else None

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Replace torch's error about another process by one that names it."""
        import torch.distributed

        try:
            yield
        except RuntimeError as error:
            if worker := re.search(r"DataLoader worker \(.*(killed by signal: \w+|exited unexpectedly)", str(error)):
                raise LostProcessError(
                    f"One of the processes of data.num_workers was lost ({worker[1]}). Perhaps memory ran out: lower "
                    f"data.num_workers. {self.way_on()}"
                ) from error
            if "EADDRINUSE" in str(error):
                port = os.environ.get("MASTER_PORT")
                raise UserError(f"MASTER_PORT={port} is taken by another program; start the run again.") from error
            if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
                raise
            raise self.lost("timed out" in str(error).lower()) from error

    def lost(self, late: bool) -> UserError:
        """The error about a rank that has failed, or that hangs if this one has waited too long."""
        rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
        unknown = LostProcessError(f"Rank {rank} has lost the connection to another rank, whose own error says why.")
        if not self.children:
            if not late:
                return unknown
            other = "rank 0" if (self.count, rank) == (2, "1") else "another rank"
            return LostProcessError(
                f"Rank {rank} has waited {self.seconds:g} s for {other}, which hangs. If it is slow instead, raise "
                "rank_timeout."
            )
        until = time.monotonic() + NOTICE_SECONDS  # of ranks that have waited, too, or are just ending
        while not (failed := self.failed()) and time.monotonic() < until:
            time.sleep(0.05)
        hanging = [(number, child.pid) for number, child in self.numbered() if child.poll() is None]
        if not (late and hanging):
            gone = failed or next(((number, 0) for number, child in self.numbered() if child.poll() == 0), None)
            return self.explain(*gone) if gone else unknown
        for _, pid in hanging:
            with suppress(ProcessLookupError):
                os.kill(pid, INTERRUPT)  # prints its stack
        time.sleep(STACK_SECONDS)
        ranks = ", ".join(str(number) for number, _ in hanging)
        return LostProcessError(
            f"Rank {ranks} hangs: rank 0 has waited {self.seconds:g} s. The stack "
            f"above shows where, unless it was stopped. If it is slow instead, raise rank_timeout. {self.way_on()}"
        )

    def explain(self, rank: int, status: int) -> UserError:
        """The error of a run that has lost a rank by the rank's own error, or by a signal."""
        if status > 0:
            return UserError(f"Rank {rank} {how_ended(status)}; its own error is above.")
        memory = " Perhaps memory ran out: lower data.batch_size or data.num_workers." if status == -SIGKILL else ""
        return LostProcessError(f"Rank {rank} {how_ended(status)}.{memory} {self.way_on()}")

    def way_on(self) -> str:
        folder = setting("resume", os.path.relpath(self.run_dir))
        return f"To continue from the last checkpoint: python train.py {folder}"

    @contextmanager
    def watched(self) -> Iterator[None]:
        """End the body with an error, or else the program, if a rank has failed and rank 0 does not notice it."""

        def end(number: int, frame: FrameType | None) -> None:
            if failed := self.failed():
                faulthandler.dump_traceback(all_threads=False)
                raise LostProcessError(f"Rank 0 hangs where its stack above says. {self.explain(*failed)}")

        is_main, ended = threading.current_thread() is threading.main_thread(), threading.Event()
        before = signal.signal(INTERRUPT, end) if is_main else None
        threading.Thread(target=self.watch, args=(ended,), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            if is_main:
                signal.signal(INTERRUPT, before)

    def watch(self, ended: threading.Event) -> None:
        while not ended.wait(0.5):
            if not (failed := self.failed()) or ended.wait(RANK_GRACE):
                continue
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, INTERRUPT)
            if not ended.wait(RANK_GRACE):
                print(f"error: Rank 0 hangs. {self.explain(*failed)}", file=sys.stderr)
                self.kill()
                os._exit(1)


def how_ended(status: int) -> str:
    """`ended with exit status 1`, or `was ended by SIGKILL`."""
    if -status in set(signal.Signals):
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"


def from_all_ranks(value: Any) -> list[Any]:
    """The values that the ranks give, in their order; every rank calls it."""
    import torch.distributed

    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def check_world(count: int, nodes: int) -> None:
    """Refuse other numbers of processes than were started: they would wait for each other, or each train alone."""
    if not is_launched():
        if nodes > 1:
            raise UserError(
                f"trainer.num_nodes={nodes} needs a process for each device on {nodes} machines: start them with srun "
                "(docs/slurm.sh) or torchrun, or set it to 1."
            )
        return
    started = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or count * nodes)
    if started != count * nodes:
        raise UserError(
            f"A launcher started {started} process(es), but trainer.devices={count} and trainer.num_nodes={nodes} ask "
            f"for {count * nodes}. Set trainer.devices to the number on each machine, with trainer.strategy=ddp for "
            "several, or start train.py without a launcher."
        )


def start_ranks(count: int, run_dir: Path, config: dict) -> list[subprocess.Popen]:
    """Make this process rank 0 of `count`, and start the others."""
    import torch
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(yaml_text(config), run_dir / CONFIG_NAME)
    share = max(1, torch.get_num_threads() // count)  # ranks that each use all cores slow each other down many times
    torch.set_num_threads(share)
    os.environ |= {"NODE_RANK": "0", "WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(share)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    children = [start_rank(rank, run_dir) for rank in range(1, count)]
    os.environ["LOCAL_RANK"] = "0"
    return children


def start_rank(rank: int, run_dir: Path) -> subprocess.Popen:
    """Start this program again as another rank of the run in `run_dir`."""
    environment = {**os.environ, "LOCAL_RANK": str(rank), PARENT: str(os.getpid())}
    return subprocess.Popen(run_command(run_dir, f"rank{rank}"), env=environment, stdin=subprocess.DEVNULL)


def run_command(run_dir: Path, job_name: str) -> list[str]:
    """The command that trains what `config.yaml` in the absolute `run_dir` says; `job_name` names the log file."""
    program = Path(sys.argv[0]).resolve()
    if program.name in ("sweep.py", "compare.py"):  # whose jobs are runs of train.py
        program = program.with_name("train.py")
    return [
        *(sys.executable, str(program), "--config-path", str(run_dir), "--config-name", CONFIG_NAME),
        *(f"hydra.run.dir={quoted(run_dir)}", "hydra.output_subdir=null", f"hydra.job.name={job_name}"),
    ]


def end_with_parent() -> None:
    """Let a rank or a queued job end when the process that started it has: it may be killed, and could end nothing."""
    if PARENT not in os.environ:
        return
    faulthandler.register(INTERRUPT, all_threads=False)  # prints where this process hangs
    if sys.platform == "linux":  # also while this process is stopped, or hangs outside Python
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=end_with, args=(int(os.environ[PARENT]),), daemon=True).start()


def end_with(parent: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
