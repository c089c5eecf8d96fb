"""The memory that a process keeps, and how often it is searched."""

import ctypes
import gc
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
ONE_GIB = 1 << 30  # bytes, more than a batch takes


SEARCHED_AFTER = 100_000  # new objects, instead of 700


def search_rarely() -> None:
    """Let Python's collector search for unreachable objects rarely: libraries make a million that stay.

    Their imports then take a seventh less time.
    """
    gc.set_threshold(SEARCHED_AFTER, *gc.get_threshold()[1:])


def keep_memory() -> None:
    """Keep the memory of a batch for the next one.

    glibc gives large blocks back to the system at once and asks for them again: for a batch of a small ViT on two cores
    these are 6,000 page faults and a fifth to a third of the time. Other systems' allocators are left alone.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for threshold in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            libc.mallopt(threshold, ONE_GIB)
