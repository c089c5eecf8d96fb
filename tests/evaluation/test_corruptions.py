"""Corruptions against naive computations of what their papers say, on real digits and on smooth colours."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage import color, transform
from torch import Tensor

from thaw.data.mnist import load_mnist
from thaw.evaluation import corruptions
from thaw.evaluation.corruptions import Corruption, corrupt
from thaw.evaluation.robustness import SETS

PLACES = range(3, 11)
# by name: the severities of these differ in kind, or their paper has them in no strict order
UNORDERED = ("elastic_transform",)


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return load_mnist("MNIST", "nowhere", "sample", None).test.images[::60][: len(PLACES)]


@pytest.fixture(scope="module")
def colours() -> Tensor:
    """Smooth random pictures, higher than wide."""
    noise = torch.rand((len(PLACES), 3, 9, 8), generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, (36, 32), mode="bicubic")
    return (255 * smooth).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def few_plasmas(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(corruptions, "PLASMA_POINTS", 2**17)
    corruptions.plasma_maps.cache_clear()
    yield
    corruptions.plasma_maps.cache_clear()


def generators() -> list[np.random.Generator]:
    return [np.random.default_rng(place) for place in PLACES]


def share(images: Tensor) -> NDArray[np.float64]:
    return images.numpy() / 255


def corruption_of(key: str, name: str) -> Corruption:
    return Corruption(*(SETS[key].published | SETS[key].further)[name], SETS[key].side)


def test_names_are_the_papers() -> None:
    mnist = "shot_noise impulse_noise glass_blur motion_blur shear scale rotate brightness translate stripe fog "
    assert " ".join(SETS["mnist_c"].published) == mnist + "spatter dotted_line zigzag canny_edges"
    others = "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow fog "
    for key in ("cifar10_c", "imagenet_c"):
        assert " ".join(SETS[key].published) == (
            others + "brightness contrast elastic_transform pixelate jpeg_compression"
        )
    for chosen in SETS.values():
        assert {len(levels) for _, levels in chosen.published.values()} <= {1, 5}
        assert all(1 <= severity <= 5 and name in chosen.published for name, severity in chosen.released.items())


@pytest.mark.parametrize(("key", "name"), [(key, name) for key in SETS for name in SETS[key].published])
def test_each_is_repeatable_whatever_the_batch_and_grows_with_severity(
    digits: Tensor, colours: Tensor, few_plasmas: None, key: str, name: str
) -> None:
    images = digits if key == "mnist_c" else colours
    before, corruption = images.clone(), corruption_of(key, name)._replace(side=28 if key == "mnist_c" else 32)
    changes = []
    for severity in range(1, len(corruption.levels) + 1):
        harder = corrupt(images, corruption, severity, PLACES)
        assert harder.shape == images.shape and harder.dtype == torch.uint8
        parts = [corrupt(images[n], corruption, severity, PLACES[n]) for n in (slice(0, 3), slice(3, 8))]
        assert torch.equal(harder, torch.cat(parts))
        changes.append(float((harder.float() - images.float()).abs().mean()))
    assert torch.equal(images, before) and changes[0] > 0
    assert name in UNORDERED or changes[-1] > changes[0] or len(changes) == 1
    other = corrupt(images[:1], corruption, 1, [77])
    chance = ("noise", "glass", "motion", "snow", "fog", "elastic", "spatter", "line", "zigzag")
    if name.startswith(chance) or name.endswith(chance):
        assert not torch.equal(other, corrupt(images[:1], corruption, 1, [78])), "by the image's place"


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 3, 70)])
def test_images_of_any_shape(few_plasmas: None, shape: tuple[int, ...]) -> None:
    images = torch.randint(1, 255, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for key, chosen in SETS.items():
        for name in chosen.published:
            assert corrupt(images, corruption_of(key, name), 1, range(len(images))).shape == shape, name


def test_noise_has_the_strength_it_says() -> None:
    grey = np.full((8, 1, 56, 56), 0.5)
    noisy = corruptions.gaussian_noise(grey, 0.1, 1.0, generators())
    assert noisy.std() == pytest.approx(0.1, rel=0.02) and noisy.mean() == pytest.approx(0.5, abs=0.01)
    shot = corruptions.shot_noise(grey, 25, 1.0, generators())
    assert shot.mean() == pytest.approx(0.5, abs=0.01) and shot.var() == pytest.approx(0.5 / 25, rel=0.05)
    impulses = corruptions.impulse_noise(grey, 0.2, 1.0, generators())
    assert [(impulses == value).mean() for value in (0, 0.5, 1)] == pytest.approx([0.1, 0.8, 0.1], abs=0.01)


def test_geometry_equals_scikit_images(digits: Tensor) -> None:
    images = share(digits)
    # (x, y) -> (x', y') where a pixel comes from; the signs are each image's own
    maps = {
        "rotate": (0.6, lambda a, b: [[np.cos(0.6), -a * np.sin(0.6), 0], [a * np.sin(0.6), np.cos(0.6), 0]]),
        "shear": (0.6, lambda a, b: [[1, -a * np.sin(0.6), 0], [0, np.cos(0.6), 0]]),
        "scale": (0.7, lambda a, b: [[1 / 0.7, 0, 0], [0, 1 / 0.7, 0]]),
        "translate": (3, lambda a, b: [[1, 0, 3 * b], [0, 1, 3 * a]]),
    }
    centre = np.array([[1, 0, -13.5], [0, 1, -13.5], [0, 0, 1]])
    for name, (level, around) in maps.items():
        warped = getattr(corruptions, name)(images, level, 1.0, generators())
        for image, result, (a, b) in zip(images, warped, corruptions.signs(generators()), strict=True):
            inverse = np.linalg.inv(centre) @ np.vstack([around(a, b), [0, 0, 1]]) @ centre
            assert np.allclose(result[0], transform.warp(image[0], inverse, order=1), atol=1e-9), name


def test_lengths_grow_with_the_side() -> None:
    large = torch.zeros(8, 1, 56, 70, dtype=torch.uint8)
    large[:, :, 28, 35] = 255
    moved = corrupt(large, corruption_of("mnist_c", "translate"), 3, PLACES)
    rows, columns = moved[:, 0].nonzero()[:, 1:].T
    assert set((rows - 28).tolist()) == {-6, 6} == set((columns - 35).tolist())


def test_blurs_equal_naive_sums(digits: Tensor) -> None:
    images = share(digits)[:2]
    side = np.arange(-3, 4)
    disk = (side[:, None] ** 2 + side**2 <= 4).astype(float)
    expected = [ndimage.convolve(image[0], disk / disk.sum(), mode="mirror") for image in images]
    assert np.allclose(corruptions.defocus_blur(images, (2, 0.01), 1.0, [])[:, 0], expected)
    weights = np.exp(-(np.arange(7) ** 2) / 8)
    traced = corruptions.blur_along(images, 3, 2, np.array([0.0, -90.0]))
    for row, column in ((14, 20), (7, 7), (27, 0)):
        right = [images[0, 0, row, min(27, column + n)] for n in range(7)]
        above = [images[1, 0, max(0, row - n), column] for n in range(7)]
        assert traced[0, 0, row, column] == pytest.approx(weights @ right / weights.sum())
        assert traced[1, 0, row, column] == pytest.approx(weights @ above / weights.sum())
    inner = ndimage.zoom(images[0, 0, 7:21, 7:21], 2, order=1)
    assert np.allclose(corruptions.magnify(images, 2.0)[0, 0], inner)
    zoomed = corruptions.zoom_blur(images, (1.0, 2), 1.0, [])
    assert np.allclose(zoomed[0, 0], (2 * images[0, 0] + inner) / 3)


def test_glass_moves_pixels_and_keeps_each() -> None:
    marked = np.random.default_rng(0).random((8, 3, 20, 24))
    moved = corruptions.glass_blur(marked, (0.01, 2, 2), 1.0, generators())
    assert np.allclose(np.sort(moved, axis=None), np.sort(marked, axis=None))
    assert (moved != marked).mean() > 0.5
    assert np.array_equal(moved[:, 0] == marked[:, 0], moved[:, 1] == marked[:, 1]), "channels stay together"


def test_plasma_equals_a_loop_over_its_points(few_plasmas: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruptions, "PLASMA_POINTS", 2 * 8**2)
    found = corruptions.plasma_maps(8, 1.5)
    for chance, plasma in zip(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8)), found, strict=True):
        expected, step, height = np.zeros((8, 8)), 8, 1.0
        while step > 1:
            half = step // 2
            corners, sides = [(-half, -half), (-half, half), (half, -half), (half, half)], [(0, half), (half, 0)]
            squares = [(i, j) for i in range(half, 8, step) for j in range(half, 8, step)]
            diamonds = [(i, j) for i in range(0, 8, half) for j in range(0, 8, half) if (i // half + j // half) % 2]
            for points, ways in ((squares, corners), (diamonds, [*sides, (0, -half), (-half, 0)])):
                for i, j in points:
                    near = [expected[(i + down) % 8, (j + right) % 8] for down, right in ways]
                    expected[i, j] = sum(near) / 4 + height * chance[i, j]
            step, height = half, height / 1.5**2
        expected -= expected.min()
        assert np.allclose(plasma, expected / expected.max())


def test_light_equals_scikit_images(colours: Tensor) -> None:
    images = share(colours)
    hsv = color.rgb2hsv(images.transpose(0, 2, 3, 1))
    hsv[..., 2] = np.minimum(hsv[..., 2] + 0.3, 1)
    brighter = corruptions.brightness(images, 0.3, 1.0, [])
    assert np.allclose(brighter, color.hsv2rgb(hsv).transpose(0, 3, 1, 2))
    assert np.allclose(corruptions.brightness(np.zeros((1, 1, 2, 2)), 0.3, 1.0, []), 0.3)
    flatter = corruptions.reduce_contrast(images, 0.25, 1.0, [])
    assert np.allclose(flatter.std(axis=(2, 3)), images.std(axis=(2, 3)) / 4)
    assert np.allclose(flatter.mean(axis=(2, 3)), images.mean(axis=(2, 3)))


def test_elastic_field_equals_a_gaussian_filter() -> None:
    """A ramp shows where each pixel comes from."""
    ramp = np.broadcast_to(np.arange(40.0), (1, 1, 40, 40))
    rng = np.random.default_rng(5)
    rng.uniform(0, 0, (3, 2))
    field = rng.uniform(-1, 1, (2, 40, 40))[1]
    smooth = ndimage.gaussian_filter(field, 2.0, mode="reflect", truncate=8)
    moved = corruptions.elastic_transform(ramp, (0.1, 0.05, 0.0), 1.0, [np.random.default_rng(5)])
    assert np.allclose((moved - ramp)[0, 0, :, 5:-5], 4 * smooth[:, 5:-5], atol=1e-3)


def test_strokes_and_patterns(digits: Tensor) -> None:
    dark = np.zeros((8, 1, 28, 28))
    dotted = corruptions.dotted_line(dark, None, 1.0, generators())
    for image, rng in zip(dotted[:, 0], generators(), strict=True):
        start, end = rng.integers(0, 27, 2)
        for row, column in np.ndindex(28, 28):
            away = abs(row - (start + (end - start) * column / 27))
            light = max(0.0, np.log(1 - min(away, 2.29) / 2.3) + 1)
            drawn = column < 27 and column // 2 % 2 == 1
            assert image[row, column] == pytest.approx(light if drawn else 0)
    zigzag = corruptions.zigzag(dark, None, 1.0, generators())[:, 0]
    assert (zigzag[:, :, 4:23].max(axis=1) > 0.1).mean() > 0.9 and not zigzag[:, :, 27].any()
    striped = corrupt(digits, corruption_of("mnist_c", "stripe"), 1, PLACES)
    assert torch.equal(striped[..., 7:21], digits[..., 7:21])
    for outer in (slice(0, 7), slice(21, 28)):
        assert torch.equal(striped[..., outer], 255 - digits[..., outer])
    square = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    square[..., 8:20, 8:20] = 255
    edges = corrupt(square, corruption_of("mnist_c", "canny_edges"), 1, [0])[0, 0]
    assert set(edges.unique().tolist()) == {0, 255}
    assert not edges[10:18, 10:18].any() and not edges[:6].any() and edges[14].any()
    drops = corrupt(digits, corruption_of("mnist_c", "spatter"), 5, PLACES)
    assert ((drops == digits) | (drops <= 63) | (drops < digits)).all() and (drops == 63).any()


def test_snow_and_fog_whiten(colours: Tensor, few_plasmas: None) -> None:
    images = share(colours)
    snowy = corruptions.snow(images, (0.1, 0.2, 1, 0.6, 8, 3, 0.9), 1.0, generators())
    assert (snowy >= images - 1e-12).all() and snowy.mean() > images.mean() + 0.02
    foggy = corruptions.fog(images, (1.0, 2.0, 32), 1.0, generators())
    brightest = images.max(axis=(1, 2, 3))
    assert (foggy.max(axis=(1, 2, 3)) <= brightest + 1e-12).all()
    assert (foggy >= images * (brightest / (brightest + 1))[:, None, None, None] - 1e-12).all()


def test_coding(digits: Tensor, colours: Tensor) -> None:
    blocks = corrupt(digits, Corruption(corruptions.pixelate, (0.5,), 28), 1, PLACES)
    means = torch.nn.functional.avg_pool2d(digits.float(), 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (blocks - means).abs().max() <= 1
    plain = torch.tensor([200, 30, 90], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 16, 24)
    coded = corrupt(plain, Corruption(corruptions.jpeg_compression, (95,), 32), 1, [0])
    assert (coded.int() - plain.int()).abs().max() < 4
    one = colours[:1].clone()
    one[:, :, :16, :16] = 0
    again = corrupt(one, Corruption(corruptions.jpeg_compression, (20,), 32), 1, [0])
    rough = corrupt(colours[:1], Corruption(corruptions.jpeg_compression, (20,), 32), 1, [0])
    assert torch.equal(again[..., 24:, 24:], rough[..., 24:, 24:]), "blocks are coded each for itself"
    assert not torch.equal(rough, colours[:1])
