"""thaw's speed beside the strongest other way, on this machine.    python -m benchmarks.bench

Each ratio is of medians of runs taken in turn. It takes about 20 minutes on two cores and wants the machine for itself.
`--only` measures single groups of rows and prints them; `--quick` takes few images, to see that everything runs. All of
them are written to benchmarks/results.md; with a GPU, to benchmarks/<its name>.md.
"""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.speed import finetune, pipeline, probe
from benchmarks.speed.measure import ROOT, Bench, Row, machine
from thaw.data.mnist import load_mnist
from thaw.run.console import lenient, quiet_libraries
from thaw.run.files import write_text

GROUPS: dict[str, Callable[[Bench], list[Row]]] = {
    "cold": probe.cold,
    "warm": probe.warm,
    "sweep": probe.sweep,
    "finetune": finetune.bundled,
    "compiled": finetune.compiled,  # with a C++ compiler
    "vit_base": finetune.vit_base,  # with a GPU
    "pipeline": pipeline.augmented,
}
HEAD = """# Speed

Written by `make bench`{quick} in {minutes:.0f} minutes on: {machine}.

Beside thaw stands the strongest other way that we know of, and the ratio says how many times as fast thaw is. Each
figure is the median of runs taken in turn. The probe is `experiment=vit_linear_probe` on {size:,} images.

- Extract then fit: `benchmarks/extract_then_fit.py`, timm and torch alone; features once, then a fit on them.
- Logistic regression and ridge: `benchmarks/closed_form.py`, on the features that it wrote to a file.
- Fine-tuning: `benchmarks/plain_finetune.py`, a loop in bf16.
- Input: torchvision's v2 transforms of decoded tensors.

[once.md](once.md) has figures that were measured once.

"""
COLUMNS = "| | strongest other way | thaw | ratio | asked | aim |\n|---|---|---|---|---|---|\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="data.dir of the official files (fetched if missing)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="of runs in turn")
    parser.add_argument(
        "--only", nargs="*", choices=GROUPS, metavar="ROW", help=f"of {', '.join(GROUPS)}; writes nothing"
    )
    args = parser.parse_args()
    quiet_libraries()
    load_mnist("MNIST", args.data, "official", None)
    started = time.monotonic()
    bench = Bench(str(Path(args.data).resolve()), args.quick, args.rounds)
    print(COLUMNS, end="")
    lines = []
    for group in args.only or GROUPS:
        rows = [f"| {' | '.join(row)} |" for row in GROUPS[group](bench)]
        print("\n".join(rows), flush=True)
        lines += rows
    if args.only:
        return
    quick = " --quick: too small to mean much" if args.quick else ""
    head = HEAD.format(quick=quick, minutes=(time.monotonic() - started) / 60, machine=machine(), size=bench.size)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "results"
    name = re.sub(r"\W+", "_", card).strip("_").lower()
    write_text(head + COLUMNS + "\n".join([*lines, "", *bench.notes, ""]), ROOT / "benchmarks" / f"{name}.md")


if __name__ == "__main__":
    with lenient():
        main()
