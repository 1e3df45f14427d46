"""The product of activations and weights: its gradients, and how its operands are rounded."""

from __future__ import annotations

import functools
import math
import string
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax import sharding
from gptjax.config import choose
from gptjax.layers import blocks, kernels
from gptjax.layers.blocks import Blocks
from gptjax.layers.parameter import Adapted, Scaled, Spec, Turned, laid, turned, wide
from gptjax.sharding import like, out

Product = Callable[..., Any]


class Row(NamedTuple):
    """What the operands of a product are rounded to; None: they stay as they are.

    Attributes:
        operand: of activations and weights.
        gradient: of the gradient that comes back; None: that stays as it is.
        apart: whether each token, and each output of a weight, has a scale of its own; else a
            tensor has one.
        roles: those of the parameters that are rounded, of `layers.parameter.KIND`.
    """

    operand: Any
    gradient: Any
    apart: bool
    roles: tuple[str, ...]


# GPUs multiply in fp8 from Hopper on; elsewhere the same numbers are computed, but slower.
PRODUCTS: dict[str, Row] = {
    "dtype": Row(None, None, apart=False, roles=()),  # as model.dtype says
    # For training. Of 8 bits, e4m3 has a finer grid and e5m2 a wider range, which gradients need
    # (Micikevicius et al. 2022, arXiv:2209.05433). A scale is that of the largest number just then.
    "fp8": Row(jnp.float8_e4m3fn, jnp.float8_e5m2, apart=False, roles=("matrix", "residual")),
    # For models that are trained (Dettmers et al. 2022, arXiv:2208.07339, section 2.1, vector-wise
    # quantisation, without the paper's outliers apart). The token table and logits are rounded too.
    "int8": Row(
        jnp.int8, None, apart=True, roles=("matrix", "residual", "embedding", "unembedding")
    ),
}


def keep(products: str, spec: Spec, parameter: jax.Array | Adapted) -> jax.Array | Scaled | Adapted:
    """A parameter as it is kept where it is only read: rounded once, if products round it.

    Args:
        products: a row of `PRODUCTS`.
        spec: what was declared of it.
        parameter: its value, of that shape, in the model's dtype; of one with an adapter the base
            alone is rounded.
    """
    if isinstance(parameter, Adapted):
        a_dims, b_dims = spec.adapter
        return parameter.replace(
            base=keep(products, spec, parameter.base),  # type: ignore[arg-type]
            a=sharding.store(parameter.a, a_dims),
            b=sharding.store(parameter.b, b_dims),
        )
    row = choose(PRODUCTS, products, "model.products")
    if spec.role not in row.roles:
        return sharding.store(parameter, spec.dims)
    summed = spec.fan_in if row.apart else spec.dims[len(spec.stacks) :]
    rounded = _round(parameter, row.operand, [spec.dims.index(dim) for dim in summed])
    return jax.tree.map(lambda x: sharding.store(x, laid(spec.dims, x.shape)), rounded)


def turn(spec: Spec, kept: jax.Array | Scaled | Adapted) -> jax.Array | Scaled | Turned | Adapted:
    """One of `keep` as `layers.kernels` reads it, where that multiplies."""
    held = Scaled(kept, None) if isinstance(kept, jax.Array) else kept
    # A table lies so as it is; experts are not multiplied by `linear`.
    if (
        spec.kind not in ("matrix", "unembedding")
        or "E" in spec.stacks
        or isinstance(held, Adapted)
    ):
        return kept
    sizes = spec.size(spec.fan_in), spec.size(spec.fan_out)
    serves = by_kernels() and kernels.serves(held.values.dtype.name, 1, *sizes)
    if not serves and not (by_sums() and held.scale is None):
        return kept
    dims = turned(spec.dims, spec.fan_in)
    order = [spec.dims.index(dim) for dim in dims]

    def one(x: jax.Array) -> jax.Array:
        x = x.transpose(order)
        return sharding.store(x, laid(dims, x.shape))

    return Turned(jax.tree.map(one, held))


def by_kernels() -> bool:
    """Whether `layers.kernels` may multiply: for tokens that are written, on one CPU."""
    return sharding.decoding() and sharding.alone_on("cpu")


def by_sums() -> bool:
    """Whether one row is multiplied as sums: a token that is written, on one GPU."""
    return sharding.decoding() and sharding.alone_on("gpu")


def look_up(
    products: str, table: jax.Array | Scaled | Blocks, role: str, ids_BT: jax.Array, dims: str
) -> jax.Array:
    """The rows `ids_BT` of a table of `role`, "BTD", float32, rounded as `products` say of the role."""
    if isinstance(table, Blocks):
        return blocks.wide(table.replace(data=_gather(table.data, ids_BT, dims)))
    if isinstance(table, Scaled):
        assert table.scale is not None, "`keep` gives each row a scale"
        return _rows(table.values, ids_BT, dims) * _rows(table.scale, ids_BT, f"{dims[:2]}1")
    return on_grid(products, _rows(table, ids_BT, dims), role)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(table: jax.Array, ids_BT: jax.Array, dims: str) -> jax.Array:
    """Rows of a table, float32.

    The gradient of a row is summed in float32 over all places where it is looked up: in bfloat16
    that of a frequent token would soon be too large for what is added to it.
    """
    return _gather(table, ids_BT, dims).astype(jnp.float32)


def _gather(table: jax.Array, ids_BT: jax.Array, dims: str) -> jax.Array:
    return table.at[ids_BT].get(out_sharding=out(dims))


def _rows_forward(
    table: jax.Array, ids_BT: jax.Array, dims: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rows(table, ids_BT, dims), (table, ids_BT)


def _rows_backward(
    dims: str, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, None]:
    table, ids_BT = residuals
    add_up = jax.linear_transpose(lambda t: _gather(t, ids_BT, dims), table.astype(jnp.float32))
    return add_up(g)[0].astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


def on_grid(products: str, x: jax.Array, role: str, summed: int = -1, stacks: int = 0) -> jax.Array:
    """A parameter of `role`, or what it meets, rounded as in a product that sums the axis `summed`.

    For what `linear` does not multiply. The gradient is that of x. Of its first `stacks` dims each
    part has scales of its own.
    """
    row = choose(PRODUCTS, products, "model.products")
    if role not in row.roles:
        return x
    together = range(stacks, x.ndim) if stacks else None
    rounded = wide(_round(x, row.operand, [summed] if row.apart else together), x.dtype)
    # What is added is 0, and has the gradient 1.
    return jax.lax.stop_gradient(rounded) + (x - jax.lax.stop_gradient(x))


def linear(
    equation: str,
    x: jax.Array,
    kernel: jax.Array | Scaled | Turned | Blocks | Adapted,
    products: str = "dtype",
    dtype: Any = None,
) -> jax.Array:
    """The einsum `equation`, "BTD,DF->BTF", of activations and a parameter ready for use.

    Args:
        kernel: one of `keep` has no gradient, nor has the base of one with an adapter. Of few bits, it
            is widened where `products` do not round; the backward pass widens it again. In blocks it
            meets activations as they are, whatever `products` say.
        products: a row of `PRODUCTS`; an adapter is multiplied as it is.
        dtype: of the result; None is that of x.

    Raises:
        ConfigError: on a name that is no row.
    """
    if isinstance(kernel, Blocks):
        return _by_blocks(equation, x, kernel, dtype or x.dtype)
    if isinstance(kernel, Turned):
        x_dims, kernel_dims, y_dims = _dims(equation)
        read = "".join(dim for dim in kernel_dims if dim not in y_dims)
        equation, kernel = f"{x_dims},{turned(kernel_dims, read)}->{y_dims}", kernel.matrix
    if not isinstance(kernel, Adapted):
        return _linear(equation, x, kernel, products, dtype)
    base = kernel.base if isinstance(kernel.base, Scaled) else Scaled(kernel.base, None)
    y = _linear(equation, x, base, products, dtype)
    x_dims, kernel_dims, y_dims = _dims(equation)
    read = "".join(dim for dim in kernel_dims if dim not in y_dims)
    written = "".join(dim for dim in kernel_dims if dim in y_dims)
    between = "".join(dim for dim in x_dims if dim not in read) + "R"
    x = _dropped(x, x_dims, kernel)
    x = _linear(f"{x_dims},{read}R->{between}", x, kernel.a, "dtype", None)
    return y + kernel.scale * _linear(
        f"{between},R{written}->{y_dims}", x, kernel.b, "dtype", dtype
    )


def _by_blocks(equation: str, x: jax.Array, kernel: Blocks, dtype: Any) -> jax.Array:
    """`linear` by `layers.kernels`, or by weights that are widened where those do not multiply."""
    x_dims, _, y_dims = _dims(equation)
    rows = len([dim for dim in x_dims if dim in y_dims])
    R, K = math.prod(x.shape[:rows]), math.prod(x.shape[rows:])
    N = math.prod(kernel.data.shape[:-1])
    by_kernel = by_kernels() and kernels.serves(kernel.kind, R, K, N)

    def multiply(x: jax.Array, data: jax.Array) -> jax.Array:
        x_RK, w_NK = x.reshape(R, K), kernel.replace(data=data.reshape(N, -1))
        if by_kernel:
            y_RN = kernels.product(x_RK, w_NK)
        else:
            wide = blocks.wide(w_NK).astype(x.dtype)
            y_RN = jnp.einsum("RK,NK->RN", x_RK, wide, preferred_element_type=dtype)
        return y_RN.astype(dtype).reshape(x.shape[:rows] + data.shape[:-1])

    return sharding.on_device(multiply, out(y_dims), x, kernel.data)


def _dropped(x: jax.Array, dims: str, kernel: Adapted) -> jax.Array:
    if kernel.key is None:
        return x
    kept = jax.random.bernoulli(kernel.key, 1 - kernel.dropout, x.shape, out_sharding=out(dims))
    if kernel.balanced:
        kept = sharding.balance(kept, dims)
    return jnp.where(kept, x / (1 - kernel.dropout), 0).astype(x.dtype)


def drop_inputs(params: Any, key: jax.Array, balanced: bool) -> Any:
    """Parameters of a layer whose adapters drop out inputs, each with a key of its own."""

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, Adapted) or not leaf.dropout:
            return leaf
        number = zlib.crc32(jax.tree_util.keystr(path).encode())
        return leaf.replace(key=jax.random.fold_in(key, number), balanced=balanced)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_adapted)


def is_adapted(leaf: Any) -> bool:
    return isinstance(leaf, Adapted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def _linear(
    equation: str, x: jax.Array, kernel: jax.Array | Scaled, products: str, dtype: Any
) -> jax.Array:
    """`linear` without an adapter.

    The gradients are the usual ones, of what is multiplied. jax's own rule writes that of the
    kernel as (g^T x)^T, here it is x^T g: of products that share an input, XLA then transposes
    that input once and not each g, which is up to four times as wide. It need not transpose any on
    a CPU, see `merge_tokens`.
    """
    return _forward(equation, x, kernel, products, dtype)[0]


# Empty where the kernel has a gradient.
Residuals = tuple[Scaled, Scaled, tuple[()] | None]


def _forward(
    equation: str, x: jax.Array, kernel: jax.Array | Scaled, products: str, dtype: Any
) -> tuple[jax.Array, Residuals]:
    row = choose(PRODUCTS, products, "model.products")
    x_dims, kernel_dims, y_dims = _dims(equation)

    def rounded(array: jax.Array, dims: str) -> Scaled:
        if row.operand is None:
            return Scaled(array, None)
        summed = [i for i, dim in enumerate(dims) if dim not in y_dims]
        return _round(array, row.operand, summed if row.apart else None)

    a = rounded(x, x_dims)
    held = kernel if isinstance(kernel, Scaled) else Scaled(kernel, None)
    b = rounded(held.values, kernel_dims) if held.scale is None else held
    factor = Scaled(wide(b, x.dtype), None) if row.operand is None else b
    y = _multiply(equation, a, factor, dtype or x.dtype, out(y_dims))
    return y, (a, b, None if isinstance(kernel, Scaled) else ())


def _backward(
    equation: str, products: str, dtype: Any, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    (x, kernel, trained), (x_dims, kernel_dims, y_dims) = residuals, _dims(equation)
    gradient = PRODUCTS[products].gradient
    if gradient is None:  # scales that differ along a sum cannot be multiplied after it
        x, kernel = (Scaled(wide(operand, g.dtype), None) for operand in (x, kernel))
    g_scaled = Scaled(g, None) if gradient is None else _round(g, gradient, None)
    to_x = f"{y_dims},{kernel_dims}->{x_dims}"
    # Hopper may add products of 8 bits in less than float32, which gradients do not bear.
    exact = None if gradient is None else jax.lax.Precision.HIGHEST
    dx = _multiply(to_x, g_scaled, kernel, g.dtype, like(x.values), exact)
    if trained is None:
        return dx, None
    made, where = kernel_dims, like(kernel.values)
    if len(x_dims) > len(y_dims):
        # XLA for CPUs would write x anew, its tokens last, and keep that from the forward pass on,
        # for a result that begins with several dims of x.
        made = "".join(dim for dim in y_dims + x_dims if dim in kernel_dims)
        where = where and jax.P(*(where[kernel_dims.index(dim)] for dim in made))
    to_kernel = f"{x_dims},{y_dims}->{made}"
    to_kernel, (rows, g_rows) = sharding.merge_tokens(to_kernel, x.values, g_scaled.values)
    x, g_scaled = Scaled(rows, x.scale), Scaled(g_rows, g_scaled.scale)
    dkernel = _multiply(to_kernel, x, g_scaled, g.dtype, where, exact)
    return dx, jnp.einsum(f"{made}->{kernel_dims}", dkernel)


def _round(x: jax.Array, dtype: Any, summed: Sequence[int] | None) -> Scaled:
    """x on the grid of `dtype`, scaled so that its largest number is the dtype's.

    Args:
        summed: the axes that share a scale, which is kept with a 1 for each; None: all, and the
            scale is a scalar.
    """
    few = _round_few(x, summed) if dtype == jnp.int8 and by_kernels() else None
    if few is not None:
        return few
    whole = jnp.issubdtype(dtype, jnp.integer)
    most = float(jnp.iinfo(dtype).max if whole else jnp.finfo(dtype).max)
    wide = x.astype(jnp.float32)
    top = largest(jnp.abs(wide), summed)
    # What is all zeros stays so. What is not finite becomes NaN, and the update is left out.
    scale = jnp.where(top == 0, 1.0, top / most)
    scaled = wide / scale
    return Scaled((jnp.round(scaled) if whole else scaled).astype(dtype), scale)


def largest(x: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """The maximum over axes, which stay as 1, or of all; infinite where x has a NaN.

    XLA's own maximum overlooks that on CPUs, among 4,096 float32 numbers or between devices.
    """
    x = jnp.where(jnp.isnan(x), jnp.inf, x)
    return jnp.max(x, axis=None if axes is None else tuple(axes), keepdims=axes is not None)


def _round_few(x: jax.Array, summed: Sequence[int] | None) -> Scaled | None:
    """`_round` to int8 by `layers.kernels`; None: not of this."""
    if summed is None or [*summed] != [*range(x.ndim - len(summed), x.ndim)]:
        return None
    rows = x.shape[: x.ndim - len(summed)]
    R, K = math.prod(rows), math.prod(x.shape[len(rows) :])
    if not kernels.serves("int8", R, K, kernels.OUTPUTS):
        return None

    def one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, scale = kernels.rounded(x.astype(jnp.float32).reshape(R, K))
        return values.reshape(x.shape), scale.reshape(*rows, *(1 for _ in summed))

    return Scaled(*sharding.on_device(one, (like(x), like(x)), x))


def _multiply(
    equation: str,
    a: Scaled,
    b: Scaled,
    dtype: Any,
    where: Any,
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    whole = jnp.issubdtype(a.values.dtype, jnp.integer)

    def plain(a: Scaled, b: Scaled, where: Any = None) -> jax.Array:
        def product(a: jax.Array, b: jax.Array, sums: Any) -> jax.Array:
            return jnp.einsum(
                _lettered(equation),
                a,
                b,
                precision=precision,
                preferred_element_type=sums,
                out_sharding=where,
            )

        def by_float32(a: jax.Array, b: jax.Array) -> jax.Array:
            return product(a, b, jnp.float32).astype(dtype)

        by_dtype = functools.partial(product, sums=jnp.int32 if whole else dtype)
        if a.values.dtype == jnp.bfloat16 == dtype and sharding.alone_on("cpu"):
            # Asked for bfloat16, XLA widens the operands; but it may be compiled for another platform.
            y = jax.lax.platform_dependent(a.values, b.values, cpu=by_float32, default=by_dtype)
        else:
            y = by_dtype(a.values, b.values)
        if a.scale is None or b.scale is None:
            return y
        a_dims, b_dims, y_dims = _dims(equation)
        scale = _along(a.scale, a_dims, y_dims) * _along(b.scale, b_dims, y_dims)
        return (y.astype(jnp.float32) * scale).astype(dtype)

    if by_kernels() or by_sums():
        few = functools.partial(_few, equation, plain, dtype, by_sums())
        return sharding.on_device(few, where, a, b)
    return plain(a, b, where)


def _few(equation: str, plain: Product, dtype: Any, sums: bool, a: Scaled, b: Scaled) -> jax.Array:
    """`plain`, but of a `Turned` matrix by `layers.kernels`, or one row, with `sums`, as sums."""
    (x, x_scale), (w, w_scale), (a_dims, b_dims, y_dims) = a, b, _dims(equation)
    summed = "".join(dim for dim in a_dims if dim not in y_dims)
    rows, outputs = a_dims.removesuffix(summed), b_dims.removesuffix(summed)
    K = math.prod(x.shape[len(rows) :])
    R, N = x.size // K, w.size // K
    turned = f"{rows}{summed},{outputs}{summed}->{rows}{outputs}" == equation
    scales = [] if x_scale is None or w_scale is None else [x_scale.ravel(), w_scale.ravel()]
    y = None
    if turned and sums and R == 1 and not scales:
        # As float32: of bfloat16 XLA makes sums too, but writes the products to memory before.
        y = (x.reshape(K).astype(jnp.float32) * w.reshape(N, K).astype(jnp.float32)).sum(1)
    elif turned and not sums and x.dtype == w.dtype and kernels.serves(w.dtype.name, R, K, N):
        y = kernels.product(x.reshape(R, K), w.reshape(N, K), *scales)
    if y is not None:
        return y.astype(dtype).reshape(x.shape[: len(rows)] + w.shape[: len(outputs)])
    if R > 1 or sums or x.dtype.itemsize == 4:
        return plain(a, b)
    # Of one row, a narrow product takes XLA ten times as long as of two, on CPUs.
    two = jnp.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1))
    two = jax.lax.optimization_barrier(two)  # or XLA would make it one again
    return plain(Scaled(two, x_scale), b)[:1]


def _along(scale: jax.Array, dims: str, y_dims: str) -> jax.Array:
    """A scale of an operand `dims`, laid along the dims of the result."""
    if scale.ndim == 0:
        return scale
    sizes = dict(zip(dims, scale.shape, strict=True))
    return scale.reshape([sizes.get(dim, 1) for dim in y_dims])


def _lettered(equation: str) -> str:
    """The equation in letters of the alphabet's order, in which an einsum sums.

    Of H before N XLA would write operands anew.
    """
    letters = dict.fromkeys(filter(str.isalpha, equation))
    return equation.translate(dict(zip(map(ord, letters), string.ascii_letters, strict=False)))


def _dims(equation: str) -> list[str]:
    return equation.replace("->", ",").split(",")


_linear.defvjp(_forward, _backward)
