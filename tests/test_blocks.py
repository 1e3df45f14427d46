"""Tests for gptjax.layers.blocks: what blocks stand for, and products of them, by other means."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import sharding
from gptjax.layers import blocks
from gptjax.layers.blocks import KINDS, Blocks
from gptjax.layers.linear import linear, look_up

HEADS = {"Q8_0": 1, "Q4_0": 1, "Q4_1": 2}  # float16 numbers before the codes


def random(kind: str, *shape: int) -> Blocks:
    """Rows of so many weights: all codes that there are, factors of every size, some 0 or tiny."""
    rng = np.random.default_rng(0)
    *rows, summed = shape
    head = HEADS[kind]
    size = 2 * head + (32 if kind == "Q8_0" else 16)
    data = rng.integers(0, 256, (*rows, summed // 32, size), np.uint8)
    factors = rng.normal(size=(*data.shape[:-1], head)) * 10.0 ** rng.integers(-6, 1, (*rows, 1, 1))
    data[..., : 2 * head] = factors.astype(np.float16).view(np.uint8)
    return Blocks(jnp.asarray(data.reshape(*rows, -1)), kind)


def weight(kind: str, block: bytes, i: int) -> float:
    """The i-th weight of a block, exactly: ggml's documentation of block_q8_0 and its kin."""
    d, *m = np.frombuffer(block[: 2 * HEADS[kind]], "<f2").astype(float)
    codes = block[2 * HEADS[kind] :]
    if kind == "Q8_0":
        return d * (codes[i] - 256 if codes[i] > 127 else codes[i])
    code = codes[i] % 16 if i < 16 else codes[i - 16] // 16
    return d * (code - 8) if kind == "Q4_0" else d * code + m[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 32), (3, 2, 96)])
def test_weights_are_what_their_block_says(kind: str, shape: tuple[int, ...]) -> None:
    found = random(kind, *shape)
    cut = np.asarray(found.data).reshape(-1, KINDS[kind].bytes)
    exact = np.reshape([[weight(kind, b.tobytes(), i) for i in range(32)] for b in cut], shape)
    got = np.asarray(jax.jit(blocks.wide)(found))
    assert got.dtype == np.float32 and len(np.unique(got)) > (8 if kind != "Q8_0" else 20)
    np.testing.assert_array_equal(got, np.float32(exact))  # at most the sum is rounded, once


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_of_gguf_reads_the_same(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    found = random(kind, 5, 192)
    expected = gguf.dequantize(np.asarray(found.data), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(blocks.wide(found), expected)


# A kernel multiplies outputs by fours, however many rows; else XLA does.
@pytest.mark.parametrize("equation", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,VD->BTV"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rows, outputs, summed, by_kernel",
    [(1, 4, 32, True), (1, 3, 32, False), (128, 12, 64, True), (129, 6, 64, False)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_meet_blocks_as_they_are(
    equation: str, kind: str, rows: int, outputs: int, summed: int, by_kernel: bool, dtype: str
) -> None:
    """In float32 each term is rounded once, and each addition; in bfloat16 the result once more."""
    x_dims, _, y_dims = equation.replace("->", ",").split(",")
    of_x = {"D": summed} if "D" in x_dims else {"N": 2, "H": summed // 2}
    of_y = {"N": 1, "H": outputs} if "NH" in y_dims else {"D": outputs, "V": outputs}
    outs = [of_y[dim] for dim in y_dims[2:]]
    x = jax.random.normal(jax.random.key(0), (1, rows, *(of_x[d] for d in x_dims[2:])), dtype)
    kernel = random(kind, *outs, summed)
    written = jax.jit(sharding.phase("decoding")(lambda x, k: linear(equation, x, k)))
    assert ("gptjax_product" in written.lower(x, kernel).as_text()) == by_kernel
    w = np.asarray(blocks.wide(kernel), np.float64).reshape(outputs, summed)
    x_RK = np.asarray(x, np.float64).reshape(rows, summed)
    got = np.asarray(written(x, kernel), np.float64)
    assert got.shape == (1, rows, *outs)
    bound = summed * 2**-24 * (abs(x_RK) @ abs(w).T)
    if dtype == "bfloat16":  # where XLA multiplies, weights are rounded to it too
        bound += 2**-8 * (abs(x_RK) @ abs(w).T)
    assert (abs(got.reshape(rows, outputs) - x_RK @ w.T) <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_table_are_widened(kind: str) -> None:
    table, ids_BT = random(kind, 7, 64), jnp.asarray([[6, 0, 6]])
    got = look_up("dtype", table, "embedding", ids_BT, "BTD")
    np.testing.assert_array_equal(got, np.asarray(blocks.wide(table))[np.asarray(ids_BT)])
