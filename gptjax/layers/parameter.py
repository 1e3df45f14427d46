"""How a layer declares a parameter, and how its initial value is drawn.

A layer calls `parameter(self, config, "query", "DNH", shape, "matrix", fan_in="D")`. During
`init` Linen collects what was declared, a `Spec`, without drawing anything; `draw` then makes
the values from the seed and the parameter's path. So a value depends on its path and shape
alone: two architectures that share a path share its initial value, and neither call order,
depth nor mesh changes it.

What is said here is said once: initial values, muP, weight decay, the optimisers, the mesh and
the counts of `gptjax.accounting` all read the `Spec`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from gptjax import parametrisation, sharding
from gptjax.config import Model, choose
from gptjax.layers.blocks import Blocks

# Role -> kind: what a parameter is to muP (`gptjax.parametrisation`), weight decay and Muon. An
# embedding is a table whose rows are looked up, a matrix maps between two sizes that grow with
# the width, a router from one that does to one that does not, as the unembedding does, adapter_out
# from one that does not to one that does, and a vector is all that multiplies or adds entry by entry.
KIND: dict[str, str] = {
    "embedding": "embedding",
    "position": "embedding",
    "matrix": "matrix",
    "residual": "matrix",  # writes to the residual stream
    "router": "router",  # chooses experts
    "unembedding": "unembedding",
    "gain": "vector",
    "bias": "vector",
    "moved": "vector",  # not by its gradient, but by what `Tap.move` says
    # Of a matrix's adapter: from what it reads to a small rank, and from there to what it writes.
    "adapter_in": "matrix",
    "adapter_out": "adapter_out",
}

# Scheme -> role -> standard deviation from (fan-in, layers), those of the base shape where
# `gptjax.parametrisation` has one. Vectors start at the mean that they declare.
INIT: dict[str, dict[str, Callable[[float, float], float]]] = {
    # Radford et al. 2019, section 2.3: 0.02, residual writers scaled by depth (two a layer).
    "gpt2": {
        "embedding": lambda fan_in, layers: 0.02,
        "position": lambda fan_in, layers: 0.02,
        "matrix": lambda fan_in, layers: 0.02,
        "router": lambda fan_in, layers: 0.02,
        "residual": lambda fan_in, layers: 0.02 * (2 * layers) ** -0.5,
        "unembedding": lambda fan_in, layers: 0.02,
    },
    # LeCun et al. 1998, section 4.6: outputs of unit variance for inputs of unit variance.
    "fan_in": {
        "embedding": lambda fan_in, layers: fan_in**-0.5,
        "position": lambda fan_in, layers: fan_in**-0.5,
        "matrix": lambda fan_in, layers: fan_in**-0.5,
        "router": lambda fan_in, layers: fan_in**-0.5,
        "residual": lambda fan_in, layers: (2 * layers * fan_in) ** -0.5,
        "unembedding": lambda fan_in, layers: fan_in**-0.5,
    },
    # As fan_in, but each branch starts as the identity (Fixup, Zhang et al. 2019).
    "zero_out": {
        "embedding": lambda fan_in, layers: fan_in**-0.5,
        "position": lambda fan_in, layers: fan_in**-0.5,
        "matrix": lambda fan_in, layers: fan_in**-0.5,
        "router": lambda fan_in, layers: fan_in**-0.5,
        "residual": lambda fan_in, layers: 0.0,
        "unembedding": lambda fan_in, layers: fan_in**-0.5,
    },
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a parameter before it has a value.

    Attributes:
        shape: sizes of the dims.
        dims: one letter of the shape alphabet for each dim, "LDNH".
        mean: the initial value where std is 0.
        std: the standard deviation of initial values around 0; 0 makes them `mean`.
        role: a row of `KIND`.
        fan_in: the letters over which an output sums; those of neither `fan_in` nor `stacks`
            are the outputs. A table, whose rows are looked up, names its rows' own dim, over
            which it sums where it is tied to the unembedding. "" for a vector.
        stacks: the leading letters that only number copies: layers L, experts E.
    """

    shape: tuple[int, ...]
    dims: str
    mean: float
    std: float
    role: str
    fan_in: str = ""
    stacks: str = ""

    @property
    def kind(self) -> str:
        return KIND[self.role]

    @property
    def exact(self) -> bool:
        """Whether it is used in float32, whatever the model's dtype."""
        return self.kind in ("vector", "router")

    @property
    def fan_out(self) -> str:
        """The letters that number the outputs."""
        return "".join(letter for letter in self.dims if letter not in self.stacks + self.fan_in)

    @property
    def adapter(self) -> tuple[str, str]:
        """The dims of both factors of a matrix's adapter, "LDR" and "LRNH"."""
        return f"{self.stacks}{self.fan_in}R", f"{self.stacks}R{self.fan_out}"

    def size(self, letters: str) -> int:
        """The product of the sizes of some of its dims."""
        return math.prod(self.shape[self.dims.index(letter)] for letter in letters)

    def stacked(self, layers: int) -> Spec:
        """The same parameter of `layers` layers, stacked along a leading dim L."""
        return dataclasses.replace(
            self, shape=(layers, *self.shape), dims="L" + self.dims, stacks="L" + self.stacks
        )


class Scaled(NamedTuple):
    """values * scale: a parameter, or another operand of a product, rounded to few bits.

    Attributes:
        values: as many as the tensor has.
        scale: float32, a scalar, or with the values' dims, where those that share it are 1; None
            is 1.
    """

    values: jax.Array
    scale: jax.Array | None


class Turned(NamedTuple):
    """A `Scaled` matrix whose summed dims come last, "FD" of "DF", as a product of few rows reads it."""

    matrix: Scaled


def turned(dims: str, fan_in: str) -> str:
    """The dims of a `Turned` matrix."""
    return "".join(dim for dim in dims if dim not in fan_in) + fan_in


def wide(x: Scaled, dtype: Any) -> jax.Array:
    """The numbers that `x` stands for."""
    if x.scale is None:
        return x.values
    return (x.values.astype(jnp.float32) * x.scale).astype(dtype)


def widen(params: Any) -> Any:
    """A tree of parameters with the numbers that `Scaled` ones stand for, float32."""
    scaled = lambda leaf: isinstance(leaf, Scaled)  # noqa: E731
    one = lambda leaf: wide(leaf, jnp.float32) if scaled(leaf) else leaf  # noqa: E731
    return jax.tree.map(one, params, is_leaf=scaled)


def laid(dims: str, shape: tuple[int, ...]) -> str:
    """The dims of a part of a parameter, whose sizes of 1 stand for all: of its scale "1NH"."""
    return "".join("1" if n == 1 else dim for dim, n in zip(dims, shape, strict=True))


def gather(
    value: jax.Array | Scaled, dims: str, dtype: jax.typing.DTypeLike, stacks: str = ""
) -> Any:
    """A parameter ready for use (`sharding.gather`); a rounded one stays so, and moves so."""
    if not isinstance(value, Scaled):
        return sharding.gather(value, dims, dtype, stacks)
    one = lambda x: sharding.gather(x, laid(dims, x.shape), x.dtype, stacks)  # noqa: E731
    return jax.tree.map(one, value)


class Adapted(struct.PyTreeNode):
    """A matrix and the adapter beside it, W + scale * A B (LoRA, Hu et al. 2022, arXiv:2106.09685,
    eq. 3), whose product `layers.linear` makes without making the sum.

    Attributes:
        base: W, which gets no gradient.
        a: A, of `Spec.adapter`'s first dims.
        b: B, of its second.
        key: drops out inputs of the adapter with this key; None: none.
        scale: alpha / rank in the paper, section 4.1.
        dropout: share of the inputs of the adapter that is dropped in training.
        balanced: whether tokens stand in the order of `sharding.balanced`.
    """

    base: jax.Array | Scaled
    a: jax.Array
    b: jax.Array
    key: jax.Array | None = None
    scale: float = struct.field(pytree_node=False, default=1.0)
    dropout: float = struct.field(pytree_node=False, default=0.0)
    balanced: bool = struct.field(pytree_node=False, default=False)


class Declared(struct.PyTreeNode, nn.meta.AxisMetadata[Any]):
    """Carries a `Spec` out of Linen's `init`; unboxes to the bare value."""

    value: Any
    spec: Spec = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Declared:
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        raise NotImplementedError("layers are stacked by gptjax.model, not by nn.scan")

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        raise NotImplementedError("layers are stacked by gptjax.model, not by nn.scan")


def parameter(
    module: nn.Module,
    config: Model,
    name: str,
    dims: str,
    shape: tuple[int, ...],
    role: str,
    *,
    fan_in: str = "",
    stacks: str = "",
    mean: float = 0.0,
) -> jax.Array:
    """Declares a float32 parameter of `module`; returns it cast and gathered for use.

    One that `layers.linear.keep` has rounded comes `Scaled` or `Turned`, to what can take it, one in
    `Blocks` so, and one with an adapter as `Adapted`.

    Args:
        module: the Linen module that owns it.
        config: decides the initial scale and the dtype of use: its own, or float32 (`Spec.exact`).
        name: the last part of its path.
        dims: its dims, "DNH".
        shape: its shape.
        role: a row of `KIND`; gains and biases start at `mean`.
        fan_in: the letters of dims over which each output sums; see `Spec`.
        stacks: the letters of dims, its first ones, that number copies, such as experts.
        mean: the mean of its initial value.

    Raises:
        ValueError: on a role, fan_in or stacks that do not fit.
    """
    spec = Spec(shape, dims, mean, 0.0, role, fan_in, stacks)
    if role not in KIND or not set(fan_in) <= set(dims) or not dims.startswith(stacks):
        raise ValueError(
            f"parameter {name!r}: its role is one of {', '.join(KIND)}, its fan_in some of its "
            f"dims and its stacks the first of them; got {spec}"
        )
    if (spec.kind == "vector") == bool(fan_in):
        raise ValueError(f"parameter {name!r}: all but a gain or a bias name a fan_in, got {spec}")
    scheme = choose(INIT, config.init, "model.init")
    if role in scheme:
        base_fan_in = spec.size(fan_in) / parametrisation.width_ratio(config)
        base_layers = config.layers / parametrisation.depth_ratio(config)
        std = scheme[role](base_fan_in, base_layers) * parametrisation.init_std(config, spec.kind)
        spec = dataclasses.replace(spec, std=std * config.init_scale)
    value: Any = module.get_variable("params", name)
    if isinstance(value, Blocks):
        return value  # type: ignore[return-value]
    if not isinstance(value, Turned):  # whose shape Linen would refuse
        # Linen unboxes it: what comes back is the bare value.
        value = module.param(name, lambda key: Declared(jnp.zeros(shape, jnp.float32), spec))

    def use(value: Any, dims: str) -> Any:
        if isinstance(value, Turned):
            return Turned(use(value.matrix, turned(dims, fan_in)))
        return gather(value, dims, jnp.float32 if spec.exact else config.dtype, stacks)

    if isinstance(value, Adapted):
        a_dims, b_dims = spec.adapter
        base, a, b = use(value.base, dims), use(value.a, a_dims), use(value.b, b_dims)
        return value.replace(base=base, a=a, b=b)  # type: ignore[return-value]
    return use(value, dims)


def add_bias(module: nn.Module, config: Model, name: str, dims: str, y: jax.Array) -> jax.Array:
    """y plus a bias along its last dims, `dims`, in y's dtype.

    Added in float32, so that a bias's gradient is summed in it over all tokens.
    """
    shape = y.shape[y.ndim - len(dims) :]
    return (y + parameter(module, config, name, dims, shape, "bias")).astype(y.dtype)


@functools.cache
def _quantiles(role: str) -> np.ndarray:
    """65,536 equally likely values of mean 0 and variance 1, float32.

    Normal, at most 4.3 from 0, but uniform of the role that reads into an adapter: Kaiming's, as
    Hu et al.'s code and peft have it. Drawing is integer bits, a look-up and one product, each exact; `jax.random.normal`
    evaluates a polynomial, whose last bit changes with the shape of a device's shard.
    """
    share = (np.arange(2**16) + 0.5) / 2**16
    if role == "adapter_in":
        return (3**0.5 * (2 * share - 1)).astype(np.float32)
    return np.array([*map(NormalDist().inv_cdf, share)], np.float32)


def draw(spec: Spec, path: str, seed: jax.Array) -> jax.Array:
    """The initial value of a parameter, born sharded where a mesh is set.

    Args:
        spec: what to draw; a leading dim L is drawn layer by layer, each from its own
            key, so that layer 3 starts alike in a model of 4 layers and one of 40.
        path: its path, "blocks/attention/query".
        seed: a PRNG key.
    """
    key = jax.random.fold_in(seed, zlib.crc32(path.encode()))
    stacked = "L" in spec.stacks
    shape, dims = (spec.shape[1:], spec.dims[1:]) if stacked else (spec.shape, spec.dims)
    where = None if sharding.out(dims) is None else sharding.parameter_spec(dims)

    def one(key: jax.Array) -> jax.Array:
        if spec.std == 0:
            constant = jnp.full(shape, spec.mean, jnp.float32)
            return constant if where is None else jax.reshard(constant, where)
        bits = jax.random.bits(key, shape, jnp.uint16, out_sharding=where)
        unit = jnp.asarray(_quantiles(spec.role)).at[bits.astype(jnp.int32)]
        return spec.std * unit.get(out_sharding=where)

    if not stacked:
        return one(key)
    return jax.vmap(lambda layer: one(jax.random.fold_in(key, layer)))(jnp.arange(spec.shape[0]))


Named = tuple[tuple[str, Spec], ...]


def draw_all(specs: Named, seed: jax.Array) -> list[jax.Array]:
    """`draw` of each path, in one program."""
    if isinstance(seed, jax.core.Tracer):  # within another
        return _draw_all(specs, seed)
    return _drawing(jax.default_backend())(specs, seed)


def _draw_all(specs: Named, seed: jax.Array) -> list[jax.Array]:
    return [draw(spec, path, seed) for path, spec in specs]


@functools.cache
def _drawing(platform: str) -> Callable[[Named, jax.Array], list[jax.Array]]:
    """`_draw_all` in a program, which LLVM makes for CPUs in a third of the time, as fast a one."""
    less = jax.config.read("jax_disable_most_optimizations")  # there is no effort to save then
    options = {"xla_backend_optimization_level": 1} if platform == "cpu" and not less else None
    return jax.jit(_draw_all, static_argnums=0, compiler_options=options)
