"""All facts that eval.py reports about one checkpoint, and the figures that go with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from thaw.data.corrections import say_corrections
from thaw.data.images import Images, Source
from thaw.evaluation.cost import cost_facts
from thaw.evaluation.metrics import accuracy_facts, calibration_error, class_scores, fit_temperature, least_certain
from thaw.evaluation.pictures import (
    MOST_EXAMPLES,
    draw_errors,
    on_paper,
    save_attention,
    save_between,
    save_corruptions,
    save_images,
    save_reliability,
)
from thaw.evaluation.robustness import corrupted_example, number_corrupted, robustness_facts
from thaw.predict.predictor import Predictor
from thaw.run.console import say
from thaw.run.errors import UserError
from thaw.task import check_single_label

MOST_LOOKED_AT = 12  # images with a map of attention, each of another class


@dataclass(frozen=True)
class Assessment:
    """A checkpoint on its test images."""

    label: str  # tells it from other checkpoints
    facts: dict[str, Any]  # all numbers, as values of JSON
    logits: Tensor  # (N, K)
    test: Images
    pictures: list[tuple[str, Path]]  # titles and files

    @property
    def title(self) -> str:
        """Name and origin of the images."""
        return ", ".join(filter(None, (self.facts["dataset"], self.facts["data_source"])))

    @property
    def origin(self) -> list[tuple[str, str]]:
        """Name and text of each fact about the run that trained the checkpoint."""
        keys = {"overrides": "overrides", "checkpoint": "checkpoint", "git_commit": "trained by commit"}
        rows = [(title, str(self.facts[key])) for key, title in keys.items() if self.facts[key]]
        corrections = self.facts.get("corrections")
        return [*rows, ("corrected data", say_corrections(corrections))] if corrections else rows


def assess(
    label: str,
    predictor: Predictor,
    source: Source,
    second: Source | None,
    robustness: Mapping[str, Any],
    folder: Path,
    advance: Callable[[int], Any],
) -> Assessment:
    """Measure a checkpoint and draw its figures.

    Args:
        label: tells it from other checkpoints.
        source: of its images; the temperature is chosen on the validation split, all else uses the test split.
        second: another dataset, to whose test split the checkpoint is applied too.
        robustness: which corruptions, and on how many test images, as for `robustness_facts`.
        folder: where the figures go.
        advance: is called with the number of images after each batch; `images_to_predict` says how many there are.
    """
    check_single_label(predictor.model.task, "eval.py")
    if not len(labels := source.test.labels):
        raise UserError(f"{source.title} has no test images to evaluate on; give a test split.")
    logits = predictor.logits(source.test.images, advance)
    val_logits = predictor.logits(source.val.images, advance) if len(source.val.labels) else logits[:0]
    temperature = fit_temperature(val_logits, source.val.labels)
    right = val_logits.argmax(dim=1) == source.val.labels
    robust = robustness_facts(predictor, source.test, logits, robustness, advance)
    other = {"second": second_facts(second, predictor, logits, advance)} if second else {}
    say("measuring speed, drawing figures")
    facts = {
        **predictor.facts(),
        "overrides": predictor.cfg.overrides,
        **source.facts(),
        "val/acc": float(right.double().mean()) if len(right) else None,
        **accuracy_facts(logits, labels, source.listed),
        "classes": class_facts(predictor.classes, logits, labels),
        "calibration": {
            "ece": calibration_error(logits, labels),
            "temperature": temperature,
            "ece_with_temperature": calibration_error(logits / temperature, labels),
        },
        "robustness": robust,
        **({"test/corruption_acc": robust["mean"]} if robust["means"] else {}),
        "cost": cost_facts(predictor, source.test.images[: predictor.batch_size]),
        **other,
    }
    pictures = draw_pictures(predictor, source, logits, temperature, robustness, folder)
    return Assessment(label, facts, logits, source.test, pictures)


def images_to_predict(source: Source, second: Source | None, robustness: Mapping[str, Any]) -> int:
    """How many images `assess` will predict."""
    other = len(second.test.labels) if second else 0
    return len(source.test.labels) + len(source.val.labels) + number_corrupted(source.test, robustness) + other


def class_facts(names: Sequence[str], logits: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Precision, recall and number of each class; None in place of 0 / 0, as JSON has no NaN."""
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    scores = ([None if one != one else one for one in score.tolist()] for score in class_scores(logits, labels))
    rows = zip(names, *scores, counts, strict=True)
    return [dict(zip(("class", "precision", "recall", "n"), row, strict=True)) for row in rows]


def second_facts(source: Source, predictor: Predictor, logits: Tensor, advance: Callable[[int], Any]) -> dict[str, Any]:
    """Accuracy on another dataset, and how well confidence tells the two apart: the area under the ROC curve."""
    others = predictor.logits(source.test.images, advance)
    confidence = torch.cat([part.softmax(dim=1).amax(dim=1) for part in (others, logits)])
    is_own = torch.cat([torch.zeros(len(others)), torch.ones(len(logits))]).long()
    return {
        "dataset": source.name,
        **accuracy_facts(others.argmax(dim=1), source.test.labels),
        "mean_confidence": float(confidence[: len(others)].mean()),
        "mean_confidence_own": float(confidence[len(others) :].mean()),
        "auroc": float(binary_auroc(confidence, is_own)),
    }


def draw_pictures(
    predictor: Predictor,
    source: Source,
    logits: Tensor,
    temperature: float,
    robustness: Mapping[str, Any],
    folder: Path,
) -> list[tuple[str, Path]]:
    """Draw all figures, and write the list of wrong images; returns title and file of each figure."""
    images, labels = source.test
    reader = predictor.data["reader"]
    draw_errors(source, logits, torch.arange(len(labels)), reader, folder)
    save_reliability(logits, labels, temperature, folder / "reliability.png")
    unsure = least_certain(logits, MOST_EXAMPLES)
    shown = (on_paper(images[unsure], reader), logits[unsure], labels[unsure], unsure)
    save_images(*shown, predictor.classes, "Least certain first", folder / "least_certain.png")
    between = {"Between the two models": "between"} if "between" in predictor.combined else {}
    if between:
        save_between(predictor.combined, len(source.val.labels), folder / "between.png")
    pictures = {
        **between,
        "Where it errs": "confusion_matrix",
        "How sure it is": "reliability",
        "The images with the highest loss": "worst_images",
        "The images it is least certain about": "least_certain",
    }
    if harder := corrupted_example(source.test, robustness):
        pictures["An image under each corruption"] = "corruptions"
        save_corruptions({name: on_paper(image, reader) for name, image in harder.items()}, folder / "corruptions.png")
    if predictor.has_attention:
        pictures["Where it looks: attention rollout (Abnar & Zuidema 2020)"] = "attention"
        first = torch.stack([(labels == c).nonzero()[0, 0] for c in labels.unique()[:MOST_LOOKED_AT]])  # of each class
        answers = [predictor.classes[c] for c in logits[first].argmax(dim=1).tolist()]
        shares = predictor.attention(images[first])
        save_attention(on_paper(images[first], reader), shares, answers, folder / "attention.png")
    return [(title, folder / f"{name}.png") for title, name in pictures.items()]
