"""Augment image by image against torchvision and SciPy, and its random numbers against what the settings promise."""

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import compose_config
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy import ndimage
from small_models import CONFIGS, augmentation
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from thaw.data import augment
from thaw.data.augment import Augment, resize_boxes
from thaw.data.mnist import load_mnist
from thaw.run.values import check_types

STRONG = {
    "degrees": 20.0,
    "translate": 0.12,
    "scale": 0.25,
    "shear": 15.0,
    "elastic": 1.2,
    "thickness": 0.8,
    "erase": 0.5,
}
PHOTOS = {"flip": 0.5, "crop_area": 0.3, "crop_padding": 4, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
DRAWS = ("degrees", "shear", "scale", "shift_x", "shift_y")  # in this order


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return load_mnist("MNIST", "nowhere", "sample", None).test.images[::40]  # 13 digits


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Twelve smooth colour images, with no level so near black or white that a change of PHOTOS would clamp it."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(80, 176, (12, 3, 5, 6), generator=generator).float()
    return F.interpolate(coarse, (40, 48), mode="bicubic").round().clamp(80, 175).to(torch.uint8)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """drawn(degrees=1, ...) decides what `uniform` returns: a number or one for each digit; 0 where not named."""

    def decide(**values: Any) -> None:
        queue = [values.pop(name, 0.0) for name in DRAWS]
        assert not values
        monkeypatch.setattr(augment, "uniform", lambda x: torch.zeros(len(x)) + queue.pop(0))

    return decide


def assert_close(got: Tensor, expected: Any, digits: Tensor) -> None:
    """Equal but for the rounding of grey levels, and not because nothing happened."""
    pixels = got.squeeze(1).numpy().astype(float)
    assert np.abs(pixels - np.asarray(expected, dtype=float).reshape(pixels.shape)).max() <= 1
    assert np.abs(pixels - digits.squeeze(1).numpy()).max() > 50


# What each transform does


def test_zeros_are_the_identity_and_draw_nothing(digits: Tensor) -> None:
    state = torch.get_rng_state()
    assert torch.equal(augmentation()(digits), digits)
    assert torch.equal(torch.get_rng_state(), state)


def test_uint8_to_uint8_and_the_input_is_left_alone(digits: Tensor) -> None:
    before = digits.clone()
    out = augmentation(**STRONG)(digits)
    assert out.dtype == torch.uint8
    assert out.shape == digits.shape
    assert torch.equal(digits, before)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize(
    ("setting", "affine"),
    [
        ({"degrees": 30.0}, lambda sign: {"angle": -30.0 * sign}),
        ({"scale": 0.3}, lambda sign: {"scale": 1 + 0.3 * sign}),
        ({"shear": 20.0}, lambda sign: {"shear": [20.0 * sign, 0.0]}),
    ],
)
def test_one_at_a_time_as_torchvision_does_it(
    setting: dict[str, float], affine: Callable[..., Any], sign: float, digits: Tensor, drawn: Callable[..., None]
) -> None:
    drawn(**dict.fromkeys(setting, sign))
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    expected = [
        tv.affine(digit.float(), **(still | affine(sign)), interpolation=InterpolationMode.BILINEAR).numpy()
        for digit in digits
    ]
    assert_close(augmentation(**setting)(digits), expected, digits)


@pytest.mark.parametrize(("x", "y"), [(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.5, -1.0)])
def test_translation_is_in_fractions_of_the_side(
    x: float, y: float, digits: Tensor, drawn: Callable[..., None]
) -> None:
    drawn(shift_x=x, shift_y=y)
    out = augmentation(translate=2 / 28)(digits)  # up to 2 pixels
    assert np.array_equal(out, [ndimage.shift(digit.numpy(), (0, -2 * y, -2 * x), order=0) for digit in digits])


def test_all_at_once_is_one_interpolation(
    digits: Tensor, drawn: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every digit with its own parameters, against SciPy at coordinates worked out here."""
    random = np.random.default_rng(0)
    values = {name: random.uniform(-1, 1, len(digits)) for name in DRAWS}
    wobble = random.normal(0, 1, (len(digits), 28, 28, 2))  # pixels, x and y
    drawn(**{name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()})
    pixels_to_unit = 2 / 28
    monkeypatch.setattr(Augment, "random_displacement", lambda *_: torch.tensor(wobble * pixels_to_unit).float())

    out = augmentation(degrees=20, translate=0.1, scale=0.2, shear=15, elastic=1)(digits)

    y, x = np.mgrid[:28, :28] - 13.5  # from the centre
    expected = []
    for i, digit in enumerate(digits):
        angle, tilt = math.radians(20 * values["degrees"][i]), math.tan(math.radians(15 * values["shear"][i]))
        sheared, zoom = x + tilt * y, 1 + 0.2 * values["scale"][i]
        from_x = (math.cos(angle) * sheared - math.sin(angle) * y) / zoom + 28 * 0.1 * values["shift_x"][i]
        from_y = (math.sin(angle) * sheared + math.cos(angle) * y) / zoom + 28 * 0.1 * values["shift_y"][i]
        places = [from_y + wobble[i, ..., 1] + 13.5, from_x + wobble[i, ..., 0] + 13.5]
        expected.append(ndimage.map_coordinates(digit[0].numpy().astype(float), places, order=1, mode="grid-constant"))
    assert_close(out, expected, digits)


def test_half_precision_training_moves_nothing(digits: Tensor) -> None:
    results = []
    for autocast in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(augmentation(degrees=10, translate=0.07, scale=0.1)(digits))
    assert torch.equal(*results)


@pytest.mark.parametrize(("thickness", "draw"), [(1.0, 1.0), (1.0, -1.0), (0.8, 0.5), (0.5, -0.5)])
def test_thickness_is_a_share_of_scipys_dilation_or_erosion(
    thickness: float, draw: float, digits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "uniform", lambda x: torch.full((len(x),), draw))
    change = ndimage.grey_dilation if draw > 0 else ndimage.grey_erosion
    old = digits[:, 0].numpy().astype(float)
    target = np.stack([change(digit, size=(3, 3)) for digit in old])
    assert_close(augmentation(thickness=thickness)(digits), old + abs(thickness * draw) * (target - old), digits)


def test_erased_rectangles() -> None:
    torch.manual_seed(0)
    out = augmentation(erase=0.3)(torch.full((4000, 1, 28, 28), 200, dtype=torch.uint8))[:, 0]
    assert set(out.unique().tolist()) == {0, 200}
    erased = (out == 0).nonzero().split((out == 0).sum((1, 2)).tolist())  # each digit's (place, row, column)
    boxes = [(*place[:, 1:].amin(0).tolist(), *(place[:, 1:].amax(0) + 1).tolist()) for place in erased if len(place)]
    assert len(boxes) / 4000 == pytest.approx(0.3, abs=0.03)
    top, left, bottom, right = np.array(boxes).T
    heights, widths = bottom - top, right - left
    areas = [len(place) for place in erased if len(place)]
    assert areas == (heights * widths).tolist()  # solid rectangles
    assert set(heights) == set(widths) == set(range(5, 16))
    assert not np.array_equal(heights, widths)
    assert top.min() == left.min() == 0
    assert bottom.max() == right.max() == 28


def test_erased_rectangles_grow_with_the_image_and_have_all_channels() -> None:
    torch.manual_seed(0)
    erased = augmentation(erase=1.0)(torch.full((2000, 3, 56, 56), 200, dtype=torch.uint8)) == 0
    assert torch.equal(erased, erased[:, :1].expand_as(erased))
    for sides in (erased[:, 0].any(2).sum(1), erased[:, 0].any(1).sum(1)):
        assert (sides.min(), sides.max()) == (10, 30)


def test_blur_is_scipys_within_the_image() -> None:
    """Each image has two deviations of its own. SciPy's zeros outside are divided out."""
    images = 255 * torch.rand(6, 3, 28, 32, generator=torch.Generator().manual_seed(0))
    module = augmentation(blur=2.5)
    draws = module.draw(images)
    assert draws.blurs is not None and draws.blurs.shape == (6, 2) and draws.blurs.unique().numel() == 12
    deviations = draws.blurs.clamp(min=0.5)  # below that SciPy's kernel and ours are cut off differently
    for image, out, sigma in zip(
        images, module.apply_draws(images, draws._replace(blurs=deviations)), deviations, strict=True
    ):
        kernel = {"sigma": (0, *sigma.tolist()), "mode": "constant", "truncate": 20.0}
        blurred = ndimage.gaussian_filter(image.double().numpy(), **kernel)
        inside = ndimage.gaussian_filter(np.ones(image.shape), **kernel)
        assert np.allclose(out, blurred / inside, atol=0.01)


def test_haze_blends_with_smooth_grey() -> None:
    """The same haze on a black and on a white image tells its share and its levels."""
    module, images = augmentation(haze=0.5), torch.zeros(2000, 3, 28, 28)
    draws = module.draw(images)
    black, white = (module.apply_draws(images + level, draws).double() for level in (0, 255))
    shares = 1 - (white - black) / 255
    assert torch.allclose(shares, shares[:, :1, :1, :1].expand_as(shares), atol=1e-5)
    assert shares.min() >= 0 and 0.49 < shares.max() <= 0.5 and shares.mean() == pytest.approx(0.25, abs=0.01)
    levels = (black / shares.clamp(min=0.05))[shares[:, 0, 0, 0] > 0.05]
    assert -0.01 < levels.min() < 10 and 245 < levels.max() < 255.01
    assert levels.diff(dim=2).abs().max() < 28  # from 0 to 255 in a third of the side
    assert torch.equal(black, black[:, :1].expand_as(black))


def test_noise_has_each_images_own_deviation() -> None:
    out = augmentation(noise=0.4)(torch.full((3000, 1, 28, 28), 1e4))
    deviations = out.std((1, 2, 3)) / 255
    assert out.mean() == pytest.approx(1e4, abs=0.5)
    assert deviations.max() < 0.44 and deviations.min() < 0.001
    assert (deviations / 0.4).sqrt().mean() == pytest.approx(0.5, abs=0.02)  # the root is uniform in [0, 1]


def test_inverted_images_stripes_and_rectangles() -> None:
    images = torch.randint(100, (3000, 3, 28, 28), dtype=torch.uint8)
    out = augmentation(invert=0.3)(images)
    inverted = out == 255 - images
    assert torch.equal(inverted | (out == images), torch.ones_like(inverted))
    assert torch.equal(inverted, inverted[:, :1].expand_as(inverted))
    inverted = inverted[:, 0]
    rows, columns = inverted.any(2), inverted.any(1)  # (N, 28)
    assert torch.equal(inverted, rows[:, :, None] & columns[:, None, :])
    chosen = rows.any(1)
    assert chosen.float().mean() == pytest.approx(0.3, abs=0.03)
    whole, tall = rows[chosen].all(1) & columns[chosen].all(1), rows[chosen].all(1)
    assert 0.2 < whole.float().mean() < 0.4 < tall.float().mean() < 0.7


def test_corrupt_is_the_share_of_images_that_are_changed() -> None:
    images = torch.randint(50, 200, (2000, 3, 28, 28), dtype=torch.uint8)
    settings = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "blur": 2.0, "haze": 0.5, "noise": 0.5}
    for chosen in (settings | {"invert": 1.0}, *({name: value} for name, value in settings.items())):
        unchanged = (augmentation(**chosen, corrupt=0.3)(images) == images).all((1, 2, 3)).float().mean()
        assert 0.66 < unchanged < 0.8, chosen  # 0.7, and those whose change is too small to see
    assert (augmentation(**settings, invert=1.0, corrupt=0.0)(images) == images).all()


@pytest.mark.parametrize(("erase", "share"), [(0.0, 0), (1.0, 1)])
def test_erase_never_and_always(erase: float, share: float) -> None:
    out = augmentation(erase=erase)(torch.full((200, 1, 28, 28), 200, dtype=torch.uint8))[:, 0]
    assert (out == 0).any(2).any(1).float().mean() == share


# Photographs


def both(photos: Tensor) -> tuple[Tensor, Tensor]:
    return photos, photos[:, :1]


def test_flips_some_images_as_they_are(photos: Tensor) -> None:
    torch.manual_seed(0)
    for images in both(photos.repeat(20, 1, 1, 1)):
        out = augmentation(flip=0.3)(images)
        flipped = (out == images.flip(3)).all((1, 2, 3))
        assert ((out == images).all((1, 2, 3)) ^ flipped).all()
        assert flipped.float().mean() == pytest.approx(0.3, abs=0.1)
        assert torch.equal(augmentation(flip=1.0)(images), images.flip(3))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_boxes_are_resized_as_torchvision_does_it(on_gpu: bool, photos: Tensor) -> None:
    """A GPU samples floats by a grid."""
    torch.manual_seed(0)
    settings = augmentation(crop_area=0.08)
    for images in both(photos):
        boxes, flips = settings.random_boxes(images), torch.arange(12) % 2 == 0
        out = resize_boxes(images.float() if on_gpu else images, boxes, flips)
        for image, result, box, flip in zip(images, out, boxes.tolist(), flips.tolist(), strict=True):
            expected = tv.resized_crop(image.float(), *box, size=[40, 48], antialias=True)
            expected = tv.hflip(expected) if flip else expected
            assert (result.float() - expected).abs().max() <= (1e-3 if on_gpu else 1)


def test_boxes_have_the_wanted_area_and_aspect() -> None:
    torch.manual_seed(0)
    images = torch.zeros(1, 1, 1, 1).expand(5000, 1, 300, 400)
    top, left, height, width = augmentation(crop_area=0.25).random_boxes(images).double().T
    assert min(top.min(), left.min()) == 0
    assert (top + height).max() == 300 and (left + width).max() == 400
    area, aspect = height * width / 300 / 400, width / height
    assert 0.24 < area.min() < 0.26 and 0.95 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.35
    small = area < 0.5  # any of these fits
    assert area[small].mean() == pytest.approx(0.375, abs=0.01)
    assert aspect[small].log().mean().abs() < 0.02
    assert (top / (300 - height + 1))[small].mean() == pytest.approx(0.5, abs=0.02)
    assert torch.corrcoef(torch.stack([top, left, height, width])[:, small])[0, 1].abs() < 0.05


def test_boxes_that_never_fit_are_cut_off() -> None:
    """With nearly the whole area every aspect ratio but 1 is too long for a square."""
    torch.manual_seed(0)
    top, left, height, width = augmentation(crop_area=0.999).random_boxes(torch.zeros(1000, 1, 32, 32)).T
    assert (top + height).max() <= 32 and (left + width).max() <= 32
    assert height.min() >= 27 and width.min() >= 27  # 32 x sqrt(3/4)


@pytest.mark.parametrize("mode", ["reflect", "constant"])
def test_padded_crops_are_slices_of_torchvisions_padding(mode: str, photos: Tensor) -> None:
    torch.manual_seed(0)
    settings = augmentation(flip=0.5, crop_padding=2, padding_mode=mode)
    for images in both(photos.repeat(20, 1, 1, 1)):
        padded = tv.pad(images, [2], padding_mode=mode)
        slices = [padded[:, :, top : top + 40, left : left + 48] for top in range(5) for left in range(5)]
        slices = torch.stack([*slices, *(part.flip(3) for part in slices)])  # (50, 240, C, 40, 48)
        found = (settings(images) == slices).all((2, 3, 4))  # (50, 240)
        assert (found.sum(0) == 1).all()
        assert found.any(1).sum() >= 45


def test_colours_as_torchvision_changes_them_one_after_another(photos: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = augmentation(brightness=0.2, contrast=0.2, saturation=0.2)
    for images, chunk in zip(both(photos), (1, 5 * 40 * 48), strict=True):
        monkeypatch.setattr(augment, "FLOATS_AT_ONCE", chunk)  # an image at a time, five at a time
        torch.manual_seed(0)
        factors = colours.random_factors(images).tolist()
        torch.manual_seed(0)
        for image, result, (brightness, contrast, saturation) in zip(images, colours(images), factors, strict=True):
            expected = tv.adjust_brightness(image / 255, brightness)
            expected = tv.adjust_contrast(expected, contrast)
            expected = 255 * tv.adjust_saturation(expected, saturation)
            assert expected.min() > 0 and expected.max() < 255  # torchvision clamps after each
            assert (result.float() - expected).abs().max() <= 0.6
            assert (result.float() - image).abs().max() > 2


def test_colours_are_clamped(photos: Tensor) -> None:
    torch.manual_seed(0)
    settings = augmentation(brightness=0.9)
    bright = torch.full((50, 3, 8, 8), 250, dtype=torch.uint8)
    factors = settings.random_factors(bright)[:, 0]
    torch.manual_seed(0)
    assert torch.equal(settings(bright)[:, 0, 0, 0], (250 * factors).round().clamp(max=255).to(torch.uint8))


def test_saturation_leaves_grey_images_alone(photos: Tensor) -> None:
    settings = augmentation(saturation=0.5)
    assert torch.equal(settings(photos[:, :1]), photos[:, :1])
    assert (settings(photos).int() - photos.int()).abs().max() > 5


@pytest.mark.parametrize("name", ["natural", "padded"])
def test_floats_are_transformed_as_integers_are_and_pass_gradients_on(name: str, photos: Tensor) -> None:
    settings = compose_config("train", f"augment={name}").augment
    results = []
    pixels = (photos / 255).requires_grad_()
    for transform, images in ((instantiate(settings), photos), (instantiate(settings), pixels)):
        torch.manual_seed(0)
        results.append(transform(images))
    assert results[0].dtype == torch.uint8
    assert (results[0] - 255 * results[1]).abs().max() <= 2  # rounded after the crop and after the colours
    results[1].square().sum().backward()
    assert (pixels.grad.abs().sum((1, 2, 3)) > 0).all()


def test_two_ways_to_crop_are_refused() -> None:
    with pytest.raises(ValueError, match=r"crop_area=0\.5 and augment\.crop_padding=4 are two ways to crop an image"):
        augmentation(crop_area=0.5, crop_padding=4)


def test_an_image_smaller_than_its_reflection_is_refused(photos: Tensor) -> None:
    with pytest.raises(ValueError, match=r"crop_padding=40 .* below the side of the images, 40 pixels; .*constant"):
        augmentation(crop_padding=40)(photos)
    assert augmentation(crop_padding=40, padding_mode="constant")(photos).shape == photos.shape


# The random numbers


@pytest.mark.parametrize("setting", PHOTOS)
def test_every_photograph_has_its_own_parameters(setting: str, photos: Tensor) -> None:
    torch.manual_seed(0)
    images = photos[:1].expand(60, -1, -1, -1)
    out = augmentation(**{setting: PHOTOS[setting]})(images)
    assert out.shape == images.shape and out.dtype == torch.uint8
    different = len({image.numpy().tobytes() for image in out})
    assert different == 2 if setting == "flip" else different >= 35


@pytest.mark.parametrize(
    ("settings", "means", "next_number"),
    [
        ({"degrees": 10.0, "translate": 0.07, "scale": 0.1}, [25.915, 24.528, 33.347, 30.388], 0.436891),
        (STRONG, [10.371, 26.313, 24.398, 14.945], 0.410597),
    ],
)
def test_the_numbers_of_a_seed_are_those_of_earlier_versions(
    settings: dict[str, float], means: list[float], next_number: float, digits: Tensor
) -> None:
    torch.manual_seed(0)
    assert augmentation(**settings)(digits)[:4].float().mean((1, 2, 3)).tolist() == pytest.approx(means, abs=0.02)
    assert float(torch.rand(())) == pytest.approx(next_number)


@pytest.mark.parametrize("setting", STRONG)
def test_every_digit_has_its_own_parameters(setting: str, digits: Tensor) -> None:
    torch.manual_seed(0)
    value = 1.0 if setting == "erase" else STRONG[setting]
    out = augmentation(**{setting: value})(digits[:1].expand(20, -1, -1, -1))
    assert len({image.numpy().tobytes() for image in out}) >= 18


def test_the_same_seed_gives_the_same_digits(digits: Tensor) -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(augmentation(**STRONG)(digits))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_parameters_fill_their_range_and_keep_to_it() -> None:
    torch.manual_seed(0)
    maps = (
        augmentation(degrees=20, translate=0.1, scale=0.25, shear=15)
        .random_affine(torch.zeros(5000, 1, 28, 28))
        .double()
    )
    linear, shift = maps[:, :, :2], maps[:, :, 2]
    angle = torch.atan2(linear[:, 1, 0], linear[:, 0, 0])
    zoom = linear[:, :, 0].norm(dim=1)
    tilt = (linear[:, 0, 1] * angle.cos() + linear[:, 1, 1] * angle.sin()) / zoom
    parameters = {  # each as a share of its setting, so -1 to 1
        "angle": angle.rad2deg() / 20,
        "scale": (1 / zoom - 1) / 0.25,
        "shear": tilt.atan().rad2deg() / 15,
        "shift_x": shift[:, 0] / 2 / 0.1,
        "shift_y": shift[:, 1] / 2 / 0.1,
    }
    for name, share in parameters.items():
        assert share.min() == pytest.approx(-1, abs=0.01), name
        assert share.max() == pytest.approx(1, abs=0.01), name
        assert share.abs().max() <= 1 + 1e-5, name
        assert share.mean() == pytest.approx(0, abs=0.04), name
        assert share.var() == pytest.approx(1 / 3, abs=0.02), name
    correlation = torch.corrcoef(torch.stack(list(parameters.values()))) - torch.eye(5)
    assert correlation.abs().max() < 0.06


@pytest.mark.parametrize(("elastic", "sigma"), [(1.2, 4.0), (0.5, 2.0)])
def test_displacement_has_the_wanted_size_and_smoothness(elastic: float, sigma: float) -> None:
    torch.manual_seed(0)
    settings = augmentation(elastic=elastic, elastic_sigma=sigma)
    field = settings.random_displacement(torch.zeros(1000, 1, 28, 28)) * 28 / 2 / elastic  # (B, S, S, 2), deviation 1
    assert field.shape == (1000, 28, 28, 2)
    assert field.mean().abs() < 0.03
    assert field.std(dim=(0, 3)).sub(1).abs().max() < 0.1  # at the edges as in the middle
    for lag in (1, 3, 6):  # white noise under a Gaussian of deviation sigma
        expected = math.exp(-(lag**2) / (4 * sigma**2))
        assert (field[:, lag:] * field[:, :-lag]).mean() == pytest.approx(expected, abs=0.04)
        assert (field[:, :, lag:] * field[:, :, :-lag]).mean() == pytest.approx(expected, abs=0.04)
    assert (field[..., 0] * field[..., 1]).mean().abs() < 0.04
    assert (field[1:] * field[:-1]).mean().abs() < 0.04


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *dict.fromkeys(STRONG, -0.5).items(),
        *[("scale", 1.0), ("erase", 1.5), ("elastic_sigma", 0.0)],
        *[
            ("flip", 1.5),
            ("crop_area", 0.0),
            ("crop_area", 1.5),
            ("brightness", 1.0),
            ("contrast", -0.1),
            ("saturation", 2),
            ("haze", 1.0),
            ("noise", -0.1),
            ("invert", 1.1),
            ("corrupt", -0.1),
        ],
    ],
)
def test_settings_out_of_range(name: str, value: float) -> None:
    block = OmegaConf.load(CONFIGS / "augment" / "none.yaml")
    block[name] = value
    with pytest.raises(ValueError, match=rf"^augment\.{name}={value} must be a number[^=]*$"):
        check_types(block, "augment.")


def test_can_be_built_under_a_debugger() -> None:
    """Debuggers read a frame's locals, which adds to what locals() returned."""

    def read_locals(frame: Any, *_: Any) -> Any:
        assert frame.f_locals is not None
        return read_locals

    before = sys.gettrace()
    sys.settrace(read_locals)
    try:
        augmentation(**STRONG)
    finally:
        sys.settrace(before)
