"""A branch is its trunk going on, but for what it changes; what would mix two things up is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import branch, configure, loop, records, replay, setup, status
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.cli import main
from gptjax.config import Config, ConfigError, UserError, from_dict, to_dict
from gptjax.optim import make_schedule
from gptjax.records import read_metrics
from gptjax.study import equalise, results, runner, spec
from gptjax.study.store import COMPUTES
from tests import tiny
from tests.child import GPTJAX, Child
from tests.test_loop import SIGKILL, at_step, bits, final_state, timeless

# Dropout draws, an average, micro-batches: all that a state and a step can carry.
KNOBS: dict[str, Any] = {
    "model__dropout": 0.1, "optim__ema_decay": 0.9, "train__accumulation": 2, "train__steps": 12,
    "train__eval_every": 4, "train__checkpoint_every": 4, "train__keep_every": 4,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "train__eval_every": 20, "train__checkpoint_every": 4, "train__keep_every": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def store(text: Path) -> Path:
    return text


@pytest.fixture(scope="module")
def trunk(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps, of which 4, 8 and 12 are kept."""
    return go(tiny.config(store, **KNOBS), tmp_path_factory.mktemp("trunk"))


@pytest.fixture(scope="module")
def stable(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Warmup, stable, decay: 10 steps, of which the last 4 decay."""
    wsd = {"optim__schedule": "wsd", "optim__decay_fraction": 0.4, "train__steps": 10}
    return go(tiny.config(store, **PLAIN, **wsd), tmp_path_factory.mktemp("stable"))


def go(config: Config, workdir: Path) -> Path:
    with jax.set_mesh(tiny.mesh()):
        loop.train(config, workdir)
    return workdir


def of(text: str, workdir: Path, **knobs: Any) -> Config:
    """The config of `train --branch=text`, with knobs as for `tiny.overrides`."""
    words = [f"--config.{name.replace('__', '.')}={value}" for name, value in knobs.items()]
    return configure.override(branch.of_run(text, workdir), words)


def after(step: int, workdir: Path) -> list[dict[str, float]]:
    return [line for line in timeless(workdir) if line["step"] > step]


# ---- what it computes


@pytest.mark.parametrize("step", [4, 8])
def test_without_a_change_it_is_the_trunk_going_on(
    step: int, store: Path, trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(of(f"{trunk}@{step}", tmp_path), tmp_path)
    assert f"branched from {trunk} after step {step}; changed: nothing" in unwrapped(capsys)
    assert timeless(tmp_path) == after(step, trunk) != []
    ours, theirs = (bits(final_state(store, w, 12, **KNOBS)) for w in (tmp_path, trunk))
    assert ours == theirs
    saved = Checkpoints(tmp_path / CHECKPOINTS).steps()
    assert saved == [s for s in (8, 12) if s > step]


def unwrapped(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.replace("\n", " ")


def test_another_end_of_the_schedule_has_the_rates_of_its_formula(
    trunk: Path, tmp_path: Path
) -> None:
    config = of(f"{trunk}@8", tmp_path, train__steps=15, optim__schedule_steps=14)
    go(config, tmp_path)
    rates = [line["learning_rate"] for line in timeless(tmp_path) if "learning_rate" in line]
    schedule = jax.jit(make_schedule(config.optim, 15))
    assert rates == [float(schedule(np.int32(count))) for count in range(8, 15)]
    of_trunk = [line["learning_rate"] for line in after(8, trunk) if "learning_rate" in line]
    assert rates[: len(of_trunk)] != of_trunk


def test_a_decay_is_put_off_as_if_the_run_had_always_been_that_long(
    store: Path, stable: Path, tmp_path: Path
) -> None:
    """What warmup-stable-decay is for: up to step 4 both schedules have the same rates."""
    longer = go(of(f"{stable}@4", tmp_path / "branch", train__steps=16), tmp_path / "branch")
    wsd = {"optim__schedule": "wsd", "optim__decay_fraction": 0.4, "train__steps": 16}
    alone = go(tiny.config(store, **PLAIN, **wsd), tmp_path / "alone")
    assert timeless(longer) == after(4, alone)
    assert bits(final_state(store, longer, 16, **wsd)) == bits(final_state(store, alone, 16, **wsd))
    assert after(4, stable)[0] == timeless(longer)[0] and after(6, stable)[0] != after(6, longer)[0]


def test_numbers_of_the_optimiser_and_the_mixture_may_change(
    store: Path, stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more").mkdir()
    more = tiny.make_store(tmp_path / "more", "a second text, of other letters.\n" * 40)
    knobs = {"optim__peak_lr": 1e-4, "optim__b2": 0.9, "data__sources": f"('{store}', '{more}')"}
    workdir = tmp_path / "branch"
    config = of(f"{stable}@4", workdir, data__weights="(1.0, 1.0)", **knobs)
    go(config, workdir)
    said = unwrapped(capsys)
    assert "optim.peak_lr 0.001 -> 0.0001" in said and "optim.b2 0.95 -> 0.9" in said
    assert "some that its trunk has read may come again" in said
    assert [line["step"] for line in timeless(workdir) if "loss" in line] == [*range(5, 11)]
    # The rows of step 5 are those of a run that has had the mixture from its beginning.
    with jax.set_mesh(tiny.mesh()):
        alone = dataclasses.replace(config, train=dataclasses.replace(config.train, branch=None))
        tokens = setup.load_batch(setup.set_up(alone), 4).tokens
        assert np.array_equal(tokens, setup.load_batch(setup.set_up(config), 4).tokens)


# ---- how it goes on


def test_killed_or_stopped_it_goes_on_bitwise(store: Path, trunk: Path, tmp_path: Path) -> None:
    """By the same command: before its first checkpoint, where it begins anew, and behind it."""
    words = ["train", f"--branch={trunk}@4", f"--workdir={tmp_path}"]
    for step, number in ((6, SIGKILL), (9, "os.kill(os.getpid(), signal.SIGTERM)")):
        done = Child(f"{at_step(step, number)}\n{GPTJAX}", *words).wait()
        assert done.returncode == (-signal.SIGKILL if step == 6 else 75), done.stderr
        assert status.statuses(tmp_path)[0].saved == (4 if step == 6 else 10)
    done = Child(GPTJAX, *words).wait()
    assert done.returncode == 0 and "resumed at step 10" in done.stderr, done.stderr
    assert timeless(tmp_path) == after(4, trunk)
    ours, theirs = (bits(final_state(store, w, 12, **KNOBS)) for w in (tmp_path, trunk))
    assert ours == theirs
    assert [record["resume_step"] for record in records.read_environment(tmp_path)] == [
        *(None, None, 10)
    ]


def test_its_lineage_is_recorded(trunk: Path, tmp_path: Path) -> None:
    go(of(str(trunk), tmp_path, train__steps=13), tmp_path)
    (record,) = records.read_environment(tmp_path)
    manifest = (trunk / CHECKPOINTS / "00000012" / "manifest.json").read_bytes()
    assert record["branch"] == {
        "folder": str(trunk),
        "step": 12,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "config": json.loads((trunk / "config.json").read_text()),
    }
    assert "branch" not in records.read_environment(trunk)[0]
    config = from_dict(json.loads((tmp_path / "config.json").read_text()))
    digits = record["branch"]["manifest_sha256"][:16]
    assert config.train.branch == f"{trunk}@12#{digits}" and branch.first_step(config) == 12


def test_it_outlives_its_trunk_once_it_has_saved(
    store: Path, stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And "latest" stays the step that it was when the branch began."""
    trunk, workdir = Path(shutil.copytree(stable, tmp_path / "trunk")), tmp_path / "branch"
    load = loop.load_batch

    def planted(found: setup.Setup, step: int) -> Any:
        if step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return load(found, step)

    with monkeypatch.context() as patch, pytest.raises(loop.Stopped):
        patch.setattr(loop, "load_batch", planted)
        go(of(f"{trunk}@latest", workdir, train__steps=14), workdir)
    go(
        tiny.config(store, **PLAIN, optim__schedule="constant", train__steps=4),
        trunk.with_name("x"),
    )
    shutil.rmtree(trunk)
    again = of(f"{trunk}@latest", workdir, train__steps=14)
    assert branch.first_step(again) == 10
    go(again, workdir)
    assert [line["step"] for line in timeless(workdir) if "loss" in line] == [11, 12, 13, 14]
    with pytest.raises(UserError, match=r"no complete checkpoint of step 10 in .*trunk"):
        replay.replay_run(workdir)


def test_a_branch_recurs_and_so_does_a_branch_of_it(stable: Path, tmp_path: Path) -> None:
    first = go(of(f"{stable}@4", tmp_path / "first", seed=3), tmp_path / "first")
    second = go(of(f"{first}@8", tmp_path / "second"), tmp_path / "second")
    assert timeless(second) == after(8, first)
    for workdir in (first, second):
        record = replay.replay_run(workdir)
        assert record["bitwise"] and record["numbers"] > 10, record


@pytest.mark.parametrize("spelling", ["trunk", "./trunk/", "link", "gone"])
def test_a_branch_goes_on_however_its_trunk_is_spelt(
    spelling: str, stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shell's completion, or a whole path, has it; also once the trunk has gone."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stable, tmp_path / "trunk")
    (tmp_path / "link").symlink_to("trunk")
    whole = ["train", f"--branch={tmp_path}/trunk@8", "--workdir=branch", "--config.train.steps=9"]
    assert main(whole) == 0
    if spelling == "gone":
        (tmp_path / "trunk").rename(tmp_path / "moved")
    spelling = {"gone": "trunk"}.get(spelling, spelling)
    assert main(["train", f"--branch={spelling}@8", *whole[2:]]) == 0
    last = records.read_environment(tmp_path / "branch")[-1]
    assert last["resume_step"] == 9 and last["changed_knobs"] == {}


# ---- what is refused


def test_another_trunk_is_another_run(stable: Path, tmp_path: Path) -> None:
    workdir = go(of(f"{stable}@4", tmp_path, train__steps=6), tmp_path)
    before = timeless(workdir)
    for text, steps in ((f"{stable}@8", 10), (f"{stable}@10", 12)):
        with pytest.raises(UserError, match=r"another config: .*train.branch was '.*@4#") as caught:
            go(of(text, workdir, train__steps=steps), workdir)
        assert "\n" not in str(caught.value)
    assert timeless(workdir) == before


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"optim__optimizer": "lion"}, r"another architecture: opt_state.* in this run"),
        ({"model__layers": 2}, r"another architecture: .* in this run"),
        ({"model__context": 32}, r"another architecture: .*embed.positions"),
        ({"train__steps": 8}, r"train.steps=8 leaves nothing to train after step 8 of"),
    ],
)
def test_another_state_is_refused_and_leaves_no_run(
    knobs: dict[str, Any], message: str, stable: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        go(of(f"{stable}@8", tmp_path, **knobs), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "metrics.jsonl").exists()


def test_another_tokenizer_is_refused(
    stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a vocabulary of the same size, under which every id would mean something else."""
    config = of(f"{stable}@8", tmp_path)
    prints = {"tokenizer": "another", f"data.{config.data.sources[0]}": "?"}
    with pytest.raises(UserError, match="was trained with another tokenizer than this run reads"):
        branch.begin(config, prints)


def test_a_source_of_other_content_is_refused(stable: Path, tmp_path: Path) -> None:
    config = of(f"{stable}@8", tmp_path)
    own = Checkpoints(stable / CHECKPOINTS).meta(8)["fingerprints"]
    name = f"data.{config.data.sources[0]}"
    with pytest.raises(UserError, match=r"another data\..*store than this run reads"):
        branch.begin(config, own | {name: "other"})
    with jax.set_mesh(tiny.mesh()):
        branch.begin(config, own | {"data.another": "other"})


def test_a_trunk_that_was_trained_anew_is_refused(
    store: Path, stable: Path, tmp_path: Path
) -> None:
    trunk = Path(shutil.copytree(stable, tmp_path / "trunk"))
    config = of(f"{trunk}@4", tmp_path / "branch")
    shutil.rmtree(trunk)
    go(tiny.config(store, **PLAIN, train__steps=5, seed=9), trunk)
    with pytest.raises(
        UserError, match=r"is not the one that this run branches from: its manifest"
    ):
        go(config, tmp_path / "branch")


def test_a_flipped_bit_of_the_trunk_is_refused(stable: Path, tmp_path: Path) -> None:
    trunk = Path(shutil.copytree(stable, tmp_path / "trunk"))
    step = trunk / CHECKPOINTS / "00000004"
    file = max(
        (f for f in (step / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="00000004 is damaged: .* was altered"):
        go(of(f"{trunk}@4", tmp_path / "branch"), tmp_path / "branch")


@pytest.mark.parametrize(
    "named, message",
    [
        ("{trunk}@5", r"no complete checkpoint of step 5 in .*; steps: 4, 8, 10"),
        ("{trunk}@", r"trunk@ holds no complete checkpoint to branch from"),
        ("{trunk}@-4", r"holds no complete checkpoint to branch from"),
        ("{trunk}@last", r"holds no complete checkpoint to branch from"),
        ("nowhere@4", r"no complete checkpoint of step 4 in .*nowhere.*; steps: none"),
        ("nowhere", r"nowhere holds no complete checkpoint to branch from"),
        ("", r"train.branch='' names no run: write RUN@STEP"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_told(
    named: str, message: str, stable: Path, tmp_path: Path
) -> None:
    (tmp_path / "trunk").symlink_to(stable)
    with pytest.raises(UserError, match=message) as caught:
        branch.of_run(named.format(trunk=tmp_path / "trunk"), tmp_path / "branch")
    assert "\n" not in str(caught.value)


def test_a_config_that_does_not_say_which_bytes_is_refused(store: Path, tmp_path: Path) -> None:
    config = tiny.config(store, train__branch="runs/trunk@4")
    with pytest.raises(ConfigError, match="does not say which bytes are meant"):
        go(config, tmp_path)


def test_the_command_takes_the_trunks_config_alone(
    stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", f"--branch={stable}@8"]
    for more in ([], [f"--workdir={tmp_path}", "--config=configs/base.py"],
                 [f"--workdir={tmp_path}", f"--from={stable}"]):  # fmt: skip
        assert main([*words, *more]) == 2
        assert "give --workdir and knobs" in capsys.readouterr().err
    done = main([*words, f"--workdir={tmp_path}", "--config.train.steps=9"])
    assert done == 0 and "the " in capsys.readouterr().out  # the trunk's own prompt
    assert [line["step"] for line in timeless(tmp_path) if "loss" in line] == [9]


def test_a_recipe_may_name_its_trunk(store: Path, stable: Path, tmp_path: Path) -> None:
    words = [*tiny.overrides(store, train__steps=9), f"--config.train.branch={stable}@8"]
    line = ["train", f"--config={tiny.RECIPE}", f"--workdir={tmp_path}", *words]
    assert main(line) == 0
    assert [line["step"] for line in timeless(tmp_path) if "loss" in line] == [9]
    assert main(line) == 0  # is done


# ---- studies


def study(store: Path, trunk: Path, **fields: Any) -> spec.Study:
    knobs: dict[str, object] = {**PLAIN, "train__steps": 10}
    shared = {"train.branch": f"{trunk}@8", "optim.schedule": "constant"}
    arms = {"slow": {"optim.peak_lr": 1e-4}}
    return tiny.study(store, arms, knobs, settings=shared, seeds=1, **fields)


def test_arms_start_from_a_shared_trunk(store: Path, stable: Path, tmp_path: Path) -> None:
    trunk = Path(shutil.copytree(stable, tmp_path / "trunk"))
    cells = tmp_path / "cells"
    done = runner.run_study(study(store, trunk), cells)
    base, slow = done.outcomes
    digits = Checkpoints(trunk / CHECKPOINTS).fingerprint(8)[:16]
    for o in (base, slow):
        assert o.status == "finished" and o.folder.name == o.cell.address
        assert [line["step"] for line in read_metrics(o.folder) if "loss" in line] == [9, 10]
        assert json.loads((o.folder / COMPUTES).read_text())["facts"]["initial values"] == digits
        assert equalise.tokens(o.cell.config) == 2 * 8 * 16  # the two steps of its own
    first = [read_metrics(o.folder)[0]["loss"] for o in (base, slow)]
    assert first[0] == first[1]  # the same state, the same batch
    assert base.metric != slow.metric
    # The trunk spelt otherwise: the same cells.
    (tmp_path / "link").symlink_to(trunk)
    again = results.read(study(store, tmp_path / "link"), cells)
    assert [o.status for o in again.outcomes] == ["finished", "finished"]
    # Another trunk in the same place: other cells, and the old ones in no table with them.
    shutil.rmtree(trunk)
    go(tiny.config(store, **PLAIN, train__steps=9, seed=9), trunk)
    again = results.read(study(store, trunk), cells)
    assert [o.status for o in again.outcomes] == ["missing", "missing"]
    assert not {o.cell.address for o in again.outcomes} & {base.cell.address, slow.cell.address}


def test_equal_budgets_are_those_of_the_steps_behind_the_trunk(store: Path, stable: Path) -> None:
    """Twice the rows: half of the 8 steps that are left, not of 16."""
    knobs: dict[str, object] = {**PLAIN, "train__steps": 16}
    arms = {"rows": {"data.batch_size": 16}}
    shared = {"train.branch": f"{stable}@8"}
    found = spec.cells(tiny.study(store, arms, knobs, settings=shared, seeds=1), {})
    assert [cell.config.train.steps for cell in found] == [16, 12]


def test_knobs_round_trip(store: Path) -> None:
    config = tiny.config(store, train__branch="runs/a@b@400#0123456789abcdef", train__steps=500)
    assert from_dict(to_dict(config)) == config
    assert branch.of(config) == (Path("runs/a@b"), 400, "0123456789abcdef")
    assert branch.resolve(config) == config
