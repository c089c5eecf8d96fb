"""The JavaScript of a page that answers in the browser reads pictures as Python does; needs no model, no network."""

import base64
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageDraw

from thaw.data.readers import ImageReader, Reading

READER = ROOT / "src/thaw/pages/templates/reader.js"
READ = """([base64, width, shape]) => {
    const data = Uint8ClampedArray.from(atob(base64), letter => letter.charCodeAt(0));
    const picture = new ImageData(data, width), result = shape ? readPhoto(picture, shape) : readDigit(picture);
    return { ...result, image: result.image && [...result.image] };
}"""


@pytest.fixture(scope="module")
def read(browser: Any) -> Iterator[Callable[..., Reading]]:
    """Read the pixels of a picture in the browser, as a digit or as a photograph for a model's shape."""
    page = browser.new_page()
    page.set_content(f"<script>{READER.read_text()}</script>")

    def ask(picture: Image.Image, shape: tuple[int, ...] | None = None) -> Reading:
        pixels = base64.b64encode(picture.convert("RGBA").tobytes()).decode()
        answer = page.evaluate(READ, [pixels, picture.width, shape])
        image = np.array(answer["image"], dtype=np.uint8).reshape(shape or (1, 28, 28)) if answer["image"] else None
        return Reading(image, answer.get("error", ""), answer.get("warning", ""))

    yield ask
    page.close()


def pictures_of(digits: list[np.ndarray]) -> dict[str, Image.Image]:
    """Pictures of digits as people make them: of any size, colours and place, on paper, in a frame, with dirt."""
    random = np.random.default_rng(0)
    made: dict[str, Image.Image] = {}

    def draw(name: str, digit: np.ndarray, size: int, paper: tuple[int, ...], ink: tuple[int, ...]) -> Image.Image:
        large = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
        made[name] = Image.new("RGB", (size + 37, size + 90), paper)
        made[name].paste(ink, (21, 60), large)
        return made[name]

    for number, digit in enumerate(digits):
        for size in (28, 61, 160, 391):
            draw(f"{number} of {size}", digit, size, (0, 0, 0), (255, 255, 255))
        draw(f"{number} in colours", digit, 130, (250, 240, 90), (40, 60, 200))
        noisy = np.asarray(draw(f"{number} with noise", digit, 130, (230, 225, 220), (40, 40, 60))).astype(float)
        noisy += random.normal(0, 6, noisy.shape)
        made[f"{number} with noise"] = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    pen = {"outline": "black", "width": 3}
    ImageDraw.Draw(draw("framed", digits[4], 130, (255, 255, 255), (0, 0, 0))).rectangle((3, 3, 160, 210), **pen)
    ImageDraw.Draw(draw("ruled", digits[3], 130, (255, 255, 255), (0, 0, 0))).line((0, 215, 166, 215), "black", 2)
    ImageDraw.Draw(draw("with specks", digits[2], 130, (255, 255, 255), (0, 0, 0))).point([(5, 5), (150, 9)], "black")
    made["sheet"] = Image.new("RGB", (400, 420), (90, 60, 40))
    made["sheet"].paste(made["6 in colours"], (90, 80))
    made["two"] = Image.new("RGB", (500, 300))
    for place, digit in enumerate(digits[2:4]):
        made["two"].paste(Image.fromarray(digit).resize((200, 200)), (30 + 220 * place, 50))
    made["wide"] = Image.new("RGB", (300, 120), "white")
    ImageDraw.Draw(made["wide"]).line((40, 60, 260, 70), "black", 12)
    made["clear"] = Image.new("RGBA", (200, 200))
    made["clear"].paste((255, 0, 0), (20, 20), Image.fromarray(digits[5]).resize((160, 160)))
    made["large"] = Image.fromarray(np.kron(255 - digits[8], np.ones((60, 50), dtype=np.uint8)))
    return made


FEW = ("3 of 61", "4 in colours", "8 with noise", "framed", "ruled", "with specks", "sheet", "two", "wide", "clear")


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.long)])
def test_digits(read: Callable[..., Reading], digits: list[np.ndarray], all_of_them: bool) -> None:
    """Equal to Python's in every pixel but for one step of brightness, and so are the doubts."""
    reader = ImageReader("digit", (1, 28, 28))
    pictures = pictures_of(digits)
    for name in pictures if all_of_them else FEW:
        picture = pictures[name]
        given, wanted = read(picture), reader.opened(picture, "The picture", [])
        assert given.image is not None and wanted.image is not None, name
        assert np.abs(given.image.astype(int) - wanted.image).max() <= 1, name
        assert given.warning == wanted.warning, name
    assert len(pictures) == 68


def test_no_digit_and_a_shadow(read: Callable[..., Reading], digits: list[np.ndarray]) -> None:
    empty = Image.new("RGB", (50, 60), "grey")
    assert read(empty).error == ImageReader("digit", (1, 28, 28)).opened(empty, "The picture", []).error
    shaded = 250 - 0.8 * np.kron(digits[3], np.ones((5, 5)))
    shaded[:, 70:] *= 0.6
    assert "removes no shadow" in read(Image.fromarray(shaded.astype(np.uint8))).warning


LARGE = [pytest.param(shape, marks=pytest.mark.long) for shape in ((1, 28, 28), (3, 48, 64), (3, 224, 224))]


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 40, 24), *LARGE])
def test_photographs(read: Callable[..., Reading], shape: tuple[int, ...]) -> None:
    """The centre square, smaller or larger, upright or lying, opaque or not."""
    random, reader = np.random.default_rng(1), ImageReader("photo", shape)
    for size in ((300, 200), (97, 160), (20, 21), (7, 90)):
        noise = Image.fromarray(random.integers(0, 256, (9, 9, 4), dtype=np.uint8), "RGBA").resize(size)
        for picture in (noise.convert("RGB"), noise):
            given, wanted = read(picture, shape), reader.opened(picture, "it", [])
            assert given.image is not None and wanted.image is not None
            assert np.abs(given.image.astype(int) - wanted.image).max() <= 2
            assert np.abs(given.image.astype(int) - wanted.image).mean() < 0.1
            assert given.warning == wanted.warning
