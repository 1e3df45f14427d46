"""What every process of a job sees before its first step; a host that differs or is slow is named.

Each row of CHECKS is looked at by every process, and the values of all are judged by every
process alike, from what jax's coordination service carried: so all end together, with one line.
What is measured (clock, products, all-reduce) is only looked at where the rest agrees, because
processes with other devices or versions may not run one program at all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import shutil
import socket
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import accounting, alive
from gptjax.config import Config, UserError, to_dict
from gptjax.progress import say
from gptjax.records import code_fingerprint
from gptjax.report import formats, terminal
from gptjax.sharding import make_mesh
from gptjax.storage import PATIENCE_SECONDS, Place, Unreachable, nearest_folder, replace_file

# Within which each process must have looked, and may have waited for a bucket.
SECONDS = 60.0 + PATIENCE_SECONDS
# Processes take each step together, at the pace of the slowest. At half the pace of the median a
# process wastes half of all the others.
SLOW = 0.5
CLOCK_SECONDS = 1.0  # the resolution of the times in records, which are compared between hosts
REPEATS = 10  # of what is measured: the best counts, which other work on the host disturbs least


class Look(NamedTuple):
    """What a process is to look at."""

    config: Config
    folder: Place  # of the run
    token: str  # the name of a file in it, by process 0


class Check(NamedTuple):
    """A row of CHECKS.

    Attributes:
        see: one process's value, which JSON can hold.
        judge: of all values, by index: what is wrong with those that are not as they should be.
        ends: whether `train` ends by it, rather than warns.
        show: a value as a person reads it.
    """

    see: Callable[[Look], Any]
    judge: Callable[[Sequence[Any]], dict[int, str]]
    ends: bool = True
    show: Callable[[Any], str] = str


# How values are judged.


def same(values: Sequence[Any]) -> dict[int, str]:
    """All must be what most are; of as many on two sides, what is seen at the lower index."""
    most = Counter(map(str, values)).most_common(1)[0][0]
    return {i: f"{v}, elsewhere {most}" for i, v in enumerate(values) if str(v) != most}


def no_fault(values: Sequence[Any]) -> dict[int, str]:
    """Each says what is wrong with it, "" for nothing."""
    return {i: str(v) for i, v in enumerate(values) if v}


def fast(values: Sequence[Any]) -> dict[int, str]:
    """None below half of the median; of two, of the faster."""
    median = statistics.median_high(values)
    return {
        i: f"{rate(v)}, less than half of the {rate(median)} of the others"
        for i, v in enumerate(values)
        if v < SLOW * median
    }


def together(values: Sequence[Any]) -> dict[int, str]:
    """Clocks, each read at the same moments, in seconds: none far from the median."""
    offsets = clock_offsets(values)
    return {
        i: f"{offset:+.1f} s from the others"
        for i, offset in enumerate(offsets)
        if abs(offset) > CLOCK_SECONDS
    }


def anything(values: Sequence[Any]) -> dict[int, str]:
    return {}


def clock_offsets(readings: Sequence[Sequence[float]]) -> list[float]:
    """Of each process, seconds from the median of all; processes x moments."""
    times = np.asarray(readings, np.float64)
    return np.median(times - np.median(times, axis=0), axis=1).tolist()


# What a process sees.


def _devices(look: Look) -> str:
    kinds = Counter(device.device_kind for device in jax.local_devices())
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _mesh(look: Look) -> str:
    """What it wants that is not here."""
    try:
        make_mesh(look.config.mesh)
    except UserError as error:
        return str(error)
    return ""


def _config(look: Look) -> str:
    content = json.dumps(to_dict(look.config), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def _shared(look: Look) -> str:
    """Whether the file that process 0 wrote is there."""
    until = time.monotonic() + 5  # a network file system may show it late
    while not (look.folder / look.token).exists():
        if time.monotonic() > until:
            return f"{look.folder.absolute()} on {socket.gethostname()} is not process 0's"
        time.sleep(0.1)
    return ""


def _writable(look: Look) -> str:
    mine = look.folder / f"{look.token}.{jax.process_index()}"
    try:
        mine.write_bytes(b"gptjax")
        mine.unlink()
    except Unreachable:
        raise
    except OSError as error:
        return f"cannot write in {look.folder.absolute()}: {error.strerror or error}"
    return ""


def _space(look: Look) -> dict[str, float]:
    """Free bytes, and those of the checkpoints kept and the one being written."""
    c = look.config
    copies = 3 + (c.optim.ema_decay is not None)  # float32 parameters, and two moments as Adam's
    checkpoint = 4 * copies * accounting.parameters(c.model)["total"]
    free = shutil.disk_usage(nearest_folder(look.folder)).free
    return {"free": free, "needed": (c.train.keep_checkpoints + 1) * checkpoint}


def enough(values: Sequence[Any]) -> dict[int, str]:
    return {
        i: f"{v['free'] / 1e9:.1f} GB free, checkpoints take {v['needed'] / 1e9:.1f} GB"
        for i, v in enumerate(values)
        if v["free"] < v["needed"]
    }


def _product(look: Look) -> float:
    """FLOP/s of a square product, on the slowest device of this process."""
    cpu = jax.default_backend() == "cpu"
    size, dtype = (1024, jnp.float32) if cpu else (8192, jnp.bfloat16)
    product, slowest = jax.jit(jnp.matmul), float("inf")
    for device in jax.local_devices():
        a = jax.device_put(jnp.ones((size, size), dtype), device)
        seconds = _best(functools.partial(product, a, a))
        slowest = min(slowest, 2 * size**3 / seconds)
    return slowest


def _all_reduce(look: Look) -> float | None:
    """Bytes/s of a float32 sum over all devices; None of one device, which sums nothing.

    As NCCL's tests count them (bus bandwidth): 2 (n - 1) / n of the bytes, for n devices.
    """
    n, size = len(jax.devices()), (2**20 if jax.default_backend() == "cpu" else 2**24)
    return 2 * (n - 1) / n * 4 * size / _best(_sum_over_all(size)) if n > 1 else None


def _clock(look: Look) -> list[float]:
    """Times, in seconds, right after sums that all processes end together."""
    reduce, clock = _sum_over_all(1), []
    for _ in range(REPEATS + 1):
        reduce().block_until_ready()
        clock.append(time.time())
    return clock[1:]  # the first is compiled as well


def _sum_over_all(size: int) -> Callable[[], jax.Array]:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    apart, whole = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    row = np.ones((1, size), np.float32)
    x = jax.make_array_from_callback((len(jax.devices()), size), apart, lambda where: row)
    total = jax.jit(lambda x: x.sum(axis=0), out_shardings=whole)
    return lambda: total(x)


def _best(run: Callable[[], jax.Array]) -> float:
    """Seconds of the fastest call; each process makes as many, so that they may meet in it."""
    run().block_until_ready()
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        run().block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


def rate(value: float | None, unit: str = "FLOP/s") -> str:
    """Such as "51.2 GFLOP/s"."""
    if value is None:
        return "—"
    return f"{value / 1e12:,.1f} T{unit}" if value >= 1e12 else f"{value / 1e9:,.3g} G{unit}"


def _version(package: str) -> Callable[[Look], str]:
    return lambda look: importlib.metadata.version(package)


CHECKS: dict[str, Check] = {
    "devices": Check(_devices, same),
    "mesh": Check(_mesh, no_fault, show=lambda v: "no" if v else "fits"),
    "jax": Check(_version("jax"), same),
    "jaxlib": Check(_version("jaxlib"), same),
    "python": Check(lambda look: platform.python_version(), same),
    "code": Check(lambda look: code_fingerprint()[:8], same),
    "config": Check(_config, same),
    "run folder": Check(_shared, no_fault, show=lambda v: v or "shared"),
    "write access": Check(_writable, no_fault, show=lambda v: v or "yes"),
    "free disk": Check(_space, enough, False, lambda v: f"{v['free'] / 1e9:,.1f} GB"),
}
# Looked at together, once the others agree.
MEASURED: dict[str, Check] = {
    "clock": Check(_clock, together, False, lambda v: f"{v:+.3f} s"),
    "product": Check(_product, fast, False, rate),
    "all-reduce": Check(_all_reduce, anything, False, lambda v: rate(v, "B/s")),
}


class Fault(NamedTuple):
    """What is wrong with a process."""

    process: int
    host: str
    check: str
    words: str
    ends: bool

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}: {self.check}: {self.words}"


class Report(NamedTuple):
    """What all processes saw: by process, by check; and what is wrong."""

    hosts: list[str]
    seen: list[dict[str, Any]]
    faults: list[Fault]


def examine(config: Config, workdir: Place) -> Report:
    """Lets every process look; all must call it, outside of a mesh. Leaves nothing in `workdir`.

    Raises:
        UserError: if a process does not look in time, or process 0 cannot write in `workdir`.
    """
    with _token(workdir) as token:
        look = Look(config, workdir, token)
        hosts = alive.gather("doctor/host", socket.gethostname(), SECONDS)
        seen: list[dict[str, Any]] = [{} for _ in hosts]
        faults: list[Fault] = []
        for checks in (CHECKS, MEASURED):
            if any(fault.ends for fault in faults):
                break
            mine = json.dumps({name: check.see(look) for name, check in checks.items()})
            for values, text in zip(
                seen, alive.gather(f"doctor/{len(seen[0])}", mine, SECONDS), strict=True
            ):
                values.update(json.loads(text))
            for name, check in checks.items():
                wrong = check.judge([values[name] for values in seen])
                faults += [Fault(i, hosts[i], name, w, check.ends) for i, w in wrong.items()]
        if "clock" in seen[0]:
            for values, offset in zip(seen, clock_offsets([v["clock"] for v in seen]), strict=True):
                values["clock"] = offset
    return Report(hosts, seen, faults)


@contextlib.contextmanager
def _token(workdir: Place) -> Iterator[str]:
    """The name of a file that process 0 puts into the folder, which it makes for that long."""
    made: list[Path] = []
    failure, name = "", f".doctor.{uuid.uuid4().hex}"
    if jax.process_index() == 0:
        if isinstance(workdir, Path):
            made = [p for p in (workdir, *workdir.absolute().parents) if not p.exists()]
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            replace_file(workdir / name, b"")
        except Unreachable:
            raise
        except OSError as error:
            failure = f"cannot write in {workdir}: {error.strerror or error}"
    name, failure = json.loads(
        alive.gather("doctor/token", json.dumps([name, failure]), SECONDS)[0]
    )
    try:
        if failure:
            raise UserError(f"{failure}. Free some space or choose another --workdir")
        yield name
    finally:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                (workdir / name).unlink()
                for folder in made:
                    folder.rmdir()


def check(config: Config, workdir: Place) -> None:
    """What `train` does first where there are several processes; nothing where there is one.

    Raises:
        UserError: naming the process that differs. What is slow, or short of disk, is only said.
    """
    if jax.process_count() == 1:
        return
    faults = examine(config, workdir).faults
    if ending := [fault for fault in faults if fault.ends]:
        more = f" (and {len(ending) - 1} more: `doctor` shows them)" * (len(ending) > 1)
        raise UserError(f"{ending[0]}{more}")
    for fault in faults:
        say(f"warning: {fault}")


def show(report: Report) -> None:
    """Prints a table, a row for each process, and what is wrong."""
    checks = {name: c for name, c in (CHECKS | MEASURED).items() if name in report.seen[0]}
    rows = [
        [str(i), host, *(check.show(values[name]) for name, check in checks.items())]
        for i, (host, values) in enumerate(zip(report.hosts, report.seen, strict=True))
    ]
    console = terminal.new_console()
    console.print(formats.terminal(formats.Table(["process", "host", *checks], rows, [])))
    for fault in report.faults:
        console.print(str(fault), soft_wrap=True)
    if not report.faults:
        console.print("nothing is wrong")
