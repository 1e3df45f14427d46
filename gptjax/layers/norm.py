"""Normalisation over the width."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import Model, choose
from gptjax.layers.parameter import parameter


class NormKind(NamedTuple):
    centre: bool  # subtract the mean
    scale: bool  # learn a gain
    bias: bool  # learn an offset, where model.bias allows


NORM: dict[str, NormKind] = {
    "layernorm": NormKind(centre=True, scale=True, bias=True),  # Ba et al. 2016, eq. 3
    "rmsnorm": NormKind(centre=False, scale=True, bias=False),  # Zhang & Sennrich 2019, eq. 4
    "parameterfree": NormKind(centre=True, scale=False, bias=False),  # OLMo, Groeneveld et al. 2024
}


def normalise(x: jax.Array, eps: float, centre: bool) -> jax.Array:
    """x of any shape with unit mean square over its last dim, in float32."""
    x = x.astype(jnp.float32)
    if centre:
        x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


class Norm(nn.Module):
    """Normalises (..., D) over D in float32; returns the input's dtype."""

    config: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, kind = self.config, choose(NORM, self.config.norm, "model.norm")
        y = normalise(x, c.norm_eps, kind.centre)
        if kind.scale:
            y = y * parameter(
                self, c, "scale", "D", (c.width,), "gain", mean=1.0, dtype=jnp.float32
            )
        if kind.bias and c.bias:
            y = y + parameter(self, c, "bias", "D", (c.width,), "bias", dtype=jnp.float32)
        return y.astype(x.dtype)


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
