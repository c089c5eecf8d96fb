"""A trained model for scripts: numpy arrays or picture files in, numpy arrays out.

Shapes: N images, K classes, D the backbone's width, h x w its grid of patches; the model takes images (C, H, W).
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thaw.data.batches import EVAL_BATCH
from thaw.data.digit_image import are_like_mnist
from thaw.data.readers import ImageReader, Reading
from thaw.predict.onnx_model import load_onnx
from thaw.predict.prediction import NOT_FINITE, find_files, read_file
from thaw.predict.predictor import ImageModel, load_predictor
from thaw.run.console import plural, say, some
from thaw.run.errors import UserError

log = logging.getLogger(__name__)

# One or many pictures as an array, a file or folder, or several arrays or files: see `Model`.
Pictures: TypeAlias = NDArray[np.uint8] | str | os.PathLike[str] | Iterable[NDArray[np.uint8] | str | os.PathLike[str]]
EXPECTED = "Give a uint8 array (N, H, W) or (N, H, W, C), one picture (H, W) or (H, W, C), a file, a folder or a list."
CHANNELS = (1, 3, 4)  # grey, RGB, RGB with opacity
UNLIKE = "is not bright ink on a dark background, as MNIST's are (255 - images would invert it)"
SHOWN = 3  # errors and doubts in one message


class Model:
    """A trained classifier as a function of images, which `thaw.load` returns.

    `predict`, `features`, `attention` and `inputs` take images as

    - an array, uint8 from 0 to 255: (N, H, W) grey, (N, H, W, C) with C = 1, 3 (RGB) or 4 (with opacity), or one
      picture (H, W) or (H, W, C). A batch (N, C, H, W) is taken where C, H and W are the model's own;
    - a file, a folder or a list of them, read as `predict.py` does: pictures of any size, IDX files with many images;
    - a list of arrays (H, W) or (H, W, C), which may differ in size.

    An array of the model's own size and channels is taken as it is. From other arrays, and from files, the image is
    made by the model's reader as in training: the centre square of a photograph, or by MNIST's rule the digit.

    All raise a UserError, which is a ValueError, for images of another type, dtype or shape, for none at all, and for
    files that cannot be read.

    Attributes:
        classes: K names, in the order of the probabilities.
        shape: (C, H, W) of the images that the model takes.
        reader: makes such images from others.
    """

    def __init__(self, model: ImageModel, reader: ImageReader) -> None:
        self.model, self.reader = model, reader
        self.classes: list[str] = list(model.data["classes"])
        self.shape: tuple[int, int, int] = tuple(model.data["shape"])

    def __repr__(self) -> str:
        return f"<thaw.Model of {self.facts()['name']}: images {self.shape}, {len(self.classes)} classes>"

    def predict(self, images: Pictures) -> NDArray[np.float32]:
        """Probabilities (N, K); each row sums to 1. `[model.classes[k] for k in p.argmax(axis=1)]` are the names."""
        probabilities = self.compute(self.model, images)
        if not np.isfinite(probabilities).all():
            raise UserError(NOT_FINITE)
        return probabilities

    def features(self, images: Pictures) -> NDArray[np.float32]:
        """The backbone's features (N, D), which the head sees.

        Raises:
            UserError: also if the model is an ONNX file.
        """
        return self.compute(self.model.features, images)

    def attention(self, images: Pictures) -> NDArray[np.float32]:
        """The share (N, h, w) of each patch in the features, by attention rollout (Abnar & Zuidema 2020).

        The shares of an image sum to 1.

        Raises:
            UserError: also if the model is an ONNX file, or its backbone has no attention between all its patches.
        """
        return self.compute(self.model.attention, images)

    def inputs(self, images: Pictures) -> NDArray[np.uint8]:
        """The images (N, C, H, W) that the model sees."""
        return np.concatenate(list(self.batches(images)))

    def facts(self) -> dict[str, Any]:
        """Facts that identify the model: its run, backbone, data set, weights, commit."""
        return self.model.facts()

    def compute(self, function: Callable[[Tensor], Tensor], images: Pictures) -> NDArray[np.float32]:
        return np.concatenate([function(torch.from_numpy(batch)).numpy() for batch in self.batches(images)])

    def batches(self, images: Pictures) -> Iterator[NDArray[np.uint8]]:
        """The model's images (B, C, H, W), so many at a time that any number of files fits into memory."""
        readings, doubts, count = self.readings(images), [], 0
        while batch := list(islice(readings, EVAL_BATCH)):
            if errors := [reading.error for reading in batch if reading.image is None]:
                raise UserError(f"{plural(len(errors), 'image')} cannot be read: {some(errors, ' ', SHOWN)}")
            doubts += [reading.warning for reading in batch if reading.warning]
            count += len(batch)
            yield np.stack([reading.image for reading in batch if reading.image is not None])
        if doubts:
            log.warning("%d of %d images are doubtful: %s", len(doubts), count, some(doubts, "; ", SHOWN))

    def readings(self, images: Pictures) -> Iterator[Reading]:
        if isinstance(images, np.ndarray):
            return self.read_arrays([images])
        given: list[Any] = [images] if isinstance(images, str | os.PathLike) else list(checked_iterable(images))
        if not given:
            raise UserError(f"There are no images: the list is empty. {EXPECTED}")
        if all(isinstance(each, np.ndarray) for each in given):
            return self.read_arrays(given)
        if wrong := [each for each in given if not isinstance(each, str | os.PathLike)]:
            raise UserError(f"The list holds {named(wrong[0])}. {EXPECTED}")
        files, left_out = find_files(map(os.fspath, given))
        for line in left_out:
            say(line, stderr=True)
        return (
            read.reading._replace(warning=read.reading.warning and f"{read.file}: {read.reading.warning}")
            for file in files
            for read in read_file(file, self.reader)
        )

    def read_arrays(self, arrays: Iterable[NDArray[np.uint8]]) -> Iterator[Reading]:
        """An image from each picture in arrays of one or many."""
        number = 0
        for array in arrays:
            pictures = arrays_of(array, self.shape)  # (N, H, W, C)
            images = pictures.transpose(0, 3, 1, 2)
            expected = are_like_mnist(images[:, 0]) if self.reader.is_digit else np.ones(len(images), bool)
            for image, is_expected in zip(images, expected, strict=True):
                if image.shape != self.shape:
                    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
                    reading = self.reader.array(pixels, f"Image {number}")
                    yield reading._replace(warning=reading.warning and f"image {number}: {reading.warning}")
                else:
                    yield Reading(image, warning="" if is_expected else f"image {number} {UNLIKE}")
                number += 1


def arrays_of(images: NDArray[np.uint8], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """One or many pictures as (N, H, W, C).

    Raises:
        UserError: another dtype or shape, or no pixel at all.
    """
    given = f"an array of {images.dtype}, shape {images.shape}"
    if images.dtype != np.uint8:
        raise UserError(f"The images are {given}, but pixels must be uint8 from 0 to 255{conversion(images)}.")
    if not images.size:
        raise UserError(f"The images are {given}, which holds no pixels. {EXPECTED}")
    if images.ndim == 4 and images.shape[3] in CHANNELS:
        return images
    if images.ndim == 4 and images.shape[1:] == shape:
        return images.transpose(0, 2, 3, 1)
    if images.ndim == 3 and images.shape[2] in CHANNELS:
        return images[None]
    if images.ndim == 3 and images.shape == shape and len(images) > 1:
        raise UserError(
            f"The images are {given}, which may be one picture or {len(images)} grey ones; give images[None] for one "
            "picture, images[..., None] for grey ones."
        )
    if images.ndim in (2, 3):
        return (images[None] if images.ndim == 2 else images)[..., None]
    if images.ndim == 4 and images.shape[1] in CHANNELS:
        raise UserError(
            f"The images are {given}: channels come last, except in the model's own shape (N, "
            f"{', '.join(map(str, shape))}). Give images.transpose(0, 2, 3, 1)."
        )
    raise UserError(f"The images are {given}. {EXPECTED}")


def conversion(images: np.ndarray) -> str:
    """How to make uint8 of an array of another dtype."""
    if images.dtype == bool:
        return "; give 255 * images.astype(np.uint8)"
    if images.dtype.kind not in "iuf" or not images.size:
        return ""
    low, high = images.min(), images.max()
    if images.dtype.kind == "f" and low >= 0 and high <= 1:
        return "; for fractions from 0 to 1 give (255 * images).round().astype(np.uint8)"
    return "; give images.astype(np.uint8)" if low >= 0 and high <= 255 else f", and these are from {low} to {high}"


def checked_iterable(images: Any) -> Iterable[Any]:
    if not isinstance(images, Iterable):
        raise UserError(f"The images are {named(images)}. {EXPECTED}")
    return images


def named(value: Any) -> str:
    """The type of a value that is no image, and how to make an array of it."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, Tensor):
        return f"{kind}, not an array: give images.cpu().numpy(), channels last"
    return f"{kind}, not an array: give np.asarray(picture)" if hasattr(value, "__array_interface__") else kind


def load(
    ckpt: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    accelerator: str | None = None,
    precision: str | None = None,
    reader: str | None = None,
    allow: Sequence[str] = (),
) -> Model:
    """Load a trained model, as `predict.py` and `serve.py` do, and say on standard error which one it is.

    Args:
        ckpt: a run's folder (its best checkpoint), a checkpoint file, `last` (the newest run below `logs/runs`), or an
            `.onnx` file that `export.py` wrote.
        weights: file of the frozen weights, if it has moved since training.
        accelerator: `cpu`, `gpu` or `mps`; None means the best device of this machine.
        precision: of Lightning, such as `32-true`; None means as in training on a device of the same kind, else the
            device's best.
        reader: `photo` or `digit`, how pictures of other sizes become images; None means the checkpoint's.
        allow: your packages that the checkpoint may name, such as that of your own data set.

    Raises:
        UserError: a ValueError; there is no such file, it is damaged, it is of a pretraining run, or it is not thaw's.
    """
    model: ImageModel
    if Path(ckpt).suffix == ".onnx":
        settings = {"weights": weights, "accelerator": accelerator, "precision": precision}
        for name, value in settings.items():
            if value is not None:
                raise UserError(f"{name}={value} is for checkpoints; an ONNX file is computed on the CPU as it is.")
        model = load_onnx(Path(ckpt).expanduser())
    else:
        frozen = None if weights is None else os.fspath(weights)
        model = load_predictor(os.fspath(ckpt), frozen, accelerator, precision, allow, stderr=True)
    return Model(model, ImageReader(reader or model.data["reader"], model.data["shape"]))
