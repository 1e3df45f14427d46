"""A coordinate check as a person reads it: in the terminal, as a picture, as a page."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from gptjax.report.figures import COLOURS, dress, to_svg
from gptjax.report.formats import Table, html, terminal
from gptjax.report.page import document
from gptjax.report.terminal import MISSING, new_console
from gptjax.sizes.coordinates import KEPT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show(record: dict[str, Any]) -> None:
    """Prints what `coordinates.coordinate_check` returns."""
    console = new_console()
    for knob, sweep in record["sweeps"].items():
        console.print(f"slopes against {knob}={', '.join(map(str, sweep['values']))}")
        console.print(terminal(slopes(record, knob)))
    for sentence in verdict(record):
        console.print(sentence)


def slopes(record: dict[str, Any], knob: str) -> Table:
    """The table of one sweep."""
    steps = (f"change, step {i + 1}" for i in range(record["steps"]))
    headings = ("activation", "initial size", *steps, "should be")
    rows = []
    for name, kinds in record["sweeps"][knob]["places"].items():
        values = (kinds["size"]["slopes"][0], *kinds["change"]["slopes"])
        slope_texts = tuple(MISSING if value is None else f"{value:+.2f}" for value in values)
        rows.append((name, *slope_texts, "0" if name in KEPT[knob] else "at most 0"))
    return Table(headings, rows, {"activation", "should be"})


def verdict(record: dict[str, Any]) -> Iterator[str]:
    """In lines: passed, or what failed; and of what."""
    model = record["config"]["model"]
    yield (
        f"model.parametrisation={model['parametrisation']}, optim.peak_lr="
        f"{record['config']['optim']['peak_lr']:g}, {record['steps']} steps, {record['seeds']} "
        f"seeds; slopes may be off by {record['tolerance']}"
    )
    yield from (fault for sweep in record["sweeps"].values() for fault in sweep["faults"])
    yield "passed" if record["passed"] else "FAILED"


def figure(record: dict[str, Any]) -> Figure:
    """The rms change after the last step against the width, against the depth, or both."""
    from matplotlib.figure import Figure

    sweeps = record["sweeps"]
    picture = Figure(figsize=(1.4 + 4.6 * len(sweeps), 3.8), layout="constrained")
    for axes, (knob, sweep) in zip(
        picture.subplots(1, len(sweeps), squeeze=False)[0], sweeps.items(), strict=True
    ):
        dress(axes, knob, f"rms change after {record['steps']} steps")
        for (name, kinds), colour in zip(sweep["places"].items(), COLOURS, strict=False):
            rms = np.array(kinds["change"]["rms"], float)[:, :, -1]
            slope = kinds["change"]["slopes"][-1]
            label = f"{name} {MISSING if slope is None else f'{slope:+.2f}'}"
            axes.plot(sweep["values"], np.exp(np.log(rms).mean(0)), "o-", c=colour, label=label)
            axes.plot(sweep["values"], rms.T, "o", c=colour, ms=2, alpha=0.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sweep["values"], [str(value) for value in sweep["values"]])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture


def page(record: dict[str, Any]) -> str:
    """One HTML page that needs nothing but itself."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in verdict(record))
    body = ["<h1>Coordinate check</h1>", lines, to_svg(figure(record).axes[0])]
    for knob in record["sweeps"]:
        body += [f"<h2>Slopes against {escape(knob)}</h2>", html(slopes(record, knob))]
    return document("Coordinate check", body)
