"""Products of a few rows with weights that lie output after output, "FD", written for CPUs.

XLA packs the weights of a product anew at each call, which for a few rows costs more than the
product. Here weights are read as they are kept, widened in registers, multiplied and summed: a few
rows cost little more than what memory takes to deliver the weights (`gptjax.native` compiles it).

An output is LANES sums of every so-manieth term, which are added up at the end, halves with halves.
So its bits depend neither on the other rows nor on threads, nor on how wide registers are. Sums of
int8 are exact, and so is what is made of them: bits that XLA gives for the same operands.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
from llvmlite import ir

from gptjax import native
from gptjax.layers.blocks import KINDS, SIZE, Blocks
from gptjax.native import F16, F32, I8, I16, I32, I64, POINTER, Code, Operand, Program, Value

LANES = 16
OUTPUTS = 4  # that are summed at once, and that their number is a multiple of
SHARE = 2**15  # weights that a task reads, or a few more
AHEAD = 2**14  # bytes: weights are asked of memory so far before they are read


class Kind(NamedTuple):
    """How weights of a dtype, or in blocks of a kind, are multiplied.

    Attributes:
        x: the dtype of activations.
        types: LLVM's types of activations, weights and sums.
        terms: of a sum that are added at once; all are a multiple.
        rows: at most; for more, XLA is faster. Of blocks it would widen all of a model.
        add: writes LANES sums, of the sums so far and that many activations and weights.
        shifted: whether `add` adds something to each activation, which is taken off in the end.
        scaled: whether each row, and each output, has a factor.
        read: of blocks, the weights of the one at a pointer, as `add` takes them, in parts.
    """

    x: Any
    types: tuple[Any, Any, Any]
    terms: int
    rows: float
    add: Callable[[Code, Value, Value, Value], Value]
    shifted: bool = False
    scaled: bool = False
    read: Callable[[Code, Value], list[Value]] | None = None

    @property
    def block(self) -> int:
        """How many weights the type of weights is of."""
        return 1 if self.read is None else SIZE


def _vector(kind: Any, lanes: int = LANES) -> Any:
    return ir.VectorType(kind, lanes)


def _halves(code: Code, a: Value, b: Value | None, second: Callable[[int], int]) -> Value:
    """Half of the lanes of a and b, each added to one of the other half, for which `second` is 1."""
    lanes = range(a.of.type.count * (1 if b is None else 2))
    first, other = ([i for i in lanes if second(i) == half] for half in (0, 1))
    b = a if b is None else b
    return code.pick(a, b, first) + code.pick(a, b, other)


def _float32(code: Code, sums: Value, x: Value, w: Value) -> Value:
    return code.fma(x, w, sums)


def _bfloat16(code: Code, sums: Value, x: Value, w: Value) -> Value:
    """A bfloat16 is the upper half of a float32."""
    b = code.builder
    bits = b.shl(b.zext(w.of, _vector(I32)), ir.Constant(_vector(I32), [16] * LANES))
    return code.fma(x, Value(b, b.bitcast(bits, _vector(F32))), sums)


def _int8(code: Code, sums: Value, x: Value, w: Value) -> Value:
    """Neighbours multiplied and added: what LLVM knows as one instruction of x86, pmaddwd."""
    b, both = code.builder, _vector(I32, 4 * LANES)
    terms = Value(b, b.mul(b.sext(x.of, both), b.sext(w.of, both)))
    pairs = _halves(code, terms, None, lambda i: i % 2)
    return sums + _halves(code, pairs, None, lambda i: i // LANES)


def _vnni(code: Code, sums: Value, x: Value, w: Value) -> Value:
    """The same by AVX-512 VNNI's vpdpbusd, whose activations have no sign: 128 is added to each."""
    words = [Value(code.builder, code.builder.bitcast(v.of, _vector(I32))) for v in (x + -128, w)]
    return code.intrinsic("llvm.x86.avx512.vpdpbusd.512", _vector(I32), sums, *words)


def _bytes(code: Code, at: Value, weight: Callable[[Value], Value]) -> list[Value]:
    """The weights of a block whose codes, int32, `layers.blocks` has so."""
    b, both = code.builder, [code.load(at, half, LANES, I8) for half in (0, LANES)]
    return [weight(Value(b, b.sext(codes.of, _vector(I32)))) for codes in both]


def _nibbles(code: Code, at: Value, weight: Callable[[Value], Value]) -> list[Value]:
    lower, upper = _bytes_of_two(code, at)
    return [weight(lower & 15), weight(upper)]


def _looked_up(code: Code, at: Value, weight: Callable[[Value], Value]) -> list[Value]:
    """The same by AVX-512's vpermps, which looks up the lowest four bits in 16 lanes."""
    name, of, table = "llvm.x86.avx512.permvar.sf.512", _vector(F32), weight(code.count(LANES))
    return [code.intrinsic(name, of, table, codes) for codes in _bytes_of_two(code, at)]


def _bytes_of_two(code: Code, at: Value) -> tuple[Value, Value]:
    """Of a block with two codes a byte these bytes, int32, and their upper halves."""
    b = code.builder
    both = Value(b, b.zext(code.load(at, 0, LANES, I8).of, _vector(I32)))
    return both, Value(b, b.lshr(both.of, both.like(4)))


def _in_blocks(kind: str, codes: Callable[..., list[Value]], moved: int = 0) -> Kind:
    """Widened in registers to the bits that `blocks.wide` gives, and multiplied as float32."""
    factors, size, _ = KINDS[kind]

    def read(code: Code, at: Value) -> list[Value]:
        b, halves = code.builder, code.load(at, 0, factors, F16)
        wide = Value(b, b.fpext(halves.of, _vector(F32, factors)))
        d, *m = (code.pick(wide, wide, [i] * LANES) for i in range(factors))

        def weight(codes: Value) -> Value:
            real = Value(b, b.sitofp((codes + moved).of, _vector(F32)))
            # d code is exact, so that both ways round once.
            return code.fma(d, real, m[0]) if m else d * real

        return codes(code, code.at(at, factors, F16), weight)

    types = (F32, ir.ArrayType(I8, size), F32)
    return Kind(jnp.float32, types, SIZE, math.inf, _float32, read=read)


@functools.cache
def kinds() -> dict[str, Kind]:
    """By the dtype of the weights, or their kind of block."""
    features = llvm.get_host_cpu_features()
    vnni = bool(features.get("avx512vnni"))
    add = _vnni if vnni else _int8
    nibbles = _looked_up if features.get("avx512f") else _nibbles
    # XLA multiplies many rows by AMX; without that it takes twice as long.
    rows = math.inf if vnni and not features.get("amx-int8") else 32
    return {
        "float32": Kind(jnp.float32, (F32, F32, F32), LANES, 128, _float32),
        "bfloat16": Kind(jnp.float32, (F32, I16, F32), LANES, 32, _bfloat16),
        "int8": Kind(jnp.int8, (I8, I8, I32), 4 * LANES, rows, add, shifted=vnni, scaled=True),
        "Q8_0": _in_blocks("Q8_0", _bytes),
        "Q4_0": _in_blocks("Q4_0", nibbles, moved=-8),
        "Q4_1": _in_blocks("Q4_1", nibbles),
    }


def serves(name: str, rows: int, summed: int, outputs: int) -> bool:
    """Whether `product` takes weights of `kinds()[name]` and operands of these sizes."""
    kind = kinds().get(name)
    if kind is None or not 0 < rows <= kind.rows:
        return False
    return summed % kind.terms == outputs % OUTPUTS == 0


def product(x_RK: jax.Array, w_NK: jax.Array | Blocks, *scales: jax.Array) -> jax.Array:
    """y_RN, float32, the products of activations and weights on a CPU.

    Args:
        scales: of int8, x_R and w_N, float32.
    """
    if isinstance(w_NK, Blocks):
        key, w = w_NK.kind, w_NK.data
    else:
        key, w = w_NK.dtype.name, w_NK
    kind = kinds()[key]
    name = native.register(f"product_{key}", functools.partial(_program, kind))
    result = jax.ShapeDtypeStruct((x_RK.shape[0], w.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(name, result, vmap_method="sequential")
    return call(x_RK.astype(kind.x), w, *scales)


def rounded(x_RK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 on the grid of int8, and scale_R, with the bits of `layers.linear` by XLA."""
    name = native.register("round", _rounding)
    scale = jax.ShapeDtypeStruct((x_RK.shape[0],), jnp.float32)
    results = (jax.ShapeDtypeStruct(x_RK.shape, jnp.int8), scale)
    values, scale_R = jax.ffi.ffi_call(name, results, vmap_method="sequential")(x_RK)
    return values, scale_R


# What follows writes the programs.


def totals(code: Code, vectors: Sequence[Value]) -> Value:
    """One vector with the sum of each one's lanes, added halves with halves; then come others."""
    half = LANES // 2  # of what is left to add up, for each
    while half:
        seconds: Sequence[Value | None] = vectors[1::2] or [None]
        pairs = itertools.zip_longest(vectors[::2], seconds, fillvalue=vectors[-1])
        vectors = [_halves(code, a, b, lambda i: i // half % 2) for a, b in pairs]  # noqa: B023
        half //= 2
    return vectors[0]


def _block(module: Any, kind: Kind, rows: int, outputs: int) -> Any:
    """A function: so many rows times so many outputs, the arrays' first; K and N are their sizes."""
    code = Code(module, f"rows{rows}_of_{kind.block}", [POINTER] * 5 + [I64] * 2)
    x, w, y, x_scale, w_scale, K, N = code.operands
    of_x, _, of_sums = kind.types

    def zeros(of: Any, lanes: int) -> Value:
        return Value(code.builder, ir.Constant(_vector(of, lanes), [0] * lanes))

    def sums() -> list[Any]:
        return [code.variable(zeros(of_sums, LANES)) for _ in range(outputs)]

    each, of_zeros = [sums() for _ in range(rows)], sums()
    with code.loop(0, K, kind.terms) as k:
        w_N = [_read(code, kind, w, K, n, k) for n in range(outputs)]
        width = kind.terms // len(w_N[0])

        def add(sums: list[Any], x_r: list[Value]) -> None:
            for s, w_n in zip(sums, w_N, strict=True):
                for part in zip(x_r, w_n, strict=True):
                    s.set(kind.add(code, s.get(), *part))

        if kind.shifted:
            add(of_zeros, [zeros(of_x, width)])
        for r in range(rows):
            parts = range(0, kind.terms, width)
            add(each[r], [code.load(x, K * r + k + part, width, of_x) for part in parts])
    total_RN = [s.get() for row in each for s in row]
    if kind.shifted:
        total_RN = [s - z.get() for s, z in zip(total_RN, of_zeros * rows, strict=True)]
    sums_RN = totals(code, total_RN)
    for r in range(rows):
        total = code.pick(sums_RN, sums_RN, [*range(r * outputs, (r + 1) * outputs)])
        if kind.scaled:
            scale = code.splat(code.load(x_scale, r), outputs) * code.load(w_scale, 0, outputs)
            b = code.builder
            total = Value(b, b.sitofp(total.of, _vector(F32, outputs))) * scale
        code.store(total, y, N * r)
    return code.end()


def _read(code: Code, kind: Kind, w: Value, K: Value, n: Value | int, k: Value) -> list[Value]:
    """Weights of an output from k on, as `Kind.add` takes them, in parts."""
    at = code.at(w, K * n // kind.block + k // kind.block, kind.types[1])
    code.prefetch(at, AHEAD)
    return kind.read(code, at) if kind.read else [code.load(at, 0, kind.terms, kind.types[1])]


def _program(kind: Kind, module: Any) -> Program:
    """A task is some outputs of all rows, of which its weights meet a few after the other.

    Blocks are widened once for all rows, where these would meet them more than twice.
    """
    machine = native.machine()
    sums = machine.lanes * machine.accumulators // LANES  # at once
    most = sums // 2
    outputs = {rows: min(OUTPUTS, 2 ** int(math.log2(sums // rows))) for rows in range(1, most + 1)}

    def blocks(kind: Kind, fewest: int = 1) -> dict[int, Any]:
        return {r: _block(module, kind, r, outputs[r]) for r in outputs if r >= fewest}

    as_they_are, plain = blocks(kind), kinds()["float32"]
    # Three times or more have no fewer rows each.
    widened = {} if kind.read is None else blocks(plain, most * 2 // 3 + 1)

    def sizes(code: Code, operands: list[Operand]) -> tuple[Value, Value, Value, Value]:
        """R, K, N, and the outputs of a task."""
        x, w, *_ = operands
        K = x.dim(code, 0)
        return (
            x.dim(code, 1),
            K,
            w.dim(code, 1),
            (code.number(SHARE) // (K * OUTPUTS) + 1) * OUTPUTS,
        )

    def tasks(code: Code, operands: list[Operand]) -> Value:
        *_, N, part = sizes(code, operands)
        return (N + part - 1) // part

    def memory(code: Code, operands: list[Operand]) -> Value:
        _, K, _, part = sizes(code, operands)
        return part * K * (0 if kind.read is None else 4)

    def task(code: Code, operands: list[Operand], number: Value, memory: Value) -> None:
        x, w, *scales, y = (operand.data for operand in operands)
        R, K, N, part = sizes(code, operands)
        start = number * part
        count, w = code.least(N - start, part), code.at(w, start * K // kind.block, kind.types[1])
        times = (R + (most - 1)) // most
        at_once = (R + (times - 1)) // times

        def multiply(blocks: dict[int, Any], kind: Kind, w: Value) -> None:
            for rows, block in blocks.items():
                with code.when(at_once.same(rows)), code.loop(0, R, rows) as r:
                    r = code.least(r, R - rows)  # some may be multiplied again
                    x_r, y_r = code.at(x, r * K, kind.types[0]), code.at(y, r * N + start)
                    with code.loop(0, count, outputs[rows]) as n:
                        w_n, y_rn = code.at(w, n * K // kind.block, kind.types[1]), code.at(y_r, n)
                        factors = [x_r, w_n]
                        if scales:
                            factors = [code.at(scales[0], r), code.at(scales[1], start + n)]
                        code.call(block, x_r, w_n, y_rn, *factors, K, N)

        if not widened:
            multiply(as_they_are, kind, w)
            return
        with code.either(times < 3) as (so, not_so):
            with so:
                multiply(as_they_are, kind, w)
            with not_so:
                with code.loop(0, count) as n, code.loop(0, K, kind.terms) as k:
                    for i, weights in enumerate(_read(code, kind, w, K, n, k)):
                        code.store(weights, memory, n * K + k + i * LANES)
                multiply(widened, plain, memory)

    return Program((4 if kind.scaled else 2, 1), tasks, memory, task)


def _rounding(module: Any) -> Program:
    """A task is some rows: `layers.linear._round` as XLA has it, which multiplies by 1 / 127."""

    def sizes(code: Code, operands: list[Operand]) -> tuple[Value, Value, Value]:
        """R, K, and the rows of a task."""
        R, K = operands[0].dim(code, 1), operands[0].dim(code, 0)
        return R, K, code.number(SHARE) // K + 1

    def tasks(code: Code, operands: list[Operand]) -> Value:
        R, _, part = sizes(code, operands)
        return (R + part - 1) // part

    def task(code: Code, operands: list[Operand], number: Value, memory: Value) -> None:
        x, y, scale = (operand.data for operand in operands)
        R, K, part = sizes(code, operands)
        start, b = number * part, code.builder

        def larger(a: Value, b: Value) -> Value:
            """NaN if one is."""
            return code.lane_by_lane("maximum", a, b)

        with code.loop(start, code.least(start + part, R)) as r:
            x_r = code.at(x, r * K)
            largest = code.variable(code.real(0.0, LANES))
            with code.loop(0, K, LANES) as k:
                size = code.lane_by_lane("fabs", code.load(x_r, k, LANES))
                largest.set(larger(largest.get(), size))
            most = code.across(larger, largest.get())
            factor = code.select(most.same(0.0), code.real(1.0), most * (1 / 127))
            code.store(factor, scale, r)
            with code.loop(0, K, LANES) as k:
                near = code.load(x_r, k, LANES) / code.splat(factor, LANES)
                whole = b.fptosi(code.lane_by_lane("rint", near).of, _vector(I8))
                b.store(whole, code.at(y, r * K + k, I8).of, align=4)

    return Program((1, 2), tasks, native.no_memory, task)
