"""What a step minimises and what it trains are rows of tables, which the step only reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import model, objectives, setup, sharding, state
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, ConfigError
from gptjax.data.batches import Batch
from gptjax.layers.feedforward import FEEDFORWARD, Branch
from gptjax.objectives import OBJECTIVE, Objective, Totals
from gptjax.optim import OPTIMIZERS
from gptjax.trainable import TRAINABLE, trainable
from tests import tiny

V, B, T = 64, 8, 16


def configure(**train: Any) -> Config:
    optim = {k: train.pop(k) for k in list(train) if hasattr(tiny.BASE.optim, k)}
    shape = {k: train.pop(k) for k in list(train) if hasattr(tiny.BASE.model, k)}
    return dataclasses.replace(
        tiny.BASE,
        model=tiny.model(vocab_size=V, context=T, **shape),
        optim=tiny.optim(**({"warmup_steps": 0, "clip": None, "peak_lr": 1e-2} | optim)),
        data=tiny.data(batch_size=B),
        train=tiny.train(steps=10, **train),
    )


def rows(seed: int = 0, micros: int = 1) -> Batch[jax.Array]:
    rng = np.random.default_rng(seed)
    shape = (B // micros, micros, T)
    tokens, targets = (rng.integers(V, size=shape).astype(np.int32) for _ in range(2))
    weights = (rng.random(shape) < 0.8).astype(np.float32)
    return Batch(tokens, targets, weights)


def train(config: Config, steps: int = 3) -> tuple[state.TrainState, dict[str, float]]:
    now = state.create(config)
    for i in range(steps):
        now, metrics = state.make_train_step(config)(now, rows(i, config.train.accumulation))
    return now, metrics


def leaves(tree: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(part.key for part in path): np.asarray(leaf) for path, leaf in pairs}


# --- objectives -------------------------------------------------------------------------------


def small_logits(config: Config, params: Any, batch: Any, key: Any) -> Totals:
    """A planted row: the mean square of the logits of the scored tokens' rows."""
    logits_BTV = model.apply(config.model, params, batch.tokens)
    each_B = jnp.square(logits_BTV).mean((1, 2))
    return Totals(each_B.sum(), {"loss": each_B.sum(), "largest": each_B.max()}, 1.0 * len(each_B))


@pytest.mark.parametrize("micros", [1, 4])
def test_the_step_differentiates_whatever_row_it_is_given(micros, monkeypatch):
    row = Objective(lambda batch: jnp.float32(batch.tokens[..., 0].size), small_logits)
    monkeypatch.setitem(OBJECTIVE, "small_logits", row)
    config = configure(objective="small_logits", accumulation=micros)
    start = model.init(config.model, config.seed)
    batch = rows(0, micros)
    tokens = batch.tokens.reshape(B, T)
    mean = lambda p: jnp.square(model.apply(config.model, p, tokens)).mean()  # noqa: E731
    wanted, slope = jax.value_and_grad(mean)(start)
    now, metrics = state.make_train_step(config)(state.create(config), batch)
    assert float(metrics["loss"]) == pytest.approx(float(wanted), rel=1e-5)
    assert metrics["tokens"] == B and "largest" in metrics and "z" not in metrics
    # AdamW's first moment after one step is (1 - b1) times the gradient.
    moment = jax.tree.map(lambda m: m / (1 - config.optim.b1), now.opt_state[0].mu)
    for path, value in leaves(moment).items():
        atol = 1e-5 * np.abs(leaves(slope)[path]).max() + 1e-9
        np.testing.assert_allclose(value, leaves(slope)[path], rtol=0, atol=atol)


@pytest.mark.parametrize("scan", [False, True])
def test_the_losses_of_layers_are_minimised_and_told(scan, monkeypatch):
    """A planted branch that adds a loss of its own, whose gradient is known."""
    plain = FEEDFORWARD["gelu"]

    def with_loss(module: Any, c: Any, x_BTD: Any, tap: Any) -> Any:
        tap.loss("input", 0.5 * jnp.square(x_BTD).mean())
        return plain.apply(module, c, x_BTD, tap)

    monkeypatch.setitem(FEEDFORWARD, "with_loss", Branch(with_loss, plain.width))
    config, without = configure(feedforward="with_loss", scan_layers=scan), configure()
    params, batch = model.init(config.model, 0), jax.tree.map(lambda x: x[:, 0], rows())

    def both(config: Config) -> Any:
        def objective(p: Any) -> Any:
            totals = OBJECTIVE["next_token"].totals(config, p, batch, None)
            return totals.objective, totals

        return jax.jit(jax.grad(objective, has_aux=True))(params)

    listen = ("feedforward_in",)
    heard = jax.jit(lambda p: model.hidden(config.model, p, batch.tokens, listen=listen).heard)(
        params
    )
    x_LBTD = heard.pop("feedforward_in")
    each_L = jnp.square(x_LBTD).mean((1, 2, 3)) / 2
    np.testing.assert_allclose(heard.pop("loss/input"), each_L, rtol=2e-6)  # sums of 2,048 terms
    assert not heard
    (slope, totals), (plain_slope, plain_totals) = both(config), both(without)
    added = totals.metrics["loss/input"]
    assert float(added) == pytest.approx(float(totals.weight * each_L.sum()), rel=1e-5)
    assert float(totals.objective - plain_totals.objective) == pytest.approx(float(added), rel=1e-4)
    # d/dg of the mean of (g x)^2 / 2 over all channels: mean(x^2) / D of each channel's gain. What
    # layers before did to it is normalised away.
    gain = lambda tree: tree["blocks"]["feedforward_norm_in"]["scale"]  # noqa: E731
    wanted = totals.weight * jnp.square(x_LBTD).mean((1, 2)) / x_LBTD.shape[-1]
    difference = gain(slope) - gain(plain_slope)
    np.testing.assert_allclose(difference, wanted, rtol=0, atol=2e-3 * float(wanted.max()))


def test_an_unknown_objective_is_refused_with_the_rows():
    with pytest.raises(ConfigError, match=r"train.objective='next' is not one of: next_token"):
        setup.check_names(configure(objective="next"))


# --- what is trained --------------------------------------------------------------------------

FROZEN = ("embed/*", "blocks/attention/*")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_frozen_stays_and_what_is_not_moves(optimizer):
    schedule = "constant" if optimizer == "schedule_free" else "cosine"
    config = configure(trainable="unfrozen", frozen=FROZEN, optimizer=optimizer, schedule=schedule)
    now, _ = train(config)
    before = leaves(model.init(config.model, config.seed))
    after = leaves(state.evaluation_params(config, now))
    assert after.keys() == before.keys()
    for path in before:
        frozen = path.startswith(("embed/", "blocks/attention/"))
        assert (after[path] == before[path]).all() == frozen, path
    # Nor does the optimiser hold anything of its size.
    held = sum(x.size for x in jax.tree.leaves(now.opt_state))
    trained = sum(x.size for x in jax.tree.leaves(now.params))
    assert held <= 2 * trained + 8
    assert trained + sum(x.size for x in jax.tree.leaves(now.frozen)) == sum(
        x.size for x in before.values()
    )


def test_the_first_update_of_what_is_trained_is_that_of_training_all():
    some, every = configure(trainable="unfrozen", frozen=FROZEN), configure()
    ours, theirs = leaves(train(some, 1)[0].params), leaves(train(every, 1)[0].params)
    assert 0 < len(ours) < len(theirs)
    moved = leaves(model.init(every.model, every.seed))
    for path, value in ours.items():
        # Adam's first step is the gradient's sign times the rate: rounding shows where it is 0.
        np.testing.assert_allclose(value, theirs[path], rtol=0, atol=1e-5)
        assert np.abs(theirs[path] - moved[path]).max() > 1e-3


def test_all_is_the_model_itself():
    config = configure(ema_decay=0.9)
    row = trainable(config)
    params = model.init(config.model, 0)
    assert row.split(params) == (params, None) and row.realise(params, None) is params
    assert row.specs == model.abstract_params(config.model)


def test_an_average_is_of_what_is_trained_and_is_evaluated_with_the_rest():
    config = configure(trainable="unfrozen", frozen=FROZEN, ema_decay=0.5)
    now, _ = train(config, 2)
    whole = leaves(state.evaluation_params(config, now))
    average = leaves(now.ema)
    assert average.keys() == leaves(now.params).keys()
    assert all((whole[path] == average[path]).all() for path in average)
    assert whole.keys() == leaves(model.init(config.model, 0)).keys()


def test_a_frozen_state_is_saved_and_restored_on_a_mesh_bit_for_bit(tmp_path):
    config = configure(trainable="unfrozen", frozen=FROZEN)
    with jax.set_mesh(tiny.mesh(data=2, fsdp=2, tensor=2)):
        batch = rows()
        placed = sharding.place(lambda a, b: jax.tree.map(lambda x: x[a:b], batch), B, "BAT")
        now, metrics = state.make_train_step(config)(state.create(config), placed)
        with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
            checkpoints.save(1, now, {}, wait=True)
            again = checkpoints.restore(1, state.abstract(config))
    assert jax.tree.structure(again) == jax.tree.structure(now)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(now), strict=True):
        np.testing.assert_array_equal(a, b)
    alone = train(config, 1)[1]
    assert float(metrics["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-6)


@pytest.mark.parametrize(
    "train, message",
    [
        ({"trainable": "al"}, "train.trainable='al' is not one of: all, unfrozen"),
        ({"frozen": ("embed/*",)}, "train.frozen names parameters, but train.trainable='all'"),
        ({"trainable": "unfrozen"}, "train.frozen: must match some, and not all"),
        ({"trainable": "unfrozen", "frozen": ("*",)}, "must match some, and not all"),
        (
            {"trainable": "unfrozen", "frozen": ("embed/*", "block/*")},
            "'block/\\*' matches none of the parameters: blocks/attention/key, ",
        ),
    ],
)
def test_patterns_that_do_not_fit_are_refused(train, message):
    with pytest.raises(ConfigError, match=message):
        setup.check_names(configure(**train))


def test_every_row_of_trainable_has_the_seams(monkeypatch):
    """A row that trains other leaves than the model's: scales of the output matrices."""

    def scales(config: Config) -> Any:
        everything = TRAINABLE["all"](config)
        spec = everything.specs["blocks"]["attention"]["out"]
        one = dataclasses.replace(spec, shape=(config.model.layers,), dims="L", mean=1.0, std=0.0,
                                  role="gain", fan_in="", stacks="L")  # fmt: skip
        split = lambda params: ({"scale": jnp.ones(config.model.layers)}, params)  # noqa: E731

        def realise(trained: Any, params: Any) -> Any:
            attention = params["blocks"]["attention"]
            out = attention["out"] * trained["scale"][:, None, None, None]
            blocks = params["blocks"] | {"attention": attention | {"out": out}}
            return params | {"blocks": blocks}

        return everything._replace(specs={"scale": one}, split=split, realise=realise)

    monkeypatch.setitem(TRAINABLE, "scales", scales)
    config = configure(trainable="scales", weight_decay=0.0)
    now, metrics = train(config, 1)
    assert leaves(now.params).keys() == {"scale"}
    first = train(configure(), 1)[1]
    assert float(metrics["loss"]) == pytest.approx(float(first["loss"]), rel=1e-6)
    assert (np.abs(np.asarray(now.params["scale"]) - 1) > 1e-3).all()


def test_the_tables_name_what_the_recipe_says():
    assert tiny.BASE.train.objective in objectives.OBJECTIVE
    assert tiny.BASE.train.trainable in TRAINABLE
