"""What runs took, and what plans make of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import ledger, loop
from gptjax.plan import hardware, summary
from gptjax.plan import plan as plans
from gptjax.records import read_metrics
from gptjax.sharding import make_mesh
from tests import tiny
from tests.child import GPTJAX, Child
from tests.test_plan import small


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))


def entry(ratio: float, run: str, kind: str = "TPU v5 lite") -> ledger.Entry:
    return ledger.Entry(kind, 8, 1.0, ratio, run)


def test_the_interval_is_the_prediction_interval_of_the_ratios() -> None:
    assert ledger.forecast([]) is None
    assert ledger.forecast([entry(2.0, "a")]) == (pytest.approx(2.0), None, 1)
    ratios = [1.8, 2.0, 2.4, 2.1]
    found = ledger.forecast([entry(r, str(i)) for i, r in enumerate(ratios)])
    assert found is not None and found.interval is not None
    logs = np.log(ratios)
    width = 3.182446305284263 * logs.std(ddof=1) * math.sqrt(1 + 1 / 4)  # t of 3 degrees of freedom
    assert found.ratio == pytest.approx(math.exp(logs.mean()))
    assert found.interval == pytest.approx(
        (math.exp(logs.mean() - width), math.exp(logs.mean() + width))
    )


def test_the_interval_holds_so_many_further_runs() -> None:
    generator, held = np.random.default_rng(0), 0
    for _ in range(2000):
        *past, future = np.exp(generator.normal(0.7, 0.2, 6))
        found = ledger.forecast([entry(r, str(i)) for i, r in enumerate(past)])
        assert found is not None and found.interval is not None
        held += found.interval.low <= future <= found.interval.high
    assert 0.935 < held / 2000 < 0.965  # 95%, of which 2000 trials are off by 0.5% in one of three


def test_runs_that_end_are_in_the_ledger_and_plans_use_those_of_their_kind() -> None:
    for one in (entry(2.0, "a"), entry(3.0, "a"), entry(2.5, "b"), entry(9.0, "c", "NVIDIA H100")):
        ledger.append(one)
    found = {e.run: e.ratio for e in ledger.read(hardware.parse("v5e-8").chip.covers)}
    assert found == {"a": 3.0, "b": 2.5}  # the run that was trained again counts once
    record = plans.make(small(mesh_fsdp=8), hardware.parse("v5e-8"))
    forecast, low = record["forecast"], record["range"]["low"]
    assert forecast["runs"] == 2 and forecast["low"]["step"] < forecast["high"]["step"]
    compute = record["seconds"]["compute"][0]
    assert forecast["middle"]["step"] == pytest.approx(compute * math.sqrt(3.0 * 2.5))
    assert forecast["middle"]["mfu"] == pytest.approx(1 / math.sqrt(3.0 * 2.5))
    assert low["step"] >= compute
    assert any("forecast" in heading for heading in summary.time(record).headings)


@pytest.mark.slow
def test_a_run_that_ends_is_planned_afterwards_as_it_went(text: Path, tmp_path: Path) -> None:
    """The ledger's forecast for this machine is what the run of it took."""
    workdir, recipe = tmp_path / "run", f"--config={tiny.RECIPE}"
    words = tiny.overrides(text, train__steps=20, train__log_every=2)

    def run(*more: str | Path) -> Child:  # with one device, as a user's machine has
        return Child(GPTJAX, *more, recipe, *words).wait()

    assert run("train", f"--workdir={workdir}").returncode == 0
    (line,) = (tmp_path / "cache" / ledger.LEDGER).read_text().splitlines()
    assert json.loads(line)["run"] == str(workdir)
    taken = ledger.measure(workdir)
    for more in ([], [f"--calibrate={workdir}"]):
        record = json.loads(run("plan", "--on=cpu-1", "--json", *more).stdout)
        assert record["forecast"]["runs"] == 1
        assert record["forecast"]["middle"]["mfu"] == pytest.approx(1 / taken.ratio)
        # The peak is measured anew, on a machine that does other things besides: within a factor 3.
        assert 1 / 3 < record["forecast"]["middle"]["step"] / taken.measured < 3
    refused = run("plan", "--on=cpu-1", f"--calibrate={tmp_path}")
    assert refused.returncode == 2 and "is not a run's folder" in refused.stderr
    refused = run("plan", "--on=v5e-8", f"--calibrate={workdir}")
    assert refused.returncode == 2
    assert "was trained on cpu, which foretells nothing of v5e-8" in refused.stderr


def test_of_two_chips_whose_names_begin_alike_each_has_its_own_runs() -> None:
    names = {"v5e-8": "TPU v5 lite", "v5p-8": "TPU v5", "v6e-8": "TPU v6 lite", "cpu-1": "cpu"}
    for kind in names.values():
        ledger.append(entry(2.0, kind, kind))
    for name, kind in names.items():
        assert [e.kind for e in ledger.read(hardware.parse(name).chip.covers)] == [kind]


def test_a_line_that_a_full_disk_cut_off_spoils_no_plan(tmp_path: Path) -> None:
    ledger.append(entry(2.0, "a"))
    with (tmp_path / "cache" / ledger.LEDGER).open("a") as stream:
        stream.write('{"kind": "TPU v5 lite", "dev\n[]\n')
    ledger.append(entry(3.0, "b"))
    assert [e.run for e in ledger.read(hardware.parse("v5e-8").chip.covers)] == ["a", "b"]


def test_every_run_that_ends_is_there_once(tmp_path: Path) -> None:
    store, folder = tiny.make_store(tmp_path), tmp_path / "run"
    run = tiny.config(store, model__layers=1, train__steps=8, train__log_every=2)
    with jax.set_mesh(make_mesh(run.mesh, jax.devices()[:1])):
        loop.train(run, folder, until=6)
        assert ledger.read(lambda kind: True) == []
        loop.train(run, folder)
        loop.train(run, folder)  # is done
    assert ledger.read(lambda kind: True) == [ledger.measure(folder)]
    shares = [line["mfu"] for line in read_metrics(folder) if "mfu" in line]
    assert ledger.measure(folder).ratio == pytest.approx(1 / np.median(shares))
    assert len((tmp_path / "cache" / ledger.LEDGER).read_text().splitlines()) == 1
