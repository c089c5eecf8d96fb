"""MNIST's rule on pictures of any size, colour and format, and what is no picture."""

import gzip
import io
import re
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from scipy import ndimage
from torch import Tensor

from thaw.data.digit_image import BOX, find_digit, fit_box
from thaw.data.idx import MAX_BYTES, write_idx
from thaw.data.mnist import load_mnist
from thaw.data.pictures import PICTURE_FORMATS
from thaw.data.readers import ImageReader, Reading

read_digits = ImageReader("digit", (1, 28, 28)).file


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """A test digit of each class and 20 more."""
    return load_mnist("MNIST", "nowhere", "sample", None).test.images[::17, 0]


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


def read(content: bytes) -> np.ndarray:
    """The one digit of a file, about which nothing is doubtful."""
    [digit] = read_digits(content, "it")
    assert digit.image is not None, digit.error
    assert not digit.warning
    return digit.image[0]


def found_in(image: Image.Image) -> np.ndarray:
    return find_digit(image)[0]


def difference(found: np.ndarray, digit: Tensor | np.ndarray) -> float:
    """Mean absolute difference, as a share of the ink."""
    expected = np.asarray(digit, dtype=float)
    return float(np.abs(found - expected).sum() / expected.sum())


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
        found = read(encoded(picture(digit, paper, ink), format))
        assert found.shape == (28, 28)
        assert found.dtype == np.uint8
        differences.append(difference(found, digit))
    # JPEG's colours have half the resolution, which may move the edge of the box
    assert median(differences) < (0.02 if format == "PNG" else 0.35)
    assert max(differences) < 1.0, "a shift by one pixel costs about 0.5"


def test_box_and_centre_of_mass(digits: Tensor) -> None:
    for digit in digits:
        found = found_in(picture(digit, (255, 255, 255), (0, 0, 80), scale=9))
        rows, columns = np.flatnonzero(found.max(axis=1)), np.flatnonzero(found.max(axis=0))
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == BOX
        assert np.allclose(ndimage.center_of_mass(found), 14, atol=0.51)
        assert found.max() == 255


def test_mnist_itself_stays_as_it_is(digits: Tensor) -> None:
    """IDX digits to the bit, PNG files of 28 x 28 but for the faintest pixels."""
    for content in (write_idx(digits), gzip.compress(write_idx(digits))):
        found = list(read_digits(content, "it"))
        assert not any(one.error or one.warning for one in found)
        assert np.array_equal([one.image for one in found], digits[:, None].numpy())
    for digit in digits:
        assert difference(found_in(Image.fromarray(digit.numpy())), digit) < 0.12


def test_idx_of_another_size_is_brought_to_the_rule(digits: Tensor) -> None:
    large = torch.from_numpy(np.kron(digits[:3].numpy(), np.ones((1, 2, 2), dtype=np.uint8)))
    for found, digit in zip(read_digits(write_idx(large), "it"), digits, strict=False):
        assert found.image is not None
        assert difference(found.image[0], digit) < 0.02


def test_transparency_orientation_depth_and_palette(digits: Tensor) -> None:
    digit = digits[2]
    expected = found_in(picture(digit, (255, 255, 255), (0, 0, 0)))
    alpha = picture(digit, (0, 0, 0), (255, 255, 255)).convert("L")
    for colour in ("black", "white", "red"):
        drawn = Image.new("RGB", alpha.size, colour)
        drawn.putalpha(alpha)
        assert difference(read(encoded(drawn, "PNG")), expected) < 0.05, colour
    deep = Image.fromarray(np.asarray(alpha, dtype=np.uint16) * 257)
    assert difference(read(encoded(deep, "PNG")), expected) < 0.05
    assert difference(read(encoded(alpha.convert("P"), "PNG")), expected) < 0.05
    assert difference(read(encoded(alpha.convert("1"), "PNG")), expected) < 0.3
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # must be turned clockwise to be upright
    picture(digit, (255, 255, 255), (0, 0, 0)).rotate(90, expand=True).save(file, "JPEG", exif=exif)
    assert difference(read(file.getvalue()), expected) < 0.1


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
        found = found_in(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
        differences.append(difference(found, found_in(clean)))
    assert median(differences) < 0.1
    assert max(differences) < 1.0


def framed(image: Image.Image, inset: int, width: int, colour: str) -> Image.Image:
    image, (right, bottom) = image.copy(), (image.width - 1 - inset, image.height - 1 - inset)
    ImageDraw.Draw(image).rectangle((inset, inset, right, bottom), outline=colour, width=width)
    return image


def shaded(image: Image.Image, across: float, down: float, factor: float = 0.5) -> Image.Image:
    """All beyond a line through the middle, in shadow."""
    rows, columns = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
    light = np.where(across * columns + down * rows > 0, factor, 1)[..., None]
    return Image.fromarray((np.asarray(image) * light).astype(np.uint8))


DISTURBED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "frame at the edge": lambda image: framed(image, 0, 6, "black"),
    "grey frame at the edge": lambda image: framed(image, 0, 6, "grey"),
    "frame inside": lambda image: framed(image, 5, 3, "black"),
    "two frames": lambda image: framed(framed(image, 2, 2, "black"), 8, 2, "black"),
    "frame on two sides": lambda image: framed(image, 0, 5, "black").crop((0, 0, image.width - 6, image.height - 6)),
    "dark table": lambda image: ImageOps.expand(image, (90, 40, 60, 150), "#402010"),
    "shadow aslant": lambda image: shaded(image, 1, 1),
    "shadow on the left": lambda image: shaded(image, -1, 0.1),
    "deep shadow below": lambda image: shaded(image, 0.1, 1, 0.35),
}


@pytest.mark.parametrize("kind", DISTURBED)
def test_frames_and_hard_shadows_are_no_ink(digits: Tensor, kind: str) -> None:
    differences = []
    for digit in digits[::5]:
        clean = picture(digit, (235, 235, 235), (30, 30, 40))
        clean = clean.crop((-30, -30, clean.width, clean.height))
        ImageDraw.Draw(clean).rectangle((0, 0, clean.width, 29), fill=(235, 235, 235))
        ImageDraw.Draw(clean).rectangle((0, 0, 29, clean.height), fill=(235, 235, 235))
        differences.append(difference(found_in(DISTURBED[kind](clean)), found_in(clean)))
    assert median(differences) < 0.25, differences


def test_a_bar_is_no_sheet_and_a_tight_digit_no_frame(digits: Tensor) -> None:
    bar = np.full((300, 40), 255, dtype=np.uint8)
    bar[2:-2, 2:-2] = 0
    assert found_in(Image.fromarray(bar))[4:24].max(axis=1).min() == 255
    for digit in digits:
        rows, columns = (np.flatnonzero(digit.numpy().max(axis=axis) > 60) for axis in (1, 0))
        tight = digit.numpy()[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].repeat(8, axis=0).repeat(8, axis=1)
        for pixels in (tight, 255 - tight):
            assert difference(found_in(Image.fromarray(pixels)), digit) < 0.7


def test_two_digits_are_said(digits: Tensor) -> None:
    large = [np.asarray(picture(digit, (255, 255, 255), (0, 0, 0))) for digit in digits[::3]]
    for first, second in pairwise(large):
        for axis in (0, 1):
            assert "may be more than one digit" in find_digit(Image.fromarray(np.concatenate([first, second], axis)))[1]
    assert sum(bool(find_digit(Image.fromarray(one))[1]) for one in large) <= 1


def test_arrays_of_another_polarity_or_scale(digits: Tensor) -> None:
    """Inverted, scaled to 0 and 1, or blank: read rightly with a warning, or refused by itself."""
    black = (digits > 127).to(torch.uint8)
    for odd, word in ((255 - digits, "ground"), (black, "0 and 1"), (1 - black, "0 and 1")):
        expected = 255 * black if odd.max() == 1 else digits
        found = list(read_digits(write_idx(odd), "it"))
        assert all(word in one.warning for one in found)
        differences = [difference(one.image[0], digit) for one, digit in zip(found, expected, strict=True)]  # type: ignore[arg-type]
        assert median(differences) < 0.2
        assert max(differences) < 1.0, "a shift by one pixel costs about 0.5"
    for blank in (0, 1, 128, 255):
        for size in (28, 32):
            images = torch.nn.functional.pad(digits[:4], [(size - 28) // 2] * 4)
            images[2] = blank
            found = list(read_digits(write_idx(images), "it"))
            assert [one.image is None for one in found] == [False, False, True, False]
            assert found[2].error.startswith("it, image 2, shows no digit")


@pytest.mark.parametrize("format", PICTURE_FORMATS)
def test_formats(digits: Tensor, format: str) -> None:
    image = picture(digits[3], (255, 255, 255), (0, 0, 0)).convert("L")
    assert difference(read(encoded(image, format)), found_in(image)) < 0.1


def test_only_the_first_frame_is_read(digits: Tensor) -> None:
    first, second = (picture(digit, (255, 255, 255), (0, 0, 0)) for digit in digits[:2])
    for format in ("GIF", "PNG", "TIFF", "WEBP"):
        file = io.BytesIO()
        first.save(file, format, save_all=True, append_images=[second])
        [digit] = read_digits(file.getvalue(), "it")
        assert digit.image is not None
        assert difference(digit.image[0], found_in(first)) < 0.1
        assert "first of its frames" in digit.warning


def odd_exif(image: Image.Image) -> dict[str, bytes]:
    """A picture with EXIF blocks that no reader agrees on."""
    zero, info = Image.Exif(), PngImagePlugin.PngInfo()
    zero[0x0112], zero[0x011A] = 6, 72.0
    file = io.BytesIO()
    image.save(file, "JPEG", exif=zero)
    info.add_text("Raw profile type exif", "\nexif\n      10\nno hexadecimal digits\n")
    text, garbage = io.BytesIO(), io.BytesIO()
    image.save(text, "PNG", pnginfo=info)
    image.save(garbage, "PNG", exif=b"\0\x08\0\x02" + b"garbage" * 9)
    fraction = struct.pack(">II", 72, 1)
    assert fraction in file.getvalue() or struct.pack("<II", 72, 1) in file.getvalue()
    no_number = file.getvalue().replace(fraction, struct.pack(">II", 72, 0))
    no_number = no_number.replace(struct.pack("<II", 72, 1), struct.pack("<II", 72, 0))
    return {"a fraction by zero": no_number, "no hexadecimal": text.getvalue(), "garbage": garbage.getvalue()}


def test_damaged_exif_is_not_believed_and_the_picture_is_read(digits: Tensor) -> None:
    image = picture(digits[3], (255, 255, 255), (0, 0, 0))
    for kind, content in odd_exif(image).items():
        [digit] = read_digits(content, "it")
        assert digit.image is not None, kind
        assert difference(digit.image[0], found_in(image)) < 0.1, kind
        assert "EXIF" in digit.warning, kind


@pytest.mark.parametrize(
    "error", [KeyError("x"), MemoryError(), ZeroDivisionError("y"), struct.error("z"), TypeError()]
)
@pytest.mark.parametrize("where", ["load", "convert"])
def test_any_exception_of_a_decoder_is_this_pictures(
    digits: Tensor, error: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise error

    content = encoded(picture(digits[0], (255, 255, 255), (0, 0, 0)), "PNG")
    monkeypatch.setattr(PngImagePlugin.PngImageFile if where == "load" else Image.Image, where, fail)
    [digit] = read_digits(content, "it.png")
    assert digit.image is None
    assert digit.error.startswith("it.png ")


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
        (lambda: b"<svg></svg>", "is not a PNG, JPEG"),
        (lambda: b"\0\0\0\x18ftypheic" + bytes(99), "is not a PNG, JPEG"),
        (lambda: encoded(Image.new("L", (40, 40)), "PPM"), "is not a PNG, JPEG"),
        (lambda: claims(50_000, 50_000), "claims 2,500,000,000 pixels, more than 50,000,000"),
        (lambda: claims(9_000, 9_000), "claims 81,000,000 pixels, more than"),
        (lambda: claims(500, 500), "damaged"),
        (truncated, "damaged"),
        (lambda: encoded(Image.new("L", (50, 50), 200), "PNG"), "shows no digit"),
        (lambda: encoded(Image.new("L", (1, 1)), "PNG"), "shows no digit"),
        (lambda: gzip.compress(bytes(MAX_BYTES + 1)), "holds more than"),
        (lambda: gzip.compress(b"x" * 100)[:-9], "is truncated at"),
        (lambda: write_idx(torch.zeros(4, dtype=torch.uint8)), "shape"),
        (lambda: write_idx(torch.zeros(2, 28, 28, dtype=torch.uint8))[:-1], "bytes"),
        (lambda: write_idx(torch.zeros(0, 28, 28, dtype=torch.uint8)), "shape"),
        (lambda: write_idx(torch.zeros(2, 30, 30, dtype=torch.uint8)), "shows no digit"),
    ],
)
def test_what_is_no_digit_is_refused(content: Callable[[], bytes], reason: str) -> None:
    try:
        digit = next(read_digits(content(), "it.png"))
    except ValueError as error:
        digit = Reading(None, str(error))
    assert digit.image is None
    assert re.search(reason, digit.error)
    assert "it.png" in digit.error


def test_the_shape_of_a_digit_is_kept() -> None:
    for given, fitted in (((60, 1), (20, 1)), ((1, 60), (1, 20)), ((10, 5), (20, 10)), ((30, 40), (15, 20))):
        assert fit_box(np.ones(given, dtype=np.float32)).shape == fitted
