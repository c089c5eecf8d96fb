"""Official files read and downloaded, tried with a tiny synthetic set and mirrors on the loopback address."""

import errno
import gzip
import hashlib
import io
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision.datasets

from thaw.data import mnist
from thaw.data.idx import write_idx
from thaw.data.images import Images, Source
from thaw.data.mnist import OFFICIAL, SAMPLE, load_mnist

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES = [
    f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]
HTML = b"<!DOCTYPE html><html>Please log in to this network</html>"
ROOT = Path(__file__).parents[2]
PLACES = (ROOT / "data", ROOT.parent / "shared/data")  # where the real files may lie

Tensors = dict[str, torch.Tensor]
Files = dict[str, bytes]


class Cut(NamedTuple):
    """A fault: the connection closes after so many bytes of the body."""

    after: int


class Silence(NamedTuple):
    """A fault: nothing comes for so many seconds."""

    seconds: float


class Mirror(ThreadingHTTPServer):
    """Serves `files`; every request meets the fault (an HTTP status, a Cut or a Silence), if there is one."""

    def __init__(self, files: Files, fault: int | Cut | Silence | None) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.fault = files, fault
        self.asked: list[str] = []  # files
        self.url = f"http://127.0.0.1:{self.server_port}/mnist"


class Answer(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        name, fault = Path(self.path).name, self.server.fault
        self.server.asked.append(name)
        content = self.server.files.get(name)
        if isinstance(fault, int):
            self.send_error(fault)
        elif isinstance(fault, Silence):
            time.sleep(fault.seconds)
        elif content is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: fault.after if fault else None])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def mirror() -> Iterator[Callable[..., Mirror]]:
    """Starts mirrors: mirror(files, fault)."""
    running = []

    def start(files: Files, fault: int | Cut | Silence | None = None) -> Mirror:
        server = Mirror(files, fault)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def digits() -> Tensors:
    """6,100 training and 100 test images that compress well and all differ."""
    tensors = {}
    for number, (images, labels) in enumerate(((TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS))):
        places = torch.arange(100 if number else 6100)
        tensors[images] = torch.zeros(len(places), 28, 28, dtype=torch.uint8)
        tensors[images][:, 0, 0] = places // 256
        tensors[images][:, 0, 1] = places % 256
        tensors[images][:, 0, 2] = number
        tensors[labels] = (places * 7 % 10).to(torch.uint8)
    return tensors


@pytest.fixture(scope="module")
def packed(digits: Tensors) -> Files:
    return {name: gzip.compress(write_idx(tensor), mtime=0) for name, tensor in digits.items()}


@pytest.fixture
def nowhere() -> str:
    """A URL at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/"


@pytest.fixture(autouse=True)
def official(packed: Files, nowhere: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The synthetic set takes the place of the official one."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(mnist, "FAILED", {})
    mnist.warn_of_sample.cache_clear()
    if "real" in request.fixturenames:
        return
    resources = [(name, hashlib.md5(packed[name]).hexdigest()) for name in NAMES]
    unpacked = tuple(hashlib.md5(gzip.decompress(packed[name])).hexdigest() for name in NAMES)
    monkeypatch.setattr(mnist, "UNPACKED_MD5", {"MNIST": unpacked})
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    for dataset in (torchvision.datasets.MNIST, torchvision.datasets.FashionMNIST):
        monkeypatch.setattr(dataset, "mirrors", [nowhere])


@pytest.fixture
def real() -> Path:
    """The folder of the real official files."""
    for place in PLACES:
        if all((place / "MNIST/raw" / name).exists() for name in NAMES):
            return place
    pytest.skip("the official MNIST files lie neither in data/ nor in ../shared/data/")


def put(content: Files, directory: Path) -> Path:
    """Files in the layout of torchvision; returns their folder."""
    raw = directory / "MNIST/raw"
    raw.mkdir(parents=True)
    for name, packed in content.items():
        (raw / name).write_bytes(packed)
    return raw


def files_in(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()} - {".download.lock"}


def assert_equal(one: Images, other: Images) -> None:
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)


def assert_synthetic(found: Source, digits: Tensors) -> None:
    assert found.origin == OFFICIAL
    whole = Images(*(torch.cat(parts) for parts in zip(found.val, found.train, strict=True)))
    assert_equal(whole, Images(digits[TRAIN_IMAGES][:, None], digits[TRAIN_LABELS].long()))
    assert_equal(found.test, Images(digits[TEST_IMAGES][:, None], digits[TEST_LABELS].long()))
    assert [len(part.labels) for part in found[:3]] == [100, 6000, 100]


# The bundled sample


def test_sample_splits() -> None:
    sample, again = (load_mnist("MNIST", "nowhere", "sample", None) for _ in range(2))
    assert sample.origin == SAMPLE
    for digits, same, per_class in zip(sample[:3], again[:3], (400, 50, 50), strict=True):
        assert digits.images.shape == (10 * per_class, 1, 28, 28)
        assert digits.images.dtype == torch.uint8
        assert digits.labels.dtype == torch.int64
        assert digits.labels.bincount().tolist() == [per_class] * 10
        assert_equal(digits, same)
    images = [image.numpy().tobytes() for digits in sample[:3] for image in digits.images]
    assert len(set(images)) == 5000


def test_sample_is_mnist_only() -> None:
    with pytest.raises(ValueError, match=r"no bundled sample of FashionMNIST.*data\.source=official"):
        load_mnist("FashionMNIST", "nowhere", "sample", None)


# Official files on disk


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize("source", ["auto", "official"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda right: right[TRAIN_IMAGES][:5000], r"truncated at 5,000 bytes"),
        (lambda right: flip(right[TRAIN_IMAGES]), "damaged gzip file"),
        (lambda right: right[TEST_IMAGES], f"it holds {TEST_IMAGES} of MNIST; data.dataset=MNIST reads that"),
        (lambda right: b"\n " + HTML, "HTML page"),
        (lambda right: gzip.compress(b"other"), r"it is not an IDX file: it starts with b'other'"),
        (lambda right: write_idx(torch.zeros(9, 28, 28).byte()), r"it holds other data, of shape \(9, 28, 28\)"),
    ],
    ids=["truncated", "corrupt", "swapped", "html", "not IDX", "own images"],
)
def test_a_wrong_file_is_never_used(
    make: Callable[[Files], bytes], message: str, source: str, packed: Files, tmp_path: Path
) -> None:
    path = put(packed, tmp_path) / TRAIN_IMAGES
    path.write_bytes(make(packed))
    with pytest.raises(ValueError, match=message) as caught:
        load_mnist("MNIST", tmp_path, source, None)
    for part in (str(path), "Move it away", f"data=arrays data.path={path.parent}"):
        assert part in str(caught.value)


LAYOUTS: dict[str, Callable[[str], str]] = {
    "of torchvision": lambda name: f"MNIST/raw/{name}",
    "unpacked": lambda name: f"MNIST/raw/{name.removesuffix('.gz')}",
    "dotted": lambda name: f"MNIST/raw/{name.removesuffix('.gz').replace('-idx', '.idx')}",
    "dotted and packed": lambda name: f"MNIST/raw/{name.replace('-idx', '.idx')}",
    "flat": lambda name: name,
    "raw": lambda name: f"raw/{name}",
    "named": lambda name: f"MNIST/{name}",
    "in another folder": lambda name: f"mnist/files/{name}",
    "a folder each": lambda name: "{0}/{0}".format(name.removesuffix(".gz")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_files_in_any_usual_place(layout: str, packed: Files, digits: Tensors, tmp_path: Path) -> None:
    for name, content in packed.items():
        path = tmp_path / LAYOUTS[layout](name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if path.suffix == ".gz" else gzip.decompress(content))
    before = sorted(tmp_path.rglob("*"))
    assert_synthetic(load_mnist("MNIST", tmp_path, "auto", None), digits)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["MNIST/raw", "MNIST"])
def test_a_folder_within_the_layout_may_be_given(place: str, packed: Files, digits: Tensors, tmp_path: Path) -> None:
    put(packed, tmp_path)
    assert_synthetic(load_mnist("MNIST", tmp_path / place, "official", []), digits)


def test_the_users_home_is_expanded(
    packed: Files, digits: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    put(packed, tmp_path / "home/digits")
    assert_synthetic(load_mnist("MNIST", "~/digits", "auto", None), digits)
    with pytest.raises(ValueError, match=r"data\.dir=~no_such_user/digits: .*Give the whole path"):
        load_mnist("MNIST", "~no_such_user/digits", "auto", None)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("level", [1, 9])
def test_only_the_content_counts(level: int, packed: Files, digits: Tensors, tmp_path: Path) -> None:
    """Files that were compressed anew, one that a browser has unpacked on the way, and a right one beside a wrong."""
    again = {name: gzip.compress(gzip.decompress(content), level, mtime=1) for name, content in packed.items()}
    raw = put(again | {TRAIN_IMAGES: gzip.decompress(packed[TRAIN_IMAGES])}, tmp_path)
    (raw / TEST_LABELS).write_bytes(packed[TEST_LABELS][:50])
    (raw / TEST_LABELS.removesuffix(".gz")).write_bytes(gzip.decompress(packed[TEST_LABELS]))
    assert_synthetic(load_mnist("MNIST", tmp_path, "official", []), digits)


def test_a_file_that_was_replaced_is_read_again(packed: Files, tmp_path: Path) -> None:
    raw = put(packed, tmp_path)
    load_mnist("MNIST", tmp_path, "official", [])
    (raw / TEST_LABELS).write_bytes(b"damaged")
    os.utime(raw / TEST_LABELS, (1, 1))
    with pytest.raises(ValueError, match="it is not an IDX file"):
        load_mnist("MNIST", tmp_path, "official", [])


def test_files_whose_unpacked_content_is_unknown(packed: Files, tmp_path: Path) -> None:
    """Of KMNIST the published .gz files can be checked, and nothing else."""
    raw = tmp_path / "KMNIST/raw"
    raw.mkdir(parents=True)
    (raw / TRAIN_IMAGES.removesuffix(".gz")).write_bytes(gzip.decompress(packed[TRAIN_LABELS]))
    as_published = "expected bdb82020997e1d708af4cf47b453dcf7 as published; no other copy can be verified"
    with pytest.raises(ValueError, match=as_published):
        load_mnist("KMNIST", tmp_path, "official", [])


# Data that a user pointed at are never replaced


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (["train/3/a.png", "train/5/b.png"], "train/"),
        (["mnist/train-00000-of-00001.parquet"], "mnist/"),
        (["mnist_test.csv"], "mnist_test.csv"),
        ([f"{number:02}.png" for number in range(30)], "00.png, 01.png, .* and 22 more"),
    ],
)
@pytest.mark.parametrize("source", ["auto", "official"])
def test_other_data_are_an_error(
    source: str, names: list[str], listed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"a picture")
    (tmp_path / "MNIST/raw").mkdir(parents=True)  # empty
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConnectionError, match=rf"data\.dir={tmp_path} holds {listed}, but not {TRAIN_IMAGES}, "):
        load_mnist("MNIST", tmp_path, source, None)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "MNIST").exists()
    assert "bundled" not in caplog.text


@pytest.mark.parametrize("there", [1, 3])
def test_a_part_of_the_official_files_is_an_error(there: int, packed: Files, tmp_path: Path) -> None:
    put({name: packed[name] for name in NAMES[:there]}, tmp_path)
    with pytest.raises(ConnectionError) as caught:
        load_mnist("MNIST", tmp_path, "auto", None)
    assert f"holds MNIST/, but not {', '.join(NAMES[there:])} (packed or not" in str(caught.value)


def test_what_thaw_put_there_counts_for_nothing(tmp_path: Path) -> None:
    for name in ("FashionMNIST/raw/x.gz", "MNIST/raw/.download.lock", f"MNIST/raw/{TRAIN_IMAGES}.part", ".DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert load_mnist("MNIST", tmp_path, "auto", None).origin == SAMPLE


# Downloading


def test_download_once(
    packed: Files, digits: Tensors, mirror: Callable[..., Mirror], nowhere: str, tmp_path: Path
) -> None:
    server = mirror(packed)
    assert_synthetic(load_mnist("MNIST", tmp_path / "new", "auto", [server.url + "/"]), digits)
    assert server.asked == NAMES
    assert files_in(tmp_path) == set(NAMES)
    assert_synthetic(load_mnist("MNIST", tmp_path / "new", "official", [nowhere]), digits)  # no need of a mirror now


def test_only_what_is_missing_is_downloaded_from_torchvisions_mirrors(
    packed: Files, digits: Tensors, mirror: Callable[..., Mirror], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = mirror(packed)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [server.url])
    (put(packed, tmp_path) / TEST_LABELS).unlink()
    assert_synthetic(load_mnist("MNIST", tmp_path, "official", None), digits)
    assert server.asked == [TEST_LABELS]


def test_runs_that_start_together_download_once(
    packed: Files, digits: Tensors, mirror: Callable[..., Mirror], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, barrier, real_download = mirror(packed), threading.Barrier(3), mnist.download

    def together(*arguments: Any) -> None:  # called once a run has seen that files are missing
        barrier.wait(timeout=30)
        real_download(*arguments)

    monkeypatch.setattr(mnist, "download", together)
    with ThreadPoolExecutor(3) as pool:
        for run in [pool.submit(load_mnist, "MNIST", tmp_path, "official", [server.url]) for _ in range(3)]:
            assert_synthetic(run.result(), digits)
    assert server.asked == NAMES


def test_a_file_is_never_half_there(
    packed: Files, mirror: Callable[..., Mirror], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes lie under another name until their MD5 is known to be right."""
    server, real_retrieve = mirror(packed), mnist.retrieve

    def watched(url: str, *arguments: Any) -> None:
        real_retrieve(url, *arguments)
        assert not (tmp_path / "MNIST/raw" / Path(url).name).exists()

    monkeypatch.setattr(mnist, "retrieve", watched)
    load_mnist("MNIST", tmp_path, "official", [server.url])
    assert files_in(tmp_path) == set(NAMES)


@pytest.mark.parametrize(
    ("portal", "fault", "reason"),
    [
        ({}, None, "HTTP Error 404: Not Found"),
        ({}, 503, "HTTP Error 503: Service Unavailable"),
        (dict.fromkeys(NAMES, HTML), None, "it is an HTML page, not data"),
        (None, Cut(30), "it is truncated at 30 bytes"),
        (None, Silence(2), "timed out"),
    ],
    ids=["absent", "overloaded", "login page", "broken off", "silent"],
)
def test_a_mirror_that_fails_leads_to_the_next_one(
    portal: Files | None,
    fault: int | Cut | Silence | None,
    reason: str,
    packed: Files,
    digits: Tensors,
    mirror: Callable[..., Mirror],
    nowhere: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error names every URL that was tried, and why it failed."""
    monkeypatch.setattr(mnist, "MIRROR_TIMEOUT", 0.2)
    bad, good = mirror(packed if portal is None else portal, fault), mirror(packed)
    started = time.monotonic()
    with pytest.raises(ConnectionError) as caught:
        load_mnist("MNIST", tmp_path, "official", [bad.url, nowhere])
    assert time.monotonic() - started < 1.5
    for part in (f"{bad.url}/{TRAIN_IMAGES}: {reason}", f"{nowhere}{TRAIN_IMAGES}: Connection refused", "Set data.dir"):
        assert part in str(caught.value)
    assert files_in(tmp_path) == set()
    assert_synthetic(load_mnist("MNIST", tmp_path, "official", [bad.url, good.url]), digits)
    assert bad.asked == good.asked == NAMES  # the first file, which had failed, was not asked for again
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0-OpenSSH_9.6\r\n"], ids=["nothing", "not HTTP"])
def test_a_server_that_does_not_speak_http(reply: bytes, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(reply)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConnectionError, match=TRAIN_IMAGES):
            load_mnist("MNIST", tmp_path, "official", [f"http://127.0.0.1:{listener.getsockname()[1]}"])


def test_out_of_reach_falls_back_to_the_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which is said once, in three lines of a terminal, however many jobs of a sweep load it."""
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = load_mnist("MNIST", tmp_path, "auto", None)
    assert found.origin == SAMPLE
    assert len(found.train.labels) == 4000
    [record] = [record for record in caplog.records if record.name == mnist.__name__]
    assert record.levelno == logging.WARNING and len(f"warning: {record.getMessage()}") < 3 * 80
    for part in ("the 5,000 bundled images", "127.0.0.1: Connection refused", "data.source=sample"):
        assert part in record.getMessage()


def test_the_progress_of_a_download(
    packed: Files,
    mirror: Callable[..., Mirror],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("thaw.run.console.LINE_SECONDS", 0)
    monkeypatch.setattr("thaw.run.download.BLOCK", 100)
    load_mnist("MNIST", tmp_path, "official", [mirror(packed).url])
    first, *_, last = capsys.readouterr().out.splitlines()
    size = len(packed[TRAIN_IMAGES])
    assert re.fullmatch(rf"downloading train-images: 100 of {size:,} bytes, about \d+ s left", first)
    assert last == f"downloaded 4 files of MNIST to {tmp_path / 'MNIST/raw'}"


@pytest.mark.parametrize(("dataset", "source"), [("MNIST", "official"), ("FashionMNIST", "auto")])
def test_out_of_reach_is_an_error_where_there_is_no_fall_back(
    dataset: str, source: str, nowhere: str, tmp_path: Path
) -> None:
    with pytest.raises(ConnectionError) as caught:
        load_mnist(dataset, tmp_path, source, None)
    for part in (TRAIN_IMAGES, f"{tmp_path}/{dataset}/raw", nowhere, "refused", "Set data.dir", "data.mirrors"):
        assert part in str(caught.value)


def test_no_mirrors_means_no_download(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"\(data\.mirrors is empty\)"):
        load_mnist("MNIST", tmp_path, "official", [])


# What cannot be written


def full_disk(path: Path, mode: str) -> io.FileIO:
    class FullDisk(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return FullDisk(path, "w") if "w" in mode else open(path, mode)  # type: ignore[return-value]  # noqa: PTH123


@pytest.mark.parametrize("source", ["auto", "official"])
@pytest.mark.parametrize("reason", ["Not a directory", "No space left on device"])
def test_a_folder_that_cannot_be_written(
    source: str,
    reason: str,
    packed: Files,
    mirror: Callable[..., Mirror],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "place"
    if reason == "Not a directory":
        folder.write_text("a file")
    monkeypatch.setattr(Path, "open", full_disk)
    message = rf"data\.dir: cannot write to {folder}/MNIST/raw \({reason}\).*data\.dir at another"
    with pytest.raises(OSError, match=message) as caught:
        load_mnist("MNIST", folder, source, [mirror(packed).url])
    assert not isinstance(caught.value, ConnectionError)
    assert files_in(tmp_path) <= {"place"}


# The real files


def test_official_files_as_torchvision_reads_them(real: Path, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        with gzip.open(real / "MNIST/raw" / name) as packed_file, (raw / name.removesuffix(".gz")).open("wb") as file:
            shutil.copyfileobj(packed_file, file)
    train, test = map(partial(torchvision.datasets.MNIST, tmp_path, download=False), (True, False))
    ours = load_mnist("MNIST", real, "official", [])
    assert [len(part.labels) for part in ours[:3]] == [54_000, 6_000, 10_000]
    assert_equal(ours.val, Images(train.data[:6000, None], train.targets[:6000]))
    assert_equal(ours.train, Images(train.data[6000:, None], train.targets[6000:]))
    assert_equal(ours.test, Images(test.data[:, None], test.targets))


@pytest.mark.parametrize("name", NAMES)
def test_known_content_is_that_of_the_official_files(name: str, real: Path) -> None:
    content = (real / "MNIST/raw" / name).read_bytes()
    assert mnist.official_name(content) == mnist.official_name(gzip.decompress(content)) == ("MNIST", name)


def test_the_sample_lies_inside_the_official_validation_split(real: Path) -> None:
    """So that nothing pretrained on the other 54,000 digits has seen the sample's test split."""
    count = Counter(keys(load_mnist("MNIST", real, "official", []).val))
    sample = load_mnist("MNIST", "nowhere", "sample", None)
    count.subtract(key for digits in sample[:3] for key in keys(digits))
    assert min(count.values()) >= 0


def keys(digits: Images) -> list[tuple[bytes, int]]:
    return [(image.numpy().tobytes(), int(label)) for image, label in zip(digits.images, digits.labels, strict=True)]
