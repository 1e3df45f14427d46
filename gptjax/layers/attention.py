"""Causal self-attention: the kernels that compute it, the module.

A kernel is a function (q_BTNH, k_BSKH, v_BSKH, Scores) -> o_BTNH. `Scores` says everything
about visibility and score changes, so a new kernel is one function and one row of `ATTENTION`.
The row says what the kernel cannot do: there `auto` takes another, and its own name is refused.

Where a row is split over devices, queries stay where they are and keys and values are gathered.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding

from gptjax import parametrisation
from gptjax.config import ConfigError, Model, choose
from gptjax.layers import cached
from gptjax.layers.context import Cache, Context
from gptjax.layers.flash import flash
from gptjax.layers.linear import by_kernels, linear
from gptjax.layers.norm import HeadNorm, row_sums
from gptjax.layers.parameter import add_bias, parameter
from gptjax.layers.position import POSITION, ROPE_SCALING
from gptjax.layers.scores import Kernel, Scores, on_shards
from gptjax.layers.split import pairs
from gptjax.sharding import gather_sequence, out, spec, ways


def plain(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, scores: Scores) -> jax.Array:
    """Scaled dot-product attention with grouped heads, all scores at once in memory.

    Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023. Scores and softmax
    are float32.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS",
        q_BTKGH * H**-0.5,
        k_BSKH,
        preferred_element_type=jnp.float32,
        out_sharding=out("BKGTS"),
    )
    if scores.softcap is not None:
        scores_BKGTS = scores.softcap * jnp.tanh(scores_BKGTS / scores.softcap)
    bias = scores.bias()
    if bias is not None:
        # A row count of 1 stands for all rows, so the split into groups is spelled out.
        scores_BKGTS += bias.reshape(-1, K, N // K, *bias.shape[2:])
    mask_BTS = scores.visible()
    # The lowest finite value, not -inf: a padded row that sees nothing stays finite.
    lowest = jnp.finfo(jnp.float32).min
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, lowest)
    scores_BKGTS = scores.tap("scores", scores_BKGTS)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    weights_BKGTS = scores.tap("weights", weights_BKGTS)
    o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH, out_sharding=out("BTKGH"))
    # With one key-value head jax would forget that the heads may be split.
    return jnp.reshape(o_BTKGH, (B, T, N, H), out_sharding=out("BTNH"))


TILES = "tiles"  # `model.attention` of whoever reads a cache by `tiles`
TILE = 128  # keys a step of `tiles`


def tiles(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, scores: Scores) -> jax.Array:
    """`plain` over a cache, a tile of keys after another, no further than the longest row goes.

    What a query gets is decided by the tiles that it sees alone: it passes over any other as if
    that were not there, to the last bit. So neither the room of a cache nor a longer row beside
    it changes a row, as they change the order of `plain`'s sums. A running softmax: Milakov &
    Gimelshein 2018, arXiv:1805.02867, algorithm 3.

    Args:
        k_BSKH: a multiple of `TILE` keys. A query whose index is beyond them is idle: no tile is
            read for its sake, and what it gets means nothing.
        scores: its `row_B` may choose among more rows of keys.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    row_B = jnp.arange(B) if scores.row_B is None else scores.row_B
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)  # as the cache has them
    mask_BTS, bias = scores.visible(), scores.bias()
    lowest = float(jnp.finfo(jnp.float32).min)
    Running = tuple[jax.Array, jax.Array, jax.Array]

    def visit(i: jax.Array, running: Running) -> Running:
        most_BKGT, sum_BKGT, o_BKGTH = running

        def tile(x: jax.Array, dim: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * TILE, TILE, dim)

        def kept(x_BKSH: jax.Array) -> jax.Array:
            tiles = x_BKSH.reshape(-1, K, S // TILE, TILE, H)
            return tiles.at[row_B, :, i].get(mode="promise_in_bounds")

        scores_BKGTS = jnp.einsum(
            "BTKGH,BKSH->BKGTS", q_BTKGH, kept(k_BKSH), preferred_element_type=jnp.float32
        )
        if scores.softcap is not None:
            scores_BKGTS = scores.softcap * jnp.tanh(scores_BKGTS / scores.softcap)
        if bias is not None:
            scores_BKGTS += tile(bias, 3).reshape(-1, K, N // K, bias.shape[2], TILE)
        sees_BKGTS = tile(mask_BTS, 2)[:, None, None]
        scores_BKGTS = jnp.where(sees_BKGTS, scores_BKGTS, lowest)
        new_most = jnp.maximum(most_BKGT, scores_BKGTS.max(-1))
        weights_BKGTS = jnp.where(sees_BKGTS, jnp.exp(scores_BKGTS - new_most[..., None]), 0)
        shrink = jnp.exp(most_BKGT - new_most)
        added_BKGTH = jnp.einsum(
            "BKGTS,BKSH->BKGTH",
            weights_BKGTS.astype(v_BKSH.dtype),
            kept(v_BKSH),
            preferred_element_type=jnp.float32,
        )
        new = (
            new_most,
            sum_BKGT * shrink + row_sums(weights_BKGTS)[..., 0],
            o_BKGTH * shrink[..., None] + added_BKGTH,
        )
        any_BKGT = sees_BKGTS.any(-1)
        return (
            jnp.where(any_BKGT, new[0], most_BKGT),
            jnp.where(any_BKGT, new[1], sum_BKGT),
            jnp.where(any_BKGT[..., None], new[2], o_BKGTH),
        )

    at_work = scores.q_index_BT < S
    count = jnp.where(at_work, scores.q_index_BT, 0).max() // TILE + 1
    zeros = jnp.zeros((B, K, N // K, T), jnp.float32)
    begin = (zeros + lowest, zeros, jnp.zeros((B, K, N // K, T, H), jnp.float32))
    _, sum_BKGT, o_BKGTH = jax.lax.fori_loop(0, count, visit, begin)
    # An idle query may have seen nothing; it is to stay finite.
    o_BKGTH /= jnp.where(sum_BKGT == 0, 1, sum_BKGT)[..., None]
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(v_BSKH.dtype)


BLOCK = 64  # queries a step of `block`


def block(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, scores: Scores) -> jax.Array:
    """`plain` over blocks of queries, each against only the blocks of keys that it can see.

    Skips the masked upper triangle and what lies outside a static window; for CPUs. Of a row that
    is split, see `split.pairs`.
    """
    if ways("T") > 1:
        return pairs(q_BTNH, k_BSKH, v_BSKH, scores)
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    window = scores.window
    parts = _parts(T, window)
    if len(parts) == 1 or scores.softcap is not None or scores.slopes_N is not None:
        outputs = [
            plain(q_BTNH[:, queries], k_BSKH[:, keys], v_BSKH[:, keys], scores.part(queries, keys))
            for queries, keys in parts
        ]
        return jnp.concatenate(outputs, axis=1)
    # With one key-value head jax would split the heads of its group instead.
    q_BTKGH = jnp.reshape(q_BTNH * H**-0.5, (B, T, K, N // K, H), out_sharding=out("BTKGH"))
    masks = [scores.part(queries, keys).visible() for queries, keys in parts]
    o_BKGTH = _blocks(
        window,
        q_BTKGH.transpose(0, 2, 3, 1, 4),
        k_BSKH.swapaxes(1, 2),
        v_BSKH.swapaxes(1, 2),
        masks,
    )
    o_BTKGH = o_BKGTH.transpose(0, 3, 1, 2, 4)
    return jnp.reshape(o_BTKGH, (B, T, N, H), out_sharding=out("BTNH"))


def _parts(T: int, window: int | None) -> list[tuple[slice, slice]]:
    """The queries of each block and its keys, which begin with a block."""
    return [
        (slice(start, stop), slice(max(0, start - (window or T) + 1) // BLOCK * BLOCK, stop))
        for start in range(0, T, BLOCK)
        for stop in [min(start + BLOCK, T)]
    ]


Blocks = tuple[jax.Array, jax.Array, jax.Array, list[jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(
    window: int | None,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    masks: list[jax.Array],
) -> jax.Array:
    """o_BKGTH of queries that are scaled, by blocks; each query sees its own key at least.

    The gradient is the usual one. jax's own rule pads that of each block's keys to all keys and
    adds, and transposes weights where queries are narrower; that takes more time and memory.
    """
    return _blocks_forward(window, q_BKGTH, k_BKSH, v_BKSH, masks)[0]


def _blocks_forward(
    window: int | None,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    masks: list[jax.Array],
) -> tuple[jax.Array, Blocks]:
    outputs, weights = [], []
    parts = _parts(q_BKGTH.shape[3], window)
    for (queries, keys), mask_BTS in zip(parts, masks, strict=True):
        scores_BKGTS = _product("BKGTH,BKSH->BKGTS", q_BKGTH[:, :, :, queries], k_BKSH[:, :, keys])
        lowest = jnp.finfo(jnp.float32).min
        scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, lowest)
        weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
        weights.append(weights_BKGTS)
        outputs.append(_product("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH[:, :, keys]))
    o_BKGTH = jnp.concatenate(outputs, axis=3).astype(v_BKSH.dtype)
    return o_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, weights, o_BKGTH)


def _blocks_backward(
    window: int | None, residuals: Blocks, do_BKGTH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BKGTH, k_BKSH, v_BKSH, weights, o_BKGTH = residuals
    # The mean of dweights under the weights (Dao et al. 2022, arXiv:2205.14135, appendix B.2).
    mean_BKGT = jnp.sum(do_BKGTH.astype(jnp.float32) * o_BKGTH.astype(jnp.float32), axis=-1)
    parts = _parts(q_BKGTH.shape[3], window)
    dq, dk, dv = [], [], []
    for (queries, keys), weights_BKGTS in zip(parts, weights, strict=True):
        q, do = q_BKGTH[:, :, :, queries], do_BKGTH[:, :, :, queries]
        dweights = _product("BKGTH,BKSH->BKGTS", do, v_BKSH[:, :, keys])
        # What is masked has a weight of 0, and so no gradient.
        dscores = weights_BKGTS * (dweights - mean_BKGT[:, :, :, queries, None])
        dscores = dscores.astype(q.dtype)
        dq.append(_product("BKGTS,BKSH->BKGTH", dscores, k_BKSH[:, :, keys]))
        dk.append(_product("BKGTH,BKGTS->BKHS", q, dscores))
        dv.append(_product("BKGTH,BKGTS->BKHS", do, weights_BKGTS))

    def total(gradients: list[jax.Array], of_BKSH: jax.Array) -> jax.Array:
        """Each block of keys has the sum of what the blocks that see it give."""
        blocks = []
        for own, _ in parts:
            seen = [
                jax.lax.slice_in_dim(d, own.start - keys.start, own.stop - keys.start, axis=3)
                for (_, keys), d in zip(parts, gradients, strict=True)
                if keys.start <= own.start < keys.stop
            ]
            blocks.append(functools.reduce(jnp.add, seen))
        return jnp.concatenate(blocks, axis=3).swapaxes(2, 3).astype(of_BKSH.dtype)

    dq_BKGTH = jnp.concatenate(dq, axis=3).astype(q_BKGTH.dtype)
    return dq_BKGTH, total(dk, k_BKSH), total(dv, v_BKSH), None


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The einsum in float32, whatever is multiplied."""
    dims = equation.partition("->")[2]
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32, out_sharding=out(dims))


_blocks.defvjp(_blocks_forward, _blocks_backward)


# Products under this name are those of pairs of tokens, of which `gptjax.accounting` counts those
# that a window and causality leave.
KERNEL = "attention_kernel"


def cudnn(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, scores: Scores) -> jax.Array:
    """cuDNN's fused attention, for NVIDIA GPUs."""
    window, segments = scores.window, scores.q_segments_BT

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        mask = (
            None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
        )
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=True, implementation="cudnn",
            local_window_size=None if window is None else (window - 1, 0),
        )  # fmt: skip

    return on_shards(kernel, (q_BTNH, "BTNH"), (k_BSKH, "BSKH"), (v_BSKH, "BSKH"), (segments, "BT"))


def splash(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    scores: Scores,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention, the Pallas kernel of jax for TPUs.

    Args:
        interpret: runs the kernel's body on any device, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    window, (_, T, N, H) = scores.window, q_BTNH.shape
    G = N // k_BSKH.shape[2]
    one: Any = (
        masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    )
    if scores.order_T is not None:
        one.q_sequence = scores.order_T
    attend = kernels.make_splash_mqa(
        masks.MultiHeadMask([one] * G),
        attn_logits_soft_cap=scores.softcap,
        head_shards=1,
        q_seq_shards=ways("T"),
        interpret=interpret,
    )
    attend_specs = None
    if out("B") is not None:
        where = NamedSharding(jax.sharding.get_abstract_mesh(), spec("1T"))
        attend_specs = attend.manual_sharding_spec(where)
        attend = jax.tree.map(jax.reshard, attend, attend_specs)

    def kernel(
        attend: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        q_ids: jax.Array | None,
        k_ids: jax.Array | None,
    ) -> jax.Array:
        q_BKGTH = (q * H**-0.5).reshape(*q.shape[:2], -1, G, H).transpose(0, 2, 3, 1, 4)
        ids = None if q_ids is None or k_ids is None else kernels.SegmentIds(q_ids, k_ids)
        over_heads = jax.vmap(attend, in_axes=(0, 0, 0, None))
        o_BKGTH = jax.vmap(over_heads)(q_BKGTH, k.swapaxes(1, 2), v.swapaxes(1, 2), ids)
        return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q.shape)

    return on_shards(
        kernel,
        (attend, attend_specs),
        (q_BTNH, "BTNH"),
        (k_BSKH, "BSKH"),
        (v_BSKH, "BSKH"),
        (scores.q_segments_BT, "BT"),
        (scores.k_segments_BS, "BS"),
    )


class Row(NamedTuple):
    """A kernel and what it cannot do.

    Attributes:
        kernel: called with whole rows only, keys and queries alike: a cache is `plain`'s, or that
            of `tiles`. The mesh may have split the queries, never the keys.
        auto: the platform ("cpu", "gpu", "tpu") where `auto` takes the kernel if it can.
        elsewhere: whether it runs on other platforms too.
        multiple: it takes only lengths that are multiples of so many tokens, on each device that
            has a part of a row.
        lacks: config -> {what it does not support: whether the config asks for that}.
    """

    kernel: Kernel
    auto: str | None = None
    elsewhere: bool = True
    multiple: int = 1
    lacks: Callable[[Model], dict[str, bool]] = lambda c: {}


def _alibi(c: Model) -> dict[str, bool]:
    return {"ALiBi": choose(POSITION, c.position, "model.position").slopes is not None}


def _deterministic(c: Model) -> dict[str, bool]:
    """Programs with cuDNN's attention do not run then: jax 0.11.2 stops with an IndexError."""
    flags = os.environ.get("XLA_FLAGS", "")
    names = ("xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops")
    return {f"XLA_FLAGS=--{name}=true": f"--{name}=true" in flags for name in names}


ATTENTION: dict[str, Row] = {
    "plain": Row(plain),
    "flash": Row(
        flash,
        auto="cpu",
        elsewhere=False,
        lacks=lambda c: {
            **_alibi(c),
            "rows that are split over devices": ways("T") > 1,
            "softcapped scores": c.attention_softcap is not None,
            f"heads of width {c.H}, no multiple of 8": c.H % 8 != 0,
        },
    ),
    "block": Row(block, auto="cpu"),  # what `flash` cannot do
    "cudnn": Row(
        cudnn,
        auto="gpu",
        elsewhere=False,
        multiple=2,
        lacks=lambda c: {
            **_alibi(c),
            **_deterministic(c),
            # It has no mask that begins within the keys, and its log-sum-exp has no gradient, by
            # which parts could be merged.
            "rows that are split over devices": ways("T") > 1,
            "softcapped scores": c.attention_softcap is not None,
            f"model.dtype={c.dtype!r}": c.dtype != "bfloat16",
            f"heads of width {c.H}, no multiple of 8 up to 256": c.H % 8 != 0 or c.H > 256,
        },
    ),
    "splash": Row(
        splash,
        auto="tpu",
        elsewhere=False,
        multiple=128,
        lacks=_alibi,
    ),
}


def resolve(config: Model, platform: str) -> Model:
    """`config` settled for the devices of a mesh: attention "auto" becomes "auto:PLATFORM".

    The kernel is chosen later, by `kernel_for`, for each length at hand.

    Args:
        config: the architecture.
        platform: the platform of the mesh's devices, "cpu", "gpu" or "tpu"; never the
            default backend, because programs for a pod are compiled on CPU hosts.

    Raises:
        ConfigError: on a name that is no row.
    """
    choose(choices(), config.attention, "model.attention")
    if config.attention != "auto":
        return config
    settled = f"auto:{platform}"
    return dataclasses.replace(config, attention=settled if settled in choices() else "plain")


def check(config: Model, platform: str) -> None:
    """Refuses a kernel that does not run on a platform.

    Raises:
        ConfigError: naming it.
    """
    row = ATTENTION.get(config.attention)
    if row is not None and not row.elsewhere and row.auto != platform:
        raise _refusal(config.attention, f"devices of platform {platform!r}")


def kernel_for(config: Model, length: int) -> str:
    """The name of the kernel for rows of `length` tokens.

    The one that the config names; of "auto:PLATFORM" that platform's, or where it cannot do what
    is asked `plain`, but `block` of rows that the current mesh splits, which are long; of "auto"
    that was not settled `plain`.

    Raises:
        ConfigError: on a name that is no row, or a kernel that cannot do what is asked.
    """
    platform = choose(choices(), config.attention, "model.attention")
    if platform is not None:
        names = [name for name, row in ATTENTION.items() if row.auto == platform]
        any_platform = "plain" if ways("T") == 1 else "block"
        return next((name for name in names if not _lacking(name, config, length)), any_platform)
    if lacking := _lacking(config.attention, config, length):
        raise _refusal(config.attention, lacking)
    return config.attention


# What these yield is made again for the backward pass: a device keeps its own keys and values, and
# gathers the others' once more. A policy by names would keep what becomes the named.
MOVES = ("reshard", "reshape", "slice", "squeeze", "rev", "concatenate", "transpose")


def attend(
    config: Model, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, scores: Scores
) -> jax.Array:
    """o_BTNH by the kernel for this config and length; of a cache by `plain`, `cached` or `tiles`.

    Keys and values that lie as the queries do, split, are gathered here.

    Raises:
        ConfigError: as `kernel_for`.
    """
    kernel: Kernel
    if scores.cached and config.attention == TILES:
        kernel = tiles
    elif scores.cached:
        by_kernel = by_kernels() and cached.serves(q_BTNH, k_BSKH, scores)
        kernel = cached.cached if by_kernel else plain
    else:
        kernel = ATTENTION[kernel_for(config, q_BTNH.shape[1])].kernel
    if ways("T") == 1:
        return kernel(q_BTNH, k_BSKH, v_BSKH, scores)
    moved, segments = scores.order_T is not None, scores.k_segments_BS
    whole = dataclasses.replace(
        scores,
        k_index_BS=jnp.arange(k_BSKH.shape[1])[None],
        k_segments_BS=None if segments is None else gather_sequence(segments, "BT", moved),
    )

    def gathered(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (gather_sequence(x, "BTKH", moved) for x in (k, v))
        return kernel(q, k, v, whole)

    if not moved:  # what is heard cannot leave a checkpoint
        return gathered(q_BTNH, k_BSKH, v_BSKH)
    keep = lambda primitive, *_, **__: primitive.name not in MOVES  # noqa: E731
    return jax.checkpoint(gathered, policy=keep)(q_BTNH, k_BSKH, v_BSKH)


def choices() -> dict[str, str | None]:
    """What `model.attention` may be -> the platform of an "auto", "" if not yet settled."""
    platforms = [row.auto for row in ATTENTION.values() if row.auto]
    settled = {f"auto:{platform}": platform for platform in platforms}
    return {"auto": "", **dict.fromkeys(ATTENTION), **settled}


def _lacking(name: str, config: Model, length: int) -> str:
    """What a kernel cannot do of what is asked, in words; empty if it can."""
    row = choose(ATTENTION, name, "model.attention")
    multiple = row.multiple * ways("T") if row.multiple > 1 else 1
    lacks = row.lacks(config) | {
        f"{length} tokens, no multiple of {multiple}": length % multiple != 0
    }
    return ", ".join(what for what, lacking in lacks.items() if lacking)


def _refusal(name: str, lacking: str) -> ConfigError:
    return ConfigError(
        f"model.attention={name!r} does not support {lacking}: "
        "use model.attention='auto' or 'plain'"
    )


def _extend(
    cache_BKSH: jax.Array, new_BKTH: jax.Array, start_B: jax.Array, row_B: jax.Array | None
) -> jax.Array:
    """The cache with T new entries written from each row's own start, which leaves room for them.

    Args:
        row_B: as in `Context`.
    """

    def write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(cache, new, (0, start, 0))

    def one_by_one(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        def row(b: jax.Array, cache: jax.Array) -> jax.Array:
            one = jax.lax.dynamic_slice_in_dim(new, b, 1)
            row = b if row_B is None else row_B[b]
            return jax.lax.dynamic_update_slice(cache, one, (row, 0, start[b], 0))

        return jax.lax.fori_loop(0, len(start), row, cache)

    def at_once(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        if row_B is None and len(start) == 1:  # no scatter, which checks its place
            return jax.lax.dynamic_update_slice(cache, new, (0, 0, start[0], 0))
        if row_B is None:
            return jax.vmap(write)(cache, new, start)
        place_BT = start[:, None] + jnp.arange(new.shape[2])
        return cache.at[row_B[:, None], :, place_BT].set(new.swapaxes(1, 2), mode="drop")

    def rows(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        # Of rows at once XLA makes a scatter, which on CPUs copies the whole cache for each token.
        return jax.lax.platform_dependent(
            cache, new.astype(cache.dtype), start, cpu=one_by_one, default=at_once
        )

    if out("B") is None:
        return rows(cache_BKSH, new_BKTH, start_B)
    specs = (spec("BKSH"), spec("BKTH"), spec("B"))
    return jax.shard_map(rows, in_specs=specs, out_specs=spec("BKSH"))(
        cache_BKSH, new_BKTH, start_B
    )


class Attention(nn.Module):
    """Multi-head (K = N), grouped-query or multi-query (K = 1) causal self-attention."""

    config: Model

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        """Attends.

        Args:
            x_BTD: the normalised residual stream.
            context: where the tokens stand, and what this layer is told.

        Returns:
            The output (B, T, D), this layer's own values (B, T, K, H) and the new cache.
        """
        c, tap = self.config, context.tap
        position = choose(POSITION, c.position, "model.position")
        # A name that is no row is refused with any position, not only when RoPE reads it.
        choose(ROPE_SCALING, c.rope_scaling, "model.rope_scaling")
        q_BTNH, k_BTKH, v_BTKH = (self._project(x_BTD, name) for name in ("query", "key", "value"))
        if c.qk_norm:
            q_BTNH = HeadNorm(c, name="query_norm")(q_BTNH)
            k_BTKH = HeadNorm(c, name="key_norm")(k_BTKH)
        if position.rotate is not None:
            q_BTNH = position.rotate(c, q_BTNH, context.position_BT)
            k_BTKH = position.rotate(c, k_BTKH, context.position_BT)
        if (scale := parametrisation.score_multiplier(c)) != 1:
            q_BTNH = scale * q_BTNH  # kernels divide by sqrt(H)
        own_value_BTKH = v_BTKH
        if c.value_residual:
            first = v_BTKH if context.first_value_BTKH is None else context.first_value_BTKH
            v_BTKH = self._mix(v_BTKH, jnp.where(context.layer == 0, v_BTKH, first))
        q_BTNH, k_BTKH = tap("query", q_BTNH), tap("key", k_BTKH)
        v_BTKH = tap("value", v_BTKH)
        k_index_BS, k_segments_BS, cache = context.index_BT, context.segments_BT, context.cache
        if cache is not None:
            assert context.start_B is not None, "a cache needs context.start_B"
            new = {"key": k_BTKH.swapaxes(1, 2), "value": v_BTKH.swapaxes(1, 2)}
            start_B, row_B = context.start_B, context.row_B
            cache = {name: _extend(cache[name], new[name], start_B, row_B) for name in new}
            k_BTKH, v_BTKH = cache["key"].swapaxes(1, 2), cache["value"].swapaxes(1, 2)
            k_index_BS = jnp.arange(k_BTKH.shape[1])[None]
        scores = Scores(
            q_index_BT=context.index_BT,
            k_index_BS=k_index_BS,
            q_segments_BT=context.segments_BT,
            k_segments_BS=k_segments_BS,
            window=context.window,
            slopes_N=None if position.slopes is None else position.slopes(c),
            softcap=c.attention_softcap,
            cached=cache is not None,
            row_B=context.row_B,
            order_T=context.order_T,
            tap=tap,
        )
        with jax.named_scope(KERNEL):
            o_BTNH = attend(c, q_BTNH, k_BTKH, v_BTKH, scores)
        return self._output(tap("heads", o_BTNH)), own_value_BTKH, cache

    def _project(self, x_BTD: jax.Array, name: str) -> jax.Array:
        c, letter = self.config, "N" if name == "query" else "K"
        heads = c.heads if name == "query" else c.K
        kernel = parameter(
            self, c, name, f"D{letter}H", (c.width, heads, c.H), "matrix", fan_in="D"
        )
        to = f"BT{letter}H"
        y = linear(f"BTD,D{letter}H->{to}", x_BTD, kernel, c.products)
        return add_bias(self, c, f"{name}_bias", f"{letter}H", y) if name in c.biased else y

    def _mix(self, own: jax.Array, first: jax.Array) -> jax.Array:
        """Value residual with two learned shares (Zhou et al. 2024, eq. 8), each 1/2 at first."""
        share_own = parameter(self, self.config, "value_own", "", (), "gain", mean=0.5)
        share_first = parameter(self, self.config, "value_first", "", (), "gain", mean=0.5)
        return (share_own * own + share_first * first).astype(own.dtype)

    def _output(self, o_BTNH: jax.Array) -> jax.Array:
        c = self.config
        shape = (c.heads, c.H, c.width)
        kernel = parameter(self, c, "out", "NHD", shape, "residual", fan_in="NH")
        y = linear("BTNH,NHD->BTD", o_BTNH, kernel, c.products)
        return add_bias(self, c, "out_bias", "D", y) if "out" in c.biased else y
