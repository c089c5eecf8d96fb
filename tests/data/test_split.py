"""Splits taken from the training images: stratified, fixed, and with equal images on one side."""

import hashlib

import pytest
import torch

from thaw.data.images import Images
from thaw.data.split import complete, divide, name_splits


def digests(number: int) -> list[str]:
    return [hashlib.sha256(str(index).encode()).hexdigest() for index in range(number)]


def test_a_tenth_of_each_class_is_held_out() -> None:
    labels = torch.cat([torch.full((number,), label) for label, number in enumerate((400, 100, 10, 2, 1))])
    parts = divide(digests(513), labels, ["test", "val"])
    assert torch.cat(list(parts.values())).sort().values.equal(torch.arange(513))
    counts = {name: labels[which].bincount(minlength=5).tolist() for name, which in parts.items()}
    assert counts == {"train": [324, 81, 8, 1, 1], "val": [36, 9, 1, 0, 0], "test": [40, 10, 1, 1, 0]}


def test_the_order_of_the_images_does_not_matter() -> None:
    order, keys, labels = torch.randperm(300), digests(300), torch.arange(300) % 3
    val = {keys[index] for index in divide(keys, labels, ["val"])["val"]}
    again = divide([keys[index] for index in order], labels[order], ["val"])["val"]
    assert {keys[order[index]] for index in again} == val


def test_equal_images_stay_together() -> None:
    """Each of 100 images occurs three times, once with another label."""
    keys, labels = digests(100) * 3, torch.arange(100).repeat(3) // 10
    labels[200:] = 9 - labels[200:]
    parts = divide(keys, labels, ["test", "val"])
    sides = [{keys[index] for index in which} for which in parts.values()]
    assert [len(which) for which in parts.values()] == [240, 30, 30]
    assert not (sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2])


def test_splits_by_their_use(capsys: pytest.CaptureFixture) -> None:
    assert name_splits({"train": 1, "val": 2, "test": 3}, "pets") == ({"train": 1, "val": 2, "test": 3}, [])
    assert not capsys.readouterr().out
    assert name_splits({"train": 1, "val": 2}, "pets") == ({"train": 1, "test": 2}, ["val"])
    assert "pets: its validation images are the test split, and 10% of each class" in capsys.readouterr().out
    assert name_splits({"train": 1}, "pets") == ({"train": 1}, ["test", "val"])


def test_images_in_memory() -> None:
    whole = Images(torch.randint(256, (200, 1, 3, 4), dtype=torch.uint8), torch.arange(200) % 2)
    test = whole.take(slice(5))
    train, val, same = complete({"train": whole, "test": test}, "pets")
    assert (len(train.labels), len(val.labels)) == (180, 20) and same is test
    assert val.labels.bincount().tolist() == [10, 10]
    flat = torch.cat([train.images, val.images]).flatten(1).tolist()
    assert sorted(flat) == sorted(whole.images.flatten(1).tolist())
