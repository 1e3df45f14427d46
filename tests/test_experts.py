"""A mixture of experts against a loop over tokens in float64, over meshes, and what it costs."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from gptjax import accounting, loop, sharding, state
from gptjax import model as gpt
from gptjax.config import ConfigError, Model
from gptjax.data.batches import Batch
from gptjax.decode import cast, generate
from gptjax.layers.context import Tap
from gptjax.layers.experts import _rank
from gptjax.layers.feedforward import FEEDFORWARD, FeedForward, hidden_width
from gptjax.optim import DECAY_MASKS, make_optimizer
from tests import tiny

ROWS = [name for name, row in FEEDFORWARD.items() if row.experts]
B, T = 8, 8
MODEL = tiny.model(
    context=T, vocab_size=32, feedforward="swiglu_experts", experts=8, experts_per_token=2
)


def model(**changes: Any) -> Model:
    return dataclasses.replace(MODEL, **changes)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_params(c: Model, seed: int = 0) -> Any:
    """Each path's own, so that models that share a path share its value."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.float32(s.mean + 0.4 * random.normal(size=s.shape)), gpt.abstract_params(c)
    )


def branch(c: Model, seed: int = 0) -> dict[str, jax.Array]:
    """The parameters of one feed-forward."""
    return jax.tree.map(lambda p: p[0], random_params(c, seed)["blocks"]["feedforward"])


def run(c: Model, p: Any, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    tap = Tap()
    module: Any = FeedForward(c)
    return module.apply({"params": p}, x_BTD, tap), tap.heard


# --- the definition -------------------------------------------------------------------------


def activate(c: Model, z: Any) -> Any:
    """Hendrycks & Gimpel 2016, the tanh form; or Elfwing et al. 2018."""
    if c.feedforward == "gelu_experts":
        return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    return z / (1 + np.exp(-z))


def one_expert(c: Model, p: dict[str, Any], x: Any, name: str = "") -> Any:
    product = lambda x, w: x @ p[name + w] + p.get(f"{name}{w}_bias", 0)  # noqa: E731
    up = product(x, "up")
    gated = c.feedforward.startswith("swiglu")
    return product(activate(c, product(x, "gate")) * up if gated else activate(c, up), "down")


def capacity(c: Model, T: int) -> int | None:
    factor = c.capacity_factor
    return None if factor is None else math.ceil(factor * T * c.experts_per_token / c.experts)


def stacks(p: dict[str, Any]) -> dict[str, Any]:
    """The weights of all experts."""
    return {n: w for n, w in p.items() if not n.startswith(("router", "balance", "shared"))}


def by_loop(c: Model, p: dict[str, Any], x_BTD: Any) -> tuple[np.ndarray, int]:
    """A row, token and expert at a time in float64, from the definition; and how many it dropped."""
    p = {name: np.asarray(w, np.float64) for name, w in p.items()}
    stacked = stacks(p)
    y_BTD, dropped = np.zeros(x_BTD.shape), 0
    for b, x_TD in enumerate(np.asarray(x_BTD, np.float64)):
        taken = [0] * c.experts
        for t, x in enumerate(x_TD):
            score = np.exp(x @ p["router"])
            share = score / score.sum()
            liked = share + p.get("balance", 0)
            chosen = sorted(range(c.experts), key=lambda e: (-liked[e], e))[: c.experts_per_token]
            total = sum(share[e] for e in chosen) if c.normalise_gates else 1.0
            for e in chosen:
                taken[e] += 1
                limit = capacity(c, len(x_TD))
                if limit is not None and taken[e] > limit:
                    dropped += 1
                    continue
                own = {n: w[e] for n, w in stacked.items()}
                y_BTD[b, t] += share[e] / total * one_expert(c, own, x)
            if c.shared_experts:
                y_BTD[b, t] += one_expert(c, p, x, "shared_")
    return y_BTD, dropped


CASES: list[dict[str, Any]] = [
    *({"feedforward": name, "bias": bias} for name in ROWS for bias in (True, False)),
    {"normalise_gates": False},
    {"shared_experts": 2},
    {"shared_experts": 1, "bias": False},
    {"experts_per_token": 1, "normalise_gates": False},
    {"experts_per_token": 8},
    {"experts": 1, "experts_per_token": 1},
    {"capacity_factor": 1.0},
    {"capacity_factor": 0.01},  # one slot an expert
    {"capacity_factor": 1.25, "experts_per_token": 3, "normalise_gates": False},
    {"capacity_factor": 100.0},
    {"balance_rate": 1e-3},
]
NAMES = [",".join(f"{k}={v}" for k, v in case.items()) for case in CASES]


@pytest.mark.parametrize("changes", CASES, ids=NAMES)
@pytest.mark.parametrize("rows", [(2, T), (1, 1)], ids=["rows", "token"])
def test_a_mixture_is_a_loop_over_its_experts(changes, rows):
    c = model(**changes)
    p, x = branch(c), normal(*rows, c.width)
    y, heard = jax.jit(functools.partial(run, c))(p, x)
    expected, dropped = by_loop(c, p, x)
    # float32 sums of D and F terms, twice, whose values reach some ten.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    if c.capacity_factor is None:
        assert dropped == 0 and "metric/dropped_share" not in heard
    else:
        share = dropped / (x[..., 0].size * c.experts_per_token)
        assert float(heard["metric/dropped_share"]) == pytest.approx(share, abs=1e-7)
        assert (dropped > 0) == (c.capacity_factor < 2 and rows[1] > 1)


def dense(c: Model, p: dict[str, Any], x_BTD: jax.Array) -> jax.Array:
    """Every token through every expert, whose gradients are those of plain products."""
    share_BTE = jax.nn.softmax(x_BTD @ p["router"])
    rank = jnp.argsort(jnp.argsort(-share_BTE - p.get("balance", 0), axis=-1), axis=-1)
    chosen = rank < c.experts_per_token
    gate_BTE = jnp.where(chosen, share_BTE, 0)
    if c.normalise_gates:
        gate_BTE = gate_BTE / gate_BTE.sum(-1, keepdims=True)
    if (limit := capacity(c, x_BTD.shape[1])) is not None:
        gate_BTE = jnp.where(chosen.cumsum(1) <= limit, gate_BTE, 0)
    stacked = stacks(p)
    act = jax.nn.gelu if c.feedforward.startswith("gelu") else jax.nn.silu

    def expert(p: dict[str, Any]) -> jax.Array:
        product = lambda x, w: x @ p[w] + p.get(f"{w}_bias", 0)  # noqa: E731
        gated = "gate" in p
        hidden = act(product(x_BTD, "gate" if gated else "up"))
        return product(hidden * product(x_BTD, "up") if gated else hidden, "down")

    y = sum(
        gate_BTE[..., e, None] * expert({n: w[e] for n, w in stacked.items()})
        for e in range(c.experts)
    )
    if c.shared_experts:
        y += expert({n.removeprefix("shared_"): w for n, w in p.items() if n.startswith("shared")})
    balance = c.experts * (chosen.mean((0, 1)) / c.experts_per_token) @ share_BTE.mean((0, 1))
    z = jnp.square(jax.nn.logsumexp(x_BTD @ p["router"], axis=-1)).mean()
    return jnp.square(y).mean() + c.balance_loss * balance + c.router_z_loss * z


def loss_of_a_branch(c: Model, p: Any, x_BTD: jax.Array) -> jax.Array:
    y, heard = run(c, p, x_BTD)
    losses = [value for name, value in heard.items() if name.startswith("loss/")]
    return jnp.square(y).mean() + sum(losses)


LOSSES = {"balance_loss": 0.3, "router_z_loss": 0.2}


@pytest.mark.parametrize("changes", CASES, ids=NAMES)
def test_loss_and_gradients_are_those_of_a_dense_loop(changes):
    c = model(**LOSSES | changes)
    p, x = branch(c), jnp.asarray(normal(2, T, c.width))
    got = jax.jit(jax.value_and_grad(functools.partial(loss_of_a_branch, c), (0, 1)))(p, x)
    want = jax.jit(jax.value_and_grad(functools.partial(dense, c), (0, 1)))(p, x)
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1e-3, np.abs(b).max()))


@pytest.mark.parametrize("name", ROWS)
def test_one_expert_is_the_dense_row_and_starts_as_it(name):
    c = model(feedforward=name, experts=1, experts_per_token=1)
    plain = dataclasses.replace(c, feedforward=name.removesuffix("_experts"))
    p, q = gpt.init(c, 3), gpt.init(plain, 3)
    p["blocks"]["feedforward"].pop("router")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.reshape(b.shape), b), p, q)
    p, tokens = gpt.init(c, 3), np.random.default_rng(0).integers(32, size=(2, T))

    def loss(c: Model, p: Any) -> jax.Array:
        return jnp.square(gpt.apply(c, p, tokens)).mean()

    got = jax.jit(jax.value_and_grad(functools.partial(loss, c)))(p)
    want = jax.jit(jax.value_and_grad(functools.partial(loss, plain)))(q)
    assert not np.asarray(got[1]["blocks"]["feedforward"].pop("router")).any()  # its gate is 1
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        # The same products; XLA may add up their terms in another order.
        np.testing.assert_allclose(
            a.reshape(b.shape), b, rtol=0, atol=2e-6 * max(np.abs(b).max(), 1e-3)
        )


# --- the router ---------------------------------------------------------------------------


def test_of_equal_scores_the_first_experts_are_chosen():
    c = model(bias=False, experts_per_token=3, normalise_gates=False)
    p = branch(c) | {"router": jnp.zeros((c.width, 8))}
    x = normal(2, T, c.width)
    first = {n: np.asarray(w, np.float64) for n, w in p.items()}
    expected = sum(
        one_expert(c, {n: first[n][e] for n in ("gate", "up", "down")}, x) for e in range(3)
    )
    y, heard = run(c, p, jnp.asarray(x))
    np.testing.assert_allclose(y, expected / 8, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert float(heard["metric/busiest_expert"]) == pytest.approx(8 / 3)


def test_all_tokens_to_one_expert():
    c = model(experts_per_token=1, normalise_gates=True)
    router = jnp.zeros((c.width, 8)).at[:, 5].set(1.0)
    p, x = branch(c) | {"router": router}, 1 + np.abs(normal(3, T, c.width))
    y, heard = run(c, p, jnp.asarray(x))
    expected, _ = by_loop(c, p, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert float(heard["metric/busiest_expert"]) == 8
    assert float(heard["loss/balance"]) == pytest.approx(c.balance_loss * 8)  # its maximum
    # With a capacity of 2 tokens the others of each row, the last, pass by.
    c = dataclasses.replace(c, capacity_factor=8 * 2 / T)
    y, heard = run(c, p, jnp.asarray(x))
    np.testing.assert_allclose(
        y[:, :2], expected[:, :2], rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    assert not np.asarray(y[:, 2:]).any()
    assert float(heard["metric/dropped_share"]) == pytest.approx(1 - 2 / T)


def test_even_experts_have_a_balance_loss_of_one():
    c = model(experts=3, experts_per_token=1, balance_loss=1.0)
    p = branch(c) | {"router": jnp.eye(c.width, 3) * 1e-3}
    x = jnp.eye(c.width)[jnp.arange(6) % 3][None]
    _, heard = run(c, p, x)
    assert float(heard["loss/balance"]) == pytest.approx(1, rel=1e-6)
    assert float(heard["metric/busiest_expert"]) == 1


def test_ranks_count_in_the_order_of_the_row():
    id_BTk = jnp.asarray([[[0, 1], [1, 0], [0, 2]], [[2, 1], [2, 1], [2, 0]]])
    assert _rank(id_BTk, 3).tolist() == [[[0, 0], [1, 1], [2, 0]], [[0, 0], [1, 1], [2, 0]]]


def test_the_router_works_in_float32_whatever_the_dtype():
    """Two experts whose scores bfloat16 cannot tell apart: the higher one is chosen."""
    c = model(experts=2, experts_per_token=1, dtype="bfloat16", bias=False)
    router = jnp.zeros((c.width, 2)).at[0].set(jnp.asarray([1.0, 1.0 + 2**-12]))
    p = branch(c) | {"router": router}
    swapped = p | {"router": router[:, ::-1]}
    listen = {}
    for name, q in (("second", p), ("first", swapped)):
        tap = Tap({"router": None})
        FeedForward(c).apply({"params": q}, jnp.ones((1, 4, c.width), jnp.bfloat16), tap)
        listen[name] = np.asarray(tap.heard["router"])
        assert listen[name].dtype == np.float32
    assert (listen["second"].argmax(-1) == 1).all() and (listen["first"].argmax(-1) == 0).all()
    # In decoding as well.
    whole = random_params(c)
    kept = cast(c, whole).params["blocks"][0]["feedforward"]
    assert kept["router"].dtype == jnp.float32 and kept["down"].dtype == jnp.bfloat16


def test_scores_can_be_heard_and_edited():
    """Without its favourite a token goes to the others."""
    c = model()
    p, tokens = random_params(c), np.random.default_rng(0).integers(32, size=(2, T))
    away = lambda scores, layer: scores.at[..., 3].set(-jnp.inf)  # noqa: E731
    hear = functools.partial(gpt.hidden, c, p, tokens, listen=("router",))
    plain, edited = hear(), hear(edit={"router": away})
    assert plain.heard["router"].shape == (c.layers, 2, T, c.experts)
    assert np.abs(np.asarray(edited.x_BTD - plain.x_BTD)).max() > 0.01
    q = jax.tree.map(jnp.copy, p)
    q["blocks"]["feedforward"]["down"] = p["blocks"]["feedforward"]["down"].at[:, 3].add(9.0)
    again = gpt.hidden(c, q, tokens, edit={"router": away})
    np.testing.assert_array_equal(again.x_BTD, edited.x_BTD)


# --- causality ----------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [None, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 2])
def test_no_token_and_no_other_row_decides_what_an_earlier_one_gets(factor, k):
    c = model(capacity_factor=factor, experts_per_token=k)
    p, x = branch(c), normal(3, T, c.width)
    before, heard = run(c, p, jnp.asarray(x))
    assert factor is None or float(heard["metric/dropped_share"]) > 0.1
    for t in range(T):
        later = x.copy()
        later[0, t:] = normal(T - t, c.width, seed=t + 1)
        later[1] = normal(T, c.width, seed=9)
        after, _ = run(c, p, jnp.asarray(later))
        np.testing.assert_array_equal(after[0, :t], before[0, :t])
        np.testing.assert_array_equal(after[2], before[2])
    one = jax.jit(jax.grad(lambda x, b, t: run(c, p, x)[0][b, t].sum()))
    for b, t in np.ndindex(3, T):
        slope = np.abs(one(jnp.asarray(x), b, t)).max(-1)
        assert not np.delete(slope.reshape(-1), b * T + t).any()


# --- over a mesh ----------------------------------------------------------------------------


MESHES = [
    {},
    {"expert": 2},
    {"expert": 4},
    {"expert": 8},
    {"fsdp": 2, "expert": 2},
    {"expert": 2, "tensor": 2},
    {"data": 2, "expert": 2, "tensor": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"expert": 2, "sequence": 2},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
]


def objective(c: Model, p: Any, tokens: Any) -> Any:
    found = gpt.hidden(c, p, tokens)
    losses = sum(x.sum() for name, x in found.heard.items() if name.startswith("loss/"))
    shown = {name: x for name, x in found.heard.items() if not name.startswith("loss/")}
    logits = gpt.logits(c, p, found.x_BTD)
    return jnp.square(logits).mean() + losses, shown


def on_mesh(c: Model, p: Any, mesh: jax.sharding.Mesh) -> Any:
    def put(spec: Any, value: Any) -> jax.Array:
        return jax.device_put(value, NamedSharding(mesh, sharding.parameter_spec(spec.dims)))

    return jax.tree.map(put, gpt.abstract_params(c), p)


TOKENS = np.random.default_rng(1).integers(32, size=(B, T)).astype(np.int32)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("factor", [None, 1.0])
def test_a_mesh_computes_what_one_device_does(sizes, factor):
    more = {"shared_experts": 1, "scan_layers": True, "balance_rate": 0.1}
    c = model(capacity_factor=factor, **more, **LOSSES)
    p = random_params(c)
    step = jax.jit(jax.value_and_grad(functools.partial(objective, c), has_aux=True))
    (want, shown), slope = step(p, TOKENS)
    mesh = tiny.mesh(**sizes)
    with jax.set_mesh(mesh):
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, sharding.spec("BT")))
        (got, heard), found = step(on_mesh(c, p, mesh), tokens)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    # The very same choices: what is dropped is counted alike.
    assert shown.keys() == heard.keys()
    for name in shown:
        np.testing.assert_allclose(heard[name], shown[name], rtol=1e-6, atol=1e-7)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(slope))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(slope), strict=True):
        # Float32 sums of 64 tokens, and those of norms, in another order: `layers.rows` and XLA.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * largest)


@pytest.mark.usefixtures("eight_devices")
def test_what_is_dropped_of_a_split_row_is_the_same_whoever_listens():
    """In order where somebody does, else balanced."""
    c = model(capacity_factor=0.5)
    p = random_params(c)
    want = gpt.hidden(c, p, TOKENS)
    assert (want.heard["metric/dropped_share"] > 0.2).all()
    with jax.set_mesh(mesh := tiny.mesh(sequence=2, expert=2)):
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, sharding.spec("BT")))
        for listen in ((), ("router",)):
            run = jax.jit(functools.partial(gpt.hidden, c, listen=listen))
            got = run(on_mesh(c, p, mesh), tokens)
            # Float32 sums of 16 to 64 terms whose values reach some ten.
            np.testing.assert_allclose(got.x_BTD, want.x_BTD, rtol=0, atol=1e-4)
            name = "metric/dropped_share"
            np.testing.assert_array_equal(got.heard[name], want.heard[name])


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("factor", [None, 1.0])
def test_tokens_go_to_experts_by_all_to_all_and_experts_stay(factor):
    c = model(capacity_factor=factor, layers=1, bias=False, ff_dim=40, feedforward="gelu_experts")
    mesh = tiny.mesh(expert=4, fsdp=2)
    with jax.set_mesh(mesh):
        p = on_mesh(c, random_params(c), mesh)
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, sharding.spec("BT")))
        step = jax.jit(jax.value_and_grad(functools.partial(objective, c), has_aux=True))
        text = step.lower(p, tokens).compile().as_text()
    moved = re.findall(r"= \(?(\w+\[[\d,]*\]).* all-to-all\(", text)
    # Tokens there and back, and their gradients likewise; without a capacity their experts' numbers.
    assert len(moved) == (5 if factor is None else 4)
    # Expert weights are gathered over fsdp alone: of 8 experts a device never has more than its 2.
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    sizes = {tuple(map(int, shape.split(","))) for shape in gathered}
    assert (2, 16, 40) in sizes or (1, 2, 16, 40) in sizes
    held = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text)}
    assert not any(8 in shape and 40 in shape and 16 in shape for shape in held)


@pytest.mark.usefixtures("eight_devices")
def test_experts_that_do_not_divide_are_refused():
    c = model(experts=6)
    with pytest.raises(
        ConfigError, match=r"model.experts=6 does not divide over mesh axes expert = 4"
    ):
        sharding.check_model_divisible(
            gpt.abstract_params(c), sharding.mesh_shape(tiny.axes(expert=4), 4)
        )


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ConfigError, match="model.experts_per_token=9 exceeds model.experts=8"):
        model(experts_per_token=9)


# --- training and decoding --------------------------------------------------------------------


def config(**changes: Any) -> Any:
    return dataclasses.replace(
        tiny.BASE,
        model=model(**changes),
        optim=tiny.optim(warmup_steps=0),
        data=tiny.data(batch_size=B),
        train=tiny.train(steps=4, accumulation=2),
    )


def batch(micros: int = 2) -> Batch[jax.Array]:
    tokens = jnp.asarray(TOKENS.reshape(B // micros, micros, T))
    return Batch(tokens, jnp.roll(tokens, -1, -1), jnp.ones(tokens.shape), None, None)


def test_the_step_reports_losses_load_and_what_is_dropped():
    c = config(capacity_factor=1.0, router_z_loss=1e-3)
    _, metrics = state.make_train_step(c)(state.create(c), batch())
    dropped, sums = [], {"balance": 0.0, "router_z": 0.0}
    p = gpt.init(c.model, c.seed)
    for micro in TOKENS.reshape(B // 2, 2, T).swapaxes(0, 1):
        heard = gpt.hidden(c.model, p, micro).heard
        dropped.append(np.asarray(heard["metric/dropped_share"]).mean())
        for name in sums:
            sums[name] += float(heard[f"loss/{name}"].sum()) / 2
    assert float(metrics["dropped_share"]) == pytest.approx(np.mean(dropped), rel=1e-5)
    assert float(metrics["dropped_share"]) > 0.05 and float(metrics["busiest_expert"]) > 1
    for name, value in sums.items():
        assert float(metrics[f"loss/{name}"]) == pytest.approx(value, rel=1e-5)


def biases(now: state.TrainState) -> np.ndarray:
    assert now.frozen is not None
    return np.asarray(now.frozen["blocks"]["feedforward"]["balance"])


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("sizes", [{}, {"expert": 2}, {"fsdp": 2, "expert": 2}], ids=str)
def test_a_bias_moves_by_the_load_and_not_by_a_gradient(sizes):
    c = config(balance_rate=0.01, balance_loss=0.0)
    with jax.set_mesh(tiny.mesh(**sizes)):
        start = state.create(c)
        assert not biases(start).any() and "balance" not in str(jax.tree.structure(start.params))
        assert "balance" not in str(jax.tree.structure(start.opt_state))
        where = NamedSharding(jax.sharding.get_mesh(), sharding.spec("BAT"))
        on_it = lambda tree: jax.device_put(tree, where)  # noqa: E731
        first = batch()
        placed = first._replace(
            tokens=on_it(first.tokens), targets=on_it(first.targets), weights=on_it(first.weights)
        )
        step = state.make_train_step(c)
        now, _ = step(start, placed)
        before = biases(now)
        broken = placed._replace(weights=jnp.full_like(placed.weights, jnp.nan))
        after, metrics = step(now, broken)
        assert metrics["skipped"] == 1
        np.testing.assert_array_equal(biases(after), before)  # a step that is left out
    p = gpt.init(c.model, c.seed)
    scores = gpt.hidden(c.model, p, TOKENS, listen=("router",)).heard["router"]
    chosen = np.argsort(-np.asarray(scores), axis=-1, kind="stable")[..., :2]
    load_LE = np.stack([np.bincount(layer.reshape(-1), minlength=8) for layer in chosen])
    want = 0.01 * np.sign(load_LE.mean(1, keepdims=True) - load_LE)
    np.testing.assert_array_equal(before, want.astype(np.float32))
    assert {*np.unique(want)} >= {-0.01, 0.01}


def test_a_bias_evens_the_experts_out_without_a_loss():
    c = config(balance_rate=0.01, balance_loss=0.0)
    # Nothing else moves.
    optim = dataclasses.replace(c.optim, peak_lr=1e-9, schedule="constant")
    c = dataclasses.replace(c, optim=optim)
    p = gpt.init(c.model, c.seed)
    router = p["blocks"]["feedforward"]["router"]
    p["blocks"]["feedforward"]["router"] = router * 20
    now, step = state.create(c, p), state.make_train_step(c)
    busiest = []
    for _ in range(60):
        now, metrics = step(now, batch())
        busiest.append(float(metrics["busiest_expert"]))
    assert busiest[0] > 2 and np.mean(busiest[-10:]) < 1.6  # seen: 2.4 and 1.3


def test_a_frozen_bias_stays():
    c = config(balance_rate=0.02)
    train = dataclasses.replace(c.train, trainable="unfrozen", frozen=("blocks/feedforward/*",))
    c = dataclasses.replace(c, train=train)
    now, _ = state.make_train_step(c)(state.create(c), batch())
    assert not biases(now).any()


def test_a_step_is_repeated_bit_for_bit():
    c = config()

    def trained() -> Any:
        now = state.create(c)
        for _ in range(3):
            now, _ = state.make_train_step(c)(now, batch())
        return now

    jax.tree.map(np.testing.assert_array_equal, trained(), trained())


@pytest.mark.parametrize("changes", [{}, {"shared_experts": 1}, {"capacity_factor": 0.5}], ids=str)
def test_a_text_is_what_the_whole_context_predicts(changes):
    """With a cache, a token at a time; a capacity is no part of it."""
    c = model(context=16, **changes)
    p = random_params(c)
    sample = tiny.sample(temperature=0.0, max_new_tokens=8)
    (text,) = generate(c, p, [[1, 2, 3]], sample, seed=0, vocab_size=32, end_of_text=31)
    ids = [1, 2, 3, *text.ids]
    without = dataclasses.replace(c, capacity_factor=None)
    logits = gpt.apply(without, p, jnp.asarray([ids]))
    assert np.asarray(logits[0, 2:-1].argmax(-1)).tolist() == text.ids


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("sizes", [{"expert": 2, "sequence": 2}, {"fsdp": 2, "expert": 4}], ids=str)
def test_texts_are_the_same_on_a_mesh(sizes):
    """As many devices as there are no texts for: three rows are filled up."""
    c = model(context=16, shared_experts=1, capacity_factor=0.5)
    p = random_params(c)
    sample = tiny.sample(temperature=0.0, max_new_tokens=8)

    def write(p: Any) -> list[list[int]]:
        prompts = [[1, 2, 3], [4], [5, 6]]
        texts = generate(c, p, prompts, sample, seed=0, vocab_size=32, end_of_text=31)
        return [list(text.ids) for text in texts]

    want = write(p)
    with jax.set_mesh(mesh := tiny.mesh(**sizes)):
        assert write(on_mesh(c, p, mesh)) == want


def test_kept_weights_of_eight_bits_compute_what_the_model_does():
    c = model(context=16, products="int8", bias=False)
    p = random_params(c)
    kept = cast(c, p).params
    up = kept["blocks"][0]["feedforward"]["up"]
    assert up.values.dtype == jnp.int8 and up.scale.shape == (8, 1, c.ff_dim)
    tokens = jnp.asarray(TOKENS[:2])
    cached = gpt.hidden(c, kept, tokens, cache=gpt.init_cache(c, 2, 16))
    plain = gpt.hidden(c, p, tokens)
    # Attention's own products of 8 bits differ by float32 rounding, which may move one by a step.
    np.testing.assert_allclose(cached.x_BTD, plain.x_BTD, atol=0.05)
    exact = gpt.hidden(dataclasses.replace(c, products="dtype"), p, tokens)
    assert 1e-4 < np.median(np.abs(np.asarray(plain.x_BTD - exact.x_BTD))) < 0.1


# --- what it costs ----------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [None, 0.5, 2.0])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_flops_are_those_of_the_experts_that_a_token_meets(k, factor):
    c = model(experts_per_token=k, capacity_factor=factor, bias=False)
    D, F, L = c.width, hidden_width(c), c.layers
    parts = accounting.flops_by_part(c, causal=True)
    assert parts["experts"] == 6 * L * k * 3 * D * F
    assert parts["feedforward"] == 6 * L * D * c.experts  # the router
    other = dataclasses.replace(c, feedforward="swiglu")
    rest = parts["experts"] + parts["feedforward"]
    del parts["experts"], parts["feedforward"]
    plain = accounting.flops_by_part(other, causal=True)
    assert parts == {part: n for part, n in plain.items() if part != "feedforward"}
    assert accounting.train_flops_per_token(c, True) == sum(parts.values()) + rest


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("factor", [None, 2.0])
def test_slots_that_stay_empty_on_a_mesh_are_not_counted(factor):
    """Without a capacity a device has room for all tokens of all others, and computes its share."""
    c = model(capacity_factor=factor, bias=False)
    want = accounting.flops_by_part(c, causal=True)
    run = dataclasses.replace(config(), model=c)
    with jax.set_mesh(tiny.mesh(expert=4, fsdp=2)):
        accounting._products.cache_clear()
        assert accounting.flops_by_part(c, causal=True) == want
        meter = loop.Meter(run, None, None)  # type: ignore[arg-type]
    assert (meter._flops, meter._routed) == (sum(want.values()), want["experts"])


def test_active_parameters_by_hand():
    c = model(experts_per_token=2, bias=False, shared_experts=1)
    D, F, L, E = c.width, hidden_width(c), c.layers, c.experts
    total = accounting.parameters(c)["total"]
    assert accounting.active_parameters(c) == total - L * (E - 2) * 3 * D * F
    plain = dataclasses.replace(c, feedforward="swiglu")
    assert accounting.active_parameters(plain) == accounting.parameters(plain)["total"]
    whole = dataclasses.replace(config(), model=c)
    (first, *_) = accounting.costs(whole, dict.fromkeys(sharding.AXES, 1))
    assert first.endswith(f"total {total:,}, active {accounting.active_parameters(c):,}")
    (first, *_) = accounting.costs(
        dataclasses.replace(whole, model=plain), dict.fromkeys(sharding.AXES, 1)
    )
    assert "active" not in first


def test_mfu_leaves_out_what_was_dropped():
    c = config(capacity_factor=1.0)
    with jax.set_mesh(tiny.mesh()):
        meter = loop.Meter(c, None, None)  # type: ignore[arg-type]
    meter._rate = 1.0
    parts = accounting.flops_by_part(c.model, causal=True)
    share = meter._speed({"dropped_share": 0.25})["mfu"] / meter._speed({})["mfu"]
    assert share == pytest.approx(1 - 0.25 * parts["experts"] / sum(parts.values()))


def test_every_expert_is_updated_as_a_matrix_alone():
    """By Muon with the fans of one expert; AdamW moves the router; decay and muP see matrices."""
    c = model(layers=1, bias=False)
    specs = gpt.abstract_params(c)
    feed = specs["blocks"]["feedforward"]
    assert (feed["up"].fan_in, feed["up"].fan_out, feed["up"].stacks) == ("D", "F", "LE")
    assert (feed["down"].fan_in, feed["down"].fan_out, feed["down"].stacks) == ("F", "D", "LE")
    assert feed["router"].kind == "router" and feed["router"].stacks == "L"
    for mask in DECAY_MASKS.values():
        assert mask(feed["router"]) and mask(feed["up"])
    optim = tiny.optim(
        optimizer="muon", clip=None, weight_decay=0.0, schedule="constant", warmup_steps=0
    )

    def moved(specs: Any, grads: Any) -> Any:
        optimizer = make_optimizer(optim, 10, specs)
        zeros = jax.tree.map(jnp.zeros_like, grads)
        return optimizer.update(grads, optimizer.init(zeros), zeros)[0]

    grads = {"up": jnp.asarray(normal(1, 8, 16, 24)), "router": jnp.asarray(normal(1, 16, 8))}
    got = moved({name: feed[name] for name in grads}, grads)
    alone = dataclasses.replace(feed["up"], shape=(1, 16, 24), dims="LDF", stacks="L")
    for e in range(8):
        one = moved({"up": alone}, {"up": grads["up"][:, e]})["up"]
        np.testing.assert_allclose(got["up"][:, e], one, rtol=0, atol=1e-5 * np.abs(one).max())
    # Adam's first step is the sign.
    np.testing.assert_allclose(got["router"], -optim.peak_lr * np.sign(grads["router"]), rtol=1e-4)


def test_a_router_is_to_mup_what_the_unembedding_is():
    base = model(width=16, bias=False)
    wide = dataclasses.replace(base, width=64, parametrisation="mup", mup_base_width=16)
    one, four = (gpt.abstract_params(c)["blocks"]["feedforward"] for c in (base, wide))
    assert four["router"].std == one["router"].std
    assert four["up"].std == pytest.approx(one["up"].std / 2)
    assert four["down"].std == pytest.approx(one["down"].std / 2)
    p, x = branch(wide), normal(1, 3, 64)
    tap = Tap({"router": None})
    FeedForward(wide).apply({"params": p}, jnp.asarray(x), tap)
    np.testing.assert_allclose(tap.heard["router"], x @ p["router"] / 4, rtol=1e-5, atol=1e-5)
