"""The store of tensors: exact or nothing, whatever was killed, damaged, full or in use by another process."""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from thaw.data.store import TensorStore, json_sha256, read_ahead

KEY, OTHER, THIRD = ("0123456789abcdef", "1" * 16, "2" * 16)
FACTS = {"weights": "abc", "size": [28, 28]}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8]


@pytest.fixture
def store(tmp_path: Path) -> TensorStore:
    return TensorStore(tmp_path / "some" / "cache", max_bytes=10_000)


def put(store: TensorStore, key: str = KEY, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Write (2, 5, 4) random numbers."""
    values = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed)).mul(50).to(dtype)
    with store.lock(key):
        target = store.create(key, (2, 5, 4), dtype)
        target.copy_(values)
        store.commit(key, FACTS, target)
    return values


def files(store: TensorStore) -> set[str]:
    return {path.name for path in store.folder.iterdir() if path.suffix != ".lock"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_gives_what_was_written(store: TensorStore, dtype: torch.dtype) -> None:
    assert store.read(KEY, FACTS) is None
    values = put(store, dtype=dtype)
    got = TensorStore(store.folder, 1).read(KEY, FACTS)
    assert got is not None and got.dtype == dtype and torch.equal(got, values)
    assert files(store) == {f"{KEY}.npy", f"{KEY}.json"}
    bits = np.load(store.path(KEY)).view(np.uint8)  # numpy alone
    assert np.array_equal(bits, values.view(torch.uint8).numpy())


def test_an_unfinished_entry_has_the_name_of_its_own(store: TensorStore) -> None:
    with store.lock(KEY):
        store.create(KEY, (2, 5, 4), torch.float32)
        (name,) = files(store)
        assert name.startswith(f".{KEY}.npy.")
    assert not files(store)


def test_what_is_read_is_mapped_and_cannot_change_the_file(store: TensorStore) -> None:
    values = put(store)
    got = store.read(KEY, FACTS)
    assert got is not None
    got.zero_()
    again = store.read(KEY, FACTS)
    assert again is not None and torch.equal(again, values)


def edited(**changes: object) -> Callable[[Path], object]:
    """Change fields of the JSON, whose own hash fits."""

    def edit(path: Path) -> None:
        record = path.with_suffix(".json")
        content = json.loads(record.read_text()) | changes
        del content["record_sha256"]
        record.write_text(json.dumps(content | {"record_sha256": json_sha256(content)}))

    return edit


def reshaped(path: Path) -> None:
    """The same bytes under another shape."""
    np.save(path, np.load(path).reshape(5, 2, 4))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "npy empty": lambda path: path.write_bytes(b""),
    "npy cut in its header": lambda path: os.truncate(path, 40),
    "npy cut in its numbers": lambda path: os.truncate(path, path.stat().st_size - 1),
    "npy a zip file": lambda path: path.write_bytes(b"PK\x03\x04 and no more"),
    "npy a pickle": lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True),
    "npy of another shape": reshaped,
    "npy a folder": lambda path: (path.unlink(), path.mkdir()),
    "npy missing": Path.unlink,
    "json missing": lambda path: path.with_suffix(".json").unlink(),
    "json empty": lambda path: path.with_suffix(".json").write_text(""),
    "json half": lambda path: path.with_suffix(".json").write_text('{"facts": {'),
    "json null": lambda path: path.with_suffix(".json").write_text("null"),
    "json no text": lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe\x00"),
    "json without a field": lambda path: path.with_suffix(".json").write_text(json.dumps({"facts": FACTS})),
    "json of other facts": edited(facts=FACTS | {"weights": "abd"}),
    "json of another hash": edited(sha256="0" * 64),
    "json of another size of number": edited(dtype="float16"),
    "json of other numbers": edited(dtype="int32"),
    "json of numbers that do not fit": edited(dtype="complex128"),
    "json of no numbers": edited(dtype="nn"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_no_entry_and_can_be_written_anew(store: TensorStore, damage: str) -> None:
    values = put(store)
    DAMAGE[damage](store.path(KEY))
    assert store.read(KEY, FACTS) is None
    if store.path(KEY).is_dir():
        return
    assert torch.equal(values, put(store))
    got = store.read(KEY, FACTS)
    assert got is not None and torch.equal(got, values)


def test_damage_is_told(store: TensorStore, caplog: pytest.LogCaptureFixture) -> None:
    assert store.read(KEY, FACTS) is None and not caplog.records
    put(store)
    os.truncate(store.path(KEY), 200)
    assert store.read(KEY, FACTS) is None
    assert f"{KEY}.npy is damaged and will be computed again" in caplog.text


def test_large_decoded_images_are_compared_by_type_shape_and_size_alone(
    store: TensorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of GB are not read to find a changed byte; a file that is cut short is found."""

    def changed(place: int) -> Tensor | None:
        with store.lock(KEY):
            images = store.create(KEY, (2, 5, 4), torch.uint8).zero_()
            store.commit(KEY, FACTS, images, known={"order": []})
        content = store.path(KEY).read_bytes()
        store.path(KEY).write_bytes(content[:place] + b"\xee" * (len(content) > place) + content[place + 1 :])
        return store.read(KEY, FACTS)

    whole = changed(999)
    assert whole is not None and changed(-1) is None
    monkeypatch.setattr("thaw.data.store.HASHED", 39)
    got = changed(-1)
    assert got is not None and got.flatten().tolist() == [0] * 39 + [0xEE]
    reshaped(store.path(KEY))
    assert store.read(KEY, FACTS) is None
    assert changed(999) is not None
    os.truncate(store.path(KEY), store.path(KEY).stat().st_size - 1)
    assert store.read(KEY, FACTS) is None


def test_other_facts_under_the_same_key_are_no_entry(store: TensorStore) -> None:
    put(store)
    assert store.read(KEY, FACTS | {"weights": "abd"}) is None


def test_an_entry_counts_only_when_its_json_is_there(store: TensorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no moment of a write is there an entry but the last."""
    moments: list[bool] = []
    replace = Path.replace

    def watched(path: Path, target: Path) -> Path:
        moments.append(store.read(KEY, FACTS) is None)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    put(store)
    assert moments == [True, True] and store.read(KEY, FACTS) is not None


def test_a_folder_that_cannot_be_written_is_still_read(store: TensorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    values = put(store)
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    got = store.read(KEY, FACTS)
    assert got is not None and torch.equal(got, values)
    assert store.read(KEY, {}) is None


def test_a_full_disk_is_found_before_the_first_number(store: TensorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with store.lock(KEY), pytest.raises(OSError, match="No space left"):
        store.create(KEY, (2, 5, 4), torch.float32)
    assert files(store) == set()


def test_one_writer_at_a_time(store: TensorStore, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def second() -> None:
        with store.lock(KEY):
            order.append("second")

    with store.lock(KEY):
        with store.lock(OTHER):  # another entry is free
            pass
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert f"cache: waiting for another run that computes {store.path(KEY)}" in capsys.readouterr().out


# Room


def aged(store: TensorStore, *keys: str) -> int:
    """Write entries, the first used longest ago; returns the size of one."""
    for age, key in enumerate(keys):
        put(store, key)
        os.utime(store.path(key).with_suffix(".json"), (1000 + age, 1000 + age))
    return sum(path.stat().st_size for path in store.folder.glob(f"{keys[0]}.*"))


def test_the_least_recently_used_makes_room(store: TensorStore) -> None:
    one = aged(store, KEY, OTHER, THIRD)
    assert store.read(KEY, FACTS) is not None  # used now
    store.max_bytes = 3 * one
    put(store, "3" * 16)
    assert [store.read(key, FACTS) is not None for key in (KEY, OTHER, THIRD, "3" * 16)] == [True, False, True, True]
    assert f"{OTHER}.npy" not in files(store)


def test_nothing_is_removed_where_there_is_room(store: TensorStore) -> None:
    one = aged(store, KEY, OTHER)
    store.max_bytes = 3 * one
    put(store, THIRD)
    put(store, THIRD)  # its own old size does not count
    assert all(store.read(key, FACTS) is not None for key in (KEY, OTHER, THIRD))


def test_what_another_process_writes_is_not_removed(store: TensorStore) -> None:
    aged(store, KEY, OTHER)
    store.max_bytes = 1
    with (store.folder / f"{KEY}.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process holds it
        put(store, "3" * 16)
        assert files(store) == {f"{key}.{suffix}" for key in (KEY, "3" * 16) for suffix in ("npy", "json")}


def test_a_file_that_another_process_removes_meanwhile_does_no_harm(store: TensorStore) -> None:
    aged(store, KEY)
    store.path(OTHER).symlink_to("gone")  # listed, but not there when it is looked at
    put(store, THIRD)
    assert store.read(KEY, FACTS) is not None and store.read(THIRD, FACTS) is not None


def test_files_of_others_in_the_folder_are_left_alone(store: TensorStore) -> None:
    store.folder.mkdir(parents=True)
    others = {"mine.npy", "mine.json", "README.md", ".gitignore", "notes"}
    for name in others:
        (store.folder / name).write_bytes(b"0" * 999)
    store.max_bytes = 1
    put(store)
    put(store, OTHER)
    assert files(store) == others | {f"{OTHER}.npy", f"{OTHER}.json"}


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux which pages lie in memory")
def test_read_ahead_fetches_the_pages_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, pages = 64, 5  # of a row, and the rows lie across pages
    big = TensorStore(tmp_path, max_bytes=1e9)
    with big.lock(KEY):
        target = big.create(KEY, (rows, pages * mmap.PAGESIZE), torch.uint8)
        big.commit(KEY, FACTS, target.fill_(7), known={})
    del target

    def in_memory(tensor: Tensor) -> list[int]:
        """How many pages of each row."""
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        found = (ctypes.c_ubyte * (rows * pages + 1))()
        assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(tensor.nbytes), found)
        return [sum(page & 1 for page in found[row * pages : (row + 1) * pages]) for row in range(rows)]

    with big.path(KEY).open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    images = torch.from_numpy(np.load(big.path(KEY), mmap_mode="c"))
    if sum(in_memory(images)) > pages:  # the header's
        pytest.skip("this file system keeps its files in memory")
    read_ahead(images, torch.tensor([40, 12]))
    assert sum(in_memory(images)) <= pages  # it is small
    monkeypatch.setattr("thaw.data.store.HASHED", 0)
    monkeypatch.setattr("thaw.data.store.LONG_ROW", 0)
    read_ahead(images, torch.tensor([40, 12]))
    until = time.monotonic() + 10
    while min(in_memory(images)[row] for row in (40, 12)) < pages and time.monotonic() < until:
        time.sleep(0.01)
    found = in_memory(images)
    assert found[40] == found[12] == pages and sum(found) <= 4 * pages
