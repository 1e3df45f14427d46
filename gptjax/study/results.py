"""The results of a study's cells, and whether they may stand in one table."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.config import UserError
from gptjax.records import DIVERGED, FAILED, METRICS, read_environment, read_metrics
from gptjax.storage import Place
from gptjax.study.spec import Cell, Settings, Study, cells, cross, tuning_cells
from gptjax.study.store import code_and_versions, computation_recorded, differences, place

SAMPLE = "sample.txt"
Status = Literal["finished", "diverged", "failed", "started", "missing"]
ENDED = ("finished", "diverged")  # there is nothing left to run


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A cell and what is known of it.

    Attributes:
        cell, folder: which run, and where it lies.
        status: finished, diverged (ended without a finite gradient or metric), failed (could
            not run), started, or missing.
        reason: of a divergence or failure.
        metric: the study's metric at the last step; NaN unless finished.
        curve: (steps, metric) of every evaluation so far, int64 (E,) and float64 (E,).
        tokens_per_second: median over the logged steps; NaN where unknown, as those below.
        compile_seconds: of the step in the first start; little where the compilation cache had it.
        program_bytes: memory of the compiled step on a device.
    """

    cell: Cell
    folder: Place
    status: Status
    reason: str
    metric: float
    curve: tuple[np.ndarray, np.ndarray]
    tokens_per_second: float
    compile_seconds: float
    program_bytes: float


@dataclasses.dataclass(frozen=True)
class Results:
    """The outcomes of a study, tuning apart.

    Attributes:
        outcomes: of the cells that decide. Where an arm's tuning is not done it has none yet.
        tuning: of the cells that tune, with the values that each tries.
        tuned: (scale, arm) -> the values that did best, where all tuning runs of it are done.
    """

    study: Study
    outcomes: list[Outcome]
    tuning: list[tuple[Outcome, Settings]]
    tuned: Mapping[tuple[str, str], Settings]


def read(study: Study, store: Place, now: bool = False) -> Results:
    """The results of a study so far.

    Args:
        now: as in `store.place`: runs that compute something else than this code are as missing.

    Raises:
        UserError: if runs of different programs, packages or data would stand in one table.
    """
    tuning = [(outcome(study, cell, store, now), values) for cell, values in tuning_cells(study)]
    best = _best(study, tuning)
    outcomes = [outcome(study, cell, store, now) for cell in cells(study, best)]
    check_alike([*outcomes, *(o for o, _ in tuning)])
    return Results(study, outcomes, tuning, best)


def outcome(study: Study, cell: Cell, store: Place, now: bool = False) -> Outcome:
    """What the folder of a cell records; `store.place` says which folder that is.

    Raises:
        UserError: if its files are damaged.
    """
    folder = place(cell, store, now)
    # Read before the log, which another process may be writing: what is finished has all of it.
    status, reason = _status(cell, folder)
    lines = read_metrics(folder) if (folder / METRICS).is_file() else []
    scored = [line for line in lines if study.metric in line]
    curve = (
        np.array([line["step"] for line in scored], np.int64),
        np.array([line[study.metric] for line in scored], np.float64),
    )
    if status == "finished":
        if cell.config.train.steps not in curve[0][-1:]:
            raise UserError(
                f"{folder / METRICS} lacks {study.metric} of the last step: remove {folder} to "
                "run it again"
            )
        if not math.isfinite(curve[1][-1]):
            status, reason = "diverged", f"{study.metric} is {curve[1][-1]} at the last step"
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    first: Mapping[str, float] = lines[0] if lines else {}
    return Outcome(
        cell,
        folder,
        status,
        reason,
        float(curve[1][-1]) if status == "finished" else math.nan,
        curve,
        float(np.median(speeds)) if speeds else math.nan,
        first.get("compile_seconds", math.nan),
        first.get("program_bytes", math.nan),
    )


def _status(cell: Cell, folder: Place) -> tuple[Status, str]:
    if not folder.is_dir():
        return "missing", ""
    for status, name in (("diverged", DIVERGED), ("failed", FAILED)):
        # Another process, which tries a failed cell again, may remove it at any time.
        with contextlib.suppress(FileNotFoundError):
            return status, json.loads((folder / name).read_bytes())["reason"]  # type: ignore[return-value]
    # The last checkpoint appears by one rename, after everything that the run had to record.
    with Checkpoints(folder / CHECKPOINTS) as checkpoints:
        done = cell.config.train.steps in checkpoints.steps()
    return ("finished" if done else "started"), ""


def _best(
    study: Study, tuning: Sequence[tuple[Outcome, Settings]]
) -> dict[tuple[str, str], Settings]:
    """The values with the lowest mean; a value that diverged is out."""
    best: dict[tuple[str, str], Settings] = {}
    groups = dict.fromkeys((o.cell.scale, o.cell.arm) for o, _ in tuning)
    for scale, arm in groups:
        tuning_runs = [(o, v) for o, v in tuning if (o.cell.scale, o.cell.arm) == (scale, arm)]
        if any(o.status not in ENDED for o, _ in tuning_runs):
            continue
        means = []
        for values in cross(study.tune).values():
            losses = [
                math.inf if o.status == "diverged" else o.metric
                for o, v in tuning_runs
                if v == values
            ]
            means.append((float(np.mean(losses)), values))
        loss, values = min(means, key=lambda pair: pair[0])
        if math.isfinite(loss):
            best[scale, arm] = values
    return best


def at_edge(study: Study, values: Settings) -> list[str]:
    """The tuned knobs whose best value is the least or greatest of several that were tried."""
    knobs = []
    for knob, value in values.items():
        numbers = sorted(v for v in study.tune[knob] if isinstance(v, (int, float)))
        if len(numbers) > 1 and value in (numbers[0], numbers[-1]):
            knobs.append(knob)
    return knobs


def check_alike(outcomes: Iterable[Outcome]) -> None:
    """Refuses runs that were made by different programs, packages or data, naming both.

    Every start of every run counts: a run that went on with other packages is a mixture itself.
    Where the code differs, each run must compute what this code would compute for it; and a run
    that did not record what it computes stands beside runs of its own code alone.
    """
    outcomes = [o for o in outcomes if read_environment(o.folder)]
    codes = {record["code"] for o in outcomes for record in read_environment(o.folder)}
    recorded = all(computation_recorded(o.folder) for o in outcomes)
    first_seen: dict[str, tuple[str, Outcome]] = {}
    for o in outcomes:
        for name, value in _origins(o):
            if name == "code" and recorded:
                continue
            first, first_run = first_seen.setdefault(name, (value, o))
            if first != value:
                raise UserError(
                    f"different {name} in one table: {_short(first)} in {first_run.folder} "
                    f"({first_run.cell.label}), {_short(value)} in {o.folder} ({o.cell.label}). "
                    "Remove the outdated folders and run the study again, or keep it apart by "
                    "another --store"
                )
        if recorded and len(codes) > 1 and (names := differences(o.folder, o.cell)):
            raise UserError(
                f"the runs were made by {len(codes)} codes, and {o.folder} ({o.cell.label}) does "
                f"not compute what this code does: it differs in {', '.join(names)}. Run the "
                "study again, which leaves that run alone and makes another"
            )


def _origins(o: Outcome) -> Iterable[tuple[str, str]]:
    """(what, which) of each start of a run: the code, packages and data that made it."""
    for record in read_environment(o.folder):
        yield from code_and_versions(record).items()
        # One text is other tokens to another tokenizer: no other data.
        tokenizer = o.cell.config.data.tokenizer
        yield from ((f"{k} ({tokenizer})", v) for k, v in record["fingerprints"].items())


def _short(value: str) -> str:
    return value[:12]
