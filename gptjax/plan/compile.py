"""The real training step, compiled for hardware that is not here, in a process of its own.

`ask` starts `python -m gptjax.plan.compile`, so that neither the compilers nor their devices enter
the process that asks. The compiler of TPUs is `libtpu`, that of GPUs jax's CUDA plugin, which reads
a description of the GPU (`assets/`); the extra `plan` brings both. Without them the same step can
be compiled for as many virtual devices of a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import gptjax
from gptjax import loop, setup, sharding, state
from gptjax.config import Config, UserError, from_dict, out_of_memory, to_dict
from gptjax.data.batches import PACKING, Batch
from gptjax.places import cache
from gptjax.plan import collectives
from gptjax.plan.hardware import Hardware, parse
from gptjax.records import code_fingerprint
from gptjax.storage import replace_file

# Of jax and of libtpu on a host that has no TPU and asks no server for one.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
}
MODULES = {
    "tpu": ("libtpu",),
    "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
    "cpu": ("jaxlib",),
}
OWN = ("collectives", "compile", "hardware")  # of this room, what decides an answer
# The distributions that compile for a platform.
COMPILERS = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    "cpu": ("jaxlib",),
}


class Compiled(NamedTuple):
    """What a compiler told of a training step; bytes are those of one device.

    Attributes:
        by: the compiler and its version.
        seconds: that tracing, lowering and compiling took.
        host_bytes: the most that the compiling process held.
        arguments: bytes of the state and the batch.
        temporaries: bytes that live within a step.
        total: bytes of all: arguments, results that are no argument given away, temporaries, code.
        exhausted: what the compiler said where the step does not fit; then the bytes are 0.
        collectives: those of a step; None where the program's text could not be read.
        unread: why not.
    """

    by: str
    seconds: float
    host_bytes: int
    arguments: int
    temporaries: int
    total: int
    exhausted: str | None
    collectives: list[collectives.Collective] | None
    unread: str | None


def compiler_for(hardware: Hardware) -> str | None:
    """The module that compiles for it; None where it is not installed."""
    return next((n for n in MODULES[hardware.chip.platform] if importlib.util.find_spec(n)), None)


def ask(config: Config, hardware: Hardware) -> Compiled:
    """Compiles in another process, or remembers what that process said.

    Raises:
        UserError: if the compiler fails otherwise than by the step's being too large.
    """
    virtual = compiler_for(hardware) in (None, "jaxlib")
    request = {"config": to_dict(config), "on": hardware.name, "virtual": virtual}
    room = [(Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in OWN]
    versions = [_versions(platform) for platform in COMPILERS]
    known = [request, code_fingerprint(), room, versions, os.environ.get("XLA_FLAGS", "")]
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache() / "plans"
    folder.mkdir(exist_ok=True)
    remembered = folder / f"{name}.json"
    if not remembered.is_file():
        replace_file(remembered, json.dumps(_start(request, hardware)).encode())
    answer = json.loads(remembered.read_bytes())
    if answer["collectives"] is not None:
        answer["collectives"] = [collectives.Collective(**c) for c in answer["collectives"]]
    return Compiled(**answer)


def _versions(platform: str) -> str:
    versions = []
    for name in COMPILERS[platform]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(versions)


def _start(request: dict[str, Any], hardware: Hardware) -> dict[str, Any]:
    environment = os.environ | ENVIRONMENT
    # The child finds this very package, wherever it was started from.
    paths = [str(Path(gptjax.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if request["virtual"]:
        flags = re.sub(r"--xla_force_host\S+", "", environment.get("XLA_FLAGS", ""))
        count = f"--xla_force_host_platform_device_count={hardware.devices}"
        environment["XLA_FLAGS"] = f"{flags} {count}".strip()
    done = subprocess.run(
        [sys.executable, "-m", "gptjax.plan.compile"],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        fault = next(
            (w for w in reversed(words) if re.match(r"[\w.]+(Error|Exception)\b", w)), words[-1]
        )
        whole = RuntimeError(done.stderr)  # for --debug
        raise UserError(f"no plan for {hardware.name}: its compiler says {fault[:400]}") from whole
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "refused" in answer:
        raise UserError(answer["refused"])
    return answer


# ---- in the other process


def devices_of(hardware: Hardware) -> Sequence[jax.Device]:
    """The devices of a topology, which are only compiled for."""
    from jax.experimental import topologies

    if hardware.chip.platform == "tpu":
        more: dict[str, Any] = {}
        if hardware.kind == "v4":
            more["chip_config_name"] = "megacore"  # a chip is one device, as on a real one
        if hardware.slice_devices < 4:
            more["chips_per_host_bounds"] = (1, 1, 1)
        if hardware.slices > 1:
            more["num_slices"] = hardware.slices
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{hardware.kind}:{hardware.layout}", **more
        ).devices
    layout = f"1x{hardware.slices}x{hardware.layout}"
    description = files("gptjax.plan") / "assets" / f"{hardware.kind}.txtpb"
    return topologies.get_topology_desc(
        platform="cuda", topology_name=layout, topology=layout,
        target_config=description.read_text(encoding="utf-8"),
    ).devices  # fmt: skip


def abstract_batch(config: Config) -> Batch[jax.ShapeDtypeStruct]:
    """The shapes of a step's batch, laid on the current mesh."""
    micro = config.train.accumulation
    shape = (config.data.batch_size // micro, micro, config.model.context)
    rows = NamedSharding(jax.sharding.get_mesh(), sharding.spec("BAT"))
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    packing = PACKING[config.data.packing]
    segments = [ids, ids] if packing.segmented else []
    return Batch(ids, ids, weights, *segments, **dict.fromkeys(packing.extra, weights))


def compile_for(config: Config, devices: Sequence[jax.Device], domains: Sequence[int]) -> Compiled:
    """Compiles the step of `state.make_train_step` for a mesh over `devices`.

    Args:
        domains: of each device in the order given, the slice or host that it is of.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    domain_of = {device.id: domain for device, domain in zip(devices, domains, strict=True)}
    platform = devices[0].platform
    options = loop.compiler_options(platform)
    if platform == "gpu":
        options["xla_gpu_autotune_level"] = 0  # which would try kernels on a GPU
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        config = setup.settle(config)
        step: Any = state.make_train_step(config)
        lowered = step.trace(state.abstract(config), abstract_batch(config)).lower()
        exhausted, told = None, {"arguments": 0, "temporaries": 0, "total": 0}
        read: list[collectives.Collective] | None = None
        unread = None
        try:
            compiled = lowered.compile(compiler_options=options)
        except Exception as error:
            if not out_of_memory(error):
                raise
            exhausted = exhaustion(str(error))
        else:
            told = _bytes(compiled.memory_analysis(), platform)
            order = [domain_of[device.id] for device in mesh.devices.flat]
            try:
                read = collectives.read(compiled.as_text(), order)
            except collectives.Unknown as error:
                unread = str(error)
    return Compiled(
        by=_versions(platform),
        seconds=time.perf_counter() - begin,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        exhausted=exhausted,
        collectives=read,
        unread=unread,
        **told,
    )


def _bytes(memory: Any, platform: str) -> dict[str, int]:
    arguments = memory.argument_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = arguments + results + memory.temp_size_in_bytes
    if platform == "tpu":  # of its temporaries the sum is more than what is taken at once
        total = memory.peak_memory_in_bytes
    total += memory.generated_code_size_in_bytes
    return {"arguments": arguments, "temporaries": total - arguments, "total": total}


def exhaustion(message: str) -> str:
    """The sentence of the compiler that says how much is lacking."""
    sentences = re.split(r"(?<=[.:])\s|\n", message.replace("RESOURCE_EXHAUSTED:", ""))
    telling = [s.strip() for s in sentences if re.search(r"\d[\d.]*\s?[KMGT]i?B?\b", s)]
    return telling[0] if telling else message.strip().splitlines()[0]


def main() -> None:
    request = json.loads(sys.stdin.read())
    config: Config = from_dict(request["config"])
    hardware = parse(request["on"])
    domains = [i // hardware.slice_devices for i in range(hardware.devices)]
    try:
        if request["virtual"]:
            devices: Sequence[jax.Device] = jax.devices()
        else:
            devices = devices_of(hardware)
        answer = compile_for(config, devices, domains)._asdict()
        if answer["collectives"] is not None:
            answer["collectives"] = [dataclasses.asdict(c) for c in answer["collectives"]]
    except UserError as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
