"""Rows of linear probes: from the command to the test accuracy, sweeps, and what a run needs before its first step."""

import math
import re
import statistics
from pathlib import Path

from benchmarks.extract_then_fit import digits_vit
from benchmarks.speed.measure import Bench, Cost, Row, forward_flops, in_turn, middle, program, times

LRS = "1e-4,2e-4,5e-4,1e-3,2e-3,3e-3,5e-3,7e-3,1e-2,2e-2,3e-2,5e-2,1e-1"  # 13
EXPERIMENT = "experiment=vit_linear_probe"
LIBRARIES = "import lightning, timm, torch, torchmetrics, hydra, wandb, matplotlib.figure"


def said(cost: Cost) -> str:
    """Seconds and test accuracy of another way."""
    return f"{cost.seconds:.1f} s, {cost.result['test_acc']:.2%}"


def cold(bench: Bench) -> list[Row]:
    """One probe with an empty cache; the feature pass in it; its memory."""
    size = ("--train-size", str(bench.size))
    theirs, ours, floors, peaks = in_turn(
        bench.rounds,
        lambda: bench.other("extract_then_fit", "--data", bench.data, *size),
        lambda: bench.thaw(EXPERIMENT, f"data.train_size={bench.size}"),
        lambda: program("-c", LIBRARIES),
        bench.peak,
    )
    peak = statistics.median(peaks)
    bench.note(f"Matrix products in bf16 ran at {peak / 1e9:,.0f} GFLOP/s beside the feature passes.")
    other, own = middle(theirs), middle([cost for cost, _ in ours])
    rows = [
        Row(
            "probe, command to test accuracy, cold",
            f"extract then fit: {said(other)}",
            f"{own.seconds:.1f} s, {ours[0][1]['test/acc']:.2%}",
            times(other.seconds, own.seconds),
            "1.3",
            "1.6",
        )
    ]
    flops = forward_flops(digits_vit().eval(), 1, 28, 28)
    ours_rate = statistics.median(feature_rate(cost.output) for cost, _ in ours)
    their_rate = statistics.median((bench.size + 16000) / cost.result["features"] for cost in theirs)
    row = (f"{rate:,.0f} images/s, {rate * flops / peak:.0%}" for rate in (their_rate, ours_rate))
    rows.append(
        Row("feature pass, images/s and share of the bf16 peak", *row, times(ours_rate, their_rate), "70 %", "80 %")
    )
    memory, floor = max(cost.memory for cost, _ in ours), max(cost.memory for cost in floors)
    name, libraries = "peak memory of the main job", f"its libraries imported: {floor:.2f} GB"
    theirs_memory = f"extract then fit: {max(cost.memory for cost in theirs):.2f} GB; {libraries}"
    rows.append(Row(name, theirs_memory, f"{memory:.2f} GB", "", "", ""))
    return rows


def feature_rate(output: str) -> float:
    """Images per second, from the line `cached features: 54,000 train + 6,000 val images, 46 MB in <place> (9.1 s)`."""
    line = re.search(r"^cached features: (.*) images, .*\(([\d.]+) s\)$", output, re.MULTILINE)
    if line is None:
        raise SystemExit(f"no line about computed features in:\n{output}")
    images = sum(int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", line[1]))
    return images / float(line[2])


def warm(bench: Bench) -> list[Row]:
    """Probes whose features are cached, by gradient steps and in closed form; time to the first step."""
    file, cache = str(Path(bench.new_folder(), "features.pt")), bench.new_folder()
    size, settings = ("--train-size", str(bench.size)), f"data.train_size={bench.size}"
    script = ("extract_then_fit", "--data", bench.data, *size, "--cached", file)
    anew, _ = bench.other(*script), bench.thaw(EXPERIMENT, settings, cache=cache)
    logistic = ("probe=logistic_regression", "probe.C=[1e-3,1e-2,1e-1]", settings)
    theirs, ours, sklearn, ridge, probes, steps = in_turn(
        bench.rounds,
        lambda: bench.other(*script),
        lambda: bench.thaw(EXPERIMENT, settings, cache=cache),
        lambda: bench.other("closed_form", file, "logistic"),
        lambda: bench.other("closed_form", file, "ridge"),
        lambda: bench.thaw(*logistic, script="probe.py", cache=cache),
        lambda: bench.clocked(EXPERIMENT, settings, "trainer.max_epochs=1", cache=cache)["first_step"],
    )
    other, own = middle(theirs), middle([cost for cost, _ in ours])
    name, acc = "the same, features cached", ours[0][1]["test/acc"]
    cell, ratios = f"{own.seconds:.1f} s, {acc:.2%}", [times(each.seconds, own.seconds) for each in (anew, other)]
    rows = [
        Row(name, f"extract then fit, which keeps none: {said(anew)}", cell, ratios[0], "3.5", "5"),
        Row("the same", f"extract then fit with a file of features: {said(other)}", cell, ratios[1], "", ""),
    ]
    other, own = middle(sklearn), middle([cost for cost, _ in probes])
    least = middle(ridge)
    name, acc = "logistic regression on cached features, 3 strengths", probes[0][1]["test/acc"]
    both = f"scikit-learn: {said(other)}; closed-form ridge, 31 strengths: {said(least)}"
    rows.append(Row(name, both, f"{own.seconds:.1f} s, {acc:.2%}", times(other.seconds, own.seconds), "", ""))
    first = statistics.median(steps)
    before = statistics.median(sum(cost.result[part] for part in ("imports", "read", "features")) for cost in theirs)
    name, script_says = "import to first step, features cached", f"extract then fit: {before:.1f} s"
    return [*rows, Row(name, script_says, f"{first:.1f} s", times(before, first), "4.0 s", "3.0 s")]


def sweep(bench: Bench) -> list[Row]:
    """13 learning rates with an empty cache, and one run beside them."""
    size, settings = ("--train-size", str(bench.size)), (EXPERIMENT, f"data.train_size={bench.size}")
    script = ("extract_then_fit", "--data", bench.data, *size, "--lrs", LRS)
    fits, bank, runs, one = in_turn(
        min(2, bench.rounds),
        lambda: bench.other(*script),
        lambda: bench.other(*script, "--bank"),
        lambda: bench.thaw(*settings, f"optim.lr={LRS}", sweep=True),
        lambda: bench.thaw(*settings)[0],
    )
    many, single = middle([cost for cost, _ in runs]).seconds, middle(one).seconds
    ours = f"{many:.1f} s, {runs[0][1].get('test/acc', math.nan):.2%}"
    separate, together = middle(fits), middle(bank)
    ratios = [times(cost.seconds, many) for cost in (separate, together)]
    return [
        Row("13 learning rates, cold", f"extract once, 13 fits: {said(separate)}", ours, ratios[0], "1.0", "1.5"),
        Row("the same", f"extract once, a bank of 13 heads: {said(together)}", ours, ratios[1], "", ""),
        Row(
            "13 learning rates against one run, cold",
            f"one run: {single:.1f} s",
            ours,
            times(many, single),
            "at most 1.4",
            "1.2",
        ),
    ]
