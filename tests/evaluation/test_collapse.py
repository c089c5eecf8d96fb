"""Signs of collapse on features whose spread is known."""

import numpy as np
import pytest
import torch

from thaw.evaluation.collapse import effective_rank, feature_std


def test_features_in_all_directions() -> None:
    features = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(0))
    assert feature_std(features) == pytest.approx(1, abs=0.01)
    assert effective_rank(features) == pytest.approx(32, rel=0.01)
    assert feature_std(7 * features) == pytest.approx(feature_std(features))  # on the sphere
    assert effective_rank(features + 100) == pytest.approx(effective_rank(features), rel=1e-3)  # centred


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_constant_features(value: float) -> None:
    features = torch.full((100, 16), value)
    assert feature_std(features) == pytest.approx(0, abs=1e-4)
    assert effective_rank(features) == 0


def test_features_on_a_line_and_in_a_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q.T  # (2, 16)
    line = torch.randn(1000, 1, generator=generator) * directions[:1]
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    corners = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]) @ directions
    assert effective_rank(corners) == pytest.approx(2, rel=1e-5)


def test_effective_rank_equals_roy_and_vetterlis_formula() -> None:
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 9)
    values = np.linalg.svd(features.numpy() - features.numpy().mean(axis=0), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(features) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
