"""How well wrong labels are found and what cleaning regains: python -m benchmarks.cleaning data.dir=data

Puts in 1, 5 and 10 % of uniformly wrong labels among train and val, searches as clean.py does, and fits a logistic
probe on the wrong labels, without the images found, with the labels suggested, and on the true labels. With
`--votes FILE`, the votes of five people on doubtful test digits (github.com/cleanlab/label-errors), it counts how many
of the labels that most of them rejected are among the first on the list. Nothing is chosen by either. Writes
benchmarks/cleaning.md. With `ckpt=` the backbone is that of a run; `--draws 0` measures the votes alone,
as such a backbone has seen the training labels.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from thaw.cleaning.label_issues import label_issues, label_scores
from thaw.cleaning.probabilities import logistic
from thaw.cleaning.search import Search
from thaw.cleaning.views import features_of_views
from thaw.data.folds import number_contents
from thaw.data.images import Source
from thaw.evaluation.probe_run import checkpoint_backbone
from thaw.run.config import backbone_name, build, settle
from thaw.run.console import lenient, quiet_libraries, say
from thaw.run.files import write_text

ROOT = Path(__file__).resolve().parents[1]
SHARES = (0.01, 0.05, 0.1)
PRECISION = 0.95
FIRST = (20, 50, 100, 200)


def put_in_errors(labels: Tensor, share: float, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels (N,), a share of them replaced by another class at random, and a mask (N,) of the replaced ones."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[which] = True
    moved = labels + wrong * torch.randint(1, classes, labels.shape, generator=generator)
    return moved % classes, wrong


def recall_at(scores: np.ndarray, wrong: np.ndarray) -> float:
    """The largest recall of a list of the lowest scores (N,) whose precision is at least `PRECISION`."""
    hits = wrong[np.argsort(scores, kind="stable")].cumsum()
    precise = hits / np.arange(1, len(hits) + 1) >= PRECISION
    return float(hits[precise].max(initial=0) / wrong.sum())


def one_draw(search: Search, source: Source, features: Sequence[Tensor], near: Any, share: float, seed: int) -> dict:
    """Figures of one draw of wrong labels; `features` are those of the pool, (N, D), and of the test images."""
    pool, test = features
    true, test_labels = torch.cat([source.train.labels, source.val.labels]), source.test.labels
    given, wrong = put_in_errors(true, share, len(source.classes), seed)
    contents = number_contents(torch.cat([source.train.images, source.val.images]))
    probabilities, _ = search.judge([pool], [test], near, given, contents, len(source.classes))
    found = torch.zeros(len(given), dtype=torch.bool)
    found[torch.from_numpy(label_issues(given, probabilities, None).copy())] = True
    relabelled = torch.where(found, probabilities.argmax(dim=1), given)

    def accuracy(kept: Tensor, labels: Tensor) -> float:
        answers = logistic(pool[kept], labels[kept], len(source.classes), search.C)(test).argmax(dim=1)
        return float((answers == test_labels).double().mean())

    every = torch.ones_like(found)
    return {
        "recall": recall_at(label_scores(given, probabilities), wrong.numpy()),
        "cl_precision": float(wrong[found].double().mean()),
        "cl_recall": float(found[wrong].double().mean()),
        "wrong": accuracy(every, given),
        "excluded": accuracy(~found, given),
        "relabelled": accuracy(every, relabelled),
        "true": accuracy(every, true),
    }


def planted_table(draws: dict[float, list[dict[str, float]]]) -> list[str]:
    """Means over the draws, and the spread of the recall."""
    names = f"recall at precision {PRECISION:g}", "precision, recall of confident learning"
    columns = ["wrong labels", *names, "probe: wrong labels", "excluded", "relabelled", "true labels"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for share, each in draws.items():
        mean = {key: statistics.mean(draw[key] for draw in each) for key in each[0]}
        recalls = [draw["recall"] for draw in each]
        cells = [f"{share:.0%}", f"{mean['recall']:.2%} ({min(recalls):.2%} to {max(recalls):.2%})"]
        cells += [f"{mean['cl_precision']:.2%}, {mean['cl_recall']:.2%}"]
        cells += [f"{mean[key]:.2%}" for key in ("wrong", "excluded", "relabelled", "true")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def votes_line(scores: np.ndarray, rejected: Sequence[int], views: int) -> str:
    """How many of the rejected labels are among the first on the list."""
    rank = np.argsort(np.argsort(scores, kind="stable"))[list(rejected)]
    counts = (str(int((rank < first).sum())) for first in FIRST)
    return f"| {views} | {' | '.join(counts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how well wrong labels are found.")
    parser.add_argument("--draws", type=int, default=3, help="of wrong labels")
    parser.add_argument("--votes", type=Path, help="JSON file of people's votes on test digits")
    parser.add_argument("--views", type=int, default=8, help="of each test digit, beside 1, for --votes")
    parser.add_argument("overrides", nargs="*", help="of configs/clean.yaml, e.g. data.dir=/data")
    arguments = parser.parse_args()
    quiet_libraries()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("clean", [*arguments.overrides, "run_dir=logs/cleaning/benchmark", "overrides=''"])
    backbone = checkpoint_backbone(cfg, arguments.overrides) if cfg.ckpt else None
    settle(cfg)
    L.seed_everything(cfg.seed, verbose=False)
    trainer = build(cfg.trainer, logger=False, enable_checkpointing=False)
    trainer.datamodule, cache, search = build(cfg.data), build(cfg.cache), build(cfg.search)
    backbone = build(cfg.backbone) if backbone is None else backbone
    backbone.eval().requires_grad_(False).to(trainer.strategy.root_device)
    how = build(cfg.augment), trainer, backbone, cache
    source = trainer.datamodule.load()
    pool = torch.cat([features_of_views(split, 1, *how)[0].cpu() for split in ("train", "val")])  # (N, D)
    test = [view.cpu() for view in features_of_views("test", arguments.views if arguments.votes else 1, *how)]
    near = search.near([pool], test)
    first = near[0], near[1][:1]
    draws = {}
    for share in SHARES if arguments.draws else ():
        draws[share] = [
            one_draw(search, source, (pool, test[0]), first, share, seed) for seed in range(arguments.draws)
        ]
        say(planted_table({share: draws[share]})[-1])
    what = f"{source.title}, {len(pool):,} train and val images, {len(test[0]):,} test images"
    command = " ".join(["python -m benchmarks.cleaning", f"--draws {arguments.draws}"])
    lines = [
        f"# Finding wrong labels\n\n{what}; features of {backbone_name(cfg.backbone)}; `{command}`, means over "
        f"{arguments.draws} draws. The probes are scored on all test images.\n",
        *(planted_table(draws) if draws else ()),
    ]
    if arguments.votes:
        doubtful = json.loads(arguments.votes.read_text(encoding="utf-8"))
        rejected = [each["id"] for each in doubtful if each["votes"]["given"] < 3]
        assert all(int(source.test.labels[each["id"]]) == each["given"] for each in doubtful), "another test set"
        labels = torch.cat([source.train.labels, source.val.labels])
        contents = number_contents(torch.cat([source.train.images, source.val.images]))
        lines += [
            "",
            f"Of {len(rejected)} test labels that most of five people rejected, so many are among the first listed:",
        ]
        lines += ["", f"| views | {' | '.join(map(str, FIRST))} |", "|" + "---|" * (len(FIRST) + 1)]
        for number in sorted({1, arguments.views}):
            judged = search.judge(
                [pool], test[:number], (near[0], near[1][:number]), labels, contents, len(source.classes)
            )
            lines.append(votes_line(label_scores(source.test.labels, judged[1]), rejected, number))
    write_text("\n".join(lines) + "\n", ROOT / "benchmarks" / "cleaning.md")
    say("\n".join(lines))


if __name__ == "__main__":
    with lenient():
        main()
