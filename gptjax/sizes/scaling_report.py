"""A law of scale as a person reads it: in the terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptjax.report.figures import COLOURS, new_axes
from gptjax.report.formats import Table, terminal
from gptjax.report.terminal import MISSING, new_console, number
from gptjax.sizes.scaling import Bootstrap, Law, Points, levels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEYOND = 3  # the curves go on to so many times the largest size


def show(record: dict[str, Any]) -> None:
    """Prints what `scaling.record` returns."""
    console = new_console()
    console.print(
        f"loss = {record['law']}, N parameters, D tokens, nats/token; {len(record['points'])} "
        f"points, error {number(record['rms_error'])} (rms), at most "
        f"{number(record['largest_error'])}",
    )
    constants = [(name, *_cells(estimate)) for name, estimate in record["constants"].items()]
    console.print(terminal(Table(("constant", "value", "95% interval"), constants, {"constant"})))
    for note in (record["interval_by"], *record["notes"]):
        console.print(note)
    _show_left_out(console, record["largest_left_out"])
    if record["optimum"]:
        console.print(terminal(_optima(record["optimum"])))


def _show_left_out(console: Any, held_out: dict[str, Any]) -> None:
    if "refused" in held_out:
        console.print(f"the largest cannot be foretold: {held_out['refused']}")
        return
    rows = [
        (
            f"{p['parameters']:.4g}",
            f"{p['tokens']:.4g}",
            number(p["loss"]),
            number(p["foretold"]),
            f"{p['error']:+.4f}",
            f"{p['relative']:+.2%}",
        )
        for p in held_out["points"]
    ]
    headings = ("parameters", "tokens", "loss", "foretold", "error", "relative")
    console.print("the largest, foretold by a fit without it:")
    console.print(terminal(Table(headings, rows, ())))


def _optima(optima: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for o in optima:
        cells = ["\n".join(_cells(o[name])) for name in Points._fields]
        beyond = f"{o['beyond']:.3g} times" if o["beyond"] > 1 else "no"
        rows.append((f"{o['flops']:.4g}", *cells, beyond))
    return Table(("FLOPs", "parameters", "tokens", "loss", "beyond the ladder"), rows, ())


def _cells(estimate: dict[str, Any]) -> tuple[str, str]:
    value, low, high = (
        MISSING if v is None else f"{v:.4g}" for v in (estimate["value"], *estimate["interval"])
    )
    return value, f"{low} – {high}"


def figure(points: Points, law: Law, resampled: Bootstrap) -> Figure:
    """Loss against the size that varies, with the law and its 95% band: `savefig` writes it.

    In a law of both sizes there is a line for each number of tokens, or for the middle of each
    of several groups where they are many. Points of a group stand at their own loss, so they
    may lie off its line by what their tokens differ.
    """
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    name = law.terms[0]
    size_P = getattr(points, name)
    axes = new_axes(6.4, 4.2, name, "nats/token")
    grid = np.geomspace(size_P.min() / 1.2, size_P.max() * BEYOND, 200)
    many = Law(*(constant[:, None] for constant in resampled.laws))
    for (tokens, mask_P), colour in zip(_groups(points, law), COLOURS, strict=False):
        sizes = (grid, tokens) if name == "parameters" else (tokens, grid)
        label = f"{tokens:.3g}" if len(law.terms) > 1 else None
        low, high = resampled.interval(many.loss(*sizes))
        axes.fill_between(grid, low, high, color=colour, alpha=0.18, lw=0)
        axes.plot(grid, law.loss(*sizes), color=colour, lw=1.4, label=label)
        axes.plot(size_P[mask_P], points.loss[mask_P], "o", color=colour, ms=4)
    axes.axhline(law.E, color="#888", lw=0.8, ls="--")
    axes.axvline(size_P.max(), color="#888", lw=0.8, ls=":")
    axes.annotate(
        f"E = {law.E:.3g}", (grid[0], law.E), (2, 3), textcoords="offset points", fontsize=8
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    # A ladder's losses lie within one decade, for which a log axis has too few ticks.
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    if len(law.terms) > 1:
        axes.legend(
            title="tokens", frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    picture = axes.get_figure(root=True)
    assert picture is not None
    return picture


def _groups(points: Points, law: Law) -> Iterator[tuple[float, np.ndarray]]:
    """The tokens of each line and the points that go with it, bool (P,)."""
    if len(law.terms) == 1:
        yield 1.0, np.ones(len(points.loss), bool)
        return
    starts = levels(points.tokens)
    if len(starts) > len(COLOURS):
        cuts = np.linspace(0, 1, len(COLOURS) + 1)[:-1]
        starts = np.quantile(points.tokens, cuts, method="nearest").tolist()
    group_P = np.searchsorted(starts, points.tokens, side="right") - 1
    for group in np.unique(group_P):
        mask_P = group_P == group
        yield float(np.exp(np.log(points.tokens[mask_P]).mean())), mask_P
