"""The end of a search: the winner is tested, pictures are drawn, the table is written and printed."""

import os
import shlex
from collections import Counter

import optuna
from filelock import FileLock
from optuna.trial import TrialState

from thaw.run.console import plural, say
from thaw.run.targets import targets
from thaw.sweeps.ending import measure_winners, report_runs
from thaw.sweeps.search_plan import SearchPlan
from thaw.sweeps.study import OPEN, STATES, counted
from thaw.sweeps.study_pictures import draw_study


def report_study(plan: SearchPlan, study: optuna.Study) -> int:
    """Test the winner or the Pareto front, or with `test=always` every trial; write and print the table.

    They are tested once no worker can overtake them any more. The table goes to `report` in the study's folder.
    Returns how many trials have failed, or cannot be tested.
    """
    folder, report, trials = plan.folder, plan.folder / "report", counted(study)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    running = sum(trial.state in OPEN for trial in trials)
    untested = 0
    with FileLock(folder / ".report.lock"):
        if plan.cfg.test and done and not running:
            untested = measure_winners(folder, targets(plan.base), plan.cfg.test == "always")
        states = Counter(STATES[trial.state] for trial in trials if trial.state not in OPEN)
        counts = ", ".join(f"{count} {state}" for state, count in states.items()) or "none done"
        say(f"\n{plural(len(trials), 'trial')}: {counts}.")
        if running:
            say(f"{running} more run elsewhere; the worker that ends last tests the winner and writes the last report.")
        address = f"{'sqlite:///' if plan.storage.suffix == '.db' else ''}{os.path.relpath(plan.storage)}"
        more = {"To see the study (pip install optuna-dashboard)": [f"optuna-dashboard {shlex.quote(address)}"]}
        report_runs([folder], report, lambda: draw_study(study, plan.objectives, report), more=more)
    return states[STATES[TrialState.FAIL]] + untested
