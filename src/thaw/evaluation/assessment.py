"""All that a report says of one checkpoint: numbers, and the pictures that go with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from thaw.data.images import Images, Source
from thaw.evaluation.corruptions import CORRUPTIONS
from thaw.evaluation.cost import cost
from thaw.evaluation.errors import WRONG_IMAGES, write_wrong_images
from thaw.evaluation.metrics import (
    accuracy_interval,
    calibration_error,
    class_scores,
    fit_temperature,
    least_certain,
    worst_digits,
)
from thaw.evaluation.pictures import save_attention, save_confusion_matrix, save_digits, save_reliability
from thaw.predict.predictor import Predictor

SHOWN = 32  # worst and least certain digits, and classes
Curve = list[tuple[float, float]]  # strength, accuracy


@dataclass(frozen=True)
class Assessment:
    """A checkpoint on its test digits.

    Attributes:
        label: names it among others.
        facts: every number of the report, as values of JSON.
        logits: (N, 10) of the test digits.
        digits: these test digits.
        pictures: title and file of each.
    """

    label: str
    facts: dict[str, Any]
    logits: Tensor
    digits: Images
    pictures: list[tuple[str, Path]]


def assess(
    label: str,
    predictor: Predictor,
    source: Source,
    second: tuple[str, Source] | None,
    robustness: Mapping[str, Any],
    folder: Path,
    told: Callable[[int], Any],
) -> Assessment:
    """Measure a checkpoint and draw its pictures.

    Args:
        label: names it among others.
        predictor: of the checkpoint.
        source: of its digits; the temperature is chosen on the validation split, all else is of the test split.
        second: another dataset and its digits, whose test split is looked at too.
        robustness: `digits`, how many test digits are corrupted, and the strengths of each corruption.
        folder: where the pictures go.
        told: is called with the number of digits done; `count_digits` says how many there will be.
    """
    logits, labels = predictor.logits(source.test.images, told), source.test.labels
    temperature = fit_temperature(predictor.logits(source.val.images, told), source.val.labels)
    facts = {
        **predictor.facts(),
        **source.facts(),
        **accuracy_facts(logits, labels),
        "classes": class_facts(predictor.classes, logits, labels),
        "calibration": {
            "ece": calibration_error(logits, labels),
            "temperature": temperature,
            "ece_with_temperature": calibration_error(logits / temperature, labels),
        },
        "robustness": robustness_facts(predictor, source.test, robustness, told),
        "cost": cost(predictor, source.test.images[: predictor.batch_size]),
    }
    if second:
        facts["second"] = second_facts(*second, predictor, logits, told)
    pictures = draw(predictor, source.test, logits, temperature, folder)
    return Assessment(label, facts, logits, source.test, pictures)


def count_digits(source: Source, second: tuple[str, Source] | None, robustness: Mapping[str, Any]) -> int:
    """How many digits `assess` will predict."""
    points = sum(len(robustness[name]) + 1 for name in CORRUPTIONS)
    corrupted = points * len(evenly(len(source.test.labels), robustness["digits"]))
    return len(source.test.labels) + len(source.val.labels) + corrupted + (len(second[1].test.labels) if second else 0)


def accuracy_facts(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    correct, total = int((logits.argmax(dim=1) == labels).sum()), len(labels)
    low, high = accuracy_interval(correct, total)
    return {"test/acc": correct / total, "test/acc_low": low, "test/acc_high": high, "n_test": total}


def class_facts(names: Sequence[str], logits: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    precision, recall = class_scores(logits, labels)
    counts = torch.bincount(labels, minlength=len(names))
    return [
        {"class": name, "precision": number(precision[c]), "recall": number(recall[c]), "n": int(counts[c])}
        for c, name in enumerate(names)
    ]


def number(value: Tensor) -> float | None:
    """A scalar as a value of JSON; None for NaN, which is what 0 of 0 is."""
    return None if value.isnan() else float(value)


def robustness_facts(
    predictor: Predictor, digits: Images, robustness: Mapping[str, Any], told: Callable[[int], Any]
) -> dict[str, Any]:
    """The curve of each corruption, from the weakest number to the highest, with the harmless strength among them."""
    chosen = evenly(len(digits.labels), robustness["digits"])
    images, labels = (part[chosen] for part in digits)
    curves: dict[str, Curve] = {}
    for name, corruption in CORRUPTIONS.items():
        curves[name] = []
        for strength in sorted({corruption.harmless, *map(float, robustness[name])}):
            harder = images if strength == corruption.harmless else corruption.apply(images, strength)
            right = predictor.logits(harder, told).argmax(dim=1) == labels
            curves[name].append((strength, float(right.double().mean())))
    harmed = [acc for name, curve in curves.items() for at, acc in curve if at != CORRUPTIONS[name].harmless]
    return {"digits": len(chosen), "mean": sum(harmed) / max(1, len(harmed)), "curves": curves}


def evenly(total: int, wanted: int | None) -> Tensor:
    """Indices of at most so many of all digits, evenly spread: the two halves of MNIST's test set differ."""
    return torch.arange(total) if wanted is None else torch.linspace(0, total - 1, min(wanted, total)).round().long()


def second_facts(
    dataset: str, source: Source, predictor: Predictor, logits: Tensor, told: Callable[[int], Any]
) -> dict[str, Any]:
    """Accuracy on another dataset, and how well confidence tells the two apart: the area under the ROC curve."""
    others = predictor.logits(source.test.images, told)
    confidence = torch.cat([part.softmax(dim=1).amax(dim=1) for part in (others, logits)])
    is_own = torch.cat([torch.zeros(len(others)), torch.ones(len(logits))]).long()
    return {
        "dataset": dataset,
        **accuracy_facts(others, source.test.labels),
        "mean_confidence": float(confidence[: len(others)].mean()),
        "mean_confidence_own": float(confidence[len(others) :].mean()),
        "auroc": float(binary_auroc(confidence, is_own)),
    }


def draw(
    predictor: Predictor, digits: Images, logits: Tensor, temperature: float, folder: Path
) -> list[tuple[str, Path]]:
    images, labels = digits
    pictures = {
        "Where it errs": "confusion_matrix",
        "How sure it is": "reliability",
        "The worst digits": "worst_digits",
        "The least certain digits": "least_certain",
    }
    if predictor.has_attention:
        pictures["Where it looks: attention rollout (Abnar & Zuidema 2020)"] = "attention"
    paths = {name: folder / f"{name}.png" for name in pictures.values()}
    save_confusion_matrix(labels, logits.argmax(dim=1), logits.shape[1], paths["confusion_matrix"])
    save_reliability(logits, labels, temperature, paths["reliability"])
    worst, unsure = worst_digits(logits, labels, SHOWN), least_certain(logits, SHOWN)
    save_digits(images[worst], logits[worst], labels[worst], "Highest loss first", paths["worst_digits"])
    save_digits(images[unsure], logits[unsure], labels[unsure], "Least certain first", paths["least_certain"])
    write_wrong_images(torch.arange(len(labels)), logits, labels, predictor.classes, folder / WRONG_IMAGES)
    if predictor.has_attention:
        first = torch.stack([(labels == c).nonzero()[0, 0] for c in labels.unique()[:SHOWN]])  # of each class there is
        said = [predictor.classes[c] for c in logits[first].argmax(dim=1).tolist()]
        save_attention(images[first], predictor.attention(images[first]), said, paths["attention"])
    return [(title, paths[name]) for title, name in pictures.items()]
