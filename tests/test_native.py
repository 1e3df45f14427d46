"""Programs that LLVM compiles, and XLA calls: against numpy, and the interface as its header has it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np
import pytest

from gptjax import native
from gptjax.native import F32, I64, Machine, Program, Value
from tests import tiny

LANES = 4
random = np.random.default_rng(0)


def per_task(task: Any, operands: tuple[int, int] = (1, 1)) -> Program:
    """A task for each row of the first operand, with 64 bytes of memory."""
    tasks = lambda code, arrays: arrays[0].before(code, 1)  # noqa: E731
    return Program(operands, tasks, lambda code, arrays: code.number(64), task)


def call(name: str, program: Program, *operands: Any, shape: tuple[int, ...]) -> jax.Array:
    known_as = native.register(name, lambda module: program)
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.jit(lambda *x: jax.ffi.ffi_call(known_as, result)(*x))(*operands)


# What each does of vectors a, b and c of LANES numbers; and the same by numpy.
VECTORS: dict[str, tuple[Any, Any]] = {
    "arithmetic": (lambda code, a, b, c: (a + b) * c - a / b + 2.5, lambda a, b, c: (a + b) * c - a / b + 2.5),
    "fma": (lambda code, *abc: code.fma(*abc), lambda a, b, c: a * b + c),
    "largest": (lambda code, a, b, c: code.largest(a, code.largest(b, c)), lambda *abc: np.max(abc, 0)),
    "select": (lambda code, a, b, c: code.select((a < b) & (b <= c), a, c),
               lambda a, b, c: np.where((a < b) & (b <= c), a, c)),
    "or": (lambda code, a, b, c: code.select((a < b) | b.same(c), a, c),
           lambda a, b, c: np.where((a < b) | (b == c), a, c)),
    "across": (lambda code, a, b, c: code.splat(code.across(Value.__add__, a), LANES) + b,
               lambda a, b, c: a.sum(-1, keepdims=True) + b),
    "nearest": (lambda code, a, b, c: code.nearest(a * 60)[0], lambda a, b, c: np.rint(a * 60)),
    "power": (lambda code, a, b, c: code.nearest(a * 60)[1], lambda a, b, c: 2.0 ** np.rint(a * 60)),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_what_a_program_computes_is_numpys(name):
    write, numpy = VECTORS[name]

    def task(code, arrays, number, memory):
        a, b, c = (code.load(x.data, number * LANES, LANES) for x in arrays[:3])
        code.store(write(code, a, b, c), arrays[3].data, number * LANES)

    a, b, c = np.clip(random.normal(size=(3, 7, LANES)), -2, 2).astype(np.float32)
    got = call(f"test_{name}", per_task(task, (3, 1)), a, b, c, shape=a.shape)
    np.testing.assert_allclose(got, numpy(*np.float64([a, b, c])), rtol=1e-6, atol=1e-6)


def test_the_power_of_two_has_its_ends():
    def task(code, arrays, number, memory):
        code.store(code.nearest(code.load(arrays[0].data, number))[1], arrays[1].data, number)

    ends = np.float32([-127, -126, -1, 0, 1, 127])
    got = call("test_ends", per_task(task), ends[:, None], shape=(6, 1))
    assert np.asarray(got)[:, 0].tolist() == [0, 2.0**-126, 0.5, 1, 2, 2.0**127]


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_rows_are_turned(count):
    def task(code, arrays, number, memory):
        rows = [
            code.load(arrays[0].data, (number * count + i) * count, count) for i in range(count)
        ]
        for i, row in enumerate(code.transpose(rows)):
            code.store(row, arrays[1].data, (number * count + i) * count)

    tasks = lambda code, arrays: arrays[0].before(code, 2)  # noqa: E731
    program = per_task(task)._replace(tasks=tasks)
    x = np.arange(3 * count * count, dtype=np.float32).reshape(3, count, count)
    got = call(f"test_turn_{count}", program, x, shape=x.shape)
    np.testing.assert_array_equal(got, x.swapaxes(1, 2))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
def test_every_task_is_done_once(count):
    """Sums of 0, 1, .. of as many terms as the task's number says, by way of its memory."""

    def task(code, arrays, number, memory):
        at, total = number * 2, code.variable(code.number(0))
        with code.loop(0, number % 10, 2) as i:
            total.set(total.get() + i)
        code.store(total.get(), memory)
        with code.either(code.number(4) < number % 10) as (so, not_so):
            with so:
                code.store(code.real(1.0), arrays[1].data, at)
            with not_so:
                code.store(code.real(-1.0), arrays[1].data, at)
        again = code.load(memory, kind=I64)
        real = Value(code.builder, code.builder.sitofp(again.of, F32))
        code.store(real + code.load(arrays[0].data, at + 1), arrays[1].data, at + 1)

    x = random.normal(size=(count, 2)).astype(np.float32)
    n = np.arange(count) % 10
    expected = np.stack([np.where(n > 4, 1, -1), x[:, 1] + [sum(range(0, i, 2)) for i in n]], 1)
    program = per_task(task)
    for _ in range(20):  # threads take turns as they may
        got = call("test_once", program, x, shape=x.shape)
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def adds_up(code, arrays, number, memory):
    """A task that takes others long enough to begin: 1 added 100,000 times, by way of its memory."""
    total = code.variable(code.real(0.0))
    with code.loop(0, 100_000):
        total.set(total.get() + 1.0)
    code.store(total.get(), memory)
    code.store(code.load(memory), arrays[1].data, number)


def added(name: str, scratch: int) -> list[float]:
    program = per_task(adds_up)._replace(scratch=lambda code, arrays: code.number(scratch))
    return call(name, program, jnp.zeros((64, 1)), shape=(64,)).tolist()


def test_without_memory_for_a_task_there_is_an_error():
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED: no memory for a pro"):
        added("test_no_memory", 1 << 60)
    assert added("test_memory", 64) == [1e5] * 64


def test_one_thread_does_all_where_there_is_no_memory_for_others():
    told = tiny.as_users_compile(
        "import resource, tests.test_native as t\n"
        "t.added('before', 64)\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 30),) * 2)\n"
        "print(all(t.added('within', 2 << 30) == [1e5] * 64 for _ in range(3)))"
    )
    assert told == "True\n"


def test_a_program_is_compiled_once_whoever_asks_at_once(monkeypatch):
    def task(code, arrays, number, memory):
        code.store(code.load(arrays[0].data, number) * 2.0, arrays[1].data, number)

    compiled, compile_ = [], native._compile
    monkeypatch.setattr(native, "_compile", lambda module: compiled.append(1) or compile_(module))
    names, start = [], threading.Barrier(4)

    def register():
        start.wait()
        names.append(native.register("test_at_once", lambda module: per_task(task)))

    threads = [threading.Thread(target=register) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1 and len(set(names)) == 1
    got = call("test_at_once", per_task(task), jnp.arange(3.0)[:, None], shape=(3, 1))
    assert len(compiled) == 1 and got[:, 0].tolist() == [0, 2, 4]


def test_a_program_is_of_the_machine(monkeypatch):
    program = per_task(lambda code, arrays, number, memory: None)
    names = set()
    for lanes in (4, 8, 16):
        monkeypatch.setattr(native, "machine", lambda lanes=lanes: Machine(lanes, 8))
        names.add(native.register("test_of_machine", lambda module: program))
    assert len(names) == 3


@pytest.mark.parametrize(
    "features, machine",
    [
        ({"avx512f": True, "avx": True}, (16, 16)),
        ({"avx512f": False, "avx": True}, (8, 8)),
        ({"avx": False}, (4, 16)),
        ({}, (4, 16)),
    ],
)
def test_the_machine_is_what_llvm_says(features, machine, monkeypatch):
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: features)
    assert native.machine.__wrapped__() == machine


# Where fields of XLA's structs are: what `native` says and C's own words.
FIELDS = {
    "_EXTENSION": "XLA_FFI_CallFrame, extension_start",
    "_API": "XLA_FFI_CallFrame, api",
    "_CONTEXT": "XLA_FFI_CallFrame, ctx",
    "_ARGUMENTS": "XLA_FFI_CallFrame, args.args",
    "_RESULTS": "XLA_FFI_CallFrame, rets.rets",
    "_METADATA": "XLA_FFI_Metadata_Extension, metadata",
    "_VERSION": "XLA_FFI_Metadata, api_version.major_version",
    "_VERSION + 4": "XLA_FFI_Metadata, api_version.minor_version",
    "_TRAITS": "XLA_FFI_Metadata, traits",
    "_ERROR": "XLA_FFI_Api, XLA_FFI_Error_Create",
    "_SCHEDULE": "XLA_FFI_Api, XLA_FFI_ThreadPool_Schedule",
    "_THREADS": "XLA_FFI_Api, XLA_FFI_ThreadPool_NumThreads",
    "_DATA": "XLA_FFI_Buffer, data",
    "_RANK": "XLA_FFI_Buffer, rank",
    "_DIMS": "XLA_FFI_Buffer, dims",
    "8": "XLA_FFI_ThreadPool_Schedule_Args, extension_start",
    "16": "XLA_FFI_ThreadPool_Schedule_Args, ctx",
    "24": "XLA_FFI_ThreadPool_Schedule_Args, task",
    "32": "XLA_FFI_ThreadPool_Schedule_Args, data",
    "16 ": "XLA_FFI_ThreadPool_NumThreads_Args, ctx",
    "24 ": "XLA_FFI_ThreadPool_NumThreads_Args, num_threads",
    "16  ": "XLA_FFI_Error_Create_Args, message",
    "24  ": "XLA_FFI_Error_Create_Args, errc",
}


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a compiler of C")
def test_the_interface_is_that_of_the_header(tmp_path: Path) -> None:
    lines = "".join(f'printf("%zu\\n", offsetof({field}));' for field in FIELDS.values())
    version = 'printf("%d %d\\n", XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);'
    (tmp_path / "a.c").write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <stdint.h>\n#include <stdbool.h>\n"
        f'#include "xla/ffi/api/c_api.h"\nint main(void) {{ {lines} {version} return 0; }}\n'
    )
    command = ["cc", f"-I{jax.ffi.include_dir()}", "a.c", "-o", "a"]
    subprocess.run(command, cwd=tmp_path, check=True)
    told = subprocess.run(["./a"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    *offsets, version = told.splitlines()
    ours = [eval(name, vars(native)) for name in FIELDS]
    assert ours == [int(offset) for offset in offsets]
    # XLA takes programs that were written for an older minor version.
    assert re.match(r"0 [1-9]", version)


def test_it_starts_no_backend():
    """As a program may be told to run elsewhere, or to be one of many hosts, only later."""
    code = (
        "from jax._src import xla_bridge; import gptjax.layers.flash; print(xla_bridge._backends)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n"
