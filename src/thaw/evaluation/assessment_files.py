"""The files that eval.py writes: `report.html`, `report.json` and the figures, on disk and in W&B."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.table import Table

from thaw.evaluation.assessment import Assessment
from thaw.evaluation.evaluate import loggers_of
from thaw.evaluation.metrics import mcnemar
from thaw.evaluation.pictures import save_robustness
from thaw.evaluation.predictions import WRONG_IMAGES
from thaw.pages.html import write_page
from thaw.run.errors import UserError
from thaw.run.files import write_json
from thaw.run.loggers import add_to_summary, finish, log_image, log_page
from thaw.run.record import time_now, typed_command


def compare_pairs(assessments: Sequence[Assessment]) -> list[dict[str, Any]]:
    """McNemar's test between each two checkpoints, which may have seen the same photographs at two sizes.

    Raises:
        UserError: they were not tested on the same images.
    """
    first, pairs = assessments[0], []
    for other in assessments[1:]:
        resized = first.test.images.shape[1:] != other.test.images.shape[1:] and first.title == other.title
        if not torch.equal(*((model.test.labels if resized else model.test.images) for model in (first, other))):
            raise UserError(
                f"{first.label} and {other.label} have other test images ({first.title}, and {other.title}), so that "
                "they cannot be compared; set data.dir to one folder for both, or for MNIST data.source=official or "
                "data.source=sample."
            )
    for first, second in combinations(assessments, 2):
        correct = [model.logits.argmax(dim=1) == model.test.labels for model in (first, second)]
        only_first, only_second, p_value = mcnemar(*correct)
        found = {"only_first_right": only_first, "only_second_right": only_second, "p_value": p_value}
        pairs.append({"models": [first.label, second.label], **found})
    return pairs


def write_assessments(assessments: Sequence[Assessment], folder: Path) -> Path:
    """Write everything into a folder; returns the page."""
    pairs = compare_pairs(assessments)
    robustness = {model.label: model.facts["robustness"] for model in assessments}
    if assessments[0].facts["robustness"]["means"]:
        save_robustness(robustness, folder / "robustness.png")
    facts = {"models": {model.label: model.facts for model in assessments}, "comparison": pairs}
    write_json(facts, folder / "report.json")
    page, names = folder / "report.html", ", ".join(model.label for model in assessments)
    write_page(
        page,
        "evaluation.html",
        title=f"{len(assessments)} models compared: {names}" if len(assessments) > 1 else names,
        models=assessments,
        pairs=pairs,
        robustness=folder / "robustness.png",
        corruption_table=corruption_table(assessments),
        origins=[model.origin for model in assessments],
        command=typed_command(),
        time=time_now(),
        wrong_images=[(model.pictures[0][1].parent / WRONG_IMAGES).relative_to(folder) for model in assessments],
    )
    return page


def cost_table(assessments: Sequence[Assessment]) -> Table:
    """Accuracy of each model, and what an image costs it."""
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for title in ("val/acc", "test/acc", "parameters", "GFLOPs", "images/s"):
        table.add_column(title, justify="right")
    for model in assessments:
        facts, cost = model.facts, model.facts["cost"]
        accuracies = ["-" if facts[key] is None else f"{facts[key]:.2%}" for key in ("val/acc", "test/acc")]
        flops = "-" if cost["flops"] is None else f"{cost['flops'] / 1e9:.3g}"
        speed = f"{cost['images_per_second']:,.0f}"
        table.add_row(model.label, *accuracies, f"{cost['parameters']:,}", flops, speed)
    return table


def corruption_table(assessments: Sequence[Assessment]) -> tuple[list[tuple[str, bool]], list[list[tuple[str, Any]]]]:
    """Columns and rows, as the page's tables take them, of the accuracy under each corruption.

    Each model has a column of means over severities; a single one has columns of the severities, too.
    """
    robust = [model.facts["robustness"] for model in assessments]
    names = dict.fromkeys(name for facts in robust for name in facts["means"])
    curves = {name: dict(curve[1:]) for name, curve in robust[0]["curves"].items() if len(curve) > 2}
    severities = sorted({at for curve in curves.values() for at in curve}) if len(robust) == 1 else []
    means = [model.label for model in assessments] if len(robust) > 1 else ["mean"]
    rows = []
    for name in names:
        accuracies = [facts["means"].get(name) for facts in robust]
        accuracies += [curves.get(name, {}).get(severity) for severity in severities]
        rows.append([(name, name), *(("" if acc is None else f"{acc:.1%}", acc) for acc in accuracies)])
    titles = [*means, *(f"severity {severity}" for severity in severities)]
    return [("corruption", True), *((title, False) for title in titles)], rows


def log_assessment(assessment: Assessment, checkpoint: dict[str, Any], page: Path) -> None:
    """Add numbers and figures to the logged runs that trained the checkpoint, if there are any; the page to W&B's."""
    cfg = OmegaConf.create(checkpoint["config"])
    if not (Path(cfg.run_dir) / "config.yaml").is_file():  # the checkpoint was taken out of its run
        cfg.run_dir = str(page.parent)
    loggers = loggers_of(checkpoint, cfg)
    if not loggers:
        return

    try:
        facts = assessment.facts
        numbers = {name: value for name, value in facts.items() if name.startswith("test/")}
        numbers |= {f"report/{name}": value for name, value in facts["calibration"].items()}
        numbers |= {f"report/{name}": facts["cost"][name] for name in ("flops", "latency_ms", "images_per_second")}
        add_to_summary(loggers, numbers)
        robustness = [page.parent / "robustness.png"] if facts["robustness"]["means"] else []
        for path in [*(path for _, path in assessment.pictures), *robustness]:
            log_image(loggers, f"report/{path.stem}", path)
        log_page(loggers, page)
    finally:
        finish(loggers)
