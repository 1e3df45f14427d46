"""Cells of a study that train in one program: the same results, in the groups they began in."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from gptjax import ensemble
from gptjax.records import ENSEMBLE
from gptjax.study import runner, spec
from tests import tiny
from tests.child import Child

STUDY = """
from gptjax.study.spec import Study

STUDY = Study(
    hypothesis="A higher rate learns faster.",
    base="configs/base.py",
    arms={{"high": {{"optim.peak_lr": 1e-2}}, "rope": {{"model.position": "rope"}}}},
    seeds=2,
    overrides={overrides},
)
"""
SCRIPT = """
import sys
from pathlib import Path
from gptjax.study import runner, spec
runner.run_study(spec.load(Path(sys.argv[1])), Path(sys.argv[2]), together=4)
"""


@pytest.fixture(scope="module", autouse=True)
def two_devices() -> Iterator[None]:
    """Over which the members of a group are split."""
    with tiny.seeing(2):
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    words = tuple(tiny.overrides(tiny.make_store(folder)))
    (folder / "study.py").write_text(STUDY.format(overrides=words))
    return folder / "study.py"


@pytest.fixture(scope="module")
def together(file: Path) -> tuple[Path, dict[str, float]]:
    store = file.parent / "together"
    return store, metrics(runner.run_study(spec.load(file), store, together=4))


def metrics(found) -> dict[str, float]:
    return {o.cell.label: o.metric for o in found.outcomes}


def test_cells_that_differ_in_numbers_train_together_and_agree_with_those_alone(
    file: Path, together: tuple[Path, dict[str, float]]
) -> None:
    store, found = together
    alone = metrics(runner.run_study(spec.load(file), file.parent / "alone"))
    # Sums of a batched product are rounded in another order.
    assert found == pytest.approx(alone, abs=1e-5)
    assert len(set(found.values())) == 6
    groups = [ensemble.group_of(store / c.address)[0] for c in spec.cells(spec.load(file), {})]
    # Two arms differ in the rate alone, and have two seeds each; rope is another program.
    assert [len(group) for group in groups] == [4, 4, 4, 4, 2, 2]


def test_a_group_is_no_larger_than_asked(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []

    def train(group: dict[Path, object], begin: None) -> None:
        trained.append(len(group))

    monkeypatch.setattr(runner, "train_group", train)
    monkeypatch.setattr(runner, "_sample", lambda outcomes: None)
    runner.run_study(spec.load(file), tmp_path, together=3)
    assert trained == [3, 1, 2]


@pytest.mark.slow
def test_a_killed_group_goes_on_as_it_was_and_ends_the_same(
    file: Path, together: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    child = Child(SCRIPT, file, tmp_path, devices=len(jax.devices()))
    cells = spec.cells(spec.load(file), {})
    until, log = time.monotonic() + 120, tmp_path / cells[3].address / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 6):
        assert child.returncode is None and time.monotonic() < until
        time.sleep(0.02)
    child.kill()
    # Asked for alone now: what began as a group stays one.
    found = runner.run_study(spec.load(file), tmp_path, together=1)
    begun = [c for c in cells if (tmp_path / c.address / ENSEMBLE).is_file()]
    assert len(begun) in (4, 6)
    same = {c.label: together[1][c.label] for c in begun}
    assert {label: metrics(found)[label] for label in same} == same
    record = json.loads((tmp_path / cells[0].address / "environment.json").read_text())
    assert len(record) == 2, "the kill came before the first step or after the last"


def test_a_sample_that_a_kill_prevented_is_made_later(
    file: Path, together: tuple[Path, dict[str, float]]
) -> None:
    store, first = together[0], spec.cells(spec.load(file), {})[0]
    sample = store / first.address / "sample.txt"
    text = sample.read_text()
    sample.unlink()
    runner.run_study(spec.load(file), store, together=4)
    assert text == sample.read_text() != ""
