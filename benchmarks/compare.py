"""Every policy and every baseline, each over seeds, in one table and one picture: `make compare`.

Each run is a process of its own, `python train.py experiment=compare/...` or `python probe.py ...`, in a folder below
logs/compare. Runs whose summary is there already are not repeated, so that the comparison can be stopped and started.
Cost is CPU time, which runs side by side (`--jobs`) and other programs change little. Writes benchmarks/compare.md and
draws compare.png from it; `--redraw` does that alone. Nothing is chosen by the test accuracies: all of them are shown.
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

from thaw.pages.figures import COLORS, INK, SMALL, new_figure, number_axis, plain_axes, save_figure
from thaw.run.console import lenient, progress, say
from thaw.run.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "logs" / "compare"

VIT, BASELINE = "bundled ViT, 2.7 M", "baselines"
KIND_COLORS = {VIT: COLORS[1], BASELINE: "#6b6b6b"}
POLICIES = {
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
}
ROWS: dict[str, tuple[str, str, str]] = {  # folder -> (kind, label, command)
    **{name: (VIT, label, f"train.py experiment=compare/{name}") for name, label in POLICIES.items()},
    "vit_linear_probe": (VIT, "linear probe, 10 epochs, no augmentation", "train.py experiment=vit_linear_probe"),
    "vit_finetune": (VIT, "everything, 8 epochs, EMA", "train.py experiment=vit_finetune"),
    "probe_knn": (VIT, "k nearest neighbours, features", "probe.py probe=knn"),
    "probe_logistic": (VIT, "logistic regression, features", "probe.py probe=logistic_regression"),
    "pixels_logistic": (BASELINE, "logistic regression, pixels", "probe.py probe=logistic_regression backbone=pixels"),
    "pixels_knn": (BASELINE, "k nearest neighbours, pixels", "probe.py probe=knn backbone=pixels"),
    "mlp": (BASELINE, "MLP", "train.py experiment=baseline/mlp"),
    "lenet5": (BASELINE, "LeNet-5", "train.py experiment=baseline/lenet5"),
    "convnet": (BASELINE, "CNN", "train.py experiment=baseline/convnet"),
    "rnn": (BASELINE, "RNN, rows as a sequence", "train.py experiment=baseline/rnn"),
    "vit_from_scratch": (BASELINE, "the same ViT from scratch", "train.py experiment=compare/vit_from_scratch"),
}


def run_row(name: str, seed: int, overrides: list[str], threads: int) -> str | None:
    """Run a row with a seed; see `run_once`."""
    logger = ["logger=csv"] if ROWS[name][2].startswith("train") else []
    return run_once([*ROWS[name][2].split(), *logger, f"seed={seed}", *overrides], RUNS / name / f"seed{seed}", threads)


def run_once(command: list[str], folder: Path, threads: int) -> str | None:
    """Run a script in a folder unless a summary is there, and write its CPU time to `cpu_seconds.json`.

    Returns:
        the last line of its output if it failed; all of it is in `output.log`.
    """
    if (folder / "summary.json").is_file():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *command, f"hydra.run.dir={folder}"]
    with (folder / "output.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    (folder / "cpu_seconds.json").write_text(json.dumps(used.ru_utime + used.ru_stime))
    said = (folder / "output.log").read_text(encoding="utf-8", errors="replace").split("\n")
    return ([line for line in said if line.strip()] or ["?"])[-1] if process.returncode else None


def finished() -> dict[str, list[dict[str, Any]]]:
    """The summaries of all tested runs, by row, by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ROWS:
        for path in sorted((RUNS / name).glob("seed*/summary.json")):
            summary, cost = json.loads(path.read_text()), path.with_name("cpu_seconds.json")
            if summary["test/acc"] is not None:
                summary["cpu_seconds"] = json.loads(cost.read_text()) if cost.is_file() else None
                found.setdefault(name, []).append(summary)
    return found


def mean_and_spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "") + " %"


def markdown(runs: Mapping[str, list[dict[str, Any]]]) -> str:
    """A table with a line for each row, by kind, in the order of ROWS."""
    head = "| | test accuracy | each seed | trains | CPU time | memory | checkpoint |\n|---|---|---|---|---|---|---|"
    lines, kind = [head], ""
    for name, found in runs.items():
        if ROWS[name][0] != kind:
            kind = ROWS[name][0]
            lines.append(f"| **{kind}** | | | | | | |")
        scores = [100 * summary["test/acc"] for summary in found]
        cells = [ROWS[name][1], mean_and_spread(scores), ", ".join(f"{score:.2f}" for score in scores)]
        cells.append(f"{found[0]['trainable_params']:,}")
        for key, shown in (
            ("cpu_seconds", "{:.0f} s"),
            ("peak_memory_gb", "{:.1f} GB"),
            ("checkpoint_mb", "{:.2f} MB"),
        ):
            values = [summary[key] for summary in found if summary.get(key) is not None]
            cells.append(shown.format(statistics.median(values)) if values else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_rows(table: str) -> list[tuple[str, str, list[float], float | None]]:
    """Kind, name, test error of each seed in % and CPU seconds of each row of `markdown`, the lowest error last."""
    rows, kind = [], ""
    for line in table.splitlines()[2:]:
        name, _, scores, _, seconds, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        if scores:
            errors = [100 - float(score) for score in scores.split(", ")]
            rows.append((kind, name, errors, None if seconds == "-" else float(seconds.removesuffix(" s"))))
        else:
            kind = name.strip("*")
    return sorted(rows, key=lambda row: -statistics.mean(row[2]))


def picture(table: str, path: Path) -> None:
    """Draw the table of `markdown`: test error of each seed beside the CPU time of a run, both on logarithmic axes."""
    rows = read_rows(table)
    figure = new_figure(9, 0.21 * len(rows) + 0.8)
    errors, times = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for place, (kind, _, scores, seconds) in enumerate(rows):
        color = KIND_COLORS[kind]
        errors.plot(scores, [place] * len(scores), "o", color=color, alpha=0.55, markersize=5, markeredgewidth=0)
        errors.plot(statistics.mean(scores), place, "|", color=color, markersize=11, markeredgewidth=2)
        if seconds is not None:
            times.plot(seconds, place, "o", color=color, markersize=5)
            times.annotate(
                f"{seconds:.0f} s", (seconds, place), (8, 0), textcoords="offset points", va="center", fontsize=SMALL
            )
    for axes, title in (
        (errors, "test error in %: each seed (dot), mean (bar)"),
        (times, "CPU time of a run in s, all cores"),
    ):
        axes.set_title(title, fontsize=10, loc="left", color=INK)
        plain_axes(axes)
        axes.tick_params(length=0, axis="y")
        axes.spines["left"].set_visible(False)
    errors.set_yticks(range(len(rows)), [name for _, name, *_ in rows], fontsize=SMALL)
    handles = [errors.plot([], [], "o", color=color, label=kind)[0] for kind, color in KIND_COLORS.items()]
    errors.legend(handles=handles, fontsize=SMALL, loc="upper right", frameon=False)
    times.margins(x=0.15)
    for axes in (errors, times):
        number_axis(axes.xaxis, log=True)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare all policies and baselines on the official test digits.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), help="rows to run")
    parser.add_argument("overrides", nargs="*", help="for every run, e.g. data.dir=/data")
    parser.add_argument("--redraw", action="store_true", help="draw compare.png from compare.md, and run nothing")
    arguments = parser.parse_args()
    written, drawn = ROOT / "benchmarks" / "compare.md", ROOT / "benchmarks" / "compare.png"
    if arguments.redraw:
        return picture(written.read_text(), drawn)
    overrides = ["data.source=official", *arguments.overrides]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = {
            pool.submit(run_row, name, seed, overrides, threads): RUNS / name / f"seed{seed}"
            for seed in range(arguments.seeds)
            for name in arguments.only
            if seed == 0 or not ROWS[name][2].startswith("probe")  # these draw no random numbers
        }
        with progress("comparison", len(running), "runs") as advance:
            for job in as_completed(running):
                if failed := job.result():
                    say(f"{running[job]} failed: {failed} (see output.log there)")
                advance(1)
    if not (runs := finished()):
        raise SystemExit(f"No run below {RUNS} has been tested.")
    write_text(markdown(runs) + "\n", written)
    picture(markdown(runs), drawn)
    print(markdown(runs))


if __name__ == "__main__":
    with lenient():
        main()
