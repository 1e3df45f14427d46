"""Cross-entropy of next tokens: float32 token-weighted sums, whole or a vocabulary chunk at a time.

Both forms are one function with one gradient rule, so they cannot drift apart. The
chunked form (`chunk` columns at a time) never holds logits_BTV: the forward pass keeps a
running maximum and sum of exponentials (the online softmax of Milakov & Gimelshein 2018,
arXiv:1805.02867), the backward pass computes each chunk's logits again (as Wijmans et al.
2024, arXiv:2411.09009, do in a GPU kernel). It trades one more matrix product for memory.

Shapes, beyond the legend in `gptjax/model.py`: the vocabulary is seen as (V, C), V tensor
shards of C columns each, so that in every chunk each shard works on columns of its own and
the shards meet once, at the end.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.layers import rows
from gptjax.layers.kernels import LANES
from gptjax.sharding import alone_on, like, merge_tokens, on_device, out, shard, ways


class Sums(NamedTuple):
    """Token-weighted float32 sums, which add up over micro-batches; divide by `weight` last."""

    objective: jax.Array  # nll + z_loss * z: what is differentiated
    nll: jax.Array  # negative log-likelihood, nats
    z: jax.Array  # log(Z)^2
    weight: jax.Array  # of the tokens


def cross_entropy(
    x_BTD: jax.Array,
    kernel: jax.Array,
    dims: str,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int | None,
    softcap: float | None,
    z_loss: float,
) -> Sums:
    """Weighted sums of the loss over a batch.

    Args:
        x_BTD: final hidden states, in the compute dtype.
        kernel: the output projection, in x's dtype and gathered over fsdp.
        dims: the kernel's layout: "DV", or "VD" for a tied token table.
        targets_BT: ids of the next tokens. An id outside [0, V) makes the loss and its
            gradient NaN, unless its weight is 0: it never counts silently as some other id.
        weights_BT: 0 where nothing is scored; never negative.
        chunk: at most so many columns of the logits exist at a time (rounded down to the
            tensor shards, at least one each); None: all of them.
        softcap: s of s tanh(logits / s) (Gemma Team 2024, arXiv:2408.00118); None: off.
        z_loss: factor of log(Z)^2 in the objective (PaLM: Chowdhery et al. 2022, sec. 5).
    """
    weights_BT = weights_BT.astype(jnp.float32)
    targets_BT = jnp.where(weights_BT > 0, targets_BT, 0)
    nll_BT, log_z_BT = token_nll(x_BTD, kernel, dims, targets_BT, chunk=chunk, softcap=softcap)
    nll = jnp.sum(weights_BT * nll_BT)
    z = jnp.sum(weights_BT * log_z_BT**2)
    return Sums(nll + z_loss * z, nll, z, jnp.sum(weights_BT))


def token_nll(
    x_BTD: jax.Array,
    kernel: jax.Array,
    dims: str,
    targets_BT: jax.Array,
    *,
    chunk: int | None,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Each token's negative log-likelihood and log-partition, (nll_BT, log_z_BT) in nats, float32.

    The matrix products take x's dtype and accumulate in float32; softmax and logarithms are
    float32 throughout. Arguments are those of `cross_entropy`; a target outside [0, V)
    yields NaN.
    """
    x_BTD = shard(x_BTD, "BTD")
    V, shards = dims.index("V"), ways("V")
    vocab = kernel.shape[V]
    # Splitting V into (V, C) moves nothing: a shard's columns are contiguous.
    shape = (*kernel.shape[:V], shards, vocab // shards, *kernel.shape[V + 1 :])
    dims = dims.replace("V", "VC")
    kernel = jax.lax.reshape(kernel, shape, out_sharding=out(dims))
    width = vocab // shards if chunk is None else min(max(chunk // shards, 1), vocab // shards)
    results: Any = _nll(x_BTD, kernel, targets_BT, dims, width, softcap)
    nll_BT, log_z_BT = results
    in_vocab_BT = (targets_BT >= 0) & (targets_BT < vocab)
    return nll_BT * jnp.where(in_vocab_BT, 1.0, jnp.nan), log_z_BT


def log_likelihood(logits_BTV: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """ll_BT of tokens, float32, in nats: minus what `token_nll` gives, to the last bit."""
    logits_BTVC, zero = logits_BTV[..., None, :], jnp.int32(0)
    statistics = _statistics(_Columns(logits_BTVC, zero, ids_BT[..., None]))
    log_z_BTV = statistics.top_BTV + jnp.log(statistics.total_BTV)
    return (statistics.target_BTV - log_z_BTV)[..., 0]


class _Columns(NamedTuple):
    logits_BTVC: jax.Array  # float32, capped
    stale: jax.Array  # int32, so many of the first columns an earlier chunk has had
    target_BTV: jax.Array  # int32, the target's column; it may be none of these

    @property
    def fresh_C(self) -> jax.Array:
        return jnp.arange(self.logits_BTVC.shape[-1]) >= self.stale

    @property
    def hit_BTVC(self) -> jax.Array:
        """Where a fresh column is the target."""
        columns = jnp.arange(self.logits_BTVC.shape[-1])
        return (columns == self.target_BTV[..., None]) & self.fresh_C


class _Chunk(NamedTuple):
    start: jax.Array  # first column within every shard
    kernel: jax.Array  # these columns of the kernel
    columns: _Columns


class _Residuals(NamedTuple):
    """What the backward pass reads."""

    x_BTD: jax.Array
    kernel: jax.Array
    targets_BT: jax.Array
    log_z_BT: jax.Array
    logits_BTVC: jax.Array | None  # those of a single chunk; of several, none are kept


class _Statistics(NamedTuple):
    """Of the columns seen so far, per tensor shard."""

    top_BTV: jax.Array  # largest logit
    total_BTV: jax.Array  # sum of exp(logit - top)
    target_BTV: jax.Array  # the target's logit, 0 where it is not among them


def _chunk(
    x_BTD: jax.Array,
    kernel: jax.Array,
    targets_BT: jax.Array,
    dims: str,
    width: int,
    softcap: float | None,
    i: int | jax.Array,
    logits_BTVC: jax.Array | None = None,
) -> _Chunk:
    """Chunk number i; its logits are computed unless they are at hand."""
    C = dims.index("C")
    shards, columns = kernel.shape[C - 1 : C + 1]
    # The last chunk starts early enough to end with the shard, so that nothing is padded.
    start = jnp.minimum(i * width, columns - width)
    if width < columns:
        kernel = jax.lax.dynamic_slice_in_dim(kernel, start, width, C)
    if logits_BTVC is None:
        with jax.named_scope("unembedding"):
            logits_BTVC = jnp.einsum(
                f"BTD,{dims}->BTVC",
                x_BTD,
                kernel,
                preferred_element_type=jnp.float32,
                out_sharding=out("BTVC"),
            )
        if softcap is not None:
            logits_BTVC = softcap * jnp.tanh(logits_BTVC / softcap)
    target_BTV = targets_BT[..., None] - (columns * jnp.arange(shards) + start)
    return _Chunk(start, kernel, _Columns(logits_BTVC, i * width - start, target_BTV))


def _statistics(c: _Columns) -> _Statistics:
    others = {"cuda": _in_one_pass}
    if alone_on("cpu") and c.logits_BTVC.shape[-1] >= LANES:
        others["cpu"] = _by_rows
    statistics: Any = jax.lax.platform_dependent(c, **others, default=_in_passes)
    return statistics


def _by_rows(c: _Columns) -> _Statistics:
    """Reads the logits twice, of which one CPU has a row in its cache the second time."""

    def sums(logits_BTVC: jax.Array, target_BTV: jax.Array, stale: jax.Array) -> _Statistics:
        C, each = logits_BTVC.shape[-1], target_BTV.shape
        found = rows.softmax_sums(logits_BTVC.reshape(-1, C), target_BTV.ravel(), stale)
        return _Statistics(*(sum_R.reshape(each) for sum_R in found))

    laid = like(c.logits_BTVC)
    where = laid and jax.P(*laid[:-1])
    operands = c.logits_BTVC, c.target_BTV, jnp.int32(c.stale)
    statistics: _Statistics = on_device(sums, where, *operands)
    return statistics


def _in_passes(c: _Columns) -> _Statistics:
    """Reads the logits three times."""
    logits_BTVC = jnp.where(c.fresh_C, c.logits_BTVC, -jnp.inf)
    top_BTV = jnp.max(logits_BTVC, axis=-1)
    total_BTV = jnp.sum(jnp.exp(logits_BTVC - top_BTV[..., None]), axis=-1)
    return _Statistics(top_BTV, total_BTV, jnp.sum(c.logits_BTVC, axis=-1, where=c.hit_BTVC))


def _in_one_pass(c: _Columns) -> _Statistics:
    """Reads the logits once, which is what takes a GPU its time: one column is merged at a time."""
    # Finite: of two columns that are not counted, the difference would be NaN.
    lowest = jnp.finfo(jnp.float32).min
    columns = _Statistics(
        jnp.where(c.fresh_C, c.logits_BTVC, lowest),
        jnp.where(c.fresh_C, 1.0, jnp.zeros_like(c.logits_BTVC)),
        jnp.where(c.hit_BTVC, c.logits_BTVC, 0),
    )
    none = _Statistics(*map(jnp.float32, (lowest, 0, 0)))
    statistics: Any = jax.lax.reduce(columns, none, _merge, [columns.top_BTV.ndim - 1])
    return statistics


def _merge(a: _Statistics, b: _Statistics) -> _Statistics:
    """The statistics of the columns of both, with one exponential."""
    higher = a.top_BTV >= b.top_BTV
    factor_BTV = jnp.exp(-jnp.abs(a.top_BTV - b.top_BTV))
    return _Statistics(
        jnp.maximum(a.top_BTV, b.top_BTV),
        jnp.where(higher, a.total_BTV, b.total_BTV)
        + factor_BTV * jnp.where(higher, b.total_BTV, a.total_BTV),
        a.target_BTV + b.target_BTV,
    )


def _to_logits(
    c: _Columns, log_z_BT: jax.Array, g_nll_BT: jax.Array, g_z_BT: jax.Array, softcap: float | None
) -> jax.Array:
    """The gradient of the logits, before their cap, BTVC, float32; that of stale columns is 0."""

    def whole(
        c: _Columns, log_z_BT: jax.Array, g_nll_BT: jax.Array, g_z_BT: jax.Array
    ) -> jax.Array:
        log_z, g_nll, g_z = (g[..., None, None] for g in (log_z_BT, g_nll_BT, g_z_BT))
        softmax_BTVC = jnp.exp(c.logits_BTVC - log_z)
        d_BTVC = (g_nll + g_z) * softmax_BTVC - jnp.where(c.hit_BTVC, g_nll, 0)
        if softcap is not None:
            d_BTVC *= 1 - (c.logits_BTVC / softcap) ** 2
        return jnp.where(c.fresh_C, d_BTVC, 0)

    others = {}
    if alone_on("cpu") and softcap is None and c.logits_BTVC.shape[-1] % LANES == 0:
        others["cpu"] = _to_logits_by_rows
    operands = c, log_z_BT, g_nll_BT, g_z_BT
    d_BTVC: jax.Array = jax.lax.platform_dependent(*operands, **others, default=whole)
    return d_BTVC


def _to_logits_by_rows(
    c: _Columns, log_z_BT: jax.Array, g_nll_BT: jax.Array, g_z_BT: jax.Array
) -> jax.Array:
    """In the logits' place, where XLA would hold exponentials and gradients beside them."""

    def gradient(logits_BTVC: jax.Array, stale: jax.Array, *rest: jax.Array) -> jax.Array:
        target_R, *numbers_R = (array.ravel() for array in rest)
        logits_RC = logits_BTVC.reshape(-1, logits_BTVC.shape[-1])
        d_RC = rows.softmax_gradient(logits_RC, target_R, stale, *numbers_R)
        return d_RC.reshape(logits_BTVC.shape)

    numbers = c.target_BTV, log_z_BT, g_nll_BT + g_z_BT, g_nll_BT
    operands = c.logits_BTVC, jnp.int32(c.stale), *numbers
    d_BTVC: jax.Array = on_device(gradient, like(c.logits_BTVC), *operands)
    return d_BTVC


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _nll(
    x_BTD: jax.Array,
    kernel: jax.Array,
    targets_BT: jax.Array,
    dims: str,
    width: int,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    return _nll_forward(x_BTD, kernel, targets_BT, dims, width, softcap)[0]


def _nll_forward(
    x_BTD: jax.Array,
    kernel: jax.Array,
    targets_BT: jax.Array,
    dims: str,
    width: int,
    softcap: float | None,
) -> tuple[tuple[jax.Array, jax.Array], _Residuals]:
    chunk = functools.partial(_chunk, x_BTD, kernel, targets_BT, dims, width, softcap)
    count = -(-kernel.shape[dims.index("C")] // width)
    first = chunk(0)
    statistics = _statistics(first.columns)
    if count > 1:
        statistics, _ = jax.lax.scan(
            lambda statistics, i: (_merge(statistics, _statistics(chunk(i).columns)), None),
            statistics,
            jnp.arange(1, count),
        )
    # Here the shards meet, over vectors of (B, T).
    top_BT = jnp.max(statistics.top_BTV, axis=-1)
    total_BT = jnp.sum(
        statistics.total_BTV * jnp.exp(statistics.top_BTV - top_BT[..., None]), axis=-1
    )
    log_z_BT = top_BT + jnp.log(total_BT)
    nll_BT = log_z_BT - jnp.sum(statistics.target_BTV, axis=-1)
    logits_BTVC = first.columns.logits_BTVC if count == 1 else None
    return (nll_BT, log_z_BT), _Residuals(x_BTD, kernel, targets_BT, log_z_BT, logits_BTVC)


def _nll_backward(
    dims: str,
    width: int,
    softcap: float | None,
    residuals: _Residuals,
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None]:
    x_BTD, kernel, targets_BT, log_z_BT, saved_logits_BTVC = residuals
    C = dims.index("C")
    # Each shard keeps its own part of dx; the parts are added once, after the last chunk.
    dx_dims = "BTVD" if kernel.shape[C - 1] > 1 else "BTD"
    chunk = functools.partial(_chunk, x_BTD, kernel, targets_BT, dims, width, softcap)

    def gradients(c: _Chunk) -> tuple[jax.Array, jax.Array]:
        d_BTVC = _to_logits(c.columns, log_z_BT, *cotangents, softcap).astype(x_BTD.dtype)
        with jax.named_scope("unembedding"):
            dx = jnp.einsum(
                f"BTVC,{dims}->{dx_dims}",
                d_BTVC,
                c.kernel,
                preferred_element_type=jnp.float32,
                out_sharding=out(dx_dims),
            )
            # On a CPU the order of the operands that needs no transpose is up to 3 times faster.
            operands = ("BTD", x_BTD), ("BTVC", d_BTVC)
            (a_dims, a), (b_dims, b) = operands if dims[0] == "D" else operands[::-1]
            to_kernel, factors = merge_tokens(f"{a_dims},{b_dims}->{dims}", a, b)
            dkernel = jnp.einsum(
                to_kernel,
                *factors,
                preferred_element_type=jnp.float32,
                out_sharding=out(dims),
            )
        return dx, dkernel.astype(kernel.dtype)

    def accumulate(
        sums: tuple[jax.Array, jax.Array], i: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        dx_sum, dkernel = sums
        c = chunk(i)
        dx, d = gradients(c)
        # Columns that an earlier chunk has had get exactly 0 more.
        d += jax.lax.dynamic_slice_in_dim(dkernel, c.start, width, C)
        return (dx_sum + dx, jax.lax.dynamic_update_slice_in_dim(dkernel, d, c.start, C)), None

    if saved_logits_BTVC is not None:
        dx, dkernel = gradients(chunk(0, saved_logits_BTVC))
    else:
        sizes = dict(zip(dims + "BTD", kernel.shape + x_BTD.shape, strict=True))
        dx_shape = tuple(sizes[dim] for dim in dx_dims)
        zeros = jnp.zeros(dx_shape, jnp.float32, out_sharding=out(dx_dims)), jnp.zeros_like(kernel)
        (dx, dkernel), _ = jax.lax.scan(accumulate, zeros, jnp.arange(-(-sizes["C"] // width)))
    dx_BTD = jnp.sum(dx, axis=2) if dx_dims == "BTVD" else dx
    return dx_BTD.astype(x_BTD.dtype), dkernel, None


_nll.defvjp(_nll_forward, _nll_backward)
