"""The best that the bundled backbone gives on MNIST: `python -m benchmarks.best data.dir=<folder of the files>`.

Over seeds: the ViT by experiment=vit_best, the CNN by its own recipe and by that of vit_best, and the ViT by vit_best
with soft targets of the ensemble of these ViTs and CNNs (distill=). Then averages, soups and test-time augmentation of
them by eval.py. Each is a process of its own below `--out`; finished runs are not repeated. The combination is chosen
by validation accuracy, of equals the one that is listed first; the test accuracies choose nothing, and all are shown.
Writes benchmarks/best.md.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import ROOT, mean_and_spread, run_once
from thaw.run.console import lenient, say
from thaw.run.files import write_text

BEST = "experiment=vit_best"
ROWS: dict[str, tuple[str, list[str]]] = {  # folder -> (label, settings)
    "vit": ("ViT, `vit_best`", [BEST]),
    "cnn": (
        "CNN, by `vit_best`",
        [BEST, "name=cnn_best", "backbone=convnet", "optim.lr=4e-3", "optim.layer_decay=1.0"],
    ),
    "cnn_own": ("CNN, `baseline/convnet`", ["experiment=baseline/convnet"]),
    "distilled": ("ViT, `vit_best distill=`", [BEST, "name=vit_distilled"]),
}
TEACHERS = ("vit", "cnn")
VIEWS = ["tta=8", "augment=affine"]
COMBINED: dict[str, tuple[str, Sequence[str], list[str]]] = {  # folder -> (label, rows whose seeds it takes, settings)
    "vit_soup": ("soup of the ViTs", ["vit"], ["combine=soup"]),
    "distilled_soup": ("soup of the distilled ViTs", ["distilled"], ["combine=soup"]),
    "vit_average": ("average of the ViTs", ["vit"], ["combine=average"]),
    "distilled_average": ("average of the distilled ViTs", ["distilled"], ["combine=average"]),
    "teachers": ("average of ViTs and CNNs, the teachers", TEACHERS, ["combine=average"]),
    "all": ("average of the teachers and the distilled ViTs", [*TEACHERS, "distilled"], ["combine=average"]),
    "distilled_views": ("distilled ViTs, 8 views", ["distilled"], ["combine=average", *VIEWS]),
    "teachers_views": ("the teachers, 8 views", TEACHERS, ["combine=average", *VIEWS]),
    "all_views": (
        "the teachers and the distilled ViTs, 8 views",
        [*TEACHERS, "distilled"],
        ["combine=average", *VIEWS],
    ),
}
CEILING = (
    "Five people each looked at 100 doubtful test images, and most of them rejected the given label of 15 (Northcutt "
    "et al. 2021, arXiv:2103.14749). A model that is right about every image has 99.85 %: above it the test set "
    "measures how well a model guesses wrong labels."
)


def seeds_of(rows: Sequence[str], out: Path, seeds: int) -> str:
    """Their runs, as a list of Hydra's."""
    return f"[{','.join(str(out / row / f'seed{seed}') for row in rows for seed in range(seeds))}]"


def train_all(out: Path, seeds: int, overrides: Sequence[str], threads: int) -> None:
    for row, (_, settings) in ROWS.items():
        own = [*settings, f"distill={seeds_of(TEACHERS, out, seeds)}"] if row == "distilled" else settings
        for seed in range(seeds):
            folder = out / row / f"seed{seed}"
            say(f"{row}, seed {seed}: {folder}")
            command = ["train.py", *own, f"seed={seed}", "logger=csv", "data.source=official", *overrides]
            if failed := run_once(command, folder, threads):
                raise SystemExit(f"{folder} failed: {failed} (see output.log there)")


def combine_all(out: Path, seeds: int, device: str, threads: int) -> None:
    for name, (label, rows, settings) in COMBINED.items():
        folder = out / "combined" / name
        if (folder / "report" / "report.json").is_file():
            continue
        say(f"{label}: {folder}")
        command = ["eval.py", f"ckpt={seeds_of(rows, out, seeds)}", *settings, f"trainer.accelerator={device}"]
        if failed := run_once([*command, "robustness.images=100", "wandb=false"], folder, threads):
            raise SystemExit(f"{folder} failed: {failed} (see output.log there)")


def markdown(out: Path, seeds: int) -> str:
    """A table of the runs, one of the combinations with the chosen one in bold, and the ceiling."""
    lines = ["| | validation | test | each seed | minutes of a run |", "|---|---|---|---|---|"]
    for row, (label, _) in ROWS.items():
        runs = [json.loads((out / row / f"seed{seed}" / "summary.json").read_text()) for seed in range(seeds)]
        val, test = ([100 * run[f"{split}/acc"] for run in runs] for split in ("val", "test"))
        each = ", ".join(f"{score:.2f}" for score in test)
        minutes = statistics.median(run["seconds"] for run in runs) / 60
        lines.append(f"| {label} | {mean_and_spread(val)} | {mean_and_spread(test)} | {each} | {minutes:.1f} |")
    lines += ["", "| | models | validation | test |", "|---|---|---|---|"]
    reports: dict[str, Any] = {}
    for name in COMBINED:
        models = json.loads((out / "combined" / name / "report" / "report.json").read_text())["models"]
        reports[name] = [*models.values()][-1]  # the others are its members
    chosen = max(COMBINED, key=lambda name: reports[name]["val/acc"])  # of equals the first
    for name, (label, rows, _) in COMBINED.items():
        val, test = (f"{100 * reports[name][f'{split}/acc']:.2f} %" for split in ("val", "test"))
        cells = [label, str(1 if "soup" in name else seeds * len(rows)), val, test]
        lines.append("| " + " | ".join(f"**{cell}**" if name == chosen else cell for cell in cells) + " |")
    return "\n".join([*lines, "", f"In bold: the best by validation. {CEILING}"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure vit_best, distillation, ensembles, soups and views.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "best")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("overrides", nargs="*", help="for every training run, e.g. data.dir=/data")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    overrides = [f"trainer={arguments.device}", *arguments.overrides]
    train_all(out, arguments.seeds, overrides, arguments.threads)
    combine_all(out, arguments.seeds, arguments.device, arguments.threads)
    table = markdown(out, arguments.seeds)
    write_text(table + "\n", ROOT / "benchmarks" / "best.md")
    print(table)


if __name__ == "__main__":
    with lenient():
        main()
