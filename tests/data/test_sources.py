"""Where digits come from, tried with a tiny synthetic "official" set and mirrors on the loopback address."""

import errno
import gzip
import hashlib
import io
import logging
import os
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torchvision.datasets

from thaw.data import sources
from thaw.data.idx import write_idx
from thaw.data.sources import Digits, Source, load

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES = [
    f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]
HTML = b"<!DOCTYPE html><html>Please log in to this network</html>"
ROOT = Path(__file__).parents[2]
PLACES = (ROOT / "data", ROOT.parent / "shared/data")  # where the real files may lie


class Cut(NamedTuple):
    """A fault: the connection closes after so many bytes of the body."""

    after: int


class Mirror(ThreadingHTTPServer):
    """Serves `files`; the faults (an HTTP status, or a Cut) are spent one a request."""

    def __init__(self, files: dict[str, bytes], faults: list[int | Cut], ranges: bool) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.faults, self.ranges = files, faults, ranges
        self.requests: list[tuple[str, str | None]] = []  # (file, Range header)
        self.url = f"http://127.0.0.1:{self.server_port}/mnist"


class Answer(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        name, asked = Path(self.path).name, self.headers.get("Range")
        self.server.requests.append((name, asked))
        fault = self.server.faults.pop(0) if self.server.faults else None
        content = self.server.files.get(name)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if isinstance(fault, int):
            self.send_error(fault)
        elif content is None:
            self.send_error(404)
        elif start >= len(content):
            self.send_error(416)
        else:
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: fault.after if fault else None])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def mirror() -> Iterator[Callable[..., Mirror]]:
    """Starts mirrors: mirror(files, fault, ..., ranges=True)."""
    running = []

    def start(files: dict[str, bytes], *faults: int | Cut, ranges: bool = True) -> Mirror:
        server = Mirror(files, list(faults), ranges)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def digits() -> dict[str, torch.Tensor]:
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
def packed(digits: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: gzip.compress(write_idx(tensor), mtime=0) for name, tensor in digits.items()}


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No test waits between tries: how long each would have waited."""
    waited: list[float] = []
    monkeypatch.setattr(sources, "time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return waited


@pytest.fixture
def nowhere() -> str:
    """A URL at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/"


@pytest.fixture(autouse=True)
def official(
    packed: dict[str, bytes], nowhere: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The synthetic set takes the place of the official one."""
    if "real" in request.fixturenames:
        return
    resources = [(name, hashlib.md5(packed[name]).hexdigest()) for name in NAMES]
    unpacked = tuple(hashlib.md5(gzip.decompress(packed[name])).hexdigest() for name in NAMES)
    monkeypatch.setattr(sources, "UNPACKED_MD5", {"MNIST": unpacked})
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


def put(packed: dict[str, bytes], directory: Path) -> Path:
    """Files in the layout of torchvision; returns their folder."""
    raw = directory / "MNIST/raw"
    raw.mkdir(parents=True)
    for name, content in packed.items():
        (raw / name).write_bytes(content)
    return raw


def kept(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()} - {".download.lock"}


def assert_synthetic(found: Source, digits: dict[str, torch.Tensor]) -> None:
    assert found.name == "official"
    assert torch.equal(torch.cat([found.val.images, found.train.images]), digits[TRAIN_IMAGES])
    assert torch.equal(torch.cat([found.val.labels, found.train.labels]), digits[TRAIN_LABELS].long())
    assert torch.equal(found.test.images, digits[TEST_IMAGES])
    assert torch.equal(found.test.labels, digits[TEST_LABELS].long())
    assert [len(part.labels) for part in found[:3]] == [100, 6000, 100]


# The bundled sample


def test_sample_splits() -> None:
    sample = load("MNIST", "nowhere", "sample", None)
    assert sample.name == "sample"
    for digits, per_class in zip(sample[:3], (400, 50, 50), strict=True):
        assert digits.images.shape == (10 * per_class, 28, 28)
        assert digits.images.dtype == torch.uint8
        assert digits.labels.dtype == torch.int64
        assert digits.labels.bincount().tolist() == [per_class] * 10
    images = [image.numpy().tobytes() for digits in sample[:3] for image in digits.images]
    assert len(set(images)) == 5000


def test_sample_is_the_same_every_time() -> None:
    first, second = (load("MNIST", "nowhere", "sample", None) for _ in range(2))
    for one, other in zip(first[:3], second[:3], strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_sample_is_mnist_only() -> None:
    with pytest.raises(ValueError, match=r"no bundled sample of FashionMNIST.*data\.source=official"):
        load("FashionMNIST", "nowhere", "sample", None)


# Official files on disk


def test_files_on_disk_are_read_and_nothing_is_written(
    packed: dict[str, bytes], digits: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    raw = put(packed, tmp_path)
    assert_synthetic(load("MNIST", tmp_path, "auto", None), digits)
    assert {path.name for path in raw.iterdir()} == set(NAMES)


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


WRONG = {
    "truncated": (lambda right: right[TRAIN_IMAGES][:5000], r"truncated at 5,000 bytes"),
    "corrupt": (lambda right: flip(right[TRAIN_IMAGES]), "corrupt"),
    "swapped": (lambda right: right[TEST_IMAGES], f"it holds {TEST_IMAGES} of MNIST"),
    "html": (lambda right: b"\n " + HTML, "HTML page"),
    "not IDX": (lambda right: gzip.compress(b"other"), r"it is not an IDX file: it starts with b'other'"),
    "own digits": (
        lambda right: write_idx(torch.zeros(9, 28, 28).byte()),
        r"it holds other data, of shape \(9, 28, 28\)",
    ),
}


@pytest.mark.parametrize("source", ["auto", "official"])
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_file_is_never_used(fault: str, source: str, packed: dict[str, bytes], tmp_path: Path) -> None:
    make, message = WRONG[fault]
    path = put(packed, tmp_path) / TRAIN_IMAGES
    path.write_bytes(make(packed))
    with pytest.raises(ValueError, match=message) as caught:
        load("MNIST", tmp_path, source, None)
    assert str(path) in str(caught.value)
    assert "Move it away" in str(caught.value)
    assert "data._target_" in str(caught.value)


LAYOUTS: dict[str, Callable[[str], str]] = {
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
def test_official_files_in_any_usual_place(
    layout: str, packed: dict[str, bytes], digits: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    for name, content in packed.items():
        path = tmp_path / LAYOUTS[layout](name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if path.suffix == ".gz" else gzip.decompress(content))
    before = sorted(tmp_path.rglob("*"))
    assert_synthetic(load("MNIST", tmp_path, "auto", None), digits)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["MNIST/raw", "MNIST"])
def test_a_folder_within_the_layout_may_be_given(
    place: str, packed: dict[str, bytes], digits: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    put(packed, tmp_path)
    assert_synthetic(load("MNIST", tmp_path / place, "official", []), digits)


def test_the_users_home_is_expanded(
    packed: dict[str, bytes], digits: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    put(packed, tmp_path / "home/digits")
    assert_synthetic(load("MNIST", "~/digits", "auto", None), digits)
    with pytest.raises(ValueError, match=r"data\.dir=~no_such_user/digits: .*Give the whole path"):
        load("MNIST", "~no_such_user/digits", "auto", None)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("level", [1, 9])
def test_only_the_content_counts(
    level: int, packed: dict[str, bytes], digits: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Files that were compressed anew, and one that a browser has unpacked on the way."""
    again = {name: gzip.compress(gzip.decompress(content), level, mtime=1) for name, content in packed.items()}
    put(again | {TRAIN_IMAGES: gzip.decompress(packed[TRAIN_IMAGES])}, tmp_path)
    assert_synthetic(load("MNIST", tmp_path, "official", []), digits)


def test_a_right_file_is_found_beside_a_wrong_one(
    packed: dict[str, bytes], digits: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    raw = put(packed, tmp_path)
    (raw / TRAIN_IMAGES).write_bytes(packed[TRAIN_IMAGES][:100])
    (raw / TRAIN_IMAGES.removesuffix(".gz")).write_bytes(gzip.decompress(packed[TRAIN_IMAGES]))
    assert_synthetic(load("MNIST", tmp_path, "official", []), digits)


def test_a_file_that_was_replaced_is_read_again(packed: dict[str, bytes], tmp_path: Path) -> None:
    raw = put(packed, tmp_path)
    load("MNIST", tmp_path, "official", [])
    (raw / TEST_LABELS).write_bytes(b"damaged")
    os.utime(raw / TEST_LABELS, (1, 1))
    with pytest.raises(ValueError, match="it is not an IDX file"):
        load("MNIST", tmp_path, "official", [])


def test_files_whose_unpacked_content_is_unknown(packed: dict[str, bytes], tmp_path: Path) -> None:
    """Of KMNIST the published .gz files can be checked, and nothing else."""
    raw = tmp_path / "KMNIST/raw"
    raw.mkdir(parents=True)
    (raw / TRAIN_IMAGES.removesuffix(".gz")).write_bytes(gzip.decompress(packed[TRAIN_LABELS]))
    with pytest.raises(ValueError, match=r"expected bdb82020997e1d708af4cf47b453dcf7, as published\."):
        load("KMNIST", tmp_path, "official", [])


# Data that a user pointed at are never replaced


def own_images(directory: Path) -> None:
    for name in ("train/3/a.png", "train/5/b.png"):
        (directory / name).parent.mkdir(parents=True)
        (directory / name).write_bytes(b"a picture")
    (directory / "MNIST/raw").mkdir(parents=True)


def parquet(directory: Path) -> None:
    (directory / "mnist").mkdir()
    (directory / "mnist/train-00000-of-00001.parquet").write_bytes(b"PAR1")


def csv_file(directory: Path) -> None:
    (directory / "mnist_test.csv").write_text("label,1x1\n")


def many(directory: Path) -> None:
    for number in range(30):
        (directory / f"{number:02}.png").write_bytes(b"a picture")


@pytest.mark.parametrize(
    ("fill", "listed"),
    [
        (own_images, "train/"),
        (parquet, "mnist/"),
        (csv_file, "mnist_test.csv"),
        (many, "00.png, 01.png, .* and 22 more"),
    ],
)
@pytest.mark.parametrize("source", ["auto", "official"])
def test_other_data_are_an_error(
    source: str, fill: Callable[[Path], None], listed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConnectionError, match=rf"data\.dir={tmp_path} holds {listed}, but not {TRAIN_IMAGES}, "):
        load("MNIST", tmp_path, source, None)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "MNIST").exists()
    assert "USING THE BUNDLED SAMPLE" not in caplog.text


@pytest.mark.parametrize("there", [1, 3])
def test_a_part_of_the_official_files_is_an_error(there: int, packed: dict[str, bytes], tmp_path: Path) -> None:
    put({name: packed[name] for name in NAMES[:there]}, tmp_path)
    with pytest.raises(ConnectionError) as caught:
        load("MNIST", tmp_path, "auto", None)
    assert f"holds MNIST/, but not {', '.join(NAMES[there:])} (packed or not" in str(caught.value)


def test_own_digits_under_the_official_names_are_an_error(tmp_path: Path) -> None:
    for name, shape in zip(NAMES, ((9, 28, 28), (9,), (4, 28, 28), (4,)), strict=True):
        (tmp_path / name).write_bytes(gzip.compress(write_idx(torch.zeros(shape).byte())))
    with pytest.raises(ValueError, match=r"holds other data, of shape \(9, 28, 28\).*data module of your own"):
        load("MNIST", tmp_path, "auto", None)


def test_what_thaw_put_there_counts_for_nothing(tmp_path: Path) -> None:
    for name in ("FashionMNIST/raw/x.gz", "MNIST/raw/.download.lock", f"MNIST/raw/{TRAIN_IMAGES}.part", ".DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert load("MNIST", tmp_path, "auto", None).name == "sample"


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(5, 784), torch.zeros(5), r"shape \(5, 784\)"),
        (torch.zeros(5, 32, 32), torch.zeros(5), r"shape \(5, 32, 32\)"),
        (torch.zeros(5, 28, 28), torch.zeros(4), r"5 images but labels of shape \(4,\)"),
        (torch.zeros(5, 28, 28), torch.tensor([0, 1, 2, 3, 10]), "label 10 is not a class"),
    ],
)
def test_digits_that_do_not_fit(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        sources.check_digits(images.to(torch.uint8), labels.to(torch.uint8), "here")


# Downloading


def test_download_once(
    packed: dict[str, bytes],
    digits: dict[str, torch.Tensor],
    mirror: Callable[..., Mirror],
    nowhere: str,
    tmp_path: Path,
) -> None:
    server = mirror(packed)
    assert_synthetic(load("MNIST", tmp_path / "new", "auto", [server.url + "/"]), digits)
    assert server.requests == [(name, None) for name in NAMES]
    assert kept(tmp_path) == set(NAMES)
    assert_synthetic(load("MNIST", tmp_path / "new", "official", [nowhere]), digits)  # no need of a mirror now


def test_torchvisions_mirrors_are_the_default(
    packed: dict[str, bytes], mirror: Callable[..., Mirror], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = mirror(packed)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [server.url])
    assert load("MNIST", tmp_path, "official", None).name == "official"
    assert len(server.requests) == 4


def test_only_what_is_missing_is_downloaded(
    packed: dict[str, bytes], digits: dict[str, torch.Tensor], mirror: Callable[..., Mirror], tmp_path: Path
) -> None:
    server = mirror(packed)
    (put(packed, tmp_path) / TEST_LABELS).unlink()
    assert_synthetic(load("MNIST", tmp_path, "official", [server.url]), digits)
    assert server.requests == [(TEST_LABELS, None)]


def test_runs_that_start_together_download_once(
    packed: dict[str, bytes],
    digits: dict[str, torch.Tensor],
    mirror: Callable[..., Mirror],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, barrier, real_make_folder = mirror(packed), threading.Barrier(3), sources.make_folder

    def together(folder: Path) -> None:  # called once a run has seen that files are missing
        real_make_folder(folder)
        barrier.wait(timeout=30)

    monkeypatch.setattr(sources, "make_folder", together)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(load, "MNIST", tmp_path, "official", [server.url]) for _ in range(3)]
        for run in runs:
            assert_synthetic(run.result(), digits)
    assert len(server.requests) == 4


def test_a_file_is_never_half_there(
    packed: dict[str, bytes], mirror: Callable[..., Mirror], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the rename the bytes lie under another name."""
    server = mirror(packed)
    real_fetch = sources.fetch

    def watched(url: str, part: Path, name: str) -> None:
        real_fetch(url, part, name)
        assert part.read_bytes() == packed[name]
        assert not (part.parent / name).exists()

    monkeypatch.setattr(sources, "fetch", watched)
    load("MNIST", tmp_path, "official", [server.url])


def test_a_download_that_breaks_off_goes_on(
    packed: dict[str, bytes],
    digits: dict[str, torch.Tensor],
    mirror: Callable[..., Mirror],
    naps: list[float],
    tmp_path: Path,
) -> None:
    server = mirror(packed, Cut(1000), Cut(500))
    assert_synthetic(load("MNIST", tmp_path, "official", [server.url]), digits)
    assert server.requests[:3] == [(TRAIN_IMAGES, asked) for asked in (None, "bytes=1000-", "bytes=1500-")]
    assert len(server.requests) == 6
    assert naps == [1, 2]
    assert kept(tmp_path) == set(NAMES)


def test_the_next_run_goes_on(
    packed: dict[str, bytes], digits: dict[str, torch.Tensor], mirror: Callable[..., Mirror], tmp_path: Path
) -> None:
    server = mirror(packed, Cut(1000), Cut(500), Cut(250))
    with pytest.raises(ConnectionError, match=r"broke off after 1,750 of [\d,]+ bytes"):
        load("MNIST", tmp_path, "official", [server.url])
    assert kept(tmp_path) == {f"{TRAIN_IMAGES}.part"}
    assert_synthetic(load("MNIST", tmp_path, "official", [server.url]), digits)
    assert server.requests[3] == (TRAIN_IMAGES, "bytes=1750-")


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("junk", [HTML, bytes(10**6)], ids=["short", "too long"])
def test_a_part_that_is_no_beginning_is_thrown_away(
    junk: bytes,
    ranges: bool,
    packed: dict[str, bytes],
    digits: dict[str, torch.Tensor],
    mirror: Callable[..., Mirror],
    tmp_path: Path,
) -> None:
    server = mirror(packed, ranges=ranges)
    put({f"{TRAIN_IMAGES}.part": junk}, tmp_path)
    assert_synthetic(load("MNIST", tmp_path, "official", [server.url]), digits)
    assert len(server.requests) == (5 if ranges else 4)  # a server without ranges starts at the first byte anyway
    assert kept(tmp_path) == set(NAMES)


@pytest.mark.parametrize("status", [500, 503])
def test_server_errors_are_tried_again(
    status: int,
    packed: dict[str, bytes],
    digits: dict[str, torch.Tensor],
    mirror: Callable[..., Mirror],
    naps: list[float],
    tmp_path: Path,
) -> None:
    server = mirror(packed, status, status)
    assert_synthetic(load("MNIST", tmp_path, "official", [server.url]), digits)
    assert server.requests[:3] == [(TRAIN_IMAGES, None)] * 3
    assert naps == [1, 2]


def test_what_is_not_there_is_not_tried_again(
    packed: dict[str, bytes], digits: dict[str, torch.Tensor], mirror: Callable[..., Mirror], tmp_path: Path
) -> None:
    empty, good = mirror({}), mirror(packed)
    assert_synthetic(load("MNIST", tmp_path, "official", [empty.url, good.url]), digits)
    assert empty.requests == good.requests == [(name, None) for name in NAMES]


def test_a_login_page_leads_to_the_next_mirror(
    packed: dict[str, bytes], digits: dict[str, torch.Tensor], mirror: Callable[..., Mirror], tmp_path: Path
) -> None:
    portal, good = mirror(dict.fromkeys(NAMES, HTML)), mirror(packed)
    with pytest.raises(ConnectionError, match=rf"{portal.url}/{TRAIN_IMAGES}: it is an HTML page"):
        load("MNIST", tmp_path, "official", [portal.url])
    assert kept(tmp_path) == set()
    assert len(portal.requests) == 1
    assert_synthetic(load("MNIST", tmp_path, "official", [portal.url, good.url]), digits)


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0-OpenSSH_9.6\r\n"], ids=["nothing", "not HTTP"])
def test_a_server_that_does_not_speak_http(reply: bytes, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(sources.TRIES):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(reply)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConnectionError, match=TRAIN_IMAGES):
            load("MNIST", tmp_path, "official", [f"http://127.0.0.1:{listener.getsockname()[1]}"])


def test_out_of_reach_falls_back_to_the_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = load("MNIST", tmp_path, "auto", None)
    assert found.name == "sample"
    assert len(found.train.labels) == 4000
    [record] = [record for record in caplog.records if record.name == sources.__name__]
    assert record.levelno == logging.WARNING
    assert "SAMPLE of 5,000" in record.getMessage()
    assert "data.source=official" in record.getMessage()


@pytest.mark.parametrize(("dataset", "source"), [("MNIST", "official"), ("FashionMNIST", "auto")])
def test_out_of_reach_is_an_error_where_there_is_no_fall_back(
    dataset: str, source: str, nowhere: str, tmp_path: Path
) -> None:
    with pytest.raises(ConnectionError) as caught:
        load(dataset, tmp_path, source, None)
    for part in (TRAIN_IMAGES, f"{tmp_path}/{dataset}/raw", nowhere, "refused", "Set data.dir", "data.mirrors"):
        assert part in str(caught.value)


def test_no_mirrors_means_no_download(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"data\.mirrors is empty"):
        load("MNIST", tmp_path, "official", [])


# What cannot be written


@pytest.mark.parametrize("source", ["auto", "official"])
def test_a_folder_that_cannot_be_written(source: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"data\.dir: cannot write to .*file/MNIST/raw") as caught:
        load("MNIST", tmp_path / "file", source, None)
    assert not isinstance(caught.value, ConnectionError)


@pytest.mark.parametrize("source", ["auto", "official"])
def test_a_full_disk(
    source: str,
    packed: dict[str, bytes],
    mirror: Callable[..., Mirror],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FullDisk(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *args: FullDisk(path, "w") if path.suffix == ".part" else real_open(path, *args)
    )
    server = mirror(packed)
    with pytest.raises(OSError, match=r"data\.dir: writing .*No space left.*nothing was kept") as caught:
        load("MNIST", tmp_path, source, [server.url])
    assert not isinstance(caught.value, ConnectionError)
    assert kept(tmp_path) == set()


# Settings


@pytest.mark.parametrize(
    ("dataset", "source", "mirrors", "message"),
    [
        ("MNIST", "offical", None, r"data\.source='offical'.*auto, official or sample"),
        ("mnist", "auto", None, r"data\.dataset='mnist'.*MNIST, FashionMNIST, KMNIST"),
        ("MNIST", "auto", "https://example.org", r"data\.mirrors=https://example\.org must be .*list"),
        ("MNIST", "auto", ["example.org"], r"data\.mirrors=\['example\.org'\] must be .*list of URLs"),
    ],
)
def test_unknown_settings(dataset: str, source: str, mirrors: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(dataset, tmp_path, source, mirrors)


# The real files


def test_official_files_as_torchvision_reads_them(real: Path, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        with gzip.open(real / "MNIST/raw" / name) as packed_file, (raw / name.removesuffix(".gz")).open("wb") as file:
            shutil.copyfileobj(packed_file, file)
    train, test = (torchvision.datasets.MNIST(tmp_path, train=train, download=False) for train in (True, False))
    ours = load("MNIST", real, "official", [])
    assert [len(part.labels) for part in ours[:3]] == [54_000, 6_000, 10_000]
    assert_equal(ours.val, Digits(train.data[:6000], train.targets[:6000]))
    assert_equal(ours.train, Digits(train.data[6000:], train.targets[6000:]))
    assert_equal(ours.test, Digits(test.data, test.targets))


@pytest.mark.parametrize("name", NAMES)
def test_known_content_is_that_of_the_official_files(name: str, real: Path) -> None:
    content = (real / "MNIST/raw" / name).read_bytes()
    assert sources.official_name(content) == sources.official_name(gzip.decompress(content)) == ("MNIST", name)


def test_the_sample_lies_inside_the_official_validation_split(real: Path) -> None:
    """So that nothing pretrained on the other 54,000 digits has seen the sample's test split."""
    count = Counter(keys(load("MNIST", real, "official", []).val))
    sample = load("MNIST", "nowhere", "sample", None)
    count.subtract(key for digits in sample[:3] for key in keys(digits))
    assert min(count.values()) >= 0


def keys(digits: Digits) -> list[tuple[bytes, int]]:
    return [(image.numpy().tobytes(), int(label)) for image, label in zip(digits.images, digits.labels, strict=True)]


def assert_equal(ours: Digits, theirs: Digits) -> None:
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.labels, theirs.labels)
