"""What all code may expect of images and labels, and what other data is told."""

import os

import pytest
import torch

from thaw.data.images import Images, Source, absent_classes, check_same_classes, check_source


def images(number: int = 6, *shape: int, labels: list[int] | None = None) -> Images:
    shown = torch.zeros(number, *(shape or (3, 8, 8)), dtype=torch.uint8)
    return Images(shown, torch.tensor(labels if labels is not None else [n % 3 for n in range(number)]).long())


def source(**changes: object) -> Source:
    given = {"train": images(), "val": images(), "test": images(), "classes": ["ant", "bee", "cat"], "name": "insects"}
    return Source(**given | changes)  # type: ignore[arg-type]


def test_images_of_any_shape_are_taken() -> None:
    for shape in ((3, 8, 8), (1, 28, 28), (3, 30, 20)):
        check_source(source(train=images(6, *shape), val=images(6, *shape), test=images(0, *shape)))
    assert source().shape == (3, 8, 8)
    assert source().title == "insects" and source(origin="my folder").title == "insects, my folder"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": images(6, 8, 8)}, r"train images of insects are torch.uint8 \(6, 8, 8\); .*\(N, 1, H, W\)"),
        ({"val": images(6, 4, 8, 8)}, r"val images of insects are torch.uint8 \(6, 4, 8, 8\)"),
        ({"test": images(6, 3, 9, 9)}, r"test images of insects are .*\(6, 3, 9, 9\); .*\(training: \(3, 8, 8\)\)"),
        ({"val": images()._replace(labels=torch.zeros(6))}, r"val labels of insects are torch.float32 \(6,\)"),
        ({"val": images()._replace(labels=torch.zeros(5).long())}, r"val labels .*must be int64 \(6,\)"),
        (
            {"val": images()._replace(labels=torch.zeros(6, 2).long())},
            r"or \(6, 3\) of 0 and 1, one for each image and class",
        ),
        ({"val": images()._replace(labels=2 * torch.eye(6, 3).long())}, r"val labels of insects hold 2; \(N, K\) are"),
        ({"test": images(labels=[0, 1, 2, 3, 0, 1])}, r"test split of insects has the label 3, but its 3 classes"),
        ({"train": images(labels=[0, -1, 2, 0, 0, 1])}, r"train split of insects has the label -1"),
        ({"classes": ["ant", "bee", "ant"]}, "the class name 'ant' is there twice; rename its folder or label"),
        ({"classes": ["ant", "bee", os.fsdecode(b"caf\xe9")]}, r"the class name 'caf\\udce9' is not valid UTF-8"),
    ],
)
def test_other_data_is_refused(changes: dict[str, Images], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_source(source(**changes))
    floats = images()._replace(images=torch.zeros(6, 3, 8, 8))
    with pytest.raises(ValueError, match=r"are torch.float32"):
        check_source(source(train=floats))


def test_a_model_of_other_classes_is_refused() -> None:
    check_same_classes(["ant", "bee", "cat"], source(), "best.ckpt")
    with pytest.raises(ValueError, match=r"best.ckpt .* 2 classes, insects has 3: the model does not know cat\."):
        check_same_classes(["ant", "bee"], source(), "best.ckpt")
    with pytest.raises(ValueError, match=r"the data lacks wasp; the model does not know cat"):
        check_same_classes(["ant", "bee", "wasp"], source(), "best.ckpt")
    with pytest.raises(ValueError, match="another order"):
        check_same_classes(["bee", "ant", "cat"], source(), "best.ckpt")


def test_absent_classes_are_named() -> None:
    """One line a split; a split without images has none, and is not without classes."""
    assert absent_classes(source()) == []
    lines = absent_classes(source(train=images(2, labels=[0, 2]), val=images(0), test=images(1, labels=[1])))
    assert lines == [
        "insects: 1 of 3 classes have no train images and cannot be learned: bee",
        "insects: 2 of 3 classes have no test images and have no recall: ant, cat",
    ]
    many = source(classes=[f"class {n}" for n in range(9)], val=images(3, labels=[0, 1, 0]))
    assert absent_classes(many)[1].endswith(
        "do not count in val/acc: class 2, class 3, class 4, class 5, class 6 and 2 more"
    )


def test_several_labels_an_image() -> None:
    tagged = images()._replace(labels=torch.tensor([[1, 0, 1]] * 6))
    check_source(source(train=tagged, val=tagged, test=tagged))
    (line,) = absent_classes(source(train=tagged, val=images(), test=images(0)))
    assert line == "insects: 1 of 3 classes have no train images and cannot be learned: bee"
