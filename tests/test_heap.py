"""Memory that is kept from step to step, counted in pages that the system had to clear."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from gptjax import heap

# Runs a program of large temporaries 20 times; prints the pages that this took.
PROGRAM = """
import resource
from gptjax import heap
heap.MOST = {most}
if {share}:
    heap.share()
import jax, jax.numpy as jnp
from gptjax.loop import Unhurried, compile_step

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x = jnp.ones(4096)
run, cost = compile_step(jax.jit(lambda x: (jnp.outer(x, x) @ x, 0)), x)
assert 64e6 < cost["program_bytes"] < 128e6, cost
assert isinstance(run, Unhurried) == ({share} and {most} < 64e6)
for turn in range(30):
    if turn == 10:  # the heap has grown to its size
        before = pages()
    jax.block_until_ready(run(x))
print(pages() - before)
"""


def pages(share: bool, most: int = heap.MOST) -> int:
    program = PROGRAM.format(share=share, most=most)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's alone")
def test_a_program_that_runs_again_takes_no_page_afresh():
    kept, fresh = pages(share=True), pages(share=False)
    assert fresh >= 20 * 32  # 64 MB, were pages as large as 2 MB
    # The heap may still grow by a hole or two; else each of the 20 turns takes all pages anew.
    assert kept < fresh / 2
    # One that is waited for has its own pages again, of which the next one would have as many.
    assert pages(share=True, most=2**25) < fresh / 20


# Takes temporaries again and again, beside pieces that stay; prints by how much the heap grew.
PIECES = """
import ctypes
from gptjax import heap
heap.SLACK = {slack}
heap.share()
heap.keep(2**28)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.mallinfo2.restype = heap._Information
before = libc.mallinfo2().arena
for _ in range(20):
    temporaries = libc.malloc(2**28)
    for size in (1_000, 10_000, 100_000):
        libc.malloc(size)
    libc.free(temporaries)
    libc.malloc(30_000)
print(libc.mallinfo2().arena - before)
"""


@pytest.mark.skipif(not heap._used(), reason="glibc 2.33's and later")
def test_small_pieces_that_stay_do_not_take_the_room_of_temporaries():
    def growth(slack: int) -> int:
        program = PIECES.format(slack=slack)
        return int(subprocess.check_output([sys.executable, "-c", program], text=True))

    assert growth(heap.SLACK) < 2**24
    assert growth(0) > 2**27  # they are taken elsewhere too: else this shows nothing


# Takes temporaries whose place is taken once; prints the most memory that this took.
TAKEN = """
import ctypes
from pathlib import Path
from gptjax import heap
size = 2**28
heap.share()
heap.keep(size)
libc = heap._libc()
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
{before}
meter = heap.Meter(size)

def most():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

begin = most()
for turn in range(4):
    meter.wait()
    temporaries = libc.malloc(size)
    libc.memset(temporaries, 1, size)
    libc.free(temporaries)
    if turn == 1:
        libc.malloc(heap.SLACK + 2**20)
print(most() - begin)
"""


@pytest.mark.skipif(not heap._used(), reason="glibc 2.33's and later")
def test_pages_of_temporaries_are_let_go_where_these_have_to_move() -> None:
    def most(before: str) -> int:
        program = TAKEN.format(before=before)
        return int(subprocess.check_output([sys.executable, "-c", program], text=True))

    assert most("") < 1.3 * 2**28  # what stays has a quarter of their pages
    assert most("heap._place = lambda size: 0") > 1.9 * 2**28  # else this shows nothing


def test_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[int] = []
    monkeypatch.setattr(heap, "_set", lambda option, value: options.append(option) or True)
    monkeypatch.setattr(heap, "_shared", False)
    assert not heap.keep(0) and options == []
    monkeypatch.setattr(heap, "_shared", True)
    assert heap.keep(0) and options == [heap._MMAP_MAX, heap._TRIM_THRESHOLD]


def test_temporaries_are_waited_for_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [1000]  # bytes from one look to the next
    monkeypatch.setattr(heap, "_used", lambda: used.pop(0) if len(used) > 1 else used[0])
    meter = heap.Meter(temporaries=100)
    used[:] = [1100, 1090, 1060, 1050, 1049]
    meter.wait()
    assert used == [1049]  # back, but for what the results may take: less than half
    used[:] = [1099]
    meter.wait()
    used[:] = [2000]  # something else has taken it and stays
    begin = time.monotonic()
    meter.wait()
    assert heap.PATIENCE <= time.monotonic() - begin < 10
    begin = time.monotonic()
    meter.wait()
    assert time.monotonic() - begin < heap.PATIENCE
