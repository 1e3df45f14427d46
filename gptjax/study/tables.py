"""What a study's report says: its tables, and the sentences round them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gptjax.report.formats import Table, below, csv_of, terminal
from gptjax.report.interval import Interval
from gptjax.report.terminal import MISSING, new_console, number
from gptjax.study import statistics
from gptjax.study.analysis import Analysis, Row
from gptjax.study.equalise import EQUAL, parameters, tokens
from gptjax.study.results import Outcome
from gptjax.study.spec import Settings, Study, cross

TIMES = "×"
TESTED = (statistics.BETTER, statistics.WORSE, statistics.SAME, statistics.UNDECIDED)


def verdicts(a: Analysis) -> Table:
    """The table that answers the question."""
    study = a.study
    headings = (
        *_place(study),
        "verdict",
        f"difference\n{study.unit}, 95%",
        "p\nby Holm",
        "in steps",
        f"{study.unit}\n± sd",
        "runs",
        "FLOPs",
    )
    rows = [
        (
            *_named(study, r.scale, r.arm),
            _words(r),
            MISSING if r.comparison is None else _signed(r.difference) + below(_interval(r)),
            _p(r),
            reach(r),
            value(r.mean) + below("" if math.isnan(r.sd) else f"± {value(r.sd)}"),
            runs(study, r),
            _share(r.cost.over(a.row(r.scale, study.baseline).cost).flops),
        )
        for r in a.rows
    ]
    return Table(headings, rows, {*_place(study), "verdict"})


def changes(a: Analysis) -> Table:
    """What becomes of each arm's gain from the smallest to the largest scale."""
    first, last = a.ends
    rows = []
    for arm in a.study.arms:
        change = a.changes.get(arm)
        if change is None:
            rows.append((arm, "cannot be told: runs diverged", *[MISSING] * 3))
            continue
        early = any(a.row(scale, arm).preliminary for scale in (first, last))
        rows.append(
            (
                arm,
                ("preliminary: " if early else "") + change.verdict,
                _signed(change.gain_small),
                _signed(change.gain_large),
                _signed(change.change) + below(interval(change.interval)),
            )
        )
    gains = (f"gain\n{first}", f"gain\n{last}", f"change\n{a.study.unit}, 95%")
    return Table(("arm", "the gain", *gains), rows, {"arm", "the gain"})


def costs(a: Analysis) -> Table:
    """What each arm costs, and how that compares to the baseline."""
    headings = (
        *_place(a.study),
        "parameters",
        "FLOPs/token",
        "FLOPs",
        "tokens/s",
        "training\ns",
        "compilation\ns",
        "program\nMB",
        "front",
    )
    rows = []
    for r in a.rows:
        c, over = r.cost, r.cost.over(a.row(r.scale, a.study.baseline).cost)
        figures = (
            (f"{c.parameters:,.0f}", over.parameters),
            (f"{c.flops_per_token:.3e}", over.flops_per_token),
            (f"{c.flops:.3e}", over.flops),
            (f"{c.tokens_per_second:,.0f}", over.tokens_per_second),
            (f"{c.seconds:,.1f}", over.seconds),
            (f"{c.compile_seconds:,.1f}", over.compile_seconds),
            (f"{c.program_bytes / 1e6:,.1f}", over.program_bytes),
        )
        cells = [
            MISSING if text == "nan" else text + below(_times(r, a.study, share))
            for text, share in figures
        ]
        fronts = {"flops": "FLOPs", "seconds": "time"}
        on = ", ".join(word for name, word in fronts.items() if r.on_front[name])
        rows.append((*_named(a.study, r.scale, r.arm), *cells, on or MISSING))
    return Table(headings, rows, {*_place(a.study), "front"})


def tuning(a: Analysis) -> Table:
    """What was tried for each arm before the runs that decide, and what came of it."""
    study = a.study
    rows = []
    for r in a.rows:
        place = r.scale, r.arm
        for values in cross(study.tune).values():
            outcomes = [
                o
                for o, v in a.results.tuning
                if (o.cell.scale, o.cell.arm) == place and v == values
            ]
            metrics = [o.metric for o in outcomes if o.status == "finished"]
            unended = [o.status for o in outcomes if o.status != "finished"]
            note = ""
            if values == r.tuned:
                note = "chosen, at the edge of " + ", ".join(r.edge) if r.edge else "chosen"
            rows.append(
                (
                    *_named(study, *place),
                    settings(values),
                    value(float(np.mean(metrics)) if metrics else math.nan),
                    ", ".join([f"{len(metrics)} of {len(outcomes)}", *unended]),
                    note,
                )
            )
    headings = (*_place(study), "values", study.unit, "runs", "")
    return Table(headings, rows, {*_place(study), "values", "runs", ""})


def differences(a: Analysis) -> Table:
    """The knobs in which each arm's resolved config differs from the baseline's."""
    rows = [
        (
            *_named(a.study, r.scale, r.arm),
            knob,
            str(base),
            str(arm),
            "solved for" if knob in r.solved else "tuned" if knob in r.tuned else "",
        )
        for r in a.rows
        for knob, (base, arm) in r.differs.items()
    ]
    headings = (*_place(a.study), "knob", a.study.baseline, "arm's", "")
    return Table(headings, rows, headings)


def unfinished(a: Analysis) -> Table:
    """Every run that did not finish, but those that have not begun."""
    outcomes = [*a.results.outcomes, *(o for o, _ in a.results.tuning)]
    rows = [
        (o.cell.label, o.status, o.reason or MISSING, o.folder.name)
        for o in outcomes
        if o.status in ("diverged", "failed", "started")
    ]
    headings = ("run", "status", "reason", "folder")
    return Table(headings, rows, headings)


def stated(study: Study) -> list[str]:
    """What was decided before the runs, in sentences."""
    sentences = [
        f"Metric: {study.metric} in {study.unit}, the mean over the same held-out tokens at the "
        "end of training; lower is better",
        f"Held equal: {EQUAL[study.equal].description}",
        f"{study.seeds} seed{'s' * (study.seeds > 1)} an arm; the smallest difference that matters is {study.smallest:g} "
        f"{study.unit}",
    ]
    if study.tune:
        tried = "; ".join(
            f"{knob} of {', '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)}"
            for knob, values in study.tune.items()
        )
        sentences.append(
            f"Each arm, the baseline too, runs at what did best for it in {study.tuning_seeds} "
            f"run{'s' * (study.tuning_seeds > 1)} of other seeds: {tried}"
        )
    return sentences


def warnings(a: Analysis) -> list[str]:
    """What a reader of the verdicts must know about these results."""
    sentences = []
    if any(r.preliminary for r in a.rows):
        counts = sum(r.counts["finished"] + r.counts["diverged"] for r in a.rows)
        sentences.append(
            f"Preliminary: {counts} of {len(a.rows) * a.study.seeds} runs have ended. A verdict "
            "holds at its stated error rate only when all runs that were planned have"
        )
    for r in a.rows:
        place = ", ".join(filter(None, (r.scale, r.arm)))
        if r.edge:
            sentences.append(
                f"{place}: the best {_and(f'{k} ({r.tuned[k]})' for k in r.edge)} lies at the edge "
                "of what was tried, so it may do better beyond; try more values"
            )
        if r.counts["diverged"]:
            sentences.append(
                f"{place}: {r.counts['diverged']} of {a.study.seeds} runs diverged. The other "
                "runs' loss and difference are shown, and not tested: they are chosen by how "
                "they ended"
            )
    return sentences


def method(a: Analysis) -> list[str]:
    """How the figures were made."""
    study = a.study
    comparisons = len(study.arms) * len(study.scales)
    ratios = [r.pairing for r in a.rows if not math.isnan(r.pairing)]
    sentences = [
        "Differences are arm less baseline in pairs of equal seed, which see the same batches in "
        "the same order and begin with the same values of the parameters that they share. Below 0 "
        "the arm is better. Intervals are Student's, 95%, each arm's own",
        f"Better and worse: p <= {statistics.ALPHA} by Holm's correction over the {comparisons} "
        f"comparison{'s' * (comparisons > 1)} of the study, so that the chance of any false one is "
        f"at most 5%. No difference larger than {study.smallest:g}: two one-sided t tests, "
        "corrected likewise, at most 5% as well. Under "
        f"{statistics.FEWEST_SEEDS} seeds nothing is claimed",
        "A second interval, by the expanded percentile bootstrap over seeds, which assumes no "
        "normal noise, is drawn thin in the forest plot and listed in verdicts.csv",
        "In steps: where an arm is worse, the step at which the baseline's mean held-out curve is "
        "down at the arm's final loss; where it is better, the step at which the arm's curve is "
        "down at the baseline's. Points in mid-run stand before the learning rate's decay, so "
        "this is an approximation that makes effects look small in steps",
    ]
    if reseeded := [arm for arm, differs in study.arms.items() if "seed" in differs]:
        sentences.append(
            f"{_and(reseeded)} set the seed, so that their pairs have nothing in common"
        )
    if ratios:
        sentences.append(
            "Variance of paired differences over that of unpaired ones: "
            f"{_span(ratios)} (below 1 pairing helps)"
        )
    sentences.append(
        "FLOPs are those of the model's matrix products in training, causal, without "
        "recomputation. tokens/s is the median over a run's logged steps and then over seeds, "
        "which depends on what else the machine did; training time is tokens divided by it, "
        "without compilation and evaluation. A compilation cache makes compilation short. Front: no "
        "arm has a lower loss at no more FLOPs, or in no more time"
    )
    if a.changes:
        sentences.append(
            "From scale to scale: Welch's t interval of the change of gain, 95% for each arm by "
            f"itself. It holds where the change is shown to be smaller than {study.smallest:g}"
        )
    return sentences


def summary(a: Analysis) -> str:
    """The verdicts counted: "1 better, 2 worse, 1 undecided of 4 comparisons"."""
    verdicts_ = [r.verdict for r in a.rows if r.comparison is not None]
    counts = ", ".join(f"{verdicts_.count(v)} {v}" for v in dict.fromkeys(verdicts_))
    early = "preliminary: " if any(r.preliminary for r in a.rows) else ""
    return f"{early}{counts} of {len(verdicts_)} comparison{'s' * (len(verdicts_) > 1)}"


def show(a: Analysis) -> None:
    """Prints the verdicts in the terminal."""
    console = new_console()
    for line in (f"{a.study.name}: {a.study.hypothesis}", *stated(a.study)):
        console.print(line)
    tables = [verdicts(a)]
    if a.changes:
        tables.append(changes(a))
    for table in tables:
        console.print(terminal(table))
    for line in (*warnings(a), summary(a)):
        console.print(line)


def verdicts_csv(a: Analysis) -> str:
    """One row for each arm and scale, figures in full."""
    return csv_of([_verdict_record(a, r) for r in a.rows])


def _verdict_record(a: Analysis, r: Row) -> dict[str, Any]:
    study, c = a.study, r.comparison
    reached = r.reach or (None, None, None)
    t, bootstrap = (c.interval, c.bootstrap) if c else (Interval(math.nan, math.nan),) * 2
    return {
        "study": study.name,
        "scale": r.scale,
        "arm": r.arm,
        "metric": study.metric,
        "unit": study.unit,
        **r.counts,
        "mean": r.mean,
        "sd": r.sd,
        "pairs": c.seeds if c else None,
        "difference": r.difference,
        "difference_sd": c.sd if c else None,
        "low": t.low,
        "high": t.high,
        "bootstrap_low": bootstrap.low,
        "bootstrap_high": bootstrap.high,
        "p": c.p if c else None,
        "p_holm": c.p_holm if c else None,
        "p_same": c.p_same if c else None,
        "p_same_holm": c.p_same_holm if c else None,
        "verdict": r.verdict,
        "words": r.words,
        "more_seeds": c.more_seeds if c else None,
        "preliminary": r.preliminary,
        **dict(zip(("curve", "reaches_at_step", "of_steps"), reached, strict=True)),
        "variance_ratio": r.pairing,
        "tuned": settings(r.tuned),
        "at_edge": " ".join(r.edge),
        "solved": settings(r.solved),
        "parameters": r.cost.parameters,
        "flops_per_token": r.cost.flops_per_token,
        "tokens": r.cost.tokens,
        "flops": r.cost.flops,
        "tokens_per_second": r.cost.tokens_per_second,
        "seconds": r.cost.seconds,
        "compile_seconds": r.cost.compile_seconds,
        "program_bytes": r.cost.program_bytes,
        **{f"on_front_of_{name}": on for name, on in r.on_front.items()},
    }


def cells_csv(a: Analysis) -> str:
    """One row for each run, those that tuned at the end."""
    decide = [_cell_record(a.study, o, {}) for o in a.results.outcomes]
    return csv_of([*decide, *(_cell_record(a.study, o, v) for o, v in a.results.tuning)])


def _cell_record(study: Study, o: Outcome, tunes: Settings) -> dict[str, Any]:
    return {
        "study": study.name,
        "scale": o.cell.scale,
        "arm": o.cell.arm,
        "seed": o.cell.config.seed,
        "tunes": settings(tunes),
        "status": o.status,
        "reason": o.reason,
        "metric": study.metric,
        "value": o.metric,
        "steps": o.cell.config.train.steps,
        "tokens": tokens(o.cell.config),
        "parameters": parameters(o.cell.config),
        "tokens_per_second": o.tokens_per_second,
        "compile_seconds": o.compile_seconds,
        "program_bytes": o.program_bytes,
        "address": o.folder.name,
    }


def value(x: float) -> str:
    return MISSING if math.isnan(x) else number(x)


def interval(ends: Interval) -> str:
    return "" if math.isnan(ends.low) else f"[{ends.low:+.4f}, {ends.high:+.4f}]"


def reach(r: Row) -> str:
    """The effect in steps, in words."""
    if r.reach is None:
        return MISSING
    at = f"{r.reach.step:,.0f} of {r.reach.steps:,}"
    return f"there at step {at}" if r.reach.curve == "arm" else f"worth {at}"


def runs(study: Study, r: Row) -> str:
    others = [f"{n} {status}" for status, n in r.counts.items() if n and status != "finished"]
    return f"{r.counts['finished']} of {study.seeds}" + below(
        f"({', '.join(others)})" if others else ""
    )


def settings(values: Settings) -> str:
    return ", ".join(f"{knob}={value}" for knob, value in values.items())


def _place(study: Study) -> tuple[str, ...]:
    return ("scale", "arm") if any(study.scales) else ("arm",)


def _named(study: Study, scale: str, arm: str) -> tuple[str, ...]:
    return (scale, arm) if any(study.scales) else (arm,)


def _words(r: Row) -> str:
    if r.comparison is None:
        return "; ".join(filter(None, ("baseline", r.words)))
    return r.words


def _signed(x: float) -> str:
    return MISSING if math.isnan(x) else f"{x:+.4f}"


def _interval(r: Row) -> str:
    return interval(r.comparison.interval) if r.comparison else ""


def _p(r: Row) -> str:
    if r.comparison is None or r.verdict not in TESTED:
        return MISSING
    p = "< 0.0001" if r.comparison.p_holm < 1e-4 else f"{r.comparison.p_holm:.4f}"
    same = f"(same: {r.comparison.p_same_holm:.4f})" if r.verdict == statistics.SAME else ""
    return p + below(same)


def _times(r: Row, study: Study, share: float) -> str:
    return "" if r.arm == study.baseline or math.isnan(share) else f"({_share(share)})"


def _share(x: float) -> str:
    return MISSING if math.isnan(x) else f"{x:.3g}{TIMES}"


def _and(words: Iterable[str]) -> str:
    return " and ".join(words)


def _span(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2g}"
    return f"{min(values):.2g} to {max(values):.2g}, median {float(np.median(values)):.2g}"
