"""Searches: what fits comes first, the fastest of it before the others; what money buys."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax.cli import main
from gptjax.plan import hardware, search
from gptjax.plan.search import Found
from gptjax.sharding import AXES
from gptjax.sizes import budget, scaling
from gptjax.sizes.scaling import Bootstrap, Law, Points
from tests import tiny


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))


def test_every_mesh_is_tried_once() -> None:
    found = [dataclasses.astuple(mesh) for mesh in search.meshes(hardware.parse("v5e-8"))]
    assert len(found) == len(set(found)) == math.comb(3 + len(AXES) - 1, 3)  # 2 * 2 * 2 shared out
    assert {math.prod(sizes) for sizes in found} == {8}


def test_only_meshes_that_divide_are_compiled_for() -> None:
    config = dataclasses.replace(
        tiny.BASE, model=tiny.model(width=12, heads=3, ff_dim=24), data=tiny.data(batch_size=4)
    )
    spread = search.over_meshes({"": config}, hardware.parse("v5e-4"))
    # Three heads are split over none; 12 of width, 4 rows and rows of 16 tokens over 4; and there are
    # no experts.
    split = {"data=2 fsdp=2", "data=2 sequence=2", "fsdp=2 sequence=2"}
    assert set(spread) == {"data=4", "fsdp=4", "sequence=4"} | split
    of_experts = dataclasses.replace(
        config, model=dataclasses.replace(config.model, feedforward="gelu_experts", experts=2)
    )
    more = {"data=2 expert=2", "fsdp=2 expert=2", "expert=2 sequence=2"}
    assert set(search.over_meshes({"": of_experts}, hardware.parse("v5e-4"))) == {*spread} | more
    nowhere = dataclasses.replace(
        config, model=tiny.model(width=9, heads=3, context=9), data=tiny.data(batch_size=1)
    )
    assert list(search.over_meshes({"odd": nowhere}, hardware.parse("v5e-4"))) == ["odd"]


def a_plan(step: float, fits: bool = True, **more: Any) -> dict[str, Any]:
    """What `search` and `budget` read of a plan."""
    ends = {"low": {"step": step / 2}, "high": {"step": step}}
    return {
        "config": {"data": {"batch_size": 8}, "model": {"context": 128}},
        "fits": {"fits": fits},
        "range": ends,
        "forecast": None,
        "dollars_an_hour": 3.6,
        "parameters": 10**6,
        **more,
    }


def test_what_fits_comes_first_by_its_time_for_a_token() -> None:
    slow, fast = Found("slow", a_plan(2.0), ""), Found("fast", a_plan(1.0), "")
    large = Found("large", a_plan(0.1, fits=False), "")
    # Twice the rows in less than twice the time.
    rows = {"config": {"data": {"batch_size": 16}, "model": {"context": 128}}}
    batch, none = Found("batch", a_plan(1.5, **rows), ""), Found("none", None, "cannot")
    ordered = sorted([none, large, slow, fast, batch], key=search._rank)
    assert [found.name for found in ordered] == ["batch", "fast", "slow", "large", "none"]


def test_a_budget_buys_what_dollars_divided_by_the_price_of_a_token_are() -> None:
    law = Law(2.0, 50.0, 0.3, 90.0, 0.25)
    points = Points(np.array([1e5, 1e6]), np.array([1e8, 1e9]), np.array([3.0, 2.9]))
    same = Bootstrap(Law(*(np.full(10, constant) for constant in law)), 0.025)
    found = [
        Found("a", a_plan(1.0), ""),
        Found("b", a_plan(1.0, parameters=2 * 10**6), ""),
        Found("does not fit", a_plan(0.1, fits=False), ""),
        Found("cannot run", None, "why"),
    ]
    rows = budget.spend(found, 100.0, points, law, same)
    assert [row["name"] for row in rows] == ["b", "a"]  # the larger one is better at equal tokens
    # 8 * 128 tokens in 1 s, or in half of one, at 3.6 dollars an hour, a thousandth a second.
    few, middle, many = rows[1]["tokens"]
    assert (few, many) == (pytest.approx(100 * 1000 * 1024), pytest.approx(2 * few))
    assert middle == pytest.approx(math.sqrt(few * many))
    assert rows[1]["loss"] == pytest.approx(law.loss(1e6, middle))
    # Of a law without uncertainty the range of the time is left.
    assert rows[1]["interval"] == pytest.approx([law.loss(1e6, many), law.loss(1e6, few)])
    assert rows[0]["beyond"] == 2.0  # 2e6 parameters, of 1e6 that were run
    forecast = {name: {"step": step} for name, step in (("low", 1), ("middle", 2), ("high", 4))}
    (row,) = budget.spend(
        [Found("a", a_plan(1.0, forecast=forecast), "")], 100.0, points, law, same
    )
    assert row["tokens"] == pytest.approx([few / 4, few / 2, few])
    # Of one run alone, which was slower than the high end: that is the end then.
    slow = {"middle": {"step": 4}}
    (row,) = budget.spend([Found("a", a_plan(1.0, forecast=slow), "")], 100.0, points, law, same)
    assert row["tokens"] == pytest.approx([few / 4, few / 4, 2 * few])
    assert row["interval"][0] <= row["loss"] <= row["interval"][1]


def small(batch_size: int = 8) -> list[str]:
    named = {**tiny.KNOBS, "train.accumulation": 1, "model.scan_layers": True}
    named |= {"optim.loss_vocab_chunk": None, "data.batch_size": batch_size}
    return [f"--config.{name}={value}" for name, value in named.items()]


@pytest.mark.slow
@pytest.mark.usefixtures("few_replicates")
def test_the_command_lists_what_fits_and_goes_on_where_it_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["plan", "--config=configs/base.py", "--on=cpu-1", "--search", *small()]
    axis = "--axis=model.width=16,32"
    assert main([*words, axis, "--jobs=2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "width=" in line]
    assert ["width=16" in line for line in lines] == [True, False]
    assert all("fits" in line for line in lines)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it was compiled before")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert main([*words, axis]) == 0
    capsys.readouterr()
    ladder = tmp_path / "ladder.csv"
    sizes = [(10**n, 10**7 * d) for n in (4, 5, 6) for d in (1, 4, 16)]
    rows = [f"{n},{d},{2 + 50 / n**0.3 + 90 / d**0.25}" for n, d in sizes]
    ladder.write_text("\n".join(["parameters,tokens,loss", *rows]))
    money = ["--budget=100", f"--points={ladder}", "--dollars=1", "--json"]
    assert main([*words[:3], *small(), axis, *money]) == 0
    bought = json.loads(capsys.readouterr().out)["budget"]
    assert len(bought) == 2 and bought[0]["loss"] <= bought[1]["loss"]
    law = scaling.fit(scaling.points_from_csv(ladder))
    assert bought[0]["loss"] == law.loss(bought[0]["parameters"], bought[0]["tokens"][1])


@pytest.mark.parametrize(
    "words, told",
    [
        (["--budget=100"], "--budget wants a law of scale: --points=FILE"),
        (["--budget=-1", "--points=x.csv"], "--budget=-1.0 must be above 0"),
        (["--budget=0", "--points=x.csv"], "--budget=0.0 must be above 0"),
        (["--dollars=0"], "--dollars=0.0 must be above 0"),
        (["--dollars=nan"], "--dollars=nan must be above 0"),
        (
            ["--search", "--axis=model.remat=none,all"],
            "model.remat='all' is not one of: none, dots",
        ),
        (["--search", "--jobs=0"], "--jobs=0 must be above 0"),
        (["--budget=1", "--points=x.csv", "--on=tpu7x-8"], "no price of tpu7x-8 is on file"),
        (["--axis=model.width=1,2"], "--axis and --points are of a search"),
        (["--search", "--html=plan.html"], "--calibrate and --html are of one plan"),
    ],
)
def test_words_that_do_not_go_together_are_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--on=v5e-8", *words]) == 2
    assert told in capsys.readouterr().err
