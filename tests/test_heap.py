"""Memory that is kept from step to step, counted in pages that the system had to clear."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gptjax import heap

# Runs a program of large temporaries 20 times; prints the pages that this took.
PROGRAM = """
import resource
from gptjax import heap
if {share}:
    heap.share()
import jax, jax.numpy as jnp
from gptjax.loop import compile_step

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x = jnp.ones(4096)
run, cost = compile_step(jax.jit(lambda x: (jnp.outer(x, x) @ x, 0)), x)
assert 64e6 < cost["program_bytes"] < heap.MOST, cost
for turn in range(30):
    if turn == 10:  # the heap has grown to its size
        before = pages()
    jax.block_until_ready(run(x))
print(pages() - before)
"""


def pages(share: bool) -> int:
    program = PROGRAM.format(share=share)
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


def test_a_large_program_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[int] = []
    monkeypatch.setattr(heap, "_set", lambda option, value: options.append(option) or True)
    monkeypatch.setattr(heap, "_shared", True)
    heap.keep(heap.MOST + 1)
    assert options == []
    heap.keep(heap.MOST)
    assert options == [heap._MMAP_MAX, heap._TRIM_THRESHOLD]
    monkeypatch.setattr(heap, "_shared", False)
    heap.keep(1)
    assert len(options) == 2
