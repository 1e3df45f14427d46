"""A coordinate check as a person reads it: in the terminal, as a picture, as a page."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from gptjax.report.figures import COLOURS, dress, to_svg
from gptjax.report.page import document
from gptjax.report.terminal import MISSING, new_console
from gptjax.sizes.coordinates import KEPT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show(record: dict[str, Any]) -> None:
    """Prints what `coordinates.run` returns."""
    console = new_console()
    for knob, sweep in record["sweeps"].items():
        heads, *lines = rows(record, knob)
        table = Table(title=f"slopes against {knob}={', '.join(map(str, sweep['values']))}")
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if 0 < i < len(heads) - 1 else "left")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for sentence in verdict(record):
        console.print(sentence)


def rows(record: dict[str, Any], knob: str) -> Iterator[tuple[str, ...]]:
    """The table of one sweep, its heading first."""
    steps = (f"change, step {i + 1}" for i in range(record["steps"]))
    yield ("activation", "initial size", *steps, "should be")
    for name, kinds in record["sweeps"][knob]["places"].items():
        values = (kinds["size"]["slopes"][0], *kinds["change"]["slopes"])
        slopes = tuple(MISSING if value is None else f"{value:+.2f}" for value in values)
        yield (name, *slopes, "0" if name in KEPT[knob] else "at most 0")


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
        heads, *body_rows = rows(record, knob)
        head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
        cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body_rows)
        table = "".join(f"<tr>{row}</tr>" for row in (head, *cells))
        body += [f"<h2>Slopes against {escape(knob)}</h2>", f"<table>{table}</table>"]
    return document("Coordinate check", body)
