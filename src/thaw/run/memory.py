"""The memory that a process keeps, and how often it is searched."""

import atexit
import ctypes
import gc
from contextlib import suppress
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
ONE_GIB = 1 << 30  # bytes, more than a batch takes


def search_rarely(objects: int) -> None:
    """Let Python's collector search for unreachable objects after so many new ones instead of 700.

    The imports of a command make a million objects that stay; to search none of them saves a quarter of that time.
    """
    gc.set_threshold(objects, *gc.get_threshold()[1:])


@cache  # once: what an earlier job of a sweep left behind must be collected
def keep_memory() -> None:
    """Keep the memory of a batch for the next one, and exempt the objects that exist now from garbage collection.

    glibc gives large blocks back to the system at once and asks for them again: for a batch of a small ViT on two cores
    these are 6,000 page faults and a fifth to a third of the time. Other systems' allocators are left alone.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)  # Python frees all at its end
    search_rarely(100_000)
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for threshold in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            libc.mallopt(threshold, ONE_GIB)
