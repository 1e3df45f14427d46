"""Optimisers, schedules, masks and averages against closed forms, and on meshes."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config import ConfigError, Optim
from gptjax.layers.parameter import Spec
from gptjax.optim import (
    DECAY_MASKS,
    OPTIMIZERS,
    SCHEDULES,
    ema_update,
    evaluation_params,
    make_optimizer,
    make_schedule,
    state_specs,
)
from gptjax.sharding import parameter_spec
from tests import tiny

SIZES = {"L": 3, "D": 32, "N": 4, "H": 8, "F": 64, "V": 48}
DIMS = {
    "embed": {"tokens": "VD"},
    "blocks": {
        "attention": {"query": "LDNH", "out": "LNHD", "query_bias": "LNH"},
        "feedforward": {"up": "LDF", "down": "LFD", "up_bias": "LF"},
        "value_own": "L",
    },
    "final_norm": {"scale": "D"},
    "unembed": {"kernel": "DV"},
}
# What a layer declares of each: its role, its fan-in.
DECLARED = {
    "VD": ("embedding", "D"),
    "PD": ("position", "D"),
    "DV": ("unembedding", "D"),
    "LDNH": ("matrix", "D"),
    "LDKH": ("matrix", "D"),
    "LNHD": ("residual", "NH"),
    "LDF": ("matrix", "D"),
    "LFD": ("residual", "F"),
    "LNH": ("bias", ""),
    "LF": ("bias", ""),
    "LH": ("gain", ""),
    "LD": ("gain", ""),
    "L": ("gain", ""),
    "D": ("gain", ""),
}


def spec(dims: str) -> Spec:
    shape = tuple(SIZES.get(letter, 1) for letter in dims)
    return Spec(shape, dims, 0.0, 0.0, *DECLARED[dims], "L" if dims[0] == "L" else "")


SPECS = jax.tree.map(spec, DIMS)


def config(**changes) -> Optim:
    """Bare: a constant rate of 0.1, no warmup, decay or clipping."""
    bare = {"peak_lr": 0.1, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    return tiny.optim(**bare | {"clip": None} | changes)


def draw(seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda d: rng.normal(size=[SIZES[letter] for letter in d]).astype(np.float32), DIMS
    )


FEW = {"": SPECS, "blocks": SPECS["blocks"], "up": {"up": spec("LDF")}}


@functools.cache
def compiled(optim: Optim, part: str):
    optimizer = make_optimizer(optim, 100, FEW[part])

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(optimizer.init), step


def run(optim: Optim, params, gradients, part: str = ""):
    """Parameters and state after one update for each of the gradients."""
    init, step = compiled(optim, part)
    state = init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


def assert_close(got, expected, tolerance):
    def one(g, e):
        np.testing.assert_allclose(g, e, rtol=tolerance, atol=tolerance * np.abs(e).max())

    jax.tree.map(one, got, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_quadratic_decreases(name):
    target = draw(0)
    optimizer = make_optimizer(config(optimizer=name, peak_lr=0.05, clip=1.0), 100, SPECS)

    def distance(params):
        squares = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, target)
        return jax.tree.reduce(jnp.add, squares)

    @jax.jit
    def descend(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(distance)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, 100)
        return jax.tree.map(
            lambda p, t: jnp.mean((p - t) ** 2), evaluation_params(state, params), target
        )

    # Every parameter starts at a mean square of about 1 (three numbers at least).
    start = jax.tree.map(np.zeros_like, target)
    before = jax.tree.map(lambda t: np.mean(t**2), target)
    after = descend(start)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(before), strict=True
    ):
        assert a < 0.3 * b, (path, a, b)


def test_two_steps_of_adamw_by_hand():
    o = config(weight_decay=0.5, schedule="linear", final_lr_fraction=0.0)
    p, g1, g2 = (draw(seed)["blocks"]["feedforward"]["up"] for seed in range(3))
    got, _ = run(o, {"up": p}, [{"up": g1}, {"up": g2}], "up")
    p = p - 0.1 * (g1 / (np.abs(g1) + 1e-8) + 0.5 * p)
    m = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)
    v = (0.95 * 0.05 * g1**2 + 0.05 * g2**2) / (1 - 0.95**2)
    p = p - 0.1 * (98 / 99) * (m / (np.sqrt(v) + 1e-8) + 0.5 * p)
    # float32 second moments: 1 - b2 alone is rounded to 1e-6.
    np.testing.assert_allclose(got["up"], p, atol=1e-6)


def test_two_steps_of_lion_by_hand():
    o = config(optimizer="lion", weight_decay=0.5)
    p, g1, g2 = (draw(seed)["blocks"]["feedforward"]["up"] for seed in range(3))
    got, _ = run(o, {"up": p}, [{"up": g1}, {"up": g2}], "up")
    p = p - 0.1 * (np.sign(g1) + 0.5 * p)
    p = p - 0.1 * (np.sign(0.9 * 0.05 * g1 + 0.1 * g2) + 0.5 * p)
    np.testing.assert_allclose(got["up"], p, atol=1e-6)


def test_schedule_free_is_the_papers_recursion():
    o = config(optimizer="schedule_free", weight_decay=0.5, warmup_steps=3)
    p, *gs = (draw(seed)["blocks"]["feedforward"]["up"] for seed in range(4))
    got, state = run(o, {"up": p}, [{"up": g} for g in gs], "up")
    x = y = z = p.astype(np.float64)
    v, total = 0.0, 0.0
    for t, g in enumerate(gs):
        rate = 0.1 * (t + 1) / 4
        v = 0.95 * v + 0.05 * g**2
        z = z - rate * (g / (np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-8) + 0.5 * y)
        total += rate**2
        x = x + rate**2 / total * (z - x)
        y = 0.9 * x + 0.1 * z
    np.testing.assert_allclose(got["up"], y, atol=1e-6)
    np.testing.assert_allclose(evaluation_params(state, got)["up"], x, atol=1e-6)
    assert np.abs(x - y).max() > 1e-3


def test_other_optimisers_evaluate_at_their_parameters():
    params, state = run(config(), draw(0), [draw(1)])
    assert evaluation_params(state, params) is params


def test_muon_orthogonalises_each_layer_and_has_the_rms_of_adam():
    params, grads = draw(0), draw(1)
    got, _ = run(config(optimizer="muon"), params, [grads])
    update = jax.tree.map(lambda new, old: (new - old) / -0.1, got, params)["blocks"]
    for part, name, rows, columns in (
        ("attention", "query", 32, 32),
        ("attention", "out", 32, 32),
        ("feedforward", "up", 32, 64),
        ("feedforward", "down", 64, 32),
    ):
        matrices = np.asarray(update[part][name]).reshape(3, rows, columns)
        matrices = matrices / (0.2 * math.sqrt(max(rows, columns)))
        singular = np.linalg.svd(matrices, compute_uv=False)
        assert singular.max() < 1.25, (name, singular)
        # Five steps do not finish the few values that start near 0 (square matrices).
        assert np.quantile(singular, 0.1) > 0.6, (name, singular)
        # The direction is that of U V^T: their inner product is the sum of singular values.
        gradient = grads["blocks"][part][name].reshape(3, rows, columns)
        U, _, Vt = np.linalg.svd(gradient, full_matrices=False)
        cosine = np.sum(matrices * (U @ Vt), (1, 2)) / singular.sum(1)
        np.testing.assert_allclose(cosine, 1, atol=2e-2, err_msg=name)
    # The rest is Adam's first step, the sign of the gradient.
    embed = (np.asarray(got["embed"]["tokens"]) - params["embed"]["tokens"]) / -0.1
    np.testing.assert_allclose(embed, np.sign(grads["embed"]["tokens"]), atol=1e-5)


def orthogonal(matrix):
    """Newton-Schulz by Jordan's code, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


def test_muons_momentum_and_how_far_it_is_from_jordans():
    """The docstring's formula, to float32 through five iterations, and its figures."""
    specs = {"up": Spec((32, 64), "DF", 0.0, 0.0, "matrix", "D")}
    optimizer, beta = make_optimizer(config(optimizer="muon", peak_lr=1.0), 100, specs), 0.95
    params, m, apart = {"up": jnp.zeros((32, 64))}, np.zeros((32, 64)), {}
    state = optimizer.init(params)
    for t in range(1, 41):
        g = np.random.default_rng(t).normal(size=(32, 64)).astype(np.float32)
        update, state = optimizer.update({"up": g}, state, params)
        m = beta * m + (1 - beta) * g
        corrected = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        size = 0.2 * math.sqrt(64)
        np.testing.assert_allclose(update["up"], -size * orthogonal(corrected), atol=3e-6)
        jordans = -size * orthogonal(beta * m + (1 - beta) * g)
        apart[t] = np.linalg.norm(update["up"] - jordans) / np.linalg.norm(jordans)
    assert apart[1] < 1e-5  # a factor alone
    assert [round(apart[t], 3) for t in (6, 20, 40)] == pytest.approx([0.05, 0.01, 0.003], rel=0.2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layers_update_does_not_depend_on_the_other_layers(name):
    o = config(optimizer=name, weight_decay=0.1)
    p, *gs = (draw(seed)["blocks"] for seed in range(3))
    gs = [
        jax.tree.map(lambda g: g * np.float32([1, 10, 100]).reshape(3, *[1] * (g.ndim - 1)), t)
        for t in gs
    ]
    together, _ = run(o, p, gs, "blocks")
    alone = [
        run(o, *jax.tree.map(lambda a, i=i: a[i : i + 1], (p, gs)), "blocks")[0] for i in range(3)
    ]
    alone = jax.tree.map(lambda *layers: np.concatenate(layers), *alone)
    # The same arithmetic, in a batched product for Muon.
    assert_close(together, alone, 1e-6)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_an_experts_update_is_that_of_a_matrix_alone(name):
    o, sizes = config(optimizer=name), {"L": 1, "E": 2, "D": 32, "F": 64}

    def updated(dims: str, stacks: str, params, grads):
        shape = tuple(sizes[letter] for letter in dims)
        specs = {"up": Spec(shape, dims, 0.0, 0.0, "matrix", "D", stacks)}
        optimizer = make_optimizer(o, 100, specs)
        params, grads = {"up": params.reshape(shape)}, {"up": grads.reshape(shape)}
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return updates["up"]

    rng = np.random.default_rng(0)
    params, grads = rng.normal(size=(2, 1, 2, 32, 64)).astype(np.float32)
    grads *= np.float32([1, 100])[:, None, None]
    together = updated("LEDF", "LE", params, grads)
    alone = [updated("LDF", "L", params[:, i], grads[:, i]) for i in range(2)]
    # The same arithmetic in other programs: roundings of float32, for Muon of batched products.
    np.testing.assert_allclose(together, np.stack(alone, 1), atol=1e-6)


@pytest.mark.parametrize(
    "name, mask",
    [(name, "no_embedding") for name in OPTIMIZERS] + [("adamw", mask) for mask in DECAY_MASKS],
)
def test_decay_is_decoupled_and_masked(name, mask):
    params = draw(0)
    zeros = jax.tree.map(np.zeros_like, params)
    got, _ = run(config(optimizer=name, weight_decay=0.5, decay_mask=mask), params, [zeros])
    decays = jax.tree.map(DECAY_MASKS[mask], SPECS)
    expected = jax.tree.map(lambda p, d: p * (1 - 0.1 * 0.5) if d else p, params, decays)
    # Schedule-free puts y together from x and z.
    assert_close(got, expected, 3e-7)


@pytest.mark.parametrize(
    "mask, decaying",
    [
        ("matrices", ["VD", "PD", "DV", "LDNH", "LDKH", "LNHD", "LDF", "LFD"]),
        ("no_embedding", ["LDNH", "LDKH", "LNHD", "LDF", "LFD"]),
        ("all", list(DECLARED)),
    ],
)
def test_masks_literally(mask, decaying):
    assert [dims for dims in DECLARED if DECAY_MASKS[mask](spec(dims))] == decaying


def test_clip_scales_all_gradients_by_the_global_norm():
    params, grads = draw(0), draw(1)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    for clip in (1.0, 2 * norm):
        _, state = run(config(clip=clip), params, [grads])
        expected = jax.tree.map(lambda g, clip=clip: 0.1 * g * min(1, clip / norm), grads)
        assert_close(optax.tree.get(state, "mu"), expected, 1e-6)


SCHEDULE_VALUES = {
    # 11 updates, warmup 2, final 0.2, decay_fraction 0.4: peak at 2, last update is 10.
    "constant": [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "linear": [1 / 3, 2 / 3, *(1 - 0.1 * i for i in range(9))],
    "cosine": [1 / 3, 2 / 3, *(0.2 + 0.4 * (1 + math.cos(math.pi * i / 8)) for i in range(9))],
    "wsd": [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_in_closed_form(name):
    o = config(
        schedule=name, warmup_steps=2, final_lr_fraction=0.2, decay_fraction=0.4, peak_lr=3.0
    )
    rate = make_schedule(o, 11)
    got = np.array([rate(step) for step in range(11)])
    np.testing.assert_allclose(got, 3 * np.array(SCHEDULE_VALUES[name]), rtol=3e-7)
    np.testing.assert_array_equal(jax.jit(jax.vmap(rate))(jnp.arange(11)).shape, (11,))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_end_at_their_final_rate(name):
    """Whatever is accepted, as long as the end of the warmup, the peak, is not the end of all."""
    lengths = [(s, w, f) for s in (1, 2, 5, 8) for w in range(s) for f in (0.01, 0.5, 0.7, 1)]
    for steps, warmup, fraction in [*lengths, (1000, 100, 0.2), (1000, 500, 0.5)]:
        o = config(schedule=name, warmup_steps=warmup, decay_fraction=fraction)
        if name == "wsd" and warmup + max(1, round(fraction * steps)) > steps:
            continue  # refused
        rates = np.array(make_schedule(o, steps)(np.arange(steps)) + np.zeros(steps))
        peak = steps - 1 == warmup or name == "constant"
        told = steps, warmup, fraction
        assert rates[-1] == pytest.approx(0.1 if peak else 0.01, rel=1e-6), told
        assert rates[warmup] == pytest.approx(0.1, rel=1e-6), told
        if name == "wsd":
            decay = max(1, round(fraction * steps))
            below = decay - (warmup + decay == steps)
            assert (rates[warmup:] < 0.0999).sum() == below, told


def test_a_wsd_whose_warmup_meets_its_decay_ends_at_its_final_rate():
    o = config(schedule="wsd", warmup_steps=5, decay_fraction=0.5, peak_lr=1.0)
    rates = [float(make_schedule(o, 10)(step)) for step in range(10)]
    warmup = [(step + 1) / 6 for step in range(5)]
    assert rates == pytest.approx([*warmup, 1, 0.775, 0.55, 0.325, 0.1], rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_may_end_before_the_run(name):
    """Then the rate stays; a longer run has the rates of the shorter, and its last ever after."""
    o = config(schedule=name, warmup_steps=2, decay_fraction=0.4)
    ended = dataclasses.replace(o, schedule_steps=11)
    short, long = make_schedule(o, 11)(np.arange(11)), make_schedule(ended, 30)(np.arange(30))
    np.testing.assert_array_equal(np.broadcast_to(long, 30)[:11], short)
    np.testing.assert_array_equal(np.broadcast_to(long, 30)[11:], np.broadcast_to(short, 11)[-1])
    with pytest.raises(ConfigError, match="never ends in a run of optim.schedule_steps=2: .* 1$"):
        make_schedule(dataclasses.replace(ended, schedule_steps=2), 30)


def test_impossible_optimisers_are_told():
    with pytest.raises(ConfigError, match="warmup_steps=10 never ends .* at most 9"):
        make_schedule(config(warmup_steps=10), 10)
    with pytest.raises(ConfigError, match="overlap in a run of 10 steps"):
        make_schedule(config(schedule="wsd", warmup_steps=6, decay_fraction=0.5), 10)
    with pytest.raises(ConfigError, match="b1 above 0"):
        make_optimizer(config(optimizer="schedule_free", b1=0.0), 10, SPECS)
    for knob in ("optimizer", "schedule", "decay_mask"):
        with pytest.raises(ConfigError, match=f"optim.{knob}='nope' is not one of: "):
            make_optimizer(config(**{knob: "nope"}), 10, SPECS)


@pytest.mark.parametrize("shape", [tiny.CUBE, tiny.TENSOR], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meshes_agree_with_no_mesh(name, shape):
    o = config(optimizer=name, weight_decay=0.1, clip=1.0)
    params, *grads = (draw(seed) for seed in range(3))
    expected = run(o, params, grads)

    def place(tree):
        return jax.tree.map(lambda a, d: jax.device_put(a, parameter_spec(d)), tree, DIMS)

    with jax.set_mesh(tiny.mesh_of(shape)):
        placed = place(params)
        optimizer = make_optimizer(o, 100, SPECS)
        born = jax.jit(optimizer.init)(placed)
        got = run(o, placed, [place(g) for g in grads])
        # Born and updated alike, so that the step compiles once and donates.
        assert jax.tree.map(jax.typeof, born) == jax.tree.map(jax.typeof, got[1])
        for tree, dims in ((got[0], DIMS), *moments(got[1])):
            jax.tree.map(lambda a, d: check(a, parameter_spec(d)), tree, dims)
    # Newton-Schulz amplifies the rounding of small singular values.
    assert_close(got, expected, 3e-6 if name == "muon" else 1e-6)


def check(array, spec):
    if not isinstance(array, optax.MaskedNode):
        assert jax.typeof(array).sharding.spec == spec


def moments(state):
    """The parts of a state that are shaped like parameters, with their dims."""
    found = []
    for name in ("mu", "nu", "z"):
        for _, tree in optax.tree.get_all_with_path(state, name):
            masked = jax.tree.map(
                lambda d, a: a if isinstance(a, optax.MaskedNode) else d,
                DIMS,
                tree,
                is_leaf=lambda a: isinstance(a, (str, optax.MaskedNode)),
            )
            found.append((tree, masked))
    return found


def test_specs_tell_a_moment_from_a_factor_of_the_same_name():
    params = draw(0)
    optimizer = make_optimizer(config(optimizer="adafactor"), 100, SPECS)
    specs = state_specs(jax.eval_shape(optimizer.init, params), SPECS)
    (_, single), (_, stacked) = optax.tree.get_all_with_path(specs, "v")
    assert stacked["blocks"]["feedforward"]["up_bias"] == parameter_spec("LF")
    assert stacked["blocks"]["feedforward"]["up"] == jax.P()  # factored: a stub of shape (L, 1)
    assert single["final_norm"]["scale"] == parameter_spec("D")


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_ema_is_the_debiased_weighted_mean(decay):
    history = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    ema = {"p": jnp.ones(7)}  # of no consequence
    for step, value in enumerate(history):
        ema = ema_update(ema, {"p": value}, decay, step)
        weights = decay ** np.arange(step, -1, -1.0)
        expected = (weights[:, None] * history[: step + 1]).sum(0) / weights.sum()
        np.testing.assert_allclose(ema["p"], expected, rtol=1e-6, atol=1e-6)
