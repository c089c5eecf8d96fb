"""A user's files as images of a model's shape; MNIST's rule is tested in test_digit_image.py."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from thaw.data.idx import write_idx
from thaw.data.pictures import fit_photo
from thaw.data.readers import ImageReader, is_idx


def encoded(image: Image.Image, format: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 24, 40), (1, 40, 24)])
def test_photographs_are_read_as_in_training(shape: tuple[int, int, int]) -> None:
    """Upright, the centre square, in the model's channels; of images that are not square a model sees the centre."""
    channels, height, width = shape
    side = min(height, width)
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    content = encoded(picture, "PNG", exif=turned)
    [read] = ImageReader("photo", shape).file(content, "it")
    assert read.image is not None and read.image.dtype == np.uint8 and read.image.shape == shape and not read.warning
    top, left = (height - side) // 2, (width - side) // 2
    expected = fit_photo(picture.transpose(Image.Transpose.ROTATE_270), channels, side)
    assert np.array_equal(read.image[:, top : top + side, left : left + side], expected)


def test_arrays_of_the_models_size_stay_as_they_are() -> None:
    images = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    found = list(ImageReader("photo", (1, 20, 30)).file(write_idx(images), "it"))
    assert np.array_equal([one.image for one in found], images[:, None].numpy())
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(ImageReader("photo", (3, 20, 30)).array(pixels, "it").image, pixels.transpose(2, 0, 1))


def test_arrays_of_another_size_are_fitted() -> None:
    images = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    for channels in (1, 3):
        for one, image in zip(
            ImageReader("photo", (channels, 8, 8)).file(write_idx(images), "it"), images.numpy(), strict=True
        ):
            assert np.array_equal(one.image, fit_photo(Image.fromarray(image), channels, 8))


def test_what_cannot_be_read_is_an_error_in_its_place() -> None:
    reader = ImageReader("photo", (3, 8, 8))
    [read] = reader.file(b"no picture", "it.png")
    assert read.image is None and read.error.startswith("it.png is not a PNG, JPEG")
    with pytest.raises(ValueError, match=r"it\.idx.*shape \(4,\)"):
        list(reader.file(write_idx(torch.zeros(4, dtype=torch.uint8)), "it.idx"))


def test_readers_that_a_model_cannot_have() -> None:
    assert ImageReader("photo", [3, 8, 8]).shape == (3, 8, 8) and ImageReader("digit", (1, 28, 28)).is_digit
    with pytest.raises(ValueError, match=r"reader=pdf makes no images .* choose photo"):
        ImageReader("pdf", (1, 28, 28))
    with pytest.raises(ValueError, match=r"reader=digit makes no images of the shape \(3, 32, 32\).* choose photo"):
        ImageReader("digit", (3, 32, 32))


def test_what_is_idx() -> None:
    """The element types of the format: unsigned and signed bytes, short and long integers, floats and doubles."""
    assert [kind for kind in range(256) if is_idx(bytes([0, 0, kind, 3]))] == [8, 9, 11, 12, 13, 14]
    assert not is_idx(b"\0\1\x08\3") and not is_idx(b"\1\0\x08\3")
