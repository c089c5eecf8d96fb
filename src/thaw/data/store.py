"""A folder of tensors that several processes share, decoded images or cached features: memory-mapped.

An entry is `<key>.npy` and `<key>.json`. The JSON is written last. It holds the facts that the key is a hash of, the
SHA-256 of the tensor and its own; an entry that does not match its JSON is ignored.
"""

import ctypes
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from thaw.run.claims import total_memory
from thaw.run.console import say
from thaw.run.errors import UserError
from thaw.run.files import move, read_json, temporary, write_json

log = logging.getLogger(__name__)

NUMPY = {  # numpy has no bf16: its bits
    **{torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16},
    **{torch.uint8: np.uint8, torch.bfloat16: np.int16},
}
HASHED = 2e9  # bytes of decoded images that are hashed, and so in memory once they are opened
LONG_ROW = 1 << 16  # bytes, far more than a page
KNOWN: dict[str, tuple[Tensor, dict[str, Any]]] = {}  # by key: the decoded images that this process has, and their JSON


class TensorStore:
    """A folder of entries that several processes may use at once.

    Args:
        folder: made at the first write.
        max_bytes: of all entries together; the least recently used are removed to make room for a new one.
    """

    def __init__(self, folder: Path, max_bytes: float) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"

    def read(self, key: str, facts: Mapping[str, Any]) -> Tensor | None:
        """The tensor of an entry, mapped copy-on-write; None where it is missing or damaged, which is logged.

        Its numbers are compared with their SHA-256, at 1 GB/s or more, if `commit` has stored that.
        """
        path = self.path(key)
        record = path.with_suffix(".json")
        try:
            saved = self.record(key)
            array = np.load(path, mmap_mode="c", allow_pickle=False)
            tensor = torch.from_numpy(array).view(getattr(torch, saved["dtype"]))
            damage = saved["facts"] != facts or saved["shape"] != list(tensor.shape)
            damage = damage or ("sha256" in saved and saved["sha256"] != tensors_sha256({key: tensor}))
        except FileNotFoundError:
            return None
        except Exception:  # damaged files fail in any way
            damage = True
        if damage:
            log.warning("%s is damaged and will be computed again.", path)
            with suppress(OSError):
                record.unlink()
            return None
        with suppress(OSError):  # a read-only folder
            os.utime(record)  # the time of last use
        return tensor

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """One writer of an entry at a time; the lock of a process that was killed is free."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"cache: waiting for another run that computes {self.path(key)}")
            lock.acquire()
        try:
            with ExitStack() as self.held:
                yield
        finally:
            lock.release()

    def create(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A writable tensor on disk, to be filled and then given to `commit`; needs the key's lock.

        Raises:
            OSError: the folder cannot be written, or has no room for it.
        """
        size = int(np.prod(shape)) * dtype.itemsize
        self.make_room(size, key)
        self.part = self.held.enter_context(temporary(self.path(key)))
        array = np.lib.format.open_memmap(self.part, mode="w+", dtype=NUMPY[dtype], shape=shape)
        with self.part.open("r+b") as file:  # a write to a map on a full disk kills the process
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.part.stat().st_size)
        return torch.from_numpy(array).view(dtype)

    def commit(
        self, key: str, facts: Mapping[str, Any], tensor: Tensor, known: Mapping[str, Any] | None = None
    ) -> None:
        """Make the filled tensor of `create` the entry.

        `known` holds further facts for the JSON. Decoded images have some, and get a SHA-256 only up to `HASHED` bytes:
        they may fill hundreds of GB, and a damaged pixel does less harm than waiting for the hash.
        """
        path = self.path(key)
        record = {"facts": facts, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        if known is None or tensor.nbytes <= HASHED:
            record["sha256"] = tensors_sha256({key: tensor})
        record |= known or {}
        move(self.part, path)
        write_json({**record, "record_sha256": json_sha256(record)}, path.with_suffix(".json"))

    def record(self, key: str) -> dict[str, Any]:
        """The JSON of an entry; UserError if it is damaged."""
        path = self.path(key).with_suffix(".json")
        saved = read_json(path)
        if saved.pop("record_sha256", None) != json_sha256(saved):
            raise UserError(f"{path} is damaged; remove it to compute {key} again.")
        return saved

    def make_room(self, size: int, key: str) -> None:
        """Remove the least recently used entries until a new one of `size` bytes fits the limit."""
        ours = self.folder.glob(f"{'[0-9a-f]' * 16}.*")  # a user's own files stay
        entries = {path.name.split(".")[0] for path in ours if path.suffix != ".lock"} - {key}
        sizes = {entry: sum(size_and_time(path)[0] for path in self.folder.glob(f"{entry}.*")) for entry in entries}
        for entry in sorted(entries, key=lambda entry: size_and_time(self.path(entry).with_suffix(".json"))[1]):
            if sum(sizes.values()) + size <= self.max_bytes:
                return
            with suppress(Timeout), FileLock(self.folder / f"{entry}.lock", timeout=0):  # a writer keeps its entry
                for suffix in (".json", ".npy"):
                    self.path(entry).with_suffix(suffix).unlink(missing_ok=True)
                sizes.pop(entry)


def size_and_time(path: Path) -> tuple[int, float]:
    """Bytes and time of last use; 0 where another process has just removed or renamed the file."""
    try:
        return path.stat().st_size, path.stat().st_mtime
    except FileNotFoundError:
        return 0, 0.0


def json_sha256(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def decoded_key(tensor: Tensor) -> str | None:
    """The key of decoded images, also of a part of them; None for another tensor."""
    start = tensor.untyped_storage().data_ptr()
    return next((key for key, (images, _) in KNOWN.items() if images.untyped_storage().data_ptr() == start), None)


def read_ahead(tensor: Tensor, indices: Tensor) -> None:
    """Ask the system to read rows of a mapped tensor (N, ...) from the disk, all at once, and return before they come.

    Otherwise rows that lie apart come one after the other, each with MBs around it that push out of memory what is
    needed later. The asking costs about 2 us a row, so it is left out where memory holds the tensor or soon will: small
    ones, and short rows that fit in memory.

    Args:
        indices: int64 (B,) of the rows.
    """
    size = tensor.stride(0) * tensor.itemsize
    fits = tensor.nbytes < HASHED or (size < LONG_ROW and tensor.nbytes < total_memory() / 2)
    if fits or tensor.device.type != "cpu" or not hasattr(mmap, "MADV_WILLNEED"):  # Windows has none
        return
    madvise = ctypes.CDLL(None).madvise

    def advise(begin: int, end: int, advice: int) -> None:
        start = begin - begin % mmap.PAGESIZE
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)

    begin = tensor.data_ptr()
    advise(begin, begin + tensor.nbytes, mmap.MADV_RANDOM)  # nothing around a row
    for index in indices.tolist():
        advise(begin + index * size, begin + (index + 1) * size, mmap.MADV_WILLNEED)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and numbers; of decoded images their key stands for the numbers."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if source := decoded_key(tensor):  # hundreds of GB need not be read
            total.update(f"{source} {tensor.storage_offset()} {tensor.stride()}".encode())
        else:
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
