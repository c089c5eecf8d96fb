"""Batches of images: fixed splits held as uint8 tensors, each batch taken by one indexing operation.

Other data than MNIST's need a data module of their own, named by `data._target_`. The short way is a subclass of
`MNISTDataModule` that overrides `load`. Any other LightningDataModule must offer

- `load() -> thaw.data.images.Source`, all images in their splits, for evaluation, export and probes;
- loaders that yield a `Batch`, and for the cache of frozen features `split_dataset(split) -> ImageDataset`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import torch
from lightning import LightningDataModule
from omegaconf import DictConfig
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from thaw.data.images import Images, Source
from thaw.data.mnist import load_mnist
from thaw.run.config import build
from thaw.run.errors import UserError
from thaw.run.values import Count, Seed, check_types

MirrorURL: TypeAlias = Annotated[str, Field(pattern="://", description="a URL such as https://example.org/mnist")]
NOT_RESUMED = {"epoch": -1, "batches_done": 0}


class Batch(NamedTuple):
    """images uint8 (B, 28, 28), labels int64 (B,), indices int64 (B,) of the images in their split.

    features (B, ...): the cached output of the frozen part of the model, where there is a cache.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    features: Tensor | None = None


class ImageDataset(Dataset[Batch]):
    """Images addressed by a whole batch of indices at a time, on the device that holds them.

    Attributes:
        features: (N, ...) of the frozen part of a model, or None.
    """

    def __init__(self, data: Images) -> None:
        self.data = data
        self.features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, indices: Tensor) -> Batch:
        features = self.features  # index_select is several times as fast as indexing with a tensor
        if features is not None:
            features = features.index_select(0, indices.to(features.device))
        indices = indices.to(self.data.labels.device, non_blocking=True)
        images, labels = (part.index_select(0, indices) for part in self.data)
        return Batch(images, labels, indices, features)


class BatchSampler(DistributedSampler):
    """Yields the index tensor of each of this rank's batches; a pure function of (seed, epoch, rank).

    Every epoch's order is cut into global batches of `batch_size * num_replicas` images and each of these among the
    ranks, so that every rank takes the same number of steps and no image is repeated or left out. (The parent pads
    by repeating images, which biases validation.) Lightning leaves a DistributedSampler in place and calls its
    `set_epoch`.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, shuffle: bool, seed: int, num_replicas: int, rank: int
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.batch_size = batch_size
        self.num_images = len(dataset)  # type: ignore[arg-type]  # torch declares no length for a Dataset

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]  # the parent yields single indices
        order = torch.arange(self.num_images)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.num_images, generator=generator)
        batches = list(order.split(self.batch_size * self.num_replicas))  # one for each step of all ranks together
        if len(batches) > 1 and len(batches[-1]) < self.num_replicas:  # too few for each rank to get one
            batches[-2:] = [torch.cat(batches[-2:])]
        for batch in batches:
            yield batch.tensor_split(self.num_replicas)[self.rank]

    def __len__(self) -> int:
        full, rest = divmod(self.num_images, self.batch_size * self.num_replicas)
        return max(1, full + (rest >= self.num_replicas))


class ImageLoader(DataLoader):
    """A DataLoader whose position within the epoch can be saved, so that a run resumes at the next unseen batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches_done = 0
        self.resume_at = NOT_RESUMED

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        resumed = self.resume_at["epoch"] == self.sampler.epoch  # type: ignore[attr-defined]
        skip = self.resume_at["batches_done"] if resumed else 0
        self.resume_at = NOT_RESUMED  # the next pass is a whole one
        self.batches_done = skip
        for number, batch in enumerate(super().__iter__()):
            if number < skip:  # costs one indexing operation
                continue
            self.batches_done = number + 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "batches_done": self.batches_done}  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resume_at = state


class MNISTDataModule(LightningDataModule):
    """MNIST, or another dataset of the same files, in three fixed splits.

    Args:
        dataset, dir, source, mirrors: see `thaw.data.mnist.load_mnist`.
        train_size: use only the first so many training images; None stands for all.
        batch_size: training images a step on each process.
        eval_batch_size: images a step in validation and test.
        num_workers: worker processes; 0 is the fastest, as images lie on the training device and a batch is one
            indexing operation there.
        seed: of the order of the training images. The splits do not depend on it.
    """

    def __init__(
        self,
        dataset: Literal["MNIST", "FashionMNIST", "KMNIST"],
        dir: str,
        source: Literal["auto", "official", "sample"],
        mirrors: Sequence[MirrorURL] | None,
        train_size: Count | None,
        batch_size: Count,
        eval_batch_size: Count,
        num_workers: Annotated[int, Field(ge=0)],
        seed: Seed,
    ) -> None:
        super().__init__()
        self.dataset, self.dir, self.source, self.mirrors = dataset, dir, source, mirrors
        self.train_size, self.batch_size, self.eval_batch_size = train_size, batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.loaded: Source | None = None
        self.datasets: dict[tuple[str, torch.device], ImageDataset] = {}
        self.train_loader: ImageLoader | None = None
        self.resume_at = NOT_RESUMED

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls this on one process only."""
        self.load()

    def setup(self, stage: str | None = None) -> None:
        if self.trainer and self.trainer.world_size > 1:  # all ranks take rank 0's choice, official files or sample
            source: Any = self.trainer.strategy.broadcast(self.load().name if self.trainer.is_global_zero else "")
            if self.loaded is None:
                self.source = source
        self.load()

    def load(self) -> Source:
        """The images in their splits, read once."""
        if self.loaded is None:
            source = load_mnist(self.dataset, self.dir, self.source, self.mirrors)
            available = len(source.train.labels)
            if self.train_size is not None and self.train_size > available:
                raise UserError(
                    f"data.train_size={self.train_size} but the training split of the {source.name} data has "
                    f"{available:,} images; choose 1 to {available} or null for all."
                )
            self.loaded = source._replace(train=source.train.take(slice(self.train_size)))
        return self.loaded

    def train_dataloader(self) -> ImageLoader:
        size = len(self.split_dataset("train"))
        ranks = self.trainer.world_size if self.trainer else 1
        if self.batch_size * ranks > size:
            where = f" on each of {ranks} processes" if ranks > 1 else ""
            raise UserError(
                f"data.batch_size={self.batch_size}{where} is more than the {size:,} training images; "
                f"choose at most {size // ranks}."
            )
        self.train_loader = self.loader("train", self.batch_size, shuffle=True)
        self.train_loader.load_state_dict(self.resume_at)
        self.resume_at = NOT_RESUMED  # a later fit starts afresh
        return self.train_loader

    # Lightning restores the loader's own state, but not if the optimizer's schedule has asked for the loader's length
    # before. So the position in the epoch is part of the data module's state.
    def state_dict(self) -> dict[str, int]:
        return self.train_loader.state_dict() if self.train_loader else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.resume_at = state_dict or NOT_RESUMED

    def val_dataloader(self) -> ImageLoader:
        return self.loader("val", self.eval_batch_size, shuffle=False)

    def test_dataloader(self) -> ImageLoader:
        return self.loader("test", self.eval_batch_size, shuffle=False)

    def split_dataset(self, split: str) -> ImageDataset:
        """The images of `train`, `val` or `test`, on the training device unless worker processes fetch them."""
        device = torch.device("cpu")
        if self.trainer and self.num_workers == 0:
            device = self.trainer.strategy.root_device
        if (split, device) not in self.datasets:
            images, labels = getattr(self.load(), split)
            self.datasets[split, device] = ImageDataset(Images(images.to(device), labels.to(device)))
        return self.datasets[split, device]

    def on_exception(self, exception: BaseException) -> None:
        """Drop cached features after an exception; they belong to the model that failed."""
        for dataset in self.datasets.values():
            dataset.features = None

    def loader(self, split: str, batch_size: int, shuffle: bool) -> ImageLoader:
        if overfit := getattr(self.trainer, "overfit_batches", 0):  # Lightning would replace our sampler
            raise UserError(
                f"trainer.overfit_batches={overfit} is not supported; "
                f"to overfit, train on few images: data.train_size={self.batch_size}."
            )
        dataset = self.split_dataset(split)
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return ImageLoader(
            dataset,
            sampler=BatchSampler(dataset, batch_size, shuffle, self.seed, num_replicas=ranks, rank=rank),
            batch_size=None,  # the sampler yields whole batches of indices, nothing is collated
            num_workers=self.num_workers,
            pin_memory=self.num_workers > 0 and torch.cuda.is_available(),
        )


def check_classes(num_classes: int, datamodule: Any) -> None:
    """Refuse a model with another number of classes than the data has, as far as the data module tells.

    Raises:
        UserError: names both numbers.
    """
    if not hasattr(datamodule, "load"):
        return
    source = datamodule.load()
    found = len(source.classes) or int(source.train.labels.max()) + 1  # unnamed classes
    if found > num_classes or (source.classes and found < num_classes):
        raise UserError(
            f"model.num_classes={num_classes} but the data has {found} classes; set model.num_classes={found}."
        )


def load_source(data: DictConfig, changes: Mapping[str, Any]) -> Source:
    """The splits of the data module that a checkpoint names, to test on.

    `data` is a block of its configuration and takes the changes: other values of some keys, e.g. `{"dir": "/data"}`.

    Raises:
        UserError: see `change_settings`, or the data module has no `load`.
        OSError: its files are gone or cannot be read.
    """
    change_settings(data, changes)
    datamodule = build(data)
    if not hasattr(datamodule, "load"):
        raise UserError(
            f"data._target_={data._target_} has no method load() that returns a thaw.data.images.Source, from which "
            "a checkpoint is tested; see thaw.data.datamodule."
        )
    if isinstance(datamodule, MNISTDataModule):
        datamodule.train_size = None  # the training split of today's data may be smaller, and is not needed
    try:
        return datamodule.load()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The data that {data._target_} reads are gone: {error}. Put them back, or say where they lie by one of "
            f"its settings: {setting_names(data)}."
        ) from error


def change_settings(data: DictConfig, changes: Mapping[str, Any]) -> None:
    """Change settings of a checkpoint's data module in place.

    Raises:
        UserError: it has no such setting, or does not allow the value, or would not read the folder.
    """
    if unknown := [key for key in changes if key not in data]:
        raise UserError(
            f"data.{unknown[0]}={changes[unknown[0]]}: the checkpoint's data module {data._target_} has no such "
            f"setting; it has {setting_names(data)}."
        )
    if changes.get("dir") and "source" not in changes and data.get("source") == "sample":
        raise UserError(
            f"data.dir={changes['dir']} would not be read: the checkpoint's run took the bundled sample. Add "
            "data.source=official, or leave data.dir out."
        )
    data.merge_with(changes)
    check_types(data, "data.")


def setting_names(data: DictConfig) -> str:
    """The keys of a data module, for a message."""
    return ", ".join(f"data.{key}" for key in map(str, data) if key != "_target_")
