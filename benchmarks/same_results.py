"""Whether a change of the code changes results: the weights and metrics of thirty small runs on the bundled sample.

    python -m benchmarks.same_results record before.json          (about 6 minutes on 2 cores)
    python -m benchmarks.same_results compare before.json

The weights of each run's last checkpoint are hashed, so that a difference in the last bit shows. Hashes hold for one
machine and one version of torch.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from thaw.data.store import tensors_sha256
from thaw.run.console import lenient

ROOT = Path(__file__).parents[1]
SMALL = ["data.source=sample", "data.train_size=600", "data.batch_size=100", "trainer.max_epochs=2", "logger=csv"]
TUNED = [*SMALL, "experiment=vit_finetune", "augment=none", "mix=none", "average=none"]
POLICIES = [
    "attention_only",
    "bias_only",
    "first_blocks",
    "full",
    "last_blocks",
    "linear_probe",
    "lora",
    "norm_only",
    "patterns",
]
RUNS: dict[str, list[str]] = {
    **{f"freeze={policy}": [*TUNED, f"freeze={policy}"] for policy in POLICIES},
    "freeze=gradual": [*TUNED, "freeze=gradual", "freeze.blocks=3", "trainer.max_epochs=3"],
    "freeze=lp_ft": [*TUNED, "freeze=lp_ft", "freeze.probe_epochs=1"],
    "cache.mode=off": [*SMALL, "experiment=vit_linear_probe", "cache.mode=off"],
    "head=lr_bank": [*SMALL, "experiment=vit_linear_probe", "head=lr_bank"],
    "head=lr_bank mix=both": [*SMALL, "experiment=vit_linear_probe", "head=lr_bank", "mix=both", "augment=affine"],
    "head=mlp": [*SMALL, "experiment=vit_linear_probe", "head=mlp"],
    "head.norm=batch": [*SMALL, "experiment=vit_linear_probe", "head.norm=batch"],
    "vit_finetune": [*SMALL, "experiment=vit_finetune"],
    "mix=both": [*TUNED, "mix=both", "augment=strong", "optim.layer_decay=0.7"],
    "average=ema": [*TUNED, "average=ema", "freeze=last_blocks"],
    "few_labels": [*SMALL, "experiment=few_labels", "data.train_size=null"],
    **{
        f"pretrain_{objective}": [*SMALL, f"experiment=pretrain_{objective}", "trainer.check_val_every_n_epoch=1"]
        for objective in ("autoregressive", "mae", "simclr")
    },
    "pretrain_gan": [*SMALL, "experiment=pretrain_gan", "model.samples=200", "data.train_size=200"],
    **{f"baseline/{name}": [*SMALL, f"experiment=baseline/{name}"] for name in ("convnet", "lenet5", "mlp", "rnn")},
    "trainer=ddp_cpu": [*TUNED, "trainer=ddp_cpu", "data.batch_size=50", "freeze=gradual", "freeze.blocks=3"],
    "-m": ["-m", *SMALL, "experiment=vit_linear_probe", "optim.lr=1e-3,1e-2", "seed=0,1"],
}
RESUMED = ["trainer.max_epochs=5"]  # of `freeze=gradual` and `trainer=ddp_cpu`


def train(name: str, arguments: list[str], repository: Path, folder: Path) -> dict[str, Any]:
    """Run one command; the hash of the weights and the last value of every metric, for each job by its overrides."""
    where = f"hydra.sweep.dir={folder}" if "-m" in arguments else f"hydra.run.dir={folder}"
    command = [sys.executable, "train.py", *arguments, where, f"cache.dir={folder.parent / 'cache'}"]
    path = os.pathsep.join([str(repository / "src"), str(repository)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    print(f"{name}: done", flush=True)
    jobs = sorted(folder.glob("**/checkpoints/last.ckpt"))
    return {" ".join([name, *typed(job)]) if len(jobs) > 1 else name: result(job) for job in jobs}


def typed(checkpoint: Path) -> list[str]:
    """What tells a job of a sweep from the others."""
    overrides = str(json.loads((checkpoint.parents[1] / "summary.json").read_text())["overrides"]).split()
    return [override for override in overrides if override.startswith(("optim.lr", "seed"))]


def result(checkpoint: Path) -> dict[str, Any]:
    """Hash of the weights in a checkpoint, and the metrics that its run logged."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    hashed = tensors_sha256(dict(sorted(state.items())))
    return {"weights": hashed, "metrics": dict(metrics(checkpoint.parents[1]))}


def metrics(folder: Path) -> Iterator[tuple[str, float]]:
    """The last value of every metric that a run's `metrics.csv` holds, times left out."""
    for path in sorted(folder.glob("csv/**/metrics.csv")):
        header, *rows = [line.split(",") for line in path.read_text().splitlines()]
        for column, name in enumerate(header):
            values = [row[column] for row in rows if row[column] not in ("", "nan")]
            if values and "/" in name and not any(word in name for word in ("time", "second", "per_s")):
                yield name, float(values[-1])


def all_results(repository: Path, workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        numbered = {name: Path(folder) / f"run{number}" for number, name in enumerate(RUNS)}
        results: dict[str, Any] = {}
        for part in pool.map(lambda name: train(name, RUNS[name], repository, numbered[name]), RUNS):
            results |= part
        for name in ("freeze=gradual", "trainer=ddp_cpu"):
            again = [*RESUMED, f"resume={numbered[name]}", "logger=csv"]
            results |= train(f"{name}, resumed", again, repository, Path(folder) / f"{numbered[name].name}_resumed")
        return results


SPEED = {"train/images_per_second", "train/share_of_peak"}


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each difference."""
    lines = [f"{name}: only in one of both" for name in sorted(before.keys() ^ after.keys())]
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name], after[name]
        if old["weights"] != new["weights"]:
            lines.append(f"{name}: weights {old['weights'][:12]} -> {new['weights'][:12]}")
        for metric in sorted(old["metrics"].keys() - SPEED):  # a later version may log more
            one, other = old["metrics"][metric], new["metrics"].get(metric, math.nan)
            if one != other:
                lines.append(f"{name}: {metric} {one} -> {other}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="hashes and metrics, as JSON")
    parser.add_argument("--repository", type=Path, default=ROOT, help="checkout whose code runs (default: this one)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once")
    arguments = parser.parse_args()
    results = all_results(arguments.repository.resolve(), arguments.workers)
    if arguments.action == "record":
        arguments.file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{len(results)} runs in {arguments.file}")
        return
    differences = compare(json.loads(arguments.file.read_text()), results)
    print("\n".join(differences) or f"all {len(results)} runs are equal to the last bit")
    sys.exit(bool(differences))


if __name__ == "__main__":
    with lenient():
        main()
