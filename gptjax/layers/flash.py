"""Causal attention for CPUs, whose scores never leave the processor's cache.

Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4, written for `gptjax.native`: a task is all
the query heads of one key-value head of one row, so that whoever computes it adds up the gradients
of keys and values in one order. A block of queries meets one block of keys after another, no
further than it sees; the backward pass computes the weights again from the largest score and the
sum that the forward pass keeps of each query.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax import native
from gptjax.layers.scores import Scores, on_shards
from gptjax.native import I32, I64, POINTER, Code, Operand, Program, Value

BLOCK = 64  # queries, and keys
# What is masked is lower than what the largest of scores begins with, by more than any weight bears;
# what is seen is higher, or overflows.
LOWEST, LEAST = -3.4e38, -3.3e38


class Shape(NamedTuple):
    """What a program is compiled for.

    Attributes:
        N: query heads.
        K: key-value heads.
        H: width of a head, a multiple of 8.
        window: keys that a query sees; None: all.
        packed: whether rows hold documents that do not see each other.
    """

    N: int
    K: int
    H: int
    window: int | None
    packed: bool

    @property
    def name(self) -> str:
        return "_".join(map(str, self))

    @property
    def factor(self) -> float:
        """exp(x / sqrt(H)) = 2**(factor x)."""
        return self.H**-0.5 * math.log2(math.e)

    @property
    def lanes(self) -> int:
        return math.gcd(self.H, native.machine().lanes)


def flash(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, scores: Scores) -> jax.Array:
    """`plain`, in float32, block by block within the cache of the processor."""

    def kernel(
        q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array | None
    ) -> jax.Array:
        # Of heads that are split, a device has fewer.
        packed = segments_BT is not None
        shape = Shape(q.shape[2], k.shape[2], q.shape[3], scores.window, packed)
        return _attend(
            shape, q, k, v, jnp.zeros((), jnp.int32) if segments_BT is None else segments_BT
        )

    wide = [x.astype(jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH)]
    laid = zip(wide, ("BTNH", "BSKH", "BSKH"), strict=True)
    o_BTNH = on_shards(kernel, *laid, (scores.q_segments_BT, "BT"))
    return o_BTNH.astype(q_BTNH.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    shape: Shape, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    return _forward(shape, q_BTNH, k_BTKH, v_BTKH, segments_BT)[0]


def _forward(
    shape: Shape, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    B, T, N, _ = q_BTNH.shape
    each_BNT = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    name = native.register(
        f"flash_forward_{shape.name}", functools.partial(_forward_program, shape)
    )
    operands = (q_BTNH, k_BTKH, v_BTKH, segments_BT)
    results = _call(name, (q_BTNH, each_BNT, each_BNT), *operands)
    return results[0], (*operands, *results)


def _backward(
    shape: Shape, residuals: tuple[jax.Array, ...], do_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    name = native.register(
        f"flash_backward_{shape.name}", functools.partial(_backward_program, shape)
    )
    dq, dk, dv = _call(name, residuals[:3], *residuals, do_BTNH)
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _call(name: str, results: tuple[Any, ...], *operands: jax.Array) -> Any:
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results)
    return jax.ffi.ffi_call(name, results, vmap_method="broadcast_all")(*operands)


# What follows writes the programs. Memory is spoken of in float32 numbers.


def _product(
    module: Any,
    name: str,
    lanes: int,
    a: tuple[int, int],
    b: int,
    c: int,
    columns: int,
) -> Any:
    """A function: C_mn = sum_k A_mk B_kn, or C_mn += it.

    Its operands: A, B, C, how many m, how many k, whether to add to C.

    Args:
        a: strides of m and k in A.
        b: stride of k in B; those of n are 1.
        c: stride of m in C.
        columns: how many n, a multiple of the lanes.
    """
    code = Code(module, name, [POINTER, POINTER, POINTER, I64, I64, native.I1])
    A, B, C, rows, depth, add = code.operands
    most = 2 if columns % (2 * lanes) == 0 else 1  # vectors of B at once
    at_once = native.machine().accumulators // most

    def tile(m: Value, n: Value, count: int) -> None:
        a_at, b_at, c_at = code.at(A, m * a[0]), code.at(B, n), code.at(C, m * c + n)
        each = [(r, v) for r in range(count) for v in range(most)]
        zero = code.real(0.0, lanes)
        sums = {(r, v): code.variable(zero) for r, v in each}
        with code.when(add):
            for r, v in each:
                sums[r, v].set(code.load(c_at, r * c + v * lanes, lanes))
        with code.loop(0, depth) as k:
            a_k, b_k = code.at(a_at, k * a[1]), code.at(b_at, k * b)
            vectors = [code.load(b_k, v * lanes, lanes) for v in range(most)]
            for r in range(count):
                number = code.splat(code.load(a_k, r * a[0]), lanes)
                for v in range(most):
                    sums[r, v].set(code.fma(number, vectors[v], sums[r, v].get()))
        for r, v in each:
            code.store(sums[r, v].get(), c_at, r * c + v * lanes)

    with code.loop(0, columns, most * lanes) as n:
        whole = rows - rows % at_once
        with code.loop(0, whole, at_once) as m:
            tile(m, n, at_once)
        with code.loop(whole, rows) as m:
            tile(m, n, 1)
    return code.end()


# 2**f for f from -1/2 to 1/2, the highest power first: exp2f of Moshier's Cephes library.
_POLYNOMIAL = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3,
               5.550332471162809e-2, 2.402264791363012e-1, 6.931472028550421e-1, 1.0)  # fmt: skip


def exp2(code: Code, x: Value, lanes: int) -> Value:
    """2**x of a vector, x at most 127, to 1.2e-7 of it; 0 below the normal float32 numbers."""
    x = code.select(x < -127.0, code.real(-127.0, lanes), x)  # what is no number stays none
    whole, power = code.nearest(x)
    fraction = x - whole
    of_fraction = code.real(_POLYNOMIAL[0], lanes)
    for term in _POLYNOMIAL[1:]:
        of_fraction = code.fma(of_fraction, fraction, code.real(term, lanes))
    return of_fraction * power


See = Callable[[int], Value]


class _Task:
    """What a task of either program reads, and what it does with it.

    Its memory begins with blocks of keys that are turned, then those of values, each H x BLOCK, and
    the documents of the keys.
    """

    def __init__(
        self, shape: Shape, code: Code, operands: list[Operand], number: Value, memory: Value
    ) -> None:
        self.shape, self.code = shape, code
        self.q, self.k, self.v, self.segments = (operand.data for operand in operands[:4])
        self.T = operands[0].dim(code, 2)
        self.blocks = _blocks(code, self.T)
        self.row, self.head = number // shape.K, number % shape.K
        self.keys = memory
        self.values = code.at(memory, self.blocks * (BLOCK * shape.H))
        self.documents = code.at(self.values, self.blocks * (BLOCK * shape.H))
        self.rest = code.at(self.documents, self.blocks * BLOCK)

    def of_queries(self, array: Value, head: Value, i: Value) -> Value:
        """Where block i of a query head is in (B, T, N, H)."""
        step = self.shape.N * self.shape.H
        return self.code.at(array, (self.row * self.T + i * BLOCK) * step + head * self.shape.H)

    def of_keys(self, array: Value, j: Value) -> Value:
        """Where block j of this task's head is in (B, T, K, H)."""
        step = self.shape.K * self.shape.H
        return self.code.at(
            array, (self.row * self.T + j * BLOCK) * step + self.head * self.shape.H
        )

    def of_each(self, array: Value, head: Value, i: Value) -> Value:
        """Where block i of a query head is in (B, N, T)."""
        return self.code.at(array, (self.row * self.shape.N + head) * self.T + i * BLOCK)

    def size(self, i: Value) -> Value:
        """How many tokens block i has."""
        return self.code.least(self.T - i * BLOCK, BLOCK)

    def turn(self, array: Value, to: Value, factor: float = 1.0) -> None:
        """This head's part of (B, T, K, H), times the factor, block by block, each H x BLOCK.

        Beyond the last key stands the last one again, which no query sees there.
        """
        code, (_, K, H, *_), L = self.code, self.shape, self.shape.lanes
        begin = self.of_keys(array, code.number(0))
        with code.loop(0, self.blocks * BLOCK, L) as s, code.loop(0, H, L) as h:
            rows = [code.load(begin, self._kept(s + i) * (K * H) + h, L) * factor for i in range(L)]
            at = s // BLOCK * (BLOCK * H) + h * BLOCK + s % BLOCK
            for i, row in enumerate(code.transpose(rows)):
                code.store(row, to, at + i * BLOCK)

    def copy_documents(self) -> None:
        code = self.code
        with code.loop(0, self.blocks * BLOCK) as s:
            at = self.row * self.T + self._kept(s)
            code.store(code.load(self.segments, at, kind=I32), self.documents, s)

    def _kept(self, s: Value) -> Value:
        return self.code.least(s, self.T - 1)

    def first(self, i: Value) -> Value:
        """The first block of keys that a query of block i sees."""
        if self.shape.window is None:
            return self.code.number(0)
        s = i * BLOCK - (self.shape.window - 1)
        return self.code.select(s < 0, self.code.number(0), s) // BLOCK

    def visit(self, i: Value, j: Value, each: Callable[[Value, See | None], None]) -> None:
        """Does `each` of the queries of block i, which are to meet block j.

        Args:
            each: is given the query's number in the block, and what says which keys of vector v it
                sees; None where it sees all.
        """
        code, (*_, window, packed) = self.code, self.shape
        partly = i.same(j)
        if window is not None:
            partly = partly | (code.number(window - BLOCK) < (i - j) * BLOCK)
        if packed:
            partly = code.yes(True)
        with code.either(partly) as (so, not_so):
            with so, code.loop(0, self.size(i)) as r:
                each(r, functools.partial(self._sees, i * BLOCK + r, j * BLOCK))
            with not_so, code.loop(0, self.size(i)) as r:
                each(r, None)

    def _sees(self, t: Value, s: Value, v: int) -> Value:
        """Whether query t sees each key of vector v from s on."""
        code, (*_, window, packed), L = self.code, self.shape, self.shape.lanes
        s = s + v * L
        query, key = code.splat(code.narrow(t), L), code.splat(code.narrow(s), L) + code.count(L)
        sees = key <= query
        if window is not None:
            sees = sees & (query - key < window)
        if packed:
            own = code.splat(code.load(self.documents, t, kind=I32), L)
            sees = sees & own.same(code.load(self.documents, s, L, I32))
        return sees


def _blocks(code: Code, T: Value) -> Value:
    return (T + (BLOCK - 1)) // BLOCK


def _program(
    shape: Shape, operands: tuple[int, int], task: Callable[[Code, _Task, list[Value]], None]
) -> Program:
    """A program whose first operands are q, k, v and segments; `task` is given the others."""

    def tasks(code: Code, operands: list[Operand]) -> Value:
        return operands[0].before(code, 3) * shape.K

    def memory(code: Code, operands: list[Operand]) -> Value:
        of_keys = _blocks(code, operands[0].dim(code, 2)) * (BLOCK * (2 * shape.H + 1))
        return (of_keys + BLOCK * (2 * BLOCK + shape.H + 1)) * 4

    def one(code: Code, operands: list[Operand], number: Value, memory: Value) -> None:
        t = _Task(shape, code, operands, number, memory)
        if shape.packed:
            t.copy_documents()
        task(code, t, [operand.data for operand in operands[4:]])

    return Program(operands, tasks, memory, one)


def _forward_program(shape: Shape, module: Any) -> Program:
    N, K, H, *_ = shape
    L, vectors = shape.lanes, range(BLOCK // shape.lanes)
    score = _product(module, "score", L, (N * H, 1), BLOCK, BLOCK, columns=BLOCK)
    weigh = _product(module, "weigh", L, (BLOCK, 1), K * H, H, columns=H)

    def task(code: Code, t: _Task, others: list[Value]) -> None:
        o, most, total = others
        scores, sums = t.rest, code.at(t.rest, BLOCK * BLOCK)
        t.turn(t.k, t.keys, shape.factor)
        with code.loop(0, N // K) as g, code.loop(0, t.blocks) as i:
            head = t.head * (N // K) + g
            q, o_i = t.of_queries(t.q, head, i), t.of_queries(o, head, i)
            most_i, total_i = t.of_each(most, head, i), t.of_each(total, head, i)
            with code.loop(0, t.size(i)) as r:
                code.store(code.real(LEAST), most_i, r)
                code.store(code.real(0.0), total_i, r)
            with code.loop(t.first(i), i + 1) as j:
                keys = code.at(t.keys, j * (BLOCK * H))
                code.call(score, q, keys, scores, t.size(i), code.number(H), code.yes(False))
                later = t.first(i) < j

                def soften(r: Value, sees: See | None) -> None:
                    """Scores of a query become weights; what was summed before shrinks."""
                    at = r * BLOCK
                    rows = [code.load(scores, at + v * L, L) for v in vectors]
                    if sees is not None:
                        low = code.real(LOWEST, L)
                        rows = [
                            code.select(sees(v), x, low) for v, x in zip(vectors, rows, strict=True)
                        ]
                    largest = code.across(code.largest, functools.reduce(code.largest, rows))
                    before = code.load(most_i, r)
                    now = code.largest(before, largest)
                    code.store(now, most_i, r)
                    weights = [exp2(code, x - code.splat(now, L), L) for x in rows]
                    for v, x in zip(vectors, weights, strict=True):
                        code.store(x, scores, at + v * L)
                    shrink = exp2(code, code.splat(before - now, L), L)
                    sum_ = code.across(Value.__add__, functools.reduce(Value.__add__, weights))
                    code.store(
                        code.fma(code.load(total_i, r), code.first(shrink), sum_), total_i, r
                    )
                    with code.when(later):
                        for h in range(0, H, L):
                            code.store(code.load(sums, r * H + h, L) * shrink, sums, r * H + h)

                t.visit(i, j, soften)
                values = t.of_keys(t.v, j)
                code.call(weigh, scores, values, sums, t.size(i), t.size(j), later)
            with code.loop(0, t.size(i)) as r:
                share = code.real(1.0) / code.load(total_i, r)
                for h in range(0, H, L):
                    mean = code.load(sums, r * H + h, L) * code.splat(share, L)
                    code.store(mean, o_i, r * (N * H) + h)

    return _program(shape, (4, 3), task)


def _backward_program(shape: Shape, module: Any) -> Program:
    N, K, H, *_ = shape
    L, vectors = shape.lanes, range(BLOCK // shape.lanes)
    score = _product(module, "score", L, (N * H, 1), BLOCK, BLOCK, columns=BLOCK)
    to_q = _product(module, "to_q", L, (BLOCK, 1), K * H, N * H, columns=H)
    to_keys = _product(module, "to_keys", L, (1, BLOCK), N * H, K * H, columns=H)

    def task(code: Code, t: _Task, others: list[Value]) -> None:
        o, most, total, do, dq, dk, dv = others
        weights = t.rest
        dscores = code.at(weights, BLOCK * BLOCK)
        means = code.at(dscores, BLOCK * BLOCK)
        t.turn(t.k, t.keys, shape.factor)
        t.turn(t.v, t.values)
        with code.loop(0, N // K) as g, code.loop(0, t.blocks) as i:
            head = t.head * (N // K) + g
            q, do_i, dq_i = (t.of_queries(x, head, i) for x in (t.q, do, dq))
            o_i = t.of_queries(o, head, i)
            most_i, total_i = t.of_each(most, head, i), t.of_each(total, head, i)
            with code.loop(0, t.size(i)) as r:
                # The mean of dweights under the weights (appendix B.2).
                sum_ = code.real(0.0, L)
                for h in range(0, H, L):
                    at = r * (N * H) + h
                    sum_ = code.fma(code.load(o_i, at, L), code.load(do_i, at, L), sum_)
                code.store(code.across(Value.__add__, sum_), means, r)
            with code.loop(t.first(i), i + 1) as j:
                turned = j * (BLOCK * H)
                depth, anew = code.number(H), code.yes(False)
                code.call(score, q, code.at(t.keys, turned), weights, t.size(i), depth, anew)
                code.call(score, do_i, code.at(t.values, turned), dscores, t.size(i), depth, anew)

                def soften(r: Value, sees: See | None) -> None:
                    """Scores of a query become weights, and dweights dscores."""
                    largest = code.splat(code.load(most_i, r), L)
                    share = code.splat(code.real(1.0) / code.load(total_i, r), L)
                    mean = code.splat(code.load(means, r), L)
                    for v in vectors:
                        at = r * BLOCK + v * L
                        weight = exp2(code, code.load(weights, at, L) - largest, L) * share
                        if sees is not None:
                            weight = code.select(sees(v), weight, code.real(0.0, L))
                        code.store(weight, weights, at)
                        dscore = weight * (code.load(dscores, at, L) - mean)
                        code.store(dscore * H**-0.5, dscores, at)

                t.visit(i, j, soften)
                k_j, dk_j, dv_j = (t.of_keys(x, j) for x in (t.k, dk, dv))
                code.call(to_q, dscores, k_j, dq_i, t.size(i), t.size(j), t.first(i) < j)
                # The first that meet a block of keys are the queries of its own.
                again = (code.number(0) < g) | (j < i)
                code.call(to_keys, dscores, q, dk_j, t.size(j), t.size(i), again)
                code.call(to_keys, weights, do_i, dv_j, t.size(j), t.size(i), again)

    return _program(shape, (8, 3), task)
