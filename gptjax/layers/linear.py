"""The product of activations and weights: its gradients, and how its operands are rounded."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import choose
from gptjax.sharding import like, out


class Row(NamedTuple):
    """What the operands of a product are rounded to; None: they stay as they are.

    Attributes:
        operand: of activations and weights.
        gradient: of the gradient that comes back.
    """

    operand: Any
    gradient: Any


# Of 8 bits, e4m3 has a finer grid and e5m2 a wider range, which gradients need (Micikevicius et
# al. 2022, arXiv:2209.05433). A tensor has one scale, by the largest number that it holds just
# then. GPUs multiply so from Hopper on; elsewhere the same numbers are computed, but slower.
PRODUCTS: dict[str, Row] = {
    "dtype": Row(None, None),  # as model.dtype says
    "fp8": Row(jnp.float8_e4m3fn, jnp.float8_e5m2),
}


class Scaled(NamedTuple):
    """values * scale; a scale of None is 1."""

    values: jax.Array
    scale: jax.Array | None  # float32 scalar


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def linear(equation: str, x: jax.Array, kernel: jax.Array, products: str = "dtype") -> jax.Array:
    """The einsum `equation`, "BTD,DF->BTF", of activations and a parameter ready for use.

    The gradients are the usual ones. jax's own rule writes that of the kernel as (g^T x)^T,
    here it is x^T g: of products that share an input, XLA then transposes that input once and
    not each g, which is up to four times as wide.

    Args:
        products: a row of `PRODUCTS`.

    Raises:
        ConfigError: on a name that is no row.
    """
    return _forward(equation, x, kernel, products)[0]


def _forward(
    equation: str, x: jax.Array, kernel: jax.Array, products: str
) -> tuple[jax.Array, tuple[Scaled, Scaled]]:
    row = choose(PRODUCTS, products, "model.products")
    a, b = _round(x, row.operand), _round(kernel, row.operand)
    return _multiply(equation, a, b, x.dtype, out(_dims(equation)[2])), (a, b)


def _backward(
    equation: str, products: str, residuals: tuple[Scaled, Scaled], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (x_dims, kernel_dims, y_dims) = residuals, _dims(equation)
    gradient = _round(g, PRODUCTS[products].gradient)
    to_x, to_kernel = f"{y_dims},{kernel_dims}->{x_dims}", f"{x_dims},{y_dims}->{kernel_dims}"
    # Hopper may add products of 8 bits in less than float32, which gradients do not bear.
    exact = None if gradient.scale is None else jax.lax.Precision.HIGHEST
    dx = _multiply(to_x, gradient, kernel, g.dtype, like(x.values), exact)
    dkernel = _multiply(to_kernel, x, gradient, g.dtype, like(kernel.values), exact)
    return dx, dkernel


def _round(x: jax.Array, dtype: Any) -> Scaled:
    """x on the grid of `dtype`, scaled so that its largest number is the dtype's."""
    if dtype is None:
        return Scaled(x, None)
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide))
    # What is all zeros stays so. What is not finite becomes NaN, and the update is left out.
    scale = jnp.where(largest == 0, 1.0, largest / float(jnp.finfo(dtype).max))
    return Scaled((wide / scale).astype(dtype), scale)


def _multiply(
    equation: str,
    a: Scaled,
    b: Scaled,
    dtype: Any,
    where: Any,
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    y = jnp.einsum(
        equation,
        a.values,
        b.values,
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=where,
    )
    if a.scale is None or b.scale is None:
        return y
    return (y.astype(jnp.float32) * (a.scale * b.scale)).astype(dtype)


def _dims(equation: str) -> list[str]:
    return equation.replace("->", ",").split(",")


linear.defvjp(_forward, _backward)
