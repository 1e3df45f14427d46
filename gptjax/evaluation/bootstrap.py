"""Intervals for ratios of sums, by the bootstrap over documents.

Documents are what a text was drawn as: the tokens of one hang together, so an interval that
resamples tokens is much too narrow. Every figure here is a ratio of sums over documents, nats
by tokens, words or bytes.
"""

from __future__ import annotations

import functools

import numpy as np

from gptjax.report.interval import CONFIDENCE, SEED, Interval

REPLICATES = 4000
# With fewer effective units the interval covers the truth too rarely, and none is given.
MIN_UNITS = 10
# Of more, random ones are joined: units still, which are as independent and fewer to draw.
MAX_UNITS = 1000


def effective_units(denominator_U: np.ndarray) -> float:
    """How many units of equal size would weigh as evenly (Kish 1965): one that dwarfs the others
    decides a sum alone, and what is left of it without that one is no measure of its spread."""
    squares = float((denominator_U**2).sum())
    return float(denominator_U.sum()) ** 2 / squares if squares else 0.0


def interval(numerator_U: np.ndarray, denominator_U: np.ndarray) -> Interval:
    """A 95% interval of sum(numerator) / sum(denominator), by the studentised bootstrap.

    Units are drawn with replacement, and the ratio r* of each replicate is held against its own
    linearised standard error s* (Efron and Tibshirani 1993, section 12.5); the quantiles of
    (r* - r) / s* then bound the true ratio. On 4,000 sets of simulated documents of lognormal
    length, each with a difficulty of its own (tests/test_evaluation.py), it covers the truth in 94%
    of the cases with 20, 30, 40 or 100 documents; the percentile bootstrap in 92% with up to 40.

    There is none where the effective units are fewer than MIN_UNITS. Where many replicates lack
    any spread, so that these quantiles do not exist (all documents but a few are exact multiples
    of each other), the interval is the percentile bootstrap's.

    Args:
        numerator_U: a sum for each unit, float (U,).
        denominator_U: not below 0, (U,).
    """
    x_U, y_U = np.asarray(numerator_U, np.float64), np.asarray(denominator_U, np.float64)
    if effective_units(y_U) < MIN_UNITS:
        return Interval(np.nan, np.nan)
    x_U, y_U = _joined(x_U), _joined(y_U)
    units = len(x_U)
    ratio = x_U.sum() / y_U.sum()
    e_U = x_U - ratio * y_U
    error = np.sqrt((e_U**2).sum()) / y_U.sum()
    if not error:
        return Interval(ratio, ratio)
    sums_RM = _counts(units) @ np.stack([x_U, y_U, e_U**2, e_U * y_U, y_U**2], axis=1)
    sums_RM = sums_RM[sums_RM[:, 1] > 0]
    x_R, y_R, ee_R, ey_R, yy_R = sums_RM.T
    shift_R = x_R / y_R - ratio
    # Of a replicate's own residuals x - r* y = e - (r* - r) y, the sum of squares.
    squares_R = ee_R - 2 * shift_R * ey_R + shift_R**2 * yy_R
    error_R = np.sqrt(np.maximum(squares_R, 0)) / y_R
    tail = (1 - CONFIDENCE) / 2
    spread = error_R > 1e-6 * error
    if (~spread).mean() >= tail:
        low, high = np.quantile(shift_R, [tail, 1 - tail])
        return Interval(float(ratio + low), float(ratio + high))
    low, high = np.quantile(shift_R[spread] / error_R[spread], [tail, 1 - tail])
    return Interval(float(ratio - high * error), float(ratio - low * error))


def _joined(values_U: np.ndarray) -> np.ndarray:
    """At most MAX_UNITS sums of random units, the same at every call."""
    if len(values_U) <= MAX_UNITS:
        return values_U
    place_U = np.random.default_rng(SEED).permutation(len(values_U)) % MAX_UNITS
    return np.bincount(place_U, values_U)


@functools.lru_cache(maxsize=1)
def _counts(units: int) -> np.ndarray:
    """How often each replicate draws each unit, float64 (R, U)."""
    generator = np.random.default_rng(SEED)
    return generator.multinomial(units, np.full(units, 1 / units), REPLICATES).astype(np.float64)
