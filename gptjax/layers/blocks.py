"""Weights in blocks of 32 that share a factor, as GGUF files hold them, and what they stand for.

A block is one or two float16 numbers, d and m, and a code of each weight, which is d code, or
d code + m. Bytes lie as llama.cpp's do (block_q8_0 and its kin in ggml/src/ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

SIZE = 32


def _bytes(codes: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes, jnp.int8)


def _nibbles(codes: jax.Array) -> jax.Array:
    """The lower halves of all bytes, then the upper."""
    return jnp.concatenate([codes & 15, codes >> 4], axis=-1).astype(jnp.int8)


class Row(NamedTuple):
    """A kind of block.

    Attributes:
        factors: float16 numbers that it begins with: d, or d and m.
        bytes: of it all.
        codes: of the bytes that follow (..., n), whole numbers (..., 32).
    """

    factors: int
    bytes: int
    codes: Callable[[jax.Array], jax.Array]


KINDS: dict[str, Row] = {
    "Q8_0": Row(1, 34, _bytes),
    "Q4_0": Row(1, 18, lambda codes: _nibbles(codes) - 8),
    "Q4_1": Row(2, 20, _nibbles),
}


class Blocks(struct.PyTreeNode):
    """A matrix whose rows, the weights of one output, are blocks.

    Attributes:
        data: uint8, the outputs' dims and then a row's bytes.
        kind: a row of `KINDS`.
    """

    data: jax.Array
    kind: str = struct.field(pytree_node=False)


def wide(blocks: Blocks) -> jax.Array:
    """The weights, float32, each row in one dim: exact, but for one rounding where there is an m."""
    row, rows = KINDS[blocks.kind], blocks.data.shape[:-1]
    data = blocks.data.reshape(*rows, -1, row.bytes)
    head, codes = data[..., : 2 * row.factors], data[..., 2 * row.factors :]
    halves = jax.lax.bitcast_convert_type(head.reshape(*head.shape[:-1], -1, 2), jnp.float16)
    d, *m = jnp.split(halves.astype(jnp.float32), row.factors, axis=-1)
    weights = sum(m, d * row.codes(codes).astype(jnp.float32))
    return weights.reshape(*rows, -1)
