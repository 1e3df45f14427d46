"""Pictures of a study's report, as SVG: curves, differences, intervals, and cost against loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gptjax.report.figures import BAND, COLOURS, INK, new_axes, to_svg
from gptjax.study import analysis, statistics
from gptjax.study.analysis import Analysis, Row
from gptjax.study.spec import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 8.2  # inches, the legend beside the picture included
DASHES = ("-", "--", ":")  # of arms beyond the number of colours
MARKERS = "osD^vP"  # of scales
# A forest of intervals whose ends lie beyond so many smallest differences is drawn on a
# logarithm outside of FAR / 6 of them.
FAR = 60
AXES = {"flops": "training FLOPs", "seconds": "training time, s"}


def learning(a: Analysis, scale: str) -> str:
    """Each arm's mean held-out curve with a band of one sd; runs that did not finish are thin."""
    axes = new_axes(WIDTH, 3.6, "step", f"held-out {a.study.unit}")
    shown_losses: list[float] = []
    for arm, style in _styles(a.study).items():
        outcomes = a.outcomes(scale, arm)
        finished = [o for o in outcomes if o.status == "finished"]
        for o in outcomes:
            if o.status != "finished" and len(o.curve[0]):
                axes.plot(*o.curve, **style, lw=0.7, marker="x", ms=3)
                shown_losses += o.curve[1].tolist() if o.status == "started" else []
        steps_E, metric_SE = analysis.curves(finished)
        if len(metric_SE):
            mean_E = metric_SE.mean(0)
            axes.plot(steps_E, mean_E, **style, lw=1.5, label=arm)
            shown_losses += metric_SE.ravel().tolist()
            if len(metric_SE) > 1:
                sd_E = metric_SE.std(0, ddof=1)
                band = mean_E - sd_E, mean_E + sd_E
                axes.fill_between(steps_E, *band, color=style["color"], alpha=0.15, lw=0)
        else:
            axes.plot([], [], **style, lw=0.7, label=f"{arm}, none finished")
    # A run that diverged may lie anywhere, and must not flatten the others.
    if shown_losses:
        room = 0.05 * (max(shown_losses) - min(shown_losses)) or 0.05
        axes.set_ylim(min(shown_losses) - room, max(shown_losses) + room)
    return _with_legend(axes)


def differences(a: Analysis, scale: str) -> str:
    """Arm less baseline along the run, mean over pairs, with Student's 95% interval; "" without."""
    axes = new_axes(WIDTH, 3.6, "step", f"difference, {a.study.unit}")
    _zone(axes.axhspan, axes.axhline, a.study)
    for arm, style in _styles(a.study).items():
        if arm == a.study.baseline:
            continue
        steps_E, d_SE = analysis.difference_curves(a.results, scale, arm)
        if not len(d_SE):
            continue
        ends = np.array([statistics.t_interval(d_S) for d_S in d_SE.T])
        axes.fill_between(steps_E, *ends.T, color=style["color"], alpha=0.15, lw=0)
        axes.plot(steps_E, d_SE.mean(0), **style, lw=1.5, label=arm)
    return _with_legend(axes) if len(axes.lines) > 1 else ""


def forest(a: Analysis) -> str:
    """Every difference with both intervals, Student's thick and the bootstrap's thin below it."""
    rows = [r for r in a.rows if r.comparison is not None]
    axes = new_axes(WIDTH, 1.0 + 0.42 * len(rows), f"arm less baseline, {a.study.unit}", "")
    _zone(axes.axvspan, axes.axvline, a.study)
    styles, ends = _styles(a.study), [0.0]
    for y, r in enumerate(rows):
        c, colour = r.comparison, styles[r.arm]["color"]
        assert c is not None
        for ends_of_bar, at, width in ((c.interval, y, 2.4), (c.bootstrap, y + 0.22, 0.9)):
            axes.plot(ends_of_bar, [at, at], color=colour, lw=width, solid_capstyle="round")
            ends += [end for end in ends_of_bar if np.isfinite(end)]
        decided = r.verdict not in ("undecided", analysis.DIVERGED, analysis.BASELINE_DIVERGED)
        axes.plot(r.difference, y, "o", color=colour, mfc=colour if decided else "white", ms=6)
        ends += [r.difference] if np.isfinite(r.difference) else []
        axes.annotate(
            ("preliminary: " if r.preliminary else "") + r.verdict,
            (1.02, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            color=INK,
            annotation_clip=False,
        )
    axes.set_yticks(range(len(rows)), [_label(r) for r in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    reach = max(map(abs, ends))
    if reach > FAR * a.study.smallest:
        straight = FAR / 6 * a.study.smallest
        axes.set_xscale("symlog", linthresh=straight)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"{axes.get_xlabel()} (on a logarithm beyond {straight:g})")
    low, high = (min(ends), max(ends))
    room = 0.08 * (high - low) + a.study.smallest / 2
    axes.set_xlim(min(low, -a.study.smallest) - room, max(high, a.study.smallest) + room)
    return to_svg(axes)


def pareto(a: Analysis, cost: str) -> str:
    """Loss against a row of AXES, bars of one sd, and the front."""
    axes = new_axes(WIDTH, 3.4, AXES[cost], f"held-out {a.study.unit}")
    styles, scales = _styles(a.study), list(a.study.scales)
    points = []
    for r in a.rows:
        x = getattr(r.cost, cost)
        if not np.isfinite([x, r.mean]).all():
            continue
        points.append((x, r.mean, r.on_front[cost]))
        colour, marker = styles[r.arm]["color"], MARKERS[scales.index(r.scale) % len(MARKERS)]
        if np.isfinite(r.sd):
            axes.plot([x, x], [r.mean - r.sd, r.mean + r.sd], color=colour, lw=1)
        filled = colour if r.on_front[cost] else "white"
        axes.plot(x, r.mean, marker, color=colour, mfc=filled, ms=6.5, label=_label(r), ls="")
    if not points:
        return ""
    best = sorted((x, y) for x, y, on in points if on)
    if best:
        axes.step(*zip(*best, strict=True), where="post", color="#888", lw=0.9, ls="--", zorder=0)
    xs = [x for x, _, _ in points]
    if max(xs) > 8 * min(xs):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")
    elif max(xs) < 1.02 * min(xs):
        axes.set_xlim(0.9 * min(xs), 1.1 * max(xs))
    axes.xaxis.set_major_formatter("{x:.3g}")
    return _with_legend(axes)


def _zone(span: Any, line: Any, study: Study) -> None:
    """Where a difference would not matter."""
    span(-study.smallest, study.smallest, color=BAND, lw=0, alpha=0.7)
    line(0, color=INK, lw=0.8)


def _label(r: Row) -> str:
    return ", ".join(filter(None, (r.scale, r.arm)))


def _styles(study: Study) -> dict[str, dict[str, Any]]:
    """Each arm's look in all pictures; the baseline is the dark one."""
    styles: dict[str, dict[str, Any]] = {study.baseline: {"color": INK, "ls": "-"}}
    for i, arm in enumerate(study.arms):
        dashes = DASHES[i // len(COLOURS) % len(DASHES)]
        styles[arm] = {"color": COLOURS[i % len(COLOURS)], "ls": dashes}
    return styles


def _with_legend(axes: Axes) -> str:
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return to_svg(axes)
