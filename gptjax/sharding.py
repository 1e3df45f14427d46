"""The device mesh, and the one table that maps tensor dims to mesh axes.

Every tensor is named by the letters of the shape alphabet (see `gptjax/model.py`):
"BTD" is an activation, "LDNH" a stacked parameter. `RULES` says which mesh axes split which
letter, for activations and for parameters, in training and in decoding. Beside it only the
config's section `mesh` names a mesh axis. Axes are Explicit: jax checks every sharding while
it traces and refuses what it would otherwise guess (docs.jax.dev, "Explicit sharding").

`axis` always means a mesh axis, `dim` always a tensor's.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import Config, ConfigError
from gptjax.config import Mesh as MeshConfig

AXES = ("data", "fsdp", "tensor")

# Letter -> mesh axes. A letter that is absent is never split. Parameters add the
# fsdp split of the width, undone by `gather` right before use (ZeRO-3,
# Rajbhandari et al. 2020); tensor splits follow Megatron (Shoeybi et al. 2019).
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}
PARAMETER_RULES: dict[str, tuple[str, ...]] = ACTIVATION_RULES | {"D": ("fsdp",)}


class Rules(NamedTuple):
    activations: dict[str, tuple[str, ...]]
    parameters: dict[str, tuple[str, ...]]


RULES: dict[str, Rules] = {
    "training": Rules(ACTIVATION_RULES, PARAMETER_RULES),
    # Every new token reads all weights: they are gathered once and stay whole, save for tensor.
    "decoding": Rules(ACTIVATION_RULES, ACTIVATION_RULES),
}
_PHASE = contextvars.ContextVar("phase", default="training")


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What is traced inside follows the row `name` of `RULES`; elsewhere it is "training"."""
    token = _PHASE.set(name)
    try:
        yield
    finally:
        _PHASE.reset(token)


# A batches, B rows, T query and S key positions, D width, N heads, K kv heads, G = N/K,
# H head width, F feed-forward, E experts, V vocabulary, C vocabulary chunk, L layers,
# P positions, 1 a single row that stands for all, which nothing splits.
LETTERS = frozenset("ABTSDNKGHFEVCLP1")


def mesh_shape(config: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along each mesh axis, of so many; `data` None takes what the others leave."""
    fixed = config.fsdp * config.tensor
    data = config.data if config.data is not None else max(1, devices // fixed)
    return dict(zip(AXES, (data, config.fsdp, config.tensor), strict=True))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with axes (data, fsdp, tensor) over all `devices` (default: every device).

    Raises:
        ConfigError: if the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    if (expected := math.prod(shape.values())) != len(devices):
        raise ConfigError(
            f"mesh {' x '.join(f'{axis}={n}' for axis, n in shape.items())} wants {expected} "
            f"devices, but {len(devices)} are here: set mesh.data, mesh.fsdp and mesh.tensor to "
            f"numbers whose product is {len(devices)}"
        )
    return jax.make_mesh(
        tuple(shape.values()),
        AXES,
        axis_types=(AxisType.Explicit,) * len(AXES),
        devices=devices,
    )


def spec(dims: str) -> P:
    """The PartitionSpec of an activation named by its letters.

    Raises:
        ValueError: on a letter outside the alphabet, or two dims that claim one mesh axis.
    """
    return _spec(dims, RULES[_PHASE.get()].activations)


def parameter_spec(dims: str) -> P:
    """The PartitionSpec of a stored parameter, its gradient and its optimiser moments."""
    return _spec(dims, RULES[_PHASE.get()].parameters)


def _spec(dims: str, rules: dict[str, tuple[str, ...]]) -> P:
    unknown = set(dims) - LETTERS
    if unknown:
        raise ValueError(f"dims {dims!r}: no such letter in the shape alphabet: {sorted(unknown)}")
    claims = [axis for dim in dims for axis in rules.get(dim, ())]
    if len(claims) != len(set(claims)):
        raise ValueError(f"dims {dims!r} claim a mesh axis twice: {claims}")
    entries = [rules.get(dim, ()) for dim in dims]
    return P(*(e[0] if len(e) == 1 else (e or None) for e in entries))


def out(dims: str) -> P | None:
    """`out_sharding` of an op that yields an activation `dims`; None where no mesh is set."""
    return None if jax.sharding.get_abstract_mesh().empty else spec(dims)


def like(x: jax.Array) -> P | None:
    """`out_sharding` of an op whose result lies as `x` does, such as its gradient."""
    return None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding.spec


def shard(x: jax.Array, dims: str) -> jax.Array:
    """The activation `x` laid as the rules say, wherever it lay; itself where no mesh is set."""
    target = out(dims)
    return x if target is None or jax.typeof(x).sharding.spec == target else jax.reshard(x, target)


def store(parameter: jax.Array, dims: str) -> jax.Array:
    """A parameter laid as it is kept between uses; itself where no mesh is set."""
    return parameter if out("") is None else jax.reshard(parameter, parameter_spec(dims))


def gather(parameter: jax.Array, dims: str, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A parameter ready for use: cast, then gathered over fsdp.

    The cast comes first so that the all-gather moves `dtype`, not float32.
    """
    return shard(parameter.astype(dtype), dims)


def round_up(size: int, dim: str) -> int:
    """The least multiple of the devices along `dim` of an activation that is at least `size`."""
    shape = jax.sharding.get_abstract_mesh().shape
    ways = math.prod(shape.get(axis, 1) for axis in RULES[_PHASE.get()].activations[dim])
    return -(-size // ways) * ways


def place(load: Callable[[int, int], Any], rows: int, dims: str) -> Any:
    """Puts the rows of a batch on the mesh; each process loads only those it owns.

    Args:
        load: (start, stop) -> a tree of arrays whose leading dim is rows [start, stop).
        rows: rows over all processes.
        dims: the dims of the arrays, "BT".
    """
    sharding: Any = NamedSharding(jax.sharding.get_mesh(), spec(dims))
    # Only the row dim of a batch is ever split, so an addressable shard is a range of rows.
    owned = sharding.addressable_devices_indices_map((rows,) + (1,) * (len(dims) - 1)).values()
    ranges = [index[0].indices(rows)[:2] for index in owned]
    first, last = min(start for start, _ in ranges), max(stop for _, stop in ranges)

    def put(array: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            return array[start - first : stop - first]

        return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, shard)

    return jax.tree.map(put, load(first, last))


def check_divisible(config: Config, specs: Any, mesh: Mapping[str, int]) -> None:
    """Refuses a run that does not divide over the mesh, before anything is compiled.

    Args:
        config: of the run.
        specs: of `gptjax.model.abstract_params`: a dim of a parameter has the size that it has
            in activations.
        mesh: devices along each axis, such as `Mesh.shape`.

    Raises:
        ConfigError: naming the knob, its value and the axis that does not divide it.
    """
    rows = config.data.batch_size // config.train.accumulation
    _check_divisible("B", "data.batch_size / train.accumulation", rows, mesh)
    check_model_divisible(specs, mesh)


# The knob that sets the size of a dim that a mesh may split.
KNOBS = {
    "N": "model.heads",
    "K": "model.kv_heads",
    "F": "model.ff_dim",
    "V": "model.vocab_size",
    "D": "model.width",
}


def check_model_divisible(specs: Any, mesh: Mapping[str, int]) -> None:
    """The same of a model alone, whatever the batch."""
    sizes = {(d, n) for s in jax.tree.leaves(specs) for d, n in zip(s.dims, s.shape, strict=True)}
    for dim, knob in KNOBS.items():
        for size in sorted(size for letter, size in sizes if letter == dim):
            _check_divisible(dim, knob, size, mesh)


def _check_divisible(dim: str, knob: str, size: int, mesh: Mapping[str, int]) -> None:
    axes = PARAMETER_RULES[dim]
    ways = math.prod(mesh[axis] for axis in axes)
    if size % ways:
        raise ConfigError(
            f"{knob}={size} does not divide over mesh axes {' x '.join(axes)} = {ways}: "
            f"make it a multiple of {ways}, or change the mesh"
        )
