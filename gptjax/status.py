"""What the runs in a folder are doing, by what they leave there.

Everything is only read, no device is touched, and whatever lies in a folder becomes a row. States:

    running     a process holds the run, or a job of Slurm's runs that is to
    queued      such a job waits
    waiting     nobody has trained a step of it yet
    stopped     nobody trains it, and its latest checkpoint has all that it logged
    killed      nobody trains it, and it logged steps that no checkpoint has: they are trained again
    diverged    recorded, as is what
    failed      means: a study's run could not run
    damaged     a file of it cannot be read
    finished    the checkpoint of its last step is there
    no run      a folder of something else
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from gptjax import branch, configure
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.cluster import slurm
from gptjax.config import Config, UserError, flatten, to_dict
from gptjax.locks import holder
from gptjax.records import BEGUN, CONFIG, DIVERGED, ENVIRONMENT, FAILED, METRICS
from gptjax.report.formats import Table
from gptjax.report.terminal import MISSING, number
from gptjax.storage import Place, Unreachable, changed, children, whole

# In the order of a table.
STATES = (
    *("running", "queued", "waiting", "stopped", "killed", "diverged", "failed", "damaged"),
    *("finished", "no run"),
)
CELL = r"[0-9a-f]{16}(\.\d+)?"  # the folder of a study's run, whose name tells nothing
SHOWN = 4  # knobs of a study's run
Result = TypeVar("Result")
MARKS = {"diverged": DIVERGED, "failed": FAILED}  # whose "reason" is told


@dataclasses.dataclass(frozen=True)
class Status:
    """What is known of a folder; None of what is not.

    Attributes:
        run: the folder, as it is reached from the one that was asked for.
        state: a row of `STATES`.
        who: host and process of a running one.
        job: of Slurm's that has the run or, in a study's store, its runs.
        why: it diverged, failed or is damaged; or what a killed one lost.
        step, steps: done, of all.
        saved: the step that it would go on from.
        loss, val_loss, tokens_per_second: the last that were logged.
        seconds_left: at that rate, in which evaluating and saving are not counted.
        seconds_since: a file of the run changed.
        differs: knob -> value, where a study's run differs from most of those beside it.
    """

    run: str
    state: str
    who: str | None = None
    job: str | None = None
    why: str | None = None
    step: int | None = None
    steps: int | None = None
    saved: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    seconds_since: float | None = None
    differs: dict[str, Any] | None = None


def statuses(folder: Place) -> list[Status]:
    """Of a run, or of every folder in `folder` and, where that is no run, of the runs in it.

    Raises:
        UserError: if there is no such folder.
    """
    jobs, above = slurm.queued(), whole(folder)
    if not folder.is_dir() and not any(_inside(job, above) for job in jobs):
        raise UserError(f"{folder} is no folder: name a run's, or one that holds runs")
    if _is_run(folder):
        return [_with_job(dataclasses.replace(status(folder), run=str(folder)), jobs.get(above))]
    runs = [run for found in _each(_runs_of, _folders(folder)) for run in found]
    differs = _differences([run for run in runs if re.fullmatch(CELL, run.name)])
    of_each = []
    for run, row in zip(runs, _each(status, runs), strict=True):
        name = str(run).removeprefix(f"{folder}/")
        seen = dataclasses.replace(row, run=name, differs=differs.get(run))
        of_each.append(_with_job(seen, jobs.pop(whole(run), None)))
    # What no process has begun has no folder; a study's store has, but is no run.
    of_each += [
        _with_job(Status(job.removeprefix(f"{above}/"), "no run"), of_it)
        for job, of_it in jobs.items()
        if _inside(job, above)
    ]
    return sorted(of_each, key=lambda s: (STATES.index(s.state), *_natural(s)))


def _inside(job: str, folder: str) -> bool:
    """Whether a job's folder is this one, or would be a row of it."""
    return job == folder or (
        job.startswith(f"{folder}/") and job.removeprefix(f"{folder}/").count("/") < 2
    )


def _with_job(seen: Status, jobs: slurm.Jobs | None) -> Status:
    """What is known of a run that jobs have."""
    if jobs is None:
        return seen
    state = seen.state
    if jobs.state and state in ("waiting", "stopped", "killed", "no run"):
        state = jobs.state
    return dataclasses.replace(seen, state=state, job=jobs.words)


def status(run: Place) -> Status:
    """Of one folder, whatever lies there."""
    if not _is_run(run):
        return Status(run.name, "no run")
    try:
        return _status(run)
    except Unreachable:
        raise
    except Exception as error:  # of any file that somebody else wrote
        text = str(error) if isinstance(error, (UserError, OSError)) else repr(error)
        since = _seconds_since(run)
        return Status(run.name, "damaged", why=" ".join(text.split()), seconds_since=since)


def _status(run: Place) -> Status:
    # Who holds it first, then what it wrote, then the checkpoints, which stand for having written
    # it: a run that ends meanwhile is seen with all it wrote.
    with Checkpoints(run / CHECKPOINTS) as checkpoints:
        who = checkpoints.writer() or ("another process" if _claimed(run) else "")
        config = _config(run)
        last = _last(run / METRICS)
        first = 0 if config is None else branch.first_step(config)
        saved = max(checkpoints.steps(), default=first)
    logged = int(last.get("step", first))
    step, steps = max(logged, saved), None if config is None else config.train.steps
    reasons = {state: _reason(run / file) for state, file in MARKS.items()}
    why: str | None = None
    left = None
    rate = last.get("tokens_per_second")
    if who:
        state = "running"
        if rate and config is not None:
            left = (
                (config.train.steps - step) * config.data.batch_size * config.model.context / rate
            )
    elif steps is not None and saved == steps and not any(reasons.values()):
        state = "finished"
    elif marked := [state for state, reason in reasons.items() if reason]:
        state, why = marked[0], reasons[marked[0]]
    elif logged > saved or (run / BEGUN).exists():
        state, why = "killed", f"resumes at step {saved}"
    else:
        state = "stopped" if step > first else "waiting"
    return Status(
        run=run.name, state=state, who=who or None, why=why, step=step, steps=steps, saved=saved,
        loss=last.get("loss"), val_loss=last.get("val_loss"), tokens_per_second=rate,
        seconds_left=left, seconds_since=_seconds_since(run),
    )  # fmt: skip


def _each(function: Callable[[Place], Result], places: Sequence[Place]) -> list[Result]:
    """What it returns of each; a bucket is asked for many at once."""
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(function, places))


def _is_run(folder: Place) -> bool:
    files = (CONFIG, ENVIRONMENT, METRICS, CHECKPOINTS, *MARKS.values(), BEGUN)
    for file in files:
        with contextlib.suppress(OSError):  # that cannot be read
            if (folder / file).exists():
                return True
    return False


def _folders(folder: Place) -> list[Place]:
    inside = [p for p in children(folder) if not p.name.startswith(".")]
    are_folders = _each(lambda p: p.is_dir(), inside)
    return [p for p, is_folder in zip(inside, are_folders, strict=True) if is_folder]


def _runs_of(folder: Place) -> list[Place]:
    """The folder if it is a run, else the runs in it, else the folder, which is none."""
    runs: list[Place] = []
    if not _is_run(folder):
        with contextlib.suppress(OSError):
            runs = [run for run in _folders(folder) if _is_run(run)]
    return runs or [folder]


def _config(run: Place) -> Config | None:
    """None where it is not written yet."""
    with contextlib.suppress(FileNotFoundError):
        return configure.of_file(run / CONFIG, (run / CONFIG).read_bytes())
    return None


def _last(metrics: Place) -> dict[str, float]:
    """The last value of each of the names that a row shows, and the last step."""
    try:
        lines = metrics.read_bytes().split(b"\n")[:-1]  # what follows the last line's end was torn
    except FileNotFoundError:
        return {}
    values: dict[str, float] = {}
    for place, line in reversed(list(enumerate(lines, 1))):
        try:
            record = {name: float(value) for name, value in json.loads(line).items()}
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{metrics}:{place} is not a line of metrics") from None
        values = record | values
        if {"loss", "val_loss", "tokens_per_second"} <= values.keys():
            break
    return values


def _reason(file: Place) -> str:
    with contextlib.suppress(FileNotFoundError):
        return str(json.loads(file.read_bytes())["reason"])
    return ""


def _claimed(run: Place) -> bool:
    """Whether a study holds the run, which it does before its training begins."""
    return holder(run.parent / ".locks" / run.name) != ""


def _seconds_since(run: Place) -> float | None:
    changes = []
    for name in (CONFIG, ENVIRONMENT, METRICS, CHECKPOINTS, *MARKS.values(), BEGUN):
        with contextlib.suppress(OSError):
            changes.append(changed(run / name) / 1e9)
    # A file server's clock may be ahead. A bucket is not asked.
    return max(0.0, time.time() - max(changes)) if any(changes) else None


def _differences(runs: Sequence[Place]) -> dict[Place, dict[str, Any]]:
    """The seed of each run, and its knobs that most of them have otherwise."""
    knobs: dict[Place, dict[str, Any]] = {}
    for run in runs:
        with contextlib.suppress(Exception):  # `status` tells what is wrong with it
            if config := _config(run):
                knobs[run] = flatten(to_dict(config))
    names = list(next(iter(knobs.values()), {}))
    usual = {n: Counter(str(k[n]) for k in knobs.values()).most_common(1)[0][0] for n in names}
    several = len({k["seed"] for k in knobs.values()}) > 1
    return {
        run: {
            name: value
            for name, value in k.items()
            if str(value) != usual[name] or (name == "seed" and several)
        }
        for run, k in knobs.items()
    }


def _natural(s: Status) -> tuple[Any, ...]:
    """By what tells runs apart, 10 behind 9."""
    differs = s.differs or {}
    words = [f"{knob}={value}" for knob, value in differs.items() if knob != "seed"]
    words += [str(differs.get("seed", "")), s.run]
    parts = (re.split(r"(\d+)", word) for word in words)
    return tuple(tuple((p.isdecimal(), int(p) if p.isdecimal() else p) for p in ps) for ps in parts)


def table(of_each: Sequence[Status]) -> Table:
    cells = any(s.differs is not None for s in of_each)
    headings = ["run", *["differs by"] * cells, "state", "step", "loss", "held out", "tokens/s"]
    headings += ["left", "changed", "who, or why"]
    rows = [
        [
            s.run,
            *[_differs(s.differs)] * cells,
            s.state,
            MISSING if s.steps is None else f"{s.step:,} of {s.steps:,}",
            number(s.loss),
            number(s.val_loss),
            MISSING if s.tokens_per_second is None else f"{s.tokens_per_second:,.0f}",
            duration(s.seconds_left),
            MISSING if s.seconds_since is None else f"{duration(s.seconds_since)} ago",
            "; ".join(words for words in (s.who or s.why, s.job) if words),
        ]
        for s in of_each
    ]
    return Table(headings, rows, ("run", "differs by", "state", "who, or why"))


def _differs(knobs: dict[str, Any] | None) -> str:
    if knobs is None:
        return ""
    words = [f"{knob.rpartition('.')[2]}={value}" for knob, value in knobs.items()]
    more = len(words) - SHOWN
    return ", ".join(words[:SHOWN] + [f"{more} more"] * (more > 0)) or "nothing"


def duration(seconds: float | None) -> str:
    """In the largest unit of which there are two."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"
