"""Picture files decoded once: uint8 images of one size in a memory-mapped file, which later runs open at once.

An image takes C x S x S bytes: CIFAR-10's 60,000 at 3 x 32 x 32 take 0.18 GB, the 1,331,167 of ImageNet-1k's training
and validation sets at 3 x 224 x 224 take 200 GB. Memory need not hold them: a batch is read from the file by its
indices, and the operating system keeps in free memory what was read before.
"""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from thaw.data.images import Images, Source
from thaw.data.module import ImageDataModule
from thaw.data.pictures import fit_photo, open_picture, shape_doubts
from thaw.data.splits import SPLITS, ListedFile, SplitShare, plan_splits, split_files
from thaw.data.store import KNOWN, TensorStore
from thaw.run.console import plural, progress, say, some
from thaw.run.errors import UserError, UserFileError
from thaw.run.values import Count, Positive

log = logging.getLogger(__name__)
DECODE_FORMAT = 3  # part of every key
CHUNK = 64  # pictures that a thread takes at once
Content: TypeAlias = Callable[[int], bytes]  # gets the number of a file, returns what is in it
Answer = TypeVar("Answer")


@dataclass(kw_only=True, eq=False)
class DecodedData(ImageDataModule):
    """Pictures that are decoded once; each source is a subclass that lists them.

    Args:
        image_size: S, pixels; the central square of each picture is kept at C x S x S.
        channels: C.
        val_share, test_share: of each class of the training pictures, where that split is missing.
        skip_unreadable: leave out what cannot be read; otherwise it is an error.
        cache_dir, max_gb: decoded images are kept in `cache_dir`/images, of at most this size in all, in 1e9 bytes;
            what was used least recently makes room.
    """

    image_size: Count
    channels: Literal[1, 3]
    val_share: SplitShare
    test_share: SplitShare
    skip_unreadable: bool
    cache_dir: str
    max_gb: Positive

    def decode(
        self, files: Sequence[ListedFile], content: Content, classes: Sequence[str], name: str, **facts: Any
    ) -> Source:
        """The images of listed files by split; prints what is left out, and how splits are made.

        Args:
            classes: in the order of the labels; a file has one of them as its label.
            name: of the dataset.
            facts: what else distinguishes the pictures from those of another dataset, as values of JSON.
        """
        uses, shares = plan_splits({file.split for file in files}, self.val_share, self.test_share, name)
        files = [file._replace(split=uses.get(file.split, "train")) for file in files]
        images, order, lines = self.decode_once(files, content, shares, facts)
        if empty := [split for split in SPLITS if not order[split]]:
            raise UserError(
                f"{name} has no picture for {' and '.join(empty)}. Add some: of a class of three or more different "
                "pictures, each split that is missing gets at least one."
            )
        for line in lines:
            rank_zero_only(log.warning)("%s", line)
        numbers = {label: number for number, label in enumerate(classes)}
        labels = torch.tensor([numbers[file.label] for file in files])
        parts = images.split([len(order[split]) for split in SPLITS])
        train, val, test = (Images(part, labels[order[split]]) for split, part in zip(SPLITS, parts, strict=True))
        self.names = {split: [files[number].name for number in order[split]] for split in SPLITS}
        decoded = {name for names in self.names.values() for name in names}
        self.unreadable = [file.name for file in files if file.name not in decoded]
        return Source(train, val, test, classes, name, files=self.names["test"])

    def decode_once(
        self, files: Sequence[ListedFile], content: Content, shares: Mapping[str, float], facts: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, list[int]], list[str]]:
        """Decode files, or open what an earlier run has decoded of them.

        Returns images uint8 (N, C, S, S), the numbers of their files by split, in this order, and lines for the user.
        """
        shape = len(files), self.channels, self.image_size, self.image_size
        size, gigabytes = " x ".join(map(str, shape[1:])), math.prod(shape) / 1e9
        if gigabytes > self.max_gb:
            fits = math.isqrt(int(self.max_gb * 1e9 / (len(files) * self.channels)))
            raise UserError(
                f"{len(files):,} images of {size} take {gigabytes:.3g} GB, more than data.max_gb={self.max_gb:g}. Set "
                f"data.max_gb or cache.max_gb to {math.ceil(gigabytes)} or more"
                f"{f', or data.image_size to at most {fits}' if fits else ''}."
            )
        facts = {"format": DECODE_FORMAT, "shape": [*shape], "skips": self.skip_unreadable, **shares, **facts}
        facts["files"] = hashlib.sha256(repr(files).encode()).hexdigest()
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        if key not in KNOWN:
            folder, started, how = Path(self.cache_dir).expanduser() / "images", time.monotonic(), "reused"
            store = TensorStore(folder, self.max_gb * 1e9)
            try:
                images = store.read(key, facts)
                if images is None:
                    with store.lock(key):
                        images = store.read(key, facts)  # another run may just have written it
                        if images is None:
                            images = store.create(key, shape, torch.uint8)
                            store.commit(key, facts, images, self.decode_all(files, content, shares, images))
                            how = f"{time.monotonic() - started:.1f} s"
                KNOWN[key] = images, store.record(key)
            except OSError as error:
                raise UserFileError(
                    f"data.cache_dir={folder} cannot hold {gigabytes:.3g} GB of decoded images "
                    f"({error.strerror or error}). Free some space, or set cache.dir or data.cache_dir to another one."
                ) from error
            place = f"{gigabytes * 1000:,.0f} MB in {folder} ({how})"
            rank_zero_only(say)(f"decoded images: {len(files):,} of {size}, {place}")
            while len(KNOWN) > 2:
                KNOWN.pop(next(iter(KNOWN)))
        images, known = KNOWN[key]
        return images[: sum(map(len, known["order"].values()))], known["order"], known["lines"]

    def decode_all(
        self, files: Sequence[ListedFile], content: Content, shares: Mapping[str, float], target: Tensor
    ) -> dict[str, Any]:
        """Fill `target` (N, C, S, S), whose end stays empty if files are left out; returns the order and the lines."""
        array, names = target.numpy(), [file.name for file in files]

        def content_hash(number: int) -> str:
            return hashlib.sha256(content(number)).hexdigest()

        def decode(number: int) -> list[str]:
            picture, doubts = open_picture(content(number), names[number], 2 * self.image_size)
            array[rows[number]] = fit_photo(picture, self.channels, self.image_size)
            return [*doubts, *shape_doubts(picture)]

        hashes, unreadable = in_threads(content_hash, range(len(files)), names, "reading pictures")
        order, lines = split_files(files, shares, hashes)
        rows = {number: row for row, number in enumerate(chain(*order.values()))}
        found, errors = in_threads(decode, [*rows], names, "decoding pictures")
        kept = [number for number in rows if number in found]
        for row, number in enumerate(kept):
            if row < rows[number]:
                array[row] = array[rows[number]]  # close the gap
        if doubts := [f"{names[number]}: {doubt}" for number in sorted(kept) for doubt in found[number]]:
            lines.append(some(doubts, "; "))
        if reasons := [error for _, error in sorted((unreadable | errors).items())]:
            if not self.skip_unreadable:
                raise UserError(
                    f"{len(reasons)} of {plural(len(files), 'picture')} cannot be read: {some(reasons, '; ')}. Replace "
                    "or remove them, or set data.skip_unreadable=true to leave them out."
                )
            lines.append(f"left out {plural(len(reasons), 'picture')} that cannot be read: {some(reasons, '; ')}")
        order = {split: [number for number in part if number in found] for split, part in order.items()}
        return {"order": order, "lines": lines}


def in_threads(
    work: Callable[[int], Answer], numbers: Sequence[int], names: Sequence[str], title: str
) -> tuple[dict[int, Answer], dict[int, str]]:
    """Call a function on the number of each file, with a thread for each core; its answers, and what failed, by number.

    Decoders and resizing run outside of Python's lock: two threads take 7 s for CIFAR-10's files, two processes 11 s.
    """
    answers, errors = {}, {}

    def attempt(number: int) -> None:
        try:
            answers[number] = work(number)
        except UserError as error:
            errors[number] = str(error).partition("; ")[0].rstrip(".")
        except Exception as error:  # Pillow raises nearly anything for odd modes
            errors[number] = f"{names[number]} cannot be read ({getattr(error, 'strerror', None) or error})"

    parts = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with progress(title, len(numbers)) as advance, ThreadPoolExecutor(cores) as pool:
        for part in pool.map(lambda part: [*map(attempt, part)], parts):
            advance(len(part))
    return answers, errors
