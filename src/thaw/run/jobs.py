"""One run in its folder: skipped when it is done, continued when it was cut off, recorded when it fails."""

import logging
import os
import platform
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1, SIGUSR2
from typing import Any, Literal

from filelock import FileLock, Timeout
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from thaw.run.command import explain, show
from thaw.run.command_line import setting
from thaw.run.config import plain, yaml_text
from thaw.run.console import brief, lenient, say
from thaw.run.errors import LostProcessError, RunPrunedError, UserError, is_interruption
from thaw.run.files import read_json, write_errors, write_json, write_text
from thaw.run.folders import LOCK, is_locked, job_key
from thaw.run.targets import targets

log = logging.getLogger(__name__)

State = Literal["new", "running", "cut off", "failed", "done"]

JOB = "job.json"  # whose folder this is
SUMMARY = "summary.json"  # of a run that came to its end
FAILURE = "failure.json"  # of one that did not
LAST_CHECKPOINT = "checkpoints/last.ckpt"


def run_job(cfg: DictConfig, train: Callable[[DictConfig], float | None]) -> float | None:
    """Train in `cfg.run_dir` if that is not done; returns the best validation accuracy, as `train` does.

    In a sweep a failure ends this job only.

    Raises:
        UserError: the folder belongs to another configuration, or another process works there.
    """
    if not is_sweep_job():
        return run_in_folder(cfg, train)
    cfg.validate = cfg.test = False  # the winner alone is measured, at the end
    try:
        with lenient(), in_one_line(cfg):  # submitit starts a job without the script around it
            return run_in_folder(cfg, train)
    except RunPrunedError as behind:
        say(f"  pruned: {behind}  in {Path(cfg.run_dir).name}")
        return None
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and "SUBMITIT_EXECUTOR" in os.environ:
            raise  # which has put the job back into the queue
        say(show(error), "red", stderr=True)
        return None


def run_in_folder(cfg: DictConfig, train: Callable[[DictConfig], float | None]) -> float | None:
    """`run_job` that raises every error."""
    run_dir = Path(cfg.run_dir)
    with claimed(run_dir, job_key(cfg)):
        if has_summary(run_dir):
            val_acc = read_json(run_dir / SUMMARY)["val/acc"]
            log.info("%s is done already, with a validation accuracy of %s.", os.path.relpath(run_dir), val_acc)
            return val_acc
        with recorded(cfg), interruptible(run_dir):
            go_on(cfg)
            return train(cfg)


@contextmanager
def in_one_line(cfg: DictConfig) -> Iterator[None]:
    """Print only how a job of a sweep ended, where others run in the same process; its log file holds the rest."""
    if "SUBMITIT_EXECUTOR" in os.environ or not is_first_rank():
        yield
        return
    with brief():
        yield
    facts = read_json(Path(cfg.run_dir) / SUMMARY)
    result = "done" if facts["val/acc"] is None else f"val/acc {facts['val/acc']:.2%}"
    say(f"  {result}  {facts['seconds']:.1f} s  in {Path(cfg.run_dir).name}")


def read_state(run_dir: Path) -> State:
    """The state of the run in a folder."""
    if has_summary(run_dir):
        return "done"
    if is_locked(run_dir):
        return "running"
    if (run_dir / FAILURE).is_file():
        return "failed"
    return "cut off" if (run_dir / LAST_CHECKPOINT).is_file() else "new"


def has_summary(run_dir: Path) -> bool:
    """Whether a run came to its end and its summary can be read."""
    try:
        return "val/acc" in read_json(run_dir / SUMMARY)
    except (UserError, OSError):
        return False


def go_on(cfg: DictConfig) -> None:
    """Let a run that was cut off continue from its last checkpoint, in the same folder and the same W&B run.

    A run that failed with an exception restarts from scratch: its state may be wrong. A run that could not write a file
    continues: its last checkpoint is whole.
    """
    from thaw.run.checkpoint import continue_logged, read_checkpoint

    run_dir = Path(cfg.run_dir)
    failed = (run_dir / FAILURE).is_file() and read_json(run_dir / FAILURE).get("status") == "failed"
    if failed or not (run_dir / LAST_CHECKPOINT).is_file():
        return
    try:
        last = read_checkpoint(run_dir / LAST_CHECKPOINT, targets(cfg))
    except UserError as error:
        log.warning("%s Starting from scratch.", error)
        return
    log.info("%s was cut off; resuming from its last checkpoint.", os.path.relpath(run_dir))
    cfg.resume = str(run_dir / LAST_CHECKPOINT)
    if "chosen" in cfg.freeze:  # by a measurement, which is not repeated
        cfg.freeze.chosen = last["config"]["freeze"]["chosen"]
    continue_logged(cfg, last)


def refuse_chdir(hydra: DictConfig | HydraConf) -> None:
    """Refuse Hydra's change of the working folder: relative paths are meant before it."""
    if hydra.job.chdir:
        raise UserError(
            "hydra.job.chdir=true is not supported: data.dir, cache.dir and logs are relative to the folder in which "
            "the command is typed. Leave it out; the run's own files go to its folder anyway."
        )


@contextmanager
def interruptible(run_dir: Path) -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C, and say how to resume the run unless the sweep around it does.

    Lightning would exit with status 1 and ignore Ctrl-C from then on. Afterwards signals have the handlers of before.
    """
    before = {number: signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGUSR1, SIGUSR2)}
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as leaving:
        if not is_interruption(leaving):
            raise
        restore_handlers(before)
        say_resume(run_dir)
        raise KeyboardInterrupt from None
    except OSError:  # such as a full disk
        if (run_dir / LAST_CHECKPOINT).is_file():
            say_resume(run_dir)
        raise
    finally:
        restore_handlers(before)


def restore_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():  # only that one may set handlers
        for number, handler in handlers.items():
            signal.signal(number, handler)


def say_resume(run_dir: Path) -> None:
    if is_first_rank() and not is_sweep_job():
        say(f"\nTo resume: python train.py {setting('resume', os.path.relpath(run_dir))}")


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, where jobs run in other processes, or Lightning's test would ignore it."""
    before = signal.signal(SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(SIGTERM, before)


@contextmanager
def claimed(run_dir: Path, key: str) -> Iterator[None]:
    """Keep other processes out of a run's folder; the first rank holds it for all ranks of its run."""
    if not is_first_rank():
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / LOCK, timeout=1)  # second: others may just be asking
    try:
        with write_errors(run_dir / LOCK):
            lock.acquire()
    except Timeout as error:
        raise UserError(f"{run_dir} is being written by another process; wait until it ends.") from error
    try:
        job = run_dir / JOB
        if job.is_file() and read_json(job).get("key") != key:
            raise UserError(
                f"{run_dir} holds a run of another configuration; choose another hydra.run.dir, or remove that folder."
            )
        write_json({"key": key, "pid": os.getpid(), "host": platform.node()}, job)
        yield
    finally:
        lock.release()


@contextmanager
def recorded(cfg: DictConfig) -> Iterator[None]:
    """Write the configuration at the start and `failure.json` at a failure, which goes once there is a summary."""
    if not is_first_rank():
        yield
        return
    run_dir, started = Path(cfg.run_dir), time.monotonic()
    write_text(yaml_text(plain(cfg)), run_dir / "config.yaml")
    try:
        yield
    except (Exception, SystemExit) as error:
        if not has_summary(run_dir):
            pruned = type(error).__name__ in ("RunPrunedError", "TrialPruned")  # Optuna's is there for sweep.py alone
            trace = "" if pruned else traceback.format_exc()
            status = "pruned" if pruned else "killed" if isinstance(error, OSError | LostProcessError) else "failed"
            reason = str(error) if pruned else explain(error)
            try:
                record_failure(cfg, status, reason, trace, time.monotonic() - started)
            except OSError as unwritten:  # the disk may be full, as perhaps the first error says
                log.warning("%s", unwritten)
        raise
    finally:
        if has_summary(run_dir):
            (run_dir / FAILURE).unlink(missing_ok=True)


def record_failure(cfg: DictConfig, status: str, reason: str, trace: str, seconds: float) -> None:
    """Say in `failure.json` why a run has no summary; `status` is failed, killed, timeout or pruned."""
    facts = {"status": status, "reason": reason, "traceback": trace, "name": cfg.name, "overrides": cfg.overrides}
    facts |= {"seed": cfg.seed, "seconds": round(seconds, 2), "run_dir": cfg.run_dir}
    write_json(facts, Path(cfg.run_dir) / FAILURE)


def is_sweep_job() -> bool:
    """Whether this process runs a job of `-m`."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def is_first_rank() -> bool:
    """Whether this process is rank 0 of its run, or its only process."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"
