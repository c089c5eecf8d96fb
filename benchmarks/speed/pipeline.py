"""Rows of the input: augmented batches of decoded images per second, beside torchvision's transforms of tensors."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.speed.measure import ROOT, Bench, Row, rates, seconds_of
from thaw.data.augment import Augment
from thaw.data.images import Images
from thaw.data.loader import ImageDataset

FFCV = (  # https://docs.ffcv.io/benchmarks.html, read in November 2026
    "ffcv's published figure: 172,801 images/s on all cores of an AWS p3dn.24xlarge (raw images of 256 px, from memory)"
)


class Pictures(Dataset[Tensor]):
    """One transformed picture at a time, of decoded ones uint8 (N, C, H, W)."""

    def __init__(self, images: Tensor, transform: v2.Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index])


def augmented(bench: Bench) -> list[Row]:
    """Affine maps of digits; random resized and padded crops with flips of photographs."""
    smooth = v2.InterpolationMode.BILINEAR
    affine = v2.RandomAffine(10, (0.07, 0.07), (0.9, 1.1), interpolation=smooth)
    flip = v2.RandomHorizontalFlip()
    crop = v2.Compose([v2.RandomResizedCrop(224, antialias=True), flip])
    pad = v2.Compose([v2.RandomCrop(32, padding=4), flip])
    cases = [
        ("affine maps, 1 x 28 x 28", (20000, 1, 28, 28), 512, affine, load_augment("affine")),
        (
            "padded crops and flips, 3 x 32 x 32",
            (20480, 3, 32, 32),
            512,
            pad,
            load_augment("padded", padding_mode="constant"),
        ),
        (
            "random resized crops and flips, 3 x 224 x 224",
            (1024, 3, 224, 224),
            64,
            crop,
            load_augment("none", flip=0.5, crop_area=0.08),
        ),
    ]
    return [case(bench, *each) for each in cases]


def case(bench: Bench, name: str, shape: tuple[int, ...], batch: int, transform: v2.Transform, augment: Augment) -> Row:
    """A draw for each image: torchvision's in two workers, thaw's on whole batches. Torchvision's own form for batches
    makes one draw for all their images, which is less work.
    """
    images = torch.randint(256, (shape[0] // (8 if bench.quick else 1), *shape[1:]), dtype=torch.uint8)
    data, order = ImageDataset(Images(images, torch.zeros(len(images)))), torch.randperm(len(images)).split(batch)
    workers = DataLoader(Pictures(images, transform), batch, shuffle=True, num_workers=2, persistent_workers=True)
    for _ in workers:  # starts them
        pass
    each, whole, ours = rates(
        bench.rounds,
        lambda: len(images) / seconds_of(lambda: [None for _ in workers]),
        lambda: len(images) / seconds_of(lambda: [transform(images[part]) for part in order]),
        lambda: len(images) / seconds_of(lambda: [augment(data[part].images) for part in order]),
    )
    other = f"v2 on tensors, 2 workers: {each:,.0f} (one draw a batch: {whole:,.0f})"
    if shape[-1] == 224:
        other += f"; {FFCV}"
    return Row(f"{name}, images/s", other, f"{ours:,.0f}", f"{ours / each:.2f}", "", "")


def load_augment(name: str, **changes: Any) -> Augment:
    folder = Path(ROOT, "configs", "augment")
    config = OmegaConf.merge(*(OmegaConf.load(folder / f"{file}.yaml") for file in ("none", name)), changes)
    settings = OmegaConf.to_container(config)
    assert isinstance(settings, dict)
    return Augment(**{str(key): value for key, value in settings.items() if key not in ("defaults", "_target_")})
