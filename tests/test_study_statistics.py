"""Verdicts: their error rates, coverage and power by simulation, and parity by another route."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import numpy as np
import pytest
import statsmodels.api
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from gptjax.config import UserError
from gptjax.study.statistics import (
    ALPHA,
    BETTER,
    GROWS,
    HOLDS,
    NO_INTERVAL,
    POWER,
    SAME,
    SHRINKS,
    UNDECIDED,
    WORSE,
    bootstrap_interval,
    change_of_gain,
    compare,
    difference_sd,
    holm,
    noise,
    p_values,
    pairing,
    power,
    seeds_to_decide,
    seeds_to_see,
    smallest_effect,
    t_interval,
    verdict,
)

STUDIES = 1000
ARMS = 4
SD = 0.003  # nats between seeds, of which
CORRELATION = 0.6  # is shared by the runs of a seed
WINNERS = (BETTER, WORSE)


@pytest.fixture(scope="module", autouse=True)
def _quick_holm() -> Iterator[None]:
    """multipletests collects garbage at each call: in a process full of jax, a thousand calls would
    take minutes. What exists already need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


def draw(
    seeds: int, effects: tuple[float, ...], studies: int = STUDIES, shape: str = "normal", key=0
) -> np.ndarray:
    """Simulated differences (studies, arms, seeds): every arm is paired with one baseline."""
    rng = np.random.default_rng(key)

    def unit(*size: int) -> np.ndarray:
        if shape == "normal":
            return rng.normal(size=size)
        if shape == "heavy":
            return rng.standard_t(4, size=size) / math.sqrt(2)
        return rng.exponential(size=size) - 1

    shared = math.sqrt(CORRELATION) * unit(studies, 1, seeds)
    own = math.sqrt(1 - CORRELATION) * unit(studies, len(effects) + 1, seeds)
    losses = 3 + SD * (shared + own)
    return losses[:, 1:] - losses[:, :1] + np.array(effects)[:, None]


def judged(differences: np.ndarray, smallest: float) -> np.ndarray:
    """Verdicts (studies, arms), by the parts of `compare` without its bootstrap."""
    p, p_same = p_values(differences, smallest)
    rows = zip(differences.mean(-1), map(holm, p), map(holm, p_same), strict=True)
    return np.array([list(map(verdict, *row)) for row in rows])


def share_within(hits: np.ndarray, low: float, high: float) -> bool:
    """Whether the count of hits is likely (all but 1 in 1,000) where the rate is low to high."""
    n = len(hits)
    return bool(stats.binom.ppf(5e-4, n, low) <= hits.sum() <= stats.binom.ppf(1 - 5e-4, n, high))


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_simulation_judges_as_compare_does(seeds):
    differences = draw(seeds, (0, 0.001, 0.004, -0.006), studies=12)
    expected = judged(differences, 0.003)
    for study, row in zip(differences, expected, strict=True):
        found = compare({str(a): d_S for a, d_S in enumerate(study)}, 0.003)
        assert [c.verdict for c in found.values()] == list(row)
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize("shape", ["normal", "heavy", "skewed"])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_a_study_of_identical_arms_has_a_false_winner_in_five_percent(seeds, shape):
    # So small a `smallest` that no arm is called SAME, which would only hide false winners.
    differences = draw(seeds, (0,) * ARMS, shape=shape)
    false = np.isin(judged(differences, 1e-5), WINNERS).any(1)
    assert share_within(false, 0.01, ALPHA)
    # Were it not for Holm, it would be far more.
    uncorrected = (p_values(differences, 1e-5)[0] <= ALPHA).any(1)
    assert not share_within(uncorrected, 0, ALPHA)


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("smallest", [0.003, 0.01])
def test_an_effect_that_matters_is_called_none_in_five_percent(seeds, smallest):
    differences = draw(seeds, (smallest, -smallest) * 2)
    assert share_within((judged(differences, smallest) == SAME).any(1), 0.01, ALPHA)
    assert not share_within((p_values(differences, smallest)[1] <= ALPHA).any(1), 0, ALPHA)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_false_claims_of_both_kinds_together(seeds):
    found = judged(draw(seeds, (0, 0, 0.003, 0.003)), 0.003)
    false = np.isin(found[:, :2], WINNERS).any(1) | np.isin(found[:, 2:], (SAME, BETTER)).any(1)
    assert share_within(false, 0.02, 2 * ALPHA)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_coverage_of_the_t_interval(seeds):
    differences = draw(seeds, (0.002,))[:, 0]
    low, high = np.transpose([t_interval(d_S) for d_S in differences])
    assert 0.93 <= ((low <= 0.002) & (high >= 0.002)).mean() <= 0.97


# What its docstring says; 500 samples tell 92% from 84% and 95% from 90%.
@pytest.mark.parametrize(
    "seeds, covered, percentile", [(3, 0.75, None), (5, 0.92, 0.84), (10, 0.95, 0.90)]
)
def test_coverage_of_the_bootstrap_interval(seeds, covered, percentile):
    differences = draw(seeds, (0.002,), studies=500)[:, 0]
    low, high = np.transpose([bootstrap_interval(d_S) for d_S in differences])
    hits = (low <= 0.002) & (high >= 0.002)
    assert share_within(hits, covered, covered)
    if percentile:
        assert not share_within(hits, percentile, percentile)


def test_the_bootstrap_is_expanded_as_hesterberg_says():
    d_S = draw(10, (0,), studies=1)[0, 0]
    level = stats.norm.cdf(stats.t.ppf(1 - ALPHA / 2, 9) * math.sqrt(10 / 9))
    means = d_S[np.random.default_rng(5).integers(10, size=(100_000, 10))].mean(1)
    low, high = np.quantile(means, [1 - level, level])
    found = bootstrap_interval(d_S)
    # Both are noisy by some 1%; without the square root the interval were 5% narrower.
    assert found.high - found.low == pytest.approx(high - low, rel=0.03)


@pytest.mark.parametrize("effect", [0.0015, 0.003, 0.006])
def test_a_planted_effect_is_found_at_the_stated_power(effect):
    sd = difference_sd(SD, CORRELATION)
    seeds = seeds_to_see(effect, sd)
    for sign, name in ((1, WORSE), (-1, BETTER)):
        found = judged(draw(seeds, (sign * effect,), key=sign + 1), effect)[:, 0] == name
        assert share_within(found, POWER, power(effect, sd, seeds))
        fewer = judged(draw(max(3, seeds // 2), (sign * effect,)), effect)[:, 0] == name
        assert not share_within(fewer, POWER, 1) or seeds < 5


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("arms", [1, 4])
@pytest.mark.parametrize("truth", [0, 1])
def test_as_many_more_seeds_as_promised_decide(seeds, arms, truth):
    """With sd and effects in units of `smallest`, each arm at Holm's hardest step."""
    rng = np.random.default_rng(0)
    sd = 2
    first = rng.normal(truth, sd, size=(400, seeds))
    p, p_same = p_values(first, 1)
    open_ = first[np.minimum(p, p_same) > ALPHA / arms]
    decided = []
    for d_S in open_:
        promised = seeds_to_decide(float(d_S.std(ddof=1)), seeds, 1, arms)
        more = rng.normal(truth, sd, size=max(1, promised - seeds))
        p, p_same = p_values(np.append(d_S, more), 1)
        decided.append(min(p, p_same) <= ALPHA / arms)
    assert share_within(np.array(decided), POWER, 1)


def test_a_plan_by_the_estimate_alone_would_promise_too_much():
    """Why seeds_to_decide is not simply statsmodels' power with the sd of three seeds."""
    rng = np.random.default_rng(0)
    plans = np.unique(np.geomspace(3, 3000, 100).astype(int))
    decided = []
    for d_S in rng.normal(0, 2, size=(200, 3)):
        powers = TTestPower().power(1 / d_S.std(ddof=1), plans, ALPHA, alternative="larger")
        more = rng.normal(0, 2, size=max(1, plans[np.argmax(powers >= 0.9)] - 3))
        decided.append(min(p_values(np.append(d_S, more), 1)) <= ALPHA)
    assert not share_within(np.array(decided), POWER, 1)


def test_the_plan_serves_the_dearer_of_the_two_claims():
    # Quantiles as printed tables have them. With 2 degrees a difference is dearer to show
    # (4.303 + 1.061) than none (2.920 + 1.886); with 19 it is none (1.729 + 1.328 over
    # 2.093 + 0.861).
    assert seeds_to_decide(100, 3, 1, arms=1) == pytest.approx((100 * 5.364) ** 2, rel=1e-3)
    assert seeds_to_decide(100, 20, 1, arms=1) == pytest.approx((100 * 3.057) ** 2, rel=1e-3)


def test_more_seeds_is_what_the_plan_lacks():
    d_S = draw(5, (0,), studies=1)[0, 0]
    found = compare({"a": d_S, "b": d_S + 0.0001}, 0.0005)
    assert {c.verdict for c in found.values()} == {UNDECIDED}
    plan = seeds_to_decide(found["a"].sd, 5, 0.0005, arms=2)
    assert found["a"].more_seeds == plan - 5 > 0
    assert found["a"].words == f"undecided: {plan - 5} more seeds"


def test_a_planted_loss_is_worse_and_a_planted_tie_is_no_difference():
    a, b = draw(5, (0, 0), studies=1)[0]
    found = compare({"loss": a + 2.0, "gain": b - 0.1, "tie": np.zeros(5)}, 0.003)
    assert [c.verdict for c in found.values()] == [WORSE, BETTER, SAME]
    assert found["tie"].words == "no difference larger than 0.003"
    assert found["tie"].interval == found["tie"].bootstrap == (0, 0)
    assert [c.more_seeds for c in found.values()] == [None] * 3


def test_a_gain_that_is_sure_and_too_small_to_matter_is_no_difference():
    tiny = -0.0005 + draw(10, (0,), studies=1)[0, 0] / 100
    found = compare({"tiny": tiny}, 0.003)["tiny"]
    assert found.p_holm < 1e-6 and found.interval.high < 0
    assert found.verdict == SAME


@pytest.mark.parametrize("seeds", [0, 1, 2])
@pytest.mark.parametrize("size", [0.0, 5.0])
def test_nothing_is_claimed_under_three_seeds(seeds, size):
    d_S = size * (1 + 1e-6 * np.arange(seeds))
    found = compare({"a": d_S, "tie": np.zeros(3)}, 0.003)
    assert found["a"].verdict == UNDECIDED
    assert found["a"].more_seeds == 3 - seeds
    assert f"{seeds} seed" in found["a"].words and "of at least 3" in found["a"].words
    assert found["tie"].verdict == SAME


@pytest.mark.parametrize("size", [-0.01, 0.001, 0.1 + 0.2])
@pytest.mark.filterwarnings("error")
def test_the_same_difference_at_every_seed_shows_no_noise(size):
    # 0.1 + 0.2 - 3 + 3 and the like: equal but for rounding.
    d_S = np.array([size, size - 3 + 3, size + 7 - 7, size])
    found = compare({"a": d_S}, 0.003)["a"]
    assert found.verdict == UNDECIDED and found.more_seeds is None
    assert found.interval == pytest.approx(NO_INTERVAL, nan_ok=True)
    assert "same amount" in found.words


def test_arms_without_seeds_count_in_the_family():
    arms = dict(zip("abc", draw(4, (-0.003, 0, 0), studies=1)[0], strict=True))
    waiting = compare(arms | {"d": np.array([])}, 0.003)
    ready = compare(arms, 0.003)
    lowest = min(ready, key=lambda a: ready[a].p)
    assert waiting[lowest].p_holm == pytest.approx(4 / 3 * ready[lowest].p_holm)


def test_bad_input():
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="must be above 0"):
            compare({"a": np.zeros(3)}, wrong)
    for wrong in (np.array([0, np.nan, 1]), np.array([np.inf] * 3), np.zeros((3, 1))):
        with pytest.raises(ValueError, match="a: one finite difference"):
            compare({"a": wrong}, 0.003)
    assert compare({}, 0.003) == {}


def test_parity_by_another_route():
    rng = np.random.default_rng(2)
    baseline, *losses = 3 + rng.normal(size=(4, 6)) * SD
    found = compare({str(a): loss_S - baseline for a, loss_S in enumerate(losses)}, 0.002)
    for loss_S, c in zip(losses, found.values(), strict=True):
        assert c.p == pytest.approx(stats.ttest_rel(loss_S, baseline).pvalue, rel=1e-9)
        described = DescrStatsW(loss_S - baseline)
        assert c.p_same == pytest.approx(described.ttost_mean(-0.002, 0.002)[0], rel=1e-9)
        # The interval by an ordinary regression on a constant.
        fit = statsmodels.api.OLS(loss_S - baseline, np.ones(6)).fit()
        assert c.interval == pytest.approx(fit.conf_int()[0], rel=1e-9)
        assert (c.mean, c.sd) == pytest.approx((described.mean, math.sqrt(6 / 5) * described.std))
    # Holm 1979: the k-th smallest of m is multiplied by m - k + 1, and none is below the one before.
    assert holm([0.02, 0.001, 0.9, 0.03]) == pytest.approx([0.06, 0.004, 0.9, 0.06])


pieces = st.lists(st.integers(-20, 20), min_size=0, max_size=6).map(lambda x: np.array(x) * 1e-3)


@settings(deadline=None, max_examples=40)
@given(st.lists(pieces, min_size=1, max_size=4), st.randoms())
def test_order_and_exchange(arms, random):
    named = {str(a): d_S for a, d_S in enumerate(arms)}
    found = compare(named, 0.004)
    names = list(named)
    random.shuffle(names)
    assert {a: repr(c) for a, c in compare({a: named[a] for a in names}, 0.004).items()} == {
        a: repr(c) for a, c in found.items()
    }
    # What was better is worse once arm and baseline change places.
    other = compare({a: -d_S for a, d_S in named.items()}, 0.004)
    swapped = {BETTER: WORSE, WORSE: BETTER}
    for a, c in found.items():
        assert other[a].verdict == swapped.get(c.verdict, c.verdict)
        assert other[a].more_seeds == c.more_seeds
        for mine, its in ((c.interval, other[a].interval), (c.bootstrap, other[a].bootstrap)):
            assert mine == pytest.approx((-its.high, -its.low), nan_ok=True, abs=1e-12)


def test_pairing():
    rng = np.random.default_rng(0)
    shared, a, b = rng.normal(size=(3, 20_000))
    # Of two that correlate by 0.8 the ratio is 1 - 0.8.
    arm, baseline = 2 * shared + a, 2 * shared + b
    assert pairing(arm, baseline) == pytest.approx(0.2, rel=0.05)
    assert pairing(3 * a, b) == pytest.approx(1, rel=0.05)
    assert math.isnan(pairing(a[:1], b[:1])) and math.isnan(pairing(np.ones(3), np.ones(3)))


def test_noise():
    found = noise(np.array([1.0, 2.0, 3.0]))
    assert (found.seeds, found.mean, found.sd) == (3, 2, 1)
    # Chi-square of 2 degrees is exponential: its quantiles are -2 ln(1 - p).
    expected = (math.sqrt(2 / -2 / math.log(0.025)), math.sqrt(2 / -2 / math.log(0.975)))
    assert found.interval == pytest.approx(expected)
    covered = []
    for losses_S in np.random.default_rng(0).normal(size=(STUDIES, 5)):
        low, high = noise(losses_S).interval
        covered.append(low <= 1 <= high)
    assert share_within(np.array(covered), 0.95, 0.95)
    with pytest.raises(UserError, match="at least 2 seeds"):
        noise(np.ones(1))


def test_plans_agree_with_statsmodels_and_with_each_other():
    for seeds in (3, 5, 20, 1000):
        effect = smallest_effect(seeds, 0.004)
        solved = TTestPower().solve_power(nobs=seeds, alpha=ALPHA, power=POWER) * 0.004
        # Two-sided power counts calls by the wrong sign, too.
        assert effect == pytest.approx(solved, rel=1e-4)
        assert seeds_to_see(effect * 1.0001, 0.004) == seeds
    assert smallest_effect(2, 0.004) == math.inf
    assert seeds_to_see(1e-6, 1) is None and seeds_to_see(1, 0) == seeds_to_see(100, 1) == 3
    assert difference_sd(0.003, 0) == pytest.approx(0.003 * math.sqrt(2))
    assert difference_sd(0.003, 0.75) == pytest.approx(0.003 / math.sqrt(2))


@pytest.mark.parametrize(
    "small, large, expected",
    [(0.02, 0.002, SHRINKS), (0.002, 0.02, GROWS), (0.02, 0.02, HOLDS), (-0.02, 0.002, GROWS)],
)
def test_a_gain_at_two_scales(small, large, expected):
    a, b = draw(8, (0, 0), studies=1)[0]
    a, b = a - a.mean(), (b - b.mean()) / 2
    found = change_of_gain(a - small, b - large, 0.005)
    assert found.verdict == expected
    assert (found.gain_small, found.gain_large) == pytest.approx((small, large))
    assert found.change == pytest.approx(large - small)
    other = CompareMeans(DescrStatsW(large - b), DescrStatsW(small - a))
    assert found.interval == pytest.approx(other.tconfint_diff(usevar="unequal"), rel=1e-6)
    inner = other.ttost_ind(-0.005, 0.005, usevar="unequal")[0] < ALPHA
    assert inner == (expected == HOLDS)


def test_a_gain_at_two_scales_may_be_undecided():
    a, b = draw(8, (0, 0), studies=1)[0]
    assert change_of_gain(a - 0.01, b - 0.01, 1e-4).verdict == UNDECIDED
    for few in (a[:2], a[:0], np.array([0.5])):
        assert change_of_gain(few, b, 0.01).verdict == UNDECIDED
        assert change_of_gain(b, few - 1, 0.01).verdict == UNDECIDED
    assert change_of_gain(np.full(3, -0.1), np.full(3, -0.2), 0.01).verdict == UNDECIDED
    assert change_of_gain(np.full(3, -0.1), b - 0.2, 0.01).verdict == GROWS


def _changes(small: float, large: float) -> np.ndarray:
    pairs = zip(*(draw(s, (0,), studies=500, key=s)[:, 0] for s in (3, 5)), strict=True)
    return np.array([change_of_gain(a - small, b - large, 0.004).verdict for a, b in pairs])


def test_a_gain_that_holds_rarely_seems_not_to_and_the_other_way_round():
    assert share_within(np.isin(_changes(0.01, 0.01), (SHRINKS, GROWS)), 0.005, ALPHA)
    assert share_within(_changes(0.01, 0.006) == HOLDS, 0.005, ALPHA)
