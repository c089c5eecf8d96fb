"""What each pretraining objective buys at equal compute: `make compare-pretraining`.

Each objective pretrains the same ViT on the 54,000 training images for as many steps as fit in a budget of CPU time, by
the time of a step, which is measured first. Then each backbone is probed (nearest neighbours, logistic regression on
all labels) and fine-tuned with 1, 10 and 100 % of the labels over seeds, next to the same ViT from scratch; with 1 %
also from scratch for 40 times as long. Each run is a process of its own below logs/compare_pretraining; what is
there is not run again. Nothing is chosen by the test accuracies. Writes benchmarks/compare_pretraining.md and
compare_pretraining.png.
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
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.compare import ROOT, run_once
from thaw.pages.axes import save
from thaw.run.config import settle
from thaw.run.console import lenient
from thaw.run.files import write_json, write_text

RUNS = ROOT / "logs" / "compare_pretraining"
OBJECTIVES = {
    "simclr": "SimCLR",
    "mae": "masked autoencoder",
    "autoregressive": "autoregressive",
    "gan": "GAN discriminator",
}
LONGER = 40  # times the epochs of "from scratch"; with 1 % of the labels and one seed
STARTS = {
    "scratch": "from scratch",
    "longer": f"from scratch, {LONGER} times as long",
    **OBJECTIVES,
    "bundled": "bundled weights",
}
LABELS = {"1": (540, 30), "10": (5400, 4), "100": (54_000, 1)}  # % -> digits, epochs
COLORS = dict(zip(STARTS, ("#6b6b6b", "#b0b0b0", "#b5432e", "#2e6bb5", "#3c8f5a", "#8a4fa3", "#222222"), strict=True))


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


def plan(seconds: float, overrides: list[str]) -> dict[str, dict[str, float]]:
    """How many steps of each objective take so much CPU time on one thread.

    Of two rounds of 16 steps, in which the objectives take turns, the faster one counts: other work only slows.

    Returns:
        of each: `seconds` and `digits` of a step, and `steps`.
    """
    torch.set_num_threads(1)
    rounds = [{name: time_of_step(name, overrides) for name in tqdm(OBJECTIVES, desc="time of a step")} for _ in "12"]
    best = {name: min(times[name] for times in rounds) for name in OBJECTIVES}
    return {
        name: {"seconds": taken, "digits": digits, "steps": int(seconds / taken)}
        for name, (taken, digits) in best.items()
    }


def time_of_step(name: str, overrides: list[str]) -> tuple[float, int]:
    """Mean CPU time of a step of an objective as its experiment configures it, and the digits that it takes."""
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
    """The command; validation, with its pictures, half way and at the end."""
    return [
        *("train.py", f"experiment=pretrain_{name}", "logger=csv", f"+trainer.max_steps={steps}"),
        *(
            "trainer.max_epochs=1000",
            "trainer.check_val_every_n_epoch=null",
            f"trainer.val_check_interval={steps // 2}",
        ),
    ]


def weights_of(start: str) -> str:
    """What `backbone.weights` is for a start."""
    named = {"scratch": "none", "longer": "none", "bundled": "bundled"}
    return named.get(start) or str(RUNS / start / "pretraining" / "backbone.safetensors")


def jobs_after(start: str, seeds: int) -> dict[str, list[str]]:
    """Folder -> command of the probes and the fine-tuning."""
    weights = f"backbone.weights={weights_of(start)}"
    jobs = {f"{start}/{probe}": ["probe.py", f"probe={probe}", weights] for probe in ("knn", "logistic_regression")}
    decay = ["optim.layer_decay=1.0"] if weights_of(start) == "none" else []  # nothing below is trained already

    def tuning(percent: str, seed: int, times: int = 1) -> dict[str, list[str]]:
        digits, epochs = LABELS[percent]
        command = [
            *("train.py", "experiment=few_labels", "logger=csv", "test=true", "validate=false", weights, *decay),
            *(f"data.train_size={digits}", f"trainer.max_epochs={epochs * times}", f"seed={seed}"),
        ]
        return {f"{start}/labels{percent}/seed{seed}": command}

    if start == "longer":
        return tuning("1", 0, LONGER)
    for percent in LABELS:
        for seed in range(seeds):
            jobs |= tuning(percent, seed)
    return jobs


def run_all(starts: list[str], steps: Mapping[str, int], seeds: int, parallel: int, overrides: list[str]) -> None:
    """Run what is not done, so many at once; a failure is told and ends no other.

    Pretraining comes first in the queue, so that what waits for it holds no slot that it needs.
    """
    threads = max(1, (os.cpu_count() or 1) // parallel)

    def run(name: str, command: list[str], before: Future[str | None] | None = None) -> str | None:
        if before:
            before.result()
        return run_once([*command, "data.source=official", *overrides], RUNS / name, threads)

    with ThreadPoolExecutor(parallel) as pool:
        pretrained = {
            start: pool.submit(run, f"{start}/pretraining", pretraining(start, steps[start]))
            for start in starts
            if start in OBJECTIVES
        }
        running = {job: f"{start}/pretraining" for start, job in pretrained.items()}
        for start in sorted(starts, key=lambda start: start in pretrained):  # first those that wait for nothing
            for name, command in jobs_after(start, seeds).items():
                running[pool.submit(run, name, command, pretrained.get(start))] = name
        for job in tqdm(as_completed(running), total=len(running)):
            if failed := job.result():
                tqdm.write(f"{running[job]} failed: {failed} (see {RUNS / running[job] / 'output.log'})")


def finished() -> dict[str, dict[str, list[float]]]:
    """Test accuracies in %: start -> `knn`, `logistic_regression`, `labels1`, ... -> one for each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for start in STARTS:
        for path in sorted((RUNS / start).glob("**/summary.json")):
            measured = path.relative_to(RUNS / start).parts[0]
            accuracy = json.loads(path.read_text())["test/acc"]
            if accuracy is not None:
                found.setdefault(start, {}).setdefault(measured, []).append(100 * accuracy)
    return found


def spread(values: list[float] | None) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} %"


def table(found: Mapping[str, Mapping[str, list[float]]], budget: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a line for each start."""
    lines = [
        "| | pretraining | kNN | linear probe | 1 % of the labels | 10 % | 100 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for start, measured in found.items():
        cost = "-"
        if start in budget:
            steps, digits = budget[start]["steps"], budget[start]["digits"]
            cost = f"{steps:,} steps of {digits}: {steps * digits / 54_000:.1f} epochs"
        columns = ("knn", "logistic_regression", "labels1", "labels10", "labels100")
        cells = [STARTS[start], cost, *(spread(measured.get(column)) for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(found: Mapping[str, Mapping[str, list[float]]], path: Path) -> None:
    """Test error against the share of labels, and of the two probes, on logarithmic axes."""
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=110)
    tuned, probed = figure.subplots(1, 2, width_ratios=[3, 2])
    for start, measured in found.items():
        points = [(int(p), measured[f"labels{p}"]) for p in LABELS if f"labels{p}" in measured]
        means = [100 - statistics.mean(values) for _, values in points]
        style = "-" if len(points) > 1 else "D"
        tuned.plot([x for x, _ in points], means, style, color=COLORS[start], label=STARTS[start], linewidth=1.8)
        for x, values in points:
            tuned.plot([x] * len(values), [100 - v for v in values], "o", color=COLORS[start], alpha=0.5, markersize=4)
    names = [start for start in found if "knn" in found[start]][::-1]
    for row, start in enumerate(names):
        for column, marker in (("knn", "s"), ("logistic_regression", "D")):
            if column in found[start]:
                probed.plot(100 - found[start][column][0], row, marker, color=COLORS[start], markersize=7)
    probed.set_yticks(range(len(names)), [STARTS[start] for start in names], fontsize=9)
    for marker, label in (("s", "nearest neighbours"), ("D", "logistic regression")):
        probed.plot([], [], marker, color="#555555", label=label)
    for axes, title in (
        (tuned, "test error in % after fine-tuning, by number of labels"),
        (probed, "test error in % of frozen features"),
    ):
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(color="#e4e4e4", linewidth=0.6, which="both")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    tuned.set_xscale("log")
    tuned.set_yscale("log")
    probed.set_xscale("log")
    tuned.set_xticks(list(map(int, LABELS)), [f"{p} %: {digits:,}" for p, (digits, _) in LABELS.items()])
    tuned.set_xticks([], minor=True)
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    for axis in (tuned.yaxis, probed.xaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare pretraining objectives at equal compute.")
    parser.add_argument("--seconds", type=float, default=2400, help="CPU time of each pretraining, all cores together")
    parser.add_argument("--seeds", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, which share the cores")
    parser.add_argument("--only", nargs="*", choices=STARTS, default=list(STARTS), help="starts to run")
    parser.add_argument("overrides", nargs="*", help="for every run, e.g. data.dir=/data")
    arguments = parser.parse_args()
    path = RUNS / "budget.json"
    if not path.is_file():
        RUNS.mkdir(parents=True, exist_ok=True)
        write_json(plan(arguments.seconds, ["data.source=official", *arguments.overrides]), path)
    budget = json.loads(path.read_text())
    planned = max(cost["seconds"] * cost["steps"] for cost in budget.values())
    if not 0.95 < planned / arguments.seconds < 1.05:
        raise SystemExit(
            f"--seconds={arguments.seconds:g}, but what lies in {RUNS} is for {planned:.0f}: give that, or move the "
            "folder away."
        )
    steps = {name: int(cost["steps"]) for name, cost in budget.items()}
    run_all(arguments.only, steps, arguments.seeds, arguments.jobs, arguments.overrides)
    found = finished()
    if not found:
        raise SystemExit(f"No run below {RUNS} has been tested.")
    write_text(table(found, budget) + "\n", ROOT / "benchmarks" / "compare_pretraining.md")
    picture(found, ROOT / "benchmarks" / "compare_pretraining.png")
    print(table(found, budget))


if __name__ == "__main__":
    with lenient():
        main()
