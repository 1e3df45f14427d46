"""For so many dollars on some hardware: which size, how many tokens, which mesh, and which loss.

A law of scale (`gptjax.sizes.scaling`) says what a model of N parameters reaches after D tokens; a
plan (`gptjax.plan`) says what D tokens cost. So each candidate that fits has a D that the money
buys, and a loss. The price of a token is known as a range (or as the ledger's forecast), and the
law by its bootstrap: the interval of the loss spans both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gptjax.plan.search import Found
from gptjax.sizes.scaling import Bootstrap, Law, Points


def spend(
    found: Sequence[Found], dollars: float, points: Points, law: Law, resampled: Bootstrap
) -> list[dict[str, Any]]:
    """What the money buys with each candidate that fits, the least loss first.

    Losses are those of the law at the middle of the tokens (the geometric mean where there is no
    forecast); `beyond` is by how many times the largest size that was run is exceeded.
    """
    rows = []
    for one in found:
        if one.plan is None or not one.plan["fits"]["fits"]:
            continue
        few, middle, many = (dollars / price for price in _token_prices(one.plan))
        size = one.plan["parameters"]
        ends = [resampled.interval(resampled.laws.loss(size, tokens)) for tokens in (few, many)]
        rows.append(
            {
                "name": one.name,
                "parameters": size,
                "tokens": [few, middle, many],
                "loss": float(law.loss(size, middle)),
                "interval": [float(ends[1][0]), float(ends[0][1])],
                "beyond": float(max(size / points.parameters.max(), middle / points.tokens.max())),
            }
        )
    return sorted(rows, key=lambda row: row["loss"])


def _token_prices(plan: dict[str, Any]) -> tuple[float, float, float]:
    """Dollars a token: the dearest, the middle one and the cheapest."""
    tokens = plan["config"]["data"]["batch_size"] * plan["config"]["model"]["context"]
    forecast = plan["forecast"] or {}
    low, high = (forecast.get(name, plan["range"][name])["step"] for name in ("low", "high"))
    middle = forecast["middle"]["step"] if forecast else math.sqrt(low * high)
    # One run has no interval of its own, and may well lie beyond the range.
    low, high = min(low, middle), max(high, middle)
    an_hour = plan["dollars_an_hour"]
    dear, usual, cheap = (step / 3600 * an_hour / tokens for step in (high, middle, low))
    return dear, usual, cheap
