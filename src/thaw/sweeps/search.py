"""Search with Optuna: trials are runs in folders of their own; several workers may share the study."""

import os
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from optuna.trial import FrozenTrial, Trial, TrialState
from optuna_integration import PyTorchLightningPruningCallback

from thaw.run.config import USER_ERRORS, explain
from thaw.run.files import read_json, write_text
from thaw.run.folders import job_key
from thaw.run.jobs import SUMMARY, run_in_folder
from thaw.run.targets import targets
from thaw.sweeps import study as studies
from thaw.sweeps.outcome import report_study
from thaw.sweeps.search_plan import ACCURACY, Plan, Train, prepare
from thaw.sweeps.space import Grid, shown


class Pruning(PyTorchLightningPruningCallback):
    """Optuna's, but for the first rank alone, where Optuna's would wait for the others to be asked as well.

    They know nothing of the trial; `thaw.run.ranks.ranks` ends them when the first one leaves.
    """

    def on_fit_start(self, *_: Any) -> None:
        pass


def search(cfg: DictConfig, overrides: Sequence[str], train: Train) -> None:
    """Work at a study until it has its trials; exits with status 1 if some have failed.

    Args:
        cfg: composed from `configs/sweep.yaml`.
        overrides: what was typed.
        train: as in `Plan`.

    Raises:
        ValueError: settings that could not work, before the first trial starts.
    """
    studies.quiet()
    plan = prepare(cfg, overrides, train)
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_text(OmegaConf.to_yaml(cfg), plan.folder / "multirun.yaml")
    with plan.asking:
        identity = studies.identify(plan.space, plan.objectives, plan.base.overrides, job_key(plan.base))
        study = studies.open_study(plan.storage, plan.name, plan.objectives, identity)
        study.pruner = plan.pruner
        for trial in studies.counted(study):
            if trial.state == TrialState.FAIL:
                studies.put_back(study, trial)
    say_state(plan, study)
    try:
        while (asked := next_trial(plan, study)) is not None:
            run_trial(plan, study, *asked)
    except BaseException:
        print("\nThe same command goes on from here.", file=sys.stderr, flush=True)
        raise
    failed = report_study(study, plan.folder, plan.storage, plan.objectives, cfg.test, targets(plan.base))
    if failed:
        print(f"{failed} trials have failed; the same command tries them again.", file=sys.stderr)
        sys.exit(1)


def say_state(plan: Plan, study: optuna.Study) -> None:
    trials = studies.counted(study)
    states = [studies.SAID[trial.state] for trial in trials]
    found = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"{plan.cfg.sweep.trials} trials in {os.path.relpath(plan.folder)}: {found or 'none yet'}", flush=True)


def next_trial(plan: Plan, study: optuna.Study) -> tuple[Trial, FileLock] | None:
    """A trial and the lock that this worker holds while it is at it; None once the study has all."""
    with plan.asking:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if studies.is_left(plan.folder, trial):
                studies.put_back(study, trial)
                Path(studies.lock_of(plan.folder, trial.number).lock_file).unlink(missing_ok=True)
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        drawn = len(studies.counted(study))
        study.sampler = plan.sampler(drawn)
        limit = plan.cfg.sweep.trials
        if isinstance(study.sampler, Grid):
            limit = min(limit, study.sampler.size)
        if not waiting and drawn >= limit:
            return None
        asked = study.ask(plan.space)
        lock = studies.lock_of(plan.folder, asked.number)
        lock.acquire()
        asked.set_user_attr(studies.WORKER, studies.worker())
    return asked, lock


def run_trial(plan: Plan, study: optuna.Study, trial: Trial, lock: FileLock) -> None:
    """Train and tell the study. What ends the program leaves the trial running, for the next worker to find."""
    started, told = time.monotonic(), ""
    try:
        values = evaluate(plan, trial)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except Exception as error:
        if not isinstance(error, USER_ERRORS):
            traceback.print_exc()
        told = explain(error)
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, values)
    finally:
        lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
    say(study.get_trials(deepcopy=False)[trial.number], plan, time.monotonic() - started, told)


def evaluate(plan: Plan, trial: Trial) -> list[float]:
    cfg = plan.compose(trial.params)
    run_dir = Path(cfg.run_dir)
    trial.set_user_attr("folder", run_dir.name)
    run_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(run_dir / "job.lock"):  # another worker may have drawn the same: then its result is waited for
        pass
    callbacks = [Pruning(trial, monitor="val/acc")] if plan.objectives == ACCURACY else []
    run_in_folder(cfg, partial(plan.train, callbacks=callbacks))
    summary = read_json(run_dir / SUMMARY)
    for key in ("trainable_params", "epochs", "seconds"):
        trial.set_user_attr(key, summary.get(key))
    values: dict[str, Any] = {metric: summary.get(metric) for metric in plan.objectives}
    for metric, value in values.items():
        if value is None:
            raise ValueError(f"{metric} was not measured by {run_dir}; choose other sweep.objectives.")
    return list(values.values())


def say(trial: FrozenTrial, plan: Plan, seconds: float, told: str) -> None:
    """A line about a trial."""
    measured = trial.values if trial.state == TrialState.COMPLETE else []
    values = " ".join(f"{metric}={value:.6g}" for metric, value in zip(plan.objectives, measured, strict=False))
    parts = [f"trial {trial.number}", studies.SAID[trial.state], values, shown(trial.params), f"{seconds:.1f} s", told]
    print("  ".join(part for part in parts if part), flush=True)
