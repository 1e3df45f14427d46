"""Spikes of the loss: back to the last checkpoint, and past the batches that were read since.

    WORKDIR/spikes.json   [{"step": 812, "loss": 9.1, "checkpoint": 800}, ...]

With `train.spike` a loss that lies so many standard deviations above the mean of the last `RECENT`
ends the attempt: the run resumes from its last checkpoint and reads the batches that follow in
place of those since then (Chowdhery et al. 2022, PaLM, section 5.1, did so by hand). Steps,
schedule and checkpoints stay where they are; from there on every step reads a later batch. The
record is written before the run goes on, so that later starts, branches and replays pass over the
same batches. The losses that a step is compared with are saved with each checkpoint: a run that is
killed sees the same spikes.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gptjax.config import UserError
from gptjax.storage import Place, disk, replace_file

SPIKES = "spikes.json"
RECENT, FEWEST = 100, 20  # losses that a new one is compared with, at most and at least
MOST = 10  # so many spikes behind one checkpoint end the run


class Spike(NamedTuple):
    """A loss that ended an attempt, and the checkpoint that the run went back to."""

    step: int
    loss: float
    checkpoint: int


class Spiked(Exception):
    """The loss of a step is a spike."""

    def __init__(self, step: int, loss: float) -> None:
        self.step, self.loss = step, loss
        super().__init__(f"the loss spiked to {loss:.4f} at step {step}")


def is_spike(loss: float, recent: Sequence[float], deviations: float) -> bool:
    """Whether `loss` lies more than `deviations` above the mean of the latest losses."""
    if len(recent) < FEWEST:
        return False
    return loss > statistics.fmean(recent) + deviations * statistics.stdev(recent)


def remember(loss: float, recent: list[float]) -> None:
    """Appends a loss, if it is finite, and forgets what is older than `RECENT`."""
    if math.isfinite(loss):
        recent.append(loss)
        del recent[:-RECENT]


def batch(spikes: Iterable[Spike], step: int) -> int:
    """Which batch a step, counted from 1, reads: those of attempts that spiked are passed over."""
    return step - 1 + sum(s.step - s.checkpoint for s in spikes if s.checkpoint < step)


def read(workdir: Place) -> list[Spike]:
    """The spikes of a run; none where there is no such file.

    Raises:
        UserError: if the file is not a list of spikes.
    """
    file = workdir / SPIKES
    if not file.exists():
        return []
    try:
        records = json.loads(file.read_bytes())
        spikes = parse(records)
        if not isinstance(records, list) or any(
            not isinstance(number, int) for s in spikes for number in (s.step, s.checkpoint)
        ):
            raise TypeError
    except (ValueError, TypeError):
        raise UserError(
            f"{file} is not a list of spikes: restore it, or use another --workdir"
        ) from None
    return spikes


def write(workdir: Place, spikes: Sequence[Spike]) -> None:
    with disk(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        replace_file(workdir / SPIKES, json.dumps(plain(spikes)).encode())


def parse(records: Iterable[dict[str, Any]]) -> list[Spike]:
    return [Spike(**record) for record in records]


def plain(spikes: Iterable[Spike]) -> list[dict[str, Any]]:
    """As JSON holds them."""
    return [s._asdict() for s in spikes]
