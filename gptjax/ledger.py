"""What finished runs took beside what was planned for them, so that later plans forecast.

A line is appended for each run that ends: the seconds of a step if all devices had computed at their
peak, and what a step took, the median of the run. Their ratio, 1 / MFU, is what no plan can know. The
ratios of one kind of device make an interval that holds a further run in 95 of 100 cases if they are
drawn alike from a log-normal distribution. One run makes a number alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from gptjax import configure
from gptjax.config import UserError
from gptjax.locks import alone
from gptjax.places import cache
from gptjax.records import CONFIG, read_environment, read_metrics
from gptjax.report.interval import CONFIDENCE, Interval
from gptjax.storage import Place

LEDGER = "ledger.jsonl"


class Entry(NamedTuple):
    """A run.

    Attributes:
        kind: of its devices, as jax names it.
        devices: how many.
        planned: seconds of a step at the peak of all devices.
        measured: seconds of a step, the median of the run.
        run: its folder.
    """

    kind: str
    devices: int
    planned: float
    measured: float
    run: str

    @property
    def ratio(self) -> float:
        return self.measured / self.planned


def measure(run: Place) -> Entry:
    """What a run took.

    Raises:
        UserError: if it is none, or has measured no step of its own against a known peak.
    """
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is not a run's folder: it has no {CONFIG}")
    if (run / "ensemble.json").is_file():
        raise UserError(
            f"{run} was trained in one program with others, by an older gptjax: its speed is a share "
            "of theirs, and foretells nothing"
        )
    config = configure.as_recorded(run)
    lines = [line for line in read_metrics(run) if "mfu" in line]
    environments = read_environment(run)
    if not lines or not environments:
        raise UserError(
            f"{run} has no measured step (mfu): train it for longer than train.log_every"
        )
    (kind, devices), *others = environments[-1]["devices"].items()
    if others:
        raise UserError(f"{run} was trained on devices of several kinds, which foretell nothing")
    tokens = config.data.batch_size * config.model.context
    measured = tokens / statistics.median(line["tokens_per_second"] for line in lines)
    planned = measured * statistics.median(line["mfu"] for line in lines)
    folder = run.absolute() if isinstance(run, Path) else run
    return Entry(kind, devices, planned, measured, str(folder))


def ended(run: Place) -> None:
    """Appends what a run took that is done; one without a measured step foretells nothing."""
    if jax.process_index() == 0:
        # A bucket that is away, or a cache that cannot be written, spoils no run that is done.
        with contextlib.suppress(UserError, OSError):
            append(measure(run))


def append(entry: Entry) -> None:
    """Adds a line; runs that end at the same time wait for each other."""
    ledger = cache() / LEDGER
    with alone(ledger.with_suffix(".lock")), ledger.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry._asdict()) + "\n")


def read(of: Callable[[str], bool]) -> list[Entry]:
    """The runs on devices of a kind for which `of` is true; of one folder the latest."""
    ledger = cache() / LEDGER
    lines = ledger.read_text(encoding="utf-8").splitlines() if ledger.is_file() else []
    entries: dict[str, Entry] = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # a line that a full disk cut off
            entry = Entry(**json.loads(line))
            entries[entry.run] = entry
    return [entry for entry in entries.values() if of(entry.kind)]


class Forecast(NamedTuple):
    """By what to multiply the seconds at the peak; the interval is None of one run."""

    ratio: float
    interval: Interval | None
    runs: int


def forecast(entries: Sequence[Entry]) -> Forecast | None:
    if not entries:
        return None
    logs = [math.log(entry.ratio) for entry in entries]
    mean, n = statistics.fmean(logs), len(logs)
    if n == 1:
        return Forecast(math.exp(mean), None, 1)
    from scipy.special import stdtrit  # here: most runs do without its 11 MB

    t = stdtrit(n - 1, (1 + CONFIDENCE) / 2)
    width = t * statistics.stdev(logs) * math.sqrt(1 + 1 / n)
    return Forecast(math.exp(mean), Interval(math.exp(mean - width), math.exp(mean + width)), n)
