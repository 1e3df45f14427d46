"""What the results of a study say: verdicts, effects in steps, costs, and who is on the front."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax import accounting, configure
from gptjax.config import Config
from gptjax.records import read_environment
from gptjax.storage import Place
from gptjax.study import equalise, statistics
from gptjax.study.results import ENDED, Outcome, Results, Status, at_edge
from gptjax.study.spec import Settings, Study

STATUSES: tuple[Status, ...] = ("finished", "diverged", "failed", "started", "missing")
# Verdicts beside those of `statistics`.
DIVERGED, BASELINE_DIVERGED = "diverged", "baseline diverged"


class Reach(NamedTuple):
    """An effect in steps: `curve`, "baseline" or "arm", is at the other's final loss at `step`."""

    curve: str
    step: float
    steps: int  # of the whole run that `step` lies in


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run of an arm costs; NaN if unknown. The measured ones are medians over its seeds.

    Attributes:
        flops_per_token, flops: of training, model FLOPs, causal; of the whole run.
        tokens_per_second: while training, evaluation and compilation left out.
        program_bytes: memory of the compiled step on a device.
    """

    parameters: float
    flops_per_token: float
    tokens: float
    flops: float
    tokens_per_second: float
    compile_seconds: float
    program_bytes: float

    @property
    def seconds(self) -> float:
        """Of training: tokens / tokens_per_second."""
        return self.tokens / self.tokens_per_second

    def over(self, other: Cost) -> Cost:
        """Each cost divided by another's."""
        costs, other_costs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Cost(*(a / b if b else math.nan for a, b in zip(costs, other_costs, strict=True)))


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm at a scale.

    Attributes:
        counts: of its runs by status; all five are present and add up to the study's seeds.
        mean, sd: of the metric over the runs that finished (ddof 1); NaN where there is none.
        difference: mean of arm less baseline over the pairs that both finished.
        comparison: to the baseline; None for the baseline itself. Where runs diverged, it was
            made without pairs: those that survive are chosen by their outcome, and no test of
            them means anything.
        verdict: what statistics.Comparison says, or "diverged", or "baseline diverged"; "" for
            the baseline.
        words: the verdict for a reader.
        preliminary: runs that it needs have not ended.
        reach: the effect in steps; None where it cannot be read off.
        pairing: variance of paired differences over that of unpaired ones.
        tuned, edge: the values that tuning chose, and which of them were at the edge of it.
        solved: knobs that were solved for, to hold the budget equal; tuned ones left out.
        differs: knob -> (baseline's, arm's).
        on_front: no other arm or scale has a lower loss at no more FLOPs; the same for seconds.
    """

    scale: str
    arm: str
    counts: Mapping[str, int]
    mean: float
    sd: float
    difference: float
    comparison: statistics.Comparison | None
    verdict: str
    words: str
    preliminary: bool
    reach: Reach | None
    pairing: float
    tuned: Settings
    edge: Sequence[str]
    solved: Settings
    differs: Mapping[str, tuple[Any, Any]]
    cost: Cost
    on_front: Mapping[str, bool]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Everything a report shows.

    Attributes:
        rows: scales in the study's order, in each the baseline and then the arms.
        changes: arm -> what becomes of its gain from the first scale to the last, where there are
            several and no run of it, or of the baseline there, diverged.
    """

    results: Results
    rows: list[Row]
    changes: Mapping[str, statistics.Change]

    @property
    def study(self) -> Study:
        return self.results.study

    @property
    def ends(self) -> tuple[str, str]:
        """The first and last scale."""
        return _ends(self.study)

    def row(self, scale: str, arm: str) -> Row:
        return next(r for r in self.rows if (r.scale, r.arm) == (scale, arm))

    def outcomes(self, scale: str, arm: str) -> list[Outcome]:
        return _of(self.results, scale, arm)


def analyse(results: Results) -> Analysis:
    """Every arm at every scale against the baseline of that scale.

    Holm's correction is over all arms at all scales, those that are not ready included.
    """
    study = results.study
    places = [(scale, arm) for scale in study.scales for arm in study.all_arms]
    difference = {place: _difference(results, *place) for place in places}
    broken = {
        (scale, arm): any(_divergence(results, scale, name) for name in (arm, study.baseline))
        for scale, arm in places
    }
    compared = statistics.compare(
        {
            place: difference[place][:0] if broken[place] else difference[place]
            for place in places
            if place[1] != study.baseline
        },
        study.smallest,
    )
    rows = [_row(results, *place, compared.get(place)) for place in places]
    changes = {}
    first, last = _ends(study)
    for arm in study.arms if len(study.scales) > 1 else ():
        if not (broken[first, arm] or broken[last, arm]):
            pair = difference[first, arm], difference[last, arm]
            changes[arm] = statistics.change_of_gain(*pair, study.smallest)
    return Analysis(results, _with_fronts(rows), changes)


def _ends(study: Study) -> tuple[str, str]:
    scales = list(study.scales)
    return scales[0], scales[-1]


def _row(results: Results, scale: str, arm: str, comparison: statistics.Comparison | None) -> Row:
    study = results.study
    outcomes = _of(results, scale, arm)
    config, base = _configs(results, scale, arm)
    tuned = results.tuned.get((scale, arm), {})
    solved = outcomes[0].cell.solved if outcomes else {}
    metrics = np.array([o.metric for o in outcomes if o.status == "finished"])
    verdict, words, preliminary = _verdict(results, scale, arm, comparison)
    mine_S, base_S = (np.array([o.metric for o in runs]) for runs in _pairs(results, scale, arm))
    readable = comparison is not None and not verdict.endswith("diverged")
    return Row(
        scale,
        arm,
        _counts(results, scale, arm),
        float(metrics.mean()) if len(metrics) else math.nan,
        float(metrics.std(ddof=1)) if len(metrics) > 1 else math.nan,
        float(np.mean(mine_S - base_S)) if len(mine_S) else math.nan,
        comparison,
        verdict,
        words,
        preliminary,
        _reach(results, scale, arm) if readable else None,
        statistics.pairing(mine_S, base_S) if readable else math.nan,
        tuned,
        at_edge(study, tuned),
        {knob: value for knob, value in solved.items() if knob not in tuned},
        configure.difference(base, config),
        _cost(config, outcomes),
        {},
    )


def _verdict(
    results: Results, scale: str, arm: str, comparison: statistics.Comparison | None
) -> tuple[str, str, bool]:
    """(verdict, its words, whether it may still change for want of runs)."""
    study = results.study
    preliminary = not all(_ended(results, scale, name) for name in (arm, study.baseline))
    of_arm, base = (_divergence(results, scale, name) for name in (arm, study.baseline))
    if comparison is None:
        return "", of_arm, preliminary
    if of_arm:
        verdict, words = DIVERGED, of_arm + (f"; the baseline {base}" if base else "")
    elif base:
        finished = _counts(results, scale, arm)["finished"]
        verdict = BASELINE_DIVERGED
        words = f"finished {finished} of {study.seeds}; the baseline {base}"
    else:
        verdict = comparison.verdict
        # How many more seeds it takes is estimated only once all planned runs have ended.
        undecided = preliminary and verdict == statistics.UNDECIDED
        words = verdict if undecided else comparison.words
    if preliminary:
        pairs = len(_pairs(results, scale, arm)[0])
        words = f"preliminary, {pairs} of {study.seeds} pairs: {words}"
    return verdict, words, preliminary


def _divergence(results: Results, scale: str, arm: str) -> str:
    """How often an arm diverged, in words; "" where it did not."""
    if _untunable(results, scale, arm):
        return "diverged at every value that was tried"
    diverged = _counts(results, scale, arm)["diverged"]
    return f"diverged {diverged} of {results.study.seeds}" if diverged else ""


def _ended(results: Results, scale: str, arm: str) -> bool:
    """Whether no further run can come."""
    counts = _counts(results, scale, arm)
    ended = counts["finished"] + counts["diverged"] == results.study.seeds
    return ended or _untunable(results, scale, arm)


def _untunable(results: Results, scale: str, arm: str) -> bool:
    """Whether all tuning runs have ended and yet no value can be chosen."""
    tuning = [o.status for o, _ in results.tuning if (o.cell.scale, o.cell.arm) == (scale, arm)]
    ended = bool(tuning) and all(status in ENDED for status in tuning)
    return ended and (scale, arm) not in results.tuned


def _difference(results: Results, scale: str, arm: str) -> np.ndarray:
    of_arm, base = _pairs(results, scale, arm)
    return np.array([a.metric - b.metric for a, b in zip(of_arm, base, strict=True)], np.float64)


def _of(results: Results, scale: str, arm: str) -> list[Outcome]:
    return [o for o in results.outcomes if (o.cell.scale, o.cell.arm) == (scale, arm)]


def _counts(results: Results, scale: str, arm: str) -> dict[str, int]:
    """Runs by status; those of an arm whose tuning is not done are missing."""
    statuses: list[str] = [o.status for o in _of(results, scale, arm)]
    statuses += ["missing"] * (results.study.seeds - len(statuses))
    return {status: statuses.count(status) for status in STATUSES}


def _configs(results: Results, scale: str, arm: str) -> tuple[Config, Config]:
    """An arm's config and the baseline's at their first seed.

    Those of their first tuning runs where one of the two is not tuned yet: they try the same.
    """
    pair = arm, results.study.baseline
    tuned = all(_of(results, scale, name) for name in pair)
    outcomes = results.outcomes if tuned else [o for o, _ in results.tuning]
    first = {(o.cell.scale, o.cell.arm): o.cell.config for o in reversed(outcomes)}
    return first[scale, pair[0]], first[scale, pair[1]]


def _pairs(results: Results, scale: str, arm: str) -> tuple[list[Outcome], list[Outcome]]:
    """The runs of an arm, and of the baseline, of the seeds that both finished."""
    of_arm, base = (
        {o.cell.seed: o for o in _of(results, scale, name) if o.status == "finished"}
        for name in (arm, results.study.baseline)
    )
    seeds = [seed for seed in of_arm if seed in base]
    return [of_arm[seed] for seed in seeds], [base[seed] for seed in seeds]


def curves(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """(steps (E,), metric (S, E)) of several runs where all of them were evaluated."""
    if not outcomes:
        return np.zeros(0, np.int64), np.zeros((0, 0))
    steps_E = functools.reduce(np.intersect1d, [o.curve[0] for o in outcomes])
    return steps_E, np.stack([o.curve[1][np.isin(o.curve[0], steps_E)] for o in outcomes])


def difference_curves(results: Results, scale: str, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps (E,), arm less baseline (S, E)) of the pairs that both finished."""
    of_arm, base = _pairs(results, scale, arm)
    steps_E, metric_SE = curves([*of_arm, *base])
    return steps_E, metric_SE[: len(of_arm)] - metric_SE[len(of_arm) :]


def _reach(results: Results, scale: str, arm: str) -> Reach | None:
    of_arm, base = _pairs(results, scale, arm)
    if not of_arm:
        return None
    (arm_steps, arm_E), (base_steps, base_E) = (
        (steps, metric_SE.mean(0)) for steps, metric_SE in (curves(of_arm), curves(base))
    )
    if arm_E[-1] < base_E[-1]:
        step = crossing(arm_steps, arm_E, base_E[-1])
        return None if step is None else Reach("arm", step, int(arm_steps[-1]))
    step = crossing(base_steps, base_E, arm_E[-1])
    return None if step is None else Reach("baseline", step, int(base_steps[-1]))


def crossing(steps_E: np.ndarray, loss_E: np.ndarray, level: float) -> float | None:
    """The first step at which a curve is down at `level`, linear between its points.

    None where it never is, or is from its first point on: then it was there before.
    """
    below_E = loss_E <= level
    if not below_E.any() or (below_E[0] and loss_E[0] < level):
        return None
    i = int(np.argmax(below_E))
    if i == 0:
        return float(steps_E[0])
    return float(np.interp(level, loss_E[[i, i - 1]], steps_E[[i, i - 1]]))


def _cost(config: Config, outcomes: Sequence[Outcome]) -> Cost:
    def median(name: str) -> float:
        values = [value for o in outcomes if not math.isnan(value := getattr(o, name))]
        return float(np.median(values)) if values else math.nan

    try:
        flops_per_token = accounting.train_flops_per_token(config, causal=True)
        flops = equalise.flops(config)
    except accounting.Uncountable:
        flops_per_token = flops = math.nan
    return Cost(
        equalise.parameters(config),
        flops_per_token,
        equalise.tokens(config),
        flops,
        median("tokens_per_second"),
        median("compile_seconds"),
        median("program_bytes"),
    )


def _with_fronts(rows: Sequence[Row]) -> list[Row]:
    """Rows with `on_front` filled in; an arm that diverged is on no front."""
    loss = [math.nan if r.counts["diverged"] else r.mean for r in rows]
    fronts = {
        name: front([getattr(r.cost, name) for r in rows], loss) for name in ("flops", "seconds")
    }
    return [
        dataclasses.replace(r, on_front={name: on[i] for name, on in fronts.items()})
        for i, r in enumerate(rows)
    ]


def front(cost_N: Sequence[float], loss_N: Sequence[float]) -> list[bool]:
    """The Pareto front: points for which no other has at most the cost and loss, and less of one.

    A point with an unknown coordinate is never on it, and beats none.
    """
    c_N, l_N = np.asarray(cost_N, float), np.asarray(loss_N, float)
    no_worse = (c_N[:, None] <= c_N) & (l_N[:, None] <= l_N)
    beaten_N = (no_worse & ((c_N[:, None] < c_N) | (l_N[:, None] < l_N))).any(0)
    return (~beaten_N & np.isfinite(c_N) & np.isfinite(l_N)).tolist()


def environment(results: Results) -> dict[str, list[str]]:
    """Hardware, code and data of the runs: name -> its values, one where all runs agree."""
    values_of: dict[str, dict[str, None]] = {}  # dicts for the order
    for folder in _folders(results):
        for start in read_environment(folder):
            facts = {
                "code": start["code"],
                **{f"version of {name}": value for name, value in start["versions"].items()},
                "python": start["python"],
                "platform": start["platform"],
                "cpu": start["cpu"],
                "devices": ", ".join(f"{n} x {kind}" for kind, n in start["devices"].items()),
                **{f"data {name}": value for name, value in start["fingerprints"].items()},
                "XLA flags": start["xla_flags"],
            }
            git = start["git"]
            if git:
                facts["git revision"] = git["revision"] + (", changed" if git["dirty"] else "")
            for name, value in facts.items():
                if value:
                    values_of.setdefault(name, {})[value] = None
    return {name: list(values) for name, values in values_of.items()}


def _folders(results: Results) -> list[Place]:
    return [o.folder for o in [*results.outcomes, *(o for o, _ in results.tuning)]]
