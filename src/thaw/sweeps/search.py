"""Search with Optuna: trials are runs in folders of their own; several workers may share the study."""

import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from optuna.trial import Trial, TrialState
from optuna_integration import PyTorchLightningPruningCallback

from thaw.run.command import explain, show
from thaw.run.console import brief, plural, say
from thaw.run.errors import UserError
from thaw.run.files import read_json, write_text
from thaw.run.folders import job_key
from thaw.run.jobs import SUMMARY, run_in_folder
from thaw.run.targets import targets
from thaw.sweeps import study as studies
from thaw.sweeps.cells import about_left, format_measure, format_seconds
from thaw.sweeps.ending import measure_winners, report_runs, say_how_to_resume
from thaw.sweeps.grid import INTERRUPTED
from thaw.sweeps.runs import ACCURACY
from thaw.sweeps.search_plan import SearchPlan, Train, prepare
from thaw.sweeps.space import OrderedGridSampler, check_params, readable
from thaw.sweeps.study_pictures import draw_study


class Pruning(PyTorchLightningPruningCallback):
    """Optuna's callback for the first rank alone; Optuna's own waits for the other ranks to have one too.

    They do not know the trial; `thaw.run.ranks.ranks` ends them when the first one leaves.
    """

    def on_fit_start(self, *_: Any) -> None:
        pass


def search(cfg: DictConfig, overrides: Sequence[str], train: Train) -> None:
    """Run trials of `configs/sweep.yaml` until the study has all of them; exits with status 1 if some have failed.

    Raises:
        UserError: settings that cannot work, before the first trial starts.
    """
    studies.silence_optuna()
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
    states = [studies.STATES[trial.state] for trial in studies.counted(study)]
    found = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    say(f"{plural(cfg.sweep.trials, 'trial')} in {os.path.relpath(plan.folder)}: {found or 'none yet'}")
    started, before = time.monotonic(), studies.num_ended(study)
    try:
        while (asked := next_trial(plan, study)) is not None:
            ended = studies.num_ended(study)  # by all workers
            trials = [trial.number for trial in studies.counted(study)]
            total = number_of_trials(plan, study)
            left = about_left(started, ended - before, total - ended)
            place = f"trial {trials.index(asked[0].number) + 1} of {total}"
            say(f"\n{place}{left}: {readable(asked[0].params)}", "bold")
            run_trial(plan, study, *asked, place)
    except (KeyboardInterrupt, SystemExit) as leaving:
        ended, total = studies.num_ended(study), number_of_trials(plan, study)
        say_how_to_resume(f"interrupted, not done: {total - ended} of {plural(total, 'trial')}.")
        sys.exit(INTERRUPTED if isinstance(leaving, KeyboardInterrupt) else leaving.code)
    if failed := report_study(plan, study):
        say_how_to_resume(f"{plural(failed, 'trial')} failed.")
        sys.exit(1)


def number_of_trials(plan: SearchPlan, study: optuna.Study) -> int:
    """How many trials the study has in the end: a grid may have fewer values."""
    sampler, trials = study.sampler, plan.cfg.sweep.trials
    return min(trials, sampler.size) if isinstance(sampler, OrderedGridSampler) else trials


def next_trial(plan: SearchPlan, study: optuna.Study) -> tuple[Trial, FileLock] | None:
    """A trial, and the lock that this worker holds during it; None once the study has all trials.

    Counting under a lock, rather than with Optuna's MaxTrialsCallback, which counts when a trial has ended: several
    workers would draw too many, a finished study would get one more, and a continued trial would count twice.
    """
    with plan.asking:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if studies.is_abandoned(plan.folder, trial):
                studies.put_back(study, trial)
                Path(studies.trial_lock(plan.folder, trial.number).lock_file).unlink(missing_ok=True)
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        drawn = len(studies.counted(study))
        study.sampler = studies.make_sampler(plan.cfg.sweep.sampler, plan.space, drawn)
        if not waiting and drawn >= number_of_trials(plan, study):
            return None
        asked = study.ask(plan.space)
        lock = studies.trial_lock(plan.folder, asked.number)
        lock.acquire()
        asked.set_user_attr(studies.WORKER, f"{platform.node()}:{os.getpid()}")
    return asked, lock


def run_trial(plan: SearchPlan, study: optuna.Study, trial: Trial, lock: FileLock, place: str) -> None:
    """Train, tell the study the result, and print a line about it, with the trial's `place`.

    If the program is ended meanwhile, the trial stays in the state running, in which the next worker finds it.
    """
    started, reason, values = time.monotonic(), "", ""
    try:
        measured = train_trial(plan, trial)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except Exception as error:
        if not (shown := show(error)).startswith("error: "):  # which the trial's own line says
            say(shown, "red", stderr=True)
        reason = explain(error)
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, [*measured.values()])
        values = ", ".join(format_measure(metric, value) for metric, value in measured.items())
    finally:
        lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
    state = studies.STATES[study.get_trials(deepcopy=False)[trial.number].state]
    parts = [state, values, format_seconds(time.monotonic() - started), reason]
    say(f"{place}: {', '.join(part for part in parts if part)}")


def train_trial(plan: SearchPlan, trial: Trial) -> dict[str, float]:
    """Train a trial's run in its folder; returns the value of each objective."""
    check_params(trial.params, plan.space)
    cfg = plan.compose(trial.params)
    run_dir = Path(cfg.run_dir)
    trial.set_user_attr("folder", run_dir.name)
    run_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(run_dir / "job.lock"):  # another worker may have drawn the same values: wait for its result
        pass
    callbacks = [Pruning(trial, monitor="val/acc")] if [*plan.objectives] == [*ACCURACY] else []
    with brief():
        run_in_folder(cfg, partial(plan.train, callbacks=callbacks))
    summary = read_json(run_dir / SUMMARY)
    for key in ("trainable_params", "epochs", "seconds"):
        trial.set_user_attr(key, summary.get(key))
    for metric in plan.objectives:
        if summary.get(metric) is None:
            raise UserError(f"{metric} was not measured by {run_dir}; choose other sweep.objectives.")
    return {metric: summary[metric] for metric in plan.objectives}


def report_study(plan: SearchPlan, study: optuna.Study) -> int:
    """Test the winner or the Pareto front, or with `test=always` every trial; write and print the table.

    They are tested once no worker can overtake them any more. The table goes to `report` in the study's folder.
    Returns how many trials have failed, or cannot be tested.
    """
    folder, report, trials = plan.folder, plan.folder / "report", studies.counted(study)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    running = sum(trial.state in studies.OPEN for trial in trials)
    untested = 0
    with FileLock(folder / ".report.lock"):
        if plan.cfg.test and done and not running:
            untested = measure_winners(folder, targets(plan.base), plan.base.cache, plan.cfg.test == "always")
        states = Counter(studies.STATES[trial.state] for trial in trials if trial.state not in studies.OPEN)
        counts = ", ".join(f"{count} {state}" for state, count in states.items()) or "none done"
        say(f"\n{plural(len(trials), 'trial')}: {counts}.")
        if running:
            say(f"{running} more run elsewhere; the worker that ends last tests the winner and writes the last report.")
        address = f"{'sqlite:///' if plan.storage.suffix == '.db' else ''}{os.path.relpath(plan.storage)}"
        more = {"To see the study (pip install optuna-dashboard)": [f"optuna-dashboard {shlex.quote(address)}"]}
        report_runs([folder], report, lambda: draw_study(study, plan.objectives, report), more=more)
    return states[studies.STATES[TrialState.FAIL]] + untested
