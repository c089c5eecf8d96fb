"""Where the digits come from: official files on disk, a download of them, or the bundled sample."""

import gzip
import hashlib
import http.client
import logging
import ssl
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torchvision.datasets
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from thaw.data.idx import read_idx
from thaw.files import move

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0  # seconds without an answer before a mirror counts as out of reach
TRIES = 3  # per mirror, for errors that may pass
DATASETS = ("MNIST", "FashionMNIST", "KMNIST")  # torchvision classes that share the four file names and the format


class Digits(NamedTuple):
    """N digits: images uint8 (N, 28, 28), labels int64 (N,)."""

    images: Tensor
    labels: Tensor


class Source(NamedTuple):
    """Digits by split, and where they came from (`official` or `sample`)."""

    train: Digits
    val: Digits
    test: Digits
    name: str


def load(dataset: str, directory: str | Path, source: str, mirrors: Sequence[str] | None) -> Source:
    """Load the digits of one dataset and split them.

    Args:
        dataset: `MNIST`, `FashionMNIST` or `KMNIST`.
        directory: where `<dataset>/raw/*.gz` lie or go, the layout of torchvision.
        source: `official` reads the files, downloading what is missing; `sample` reads the 5,000 bundled digits;
            `auto` is `official`, or `sample` with a warning where the mirrors are out of reach.
        mirrors: base URLs tried in order; None means the ones torchvision lists, an empty list that nothing is fetched.

    Raises:
        ValueError: an unknown name, or a file that is not the official one.
        OSError: the folder cannot be written.
        ConnectionError: `official` files are missing and no mirror answers.
    """
    if source not in ("auto", "official", "sample"):
        raise ValueError(f"data.source={source!r} is unknown; choose auto, official or sample.")
    if dataset not in DATASETS:
        raise ValueError(f"data.dataset={dataset!r} is unknown; choose one of {', '.join(DATASETS)}.")
    if any("://" not in mirror for mirror in mirrors or ()):  # true of a string too, letter by letter
        raise ValueError(f"data.mirrors={mirrors} must be null or a list of URLs such as [https://example.org/mnist].")
    if source == "sample":
        return load_sample(dataset)
    try:
        return load_official(dataset, Path(directory), mirrors)
    except ConnectionError as error:
        if source == "official" or dataset != "MNIST":
            raise
        log.warning(
            "USING THE BUNDLED SAMPLE of 5,000 digits, not the official 70,000: %s "
            "Set data.source=official to insist on them, data.source=sample to silence this.",
            error,
        )
        return load_sample(dataset)


def class_names(dataset: str) -> list[str]:
    """The ten classes of a dataset, in the order of its labels."""
    if dataset == "MNIST":  # torchvision says "0 - zero"
        return [str(digit) for digit in range(10)]
    return list(getattr(torchvision.datasets, dataset).classes)


def load_official(dataset: str, directory: Path, mirrors: Sequence[str] | None) -> Source:
    """The official files, split by position: validation is the first 6,000 training digits, in every run."""
    official = getattr(torchvision.datasets, dataset)
    folder = directory / dataset / "raw"
    missing = [name for name, _ in official.resources if not (folder / name).exists()]
    if missing:
        make_folder(folder)
        with FileLock(folder / ".download.lock"):  # two runs that start together download once
            for name, md5 in official.resources:
                if not (folder / name).exists():
                    download(name, md5, official.mirrors if mirrors is None else mirrors, folder)
    stamps = tuple((folder / name).stat().st_mtime_ns for name, _ in official.resources)
    return read_official(dataset, folder, stamps)


@lru_cache(maxsize=1)
def read_official(dataset: str, folder: Path, stamps: tuple[int, ...]) -> Source:
    """The files in `folder`, read once for all jobs of a sweep; `stamps`, when they were written, tell of a change."""
    md5_of = dict(getattr(torchvision.datasets, dataset).resources)
    tensors = {name: read_idx(read_checked(folder / name, md5_of), str(folder / name)) for name in md5_of}
    train_images, train_labels, test_images, test_labels = (
        tensors[f"{split}-{kind}-ubyte.gz"] for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    )
    train = check_digits(train_images, train_labels, f"{folder}/train-*")
    test = check_digits(test_images, test_labels, f"{folder}/t10k-*")
    return Source(
        train=Digits(train.images[6000:], train.labels[6000:]),
        val=Digits(train.images[:6000], train.labels[:6000]),
        test=test,
        name="official",
    )


def load_sample(dataset: str) -> Source:
    """The bundled 5,000 MNIST digits (500 a class), split 4,000 / 500 / 500 with 400 / 50 / 50 of each class."""
    if dataset != "MNIST":
        raise ValueError(f"There is no bundled sample of {dataset}, only of MNIST; set data.source=official.")
    folder = files("thaw.data") / "sample"
    images, labels = (
        read_idx(gzip.decompress((folder / name).read_bytes()), f"bundled {name}")
        for name in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
    )
    digits = check_digits(images, labels, "the bundled sample")
    one_hot = digits.labels[:, None] == digits.labels.unique()  # (N, 10)
    rank_in_class = (one_hot.cumsum(0) * one_hot).sum(1) - 1  # (N,) 0 for the first digit of each class, then 1, ...
    parts = (rank_in_class < 400, (rank_in_class >= 400) & (rank_in_class < 450), rank_in_class >= 450)
    train, val, test = (Digits(digits.images[part], digits.labels[part]) for part in parts)
    return Source(train, val, test, name="sample")


def check_digits(images: Tensor, labels: Tensor, name: str) -> Digits:
    """Raise ValueError unless images are (N, 28, 28) and labels N classes below 10."""
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"{name}: images have shape {tuple(images.shape)}, expected (N, 28, 28).")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name}: {len(images)} images but labels of shape {tuple(labels.shape)}.")
    if labels.max() > 9:
        raise ValueError(f"{name}: label {labels.max().item()} is not a class; allowed are 0 to 9.")
    return Digits(images, labels.long())


def read_checked(path: Path, md5_of: dict[str, str]) -> bytes:
    """Read and gunzip an official file; ValueError says how its content differs from the official one."""
    content = path.read_bytes()
    md5 = hashlib.md5(content).hexdigest()
    if md5 != md5_of[path.name]:
        raise ValueError(
            f"{path} is not the official file ({describe(content, md5, md5_of)}): MD5 {md5}, expected "
            f"{md5_of[path.name]}. Delete it and run again to download it, or point data.dir at intact files."
        )
    return gzip.decompress(content)


def describe(content: bytes, md5: str, md5_of: dict[str, str]) -> str:
    """Say in a few words what a wrong file is."""
    for name, official in md5_of.items():
        if md5 == official:
            return f"it holds {name}: files are swapped"
    if content[:256].lstrip()[:1] == b"<":
        return "it is an HTML page, not data"
    if content[:2] != b"\x1f\x8b":
        return f"it is not gzip: it starts with {content[:8]!r}"
    try:
        gzip.decompress(content)
    except EOFError:
        return f"it is truncated at {len(content):,} bytes"
    except (OSError, zlib.error):
        return "its content is corrupt"
    return "a different version"


def make_folder(folder: Path) -> None:
    """Create a folder that can be written, or raise OSError naming `data.dir`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"data.dir: cannot write to {folder} ({error.strerror}). Point data.dir at a folder you may write to."
        ) from error


def download(name: str, md5: str, mirrors: Sequence[str], folder: Path) -> None:
    """Fetch one file into `folder`, resuming `<name>.part` if an earlier try left one; the rename comes last.

    Raises:
        ConnectionError: no mirror gave the file; lists what each answered.
        OSError: the disk is full or cannot be written.
    """
    part = folder / f"{name}.part"
    answers = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{name}"
        for attempt in range(TRIES):
            resumed = part.exists()
            try:
                fetch(url, part, name)
                content = part.read_bytes()
                found = hashlib.md5(content).hexdigest()
                if found == md5:
                    move(part, folder / name)
                    return
                part.unlink()
                answers.append(f"{url}: {describe(content, found, {name: md5})}, MD5 {found}")
                if not resumed:  # else the kept part may have been what was wrong
                    break  # a mirror that serves something else will do so again
            except urllib.error.HTTPError as error:
                answers.append(f"{url}: HTTP {error.code} {error.reason}")
                if error.code == 416:  # the kept part is no beginning of this file
                    part.unlink(missing_ok=True)
                elif error.code < 500:
                    break
            except urllib.error.URLError as error:
                answers.append(f"{url}: {error.reason}")
                break  # no connection at all: the next mirror
            except (TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
                answers.append(f"{url}: {error or type(error).__name__}")  # broke off half-way: go on from the part
            except OSError as error:
                part.unlink(missing_ok=True)
                raise OSError(
                    f"data.dir: writing {part} failed ({error.strerror}); nothing was kept. "
                    "Free some space or point data.dir at another disk."
                ) from error
            if attempt + 1 < TRIES:
                time.sleep(2**attempt)
    reason = "; ".join(dict.fromkeys(answers)) or "data.mirrors is empty"
    raise ConnectionError(
        f"{name} is not in {folder} and could not be downloaded ({reason}). "
        f"Put the official .gz files into {folder}, or set data.dir to the folder that holds "
        f"{folder.parent.name}/raw, or data.mirrors to a reachable one."
    )


def fetch(url: str, part: Path, name: str) -> None:
    """Append the bytes of `url` that `part` lacks, with a progress bar."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=CONNECT_TIMEOUT) as response:
        if have and response.status != 206:  # the server starts again from the first byte
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            part.open("ab" if have else "wb") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name, mininterval=1.0) as bar,
        ):
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
        if total is not None and part.stat().st_size < total:
            raise ConnectionError(f"broke off after {part.stat().st_size:,} of {total:,} bytes")
