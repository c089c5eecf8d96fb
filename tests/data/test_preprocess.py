"""Preprocess against plain NumPy and against Pillow's resize."""

import numpy as np
import pytest
import torch
from PIL import Image

from thaw.data.preprocess import Preprocess


@pytest.fixture
def digits() -> torch.Tensor:
    return torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_values_per_channel(digits: torch.Tensor) -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    out = Preprocess(28, 3, mean, std)(digits)
    expected = np.stack([(digits.numpy() / 255.0 - m) / s for m, s in zip(mean, std, strict=True)], axis=1)[:, :, 0]
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_number_serves_every_channel(digits: torch.Tensor, channels: int) -> None:
    out = Preprocess(28, channels, [0.1307], [0.3081])(digits)
    assert out.shape == (3, channels, 28, 28)
    for channel in range(channels):
        np.testing.assert_allclose(out[:, channel].numpy(), (digits[:, 0].numpy() / 255.0 - 0.1307) / 0.3081, atol=1e-5)


@pytest.mark.parametrize("side", [14, 32, 56])
def test_resize_is_pillows(digits: torch.Tensor, side: int) -> None:
    out = Preprocess(side, 1, [0.0], [1.0])(digits)
    assert out.shape == (3, 1, side, side)
    for digit, got in zip(digits[:, 0], out[:, 0], strict=True):
        image = Image.fromarray(digit.numpy().astype(np.float32))
        expected = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)) / 255
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)


def test_grey_and_colour_become_each_other() -> None:
    photo = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey = Preprocess(9, 1, [0.1], [0.5])(photo)
    wanted = np.stack([np.asarray(Image.fromarray(each.permute(1, 2, 0).numpy()).convert("L")) for each in photo])
    assert grey.shape == (2, 1, 9, 9)
    np.testing.assert_allclose(grey[:, 0].numpy(), (wanted / 255 - 0.1) / 0.5, atol=0.5 / 255 / 0.5 + 1e-3)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    colour = Preprocess(9, 3, mean, std)(photo)
    by_hand = (photo.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(colour.numpy(), by_hand, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(9, 14), (15, 9)])
def test_the_centre_of_an_image_that_is_not_square(height: int, width: int) -> None:
    wide = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    top, left = (height - 9) // 2, (width - 9) // 2
    preprocess = Preprocess(6, 3, [0.1], [0.2])
    assert torch.equal(preprocess(wide), preprocess(wide[:, :, top : top + 9, left : left + 9]))


def test_holds_nothing_but_mean_and_std(digits: torch.Tensor) -> None:
    preprocess = Preprocess(32, 3, [0.1], [0.2])
    before = {name: value.clone() for name, value in preprocess.state_dict().items()}
    first = preprocess.train()(digits)
    assert torch.equal(preprocess.eval()(digits), first)
    assert set(before) == {"mean", "std"}
    assert all(torch.equal(value, before[name]) for name, value in preprocess.state_dict().items())
    assert not list(preprocess.parameters())
