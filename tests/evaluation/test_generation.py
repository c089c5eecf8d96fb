"""Numbers for generated images: the Fréchet distance against scipy, precision and recall against loops."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from thaw.evaluation.generation import frechet_distance, image_features, precision_and_recall
from thaw.models.backbone import Backbone


def sets(number: int = 60, other: int = 45, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator)
    first = torch.randn(number, width, generator=generator)
    return first, torch.randn(other, width, generator=generator) @ mix + 0.5


def test_frechet_distance_equals_scipys() -> None:
    real, fake = sets()
    a, b = real.double().numpy(), fake.double().numpy()
    product = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected += np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * product)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(fake, real) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("number", "width"), [(60, 6), (20, 192)], ids=["many", "fewer images than features"])
def test_frechet_distance_of_equal_sets_is_0(number: int, width: int) -> None:
    real, _ = sets(number, 3, width)
    assert frechet_distance(real, real.flip(0)) == pytest.approx(0, abs=1e-3)
    assert frechet_distance(real, real + 1) == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_a_naive_version(k: int) -> None:
    real, fake = sets(40, 30, 3)

    def covered(manifold: Tensor, points: Tensor) -> float:
        hits = 0
        for point in points:
            for i, centre in enumerate(manifold):
                others = sorted(float((centre - each).norm()) for j, each in enumerate(manifold) if j != i)
                if float((centre - point).norm()) <= others[k - 1]:
                    hits += 1
                    break
        return hits / len(points)

    precision, recall = precision_and_recall(real, fake, k)
    assert precision == pytest.approx(covered(real, fake)) and recall == pytest.approx(covered(fake, real))
    assert precision != pytest.approx(recall) and 0 < precision < 1


def test_precision_and_recall_of_a_collapsed_and_of_a_perfect_generator() -> None:
    real, _ = sets()
    assert precision_and_recall(real, real, 3) == (1, 1)
    precision, recall = precision_and_recall(real, real[:1].repeat(50, 1), 3)  # one good image, always the same
    assert precision == 1 and recall == pytest.approx(1 / 60)


def test_features_are_the_bundled_backbones_in_eval_mode() -> None:
    arguments = {"patch_size": 7, "depth": 2, "class_token": False, "global_pool": "avg", "drop_path_rate": 0.5}
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", "none", 28, 1, "model", [0.1307], [0.3081], True, arguments)
    images = torch.randint(0, 256, (501, 1, 28, 28), dtype=torch.uint8)
    features = image_features(backbone, images)
    expected = backbone.eval()((images / 255 - 0.1307) / 0.3081)
    assert features.shape == (501, 192) and not features.requires_grad
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
