"""Run folders that older versions wrote, kept for ever: they go on, are read, and stay valid.

`tests/fixtures/runs/VERSION` holds what that version's own code left behind:

    store/        a token store of `tiny.TEXT`
    run/          a run of 6 steps, stopped after step 5, with its checkpoint of step 4
    whole.jsonl   the log of the same run, uninterrupted
    cells/        a study's two finished runs; of their checkpoints only the manifests are kept

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

from gptjax import configure, loop, replay, trained
from gptjax.config import Config
from gptjax.records import read_metrics
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
pytestmark = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture
def folder(version: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUNS / version / "run", tmp_path / "run"))


def recipe(version: str) -> Config:
    return tiny.config(RUNS / version / "store", **KNOBS)


def one_device() -> Any:
    return jax.set_mesh(tiny.mesh())


def test_a_run_goes_on_as_if_nothing_had_been(version: str, folder: Path) -> None:
    with one_device():
        loop.train(recipe(version), folder)
    lines = [json.loads(line) for line in (RUNS / version / "whole.jsonl").open(encoding="utf-8")]
    now = read_metrics(folder)
    assert [line["step"] for line in now] == [line["step"] for line in lines]
    for line, was in zip(now, lines, strict=True):
        for name in was.keys() - CLOCK:
            # Of another machine, perhaps: float32 sums of some hundred terms, in another order.
            assert line[name] == pytest.approx(was[name], rel=2e-5), (line["step"], name)


def test_a_run_is_read_by_its_folder_alone(version: str, folder: Path) -> None:
    config = configure.of_run(folder)
    wanted = dataclasses.replace(recipe(version), mesh=config.mesh)
    assert config == wanted
    with one_device(), trained.opened(trained.Trained(folder, config)) as model:
        step, params = model.step, model.params
    assert step == 4 and params["embed"]["tokens"].shape == (264, 8)


def test_a_run_is_verified_for_its_replay(version: str, folder: Path) -> None:
    past = replay.verify(folder)
    assert (past.config, past.saved, past.last) == (recipe(version), 4, 5)
