"""The report on one or several checkpoints: `report.html`, `report.json` and the pictures, on disk and in W&B."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from thaw.evaluation.assessment import Assessment
from thaw.evaluation.metrics import mcnemar
from thaw.evaluation.pictures import save_robustness
from thaw.evaluation.report_page import format_page
from thaw.run.config import build_list
from thaw.run.files import write_json, write_text
from thaw.run.loggers import add_to_summary, finish, log_image, wandb_run


def compare(assessments: Sequence[Assessment]) -> list[dict[str, Any]]:
    """McNemar's test between each two checkpoints.

    Raises:
        ValueError: they were not tested on the same digits.
    """
    pairs = []
    for first, second in combinations(assessments, 2):
        if not torch.equal(first.digits.images, second.digits.images):
            raise ValueError(
                f"{first.label} and {second.label} have other test digits ({first.facts['dataset']}, "
                f"{first.facts['data_source']}, and {second.facts['dataset']}, {second.facts['data_source']}), so that "
                "they cannot be compared; set data.source=official or data.source=sample for both."
            )
        right = [model.logits.argmax(dim=1) == model.digits.labels for model in (first, second)]
        only_first, only_second, p_value = mcnemar(*right)
        pairs.append(
            {
                "models": [first.label, second.label],
                "only_first_right": only_first,
                "only_second_right": only_second,
                "p_value": p_value,
            }
        )
    return pairs


def write_report(assessments: Sequence[Assessment], folder: Path) -> Path:
    """Write everything into a folder; returns the page."""
    pairs = compare(assessments)
    robustness = folder / "robustness.png"
    results = {model.label: model.facts["robustness"] for model in assessments}
    digits = min(result["digits"] for result in results.values())
    save_robustness({label: result["curves"] for label, result in results.items()}, digits, robustness)
    facts = {"models": {model.label: model.facts for model in assessments}, "comparison": pairs}
    write_json(facts, folder / "report.json")
    page = folder / "report.html"
    write_text(format_page(assessments, pairs, robustness), page)
    return page


def log_report(assessment: Assessment, checkpoint: dict[str, Any], page: Path) -> None:
    """Add numbers, pictures and page to the W&B run that trained the checkpoint, if there is one."""
    logger = checkpoint["config"].get("logger") or {}
    if not checkpoint.get("wandb_id") or "wandb" not in logger:
        return
    import wandb

    cfg = OmegaConf.create(checkpoint["config"])
    cfg.logger = {"wandb": cfg.logger.wandb}
    cfg.logger.wandb.id = checkpoint["wandb_id"]
    if not (Path(cfg.run_dir) / "config.yaml").is_file():  # the checkpoint was taken out of its run
        cfg.run_dir = str(page.parent)
    facts = assessment.facts
    loggers = build_list(cfg.logger, "logger")
    run = wandb_run(loggers)
    if run is None:  # W&B is disabled
        return
    try:
        numbers = {name: facts[name] for name in ("test/acc", "test/acc_low", "test/acc_high")}
        numbers |= {f"report/{name}": value for name, value in facts["calibration"].items()}
        numbers |= {"report/robustness": facts["robustness"]["mean"]}
        numbers |= {f"report/{name}": facts["cost"][name] for name in ("flops", "latency_ms", "images_per_second")}
        add_to_summary(loggers, numbers)
        for _, path in [*assessment.pictures, ("", page.parent / "robustness.png")]:
            log_image(loggers, f"report/{path.stem}", path)
        run.log({"report/page": wandb.Html(str(page), inject=False)})
    finally:
        finish(loggers)
