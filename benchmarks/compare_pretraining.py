"""What each pretraining objective buys at equal compute: `make compare-pretraining`.

Each objective pretrains the same ViT on the 54,000 training images for as many steps as fit in a budget of CPU time;
the time of a step is measured first. Then each backbone is probed (nearest neighbours, logistic regression on all
labels) and fine-tuned with 1, 10 and 100 % of the labels over seeds, next to the same ViT from scratch; with 1 % also
from scratch for 40 times as long. Each run is a process of its own below logs/compare_pretraining; finished ones are
not repeated. Nothing is chosen by the test accuracies. Writes benchmarks/compare_pretraining.md and draws
compare_pretraining.png from it; `--redraw` does that alone.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer

from benchmarks.compare import ROOT, mean_and_spread, run_once
from thaw.pages.figures import COLORS, INK, SMALL, new_figure, plain_axes, save_figure
from thaw.run.config import settle
from thaw.run.console import lenient, progress, say
from thaw.run.files import write_text

RUNS = ROOT / "logs" / "compare_pretraining"
OBJECTIVES = {
    "simclr": "SimCLR",
    "mae": "masked autoencoder",
    "autoregressive": "autoregressive",
    "gan": "GAN discriminator",
}
LONGER = 40  # times the epochs of "from scratch"; with 1 % of the labels and one seed
SCRATCH = {"scratch": "from scratch", "longer": f"from scratch, {LONGER} times as long"}
STARTS = {**SCRATCH, **OBJECTIVES, "bundled": "bundled weights"}
LABELS = {"1": (540, 30), "10": (5400, 4), "100": (54_000, 1)}  # % -> digits, epochs
ROW_COLORS = dict(zip(STARTS.values(), ("#6b6b6b", "#b0b0b0", *COLORS[:4], INK), strict=True))


class StepTime(Callback):
    """CPU time of every step but the first four."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self.start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step > 4:
            self.taken.append(time.process_time() - self.start)


def steps_in(seconds: float, overrides: list[str]) -> dict[str, dict[str, float]]:
    """How many steps of each objective take so much CPU time on one thread.

    The objectives take turns in two rounds of 16 steps; the faster round counts, as other programs can only slow it.

    Returns:
        of each: `seconds` and `digits` of a step, and `steps`.
    """
    torch.set_num_threads(1)
    rounds = [{name: time_of_step(name, overrides) for name in OBJECTIVES} for _ in "12"]
    best = {name: min(times[name] for times in rounds) for name in OBJECTIVES}
    return {
        name: {"seconds": taken, "digits": digits, "steps": int(seconds / taken)}
        for name, (taken, digits) in best.items()
    }


def time_of_step(name: str, overrides: list[str]) -> tuple[float, int]:
    """Mean CPU time of a step of an objective as its experiment configures it, and the size of its batch."""
    composed = [f"experiment=pretrain_{name}", "run_dir=unused", "overrides=unused", *overrides]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", composed)
    settle(cfg)
    timer, bare = StepTime(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = instantiate(cfg.trainer, callbacks=[timer], max_steps=20, limit_val_batches=0, plugins=None, **bare)
    model = instantiate(cfg.model)
    model.on_train_end = lambda: None  # nothing is written
    trainer.fit(model, instantiate(cfg.data))
    return statistics.mean(timer.taken), cfg.data.batch_size


def pretraining(name: str, steps: int) -> list[str]:
    """The command, with validation and its pictures half way and at the end."""
    often = ["trainer.check_val_every_n_epoch=null", f"trainer.val_check_interval={steps // 2}"]
    ends = [f"+trainer.max_steps={steps}", "trainer.max_epochs=1000"]
    return ["train.py", f"experiment=pretrain_{name}", "logger=csv", *ends, *often]


def measurements(start: str, seeds: int) -> dict[str, list[str]]:
    """Folder -> command of the probes and the fine-tuning after a start."""
    from_file = RUNS / start / "pretraining" / "backbone.safetensors"
    weights = "none" if start in SCRATCH else "bundled" if start == "bundled" else from_file
    tuning = [*("train.py", "experiment=few_labels", "logger=csv", "test=true", "validate=false")]
    tuning += [
        "data.labels_per_class=null",
        f"backbone.weights={weights}",
        *(["optim.layer_decay=1.0"] if weights == "none" else []),
    ]
    times, seeds = (LONGER, 1) if start == "longer" else (1, seeds)
    jobs = {
        f"{start}/labels{percent}/seed{seed}": [
            *(*tuning, f"data.train_size={digits}", f"trainer.max_epochs={epochs * times}", f"seed={seed}"),
        ]
        for percent, (digits, epochs) in LABELS.items()
        for seed in range(seeds)
        if start != "longer" or percent == "1"
    }
    if start != "longer":
        for probe in ("knn", "logistic_regression"):
            jobs[f"{start}/{probe}"] = ["probe.py", f"probe={probe}", f"backbone.weights={weights}"]
    return jobs


def run_all(starts: list[str], steps: Mapping[str, int], seeds: int, parallel: int, overrides: list[str]) -> None:
    """Run the unfinished runs, several at once; a run that fails is printed, and the others continue."""
    threads = max(1, (os.cpu_count() or 1) // parallel)

    def run(name: str, command: list[str], before: Future[str | None] | None = None) -> str | None:
        if before:
            before.result()
        return run_once([*command, "data.source=official", *overrides], RUNS / name, threads)

    with ThreadPoolExecutor(parallel) as pool:
        pretrained = {  # first, so that no run that waits for one holds a slot that it needs
            start: pool.submit(run, f"{start}/pretraining", pretraining(start, steps[start]))
            for start in starts
            if start in OBJECTIVES
        }
        running = {job: f"{start}/pretraining" for start, job in pretrained.items()}
        for start in sorted(starts, key=lambda start: start in pretrained):  # first those that wait for nothing
            for name, command in measurements(start, seeds).items():
                running[pool.submit(run, name, command, pretrained.get(start))] = name
        with progress("comparison", len(running), "runs") as advance:
            for job in as_completed(running):
                if failed := job.result():
                    say(f"{running[job]} failed: {failed} (see {RUNS / running[job] / 'output.log'})")
                advance(1)


def finished() -> dict[str, dict[str, list[float]]]:
    """Test accuracies in %: start -> `knn`, `logistic_regression`, `labels1`, ... -> one for each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for start in STARTS:
        for path in sorted((RUNS / start).glob("**/summary.json")):
            measured = path.relative_to(RUNS / start).parts[0]
            if (accuracy := json.loads(path.read_text())["test/acc"]) is not None:
                found.setdefault(start, {}).setdefault(measured, []).append(100 * accuracy)
    return found


def markdown(found: Mapping[str, Mapping[str, list[float]]], budget: Mapping[str, Mapping[str, float]]) -> str:
    """A table with a line for each start."""
    lines = [
        "| | pretraining | kNN | linear probe | 1 % of the labels | 10 % | 100 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for start, measured in found.items():
        cells = [STARTS[start], "-"]
        if start in budget:
            steps, digits = budget[start]["steps"], budget[start]["digits"]
            cells[1] = f"{steps:,} steps of {digits}: {steps * digits / 54_000:.1f} epochs"
        for column in ("knn", "logistic_regression", "labels1", "labels10", "labels100"):
            cells.append(mean_and_spread(measured[column]) if column in measured else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_cells(table: str) -> dict[str, list[tuple[float, float] | None]]:
    """Test error in % and its standard deviation in each column of `markdown` after the second, by name of its row."""
    rows: dict[str, list[tuple[float, float] | None]] = {}
    for line in table.splitlines()[2:]:
        name, _, *cells = (cell.strip().removesuffix(" %") for cell in line.strip("|").split("|"))
        split = [cell.partition(" ± ") for cell in cells]
        rows[name] = [None if mean == "-" else (100 - float(mean), float(spread or 0)) for mean, _, spread in split]
    return rows


def picture(table: str, path: Path) -> None:
    """Test error against the share of labels, and of the two probes, on logarithmic axes; bars: standard deviation."""
    rows = read_cells(table)
    figure = new_figure(9, 4.6)
    tuned, probed = figure.subplots(1, 2, width_ratios=[3, 2])
    shares = [*map(int, LABELS)]
    for name, (_, _, *cells) in rows.items():
        found = [(share, *cell) for share, cell in zip(shares, cells, strict=True) if cell]
        style: dict[str, Any] = {"color": ROW_COLORS[name], "linewidth": 1.8, "capsize": 3, "label": name}
        tuned.errorbar(*zip(*found, strict=True), fmt="-o" if len(found) > 1 else "D", markersize=4, **style)
    names = [name for name, cells in rows.items() if cells[0]][::-1]
    for column, (marker, label) in enumerate((("s", "nearest neighbours"), ("D", "logistic regression"))):
        for row, name in enumerate(names):
            if cell := rows[name][column]:
                probed.plot(cell[0], row, marker, color=ROW_COLORS[name], markersize=7)
        probed.plot([], [], marker, color="#555555", label=label)
    probed.set_yticks(range(len(names)), names, fontsize=SMALL)
    for axes, title in (
        (tuned, "test error in % after fine-tuning"),
        (probed, "test error in % of frozen features"),
    ):
        axes.set_title(title, fontsize=10, loc="left", color=INK)
        plain_axes(axes)
        axes.set_axisbelow(True)
        axes.set_xscale("log")
    figure.legend(
        *tuned.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False
    )
    probed.legend(loc="lower right", fontsize=SMALL, frameon=False)
    tuned.set_yscale("log")
    tuned.set_xticks(shares, [f"{p} %: {images:,}" for p, (images, _) in LABELS.items()])
    tuned.set_xticks([], minor=True)
    tuned.set_xlabel("labelled training images")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    for axis in (tuned.yaxis, probed.xaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare pretraining objectives at equal compute.")
    parser.add_argument("--seconds", type=float, default=2400, help="CPU time of each pretraining, all cores together")
    parser.add_argument("--seeds", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, which share the cores")
    parser.add_argument("--only", nargs="*", choices=STARTS, default=list(STARTS), help="starts to run")
    parser.add_argument("overrides", nargs="*", help="for every run, e.g. data.dir=/data")
    parser.add_argument("--redraw", action="store_true", help="draw the picture from the table, and run nothing")
    arguments = parser.parse_args()
    written, drawn = (ROOT / "benchmarks" / f"compare_pretraining{suffix}" for suffix in (".md", ".png"))
    if arguments.redraw:
        return picture(written.read_text(), drawn)
    path = RUNS / "budget.json"
    if not path.is_file():
        RUNS.mkdir(parents=True, exist_ok=True)
        budget = steps_in(arguments.seconds, ["data.source=official", *arguments.overrides])
        write_text(json.dumps(budget, indent=2) + "\n", path)
    budget = json.loads(path.read_text())
    planned = max(cost["seconds"] * cost["steps"] for cost in budget.values())
    if not 0.95 < planned / arguments.seconds < 1.05:
        raise SystemExit(
            f"--seconds={arguments.seconds:g}, but the runs in {RUNS} had {planned:.0f}: give that, or move the folder "
            "away."
        )
    steps = {name: int(cost["steps"]) for name, cost in budget.items()}
    run_all(arguments.only, steps, arguments.seeds, arguments.jobs, arguments.overrides)
    if not (found := finished()):
        raise SystemExit(f"No run below {RUNS} has been tested.")
    write_text(markdown(found, budget) + "\n", written)
    picture(markdown(found, budget), drawn)
    print(markdown(found, budget))


if __name__ == "__main__":
    with lenient():
        main()
