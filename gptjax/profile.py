"""Where the time of a training step goes, by part of the model: `train --profile=FIRST:LAST`.

jax's profiler records when each operation of the compiled step runs. The step's HLO says of each
operation in which scope it was written, and `accounting.PARTS` which part of a model a scope is.
Two rules make the parts add up to the whole:

    an instant belongs alike to all operations that are being computed at it;
    an instant at which none is (the host, dispatch, waiting) is "no operation".

What XLA fused from several parts counts for the part of the instruction that it is named after.
Several devices are averaged; virtual devices of a CPU share its threads, and are one.

The trace is kept in WORKDIR/profile/FIRST-LAST for viewers: xprof, TensorBoard, Perfetto.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax

from gptjax.accounting import PARTS, part_of
from gptjax.config import UserError
from gptjax.progress import console, say
from gptjax.report.formats import Table, terminal
from gptjax.storage import Place, local

NOTHING = range(0)  # no step
MOST = 100  # steps of a trace, which is held in memory until it is written
OTHER_PROGRAMS = "other programs"  # evaluation, `train.watch`, copies for a checkpoint
NO_OPERATION = "no operation"
NAMES_IN_KEY = "jax_compilation_cache_include_metadata_in_key"
# Their events last as long as those of what they run, which count.
CONTROL = re.compile(r" (?:while|conditional|call)\(")
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = ")


def parse_steps(text: str | None) -> range:
    """The steps of "10:13", which are 10, 11, 12 and 13, or of "10"; the first of a run is 1.

    Raises:
        UserError: on other words, and on more than `MOST` steps.
    """
    if text is None:
        return NOTHING
    match = re.fullmatch("([0-9]{1,12})(?::([0-9]{1,12}))?", text)
    first, last = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
    if not 1 <= first <= last:
        raise UserError(
            f"--profile={text} is neither a step nor FIRST:LAST, such as 10:13, which are four: "
            "steps count from 1, and the last is included"
        )
    if last - first >= MOST:
        raise UserError(
            f"--profile={text} are {last - first + 1} steps: choose at most {MOST}, whose trace "
            "fits into memory"
        )
    return range(first, last + 1)


class Profiler:
    """Traces the chosen steps of a run, on process 0, and prints their time by part.

    Args:
        steps: to trace; none at all does nothing.
        done: how many the run has made.
        total: how many it is to make.
        workdir: the run's folder.

    Raises:
        UserError: if a step is not one that is to be made.
    """

    def __init__(self, steps: range, done: int, total: int, workdir: Place) -> None:
        if steps and not done < steps[0] <= steps[-1] <= total:
            left = f"{done + 1} to {total}" if done < total else "none, it is done"
            raise UserError(
                f"--profile={steps[0]}:{steps[-1]}: the run in {workdir} has made {done} of "
                f"{total} steps; those that are left: {left}"
            )
        self._steps = steps if jax.process_index() == 0 else NOTHING
        name = f"{steps[0]}-{steps[-1]}" if steps else ""
        self._folder = (local(workdir) if steps else Path()) / "profile" / name
        self._since: float | None = None  # while it traces

    def __enter__(self) -> Self:
        if self._steps:
            # A kept program would have the scopes of the code that it was compiled from.
            self._before = jax.config.values[NAMES_IN_KEY]
            jax.config.update(NAMES_IN_KEY, True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._steps:
            jax.config.update(NAMES_IN_KEY, self._before)
        if self._since is not None:
            with contextlib.suppress(RuntimeError):  # a full disk must not hide what ended the run
                jax.profiler.stop_trace()
            shutil.rmtree(self._aside, ignore_errors=True)
            say("no trace was kept: the run ended before the last step to profile")

    def start(self, step: int, before: Any) -> None:
        """Begins before the first step, with the arrays that it takes; does nothing before others."""
        if step not in self._steps[:1]:
            return
        shutil.rmtree(self._aside, ignore_errors=True)
        jax.block_until_ready(before)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # the functions of Python would slow the host
        jax.profiler.start_trace(self._aside, profiler_options=options)
        self._since = time.perf_counter()

    def ends(self, step: int) -> bool:
        """Whether this is the last step to trace."""
        return step in self._steps[-1:]

    def stop(self, step: int, compiled: Any) -> None:
        """Ends after the last step, once it is computed, and shows; does nothing after others."""
        if self._since is None or not self.ends(step):
            return
        whole, self._since = time.perf_counter() - self._since, None
        try:
            jax.profiler.stop_trace()
            shutil.rmtree(self._folder, ignore_errors=True)
            os.rename(self._aside, self._folder)
        except (OSError, RuntimeError) as error:  # jax's of a full disk is a RuntimeError
            shutil.rmtree(self._aside, ignore_errors=True)
            raise UserError(
                f"cannot write the trace {self._folder}: {str(error).splitlines()[0]}. Free some "
                "space, or train without --profile: the run goes on from its last checkpoint"
            ) from error
        (file,) = self._folder.rglob("*.xplane.pb")
        trace = jax.profiler.ProfileData.from_file(str(file))
        show(time_by_part(trace, compiled.as_text(), whole), self._steps, self._folder)

    @property
    def _aside(self) -> Path:
        return self._folder.with_name(f".{self._folder.name}.partial")


class Program(NamedTuple):
    """What the HLO of a compiled program says.

    Attributes:
        name: of the module.
        parts: of each instruction by its name.
        control: the instructions that only run others.
    """

    name: str
    parts: dict[str, str]
    control: set[str]


def read_program(hlo: str) -> Program:
    """Reads the text of an optimised HLO module."""
    name = re.match(r"HloModule ([\w.-]+)", hlo)
    assert name is not None, "the text of a module begins with its name"
    program = Program(name[1], {}, set())
    for line in hlo.splitlines():
        if (instruction := INSTRUCTION.match(line)) is not None:
            scope = re.search(r'op_name="([^"]*)"', line)
            program.parts[instruction[1]] = part_of(scope[1] if scope else "")
            if CONTROL.search(line):
                program.control.add(instruction[1])
    return program


class Event(NamedTuple):
    """An operation that ran, in nanoseconds, and its part."""

    start: float
    end: float
    part: str


def read_plane(plane: Any, program: Program) -> list[Event]:
    """The operations on a plane of a trace: of a device, or of the host and its CPU."""
    events = [(event, dict(event.stats)) for line in plane.lines for event in line.events]
    # An operation of a CPU that spreads over threads lasts beyond its event, to a second one.
    ends = {
        (event.name.removeprefix("end: "), facts.get("_c")): event.start_ns
        for event, facts in events
        if event.name.startswith("end: ")
    }
    operations = []
    for event, facts in events:
        # CPU and GPU tell operation and module; a TPU names the event by its HLO.
        name = str(facts.get("hlo_op", event.name.partition(" = ")[0].lstrip("%")))
        module = facts.get("hlo_module", program.name if name in program.parts else None)
        if module is None or (module == program.name and name in program.control):
            continue
        part = program.parts.get(name, "other") if module == program.name else OTHER_PROGRAMS
        end = max(event.end_ns, ends.get((name, facts.get("_p")), 0))
        operations.append(Event(event.start_ns, end, part))
    return operations


def shares(events: Iterable[Event]) -> dict[str, float]:
    """Nanoseconds by part: at each instant all events that last share it alike."""
    boundaries = [
        (at, change, event.part)
        for event in events
        for at, change in ((event.start, 1), (event.end, -1))
    ]
    lasting: Counter[str] = Counter()
    time_of: dict[str, float] = {}
    since = 0.0
    for at, change, part in sorted(boundaries):
        for other, number in lasting.items():
            time_of[other] = time_of.get(other, 0) + (at - since) * number / lasting.total()
        since = at
        lasting[part] += change
        if not lasting[part]:
            del lasting[part]
    return time_of


def time_by_part(trace: Any, hlo: str, whole: float) -> dict[str, float]:
    """Seconds by part, a mean over devices, which add up to `whole`.

    Args:
        trace: a `jax.profiler.ProfileData`.
        hlo: the optimised HLO of the step.
        whole: seconds that were traced.
    """
    program = read_program(hlo)
    planes = {
        plane.name: times for plane in trace.planes if (times := shares(read_plane(plane, program)))
    }
    # Beside those of devices, the host's has at most what launches them.
    devices = [times for name, times in planes.items() if name.startswith("/device:")]
    devices = devices or list(planes.values())
    seconds = {
        part: sum(device.get(part, 0) for device in devices) / len(devices) / 1e9
        for part in dict.fromkeys([*PARTS.values(), "other", OTHER_PROGRAMS])
        if any(part in device for device in devices)
    }
    return seconds | {NO_OPERATION: max(whole - sum(seconds.values()), 0.0)}


def show(seconds: Mapping[str, float], steps: range, folder: Path) -> None:
    """Prints the time of a step by part, and where the trace is."""
    whole, count = sum(seconds.values()), len(steps)
    rows = [
        [part, f"{1e3 * time / count:,.2f}", f"{time / whole:.1%}"]
        for part, time in [*seconds.items(), ("a step", whole)]
    ]
    say(f"time by part, steps {steps[0]} to {steps[-1]}; the trace is in {folder}")
    console.print(terminal(Table(["part", "ms", "share"], rows, ["part"])))
    if len(seconds) == 1:
        say("the trace has no operation: NVIDIA's profiler wants a permission, ERR_NVGPUCTRPERM")
