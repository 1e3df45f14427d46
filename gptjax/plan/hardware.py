"""The hardware that a plan is made for: one dated table of what its makers and vendors say.

Every number is a published one, of a device as jax sees it: a chip, or half of one where a chip is
two devices (tpu7x). None is a number for which no source was found. Sources, read on 2026-11-26:

    TPUs     docs.cloud.google.com/tpu/docs, "System architecture" of v4, v5e, v5p, v6e and tpu7x,
             whose bandwidths between chips count both ways: half of them here. What the page of v4
             leaves out, its links, is of jax-ml/scaling-book, tpus.md: six of 9e10 bytes/s, both
             ways. The network of v5e is 6.4 Tbit/s over the 256 chips of a pod. Memory for a
             program is what the compiler, libtpu 0.0.42.1, says that it has.
    GPUs     NVIDIA's data sheets of A100 80 GB, H100 and H200 (SXM), as others quote them: half of
             NVLink's two-way figure, and for the peaks half of "with sparsity". Between hosts a
             network card of 200 (A100) or 400 Gbit/s for each GPU, as in calculon-ai/calculon,
             systems/a100_80g.json, and MLPerf's descriptions of H200 hosts. jax reserves three
             quarters of the memory (docs.jax.dev, "GPU memory allocation").
    dollars  on demand, an hour of a device: skypilot-org/skypilot-catalog, catalogs/v8. TPUs:
             gcp/vms.csv at 006059e, us-central (v4-8 12.88, v5litepod-1 1.20, v5p-12288 25,804.80,
             v6e-1 2.70). H100, H200: nebius/vms.csv at 0082b04 (23.60 and 28.00 for eight). A100:
             lambda/vms.csv at 0f40703 (22.32 for eight). No price of tpu7x is in it.

A price is what some vendor asked on some day. Give your own by `--dollars`. cpu-N are N devices of
this machine, whose peak is measured and whose other figures are not known.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any, NamedTuple

from gptjax import accounting
from gptjax.config import UserError

DATE = "2026-11-26"
GIB = 2**30


class Chip(NamedTuple):
    """A row of the table, for one device.

    Attributes:
        kind: how jax's `device_kind` begins.
        platform: "tpu", "gpu" or "cpu".
        memory: bytes that it has.
        usable: bytes of them for a program.
        bandwidth: of its memory, bytes/s; None if not known.
        link: bytes/s that it sends to the devices of its slice or host, over all links together;
            None if not known.
        network: bytes/s that it sends to those of others; None if not known.
        dollars: an hour of it; None if not known.
        cores: of a device by which its vendor counts: "v5p-8" has four chips of two.
        sizes: devices of a slice -> how they lie; of a host, for GPUs.
    """

    kind: str
    platform: str
    memory: int
    usable: int
    bandwidth: float | None
    link: float | None
    network: float | None
    dollars: float | None
    cores: int
    sizes: dict[int, str]

    def covers(self, device_kind: str) -> bool:
        """Whether a device of this kind is such a chip, and no other row's: "TPU v5 lite" is no v5p."""
        others = [c.kind for c in CHIPS.values() if len(c.kind) > len(self.kind)]
        return device_kind.startswith(self.kind) and not device_kind.startswith(tuple(others))

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s of a device, by `gptjax.accounting`; of a CPU float32, measured now."""
        if self.platform == "cpu":
            return accounting.matmul_rate() / next(iter(self.sizes))
        peak, _ = accounting.published_peak(self.kind)
        assert peak is not None, self.kind
        return peak


def _torus(*layouts: str) -> dict[int, str]:
    return {math.prod(map(int, layout.split("x"))): layout for layout in layouts}


FLAT = _torus("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = _torus(
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12"),
    *("8x8x8", "8x8x12", "8x8x16", "8x16x16", "16x16x16"),
)
HOST = _torus("1", "2", "4", "8")


def _tpu(
    kind: str, memory: float, usable: float, bandwidth: float, link: float, **rest: Any
) -> Chip:
    """Memory in GiB, rates in GB/s; `link` is the published bandwidth, both ways together."""
    sizes, cores = rest.pop("sizes"), rest.pop("cores", 1)
    bytes_ = int(memory * GIB), int(usable * GIB)
    return Chip(
        kind, "tpu", *bytes_, bandwidth * 1e9, link * 1e9 / 2, **rest, cores=cores, sizes=sizes
    )


def _gpu(
    kind: str, memory: int, bandwidth: float, link: float, network: float, dollars: float
) -> Chip:
    """Memory in GB, rates in GB/s, the network's in Gbit/s; dollars of a host of eight."""
    rates = bandwidth * 1e9, link * 1e9 / 2, network * 1e9 / 8
    return Chip(
        kind,
        "gpu",
        memory * 10**9,
        memory * 10**9 * 3 // 4,
        *rates,
        dollars / 8,
        cores=1,
        sizes=HOST,
    )


HALVES = {2 * chips: layout for chips, layout in CUBES.items()}
CHIPS: dict[str, Chip] = {
    "v4": _tpu("TPU v4", 32, 30.75, 1200, 540, network=None, dollars=3.22, cores=2, sizes=CUBES),
    "v5e": _tpu("TPU v5 lite", 16, 15.75, 819, 400, network=25e9 / 8, dollars=1.20, sizes=FLAT),
    # The compiler has more than the data sheet says.
    "v5p": _tpu(
        "TPU v5", 95, 95.74, 2765, 1200, network=50e9 / 8, dollars=4.20, cores=2, sizes=CUBES
    ),
    "v6e": _tpu("TPU v6 lite", 32, 31.25, 1638, 800, network=100e9 / 8, dollars=2.70, sizes=FLAT),
    # Half of each figure of the chip.
    "tpu7x": _tpu("TPU7x", 96, 94.75, 3690, 600, network=50e9 / 8, dollars=None, sizes=HALVES),
    "a100": _gpu("NVIDIA A100", 80, 2039, 600, 200, 22.32),
    "h100": _gpu("NVIDIA H100", 80, 3350, 900, 400, 23.60),
    "h200": _gpu("NVIDIA H200", 141, 4800, 900, 400, 28.00),
}


MOST_VIRTUAL = 256  # devices of a CPU; more take minutes to make


class Hardware(NamedTuple):
    """What `--on` names.

    Attributes:
        name: as it was given, "2xv4-128".
        kind: the row of `CHIPS`, "v4".
        chip: what it says.
        slices: groups of devices with links among them: slices of a pod, or hosts.
        layout: of a slice, "4x4x4"; of a host its number of devices.
    """

    name: str
    kind: str
    chip: Chip
    slices: int
    layout: str

    @property
    def slice_devices(self) -> int:
        return next(n for n, layout in self.chip.sizes.items() if layout == self.layout)

    @property
    def devices(self) -> int:
        return self.slices * self.slice_devices


def parse(name: str) -> Hardware:
    """The hardware of "v5e-256", of several slices "2xv4-128", or of GPUs, "h100-32".

    Raises:
        UserError: listing what there is.
    """
    match = re.fullmatch(r"(?:(\d{1,4})x)?([a-z0-9]+)-(\d{1,6})", name)
    if match and match[2] == "cpu" and not match[1] and 1 <= int(match[3]) <= MOST_VIRTUAL:
        return _this_machine(name, int(match[3]))
    chip = CHIPS.get(match[2]) if match else None
    if match is None or chip is None:
        raise UserError(
            f"--on={name}: a plan is for KIND-N, such as v5e-256, 2xv4-128 (two slices) or h100-8; "
            f"kinds: {', '.join(CHIPS)}, cpu. It is made here: where a command runs is no choice of it"
        )
    slices, count = int(match[1] or 1), int(match[3])
    if slices < 1 or count < 1:
        raise UserError(f"--on={name}: the numbers must be above 0")
    if chip.platform == "gpu" and count > 8:  # hosts of eight
        if match[1] or count % 8:
            raise UserError(
                f"--on={name}: GPUs are planned in hosts of 8: write {match[2]}-N, N a multiple of 8"
            )
        return Hardware(name, match[2], chip, count // 8, "8")
    devices = count // chip.cores if count % chip.cores == 0 else 0
    if devices not in chip.sizes:
        sizes = ", ".join(f"{match[2]}-{n * chip.cores}" for n in chip.sizes)
        raise UserError(f"--on={name} is no size of a slice; sizes: {sizes}")
    return Hardware(name, match[2], chip, slices, chip.sizes[devices])


def _this_machine(name: str, devices: int) -> Hardware:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // devices
    chip = Chip("cpu", "cpu", memory, memory, None, None, None, None, 1, {devices: str(devices)})
    return Hardware(name, "cpu", chip, 1, str(devices))
