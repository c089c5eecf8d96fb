"""Common corruptions of images: MNIST-C (Mu & Gilmer 2019, arXiv:1906.02337), CIFAR-10-C and ImageNet-C (Hendrycks &
Dietterich 2019, arXiv:1903.12261).

Written anew from the papers, with their names and the parameters of their released generators, so images are not those
of the released files. ImageNet-C's `frost`, which needs photographs of frost, is left out. Random numbers belong to
an image's place in its dataset: they are the same in every run, for every severity and however images are batched.

Shapes: N images x of float64 (N, C, H, W) from 0 to 1, one random generator for each. Lengths are pixels of the side
for which a set was made, and grow with the images' shorter side: `unit` is their ratio.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from io import BytesIO
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage, signal
from torch import Tensor

Array = NDArray[Any]
Generators = list[np.random.Generator]
PLASMA_POINTS = 2**20  # of the fractals from which fog is cut


class Corruption(NamedTuple):
    """A way to make images harder: `apply(x, level, unit, generators)` returns x corrupted, not yet clipped."""

    apply: Callable[[Array, Any, float, Generators], Array]
    levels: tuple[Any, ...]  # for severity 1, 2, ...; one if the corruption has no severity
    side: int  # for which lengths are given


def corrupt(images: Tensor, corruption: Corruption, severity: int, places: Sequence[int]) -> Tensor:
    """Corrupt uint8 (N, C, H, W) at a severity from 1; `places` (N,) of the images in their dataset seed the chance."""
    generators = [np.random.default_rng(place) for place in places]
    unit = min(images.shape[-2:]) / corruption.side
    harder = corruption.apply(images.numpy() / 255, corruption.levels[severity - 1], unit, generators)
    return torch.from_numpy((harder * 255).round().clip(0, 255).astype(np.uint8))


def draw(generators: Generators, sample: Callable[[np.random.Generator], Any]) -> Array:
    """What `sample` gives for each generator, stacked."""
    return np.stack([sample(generator) for generator in generators])


def signs(generators: Generators) -> Array:
    return draw(generators, lambda rng: rng.choice([-1, 1], 2))  # (N, 2)


# Noise


def gaussian_noise(x: Array, deviation: float, unit: float, generators: Generators) -> Array:
    return x + deviation * draw(generators, lambda rng: rng.standard_normal(x.shape[1:]))


def shot_noise(x: Array, photons: float, unit: float, generators: Generators) -> Array:
    """Counts of a Poisson distribution, of so many photons where a pixel is white."""
    return np.stack([rng.poisson(image * photons) / photons for image, rng in zip(x, generators, strict=True)])


def impulse_noise(x: Array, share: float, unit: float, generators: Generators) -> Array:
    """Salt and pepper, in equal shares."""
    chance = draw(generators, lambda rng: rng.random(x.shape[1:]))
    return np.where(chance < share / 2, 0, np.where(chance > 1 - share / 2, 1, x))


# Blur


def gaussian_blur(x: Array, deviation: float, unit: float, generators: Generators) -> Array:
    return gaussian(x, deviation * unit)


def gaussian(x: Array, deviation: float) -> Array:
    """A Gaussian over the last two axes."""
    return ndimage.gaussian_filter(x, deviation, axes=(-2, -1), mode="nearest")


def glass_blur(
    x: Array, level: tuple[float, int, int], unit: float, generators: Generators, share: float = 1.0
) -> Array:
    """Swap a share of the pixels with neighbours, one after the other, between two Gaussian blurs.

    `level` is the blurs' standard deviation, the longest distance and the number of rounds.
    """
    deviation, distance, rounds = level[0] * unit, max(1, round(level[1] * unit)), level[2]
    height, width = x.shape[2:]
    pixels = gaussian(x, deviation).transpose(2, 3, 0, 1).copy()  # (H, W, N, C)
    rows, columns = (np.arange(side - distance, distance, -1) for side in (height, width))
    every = np.arange(len(x))
    shape = (len(rows), len(columns))
    for _ in range(rounds):
        moves = draw(generators, lambda rng: rng.integers(-distance, distance, (*shape, 2)))  # (N, H, W, 2)
        moves *= draw(generators, lambda rng: rng.random((*shape, 1)) < share)
        for (i, row), (j, column) in ((a, b) for a in enumerate(rows) for b in enumerate(columns)):
            other = row + moves[:, i, j, 0], column + moves[:, i, j, 1], every
            here = pixels[row, column].copy()
            pixels[row, column] = pixels[other]
            pixels[other] = here
    return gaussian(pixels.transpose(2, 3, 0, 1), deviation)


def defocus_blur(x: Array, level: tuple[float, float], unit: float, generators: Generators) -> Array:
    """The mean over a disk of a radius, whose edge a Gaussian of a standard deviation softens."""
    radius, soft = level[0] * unit, level[1]
    margin = 1 + int(max(radius, 1))
    grid = np.arange(-margin, margin + 1)
    disk = (grid[:, None] ** 2 + grid**2 <= radius**2).astype(float)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), soft, radius=1 if radius <= 8 else 2, mode="mirror")
    padded = np.pad(x, [(0, 0), (0, 0), (margin, margin), (margin, margin)], mode="reflect")
    return signal.oaconvolve(padded, kernel[None, None], mode="valid", axes=(2, 3))


def motion_blur(x: Array, level: tuple[float, float], unit: float, generators: Generators) -> Array:
    """Along a random line from -45 to 45 degrees; `level` is the radius and the standard deviation of the trace."""
    return blur_along(x, level[0] * unit, level[1] * unit, draw(generators, lambda rng: rng.uniform(-45, 45)))


def blur_along(x: Array, radius: float, deviation: float, degrees: Array) -> Array:
    """One half of a Gaussian along a line for each image, as ImageMagick's motion blur, of 2 radius + 1 pixels."""
    steps = np.arange(2 * int(np.ceil(radius)) + 1)
    weights = np.exp(-(steps**2) / (2 * deviation**2))
    weights /= weights.sum()
    height, width = x.shape[2:]
    margin = len(steps)
    padded = np.pad(x, [(0, 0), (0, 0), (margin, margin), (margin, margin)], mode="edge")
    blurred = np.zeros_like(x)
    for result, image, angle in zip(blurred, padded, np.deg2rad(degrees), strict=True):
        downs, rights = (np.ceil(steps * f(angle) - 0.5).astype(int) + margin for f in (np.sin, np.cos))
        for weight, down, right in zip(weights, downs, rights, strict=True):
            result += weight * image[:, down : down + height, right : right + width]
    return blurred


def zoom_blur(x: Array, level: tuple[float, int], unit: float, generators: Generators) -> Array:
    """The mean of an image and of its magnifications; `level` is their step and number."""
    step, number = level
    return (x + sum(magnify(x, 1 + step * n) for n in range(number))) / (number + 1)


def magnify(x: Array, factor: float) -> Array:
    """The centre of images, bilinearly, at their own size."""
    sides = x.shape[-2:]
    inner = [int(np.ceil(side / factor)) for side in sides]
    parts = [slice((side - part) // 2, (side - part) // 2 + part) for side, part in zip(sides, inner, strict=True)]
    size = [max(round(part * factor), side) for part, side in zip(inner, sides, strict=True)]
    centre = torch.from_numpy(x[..., parts[0], parts[1]])
    large = F.interpolate(centre, size, mode="bilinear", align_corners=True).numpy()
    top, left = ((long - side) // 2 for long, side in zip(size, sides, strict=True))
    return large[..., top : top + sides[0], left : left + sides[1]]


# Weather


def fog(x: Array, level: tuple[float, float, int], unit: float, generators: Generators) -> Array:
    """Add a part of a plasma fractal; `level` is its weight, how fast its details fade, and its side."""
    thickness, decay, side = level
    maps = plasma_maps(2 ** int(np.ceil(np.log2(max(2, side * unit)))), decay)
    side = maps.shape[1]
    chosen = draw(generators, lambda rng: rng.integers(maps.shape))  # (N, 3)
    rows, columns = ((start[:, None] + np.arange(n)) % side for start, n in zip(chosen.T[1:], x.shape[2:], strict=True))
    clouds = maps[chosen[:, 0, None, None], rows[:, :, None], columns[:, None]]  # (N, H, W)
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    return (x + thickness * clouds[:, None]) * brightest / (brightest + thickness)


@lru_cache(maxsize=1)
def plasma_maps(side: int, decay: float) -> Array:
    """Plasma fractals (P, side, side) from 0 to 1, by the diamond-square algorithm on a torus; 16 of side 256."""
    chance = np.random.default_rng(0).uniform(-1, 1, (max(1, PLASMA_POINTS // side**2), side, side))
    maps, step, height = np.zeros_like(chance), side, 1.0

    def fill(rows: slice, columns: slice, sums: Array) -> None:
        maps[:, rows, columns] = sums / 4 + height * chance[:, rows, columns]

    while step >= 2:
        old, new = slice(0, None, step), slice(step // 2, None, step)
        corners = maps[:, old, old]
        pairs = corners + np.roll(corners, -1, axis=1)
        fill(new, new, pairs + np.roll(pairs, -1, axis=2))
        middles = maps[:, new, new]
        above = middles + np.roll(middles, 1, axis=1)
        beside = middles + np.roll(middles, 1, axis=2)
        fill(old, new, above + corners + np.roll(corners, -1, axis=2))
        fill(new, old, beside + pairs)
        step, height = step // 2, height / decay**2
    maps -= maps.min(axis=(1, 2), keepdims=True)
    return maps / maps.max(axis=(1, 2), keepdims=True)


def snow(x: Array, level: tuple[float, ...], unit: float, generators: Generators) -> Array:
    """Flakes that fall, twice, over a whitened image.

    `level` is the mean, standard deviation, size and threshold of the flakes, radius and standard deviation of their
    fall, and the share of the image that is not whitened.
    """
    mean, deviation, size, threshold, radius, blur, keep = level
    flakes = draw(generators, lambda rng: rng.normal(mean, deviation, (1, *x.shape[2:])))  # (N, 1, H, W)
    flakes = magnify(flakes, max(1.0, size * unit)).clip(0, 1)
    falls = draw(generators, lambda rng: rng.uniform(-135, -45))
    flakes = blur_along(np.where(flakes < threshold, 0, flakes), radius * unit, blur * unit, falls)
    white = keep * x + (1 - keep) * np.maximum(x, luma(x) * 1.5 + 0.5)
    return white + flakes + flakes[:, :, ::-1, ::-1]


def luma(x: Array) -> Array:
    """Luma (N, 1, H, W) of RGB images; of others the mean channel."""
    weights = np.array([0.299, 0.587, 0.114]) if x.shape[1] == 3 else np.full(x.shape[1], 1 / x.shape[1])
    return np.tensordot(x, weights, (1, 0))[:, None]


def spatter(x: Array, level: tuple[float, float, float, float, float], unit: float, generators: Generators) -> Array:
    """Dark drops; `level` is mean, standard deviation and blur of a liquid, the threshold of a drop and its blur."""
    mean, deviation, blur, threshold, edge = level
    liquid = draw(generators, lambda rng: rng.normal(mean, deviation, (1, *x.shape[2:])))
    drops = gaussian((gaussian(liquid, blur * unit) > threshold).astype(float), edge * unit)
    drops[drops < 0.8] = 0
    return x * (1 - drops) + 63 / 255 * drops


# Light


def brightness(x: Array, more: float, unit: float, generators: Generators) -> Array:
    """Raise the value of HSV, which keeps hue and saturation."""
    value = x.max(axis=1, keepdims=True)
    return np.divide(x, value, out=np.ones_like(x), where=value > 0) * np.minimum(value + more, 1)


def reduce_contrast(x: Array, share: float, unit: float, generators: Generators) -> Array:
    """Keep this share of each pixel's distance from the mean of its channel."""
    mean = x.mean(axis=(2, 3), keepdims=True)
    return mean + share * (x - mean)


# Geometry


def warp(x: Array, matrices: Array, shifts: Array | float = 0.0) -> Array:
    """Bilinearly fetch each pixel p of image n, (row, column) from the centre, at matrices[n] @ p + shifts[n]; outside
    is black."""
    centre = (np.array(x.shape[2:]) - 1) / 2
    offsets = centre - matrices @ centre + shifts  # (N, 2)
    settings: dict[str, Any] = {"order": 1, "mode": "grid-constant"}
    warped = np.empty_like(x)
    for result, image, matrix, offset in zip(warped, x, matrices, offsets, strict=True):
        for channel, pixels in zip(result, image, strict=True):
            ndimage.affine_transform(pixels, matrix, offset, output=channel, **settings)
    return warped


def rotate(x: Array, radians: float, unit: float, generators: Generators) -> Array:
    angles = radians * signs(generators)[:, 0]
    sine, cosine = np.sin(angles), np.cos(angles)
    return warp(x, np.stack([np.stack([cosine, sine], 1), np.stack([-sine, cosine], 1)], 1))


def shear(x: Array, radians: float, unit: float, generators: Generators) -> Array:
    """Slant the rows, which lengthens the columns, as the generator's scikit-image did."""
    angles = radians * signs(generators)[:, 0]
    none = np.zeros_like(angles)
    return warp(x, np.stack([np.stack([np.cos(angles), none], 1), np.stack([-np.sin(angles), none + 1], 1)], 1))


def scale(x: Array, factor: float, unit: float, generators: Generators) -> Array:
    return warp(x, np.tile(np.eye(2) / factor, (len(x), 1, 1)))


def translate(x: Array, length: float, unit: float, generators: Generators) -> Array:
    return warp(x, np.tile(np.eye(2), (len(x), 1, 1)), length * unit * signs(generators))


def elastic_transform(x: Array, level: tuple[float, float, float], unit: float, generators: Generators) -> Array:
    """Stretch by a random affine map and a smooth random field.

    `level` is the field's height and smoothness and the longest shift of the map's three points, in shares of the side.
    """
    height, width = x.shape[2:]
    side = min(height, width)
    stretch, deviation, shift = (length * side for length in level)
    decay = [np.exp(-((deviation * np.pi * np.arange(n) / n) ** 2) / 2) for n in (height, width)]
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij")).astype(float)  # (2, H, W)
    points = np.array([[1, 1], [1, -1], [-1, -1]]) * max(1, side // 3) + np.array([height, width]) // 2
    warped = np.empty_like(x)
    for result, image, rng in zip(warped, x, generators, strict=True):
        moved = np.column_stack([points + rng.uniform(-shift, shift, (3, 2)), np.ones(3)])
        back = np.linalg.solve(moved, points)  # (3, 2)
        field = rng.uniform(-1, 1, grid.shape)
        # a Gaussian filter on images mirrored at their edges is a product of cosine transforms, however wide it is
        field = fft.idctn(fft.dctn(field, axes=(1, 2)) * decay[0][:, None] * decay[1], axes=(1, 2))
        places = np.tensordot(back[:2].T, grid + stretch * field, 1) + back[2][:, None, None]
        for channel, pixels in zip(result, image, strict=True):
            ndimage.map_coordinates(pixels, places, output=channel, order=1, mode="mirror")
    return warped


# Strokes and patterns of MNIST-C


def strokes(x: Array, points: Sequence[Array], unit: float) -> Array:
    """Light (N, 1, H, W) around lines through points (P, 2) of each image, (column, row), from left to right."""
    height, width = x.shape[2:]
    columns, rows = np.arange(width) / unit, np.arange(height)[:, None] / unit
    light = np.zeros((len(x), 1, height, width))
    for image, line in zip(light[:, 0], points, strict=True):
        for (left, start), (right, end) in pairwise(line):
            if left != right:
                distance = abs(rows - start - (end - start) / (right - left) * (columns - left))
                inside = (columns >= np.floor(left)) & (columns < np.ceil(right))
                image += inside * np.maximum(0, 1 + np.log1p(-np.minimum(distance, 2.29) / 2.3))
    return light


def dotted_line(x: Array, level: None, unit: float, generators: Generators) -> Array:
    """A line across the image, of which each second dash of two pixels is drawn."""
    ends = draw(generators, lambda rng: rng.integers(0, 27, 2))
    light = strokes(x, [np.array([[0, start], [27, end]]) for start, end in ends], unit)
    return x + light * (np.arange(x.shape[3]) / unit // 2 % 2 == 1)


def zigzag(x: Array, level: None, unit: float, generators: Generators) -> Array:
    """A zigzag across the image, with turns every 4 pixels and 2 pixels beside a line."""
    lines = []
    for rng in generators:
        start = rng.integers(0, 27)
        way = np.array([23, rng.integers(-5, 5)])  # (column, row)
        length = np.hypot(*way)
        turns = np.arange(2, length, 4)
        along = np.concatenate([[0], turns, [length]])
        aside = np.concatenate([[0], 2.0 * (-1) ** np.arange(len(turns)), [0]])
        along_way, across_way = way / length, np.array([-way[1], way[0]]) / length
        lines.append(np.array([2, start]) + along[:, None] * along_way + aside[:, None] * across_way)
    return x + strokes(x, lines, unit)


def stripe(x: Array, level: None, unit: float, generators: Generators) -> Array:
    """Invert the left and the right quarter."""
    quarter = x.shape[3] // 4
    outer = (np.arange(x.shape[3]) < quarter) | (np.arange(x.shape[3]) >= x.shape[3] - quarter)
    return np.where(outer, 1 - x, x)


def canny_edges(x: Array, level: None, unit: float, generators: Generators) -> Array:
    from skimage.feature import canny

    edges = np.stack([canny(image[0]) for image in luma(x)])
    return np.broadcast_to(edges[:, None], x.shape).astype(float)


# Coding


def pixelate(x: Array, share: float, unit: float, generators: Generators) -> Array:
    height, width = x.shape[2:]
    small = max(1, int(width * share)), max(1, int(height * share))
    box = Image.Resampling.BOX
    return through_pil(x, lambda image: image.resize(small, box).resize((width, height), box))


def jpeg_compression(x: Array, quality: int, unit: float, generators: Generators) -> Array:
    def code(image: Image.Image) -> Image.Image:
        image.save(file := BytesIO(), "JPEG", quality=quality)
        return Image.open(file)

    return through_pil(x, code)


def through_pil(x: Array, change: Callable[[Image.Image], Image.Image]) -> Array:
    """Apply `change` to RGB images, or else to each channel."""
    pixels = (x * 255).round().astype(np.uint8)
    if colour := x.shape[1] == 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    parts = pixels.reshape(-1, *pixels.shape[1 if colour else 2 :])
    changed = np.stack([np.asarray(change(Image.fromarray(part))) for part in parts]) / 255
    return changed.transpose(0, 3, 1, 2) if colour else changed.reshape(x.shape)
