"""Images and labels that lie in files as arrays: .npy, .npz, IDX, or CSV with a label and the pixels in each row."""

import math
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from thaw.data.idx import read_packed_idx
from thaw.data.images import Images, Source
from thaw.data.module import ImageDataModule
from thaw.data.splits import SplitShare, split_images
from thaw.run.claims import zip_members
from thaw.run.errors import UserError, UserFileError

ARRAY_FILE = r"\.(npy|npz|csv)$|ubyte"  # names of files that a folder is searched for
WORDS = {  # in the names of files and arrays, and what they say
    **dict.fromkeys(("train", "training"), ("split", "train")),
    **dict.fromkeys(("val", "valid", "validation"), ("split", "val")),
    **dict.fromkeys(("test", "t10k"), ("split", "test")),
    **dict.fromkeys(("images", "imgs", "x", "data"), ("kind", "images")),
    **dict.fromkeys(("labels", "label", "y", "targets"), ("kind", "labels")),
}


@dataclass(kw_only=True, eq=False)
class ArrayData(ImageDataModule):
    """Images and labels from arrays in a file or in the files of a folder.

    Args:
        path: .npz, .npy, .csv or IDX (packed or not), or a folder of them. The words in the names of files and of an
            .npz's arrays say what an array is: `x_train`, `test_labels.npy`, `mnist_test.csv`, `images`, `labels`.
        classes: names in the order of the labels; None stands for the numbers.
        val_share, test_share: of each class of the training images, where that split is missing.
    """

    path: str | None
    classes: Sequence[str] | None
    val_share: SplitShare
    test_share: SplitShare

    def read(self) -> Source:
        if self.path is None:
            raise UserError("data.path is missing: set it to an .npz, .npy, .csv or IDX file, or to a folder of them.")
        path = Path(self.path).expanduser()
        arrays: dict[str, dict[str, Tensor]] = {"train": {}}
        names: dict[tuple[str, str], str] = {}
        for name, said, array in find_arrays(path):
            split, kind = said.get("split", "train"), said["kind"]
            if (split, kind) in names:
                raise UserError(f"{names[split, kind]} and {name} both hold the {split} {kind}; move one away.")
            names[split, kind] = name
            arrays.setdefault(split, {})[kind] = to_images(array, name) if kind == "images" else to_labels(array, name)
        for split, parts in arrays.items():
            if missing := {"images", "labels"} - {*parts}:
                found = ", ".join(names.values()) or "no arrays"
                raise UserError(
                    f"data.path={self.path} has no {split} {min(missing)} (found: {found}). Name arrays or files "
                    "x_train, y_train, x_test, y_test or images, labels; a CSV has both."
                )
            if len(parts["images"]) != len(parts["labels"]):
                raise UserError(f"{names[split, 'images']} and {names[split, 'labels']} have different lengths.")
        splits = {split: Images(**parts) for split, parts in arrays.items()}
        labels = torch.cat([each.labels for each in splits.values()])
        count = int(labels.max()) + 1
        if count > len(labels):
            raise UserError(f"data.path={self.path}: {len(labels)} labels up to {count - 1} are not those of classes.")
        classes = self.classes or [str(label) for label in range(count)]
        train, val, test = split_images(splits, self.val_share, self.test_share, f"data.path={self.path}")
        return Source(train, val, test, classes, path.stem, f"the arrays in {path.name}")


def find_arrays(path: Path) -> Iterator[tuple[str, dict[str, str], np.ndarray]]:
    """Name, kind and perhaps split, and content of each array of images or labels in a file or a folder's files."""
    is_folder, file = path.is_dir(), path
    try:
        files = [each for each in path.iterdir() if re.search(ARRAY_FILE, each.name)] if is_folder else [path]
        for file in sorted(files):
            for key, array in read_arrays(file).items():
                words = re.split(r"[\W_]+", f"{key} {file.name if is_folder else ''}".lower())
                said = dict(WORDS[word] for word in reversed(words) if word in WORDS)  # the first word of a sort counts
                if "kind" in said:
                    yield f"{file}{f' ({key})' if key else ''}", said, array
    except UserError:
        raise
    except Exception as error:  # damaged files fail in any way
        reason = str(getattr(error, "strerror", None) or error or type(error).__name__).rstrip(".")
        raise UserFileError(
            f"{file} cannot be read ({reason}); data.path must be an .npz, .npy, .csv or IDX file of plain numbers, or "
            "a folder of them."
        ) from error


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by their keys; nothing in it is run as code.

    A row of a CSV file is a label and the pixels of an image; its first line may be a header.
    """
    if file.suffix == ".npz":
        arrays = {}
        with zipfile.ZipFile(file) as archive:
            for member in zip_members(archive):
                if member.filename.endswith(".npy"):
                    with archive.open(member) as opened:
                        arrays[member.filename.removesuffix(".npy")] = read_npy(opened, member.file_size)
        return arrays
    if file.suffix == ".npy":
        with file.open("rb") as whole:
            return {"": read_npy(whole, file.stat().st_size)}
    if file.suffix == ".csv":
        with file.open(encoding="utf-8-sig") as lines:
            header = int(not lines.read(1).isdigit())
        table = np.loadtxt(file, np.float32, delimiter=",", skiprows=header, ndmin=2, encoding="utf-8-sig")
        return {"images": table[:, 1:], "labels": table[:, 0]}
    return {"": read_packed_idx(file.read_bytes(), str(file)).numpy()}


def read_npy(file: IO[bytes], size: int) -> np.ndarray:
    """The array in a .npy file of `size` bytes, which may be a member of an .npz. It is all that the file holds.

    Raises:
        ValueError: it is of Python objects, or other bytes follow the header than that states.
    """
    version, _ = np.lib.format.read_magic(file)
    if version > 3:
        raise ValueError(f"version {version} of the format is unknown")
    read_header = np.lib.format.read_array_header_1_0 if version == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)  # the third version differs in names of fields alone
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be read without running code")
    stated, rest = math.prod(shape) * dtype.itemsize, size - file.tell()
    if stated != rest:
        raise ValueError(f"the header states {stated:,} bytes of {dtype} {shape}, but {rest:,} follow it")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def to_images(array: np.ndarray, name: str) -> Tensor:
    """Images uint8 (N, C, H, W) of an array of a usual shape; a UserError names another and what is allowed."""
    shape = array.shape
    if 0 in shape:
        raise UserError(f"{name} has the shape {shape}: it holds no images.")
    if array.ndim == 2 and (side := math.isqrt(shape[1])) ** 2 == shape[1]:
        array = array.reshape(-1, 1, side, side)
    elif array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 4 or shape[1] not in (1, 3):
        raise UserError(
            f"{name} has the shape {shape}; images must be (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 "
            "channels, or (N, H * W) of squares."
        )
    if array.dtype != np.uint8:
        low, high = (array.min(), array.max()) if array.dtype.kind in "biuf" else (math.nan, math.nan)
        scale = 255 if array.dtype.kind in "bf" and high <= 1 else 1
        if not 0 <= low <= high <= 255 or (scale == 1 and (array != np.rint(array)).any()):
            raise UserError(
                f"{name} is {array.dtype} from {low:.6g} to {high:.6g}; images must be whole numbers from 0 to 255, or "
                "fractions from 0 to 1."
            )
        array = np.rint(array * np.float32(scale)).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(array))


def to_labels(array: np.ndarray, name: str) -> Tensor:
    """Labels int64 (N,) of an array (N,) or (N, 1) of whole numbers; UserError names another."""
    labels = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if labels.ndim != 1 or labels.dtype.kind not in "biuf" or not (labels == np.rint(labels)).all():
        raise UserError(
            f"{name} is {array.dtype} {array.shape}; labels must be whole numbers from 0, one for each image: (N,)."
        )
    return torch.from_numpy(labels.astype(np.int64))
