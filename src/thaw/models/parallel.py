"""Forward passes without gradients on the cores of a CPU; their numbers are those of one pass in one thread."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from lightning import Trainer
from torch import Tensor

Item = TypeVar("Item")
Output = TypeVar("Output")


def forward_threads(trainer: Trainer) -> int:
    """How many threads compute different images at the same time, each with its share of the cores.

    Two threads of one core each never wait for each other; one of two cores waits for the slower core in each
    operation. Precisions such as `bf16-true` set torch's default type for the whole process, and several processes may
    share a layer's weights: there it is one thread.
    """
    is_alone = trainer.strategy.root_device.type == "cpu" and trainer.world_size == 1
    return min(2, torch.get_num_threads()) if is_alone and trainer.precision in ("32-true", "bf16-mixed") else 1


def map_in_threads(compute: Callable[[Item], Output], items: Iterable[Item], threads: int) -> Iterator[Output]:
    """`map(compute, items)`, computed in several threads; no more than `threads` outputs wait in memory.

    torch keeps the mode of gradients and autocast for each thread, so `compute` sets both.
    """
    if threads == 1:
        yield from map(compute, items)
        return
    cores = torch.get_num_threads()
    pending: deque[Future[Output]] = deque()
    try:
        share = (max(1, cores // threads),)
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=share) as pool:
            for item in items:
                pending.append(pool.submit(compute, item))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(cores)  # for threads that start later


def forward_in_threads(forward: Callable[[Tensor], Tensor], images: Tensor, trainer: Trainer | None) -> Tensor:
    """`forward`, (B, ...) -> (B, ...), without gradients, each thread computing its part of the batch."""
    if trainer is None or (threads := forward_threads(trainer)) == 1:
        return forward(images)

    @torch.no_grad()
    def part(images: Tensor) -> Tensor:
        with trainer.precision_plugin.forward_context():
            return forward(images)

    return torch.cat(list(map_in_threads(part, images.chunk(threads), threads)))
