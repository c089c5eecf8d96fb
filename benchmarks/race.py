"""A race to 99 % on MNIST's 10,000 official test images.    python -m benchmarks.race data.dir=<folder of the files>

The clock runs from the command to its end, for the whole process on two cores, with nothing cached; the median of five
seeds, in turn. Any model may enter: add a line to ENTRANTS. A recipe may be shortened as far as validation accuracy
allows, and its test accuracy must be 99 % with every seed. Reads the official files alone. Writes benchmarks/race.md.
"""

import argparse
import json
import os
import re
import statistics
import tempfile
from pathlib import Path

from benchmarks.speed.measure import ROOT, machine, program
from thaw.run.console import lenient
from thaw.run.errors import UserError
from thaw.run.files import write_text

GOAL = 0.99
QUICK = ["logger=csv", "data.source=official", "augment=none", "validate=false"]
ENTRANTS = {  # name -> command; {data}, {seed} and {folder} are filled in
    "thaw, frozen ViT: logistic regression on 5,000 images": [
        *("probe.py", "probe=logistic_regression", "probe.C=[1e-2]", "data.train_size=5000", "data.source=official"),
        *("data.dir={data}", "seed={seed}", "cache.dir={folder}/cache", "hydra.run.dir={folder}"),
    ],
    "thaw, LeNet-5 from scratch": [
        *("train.py", "experiment=baseline/lenet5", "trainer.max_epochs=4", *QUICK),
        *("data.dir={data}", "seed={seed}", "hydra.run.dir={folder}"),
    ],
    "thaw, CNN from scratch": [
        *("train.py", "experiment=baseline/convnet", "trainer.max_epochs=1", *QUICK),
        *("data.dir={data}", "seed={seed}", "hydra.run.dir={folder}"),
    ],
    "extract then fit, frozen ViT: 10,000 images": [
        *("-m", "benchmarks.extract_then_fit", "--train-size", "10000", "--batch-size", "250"),
        *("--data", "{data}", "--seed", "{seed}"),
    ],
}
HEAD = """# A race to 99 %

Seconds from the command to the end of the process, test accuracy on MNIST's 10,000 official test images included; the
median of {rounds} seeds, in turn, on two cores with nothing cached. Every seed must reach 99 %. Written by
`python -m benchmarks.race data.dir=<folder>` on: {machine}. The bundled ViT was pretrained without labels on images of
MNIST's training set, which took its own time.

| | seconds | test accuracy, lowest of the seeds | peak memory |
|---|---|---|---|
"""


def run(command: list[str], data: str, seed: int) -> tuple[float, float, float]:
    """Seconds, test accuracy and peak memory in GB of one entrant."""
    with tempfile.TemporaryDirectory(prefix="thaw_race_") as folder:
        cost = program(*(part.format(data=data, seed=seed, folder=folder) for part in command))
        summary = Path(folder, "summary.json")
        accuracy = json.loads(summary.read_text())["test/acc"] if summary.exists() else cost.result["test_acc"]
    return cost.seconds, accuracy, cost.memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="data.dir=<folder that holds MNIST/raw/*.gz>")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="entrants whose name matches this pattern; writes nothing")
    args = parser.parse_args()
    data = Path(args.data.removeprefix("data.dir=")).resolve()
    if not (data / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz").is_file():
        raise UserError(
            f"{data} does not hold MNIST/raw/t10k-images-idx3-ubyte.gz; name the folder of the official files."
        )
    if hasattr(os, "sched_setaffinity"):  # inherited by the processes
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    entrants = {name: command for name, command in ENTRANTS.items() if re.search(args.only or "", name)}
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in entrants}
    for seed in range(args.rounds):
        for name, command in entrants.items():
            runs[name].append(run(command, str(data), seed))
            print(f"{name}, seed {seed}: {runs[name][-1][0]:.1f} s, {runs[name][-1][1]:.2%}", flush=True)
    lines = {}
    for name, results in runs.items():
        seconds, accuracies, memory = zip(*results, strict=True)
        late = sum(accuracy < GOAL for accuracy in accuracies)
        missed = f" ({late} of {len(results)} below 99 %)" if late else ""
        cells = f"{statistics.median(seconds):.1f}", f"{min(accuracies):.2%}{missed}", f"{max(memory):.2f} GB"
        lines[f"| {name} | {' | '.join(cells)} |"] = (late > 0, statistics.median(seconds))
    table = "\n".join(sorted(lines, key=lines.__getitem__))
    print(table)
    if not args.only:
        head = HEAD.format(rounds=args.rounds, machine=machine())
        write_text(head + table + "\n", ROOT / "benchmarks" / "race.md")


if __name__ == "__main__":
    with lenient():
        main()
