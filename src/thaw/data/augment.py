"""Random transforms with their own parameters for every image, applied to a whole batch on the batch's device."""

import math
from itertools import repeat
from typing import Annotated, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms.v2.functional import rgb_to_grayscale

from thaw.run.errors import UserError
from thaw.run.values import CountOrZero, NonNegative, Positive, Probability

FactorSpread: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
BOX_TRIES = 10
FLOATS_AT_ONCE = 2**18  # pixels of a CPU's chunk: as floats they stay in its cache


class Draws(NamedTuple):
    """The random numbers of one call, B of each; None for a transform that is off."""

    flips: Tensor | None  # (B,) bool
    boxes: Tensor | None  # (B, 4), see `random_boxes`
    corners: Tensor | None  # (B, 2), top and left of the box in a padded image
    factors: Tensor | None  # (B, 3) of brightness, contrast and saturation
    grid: Tensor | None  # (B, S, S, 2) of sampling points in [-1, 1]
    amounts: Tensor | None  # (B,) of thickness
    blurs: Tensor | None  # (B, 2) standard deviations in pixels, along rows and columns
    haze: Tensor | None  # (B, 2, H, W): the grey levels of the haze, 0 to 255, and its share
    noise: Tensor | None  # (B, C, H, W) in grey levels
    inverted: Tensor | None  # (B, 1, S, S) bool
    erased: Tensor | None  # likewise


class Augment(nn.Module):
    """uint8 (B, C, H, W) -> uint8 (B, C, H, W), each image transformed on its own; C is 1 or 3.

    The transforms follow each other as in the list below, but blur comes before the changes of colour. Those of shape
    (degrees to thickness), invert and erase are for H = W; the affine map and elastic displacement (Simard et al. 2003,
    section 2) are one sampling grid. A setting of 0 switches its transform off, as does a crop_area of 1. The affine
    map alone runs about 2.4 times as fast as kornia's RandomAffine on two CPU threads (benchmarks/once.md).

    Args:
        flip: probability that left and right are exchanged.
        crop_area: random resized crop (Szegedy et al. 2015, section 6): a box of at least this share of the area and
            of an aspect ratio from 3/4 to 4/3 is resized to H x W.
        crop_padding: padded crop: each side gets so many more pixels, then a box of H x W is cut out.
        padding_mode: what the padded crop adds: the image mirrored at its edge, or zeros (constant).
        degrees: rotation up to so many degrees either way.
        translate: shift up to this fraction of the side, in x and y.
        scale: zoom by a factor between 1 - scale and 1 + scale.
        shear: horizontal shear up to so many degrees.
        elastic: standard deviation of the smooth displacement, in pixels.
        elastic_sigma: smoothness of that displacement, in pixels.
        thickness: strokes grow or shrink by up to this fraction of a 3 x 3 dilation or erosion.
        corrupt: probability that an image has any of the next seven transforms, brightness to invert.
        brightness: multiplies pixels by a factor between 1 - brightness and 1 + brightness.
        contrast: multiplies their difference from the image's mean grey by a factor in such a range.
        saturation: multiplies their difference from their own grey by a factor in such a range; no effect if C is 1.
        blur: Gaussian blur of a standard deviation of up to so many pixels, another along rows than along columns.
        haze: blends the image with up to this share of smoothly changing grey, as fog and uneven light do.
        noise: Gaussian noise of a standard deviation of up to this share of full brightness.
        invert: probability that dark and bright are exchanged, in the whole image, a stripe or a rectangle.
        erase: probability that a random rectangle is set to 0 (Zhong et al. 2017). Its sides are 5 to 15 pixels of 28,
            and in proportion in larger images.
    """

    def __init__(
        self,
        flip: Probability,
        crop_area: Annotated[float, Field(gt=0, le=1)],
        crop_padding: CountOrZero,
        padding_mode: Literal["reflect", "constant"],
        degrees: NonNegative,
        translate: NonNegative,
        scale: FactorSpread,
        shear: NonNegative,
        elastic: NonNegative,
        elastic_sigma: Positive,
        thickness: NonNegative,
        corrupt: Probability,
        brightness: FactorSpread,
        contrast: FactorSpread,
        saturation: FactorSpread,
        blur: NonNegative,
        haze: FactorSpread,
        noise: NonNegative,
        invert: Probability,
        erase: Probability,
    ) -> None:
        super().__init__()
        if crop_area < 1 and crop_padding:
            raise UserError(
                f"augment.crop_area={crop_area} and augment.crop_padding={crop_padding} are two ways to crop an image; "
                "choose one: crop_area=1.0 or crop_padding=0 switches the other off."
            )
        self.flip, self.crop_area, self.crop_padding, self.padding_mode = flip, crop_area, crop_padding, padding_mode
        self.degrees, self.translate, self.scale, self.shear = degrees, translate, scale, shear
        self.elastic, self.elastic_sigma, self.thickness = elastic, elastic_sigma, thickness
        self.corrupt, self.colours = corrupt, (brightness, contrast, saturation)
        self.blur, self.haze, self.noise, self.invert, self.erase = blur, haze, noise, invert, erase
        self.warps = any((degrees, translate, scale, shear, elastic))
        self.alters = any((self.warps, thickness, *self.colours, blur, haze, noise, invert, erase))
        self.is_random = bool(flip or crop_area < 1 or crop_padding or self.alters)
        self.needs_grey_levels = bool(haze or noise or invert)

    def forward(self, images: Tensor) -> Tensor:
        """Also float pixels whose background is 0: they are not clamped, and gradients pass through.

        Their scale is free unless `needs_grey_levels`, which are 0 to 255.
        """
        return self.apply_draws(images, self.draw(images))

    def draw(self, images: Tensor) -> Draws:
        """The random numbers for images (B, C, H, W), whose pixels do not matter."""
        like = to_floats(images[:, :0])  # (B, 0, H, W)
        flips = boxes = corners = grid = None
        if self.flip or self.crop_padding or self.crop_area < 1:
            flips = torch.rand(len(images), device=images.device) < self.flip
            if self.crop_area < 1:
                boxes = self.random_boxes(images)
            else:
                corners = torch.randint(2 * self.crop_padding + 1, (2, len(images)), device=images.device).T
        chosen = torch.ones(len(images), device=images.device, dtype=like.dtype)
        if self.corrupt < 1:
            chosen = (torch.rand(len(images), device=images.device) < self.corrupt).to(like.dtype)
        factors = 1 + chosen[:, None] * (self.random_factors(images) - 1) if any(self.colours) else None
        if self.warps:
            grid = affine_grid(self.random_affine(like), like.shape[-1])
            if self.elastic:
                grid = grid + self.random_displacement(like)
        return Draws(
            flips,
            boxes,
            corners,
            factors,
            grid,
            amounts=self.thickness * uniform(like) if self.thickness else None,
            blurs=chosen[:, None] * self.blur * torch.rand(len(images), 2, device=images.device) if self.blur else None,
            haze=self.random_haze(like, chosen) if self.haze else None,
            noise=self.random_noise(images, chosen) if self.noise else None,
            inverted=random_rectangles(like, chosen * self.invert, 2.0) if self.invert else None,
            erased=random_rectangles(like, self.erase, 15 / 28) if self.erase else None,
        )

    def apply_draws(self, images: Tensor, draws: Draws) -> Tensor:
        """Images (B, C, H, W) transformed by what `draw` returned for as many."""
        x = images
        if draws.boxes is not None and draws.flips is not None:
            x = resize_boxes(x, draws.boxes, draws.flips)
        elif draws.corners is not None and draws.flips is not None:
            x = self.padded_crop(x, draws.corners, draws.flips)
        if not self.alters:
            return x
        if x.dtype != torch.uint8 or x.is_cuda:
            return as_type_of(self.alter(to_floats(x), draws), images)
        size = max(1, FLOATS_AT_ONCE // x[0].numel())
        parts = zip(*(repeat(None) if each is None else each.split(size) for each in draws), strict=False)
        return torch.cat(
            [
                as_type_of(self.alter(part.float(), Draws(*own)), images)
                for part, own in zip(x.split(size), parts, strict=False)
            ]
        )

    def alter(self, x: Tensor, draws: Draws) -> Tensor:
        """All but crops and flips: float (B, C, H, W) -> the same."""
        if draws.grid is not None:
            x = F.grid_sample(x, draws.grid, align_corners=False)
        if draws.amounts is not None:
            x = thicken(x, draws.amounts)
        if draws.blurs is not None:
            x = gaussian_blurs(x, draws.blurs)
        if draws.factors is not None:
            x = recolour(x, *draws.factors.T)
        if draws.haze is not None:
            level, share = draws.haze[:, :1], draws.haze[:, 1:]
            x = x + share * (level - x)
        if draws.noise is not None:
            x = x + draws.noise
        if draws.inverted is not None:
            x = torch.where(draws.inverted, 255 - x, x)
        return x if draws.erased is None else x.masked_fill(draws.erased, 0)

    def random_haze(self, x: Tensor, chosen: Tensor) -> Tensor:
        """(B, 2, H, W): grey levels, which change smoothly from one of 3 x 3 random ones to the next, and one share."""
        levels = 255 * torch.rand(len(x), 1, 3, 3, device=x.device, dtype=x.dtype)
        levels = F.interpolate(levels, x.shape[2:], mode="bilinear")
        share = chosen * self.haze * uniform(x).abs()
        return torch.cat([levels, share[:, None, None, None].expand_as(levels)], dim=1)

    def random_noise(self, x: Tensor, chosen: Tensor) -> Tensor:
        """(B, C, H, W) of grey levels; each image has its own standard deviation, more often a small one."""
        deviations = 255 * self.noise * chosen * torch.rand(len(x), device=x.device).square()  # (B,)
        return deviations[:, None, None, None] * torch.randn(x.shape, device=x.device)

    def random_factors(self, x: Tensor) -> Tensor:
        """(B, 3) for brightness, contrast and saturation."""
        spread = torch.tensor(self.colours, device=x.device)[:, None]
        return (1 + spread * (2 * torch.rand(3, len(x), device=x.device) - 1)).T

    def random_boxes(self, x: Tensor) -> Tensor:
        """(B, 4) of top, left, height and width: of several boxes for each image the first that fits into it."""
        sides = torch.tensor(x.shape[2:], device=x.device)[:, None, None]  # (2, 1, 1) H and W
        area, aspect = torch.rand(2, BOX_TRIES, len(x), device=x.device)
        area = (self.crop_area + (1 - self.crop_area) * area) * sides.prod()
        aspect = (4 / 3) ** (2 * aspect - 1)  # its logarithm is uniform
        boxes = torch.stack([area / aspect, area * aspect]).sqrt().round().clamp(min=1)  # (2, BOX_TRIES, B)
        first = (boxes <= sides).all(0).int().argmax(0)  # 0 if none fits
        boxes = boxes[:, first, torch.arange(len(x), device=x.device)].minimum(sides[:, 0])  # (2, B)
        corners = torch.rand(2, len(x), device=x.device) * (sides[:, 0] - boxes + 1)
        return torch.cat([corners, boxes]).long().T

    def padded_crop(self, x: Tensor, corners: Tensor, flips: Tensor) -> Tensor:
        """Padded crop and flip by one gather, which on a CPU is many times as fast as slicing each image."""
        height, width, padding = *x.shape[2:], self.crop_padding
        if self.padding_mode == "reflect" and padding >= min(height, width):
            raise UserError(
                f"augment.crop_padding={padding} with padding_mode=reflect must be below the side of the images, "
                f"{min(height, width)} pixels; choose a smaller one or padding_mode=constant."
            )
        padded = F.pad(x, [padding] * 4, mode=self.padding_mode)
        top, left = corners.T[:, :, None]  # (2, B, 1)
        rows, columns = (torch.arange(side, device=x.device) for side in (height, width))
        columns = torch.where(flips[:, None], columns.flip(0), columns)  # (B, W)
        places = (top + rows)[:, :, None] * padded.shape[3] + (left + columns)[:, None]  # (B, H, W)
        places = places.flatten(1)[:, None].expand(-1, x.shape[1], -1)  # (B, C, H W)
        return padded.flatten(2).gather(2, places).view_as(x)

    def random_affine(self, x: Tensor) -> Tensor:
        """(B, 2, 3) maps from output to input coordinates in [-1, 1]: scale, rotation, shear, then shift."""
        angle = math.radians(self.degrees) * uniform(x)
        shear = torch.tan(math.radians(self.shear) * uniform(x))
        zoom = 1 / (1 + self.scale * uniform(x))
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        shift_x, shift_y = 2 * self.translate * uniform(x), 2 * self.translate * uniform(x)
        rows = [cos, cos * shear - sin, shift_x, sin, sin * shear + cos, shift_y]
        return torch.stack(rows, dim=1).reshape(-1, 2, 3)

    def random_displacement(self, x: Tensor) -> Tensor:
        """(B, S, S, 2) displacement in [-1, 1] units: white noise blurred, scaled to the wanted deviation."""
        side = x.shape[-1]
        radius = math.ceil(3 * self.elastic_sigma)
        offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
        kernel = torch.exp(-0.5 * (offsets / self.elastic_sigma) ** 2)
        kernel = kernel / kernel.norm()  # unit norm keeps the variance of white noise
        columns = torch.arange(-radius, side + radius, device=x.device)
        taps = (torch.arange(side, device=x.device)[:, None] - columns).abs()
        blur = torch.where(taps <= radius, kernel[radius:][taps.clamp(max=radius)], 0.0)  # (S, S + 2 radius)
        noise = torch.randn(2, len(x), side + 2 * radius, side + 2 * radius, device=x.device, dtype=x.dtype)
        smooth = blur @ noise @ blur.T  # (2, B, S, S)
        return (2 * self.elastic / side) * smooth.permute(1, 2, 3, 0)


def resize_boxes(x: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Each image's box (B, 4) of top, left, height and width, resized to H x W and perhaps flipped.

    A CPU resizes uint8 images one by one, several times as fast as it samples a batch, to the same pixels.
    """
    if x.dtype == torch.uint8 and x.device.type == "cpu":
        resized = np.empty(x.shape, np.uint8)
        parts = zip(x.numpy(), boxes.tolist(), flips.tolist(), resized, strict=True)
        for image, (top, left, height, width), flip, out in parts:
            box = image[:, top : top + height, left : left + width]
            # NumPy copies the box, because torch would share each small copy among its threads.
            box = torch.from_numpy(np.ascontiguousarray(box[..., ::-1] if flip else box))
            out[:] = F.interpolate(box[None], x.shape[2:], mode="bilinear", antialias=True)[0].numpy()
        return torch.from_numpy(resized)
    axes = []
    for start, length, side in zip(boxes.T[:2, :, None], boxes.T[2:, :, None], x.shape[2:], strict=True):
        centres = (torch.arange(side, device=x.device) + 0.5) * length / side  # (B, side) pixels within the box
        axes.append(2 * (start + centres.clamp(min=0.5).minimum(length - 0.5)) / side - 1)
    rows, columns = axes
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    grid = torch.stack(torch.broadcast_tensors(columns[:, None], rows[:, :, None]), dim=3)  # (B, H, W, 2)
    floats = to_floats(x)
    return as_type_of(F.grid_sample(floats, grid.to(floats.dtype), align_corners=False), x)


def recolour(x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Float (B, C, H, W) with factors (B,), applied in this order without clamping in between."""
    brightness, contrast, saturation = (factor[:, None, None, None] for factor in (brightness, contrast, saturation))
    grey = rgb_to_grayscale(x)  # (B, 1, H, W), x itself if C is 1
    mean = grey.mean((2, 3), keepdim=True)
    return brightness * (contrast * (saturation * x + (1 - saturation) * grey) + (1 - contrast) * mean)


def gaussian_blurs(x: Tensor, deviations: Tensor) -> Tensor:
    """Blur (B, C, H, W) along H and W by Gaussians of deviations (B, 2) pixels, cut off at the image's edge."""
    with torch.autocast(x.device.type, enabled=False):  # bf16 keeps 8 bits, and 255 grey levels need as many
        for axis, deviation in zip((2, 3), deviations.T, strict=True):
            positions = torch.arange(x.shape[axis], device=x.device, dtype=x.dtype)
            distances = (positions - positions[:, None]) / deviation[:, None, None].clamp(min=0.1)  # (B, S, S)
            kernel = (-0.5 * distances.square()).softmax(dim=2)[:, None]
            x = kernel @ x if axis == 2 else x @ kernel.mT
    return x


def thicken(x: Tensor, amounts: Tensor) -> Tensor:
    """Blend towards the 3 x 3 maximum (thicker) or, by amounts (B,) below 0, the minimum (thinner)."""
    amount = amounts[:, None, None, None]
    thicker = F.max_pool2d(x, 3, stride=1, padding=1)
    thinner = -F.max_pool2d(-x, 3, stride=1, padding=1)
    return x + amount.clamp(min=0) * (thicker - x) + amount.clamp(max=0) * (x - thinner)


def random_rectangles(x: Tensor, probability: float | Tensor, largest: float) -> Tensor:
    """(B, 1, S, S) bool, True inside one rectangle of each image that is chosen.

    Args:
        x: (B, C, S, S), whose pixels do not matter.
        probability: that an image is chosen; one for all or (B,).
        largest: length of a side as a share of S, at least 5 of 28; a longer side than S goes across the whole image.
    """
    side = x.shape[-1]
    positions = torch.arange(side, device=x.device)
    length = torch.randint(max(1, 5 * side // 28), round(largest * side) + 1, (2, len(x), 1), device=x.device)
    start = (torch.rand(2, len(x), 1, device=x.device) * (side - length + 1)).long()  # rows, columns
    rows, columns = (positions >= start) & (positions < start + length)  # (B, S) each
    chosen = torch.rand(len(x), device=x.device) < probability
    return (rows[:, :, None] & columns[:, None, :] & chosen[:, None, None])[:, None]


def to_floats(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.uint8 else x


def as_type_of(x: Tensor, images: Tensor) -> Tensor:
    """Float pixels as those of `images` are: rounded and clamped if these are uint8."""
    return x.round().clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else x


def affine_grid(maps: Tensor, side: int) -> Tensor:
    """(B, 2, 3) -> (B, S, S, 2): F.affine_grid, but ten times as fast, and in full precision even under autocast."""
    centres = (2 * torch.arange(side, device=maps.device, dtype=maps.dtype) + 1) / side - 1  # (S,) pixels in [-1, 1]
    maps = maps[..., None, None]
    grid = maps[:, :, 0] * centres + (maps[:, :, 1] * centres[:, None] + maps[:, :, 2])  # (B, 2, S, S)
    return grid.permute(0, 2, 3, 1)


def uniform(x: Tensor) -> Tensor:
    """(B,) numbers in [-1, 1), one for each image."""
    return 2 * torch.rand(len(x), device=x.device, dtype=x.dtype) - 1
