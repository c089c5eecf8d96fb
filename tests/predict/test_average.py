"""Averaged probabilities and test-time views against the same, image by image and model by model."""

from collections.abc import Callable

import pytest
import torch
from small_models import augmentation
from torch import Tensor

from thaw.classifier import Classifier
from thaw.predict.average import VIEWS_SEED, Average, Views

ALL = {"flip": 0.5, "crop_area": 0.5, "brightness": 0.3, "degrees": 20.0, "translate": 0.1, "elastic": 1.0}
ALL |= {"thickness": 0.5, "erase": 1.0, "shear": 5.0, "scale": 0.1, "contrast": 0.2}


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("settings", [ALL, {"flip": 0.5, "crop_padding": 3}])
def test_views_are_what_the_augmentation_gives_to_each_image(settings: dict, images: Tensor) -> None:
    augment, before = augmentation(**settings), torch.get_rng_state()
    views = Views(augment, 4, (1, 28, 28))
    first, *others = views(images)
    assert torch.equal(first, images) and len(others) == 3
    assert torch.equal(before, torch.get_rng_state()), "the run's own random numbers are as they were"
    for place, image in enumerate(images):
        torch.manual_seed(VIEWS_SEED)
        for view in others:
            expected = augment(image[None].float()).clamp(0, 255)[0]
            assert torch.allclose(view[place], expected, atol=1e-3) and not torch.equal(expected, image.float())
    fewer = Views(augment, 3, (1, 28, 28))(images)
    assert all(torch.equal(one, other) for one, other in zip(fewer, [first, *others], strict=False))


def test_average(classifier: Callable[..., Classifier], images: Tensor) -> None:
    members = [
        classifier().eval(),
        classifier(arguments={"patch_size": 14, "embed_dim": 32, "depth": 1, "num_heads": 2}),
    ]
    members[1].eval()
    views = Views(augmentation(degrees=20.0), 3, (1, 28, 28))
    probabilities = [member(view).softmax(dim=1) for member in members for view in views(images)]
    given = Average(members, views)(images)
    assert torch.allclose(given.softmax(dim=1), sum(probabilities) / 6, atol=1e-6)  # type: ignore[arg-type]
    members[0].head.linear.weight.data.mul_(1e4)  # type: ignore[union-attr]
    members[1].head.linear.weight.data.mul_(1e4)  # type: ignore[union-attr]
    assert Average(members, views)(images).isfinite().all(), "also where a probability is 0"
