"""Hypothesis tests and intervals for the losses of a few seeds: pure functions of float64 arrays.

The input is paired differences d_S: for each seed, the loss of an arm minus the loss of the
baseline, in the unit of the metric (nats for a loss). A negative difference means that the arm is
better. The dims are S, seeds, and A, arms.
"""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from gptjax.config import UserError
from gptjax.report.interval import Interval

Arm = TypeVar("Arm", bound=Hashable)  # what an arm is called

ALPHA: Final = 0.05  # family-wise error rate of one kind of claim in a whole study
POWER: Final = 0.8
FEWEST_SEEDS: Final = 3  # with fewer, the verdict is always UNDECIDED
# In nats. If the differences vary by less than this, rounding alone explains the variation, and the
# noise between seeds cannot be estimated.
ROUNDING: Final = 1e-9
RESAMPLES: Final = 9999
MOST_SEEDS: Final = 100_000  # upper limit of the search in `seeds_to_see`

BETTER: Final = "better"
WORSE: Final = "worse"
SAME: Final = "no difference"  # larger than the smallest that matters
UNDECIDED: Final = "undecided"
SHRINKS: Final = "shrinks"
HOLDS: Final = "holds"
GROWS: Final = "grows"

NO_INTERVAL: Final = Interval(math.nan, math.nan)


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline.

    Attributes:
        seeds: pairs compared.
        smallest: the smallest difference that matters, an argument of `compare`.
        mean: of the differences; NaN without seeds. If it is negative, the arm is better.
        sd: sample standard deviation of the differences (ddof 1); NaN with fewer than two seeds.
        interval: Student's t interval of the mean. It is not corrected for the number of arms, so
            it may exclude 0 although the verdict is UNDECIDED.
        bootstrap: an interval that does not assume normal noise; see `bootstrap_interval`.
        p: p-value of the two-sided t test of "the mean difference is 0"; 1 if it cannot be tested.
        p_holm: `p` after Holm's correction over the arms of the study.
        p_same: p-value of two one-sided t tests (TOST; Schuirmann 1987) of "the absolute mean
            difference is `smallest` or larger"; 1 if it cannot be tested.
        p_same_holm: `p_same` after Holm's correction over the arms of the study.
        verdict: BETTER, WORSE, SAME or UNDECIDED; see `compare`.
        more_seeds: how many more seeds would probably decide; see `seeds_to_decide`. None if the
            arm is decided, or if the number cannot be estimated.
        why: why the arm is undecided, if noise is not the reason; else "".
    """

    seeds: int
    smallest: float
    mean: float
    sd: float
    interval: Interval
    bootstrap: Interval
    p: float
    p_holm: float
    p_same: float
    p_same_holm: float
    verdict: str
    more_seeds: int | None
    why: str

    @property
    def words(self) -> str:
        """The verdict as a report says it."""
        if self.verdict == SAME:
            return f"no difference larger than {self.smallest:g}"
        if self.verdict != UNDECIDED:
            return self.verdict
        seeds = "" if self.more_seeds is None else _count(self.more_seeds, "more seed")
        return ": ".join([UNDECIDED, ", ".join(filter(None, [self.why, seeds]))])


def compare(differences: Mapping[Arm, np.ndarray], smallest: float) -> dict[Arm, Comparison]:
    """Compares every arm of a study with its baseline.

    The verdict is the first of these that applies:
        UNDECIDED with fewer than FEWEST_SEEDS seeds, or if all differences are equal and not 0.
            Then the noise cannot be estimated; most likely the seed had no effect at all.
        SAME ("no difference larger than `smallest`") if every difference is 0, or if
            p_same_holm <= 0.05. It precedes BETTER and WORSE: an effect that is significant, but
            shown to be smaller than `smallest`, is SAME.
        BETTER, WORSE if p_holm <= 0.05, by the sign of the mean.
        UNDECIDED otherwise.

    Error rates. There are two kinds of claims, "better or worse" and "no difference larger than".
    Holm's correction over the arms is applied to each kind. In one study

    - the probability that any arm without an effect is called BETTER or WORSE is at most 5%. (It is
      less likely that an arm with an effect gets the wrong sign.) In 4,000 simulated studies of
      four arms that equal the baseline, with 3, 5 or 10 seeds, 2 to 5% had such an error; without
      the correction 11 to 18% had one;
    - the probability that any arm whose effect is `smallest` or larger is called SAME is at most
      5%;
    - the probability of an error of either kind is at most 10%, and about half of that in practice:
      if two arms had no effect and two had the effect `smallest`, 4 to 6% of the simulated studies
      had an error. For one arm the bound is 5%, since only one kind of claim can be false.

    Holm's bound does not need independent tests, which these are not: the arms share a baseline.
    The t tests assume that seeds are independent and that differences are about normal. Choose the
    number of seeds before you see the losses: each further look may add as much error again. In
    simulations, running `more_seeds` more seeds once kept false BETTER and WORSE at 5% or below,
    and false SAME at 8% or below.

    Args:
        differences: for each arm, float (S,), of the seeds whose runs are finished in the arm and
            in the baseline. S may differ between arms and may be 0. Holm's correction counts all
            arms, with or without finished seeds.
        smallest: the smallest difference that matters, above 0.

    Raises:
        UserError: if `smallest` is not above 0.
        ValueError: if a difference is not finite. A run that diverged has no loss to average. The
            caller must report it and must not drop it silently.
    """
    if not (math.isfinite(smallest) and smallest > 0):
        raise UserError(f"the smallest difference that matters must be above 0, not {smallest:g}")
    arms = {name: np.asarray(d_S, np.float64) for name, d_S in differences.items()}
    for name, d_S in arms.items():
        if d_S.ndim != 1 or not np.isfinite(d_S).all():
            raise ValueError(f"{name}: one finite difference for each seed is wanted, not {d_S}")
    if not arms:
        return {}
    p_A, p_same_A = np.transpose([_tested(d_S, smallest) for d_S in arms.values()])
    tested_AP = np.stack([p_A, holm(p_A), p_same_A, holm(p_same_A)], axis=1).tolist()
    return {
        name: _comparison(d_S, smallest, len(arms), *tested_P)
        for (name, d_S), tested_P in zip(arms.items(), tested_AP, strict=True)
    }


def _comparison(
    d_S: np.ndarray,
    smallest: float,
    arms: int,
    p: float,
    p_holm: float,
    p_same: float,
    p_same_holm: float,
) -> Comparison:
    seeds = len(d_S)
    mean = _mean(d_S)
    sd = float(d_S.std(ddof=1)) if seeds > 1 else math.nan
    conclusion = verdict(mean, p_holm, p_same_holm)
    more_seeds, why = None, ""
    if conclusion == UNDECIDED and seeds < FEWEST_SEEDS:
        more_seeds, why = (
            FEWEST_SEEDS - seeds,
            f"{_count(seeds, 'seed')} of at least {FEWEST_SEEDS}",
        )
    elif conclusion == UNDECIDED and _no_spread(d_S):
        why = "every seed differs by the same amount, so there is no noise to judge by"
    elif conclusion == UNDECIDED:
        more_seeds = max(1, seeds_to_decide(sd, seeds, smallest, arms) - seeds)
    return Comparison(
        seeds=seeds,
        smallest=smallest,
        mean=mean,
        sd=sd,
        interval=t_interval(d_S),
        bootstrap=bootstrap_interval(d_S),
        p=p,
        p_holm=p_holm,
        p_same=p_same,
        p_same_holm=p_same_holm,
        verdict=conclusion,
        more_seeds=more_seeds,
        why=why,
    )


def verdict(mean: float, p_holm: float, p_same_holm: float) -> str:
    """The verdict that follows from two corrected p-values and the sign of the mean difference."""
    if p_same_holm <= ALPHA:
        return SAME
    if p_holm <= ALPHA:
        return BETTER if mean < 0 else WORSE
    return UNDECIDED


def holm(p_A: Sequence[float] | np.ndarray) -> np.ndarray:
    """p-values after Holm's (1979) step-down correction over arms, float (A,)."""
    return multipletests(p_A, method="holm")[1]


def p_values(d_S: np.ndarray, smallest: float) -> tuple[np.ndarray, np.ndarray]:
    """`p` and `p_same` of a Comparison, uncorrected; differences (..., S), not all equal."""
    p = stats.ttest_1samp(d_S, 0, axis=-1).pvalue
    not_below = stats.ttest_1samp(d_S, -smallest, axis=-1, alternative="greater").pvalue
    not_above = stats.ttest_1samp(d_S, smallest, axis=-1, alternative="less").pvalue
    return p, np.maximum(not_below, not_above)


def _tested(d_S: np.ndarray, smallest: float) -> tuple[float, float]:
    """`p_values`, or fixed values if there are too few seeds or no variance for a t test."""
    if len(d_S) < FEWEST_SEEDS:
        return 1.0, 1.0
    if _no_spread(d_S):
        return 1.0, 0.0 if _tie(d_S) else 1.0
    p, p_same = p_values(d_S, smallest)
    return float(p), float(p_same)


def _mean(d_S: np.ndarray) -> float:
    return float(np.mean(d_S)) if len(d_S) else math.nan


def _no_spread(d_S: np.ndarray) -> bool:
    return bool(np.ptp(d_S) < ROUNDING)


def _tie(d_S: np.ndarray) -> bool:
    return bool(np.abs(d_S).max() < ROUNDING)


def t_interval(d_S: np.ndarray) -> Interval:
    """Student's t interval of a mean. NaN with fewer than two seeds, or if all differences are
    equal and not 0."""
    if len(d_S) < 2:
        return NO_INTERVAL
    if _no_spread(d_S):
        return Interval(0.0, 0.0) if _tie(d_S) else NO_INTERVAL
    ends = stats.ttest_1samp(d_S, 0).confidence_interval(1 - ALPHA)
    return Interval(float(ends.low), float(ends.high))


def bootstrap_interval(d_S: np.ndarray) -> Interval:
    """An interval of a mean by the expanded percentile bootstrap; NaN where `t_interval` is NaN.

    Hesterberg 2015 (What Teachers Should Know about the Bootstrap). The bootstrap of n values is
    too narrow for two reasons: its standard deviation is too small by the factor
    sqrt((n - 1) / n), and its percentiles are those of a normal distribution and not of Student's
    t. Wider percentiles correct both. Resamples are drawn with a fixed seed.

    Verdicts do not use this interval. The mean of a resample always lies between the smallest and
    the largest value, so with n seeds the coverage is at most 1 - 2 / 2^n: 75% with 3, 87.5% with
    4. Coverage measured on 4,000 samples each of normal noise, in percent:
        seeds                             3     4     5     6     8    10
        this                             75    87    92    94    95    95
        scipy's percentile or BCa     72-75    79    84    86    89    90
        Student's t                      95    95    95    95    96    96
    If the noise is Student's t with 3 degrees of freedom, this interval covers 94% with 8 and 10
    seeds, and Student's interval covers 96% with any number above. If the noise is exponential,
    which is more skewed than a difference of two similar runs, both cover 87 to 91% with 5 to 10
    seeds.
    """
    if any(map(math.isnan, t_interval(d_S))) or _no_spread(d_S):
        return t_interval(d_S)
    seeds = len(d_S)
    student = stats.t.isf(ALPHA / 2, seeds - 1) * math.sqrt(seeds / (seeds - 1))
    ends = stats.bootstrap(
        (d_S,),
        np.mean,
        method="percentile",
        confidence_level=1 - 2 * stats.norm.sf(student),
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(ends.low), float(ends.high))


def seeds_to_decide(sd: float, seeds: int, smallest: float, arms: int) -> int:
    """The total number of seeds that gives a verdict with probability 80%.

    Assumptions: differences are independent and normal. The true effect is 0 or +-`smallest`; an
    effect between these needs up to four times as many seeds, because both hypotheses are almost
    true there. The level is that of Holm's first step, 0.05 / `arms`, which is the strictest.

    Stein's (1945) two-stage procedure: n = (sd / smallest)^2 (t_a + t_b)^2, with quantiles of
    Student's t with seeds - 1 degrees of freedom. A power analysis that takes the estimate `sd` for
    the true value gives too few seeds: with 3 seeds, the estimate is 0.83 of the true value or less
    in half of all cases. Simulated: undecided arms with 3 to 8 seeds, true sd one or two times
    `smallest`. A power analysis decided 60 to 89% of them, Stein's procedure 82 to 96%. Its
    disadvantage: with few seeds so far it asks for many.

    Args:
        sd: estimate of the standard deviation of the differences.
        seeds: how many differences `sd` was estimated from.
        smallest: the smallest difference that matters.
        arms: arms of the study.
    """
    level = ALPHA / arms
    degrees = seeds - 1
    differs = stats.t.isf(level / 2, degrees) + stats.t.ppf(POWER, degrees)
    # Both one-sided tests must reject: each may fail with half of the probability 1 - POWER.
    same = stats.t.isf(level, degrees) + stats.t.ppf((1 + POWER) / 2, degrees)
    return math.ceil((sd / smallest * max(differs, same)) ** 2)


def pairing(arm_S: np.ndarray, baseline_S: np.ndarray) -> float:
    """Variance of paired differences divided by that of unpaired ones; both losses are (S,).

    1 if pairing has no benefit. At 1/4, one pair gives as much information as four unpaired runs
    of each side. The estimate is noisy: with 5 seeds an error of 50% is common. NaN with fewer
    than two seeds or without any variance.
    """
    if len(arm_S) < 2:
        return math.nan
    unpaired = float(np.var(arm_S, ddof=1) + np.var(baseline_S, ddof=1))
    return float(np.var(arm_S - baseline_S, ddof=1)) / unpaired if unpaired else math.nan


@dataclass(frozen=True)
class Noise:
    """How much the loss of a recipe varies between seeds.

    Attributes:
        sd: sample standard deviation (ddof 1).
        interval: of `sd`, by the chi-square distribution. It is exact for normal noise, and wide.
    """

    seeds: int
    mean: float
    sd: float
    interval: Interval


def noise(losses_S: np.ndarray) -> Noise:
    """The noise between seeds of a recipe from its losses, float (S,).

    Raises:
        UserError: with fewer than two seeds.
    """
    seeds = len(losses_S)
    if seeds < 2:
        raise UserError(f"noise is measured between seeds: give at least 2 seeds, not {seeds}")
    sd = float(np.std(losses_S, ddof=1))
    ends = stats.chi2.ppf([1 - ALPHA / 2, ALPHA / 2], seeds - 1)
    low, high = sd * np.sqrt((seeds - 1) / ends)
    return Noise(seeds, float(np.mean(losses_S)), sd, Interval(float(low), float(high)))


def difference_sd(sd: float, correlation: float) -> float:
    """Standard deviation of paired differences, if the losses of arm and baseline both have the
    standard deviation `sd` and this correlation over seeds. Correlation 0: as without pairs."""
    return sd * math.sqrt(2 * (1 - correlation))


def power(effect: float, sd: float, seeds: int) -> float:
    """Probability that a true difference `effect` is significant with the right sign, in a study of
    one arm. `sd` is the true standard deviation of the differences. With more arms the power is
    lower (Holm)."""
    return float(TTestPower().power(effect / sd, seeds, ALPHA / 2, alternative="larger"))


def seeds_to_see(effect: float, sd: float) -> int | None:
    """The smallest number of seeds whose `power` is 80%; None if that is above MOST_SEEDS.

    For planning before any pair was run: `sd` (see `difference_sd`) is taken as the true value. As
    it is an estimate, compute the number also for the upper end of its interval.
    """
    if sd == 0:
        return FEWEST_SEEDS
    seeds = range(FEWEST_SEEDS, MOST_SEEDS + 1)
    at = bisect.bisect_left(seeds, True, key=lambda n: power(effect, sd, n) >= POWER)
    return seeds[at] if at < len(seeds) else None


def smallest_effect(seeds: int, sd: float) -> float:
    """The effect that `seeds` seeds detect with 80% `power`; infinite below FEWEST_SEEDS seeds."""
    if seeds < FEWEST_SEEDS:
        return math.inf
    return sd * optimize.brentq(lambda effect: power(effect, 1, seeds) - POWER, 0, 10)


@dataclass(frozen=True)
class Change:
    """How the gain of an arm (minus its mean difference) changes from a small to a large scale.

    Attributes:
        change: gain at the large scale minus gain at the small scale.
        interval: of `change`, by Welch's t test. It assumes that the runs of the two scales are
            independent.
        verdict: HOLDS if the absolute change is shown to be smaller than `smallest` (TOST); else
            SHRINKS or GROWS if the interval excludes 0; else UNDECIDED. Each claim is false with
            probability at most 5% for one arm; there is no correction for several arms.
    """

    gain_small: float
    gain_large: float
    change: float
    interval: Interval
    verdict: str


def change_of_gain(small_S: np.ndarray, large_S: np.ndarray, smallest: float) -> Change:
    """How the gain of an arm changes, by paired differences (S,) at a small and at a large scale.

    UNDECIDED with fewer than FEWEST_SEEDS seeds at either scale, or if neither scale has variance.
    """
    gain_small, gain_large = _mean(np.negative(small_S)), _mean(np.negative(large_S))
    change = gain_large - gain_small
    too_few = min(len(small_S), len(large_S)) < FEWEST_SEEDS
    if too_few or (_no_spread(small_S) and _no_spread(large_S)):
        return Change(gain_small, gain_large, change, NO_INTERVAL, UNDECIDED)
    # scipy warns if one of the two has no variance. Its result is right: the variance of the sum is
    # then that of the other.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        test = stats.ttest_ind(np.negative(large_S), np.negative(small_S), equal_var=False)
    ends = test.confidence_interval(1 - ALPHA)
    inner = test.confidence_interval(1 - 2 * ALPHA)  # inside +-smallest if and only if TOST rejects
    if -smallest < inner.low and inner.high < smallest:
        conclusion = HOLDS
    elif ends.high < 0:
        conclusion = SHRINKS
    elif ends.low > 0:
        conclusion = GROWS
    else:
        conclusion = UNDECIDED
    interval = Interval(float(ends.low), float(ends.high))
    return Change(gain_small, gain_large, change, interval, conclusion)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
