"""What a compiled program sends between devices, read from the text of its HLO.

A collective that stands in a loop counts as often as the loop turns: the number that XLA knows
(`known_trip_count`), or else, as a TPU's text has none, the constant that the loop's counter is
compared with. What is written several times counts once: the start and the end of an asynchronous
one, and on TPUs the fusions that one is spread over, which share its channel. A TPU's
reduce-scatter is a fusion of that name around an all-reduce; between slices its collectives are
transfers to the host, which say in an attribute what they are.

A device sends, of n that take part, with ring algorithms (Thakur et al. 2005), as bytes of the
whole array w that is gathered, summed or exchanged:

    all-gather, reduce-scatter, all-to-all   w (n - 1) / n
    all-reduce                               2 w (n - 1) / n
    collective-permute                       w, its own part
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_OPERATION = re.compile(r"\s([a-z][\w-]*)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")


class Unknown(Exception):
    """The text has something that is not understood, so that no number is told."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One that a step makes.

    Attributes:
        kind: a row of `KINDS`.
        bytes: of the whole array, all of a tuple together; of a permutation, of the own part.
        devices: that take part in one of its groups.
        crosses: whether a group's devices are of several slices or hosts.
        times: that a step makes it.
    """

    kind: str
    bytes: int
    devices: int
    crosses: bool
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        n = self.devices
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
        return self.times * self.bytes * share.get(self.kind, (n - 1) / n)


class Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    rest: str


def read(hlo: str, domains: Sequence[int]) -> list[Collective]:
    """The collectives of a program.

    Args:
        hlo: the optimised module as text.
        domains: of each device in the order of the mesh, the slice or host that it is of.

    Raises:
        Unknown: on a loop or a group that cannot be read.
    """
    computations, entry = _parse(hlo)
    found: dict[object, Collective] = {}
    for where, times, computation, instruction in _walk(computations, entry):
        if instruction.operation == "send" and "_xla_megascale_transfer_type" in instruction.rest:
            found[where, computation, instruction.name] = _between_slices(instruction, times)
        kind = instruction.operation.removesuffix("-start")
        if kind not in KINDS:
            continue
        groups = _groups(instruction.rest, kind, len(domains))
        devices = max(map(len, groups))
        crosses = any(len({domains[d] for d in group}) > 1 for group in groups)
        bytes_ = _bytes(_result(instruction))
        if kind == "reduce-scatter":
            bytes_ *= devices
        if "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
        if devices == 1:
            continue
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        key: object = (where, computation, instruction.name)
        if channel is not None:
            key = (where, channel[1])
        found[key] = Collective(kind, bytes_, devices, crosses, times)
    return list(found.values())


def _between_slices(send: Instruction, times: int) -> Collective:
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.rest)
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}x', send.rest)
    name = kind[1].lower().replace("_", "-") if kind else ""
    if name not in KINDS or target is None:
        raise Unknown(f"a transfer between slices that is written anew: {send.rest[:200]}")
    slices = 0
    for part in target[1].split(","):
        first, _, last = part.partition(":")
        slices += int(last or first) - int(first) + 1
    return Collective(name, _bytes(_elements(send.shape)[0]), slices, True, times)


def _parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            name = head[1]
            computations[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name and (body := _INSTRUCTION.match(line)) is not None:
            text = " " + body[2]
            if (operation := _OPERATION.search(text)) is not None:
                shape, rest = text[: operation.start()], text[operation.start(1) :]
                computations[name].append(Instruction(body[1], shape, operation[1], rest))
    if not entry:
        raise Unknown("the text has no entry")
    return computations, entry


def _walk(
    computations: dict[str, list[Instruction]], entry: str
) -> Iterator[tuple[str, int, str, Instruction]]:
    """Every instruction that runs: the loop's body or entry it runs in, how often, and where it stands."""

    def visit(name: str, where: str, times: int) -> Iterator[tuple[str, int, str, Instruction]]:
        for instruction in computations.get(name, []):
            yield where, times, name, instruction
            if instruction.operation in ("async-update", "async-done"):
                continue  # they name what async-start called
            turns, inside = times, where
            if instruction.operation == "while":
                turns, inside = times * _turns(instruction, computations), instruction.name
            called = _CALLED.findall(instruction.rest)
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
            called += re.findall(r"%?([\w.-]+)", branches[1]) if branches else []
            for other in called:
                yield from visit(other, inside, turns)

    yield from visit(entry, entry, 1)


def _turns(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    if (known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)) is not None:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    instructions = computations.get(condition[1], []) if condition else []
    # jax.lax.scan counts from 0 to a constant.
    limits = [
        int(constant[1])
        for i in instructions
        if i.operation == "constant"
        and (constant := re.match(r"constant\((\d+)\)", i.rest)) is not None
    ]
    below = [i for i in instructions if i.operation == "compare" and "direction=LT" in i.rest]
    if len(limits) == 1 and len(below) == 1:
        return limits[0]
    raise Unknown(f"the loop {loop.name} turns an unknown number of times")


def _result(instruction: Instruction) -> str:
    """The shape that a collective yields; that of a start has what it takes before it."""
    parts = _elements(instruction.shape)
    if instruction.operation.endswith("-start") and instruction.operation != "all-reduce-start":
        return parts[1]
    return instruction.shape


def _elements(shape: str) -> list[str]:
    """Of "(a, (b, c))" the texts "a" and "(b, c)"."""
    parts, depth, part = [], 0, ""
    for sign in shape.strip()[1:-1]:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += sign
    return [*parts, part]


def _bytes(shape: str) -> int:
    total = 0.0
    for dtype, dims in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        size = BYTES.get(dtype)
        if size is None:
            bits = re.match(r"[a-z]+(\d+)", dtype)
            size = int(bits[1]) / 8 if bits else 0  # a token holds nothing
        total += size * math.prod(int(n) for n in dims.split(",") if n)
    return int(total)


def _groups(rest: str, kind: str, devices: int) -> list[list[int]]:
    """The devices that take part together, in any of the ways that XLA writes them."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=(\{\{.*?\}\})", rest)
        if pairs is None:
            raise Unknown("a permutation without its pairs")
        return _lists(pairs[1])
    if (literal := re.search(r"replica_groups=(\{\{.*?\}\})", rest)) is not None:
        return _lists(literal[1])
    if re.search(r"replica_groups=\{\}", rest):
        return [list(range(devices))]
    if (
        iota := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    ) is not None:
        shape, _, order = iota[1].partition("<=")
        return _iota(order).reshape(_numbers(shape)).tolist()
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*(?:\([\d,]+\))?)\))? \{([^}]*)\}",
        rest,
    )
    if mesh is None:
        raise Unknown(f"groups of devices are written anew: {rest[:200]}")
    sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
    order = np.arange(devices) if mesh[2] is None else _iota(mesh[2])
    taking = re.findall(r"'([^']*)'", mesh[3])
    if re.search(r":\(\d+\)\d+", mesh[3]):
        raise Unknown(f"groups over a part of an axis: {mesh[3]}")
    grid, axes = order.reshape(tuple(sizes.values())), list(sizes)
    others = [i for i, axis in enumerate(axes) if axis not in taking]
    inner = [i for i, axis in enumerate(axes) if axis in taking]
    count = math.prod(sizes[axis] for axis in taking)
    return grid.transpose(*others, *inner).reshape(-1, count).tolist()


def _iota(text: str) -> np.ndarray:
    """Of "[4,64]T(1,0)": so many numbers from 0, in that shape, transposed."""
    shape, _, order = text.partition("T")
    dims = _numbers(shape)
    grid = np.arange(math.prod(dims)).reshape(dims)
    return grid.transpose(_numbers(order)).ravel() if order else grid.ravel()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _lists(text: str) -> list[list[int]]:
    groups: list[list[int]] = json.loads(text.replace("{", "[").replace("}", "]"))
    return groups


def totals(collectives: Sequence[Collective]) -> dict[tuple[str, bool], tuple[int, float]]:
    """How many a step makes and the bytes that a device sends, by kind and by whether they cross."""
    sums: dict[tuple[str, bool], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for c in collectives:
        times, sent = sums[c.kind, c.crosses]
        sums[c.kind, c.crosses] = times + c.times, sent + c.sent
    return {key: sums[key] for key in sorted(sums)}
