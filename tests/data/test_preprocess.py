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
    expected = np.stack([(digits.numpy() / 255.0 - m) / s for m, s in zip(mean, std, strict=True)], axis=1)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_number_serves_every_channel(digits: torch.Tensor, channels: int) -> None:
    out = Preprocess(28, channels, [0.1307], [0.3081])(digits)
    assert out.shape == (3, channels, 28, 28)
    for channel in range(channels):
        np.testing.assert_allclose(out[:, channel].numpy(), (digits.numpy() / 255.0 - 0.1307) / 0.3081, atol=1e-5)


@pytest.mark.parametrize("side", [14, 32, 56])
def test_resize_is_pillows(digits: torch.Tensor, side: int) -> None:
    out = Preprocess(side, 1, [0.0], [1.0])(digits)
    assert out.shape == (3, 1, side, side)
    for digit, got in zip(digits, out[:, 0], strict=True):
        image = Image.fromarray(digit.numpy().astype(np.float32))
        expected = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)) / 255
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)


def test_holds_nothing_but_mean_and_std(digits: torch.Tensor) -> None:
    preprocess = Preprocess(32, 3, [0.1], [0.2])
    before = {name: value.clone() for name, value in preprocess.state_dict().items()}
    first = preprocess.train()(digits)
    assert torch.equal(preprocess.eval()(digits), first)
    assert set(before) == {"mean", "std"}
    assert all(torch.equal(value, before[name]) for name, value in preprocess.state_dict().items())
    assert not list(preprocess.parameters())
