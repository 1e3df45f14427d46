"""Tests for gptjax.layers.kernels: exact sums, bits of a row beside others, and who calls them."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import native, sharding
from gptjax.config import Mesh
from gptjax.layers import blocks, kernels
from gptjax.layers.linear import _round, keep, linear, turn
from gptjax.layers.parameter import Spec
from tests import test_blocks, tiny

DTYPES = list(kernels.kinds())


def operands(dtype: str, rows: int, summed: int, outputs: int) -> tuple[Any, ...]:
    """Of int8 all numbers that there are, the largest sums, and scales."""
    rng = np.random.default_rng(0)
    if dtype in blocks.KINDS:
        x = jnp.asarray(rng.normal(size=(rows, summed)), jnp.float32)
        return x, test_blocks.random(dtype, outputs, summed)
    if dtype != "int8":
        return tuple(jnp.asarray(rng.normal(size=(n, summed)), dtype) for n in (rows, outputs))
    x, w = (rng.integers(-127, 128, (n, summed), np.int8) for n in (rows, outputs))
    x[-1], w[:2] = 127, [[127], [-127]]
    return x, w, *(rng.uniform(0.01, 1, n).astype(np.float32) for n in (rows, outputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("summed, outputs", [(64, 4), (576, 196), (8192, 12), (192, 4096)])
def test_a_kernel_sums(dtype: str, summed: int, outputs: int) -> None:
    """int8 exactly; else each term of a lane is rounded once, and so is each addition of lanes."""
    most = min(128, kernels.kinds()[dtype].rows)
    x, w, *scales = operands(dtype, most, summed, outputs)
    got = np.asarray(jax.jit(kernels.product)(x, w, *scales))
    wide = w
    if isinstance(w, blocks.Blocks):
        wide = blocks.wide(w)  # multiplied as it is, to the last bit
        np.testing.assert_array_equal(got, kernels.product(x, wide))
    x64, w64 = (np.asarray(operand, np.float64) for operand in (x, wide))
    if scales:
        scale = scales[0][:, None] * scales[1]
        np.testing.assert_array_equal(got, np.float32(x64 @ w64.T) * scale)
    else:
        steps = summed / kernels.LANES + math.log2(kernels.LANES)
        bound = steps * 2**-24 * (np.abs(x64) @ np.abs(w64).T)
        assert (np.abs(got - x64 @ w64.T) <= bound).all()
    for rows in (1, 2, 3, 5, 8, 13, 21):  # beside others a row has the same bits
        assert kernels.serves(dtype, rows, summed, outputs)
        some = [scales[0][-rows:], scales[1]] if scales else []
        np.testing.assert_array_equal(kernels.product(x[-rows:], w, *some), got[-rows:])


@pytest.mark.parametrize("rows", [7, 400])  # for one task, and for several
def test_rows_are_rounded_to_the_bits_of_xla(rows: int) -> None:
    x = np.random.default_rng(0).normal(size=(rows, 192)).astype(np.float32)
    x[1], x[2, 5], x[3] = 0, np.nan, np.arange(192) - 95.5  # ties
    values, scale = kernels.rounded(jnp.asarray(x))
    expected = jax.jit(lambda x: _round(x, jnp.int8, [1]))(x)
    finite = np.isfinite(scale)
    assert np.flatnonzero(~finite).tolist() == [2]
    np.testing.assert_array_equal(np.isfinite(expected.scale[:, 0]), finite)
    np.testing.assert_array_equal(scale[finite], expected.scale[finite, 0])
    np.testing.assert_array_equal(values[finite], expected.values[finite])


def test_registers_of_every_width_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what any processor can do, where this one may have instructions of its own."""
    pairs = kernels.kinds()["int8"]._replace(add=kernels._int8, shifted=False)
    plain = {"int8": pairs, "Q4_0": kernels._in_blocks("Q4_0", kernels._nibbles, moved=-8)}
    plain["Q4_1"] = kernels._in_blocks("Q4_1", kernels._nibbles)
    for machine in (native.Machine(4, 16), native.Machine(8, 8)):
        monkeypatch.setattr(native, "machine", lambda machine=machine: machine)
        for how, kinds in (("special", kernels.kinds()), ("plain", plain)):
            for key, kind in kinds.items():
                x, w, *scales = operands(key, 5, 192, 8)
                name = native.register(
                    f"test_{how}_{key}", functools.partial(kernels._program, kind)
                )
                call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((5, 8), jnp.float32))
                expected = kernels.product(x, w, *scales)
                held = w.data if isinstance(w, blocks.Blocks) else w
                np.testing.assert_array_equal(call(x.astype(kind.x), held, *scales), expected)


@pytest.mark.parametrize(
    "dtype, rows, summed, outputs",
    [
        *((name, k.rows + 1, 64, 4) for name, k in kernels.kinds().items() if k.rows < math.inf),
        ("int8", 1, 96, 4),
        ("float32", 1, 24, 4),
        ("bfloat16", 1, 16, 6),
        ("float16", 1, 64, 4),
        ("Q4_1", 1, 48, 4),
        ("Q4_1", 1, 64, 6),
    ],
)
def test_what_no_kernel_serves(dtype: str, rows: int, summed: int, outputs: int) -> None:
    assert not kernels.serves(dtype, rows, summed, outputs)


@pytest.mark.parametrize("equation", ["BTD,DNH->BTNH", "BTNX,NXD->BTD", "BTD,VD->BTV"])
@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize(
    "products, dtype, far",
    # Sums of int8 are exact; of float32 each side rounds its own; bfloat16 rounds to one nearby.
    [("int8", "float32", 0.0), ("dtype", "float32", 1e-4), ("dtype", "bfloat16", 2**-4)],
)
def test_tokens_are_written_by_the_kernels(
    equation: str, mesh: bool, products: str, dtype: str, far: float
) -> None:
    """With weights that are turned, and a table that lies so; on a mesh of one device too."""
    sizes = {"B": 1, "T": 1, "D": 64, "N": 2, "H": 32, "X": 32, "V": 48}
    x_dims, dims, y_dims = equation.replace("->", ",").split(",")
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.asarray(rng.normal(size=[sizes[d] for d in part]), dtype) for part in (x_dims, dims)
    )
    fan_in = "".join(d for d in dims if d in x_dims and d not in y_dims)
    role = "embedding" if "V" in dims else "matrix"
    dims, fan_in = (part.replace("X", "H") for part in (dims, fan_in))
    spec = Spec(kernel.shape, dims, 0.0, 1.0, role, fan_in)

    def multiply(x: jax.Array, kept: Any) -> jax.Array:
        return linear(equation, x, kept, products)

    plain = keep(products, spec, kernel)
    expected = jax.jit(multiply)(x, plain)
    written = jax.jit(sharding.phase("decoding")(multiply))
    with jax.set_mesh(tiny.mesh_of(Mesh(1, 1, 1, 1, 1))) if mesh else contextlib.nullcontext():
        with sharding.phase("decoding"):
            kept = turn(spec, plain)
        assert (kept is plain) == (role == "embedding") and turn(spec, plain) is plain
        assert "gptjax_product" in written.lower(x, kept).as_text()
        np.testing.assert_allclose(
            np.float32(written(x, kept)), np.float32(expected), rtol=0, atol=far
        )
