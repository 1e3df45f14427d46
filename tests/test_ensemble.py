"""Runs that train together are the runs that each would be alone, in the same folders."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import ensemble, loop, records, setup, state
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, UserError, to_dict
from gptjax.data.batches import Batch
from gptjax.optim import OPTIMIZERS
from gptjax.records import read_metrics
from gptjax.sharding import make_mesh
from tests import tiny
from tests.child import Child

ONE = jax.devices()[:1]
CLOCK = ("tokens_per_second", "mfu", "compile_seconds", "program_bytes")
# Without biases: softmax knows no bias of the keys, whose gradient is rounding alone, and rows that
# follow its sign (lion) or norm its size (adafactor) walk it at random.
SMALL: dict[str, Any] = {"model__layers": 1, "model__bias": False, "optim__peak_lr": 1e-3}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_store(tmp_path_factory.mktemp("text"))


def timeless(workdir: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(workdir)]


def bits(workdir: Path, config: Config, step: int) -> list[bytes]:
    """The state saved at a step."""
    with jax.set_mesh(tiny.mesh()), Checkpoints(workdir / "checkpoints") as saved:
        found = saved.restore(step, state.abstract(setup.settle(config)))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found)]


# --- the step ---------------------------------------------------------------------------------


def batches(config: Config, step: int) -> Batch[np.ndarray]:
    """(B, A, T) of random tokens, a function of seed and step as real ones are."""
    rng = np.random.default_rng((config.seed, step))
    shape = (config.data.batch_size, 1, config.model.context)
    tokens = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32) // 8
    return Batch(tokens, np.roll(tokens, 1, -1), np.ones(shape, np.float32))


def alone(config: Config, steps: int) -> tuple[list[float], Any]:
    """The loss of each step of one run on one device, and its last state."""
    step = state.make_train_step(config)
    now, losses = state.create(config), []
    for i in range(steps):
        now, metrics = step(now, batches(config, i))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(now)


def together(configs: Sequence[Config], steps: int, devices: int) -> tuple[np.ndarray, Any]:
    """The losses (members, steps) of a group on so many devices, and its last states."""
    split = ensemble.over_members(tiny.devices()[:devices])

    def stack(trees: Sequence[Any]) -> Any:
        return jax.device_put(jax.tree.map(lambda *x: np.stack(x), *trees), split)

    step = ensemble.make_step(configs[0], split)
    now, losses = stack([state.create(c) for c in configs]), []
    knobs = jax.device_put(ensemble.stack_knobs(configs), split)
    for i in range(steps):
        now, metrics = step(now, stack([batches(c, i) for c in configs]), knobs)
        losses.append(metrics["loss"])
    return np.stack(losses, 1), now


def settled(store: Path, **knobs: Any) -> Config:
    config = tiny.config(store, **{**SMALL, "train__steps": 50, **knobs})
    with jax.set_mesh(tiny.mesh()):
        return setup.settle(config)


# Two numbers beside the seed that the optimiser reads.
NUMBERS: dict[str, dict[str, float]] = {
    "adamw": {"optim__peak_lr": 2e-3, "optim__b2": 0.97},
    "lion": {"optim__peak_lr": 3e-4, "optim__weight_decay": 0.5},
    "adafactor": {"optim__peak_lr": 2e-3, "optim__final_lr_fraction": 0.5},
    "muon": {"optim__peak_lr": 2e-3, "optim__momentum": 0.8},
    "schedule_free": {"optim__b1": 0.8, "optim__eps": 1e-6},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_member_trains_as_alone(optimizer: str, store: Path) -> None:
    """50 steps over three devices: one differs in the seed, one in the seed and two numbers.

    Sums are taken in another order, and 1 - b2 is float32 where alone it is exact.
    """
    base = settled(store, optim__optimizer=optimizer)
    configs = [
        base,
        dataclasses.replace(base, seed=1),
        settled(store, optim__optimizer=optimizer, **NUMBERS[optimizer], seed=1),
    ]
    losses, states = together(configs, 50, devices=3)
    for r, config in enumerate(configs):
        wanted, last = alone(config, 50)
        np.testing.assert_allclose(losses[r], wanted, rtol=0, atol=1e-5)
        for name in ("params", "opt_state"):
            for mine, leaf in zip(
                jax.tree.leaves(getattr(states, name)),
                jax.tree.leaves(getattr(last, name)),
                strict=True,
            ):
                np.testing.assert_allclose(mine[r], leaf, rtol=1e-5, atol=1e-5)


def test_dropout_and_initial_scale_follow_the_member(store: Path) -> None:
    configs = [
        settled(store, model__dropout=0.1, seed=seed, model__init_scale=scale)
        for seed, scale in ((0, 1.0), (3, 2.0))
    ]
    losses, _ = together(configs, 3, devices=1)
    for r, config in enumerate(configs):
        np.testing.assert_allclose(losses[r], alone(config, 3)[0], rtol=0, atol=1e-5)


def test_eight_devices_at_once_train_as_one_in_turn(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerators do it, and as one CPU does."""
    configs = [settled(store, seed=seed) for seed in range(8)]
    one, _ = together(configs, 5, devices=1)
    monkeypatch.setattr(ensemble, "_in_turn", lambda step, ways: jax.vmap(step))
    jax.clear_caches()
    eight, states = together(configs, 5, devices=8)
    np.testing.assert_allclose(eight, one, rtol=0, atol=1e-6)
    assert len(set(eight[:, -1])) == 8
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(states)} == {8}


# --- folders ----------------------------------------------------------------------------------

STEPS = 30


def members(store: Path, **second: Any) -> list[Config]:
    """Three, of which `second` sets the second's numbers."""
    knobs = {
        **SMALL,
        "train__steps": STEPS,
        "train__keep_checkpoints": 1,
        "train__keep_every": 10,
        "optim__clip": "None",
    }
    return [
        tiny.config(store, **{**knobs, "seed": 5 + r, **(second if r == 1 else {})})
        for r in range(3)
    ]


def folders(parent: Path) -> list[Path]:
    return [parent / f"run{r}" for r in range(3)]


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A group of three healthy members that nothing interrupts."""
    found = folders(tmp_path_factory.mktemp("whole"))
    assert ensemble.train_together(members(store, optim__peak_lr=2e-3), found, ONE) == [
        None,
        None,
        None,
    ]
    return found


def names(workdir: Path) -> set[str]:
    """What lies in a run's folder and in its last checkpoint."""
    last = workdir / "checkpoints" / f"{STEPS:08d}"
    return {str(f.relative_to(workdir)) for f in (*workdir.iterdir(), *last.iterdir())}


def test_a_members_folder_is_that_of_a_run_alone(
    store: Path, whole: list[Path], tmp_path: Path
) -> None:
    config = members(store, optim__peak_lr=2e-3)[1]
    with jax.set_mesh(make_mesh(config.mesh, ONE)):
        loop.train(config, tmp_path / "alone")
    mine, other = read_metrics(whole[1]), read_metrics(tmp_path / "alone")
    assert [line.keys() for line in mine] == [line.keys() for line in other]
    for name in ("loss", "val_loss", "learning_rate", "tokens", "skipped"):
        found, wanted = ([line[name] for line in lines if name in line] for lines in (mine, other))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert json.loads((whole[1] / "config.json").read_text()) == to_dict(config)
    ours, theirs = (names(w) for w in (whole[1], tmp_path / "alone"))
    assert Checkpoints(whole[1] / "checkpoints").steps() == [10, 20, 25, 30]  # the latest two, too
    assert ours == theirs | {"ensemble.json"}
    (record,), (wanted,) = (records.read_environment(w) for w in (whole[1], tmp_path / "alone"))
    assert record["fingerprints"] == wanted["fingerprints"]
    # And goes for one: started again alone it is done.
    with jax.set_mesh(make_mesh(config.mesh, ONE)):
        assert loop.train(config, whole[1]) is None


def test_a_folder_tells_its_group(store: Path, whole: list[Path]) -> None:
    assert ensemble.group_of(whole[2]) == (members(store, optim__peak_lr=2e-3), 2)
    with pytest.raises(UserError, match="no run that was trained with others"):
        ensemble.group_of(whole[2].parent)


def test_a_member_that_diverges_harms_no_other(
    store: Path, whole: list[Path], tmp_path: Path
) -> None:
    """Its folder says so; the others are bit for bit what they are beside a healthy one."""
    configs, found = members(store, optim__peak_lr=1e30), folders(tmp_path)
    outcomes = ensemble.train_together(configs, found, ONE)
    told = json.loads((found[1] / "diverged.json").read_text())
    assert outcomes == [None, told, None]
    assert "20 updates in a row" in told["reason"]
    last = read_metrics(found[1])[-1]
    assert last["step"] == told["step"] < STEPS and last["skipped"] == 1
    for r in (0, 2):
        assert timeless(found[r]) == timeless(whole[r])
        assert bits(found[r], configs[r], STEPS) == bits(whole[r], configs[r], STEPS)
    assert ensemble.train_together(configs, found, ONE) == outcomes  # and again


def test_a_group_of_which_none_is_left_ends(store: Path, tmp_path: Path) -> None:
    config = members(store, optim__peak_lr=1e30)[1]
    (told,) = ensemble.train_together([config], [tmp_path], ONE)
    assert told is not None
    with jax.set_mesh(make_mesh(config.mesh, ONE)), pytest.raises(loop.Diverged) as error:
        loop.train(config, tmp_path / "alone")
    assert (error.value.step, error.value.reason) == (told["step"], told["reason"])


KILLED = """
import os, signal, sys
import jax
from pathlib import Path
from gptjax import checkpoint, ensemble
from tests import test_ensemble as t
save = checkpoint.Checkpoints.save
def planted(self, step, *rest, **knobs):
    if step == 20 and "run1" in str(self._folder):
        t.SAVED_FIRST.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, step, *rest, **knobs)
    if step == 20:
        t.SAVED_FIRST = self
checkpoint.Checkpoints.save = planted
ensemble.train_together(t.members(Path(sys.argv[1]), optim__peak_lr=2e-3), t.folders(Path(sys.argv[2])), t.ONE)
"""
SAVED_FIRST: Any = None


def test_a_killed_group_resumes_bitwise(store: Path, whole: list[Path], tmp_path: Path) -> None:
    """Killed when the first member had saved step 20, and the second had not."""
    killed = Child(KILLED, store, tmp_path, devices=len(jax.devices())).wait()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    configs, found = members(store, optim__peak_lr=2e-3), folders(tmp_path)
    latest = [Checkpoints(f / "checkpoints").latest() for f in found]
    assert latest == [20, 15, 15]
    assert ensemble.train_together(configs, found, ONE) == [None, None, None]
    for r, config in enumerate(configs):
        assert records.read_environment(found[r])[-1]["resume_step"] == 15
        assert timeless(found[r]) == timeless(whole[r])
        assert bits(found[r], config, STEPS) == bits(whole[r], config, STEPS)


def test_stopped_a_group_saves_all_and_goes_on(
    store: Path, whole: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a member's count of skipped updates goes on too: it diverges where it would have."""
    configs, found = members(store, optim__peak_lr=1e30), folders(tmp_path)
    read = ensemble.read_rows

    def planted(setup: setup.Setup, step: int, *rows: int) -> Any:
        if step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(setup, step, *rows)

    monkeypatch.setattr(ensemble, "read_rows", planted)
    with pytest.raises(loop.Stopped):
        ensemble.train_together(configs, found, ONE)
    monkeypatch.undo()
    assert [Checkpoints(f / "checkpoints").latest() for f in found] == [12, 12, 12]
    skipped = [line["step"] for line in read_metrics(found[1]) if line.get("skipped")]
    told = ensemble.train_together(configs, found, ONE)[1]
    assert told is not None and told["step"] == skipped[0] + loop.MAX_SKIPPED - 1
    assert timeless(found[0]) == timeless(whole[0])


# --- refusals ---------------------------------------------------------------------------------


def test_keys_are_equal_where_runs_go_together(store: Path) -> None:
    base = tiny.config(store)
    for name in ensemble.VARIED:
        other = tiny.config(store, **{name.replace(".", "__"): 1 if name == "seed" else 0.5})
        assert other != base and ensemble.key(other) == ensemble.key(base)
        ensemble.check_together([base, other])
    split = [tiny.config(store, mesh__tensor=2, seed=seed) for seed in range(2)]
    wider = tiny.config(store, model__width=32)
    assert len({ensemble.key(c) for c in (base, wider, *split)}) == 4


@pytest.mark.parametrize(
    "first, second, message",
    [
        ({}, {"model__width": 32}, r"differ in model.width \(16 and 32\) cannot train together"),
        ({}, {"optim__optimizer": "lion"}, r"differ in optim.optimizer \('adamw' and 'lion'\)"),
        ({"mesh__fsdp": 2}, {"mesh__fsdp": 2}, "mesh.fsdp=2 splits a model over devices"),
    ],
)
def test_runs_of_other_shapes_are_refused(
    first: Any, second: Any, message: str, store: Path, tmp_path: Path
) -> None:
    configs = [tiny.config(store, **first), tiny.config(store, seed=1, **second)]
    with pytest.raises(UserError, match=message):
        ensemble.train_together(configs, [tmp_path / "a", tmp_path / "b"])
    assert not list(tmp_path.iterdir())


def test_folders_of_other_runs_are_refused(store: Path, whole: list[Path], tmp_path: Path) -> None:
    configs = members(store, optim__peak_lr=2e-3)
    with pytest.raises(UserError, match="a run of another group, member 0 of 3"):
        ensemble.train_together(configs[:2], [whole[0], tmp_path], ONE)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(configs[0])))
    with pytest.raises(UserError, match="holds a run begun alone"):
        ensemble.train_together(configs[:1], [tmp_path], ONE)


def test_members_draw_by_all_32_bits_of_their_seeds() -> None:
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    config = tiny.config(Path("unused"))
    knobs = ensemble.stack_knobs([dataclasses.replace(config, seed=seed) for seed in seeds])
    drawn = jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed)))(knobs["seed"])
    alone = [jax.random.key_data(jax.random.key(seed)) for seed in seeds]
    np.testing.assert_array_equal(drawn, alone)
    assert len({tuple(key) for key in np.asarray(drawn).tolist()}) == len(seeds)
