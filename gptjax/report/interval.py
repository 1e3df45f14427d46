"""An interval, and what all of ours agree on."""

from __future__ import annotations

from typing import NamedTuple

CONFIDENCE = 0.95
SEED = 0  # of every bootstrap: a fixed one, so that the same numbers give the same interval


class Interval(NamedTuple):
    """Ends of an interval; both are NaN where there is none."""

    low: float
    high: float
