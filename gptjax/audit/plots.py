"""Plots of a report, as SVG that stands inside a page and asks for nothing outside it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptjax.audit.table import HEADINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, ACCENT, BAND = "#1c2330", "#b4451f", "#e9ded6"
COLOURS = ("#b4451f", "#22577a", "#4d7c0f", "#7c3aed", "#a16207", "#0e7490")


def by_position(texts: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Loss against tokens seen, one line a text."""
    axes = new_axes(6.4, 3.2, "tokens seen before", "nats/token")
    for (name, found), colour in zip(texts.items(), cycle(len(texts)), strict=True):
        # On a logarithm of 1 + seen, which has room for the prediction that sees nothing.
        x = [np.sqrt((1 + p["from"]) * (1 + p["to"])) for p in found]
        axes.plot(x, [p["loss"] for p in found], "o-", color=colour, label=name, ms=3.5, lw=1.4)
    axes.set_xscale("log", base=2)
    ticks = sorted({p["from"] for found in texts.values() for p in found})
    axes.set_xticks([1 + t for t in ticks], [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    if len(texts) > 1:
        axes.legend(frameon=False, fontsize=9)
    return to_svg(axes)


def intervals(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Bits per byte of every text and domain with its interval."""
    axes = new_axes(6.4, 0.9 + 0.34 * len(rows), HEADINGS["bits_per_byte"], "")
    for y, (_, s) in enumerate(rows):
        low, high = s["interval"]["bits_per_byte"]
        if low is not None:
            axes.plot([low, high], [y, y], color=ACCENT, lw=2, solid_capstyle="round")
        if s["bits_per_byte"] is not None:
            axes.plot([s["bits_per_byte"]], [y], "o", color=ACCENT, ms=5)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return to_svg(axes)


def documents(bits_D: Sequence[float], ends: Sequence[float | None], mean: float) -> str:
    """Each document's difference, in order, with the whole text's and its interval."""
    axes = new_axes(6.4, 3.0, "documents, in order of their difference", "B − A, bits/byte")
    found = np.sort(bits_D)
    if None not in ends:
        axes.axhspan(float(ends[0] or 0), float(ends[1] or 0), color=BAND, lw=0)
    axes.axhline(0, color=INK, lw=0.8)
    axes.axhline(mean, color=ACCENT, lw=1.4)
    if len(found) > 2000:  # a line of so many points is a curve
        axes.plot(np.linspace(0, len(found), 2000), np.quantile(found, np.linspace(0, 1, 2000)))
    else:
        axes.plot(np.arange(len(found)), found, "o", color=COLOURS[1], ms=3)
    return to_svg(axes)


def cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def new_axes(width: float, height: float, x: str, y: str) -> Axes:
    # Imported here: only a report needs it, and it takes half a second.
    from matplotlib.figure import Figure

    return dress(Figure(figsize=(width, height), layout="constrained").subplots(), x, y)


def dress(axes: Axes, x: str, y: str) -> Axes:
    """Labels and the style of all our plots."""
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    axes.tick_params(labelsize=9, colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y" if y else "x", color="#e4e4e0", lw=0.7)
    axes.set_axisbelow(True)
    return axes


def to_svg(axes: Axes) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    out, figure = io.StringIO(), axes.figure
    assert isinstance(figure, Figure)
    # Text as text: it takes the page's font and can be searched. The salt makes ids repeatable.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": axes.get_xlabel()}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # An HTML page knows the namespaces; the addresses that name them are not to be seen in it.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
