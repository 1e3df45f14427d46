"""Normalisation and sums of softmax in float32 for CPUs, row by row, each of which stays in the cache.

XLA makes loops over whole arrays, one for each sum. `layers.norm` and `losses` say what is computed;
compiled by `gptjax.native`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import native
from gptjax.layers.flash import exp2
from gptjax.layers.kernels import LANES
from gptjax.native import F32, I32, Code, Operand, Program, Value

ROWS = 64  # of a task
PART = 256  # columns whose sum is taken apart: of 50,000 in one the last roundings are too large


def serves(width: int) -> bool:
    return width % 8 == 0 and width > 0


def forward(
    x: jax.Array, gain_D: jax.Array, eps: float, centre: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y of x's shape (..., D), and of each row its mean, 0 if it is not to be taken off, and scale."""
    D, rows = x.shape[-1], x.shape[:-1]
    name = f"rows_normalise_{eps!r}_{centre:d}_{_lanes(D)}"
    name = native.register(name, functools.partial(_forward_program, eps, centre, _lanes(D)))
    x_RD = x.reshape(-1, D)
    whole, each = _like(x_RD), jax.ShapeDtypeStruct(x_RD.shape[:1], jnp.float32)
    call = jax.ffi.ffi_call(name, (whole, each, each), vmap_method="sequential")
    y, mean, scale = call(x_RD, gain_D)
    return y.reshape(x.shape), mean.reshape(*rows, 1), scale.reshape(*rows, 1)


def backward(
    x: jax.Array,
    gain_D: jax.Array,
    mean: jax.Array,
    scale: jax.Array,
    dy: jax.Array,
    centre: bool,
) -> tuple[jax.Array, jax.Array]:
    """dx and dgain_D of what `forward` gave."""
    D = x.shape[-1]
    name = f"rows_normalise_backward_{centre:d}_{_lanes(D)}"
    name = native.register(name, functools.partial(_backward_program, centre, _lanes(D)))
    x_RD, dy_RD = x.reshape(-1, D), dy.reshape(-1, D)
    of_gain = jax.ShapeDtypeStruct((-(-len(x_RD) // ROWS), D), jnp.float32)
    call = jax.ffi.ffi_call(name, (_like(x_RD), of_gain), vmap_method="sequential")
    dx, dgain = call(x_RD, gain_D, mean.ravel(), scale.ravel(), dy_RD)
    return dx.reshape(x.shape), dgain.sum(0)


def softmax_sums(
    logits_RC: jax.Array, target_R: jax.Array, stale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each row the largest logit, the sum of exp(logit - largest), and the target's logit.

    Args:
        logits_RC: float32, of 16 columns or more.
        target_R: int32, a column each; of one that is not counted or none the logit is 0.
        stale: int32, so many columns, fewer than all, come first that do not count.
    """
    name = native.register("rows_softmax_sums", _softmax_program)
    each = jax.ShapeDtypeStruct(target_R.shape, jnp.float32)
    call = jax.ffi.ffi_call(name, (each, each, each), vmap_method="sequential")
    top_R, total_R, logit_R = call(logits_RC, target_R, stale)
    return top_R, total_R, logit_R


def softmax_gradient(
    logits_RC: jax.Array,
    target_R: jax.Array,
    stale: jax.Array,
    log_z_R: jax.Array,
    factor_R: jax.Array,
    of_target_R: jax.Array,
) -> jax.Array:
    """d_RC, factor exp(logit - log_z), at the target less of_target; written in the logits' place.

    Args:
        logits_RC: float32, of C columns, a multiple of `LANES`.
        target_R: int32, as in `softmax_sums`.
        stale: int32, as there; of columns that do not count d is 0.
        log_z_R: float32, the logarithm of the sum of exp(logit).
        factor_R: float32.
        of_target_R: float32.
    """
    name = native.register("rows_softmax_gradient", _softmax_gradient_program)
    call = jax.ffi.ffi_call(
        name, _like(logits_RC), vmap_method="sequential", input_output_aliases={0: 0}
    )
    d_RC: jax.Array = call(logits_RC, target_R, stale, log_z_R, factor_R, of_target_R)
    return d_RC


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _lanes(D: int) -> int:
    return math.gcd(D, native.machine().lanes)


# What follows writes the programs. Operands are arrays of R rows of D, vectors D and numbers R.


def _sizes(code: Code, operands: list[Operand]) -> tuple[Value, Value]:
    return operands[0].dim(code, 1), operands[0].dim(code, 0)


def _tasks(code: Code, operands: list[Operand]) -> Value:
    R, _ = _sizes(code, operands)
    return (R + (ROWS - 1)) // ROWS


def _rows(code: Code, number: Value, R: Value) -> Any:
    return code.loop(number * ROWS, code.least((number + 1) * ROWS, R))


def _share(code: Code, D: Value) -> Value:
    """1 / D."""
    return code.real(1.0) / Value(code.builder, code.builder.sitofp(D.of, F32))


def _forward_program(eps: float, centre: bool, L: int, module: Any) -> Program:
    def task(code: Code, operands: list[Operand], number: Value, memory: Value) -> None:
        R, D = _sizes(code, operands)
        x, gain, y, means, scales = (operand.data for operand in operands)
        share = _share(code, D)
        with _rows(code, number, R) as r:
            x_r, y_r = code.at(x, r * D), code.at(y, r * D)
            mean = code.real(0.0)
            if centre:
                sums = code.variable(code.real(0.0, L))
                with code.loop(0, D, L) as d:
                    sums.set(sums.get() + code.load(x_r, d, L))
                mean = code.across(Value.__add__, sums.get()) * share
            means_L = code.splat(mean, L)
            squares = code.variable(code.real(0.0, L))
            with code.loop(0, D, L) as d:
                off = code.load(x_r, d, L) - means_L
                squares.set(code.fma(off, off, squares.get()))
            square = code.across(Value.__add__, squares.get()) * share + eps
            scale = code.real(1.0) / code.intrinsic("llvm.sqrt.f32", F32, square)
            code.store(mean, means, r)
            code.store(scale, scales, r)
            scales_L = code.splat(scale, L)
            with code.loop(0, D, L) as d:
                unit = (code.load(x_r, d, L) - means_L) * scales_L
                code.store(unit * code.load(gain, d, L), y_r, d)

    return Program((2, 3), _tasks, native.no_memory, task)


def _backward_program(centre: bool, L: int, module: Any) -> Program:
    def task(code: Code, operands: list[Operand], number: Value, memory: Value) -> None:
        R, D = _sizes(code, operands)
        x, gain, means, scales, dy, dx, dgain = (operand.data for operand in operands)
        share = _share(code, D)
        dgain_n = code.at(dgain, number * D)
        with code.loop(0, D, L) as d:
            code.store(code.real(0.0, L), dgain_n, d)
        with _rows(code, number, R) as r:
            x_r, dy_r, dx_r = (code.at(array, r * D) for array in (x, dy, dx))
            mean, scale = (code.splat(code.load(array, r), L) for array in (means, scales))
            along, plain = (code.variable(code.real(0.0, L)) for _ in range(2))
            with code.loop(0, D, L) as d:
                unit = (code.load(x_r, d, L) - mean) * scale
                back = code.load(dy_r, d, L)
                code.store(code.fma(back, unit, code.load(dgain_n, d, L)), dgain_n, d)
                back = back * code.load(gain, d, L)
                along.set(code.fma(back, unit, along.get()))
                if centre:
                    plain.set(plain.get() + back)
            of_unit, of_all = (
                code.splat(code.across(Value.__add__, sums.get()) * share, L)
                for sums in (along, plain)
            )
            with code.loop(0, D, L) as d:
                unit = (code.load(x_r, d, L) - mean) * scale
                back = code.load(dy_r, d, L) * code.load(gain, d, L) - unit * of_unit
                if centre:
                    back = back - of_all
                code.store(back * scale, dx_r, d)

    return Program((5, 2), _tasks, native.no_memory, task)


def _softmax_program(module: Any) -> Program:
    def task(code: Code, operands: list[Operand], number: Value, memory: Value) -> None:
        logits, targets, stale, tops, totals, of_targets = (operand.data for operand in operands)
        R, C = _sizes(code, operands)
        begin = code.widen(code.load(stale, kind=I32))
        with _rows(code, number, R) as r:
            row = code.at(logits, r * C)

            def counted(c: Value) -> Value:
                """The logits from c on; at the end of the row those that were met before are none."""
                at = code.least(c, C - LANES)
                met = code.count(LANES) < code.splat(code.narrow(c - at), LANES)
                return code.select(met, code.real(-math.inf, LANES), code.load(row, at, LANES))

            most = code.variable(code.real(-math.inf, LANES))
            with code.loop(begin, C, LANES) as c:
                most.set(code.largest(most.get(), counted(c)))
            top = code.across(code.largest, most.get())
            sums = code.variable(code.real(0.0, LANES))
            with code.loop(begin, C, PART) as part:
                of_part = code.variable(code.real(0.0, LANES))
                with code.loop(part, code.least(part + PART, C), LANES) as c:
                    below = counted(c) - code.splat(top, LANES)
                    of_part.set(of_part.get() + exp2(code, below * math.log2(math.e), LANES))
                sums.set(sums.get() + of_part.get())
            target = code.widen(code.load(targets, r, kind=I32))
            found = (begin <= target) & (target < C)
            logit = code.load(row, code.select(found, target, begin))
            code.store(top, tops, r)
            code.store(code.across(Value.__add__, sums.get()), totals, r)
            code.store(code.select(found, logit, code.real(0.0)), of_targets, r)

    return Program((3, 3), _tasks, native.no_memory, task)


def _softmax_gradient_program(module: Any) -> Program:
    def task(code: Code, operands: list[Operand], number: Value, memory: Value) -> None:
        arrays = (operand.data for operand in operands)
        logits, targets, stale, log_zs, factors, of_targets, gradients = arrays
        R, C = _sizes(code, operands)
        begin = code.widen(code.load(stale, kind=I32))
        none = code.real(0.0, LANES)
        with _rows(code, number, R) as r:
            row, d_r = code.at(logits, r * C), code.at(gradients, r * C)
            log_z, factor = (code.splat(code.load(each, r), LANES) for each in (log_zs, factors))
            with code.loop(0, C, LANES) as c:
                logit = (code.load(row, c, LANES) - log_z) * math.log2(math.e)
                stale_c = code.count(LANES) < code.splat(code.narrow(begin - c), LANES)
                d = factor * exp2(code, logit, LANES)
                code.store(code.select(stale_c, none, d), d_r, c)
            target = code.widen(code.load(targets, r, kind=I32))
            with code.when((begin <= target) & (target < C)):
                code.store(code.load(d_r, target) - code.load(of_targets, r), d_r, target)

    return Program((6, 1), _tasks, native.no_memory, task)
