"""MNIST's rule on pictures of any size, colour and format, and what is no picture."""

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from thaw.data import sources
from thaw.data.digit_image import BOX, MAX_BYTES, find_digit, read_digits
from thaw.data.idx import write_idx


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """A test digit of each class and 20 more."""
    return sources.load("MNIST", "nowhere", "sample", None).test.images[::17]


def picture(digit: Tensor, paper: tuple[int, ...], ink: tuple[int, ...], scale: int = 6) -> Image.Image:
    """A digit drawn large and off the middle, in two colours."""
    amount = np.zeros((28 * scale + 90, 28 * scale + 40))
    amount[70 : 70 + 28 * scale, 15 : 15 + 28 * scale] = np.kron(digit.numpy() / 255, np.ones((scale, scale)))
    mixed = np.array(paper) + amount[..., None] * (np.array(ink) - np.array(paper))
    return Image.fromarray(mixed.round().astype(np.uint8))


def encoded(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def difference(found: Tensor, digit: Tensor) -> float:
    """Mean absolute difference, as a share of the ink."""
    return float((found.float() - digit.float()).abs().sum() / digit.float().sum())


@pytest.mark.parametrize(
    ("paper", "ink"),
    [
        ((0, 0, 0), (255, 255, 255)),
        ((255, 255, 255), (0, 0, 0)),
        ((30, 160, 60), (160, 30, 60)),
        ((250, 240, 90), (40, 60, 200)),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_digit_is_found_in_any_colours(digits: Tensor, paper: tuple, ink: tuple, format: str) -> None:
    """Enlarged six times, the official digit comes back: its box of 20 pixels is where MNIST put it."""
    differences = []
    for digit in digits:
        found = read_digits(encoded(picture(digit, paper, ink), format), "it")
        assert found.shape == (1, 28, 28)
        assert found.dtype == torch.uint8
        differences.append(difference(found[0], digit))
    # JPEG's colours have half the resolution, which may move the edge of the box
    assert median(differences) < (0.02 if format == "PNG" else 0.35)
    assert max(differences) < 1.0, "a shift by one pixel costs about 0.5"


def test_box_and_centre_of_mass(digits: Tensor) -> None:
    for digit in digits:
        found = find_digit(picture(digit, (255, 255, 255), (0, 0, 80), scale=9), "it").numpy()
        rows, columns = np.flatnonzero(found.max(axis=1)), np.flatnonzero(found.max(axis=0))
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == BOX
        assert np.allclose(ndimage.center_of_mass(found), 14, atol=0.51)
        assert found.max() == 255


def test_mnist_itself_stays_as_it_is(digits: Tensor) -> None:
    """IDX digits to the bit, PNG files of 28 x 28 but for the faintest pixels."""
    assert torch.equal(read_digits(write_idx(digits), "it"), digits)
    assert torch.equal(read_digits(gzip.compress(write_idx(digits)), "it"), digits)
    for digit in digits:
        assert difference(read_digits(encoded(Image.fromarray(digit.numpy()), "PNG"), "it")[0], digit) < 0.12


def test_idx_of_another_size_is_brought_to_the_rule(digits: Tensor) -> None:
    large = torch.from_numpy(np.kron(digits[:3].numpy(), np.ones((1, 2, 2), dtype=np.uint8)))
    for found, digit in zip(read_digits(write_idx(large), "it"), digits, strict=False):
        assert difference(found, digit) < 0.02


def test_transparency_orientation_depth_and_palette(digits: Tensor) -> None:
    digit = digits[2]
    expected = find_digit(picture(digit, (255, 255, 255), (0, 0, 0)), "it")
    alpha = picture(digit, (0, 0, 0), (255, 255, 255)).convert("L")
    for colour in ("black", "white", "red"):
        drawn = Image.new("RGB", alpha.size, colour)
        drawn.putalpha(alpha)
        assert difference(read_digits(encoded(drawn, "PNG"), "it")[0], expected) < 0.05, colour
    deep = Image.fromarray(np.asarray(alpha, dtype=np.uint16) * 257)
    assert difference(read_digits(encoded(deep, "PNG"), "it")[0], expected) < 0.05
    assert difference(read_digits(encoded(alpha.convert("P"), "PNG"), "it")[0], expected) < 0.05
    assert difference(read_digits(encoded(alpha.convert("1"), "PNG"), "it")[0], expected) < 0.3
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # must be turned clockwise to be upright
    picture(digit, (255, 255, 255), (0, 0, 0)).rotate(90, expand=True).save(file, "JPEG", exif=exif)
    assert difference(read_digits(file.getvalue(), "it")[0], expected) < 0.1


def test_specks_uneven_paper_and_noise(digits: Tensor) -> None:
    """A shadow over the paper, noise and two specks far from the digit move its box by a pixel at most."""
    random = np.random.default_rng(0)
    differences = []
    for digit in digits:
        clean = picture(digit, (235, 235, 235), (30, 30, 40))
        pixels = np.asarray(clean, dtype=float)
        pixels *= 1 - 0.15 * np.linspace(0, 1, pixels.shape[1])[None, :, None]
        pixels += random.normal(0, 6, pixels.shape)
        pixels[10:13, 10:13] = pixels[-14:-11, -20:-17] = 40
        found = find_digit(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "it")
        differences.append(difference(found, find_digit(clean, "it")))
    assert median(differences) < 0.1
    assert max(differences) < 1.0


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def truncated() -> bytes:
    return encoded(Image.effect_noise((100, 100), 50), "PNG")[:2000]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"", "is empty"),
        (lambda: b"<svg></svg>", "neither a PNG, a JPEG nor an IDX"),
        (lambda: encoded(Image.new("L", (40, 40)), "GIF"), "neither a PNG, a JPEG nor an IDX"),
        (lambda: claims(50_000, 50_000), "claims 2,500,000,000 pixels; at most 50,000,000"),
        (lambda: claims(9_000, 9_000), "claims 9,000 x 9,000 pixels; at most"),
        (lambda: claims(500, 500), "damaged"),
        (truncated, "damaged"),
        (lambda: encoded(Image.new("L", (50, 50), 200), "PNG"), "shows no digit"),
        (lambda: encoded(Image.new("L", (1, 1)), "PNG"), "shows no digit"),
        (lambda: gzip.compress(bytes(MAX_BYTES + 1)), "holds more than"),
        (lambda: gzip.compress(b"x" * 100)[:-9], "damaged gzip"),
        (lambda: write_idx(torch.zeros(4, dtype=torch.uint8)), "shape"),
        (lambda: write_idx(torch.zeros(2, 28, 28, dtype=torch.uint8))[:-1], "bytes"),
        (lambda: write_idx(torch.zeros(0, 28, 28, dtype=torch.uint8)), "shape"),
        (lambda: write_idx(torch.zeros(2, 30, 30, dtype=torch.uint8)), "shows no digit"),
    ],
)
def test_what_is_no_digit_is_refused(content: Callable[[], bytes], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        read_digits(content(), "it.png")
    assert "it.png" in str(error.value)
