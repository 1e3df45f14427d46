"""The C library's memory on CPUs: kept from step to step.

XLA takes the temporaries of a program afresh each time that it runs, and gives them back. glibc asks
the system for pieces that large, which clears every page anew: a quarter of the time of a small
model's step.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import time

# Temporaries of a program above this are waited for; of others two steps may have theirs at once.
MOST = 256 * 2**20
SLACK = 64 * 2**20  # room beside temporaries for what is smaller and stays
PATIENCE = 0.1  # seconds at most that memory of a program is waited for after its results

# Of XLA's temporaries glibc looks for more than they are, since they are aligned by 64 bytes, and gives
# the rest back in pieces. One that lies behind them may wait in its cache, or be taken by another:
# then they do not fit in their own place.
ALIGNED = 128

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_shared = False


def share() -> None:
    """Has all threads take memory from one heap; before there are any, so before jax starts."""
    global _shared
    _shared = _set(_ARENA_MAX, 1)


def keep(temporaries: int) -> bool:
    """Keeps what programs give back from now on, after `share`; what is free now is let go.

    Args:
        temporaries: of the program that is run most, in bytes. There is more room for them than they
            need: else a small piece that stays in it would have them taken, and kept, elsewhere too.

    Returns:
        False where nothing is kept: without `share`, or another C library.
    """
    if _shared:
        libc = _libc()
        libc.malloc_trim(0)
        _set(_MMAP_MAX, 0)  # all of it from the heap, which shrinks where 2 GB of it are free
        _set(_TRIM_THRESHOLD, 2**31 - 1)
        room = libc.malloc(temporaries + SLACK)
        libc.malloc(SLACK)  # stays, of no pages: else the room would end where the heap does
        libc.free(room)
    return _shared


class Meter:
    """Waits until a program has given back its temporaries, which is after its results are there.

    Else the next one would take as much again, of fresh pages, and both be kept. Where it would all the
    same, since something lies in the former's place, the pages of that are let go.

    Args:
        temporaries: of the program, in bytes.
    """

    def __init__(self, temporaries: int) -> None:
        self._temporaries, self._before = temporaries, _used()
        self._place = _place(temporaries)

    def wait(self) -> None:
        """Before a program is run, when what it reads is there."""
        end = time.monotonic() + PATIENCE
        # XLA waits for Python's lock then, which sleep lets go of.
        while _used() > self._before + self._temporaries / 2 and time.monotonic() < end:
            time.sleep(1e-4)
        self._before = _used()
        place = _place(self._temporaries)
        if abs(place - self._place) > SLACK:
            _libc().malloc_trim(0)
        self._place = place


class _Information(ctypes.Structure):
    """mallinfo2 of glibc 2.33 and later."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]  # fmt: skip


def _used() -> int:
    """Bytes that the process has of the C library; 0 where that does not tell."""
    mallinfo2 = getattr(_libc(), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Information
    told = mallinfo2()
    return int(told.uordblks + told.hblkhd)


def _place(temporaries: int) -> int:
    """The address that a program would have its temporaries at now."""
    libc = _libc()
    place = libc.malloc(temporaries + ALIGNED)
    libc.free(place)
    return place or 0  # 0 if there is no memory


@functools.cache
def _libc() -> ctypes.CDLL:
    """The C library, opened once: it is asked before every step."""
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    return libc


def _set(option: int, value: int) -> bool:
    """False where the C library is not glibc."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(_libc(), "mallopt", None)
    return mallopt is not None and mallopt(option, value) == 1
