"""The simulation behind docs/goodput.png against its closed form."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

GOODPUT = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "goodput.py"))
simulate, expected = GOODPUT["simulate"], GOODPUT["expected"]
DAYS = 20_000  # some 155,000 failures


@pytest.mark.parametrize("interval", [60, 600, 7200])
@pytest.mark.parametrize("save, complete, restart", [(0, 0, 0), (0.5, 6, 30), (60, 600, 1200)])
def test_the_simulation_is_its_closed_form(
    interval: float, save: float, complete: float, restart: float
) -> None:
    """Times between failures vary as much as their mean, so the share of n does by 1/sqrt(n), and
    up to twice that, as the clock varies too; five of these are never met."""
    bound = 5 * 2 / (DAYS * 86_400 * GOODPUT["RATE"]) ** 0.5
    case = (interval, save, complete, restart)
    assert simulate(*case, seconds=DAYS * 86_400) == pytest.approx(expected(*case), abs=bound)


def test_without_failures_only_saves_cost() -> None:
    assert simulate(90, 10, 5, 30, seconds=1e9, rate=1e-9) == pytest.approx(0.9, rel=1e-3)
    assert expected(90, 10, 5, 30, rate=1e-9) == pytest.approx(0.9, rel=1e-3)


def test_the_published_rate_is_one_failure_in_three_hours() -> None:
    assert 1 / GOODPUT["RATE"] / 3600 == pytest.approx(3.09, abs=0.01)
