"""Test accuracy of the probes with few labels: `python -m benchmarks.few_labels data.dir=<folder>`.

Five draws each of 1, 2, 5, 10 and 54 labelled images a class, official MNIST; the other training images and those of
validation have no labels. Features and the graph are computed once. With `--finetune few_labels few_labels_finetune`
also these experiments, each run a process of its own below logs/few_labels; finished ones are not repeated.
Nothing is chosen by a label beyond those drawn. Writes benchmarks/few_labels.md, which lists every draw.
"""

import argparse
import statistics
from collections.abc import Iterator

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from benchmarks.compare import ROOT, run_once
from thaw.data.few_labels import draw_labelled
from thaw.evaluation.probe_run import probe_features
from thaw.evaluation.probes import Labelled
from thaw.evaluation.propagation import balance, neighbours_mean, normalised_graph, spread
from thaw.run.config import build, settle
from thaw.run.console import lenient, progress, say
from thaw.run.files import read_json, write_text

RUNS = ROOT / "logs" / "few_labels"
PER_CLASS, DRAWS = (1, 2, 5, 10, 54), range(5)
SUPERVISED = ("prototype", "logistic_regression")
TUNED = {"few_labels": "fine-tuning on the labelled alone", "few_labels_finetune": "fine-tuning on pseudo-labels"}
Table = dict[str, dict[int, list[float]]]  # test accuracies in %: method -> labels a class -> one for each draw


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose(
            "probe", ["data.source=official", "name=unused", "run_dir=unused", "overrides=unused", *overrides]
        )
    settle(cfg)
    return cfg


def measured_probes(overrides: list[str]) -> Table:
    """All probes on features that are computed once."""
    cfg = composed("data.labels_per_class=1", *overrides)
    trainer, cache = build(cfg.trainer, logger=False, enable_checkpointing=False), build(cfg.cache)
    backbone = build(cfg.backbone).eval().requires_grad_(False).to(trainer.strategy.root_device)
    trainer.datamodule = build(cfg.data)
    pool, val, test = (probe_features(split, trainer, backbone, cache) for split in ("train", "val", "test"))
    cfg.data.labels_per_class = None
    train = build(cfg.data).load().train  # the pool begins with these images
    labels = {}  # (N,) of each draw
    for n in PER_CLASS:
        for draw in DRAWS:
            drawn = draw_labelled(train, n, draw)
            labels[n, draw] = torch.full_like(pool.labels, -1)
            labels[n, draw][drawn] = train.labels[drawn].to(pool.labels)
    table: Table = {}
    for name in SUPERVISED:
        probe = build(composed(f"probe={name}", *overrides).probe)
        for (n, _), each in labels.items():
            add(table, name, n, probe(Labelled(pool.features, each), val).predict(test.features), test.labels)
    settings = composed("probe=propagation", *overrides).probe
    links = normalised_graph(pool.features, settings.k)
    with progress("propagation", len(labels), "draws") as advance:
        parts = []
        for each in labels.values():
            parts.append(balance(spread(links, each.cpu(), settings.alpha)))  # (N, K)
            advance(1)
    together = neighbours_mean(test.features, pool.features, torch.cat(parts, dim=1).to(pool.features), settings.k)
    for (n, _), scores in zip(labels, together.split(parts[0].shape[1], dim=1), strict=True):  # (Q, K) of each draw
        add(table, "propagation", n, scores.argmax(dim=1), test.labels)
    return table


def add(table: Table, name: str, per_class: int, answers: Tensor, labels: Tensor) -> None:
    """Add the test accuracy of a probe that has learnt from one draw; answers and labels are (Q,)."""
    accuracy = 100 * float((answers == labels).double().mean())
    table.setdefault(name, {}).setdefault(per_class, []).append(accuracy)


def tuned(experiments: list[str], per_class: list[int], overrides: list[str], threads: int) -> Table:
    """Experiments of fine-tuning, one process after the other."""
    table: Table = {}
    for experiment in experiments:
        for n in per_class:
            for draw in DRAWS:
                folder = RUNS / experiment / f"{n}_per_class_draw{draw}"
                batch = [f"data.batch_size={min(64, 10 * n)}"] * (experiment == "few_labels")
                settings = [
                    f"experiment={experiment}",
                    f"data.labels_per_class={n}",
                    f"data.labels_draw={draw}",
                    *batch,
                ]
                settings += ["data.source=official", "logger=csv", "test=true", *overrides]
                if failed := run_once(["train.py", *settings], folder, threads):
                    say(f"{folder} failed: {failed}")
                else:
                    accuracy = 100 * read_json(folder / "summary.json")["test/acc"]
                    table.setdefault(experiment, {}).setdefault(n, []).append(accuracy)
    return table


def markdown(table: Table) -> Iterator[str]:
    """A table of means and standard deviations, and one of every draw."""
    yield "| labels a class (in all) | " + " | ".join(TUNED.get(name, name.replace("_", " ")) for name in table) + " |"
    yield "|---" * (len(table) + 1) + "|"
    for n in PER_CLASS:
        cells = []
        for found in table.values():
            draws = found.get(n, [])
            cells.append(f"{statistics.mean(draws):.2f} ± {statistics.stdev(draws):.2f} %" if len(draws) > 1 else "-")
        yield f"| {n} ({10 * n}) | " + " | ".join(cells) + " |"
    yield ""
    yield f"Test accuracy in % of the official 10,000 images, of draws {DRAWS[0]} to {DRAWS[-1]}:"
    yield ""
    yield "| | " + " | ".join(f"{n} a class" for n in PER_CLASS) + " |"
    yield "|---" * (len(PER_CLASS) + 1) + "|"
    for name, found in table.items():
        cells = [", ".join(f"{acc:.2f}" for acc in found.get(n, [])) for n in PER_CLASS]
        yield f"| {TUNED.get(name, name.replace('_', ' '))} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", nargs="+", choices=TUNED, default=[], help="also these experiments")
    parser.add_argument("--labels", nargs="+", type=int, choices=PER_CLASS, default=PER_CLASS, help="of these, a class")
    parser.add_argument("--threads", type=int, default=2, help="of each run of fine-tuning")
    parser.add_argument("overrides", nargs="*", help="e.g. data.dir=/data")
    arguments = parser.parse_args()
    table = measured_probes(arguments.overrides)
    table |= tuned(arguments.finetune, arguments.labels, arguments.overrides, arguments.threads)
    text = "\n".join(markdown(table))
    write_text(text + "\n", ROOT / "benchmarks" / "few_labels.md")
    print(text)


if __name__ == "__main__":
    with lenient():
        main()
