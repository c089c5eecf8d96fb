"""The cache of the frozen layers' output for every image: in memory, or in a folder that runs share.

Shapes: N images; one image's features are (D,) pooled or (T, D) tokens.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Trainer
from omegaconf import OmegaConf
from torch import Tensor

from thaw.data.store import TensorStore
from thaw.models.parallel import forward_threads, map_in_threads
from thaw.run.console import progress, say
from thaw.run.errors import UserError, UserFileError
from thaw.run.values import Positive

FORMAT = 4  # part of every key
TOKENS = {"cpu": 2048, "cuda": 131072, "mps": 16384}  # computed at once; more of them leave a CPU's caches
VERIFIED: dict[str, Tensor] = {}  # by key: what this process has in memory for the next job of a sweep


class FeatureCache:
    """Caches the output of a function for every image, in memory or memory-mapped from a folder that runs share.

    Args:
        mode: `auto` caches features on disk, in memory where the folder cannot be used, and not at all where images are
            augmented at random or their features are larger than `max_gb`; `memory` and `disk` insist; `off`.
        dir: the folder.
        max_gb: of all that it holds, in 1e9 bytes; what was used least recently makes room.
    """

    what = "features"  # are cached, as messages say

    def __init__(self, mode: Literal["auto", "off", "memory", "disk", False], dir: str, max_gb: Positive) -> None:
        self.mode, self.max_gb = mode or "off", max_gb  # YAML reads off as false
        self.store = TensorStore(Path(dir).expanduser(), max_gb * 1e9)
        self.splits: list[str] = []  # that nothing has been printed about, with their number of images
        self.bytes, self.seconds, self.place = 0, 0.0, ""  # of those splits

    def refuse(self, reason: str, trainer: Trainer) -> None:
        """Print why nothing can be cached.

        Raises:
            UserError: mode `memory` or `disk` asked for it.
        """
        if self.mode in ("memory", "disk"):
            raise UserError(f"cache.mode={self.mode} can cache nothing: {reason}. Set cache.mode=auto or off.")
        if self.mode == "auto":
            report(trainer, f"cache: off, {reason}")

    def explain_no_layer(self, some_frozen: bool, trainer: Trainer) -> None:
        """Print that no layer can be cached, where a user could expect one."""
        if self.mode in ("memory", "disk") or (self.mode == "auto" and some_frozen):
            report(trainer, "cache: off (the stem trains, so there is nothing to compute once)")

    def summarise(self, trainer: Trainer) -> None:
        """Print one line about the splits that `features` has computed or read since the last call."""
        if self.splits:
            size, how = self.bytes / 1e6, f"{self.seconds:.1f} s" if self.seconds else "reused"
            splits = " + ".join(self.splits)
            report(trainer, f"cached {self.what}: {splits} images, {size:,.0f} MB in {self.place} ({how})")
        self.splits, self.bytes, self.seconds = [], 0, 0.0

    def features(
        self,
        split: str,
        count: int,
        compute: Callable[[Tensor], Tensor],
        tokens: int,
        facts: Mapping[str, Any],
        trainer: Trainer,
    ) -> Tensor | None:
        """The features of all images of a split; those that are not cached yet are computed by all processes together.

        Args:
            count: N.
            compute: indices (B,) of images -> features (B, ...), called by several threads at once.
            tokens: that an image is in `compute`; decides how many images are computed at once.
            facts: all that the features depend on, as values of JSON.
            trainer: of the processes that call this together.

        Returns (N, ...), or None in mode `auto` where that is larger than `max_gb`.

        Raises:
            UserError: larger than `max_gb` in another mode.
            OSError: the folder cannot be used, in mode `disk`.
        """
        own = {"format": FORMAT, "torch": torch.__version__, "device": trainer.strategy.root_device.type}
        described = json.dumps({**own, **facts}, sort_keys=True, default=OmegaConf.to_container)
        facts, key = json.loads(described), hashlib.sha256(described.encode()).hexdigest()[:16]
        if key in VERIFIED and trainer.world_size == 1:  # the other processes are new in every job
            return VERIFIED[key]
        with forked_rng(trainer):
            example = compute(torch.zeros(1, dtype=torch.long))
        shape = (count, *example.shape[1:])
        size = count * example.nbytes
        if size > self.max_gb * 1e9:
            reason = f"the {split} {self.what} take {size / 1e9:.1f} GB, more than cache.max_gb={self.max_gb:g}"
            if self.mode != "auto":
                raise UserError(f"cache.mode={self.mode}: {reason}; raise it, or set cache.mode=auto or off.")
            report(trainer, f"cache: off, {reason}")
            return None
        first, started = trainer.is_global_zero, time.monotonic()
        with ExitStack() as lock:
            cached = target = None
            if first and self.mode != "memory":
                cached, target = self.claim(key, facts, shape, example.dtype, lock)
            place = trainer.strategy.broadcast(
                "cached" if cached is not None else "disk" if target is not None else "memory"
            )
            if place != "cached":
                if target is None and (first or place == "memory"):
                    target = torch.empty(shape, dtype=example.dtype)
                compute_all(compute, f"{self.what} of {split} images", count, tokens, target, trainer)
                if first and place == "disk":
                    assert target is not None
                    try:
                        self.store.commit(key, facts, target)
                    except OSError as error:  # the mapped numbers are there all the same
                        self.give_up_folder(error)
                trainer.strategy.barrier()
            features = cached if target is None else target
            if features is None and (features := self.store.read(key, facts)) is None:
                raise UserFileError(
                    f"cache.dir={self.store.folder} does not show rank {trainer.global_rank} what rank 0 wrote; "
                    "set it to a folder that all nodes share, or cache.mode=memory."
                )
        self.splits.append(f"{count:,} {split}")
        self.bytes += size
        self.seconds += time.monotonic() - started if place != "cached" else 0
        self.place = "memory" if place == "memory" else os.path.relpath(self.store.folder)
        while len(VERIFIED) >= 4:  # the train and val features of two models
            VERIFIED.pop(next(iter(VERIFIED)))
        VERIFIED[key] = features
        return features

    def claim(
        self, key: str, facts: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype, lock: ExitStack
    ) -> tuple[Tensor | None, Tensor | None]:
        """The cached features, or else locked room for them on disk; neither if mode `auto` cannot use the folder."""
        try:
            cached = self.store.read(key, facts)
            if cached is None:
                lock.enter_context(self.store.lock(key))
                cached = self.store.read(key, facts)  # another run may just have written it
            return cached, None if cached is not None else self.store.create(key, shape, dtype)
        except OSError as error:
            self.give_up_folder(error)
            return None, None

    def give_up_folder(self, error: OSError) -> None:
        """An error in mode `disk`, a line in mode `auto`."""
        reason = error.strerror or error
        if self.mode == "disk":
            raise UserFileError(
                f"cache.dir={self.store.folder} cannot be used ({reason}). Set another cache.dir, or cache.mode=auto."
            ) from error
        say(f"cache: in memory, as cache.dir={self.store.folder} cannot be used ({reason})")


def compute_all(
    compute: Callable[[Tensor], Tensor], title: str, count: int, tokens: int, target: Tensor | None, trainer: Trainer
) -> None:
    """Fill `target` (N, ...) on the processes that have one, each process computing its share."""
    ranks, threads = trainer.world_size, forward_threads(trainer)
    chunk = max(1, TOKENS[trainer.strategy.root_device.type] // tokens // threads)
    starts = range(0, count, chunk * ranks)
    shown = progress(title, count, hidden=not trainer.is_global_zero)

    def share(start: int) -> Tensor:  # of this process
        first = start + trainer.global_rank * chunk
        return compute(torch.arange(first, first + chunk).clamp_(max=count - 1))  # ranks need equal shapes

    with forked_rng(trainer), shown as advance:
        for start, part in zip(starts, map_in_threads(share, starts, threads), strict=True):
            if ranks > 1:
                part = trainer.strategy.all_gather(part).flatten(0, 1)  # type: ignore[union-attr]
            if target is not None:
                target[start : start + len(part)] = part[: count - start].cpu()
            advance(min(len(part), count - start))


def forked_rng(trainer: Trainer) -> AbstractContextManager[None]:
    """Fork the random generators, so that filling the cache does not shift the run's own random numbers."""
    device = trainer.strategy.root_device
    return torch.random.fork_rng([device] if device.type == "cuda" else [])  # not those of all GPUs of the machine


def report(trainer: Trainer, text: str) -> None:
    if trainer.is_global_zero:
        say(text)
