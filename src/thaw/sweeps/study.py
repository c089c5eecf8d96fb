"""The study behind a search: its storage, its samplers, and the state of its trials.

All workers of a study share its folder. They ask for trials one at a time, and each holds a lock during its trial: the
next worker sees by the lock that a trial's worker has died, and resumes from the trial's last checkpoint. (Optuna's
heartbeat does that in `Study.optimize` alone, for SQL storages, and after a grace period.)
"""

import errno
import io
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from filelock import FileLock, Timeout
from hydra.errors import InstantiationException
from hydra.utils import get_class
from omegaconf import DictConfig
from optuna.distributions import CategoricalDistribution, distribution_to_json
from optuna.samplers import BaseSampler, CmaEsSampler, QMCSampler
from optuna.samplers import _cmaes as cmaes_pickle
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from thaw.run.config import build
from thaw.run.errors import UserError, UserFileError
from thaw.run.files import unwritten
from thaw.sweeps.space import OrderedGridSampler, Space, values_of

CONTINUES = "continues"  # attribute of a trial: the number of the trial that it repeats or continues
WORKER = "worker"  # attribute of a trial: the process that runs it; set once its lock is held
OPEN = (TrialState.RUNNING, TrialState.WAITING)
STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running or cut off",
    TrialState.WAITING: "to be retried",
}
STATE_OF_NUMPY = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")
STORAGE_SECONDS = 100.0  # to wait for other workers to let go of the storage


def silence_optuna() -> None:
    """Silence Optuna's logging: the search prints one line per trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", ".*already reported")  # a continued trial may repeat epochs


def open_storage(path: Path) -> BaseStorage:
    """SQLite for `*.db`, a journal for `*.journal`; created if it does not exist.

    Raises:
        UserError: another suffix, or a file that this version of Optuna cannot read.
    """
    if path.suffix not in (".db", ".journal"):
        raise UserError(f"sweep.storage={path} must end in .db, for SQLite, or .journal, for a journal.")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.suffix == ".journal":
            lock: Any = FileLock(path.with_suffix(".journal.flock"))  # free once its process dies; Optuna's: after 30 s
            return JournalStorage(JournalFileBackend(str(path), lock))
        return RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": STORAGE_SECONDS}})
    except Exception as error:  # of SQLAlchemy, alembic or json: a strange file may raise any
        reason = str(error).strip().partition("\n")[0]
        if "disk is full" in reason:
            raise unwritten(str(path), OSError(errno.ENOSPC, reason)) from error
        raise UserError(
            f"{path} cannot be read as a storage of Optuna ({reason}). Remove it, or choose another sweep.storage."
        ) from error


@contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Let the error of a storage on a full disk name its file; a trial that ran goes on with the next command."""
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # what SQLAlchemy and Optuna have wrapped
            cause = cause.__cause__
        raise UserFileError(f"{path} cannot be written ({cause}). Free some space, or choose another one.") from error


def open_study(path: Path, name: str, objectives: Mapping[str, str], identity: Mapping[str, str]) -> optuna.Study:
    """Create the study with the `identity` of `identify`, or load it from the storage.

    Raises:
        UserError: the storage cannot be read, or has a study of this name with another identity.
    """
    storage = open_storage(path)
    directions: Any = list(objectives.values())
    study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
    if not study.trials and not study.user_attrs:
        study.set_metric_names(list(objectives))
        for key, value in identity.items():
            study.set_user_attr(key, value)
    for key, value in identity.items():
        stored = study.user_attrs.get(key)
        if stored != value:
            raise UserError(
                f"{path} holds the study {name} of another search: its {key} is {stored}, but here it is {value}. "
                "Choose a name for this one with sweep.study=<name>, or remove the old one's folder."
            )
    return study


def identify(space: Space, objectives: Mapping[str, str], typed: str, key: str) -> dict[str, str]:
    """Settings that must stay the same when a study is continued. The number of trials and the sampler may change."""
    return {
        "space": json.dumps({name: json.loads(distribution_to_json(space[name])) for name in sorted(space)}),
        "objectives": json.dumps(objectives),
        "run": f"{typed or 'as configured'} (key {key})",
    }


def make_sampler(block: DictConfig, space: Space, drawn: int) -> BaseSampler:
    """The sampler for the next trial, new for each trial.

    Its seed is computed from the configured seed and the number of trials drawn before, so that workers draw different
    trials, and an interrupted study continues with the draws that it would have had. Grids and quasi-random sequences
    have one order for all trials.

    Raises:
        UserError: no such sampler, or one that cannot draw from this space.
    """
    try:
        kind = get_class(block._target_)
        assert issubclass(kind, BaseSampler)
    except Exception as error:  # Hydra raises ImportError, ValueError and its own
        known = ", ".join(name for name in optuna.samplers.__all__ if name.endswith("Sampler") and name[:4] != "Base")
        raise UserError(
            f"sweep.sampler._target_={block._target_} is not a sampler; choose sweep/sampler=tpe, cmaes, grid, random, "
            f"or one of optuna.samplers: {known}."
        ) from error
    settings: dict[str, Any] = {}
    if issubclass(kind, OrderedGridSampler):
        settings["search_space"] = {key: values_of(key, distribution) for key, distribution in space.items()}
    elif "seed" in block and block.seed is not None and not issubclass(kind, QMCSampler):
        settings["seed"] = int(np.random.SeedSequence([block.seed, drawn]).generate_state(1)[0])
    ranges = [key for key, one in space.items() if not isinstance(one, CategoricalDistribution)]
    if issubclass(kind, CmaEsSampler) and len(ranges) < 2:
        raise UserError(
            f"CMA-ES searches two or more numbers at once, but sweep.space has {len(ranges)} with low and high; choose "
            "sweep/sampler=tpe or random, or add a range."
        )
    if issubclass(kind, CmaEsSampler):
        cmaes_pickle.pickle = SimpleNamespace(dumps=pickle.dumps, loads=loads_cmaes)  # type: ignore[assignment]
    try:
        return build(block, **settings)
    except (InstantiationException, ImportError) as error:
        reason = str(error.__cause__ or error).strip()
        raise UserError(f"sweep.sampler cannot be built: {reason}. Compare it with configs/sweep/sampler.") from error


class StateUnpickler(pickle.Unpickler):
    """Reads the state of CMA-ES, which Optuna pickles into a study's storage, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        package = module.partition(".")[0]
        if (package == "cmaes" and name[:1].isupper()) or (package == "numpy" and name in STATE_OF_NUMPY):
            return super().find_class(module, name)
        raise UserError(f"A study's state of CMA-ES names {module}.{name}, which was not run; choose another study.")


def loads_cmaes(content: bytes) -> Any:
    return StateUnpickler(io.BytesIO(content)).load()


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """The trials of a study, each once: without trials that another one continues, or that never got parameters."""
    trials = study.get_trials(deepcopy=False)
    continued = {trial.user_attrs.get(CONTINUES) for trial in trials}
    return [
        trial
        for trial in trials
        if trial.number not in continued and not (trial.state == TrialState.FAIL and not trial.params)
    ]


def num_ended(study: optuna.Study) -> int:
    """How many trials of a study are done, pruned or failed."""
    return sum(trial.state not in OPEN for trial in counted(study))


def put_back(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial's parameters again, with the values reported so far: its run resumes from its checkpoint."""
    if trial.state == TrialState.RUNNING:
        study.tell(trial.number, state=TrialState.FAIL)
    if not trial.params:
        return
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={CONTINUES: trial.number},
            system_attrs=trial.system_attrs,
            intermediate_values=trial.intermediate_values,
        )
    )


def trial_lock(folder: Path, number: int) -> FileLock:
    """Held by the worker that runs a trial."""
    (folder / ".running").mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".running" / f"{number}.lock", timeout=0)


def is_abandoned(folder: Path, trial: FrozenTrial) -> bool:
    """Whether the worker of a running trial has died. The caller keeps others from asking for trials meanwhile."""
    if WORKER not in trial.user_attrs:
        return True
    lock = trial_lock(folder, trial.number)
    if not Path(lock.lock_file).exists():  # a worker on a machine that does not share this folder
        return False
    try:
        lock.acquire()
    except Timeout:
        return False
    lock.release()
    return True
