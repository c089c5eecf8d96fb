"""A few labels of each class are drawn by content; every other label of training and validation is erased."""

from typing import Any

import pytest
import torch
from small_models import mnist_data

from thaw.data import few_labels
from thaw.data.few_labels import draw_labelled, keep_labels
from thaw.data.images import Images, Source
from thaw.data.mnist import load_mnist

SAMPLE = load_mnist("MNIST", "nowhere", "sample", None)
FIRST_DRAW = [828, 1091, 1952, 2197, 2211, 2678, 3186, 3198, 3494, 3599]  # of one image a class


def test_a_draw_is_stratified_and_fixed() -> None:
    """In every process and on every machine, and whatever the order of the images; a larger draw has the smaller."""
    one = draw_labelled(SAMPLE.train, 1, 0)
    assert one.tolist() == FIRST_DRAW
    five = draw_labelled(SAMPLE.train, 5, 0)
    assert torch.bincount(SAMPLE.train.labels[five]).tolist() == [5] * 10
    assert {*one.tolist()} < {*five.tolist()} and five.tolist() == sorted({*five.tolist()})
    assert not {*five.tolist()} & {*one.tolist()} >= {*draw_labelled(SAMPLE.train, 1, 1).tolist()}
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    again = order[draw_labelled(SAMPLE.train.take(order), 5, 0)]
    assert sorted(again.tolist()) == five.tolist()


def test_the_splits_of_a_draw() -> None:
    data = mnist_data(labels_per_class=2, labels_draw=3, seed=0, batch_size=20)
    source = data.load()
    assert source.pool is not None and len(source.val.labels) == 0
    drawn = draw_labelled(SAMPLE.train, 2, 3)
    assert torch.equal(source.pool.images, torch.cat([SAMPLE.train.images, SAMPLE.val.images]))
    assert source.pool.labels.unique(return_counts=True)[1].tolist() == [4480] + [2] * 10
    assert source.pool.labels[drawn].equal(SAMPLE.train.labels[drawn])
    for part in range(2):
        assert torch.equal(source.train[part], SAMPLE.train[part][drawn])
        assert torch.equal(source.test[part], SAMPLE.test[part])
    (batch,) = data.train_dataloader()
    assert sorted(batch.labels.tolist()) == sorted([*range(10)] * 2)
    other = mnist_data(labels_per_class=2, labels_draw=3, seed=7).load()
    assert torch.equal(other.train.images, source.train.images)


def test_no_other_label_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong labels of all other images, validation's included, change no bit of what the code after this sees."""
    drawn = draw_labelled(SAMPLE.train, 3, 0)
    clean = keep_labels(SAMPLE, 3, 0)
    wrong = torch.full_like(SAMPLE.train.labels, 9)
    wrong[drawn] = SAMPLE.train.labels[drawn]
    poisoned = SAMPLE._replace(train=SAMPLE.train._replace(labels=wrong), val=SAMPLE.val._replace(labels=wrong[:500]))
    monkeypatch.setattr(few_labels, "draw_labelled", lambda *_: drawn)
    for split in ("train", "val", "test", "pool"):
        for one, other in zip(getattr(clean, split), getattr(keep_labels(poisoned, 3, 0), split), strict=True):
            assert torch.equal(one, other), split


def test_it_says_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    mnist_data(labels_per_class=4, labels_draw=1).load()
    line = (
        "few labels: 40 of 4,000 training images keep their label (draw 1); those of the 500 validation images are not"
    )
    assert line in capsys.readouterr().out


def small(counts: list[int], several: bool = False) -> Source:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.randint(0, 256, (len(labels), 1, 4, 4), dtype=torch.uint8)
    part = Images(images, torch.nn.functional.one_hot(labels) if several else labels)
    return Source(part, part, part, [f"class {n}" for n in range(len(counts))], "animals")


def test_a_class_without_images_is_left_out() -> None:
    assert keep_labels(small([3, 0, 2]), 2, 0).train.labels.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (small([3, 5, 2]), r"data\.labels_per_class=3 is more than the .* that animals has of class 2 \(2\)\. Choose"),
        (small([3, 3], several=True), r"labels_per_class=3 is for one class an image; set .*=null"),
    ],
)
def test_data_that_do_not_allow_a_draw(source: Source, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keep_labels(source, 3, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels_per_class": 5, "train_size": 100}, "data.labels_per_class=5 cannot go with data.train_size=100"),
        ({"labels_per_class": 5, "fold": 0}, "data.labels_per_class=5 cannot go with data.fold=0; set one to null"),
        ({"labels_draw": 2}, "data.labels_draw=2 draws nothing without data.labels_per_class"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mnist_data(**changes)


def test_validation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leaves no labels to validate on\. Set trainer\.limit_val_batches=0"):
        mnist_data(labels_per_class=5).val_dataloader()
