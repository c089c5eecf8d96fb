"""Picture files decoded once: uint8 images of one size in a memory-mapped file, which later runs open at once.

An image takes C x S x S bytes: CIFAR-10's 60,000 at 3 x 32 x 32 take 0.18 GB, the 1,331,167 of ImageNet-1k's training
and validation sets at 3 x 224 x 224 take 200 GB. Memory need not hold them: a batch is read from the file by its
indices, and the operating system keeps in free memory what was read before.
"""

import hashlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from thaw.data.pictures import fit_photo, open_picture, shape_doubts
from thaw.data.store import KNOWN, TensorStore
from thaw.run.console import plural, progress, say
from thaw.run.errors import UserError, UserFileError
from thaw.run.files import read_json

DECODE_FORMAT = 1  # part of every key
CHUNK = 64  # pictures that a thread takes at once
NAMES_LISTED = 10  # in one message
Order: TypeAlias = Mapping[str, Sequence[int]]  # by split, the numbers of its files
Answer = TypeVar("Answer")
tell = rank_zero_only(say)  # once for all processes of a run


class PictureFiles(NamedTuple):
    """Files to decode.

    names: of the files, for messages.
    read: gets the number of a file, returns its content.
    facts: values of JSON that change whenever a file does; the key of the decoded images is a hash of them.
    arrange: gets the SHA-256 of each readable file by its number; returns the numbers of each split in the order
        wanted, and lines for the user about the files.
    skip_unreadable: leave out what cannot be read.
    """

    names: Sequence[str]
    read: Callable[[int], bytes]
    facts: Mapping[str, Any]
    arrange: Callable[[Mapping[int, str]], tuple[Order, list[str]]]
    skip_unreadable: bool


def decode_once(
    files: PictureFiles, channels: int, size: int, folder: Path, max_gb: float
) -> tuple[Tensor, Order, list[str]]:
    """Decode files, or open what an earlier run has decoded of them.

    Args:
        folder: keeps the images. Where it cannot be used, they are decoded into memory, if they take less than half.
        max_gb: of all that the folder holds, in 1e9 bytes; what was used least recently makes room.

    Returns images uint8 (N, channels, size, size), the numbers of their files by split (the images of a split are
    neighbours, in this order), and lines for the user.

    Raises:
        UserError: the images are larger than `max_gb`, or files cannot be read.
        UserFileError: the folder cannot be used and memory is too small.
    """
    shape = (len(files.names), channels, size, size)
    check_room(shape, max_gb)
    facts = {"format": DECODE_FORMAT, "shape": [*shape], **files.facts}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    if key not in KNOWN:
        store, started, place, how = TensorStore(folder, max_gb * 1e9), time.monotonic(), str(folder), "reused"
        with ExitStack() as lock:
            try:
                target = find_or_claim(key, facts, shape, store, lock)
            except OSError as error:
                target, place = in_memory(shape, folder, error), "memory"
            if target is not None:
                found, is_lasting = decode_all(files, target)
                KNOWN[key], how = (target, found), f"{time.monotonic() - started:.1f} s"
                if is_lasting and place != "memory":
                    try:
                        store.commit(key, facts, target, found)
                    except OSError as error:  # the images are there all the same
                        tell(f"decoded images: not kept for other runs ({error})")
        mb = math.prod(shape) / 1e6
        tell(f"decoded images: {shape[0]:,} of {channels} x {size} x {size}, {mb:,.0f} MB in {place} ({how})")
        while len(KNOWN) > 2:
            KNOWN.pop(next(iter(KNOWN)))
    images, found = KNOWN[key]
    lines = list(found["lines"])
    if unreadable := found["unreadable"]:
        if not files.skip_unreadable:
            refuse_unreadable(unreadable, shape[0])
        lines.append(f"left out {plural(len(unreadable), 'picture')} that cannot be read: {some(unreadable, '; ')}")
    return images[: sum(map(len, found["order"].values()))], found["order"], lines


def check_room(shape: tuple[int, ...], max_gb: float) -> None:
    """Refuse images that are larger than `max_gb`, and name a size that fits."""
    count, channels, size, _ = shape
    gigabytes = math.prod(shape) / 1e9
    if gigabytes > max_gb:
        fits = math.isqrt(int(max_gb * 1e9 / (count * channels)))
        smaller = f", or data.image_size to at most {fits}" if fits else ""
        raise UserError(
            f"{count:,} images of {channels} x {size} x {size} take {gigabytes:.3g} GB, more than "
            f"data.max_gb={max_gb:g}. Set data.max_gb or cache.max_gb to {math.ceil(gigabytes)} or more{smaller}."
        )


def find_or_claim(
    key: str, facts: Mapping[str, Any], shape: tuple[int, ...], store: TensorStore, lock: ExitStack
) -> Tensor | None:
    """Locked room for the images on disk; None if they are there already, and now in `KNOWN`."""
    for is_locked in (False, True):
        if (images := store.read(key, facts, whole=False)) is not None:
            KNOWN[key] = images, read_json(store.path(key).with_suffix(".json"))
            return None
        if not is_locked:
            lock.enter_context(store.lock(key))  # another run may write them meanwhile
    return store.create(key, shape, torch.uint8)


def in_memory(shape: tuple[int, ...], folder: Path, error: OSError) -> Tensor:
    """Room in memory, with a line that says why; UserFileError if it would be more than half of the memory."""
    reason = f"data.cache_dir={folder} cannot be used ({error.strerror or error})"
    if math.prod(shape) > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2:
        raise UserFileError(
            f"{reason}, and {math.prod(shape) / 1e9:.1f} GB of decoded images are more than half of the memory. Free "
            "some space, or set data.cache_dir to another folder."
        ) from error
    tell(f"decoded images: in memory, for this run alone, as {reason}")
    return torch.empty(shape, dtype=torch.uint8)


def decode_all(files: PictureFiles, target: Tensor) -> tuple[dict[str, Any], bool]:
    """Fill `target` (N, C, S, S) in the order of `files.arrange`; its end stays empty where files cannot be read.

    Returns what is to be known of the images, and whether that lasts: another run may open a file that this one cannot.
    """
    count, channels, size, _ = target.shape
    array, hashes, doubts = target.numpy(), {}, defaultdict(list)
    unreadable: dict[int, Exception] = {}

    def content_hash(number: int) -> str:
        return hashlib.sha256(files.read(number)).hexdigest()

    for number, answer in enumerate(in_threads(content_hash, range(count), "reading pictures")):
        if isinstance(answer, Exception):
            unreadable[number] = answer
        else:
            hashes[number] = answer
    if unreadable and not files.skip_unreadable:
        refuse_unreadable(reasons(files, unreadable), count)
    order, lines = files.arrange(hashes)
    numbers = [number for part in order.values() for number in part]
    rows = dict(zip(numbers, range(count), strict=False))

    def decode(number: int) -> list[str]:
        picture, found = open_picture(files.read(number), files.names[number], 2 * size)
        array[rows[number]] = fit_photo(picture, channels, size)
        return [*found, *shape_doubts(picture)]

    kept: list[int] = []
    for number, found in zip(numbers, in_threads(decode, numbers, "decoding pictures"), strict=True):
        if isinstance(found, Exception):
            unreadable[number] = found
            continue
        if len(kept) < rows[number]:
            array[len(kept)] = array[rows[number]]  # close the gap
        kept.append(number)
        for doubt in found:
            doubts[doubt].append(files.names[number])
    known = {
        "sha256": hashlib.sha256(
            json.dumps([channels, size, [hashes[number] for number in kept]]).encode()
        ).hexdigest(),
        "order": {split: [number for number in part if number not in unreadable] for split, part in order.items()},
        "lines": [*lines, *(f"{some(names)}: {doubt}" for doubt, names in doubts.items())],
        "unreadable": reasons(files, unreadable),
    }
    return known, not any(isinstance(error, OSError) for error in unreadable.values())


def in_threads(work: Callable[[int], Answer], numbers: Sequence[int], title: str) -> Iterator[Answer | Exception]:
    """Call a function on each number, in as many threads as there are cores; yields its answers or errors in order.

    Decoders and resizing run outside of Python's lock.
    """

    def attempt(number: int) -> Answer | Exception:
        try:
            return work(number)
        except Exception as error:  # Pillow raises nearly anything for damaged files and odd modes
            return error

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
    with progress(title, len(numbers)) as advance, ThreadPoolExecutor(cores) as pool:
        for part in pool.map(lambda part: [*map(attempt, part)], parts):
            advance(len(part))
            yield from part


def reasons(files: PictureFiles, errors: Mapping[int, Exception]) -> list[str]:
    """Why files cannot be read, each with its name."""
    return [
        str(error).partition("; ")[0].rstrip(".")
        if isinstance(error, UserError)
        else f"{files.names[number]} cannot be read ({getattr(error, 'strerror', None) or error})"
        for number, error in sorted(errors.items())
    ]


def refuse_unreadable(reasons: Sequence[str], count: int) -> NoReturn:
    """Raise a UserError that names the first pictures that cannot be read."""
    raise UserError(
        f"{len(reasons)} of {plural(count, 'picture')} cannot be read: {some(reasons, '; ')}. Replace or remove them, "
        "or set data.skip_unreadable=true to leave them out."
    )


def some(names: Sequence[str], separator: str = ", ") -> str:
    """The first ten names, and how many more there are."""
    more = len(names) - NAMES_LISTED
    return separator.join(names[:NAMES_LISTED]) + (f" and {more:,} more" if more > 0 else "")
