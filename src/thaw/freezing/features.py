"""The frozen part of a model run once over the digits, instead of in every epoch and in every job of a sweep.

Shapes: N digits, K views of each, ... one digit's features: (D,) pooled or (T, D) tokens.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from thaw.freezing.store import FeatureStore

MODES = ("auto", "off", "memory", "disk")
FORMAT = 2  # part of every key
TOKENS = {"cpu": 2048, "cuda": 131072, "mps": 16384}  # at once; on a CPU more of them leave its caches
VERIFIED: dict[str, Tensor] = {}  # by key: what this process has at hand for the next job of a sweep


class FeatureCache:
    """Keeps what a function gives for every digit, in memory or memory-mapped from a folder that runs share.

    Args:
        mode: `auto` keeps features on disk, in memory where the folder cannot be used, and not at all where digits are
            augmented anew in every epoch or their features are larger than `max_gb`; `memory` and `disk` insist; `off`.
        dir: the folder.
        max_gb: of all that it holds, in 1e9 bytes; what was used least recently makes room.
        views: K, with random augmentation: epoch e trains on view e modulo K. None keeps no random features.

    Raises:
        ValueError: an unknown mode, or a number out of its range.
    """

    def __init__(self, mode: str, dir: str, max_gb: float, views: int | None) -> None:
        mode = "off" if mode is False else mode  # what YAML makes of it
        if mode not in MODES:
            raise ValueError(f"cache.mode={mode!r} is unknown; choose {', '.join(MODES[:-1])} or {MODES[-1]}.")
        if isinstance(max_gb, bool) or not isinstance(max_gb, int | float) or not max_gb > 0:
            raise ValueError(f"cache.max_gb={max_gb} must be above 0; cache.mode=off keeps nothing.")
        if views is not None and (isinstance(views, bool) or not isinstance(views, int) or views < 1):
            raise ValueError(f"cache.views={views} must be a number of views, 1 or more, or null for none.")
        self.mode, self.max_gb, self.views = mode, max_gb, views
        self.store = FeatureStore(Path(dir).expanduser(), max_gb * 1e9)

    def num_views(self, is_random: bool, trainer: Trainer) -> int:
        """How many views of each digit to keep; 0 where nothing can be kept.

        Args:
            is_random: whether a digit is augmented anew in every epoch.
            trainer: of the ranks; the first says why nothing is kept.
        """
        if self.mode == "off":
            return 0
        if not is_random:
            if self.views is not None:
                raise ValueError(f"cache.views={self.views} keeps augmented views, but augment=none; set it to null.")
            return 1
        if self.views is None:
            reason = "digits are augmented anew in every epoch (cache.views=K would keep K augmented views of each)"
            self.keep_nothing(reason, trainer)
        return self.views or 0

    def keep_nothing(self, reason: str, trainer: Trainer) -> None:
        """Say why nothing can be kept; where that was asked for, it is an error."""
        if self.mode == "off":
            return
        if self.mode != "auto" or self.views is not None:
            asked = f"mode={self.mode}" if self.mode != "auto" else f"views={self.views}"
            raise ValueError(f"cache.{asked} keeps nothing: {reason}.")
        say(trainer, f"off, {reason}")

    def nothing_to_keep(self, some_frozen: bool, trainer: Trainer) -> None:
        """Say that no layer is frozen below the lowest one that trains, where one could expect otherwise."""
        if self.mode in ("memory", "disk") or (self.mode == "auto" and some_frozen):
            say(trainer, "off, no layer of this backbone lies below all that trains")

    def features(
        self,
        split: str,
        count: int,
        views: int,
        compute: Callable[[Tensor], Tensor],
        tokens: int,
        facts: Mapping[str, Any],
        trainer: Trainer,
    ) -> Tensor | None:
        """The features of all digits of a split; what is not kept yet is computed by all ranks together.

        Args:
            split: its name, for what is printed.
            count: N.
            views: K.
            compute: indices (B,) of digits -> features (B, ...); draws its random numbers from torch.
            tokens: that a digit is in `compute`; decides how many digits are computed at once.
            facts: all that the features depend on, as values of JSON.
            trainer: of the ranks that call this together.

        Returns:
            (K, N, ...), or None in mode `auto` where that is larger than `max_gb`.

        Raises:
            ValueError: larger than `max_gb` in another mode.
            OSError: the folder cannot be used, in mode `disk`.
        """
        facts = {
            "format": FORMAT,
            "torch": torch.__version__,
            "device": trainer.strategy.root_device.type,
            "views": views,
            **facts,
        }
        described = json.dumps(facts, sort_keys=True, default=OmegaConf.to_container)
        facts, key = json.loads(described), hashlib.sha256(described.encode()).hexdigest()[:16]
        if key in VERIFIED and trainer.world_size == 1:  # other ranks are new in every job
            return VERIFIED[key]
        with own_random_numbers(trainer):
            example = compute(torch.zeros(1, dtype=torch.long))
        shape = (views, count, *example.shape[1:])
        size = views * count * example.nbytes
        if size > self.max_gb * 1e9:
            reason = f"the {split} features take {size / 1e9:.1f} GB, more than cache.max_gb={self.max_gb:g}"
            if self.mode != "auto":
                raise ValueError(f"cache.mode={self.mode}: {reason}; raise it, or set cache.mode=auto or off.")
            say(trainer, f"off, {reason}")
            return None
        first, started = trainer.is_global_zero, time.monotonic()
        with ExitStack() as lock:
            kept = target = None
            if first and self.mode != "memory":
                kept, target = self.claim(key, facts, shape, example.dtype, lock)
            place = trainer.strategy.broadcast(
                "kept" if kept is not None else "disk" if target is not None else "memory"
            )
            if place != "kept":
                if target is None and (first or place == "memory"):
                    target = torch.empty(shape, dtype=example.dtype)
                compute_all(compute, split, count, views, tokens, target, trainer)
                if first and place == "disk":
                    assert target is not None
                    try:
                        self.store.commit(key, facts, target)
                    except OSError as error:  # the mapped numbers are there all the same
                        self.give_up_folder(error)
                trainer.strategy.barrier()
            features = kept if target is None else target
            if features is None and (features := self.store.read(key, facts)) is None:
                raise OSError(
                    f"cache.dir={self.store.folder} does not show rank {trainer.global_rank} what rank 0 wrote; "
                    "set it to a folder that all nodes share, or cache.mode=memory."
                )
        how = "reused" if place == "kept" else f"computed in {time.monotonic() - started:.1f} s"
        where = "memory" if place == "memory" else os.path.relpath(self.store.path(key))
        of_each = f" x {views} views" if views > 1 else ""
        say(trainer, f"{count:,} {split} digits{of_each} -> {shape[2:]}, {size / 1e6:,.0f} MB, {how}, in {where}")
        while len(VERIFIED) >= 4:  # the train and val features of two models
            VERIFIED.pop(next(iter(VERIFIED)))
        VERIFIED[key] = features
        return features

    def claim(
        self, key: str, facts: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype, lock: ExitStack
    ) -> tuple[Tensor | None, Tensor | None]:
        """What is kept, or else room on disk for it, locked; neither if the folder cannot be used in mode `auto`."""
        try:
            kept = self.store.read(key, facts)
            if kept is None:
                lock.enter_context(self.store.lock(key))
                kept = self.store.read(key, facts)  # another run may just have written it
            return kept, None if kept is not None else self.store.create(key, shape, dtype)
        except OSError as error:
            self.give_up_folder(error)
            return None, None

    def give_up_folder(self, error: OSError) -> None:
        """An error in mode `disk`, a line in mode `auto`."""
        if self.mode == "disk":
            raise OSError(f"cache.dir={self.store.folder} cannot be used: {error}. Set another cache.dir.") from error
        print(f"cache: in memory, as cache.dir={self.store.folder} cannot be used ({error})", flush=True)


def compute_all(
    compute: Callable[[Tensor], Tensor],
    split: str,
    count: int,
    views: int,
    tokens: int,
    target: Tensor | None,
    trainer: Trainer,
) -> None:
    """Fill `target` (K, N, ...) on the ranks that have one, each rank computing its share."""
    ranks, chunk = trainer.world_size, max(1, TOKENS[trainer.strategy.root_device.type] // tokens)
    starts = [(view, start) for view in range(views) for start in range(0, count, chunk * ranks)]
    hidden = None if trainer.is_global_zero else True  # None: where there is no terminal
    with (
        own_random_numbers(trainer),
        tqdm(total=views * count, desc=f"{split} features", disable=hidden, leave=False) as bar,
    ):
        for view, start in starts:
            first = start + trainer.global_rank * chunk
            torch.manual_seed(view * count + first)  # of the view and the digits alone, whatever the ranks
            part = compute(torch.arange(first, first + chunk).clamp_(max=count - 1))  # ranks need equal shapes
            if ranks > 1:
                part = trainer.strategy.all_gather(part).flatten(0, 1)  # type: ignore[union-attr]
            if target is not None:
                target[view, start : start + len(part)] = part[: count - start].cpu()
            bar.update(min(len(part), count - start))


def own_random_numbers(trainer: Trainer) -> AbstractContextManager[None]:
    """Those that the run draws afterwards are as if nothing had been drawn here."""
    device = trainer.strategy.root_device
    return torch.random.fork_rng([device] if device.type == "cuda" else [])  # not of all GPUs of the machine


def say(trainer: Trainer, text: str) -> None:
    if trainer.is_global_zero:
        print(f"cache: {text}", flush=True)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and numbers."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
