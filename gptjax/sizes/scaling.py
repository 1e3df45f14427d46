"""A law of scale through a ladder of sizes: loss = E + A / N^a + B / D^b.

N is a model's parameters, D the tokens it was trained on, the loss is in nats a token. The law,
its parametrisation and its Huber loss are those of Hoffmann et al. 2022 (arXiv:2203.15556,
section 3.3 and appendix D.3). Losses are summed, not averaged, and minimised to a tight
tolerance: where they were averaged, L-BFGS stopped early and far off, with intervals much too
narrow (Besiroglu et al. 2024, arXiv:2404.10102).

Everything here is a function of arrays; suffixes: P point, R replicate, K term of a law.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats

from gptjax.config import UserError
from gptjax.report.interval import CONFIDENCE, SEED

DELTA = 1e-3  # log residuals below count by their square, those above by their size
REPLICATES = 1000
TENTH = math.log(1.1)  # sizes closer than this count as one
# Bounds of the search; a constant that ends at a bound is reported as undetermined.
EXPONENT = (0.01, 3.0)
HEIGHT = (-12.0, 3.0)  # of the log of a term at the middle of the ladder, less that of the loss
GRID = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.6)  # exponents to start from
SEARCHES = 5  # from the best of the starts

# A term's size -> its two constants in the law.
TERMS = {"parameters": ("A", "a"), "tokens": ("B", "b")}
FORMULA = {"parameters": "A/N^a", "tokens": "B/D^b"}
FLOPS_PER_PARAMETER_AND_TOKEN = 6


class Points(NamedTuple):
    """The runs of a ladder, each float (P,)."""

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray  # nats/token


class Law(NamedTuple):
    """loss = E + A / N^a + B / D^b; a term that was not fitted has both constants 0.

    Of a bootstrap, each constant is an array (R,).
    """

    E: Any
    A: Any
    a: Any
    B: Any
    b: Any

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Nats a token of models with so many parameters after so many tokens."""
        return self.E + self.A / parameters**self.a + self.B / tokens**self.b

    @property
    def terms(self) -> tuple[str, ...]:
        """The rows of TERMS that were fitted."""
        return tuple(t for t, (height, _) in TERMS.items() if np.all(getattr(self, height)))


def points_from_csv(path: str | os.PathLike[str]) -> Points:
    """The points of a table with the columns parameters, tokens and loss; others are ignored.

    Raises:
        UserError: if it cannot be read, or a line's number is missing or not above 0.
    """
    path = Path(path)
    try:
        # Decoded as a whole: an error then names the byte of the file.
        with io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            missing = [name for name in Points._fields if name not in header]
            if missing:
                raise UserError(
                    f"{path} has no column {', '.join(missing)}: its first line must name "
                    f"{', '.join(Points._fields)}, it names {', '.join(header) or 'nothing'}"
                )
            rows = [
                [_number(row[name], f"{path}:{reader.line_num}: {name}") for name in Points._fields]
                for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        message = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path} as a CSV table: {message}") from None
    return Points(*np.array(rows, np.float64).reshape(-1, 3).T)


def _number(text: str | float | None, place: str) -> float:
    try:
        value = float(text or "nan")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        shown = "missing" if text in (None, "") else repr(text)
        raise UserError(f"{place} is {shown}: give a number above 0, or leave the point out")
    return value


# ---- what the points determine


def terms(points: Points) -> tuple[tuple[str, ...], str]:
    """The rows of TERMS that these points can tell apart, and why a row is left out, or "".

    Sizes within a tenth of each other count as one. Where the tokens are the same for all, or
    a power of the parameters (20 N, say), no fit can tell how much of the loss each explains.
    """
    varying = [name for name in TERMS if len(levels(getattr(points, name))) > 1]
    if not varying:
        raise UserError(
            f"all {len(points.loss)} points have about {points.parameters[0]:.4g} parameters and "
            f"{points.tokens[0]:.4g} tokens: a law of scale needs three sizes or more"
        )
    if len(varying) == 1:
        same = next(name for name in TERMS if name not in varying)
        return tuple(varying), (
            f"all points have about {getattr(points, same)[0]:.4g} {same}: E holds "
            f"{FORMULA[same]} at that size, and the law says nothing of others"
        )
    log_N, log_D = np.log(points.parameters), np.log(points.tokens)
    power, offset = np.polyfit(log_N, log_D, 1)
    if np.abs(log_D - power * log_N - offset).max() < TENTH:
        return ("parameters",), (
            f"tokens are a power of parameters, D = {math.exp(offset):.3g} N^{power:.3g}: A/N^a "
            "holds what both gain together, and the law is for such pairs alone"
        )
    return tuple(TERMS), ""


def levels(size_P: np.ndarray) -> list[float]:
    """Distinct sizes, ascending: the smallest of each that lie within a tenth."""
    smallest: list[float] = []
    for size in np.sort(size_P).tolist():
        if not smallest or math.log(size / smallest[-1]) > TENTH:
            smallest.append(size)
    return smallest


def _level(size_P: np.ndarray) -> np.ndarray:
    """Which of `levels` each size belongs to, int (P,)."""
    return np.searchsorted(levels(size_P), size_P, side="right") - 1


def _check(points: Points) -> tuple[str, ...]:
    """The terms to fit.

    Raises:
        UserError: if there are not more distinct sizes than constants, or a number is none.
    """
    if len({np.shape(column) for column in points}) != 1 or np.ndim(points.loss) != 1:
        raise UserError("points need as many parameters as tokens and losses: one of each a run")
    for number, point in enumerate(zip(*points, strict=True), 1):
        for name, value in zip(Points._fields, point, strict=True):
            _number(float(value), f"point {number}: {name}")
    if not len(points.loss):
        raise UserError("there are no points: a law of scale needs a ladder of sizes")
    fitted, _ = terms(points)
    constants = 1 + 2 * len(fitted)
    # Repeats, such as other seeds, tell of noise and not of scale.
    distinct = len({*zip(_level(points.parameters), _level(points.tokens), strict=True)})
    if distinct <= constants:
        raise UserError(
            f"{len(points.loss)} points of {distinct} distinct sizes do not exceed the "
            f"{constants} constants of the law, {', '.join(_names(fitted))}: add "
            f"{constants + 1 - distinct} more sizes"
        )
    for name in fitted:
        sizes = levels(getattr(points, name))
        if len(sizes) < 3:
            raise UserError(
                f"{name} takes only the values {', '.join(f'{s:.4g}' for s in sizes)}, too few "
                f"for {' and '.join(TERMS[name])}: give three or more, or one alone"
            )
    return fitted


def _names(fitted: Iterable[str]) -> tuple[str, ...]:
    return ("E", *itertools.chain.from_iterable(TERMS[name] for name in fitted))


# ---- the fit


def objective(
    theta: np.ndarray, x_KP: np.ndarray, y_P: np.ndarray, delta: float = DELTA
) -> tuple[float, np.ndarray]:
    """Huber's loss of the log residuals, in units of delta^2, and its gradient in theta.

    Args:
        theta: log E, then log height and exponent of each term, where its x is 0.
        x_KP: logs of each term's size, less those of the ladder's middle: this parts height
            from exponent, so that the search is short, and moves no minimum. Within the bounds
            nothing overflows, so the paper's log-sum-exp is written out.
        y_P: logs of the losses.
    """
    floor = math.exp(theta[0])
    term_KP = np.exp(theta[1::2, None] - theta[2::2, None] * x_KP)
    total_P = floor + term_KP.sum(axis=0)
    residual_P = (np.log(total_P) - y_P) / delta
    slope_P = np.clip(residual_P, -1, 1)  # of Huber's loss: r within 1, its sign beyond
    by_total_P = slope_P / (delta * total_P)
    gradient = np.empty_like(theta)
    gradient[0] = floor * by_total_P.sum()
    gradient[1::2] = term_KP @ by_total_P
    gradient[2::2] = -(term_KP * x_KP) @ by_total_P
    return float(slope_P @ (residual_P - slope_P / 2)), gradient


def _bounds(x_KP: np.ndarray, y_P: np.ndarray) -> list[tuple[float, float]]:
    height = (HEIGHT[0] + y_P.mean(), HEIGHT[1] + y_P.mean())
    return [height, *[height, EXPONENT] * len(x_KP)]


def _minimise(start: np.ndarray, x_KP: np.ndarray, y_P: np.ndarray) -> Any:
    """scipy's result.

    By SLSQP, not L-BFGS: five unknowns need no limited memory, it stopped short of the minimum
    from fewer starts, and scipy's L-BFGS wakes BLAS threads, which on a busy machine cost ten
    times the search itself.
    """
    return scipy.optimize.minimize(
        objective,
        start,
        args=(x_KP, y_P),
        jac=True,
        method="SLSQP",
        bounds=_bounds(x_KP, y_P),
        options={"ftol": 1e-10, "maxiter": 1000},
    )


def _starts(x_KP: np.ndarray, y_P: np.ndarray) -> list[np.ndarray]:
    """A start for each tuple of exponents, best first.

    With exponents given the law is linear in E, A and B, so these are not searched on a grid of
    their own, as Hoffmann et al. do, but set to their non-negative least squares.
    """
    starts = []
    for exponents in itertools.product(GRID, repeat=len(x_KP)):
        basis = np.vstack([np.zeros_like(y_P), -np.array(exponents)[:, None] * x_KP])
        heights, _ = scipy.optimize.nnls(np.exp(basis - y_P).T, np.ones_like(y_P))
        start = np.empty(1 + 2 * len(x_KP))
        start[[0, *range(1, len(start), 2)]] = np.log(np.maximum(heights, 1e-3))
        start[2::2] = exponents
        starts.append(start)
    return sorted(starts, key=lambda start: objective(start, x_KP, y_P)[0])


def _logs(points: Points, fitted: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Logs of each fitted term's size less their mean, (K, P), and those means, (K, 1)."""
    logs_KP = np.log(np.stack([getattr(points, name) for name in fitted]))
    middle_K1 = logs_KP.mean(axis=1, keepdims=True)
    return logs_KP - middle_K1, middle_K1


def _law(theta_R: np.ndarray, fitted: Sequence[str], middle_K1: np.ndarray) -> Law:
    constants = dict.fromkeys(Law._fields, np.zeros(len(theta_R)))
    constants["E"] = np.exp(theta_R[:, 0])
    for k, name in enumerate(fitted):
        height, exponent = TERMS[name]
        constants[exponent] = theta_R[:, 2 + 2 * k]
        constants[height] = np.exp(theta_R[:, 1 + 2 * k] + constants[exponent] * middle_K1[k])
    return Law(**constants)


def _theta(law: Law, middle_K1: np.ndarray) -> np.ndarray:
    """The unknowns of the search that stand for a law: the inverse of `_law`."""
    theta = [math.log(law.E)]
    for name, middle in zip(law.terms, middle_K1.ravel().tolist(), strict=True):
        height, exponent = (getattr(law, constant) for constant in TERMS[name])
        theta += [math.log(height) - exponent * middle, exponent]
    return np.array(theta)


def fit(points: Points) -> Law:
    """The law with the least Huber loss; a term that cannot be told apart is left out (`terms`).

    Raises:
        UserError: if the points do not exceed the constants, or are no sizes and losses.
    """
    fitted = _check(points)
    x_KP, middle_K1 = _logs(points, fitted)
    y_P = np.log(points.loss)
    searches = [_minimise(start, x_KP, y_P) for start in _starts(x_KP, y_P)[:SEARCHES]]
    theta = min(searches, key=lambda search: search.fun).x
    return Law(*(float(c[0]) for c in _law(theta[None], fitted, middle_K1)))


class Bootstrap(NamedTuple):
    """What `bootstrap` returns."""

    laws: Law  # each constant (R,)
    tail: float  # the share of replicates beyond each end of an interval

    def interval(self, values_R: np.ndarray) -> tuple[Any, Any]:
        """The ends of a 95% interval of replicates, the first axis; further axes stay.

        Both are values of replicates, with nothing between: one may be infinite.
        """
        ends = [self.tail, 1 - self.tail]
        low, high = np.quantile(values_R, ends, axis=0, method="nearest")
        return low, high


def bootstrap(
    points: Points, law: Law, replicates: int = REPLICATES, seed: int = SEED
) -> Bootstrap:
    """Laws of points drawn with replacement, and so 95% intervals of all that follows from them.

    The tails are those of the expanded percentile interval (Hesterberg 2015, arXiv:1411.5279),
    which makes up for few degrees of freedom: Student's t in place of the normal quantile. Share
    of 100 simulated ladders whose interval held the truth, over the constants and the loss of a
    larger model, and the same of the percentile's tails; noise is that of log losses:

        sizes           noise    these     percentile
        3 x 3           0.002    93-94%    88-90%
        4 x 4           0.0005   94-97%    91-95%
        5 x 6           0.002    94-95%    92-94%
        5 x 6           0.0005   89-95%    87-91%
        5, one term     0.002    94-96%    93-96%
        7, one term     0.002    97-100%   96-98%

    A replicate that lost too many sizes to determine a law stays, at whatever law the search
    ends: where these were drawn again, the intervals of five sizes held the truth in 73 to 77%.
    Nor are residuals drawn, of which Huber's loss leaves too many near 0: on 5 x 6 the
    intervals of A and a held the truth in 31 of 40 ladders.
    """
    x_KP, middle_K1 = _logs(points, law.terms)
    y_P = np.log(points.loss)
    drawn_RP = np.random.default_rng(seed).integers(len(y_P), size=(replicates, len(y_P)))
    start = _theta(law, middle_K1)
    theta_R = np.stack([_minimise(start, x_KP[:, p], y_P[p]).x for p in drawn_RP])
    freedom = len(y_P) - len(start)
    tail = scipy.stats.norm.cdf(scipy.stats.t.ppf((1 - CONFIDENCE) / 2, freedom))
    return Bootstrap(_law(theta_R, law.terms, middle_K1), float(tail))


# ---- what follows from it


def optimum(law: Law, flops: float) -> tuple[Any, Any, Any]:
    """Parameters and tokens with the least loss of all that cost `flops`, and that loss.

    With C = 6 N D, N = G (C/6)^(b/(a+b)) and D = (C/6)^(a/(a+b)) / G, where
    G = (a A / (b B))^(1/(a+b)) (Hoffmann et al. 2022, equation 4).

    Raises:
        UserError: if the law lacks a term, and so cannot weigh one size against the other, or
            `flops` is not above 0.
    """
    if not (math.isfinite(flops) and flops > 0):
        raise UserError(f"a budget of {flops} FLOPs: give a number above 0, such as 1e18")
    if len(law.terms) < len(TERMS):
        raise UserError(
            "a budget is shared out only by a law of both sizes: add points whose tokens vary "
            "at the same parameters, and whose parameters vary at the same tokens"
        )
    exponent_sum = law.a + law.b
    log_G = (np.log(law.a) + np.log(law.A) - np.log(law.b) - np.log(law.B)) / exponent_sum
    log_cost = math.log(flops / FLOPS_PER_PARAMETER_AND_TOKEN)
    # The optimum of a replicate may overflow.
    with np.errstate(over="ignore", divide="ignore"):
        parameters = np.exp(log_G + law.b / exponent_sum * log_cost)
        tokens = np.exp(law.a / exponent_sum * log_cost - log_G)
        return parameters, tokens, law.loss(parameters, tokens)


def leave_largest_out(points: Points) -> dict[str, Any]:
    """How well the smaller sizes foretell the largest, whose points are left out of the fit.

    The largest is that of the most parameters (of the most tokens, in a law of tokens alone),
    with all its points. `error` is the loss measured less the loss foretold, in nats;
    `relative` is the same as a share of the loss.

    Raises:
        UserError: if what is left does not determine the law.
    """
    size_P = getattr(points, _check(points)[0])
    out_P = _level(size_P) == _level(size_P).max()
    law = fit(Points(*(column[~out_P] for column in points)))
    if law.terms != _check(points):
        raise UserError(f"without the largest, only {', '.join(law.terms)} would vary")
    left_out = Points(*(column[out_P] for column in points))
    foretold = law.loss(left_out.parameters, left_out.tokens)
    error = left_out.loss - foretold
    return {
        "law": law._asdict(),
        "points": [
            dict(zip((*Points._fields, "foretold", "error", "relative"), row, strict=True))
            for row in np.stack([*left_out, foretold, error, error / left_out.loss], 1).tolist()
        ],
        "mean_error": float(error.mean()),
        "rms_error": float(np.sqrt((error**2).mean())),
        "rms_relative": float(np.sqrt(((error / left_out.loss) ** 2).mean())),
    }


# ---- the record


def undetermined(points: Points, law: Law) -> list[str]:
    """The constants that ended at a bound of the search."""
    x_KP, middle_K1 = _logs(points, law.terms)
    ends = _bounds(x_KP, np.log(points.loss))
    return [
        name
        for name, value, end in zip(_names(law.terms), _theta(law, middle_K1), ends, strict=True)
        if np.isclose(value, end, rtol=0, atol=1e-6).any()
    ]


def record(
    points: Points, law: Law, resampled: Bootstrap, budgets: Sequence[float] = ()
) -> dict[str, Any]:
    """The law, its intervals and its checks, as JSON; None stands for a number that is not finite.

    Args:
        law: what `fit` returns.
        resampled: what `bootstrap` returns.
        budgets: in FLOPs, each to be shared out by `optimum`.
    """
    foretold_P = law.loss(points.parameters, points.tokens)
    error_P = points.loss - foretold_P
    _, note = terms(points)
    loose = undetermined(points, law)
    notes = [note] if note else []
    if loose:
        notes.append(
            f"{', '.join(loose)} ended where the search does: these points do not determine "
            f"{'it' if len(loose) == 1 else 'them'}; add sizes further apart"
        )
    try:
        held_out = leave_largest_out(points)
    except UserError as error:
        held_out = {"refused": str(error)}
    return {
        "law": " + ".join(["E", *(FORMULA[name] for name in law.terms)]),
        "constants": {
            name: _with_interval(getattr(law, name), getattr(resampled.laws, name), resampled)
            for name in _names(law.terms)
        },
        "interval_by": f"95% interval by {len(resampled.laws.E):,} bootstrap replicates of the points",
        "rms_error": float(np.sqrt((error_P**2).mean())),
        "largest_error": float(np.abs(error_P).max()),
        "notes": notes,
        "points": [
            dict(zip((*Points._fields, "foretold", "error"), row, strict=True))
            for row in np.stack([*points, foretold_P, error_P], axis=1).tolist()
        ],
        "largest_left_out": held_out,
        "optimum": [_optimum_record(points, law, resampled, flops) for flops in budgets],
    }


def _optimum_record(points: Points, law: Law, resampled: Bootstrap, flops: float) -> dict[str, Any]:
    fitted, resampled_optima = optimum(law, flops), optimum(resampled.laws, flops)
    beyond = max(fitted[0] / points.parameters.max(), fitted[1] / points.tokens.max())
    named = zip(Points._fields, fitted, resampled_optima, strict=True)
    return {
        "flops": flops,
        **{name: _with_interval(value, values_R, resampled) for name, value, values_R in named},
        "beyond": float(beyond),  # times the largest size that was run, above 1: a guess
    }


def _with_interval(value: float, values_R: np.ndarray, resampled: Bootstrap) -> dict[str, Any]:
    figures = [float(v) if np.isfinite(v) else None for v in (value, *resampled.interval(values_R))]
    return {"value": figures[0], "interval": figures[1:]}
