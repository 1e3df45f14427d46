"""Run folders that older versions wrote, kept for ever: they go on, are read, and stay valid.

`tests/fixtures/runs/VERSION` holds what that version's own code left behind:

    store/        a token store of `tiny.TEXT`
    run/          a run of 6 steps, stopped after step 5, with its checkpoint of step 4
    whole.jsonl   the log of the same run, uninterrupted
    cells/        a study's two finished runs; of their checkpoints only the manifests are kept

`tests/fixtures/together` holds the cells of a study that an older version trained in one program: that
of its baseline with its checkpoint of step 4, of the last one the manifest.

Paths were made relative, TensorBoard's files left out, nothing else was touched. A version that
changes how a run is written adds a folder; none is ever changed or removed.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from gptjax import configure, ledger, loop, replay, status, trained
from gptjax.config import Config, UserError
from gptjax.records import read_metrics
from gptjax.study import store
from gptjax.study.results import read
from gptjax.study.spec import Study
from tests import tiny
from tests.test_loop import CLOCK

RUNS = Path("tests/fixtures/runs")
VERSIONS = sorted(folder.name for folder in RUNS.iterdir())
# The recipe of the runs, as it was given.
KNOBS: dict[str, Any] = {
    "model__width": 8, "model__heads": 2, "model__layers": 1, "model__context": 8,
    "data__batch_size": 2, "train__steps": 6, "train__eval_every": 3, "train__checkpoint_every": 2,
    "train__keep_checkpoints": 1, "eval__batch_size": 2, "eval__max_tokens": 64,
}  # fmt: skip
of_each_version = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture
def folder(version: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUNS / version / "run", tmp_path / "run"))


def recipe(version: str) -> Config:
    return tiny.config(RUNS / version / "store", **KNOBS)


def one_device() -> Any:
    return jax.set_mesh(tiny.mesh())


@of_each_version
def test_a_run_goes_on_as_if_nothing_had_been(version: str, folder: Path) -> None:
    with one_device():
        loop.train(recipe(version), folder)
    lines = (RUNS / version / "whole.jsonl").read_text().splitlines()
    assert_alike(read_metrics(folder), [json.loads(line) for line in lines])


def assert_alike(now: list[dict[str, float]], lines: list[dict[str, float]]) -> None:
    assert [line["step"] for line in now] == [line["step"] for line in lines]
    for line, was in zip(now, lines, strict=True):
        for name in was.keys() - CLOCK:
            # Of another machine, perhaps: float32 sums of some hundred terms, in another order.
            assert line[name] == pytest.approx(was[name], rel=2e-5), (line["step"], name)


@of_each_version
def test_a_run_is_read_by_its_folder_alone(version: str, folder: Path) -> None:
    config = configure.of_run(folder)
    wanted = dataclasses.replace(recipe(version), mesh=config.mesh)
    assert config == wanted
    with one_device(), trained.opened(trained.Trained(folder, config)) as model:
        step, params = model.step, model.params
    assert step == 4 and params["embed"]["tokens"].shape == (264, 8)


@of_each_version
def test_a_run_is_verified_for_its_replay(version: str, folder: Path) -> None:
    past = replay.verify(folder)
    assert (past.config, past.saved, past.last) == (recipe(version), 4, 5)


# --- runs that were trained in one program ----------------------------------------------------

TOGETHER = Path("tests/fixtures/together")


def study() -> Study:
    words = tuple(tiny.overrides(RUNS / "0.1.0" / "store", **KNOBS))
    arms = {"high": {"optim.peak_lr": 1e-2}}
    return Study("?", tiny.RECIPE, arms, seeds=1, overrides=words)


def test_a_run_of_a_group_goes_on_and_recurs_as_any_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = read(study(), TOGETHER).outcomes[0].folder
    folder = Path(shutil.copytree(base, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "00000006")
    with one_device():
        loop.train(recipe("0.1.0"), folder)
    assert_alike(read_metrics(folder), read_metrics(base))
    assert "goes on with other software, so the last bits of its numbers may differ" in caplog.text
    record = replay.replay_run(base)
    assert record["same"] and record["steps"] == 6
    assert any(line.startswith("code was ") for line in record["differs"])


def test_a_study_whose_runs_were_a_group_is_read_and_run_again(tmp_path: Path) -> None:
    """A step was another program than that of a run alone: no new run stands beside them."""
    copied = Path(shutil.copytree(TOGETHER, tmp_path / "cells"))
    assert {s.state for s in status.statuses(copied)} == {"finished"}
    for o, anew in zip(
        read(study(), copied).outcomes, read(study(), copied, now=True).outcomes, strict=True
    ):
        last = read_metrics(o.folder)[-1]
        assert (o.status, o.metric) == ("finished", last["val_loss"])
        assert "step" in store.differences(o.folder, o.cell)
        assert (anew.status, anew.folder.name) == ("missing", f"{o.folder.name}.2")
        with pytest.raises(UserError, match="its speed is a share of theirs"):
            ledger.measure(o.folder)
