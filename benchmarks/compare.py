"""Every policy and every baseline, each over seeds, in one table and one picture: `make compare`.

Each run is a process of its own, `python train.py experiment=compare/...` or `python probe.py ...`, whose folder below
logs/compare holds its summary. What is there already is not run again, so that it can be stopped and started. Cost is
stated as CPU time, which runs side by side (`--jobs`) and other work change little. Writes benchmarks/compare.md and
compare.png. Nothing is chosen by the test accuracies: all of them are shown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from thaw.pages.figures import save_figure
from thaw.run.console import lenient
from thaw.run.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "logs" / "compare"

VIT, BASELINE = "bundled ViT, 2.7 M", "baselines"
ROWS: dict[str, tuple[str, str, str]] = {  # folder -> (kind, label, command)
    **{
        name: (VIT, label, f"train.py experiment=compare/{name}")
        for name, label in {
            "linear_probe": "linear probe",
            "norm_only": "norm layers",
            "bias_only": "biases (BitFit)",
            "lora": "LoRA, rank 8",
            "first_blocks": "stem and first 2 blocks",
            "last_blocks": "last 2 blocks",
            "attention_only": "attention",
            "mlp_only": "MLPs (patterns)",
            "gradual": "gradual",
            "lp_ft": "probe, then all (LP-FT)",
            "full": "everything",
        }.items()
    },
    "vit_linear_probe": (VIT, "linear probe, digits as they are, 10 epochs", "train.py experiment=vit_linear_probe"),
    "vit_finetune": (VIT, "everything, 8 epochs, EMA", "train.py experiment=vit_finetune"),
    "probe_knn": (VIT, "k nearest neighbours", "probe.py probe=knn"),
    "probe_logistic": (VIT, "logistic regression, L-BFGS", "probe.py probe=logistic_regression"),
    "pixels_logistic": (BASELINE, "logistic regression, pixels", "probe.py probe=logistic_regression backbone=pixels"),
    "pixels_knn": (BASELINE, "k nearest neighbours, pixels", "probe.py probe=knn backbone=pixels"),
    "mlp": (BASELINE, "MLP", "train.py experiment=baseline/mlp"),
    "lenet5": (BASELINE, "LeNet-5", "train.py experiment=baseline/lenet5"),
    "convnet": (BASELINE, "CNN", "train.py experiment=baseline/convnet"),
    "rnn": (BASELINE, "RNN, rows as a sequence", "train.py experiment=baseline/rnn"),
    "vit_from_scratch": (BASELINE, "the same ViT from scratch", "train.py experiment=compare/vit_from_scratch"),
}


def run(name: str, seed: int, overrides: list[str], threads: int) -> str | None:
    """Run a row with a seed unless its summary is there; returns the last line it said if it failed."""
    logger = ["logger=csv"] if ROWS[name][2].startswith("train") else []
    return run_once([*ROWS[name][2].split(), *logger, f"seed={seed}", *overrides], RUNS / name / f"seed{seed}", threads)


def run_once(command: list[str], folder: Path, threads: int) -> str | None:
    """Run a script with overrides in a folder unless a summary is there, and note the CPU time in `cpu_seconds.json`.

    Returns:
        the last line it said if it failed; all of them are in `output.log`.
    """
    if (folder / "summary.json").is_file():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (folder / "output.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command, f"hydra.run.dir={folder}"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    (folder / "cpu_seconds.json").write_text(json.dumps(used.ru_utime + used.ru_stime))
    if process.returncode:
        return next(
            (
                line
                for line in (folder / "output.log").read_text(encoding="utf-8", errors="replace").splitlines()[::-1]
                if line.strip()
            ),
            "?",
        )
    return None


def finished() -> dict[str, list[dict[str, Any]]]:
    """The summaries of all runs that were tested, by row, by seed."""
    return {
        name: found
        for name in ROWS
        if (
            found := [
                summary | {"cpu_seconds": json.loads(cost.read_text()) if cost.is_file() else None}
                for path in sorted((RUNS / name).glob("seed*/summary.json"))
                if (summary := json.loads(path.read_text()))["test/acc"] is not None
                for cost in [path.with_name("cpu_seconds.json")]  # not there if the run was made by hand
            ]
        )
    }


def table(runs: Mapping[str, list[dict[str, Any]]]) -> str:
    """Markdown: a line for each row, by kind, in the order of ROWS."""
    head = "| | test accuracy | each seed | trains | CPU time | memory | checkpoint |\n|---|---|---|---|---|---|---|"
    lines, kind = [head], ""
    for name, found in runs.items():
        if ROWS[name][0] != kind:
            kind = ROWS[name][0]
            lines.append(f"| **{kind}** | | | | | | |")
        scores = [100 * summary["test/acc"] for summary in found]
        seconds, memory, size = (
            statistics.median(values) if (values := [s[key] for s in found if s.get(key) is not None]) else None
            for key in ("cpu_seconds", "peak_memory_gb", "checkpoint_mb")
        )
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        cells = [
            ROWS[name][1],
            f"{statistics.mean(scores):.2f}{spread} %",
            ", ".join(f"{score:.2f}" for score in scores),
            f"{found[0]['trainable_params']:,}",
            "-" if seconds is None else f"{seconds:.0f} s",
            "-" if memory is None else f"{memory:.1f} GB",
            "-" if size is None else f"{size:.2f} MB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(runs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Test error of each seed beside the CPU time that a run took, both on logarithmic axes."""
    colors = {VIT: "#b5432e", BASELINE: "#6b6b6b"}
    names = sorted(runs, key=lambda name: statistics.mean(summary["test/acc"] for summary in runs[name]))
    figure = Figure(figsize=(11, 0.34 * len(names) + 1.4), layout="constrained", dpi=110)
    errors, times = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for row, name in enumerate(names):
        color = colors[ROWS[name][0]]
        scores = [100 - 100 * summary["test/acc"] for summary in runs[name]]
        errors.plot(scores, [row] * len(scores), "o", color=color, alpha=0.55, markersize=6, markeredgewidth=0)
        errors.plot(statistics.mean(scores), row, "|", color=color, markersize=15, markeredgewidth=2)
        measured = [summary["cpu_seconds"] for summary in runs[name] if summary["cpu_seconds"] is not None]
        if not measured:
            continue
        seconds = statistics.median(measured)
        times.barh(row, seconds, color=color, height=0.55)
        times.text(seconds * 1.08, row, f"{seconds:.0f} s", va="center", fontsize=8, color="#333333")
    errors.set_yticks(range(len(names)), [ROWS[name][1] for name in names], fontsize=9)
    for axes, title in (
        (errors, "test error in %, 10,000 digits, every seed and their mean"),
        (times, "CPU time of a run, all cores"),
    ):
        axes.set_xscale("log")
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(axis="x", which="both", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, axis="y")
        axes.spines[["top", "right", "left"]].set_visible(False)
    ticks = [0.4, 0.5, 0.7, 1, 2, 3, 5, 10]
    low, high = errors.get_xlim()
    shown = [tick for tick in ticks if low <= tick <= high]
    errors.set_xticks(shown, [f"{tick:g}" for tick in shown])
    errors.set_xticks([], minor=True)
    times.set_xlim(right=times.get_xlim()[1] * 2)
    handles = [errors.plot([], [], "o", color=color, label=kind)[0] for kind, color in colors.items()]
    errors.legend(handles=handles, fontsize=8, loc="upper right", frameon=False)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare all policies and baselines on the official test digits.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), help="rows to run")
    parser.add_argument("overrides", nargs="*", help="for every run, e.g. data.dir=/data")
    arguments = parser.parse_args()
    jobs = [
        (name, seed)
        for seed in range(arguments.seeds)
        for name in arguments.only
        if seed == 0 or not ROWS[name][2].startswith("probe")  # these draw no random numbers
    ]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = {}
        for name, seed in jobs:
            overrides = ["data.source=official", *arguments.overrides]
            running[pool.submit(run, name, seed, overrides, threads)] = name, seed
        for job in tqdm(as_completed(running), total=len(running)):
            name, seed = running[job]
            if failed := job.result():
                tqdm.write(f"{name} seed {seed} failed: {failed} (see {RUNS / name / f'seed{seed}' / 'output.log'})")
    runs = finished()
    if not runs:
        raise SystemExit(f"No run below {RUNS} has been tested.")
    write_text(table(runs) + "\n", ROOT / "benchmarks" / "compare.md")
    picture(runs, ROOT / "benchmarks" / "compare.png")
    print(table(runs))


if __name__ == "__main__":
    with lenient():
        main()
