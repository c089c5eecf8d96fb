"""Where runs and sweeps lie. A sweep's folder is named by its command and a job's by its configuration, so that the
same command finds what it left behind.
"""

import hashlib
import json
import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thaw.run.targets import targets

# What changes nothing in the trained weights: where they lie, what is measured afterwards, who is told.
NOT_THE_RUN = (
    *("run_dir", "overrides", "allow", "resume", "validate", "test", "logger", "cache.dir", "cache.max_gb", "data.dir"),
    *("trainer.enable_progress_bar", "trainer.log_every_n_steps", "trainer.profiler"),
    *(f"callbacks.{name}" for name in ("progress", "sample_grid", "lr_monitor", "log_interval", "preemption")),
)


def register_resolvers() -> None:
    """Make `${job_key:}`, `${sweep_key:}`, `${run_name:}` and `${run_id:}` known to configurations."""
    OmegaConf.register_new_resolver("job_key", job_key, replace=True)
    OmegaConf.register_new_resolver("sweep_key", sweep_key, replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("run_id", run_id, replace=True, use_cache=True)


def job_key(_root_: DictConfig) -> str:
    """Ten hexadecimal digits of a hash of the resolved configuration: equal keys train equal weights."""
    config = OmegaConf.create({key: _root_._get_node(key) for key in _root_ if key != "hydra"})
    for key in NOT_THE_RUN:  # emptied, not removed: others refer to them
        parent, _, name = key.rpartition(".")
        block = OmegaConf.select(config, parent) if parent else config
        if block is not None and name in block:
            block[name] = None
    return digest(OmegaConf.to_container(config, resolve=True))


def sweep_key(_root_: DictConfig) -> str:
    """Name of the experiment and a hash of what was typed after `train.py -m`, in any order."""
    return f"{_root_.name}_{digest(sorted(_root_.hydra.overrides.task))}"


def run_name(_root_: DictConfig) -> str:
    """`name`, or where `resume` goes on with another run and no name is typed, the name of that run."""
    typed = {override.split("=")[0] for override in _root_.hydra.overrides.task}
    if _root_.resume and "name" not in typed:
        from thaw.run.resume import find_saved

        runs = Path("logs", "runs") / (_root_.name if "experiment" in typed else "")
        with suppress(ValueError):  # said by the program itself
            saved = find_saved(_root_.resume, runs, [*_root_.allow, *targets(_root_)])[0]
            return Path(saved.name).name or _root_.name  # a name from a file leads to no other folder
    return _root_.name


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def run_id(key: str) -> str:
    """The same in all processes of a run, and another for each run; a run that a cluster starts again keeps its own.

    The time, to the microsecond. Under SLURM the job's number and `key`, the run's `job_key`: a requeued job finds the
    folder that it left. Under torchrun the time of rank 0, which the others ask for in torchrun's store.
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
