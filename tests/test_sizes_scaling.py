"""The law of scale: planted constants come back, bands cover them, and what cannot be told is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from gptjax.config import UserError
from gptjax.sizes import scaling, scaling_report
from gptjax.sizes.scaling import Bootstrap, Law, Points

# Hoffmann et al. 2022, section 3.3, equation 10.
CHINCHILLA = Law(E=1.69, A=406.4, a=0.34, B=410.7, b=0.28)
NOISE = 2e-3  # of log losses: what differs between seeds of small models


def ladder(n_N: int, n_D: int, noise: float = 0.0, seed: int = 0, law: Law = CHINCHILLA) -> Points:
    """A grid of sizes; of one size only, the smallest."""
    grid = np.meshgrid(np.geomspace(1e8, 1e10, n_N), np.geomspace(2e9, 2e11, n_D), indexing="ij")
    N, D = (size.ravel() for size in grid)
    factor = np.exp(noise * np.random.default_rng(seed).standard_normal(N.size))
    return Points(N, D, law.loss(N, D) * factor)


# ---- the fit


def test_noiseless_points_give_the_planted_constants():
    np.testing.assert_allclose(scaling.fit(ladder(3, 3)), CHINCHILLA, rtol=1e-5)


def test_equal_tokens_leave_a_law_of_parameters():
    points = ladder(5, 1)
    law = scaling.fit(points)
    floor = CHINCHILLA.E + CHINCHILLA.B / 2e9**CHINCHILLA.b
    np.testing.assert_allclose(law, (floor, CHINCHILLA.A, CHINCHILLA.a, 0, 0), rtol=1e-5)
    assert law.terms == ("parameters",)
    assert "all points have about 2e+09 tokens: E holds B/D^b" in scaling.terms(points)[1]


def test_equal_parameters_leave_a_law_of_tokens():
    points = ladder(1, 5)
    law = scaling.fit(points)
    floor = CHINCHILLA.E + CHINCHILLA.A / 1e8**CHINCHILLA.a
    np.testing.assert_allclose(law, (floor, 0, 0, CHINCHILLA.B, CHINCHILLA.b), rtol=1e-5)
    assert law.terms == ("tokens",)
    assert "all points have about 1e+08 parameters: E holds A/N^a" in scaling.terms(points)[1]


@pytest.mark.parametrize("jitter", [0.0, 0.02])  # whole steps are never quite 20
def test_tokens_that_follow_parameters_leave_one_term(jitter):
    N = np.geomspace(1e6, 1e8, 5)
    D = 20 * N * (1 + jitter * np.array([1, -1, 0, -1, 1]))
    points = Points(N, D, 2 + 50 / N**0.3)
    np.testing.assert_allclose(scaling.fit(points), (2, 50, 0.3, 0, 0), rtol=1e-5)
    assert "tokens are a power of parameters, D = 20 N^1:" in scaling.terms(points)[1]


def independent(theta: np.ndarray, points: Points) -> np.ndarray:
    """Log residuals as Hoffmann et al. write them: theta = (e, log A, a, log B, b)."""
    e, log_A, a, log_B, b = theta
    N, D = np.log(points.parameters), np.log(points.tokens)
    logs = [log_A - a * N, log_B - b * D, np.full_like(N, e)]
    return scipy.special.logsumexp(logs, axis=0) - np.log(points.loss)


def paper(law: Law) -> np.ndarray:
    return np.array([np.log(law.E), np.log(law.A), law.a, np.log(law.B), law.b])


def random_theta(seed: int) -> np.ndarray:
    """Residuals within delta and beyond."""
    rng = np.random.default_rng(seed)
    return np.array([-0.5, -2.0, 0.3, -1.6, 0.3]) + rng.uniform(-1, 1, 5) * 10.0 ** -rng.integers(4)


@pytest.mark.parametrize("seed", range(5))
def test_the_objective_is_hubers_loss_of_the_log_residuals(seed):
    points, theta = ladder(4, 4, 1e-3), random_theta(seed)
    x_KP, (N, D) = scaling._logs(points, tuple(scaling.TERMS))
    value, _ = scaling.objective(theta, x_KP, np.log(points.loss))
    moved = theta + np.array([0, theta[2] * N.item(), 0, theta[4] * D.item(), 0])
    huber = scipy.special.huber(scaling.DELTA, independent(moved, points)).sum()
    np.testing.assert_allclose(value * scaling.DELTA**2, huber, rtol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_its_gradient_is_that_of_differences(seed):
    points, theta = ladder(4, 4, 1e-3), random_theta(seed)
    x_KP, _ = scaling._logs(points, tuple(scaling.TERMS))
    y_P = np.log(points.loss)
    _, gradient = scaling.objective(theta, x_KP, y_P)
    step = 1e-6 * np.eye(5)
    differences = [
        (scaling.objective(theta + h, x_KP, y_P)[0] - scaling.objective(theta - h, x_KP, y_P)[0])
        / 2e-6
        for h in step
    ]
    # Differences err where a residual crosses delta: by a share of one point's slope.
    np.testing.assert_allclose(gradient, differences, rtol=1e-3, atol=1e-4 * np.abs(gradient).max())


@pytest.mark.parametrize("noise", [3e-4, 1e-2])
def test_the_fit_is_that_of_another_optimiser_and_parametrisation(noise):
    points = ladder(5, 5, noise, seed=1)
    ours = paper(scaling.fit(points))

    def theirs(start: Sequence[float]) -> Any:
        scale = np.maximum(np.abs(start), 0.1)
        return scipy.optimize.least_squares(
            lambda theta: independent(theta, points),
            start,
            loss="huber",
            f_scale=scaling.DELTA,
            x_scale=scale,
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
            max_nfev=400,
        )

    starts = [(0.5, 5, 0.3, 5, 0.3), (0, 10, 0.5, 10, 0.5), (0.5, 5, 0.5, 10, 0.5)]
    best = min((theirs(start) for start in starts), key=lambda found: found.cost)
    our_cost = scipy.special.huber(scaling.DELTA, independent(ours, points)).sum()
    assert our_cost <= best.cost * (1 + 1e-7)
    np.testing.assert_allclose(ours, best.x, rtol=1e-3)


def test_an_outlier_hardly_moves_the_fit():
    """And moves least squares, which shows that there is something to withstand."""
    points = ladder(5, 5, 5e-4, seed=2)
    spoilt = points._replace(loss=points.loss * np.where(np.arange(25) == 24, 1.1, 1.0))
    clean = scaling.fit(points)

    def moved(delta: float) -> float:
        x_KP, middle = scaling._logs(points, clean.terms)
        theta = scipy.optimize.minimize(
            scaling.objective,
            scaling._theta(clean, middle),
            args=(x_KP, np.log(spoilt.loss), delta),
            jac=True,
            method="SLSQP",
            bounds=scaling._bounds(x_KP, np.log(spoilt.loss)),
            options={"ftol": 1e-12, "maxiter": 1000},
        ).x
        return abs(theta[2] - clean.a)

    huber = abs(scaling.fit(spoilt).a - clean.a)
    assert huber == pytest.approx(moved(scaling.DELTA), abs=1e-5)
    assert huber < 0.01
    assert moved(1.0) > 10 * huber  # beyond all residuals: their squares


# ---- bands


def studies(n_N: int, n_D: int, count: int) -> list[Bootstrap]:
    """The bootstrap of each of many simulated ladders."""
    found = []
    for seed in range(count):
        points = ladder(n_N, n_D, NOISE, seed)
        found.append(scaling.bootstrap(points, scaling.fit(points), 50, seed))
    return found


@pytest.fixture(scope="module")
def grids() -> list[Bootstrap]:
    return studies(5, 6, 40)


def outside(found: list[Bootstrap], truth: Law, tokens: float, level: float) -> dict[str, int]:
    """Of each constant, and of the loss of a model ten times as large, how often an interval
    holds the truth, where that is not within the binomial bounds of its level."""
    values = truth._asdict() | {"foretold": truth.loss(1e11, tokens)}
    hits = dict.fromkeys([name for name in values if values[name]], 0)
    for laws, tail in found:
        drawn = Bootstrap(laws, tail if level == 0.95 else (1 - level) / 2)
        told = laws._asdict() | {"foretold": laws.loss(1e11, tokens)}
        for name in hits:
            low, high = drawn.interval(told[name])
            hits[name] += int(low <= values[name] <= high)
    least, most = scipy.stats.binom.ppf([1e-3, 1 - 1e-3], len(found), level)
    return {name: count for name, count in hits.items() if not least <= count <= most}


# The middle half too: bands without end would lie within the bounds of 95%.
@pytest.mark.parametrize("level", [0.95, 0.5])
def test_bands_cover_the_truth(grids, level):
    assert outside(grids, CHINCHILLA, 2e12, level) == {}


def test_bands_cover_the_truth_with_two_degrees_of_freedom():
    floor = CHINCHILLA.E + CHINCHILLA.B / 2e9**CHINCHILLA.b
    truth = CHINCHILLA._replace(E=floor, B=0.0, b=0.0)
    assert outside(studies(5, 1, 40), truth, 1.0, 0.95) == {}


def test_the_bootstrap_is_the_same_at_every_call():
    points = ladder(4, 4, NOISE)
    law = scaling.fit(points)
    a, b, c = (scaling.bootstrap(points, law, 3, seed).laws for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_replicate_is_the_fit_of_the_points_it_drew():
    points = ladder(5, 6, NOISE)
    laws, _ = scaling.bootstrap(points, scaling.fit(points), 4, seed=7)
    drawn_RP = np.random.default_rng(7).integers(30, size=(4, 30))
    again = [scaling.fit(Points(*(column[drawn_P] for column in points))) for drawn_P in drawn_RP]
    np.testing.assert_allclose(np.transpose(laws), again, rtol=1e-3)


def test_the_tails_are_students():
    """With 4 degrees of freedom, where the normal quantile is that of t, 2.776."""
    points = ladder(3, 3, NOISE)
    _, tail = scaling.bootstrap(points, scaling.fit(points), 1)
    assert tail == pytest.approx(scipy.stats.norm.sf(2.776445), rel=1e-5)


def test_an_interval_is_what_lies_between_the_tails():
    drawn = Bootstrap(CHINCHILLA, 0.025)
    assert drawn.interval(np.arange(1001.0)) == (25, 975)
    assert drawn.interval(np.append(np.arange(1000.0), np.inf))[0] == 25


# ---- the optimum, and the largest left out


@pytest.mark.parametrize("flops", [1e18, 5.76e23])
def test_the_optimum_is_the_numerical_minimum(flops):
    parameters, tokens, loss = scaling.optimum(CHINCHILLA, flops)
    assert 6 * parameters * tokens == pytest.approx(flops, rel=1e-12)
    found = scipy.optimize.minimize_scalar(
        lambda log_N: CHINCHILLA.loss(np.exp(log_N), flops / 6 / np.exp(log_N)),
        bounds=(10, 35),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert loss == pytest.approx(found.fun, rel=1e-12)
    assert np.log(parameters) == pytest.approx(found.x, abs=1e-6)  # flat at its minimum


def test_the_optimum_of_a_bootstrap_is_each_laws():
    laws = Law(*(np.array([value, 1.1 * value]) for value in CHINCHILLA))
    each = [scaling.optimum(Law(*(c[i] for c in laws)), 1e20) for i in range(2)]
    np.testing.assert_allclose(np.transpose(scaling.optimum(laws, 1e20)), each, rtol=1e-12)


def test_the_largest_are_foretold_without_them():
    points = ladder(5, 4, NOISE, seed=3)
    found = scaling.leave_largest_out(points)
    small = points.parameters < 9e9
    law = scaling.fit(Points(*(column[small] for column in points)))
    foretold = law.loss(points.parameters, points.tokens)[~small]
    error = points.loss[~small] - foretold
    assert found["law"] == law._asdict()
    assert [p["error"] for p in found["points"]] == pytest.approx(error.tolist(), abs=1e-12)
    relative = error / points.loss[~small]
    assert [p["relative"] for p in found["points"]] == pytest.approx(relative.tolist(), abs=1e-12)
    assert found["mean_error"] == pytest.approx(error.mean(), abs=1e-12)
    assert found["rms_error"] == pytest.approx(np.sqrt(np.mean(error**2)), abs=1e-12)
    assert found["rms_relative"] == pytest.approx(np.sqrt(np.mean(relative**2)), abs=1e-12)


def test_what_only_the_largest_lose_is_their_error():
    points = ladder(4, 4)
    largest = points.parameters > 9e9
    found = scaling.leave_largest_out(points._replace(loss=points.loss + 0.1 * largest))
    assert [p["error"] for p in found["points"]] == pytest.approx([0.1] * 4, abs=1e-4)
    assert [p["tokens"] for p in found["points"]] == pytest.approx(points.tokens[largest].tolist())


# ---- what is refused


def of(N: Sequence[float], D: Sequence[float], loss: Sequence[float] | None = None) -> Points:
    sizes = np.array(N, float), np.array(D, float)
    return Points(*sizes, CHINCHILLA.loss(*sizes) if loss is None else np.array(loss, float))


@pytest.mark.parametrize(
    "points, message",
    [
        (of([], []), "there are no points"),
        (of([1e6, 2e6], [1e8]), "as many parameters as tokens and losses"),
        (of([1e6, 1e7], [1e8, 1e8], [3, np.nan]), "point 2: loss is nan: give a number above 0"),
        (of([1e6, 1e7], [1e8, 1e8], [3, -1]), "point 2: loss is -1.0: give a number above 0"),
        (of([1e6, -1e7], [1e8, 1e8], [3, 2]), "point 2: parameters is -10000000.0"),
        (of([1e6, 1e7], [np.inf, 1e8], [3, 2]), "point 1: tokens is inf"),
        (
            of([1e6] * 9, [1e8] * 9),
            "all 9 points have about 1e+06 parameters and 1e+08 tokens: a law of scale needs",
        ),
        (
            of([1e6, 1e6, 1e7, 1e7, 1e8], [1e8, 1e9, 1e8, 1e9, 1e8]),
            "5 points of 5 distinct sizes do not exceed the 5 constants of the law, "
            "E, A, a, B, b: add 1 more sizes",
        ),
        # Other seeds of the same sizes tell nothing of scale.
        (
            of([1e6, 1e7, 1e8] * 5, [1e8] * 15),
            "15 points of 3 distinct sizes do not exceed the 3 constants of the law, E, A, a: ",
        ),
        (
            of([1e6, 1e7, 1e8, 1e9] * 2, [1e8] * 4 + [1e9] * 4),
            "tokens takes only the values 1e+08, 1e+09, too few for B and b: give three or more",
        ),
    ],
)
def test_points_that_determine_no_law_are_refused(points, message):
    with pytest.raises(UserError) as refusal:
        scaling.fit(points)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_too_few_without_the_largest_are_refused():
    with pytest.raises(UserError, match="6 points of 6 distinct|takes only the values"):
        scaling.leave_largest_out(ladder(3, 3))


def test_a_budget_needs_both_terms():
    with pytest.raises(UserError, match="a law of both sizes"):
        scaling.optimum(scaling.fit(ladder(5, 1)), 1e18)
    for flops in (0, -1, np.nan, np.inf):
        with pytest.raises(UserError, match="give a number above 0"):
            scaling.optimum(CHINCHILLA, flops)


def test_constants_that_points_do_not_determine_are_named():
    """Tokens that make no difference."""
    points = ladder(4, 4, law=CHINCHILLA._replace(B=0.0))
    law = scaling.fit(points)
    assert "B" in scaling.undetermined(points, law)
    assert {"E", "A", "a"}.isdisjoint(scaling.undetermined(points, law))
    assert scaling.undetermined(ladder(4, 4), CHINCHILLA) == []
    told = scaling.record(points, law, scaling.bootstrap(points, law, 3))
    assert "ended where the search does" in told["notes"][0]


# ---- tables


def test_points_are_read_from_a_table(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("\ufeffname, loss,tokens,parameters\n a,3.5,1e9,1000000\n\nb,3.25,2e9,2e6\n")
    points = scaling.points_from_csv(path)
    np.testing.assert_array_equal(points, [[1e6, 2e6], [1e9, 2e9], [3.5, 3.25]])


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no column parameters, tokens, loss: its first line must name parameters, tokens, "),
        ("parameters,loss\n", "has no column tokens: "),
        ("parameters,loss\n", "it names parameters, loss"),
        ("parameters,tokens,loss\n1,2,3\n1,2,three\n", "points.csv:3: loss is 'three': give"),
        ("parameters,tokens,loss\n1,2\n", "points.csv:2: loss is missing: give"),
        ("parameters,tokens,loss\n1,,3\n", "points.csv:2: tokens is missing: give"),
        ("parameters,tokens,loss\n1,0,3\n", "points.csv:2: tokens is '0': give"),
        ("parameters,tokens,loss\n1,2,NaN\n", "points.csv:2: loss is 'NaN': give"),
    ],
)
def test_a_wrong_table_is_refused_by_its_line(tmp_path, content, message):
    path = tmp_path / "points.csv"
    path.write_text(content)
    with pytest.raises(UserError) as refusal:
        scaling.points_from_csv(path)
    assert message in str(refusal.value)


def test_a_table_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.csv as a CSV table: No such file"):
        scaling.points_from_csv(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"parameters,tokens,loss\n\xff")
    with pytest.raises(UserError, match="cannot read"):
        scaling.points_from_csv(tmp_path / "bytes.csv")


# ---- told


def test_the_record_is_strict_json_and_is_shown(capsys):
    points = ladder(4, 4, NOISE)
    law = scaling.fit(points)
    drawn = scaling.bootstrap(points, law, 20)
    record = scaling.record(points, law, drawn, budgets=[1e19, 1e24])
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["law"] == "E + A/N^a + B/D^b"
    assert record["constants"]["a"]["value"] == law.a
    assert record["constants"]["a"]["interval"] == list(drawn.interval(drawn.laws.a))
    error = points.loss - law.loss(points.parameters, points.tokens)
    assert record["largest_error"] == pytest.approx(np.abs(error).max())
    near, far = record["optimum"]
    assert near["parameters"]["value"] == scaling.optimum(law, 1e19)[0]
    assert near["beyond"] < 1 < far["beyond"]
    assert far["beyond"] == pytest.approx(far["tokens"]["value"] / 2e11)
    scaling_report.show(record)
    told = capsys.readouterr().out
    for part in ("E + A/N^a + B/D^b", f"{law.a:.4g}", "20 bootstrap replicates", "1e+24", "beyond"):
        assert part in told


def test_a_size_beyond_all_numbers_is_none():
    points = ladder(4, 4)
    laws = Law(*(np.array([value, value]) for value in CHINCHILLA))
    laws = laws._replace(
        A=np.array([CHINCHILLA.A, 1e300]), a=np.array([0.34, 0.01]), b=np.array([0.28, 0.01])
    )
    drawn = Bootstrap(laws, 0.025)
    (found,) = scaling.record(points, CHINCHILLA, drawn, [1e20])["optimum"]
    assert found["parameters"]["interval"][1] is None
    json.dumps(found, allow_nan=False)


def test_what_cannot_be_foretold_is_shown(capsys):
    points = ladder(4, 1, NOISE)
    law = scaling.fit(points)
    scaling_report.show(scaling.record(points, law, scaling.bootstrap(points, law, 20)))
    told = " ".join(capsys.readouterr().out.split())
    assert "the largest cannot be foretold: 3 points of 3 distinct sizes do not exceed" in told
    assert "all points have about 2e+09 tokens" in told


@pytest.mark.parametrize("shape, lines", [((4, 4), 4), ((4, 1), 1), ((1, 5), 1), ((3, 12), 6)])
def test_the_picture_has_a_line_for_each_number_of_tokens(tmp_path, shape, lines):
    points = ladder(*shape)
    law = scaling.fit(points)
    laws = Law(*(np.stack([0.99 * c, 1.01 * c]) for c in map(np.asarray, law)))
    figure = scaling_report.figure(points, law, Bootstrap(laws, 0.025))
    axes = figure.axes[0]
    assert len(axes.collections) == lines
    drawn = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in drawn) == len(points.loss)
    # Each curve goes through its points, where its tokens are theirs.
    if lines < 6:
        for curve, dots in zip(axes.lines[0::2], axes.lines[1::2], strict=True):
            if dots.get_linestyle() == "None":
                at = np.interp(dots.get_xdata(), curve.get_xdata(), curve.get_ydata())
                np.testing.assert_allclose(at, dots.get_ydata(), rtol=1e-3)
    figure.savefig(tmp_path / "scaling.svg")
