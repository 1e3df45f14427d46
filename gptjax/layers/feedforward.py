"""The position-wise feed-forward: the second branch of a block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import Model, choose
from gptjax.layers.context import Tap
from gptjax.layers.experts import experts
from gptjax.layers.linear import linear
from gptjax.layers.parameter import add_bias, parameter

Activation = Callable[[jax.Array], jax.Array]


class Branch(NamedTuple):
    """A variant.

    Attributes:
        apply: (module, config, x_BTD, tap) -> y_BTD in x's dtype. It declares its parameters on
            `module` with `parameter` and may multiply what it likes: `gptjax.accounting` counts
            what it declares and the products that it makes. It shows its hidden units to
            `tap("feedforward_hidden", ...)`, and may add a loss by `tap.loss`.
        width: D -> F, where model.ff_dim is None.
        experts: whether it reads the knobs of experts.
    """

    apply: Callable[[nn.Module, Model, jax.Array, Tap], jax.Array]
    width: Callable[[int], int]
    experts: bool = False


def by_sigmoid(own: Activation, k: Activation, slope: Activation) -> Activation:
    """h = u sigmoid(k(u)), whose gradient is made of u and h, both of which products keep anyway.

    By jax's rule a CPU keeps a third array. XLA would keep one here too, in place of h, if the last
    operation were one that it takes for cheap, and does again; a division is not.

    Args:
        own: jax's, for other dtypes than float32.
        k: the exponent.
        slope: its derivative.
    """

    @jax.custom_vjp
    def apply(u: jax.Array) -> jax.Array:
        return u / (1 + jnp.exp(-k(u)))

    def forward(u: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        h = apply(u)
        return h, (u, h)

    def backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array]:
        u, h = residuals
        small = jnp.abs(u) < 1e-30  # h may be no normal number then
        # Not h / u, for which XLA would take what h is made of.
        sigmoid = jnp.where(small, 0.5, h * jnp.where(small, 0.0, 1 / u))
        return (g * sigmoid * (1 + (u - h) * slope(u)),)

    apply.defvjp(forward, backward)
    return lambda u: apply(u) if u.dtype == jnp.float32 else own(u)


_GELU = (8 / math.pi) ** 0.5
# The tanh form, as GPT-2 and faster; Hendrycks & Gimpel 2016.
gelu = by_sigmoid(
    jax.nn.gelu,
    lambda u: _GELU * (u + 0.044715 * u**3),
    lambda u: _GELU * (1 + 3 * 0.044715 * u**2),
)
silu = by_sigmoid(jax.nn.silu, lambda u: u, jnp.ones_like)


def relu2(x: jax.Array) -> jax.Array:
    """max(x, 0)^2 (So et al. 2021, "Primer")."""
    return jnp.square(jax.nn.relu(x))


def ungated(activation: Activation) -> Branch:
    """activation(x W_up) W_down (Vaswani et al. 2017, eq. 2), 4 D wide."""

    def apply(module: nn.Module, c: Model, x_BTD: jax.Array, tap: Tap) -> jax.Array:
        return _down(module, c, activation(_up(module, c, "up", x_BTD)), tap)

    return Branch(apply, lambda width: 4 * width)


def gated(activation: Activation) -> Branch:
    """(activation(x W_gate) * (x W_up)) W_down (Shazeer 2020, eq. 6).

    8/3 D wide, up to the next multiple of 64: three matrices have the parameters of two.
    """

    def apply(module: nn.Module, c: Model, x_BTD: jax.Array, tap: Tap) -> jax.Array:
        gate_BTF = activation(_up(module, c, "gate", x_BTD))
        return _down(module, c, gate_BTF * _up(module, c, "up", x_BTD), tap)

    return Branch(apply, lambda width: -(-8 * width // (3 * 64)) * 64)


def mixture(kind: Callable[[Activation], Branch], activation: Activation) -> Branch:
    """Several `kind(activation)`, of which a router chooses a few for each token."""

    def apply(module: nn.Module, c: Model, x_BTD: jax.Array, tap: Tap) -> jax.Array:
        return experts(module, c, x_BTD, tap, hidden_width(c), activation, kind is gated)

    return Branch(apply, kind(activation).width, experts=True)


def _up(module: nn.Module, c: Model, name: str, x_BTD: jax.Array) -> jax.Array:
    F = hidden_width(c)
    kernel = parameter(module, c, name, "DF", (c.width, F), "matrix", fan_in="D")
    y_BTF = linear("BTD,DF->BTF", x_BTD, kernel, c.products)
    return add_bias(module, c, f"{name}_bias", "F", y_BTF) if c.bias else y_BTF


def _down(module: nn.Module, c: Model, h_BTF: jax.Array, tap: Tap) -> jax.Array:
    h_BTF = tap("feedforward_hidden", h_BTF)
    kernel = parameter(module, c, "down", "FD", (hidden_width(c), c.width), "residual", fan_in="F")
    y_BTD = linear("BTF,FD->BTD", h_BTF, kernel, c.products)
    return add_bias(module, c, "down_bias", "D", y_BTD) if c.bias else y_BTD


FEEDFORWARD: dict[str, Branch] = {
    "relu": ungated(jax.nn.relu),
    "gelu": ungated(gelu),
    "relu2": ungated(relu2),
    "swiglu": gated(silu),
    "geglu": gated(gelu),
    "gelu_experts": mixture(ungated, gelu),
    "swiglu_experts": mixture(gated, silu),
}


def hidden_width(config: Model) -> int:
    """F: `model.ff_dim`, or what its row says of the model's width."""
    row = choose(FEEDFORWARD, config.feedforward, "model.feedforward")
    return row.width(config.width) if config.ff_dim is None else config.ff_dim


class FeedForward(nn.Module):
    """x_BTD -> y_BTD, as the row says."""

    config: Model

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tap: Tap) -> jax.Array:
        c = self.config
        return choose(FEEDFORWARD, c.feedforward, "model.feedforward").apply(self, c, x_BTD, tap)
