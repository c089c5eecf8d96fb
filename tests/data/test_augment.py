"""Augment image by image against torchvision and SciPy, and its random numbers against what the settings promise."""

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy import ndimage
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from thaw.data import augment
from thaw.data.augment import Augment
from thaw.data.mnist import load_mnist
from thaw.run.values import check_types

OFF = dict.fromkeys(("degrees", "translate", "scale", "shear", "elastic", "thickness", "erase"), 0.0)
OFF["elastic_sigma"] = 4.0
STRONG = {
    "degrees": 20.0,
    "translate": 0.12,
    "scale": 0.25,
    "shear": 15.0,
    "elastic": 1.2,
    "thickness": 0.8,
    "erase": 0.5,
}
DRAWS = ("degrees", "shear", "scale", "shift_x", "shift_y")  # in this order


def build(**settings: float) -> Augment:
    return Augment(**(OFF | settings))


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return load_mnist("MNIST", "nowhere", "sample", None).test.images[::40]  # 13 digits


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
    difference = np.abs(got.numpy().astype(float) - np.asarray(expected, dtype=float))
    assert difference.max() <= 1
    assert np.abs(got.numpy().astype(float) - digits.numpy()).max() > 50


# What each transform does


def test_zeros_are_the_identity_and_draw_nothing(digits: Tensor) -> None:
    state = torch.get_rng_state()
    assert torch.equal(build()(digits), digits)
    assert torch.equal(torch.get_rng_state(), state)


def test_uint8_to_uint8_and_the_input_is_left_alone(digits: Tensor) -> None:
    before = digits.clone()
    out = build(**STRONG)(digits)
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
        tv.affine(digit[None].float(), **(still | affine(sign)), interpolation=InterpolationMode.BILINEAR)[0].numpy()
        for digit in digits
    ]
    assert_close(build(**setting)(digits), expected, digits)


@pytest.mark.parametrize(("x", "y"), [(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.5, -1.0)])
def test_translation_is_in_fractions_of_the_side(
    x: float, y: float, digits: Tensor, drawn: Callable[..., None]
) -> None:
    drawn(shift_x=x, shift_y=y)
    out = build(translate=2 / 28)(digits)  # up to 2 pixels
    assert np.array_equal(out, [ndimage.shift(digit.numpy(), (-2 * y, -2 * x), order=0) for digit in digits])


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

    out = build(degrees=20, translate=0.1, scale=0.2, shear=15, elastic=1)(digits)

    y, x = np.mgrid[:28, :28] - 13.5  # from the centre
    expected = []
    for i, digit in enumerate(digits):
        angle, tilt = math.radians(20 * values["degrees"][i]), math.tan(math.radians(15 * values["shear"][i]))
        sheared, zoom = x + tilt * y, 1 + 0.2 * values["scale"][i]
        from_x = (math.cos(angle) * sheared - math.sin(angle) * y) / zoom + 28 * 0.1 * values["shift_x"][i]
        from_y = (math.sin(angle) * sheared + math.cos(angle) * y) / zoom + 28 * 0.1 * values["shift_y"][i]
        places = [from_y + wobble[i, ..., 1] + 13.5, from_x + wobble[i, ..., 0] + 13.5]
        expected.append(ndimage.map_coordinates(digit.numpy().astype(float), places, order=1, mode="grid-constant"))
    assert_close(out, expected, digits)


def test_half_precision_training_moves_nothing(digits: Tensor) -> None:
    results = []
    for autocast in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(build(degrees=10, translate=0.07, scale=0.1)(digits))
    assert torch.equal(*results)


@pytest.mark.parametrize(("thickness", "draw"), [(1.0, 1.0), (1.0, -1.0), (0.8, 0.5), (0.5, -0.5)])
def test_thickness_is_a_share_of_scipys_dilation_or_erosion(
    thickness: float, draw: float, digits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "uniform", lambda x: torch.full((len(x),), draw))
    change = ndimage.grey_dilation if draw > 0 else ndimage.grey_erosion
    old = digits.numpy().astype(float)
    target = np.stack([change(digit, size=(3, 3)) for digit in old])
    assert_close(build(thickness=thickness)(digits), old + abs(thickness * draw) * (target - old), digits)


def test_erased_rectangles() -> None:
    torch.manual_seed(0)
    out = build(erase=0.3)(torch.full((4000, 28, 28), 200, dtype=torch.uint8))
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


@pytest.mark.parametrize(("erase", "share"), [(0.0, 0), (1.0, 1)])
def test_erase_never_and_always(erase: float, share: float) -> None:
    out = build(erase=erase)(torch.full((200, 28, 28), 200, dtype=torch.uint8))
    assert (out == 0).any(2).any(1).float().mean() == share


# The random numbers


@pytest.mark.parametrize("setting", STRONG)
def test_every_digit_has_its_own_parameters(setting: str, digits: Tensor) -> None:
    torch.manual_seed(0)
    value = 1.0 if setting == "erase" else STRONG[setting]
    out = build(**{setting: value})(digits[:1].expand(20, -1, -1))
    assert len({image.numpy().tobytes() for image in out}) >= 18


def test_the_same_seed_gives_the_same_digits(digits: Tensor) -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(build(**STRONG)(digits))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_parameters_fill_their_range_and_keep_to_it() -> None:
    torch.manual_seed(0)
    maps = build(degrees=20, translate=0.1, scale=0.25, shear=15).random_affine(torch.zeros(5000, 1, 28, 28)).double()
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
    settings = build(elastic=elastic, elastic_sigma=sigma)
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
    ("name", "value"), [*dict.fromkeys(OFF, -0.5).items(), ("scale", 1.0), ("erase", 1.5), ("elastic_sigma", 0.0)]
)
def test_settings_out_of_range(name: str, value: float) -> None:
    block = OmegaConf.create({"_target_": "thaw.data.augment.Augment"} | OFF | {name: value})
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
        build(**STRONG)
    finally:
        sys.settrace(before)
