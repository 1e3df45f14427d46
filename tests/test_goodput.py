"""The simulation behind docs/goodput.png against its closed form."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
GOODPUT = runpy.run_path(str(DOCS / "goodput.py"))
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


def test_the_page_says_what_its_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (DOCS / "clusters.md").read_text()
    (command,) = re.findall(r"^python docs/goodput.py (.*)$", page, re.MULTILINE)
    (share,) = re.findall(r"a save every five minutes leaves ([\d.]+)% of the time", page)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    GOODPUT["main"](*shlex.split(command))
    best, *_ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"restart 14 s: {share}% with a save every 300 s", best)
    assert (tmp_path / "docs/goodput.png").read_bytes()[1:4] == b"PNG"
