"""From a picture of a digit, of any size and colours, to 28 x 28 pixels as in MNIST.

MNIST's rule (LeCun et al. 1998, section III.A; http://yann.lecun.com/exdb/mnist): the digit is scaled to fit a box of
20 x 20 pixels, keeping its aspect ratio and smoothing its edges, and placed so that its centre of mass is the centre of
a field of 28 x 28. Ink is 255, background 0.
"""

from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.measure import regionprops
from skimage.morphology import closing, disk, opening

from thaw.run.errors import UserError

SIDE, BOX = 28, 20  # pixels: of the field, and of the box that the digit fits
CENTRE = 14  # row and column of the centre of mass; 14.0 on average in MNIST's own training images
WORKING_SIDE = 1024  # pixels; larger pictures are reduced before the search for the digit
SHADOW_SIDE = 400  # pixels; pictures partly in shadow are reduced to this size to estimate their background
FAINTEST = 0.1  # contrast, from 0 to 1, below which a picture counts as empty
UNEVEN_BORDER = 0.2  # share by which part of the border must be darker than the rest to be in shadow
SPECK = 0.03  # ink, as a share of the largest stroke's, below which a separate stroke counts as dirt
MAX_STROKES = 100  # examined in one picture
SECOND = 0.3  # size, as a share of the largest stroke's, from which another stroke may be a second digit
WIDE = 1.5  # ratio of width to height above which one stroke may be two digits; 0.2 % of MNIST's digits exceed it


def are_like_mnist(images: np.ndarray) -> np.ndarray:
    """(N, H, W) -> bool (N,): images taken unchanged, of 28 x 28 pixels with ink on a dark background."""
    if images.shape[1:] != (SIDE, SIDE):
        return np.zeros(len(images), dtype=bool)
    edges = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    contrasts = np.ptp(images.reshape(len(images), -1), axis=1)
    return ((edges > 64).mean(axis=1) < 0.5) & (contrasts >= 255 * FAINTEST)


def find_digit(picture: Image.Image) -> tuple[np.ndarray, str]:
    """The digit of a picture by MNIST's rule, uint8 (28, 28), and a doubt about it, or an empty string.

    Ink is what differs from the background, so that neither inversion nor colour matters.

    Raises:
        UserError: the picture is of one colour. The message needs a name before it.
    """
    ink, doubt = find_strokes(as_rgb(picture), sheets=2)  # (H, W) from 0 to 1
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    digit = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if not doubt and digit.shape[1] > WIDE * digit.shape[0]:
        doubt = f"it is wider than {WIDE} times its height, so it may be more than one digit"
    return centred(fit_box(digit)), doubt


def as_rgb(picture: Image.Image) -> np.ndarray:
    """Pixels (H, W, 3) from 0 to 1, at most `WORKING_SIDE` high and wide."""
    if picture.mode[0] in "IF":  # 16 or 32 bits of grey
        picture = picture if picture.mode == "F" else picture.convert("I").convert("F")
        picture.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
        values = np.nan_to_num(np.asarray(picture), posinf=0, neginf=0)
        values -= min(values.min(), 0)
        picture = Image.fromarray((values * (255 / (values.max() or 1))).astype(np.uint8))
    picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
    if picture.mode == "RGBA":
        picture = on_contrast(picture).convert("RGB")
    return np.asarray(picture, dtype=np.float32) / 255


def on_contrast(picture: Image.Image) -> Image.Image:
    """A transparent picture on white, or on black if the drawing is bright."""
    pixels = np.asarray(picture, dtype=np.float32)
    opacity = pixels[..., 3]
    brightness = np.average(pixels[..., :3].mean(axis=2), weights=opacity) if opacity.any() else 0
    background = Image.new("RGBA", picture.size, "black" if brightness > 127 else "white")
    return Image.alpha_composite(background, picture)


def border(pixels: np.ndarray) -> np.ndarray:
    """The outermost pixels of (H, W, ...) as (M, ...)."""
    width = max(1, min(pixels.shape[:2]) // 50)
    inside = np.zeros(pixels.shape[:2], dtype=bool)
    inside[width:-width, width:-width] = True
    return pixels[~inside]


def contrast(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> ink (H, W), from 0 to 1: how far each pixel is from the background.

    The background is the median of the border; the distance is the largest over the channels. A border of uneven
    brightness may lie partly in shadow: then each pixel is compared with the background around it.
    """
    edge = border(pixels)
    darkest, brightest = np.quantile(edge.mean(axis=1), (0.05, 0.95))
    if brightest - darkest > max(UNEVEN_BORDER * brightest, FAINTEST / 2):
        ink = contrast_in_shadow(pixels.mean(axis=2), darkest, brightest)
        if np.quantile(border(ink), 0.97) < 1.5 * FAINTEST < ink.max():
            return ink  # otherwise ink or a frame makes the border uneven
    return np.abs(pixels - np.quantile(edge, 0.5, axis=0, method="nearest")).max(axis=2)


def contrast_in_shadow(grey: np.ndarray, darkest: float, brightest: float) -> np.ndarray:
    """(H, W) -> ink (H, W): the share by which each pixel is darker, or brighter, than the background around it.

    A morphological closing (an opening for bright ink) removes strokes and keeps the edge of a shadow in place. Ink is
    a share because a shadow darkens ink and background by the same factor.

    `darkest` and `brightest` are the border's. Dark ink in the shadow is darker than all of it, bright ink in the light
    brighter than all of it; without either, every pixel counts as ink.
    """
    darker, brighter = (grey < darkest - FAINTEST).mean(), (grey > brightest + FAINTEST).mean()
    if max(darker, brighter) < 0.002:
        return np.ones_like(grey)
    height, width = grey.shape
    scale = min(1, SHADOW_SIDE / max(grey.shape))
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    small = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BOX))
    reach = max(1, max(size) // 6)  # half of the greatest width of a stroke
    small = np.pad(ndimage.gaussian_filter(small, 1), reach, mode="edge")
    footprint = disk(reach, decomposition="sequence")
    if brighter > darker:
        ink = 1 - (opening(small, footprint) + 0.1) / (small + 0.1)  # 0.1, or noise on black would be a large share
    else:
        ink = 1 - (small + 0.02) / (closing(small, footprint) + 0.02)
    ink = ink[reach:-reach, reach:-reach]
    return np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR))


def find_strokes(pixels: np.ndarray, sheets: int) -> tuple[np.ndarray, str]:
    """The ink of the digit (H, W) without specks, frames and an uneven background, and a doubt about it.

    A pixel of (H, W, 3) counts if its contrast exceeds the border's own variation and it is connected to one above
    Otsu's threshold (1979). Inside what looks like a sheet of paper or a frame, the search starts again up to `sheets`
    times.
    """
    ink = contrast(pixels)
    if ink.max() < FAINTEST:
        raise UserError("shows no digit: all its pixels have about the same colour.")
    surely = threshold_otsu(ink)
    faint = np.clip(1.5 * np.quantile(border(ink), 0.98), 0.05, surely / 2)
    labels, count = ndimage.label(ink > faint, structure=np.ones((3, 3)))
    numbers = np.arange(1, count + 1)
    amounts = ndimage.sum_labels(ink, labels, numbers)
    sure = ndimage.maximum(ink, labels, numbers) >= surely
    largest_ones = np.argsort(np.where(sure, amounts, 0))[-min(MAX_STROKES, sure.sum()) :]
    chosen = largest_ones[amounts[largest_ones] >= SPECK * amounts.max()]
    chosen = chosen if chosen.size else largest_ones  # in noise all may be specks
    strokes = regionprops(np.where(np.isin(labels, numbers[chosen]), labels, 0))
    largest = max(strokes, key=lambda stroke: stroke.area_filled)
    if sheets and is_sheet(largest):
        cut = 1 + round(0.01 * max(ink.shape))  # its blurred edge
        inside = pixels[largest.slice][cut:-cut, cut:-cut]
        if inside.size and contrast(inside).max() >= FAINTEST:
            return find_strokes(inside, sheets - 1)
    strokes = without_frames(strokes, ink.shape)
    length = max(map(side, strokes))
    shapes = sum(side(stroke) >= SECOND * length for stroke in strokes)
    doubt = f"it shows {shapes} separate shapes, so it may be more than one digit" if shapes > 1 else ""
    return np.where(np.isin(labels, [stroke.label for stroke in strokes]), ink, 0), doubt


def is_sheet(stroke: Any) -> bool:
    """Whether a region is nearly a full rectangle but not a bar: paper or the inside of a frame, with a digit on it."""
    height, width = stroke.image.shape
    full = stroke.area_filled > 0.93 * stroke.area_bbox and stroke.area > 0.65 * stroke.area_bbox
    return full and 1 / 3 < height / width < 3


def without_frames(strokes: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Drop strokes that enclose another one or run along the edge of the picture from one end to the other."""
    strokes = [stroke for stroke in strokes if not any(encloses(stroke, other) for other in strokes)]
    margin = max(1, round(0.1 * min(shape)))

    def lies_inside(stroke: Any) -> bool:
        to_edge = np.minimum(stroke.coords, np.array(shape) - 1 - stroke.coords)  # (M, 2) pixels
        return bool((to_edge >= margin).all(axis=1).any() or (np.array(stroke.image.shape) < shape).all())

    return list(filter(lies_inside, strokes)) or strokes


def encloses(outer: Any, inner: Any) -> bool:
    """Whether a region lies in a hole of another one and is not a speck, such as the dot in a 0."""
    (top, left, bottom, right), (first, start, last, end) = outer.bbox, inner.bbox
    if not (top < first and left < start and last < bottom and end < right and side(inner) >= 0.25 * side(outer)):
        return False
    rows, columns = inner.coords.T
    return bool(outer.image_filled[rows - top, columns - left].all())


def side(stroke: Any) -> int:
    """The longer side of a region's bounding box, in pixels."""
    return max(stroke.image.shape)


def fit_box(digit: np.ndarray) -> np.ndarray:
    """Scale (H, W) to fit 20 x 20 pixels with the same aspect ratio, and the darkest ink to 1."""
    height, width = digit.shape
    scale = BOX / max(height, width)
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    kernel = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR  # means of areas: no ringing, no blur
    scaled = np.asarray(Image.fromarray(digit).resize(size, kernel))
    return scaled / scaled.max()


def centred(digit: np.ndarray) -> np.ndarray:
    """uint8 (28, 28) with the digit's centre of mass as near the centre as whole pixels and the field allow."""
    field = np.zeros((SIDE, SIDE), dtype=np.uint8)
    lengths, means = np.array(digit.shape), np.array(ndimage.center_of_mass(digit))
    top, left = np.clip(np.round(CENTRE - means).astype(int), 0, SIDE - lengths)
    field[top : top + lengths[0], left : left + lengths[1]] = np.round(255 * digit)
    return field
