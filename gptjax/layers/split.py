"""Attention of rows that are split over devices: queries stay, and see whole rows of keys.

`gptjax.layers.attention` gathers these keys and values.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.layers.scores import Scores, on_shards
from gptjax.sharding import ways

TILE = 512  # queries and keys of a step of `pairs` at most


def visits(order_T: np.ndarray, shards: int, window: int | None) -> tuple[int, list[np.ndarray]]:
    """For each shard of the queries, the pairs of tiles of which some query may see some key.

    Args:
        order_T: each query's index. A shard has two pieces of consecutive ones.
        window: as of `Scores`.

    Returns:
        The size of a tile, and for each shard int32 (pairs, 2): at which of its queries a tile
        begins, and at which key.
    """
    piece = len(order_T) // (2 * shards)
    tile = next(size for size in range(min(piece, TILE), 0, -1) if piece % size == 0)
    first_SI = order_T.reshape(shards, -1, tile)[:, :, 0, None]
    key_J = np.arange(0, len(order_T), tile)
    sees_SIJ = key_J <= first_SI
    if window is not None:
        sees_SIJ &= first_SI - (key_J + tile - 1) < window
    return tile, [np.argwhere(sees_IJ).astype(np.int32) * tile for sees_IJ in sees_SIJ]


def pairs(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, scores: Scores) -> jax.Array:
    """`plain` of rows that are split: each device takes one pair of tiles after another that it sees.

    It holds the scores of one pair: the softmax is merged over pairs by a running maximum and sum
    (Milakov & Gimelshein 2018, arXiv:1805.02867), and the backward pass computes scores again (Dao
    et al. 2022, arXiv:2205.14135, appendix B.2). All devices take as many steps as the one with
    most pairs: in the order of `sharding.balanced` all have as many, but for a window, with which
    the most are 4/3 of the mean or less.
    """
    T, H, window = q_BTNH.shape[1], q_BTNH.shape[3], scores.window
    order_T = np.arange(T, dtype=np.int32) if scores.order_T is None else scores.order_T
    tile, lists = visits(order_T, ways("T"), window)
    most = max(map(len, lists))
    # Of each shard and step: where the two tiles begin, and whether there is anything to do.
    steps = np.zeros((len(lists), most, 3), np.int32)
    for of_shard, visited in zip(steps, lists, strict=True):
        of_shard[: len(visited)] = np.pad(visited, ((0, 0), (0, 1)), constant_values=1)

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, *told: Any) -> jax.Array:
        q_BKGTH = (q * H**-0.5).reshape(*q.shape[:2], k.shape[2], -1, H).transpose(0, 2, 3, 1, 4)
        kv = k.swapaxes(1, 2), v.swapaxes(1, 2)
        o_BKGTH = _pairs(tile, scores.softcap, window, q_BKGTH, *kv, _Told(*told))
        return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q.shape)

    slopes_N = scores.slopes_N
    return on_shards(
        kernel,
        (q_BTNH, "BTNH"),
        (k_BSKH, "BSKH"),
        (v_BSKH, "BSKH"),
        (jnp.asarray(steps.reshape(-1, 3)), "T1"),
        (jnp.asarray(order_T), "T"),
        (scores.q_segments_BT, "BT"),
        (scores.k_segments_BS, "BS"),
        (None if slopes_N is None else jnp.asarray(slopes_N), "N"),
    )


class _Told(NamedTuple):
    """What `_pairs` is told on a device: its steps, and what `Scores` says of its queries."""

    steps: jax.Array  # int32 (steps, 3)
    index_T: jax.Array
    q_segments_BT: jax.Array | None
    k_segments_BS: jax.Array | None
    slopes_N: jax.Array | None


class _Pair(NamedTuple):
    """The scores of a pair of tiles, float32."""

    scores_BKGTS: jax.Array  # with softcap and bias
    slope_BKGTS: jax.Array | None  # of the softcap
    mask_BTS: jax.Array


_PairResiduals = tuple[jax.Array, jax.Array, jax.Array, _Told, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _pairs(
    tile: int,
    softcap: float | None,
    window: int | None,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    told: _Told,
) -> jax.Array:
    """o_BKGTH of a device's queries, which are scaled."""
    return _pairs_forward(tile, softcap, window, q_BKGTH, k_BKSH, v_BKSH, told)[0]


def _pairs_forward(
    tile: int,
    softcap: float | None,
    window: int | None,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    told: _Told,
) -> tuple[jax.Array, _PairResiduals]:
    lowest = jnp.finfo(jnp.float32).min

    def step(carry: Any, where: jax.Array) -> tuple[Any, None]:
        t, s, _ = where
        pair = _pair(tile, softcap, window, q_BKGTH, k_BKSH, told, where)
        o_BKGTH, top_BKGT, total_BKGT = (_tile(x, t, tile, 3) for x in carry)
        scores_BKGTS = jnp.where(pair.mask_BTS[:, None, None], pair.scores_BKGTS, lowest)
        new_top_BKGT = jnp.maximum(top_BKGT, scores_BKGTS.max(-1))
        weights_BKGTS = jnp.exp(scores_BKGTS - new_top_BKGT[..., None])
        # Of a query that has seen nothing yet, the maximum is as low as what is masked.
        weights_BKGTS = jnp.where(pair.mask_BTS[:, None, None], weights_BKGTS, 0)
        kept_BKGT = jnp.exp(top_BKGT - new_top_BKGT)
        v = _tile(v_BKSH, s, tile, 2)
        new_BKGTH = _sum("BKGTS,BKSH->BKGTH", weights_BKGTS.astype(v.dtype), v)
        new = (
            kept_BKGT[..., None] * o_BKGTH + new_BKGTH,
            new_top_BKGT,
            kept_BKGT * total_BKGT + weights_BKGTS.sum(-1),
        )
        return tuple(_put(x, n, t, 3) for x, n in zip(carry, new, strict=True)), None

    o_BKGTH, total_BKGT = jnp.zeros(q_BKGTH.shape), jnp.zeros(q_BKGTH.shape[:-1])
    nothing = o_BKGTH, jnp.full_like(total_BKGT, lowest), total_BKGT
    (o_BKGTH, top_BKGT, total_BKGT), _ = jax.lax.scan(step, nothing, told.steps)
    o_BKGTH = (o_BKGTH / total_BKGT[..., None]).astype(v_BKSH.dtype)
    log_total_BKGT = top_BKGT + jnp.log(total_BKGT)
    return o_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, told, o_BKGTH, log_total_BKGT)


def _pairs_backward(
    tile: int,
    softcap: float | None,
    window: int | None,
    residuals: _PairResiduals,
    do_BKGTH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BKGTH, k_BKSH, v_BKSH, told, o_BKGTH, log_total_BKGT = residuals
    mean_BKGT = jnp.sum(do_BKGTH.astype(jnp.float32) * o_BKGTH.astype(jnp.float32), axis=-1)

    def step(carry: Any, where: jax.Array) -> tuple[Any, None]:
        dq_BKGTH, dk_BKSH, dv_BKSH = carry
        t, s, _ = where
        pair = _pair(tile, softcap, window, q_BKGTH, k_BKSH, told, where)
        q, do, log_total, mean = (
            _tile(x, t, tile, 3) for x in (q_BKGTH, do_BKGTH, log_total_BKGT, mean_BKGT)
        )
        k, v = (_tile(x, s, tile, 2) for x in (k_BKSH, v_BKSH))
        weights_BKGTS = jnp.exp(pair.scores_BKGTS - log_total[..., None])
        weights_BKGTS = jnp.where(pair.mask_BTS[:, None, None], weights_BKGTS, 0)
        dweights_BKGTS = _sum("BKGTH,BKSH->BKGTS", do, v)
        dscores_BKGTS = weights_BKGTS * (dweights_BKGTS - mean[..., None])
        if pair.slope_BKGTS is not None:
            dscores_BKGTS *= pair.slope_BKGTS
        dscores_BKGTS = dscores_BKGTS.astype(q.dtype)
        dq = _sum("BKGTS,BKSH->BKGTH", dscores_BKGTS, k)
        dk = _sum("BKGTS,BKGTH->BKSH", dscores_BKGTS, q)
        dv = _sum("BKGTS,BKGTH->BKSH", weights_BKGTS.astype(do.dtype), do)
        return (
            _put(dq_BKGTH, _tile(dq_BKGTH, t, tile, 3) + dq, t, 3),
            _put(dk_BKSH, _tile(dk_BKSH, s, tile, 2) + dk, s, 2),
            _put(dv_BKSH, _tile(dv_BKSH, s, tile, 2) + dv, s, 2),
        ), None

    inputs = q_BKGTH, k_BKSH, v_BKSH
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in inputs)
    (dq, dk, dv), _ = jax.lax.scan(step, zeros, told.steps)
    return dq.astype(q_BKGTH.dtype), dk.astype(k_BKSH.dtype), dv.astype(v_BKSH.dtype), None


def _pair(
    tile: int,
    softcap: float | None,
    window: int | None,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    told: _Told,
    where: jax.Array,
) -> _Pair:
    t, s, counts = where
    q, k = _tile(q_BKGTH, t, tile, 3), _tile(k_BKSH, s, tile, 2)
    scores_BKGTS = _sum("BKGTH,BKSH->BKGTS", q, k)
    slope_BKGTS = None
    if softcap is not None:
        tanh_BKGTS = jnp.tanh(scores_BKGTS / softcap)
        scores_BKGTS, slope_BKGTS = softcap * tanh_BKGTS, 1 - tanh_BKGTS**2
    segments = told.q_segments_BT, told.k_segments_BS
    q_segments_BT, k_segments_BS = (
        None if x is None else _tile(x, at, tile, 1) for x, at in zip(segments, (t, s), strict=True)
    )
    rules = Scores(
        q_index_BT=_tile(told.index_T, t, tile, 0)[None],
        k_index_BS=s + jnp.arange(tile)[None],
        q_segments_BT=q_segments_BT,
        k_segments_BS=k_segments_BS,
        window=window,
        slopes_N=told.slopes_N,
    )
    bias = rules.bias()
    if bias is not None:
        scores_BKGTS += bias.reshape(-1, *scores_BKGTS.shape[1:])
    return _Pair(scores_BKGTS, slope_BKGTS, rules.visible() & (counts == 1))


def _tile(x: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _put(x: jax.Array, new: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis)


def _sum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The einsum in float32, on a device."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


_pairs.defvjp(_pairs_forward, _pairs_backward)
