"""The end of a search: the winner is tested, pictures are drawn, the table is written and printed."""

import os
import shlex
from collections import Counter

import optuna
from filelock import FileLock
from optuna.trial import TrialState

from thaw.run.console import console, plural, say
from thaw.run.targets import targets
from thaw.sweeps.ending import measure_winners, say_where, show_run_table
from thaw.sweeps.run_table import write_run_table
from thaw.sweeps.search_plan import SearchPlan
from thaw.sweeps.study import OPEN, STATES, counted
from thaw.sweeps.study_pictures import draw_study


def report_study(plan: SearchPlan, study: optuna.Study) -> int:
    """Test the winner or the Pareto front, or with `test=always` every trial; write and print the table.

    They are tested once no worker can overtake them any more. The table goes to `report` in the study's folder.

    Returns:
        how many trials have failed, or cannot be tested.
    """
    folder, report, trials = plan.folder, plan.folder / "report", counted(study)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    running = sum(trial.state in OPEN for trial in trials)
    untested = 0
    with FileLock(folder / ".report.lock"):
        if plan.cfg.test and done and not running:
            untested = measure_winners(folder, targets(plan.base), plan.cfg.test == "always")
        with console().status("drawing pictures, writing the report"):
            table = write_run_table([folder], report, draw_study(study, plan.objectives, report))
    show_run_table(table)
    states = Counter(trial.state for trial in trials)
    counts = ", ".join(
        f"{states[state]} {name}" for state, name in STATES.items() if states[state] and state not in OPEN
    )
    say(f"{plural(len(trials), 'trial')}: {counts or 'none done'}.")
    if running:
        say(f"{running} more run elsewhere; the worker that ends last tests the winner and writes the last report.")
    address = f"{'sqlite:///' if plan.storage.suffix == '.db' else ''}{os.path.relpath(plan.storage)}"
    dashboard = f"optuna-dashboard {shlex.quote(address)}"
    say_where(table, [folder], report, {"To see the study (pip install optuna-dashboard)": [dashboard]})
    return states[TrialState.FAIL] + untested
