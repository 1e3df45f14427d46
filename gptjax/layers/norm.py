"""Normalisation over the width."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import Model, choose
from gptjax.layers.parameter import add_bias, parameter
from gptjax.sharding import decoding, out

FEW = 4096  # fewer numbers at once XLA sums in another order, on CPUs


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def normalise(x: jax.Array, eps: float, centre: bool) -> jax.Array:
    """x of any shape with unit mean square over its last dim, in float32.

    The gradient is the usual one, from x and each row's mean and scale. jax's own rule lets a GPU
    write all of the result in float32 once more, and read it.
    """
    return _forward(x, eps, centre)[0]


Residuals = tuple[jax.Array, jax.Array, jax.Array]


def _forward(x: jax.Array, eps: float, centre: bool) -> tuple[jax.Array, Residuals]:
    wide = x.astype(jnp.float32)
    mean = row_sums(wide) / x.shape[-1] if centre else jnp.zeros_like(wide[..., :1])
    scale = jax.lax.rsqrt(row_sums(jnp.square(wide - mean)) / x.shape[-1] + eps)
    return (wide - mean) * scale, (x, mean, scale)


def row_sums(x: jax.Array) -> jax.Array:
    """The sums over the last dim, which stays as 1.

    While text is generated a row's sum has the same bits however many rows there are.
    """
    width, rows = x.shape[-1], math.prod(x.shape[:-1])
    if x.size >= FEW or not decoding() or out("B") is not None:
        return x.sum(-1, keepdims=True)
    padded = jnp.pad(x.reshape(rows, width), ((0, -(-FEW // width) - rows), (0, 0)))
    return padded.sum(-1)[:rows].reshape(*x.shape[:-1], 1)


def _backward(eps: float, centre: bool, residuals: Residuals, dy: jax.Array) -> tuple[jax.Array]:
    x, mean, scale = residuals
    # A GPU is to read them, where XLA would compute them again.
    kept: Any = jax.lax.platform_dependent(
        (mean, scale), cuda=jax.lax.optimization_barrier, default=lambda kept: kept
    )
    mean, scale = kept
    y = (x.astype(jnp.float32) - mean) * scale
    dx = dy - y * (dy * y).mean(-1, keepdims=True)
    if centre:
        dx -= dy.mean(-1, keepdims=True)
    return ((scale * dx).astype(x.dtype),)


normalise.defvjp(_forward, _backward)


def layernorm(module: nn.Module, c: Model, x: jax.Array) -> jax.Array:
    """Ba et al. 2016, eq. 3; without the offset where model.bias is False."""
    y = _gain(module, c, normalise(x, c.norm_eps, centre=True))
    return add_bias(module, c, "bias", "D", y) if c.bias else y


def rmsnorm(module: nn.Module, c: Model, x: jax.Array) -> jax.Array:
    """Zhang & Sennrich 2019, eq. 4."""
    return _gain(module, c, normalise(x, c.norm_eps, centre=False))


def parameterfree(module: nn.Module, c: Model, x: jax.Array) -> jax.Array:
    """A LayerNorm that learns nothing (OLMo, Groeneveld et al. 2024)."""
    return normalise(x, c.norm_eps, centre=True)


def _gain(module: nn.Module, c: Model, y: jax.Array) -> jax.Array:
    scale = parameter(module, c, "scale", "D", (c.width,), "gain", mean=1.0)
    return y * scale


# (module, config, x of shape (..., D)) -> y alike, float32. A row declares on `module` whatever
# vectors it learns.
NORM: dict[str, Callable[[nn.Module, Model, jax.Array], jax.Array]] = {
    "layernorm": layernorm,
    "rmsnorm": rmsnorm,
    "parameterfree": parameterfree,
}


class Norm(nn.Module):
    """Normalises (..., D) over D in float32; returns the input's dtype."""

    config: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        return choose(NORM, c.norm, "model.norm")(self, c, x).astype(x.dtype)


class HeadNorm(nn.Module):
    """RMS-normalises each head's vector (..., H) with one learned gain for all heads.

    QK-norm as in Qwen3: Henry et al. 2020 normalise by L2 and learn a scalar instead.
    """

    config: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        scale = parameter(self, c, "scale", "H", (c.H,), "gain", mean=1.0)
        return (normalise(x, c.norm_eps, centre=False) * scale).astype(x.dtype)
