"""From what is counted, declared and compiled to memory, time, days and dollars.

Every figure says by what it is known:

    compiler    the compiler of that hardware, or what follows from its program alone
    analytic    exact arithmetic: shapes, shardings, FLOPs of the products
    estimate    arithmetic with something in it that is rough, or that was published and not measured

The time of a step is a range. Its low end is the longest of computing, memory and network, each at
its published peak and all at once, with the FLOPs that a model needs: no run is faster. Its high
end adds them up, one after another, with what is computed again and what a causal mask wastes. It
is no upper bound, because no device reaches its peaks; for that see `gptjax.plan.ledger`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from gptjax import accounting, model, sharding, state
from gptjax.config import Config
from gptjax.plan.collectives import Collective, totals
from gptjax.plan.compile import Compiled
from gptjax.plan.hardware import Hardware
from gptjax.trainable import trainable

COMPILER, ANALYTIC, ESTIMATE = "compiler", "analytic", "estimate"
LARGE = 64 * 2**20  # bytes of an array that lies whole on every device, from which it is flagged
DAY = 86400.0


class Figure(NamedTuple):
    """A number and by what it is known."""

    value: float
    by: str


class Array(NamedTuple):
    """An array of the state of training.

    Attributes:
        path: "params/blocks/attention/query".
        shape: whole.
        letters: of the shape alphabet, "" where it is no parameter's.
        spec: the mesh axes that split it.
        bytes: of one device.
        flagged: whether every device has all of it, and it is large.
    """

    path: str
    shape: tuple[int, ...]
    letters: str
    spec: str
    bytes: int
    flagged: bool


def mesh_of(config: Config, hardware: Hardware) -> dict[str, int]:
    """Devices along each mesh axis, checked as a run would.

    Raises:
        ConfigError: on a mesh that the model, the batch or the hardware does not divide over.
    """
    shape = sharding.whole_mesh(config.mesh, hardware.devices, hardware.name)
    sharding.check_divisible(config, model.abstract_params(config.model), shape)
    return shape


def arrays(config: Config, mesh: Mapping[str, int]) -> list[Array]:
    """Every array of the state, as `state.create` lays it on such a mesh."""
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(mesh)):
        leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: state.create(config)))
    specs = [(_path(path), spec) for path, spec in _declared(config)]
    rows = []
    for path, leaf in leaves:
        where = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        held = accounting.held_bytes(leaf)
        name = _path(path)
        of = name.removesuffix("/values")  # of a rounded parameter
        alike = (s for path, s in specs if of.endswith(path) and s.shape == leaf.shape)
        letters = next((spec.dims for spec in alike), "")
        whole = held == leaf.size * leaf.dtype.itemsize
        flagged = whole and held >= LARGE and max(mesh.values()) > 1
        axes = ", ".join("·".join(jax.tree.leaves(entry)) or "–" for entry in where)
        rows.append(Array(name, leaf.shape, letters, axes, held, flagged))
    return rows


def _declared(config: Config) -> list[tuple[Any, Any]]:
    """What is trained, and the model, of which the rest is frozen."""
    trees = trainable(config).specs, model.abstract_params(config.model)
    return [pair for tree in trees for pair in jax.tree_util.tree_leaves_with_path(tree)]


def _path(path: Sequence[Any]) -> str:
    names = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path)
    return "/".join(str(name) for name in names)


def memory(counted: Mapping[str, int], compiled: Compiled | None) -> dict[str, Figure]:
    """Bytes of a device by purpose, of those that `accounting.memory_bytes` counts; last "total".

    What a compiler tells is the sum of all that lives within a step. It is split by what is known
    besides: the gradients' size, and the estimate of the activations, which takes no more than is
    left; the rest are temporaries.
    """
    parts = {name: Figure(counted[name], ANALYTIC) for name in ("parameters", "optimizer", "ema")}
    kept = counted["activations"] + counted["logits"]
    if compiled is None or compiled.exhausted is not None:
        parts |= {
            "gradients": Figure(counted["gradients"], ANALYTIC),
            "activations": Figure(kept, ESTIMATE),
            "total": Figure(counted["total"], ESTIMATE),
        }
        return parts
    gradients = min(counted["gradients"], compiled.temporaries)
    activations = min(kept, compiled.temporaries - gradients)
    named = sum(int(figure.value) for figure in parts.values()) + gradients + activations
    return parts | {
        "gradients": Figure(gradients, ANALYTIC),
        "activations": Figure(activations, ESTIMATE),
        # Batch, code, copies, and what the estimate of the activations does not know.
        "temporaries": Figure(compiled.total - named, COMPILER),
        "total": Figure(compiled.total, COMPILER),
    }


class Traffic(NamedTuple):
    """The collectives of a step that are alike."""

    kind: str
    across: str  # "links" of a slice or host, or the "network" between them
    times: int
    sent: float  # bytes by a device
    seconds: float | None  # at the published rate; None where that is not known


def traffic(collectives: Sequence[Collective], hardware: Hardware) -> list[Traffic]:
    rows = []
    for (kind, crosses), (times, sent) in totals(collectives).items():
        rate = hardware.chip.network if crosses else hardware.chip.link
        across = "network" if crosses else "links"
        rows.append(Traffic(kind, across, times, sent, None if rate is None else sent / rate))
    return rows


# How many forward passes' FLOPs a step does more than it needs, at most, by `model.remat`.
AGAIN = {"none": 0.0, "dots": 0.0, "attention": 1.0, "full": 1.0}


class Time(NamedTuple):
    """Of a step, at the ends of its range; seconds of the parts at the low end."""

    low: float
    high: float
    compute: float
    memory: float | None
    network: float | None


def step_time(config: Config, hardware: Hardware, held: int, rows: Sequence[Traffic]) -> Time:
    """The range of a step's seconds: see this module's words.

    Args:
        config: the whole config.
        hardware: that takes the step.
        held: bytes of a device in training.
        rows: what is sent.
    """
    tokens = config.data.batch_size * config.model.context
    needed = accounting.train_flops_per_token(config, causal=True)
    wasted = accounting.train_flops_per_token(config, causal=False)
    wasted *= 1 + AGAIN.get(config.model.remat, 1.0) / 3
    rate = hardware.devices * hardware.chip.peak
    # Read and written once each at least: the state; written and read: gradients, activations.
    bandwidth = hardware.chip.bandwidth
    moving = None if bandwidth is None else 2 * held / bandwidth
    sending = [row.seconds for row in rows if row.seconds is not None]
    network = sum(sending) if sending else None
    compute, known = tokens * needed / rate, [s for s in (moving, network) if s is not None]
    return Time(
        max([compute, *known]), tokens * wasted / rate + sum(known), compute, moving, network
    )
