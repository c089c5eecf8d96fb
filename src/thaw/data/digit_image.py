"""From a picture of a digit, of any size and colours, to the 28 x 28 pixels that MNIST would have made of it.

MNIST's rule (LeCun et al. 1998, section III.A; http://yann.lecun.com/exdb/mnist): the digit is scaled to fit a box of
20 x 20 pixels, its aspect ratio kept and its edges smoothed, and placed so that its centre of mass is the centre of a
field of 28 x 28. Ink is 255, background 0.
"""

import gzip
import io
import re
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from torch import Tensor

from thaw.data.idx import read_idx

SIDE, BOX = 28, 20  # pixels: of the field, and of the box that the digit fits
CENTRE = 14  # row and column of the centre of mass; 14.0 on average in MNIST's own training images
MAX_PIXELS = 50_000_000  # of a picture; a small file may claim more
MAX_BYTES = 64_000_000  # of an IDX file once decompressed: all 70,000 digits of MNIST have 55 MB
WORKING_SIDE = 1024  # pixels; larger pictures are reduced before the digit is looked for
FAINTEST = 0.1  # contrast, from 0 to 1, below which a picture counts as empty
SPECK = 0.03  # ink, as a share of the largest stroke's, below which a separate stroke counts as dirt


def read_digits(content: bytes, name: str) -> Tensor:
    """The digits in a file: one in a PNG or JPEG, any number in an IDX file (also as .gz).

    Args:
        content: the whole file.
        name: what an error calls it.

    Returns:
        uint8 (N, 28, 28). Images of an IDX file that have this size already are taken as they are.

    Raises:
        ValueError: no such file, a damaged one, one that is too large, or a picture without a digit.
    """
    if not content:
        raise ValueError(f"{name} is empty; give a PNG, a JPEG or an IDX file.")
    if content[:2] == b"\x1f\x8b":
        content = decompress(content, name)
    if content[:2] != b"\0\0":
        return find_digit(open_picture(content, name), name)[None]
    images = read_idx(content, name)
    if images.ndim != 3 or not images.numel():
        raise ValueError(f"{name}: IDX data of shape {tuple(images.shape)}, expected images (N, height, width).")
    if images.shape[1:] == (SIDE, SIDE):
        return images
    return torch.stack([find_digit(Image.fromarray(image.numpy()), name) for image in images])


def decompress(content: bytes, name: str) -> bytes:
    """Gunzip at most `MAX_BYTES`."""
    try:
        with gzip.open(io.BytesIO(content)) as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name} is a damaged gzip file ({error}).") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name} holds more than {MAX_BYTES:,} bytes; split it.")
    return content


def open_picture(content: bytes, name: str) -> Image.Image:
    """Decode a PNG or JPEG, upright, after a look at the size that its header claims."""
    try:
        picture = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(
                f"{name} claims {picture.width:,} x {picture.height:,} pixels; at most {MAX_PIXELS:,} are read: "
                "reduce it."
            )
        picture.draft("RGB", (WORKING_SIDE, WORKING_SIDE))  # a JPEG is decoded at about that size
        picture.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is neither a PNG, a JPEG nor an IDX file.") from error
    except Image.DecompressionBombError as error:
        claimed = "".join(f"{int(number):,} " for number in re.findall(r"\d+", str(error))[:1])  # Pillow looks first
        raise ValueError(f"{name} claims {claimed}pixels; at most {MAX_PIXELS:,} are read: reduce it.") from error
    except (OSError, SyntaxError, EOFError, zlib.error) as error:  # what Pillow raises for damaged data
        raise ValueError(f"{name} is a damaged picture ({error}).") from error
    return ImageOps.exif_transpose(picture)


def find_digit(picture: Image.Image, name: str) -> Tensor:
    """The digit of a picture by MNIST's rule, uint8 (28, 28).

    Ink is what differs from the colour of the picture's border, so that neither inversion nor colour matters.

    Raises:
        ValueError: the picture is of one colour.
    """
    ink = strokes(distance_from_border(picture), name)  # (H, W) from 0 to 1
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    digit = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return torch.from_numpy(place(fit_box(digit)))


def distance_from_border(picture: Image.Image) -> np.ndarray:
    """(H, W) from 0 to 1: how far each pixel is from the median of the border, in the channel where it is farthest."""
    if picture.mode[0] in "IF":  # 16 or 32 bits of grey
        values = np.asarray(picture, dtype=np.float32)
        picture = Image.fromarray((values * (255 / max(values.max(), 1))).astype(np.uint8))
    if picture.has_transparency_data:
        picture = on_contrast(picture.convert("RGBA"))
    picture = picture.convert("RGB")
    picture.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(picture, dtype=np.float32) / 255  # (H, W, 3)
    return np.abs(pixels - np.median(border(pixels), axis=0)).max(axis=2)


def on_contrast(picture: Image.Image) -> Image.Image:
    """A transparent picture on white, or on black where what is drawn is bright."""
    pixels = np.asarray(picture, dtype=np.float32)
    opacity = pixels[..., 3]
    brightness = np.average(pixels[..., :3].mean(axis=2), weights=opacity) if opacity.any() else 0
    ground = Image.new("RGBA", picture.size, "black" if brightness > 127 else "white")
    return Image.alpha_composite(ground, picture)


def border(pixels: np.ndarray) -> np.ndarray:
    """The outermost pixels of (H, W, ...) as (M, ...)."""
    width = max(1, min(pixels.shape[:2]) // 50)
    inside = np.zeros(pixels.shape[:2], dtype=bool)
    inside[width:-width, width:-width] = True
    return pixels[~inside]


def strokes(ink: np.ndarray, name: str) -> np.ndarray:
    """The ink of the digit alone: without the unevenness of the ground, and without specks.

    Pixels count that are darker than the border's own variation and connected to one above Otsu's threshold (1979).
    """
    if ink.max() < FAINTEST:
        raise ValueError(f"{name} shows no digit: all its pixels have about the same colour.")
    surely = otsu(ink)
    faint = np.clip(1.5 * np.quantile(border(ink), 0.98), 0.05, surely / 2)
    labels, count = ndimage.label(ink > faint, structure=np.ones((3, 3)))
    numbers = np.arange(1, count + 1)
    amounts = ndimage.sum_labels(ink, labels, numbers)
    kept = (ndimage.maximum(ink, labels, numbers) >= surely) & (amounts >= SPECK * amounts.max())
    return np.where(np.isin(labels, numbers[kept]), ink, 0)


def otsu(values: np.ndarray) -> float:
    """The threshold that separates two groups of values with the largest variance between them (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=256, range=(0, values.max()))
    centres = (edges[:-1] + edges[1:]) / 2
    below, above = counts.cumsum(), counts[::-1].cumsum()[::-1]
    sums = (counts * centres).cumsum()
    mean_below = sums[:-1] / np.maximum(below[:-1], 1)
    mean_above = (sums[-1] - sums[:-1]) / np.maximum(above[1:], 1)
    return float(edges[1:-1][np.argmax(below[:-1] * above[1:] * (mean_below - mean_above) ** 2)])


def fit_box(digit: np.ndarray) -> np.ndarray:
    """Scale (H, W) to fit 20 x 20 pixels, the aspect ratio kept, and its darkest ink to 1."""
    height, width = digit.shape
    scale = BOX / max(height, width)
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    kernel = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR  # means of areas: no ringing, no blur
    scaled = np.asarray(Image.fromarray(digit).resize(size, kernel))
    return scaled / scaled.max()


def place(digit: np.ndarray) -> np.ndarray:
    """uint8 (28, 28) with the digit's centre of mass in the centre, as near as whole pixels and the frame allow."""
    field = np.zeros((SIDE, SIDE), dtype=np.uint8)
    corner = [
        int(np.clip(round(CENTRE - mean), 0, SIDE - length))
        for mean, length in zip(ndimage.center_of_mass(digit), digit.shape, strict=True)
    ]
    target = tuple(slice(start, start + length) for start, length in zip(corner, digit.shape, strict=True))
    field[target] = np.round(255 * digit)
    return field
