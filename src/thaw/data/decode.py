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
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

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
        folder: keeps the images.
        max_gb: of all that the folder holds, in 1e9 bytes; what was used least recently makes room.

    Returns images uint8 (N, channels, size, size), the numbers of their files by split (the images of a split are
    neighbours, in this order), and lines for the user.

    Raises:
        UserError: the images are larger than `max_gb`, or files cannot be read.
        UserFileError: the folder cannot be used.
    """
    count, shape = len(files.names), (len(files.names), channels, size, size)
    gigabytes = math.prod(shape) / 1e9
    if gigabytes > max_gb:
        fits = math.isqrt(int(max_gb * 1e9 / (count * channels)))
        raise UserError(
            f"{count:,} images of {channels} x {size} x {size} take {gigabytes:.3g} GB, more than "
            f"data.max_gb={max_gb:g}. Set data.max_gb or cache.max_gb to {math.ceil(gigabytes)} or more"
            f"{f', or data.image_size to at most {fits}' if fits else ''}."
        )
    facts = {"format": DECODE_FORMAT, "shape": [*shape], "skips": files.skip_unreadable, **files.facts}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    if key not in KNOWN:
        store, started, how = TensorStore(folder, max_gb * 1e9), time.monotonic(), "reused"
        try:
            with ExitStack() as lock:
                if (images := store.read(key, facts, whole=False)) is None:
                    lock.enter_context(store.lock(key))
                    images = store.read(key, facts, whole=False)  # another run may just have written it
                if images is None:
                    images = store.create(key, shape, torch.uint8)
                    store.commit(key, facts, images, decode_all(files, images))
                    how = f"{time.monotonic() - started:.1f} s"
                KNOWN[key] = images, read_json(store.path(key).with_suffix(".json"))
        except UserError:
            raise
        except OSError as error:
            raise UserFileError(
                f"data.cache_dir={folder} cannot hold {gigabytes:.3g} GB of decoded images "
                f"({error.strerror or error}). Free some space, or set cache.dir or data.cache_dir to another folder."
            ) from error
        mb = f"{gigabytes * 1000:,.0f} MB in {folder} ({how})"
        rank_zero_only(say)(f"decoded images: {count:,} of {channels} x {size} x {size}, {mb}")
        while len(KNOWN) > 2:
            KNOWN.pop(next(iter(KNOWN)))
    images, known = KNOWN[key]
    return images[: sum(map(len, known["order"].values()))], known["order"], known["lines"]


def decode_all(files: PictureFiles, target: Tensor) -> dict[str, Any]:
    """Fill `target` (N, C, S, S) in the order of `files.arrange`; its end stays empty where files cannot be read.

    Returns what is to be known of the images.
    """
    count, channels, size, _ = target.shape
    array, hashes = target.numpy(), {}
    unreadable: dict[int, str] = {}
    doubts: dict[str, list[str]] = defaultdict(list)

    def content_hash(number: int) -> str:
        return hashlib.sha256(files.read(number)).hexdigest()

    def decode(number: int) -> list[str]:
        picture, found = open_picture(files.read(number), files.names[number], 2 * size)
        array[rows[number]] = fit_photo(picture, channels, size)
        return [*found, *shape_doubts(picture)]

    for number, content, error in in_threads(content_hash, range(count), files, "reading pictures"):
        if content is None:
            unreadable[number] = error
        else:
            hashes[number] = content
    refuse_unreadable(unreadable, files)
    order, lines = files.arrange(hashes)
    rows = {number: row for row, number in enumerate(chain(*order.values()))}
    kept: dict[int, str] = {}
    for number, found, error in in_threads(decode, [*rows], files, "decoding pictures"):
        if found is None:
            unreadable[number] = error
            continue
        if len(kept) < rows[number]:
            array[len(kept)] = array[rows[number]]  # close the gap
        kept[number] = hashes[number]
        for doubt in found:
            doubts[doubt].append(files.names[number])
    reasons = refuse_unreadable(unreadable, files)
    lines += [f"{some(names)}: {doubt}" for doubt, names in doubts.items()]
    if reasons:
        lines.append(f"left out {plural(len(reasons), 'picture')} that cannot be read: {some(reasons, '; ')}")
    return {
        "sha256": hashlib.sha256(json.dumps([channels, size, *kept.values()]).encode()).hexdigest(),
        "order": {split: [number for number in part if number in kept] for split, part in order.items()},
        "lines": lines,
    }


def in_threads(
    work: Callable[[int], Answer], numbers: Sequence[int], files: PictureFiles, title: str
) -> Iterator[tuple[int, Answer | None, str]]:
    """Call a function on each number, with a thread for each core; yields numbers with its answers or what failed.

    Decoders and resizing run outside of Python's lock: two threads take 7 s for CIFAR-10's files, two processes 11 s.
    """

    def attempt(number: int) -> tuple[int, Answer | None, str]:
        try:
            return number, work(number), ""
        except UserError as error:
            return number, None, str(error).partition("; ")[0].rstrip(".")
        except Exception as error:  # Pillow raises nearly anything for odd modes
            return number, None, f"{files.names[number]} cannot be read ({getattr(error, 'strerror', None) or error})"

    parts = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with progress(title, len(numbers)) as advance, ThreadPoolExecutor(cores) as pool:
        for part in pool.map(lambda part: [*map(attempt, part)], parts):
            advance(len(part))
            yield from part


def refuse_unreadable(errors: Mapping[int, str], files: PictureFiles) -> list[str]:
    """What cannot be read, in the order of the files; a UserError that names the first, unless it is to be left out."""
    reasons = [error for _, error in sorted(errors.items())]
    if reasons and not files.skip_unreadable:
        raise UserError(
            f"{len(reasons)} of {plural(len(files.names), 'picture')} cannot be read: {some(reasons, '; ')}. Replace "
            "or remove them, or set data.skip_unreadable=true to leave them out."
        )
    return reasons


def some(names: Sequence[str], separator: str = ", ") -> str:
    """The first ten names, and how many more there are."""
    more = len(names) - NAMES_LISTED
    return separator.join(names[:NAMES_LISTED]) + (f" and {more:,} more" if more > 0 else "")
