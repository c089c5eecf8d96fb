"""Folds against scikit-learn's StratifiedKFold and naive counts."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedKFold
from small_models import mnist_data

from thaw.data.arrays import ArrayData
from thaw.data.folds import deal_folds, take_fold
from thaw.data.images import Images, Source


def source(counts: list[int], num_val: int = 0, seed: int = 0) -> Source:
    """So many images of each class in a random order, all different; the first of them validate."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    images = torch.arange(len(labels) * 4, dtype=torch.uint8).view(-1, 1, 2, 2) % 251
    images[:, 0, 0, 0] = torch.arange(len(labels)) // 251
    whole = Images(images, labels)
    test = Images(torch.full((3, 1, 2, 2), 255, dtype=torch.uint8), torch.zeros(3, dtype=torch.long))
    classes = [f"class {number}" for number in range(len(counts))]
    return Source(whole.take(slice(num_val, None)), whole.take(slice(num_val)), test, classes, "data")


def hashes(images: Images) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images.images]


@pytest.mark.parametrize("counts", [[10, 10], [7, 13, 5], [23, 5, 6, 9]])
@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_have_the_sizes_of_scikit_learns(counts: list[int], folds: int) -> None:
    """By class and in all; scikit-learn deals the classes in the order in which they appear."""
    labels = source(counts).train.labels
    in_order = labels.sort().values.numpy()
    ours = deal_folds(labels, torch.arange(len(labels)), folds)
    split = StratifiedKFold(folds).split(np.zeros(len(labels)), in_order)
    theirs = sorted(np.bincount(in_order[held_out], minlength=len(counts)).tolist() for _, held_out in split)
    assert sorted(labels[ours == fold].bincount(minlength=len(counts)).tolist() for fold in range(folds)) == theirs


def test_folds_share_no_image_and_are_all_that_is_not_tested_on() -> None:
    data = source([20, 15, 31], num_val=9)
    everything = sorted(hashes(data.train) + hashes(data.val))
    parts = [take_fold(data, fold, 4) for fold in range(4)]
    assert sorted(content for part in parts for content in hashes(part.val)) == everything
    for part in parts:
        assert sorted(hashes(part.train) + hashes(part.val)) == everything
        assert torch.equal(part.test.images, data.test.images)
    pairs = [{*zip(hashes(images), images.labels.tolist(), strict=True)} for images in (*data[:2], *parts[1][:2])]
    assert pairs[0] | pairs[1] == pairs[2] | pairs[3]


def test_equal_images_are_in_one_fold_even_of_different_classes() -> None:
    data = source([20, 20], num_val=10)
    data.train.images[5] = data.train.images[9] = data.val.images[3]
    data.train.labels[5] = 1 - data.train.labels[9]
    twice = hashes(data.val)[3]
    counts = [[hashes(images).count(twice) for images in take_fold(data, fold, 5)[:2]] for fold in range(5)]
    assert sorted(counts) == [[0, 3], [3, 0], [3, 0], [3, 0], [3, 0]]


def test_of_images_sorted_by_class_train_size_takes_some_of_each(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(3), 30)
    images = np.random.default_rng(0).integers(0, 256, (90, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "sorted.npz", images=images, labels=labels)
    keys = {"fold": 2, "folds": 3, "train_size": 12, "batch_size": 4, "eval_batch_size": 4, "num_workers": 0, "seed": 0}
    keys |= {"exclude": None, "relabel": None, "labels_per_class": None, "labels_draw": 0}
    rest = {"classes": None, "val_share": 0.2, "test_share": 0.2, "reader": "photo", "class_weights": None}
    data = ArrayData(path=str(tmp_path / "sorted.npz"), sampler="shuffled", **keys, **rest).load()  # type: ignore[arg-type]
    assert data.train.labels.bincount().tolist() == [4, 4, 4] and len(data.val.labels) == 24
    assert sum(map(len, (data.val.labels, data.test.labels))) == 42


def test_the_sample_of_mnist_is_cut_into_folds_whatever_the_seed() -> None:
    official, first, again = mnist_data().load(), mnist_data(fold=1).load(), mnist_data(fold=1, seed=3).load()
    assert len(first.train.labels) == 3600 and first.val.labels.bincount().tolist() == [90] * 10
    assert all(torch.equal(one, other) for one, other in zip(first.val, again.val, strict=True))
    assert torch.equal(first.test.images, official.test.images)
    held_out = [mnist_data(fold=fold, folds=9).load().val for fold in (0, 8)]
    assert [len(part.labels) for part in held_out] == [500, 500] and not {*hashes(held_out[0])} & {*hashes(held_out[1])}


@pytest.mark.parametrize(
    ("counts", "fold", "folds", "message"),
    [
        ([9, 9], 5, 5, r"data\.fold=5 but data\.folds=5: folds count from 0 to 4\. Choose"),
        (
            [9, 4, 2],
            0,
            5,
            r"data\.folds=5 needs 5 different images of each class .* fewer of class 1 \(4\), class 2 \(2\)",
        ),
    ],
)
def test_folds_that_cannot_be(counts: list[int], fold: int, folds: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take_fold(source(counts, num_val=2), fold, folds)


def test_several_classes_an_image_have_no_strata() -> None:
    data = source([6, 6])
    several = data._replace(train=Images(data.train.images, torch.ones(12, 2, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"data\.fold=0: folds are for one class an image"):
        take_fold(several, 0, 2)
