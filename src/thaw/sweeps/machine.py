"""GPUs and CPU cores of this machine: which are free, and how many a job needs."""

import csv
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from omegaconf import DictConfig

from thaw.run.errors import UserError
from thaw.run.ranks import num_processes

Kind = Literal["gpu", "core"]
FREE_MIB = 1000  # a GPU is free if less of its memory is in use; drivers and displays take a little


def free_gpus(wanted: str | Sequence[int]) -> list[str]:
    """The GPUs that jobs may use, as CUDA_VISIBLE_DEVICES names them.

    `wanted` is `auto` for those that no other program uses, or numbers among those that this process sees.

    Raises:
        UserError: a number that does not exist, or all are in use.
    """
    import torch

    found = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(found)))
    names = visible.split(",")[:found]
    if wanted != "auto":
        if wrong := [number for number in wanted if number not in range(found)]:
            raise UserError(
                f"hydra.launcher.gpus={list(wanted)}: {wrong[0]} is not one of the {found} GPUs seen here; "
                "give numbers from 0, or auto."
            )
        return [names[int(number)] for number in wanted]
    used = used_mib() if found else {}
    free = [name for name in names if used.get(name, 0) < FREE_MIB]
    if found and not free:
        raise UserError(
            f"Other programs use all {found} GPUs seen here; wait, or name those to share: hydra.launcher.gpus=[0]."
        )
    return free


def used_mib() -> Mapping[str, float]:
    """Memory in use on each GPU, in MiB, by its number and by its UUID; empty where nvidia-smi is missing.

    torch.cuda.mem_get_info tells it too, but takes memory on every GPU for as long as this process lives.
    """
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [[field.strip() for field in row] for row in csv.reader(answer.splitlines())]
    return {
        name: float(used) for index, uuid, used in rows for name in (index, uuid) if used.replace(".", "").isdigit()
    }


def free_cores() -> list[str]:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return [str(core) for core in sorted(os.sched_getaffinity(0))]
    return [str(core) for core in range(os.cpu_count() or 1)]


def needs(trainer: DictConfig, threads: int, cores: int) -> tuple[Kind, int]:
    """The number of GPUs that a job takes while it runs, or of CPU cores, of which it takes all at most."""
    import torch

    processes = num_processes(trainer)
    if trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and torch.cuda.is_available()):
        return "gpu", processes
    return "core", min(processes * threads, cores)


def environment(kind: Kind, units: Sequence[str], cores: int, gpus: int) -> dict[str, Any]:
    """The environment variables that keep a job to its share of the machine."""
    if kind == "gpu":
        return {"CUDA_VISIBLE_DEVICES": ",".join(units), "OMP_NUM_THREADS": str(max(1, cores * len(units) // gpus))}
    return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(len(units))}


def pin(pid: int, cores: Sequence[str]) -> None:
    """Let a new process and its children run on these cores only, where the system supports it."""
    if hasattr(os, "sched_setaffinity"):
        with suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(pid, map(int, cores))
