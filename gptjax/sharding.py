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
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import Config, ConfigError, off_values, recorded
from gptjax.config import Mesh as MeshConfig

AXES = tuple(axis.name for axis in dataclasses.fields(MeshConfig))

# Letter -> mesh axes. A letter that is absent is never split. Parameters add the
# fsdp split of the width, undone by `gather` right before use (ZeRO-3,
# Rajbhandari et al. 2020); tensor splits follow Megatron (Shoeybi et al. 2019). Queries are split
# by their position and keys are not: attention gathers them (context parallelism, as in Llama 3,
# Grattafiori et al. 2024, section 3.3.2). Experts stay split in use, and tokens go to them (GShard,
# Lepikhin et al. 2020).
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp", "expert"),
    "T": ("sequence",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}
STACK_RULES: dict[str, tuple[str, ...]] = {"E": ("expert",)}
PARAMETER_RULES: dict[str, tuple[str, ...]] = ACTIVATION_RULES | STACK_RULES | {"D": ("fsdp",)}
# One token does not divide: the devices of a sequence have rows of their own.
DECODING_RULES: dict[str, tuple[str, ...]] = ACTIVATION_RULES | {
    "B": (*ACTIVATION_RULES["B"], "sequence"),
    "T": (),
}


class Rules(NamedTuple):
    activations: dict[str, tuple[str, ...]]
    parameters: dict[str, tuple[str, ...]]


RULES: dict[str, Rules] = {
    "training": Rules(ACTIVATION_RULES, PARAMETER_RULES),
    # Every new token reads all weights: they are gathered once and stay whole, save for tensor
    # and expert.
    "decoding": Rules(DECODING_RULES, DECODING_RULES | STACK_RULES),
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


def decoding() -> bool:
    """Whether what is traced generates text, a token at a time."""
    return _PHASE.get() == "decoding"


def alone_on(kind: str) -> bool:
    """Whether what is traced runs on one device of this platform."""
    return jax.sharding.get_abstract_mesh().size <= 1 and platform() == kind


def platform() -> str:
    """That of the devices which run what is traced: "cpu", "gpu" or "tpu"; "none" of no devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_device(function: Callable[..., Any], where: Any, *operands: Any) -> Any:
    """What XLA cannot partition, on a mesh of one device, or where none is set.

    Args:
        where: the sharding of what it returns, see `like`.
    """
    if out("") is None:
        return function(*operands)
    specs = jax.tree.map(like, operands)
    return jax.shard_map(function, in_specs=specs, out_specs=where, check_vma=False)(*operands)


# A batches, B rows, T query and S key positions, D width, N heads, K kv heads, G = N/K,
# H head width, F feed-forward, E experts, V vocabulary, C vocabulary chunk, L layers,
# P positions, R an adapter's rank, 1 a single row that stands for all, which nothing splits.
LETTERS = frozenset("ABTSDNKGHFEVCLPR1")


def mesh_shape(config: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along each mesh axis, of so many; `data` None takes what the others leave.

    An axis whose knob is off is left out, so that programs are those from before there was one.
    """
    sizes = dataclasses.asdict(config)
    fixed = math.prod(n for axis, n in sizes.items() if axis != "data")
    if sizes["data"] is None:
        sizes["data"] = max(1, devices // fixed)
    off = off_values(MeshConfig)
    return {axis: n for axis, n in sizes.items() if n != off.get(axis)}


def whole_mesh(config: MeshConfig, devices: int, where: str = "this run") -> dict[str, int]:
    """`mesh_shape` over all of so many devices.

    Raises:
        ConfigError: if the axis sizes do not multiply to their number.
    """
    shape = mesh_shape(config, devices)
    if (product := math.prod(shape.values())) != devices:
        raise ConfigError(
            f"mesh {in_words(shape)} wants {product} devices, but {where} has {devices}: set "
            f"{', '.join(f'mesh.{axis}' for axis in AXES)} to numbers whose product is {devices}"
        )
    return shape


def section(shape: Mapping[str, int]) -> MeshConfig:
    """The config's section of a mesh that was made of one, of its `shape`."""
    return recorded(shape, MeshConfig)


def idle(specs: Any, config: MeshConfig) -> bool:
    """Whether a mesh splits the experts of a model that has none: the axis is one more of data."""
    return config.expert > 1 and not any("E" in s.dims for s in jax.tree.leaves(specs))


def in_words(shape: Mapping[str, int]) -> str:
    """A mesh for a person: "data=4 x fsdp=2"."""
    return " x ".join(f"{axis}={n}" for axis, n in shape.items())


def abstract_mesh(shape: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices, to trace on; without axes it is as if none were set.

    Its platform is none that there is, so that nothing asks jax for its devices: a GPU's memory would
    be taken, or a pod that is elsewhere be waited for.
    """
    nobody = AbstractDevice(device_kind="none", num_cores=None, platform="none")
    explicit = (AxisType.Explicit,) * len(shape)
    sizes = tuple(shape.values())
    return AbstractMesh(sizes, tuple(shape), axis_types=explicit, abstract_device=nobody)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of the axes of `mesh_shape` over all `devices` (default: every device).

    Neighbours on the mesh are neighbours in the hardware where that can be; several slices of TPUs
    are split over `data`.

    Raises:
        ConfigError: if the axis sizes do not multiply to the number of devices, or `data` not over
            the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = whole_mesh(config, len(devices))
    slices = 1
    if devices[0].platform == "tpu":  # of GPUs jax sorts the hosts
        slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape["data"] % slices:
        raise ConfigError(
            f"mesh.data={shape['data']} does not divide over {slices} slices, between which only "
            f"whole models are split: make it a multiple of {slices}"
        )
    # Not jax.make_mesh: it refuses several slices, and any mesh that splits an axis of the hardware.
    between = [slices if axis == "data" else 1 for axis in shape]
    within = [n // of for n, of in zip(shape.values(), between, strict=True)]
    arranged = (
        create_device_mesh(within, devices, allow_split_physical_axes=True)
        if slices == 1
        else create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    )
    return jax.sharding.Mesh(arranged, tuple(shape), axis_types=(AxisType.Explicit,) * len(shape))


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
    mesh = jax.sharding.get_abstract_mesh()
    here = AXES if mesh.empty else mesh.axis_names
    entries = [tuple(axis for axis in rules.get(dim, ()) if axis in here) for dim in dims]
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


def merge_tokens(equation: str, *operands: jax.Array) -> tuple[str, list[jax.Array]]:
    """A product that sums over all tokens, of operands "BT...", as one of operands (B T, ...).

    A CPU multiplies these as they lie, where XLA would first write (B, T, F) as (F, B T). Where T is
    split, or tokens have one dim already, the product stays as it is, and so do others than those of
    float32: jax 0.10.2 refuses bfloat16 as it lies where the sum is float32.
    """
    wide = all(x.dtype == jnp.float32 for x in operands)
    if ways("T") > 1 or "BT" not in equation or not wide:
        return equation, list(operands)

    def merged(x: jax.Array) -> jax.Array:
        where = like(x)
        to = None if where is None else P(where[0], *where[2:])
        return jnp.reshape(x, (-1, *x.shape[2:]), out_sharding=to)

    return equation.replace("BT", "B"), [merged(x) for x in operands]


def store(parameter: jax.Array, dims: str) -> jax.Array:
    """A parameter laid as it is kept between uses; itself where no mesh is set."""
    return parameter if out("") is None else jax.reshard(parameter, parameter_spec(dims))


def stacked_spec(dims: str, stacks: str) -> P:
    """The PartitionSpec of a parameter in use: its leading dims `stacks` stay split."""
    stored, used = parameter_spec(dims), spec(dims)
    return P(*stored[: len(stacks)], *used[len(stacks) :])


def gather(
    parameter: jax.Array, dims: str, dtype: jax.typing.DTypeLike, stacks: str = ""
) -> jax.Array:
    """A parameter ready for use: cast, then gathered over fsdp.

    The cast comes first so that the all-gather moves `dtype`, not float32.
    """
    parameter = parameter.astype(dtype)
    if not stacks or out("") is None:
        return shard(parameter, dims)
    return jax.reshard(parameter, stacked_spec(dims, stacks))


def axis_of(dim: str) -> str:
    """The one mesh axis that splits a dim of a parameter."""
    (axis,) = PARAMETER_RULES[dim]
    return axis


def round_up(size: int, dim: str) -> int:
    """The least size from `size` on of a dim of an activation that divides over the mesh."""
    multiple = _multiple(dim, ways(dim))
    return -(-size // multiple) * multiple


def ways(dim: str) -> int:
    """Devices over which a dim of an activation is split; 1 where no mesh is set."""
    return _ways(dim, RULES[_PHASE.get()].activations, jax.sharding.get_abstract_mesh().shape)


def _ways(dim: str, rules: Mapping[str, tuple[str, ...]], mesh: Mapping[str, int]) -> int:
    return math.prod(mesh.get(axis, 1) for axis in rules.get(dim, ()))


def _multiple(dim: str, ways: int) -> int:
    """What the size of a dim is to be a multiple of: of a row each device has two pieces."""
    return 2 * ways if dim == "T" and ways > 1 else ways


# Later queries see more keys, so a row is cut into two pieces for each device along it, of which
# the first has the first and the last, the second the second and the last but one, and so on: all
# then see equally many (as in Llama 3, Grattafiori et al. 2024, section 3.3.2).


def balanced(tokens: int) -> np.ndarray | None:
    """Which index of a row stands at each place after `balance`, int32; None where T is not split.

    Raises:
        ConfigError: if rows of so many tokens do not divide.
    """
    n = ways("T")
    if n == 1:
        return None
    check_context("tokens of a row", tokens)
    pieces = np.arange(tokens, dtype=np.int32).reshape(2 * n, -1)
    return np.stack([pieces[:n], pieces[n:][::-1]], axis=1).reshape(-1)


def balance(x: jax.Array, dims: str, back: bool = False) -> jax.Array:
    """x, its T in order, with T in the order of `balanced`; `back` puts it in order again.

    Each device gives away one piece with an even number and one with an odd number, and gets one
    of each: nothing is gathered.
    """
    (axis,), T, n = RULES[_PHASE.get()].activations["T"], dims.index("T"), ways("T")
    home = [*range(n), *reversed(range(n))]  # of each piece

    def swap(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of device i in order of number, which is i first, or even before odd."""
        odd = jax.lax.axis_index(axis) % 2 == 1
        return jnp.where(odd, b, a), jnp.where(odd, a, b)

    def move(x: jax.Array) -> jax.Array:
        pieces = tuple(jnp.split(x, 2, axis=T))
        pieces = swap(*pieces) if back else pieces
        routes = [[(i, home[2 * i + parity]) for i in range(n)] for parity in (0, 1)]
        if back:
            routes = [[(to, start) for start, to in route] for route in routes]
        even, odd = (
            jax.lax.ppermute(piece, axis, route)
            for piece, route in zip(pieces, routes, strict=True)
        )
        return jnp.concatenate((even, odd) if back else swap(even, odd), axis=T)

    return jax.shard_map(move, in_specs=spec(dims), out_specs=spec(dims))(shard(x, dims))


def gather_sequence(x: jax.Array, dims: str, was_balanced: bool) -> jax.Array:
    """x of dims such as "BTKH", its second split, as "BSKH": whole on each device and in order."""
    x = shard(x, dims.replace("T", "S"))
    if not was_balanced:
        return x
    B, _, *rest = x.shape
    # Of dims of size 1 jax would not know whether they are split.
    to = out(f"{dims[0]}SSS{dims[2:]}")
    pieces = jnp.reshape(x, (B, ways("T"), 2, -1, *rest), out_sharding=to)
    ordered = jnp.concatenate([pieces[:, :, 0], pieces[:, ::-1, 1]], axis=1)
    return jnp.reshape(ordered, x.shape, out_sharding=out(dims.replace("T", "S")))


def place(load: Callable[[int, int], Any], rows: int, dims: str) -> Any:
    """Puts the rows of a batch on the mesh; each process loads only those it owns.

    Args:
        load: (start, stop) -> a tree of arrays whose leading dim is rows [start, stop).
        rows: rows over all processes.
        dims: the dims of the arrays, "BT".
    """
    mesh = jax.sharding.get_mesh()
    sharding: Any = NamedSharding(mesh, spec(dims))
    of_rows: Any = NamedSharding(mesh, spec(dims[0]))
    owned = of_rows.addressable_devices_indices_map((rows,)).values()
    ranges = [index[0].indices(rows)[:2] for index in owned]
    first, last = min(start for start, _ in ranges), max(stop for _, stop in ranges)

    def put(array: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            return array[start - first : stop - first, *index[1:]]

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
    _check_divisible("T", "model.context", config.model.context, mesh)
    _check_divisible("T", "eval.context", config.eval.context or config.model.context, mesh)
    check_model_divisible(specs, mesh)


def check_context(knob: str, tokens: int) -> None:
    """Refuses rows of so many tokens if they do not divide over the current mesh.

    Raises:
        ConfigError: as `check_divisible`.
    """
    _check_divisible("T", knob, tokens, jax.sharding.get_abstract_mesh().shape)


# The knob that sets the size of a dim that a mesh may split.
KNOBS = {
    "N": "model.heads",
    "K": "model.kv_heads",
    "F": "model.ff_dim",
    "E": "model.experts",
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
    ways = _ways(dim, PARAMETER_RULES, mesh)
    if size % (multiple := _multiple(dim, ways)):
        twice = "two pieces on each of " if multiple > ways else ""
        raise ConfigError(
            f"{knob}={size} does not divide over {twice}mesh axes "
            f"{' x '.join(PARAMETER_RULES[dim])} = {ways}: make it a multiple of {multiple}, or "
            "change the mesh"
        )
