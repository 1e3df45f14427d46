"""The position-wise feed-forward."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import Model, choose
from gptjax.layers.linear import linear
from gptjax.layers.parameter import parameter


def relu2(x: jax.Array) -> jax.Array:
    """max(x, 0)^2 (So et al. 2021, "Primer")."""
    return jnp.square(jax.nn.relu(x))


# Activation by name. A name that ends in "glu" is gated: activation(x W_gate) * (x W_up)
# (Shazeer 2020, eq. 6), see `config.Model.gated`.
FEEDFORWARD: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,  # tanh form, as GPT-2 and faster; Hendrycks & Gimpel 2016
    "relu2": relu2,
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
}


class FeedForward(nn.Module):
    """x_BTD -> x_BTD through F hidden units."""

    config: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, (D, F) = self.config, (self.config.width, self.config.F)
        activation = choose(FEEDFORWARD, c.feedforward, "model.feedforward")

        def project(name: str) -> jax.Array:
            kernel = parameter(self, c, name, "DF", (D, F), "matrix", fan_in=D)
            y = linear("BTD,DF->BTF", x, kernel)
            return y + parameter(self, c, f"{name}_bias", "F", (F,), "bias") if c.bias else y

        h = activation(project("gate")) * project("up") if c.gated else activation(project("up"))
        kernel = parameter(self, c, "down", "FD", (F, D), "residual", fan_in=F)
        y = linear("BTF,FD->BTD", h, kernel)
        return y + parameter(self, c, "down_bias", "D", (D,), "bias") if c.bias else y
