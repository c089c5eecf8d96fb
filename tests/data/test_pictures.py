"""Photographs of any mode, depth and shape as RGB or grey squares, against Pillow's own pieces and plain arithmetic."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from thaw.data.pictures import PICTURE_FORMATS, PICTURE_SUFFIXES, fit_photo, open_picture, shape_doubts


def smooth(width: int, height: int) -> Image.Image:
    """A picture whose red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 60)], axis=2).round().astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def colour(image: Image.Image, channels: int = 3) -> list[int]:
    """The one colour of a fitted picture, once it has been through a file if PNG can hold it."""
    fitted = fit_photo(image, channels, 4)
    assert fitted.shape == (channels, 4, 4) and fitted.dtype == np.uint8
    assert (fitted == fitted[:, :1, :1]).all()
    return fitted[:, 0, 0].tolist()


def test_the_central_square_is_resized_as_pillow_does() -> None:
    picture = smooth(90, 60)
    expected = picture.crop((15, 0, 75, 60)).resize((20, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(fit_photo(picture, 3, 20), np.asarray(expected).transpose(2, 0, 1))
    upright = fit_photo(smooth(60, 90), 3, 20)
    assert upright[1].min() > 40 and upright[1].max() < 215  # the upper and lower sixth are cut


def test_fine_lines_are_averaged() -> None:
    """Without antialiasing each pixel would be black or white."""
    lines = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (64, 32)))
    assert np.abs(fit_photo(lines, 1, 8).astype(int) - 127).max() <= 6


@pytest.mark.parametrize("size", [(1, 1), (30_000, 10), (10, 30_000)])
def test_odd_shapes_stay_small(size: tuple[int, int]) -> None:
    assert colour(Image.new("RGB", size, (9, 8, 7))) == [9, 8, 7]
    assert shape_doubts(Image.new("L", size))


def test_an_ordinary_shape_raises_no_doubt() -> None:
    assert shape_doubts(Image.new("L", (32, 32))) == shape_doubts(Image.new("L", (500, 333))) == []


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return Image.open(io.BytesIO(encoded(image, **({"transparency": 1} if transparent else {}))))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (8, 8), (200, 100, 50, 255)), [200, 100, 50]),
        (Image.new("RGBA", (8, 8), (200, 100, 50, 0)), [255, 255, 255]),
        (Image.new("RGBA", (8, 8), (200, 100, 50, 51)), [244, 224, 214]),  # a fifth of it on white
        (Image.new("LA", (8, 8), (100, 0)), [255, 255, 255]),
        (Image.new("LA", (8, 8), (100, 255)), [100, 100, 100]),
        (palette(False), [200, 100, 50]),
        (palette(True), [255, 255, 255]),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), [255, 0, 0]),
        (Image.new("1", (8, 8), 1), [255, 255, 255]),
        (Image.new("L", (8, 8), 77), [77, 77, 77]),
        (Image.fromarray(np.full((8, 8), 77 * 257, dtype=np.uint16)), [77, 77, 77]),
        (Image.fromarray(np.full((8, 8), 257, dtype=np.uint16)), [1, 1, 1]),  # dark, not stretched to white
        (Image.fromarray(np.full((8, 8), 77 * 257, dtype=np.int32)), [77, 77, 77]),
        (Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)), [128, 128, 128]),
        (Image.fromarray(np.full((8, 8), 77, dtype=np.float32)), [77, 77, 77]),
        (Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)), [0, 0, 0]),
        (Image.fromarray(np.full((8, 8), 1e9, dtype=np.float32)), [255, 255, 255]),
        (Image.fromarray(np.full((8, 8), -5, dtype=np.int32)), [0, 0, 0]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_modes_become_rgb(image: Image.Image, expected: list[int]) -> None:
    assert colour(image) == expected


def test_grey() -> None:
    assert colour(Image.new("RGB", (8, 8), (255, 0, 0)), channels=1) == [76]  # ITU-R 601
    assert colour(Image.fromarray(np.full((8, 8), 77 * 257, dtype=np.uint16)), channels=1) == [77]


def test_16_bits_and_cmyk_survive_their_files() -> None:
    deep = Image.fromarray(np.full((8, 8), 77 * 257, dtype=np.uint16))
    for format in ("PNG", "TIFF"):
        assert colour(open_picture(encoded(deep, format), "it", 8)[0]) == [77, 77, 77]
    ink = open_picture(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95), "it", 8)[0]
    assert ink.mode == "CMYK" and np.abs(np.array(colour(ink)) - [255, 0, 0]).max() < 6


@pytest.mark.parametrize("format", PICTURE_FORMATS)
def test_every_format_is_read(format: str) -> None:
    opened, doubts = open_picture(encoded(smooth(40, 40), format), "it", 40)
    assert not doubts
    assert np.abs(fit_photo(opened, 3, 10).astype(int) - fit_photo(smooth(40, 40), 3, 10)).mean() < 8


def test_exif_turns_the_picture_and_gif_gives_its_first_frame() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    turned = fit_photo(open_picture(encoded(smooth(40, 20), "JPEG", exif=exif), "it", 20)[0], 3, 10)
    expected = fit_photo(smooth(40, 20).rotate(-90, expand=True), 3, 10)
    assert np.abs(turned.astype(int) - expected).mean() < 4
    frames = encoded(Image.new("L", (8, 8), 50), "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 99)])
    opened, doubts = open_picture(frames, "it", 8)
    assert colour(opened) == [50, 50, 50] and doubts == ["only the first of its frames is read"]


def test_a_large_jpeg_is_decoded_smaller_but_not_below_the_side() -> None:
    content = encoded(smooth(1600, 1200), "JPEG", quality=95)
    opened, _ = open_picture(content, "it", 200)
    assert opened.size == (400, 300)
    whole, _ = open_picture(content, "it", 1200)
    assert whole.size == (1600, 1200)
    assert np.abs(fit_photo(opened, 3, 100).astype(int) - fit_photo(whole, 3, 100)).max() <= 3


def test_suffixes_are_those_of_the_formats() -> None:
    known = Image.registered_extensions()
    assert {known[suffix] for suffix in PICTURE_SUFFIXES} == {*PICTURE_FORMATS}
