"""Corruptions against what they say they do, on real digits."""

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from thaw.data.mnist import load_mnist
from thaw.evaluation.corruptions import CORRUPTIONS


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return load_mnist("MNIST", "nowhere", "sample", None).test.images[::25]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shapes_repeatability_and_the_harmless_strength(digits: Tensor, name: str) -> None:
    apply, _, harmless = CORRUPTIONS[name]
    strength = {"scale": 0.6, "contrast": 0.3, "noise": 0.3, "blur": 1.5}.get(name, 4.0)
    before = digits.clone()
    harder = apply(digits, strength)
    assert harder.shape == digits.shape
    assert harder.dtype == torch.uint8
    assert torch.equal(digits, before)
    assert not any(torch.equal(a, b) for a, b in zip(harder, digits, strict=True))
    assert torch.equal(harder, apply(digits, strength))
    if name != "blur":  # of no width there is none
        assert (apply(digits, harmless).int() - digits.int()).abs().max() <= 1


def test_rotation_shift_and_blur_equal_scipys(digits: Tensor) -> None:
    image = digits[0, 0].double().numpy()
    rotated = CORRUPTIONS["rotation"].apply(digits[:2], 30.0)[0, 0].double().numpy()
    expected = ndimage.rotate(image, -30, reshape=False, order=1)  # torchvision turns clockwise
    assert abs(rotated - expected).mean() < 2
    shifted = CORRUPTIONS["shift"].apply(digits[:4], 3.0)
    for number, (rows, columns) in enumerate(((0, 3), (0, -3), (3, 0), (-3, 0))):
        assert (shifted[number, 0].numpy() == ndimage.shift(digits[number, 0].numpy(), (rows, columns), order=0)).all()
    blurred = CORRUPTIONS["blur"].apply(digits[:1], 1.0)[0, 0].double().numpy()
    assert abs(blurred - ndimage.gaussian_filter(image, 1.0, truncate=3)).max() < 3


def test_lengths_grow_with_the_side_and_colours_are_alike() -> None:
    """At a side of 56 a strength of 3 is 6 pixels."""
    large = torch.randint(0, 256, (4, 3, 56, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shifted = CORRUPTIONS["shift"].apply(large, 3.0)
    assert torch.equal(shifted[0, :, :, 6:], large[0, :, :, :-6]) and not shifted[0, :, :, :6].any()
    assert torch.equal(shifted[3, :, :-6], large[3, :, 6:])
    blurred = CORRUPTIONS["blur"].apply(large[:1], 1.0)[0].double().numpy()
    for channel, image in zip(blurred, large[0].double().numpy(), strict=True):
        assert abs(channel - ndimage.gaussian_filter(image, 2.0, truncate=3, mode="mirror")).max() < 3
    assert CORRUPTIONS["blur"].apply(large[:, :, :1, :2], 9.0).shape == (4, 3, 1, 2)
    for name, corruption in CORRUPTIONS.items():
        assert corruption.apply(large, 0.5).shape == large.shape, name


def test_noise_and_contrast_have_the_strength_they_say(digits: Tensor) -> None:
    grey = torch.full((50, 1, 28, 28), 128, dtype=torch.uint8)
    assert CORRUPTIONS["noise"].apply(grey, 0.1).double().std() == pytest.approx(25.5, rel=0.02)
    harder = CORRUPTIONS["contrast"].apply(digits, 0.25).double()
    assert harder.std(dim=(1, 2, 3)).numpy() == pytest.approx(digits.double().std(dim=(1, 2, 3)).numpy() / 4, rel=0.03)
    assert harder.mean(dim=(1, 2, 3)).numpy() == pytest.approx(digits.double().mean(dim=(1, 2, 3)).numpy(), rel=0.03)
