"""Figures in one style, and as SVG that stands inside a page and asks for nothing outside it."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, ACCENT, BAND = "#1c2330", "#b4451f", "#e9ded6"
COLOURS = ("#b4451f", "#22577a", "#4d7c0f", "#7c3aed", "#a16207", "#0e7490")


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
