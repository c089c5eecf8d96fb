"""A dataset that takes a whole batch of indices at a time, the sampler that gives them, and a loader that resumes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from thaw.data.images import Images
from thaw.data.store import decoded_key, read_ahead

NOT_RESUMED = {"epoch": -1, "batches_done": 0}


class Batch(NamedTuple):
    """images uint8 (B, C, H, W), labels int64 (B,), indices int64 (B,) of the images in their split.

    features (B, ...): the cached output of the frozen part of the model, where there is a cache; images are then
        (B, 0), as reading them would cost more than all else.
    soft_targets (B, K): what teachers say of the images, where there are some; see `thaw.callbacks.soft_targets`.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    features: Tensor | None = None
    soft_targets: Tensor | None = None


class ImageDataset(Dataset[Batch]):
    """Images addressed by a whole batch of indices at a time, on the device that holds them.

    Attributes:
        features: (N, ...) of the frozen part of a model, or None.
        eval_batch_size: of validation and test, at least; pooled features need no small batches.
        weights: float64 (N,), in proportion to which a training epoch draws them with replacement, or None.
        soft_targets: (N, K) on the device of the labels, or None.
    """

    def __init__(self, data: Images) -> None:
        self.data = data
        self.is_mapped = decoded_key(data.images) is not None
        self.features: Tensor | None = None
        self.eval_batch_size = 1
        self.weights: Tensor | None = None
        self.soft_targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, indices: Tensor) -> Batch:
        if self.is_mapped:  # from the disk they are read in order; within a batch the order means nothing
            indices = indices.sort().values
        features = self.features  # index_select is several times as fast as indexing with a tensor
        if features is not None:
            features = features.index_select(0, indices.to(features.device))
        indices = indices.to(self.data.labels.device, non_blocking=True)
        images, labels = self.data
        labels = labels.index_select(0, indices)
        images = images.index_select(0, indices) if features is None else images.new_empty(len(labels), 0)
        soft_targets = None if self.soft_targets is None else self.soft_targets.index_select(0, indices)
        return Batch(images, labels, indices, features, soft_targets)

    def drop_features(self) -> None:
        """Take batches from the images again, as validation does in its own batch size."""
        self.features, self.eval_batch_size = None, 1

    def read_ahead(self, indices: Tensor) -> None:
        """Let the disk read what a batch will take, while the batch before it is used."""
        read_ahead(self.data.images if self.features is None else self.features, indices)


class BatchSampler(DistributedSampler):
    """Yields the index tensor of each of this rank's batches; a pure function of (seed, epoch, rank).

    Every epoch's order is cut into global batches of `batch_size * num_replicas` images and each of these among the
    ranks, so that every rank takes the same number of steps and no image is repeated or left out. (The parent pads
    by repeating images, which biases validation.) Lightning leaves a DistributedSampler in place and calls its
    `set_epoch`. With `weights` (N,) an epoch's images are drawn with replacement, in proportion to their weights.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        shuffle: bool,
        seed: int,
        num_replicas: int,
        rank: int,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.weights = weights
        self.least_size = batch_size
        self.num_images = len(dataset)  # type: ignore[arg-type]  # torch declares no length for a Dataset

    @property
    def batch_size(self) -> int:
        return self.least_size if self.shuffle else max(self.least_size, getattr(self.dataset, "eval_batch_size", 1))

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]  # the parent yields single indices
        order = torch.arange(self.num_images)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            if self.weights is None:
                order = torch.randperm(self.num_images, generator=generator)
            else:
                draws = torch.rand(self.num_images, dtype=torch.float64, generator=generator)
                order = torch.searchsorted(self.weights.double().cumsum(0) / self.weights.double().sum(), draws)
        batches = list(order.split(self.batch_size * self.num_replicas))  # one for each step of all ranks together
        if len(batches) > 1 and len(batches[-1]) < self.num_replicas:  # too few for each rank to get one
            batches[-2:] = [torch.cat(batches[-2:])]
        before: list[Tensor] = []  # the batch that is read already
        for batch in batches:
            own = batch.tensor_split(self.num_replicas)[self.rank]
            if isinstance(self.dataset, ImageDataset):
                self.dataset.read_ahead(own)
            yield from before
            before = [own]
        yield from before

    def __len__(self) -> int:
        full, rest = divmod(self.num_images, self.batch_size * self.num_replicas)
        return max(1, full + (rest >= self.num_replicas))


class ImageLoader(DataLoader):
    """A DataLoader whose position within the epoch can be saved, so that a run resumes at the next unseen batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches_done = self.next_batch = 0
        self.resume_at = NOT_RESUMED

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # the parent returns a class of its own
        resumed = self.resume_at["epoch"] == self.epoch
        self.batches_done = self.next_batch = self.resume_at["batches_done"] if resumed else 0
        self.resume_at = NOT_RESUMED  # the next pass is a whole one
        in_process = not self.num_workers  # where torch's iterator takes twice as long as the indexing
        for number, item in enumerate(self.sampler if in_process else super().__iter__()):
            if number < self.next_batch:
                continue
            self.batches_done = self.next_batch = number + 1
            yield self.dataset[item] if in_process else item

    @property
    def epoch(self) -> int:
        return self.sampler.epoch  # type: ignore[attr-defined]  # torch declares any sampler; this one is a BatchSampler

    def skip(self, batches: int) -> None:
        """Leave out the next batches."""
        self.next_batch += batches
        self.batches_done = self.next_batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batches_done": self.batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resume_at = state
