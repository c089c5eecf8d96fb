"""MNIST and the datasets that share its four files: read from disk, downloaded, or the bundled sample."""

import gzip
import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

import torchvision.datasets
from filelock import FileLock
from pydantic import Field
from torch import Tensor

from thaw.data.idx import MAX_BYTES, read_idx, unpacked
from thaw.data.images import Images, Source
from thaw.data.module import ImageDataModule
from thaw.run.console import say, some
from thaw.run.download import save_url
from thaw.run.errors import UnreachableError, UserError, UserFileError
from thaw.run.files import atomic

log = logging.getLogger(__name__)

MIRROR_TIMEOUT = 5.0  # seconds without an answer before a mirror counts as out of reach
NAMES_SHOWN = 8  # of a folder's content, in an error
DATASETS = ("MNIST", "FashionMNIST", "KMNIST")  # torchvision classes that share the four file names and the format

# MD5 of the unpacked files, in the order of torchvision's `resources`, which has those of the .gz files as published.
# FashionMNIST's agree with mindspore's model zoo. Nobody states KMNIST's, so only its published files are recognised.
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

OFFICIAL, SAMPLE = "the official files", "the bundled sample of 5,000 digits"  # origins
MirrorURL: TypeAlias = Annotated[
    str, Field(pattern="^https?://", description="a URL such as https://example.org/mnist")
]
FAILED: dict[str, str] = {}  # by URL: why this process could not download from there; it does not try again


@dataclass(kw_only=True, eq=False)
class MNISTData(ImageDataModule):
    """MNIST, or another dataset of the same four files; see `load_mnist`."""

    dataset: Literal["MNIST", "FashionMNIST", "KMNIST"]
    dir: str
    source: Literal["auto", "official", "sample"]
    mirrors: Sequence[MirrorURL] | None

    def setup(self, stage: str | None = None) -> None:
        if self.trainer and self.trainer.world_size > 1:  # all ranks take rank 0's choice, official files or sample
            origin: Any = self.trainer.strategy.broadcast(self.load().origin if self.trainer.is_global_zero else "")
            if self.loaded is None or self.loaded.origin != origin:
                self.loaded, self.source = None, "sample" if origin == SAMPLE else "official"
        super().setup(stage)

    def read(self) -> Source:
        return load_mnist(self.dataset, self.dir, self.source, self.mirrors)


def load_mnist(dataset: str, directory: str | Path, source: str, mirrors: Sequence[str] | None) -> Source:
    """Load one dataset and split it.

    Args:
        dataset: one of `DATASETS`.
        directory: where the official files lie, packed or not: there, in `raw`, in `<dataset>/raw` or at most two
            folders below. Missing files are downloaded to `<dataset>/raw`, the layout of torchvision.
        source: `official` reads the files and downloads what is missing; `sample` reads the 5,000 bundled images;
            `auto` is `official`, or `sample` with a warning where no mirror answers and the folder is empty or absent.
        mirrors: base URLs tried in order; None stands for torchvision's, an empty list for no download.

    Raises:
        UserError: a file is not the official one, or the sample or the folder does not exist.
        OSError: the folder cannot be written.
        UnreachableError: official files are missing and no mirror gives them; names what lies in the folder.
    """
    if source == "sample":
        return load_sample(dataset)
    try:
        folder = Path(directory).expanduser()
    except RuntimeError as error:  # ~name of a user that this machine does not have
        raise UserError(f"data.dir={directory}: {error} Give the whole path.") from error
    try:
        return load_official(dataset, folder, mirrors)
    except UnreachableError as error:
        if source == "official" or dataset != "MNIST" or contents(folder, dataset):
            raise
        warn_of_sample(error.reason)
        return load_sample(dataset)


@cache  # once in a process, not for each job of a sweep
def warn_of_sample(reason: str) -> None:
    log.warning(
        "using the 5,000 bundled images: MNIST's 70,000 could not be downloaded (%s). Set data.dir to their folder, "
        "data.mirrors to another host, or data.source=sample to hide this.",
        reason,
    )


def class_names(dataset: str) -> list[str]:
    """The ten classes of a dataset, in the order of its labels."""
    if dataset == "MNIST":  # torchvision says "0 - zero"
        return [str(digit) for digit in range(10)]
    return list(getattr(torchvision.datasets, dataset).classes)


def load_sample(dataset: str) -> Source:
    """The bundled 5,000 MNIST digits (500 a class), split 4,000 / 500 / 500 with 400 / 50 / 50 of each class."""
    if dataset != "MNIST":
        raise UserError(f"There is no bundled sample of {dataset}, only of MNIST; set data.source=official.")
    whole = Images(read_sample("images-idx3-ubyte.gz")[:, None], read_sample("labels-idx1-ubyte.gz").long())
    one_hot = whole.labels[:, None] == whole.labels.unique()  # (N, 10)
    number = (one_hot.cumsum(0) * one_hot).sum(1) - 1  # (N,) within its class: 0 for the first image of each
    return Source(
        train=whole.take(number < 400),
        val=whole.take((number >= 400) & (number < 450)),
        test=whole.take(number >= 450),
        classes=class_names(dataset),
        name=dataset,
        origin=SAMPLE,
    )


@cache  # for all jobs of a sweep
def read_sample(name: str) -> Tensor:
    return read_idx(gzip.decompress((files("thaw.data") / "sample" / name).read_bytes()), f"bundled {name}")


def load_official(dataset: str, directory: Path, mirrors: Sequence[str] | None) -> Source:
    """The official files, split by position: validation is the first 6,000 training images, in every run."""
    names = [name for name, _ in getattr(torchvision.datasets, dataset).resources]
    found = {name: find_official(dataset, name, directory) for name in names}
    if missing := [name for name in names if found[name] is None]:
        download(dataset, missing, directory, mirrors)
        found |= {name: find_official(dataset, name, directory) for name in missing}
    train_images, train_labels, test_images, test_labels = (tensor for tensor in found.values() if tensor is not None)
    train = Images(train_images[:, None], train_labels.long())
    return Source(
        train=train.take(slice(6000, None)),
        val=train.take(slice(6000)),
        test=Images(test_images[:, None], test_labels.long()),
        classes=class_names(dataset),
        name=dataset,
        origin=OFFICIAL,
    )


def find_official(dataset: str, name: str, directory: Path) -> Tensor | None:
    """The content of an official file, under any usual name in any usual place; None where there is none.

    Raises:
        UserError: another file of that name lies where the official one belongs, and the official one lies nowhere.
    """
    own = [directory / dataset / "raw", directory / dataset, directory / "raw", directory]
    wrong = None
    for folder in chain(own, directory.glob("*/"), directory.glob("*/*/")):
        # train-images-idx3-ubyte.gz, train-images-idx3-ubyte, train-images.idx3-ubyte, ...: the content decides
        for path in sorted(folder.glob(name.removesuffix(".gz").replace("-idx", "[-.]idx") + "*")):
            if path.is_file() and path.suffix != ".part":
                found = read_official(dataset, name, path, path.stat().st_mtime_ns)
                if isinstance(found, Tensor):
                    return found
                wrong = wrong or (found if folder in own else None)  # elsewhere it may be another dataset
    if wrong:
        raise UserError(wrong)
    return None


@lru_cache(maxsize=8)
def read_official(dataset: str, name: str, path: Path, modified: int) -> Tensor | str:
    """The content of the official file `name` at `path`, or an error that says what else the file is.

    Cached for all jobs of a sweep, until the time at which the file was `modified` changes.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)  # an official file has less
    if official_name(content) == (dataset, name):
        return read_idx(unpacked(content, str(path)), str(path))
    wanted = dict(getattr(torchvision.datasets, dataset).resources)[name]
    verified = (
        "packed, or the same content" if dataset in UNPACKED_MD5 else "as published; no other copy can be verified"
    )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    return (
        f"{path} is not the official file ({describe_wrong_file(content)}): MD5 {found}, "
        f"expected {wanted} {verified}. Move it away and run again to download {name}, point data.dir at intact files, "
        f"or take the files as they are: data=arrays data.path={path.parent}."
    )


def official_name(content: bytes) -> tuple[str, str] | None:
    """Dataset and name of an official file, as published, unpacked or compressed anew; None for another file."""
    known: dict[str, tuple[str, str]] = {}
    for dataset in DATASETS:
        resources = getattr(torchvision.datasets, dataset).resources
        hashes = [*(md5 for _, md5 in resources), *UNPACKED_MD5.get(dataset, ())]
        known |= {md5: (dataset, resources[number % 4][0]) for number, md5 in enumerate(hashes)}
    with suppress(UserError):
        for form in (lambda: content, lambda: unpacked(content, "it")):
            if found := known.get(hashlib.md5(form()).hexdigest()):
                return found
    return None


def describe_wrong_file(content: bytes) -> str:
    """Say in a few words what a file is that should be another."""
    if known := official_name(content):
        return f"it holds {known[1]} of {known[0]}; data.dataset={known[0]} reads that"
    if content[:256].lstrip()[:1] == b"<":
        return "it is an HTML page, not data"
    try:
        shape = tuple(read_idx(unpacked(content, "it"), "it").shape)
    except UserError as error:
        return str(error).rstrip(".")
    return f"it holds other data, of shape {shape}"


def download(dataset: str, names: Sequence[str], directory: Path, mirrors: Sequence[str] | None) -> None:
    """Fetch official files to `<directory>/<dataset>/raw`, each from the first mirror that has it.

    Raises:
        UnreachableError: no mirror gave a file; says what each answered, and what lies in the folder instead.
        OSError: the folder cannot be written.
    """
    official, folder = getattr(torchvision.datasets, dataset), directory / dataset / "raw"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"):  # runs that start together download once
            wanted = [each for each in official.resources if each[0] in names and not (folder / each[0]).exists()]
            for name, md5 in wanted:
                fetch(name, md5, official.mirrors if mirrors is None else mirrors, folder)
            if wanted:
                say(f"downloaded {len(wanted)} files of {dataset} to {folder}")
    except UnreachableError as error:
        if contents(directory, dataset):  # leave a user's folder of other data as it was
            with suppress(OSError):  # of folders that hold files
                (folder / ".download.lock").unlink()
                folder.rmdir()
                folder.parent.rmdir()
        raise UnreachableError(f"{error} {next_step(directory, dataset, names)}", error.reason) from error
    except OSError as error:
        reason = getattr(error.__cause__ or error, "strerror", error)
        raise UserFileError(
            f"data.dir: cannot write to {folder} ({reason}). Free some space, or point data.dir at another folder."
        ) from error


def fetch(name: str, md5: str, mirrors: Sequence[str], folder: Path) -> None:
    """Download one file, which appears under its name once it is whole and has the expected MD5."""
    urls = [f"{mirror.rstrip('/')}/{name}" for mirror in mirrors]
    for url in urls:
        if url not in FAILED:
            try:
                with atomic(folder / name) as part:
                    retrieve(url, md5, part)
                return
            except ConnectionError as error:
                FAILED[url] = str(error)
    answers = "; ".join(f"{url}: {FAILED[url]}" for url in urls) or "data.mirrors is empty"
    reason = f"{urlsplit(urls[-1]).hostname}: {FAILED[urls[-1]]}" if urls else answers
    raise UnreachableError(f"{name} could not be downloaded to {folder} ({answers}).", reason)


def retrieve(url: str, md5: str, path: Path) -> None:
    """Write the content at a URL to a file; ConnectionError if it cannot be had or has another MD5."""
    name = url.rpartition("/")[2].partition("-idx")[0]
    save_url(url, path, f"downloading {name}", MIRROR_TIMEOUT)
    content = path.read_bytes()
    if hashlib.md5(content).hexdigest() != md5:
        raise ConnectionError(describe_wrong_file(content))


def contents(directory: Path, dataset: str) -> list[str]:
    """Names of what lies in a folder that the user gave, except for what thaw itself puts there.

    Left out are hidden files, unfinished downloads, folders without a file, and the folders of the other datasets.
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


def next_step(directory: Path, dataset: str, missing: Sequence[str]) -> str:
    """For a message: where missing files are looked for, and what lies there instead."""
    expected = f"{', '.join(missing)} (packed or not, there, in raw/ or in {dataset}/raw/)"
    if not (held := contents(directory, dataset)):
        return f"Set data.dir to a folder that holds {expected}, or data.mirrors to a reachable one."
    return (
        f"data.dir={directory} holds {some(held, most=NAMES_SHOWN)}, but not {expected}. Add them, set "
        "data.mirrors to a reachable one, or data.source=sample to take the bundled sample instead. data=folder reads "
        "pictures in folders, data=arrays arrays and CSV files."
    )
