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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torchvision.datasets
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from thaw.data.idx import read_idx
from thaw.run.files import move

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0  # seconds without an answer before a mirror counts as out of reach
TRIES = 3  # per mirror, for errors that may pass
SHOWN = 8  # names of what lies in a folder
DATASETS = ("MNIST", "FashionMNIST", "KMNIST")  # torchvision classes that share the four file names and the format


# MD5 of the unpacked files, in the order of torchvision's `resources`, which has those of the .gz files as published.
# FashionMNIST's are those of mindspore's model zoo too. No source gives KMNIST's: its files count as published alone.
UNPACKED_MD5 = {
    "MNIST": (
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ),
    "FashionMNIST": (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
}


class Digits(NamedTuple):
    """N digits: images uint8 (N, 28, 28), labels int64 (N,)."""

    images: Tensor
    labels: Tensor


class Source(NamedTuple):
    """Digits by split, and how reports speak of them.

    name: `official`, `sample`, or how a data module of one's own calls its data.
    title: what people read in its place; the name where it is empty.
    classes: names of the classes in the order of the labels; see `with_numbers`.
    """

    train: Digits
    val: Digits
    test: Digits
    name: str
    title: str = ""
    classes: Sequence[str] = ()

    def facts(self) -> dict[str, str]:
        """What a summary or report says of the origin, as values of JSON."""
        return {"data_source": self.name, "data_title": self.title or self.name}


def load(dataset: str, directory: str | Path, source: str, mirrors: Sequence[str] | None) -> Source:
    """Load the digits of one dataset and split them.

    Args:
        dataset: `MNIST`, `FashionMNIST` or `KMNIST`.
        directory: where the official files lie, packed or not: there, in `raw`, in `<dataset>/raw` or at most two
            folders below. Those that are missing are downloaded to `<dataset>/raw`, the layout of torchvision.
        source: `official` reads the files, downloading what is missing; `sample` reads the 5,000 bundled digits;
            `auto` is `official`, or `sample` with a warning where the mirrors are out of reach and the folder is
            empty or absent.
        mirrors: base URLs tried in order; None means the ones torchvision lists, an empty list that nothing is fetched.

    Raises:
        ValueError: an unknown name, or a file that is not the official one.
        OSError: the folder cannot be written.
        ConnectionError: official files are missing and no mirror answers; says what lies in the folder.
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
        folder = Path(directory).expanduser()
    except RuntimeError as error:  # ~name of a user that this machine does not have
        raise ValueError(f"data.dir={directory}: {error} Give the whole path.") from error
    try:
        return load_official(dataset, folder, mirrors)
    except ConnectionError as error:
        if source == "official" or dataset != "MNIST" or contents(folder, dataset):
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


def with_numbers(names: Sequence[str], classes: int) -> list[str]:
    """The names of so many classes; those without one are called by their number."""
    return [*names, *map(str, range(len(names), classes))]


def dataset_name(data: Mapping[str, Any]) -> str:
    """How a block `data` of a configuration calls its dataset: by name, or by the class of its data module."""
    return data.get("dataset") or data["_target_"].rpartition(".")[2]


def load_official(dataset: str, directory: Path, mirrors: Sequence[str] | None) -> Source:
    """The official files, split by position: validation is the first 6,000 training digits, in every run."""
    official = getattr(torchvision.datasets, dataset)
    tensors = {name: find(dataset, name, directory) for name, _ in official.resources}
    if missing := [name for name, tensor in tensors.items() if tensor is None]:
        folder = directory / dataset / "raw"
        make_folder(folder)
        with FileLock(folder / ".download.lock"):  # two runs that start together download once
            for name, md5 in official.resources:
                if name in missing and not (folder / name).exists():
                    try:
                        download(name, md5, official.mirrors if mirrors is None else mirrors, folder)
                    except ConnectionError as error:
                        if contents(directory, dataset):
                            remove_unused(folder)
                        raise ConnectionError(f"{error} {next_step(directory, dataset, missing)}") from error
        tensors |= {name: find(dataset, name, directory) for name in missing}
    train_images, train_labels, test_images, test_labels = tensors.values()
    assert train_images is not None and train_labels is not None and test_images is not None and test_labels is not None
    train = check_digits(train_images, train_labels, f"{dataset} in {directory}, training")
    test = check_digits(test_images, test_labels, f"{dataset} in {directory}, test")
    return Source(
        train=Digits(train.images[6000:], train.labels[6000:]),
        val=Digits(train.images[:6000], train.labels[:6000]),
        test=test,
        name="official",
        title="the official files",
        classes=class_names(dataset),
    )


def find(dataset: str, name: str, directory: Path) -> Tensor | None:
    """The content of an official file, under any usual name in any usual place; None where there is none.

    Args:
        dataset: one of `DATASETS`.
        name: as published, e.g. `train-images-idx3-ubyte.gz`.
        directory: that the user gave, or the folder above it, or below.

    Raises:
        ValueError: where the file belongs lies another one of that name, and the official one lies nowhere.
    """
    own = [directory / dataset / "raw", directory / dataset, directory / "raw", directory]
    wrong = None
    for folder in chain(own, directory.glob("*/"), directory.glob("*/*/")):
        # train-images-idx3-ubyte.gz, train-images-idx3-ubyte, train-images.idx3-ubyte, ...: what counts is the content
        for path in sorted(folder.glob(name.removesuffix(".gz").replace("-idx", "[-.]idx") + "*")):
            if path.is_file() and path.suffix != ".part":
                found = read_official(dataset, name, path, path.stat().st_mtime_ns)
                if isinstance(found, Tensor):
                    return found
                wrong = wrong or (found if folder in own else None)  # elsewhere it may be another dataset
    if wrong:
        raise ValueError(wrong)
    return None


@lru_cache(maxsize=8)
def read_official(dataset: str, name: str, path: Path, stamp: int) -> Tensor | str:
    """The content of the official file `name` at `path`, or what is wrong with the file there.

    Kept in memory for all jobs of a sweep; `stamp`, when the file was written, tells of a change.
    """
    content = path.read_bytes()
    if (known := official_name(content)) == (dataset, name):
        return read_idx(unpacked(content), str(path))
    wanted = dict(getattr(torchvision.datasets, dataset).resources)[name]
    return (
        f"{path} is not the official file ({describe(content, known)}): MD5 {hashlib.md5(content).hexdigest()}, "
        f"expected {wanted}{' packed, or the same content' if dataset in UNPACKED_MD5 else ', as published'}. Move it "
        f"away and run again to download {name}, point data.dir at intact files, or, for digits of your own, give a "
        "data module of your own (data._target_; see thaw.data.datamodule)."
    )


def official_name(content: bytes) -> tuple[str, str] | None:
    """Dataset and name of an official file, as published, unpacked or compressed anew; None of another file."""
    md5 = hashlib.md5(content).hexdigest()
    for dataset in DATASETS:
        for name, published in getattr(torchvision.datasets, dataset).resources:
            if md5 == published:
                return dataset, name
    try:
        md5 = hashlib.md5(unpacked(content)).hexdigest()
    except (OSError, EOFError, zlib.error):
        return None
    for dataset, hashes in UNPACKED_MD5.items():
        for (name, _), known in zip(getattr(torchvision.datasets, dataset).resources, hashes, strict=True):
            if md5 == known:
                return dataset, name
    return None


def unpacked(content: bytes) -> bytes:
    """The content of a gzip file, or of one that is none as it is, whatever its name says."""
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def contents(directory: Path, dataset: str) -> list[str]:
    """What lies in a folder that the user gave, by name; not what thaw itself has put there.

    That is hidden files, interrupted downloads and the folders of the other datasets, and folders without a file.
    """

    def counts(path: Path) -> bool:
        if path.name.startswith(".") or path.suffix == ".part":
            return False
        return path.is_file() or (path.is_dir() and any(map(counts, path.iterdir())))

    if not directory.is_dir():
        return []
    others = {other for other in DATASETS if other != dataset}
    return sorted(
        path.name + "/" * path.is_dir() for path in directory.iterdir() if path.name not in others and counts(path)
    )


def remove_unused(folder: Path) -> None:
    """Leave a user's folder of other data as it was: remove the place of a download that has brought nothing."""
    with suppress(OSError):  # there is something in it
        (folder / ".download.lock").unlink()
        folder.rmdir()
        folder.parent.rmdir()


def next_step(directory: Path, dataset: str, missing: Sequence[str]) -> str:
    """For a message: where missing files are looked for, and what lies there instead."""
    expected = f"{', '.join(missing)} (packed or not, there, in raw/ or in {dataset}/raw/)"
    if not (held := contents(directory, dataset)):
        return f"Set data.dir to a folder that holds {expected}, or data.mirrors to a reachable one."
    more = f" and {len(held) - SHOWN} more" if len(held) > SHOWN else ""
    return (
        f"data.dir={directory} holds {', '.join(held[:SHOWN])}{more}, but not {expected}. Add them, set data.mirrors "
        "to a reachable one, or data.source=sample to take the bundled sample instead. Data of another form need a "
        "data module of your own (data._target_; see thaw.data.datamodule)."
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
    return Source(train, val, test, "sample", "the bundled sample of 5,000 digits", class_names(dataset))


def check_digits(images: Tensor, labels: Tensor, name: str) -> Digits:
    """Raise ValueError unless images are (N, 28, 28) and labels N classes below 10."""
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"{name}: images have shape {tuple(images.shape)}, expected (N, 28, 28).")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name}: {len(images)} images but labels of shape {tuple(labels.shape)}.")
    if labels.max() > 9:
        raise ValueError(f"{name}: label {labels.max().item()} is not a class; allowed are 0 to 9.")
    return Digits(images, labels.long())


def describe(content: bytes, known: tuple[str, str] | None) -> str:
    """Say in a few words what a wrong file is; `known` names it if it is another official one."""
    if known:
        return f"it holds {known[1]} of {known[0]}"
    if content[:256].lstrip()[:1] == b"<":
        return "it is an HTML page, not data"
    try:
        shape = tuple(read_idx(unpacked(content), "it").shape)
    except EOFError:
        return f"it is truncated at {len(content):,} bytes"
    except (OSError, zlib.error):
        return "its content is corrupt"
    except ValueError as error:
        return str(error).rstrip(".")
    return f"it holds other data, of shape {shape}"


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
                answers.append(f"{url}: {describe(content, official_name(content))}, MD5 {found}")
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
    raise ConnectionError(f"{name} could not be downloaded to {folder} ({reason}).")


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
