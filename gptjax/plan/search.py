"""Which of many configs fit on some hardware, the fastest first.

What cannot run is left out before anything is compiled: a mesh that the sizes do not divide over,
and a state (parameters, gradients, optimiser) that alone is larger than the memory. The others are
compiled, several at once; each answer is kept, so that a search that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from gptjax import accounting, sharding
from gptjax import model as gpt
from gptjax.config import Config, ConfigError, Mesh, UserError
from gptjax.plan import plan as plans
from gptjax.plan.estimate import mesh_of
from gptjax.plan.hardware import Hardware
from gptjax.sharding import AXES


class Found(NamedTuple):
    """A candidate: its plan, or why it has none."""

    name: str
    plan: dict[str, Any] | None
    refused: str


def meshes(hardware: Hardware) -> Iterator[Mesh]:
    """Every way to share the devices out among the axes, those by powers of two and what is left."""
    n = hardware.devices
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    for sizes in itertools.product(divisors, repeat=len(AXES) - 1):
        first, rest = divmod(n, math.prod(sizes))
        if not rest:
            yield Mesh(**dict(zip(AXES, (first, *sizes), strict=True)))


def over_meshes(candidates: Mapping[str, Config], hardware: Hardware) -> dict[str, Config]:
    """Each candidate on each mesh that it divides over; those without any stay, to be refused."""
    spread: dict[str, Config] = {}
    for name, config in candidates.items():
        before = len(spread)
        specs = gpt.abstract_params(config.model)
        for mesh in meshes(hardware):
            if sharding.idle(specs, mesh):
                continue
            on_mesh = dataclasses.replace(config, mesh=mesh)
            try:
                shape = mesh_of(on_mesh, hardware)
            except ConfigError:
                continue
            text = " ".join(f"{axis}={size}" for axis, size in shape.items() if size > 1)
            spread[", ".join(filter(None, (name, text or "one device")))] = on_mesh
        if len(spread) == before:
            spread[name] = config
    return spread


def search(
    candidates: Mapping[str, Config],
    hardware: Hardware,
    dollars: float | None,
    jobs: int,
    say: Callable[[str], None],
) -> list[Found]:
    """Plans for all: what fits, by the high end of a step's time a token, then what does not."""

    def one(name: str, config: Config) -> Found:
        try:
            mesh = mesh_of(config, hardware)
            counted = accounting.memory_bytes(config, mesh)
            state = sum(counted[part] for part in ("parameters", "gradients", "optimizer", "ema"))
            if state > hardware.chip.usable:
                return Found(name, None, f"its state alone takes {state / 2**30:,.1f} GiB a device")
            plan = plans.make(config, hardware, dollars)
        except UserError as error:
            return Found(name, None, str(error))
        say(f"{name}: {'fits' if plan['fits']['fits'] else 'does not fit'}")
        return Found(name, plan, "")

    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(one, candidates, candidates.values()))
    return sorted(found, key=_rank)


def _rank(found: Found) -> tuple[int, float]:
    if found.plan is None:
        return 2, 0.0
    data, model = found.plan["config"]["data"], found.plan["config"]["model"]
    a_token = found.plan["range"]["high"]["step"] / (data["batch_size"] * model["context"])
    return (0 if found.plan["fits"]["fits"] else 1), a_token
