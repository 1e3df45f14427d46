"""Causal attention of one token a row over a cache of keys, written for CPUs (`gptjax.native`).

XLA reads every slot of the cache, and copies what it multiplies. Here a task is a key-value head of a
row, of which only the keys are read that its query sees. So what a row gets depends neither on the
rows beside it, nor on threads, the room of the cache or how wide registers are.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import native, sharding
from gptjax.layers.flash import LEAST, LOWEST, exp2
from gptjax.layers.kernels import LANES, totals
from gptjax.layers.scores import Scores
from gptjax.native import I32, Code, Operand, Program, Value


def serves(q_BTNH: jax.Array, k_BSKH: jax.Array, scores: Scores) -> bool:
    """Whether `cached` computes these; with one device, a CPU, and without a gradient."""
    (_, T, _, H), plainly = q_BTNH.shape, scores.softcap is None and scores.slopes_N is None
    narrow = q_BTNH.dtype != jnp.float32 or k_BSKH.dtype != jnp.float32
    return T == 1 and plainly and not narrow and H % LANES == 0 and scores.q_segments_BT is None


def cached(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, scores: Scores) -> jax.Array:
    """`attention.plain` of one query a row, in float32."""
    program = functools.partial(_program, scores.window, q_BTNH.shape[3])
    name = native.register(f"cached_{scores.window}_{q_BTNH.shape[3]}", program)

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, index: jax.Array) -> jax.Array:
        (B, _, N, H), K = q.shape, k.shape[1]
        result = jax.ShapeDtypeStruct((B, K, N // K, H), jnp.float32)
        call = jax.ffi.ffi_call(name, result, vmap_method="sequential")
        return call(q.reshape(result.shape), k, v, jnp.broadcast_to(index[:, 0], B)).reshape(
            q.shape
        )

    keys, values = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)  # as the cache has them
    return sharding.on_device(
        kernel, sharding.like(q_BTNH), q_BTNH, keys, values, scores.q_index_BT
    )


# What follows writes the program. Memory is spoken of in float32 numbers.


def _program(window: int | None, H: int, module: Any) -> Program:
    def sizes(code: Code, operands: list[Operand]) -> tuple[Value, Value, Value]:
        """K, G, S."""
        q, k, *_ = operands
        return q.dim(code, 2), q.dim(code, 1), k.dim(code, 1)

    def tasks(code: Code, operands: list[Operand]) -> Value:
        return operands[0].before(code, 2)

    def memory(code: Code, operands: list[Operand]) -> Value:
        return (operands[1].dim(code, 1) + LANES) * 4

    def task(code: Code, operands: list[Operand], number: Value, weights: Value) -> None:
        q, k, v, index, o = (operand.data for operand in operands)
        K, G, S = sizes(code, operands)
        last = code.least(code.widen(code.load(index, number // K, kind=I32)), S - 1)
        first = code.number(0)
        if window is not None:
            first = last - (window - 1)
            first = code.select(first < 0, code.number(0), first)
        begin = first - first % LANES
        keys, values = (code.at(x, number * S * H) for x in (k, v))
        with code.loop(0, G) as g:
            q_g, o_g = (code.at(x, (number * G + g) * H) for x in (q, o))
            queries = [code.load(q_g, h, LANES) * H**-0.5 for h in range(0, H, LANES)]
            most = code.variable(code.real(LEAST, LANES))
            with code.loop(begin, last + 1, LANES) as s:
                sums = []
                for i in range(LANES):
                    key = code.at(keys, code.least(s + i, last) * H)
                    sum_ = code.real(0.0, LANES)
                    for h, part in enumerate(queries):
                        sum_ = code.fma(part, code.load(key, h * LANES, LANES), sum_)
                    sums.append(sum_)
                at = code.splat(code.narrow(s), LANES) + code.count(LANES)
                sees = at <= code.splat(code.narrow(last), LANES)
                sees = sees & (code.splat(code.narrow(first), LANES) <= at)
                score = totals(code, sums) * math.log2(math.e)
                score = code.select(sees, score, code.real(LOWEST, LANES))
                most.set(code.largest(most.get(), score))
                code.store(score, weights, s - begin)
            largest = code.splat(code.across(code.largest, most.get()), LANES)
            total = code.variable(code.real(0.0, LANES))
            with code.loop(begin, last + 1, LANES) as s:
                weight = exp2(code, code.load(weights, s - begin, LANES) - largest, LANES)
                code.store(weight, weights, s - begin)
                total.set(total.get() + weight)
            share = code.real(1.0) / code.across(Value.__add__, total.get())
            means = [code.variable(code.real(0.0, LANES)) for _ in queries]
            with code.loop(first, last + 1) as s:
                weight = code.splat(code.load(weights, s - begin), LANES)
                for h, mean in enumerate(means):
                    value = code.load(values, s * H + h * LANES, LANES)
                    mean.set(code.fma(weight, value, mean.get()))
            for h, mean in enumerate(means):
                code.store(mean.get() * code.splat(share, LANES), o_g, h * LANES)

    return Program((4, 1), tasks, memory, task)
