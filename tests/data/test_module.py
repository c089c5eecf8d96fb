"""Batches against a count of every image, against a single process, and inside Lightning's own loop."""

import os
import re
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from conftest import compose_config
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from small_models import mnist_data
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from thaw.data.images import Images
from thaw.data.loader import Batch, BatchSampler, ImageDataset, ImageLoader
from thaw.data.mnist import OFFICIAL, SAMPLE, MNISTData, load_mnist
from thaw.data.module import count_classes, load_source


def datamodule(**changes: Any) -> MNISTData:
    return mnist_data(**{"train_size": 45, "batch_size": 10, "eval_batch_size": 120, **changes})


def sampler(n: int, batch_size: int, ranks: int = 1, rank: int = 0, seed: int = 0, epoch: int = 0) -> BatchSampler:
    built = BatchSampler(range(n), batch_size, shuffle=True, seed=seed, num_replicas=ranks, rank=rank)
    built.set_epoch(epoch)
    return built


def loader(n: int, batch_size: int, num_workers: int = 0) -> ImageLoader:
    """Images whose every pixel is their label, 10 labels."""
    labels = torch.arange(n) % 10
    images = labels.to(torch.uint8)[:, None, None, None].expand(n, 1, 28, 28)
    return ImageLoader(
        ImageDataset(Images(images, labels)), sampler=sampler(n, batch_size), batch_size=None, num_workers=num_workers
    )


def order(built: Any) -> list[int]:
    return torch.cat([item if isinstance(item, Tensor) else item.indices for item in built]).tolist()


# The order of one epoch


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 3), st.booleans())
def test_every_image_once_on_all_ranks_together(n: int, batch_size: int, ranks: int, shuffle: bool) -> None:
    each = [BatchSampler(range(n), batch_size, shuffle, 0, ranks, rank) for rank in range(ranks)]
    batches = [list(one) for one in each]
    assert {len(one) for one in each} == {len(one) for one in batches} == {len(batches[0])}  # in step, and len() right
    seen = torch.cat([torch.cat(one) for one in batches])
    assert sorted(seen.tolist()) == list(range(n))
    sizes = [len(batch) for one in batches for batch in one]
    assert max(sizes) <= batch_size + 1  # one more where a remainder smaller than the ranks joins the last step
    if n >= ranks:
        assert min(sizes) >= 1


@settings(deadline=None)
@given(st.integers(3, 100), st.integers(1, 6), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3))
def test_ranks_share_the_batches_of_one_process(n: int, batch_size: int, ranks: int, seed: int, epoch: int) -> None:
    steps = zip(*(sampler(n, batch_size, ranks, rank, seed, epoch) for rank in range(ranks)), strict=True)
    together = [torch.cat(step).tolist() for step in steps]
    alone = [batch.tolist() for batch in sampler(n, batch_size * ranks, seed=seed, epoch=epoch)]
    if 0 < n % (batch_size * ranks) < ranks and len(alone) > 1:  # too few for a step of all ranks
        alone[-2:] = [alone[-2] + alone[-1]]
    assert together == alone


def test_order_is_a_function_of_seed_and_epoch() -> None:
    places = [(seed, epoch) for seed in range(3) for epoch in range(3)]
    orders = [order(sampler(1000, 100, seed=seed, epoch=epoch)) for seed, epoch in places]
    assert len(set(map(tuple, orders))) == 9
    torch.manual_seed(99)  # nothing global counts
    assert [order(sampler(1000, 100, seed=seed, epoch=epoch)) for seed, epoch in places] == orders


def test_without_shuffle_the_order_is_the_stored_one() -> None:
    built = BatchSampler(range(10), 4, shuffle=False, seed=5, num_replicas=1, rank=0)
    built.set_epoch(3)
    assert [batch.tolist() for batch in built] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


# Loading


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_hold_what_their_indices_say(num_workers: int) -> None:
    batches = list(loader(25, 10, num_workers))
    assert [len(batch.labels) for batch in batches] == [10, 10, 5]
    for batch in batches:
        assert isinstance(batch, Batch)
        assert batch.images.dtype == torch.uint8
        assert batch.labels.dtype == torch.int64
        assert torch.equal(batch.labels, batch.indices % 10)
        assert torch.equal(batch.images, batch.labels.to(torch.uint8)[:, None, None, None].expand(-1, 1, 28, 28))
    assert order(batches) == order(loader(25, 10))


@pytest.mark.parametrize("done", range(4))
def test_resumes_at_the_next_batch(done: int) -> None:
    whole = list(loader(25, 10))
    first = loader(25, 10)
    for _, _batch in zip(range(done), first, strict=False):
        pass
    second = loader(25, 10)
    second.load_state_dict(first.state_dict())
    assert [batch.indices.tolist() for batch in second] == [batch.indices.tolist() for batch in whole[done:]]
    assert second.state_dict() == {"epoch": 0, "batches_done": 3}
    assert len(list(second)) == 3  # the next pass is a whole one


def test_skipped_batches_are_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, skipping = list(loader(50, 10)), loader(50, 10)
    batches = iter(skipping)
    assert torch.equal(next(batches).indices, whole[0].indices)
    skipping.skip(2)
    assert skipping.state_dict() == {"epoch": 0, "batches_done": 3}
    monkeypatch.setattr(ImageDataset, "__getitem__", lambda self, indices: indices)
    assert [indices.tolist() for indices in batches] == [batch.indices.tolist() for batch in whole[3:]]


def test_the_place_in_one_epoch_says_nothing_of_another() -> None:
    resumed = loader(25, 10)
    resumed.load_state_dict({"epoch": 0, "batches_done": 2})
    resumed.sampler.set_epoch(1)
    assert order(resumed) == order(sampler(25, 10, epoch=1))


# The data module


def test_splits_and_sizes() -> None:
    data = datamodule(train_size=None, batch_size=300)
    sample = load_mnist("MNIST", "nowhere", "sample", None)
    for built, digits in (
        (data.train_dataloader(), sample.train),
        (data.val_dataloader(), sample.val),
        (data.test_dataloader(), sample.test),
    ):
        batches = list(built)
        assert len(batches) == len(built)
        labels, indices = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("labels", "indices"))
        assert sorted(indices.tolist()) == list(range(len(digits.labels)))
        assert torch.equal(labels, digits.labels[indices])
    assert [len(batch.labels) for batch in data.train_dataloader()] == [300] * 13 + [100]
    assert order(data.train_dataloader()) != list(range(4000))
    assert order(data.val_dataloader()) == list(range(500))
    assert [len(batch.labels) for batch in data.val_dataloader()] == [120] * 4 + [20]


def test_the_seed_changes_the_order_and_no_split() -> None:
    first, second = datamodule(seed=0), datamodule(seed=1)
    assert order(first.train_dataloader()) != order(second.train_dataloader())
    for one, other in zip(first.load()[:3], second.load()[:3], strict=True):
        assert torch.equal(one.images, other.images)


def test_train_size_takes_the_first() -> None:
    some, everything = datamodule(train_size=7, batch_size=7).load(), datamodule(train_size=None).load()
    assert torch.equal(some.train.images, everything.train.images[:7])
    assert torch.equal(some.train.labels, everything.train.labels[:7])
    assert len(some.val.labels) == len(some.test.labels) == 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 46}, r"data\.batch_size=46 is more than the 45 training images; choose at most 45"),
        ({"train_size": 4001}, r"data\.train_size=4001 .* sample of 5,000 digits has 4,000 images; choose 1 to 4000"),
    ],
)
def test_sizes_that_the_data_do_not_allow(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datamodule(**changes).train_dataloader()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("dataset", "mnist", "MNIST, FashionMNIST or KMNIST"),
        ("source", "offical", "auto, official or sample"),
        ("mirrors", "https://example.org", "a list, .*a URL such as https://example.org/mnist, or null"),
        ("mirrors", ["example.org"], "a list, .*a URL such as https://example.org/mnist, or null"),
        ("train_size", 0, "a whole number, 1 or more, or null"),
        ("batch_size", 0, "a whole number, 1 or more"),
        ("eval_batch_size", -1, "a whole number, 1 or more"),
        ("num_workers", -1, "a whole number, 0 or more"),
    ],
)
def test_settings_that_are_not_allowed(name: str, value: Any, allowed: str) -> None:
    """In a run, and when a checkpoint's data module is given other settings."""
    block = compose_config("train").data
    block.merge_with({"source": "sample", "seed": 0})
    with pytest.raises(ValueError, match=rf"^data\.{name}={re.escape(repr(value))} must be {allowed}\.$"):
        load_source(block, {name: value})


def on_rank(rank: int, ranks: int, **changes: Any) -> MNISTData:
    data = datamodule(**changes)
    data.trainer = SimpleNamespace(world_size=ranks, global_rank=rank, overfit_batches=0)
    data.trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return data


def test_each_process_takes_its_share() -> None:
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        shares = [order(getattr(on_rank(rank, 2), name)()) for rank in range(2)]
        whole = order(getattr(datamodule(batch_size=20, eval_batch_size=240), name)())
        assert set(shares[0]).isdisjoint(shares[1])
        assert sorted(shares[0] + shares[1]) == sorted(whole)
    with pytest.raises(
        ValueError, match=r"data\.batch_size=30 on each of 2 processes .*45 training images; choose at most 22"
    ):
        on_rank(0, 2, batch_size=30).train_dataloader()


def test_every_process_takes_the_source_of_the_first() -> None:
    data = on_rank(1, 2)
    data.source = "official"
    data.trainer.is_global_zero = False
    data.trainer.strategy = SimpleNamespace(broadcast=lambda _: SAMPLE)  # the first fell back to it
    data.setup()
    assert data.load().origin == SAMPLE
    data.loaded = data.load()._replace(origin=OFFICIAL)  # this one has found files that the first has not
    data.setup()
    assert data.load().origin == SAMPLE


# Inside Lightning


class Recorder(L.LightningModule):
    """Learns nothing; remembers the images of every step."""

    def __init__(self, plans: bool = False) -> None:
        super().__init__()
        self.plans = plans
        self.weight = nn.Parameter(torch.zeros(()))
        self.steps: list[list[int]] = []
        self.checked: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.steps.append(batch.indices.tolist())
        return self.weight * batch.images.float().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.checked += batch.indices.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.plans:  # as a schedule over all steps does; builds the loader before Lightning restores its place
            assert self.trainer.estimated_stepping_batches == 15
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SaveAfter(L.Callback):
    """A checkpoint after one step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def trainer(**changes: Any) -> L.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    plain = {"accelerator": "cpu", "devices": 1, "max_epochs": 3, "num_sanity_val_steps": 0}
    return L.Trainer(**(dict.fromkeys(quiet, False) | plain | changes))


def test_lightning_shuffles_anew_each_epoch() -> None:
    model = Recorder()
    trainer().fit(model, datamodule(seed=4))
    assert len(model.steps) == 15
    epochs = [list(chain(*model.steps[start : start + 5])) for start in (0, 5, 10)]
    assert epochs == [order(sampler(45, 10, seed=4, epoch=epoch)) for epoch in range(3)]
    assert all(one != other for one, other in pairwise(epochs))
    assert model.checked == list(range(500)) * 3


@pytest.mark.parametrize("step", [2, 5, 6])
@pytest.mark.parametrize("end", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 15}], ids=["epochs", "steps"])
@pytest.mark.parametrize("plans", [False, True])
def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(
    plans: bool, step: int, end: dict[str, int], tmp_path: Path
) -> None:
    uninterrupted, resumed = Recorder(plans), Recorder(plans)
    trainer(callbacks=[SaveAfter(step, tmp_path / "last.ckpt")], **end).fit(uninterrupted, datamodule())
    trainer(**end).fit(resumed, datamodule(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.steps == uninterrupted.steps[step:]


def test_a_fresh_run_after_a_resumed_one_is_whole(tmp_path: Path) -> None:
    data, fresh = datamodule(), Recorder()
    trainer(callbacks=[SaveAfter(2, tmp_path / "last.ckpt")]).fit(Recorder(), data)
    trainer().fit(Recorder(), data, ckpt_path=tmp_path / "last.ckpt")
    trainer(max_epochs=1).fit(fresh, data)
    assert list(chain(*fresh.steps)) == order(sampler(45, 10))


def test_lightnings_own_sampler_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a distributed strategy (here of one process) Lightning puts a sampler into loaders that have none."""
    monkeypatch.setattr(os, "environ", os.environ.copy())  # where Lightning writes the address of the group
    run = trainer(strategy="ddp", use_distributed_sampler=True, max_epochs=2)
    model, plain = Recorder(), torch.utils.data.DataLoader(range(4))
    try:
        run.fit(model, datamodule())
        replaced = run._data_connector._prepare_dataloader(plain, shuffle=False, mode=None)
        assert isinstance(replaced.sampler, DistributedSampler)
    finally:
        torch.distributed.destroy_process_group()
    assert isinstance(run.train_dataloader.sampler, BatchSampler)
    assert isinstance(run.val_dataloaders.sampler, BatchSampler)
    assert list(chain(*model.steps)) == order(sampler(45, 10)) + order(sampler(45, 10, epoch=1))


def test_overfit_batches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.overfit_batches=2 is not supported.*data\.train_size=10"):
        trainer(overfit_batches=2).fit(Recorder(), datamodule())


# Classes of uneven sizes


@pytest.fixture
def uneven(monkeypatch: pytest.MonkeyPatch) -> MNISTData:
    """300 zeros, 100 ones and 20 twos of the sample, sorted by class."""
    data = datamodule(train_size=None, sampler="balanced", class_weights="balanced")
    sample = data.read()
    parts = [sample.train.take(sample.train.labels == label).take(slice(n)) for label, n in enumerate((300, 100, 20))]
    train = Images(*map(torch.cat, zip(*parts, strict=True)))
    monkeypatch.setattr(data, "read", lambda: sample._replace(train=train))
    return data


def test_a_balanced_sampler_draws_all_classes_equally_often(uneven: MNISTData) -> None:
    loader = uneven.train_dataloader()
    labels = []
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        labels += [batch.labels for batch in loader]
    counts = torch.bincount(torch.cat(labels), minlength=10)
    assert counts.sum() == 20 * 420 and counts[3:].sum() == 0
    assert (counts[:3] - 2800).abs().max() < 5 * (8400 * 2 / 9) ** 0.5  # five standard deviations
    again = uneven.train_dataloader()
    again.sampler.set_epoch(19)
    assert torch.equal(torch.cat([batch.labels for batch in again]), torch.cat(labels[-len(again) :]))


def test_shares_are_those_of_scikit_learn(uneven: MNISTData) -> None:
    labels = uneven.load().train.labels
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert torch.allclose(uneven.shares()[:3], torch.from_numpy(wanted).float())
    assert uneven.shares()[3:].eq(0).all()


def test_few_images_of_a_sorted_split_are_of_all_its_classes(uneven: MNISTData) -> None:
    uneven.train_size = 42
    assert torch.bincount(uneven.load().train.labels).tolist() == [30, 10, 2]


def test_the_number_of_classes_comes_from_the_data(uneven: MNISTData) -> None:
    assert count_classes("auto", uneven) == count_classes(10, uneven) == 10
    with pytest.raises(ValueError, match=r"model.num_classes=7 but MNIST, the bundled .* has 10 classes"):
        count_classes(7, uneven)
    assert count_classes(7, object()) == 7
    with pytest.raises(ValueError, match=r"object has no load\(\); set model.num_classes"):
        count_classes("auto", object())


def test_batches_with_features_read_no_images() -> None:
    dataset = loader(25, 10).dataset
    dataset.features = torch.arange(75.0).view(25, 3)
    batch = dataset[torch.tensor([7, 3])]
    assert batch.images.shape == (2, 0) and batch.images.dtype == torch.uint8
    assert batch.features.tolist() == [[21, 22, 23], [9, 10, 11]] and batch.labels.tolist() == [7, 3]


def test_each_batch_is_read_ahead_once_while_the_one_before_it_is_used() -> None:
    dataset, asked = loader(25, 10).dataset, []
    dataset.read_ahead = lambda indices: asked.append(indices.tolist())
    for number, batch in enumerate(BatchSampler(dataset, 10, shuffle=True, seed=0, num_replicas=1, rank=0)):
        assert asked[number] == batch.tolist() and len(asked) == min(number + 2, 3)
