"""Figures of an evaluation or a comparison, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.evaluation.summary import HEADINGS
from gptjax.report.figures import ACCENT, BAND, COLOURS, INK, cycle, new_axes, to_svg


def by_position(texts: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Loss against tokens seen, one line a text."""
    axes = new_axes(6.4, 3.2, "tokens seen before", "nats/token")
    for (name, bins), colour in zip(texts.items(), cycle(len(texts)), strict=True):
        # On a logarithm of 1 + seen, which has room for the prediction that sees nothing.
        x = [np.sqrt((1 + p["from"]) * (1 + p["to"])) for p in bins]
        axes.plot(x, [p["loss"] for p in bins], "o-", color=colour, label=name, ms=3.5, lw=1.4)
    axes.set_xscale("log", base=2)
    ticks = sorted({p["from"] for bins in texts.values() for p in bins})
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
    sorted_D = np.sort(bits_D)
    if None not in ends:
        axes.axhspan(float(ends[0] or 0), float(ends[1] or 0), color=BAND, lw=0)
    axes.axhline(0, color=INK, lw=0.8)
    axes.axhline(mean, color=ACCENT, lw=1.4)
    if len(sorted_D) > 2000:  # a line of so many points is a curve
        axes.plot(
            np.linspace(0, len(sorted_D), 2000), np.quantile(sorted_D, np.linspace(0, 1, 2000))
        )
    else:
        axes.plot(np.arange(len(sorted_D)), sorted_D, "o", color=COLOURS[1], ms=3)
    return to_svg(axes)
