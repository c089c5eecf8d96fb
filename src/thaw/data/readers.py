"""Reads a user's files into images of a model's shape."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from thaw.data.digit_image import SIDE, WORKING_SIDE, are_like_mnist, find_digit
from thaw.data.idx import read_idx, unpacked
from thaw.data.pictures import PICTURE_FORMATS, fit_photo, open_picture, shape_doubts
from thaw.run.errors import UserError

READABLE = f"{', '.join(PICTURE_FORMATS)} or IDX file"


class Reading(NamedTuple):
    """One image, uint8 (C, H, W), or an error that says why there is none; `warning` names doubts."""

    image: np.ndarray | None
    error: str = ""
    warning: str = ""


class ImageReader:
    """Makes a model's images (C, H, W) from pictures and arrays.

    Args:
        kind: `photo` takes the centre square of a picture, as training does with the files of a folder; `digit` finds
            the digit and brings it to MNIST's form, see `thaw.data.digit_image`.
        shape: (C, H, W) of the images.

    Raises:
        UserError: no such kind, or one that makes images of another shape.
    """

    def __init__(self, kind: str, shape: Sequence[int]) -> None:
        self.is_digit, self.kind, self.shape = kind == "digit", kind, tuple(shape)
        if kind not in ("digit", "photo") or (self.is_digit and self.shape != (1, SIDE, SIDE)):
            raise UserError(
                f"reader={kind} makes no images of the shape {self.shape}, which this model takes; choose photo, for "
                f"(1, {SIDE}, {SIDE}) also digit, or null for the checkpoint's."
            )
        self.side = min(self.shape[1:])

    def file(self, content: bytes, name: str) -> Iterator[Reading]:
        """The images in a file: one in a picture (`PICTURE_FORMATS`), any number in an IDX file, each also as .gz.

        Raises:
            UserError: an IDX or .gz file is damaged or too large; begins with `name`.
        """
        content = unpack(content, name)
        if not is_idx(content):
            yield self.picture(content, name)
            return
        images = read_images(content, name)
        for index, (pixels, unchanged) in enumerate(zip(images, self.are_inputs(images), strict=True)):
            yield Reading(pixels[None]) if unchanged else self.array(pixels, f"{name}, image {index},")

    def picture(self, content: bytes, name: str) -> Reading:
        """The image in a file of one of `PICTURE_FORMATS`."""
        decoded_side = WORKING_SIDE if self.is_digit else 2 * self.side  # of a JPEG at least, as in training
        try:
            picture, doubts = open_picture(content, name, decoded_side)
        except UserError as error:
            return Reading(None, str(error))
        return self.opened(picture, name, doubts)

    def array(self, pixels: np.ndarray, name: str) -> Reading:
        """The image in uint8 (H, W) or (H, W, 3) of any size; a digit may have any contrast and polarity."""
        doubts = []
        if self.is_digit and pixels.max() == 1 and pixels.min() == 0:
            pixels = 255 * pixels
            doubts.append("its pixels are 0 and 1, read as 0 and 255")
        if self.are_inputs(pixels[None])[0]:
            image = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            return Reading(image, warning="; ".join(doubts))
        if self.is_digit and pixels.shape == (SIDE, SIDE):
            doubts.append("its background is not dark as MNIST's is, so it is read as a picture")
        return self.opened(Image.fromarray(pixels), name, doubts)

    def are_inputs(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W) or (N, H, W, 3) -> bool (N,): images taken unchanged."""
        if self.is_digit:
            return are_like_mnist(images)
        channels, *size = self.shape
        return np.full(len(images), [*images.shape[1:]] == (size if channels == 1 else [*size, channels]))

    def opened(self, picture: Image.Image, name: str, doubts: Sequence[str]) -> Reading:
        image = np.zeros(self.shape, dtype=np.uint8)  # a model sees the centre square
        top, left = ((length - self.side) // 2 for length in self.shape[1:])
        centre = image[:, top : top + self.side, left : left + self.side]
        doubt = ""
        try:
            if self.is_digit:
                centre[0], doubt = find_digit(picture)
            else:
                centre[:], doubt = fit_photo(picture, len(image), self.side), "; ".join(shape_doubts(picture))
        except Exception as error:  # numpy and Pillow raise nearly anything for odd modes and sizes
            damage = f"cannot be read ({type(error).__name__}: {error})."
            return Reading(None, f"{name} {error if isinstance(error, UserError) else damage}")
        return Reading(image, warning="; ".join(filter(None, [*doubts, doubt])))


def unpack(content: bytes, name: str) -> bytes:
    """The content of a file that gzip may have packed; a UserError if that is damaged, too large or empty."""
    content = unpacked(content, name)
    if not content:
        raise UserError(f"{name} is empty; give a {READABLE}.")
    return content


def is_idx(content: bytes) -> bool:
    """Whether content begins with two zero bytes, as HEIC and icons do too, and an element type of IDX."""
    return content[:2] == b"\0\0" and content[2:3] in (b"\x08", b"\x09", b"\x0b", b"\x0c", b"\x0d", b"\x0e")


def read_images(content: bytes, name: str) -> np.ndarray:
    """The images of an IDX file, uint8 (N, H, W), N at least 1."""
    images = read_idx(content, name).numpy()
    if images.ndim != 3 or not images.size:
        raise UserError(f"{name}: IDX data of shape {images.shape}, expected images (N, height, width).")
    return images
