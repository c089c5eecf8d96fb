"""Accuracy under the corruptions of MNIST-C, CIFAR-10-C and ImageNet-C."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thaw.data.batches import evenly_spread
from thaw.data.images import Images
from thaw.evaluation import corruptions as c
from thaw.evaluation.corruptions import Corruption, corrupt
from thaw.predict.predictor import Predictor
from thaw.run.errors import UserError

CORRUPTED_AT_ONCE = 2**24  # values of images: 128 MiB in float64


Kinds = dict[
    str, tuple[Callable[..., Any], tuple[Any, ...]]
]  # a function and its levels for severity 1, 2, ..., by name


class CorruptionSet(NamedTuple):
    """The corruptions of a paper; `further` ones of its generator are no part of the set, and are chosen by name."""

    side: int  # of its images
    published: Kinds
    further: Kinds
    released: dict[str, int]  # the one severity of each corruption in the paper's files, if they have not all


IMAGENET: Kinds = {
    "gaussian_noise": (c.gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (c.shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (c.impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (c.defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (c.glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (c.motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (c.zoom_blur, ((0.01, 11), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))),
    "snow": (
        c.snow,
        (
            *((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7)),
            *((0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
        ),
    ),
    "fog": (c.fog, ((1.5, 2.0, 256), (2.0, 2.0, 256), (2.5, 1.7, 256), (2.5, 1.5, 256), (3.0, 1.4, 256))),
    "brightness": (c.brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (c.reduce_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (
        c.elastic_transform,
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": (c.pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (c.jpeg_compression, (25, 18, 15, 10, 7)),
}
CIFAR: Kinds = {
    "gaussian_noise": (c.gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (c.shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (c.impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (c.defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))),
    "glass_blur": (c.glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (c.motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (c.zoom_blur, ((0.01, 6), (0.01, 11), (0.01, 16), (0.01, 21), (0.01, 26))),
    "snow": (
        c.snow,
        (
            *((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9)),
            *((0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
        ),
    ),
    "fog": (c.fog, ((0.2, 3.0, 32), (0.5, 3.0, 32), (0.75, 2.5, 32), (1.0, 2.0, 32), (1.5, 1.75, 32))),
    "brightness": (c.brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (c.reduce_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        c.elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (c.pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (c.jpeg_compression, (80, 65, 58, 50, 40)),
}
MNIST: Kinds = {  # the levels of noise, blur, brightness and fog are ImageNet-C's
    "shot_noise": IMAGENET["shot_noise"],
    "impulse_noise": IMAGENET["impulse_noise"],
    "glass_blur": (partial(c.glass_blur, share=0.5), IMAGENET["glass_blur"][1]),
    "motion_blur": IMAGENET["motion_blur"],
    "shear": (c.shear, (0.2, 0.4, 0.6, 0.8, 1.0)),
    "scale": (c.scale, (0.9, 0.8, 0.7, 0.6, 0.5)),
    "rotate": (c.rotate, (0.2, 0.4, 0.6, 0.8, 1.0)),
    "brightness": IMAGENET["brightness"],
    "translate": (c.translate, (1, 2, 3, 4, 5)),
    "stripe": (c.stripe, (None,)),
    "fog": IMAGENET["fog"],
    "spatter": (
        c.spatter,
        (
            *((0.65, 0.3, 4, 0.69, 0.6), (0.65, 0.3, 3, 0.68, 0.6), (0.65, 0.3, 2, 0.68, 0.5)),
            *((0.65, 0.3, 1, 0.65, 1.5), (0.67, 0.4, 1, 0.65, 1.5)),
        ),
    ),
    "dotted_line": (c.dotted_line, (None,)),
    "zigzag": (c.zigzag, (None,)),
    "canny_edges": (c.canny_edges, (None,)),
}
BLUR: Kinds = {"gaussian_blur": (c.gaussian_blur, (1, 2, 3, 4, 6))}
SETS = {
    "mnist_c": CorruptionSet(
        28,
        MNIST,
        {**BLUR, "gaussian_noise": IMAGENET["gaussian_noise"], "contrast": IMAGENET["contrast"]},
        {"shot_noise": 5, "impulse_noise": 4, "glass_blur": 1, "motion_blur": 1, "shear": 2, "scale": 3}
        | {"rotate": 2, "brightness": 5, "translate": 3, "fog": 5, "spatter": 4},
    ),
    "cifar10_c": CorruptionSet(32, CIFAR, {"gaussian_blur": (c.gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0))}, {}),
    "imagenet_c": CorruptionSet(224, IMAGENET, BLUR, {}),
}


def choose_corruptions(wanted: str | Sequence[str], shape: Sequence[int]) -> tuple[str, dict[str, Corruption]]:
    """The corruptions of `robustness.corruptions` for images of a shape (C, H, W): their set's key, and each by name.

    Args:
        wanted: `auto`, a key of `SETS`, or names. A name means what it means in the set that `auto` chooses: MNIST-C
            for grey images of 28 pixels, CIFAR-10-C up to 64 pixels, else ImageNet-C; if it is not in that, in another.

    Raises:
        UserError: an unknown name.
    """
    fitting = "mnist_c" if tuple(shape) == (1, 28, 28) else "cifar10_c" if min(shape[1:]) <= 64 else "imagenet_c"
    if isinstance(wanted, str):
        key = fitting if wanted == "auto" else wanted
        return key, {name: Corruption(*given, SETS[key].side) for name, given in SETS[key].published.items()}
    known: dict[str, Corruption] = {}
    for chosen in (SETS[fitting], *SETS.values()):
        for name, given in (chosen.published | chosen.further).items():
            known.setdefault(name, Corruption(*given, chosen.side))
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(
            f"robustness.corruptions={','.join(unknown)} is unknown; allowed are auto, {', '.join(SETS)}, or a list of "
            f"{', '.join(sorted(known))}."
        )
    return "chosen", {name: known[name] for name in wanted}


def points(corruption: Corruption, severities: Sequence[int]) -> list[int]:
    """The severities at which a corruption is measured; 1 if it has none."""
    return sorted({*severities}) if len(corruption.levels) > 1 else [1]


def corrupted_example(test: Images, robustness: Mapping[str, Any]) -> dict[str, Tensor]:
    """The first image (C, H, W) under each corruption, at the middle one of its severities."""
    _, corruptions = choose_corruptions(robustness["corruptions"], test.images.shape[1:])
    harder = {}
    for name, corruption in corruptions.items():
        at = points(corruption, robustness["severities"])
        harder[name] = corrupt(test.images[:1], corruption, at[len(at) // 2], [0])[0]
    return harder


def number_corrupted(test: Images, robustness: Mapping[str, Any]) -> int:
    """How many images `robustness_facts` predicts."""
    _, corruptions = choose_corruptions(robustness["corruptions"], test.images.shape[1:])
    each = len(evenly_spread(len(test.labels), robustness["images"]))
    return each * sum(len(points(corruption, robustness["severities"])) for corruption in corruptions.values())


def robustness_facts(
    predictor: Predictor, test: Images, logits: Tensor, robustness: Mapping[str, Any], advance: Callable[[int], Any]
) -> dict[str, Any]:
    """Accuracies on corrupted images, as values of JSON.

    `logits` (N, K) are those of the uncorrupted images; `robustness` has `corruptions`, `severities` from 1 to 5 and
    `images`, how many are corrupted, None for all. Returns `curves` with a list of severity, 0 for none, and accuracy
    for each corruption; `means` of each over its severities; `mean` of these, the mean corruption accuracy, None
    without corruptions; and of a set whose files have one severity of each corruption, `released`, the mean at these.
    """
    key, corruptions = choose_corruptions(robustness["corruptions"], test.images.shape[1:])
    chosen = evenly_spread(len(test.labels), robustness["images"])
    parts = chosen.split(max(1, CORRUPTED_AT_ONCE // test.images[0].numel()))

    def accuracy(answers: Tensor) -> float:
        return float((answers.argmax(dim=1) == test.labels[chosen]).double().mean())

    curves = {name: [(0, accuracy(logits[chosen]))] for name in corruptions}
    for name, corruption in corruptions.items():
        for severity in points(corruption, robustness["severities"]):
            harder = (corrupt(test.images[part], corruption, severity, part.tolist()) for part in parts)
            answers = torch.cat([predictor.logits(images, advance) for images in harder])
            curves[name].append((severity, accuracy(answers)))
    means = {name: fmean(acc for _, acc in curve[1:]) for name, curve in curves.items()}
    facts = {"set": key, "images": len(chosen), "curves": curves, "means": means}
    facts["mean"] = fmean(means.values()) if means else None
    if key in SETS and (released := SETS[key].released):
        found = [acc for name, curve in curves.items() for at, acc in curve[1:] if at == released.get(name, 1)]
        facts |= {"released": fmean(found)} if len(found) == len(curves) else {}
    return facts
