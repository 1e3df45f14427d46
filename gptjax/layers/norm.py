"""Normalisation over the width."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import Model, choose
from gptjax.layers.parameter import parameter


def normalise(x: jax.Array, eps: float, centre: bool) -> jax.Array:
    """x of any shape with unit mean square over its last dim, in float32."""
    x = x.astype(jnp.float32)
    if centre:
        x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def layernorm(module: nn.Module, c: Model, x: jax.Array) -> jax.Array:
    """Ba et al. 2016, eq. 3; without the offset where model.bias is False."""
    y = _gain(module, c, normalise(x, c.norm_eps, centre=True))
    if not c.bias:
        return y
    return y + parameter(module, c, "bias", "D", (c.width,), "bias", dtype=jnp.float32)


def rmsnorm(module: nn.Module, c: Model, x: jax.Array) -> jax.Array:
    """Zhang & Sennrich 2019, eq. 4."""
    return _gain(module, c, normalise(x, c.norm_eps, centre=False))


def parameterfree(module: nn.Module, c: Model, x: jax.Array) -> jax.Array:
    """A LayerNorm that learns nothing (OLMo, Groeneveld et al. 2024)."""
    return normalise(x, c.norm_eps, centre=True)


def _gain(module: nn.Module, c: Model, y: jax.Array) -> jax.Array:
    scale = parameter(module, c, "scale", "D", (c.width,), "gain", mean=1.0, dtype=jnp.float32)
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
        scale = parameter(self, c, "scale", "H", (c.H,), "gain", mean=1.0, dtype=jnp.float32)
        return (normalise(x, c.norm_eps, centre=False) * scale).astype(x.dtype)
