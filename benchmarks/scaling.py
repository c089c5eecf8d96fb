"""How much width and depth buy in pretraining: `python -m benchmarks.scaling`.

ViTs of several widths and depths pretrain by the masked autoencoder on the same digits in the same order; the picture
shows the loss on validation digits and the errors of two probes (test digits, frozen features, all labels) against the
number of parameters. Runs lie below logs/scaling; what is there is not run again. Writes benchmarks/scaling.md and
scaling.png.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.compare import ROOT, run_once
from thaw.pages.figures import save_figure
from thaw.run.console import lenient
from thaw.run.files import write_text

RUNS = ROOT / "logs" / "scaling"
HEAD_WIDTH = 64
SHAPES = [(192, 12), (192, 6), (128, 6), (64, 6), (192, 3), (192, 1)]  # width, depth
PROBES = {"logistic_regression": "linear probe", "knn": "kNN"}


def run(shape: tuple[int, int], epochs: int, threads: int, overrides: list[str]) -> str | None:
    """Pretrain one shape and probe it, as far as that is not done."""
    width, depth = shape
    folder = RUNS / f"width{width}_depth{depth}"
    given = [f"backbone.arguments.depth={depth}", f"+backbone.arguments.embed_dim={width}"]
    given += [f"+backbone.arguments.num_heads={width // HEAD_WIDTH}", "data.source=official", *overrides]
    length = [f"trainer.max_epochs={epochs}", f"trainer.check_val_every_n_epoch={epochs}"]
    failed = run_once(["train.py", "experiment=pretrain_mae", "logger=csv", *given, *length], folder, threads)
    weights = f"backbone.weights={folder / 'backbone.safetensors'}"
    for probe in PROBES:
        failed = failed or run_once(["probe.py", f"probe={probe}", weights, *given], folder / probe, threads)
    return failed


def results() -> list[dict[str, Any]]:
    """What is there: width, depth, parameters of the backbone, pretraining loss and test errors, smallest first."""
    found = []
    for width, depth in SHAPES:
        folder = RUNS / f"width{width}_depth{depth}"
        paths = [folder / "summary.json", *(folder / probe / "summary.json" for probe in PROBES)]
        if not all(path.is_file() for path in paths):
            continue
        pretrained, *probed = (json.loads(path.read_text()) for path in paths)
        errors = {probe: 100 - 100 * summary["test/acc"] for probe, summary in zip(PROBES, probed, strict=True)}
        parameters = probed[1]["total_params"]  # kNN adds none
        found.append(
            {"width": width, "depth": depth, "parameters": parameters, "loss": pretrained["val/loss"]} | errors
        )
    return sorted(found, key=lambda row: row["parameters"])


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| width | depth | parameters | loss on validation | linear probe | kNN |", "|---|---|---|---|---|---|"]
    for row in rows:
        accuracies = " | ".join(f"{100 - row[probe]:.2f} %" for probe in PROBES)
        lines.append(f"| {row['width']} | {row['depth']} | {row['parameters']:,} | {row['loss']:.4f} | {accuracies} |")
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]]) -> None:
    """Loss and probe errors against parameters, a line through the widths and one through the depths."""
    figure = Figure(figsize=(11, 3.8), layout="constrained", dpi=110)
    panels = figure.subplots(1, 3)
    titles = {"loss": "pretraining loss, validation digits"}
    titles |= {probe: f"test error in %, {name}" for probe, name in PROBES.items()}
    lines = {
        "depth 6, by width": ("depth", 6, "width", "#b5432e"),
        "width 192, by depth": ("width", 192, "depth", "#2e6bb5"),
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for label, (fixed, value, varied, color) in lines.items():
            chosen = [row for row in rows if row[fixed] == value]
            axes.plot(
                [row["parameters"] for row in chosen], [row[key] for row in chosen], "o-", color=color, label=label
            )
            for row in chosen:
                place = (row["parameters"], row[key])
                axes.annotate(
                    row[varied],
                    place,
                    xytext=(0, 7 if varied == "width" else -14),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=color,
                )
        axes.set(xscale="log", yscale="log", xlabel="parameters")
        axes.set_title(title, fontsize=10, loc="left")
        axes.margins(x=0.1, y=0.2)
        axes.xaxis.set_ticks([3e5, 1e6, 3e6], ["0.3 M", "1 M", "3 M"])
        axes.xaxis.set_ticks([], minor=True)
        axes.grid(color="#e4e4e4", linewidth=0.6, which="both")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        low, high = axes.get_ylim()
        ticks = [
            t
            for t in (0.34, 0.36, 0.38, 0.4, 0.42, 0.45, 0.5, 0.6, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30)
            if low <= t <= high
        ]
        axes.yaxis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_ticks([], minor=True)
    panels[0].legend(fontsize=8, frameon=False)
    save_figure(figure, ROOT / "benchmarks" / "scaling.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretraining loss and probe accuracy against width and depth.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, which share the cores")
    parser.add_argument("overrides", nargs="*", help="for every run, e.g. data.dir=/data")
    arguments = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(run, shape, arguments.epochs, threads, arguments.overrides) for shape in SHAPES]
        for shape, job in zip(SHAPES, tqdm(jobs), strict=True):
            if failed := job.result():
                tqdm.write(f"width {shape[0]}, depth {shape[1]} failed: {failed}")
    rows = results()
    if not rows:
        raise SystemExit(f"No run below {RUNS} is complete.")
    write_text(table(rows) + "\n", ROOT / "benchmarks" / "scaling.md")
    picture(rows)
    print(table(rows))


if __name__ == "__main__":
    with lenient():
        main()
