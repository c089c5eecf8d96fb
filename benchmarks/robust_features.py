"""How robust the features of digits backbones are.    python -m benchmarks.robust_features FILE... --ckpt RUN...

A logistic regression on features of clean training images answers for each file of weights, whose C validation chooses;
a run answers for itself. Both are measured on clean images, on each corruption of MNIST-C and on six plain corruptions
at five strengths each. Of a split's images, `--images` are corrupted, a fifth of them at each severity. `--overrides`
change probe.py's configuration, e.g. data.dir=/data or backbone.arguments.patch_size=4. Prints Markdown; a file takes
about a minute on one core.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from benchmarks.speed.measure import ROOT
from thaw.data.batches import by_batches, evenly_spread
from thaw.data.images import Images, Source
from thaw.data.preprocess import Preprocess
from thaw.evaluation.corruptions import corrupt
from thaw.evaluation.probes import Labelled, logistic_regression
from thaw.evaluation.robustness import choose_corruptions
from thaw.predict.predictor import load_predictor
from thaw.run.config import settle
from thaw.run.console import lenient, quiet_libraries, say

Answer = Callable[[Tensor], Tensor]  # images uint8 (N, C, H, W) -> classes (N,)
MEANS = ("MNIST-C, mean", "plain, mean")
PLAIN_STRENGTHS = {
    "rotation": (15, 30, 45, 60, 90),  # degrees, left and right
    "translation": (1, 2, 3, 4, 6),  # pixels, in four directions
    "scale": (0.5, 0.7, 0.85, 1.15, 1.3),
    "noise": (0.1, 0.2, 0.3, 0.5, 0.8),  # standard deviation of a Gaussian, full brightness is 1
    "blur": (0.5, 1.0, 1.5, 2.0, 3.0),  # standard deviation, pixels
    "contrast": (0.7, 0.5, 0.3, 0.15, 0.05),  # the share that is left
}


def plain(name: str, images: Tensor, strength: float) -> Tensor:
    """Images uint8 (N, C, H, W) under one of `PLAIN_STRENGTHS`."""

    def affine(part: Tensor, angle: float = 0.0, shift: tuple[int, int] = (0, 0), scale: float = 1.0) -> Tensor:
        return transforms.affine(part, angle, list(shift), scale, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR)

    if name == "scale":
        return affine(images, scale=strength)
    if name == "contrast":
        return transforms.adjust_contrast(images, strength)
    if name == "blur":
        side = 2 * round(3 * strength) + 1
        return transforms.gaussian_blur(images.float(), [side, side], [strength] * 2).round().to(torch.uint8)
    if name == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return (images + 255 * strength * noise).round().clamp(0, 255).to(torch.uint8)
    length, changed = int(strength), torch.empty_like(images)
    ways: list[dict[str, Any]] = [{"angle": strength}, {"angle": -strength}]
    if name == "translation":
        ways = [{"shift": shift} for shift in ((length, 0), (-length, 0), (0, length), (0, -length))]
    for number, way in enumerate(ways):
        changed[number :: len(ways)] = affine(images[number :: len(ways)], **way)
    return changed


def corrupted(images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names of corruptions, and the images (N, 1, 28, 28) under each; each severity has a share of the images."""
    for name, corruption in choose_corruptions("mnist_c", images.shape[1:])[1].items():
        result, severities = torch.empty_like(images), len(corruption.levels)
        for severity in range(severities):
            places = range(severity, len(images), severities)
            result[severity::severities] = corrupt(images[severity::severities], corruption, severity + 1, places)
        yield name, result
    for name, strengths in PLAIN_STRENGTHS.items():
        result = torch.empty_like(images)
        for number, strength in enumerate(strengths):
            result[number :: len(strengths)] = plain(name, images[number :: len(strengths)], strength)
        yield f"plain {name}", result


def composed(overrides: list[str]) -> DictConfig:
    """probe.py's configuration."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("probe", ["name=probe", "run_dir=unused", "overrides=unused", *overrides])
    settle(cfg)
    return cfg


def probe(path: str, overrides: list[str], source: Source, train_size: int) -> Answer:
    """A logistic regression on the features of a file's weights, `bundled` for the bundled ones."""
    weights = path if path == "bundled" else Path(path).resolve()
    backbone = instantiate(composed([*overrides, f"backbone.weights='{weights}'"]).backbone).eval()
    preprocess = Preprocess(backbone.image_size, backbone.channels, backbone.mean, backbone.std)

    def features(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return by_batches(lambda batch: backbone(preprocess(batch)), images).float()  # (N, D)

    def labelled(images: Images, most: int) -> Labelled:
        part = images.take(evenly_spread(len(images.labels), most))
        return Labelled(features(part.images), part.labels)

    train, val = labelled(source.train, train_size), labelled(source.val, 2000)
    choice = logistic_regression(train, val, C=[1e-2, 1e-1, 1], fixed_C=1e-1, max_iterations=300, tolerance=1e-4)
    return lambda images: choice.predict(features(images))


def fine_tuned(ckpt: str) -> Answer:
    """What the best checkpoint of a run answers."""
    predictor = load_predictor(ckpt, accelerator="cpu")
    return lambda images: predictor.logits(images).argmax(dim=1)


def measure(answer: Answer, clean: Images) -> dict[str, float]:
    """Accuracies by name of the corruption, and the means."""
    images = {"clean": clean.images, **dict(corrupted(clean.images))}
    found = {name: float((answer(x) == clean.labels).double().mean()) for name, x in images.items()}
    plain_names = [f"plain {name}" for name in PLAIN_STRENGTHS]
    published = [name for name in found if name != "clean" and name not in plain_names]
    means = {MEANS[0]: published, MEANS[1]: plain_names}
    return found | {mean: sum(found[name] for name in names) / len(names) for mean, names in means.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure accuracy on corrupted digits.")
    parser.add_argument("files", nargs="*", help="weights of a backbone: .safetensors files, or bundled")
    parser.add_argument("--ckpt", nargs="*", default=[], help="fine-tuned runs or checkpoints")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--images", type=int, default=2000, help="of the split, evenly spread")
    parser.add_argument("--train-size", type=int, default=20_000, help="training images of the regression")
    parser.add_argument("--overrides", nargs="*", default=[], help="of probe.py's configuration: data.dir=/data")
    arguments = parser.parse_args()
    quiet_libraries()
    source = instantiate(composed(arguments.overrides).data).load()
    split: Images = getattr(source, arguments.split)
    clean = split.take(evenly_spread(len(split.labels), arguments.images))
    columns: dict[str, dict[str, float]] = {}
    for path in [*arguments.files, *arguments.ckpt]:
        tuned = path in arguments.ckpt
        answer = fine_tuned(path) if tuned else probe(path, arguments.overrides, source, arguments.train_size)
        found = columns[path] = measure(answer, clean)
        say(f"{path}: " + ", ".join(f"{name} {found[name]:.2%}" for name in ("clean", *MEANS)))
    print("\n| " + " | ".join(["accuracy in %", *columns]) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name in next(iter(columns.values()), ()):
        print(f"| {name} | " + " | ".join(f"{100 * column[name]:.2f}" for column in columns.values()) + " |")


if __name__ == "__main__":
    with lenient():
        main()
