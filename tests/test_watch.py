"""What is watched while a run trains: right by definition, and without a trace in the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import loop, model, setup, sharding, state
from gptjax.config import Config, ConfigError
from gptjax.data.batches import Batch
from gptjax.records import read_metrics
from gptjax.watch import STATISTICS, make_watch
from tests import tiny

EVERY = tuple(STATISTICS)
CLOCK = ("tokens_per_second", "mfu", "compile_seconds", "program_bytes")


def configure(**shape: Any) -> Config:
    return dataclasses.replace(
        tiny.BASE,
        model=tiny.model(context=16, **shape),
        optim=tiny.optim(warmup_steps=0),
        data=tiny.data(batch_size=8),
        train=tiny.train(watch=EVERY),
    )


def a_batch() -> Batch[Any]:
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(64, size=(8, 1, 16)).astype(np.int32) for _ in range(2))
    segments = np.broadcast_to(np.arange(16) // 5, (8, 1, 16)).astype(np.int32)
    return Batch(tokens, targets, np.ones((8, 1, 16), np.float32), segments)


@pytest.mark.parametrize("shape", [{}, {"scan_layers": True, "attention": "block"}])
def test_statistics_by_their_definition_in_numpy(shape):
    config, batch = configure(feedforward="relu", **shape), a_batch()
    before = model.init(config.model, 0)
    params = jax.tree.map(lambda p: p + 0.01 * np.sign(p) + 0.001, before)
    # Units 3 and 5 of layer 1 are shut for every input that a layer norm can give.
    up_bias = params["blocks"]["feedforward"]["up_bias"]
    params["blocks"]["feedforward"]["up_bias"] = up_bias.at[1, jnp.array([3, 5])].set(-100)
    now = state.create(config, params)
    watched = jax.device_get(make_watch(config)(before, now, batch))

    listen = ("stream", "scores", "feedforward_hidden")
    plain = dataclasses.replace(config.model, attention="plain", scan_layers=False)
    one = jax.tree.map(lambda x: x[:, 0], batch)
    heard = jax.jit(
        lambda p: model.hidden(plain, p, one.tokens, segments_BT=one.segments, listen=listen).heard
    )(params)
    stream, scores, hidden = (np.asarray(heard[point], np.float64) for point in listen)
    for layer in range(2):
        rms = np.sqrt((stream[layer] ** 2).mean())
        assert watched[f"stream_rms/{layer:02d}"] == pytest.approx(rms, rel=1e-5)
        assert watched[f"score_max/{layer:02d}"] == pytest.approx(scores[layer].max(), rel=1e-5)
        shut = (np.abs(hidden[layer]).max((0, 1)) == 0).sum()
        assert watched[f"dead_units/{layer:02d}"] == pytest.approx(shut / 24, rel=1e-6)
    assert watched["dead_units/01"] >= 2 / 24
    # The same change of all values but those of the units that were shut.
    assert watched["update_rms/embed/tokens"] == pytest.approx(
        np.sqrt(np.square(params["embed"]["tokens"] - before["embed"]["tokens"]).mean()), rel=1e-5
    )
    parts = {name.removeprefix("update_rms/") for name in watched if name.startswith("update_rms/")}
    assert parts == {
        "embed/tokens", "embed/positions", "final_norm/scale", "final_norm/bias",
        "blocks/attention", "blocks/attention_norm_in",
        "blocks/feedforward", "blocks/feedforward_norm_in",
    }  # fmt: skip


def test_a_score_that_is_no_number_shows():
    """Among 8,192, in whose maximum XLA overlooks it, on CPUs."""
    config, batch = configure(), a_batch()
    params = model.init(config.model, 0)
    params["embed"]["tokens"] = params["embed"]["tokens"].at[batch.tokens[2, 0, 3]].set(np.nan)
    watched = make_watch(config)(params, state.create(config, params), batch)
    assert not np.isfinite(watched["score_max/00"]) and not np.isfinite(watched["score_max/01"])


@pytest.mark.parametrize("sizes", [tiny.CUBE, tiny.SEQUENCE], ids=str)
def test_a_mesh_watches_what_one_device_does(sizes):
    config, batch = configure(), a_batch()
    before = model.init(config.model, 0)
    alone = make_watch(config)(before, state.create(config, model.init(config.model, 1)), batch)
    with jax.set_mesh(tiny.mesh_of(sizes)):
        placed = sharding.place(lambda a, b: jax.tree.map(lambda x: x[a:b], batch), 8, "BAT")
        now = state.create(config, model.init(config.model, 1))
        there = make_watch(config)(model.init(config.model, 0), now, placed)
    assert alone.keys() == there.keys()
    for name, value in alone.items():
        assert float(there[name]) == pytest.approx(float(value), rel=2e-6), name


def trained(store: Path, workdir: Path, until: int | None = None, **knobs: Any) -> list[Any]:
    config = tiny.config(store, model__layers=2, train__eval_every=20, **knobs)
    with jax.set_mesh(tiny.mesh()):
        loop.train(config, workdir, until=until)
    return read_metrics(workdir)


def numbers(lines: list[Any]) -> list[Any]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def test_a_watched_run_is_the_same_run_and_goes_on(tmp_path):
    store = tiny.make_store(tmp_path)
    plain = numbers(trained(store, tmp_path / "plain"))
    knobs = {"train__watch": EVERY, "train__watch_every": 8}
    watched = numbers(trained(store, tmp_path / "watched", **knobs))
    told = [line for line in watched if "stream_rms/00" in line]
    assert [line["step"] for line in told] == [8, 16]
    assert [line for line in watched if line not in told] == plain
    assert all(line["score_max/01"] > 0 for line in told)
    # Broken off unwatched, and watched once it goes on from the checkpoint of step 10.
    trained(store, tmp_path / "later", until=11)
    later = numbers(trained(store, tmp_path / "later", **knobs))
    assert [line for line in later if "stream_rms/00" in line] == told[1:]
    assert [line for line in later if "stream_rms/00" not in line] == plain


def test_a_statistic_that_is_none_is_refused_with_the_list():
    config = configure()
    bad = dataclasses.replace(config, train=tiny.train(watch=("stream_rms", "score")))
    for refuse in (make_watch, setup.check_names):
        with pytest.raises(ConfigError, match=r"train.watch='score' is not one of: stream_rms, "):
            refuse(bad)
