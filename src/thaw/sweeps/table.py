"""What a sweep ends with: its jobs in a table, the best by validation marked, and only that one tested."""

import json
import os
from pathlib import Path
from typing import Any


def read_jobs(sweep: Path) -> list[dict[str, Any]]:
    """The summaries of a sweep's jobs, the best validation accuracy first."""
    jobs = [json.loads(path.read_text()) for path in sorted(sweep.glob("*/summary.json"))]
    return sorted(jobs, key=lambda job: (job["val/acc"] is None, -(job["val/acc"] or 0.0)))


def format_jobs(jobs: list[dict[str, Any]], sweep: Path) -> str:
    """A line a job, best first; the best is marked and carries the test accuracy."""
    experiments = len({job["name"] for job in jobs}) > 1
    overrides = [[job["name"]] * experiments + job["overrides"].split() for job in jobs]
    shared = set.intersection(*map(set, overrides)) if len(jobs) > 1 else set()
    names = [" ".join(override for override in of_job if override not in shared) for of_job in overrides]
    width = max(len("overrides"), *map(len, names))
    rows = [f"\n     {'overrides':<{width}}  {'val/acc':>8}  {'test/acc':>24}  run"]
    for place, (job, name) in enumerate(zip(jobs, names, strict=True)):
        val = f"{job['val/acc']:.2%}" if job["val/acc"] is not None else "-"
        test = "-"
        if job["test/acc"] is not None:
            test = f"{job['test/acc']:.2%} [{job['test/acc_low']:.2%}, {job['test/acc_high']:.2%}]"
        mark = "best" if place == 0 else ""
        rows.append(f"{mark:<4} {name:<{width}}  {val:>8}  {test:>24}  {os.path.relpath(job['run_dir'])}")
    tested = sum(job["test/acc"] is not None for job in jobs)
    which = "only the best is tested" if tested <= 1 else "all were tested, none is chosen by that"
    rows.append(f"{len(jobs)} jobs compared on validation; {which}. Kept in {os.path.relpath(sweep)}/sweep.json")
    return "\n".join(rows)
