"""Data modules as a user may write them: digits from a CSV of one's own, whose labels are not MNIST's."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule

from thaw.data.images import Images, Source
from thaw.data.loader import BatchSampler, ImageDataset, ImageLoader
from thaw.data.mnist import load_sample
from thaw.data.module import ImageDataModule

CLASSES = ["four", "three", "two", "one", "zero"]  # in the order of the labels


def write_csv(path: Path, classes: int, rows: int) -> None:
    """Digits of the bundled sample below `classes`, each labelled by what it lacks to the highest of them."""
    digits = load_sample("MNIST").train
    images, labels = digits.take(digits.labels < classes).take(slice(rows))
    np.savetxt(path, torch.cat([classes - 1 - labels[:, None], images.flatten(1)], dim=1).numpy(), "%d", delimiter=",")


def read_csv(path: str) -> Source:
    """The first fifth to test, the second to validate, the others to train."""
    with Path(path).open() as file:
        rows = torch.from_numpy(np.loadtxt(file, dtype=np.uint8, delimiter=","))
    images = Images(rows[:, 1:].reshape(-1, 1, 28, 28), rows[:, 0].long())
    fifth = len(rows) // 5
    parts = (slice(2 * fifth, None), slice(fifth, 2 * fifth), slice(fifth))
    return Source(*map(images.take, parts), classes=CLASSES, name="own digits", origin="my CSV")


@dataclass(kw_only=True, eq=False)
class CSVDigits(ImageDataModule):
    """The short way: settings as fields, and `read`."""

    path: str

    def read(self) -> Source:
        return read_csv(self.path)


class PlainDigits(LightningDataModule):
    """A data module with what thaw asks for and nothing else."""

    def __init__(self, path: str, batch_size: int) -> None:
        super().__init__()
        self.path, self.batch_size = path, batch_size

    def load(self) -> Source:
        return read_csv(self.path)._replace(origin="digits of my own")

    def loader(self, split: str, shuffle: bool) -> ImageLoader:
        dataset = ImageDataset(getattr(self.load(), split))
        sampler = BatchSampler(dataset, self.batch_size, shuffle, seed=0, num_replicas=1, rank=0)
        return ImageLoader(dataset, sampler=sampler, batch_size=None)

    def train_dataloader(self) -> ImageLoader:
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> ImageLoader:
        return self.loader("val", shuffle=False)

    def test_dataloader(self) -> ImageLoader:
        return self.loader("test", shuffle=False)
