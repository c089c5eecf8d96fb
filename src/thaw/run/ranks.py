"""The processes of one run: rank 0 starts the others with exactly the configuration that it composed itself.

Lightning's own launcher repeats the command line instead, and under `-m` each child would then run the whole sweep.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thaw.run.command_line import quoted
from thaw.run.errors import UserError
from thaw.run.files import write_text

CONFIG_NAME = "config.yaml"  # in the run's folder; what the other ranks run
RANK_GRACE = 20.0  # seconds that ranks get to end by themselves once one has failed
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
def ranks(cfg: DictConfig, config: dict) -> Iterator[None]:
    """Run the body as rank 0 of as many processes as `cfg.trainer` asks for; the others run `config`, its plain values.

    One process needs nothing, and ranks that torchrun or srun started are left alone. Afterwards the environment, the
    number of threads and the process group are as before, so that the next job of a sweep starts clean.
    """
    count = num_processes(cfg.trainer)
    if PARENT in os.environ:
        threading.Thread(target=end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    check_world(count, cfg.trainer.get("num_nodes", 1))
    if is_launched() or (count == 1 and int(os.environ.get("SLURM_NTASKS", 1)) == 1):
        yield
        return
    import torch
    import torch.distributed

    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    threads = torch.get_num_threads()
    ended = threading.Event()
    children: list[subprocess.Popen] = []
    try:
        os.environ.pop("SLURM_NTASKS", None)
        if count > 1:
            children += start_ranks(count, Path(cfg.run_dir), config)
            threading.Thread(target=watch, args=(children, ended), daemon=True).start()
        yield
        for rank, child in enumerate(children, start=1):
            try:
                child.wait(RANK_GRACE)
            except subprocess.TimeoutExpired:
                print(f"warning: rank {rank} did not end with rank 0; ending it.", file=sys.stderr)
    finally:
        ended.set()
        for child in children:
            child.kill()  # at once, so that it prints no error about its end
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.set_num_threads(threads)
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


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
    write_text(OmegaConf.to_yaml(config), run_dir / CONFIG_NAME)
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


def end_with(parent: int) -> None:
    """End this process when its parent has ended, which may have been killed and could end nothing itself."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def watch(children: list[subprocess.Popen], ended: threading.Event) -> None:
    """End the program if a rank has failed and rank 0 keeps waiting for it."""
    while not ended.wait(1.0):
        failed = [rank for rank, child in enumerate(children, start=1) if child.poll()]
        if failed and not ended.wait(RANK_GRACE):
            print(f"error: rank {failed[0]} ended with an error (see above); ending the run.", file=sys.stderr)
            for child in children:
                child.terminate()
            time.sleep(1)
            os._exit(1)
