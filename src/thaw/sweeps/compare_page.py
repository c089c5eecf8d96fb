"""The page of a comparison: the answer, its picture and table, and where the policies differ."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from thaw.pages.html import write_page
from thaw.run.console import plural
from thaw.sweeps.cells import ABSENT
from thaw.sweeps.compare_answer import ComparisonAnswer, policy_cells
from thaw.sweeps.compare_pictures import save_agreements, save_class_accuracies, save_costs, save_tries
from thaw.sweeps.compare_results import Comparison, PolicyResult

MOST_DISPUTED = 24  # images
THUMBNAIL = 112  # pixels, the longest side of one
TEXT_COLUMNS = ("policy",)


@dataclass(frozen=True)
class DisputedImage:
    """A test image on which policies disagree, and who gives each answer, the right one first."""

    index: int  # its place in the test split
    png: bytes | None
    label: str
    answers: list[tuple[str, list[str]]]
    right: float  # share of the policies' models


def write_comparison_page(comparison: Comparison, answer: ComparisonAnswer) -> None:
    """Draw the pictures and write `report.html` into the comparison's folder."""
    folder, finished = comparison.folder, comparison.finished
    pictures = []
    shown, disputed = 0, list[DisputedImage]()
    if finished:
        tested = comparison.tested
        policies, split = (tested, "test accuracy") if tested else (finished, "validation accuracy")
        accuracies = [accuracy_and_interval(policy) for policy in policies]
        save_costs(policies, [answer.mark(policy) for policy in policies], accuracies, split, folder / "costs.png")
        pictures.append((f"{split.capitalize()} against what a policy costs", folder / "costs.png"))
    if save_tries(finished, folder / "learning_rates.png"):
        pictures.append(("The learning rates that were tried", folder / "learning_rates.png"))
    if len(comparison.tested) > 1:
        shown = save_class_accuracies(comparison, folder / "class_accuracy.png")
        save_agreements(comparison, folder / "agreement.png")
        disputed = find_disputed(comparison)
    cells = [policy_cells(answer, policy) for policy in finished]
    titles = list(cells[0]) if cells else []
    write_page(
        folder / "report.html",
        "comparison.html",
        title=f"What to thaw: {comparison.data or folder.name}",
        answer=answer,
        facts=describe_comparison(comparison),
        pictures=pictures,
        columns=[(title, title in TEXT_COLUMNS) for title in ["", *titles]],
        rows=[[(answer.mark(policy), None), *row.values()] for policy, row in zip(finished, cells, strict=True)],
        marks=[answer.mark(policy) for policy in finished],
        warnings=comparison.warnings,
        classes=(shown, len(comparison.classes)),
        class_accuracy=folder / "class_accuracy.png",
        agreement=folder / "agreement.png",
        disputed=disputed,
    )


def accuracy_and_interval(policy: PolicyResult) -> tuple[float, float, float]:
    """Test accuracy with its 95 % interval; of an untested policy that of validation, lowest and highest seed."""
    if policy.test_acc is not None and policy.test_interval:
        return policy.test_acc, *policy.test_interval
    assert policy.val
    seeds = [run.val_acc for run in policy.group.done if run.val_acc is not None]
    return policy.val[0], min(seeds), max(seeds)


def describe_comparison(comparison: Comparison) -> list[tuple[str, str]]:
    """Name and text of each fact that holds for all policies."""
    budget = comparison.budget
    units = {"tries": "learning rate", "seeds": "seed", "epochs": "epoch", "images": "image"}
    parts = [plural(budget[key], noun) for key, noun in units.items() if isinstance(budget.get(key), int)]
    facts = {
        "data": comparison.data,
        "test images": f"{len(comparison.labels):,}" if comparison.tested else ABSENT,
        "budget of each policy": ", ".join(parts),
        "typed": " ".join(comparison.typed),
        "folder": str(comparison.folder),
    }
    return [(name, text) for name, text in facts.items() if text]


def find_disputed(comparison: Comparison) -> list[DisputedImage]:
    """The test images with the most even split of right and wrong policies; those with more different answers first."""
    tested = comparison.tested
    shares = np.mean([policy.right / len(policy.predictions) for policy in tested], axis=0)  # (N,)
    answers = np.stack([each.answers for policy in tested for each in policy.predictions], axis=1)  # (N, models)
    variety = (np.diff(np.sort(answers, axis=1), axis=1) != 0).sum(axis=1)  # different answers but one
    order = np.lexsort((-variety, np.abs(shares - 0.5)))
    chosen = [place for place in order[:MOST_DISPUTED].tolist() if 0 < shares[place] < 1]
    indices = tested[0].predictions[0].indices[chosen]
    pngs = thumbnails(comparison, indices.tolist())
    return [
        DisputedImage(
            int(index),
            png,
            comparison.classes[comparison.labels[place]],
            who_answers(comparison, place),
            float(shares[place]),
        )
        for place, index, png in zip(chosen, indices, pngs, strict=True)
    ]


def who_answers(comparison: Comparison, place: int) -> list[tuple[str, list[str]]]:
    """Each answer to a test image with the policies that give it, the right one first, then the most frequent."""
    found: dict[int, list[str]] = {int(comparison.labels[place]): []}
    for policy in comparison.tested:
        said = [int(each.answers[place]) for each in policy.predictions]
        for answer in dict.fromkeys(said):
            part = "" if said.count(answer) == len(said) else f" {said.count(answer)}/{len(said)}"
            found.setdefault(answer, []).append(policy.name + part)
    (right, *rest) = found.items()
    rest.sort(key=lambda each: -len(each[1]))
    return [(comparison.classes[answer], names) for answer, names in (right, *rest)]


def thumbnails(comparison: Comparison, indices: Sequence[int]) -> list[bytes | None]:
    """Test images as small PNG files, None for all if the data cannot be read any more, which becomes a warning."""
    from thaw.data.module import load_source
    from thaw.evaluation.pictures import on_paper
    from thaw.run.resume import read_config

    path = comparison.tested[0].group.done[0].folder / "config.yaml"
    try:
        config, _ = read_config(path, [])
        source = load_source(config.data, {})
        images = on_paper(source.test.images[list(indices)], config.data.get("reader", "photo"))
    except Exception as error:  # a page without thumbnails is better than none
        comparison.warnings.append(f"The images are not shown, as the data cannot be read: {error}")
        return [None] * len(indices)
    return [as_png(image.numpy()) for image in images]


def as_png(image: np.ndarray) -> bytes:
    """A small PNG of an image, uint8 (C, H, W), grey or RGB."""
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
