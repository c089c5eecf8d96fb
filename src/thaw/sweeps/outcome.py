"""The end of a search: the winner is tested, pictures are drawn, the table is written, the best trials are printed."""

import os
import shlex
from collections import Counter

import optuna
from filelock import FileLock
from optuna.trial import TrialState

from thaw.run.files import read_json
from thaw.run.jobs import SUMMARY
from thaw.run.targets import targets
from thaw.sweeps.search_plan import SearchPlan
from thaw.sweeps.space import as_overrides
from thaw.sweeps.study import OPEN, STATES, counted
from thaw.sweeps.study_pictures import draw_study


def report_study(plan: SearchPlan, study: optuna.Study) -> int:
    """Test the winner of one objective, or with `test=always` every trial; write and print the table.

    The winner is tested once no worker can overtake it any more. The table goes to `report` in the study's folder.

    Returns:
        how many trials have failed.
    """
    from thaw.evaluation.evaluate import test_run
    from thaw.sweeps.run_table import write_run_table

    folder, objectives, trials = plan.folder, plan.objectives, counted(study)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    running = sum(trial.state in OPEN for trial in trials)
    with FileLock(folder / ".report.lock"):
        if plan.cfg.test and done and not running:
            winners = study.best_trials[:1] if len(objectives) == 1 else []
            for trial in done if plan.cfg.test == "always" else winners:
                run = trial.user_attrs["folder"]
                if read_json(folder / run / SUMMARY)["test/acc"] is None:
                    test_run(folder / run, targets(plan.base))
        print(write_run_table([folder], folder / "report", draw_study(study, objectives, folder / "report")).text)
    states = Counter(trial.state for trial in trials)
    counts = ", ".join(
        f"{states[state]} {name}" for state, name in STATES.items() if states[state] and state not in OPEN
    )
    print(f"\n{len(trials)} trials: {counts or 'none done'}")
    if running:
        print(f"{running} more are running; the worker that ends last tests the winner and writes the last report.")
    best = study.best_trials if done else []
    if len(objectives) > 1 and best:
        print("Pareto front: no other trial is better in one objective and as good in the others")
        best = sorted(best, key=lambda trial: trial.values)
    for trial in best if len(objectives) > 1 else best[:1]:
        values = "  ".join(f"{name} {value:.6g}" for name, value in zip(objectives, trial.values, strict=True))
        print(f"best      trial {trial.number}: {values}  {shlex.join(as_overrides(trial.params))}")
        print(f"          {os.path.relpath(folder / trial.user_attrs['folder'])}")
    address = f"{'sqlite:///' if plan.storage.suffix == '.db' else ''}{os.path.relpath(plan.storage)}"
    print(f"look      optuna-dashboard {shlex.quote(address)}", flush=True)
    return states[TrialState.FAIL]
