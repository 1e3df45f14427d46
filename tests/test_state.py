"""The training step: the same on every mesh, exact in what it skips, averages and keeps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import model, optim, sharding, state
from gptjax.config import Config, Mesh
from gptjax.data.batches import Batch
from gptjax.model import REMAT
from gptjax.optim import OPTIMIZERS
from tests import tiny

V, T, ROWS = 64, 16, 16


def configure(**changes) -> Config:
    """A tiny config; `changes` are fields of the model, the optimiser or the training."""
    sections = {
        "model": {
            "vocab_size": V, "context": T, "layers": 2, "width": 32, "heads": 8, "kv_heads": 4,
            "ff_dim": 64, "bias": False,
        },
        "optim": {
            "peak_lr": 1e-2, "warmup_steps": 4, "ema_decay": 0.9, "z_loss": 1e-3,
            "loss_vocab_chunk": 24,
        },
        "data": {"batch_size": ROWS},
        "train": {"steps": 20},
    }  # fmt: skip
    config = tiny.BASE
    for section, fields in sections.items():
        part = getattr(config, section)
        own = {name: v for name, v in changes.items() if hasattr(part, name)}
        part = dataclasses.replace(part, **fields | own)
        config = dataclasses.replace(config, **{section: part})
    assert all(any(hasattr(getattr(config, s), name) for s in sections) for name in changes)
    return config


CONFIG = configure()


def on(sizes: Mesh | None):
    """Sets a mesh; None is plain jax on one device."""
    return contextlib.nullcontext() if sizes is None else jax.set_mesh(tiny.mesh_of(sizes))


def arrays(step: int, weights: np.ndarray | None = None) -> Batch[np.ndarray]:
    """(ROWS, T) of a batch: two documents a row, counting up by its own stride."""
    rng = np.random.default_rng(step)
    start, stride = rng.integers(V, size=(ROWS, 1)), rng.integers(1, 4, size=(ROWS, 1))
    text = (start + stride * np.arange(T + 1)) % V
    if weights is None:
        weights = rng.random((ROWS, T)) < 0.9
    first = rng.integers(1, T, size=(ROWS, 1))  # a second document begins here
    place = np.arange(T)
    return Batch(
        tokens=text[:, :-1].astype(np.int32),
        targets=text[:, 1:].astype(np.int32),
        weights=weights.astype(np.float32),
        segments=(place >= first).astype(np.int32),
        positions=np.where(place < first, place, place - first).astype(np.int32),
    )


def batch(config: Config, whole: Batch[np.ndarray]) -> Batch[jax.Array]:
    """The batch (B, A, T) where the current mesh wants it."""
    A = config.train.accumulation

    def rows(start: int, stop: int) -> Batch[np.ndarray]:
        return jax.tree.map(lambda x: x.reshape(-1, A, T)[start:stop], whole)

    if jax.sharding.get_mesh().empty:
        return jax.device_put(rows(0, ROWS))
    return sharding.place(rows, ROWS // A, "BAT")


def run(config: Config, sizes, steps: int):
    """The state after so many steps, and the metrics of each."""
    with on(sizes):
        now, step, metrics = state.create(config), state.make_train_step(config), []
        programs = step._cache_size()
        for i in range(steps):
            placed = batch(config, arrays(i))
            with jax.transfer_guard("disallow"):  # a step waits for nothing
                now, found = step(now, placed)
            metrics.append(found)
        assert step._cache_size() <= programs + 1  # nothing was compiled anew on the way
        return now, {name: np.array([m[name] for m in metrics]) for name in metrics[0]}


def same(a, b) -> None:
    """Bitwise equality of two trees."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), a, b)


def first_moment(now: state.TrainState):
    """After one step from zero: a tenth of the gradient as clipped."""
    return now.opt_state[1][0].mu


def alike(a, b, tolerance: float) -> None:
    """Equality of two trees up to rounding, against the largest value of each leaf."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(x).max() > 0
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(x).max())


@pytest.fixture(scope="module")
def plain():
    """20 steps on one device."""
    return run(CONFIG, None, 20)


@pytest.fixture(scope="module")
def one_step():
    """One step on one device: against what variants of a gradient are compared."""
    return run(CONFIG, None, 1)


# --- meshes ---------------------------------------------------------------------------------


def test_the_model_learns(plain):
    _, metrics = plain
    loss = metrics["loss"]
    assert loss[0] == pytest.approx(np.log(V), abs=0.05) and loss[-1] < 0.85 * loss[0]
    assert not metrics["skipped"].any()


@pytest.mark.parametrize("sizes", tiny.MESHES, ids=str)
def test_meshes_give_the_same_losses_as_one_device(sizes, plain):
    _, metrics = run(CONFIG, sizes, 20)
    # Sums in another order differ by some 1e-7 a step; the optimiser carries that along.
    np.testing.assert_allclose(metrics["loss"], plain[1]["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], plain[1]["gradient_norm"], rtol=1e-3)
    same(metrics["tokens"], plain[1]["tokens"])
    # A schedule in another program may round each of its four operations (a quotient, a cosine,
    # a product, a sum) the other way.
    rates = metrics["learning_rate"], plain[1]["learning_rate"]
    np.testing.assert_array_max_ulp(*rates, maxulp=4)


def test_the_same_mesh_twice_is_bitwise_equal():
    once, again = run(CONFIG, tiny.CUBE, 5), run(CONFIG, tiny.CUBE, 5)
    same(once, again)


def test_initial_values_are_bitwise_equal_on_all_meshes():
    whole = state.create(CONFIG).params
    for sizes in tiny.MESHES:
        with on(sizes):
            same(state.create(CONFIG).params, whole)


def test_another_seed_is_another_run():
    other = dataclasses.replace(CONFIG, seed=1)
    assert run(other, None, 1)[1]["loss"] != run(CONFIG, None, 1)[1]["loss"]


# --- the objective --------------------------------------------------------------------------


def test_metrics_are_those_of_the_model_with_documents_apart(one_step):
    whole = arrays(0)
    logits = jax.jit(functools.partial(model.apply, CONFIG.model))(
        state.create(CONFIG).params,
        whole.tokens,
        position_BT=whole.positions,
        segments_BT=whole.segments,
    )
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, whole.targets[..., None], -1)[..., 0]
    weights = whole.weights.astype(np.float64)
    (loss,), (z,), (tokens,) = (one_step[1][name] for name in ("loss", "z", "tokens"))
    # float32 sums of some 250 terms.
    assert loss == pytest.approx((weights * nll).sum() / weights.sum(), rel=1e-6)
    assert z == pytest.approx((weights * log_z**2).sum() / weights.sum(), rel=1e-6)
    assert tokens == weights.sum()


@pytest.mark.parametrize("name", ["segments", "positions"])
def test_the_loss_depends_on_the_documents(name, one_step):
    whole = arrays(0)
    whole = whole._replace(**{name: getattr(arrays(1), name)})
    _, metrics = state.make_train_step(CONFIG)(state.create(CONFIG), batch(CONFIG, whole))
    assert abs(metrics["loss"] - one_step[1]["loss"][0]) > 1e-5


@pytest.mark.parametrize("sizes", [None, tiny.CUBE], ids=str)
@pytest.mark.parametrize("scored", ["most", "unequal", "one row"])
def test_accumulation_changes_nothing(sizes, scored):
    # Row r is in micro-batch r % 4: "unequal" scores 1, 5, 11 and 16 of its tokens.
    counts = {
        "most": np.full(ROWS, 13),
        "unequal": np.array([1, 5, 11, 16])[np.arange(ROWS) % 4],
        "one row": np.where(np.arange(ROWS) == 6, T, 0),
    }[scored]
    whole = arrays(0, np.arange(T) < counts[:, None])
    found = []
    for micros in (1, 4):
        config = configure(accumulation=micros)
        with on(sizes):
            found.append(state.make_train_step(config)(state.create(config), batch(config, whole)))
    (one, one_metrics), (four, four_metrics) = found
    # Only the order of float32 sums differs.
    alike(first_moment(one), first_moment(four), 3e-6)
    for name in one_metrics:
        assert four_metrics[name] == pytest.approx(float(one_metrics[name]), rel=1e-6), name
    assert one_metrics["tokens"] == counts.sum()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_batch_without_scored_tokens_does_nothing(optimizer):
    """Neither momentum nor decay moves a parameter, and the next update is as if it had not been."""
    schedule = "constant" if optimizer == "schedule_free" else "cosine"
    config = configure(optimizer=optimizer, schedule=schedule)
    step, none = state.make_train_step(config), np.zeros((ROWS, T))
    now, _ = step(state.create(config), batch(config, arrays(0)))
    before = jax.device_get(now)
    now, metrics = step(now, batch(config, arrays(1, none)))
    assert metrics["loss"] == metrics["tokens"] == metrics["gradient_norm"] == 0
    assert metrics["skipped"] == 1 and now.step == 2
    same(now.replace(step=before.step), before)


def test_an_update_depends_on_what_weighs_more_not_on_what_all_weighs():
    """Weights of a batch that sum to less than 1 are shares of it as any are."""
    found = []
    for weight in (1.0, 2.0**-12):
        weights = weight * np.arange(ROWS * T).reshape(ROWS, T) / (ROWS * T)
        done = state.make_train_step(CONFIG)(
            state.create(CONFIG), batch(CONFIG, arrays(0, weights))
        )
        found.append(done)
        assert (float(done[1]["tokens"]) < 1) == (weight < 1)
    (one, metrics), (small, theirs) = found
    # By a power of 2, so that nothing is rounded otherwise.
    alike(first_moment(one), first_moment(small), 1e-6)
    assert theirs["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-6)


# --- variants of one function ---------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", REMAT)
def test_scanning_and_every_remat_policy_give_the_same_gradients(scan, remat, one_step):
    config = configure(scan_layers=scan, remat=remat)
    now, metrics = run(config, tiny.CUBE, 1)
    assert metrics["loss"] == pytest.approx(one_step[1]["loss"], rel=1e-6)
    alike(first_moment(now), first_moment(one_step[0]), 3e-6)


def test_bf16_computes_in_bf16_and_keeps_float32_masters(one_step):
    config = configure(dtype="bfloat16")
    now, metrics = run(config, tiny.CUBE, 1)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(now)} == {"float32", "int32"}
    assert all(value.dtype == np.float32 for value in metrics.values())
    # bf16 keeps 8 bits: 0.4% a value, which averages out in the loss.
    assert 0 < abs(metrics["loss"] - one_step[1]["loss"]) < 2e-3
    alike(first_moment(now), first_moment(one_step[0]), 0.05)
    # Only the loss and the backward pass meet float32, as they should.
    traced = jax.make_jaxpr(functools.partial(model.hidden, config.model))(
        state.abstract(config).params, arrays(0).tokens
    )
    inputs = {str(v.aval.dtype) for product in products(traced.jaxpr) for v in product.invars}
    assert inputs == {"bfloat16"}


def products(jaxpr):
    """Every matrix product in a jaxpr and in what it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_dropout_is_reproducible_fresh_each_step_and_the_same_on_every_mesh(plain):
    config = configure(dropout=0.2)
    _, once = run(config, tiny.CUBE, 3)
    _, again = run(config, tiny.CUBE, 3)
    same(once, again)
    _, alone = run(config, None, 3)
    np.testing.assert_allclose(once["loss"], alone["loss"], rtol=0, atol=1e-5)
    assert np.abs(once["loss"] - plain[1]["loss"][:3]).min() > 1e-4
    # At step 1 the same parameters and batch lose other values than at step 0.
    start = state.create(config)
    later = dataclasses.replace(jax.tree.map(jnp.copy, start), step=jnp.ones((), jnp.int32))
    losses = [
        state.make_train_step(config)(s, batch(config, arrays(0)))[1]["loss"]
        for s in (start, later)
    ]
    assert losses[0] != losses[1]


def test_only_without_dropout_do_seeds_share_a_program():
    """Another seed drops other values: with a shared step every seed would draw as seed 0."""
    start, rows = state.create(CONFIG), batch(CONFIG, arrays(0))
    losses = {}
    for dropout in (0.0, 0.2):
        configs = [dataclasses.replace(configure(dropout=dropout), seed=s) for s in (0, 1)]
        steps = [state.make_train_step(c) for c in configs]
        assert (steps[0] is steps[1]) == (dropout == 0)
        losses[dropout] = {
            float(step(jax.tree.map(jnp.copy, start), rows)[1]["loss"]) for step in steps
        }
    assert [len(found) for found in losses.values()] == [1, 2]


# --- skipping and averaging -----------------------------------------------------------------


@pytest.mark.parametrize("sizes", [None, tiny.CUBE], ids=str)
def test_a_step_without_a_finite_gradient_is_left_out_whole(sizes):
    poison = arrays(0)
    poison.targets[3, 5], poison.weights[3, 5] = V, 1  # outside the vocabulary: NaN
    with on(sizes):
        step = state.make_train_step(CONFIG)
        start = state.create(CONFIG)
        before = jax.device_get(start)
        now, metrics = step(start, batch(CONFIG, poison))
        assert metrics["skipped"] == 1 and np.isnan(metrics["loss"])
        assert now.step == 1
        same((now.params, now.opt_state, now.ema), (before.params, before.opt_state, before.ema))
        # The next update is what it would have been: same rate, same moments, same average.
        now, metrics = step(now, batch(CONFIG, arrays(0)))
        unharmed, wanted = step(state.create(CONFIG), batch(CONFIG, arrays(0)))
    assert metrics["skipped"] == 0 and now.step == 2
    same(metrics, wanted)
    same(
        (now.params, now.opt_state, now.ema),
        (unharmed.params, unharmed.opt_state, unharmed.ema),
    )


def test_an_infinite_gradient_of_a_finite_loss_is_left_out_too():
    start = state.create(CONFIG)
    # The same function with a gradient of `out` that is 1e25 times as large: its squared norm
    # overflows.
    attention = start.params["blocks"]["attention"]
    attention |= {"value": attention["value"] * 1e25, "out": attention["out"] * 1e-25}
    kept = jax.device_get(start.params)
    now, metrics = state.make_train_step(CONFIG)(start, batch(CONFIG, arrays(0)))
    assert np.isinf(metrics["gradient_norm"]) and np.isfinite(metrics["loss"])
    assert metrics["skipped"] == 1
    same(now.params, kept)


def test_the_average_is_the_debiased_exponential_one():
    now, seen = state.create(CONFIG), []
    for i in range(4):
        now, _ = state.make_train_step(CONFIG)(now, batch(CONFIG, arrays(i)))
        seen.append(jax.device_get(now.params))
    weights = 0.9 ** np.arange(3, -1, -1)
    weights /= weights.sum()
    wanted = jax.tree.map(lambda *p: sum(w * x for w, x in zip(weights, p, strict=True)), *seen)
    alike(wanted, now.ema, 1e-6)
    assert state.evaluation_params(CONFIG, now) is now.ema


def test_the_parameters_themselves_are_evaluated_where_there_is_no_average():
    now = state.create(configure(ema_decay=None))
    assert now.ema is None and state.evaluation_params(CONFIG, now) is now.params


def test_schedule_free_evaluates_its_average():
    config = configure(optimizer="schedule_free", schedule="constant", ema_decay=None)
    now = state.create(config)
    kind = optax.contrib.ScheduleFreeState
    fast = lambda part: part._replace(z=jax.tree.map(lambda z: 3 * z, part.z))  # noqa: E731
    opt_state = jax.tree.map(
        lambda part: fast(part) if isinstance(part, kind) else part,
        now.opt_state,
        is_leaf=lambda part: isinstance(part, kind),
    )
    x = state.evaluation_params(config, dataclasses.replace(now, opt_state=opt_state))
    # Defazio et al. 2024, eq. 3: the gradient is taken at y = (1 - b1) z + b1 x, so z = 3 y
    # leaves x = (1 - 3 (1 - b1)) / b1 y.
    b1 = config.optim.b1
    alike(jax.tree.map(lambda y: (1 - 3 * (1 - b1)) / b1 * y, now.params), x, 1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_logged_rate_is_the_one_applied(optimizer):
    """It is read off the count in the optimiser's state, which every row must therefore have."""
    config = configure(optimizer=optimizer, schedule="constant")
    count = state._updates(jax.eval_shape(lambda: state.create(config)).opt_state)
    assert (count.shape, count.dtype) == ((), jnp.int32)


def test_the_rate_follows_the_schedule(plain):
    rate = optim.make_schedule(CONFIG.optim, CONFIG.train.steps)
    np.testing.assert_allclose(plain[1]["learning_rate"], rate(np.arange(20)), rtol=1e-6)


# --- the machine ----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [None, tiny.CUBE], ids=str)
def test_the_state_is_donated(sizes):
    with on(sizes):
        old = state.create(CONFIG)
        now, _ = state.make_train_step(CONFIG)(old, batch(CONFIG, arrays(0)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(now))


def test_the_guard_of_these_tests_notices_a_batch_that_was_not_placed():
    start, step = state.create(CONFIG), state.make_train_step(CONFIG)
    whole = jax.tree.map(lambda x: x.reshape(ROWS, 1, T), arrays(0))
    with (
        jax.transfer_guard("disallow"),
        pytest.raises(Exception, match="Disallowed host-to-device"),
    ):
        step(start, whole)


def test_the_abstract_state_is_that_of_create():
    for sizes in (None, tiny.CUBE):
        with on(sizes):
            real, abstract = state.create(CONFIG), state.abstract(CONFIG)
        assert jax.tree.structure(real) == jax.tree.structure(abstract)
        for r, a in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
            assert (r.shape, r.dtype) == (a.shape, a.dtype)
            if sizes is not None:
                assert r.sharding.is_equivalent_to(a.sharding, r.ndim)
