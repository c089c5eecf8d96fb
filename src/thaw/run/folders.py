"""Names of the folders of runs and sweeps.

A sweep's folder is named by its command and a job's by its configuration, so that the same command finds the results of
an earlier call.
"""

import hashlib
import json
import os
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from thaw.run.command_line import override_key
from thaw.run.errors import UserError
from thaw.run.targets import targets

LOCK = "job.lock"  # held by the process that works in a run's folder

# Settings that change nothing in the trained weights: folders, measurements afterwards, messages.
NOT_THE_RUN = (
    *("run_dir", "overrides", "allow", "resume", "validate", "test", "logger", "cache.dir", "cache.max_gb", "data.dir"),
    *("data.mirrors", "data.download"),
    *("rank_timeout", "trainer.enable_progress_bar", "trainer.log_every_n_steps", "trainer.profiler"),
    *(f"callbacks.{name}" for name in ("progress", "sample_grid", "lr_monitor", "log_interval", "preemption")),
    "callbacks.pruning",
)
NO_JOBS = ("hydra", "compare")  # blocks of a root configuration that no job of it has


def is_locked(run_dir: Path) -> bool:
    """Whether a process works in a run's folder; False if this user may not ask."""
    try:
        if (run_dir / LOCK).is_file():
            with FileLock(run_dir / LOCK, timeout=0):
                pass
    except Timeout:
        return True
    except OSError:
        pass
    return False


def register_resolvers() -> None:
    """Make `${job_key:}`, `${sweep_key:}`, `${run_name:}` and `${run_id:}` known to configurations."""
    for resolver in (job_key, sweep_key, run_name):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
    OmegaConf.register_new_resolver("run_id", run_id, replace=True, use_cache=True)


def job_key(_root_: DictConfig) -> str:
    """Ten hexadecimal digits of a hash of the resolved configuration: equal keys train equal weights."""
    config = OmegaConf.create({key: _root_._get_node(key) for key in _root_ if key not in NO_JOBS})
    for key in NOT_THE_RUN:  # emptied, not removed: others refer to them
        parent, _, name = key.rpartition(".")
        block = OmegaConf.select(config, parent) if parent else config
        if block is not None and name in block:
            block[name] = None
    return short_hash(OmegaConf.to_container(config, resolve=True))


def sweep_key(_root_: DictConfig) -> str:
    """Name of the experiment and a hash of the overrides after `train.py -m`, in any order.

    Those of `compare` do not count, so that a comparison with more policies or seeds finds the jobs that are done.
    """
    typed = [each for each in _root_.hydra.overrides.task if override_key(each).split(".")[0] not in NO_JOBS]
    return f"{_root_.name}_{short_hash(sorted(typed))}"


def run_name(_root_: DictConfig) -> str:
    """`name`; where `resume` continues another run and no name is typed, the name of that run."""
    typed = {override_key(override) for override in _root_.hydra.overrides.task}
    if _root_.resume and "name" not in typed:
        from thaw.run.checkpoint import understood
        from thaw.run.resume import find_saved

        experiment = _root_.name if "experiment" in typed else ""
        with suppress(UserError), understood(Path(_root_.resume), "unknown"):  # the program itself reports it
            saved = find_saved(_root_.resume, experiment, [*_root_.allow, *targets(_root_)])[0]
            name = Path(str(saved.name)).name  # from a file, leads to no other folder
            return name if re.fullmatch(r"(?!\.)[^\x00-\x1f\x7f\\]+", name) else _root_.name
    return _root_.name


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def run_id(key: str) -> str:
    """An id that is the same in all processes of a run, and another for each run.

    It is the time, to the microsecond. Under torchrun it is the time of rank 0, which the others read from torchrun's
    store. Under SLURM it is the job's number with `key`, the run's `job_key`, so that a requeued job finds its folder.
    """
    if "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return f"slurm_{os.environ['SLURM_JOB_ID']}_{key}"
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return now
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if os.environ["RANK"] == "0" and not store.check(["thaw/run_id"]):
        store.set("thaw/run_id", now)
    return store.get("thaw/run_id").decode()  # waits for rank 0
