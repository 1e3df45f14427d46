"""A cell is what it computes: code that computes the same keeps it, code that does not runs it anew."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gptjax import records
from gptjax.checkpoint import Checkpoints
from gptjax.config import UserError
from gptjax.layers import norm
from gptjax.layers.feedforward import FEEDFORWARD, ungated
from gptjax.study import runner, store
from gptjax.study.results import read
from gptjax.study.spec import Study, address, cells
from tests import tiny
from tests.test_older_runs import KNOBS, RUNS, VERSIONS

SMALL = {
    **KNOBS,
    "optim__warmup_steps": 1,
    "train__steps": 2,
    "train__eval_every": 2,
    "train__checkpoint_every": 2,
}


def study(text: Path, **fields: Any) -> Study:
    return tiny.study(text, knobs=SMALL, seeds=1, **fields)


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cells")
    runner.run_study(study(text), folder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "cells"))


@pytest.fixture
def under_other_code(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From now on this process has code of another hash, with a function's source edited."""

    def begin(edit: Callable[[str], str] = lambda source: source) -> None:
        for module in (records, store):
            monkeypatch.setattr(module, "code_fingerprint", lambda: "other")
        edited: dict[str, Any] = dict(norm.__dict__)
        exec(edit(inspect.getsource(norm._gain)), edited)
        monkeypatch.setattr(norm, "_gain", edited["_gain"])
        forget()

    yield begin
    monkeypatch.undo()
    forget()


def forget() -> None:
    """As a new process would know nothing."""
    for cached in (store._initial, store._step, store._evaluation):
        cached.cache_clear()
    jax.clear_caches()


def other_gain(source: str) -> str:
    edited = source.replace("return parameter(", "return 2 * parameter(")
    assert edited != source
    return edited


def rewritten(source: str) -> str:
    """A comment, more lines, and a local with another name."""
    assert "    return parameter(" in source
    return (
        source.replace("return parameter(", "# Why.\n\n    gain = parameter(") + "    return gain\n"
    )


def trained(folder: Path) -> dict[str, int]:
    """How often each run was started."""
    runs = [f for f in folder.iterdir() if f.name != ".locks"]
    return {f.name: len(records.read_environment(f)) for f in runs}


# --- what keeps a cell, and what does not ------------------------------------------------------


def test_the_same_code_need_not_lower(
    text: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "facts", lambda *_: pytest.fail("lowered"))
    before = tiny.files(copied)
    assert [o.status for o in runner.run_study(study(text), copied).outcomes] == ["finished"] * 2
    assert tiny.files(copied) == before


@pytest.mark.parametrize("edit", [rewritten, lambda source: source], ids=["rewritten", "row"])
def test_code_that_computes_the_same_runs_nothing(
    edit: Any, text: Path, copied: Path, under_other_code: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a comment and a rename; after a new row of the activations."""
    monkeypatch.setitem(FEEDFORWARD, "tanh", ungated(jnp.tanh))
    under_other_code(edit)
    before = tiny.files(copied)
    assert [o.status for o in runner.run_study(study(text), copied).outcomes] == ["finished"] * 2
    assert tiny.files(copied) == before
    # And what is new is run beside what is old, in one table.
    arms = {**tiny.ARMS, "tanh": {"model.feedforward": "tanh"}}
    found = runner.run_study(study(text, arms=arms), copied)
    assert [o.status for o in found.outcomes] == ["finished"] * 3
    codes = [records.read_environment(o.folder)[0]["code"] for o in found.outcomes]
    assert codes[2] == "other" not in codes[:2]
    assert {p: b for p, b in tiny.files(copied).items() if p in before} == before


def test_code_that_computes_something_else_runs_everything(
    text: Path, copied: Path, under_other_code: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before, old = tiny.files(copied), read(study(text), copied).outcomes
    under_other_code(other_gain)
    assert [o.status for o in read(study(text), copied, now=True).outcomes] == ["missing"] * 2
    # Whoever only reports sees them, as long as one code made them all.
    assert [o.metric for o in read(study(text), copied).outcomes] == [o.metric for o in old]
    new = runner.run_study(study(text), copied).outcomes
    assert [o.status for o in new] == ["finished"] * 2
    assert [o.folder.name for o in new] == [f"{o.folder.name}.2" for o in old]
    assert {p: b for p, b in tiny.files(copied).items() if p in before} == before
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"{old[0].folder} stays: it differs in step, evaluation" in said
    assert [o.folder for o in read(study(text), copied).outcomes] == [o.folder for o in new]
    assert set(trained(copied).values()) == {1}
    runner.run_study(study(text), copied)
    assert set(trained(copied).values()) == {1}


def test_the_old_code_finds_its_own_runs_again(
    text: Path, copied: Path, under_other_code: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, real = read(study(text), copied).outcomes, (norm._gain, records.code_fingerprint)
    under_other_code(other_gain)
    runner.run_study(study(text), copied)
    monkeypatch.setattr(norm, "_gain", real[0])
    for module in (records, store):
        monkeypatch.setattr(module, "code_fingerprint", real[1])
    forget()
    assert [o.folder for o in runner.run_study(study(text), copied).outcomes] == [
        o.folder for o in old
    ]
    assert set(trained(copied).values()) == {1} and len(trained(copied)) == 4


def test_a_table_of_two_programs_is_refused(
    text: Path, copied: Path, under_other_code: Any
) -> None:
    """One arm was run anew, the other is as before: no table of both, by whatever code."""
    first, second = read(study(text), copied).outcomes
    under_other_code(other_gain)
    shutil.rmtree(first.folder)
    runner.run_study(study(text, arms={}), copied)
    with pytest.raises(UserError) as caught:
        read(study(text), copied)
    said = str(caught.value)
    assert f"{second.folder} (rope, seed 0) does not compute what this code does" in said
    assert "it differs in step, evaluation. Run the study again" in said and "\n" not in said


@pytest.mark.parametrize(
    "name, differs",
    [("version of jax", "version of jax"), ("held_out.", "held_out."), ("first batch", "first")],
)
def test_other_packages_data_or_batches_are_another_run(
    name: str, differs: str, text: Path, copied: Path, under_other_code: Any
) -> None:
    old = read(study(text), copied).outcomes
    file = old[0].folder / store.COMPUTES
    told = json.loads(file.read_text(encoding="utf-8"))
    key = next(k for k in told["facts"] if k.startswith(name))
    told["facts"][key] = "another"
    file.write_text(json.dumps(told))
    under_other_code()
    (found,) = store.other_computations(old[0].cell, copied).values()
    assert found == [key] and key.startswith(differs)
    new = runner.run_study(study(text), copied).outcomes
    assert [o.folder == was.folder for o, was in zip(new, old, strict=True)] == [False, True]


def test_what_cannot_be_lowered_here_is_told(
    text: Path, copied: Path, under_other_code: Any
) -> None:
    (o, _) = read(study(text), copied).outcomes
    under_other_code()
    path = o.folder / "environment.json"
    path.write_text(path.read_text().replace('"backend": "cpu"', '"backend": "gpu"'))
    with pytest.raises(UserError, match="by other code on 1 devices of gpu, and here are 1 of cpu"):
        runner.run_study(study(text), copied)


def test_names_and_places_are_no_part_of_a_program() -> None:
    def one(x: jax.Array) -> dict[str, jax.Array]:
        @jax.jit
        def helper(y: jax.Array) -> jax.Array:
            return jnp.where(y > 0, y, 0.1 * y)

        return {"a": helper(x), "b": jnp.sort(x)}

    def two(values: jax.Array) -> dict[str, jax.Array]:
        # The same.

        @jax.jit
        def other(of: jax.Array) -> jax.Array:
            positive = of > 0
            return jnp.where(positive, of, 0.1 * of)

        return {"c": other(values), "d": jnp.sort(values)}

    def three(x: jax.Array) -> dict[str, jax.Array]:
        return {"a": jnp.where(x > 0, x, 0.2 * x), "b": jnp.sort(x)}

    texts = [jax.jit(f).lower(jnp.ones(4)).as_text() for f in (one, two, three)]
    assert texts[0] != texts[1]
    assert store.nameless(texts[0]) == store.nameless(texts[1]) != store.nameless(texts[2])


# --- what older versions recorded -------------------------------------------------------------


def older(version: str, arms: Any = tiny.ARMS) -> Study:
    words = tuple(tiny.overrides(RUNS / version / "store", **KNOBS))
    return Study("?", tiny.RECIPE, arms, seeds=1, overrides=words)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_study_of_an_older_version_stays_valid(version: str, tmp_path: Path) -> None:
    """Its folders have the names that its own code gave them; nothing runs, all is read."""
    copied = Path(shutil.copytree(RUNS / version / "cells", tmp_path / "cells"))
    before = tiny.files(copied)
    for found in (runner.run_study(older(version), copied), read(older(version), copied)):
        for o in found.outcomes:
            last = records.read_metrics(o.folder)[-1]
            assert (o.status, o.metric) == ("finished", last["val_loss"])
    assert tiny.files(copied) == before


@pytest.mark.parametrize("version", VERSIONS)
def test_to_runs_that_did_not_tell_what_they_compute_none_is_added(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(RUNS / version / "cells", tmp_path / "cells"))
    more = older(version, {**tiny.ARMS, "alibi": {"model.position": "alibi"}})
    with pytest.raises(UserError, match="another code, .* did not record what it computes"):
        runner.run_study(more, copied)
    assert set(trained(copied).values()) == {1} and len(trained(copied)) == 2


def test_the_address_of_a_cell_knows_no_knob_that_is_off(text: Path) -> None:
    (cell,) = cells(study(text, arms={}), {})
    assert cell.address == address(cell.config)
    m = dataclasses.replace(cell.config.model, qk_norm=True)
    assert address(dataclasses.replace(cell.config, model=m)) != cell.address


# --- what must not stop the others ------------------------------------------------------------


def test_a_cell_that_needs_more_memory_than_there_is_fails_alone_and_comes_last(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2^47 bytes of feed-forward, more than a process can address: XLA's own error."""
    huge = {"model.ff_dim": 2**30, "model.layers": 2**12, "model.scan_layers": True}
    small = {"model.ff_dim": 16, "model.layers": 1}
    large = study(text, arms={"small": small}, settings=huge)
    one = "[1/2] base, seed 0"
    other = "[2/2] small, seed 0"
    for expected in ([one, other], [other, one]):  # what failed comes after what is missing
        with pytest.raises(runner.Failed) as caught:
            runner.run_study(large, tmp_path)
        said = str(caught.value)
        assert "1 cells could not run; the first, base, seed 0: out of memory (" in said
        assert "lower data.batch_size" in said and "\n" not in said
        begun = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
        assert begun == expected
        base, small = read(large, tmp_path).outcomes
        assert (base.status, small.status) == ("failed", "finished")
        shutil.rmtree(small.folder)


def test_a_cell_in_which_another_trains_is_waited_for(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `train` in its folder, which the study finds finished when that has ended."""
    one = study(text, arms={})
    (cell,) = cells(one, {})
    naps: list[float] = []
    with Checkpoints(tmp_path / cell.address / "checkpoints", keep=1) as held:

        def nap(seconds: float) -> None:
            naps.append(seconds)
            held.__exit__(None, None, None)

        monkeypatch.setattr(runner.time, "sleep", nap)
        (o,) = runner.run_study(one, tmp_path).outcomes
    assert (o.status, len(naps)) == ("finished", 1)
