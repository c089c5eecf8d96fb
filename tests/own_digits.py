"""Data modules as a user may write them: digits from a CSV of one's own, whose labels are not MNIST's."""

from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule

from thaw.data.images import Images, Source
from thaw.data.mnist import load_sample
from thaw.data.module import BatchSampler, ImageDataset, ImageLoader, MNISTDataModule


def write_csv(path: Path, classes: int, rows: int) -> None:
    """Digits of the bundled sample below `classes`, each labelled by what it lacks to the highest of them."""
    digits = load_sample("MNIST").train
    images, labels = digits.take(digits.labels < classes).take(slice(rows))
    np.savetxt(path, torch.cat([classes - 1 - labels[:, None], images.flatten(1)], dim=1).numpy(), "%d", delimiter=",")


def read_csv(path: str) -> Source:
    """The first fifth to test, the second to validate, the others to train."""
    with Path(path).open() as file:
        rows = torch.from_numpy(np.loadtxt(file, dtype=np.uint8, delimiter=","))
    images = Images(rows[:, 1:].reshape(-1, 28, 28), rows[:, 0].long())
    fifth = len(rows) // 5
    parts = (slice(2 * fifth, None), slice(fifth, 2 * fifth), slice(fifth))
    return Source(*map(images.take, parts), name="my CSV")


class CSVDigits(MNISTDataModule):
    """The short way: all but `load` is MNIST's."""

    def __init__(self, path: str, batch_size: int, eval_batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__("MNIST", "", "sample", None, None, batch_size, eval_batch_size, num_workers, seed)
        self.path = path

    def load(self) -> Source:
        if self.loaded is None:
            self.loaded = read_csv(self.path)
        return self.loaded


class PlainDigits(LightningDataModule):
    """A data module with what thaw asks for and nothing else; it names its classes."""

    def __init__(self, path: str, batch_size: int) -> None:
        super().__init__()
        self.path, self.batch_size = path, batch_size

    def load(self) -> Source:
        return read_csv(self.path)._replace(title="digits of my own", classes=["four", "three", "two", "one", "zero"])

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
