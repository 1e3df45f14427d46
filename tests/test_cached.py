"""Tests for gptjax.layers.cached: parity with the plain kernel, and what a row does not depend on."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import native, sharding
from gptjax.config import Mesh
from gptjax.layers import attention, cached
from gptjax.layers.scores import Scores
from tests import tiny

B, S, K, G, H = 5, 100, 2, 3, 32
INDEX = [0, 15, 16, 57, 99]  # the first and the last slot, and ends of what is read at once


def operands() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = (B, 1, K * G, H), (B, S, K, H), (B, S, K, H)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return 4 * q, k, v, jnp.asarray(INDEX, jnp.int32)[:, None]


def attend(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, index: jax.Array
) -> jax.Array:
    scores = Scores(index, jnp.arange(k.shape[1])[None], window=window, cached=True)
    return attention.attend(tiny.model(), q, k, v, scores)


@pytest.mark.parametrize("window, mesh", [(None, False), (1, False), (20, True)])
def test_a_query_gets_what_the_plain_kernel_gives(window: int | None, mesh: bool) -> None:
    """On a mesh of one device too."""
    operand, attends = operands(), functools.partial(attend, window)
    plain, by_kernel = jax.jit(attends), jax.jit(sharding.phase("decoding")(attends))
    assert "gptjax_cached" not in plain.lower(*operand).as_text()
    expected = plain(*operand)
    with jax.set_mesh(tiny.mesh_of(Mesh(1, 1, 1, 1, 1))) if mesh else contextlib.nullcontext():
        assert "gptjax_cached" in by_kernel.lower(*operand).as_text()
        # Scores of up to 40 are rounded to 2e-6, and weights by as much; their values are below 5.
        np.testing.assert_allclose(by_kernel(*operand), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_a_row_depends_on_nothing_but_what_it_sees(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on rows beside it, the cache's room, what lies there, or how wide registers are."""
    q, k, v, index = operands()
    run = sharding.phase("decoding")(functools.partial(attend, window))
    whole = np.asarray(run(q, k, v, index))
    for machine in (native.machine(), native.Machine(4, 16), native.Machine(8, 8)):
        monkeypatch.setattr(native, "machine", lambda machine=machine: machine)
        for b, last in enumerate(INDEX):
            for room in {last + 1, 70, S + 28} - set(range(last + 1)):
                pad = ((0, 0), (0, max(0, room - S)), (0, 0), (0, 0))
                first = 0 if window is None else max(0, last - window + 1)
                hidden = (np.arange(room) > last) | (np.arange(room) < first)
                keys, values = (
                    jnp.where(hidden[:, None, None], jnp.nan, jnp.pad(x[b : b + 1], pad)[:, :room])
                    for x in (k, v)
                )
                one = run(q[b : b + 1], keys, values, index[b : b + 1])
                np.testing.assert_array_equal(one, whole[b : b + 1])


def test_what_the_kernel_does_not_serve() -> None:
    q, k, _, index = operands()
    plain = Scores(index, jnp.arange(S)[None], cached=True)
    assert cached.serves(q, k, plain)
    assert not cached.serves(q[..., :24], k[..., :24], plain)
    assert not cached.serves(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), plain)
    assert not cached.serves(jnp.concatenate([q, q], 1), k, plain)
    for change in ({"softcap": 30.0}, {"slopes_N": np.ones(6)}):
        assert not cached.serves(q, k, Scores(index, jnp.arange(S)[None], cached=True, **change))
