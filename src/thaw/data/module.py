"""Images in three fixed splits, held as uint8 tensors.

A source of your own is a subclass of `ImageDataModule`, named by `data._target_`: a dataclass whose fields are its
settings, with the method `read() -> thaw.data.images.Source`. Any other LightningDataModule must offer

- `load() -> thaw.data.images.Source`, all images in their splits, for evaluation, export and probes;
- loaders that yield a `thaw.data.loader.Batch`, and for the cache of frozen features
  `split_dataset(split) -> thaw.data.loader.ImageDataset`.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor

from thaw.data.batches import evenly_spread
from thaw.data.corrections import correct
from thaw.data.few_labels import check_few_labels, keep_labels
from thaw.data.folds import FoldCount, check_fold, take_fold
from thaw.data.images import Images, Source, absent_classes, check_source
from thaw.data.loader import NOT_RESUMED, Batch, BatchSampler, ImageDataset, ImageLoader
from thaw.run.config import build
from thaw.run.console import say
from thaw.run.errors import UserError
from thaw.run.places import READ, keep_from_downloading, reads
from thaw.run.targets import import_target
from thaw.run.trainer_settings import check_interval
from thaw.run.values import Count, CountOrZero, Seed, check_types


@dataclass(kw_only=True, eq=False)
class ImageDataModule(LightningDataModule):
    """Images in three fixed splits; each source is a subclass with fields of its own and the method `read`.

    Args:
        reader: how predict.py and the server read a user's picture: `digit` by MNIST's rule, or `photo`.
        fold: validate on this fold of all images that are not tested on, and train on the others; None stands for the
            validation split of the source.
        folds: how many there are.
        exclude: a CSV file; training and validation images that it lists are left out, see `thaw.data.corrections`.
        relabel: a CSV file; training and validation images that it lists get its labels.
        train_size: only so many training images: the first ones, or evenly many of each class where they are sorted by
            class; None stands for all.
        labels_per_class: train on so many images of each class, and know no other label of training and validation;
            see `thaw.data.few_labels.keep_labels`. None stands for all.
        labels_draw: which images these are; does not depend on `seed`.
        batch_size: training images a step on each process.
        eval_batch_size: images a step in validation and test.
        num_workers: worker processes; 0 is the fastest, as images lie on the training device and a batch is one
            indexing operation there.
        class_weights: `balanced` weights the training loss of a class by its `shares`.
        sampler: `shuffled` takes every training image once in an epoch, `balanced` draws with replacement, all classes
            equally often.
        seed: of the order of the training images. The splits do not depend on it.
    """

    reader: Literal["digit", "photo"]
    fold: CountOrZero | None
    folds: FoldCount
    exclude: str | None
    relabel: str | None
    train_size: Count | None
    labels_per_class: Count | None
    labels_draw: CountOrZero
    batch_size: Count
    eval_batch_size: Count
    num_workers: CountOrZero
    class_weights: Literal["balanced"] | None
    sampler: Literal["shuffled", "balanced"]
    seed: Seed

    def __post_init__(self) -> None:
        super().__init__()
        check_fold(self.fold, self.folds)
        check_few_labels(self.labels_per_class, self.labels_draw, {"fold": self.fold, "train_size": self.train_size})
        self.loaded: Source | None = None
        self.names: dict[str, Sequence[str]] = {}  # of the files of the images that `read` returns, by split
        self.unreadable: Sequence[str] = ()  # names of the files that it leaves out
        self.datasets: dict[tuple[str, torch.device], ImageDataset] = {}
        self.train_loader: ImageLoader | None = None
        self.training_set: ImageDataset | None = None  # in place of the training split
        self.resume_at = NOT_RESUMED

    def read(self) -> Source:
        """The images of this source in their splits; called once.

        Raises:
            UserError: names the setting, file or array that cannot work; UserFileError one that cannot be read, and
                UnreachableError one that cannot be downloaded.
        """
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls this on one process only."""
        self.load()

    def setup(self, stage: str | None = None) -> None:
        self.load()

    def load(self) -> Source:
        """The images in their splits, read once.

        Raises:
            UserError: `train_size` is larger than the training split, or see `thaw.data.images.check_source`,
                `thaw.data.corrections.correct`, `thaw.data.folds.take_fold` and
                `thaw.data.few_labels.keep_labels`.
        """
        if self.loaded is None:
            source = self.read()
            check_source(source)
            if self.exclude is not None or self.relabel is not None:
                source = correct(source, self.names, self.unreadable, self.exclude, self.relabel)
            if self.fold is not None:
                source = take_fold(source, self.fold, self.folds)
            available = len(source.train.labels)
            if self.train_size is not None and self.train_size > available:
                raise UserError(
                    f"data.train_size={self.train_size} but the training split of {source.title} has "
                    f"{available:,} images; choose 1 to {available} or null for all."
                )
            if self.train_size is not None:
                by_class = bool((source.train.labels.diff() >= 0).all())
                which = evenly_spread(available, self.train_size) if by_class else slice(self.train_size)
                source = source._replace(train=source.train.take(which))
            if self.labels_per_class is not None:
                source = keep_labels(source, self.labels_per_class, self.labels_draw)
            for line in absent_classes(source):
                rank_zero_only(say)(line)
            self.loaded = source
        return self.loaded

    def shares(self) -> Tensor:
        """How rare each class is among the training images (K,): N / (number of classes n), 0 for a class without any.

        This is scikit-learn's `balanced`; its mean over the images is 1.

        Raises:
            UserError: images have several labels.
        """
        if self.load().train.labels.ndim == 2:
            raise UserError("data.class_weights and data.sampler=balanced are for one class an image; leave them out.")
        counts = torch.bincount(self.load().train.labels, minlength=len(self.load().classes))
        return torch.where(counts > 0, counts.sum() / ((counts > 0).sum() * counts), 0.0)

    def train_dataloader(self) -> ImageLoader:
        dataset = self.training_set or self.split_dataset("train")
        size = len(dataset)
        ranks = self.trainer.world_size if self.trainer else 1
        if self.batch_size * ranks > size:
            where = f" on each of {ranks} processes" if ranks > 1 else ""
            raise UserError(
                f"data.batch_size={self.batch_size}{where} is more than the {size:,} training images; "
                f"choose at most {size // ranks}."
            )
        self.train_loader = self.loader(dataset, self.batch_size, shuffle=True)
        if self.trainer:
            check_interval(self.trainer, len(self.train_loader))
        self.train_loader.load_state_dict(self.resume_at)
        self.resume_at = NOT_RESUMED  # a later fit starts afresh
        return self.train_loader

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave a batch alone that lies there already; Lightning's search through it takes 0.1 ms."""
        if isinstance(batch, Batch) and all(part is None or part.device == device for part in batch):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    # Lightning restores the loader's own state, but not if the optimizer's schedule has asked for the loader's length
    # before. So the position in the epoch is part of the data module's state.
    def state_dict(self) -> dict[str, int]:
        return self.train_loader.state_dict() if self.train_loader else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.resume_at = state_dict or NOT_RESUMED

    def val_dataloader(self) -> ImageLoader:
        if self.labels_per_class is not None:
            raise UserError(
                f"data.labels_per_class={self.labels_per_class} leaves no labels to validate on. Set "
                "trainer.limit_val_batches=0, as experiment=few_labels does: the last weights are the result."
            )
        return self.loader(self.split_dataset("val"), self.eval_batch_size, shuffle=False)

    def test_dataloader(self) -> ImageLoader:
        return self.loader(self.split_dataset("test"), self.eval_batch_size, shuffle=False)

    def split_dataset(self, split: str) -> ImageDataset:
        """The images of a split or of `pool`, on the training device if they fit and no workers fetch them."""
        device = torch.device("cpu")
        images, labels = getattr(self.load(), split)
        if self.trainer and self.num_workers == 0:
            device = self.trainer.strategy.root_device
            if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
                device = torch.device("cpu")  # each batch goes to the GPU on its own
        if (split, device) not in self.datasets:
            self.datasets[split, device] = ImageDataset(Images(images.to(device), labels.to(device)))
        return self.datasets[split, device]

    def train_on_pool(self) -> ImageDataset:
        """Let training batches come from the pool, whose labels and weights (zeros) are the caller's to fill in.

        Raises:
            UserError: the sampler is to draw by known labels.
        """
        if self.sampler == "balanced":
            raise UserError("data.sampler=balanced draws by known labels; pseudo-labels need data.sampler=shuffled.")
        images, labels = self.split_dataset("pool").data
        dataset = ImageDataset(Images(images, labels.clone()))
        dataset.weights = torch.zeros(len(labels), dtype=torch.float64)
        self.training_set = dataset
        return dataset

    def on_exception(self, exception: BaseException) -> None:
        """Drop cached features and soft targets after an exception; they belong to the run that failed."""
        for dataset in self.datasets.values():
            dataset.soft_targets = None
            dataset.drop_features()

    def loader(self, dataset: ImageDataset, batch_size: int, shuffle: bool) -> ImageLoader:
        if overfit := getattr(self.trainer, "overfit_batches", 0):  # Lightning would replace our sampler
            raise UserError(
                f"trainer.overfit_batches={overfit} is not supported; "
                f"to overfit, train on few images: data.train_size={self.batch_size}."
            )
        weights = dataset.weights if shuffle else None
        if shuffle and self.sampler == "balanced":
            weights = self.shares()[dataset.data.labels.cpu()]
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return ImageLoader(
            dataset,
            sampler=BatchSampler(dataset, batch_size, shuffle, self.seed, ranks, rank, weights),
            batch_size=None,  # the sampler yields whole batches of indices, nothing is collated
            num_workers=self.num_workers,
            pin_memory=self.num_workers > 0 and torch.cuda.is_available(),
        )


def count_classes(wanted: int | str, datamodule: Any) -> int:
    """The number of classes in the data, as far as the data module tells; `wanted` is `model.num_classes`.

    Raises:
        UserError: `wanted` is another number, or nothing tells.
    """
    found = len(datamodule.load().classes) if hasattr(datamodule, "load") else wanted
    if found == "auto":
        raise UserError(
            f"model.num_classes=auto takes the classes of the data, but {type(datamodule).__name__} has no load(); "
            "set model.num_classes."
        )
    if wanted not in ("auto", found):
        raise UserError(
            f"model.num_classes={wanted} but {datamodule.load().title} has {found} classes; leave it out or set "
            f"model.num_classes={found}."
        )
    return int(found)


def load_source(data: DictConfig, changes: Mapping[str, Any]) -> Source:
    """The splits of the data module that a checkpoint names, to test on.

    `data` is a block of its configuration and takes the changes: other values of some keys, e.g. `{"dir": "/data"}`.

    Raises:
        UserError: see `change_settings`, or the data module has no `load`.
        OSError: its files are gone or cannot be read.
    """
    change_settings(data, changes)
    if "dir" not in changes:
        keep_from_downloading(data)
    places = [key for key in READ if key.startswith("data.")]
    root: Any = data._get_root()
    if named := reads(root, places, [f"data.{key}" for key in changes]):
        say(f"reading {', '.join(named)}, as the checkpoint says")
    return read_splits(data)


def read_splits(data: DictConfig) -> Source:
    """The splits of the data module that a block describes; raises as `load_source`."""
    datamodule = build(data)
    if not hasattr(datamodule, "load"):
        raise UserError(
            f"data._target_={data._target_} has no method load() that returns a thaw.data.images.Source, from which "
            "a checkpoint is tested; see thaw.data.module."
        )
    if isinstance(datamodule, ImageDataModule):
        datamodule.train_size = None  # the training split of today's data may be smaller, and is not needed
    try:
        return datamodule.load()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The data that {data._target_} reads are gone: {error}. Put them back, or say where they lie by one of "
            f"its settings: {setting_names(data)}."
        ) from error


def second_source(block: Mapping[str, Any], cfg: DictConfig) -> Source:
    """The splits of another dataset than the one that `cfg`, a model's configuration, names.

    References in its block, as to `backbone.image_size`, are to `cfg`. Keys that are null and unknown to its data
    module are those that eval.yaml has for the checkpoint's data.
    """
    known = inspect.signature(import_target(block["_target_"])).parameters
    cfg = cfg.copy()
    cfg.data = {key: value for key, value in block.items() if value is not None or key in known or key == "_target_"}
    return read_splits(cfg.data)


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
