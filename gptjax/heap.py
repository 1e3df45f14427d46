"""The C library's memory on CPUs: kept from step to step, where that is worth it.

XLA takes the temporaries of a program afresh each time that it runs, and gives them back. glibc asks
the system for pieces that large, which clears every page anew: a quarter of the time of a small
model's step.
"""

from __future__ import annotations

import ctypes
import sys

# A program above this is not begun before the memory of the last one is back, or two of them would
# have as much each.
MOST = 256 * 2**20
PAUSE = 1e-3  # seconds after the results of a program in which its temporaries are given back

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_shared = False


def share() -> None:
    """Has all threads take memory from one heap; before there are any, so before jax starts."""
    global _shared
    _shared = _set(_ARENA_MAX, 1)


def keep() -> None:
    """Keeps what programs give back from now on, after `share`; what is free now is let go."""
    if _shared:
        ctypes.CDLL(None).malloc_trim(0)
        _set(_MMAP_MAX, 0)  # all of it from the heap, which shrinks where 2 GB of it are free
        _set(_TRIM_THRESHOLD, 2**31 - 1)


def _set(option: int, value: int) -> bool:
    """False where the C library is not glibc."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(option, value) == 1
