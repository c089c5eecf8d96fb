"""The files that eval.py writes: `report.html`, `report.json` and the figures, on disk and in W&B."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.table import Table

from thaw.evaluation.assessment import Assessment
from thaw.evaluation.corruptions import CORRUPTIONS
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
    curves = {label: facts["curves"] for label, facts in robustness.items()}
    save_robustness(curves, min(facts["images"] for facts in robustness.values()), folder / "robustness.png")
    facts = {"models": {model.label: model.facts for model in assessments}, "comparison": pairs}
    write_json(facts, folder / "report.json")
    page, names = folder / "report.html", ", ".join(model.label for model in assessments)
    write_page(
        page,
        "evaluation.html",
        title=f"{len(assessments)} models compared: {names}" if len(assessments) > 1 else names,
        models=assessments,
        pairs=pairs,
        corruption_means=corruption_means(assessments[0]),
        robustness=folder / "robustness.png",
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


def corruption_means(model: Assessment) -> dict[str, float]:
    """Mean accuracy over the strengths of each corruption that has any."""
    means = {}
    for name, curve in model.facts["robustness"]["curves"].items():
        if harmed := [accuracy for strength, accuracy in curve if strength != CORRUPTIONS[name].harmless]:
            means[name] = sum(harmed) / len(harmed)
    return means


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
        numbers |= {"report/robustness": facts["robustness"]["mean"]}
        numbers |= {f"report/{name}": facts["cost"][name] for name in ("flops", "latency_ms", "images_per_second")}
        add_to_summary(loggers, numbers)
        for path in [*(path for _, path in assessment.pictures), page.parent / "robustness.png"]:
            log_image(loggers, f"report/{path.stem}", path)
        log_page(loggers, page)
    finally:
        finish(loggers)
