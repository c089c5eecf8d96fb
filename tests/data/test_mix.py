"""Mixed batches taken apart again, pixel by pixel, and their shares compared with the Beta distribution."""

import random
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from thaw.data.mix import Mix, main_labels
from thaw.run.values import check_types

B, K, S = 6, 10, 28
LABELS = torch.tensor([3, 1, 4, 1, 5, 9])


def images() -> Tensor:
    """(B, 1, S, S), no two pixels alike."""
    return torch.randn(B, 1, S, S, generator=torch.Generator().manual_seed(0))


def mixed(mix: Mix, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return mix(images(), LABELS, K)


def share(targets: Tensor) -> float:
    """Of an image whose neighbour has another label: image 0, next to image 5."""
    return targets[0, LABELS[0]].item()


def test_off_leaves_images_and_labels_alone() -> None:
    mix, batch = Mix(None, None, 1), images()
    state = torch.get_rng_state()
    got, labels = mix(batch, LABELS, K)
    assert got is batch and labels is LABELS and not mix.is_on
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", range(5))
def test_mixup_pixel_by_pixel(seed: int) -> None:
    got, targets = mixed(Mix(1.0, None, 1), seed)
    lam, x = share(targets), images()
    assert 0 < lam < 1 and targets.shape == (B, K) and targets.dtype == torch.float32
    for i in range(B):
        expected = torch.zeros(K)
        expected[LABELS[i]] += lam
        expected[LABELS[i - 1]] += 1 - lam
        torch.testing.assert_close(targets[i], expected)
        torch.testing.assert_close(got[i], lam * x[i] + (1 - lam) * x[i - 1])


def test_cutmix_pastes_one_rectangle_of_the_stated_area() -> None:
    shares = []
    for seed in range(20):
        got, targets = mixed(Mix(None, 1.0, 1), seed)
        lam, x = share(targets), images()
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(B))
        pasted = got[0, 0] != x[0, 0]  # (S, S)
        for i in range(B):
            assert torch.equal(got[i, 0], torch.where(pasted, x[i - 1, 0], x[i, 0]))
        assert pasted.sum().item() / S**2 == pytest.approx(1 - lam, abs=1e-6)
        assert torch.equal(pasted, pasted.any(dim=1)[:, None] & pasted.any(dim=0))
        shares.append(lam)
    assert len(set(shares)) > 15


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_follow_beta(alpha: float) -> None:
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)) of Beta(alpha, alpha)."""
    torch.manual_seed(0)
    mix, tiny = Mix(alpha, None, 1), torch.zeros(2, 1, 1, 1)
    shares = torch.tensor([mix(tiny, torch.tensor([0, 1]), K)[1][0, 0].item() for _ in range(2000)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_probability_and_both() -> None:
    """Of 600 batches 30 % are mixed, half of them by blending, which changes nearly every pixel."""
    torch.manual_seed(0)
    mix, x = Mix(1.0, 1.0, 0.3), images()[:2, :, :8, :8]
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for _ in range(600):
        got, targets = mix(x, LABELS[:2], K)
        if targets is LABELS[:2] or targets.ndim == 1:
            assert got is x
            kinds["none"] += 1
        else:
            foreign = ((got != x) & (got != x.roll(1, 0))).any()
            kinds["mixup" if foreign else "cutmix"] += 1
    assert kinds["none"] == pytest.approx(420, abs=40)
    assert kinds["mixup"] == pytest.approx(90, abs=30)


def test_random_numbers_come_from_torch() -> None:
    mix = Mix(0.5, 0.5, 0.9)
    for seed in range(10):
        random.seed(seed), np.random.seed(seed)
        first = mixed(mix, seed)
        random.seed(seed + 1), np.random.seed(seed + 1)
        for one, other in zip(first, mixed(mix, seed), strict=True):
            assert torch.equal(one, other)
        state = torch.get_rng_state()
        mixed(mix, seed)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_single_image_stays_as_it_is() -> None:
    x = images()[:1]
    got, labels = Mix(1.0, 1.0, 1)(x, LABELS[:1], K)
    assert got is x and labels.tolist() == [3]


def test_main_labels() -> None:
    assert main_labels(LABELS) is LABELS
    assert main_labels(torch.tensor([[0.2, 0.8, 0], [0.7, 0, 0.3]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("mixup", [0, -1.0, float("nan")], "a number above 0 or null"),
        ("cutmix", [0, -1.0, float("nan")], "a number above 0 or null"),
        ("probability", [0, 1.5, float("nan")], "a number above 0 and at most 1; mix=none is off"),
    ],
)
def test_numbers_out_of_range(name: str, values: list[float], allowed: str) -> None:
    for value in values:
        block = OmegaConf.create({"_target_": "thaw.data.mix.Mix", name: value})
        with pytest.raises(ValueError, match=re.escape(f"mix.{name}={value} must be {allowed}.")):
            check_types(block, "mix.")
