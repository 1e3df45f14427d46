"""Runs that are killed, stopped, moved to another mesh or spread over processes stay the same run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import accounting, loop, model, setup, state, tokenizer
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.cli import main
from gptjax.config import Config, ConfigError, Mesh, UserError
from gptjax.data.store import StoreWriter
from gptjax.layers.feedforward import FEEDFORWARD
from gptjax.records import read_metrics
from gptjax.sharding import make_mesh
from gptjax.storage import Place
from tests import tiny
from tests.child import GPTJAX, Child, pair_of

# The only records that tell one machine's day, or one start from another.
CLOCK = ("tokens_per_second", "mfu", "compile_seconds", "program_bytes")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_store(tmp_path_factory.mktemp("text"))


def run(store: Path, workdir: Place, prelude: str = "", devices: int = 1, **knobs: Any) -> Child:
    """`gptjax train` in a process of its own, after `prelude`, which may plant a signal."""
    words = ["train", f"--config={tiny.RECIPE}", f"--workdir={workdir}"]
    code = f"{prelude}\n{GPTJAX}"
    return Child(code, *words, *tiny.overrides(store, **knobs), devices=devices).wait()


def at_step(step: int, then: str) -> str:
    """A prelude: runs `then` when the batch of `step` (0-based) is asked for."""
    return f"""
import os, signal, time
from gptjax import loop
load = loop.load_batch
def planted(setup, step):
    if step == {step}:
        {then}
    return load(setup, step)
loop.load_batch = planted
"""


SIGKILL = "os.kill(os.getpid(), signal.SIGKILL)"
SIGTERM = "os.kill(os.getpid(), signal.SIGTERM)"


def final_state(store: Path, workdir: Path, step: int = 20, **knobs: Any) -> state.TrainState:
    config = tiny.config(store, **knobs)
    with (
        jax.set_mesh(tiny.mesh()),
        Checkpoints(workdir / CHECKPOINTS) as checkpoints,
    ):
        return checkpoints.restore(step, state.abstract(setup.settle(config)))


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def timeless(workdir: Place) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(workdir)]


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps that nothing interrupts, with everything that a state can carry."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(store, folder, **KEEPS)
    assert done.returncode == 0, done.stderr
    return folder


# Dropout draws, an average of the weights, micro-batches: all must go on where they were. Each
# checkpoint stays.
KEEPS: dict[str, Any] = {
    "model__dropout": 0.1, "optim__ema_decay": 0.9, "train__accumulation": 2,
    "train__keep_every": 5,
}  # fmt: skip


@pytest.mark.parametrize("killed_at", [3, 10, 17])
def test_a_killed_run_resumes_bitwise(
    killed_at: int, store: Path, whole: Path, tmp_path: Path
) -> None:
    """Step 3: no checkpoint yet. 10: its checkpoint may be in flight. 17: between two."""
    killed = run(store, tmp_path, at_step(killed_at, SIGKILL), **KEEPS)
    assert killed.returncode == -signal.SIGKILL
    resumed = run(store, tmp_path, **KEEPS)
    assert resumed.returncode == 0, resumed.stderr
    if killed_at == 17:  # the checkpoint of step 15 may be in flight
        assert "resumed at step 1" in resumed.stderr
    assert timeless(tmp_path) == timeless(whole)
    assert bits(final_state(store, tmp_path, **KEEPS)) == bits(final_state(store, whole, **KEEPS))
    assert Checkpoints(tmp_path / CHECKPOINTS).steps() == [5, 10, 15, 20]


def test_another_seed_is_another_run(store: Path, whole: Path, tmp_path: Path) -> None:
    """So the comparison above can fail."""
    assert run(store, tmp_path, seed=1, **KEEPS).returncode == 0
    assert timeless(tmp_path) != timeless(whole)


def test_sigterm_saves_and_exits_with_a_code_of_its_own(
    store: Path, whole: Path, tmp_path: Path
) -> None:
    stopped = run(store, tmp_path, at_step(7, SIGTERM), **KEEPS)
    assert stopped.returncode == 75
    assert "stopped at step 8, saved" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    resumed = run(store, tmp_path, **KEEPS)
    assert "resumed at step 8" in resumed.stderr
    assert bits(final_state(store, tmp_path, **KEEPS)) == bits(final_state(store, whole, **KEEPS))
    assert timeless(tmp_path) == timeless(whole)
    # The first record of each start tells what compiling cost. The program holds at least the
    # parameters, AdamW's two moments and the average, of 4 bytes each.
    costs = {
        line["step"]: (line["compile_seconds"], line["program_bytes"])
        for line in read_metrics(tmp_path)
        if "compile_seconds" in line
    }
    assert costs.keys() == {1, 9}
    least = 4 * 4 * accounting.parameters(tiny.config(store).model)["total"]
    assert all(seconds > 0 and least < size < 20 * least for seconds, size in costs.values())


def test_sigterm_in_the_last_step_finishes_the_run(store: Path, tmp_path: Path) -> None:
    assert run(store, tmp_path, at_step(19, SIGTERM)).returncode == 0


def test_started_again_a_finished_run_says_so(store: Path, whole: Path) -> None:
    before = timeless(whole)
    again = run(store, whole, **KEEPS)
    assert again.returncode == 0
    assert "is done: 20 of 20 steps" in again.stderr
    assert timeless(whole) == before


def test_meta_holds_config_and_data(store: Path, whole: Path) -> None:
    meta = Checkpoints(whole / CHECKPOINTS).meta(20)
    assert meta["config"] == json.loads((whole / "config.json").read_text())
    assert meta["step"] == 20
    assert set(meta["fingerprints"]) == {"tokenizer", f"data.{store}", f"held_out.{store}"}


def test_every_step_reads_its_own_batch(store: Path, whole: Path) -> None:
    """20 steps of 8 rows of 16 tokens, of which each epoch scores every one once."""
    tokens = [line["tokens"] for line in read_metrics(whole) if "tokens" in line]
    assert len(tokens) == 20
    assert max(tokens) == 8 * 16


@pytest.fixture(scope="module")
def on_meshes(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """The same 10 steps on each mesh."""
    folders = {}
    for shape in tiny.MESHES:
        config = on(store, shape, 10)
        folders[shape] = tmp_path_factory.mktemp("mesh")
        with jax.set_mesh(tiny.mesh_of(config.mesh)):
            loop.train(config, folders[shape])
    return folders


def on(store: Path, shape: Mesh, steps: int) -> Config:
    return dataclasses.replace(tiny.config(store, train__steps=steps), mesh=shape)


@pytest.mark.parametrize("saved", tiny.MESHES, ids=str)
def test_a_run_moves_to_any_mesh(saved: Any, store: Path, on_meshes: dict[Any, Path]) -> None:
    states = []
    for shape in tiny.MESHES:
        config = on(store, shape, 10)
        with jax.set_mesh(tiny.mesh_of(config.mesh)):
            with Checkpoints(on_meshes[saved] / CHECKPOINTS) as checkpoints:
                found = checkpoints.restore(10, state.abstract(setup.settle(config)))
            tokens = found.params["embed"]["tokens"]
            assert tokens.sharding.mesh.shape == jax.sharding.get_mesh().shape
            states.append(bits(found))
    assert all(s == states[0] for s in states)


def test_meshes_train_alike(on_meshes: dict[Any, Path]) -> None:
    """Sums are taken in another order: float32 rounding over 10 steps, seen below 2e-6."""
    losses = [
        [line["loss"] for line in read_metrics(f) if "loss" in line] for f in on_meshes.values()
    ]
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=0, atol=1e-5)


def test_a_run_goes_on_on_another_mesh(
    store: Path, tmp_path: Path, on_meshes: dict[Any, Path]
) -> None:
    """Stopped on 8 x 1 x 1, finished on 2 x 2 x 2: the curve of either alone, to rounding."""
    first = run(store, tmp_path, at_step(4, SIGTERM), devices=8, train__steps=10)
    assert first.returncode == 75, first.stderr
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    second = run(store, tmp_path, devices=8, train__steps=10, **mesh)
    assert second.returncode == 0, second.stderr
    losses = [line["loss"] for line in read_metrics(tmp_path) if "loss" in line]
    alone = [line["loss"] for line in read_metrics(on_meshes[tiny.CUBE]) if "loss" in line]
    np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-5)
    record = json.loads((tmp_path / "environment.json").read_text())[-1]
    assert record["changed_knobs"]["mesh.tensor"] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("axes", [("data", "fsdp"), ("sequence", "tensor")])
def test_two_processes_train_as_one(store: Path, tmp_path: Path, axes: tuple[str, str]) -> None:
    mesh = {f"mesh__{axis}": 2 for axis in axes}
    with pair_of(store, tmp_path / "pair", train__steps=10, **mesh) as pair:
        outputs = [p.wait().stderr for p in pair]
    assert [p.returncode for p in pair] == [0, 0], outputs
    one = run(store, tmp_path / "one", devices=4, train__steps=10, **mesh)
    assert one.returncode == 0, one.stderr
    two_losses, one_losses = (
        [
            line[k]
            for line in read_metrics(tmp_path / name)
            for k in ("loss", "val_loss")
            if k in line
        ]
        for name in ("pair", "one")
    )
    # gloo sums between processes in another order than XLA within one.
    np.testing.assert_allclose(two_losses, one_losses, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_the_same_step(store: Path, tmp_path: Path) -> None:
    never = {"train__steps": 100_000, "train__eval_every": 100_000}
    metrics = tmp_path / "metrics.jsonl"
    with pair_of(store, tmp_path, train__checkpoint_every=100_000, **never) as pair:
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("\n") < 20:
            assert time.monotonic() < deadline
            assert all(p.returncode is None for p in pair), [p.stderr for p in pair]
            time.sleep(0.1)
        pair[1].signal(signal.SIGTERM)
        outputs = [p.wait().stderr for p in pair]
    assert [p.returncode for p in pair] == [75, 75], outputs
    assert "saved: run the same command" in outputs[0]
    assert Checkpoints(tmp_path / CHECKPOINTS).steps()


def test_a_diverging_run_is_told(store: Path, tmp_path: Path) -> None:
    """An absurd rate without a clip: updates that are not finite are skipped, then it ends; no later
    where it was interrupted."""
    knobs: dict[str, Any] = {"train__steps": 60, "train__checkpoint_every": 10}
    config = tiny.config(store, optim__peak_lr=1e30, optim__clip="None", **knobs)
    with jax.set_mesh(make_mesh(config.mesh)):
        with pytest.raises(loop.Diverged, match="has diverged") as whole:
            loop.train(config, tmp_path / "whole")
        loop.train(config, tmp_path / "parts", until=10)
        with pytest.raises(loop.Diverged) as parts:
            loop.train(config, tmp_path / "parts")
    assert read_metrics(tmp_path / "whole")[-1]["skipped"] == 1
    assert parts.value.step == whole.value.step < 10 + loop.MAX_SKIPPED


def test_a_batch_without_scored_tokens_is_told_and_is_no_divergence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More in a row than may have no finite gradient, and nothing has moved."""
    vocabulary = tokenizer.load("bytes")
    for split, weight in (("train", 0.0), ("val", 1.0)):
        writer = StoreWriter(tmp_path / "store" / split, vocabulary, weighted=True)
        for document in range(8):
            text = vocabulary.encode(f"document {document}")
            writer.write(np.array(text), True, np.full(len(text), weight), weight)
        writer.close()
    steps = loop.MAX_SKIPPED + 2
    told: dict[str, Any] = {"data__packing": "document", "train__steps": steps, "train__spike": 3.0}
    train(tmp_path / "store", tmp_path / "run", **told)
    lines = [line for line in read_metrics(tmp_path / "run") if "skipped" in line]
    assert [line["skipped"] for line in lines] == [1.0] * steps
    said = capsys.readouterr().err.replace("\n", " ")
    assert said.count("has nothing scored and is skipped; it read row") == steps
    config = tiny.config(tmp_path / "store", **told)
    ended = final_state(tmp_path / "store", tmp_path / "run", steps, **told)
    assert bits(ended.params) == bits(model.init(config.model, config.seed))


def test_a_skipped_batch_is_told_with_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One document's targets weigh so much that their sum leaves float32, and so the gradient."""
    vocabulary = tokenizer.load("bytes")
    for split in ("train", "val"):
        writer = StoreWriter(tmp_path / "store" / split, vocabulary, weighted=True)
        for document in range(32):
            heavy = 3e38 if (split, document) == ("train", 5) else 1.0
            text = vocabulary.encode(f"document {document:02}")
            writer.write(np.array(text), True, np.full(len(text), heavy), 1.0)
        writer.close()
    store, workdir = tmp_path / "store", tmp_path / "run"
    train(store, workdir, data__packing="document", train__steps=12)
    said = capsys.readouterr().err.replace("\n", " ")
    skipped = [line["step"] for line in read_metrics(workdir) if line.get("skipped")]
    assert (
        3 <= len(skipped) <= 4
    )  # once in each of three epochs of 32 rows, of which 12 steps read 96
    own = rf"row 5 of {store} \(document 5\)"
    told = re.findall(rf"{workdir}: step (\d+) has no finite gradient and is skipped; it read .*?{own}.*?"
                      rf"data show --workdir={workdir} --step=(\d+)", said)  # fmt: skip
    assert told == [(str(step), str(step - 1)) for step in skipped]
    assert main(["data", "show", f"--workdir={workdir}", f"--step={skipped[0] - 1}"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"{own}\n.*document 05", shown)
    # Of a batch in which all is finite nothing is said.
    assert said.count("is skipped") == len(skipped)


def train(store: Path, workdir: Path, **knobs: Any) -> None:
    config = tiny.config(store, train__checkpoint_every=2, train__eval_every=4, **knobs)
    with jax.set_mesh(tiny.mesh()):
        loop.train(config, workdir)


def test_an_extended_run_is_the_longer_run(store: Path, tmp_path: Path) -> None:
    """Bit for bit, but for what its first end logged and scored once more."""
    constant = {"optim__schedule": "constant", "train__log_every": 3}
    train(store, tmp_path / "long", train__steps=9, **constant)
    train(store, tmp_path / "run", train__steps=5, **constant)
    train(store, tmp_path / "run", train__steps=9, **constant)
    first, again = timeless(tmp_path / "long"), timeless(tmp_path / "run")
    assert [line for line in again if line["step"] != 5] == first
    assert [set(line) & {"loss", "val_loss"} for line in again if line["step"] == 5] == [
        {"loss"},
        {"val_loss"},
    ]
    assert bits(final_state(store, tmp_path / "run", 9)) == bits(
        final_state(store, tmp_path / "long", 9)
    )


def test_a_finished_cosine_goes_on_at_its_last_rate_once_its_end_is_stated(
    store: Path, tmp_path: Path
) -> None:
    train(store, tmp_path, train__steps=5)
    last = timeless(tmp_path)[-2]["learning_rate"]
    with pytest.raises(UserError, match=r"cannot go on from step 5 of 5 to 8: .*schedule_steps=5"):
        train(store, tmp_path, train__steps=8)
    train(store, tmp_path, train__steps=8, optim__schedule_steps=5)
    rates = [line["learning_rate"] for line in timeless(tmp_path) if "learning_rate" in line]
    assert len(rates) == 8 and rates[4:] == [last] * 4


def test_a_second_start_in_the_same_folder_is_refused(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first trains, which goes on undisturbed."""
    load, refused = loop.load_batch, []

    def planted(found: setup.Setup, step: int) -> Any:
        if step == 3:
            with pytest.raises(UserError, match=f"is being trained by process {os.getpid()} on"):
                loop.train(found.config, tmp_path)
            refused.append(step)
        return load(found, step)

    monkeypatch.setattr(loop, "load_batch", planted)
    train(store, tmp_path, train__steps=5)
    assert refused == [3]
    assert [line["step"] for line in timeless(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5]


def test_a_checkpoint_alone_says_what_its_run_was(tmp_path: Path) -> None:
    """Only `checkpoints/` was copied: what may not change is refused as ever, what may goes on."""
    store, rate = tiny.make_store(tmp_path), {"optim__schedule": "constant"}
    train(store, tmp_path / "run", train__steps=4, **rate)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "run" / CHECKPOINTS, moved / CHECKPOINTS)
    with pytest.raises(UserError, match=f"{moved} holds a run of another config: seed was 0, is 1"):
        train(store, moved, train__steps=6, seed=1, **rate)
    store.rename(tmp_path / "old")
    tiny.make_store(tmp_path, tiny.TEXT[::-1])
    with pytest.raises(UserError, match=f"{moved} holds a run on other data: the content of data."):
        train(store, moved, train__steps=6, **rate)
    shutil.rmtree(store)
    (tmp_path / "old").rename(store)
    assert {p.name for p in moved.iterdir()} <= {CHECKPOINTS, f"{CHECKPOINTS}.lock"}
    train(store, moved, train__steps=6, train__log_every=2, **rate)
    (record,) = json.loads((moved / "environment.json").read_text())
    assert record["resume_step"] == 4
    assert record["changed_knobs"] == {"train.steps": [4, 6], "train.log_every": [1, 2]}


def test_a_run_in_a_folder_of_any_name(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exp[1-3]* ä?\\{x}"
    train(store, folder, train__steps=4)
    assert bits(final_state(store, folder, 4))
    train(store, folder, train__steps=4)  # is done


def test_a_vocabulary_larger_than_the_models_is_refused(store: Path, tmp_path: Path) -> None:
    config = tiny.config(store, model__vocab_size=256)
    with (
        jax.set_mesh(make_mesh(config.mesh)),
        pytest.raises(ConfigError, match=r"257 tokens, more than model.vocab_size=256"),
    ):
        loop.train(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_whose_products_cannot_be_counted_trains_and_says_so(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(FEEDFORWARD, "either", tiny.UNCOUNTABLE)
    knobs = {"model__feedforward": "either", "train__steps": 3, "optim__warmup_steps": 1}
    with jax.set_mesh(tiny.mesh()):
        loop.train(tiny.config(store, **knobs), tmp_path)
    reason = "products of 'cond' in .*feedforward.* cannot be counted"
    said = capsys.readouterr().err
    assert re.search(rf"FLOPs are not counted: {reason}\n", said)
    assert re.search(rf"MFU is left out, FLOPs are not counted: {reason}\n", said)
    lines = read_metrics(tmp_path)
    assert any("tokens_per_second" in line for line in lines)
    assert not any("mfu" in line for line in lines)
    assert main(["config", f"--config={tiny.RECIPE}", *tiny.overrides(store, **knobs)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"# training: 384 tokens\n", shown)
    assert re.search(rf"# FLOPs are not counted: {reason}\n", shown)
