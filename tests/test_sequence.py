"""Rows that are split over devices: their order, their kernels, their memory."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import accounting, sharding, state
from gptjax import model as gpt
from gptjax.config import ConfigError, Model
from gptjax.data.batches import Batch
from gptjax.layers import split
from gptjax.layers.attention import ATTENTION, kernel_for, resolve, splash
from gptjax.layers.context import POINTS
from gptjax.layers.position import POSITION
from gptjax.layers.scores import Scores
from gptjax.layers.split import visits
from gptjax.objectives import next_token
from tests import tiny
from tests.test_accounting import dot_flops
from tests.test_model import close, random_params

pytestmark = pytest.mark.usefixtures("eight_devices")

# --- the order ------------------------------------------------------------------------------


def test_each_device_has_an_early_and_a_late_piece():
    with jax.set_mesh(tiny.mesh(sequence=4)):
        order = sharding.balanced(16)
    assert order is not None and order.reshape(4, 4).tolist() == [
        [0, 1, 14, 15],
        [2, 3, 12, 13],
        [4, 5, 10, 11],
        [6, 7, 8, 9],
    ]
    assert sharding.balanced(16) is None
    with jax.set_mesh(tiny.mesh(data=2)):
        assert sharding.balanced(16) is None


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("dims", ["BT", "BTD", "1T"])
def test_rows_are_put_in_balance_and_back_piece_by_piece(n, dims):
    shape = [{"B": 2, "T": 16, "D": 3, "1": 1}[dim] for dim in dims]
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with jax.set_mesh(tiny.mesh(sequence=n)):
        order = sharding.balanced(16)
        move = jax.jit(lambda x: sharding.balance(x, dims))
        moved = move(x)
        np.testing.assert_array_equal(moved, x[:, order])
        np.testing.assert_array_equal(sharding.balance(moved, dims, back=True), x)
        # Its gradient goes the other way.
        _, pull = jax.vjp(move, x)
        np.testing.assert_array_equal(pull(moved)[0], x)
        for whole in (x, x[:, order]):
            got = sharding.gather_sequence(jnp.asarray(whole), dims, was_balanced=whole is not x)
            np.testing.assert_array_equal(got, x)
        text = move.lower(moved).compile().as_text()
    assert "collective-permute" in text and "all-gather" not in text


def test_a_row_that_does_not_divide_is_refused_in_a_line():
    config = tiny.model(context=12)
    with jax.set_mesh(tiny.mesh(sequence=4)):
        params = gpt.init(config, 0)
        message = r"^tokens of a row=12 does not divide over two pieces .* make it a multiple of 8"
        with pytest.raises(ConfigError, match=message):
            gpt.apply(config, params, np.zeros((1, 12), np.int32))


# --- the work -------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("tile", [1, 2, 512])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_devices_visit_the_pairs_of_tiles_that_are_not_masked(n, tile, window, monkeypatch):
    monkeypatch.setattr(split, "TILE", tile)
    T = 64
    with jax.set_mesh(tiny.mesh(sequence=n)):
        order = sharding.balanced(T)
    t, s = order[:, None], np.arange(T)
    seen = (s <= t) & (t - s < (window or T))
    size, lists = visits(order, n, window)
    assert size == min(tile, T // (2 * n))
    for mine, visited in zip(np.split(seen, n), lists, strict=True):
        tiles = mine.reshape(len(mine) // size, size, T // size, size).any((1, 3))
        assert (np.argwhere(tiles) * size).tolist() == visited.tolist()
    counts = [len(visited) for visited in lists]
    if window is None:
        assert len(set(counts)) == 1  # balanced
        pairs = T // size
        assert sum(counts) == pairs * (pairs + 1) // 2  # and no more than the triangle
    else:
        # Of P pieces and a window of a of them a device sees 2 a at most, and all a (P - a / 2): the
        # mean is least against that at a = P / 2, where it is 3/4. A tile is what rounding adds.
        assert max(counts) <= 4 / 3 * np.mean(counts) + 1


def test_in_order_the_last_device_would_have_most():
    _, lists = visits(np.arange(16), 4, None)
    assert [len(visited) for visited in lists] == [3, 7, 11, 15]
    with jax.set_mesh(tiny.mesh(sequence=4)):
        order = sharding.balanced(16)
    assert [len(visited) for visited in visits(order, 4, None)[1]] == [9, 9, 9, 9]


def test_the_program_of_a_device_multiplies_what_it_sees():
    """Counted in the jaxpr: each of n devices takes 1 / n of the triangle's products."""
    T, N, H = 64, 4, 8

    def flops(n: int) -> int:
        with jax.set_mesh(tiny.mesh(sequence=n)):
            order = sharding.balanced(T)
            assert order is not None
            index = jnp.asarray(order)[None]
            scores = Scores(index, jnp.arange(T)[None], order_T=order)
            x = jnp.zeros((1, T, N, H))
            q = jax.reshard(x, sharding.spec("BTNH"))
            run = functools.partial(split.pairs, scores=scores)
            return dot_flops(jax.make_jaxpr(run)(q, x, x).jaxpr)

    for n in (2, 4, 8):
        tile = T // (2 * n)
        # 2 n + 1 pairs, of two products of two operations for each head and channel.
        assert flops(n) == (2 * n + 1) * tile**2 * 2 * 2 * N * H


# --- what is seen ---------------------------------------------------------------------------

DOCUMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 2]], np.int32)
CAUSAL = np.tril(np.ones((8, 8), int))
MASKS: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "causal": ({}, CAUSAL.tolist()),
    "documents": ({"segments": True}, [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]),
    "documents and a window": ({"segments": True, "window": 3}, [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]),
}  # fmt: skip


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", ["plain", "block"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_token_sees_its_own_document_and_what_stands_before(mask, name, n):
    """Which embeddings change a token's stream, by gradients through a whole layer."""
    changes, wanted = MASKS[mask]
    config = tiny.model(
        vocab_size=8, context=8, layers=1, attention=name, position="none", kv_heads=2,
        windows=(changes.get("window"),),
    )  # fmt: skip
    params = random_params(config)
    tokens_BT = np.random.default_rng(0).permutation(8)[None].astype(np.int32)
    segments_BT = DOCUMENTS if "segments" in changes else None

    def stream(table: jax.Array) -> jax.Array:
        tree = params | {"embed": {"tokens": table}}
        x_BTD = gpt.hidden(config, tree, tokens_BT, segments_BT=segments_BT).x_BTD
        return jax.reshard(x_BTD, jax.P()) @ jnp.arange(1.0, config.width + 1)

    with jax.set_mesh(tiny.mesh(sequence=n)):
        influence = jax.jit(jax.jacrev(stream))(params["embed"]["tokens"])[0]
    seen = (np.asarray(influence) != 0).any(-1)[:, tokens_BT[0]]
    assert seen.astype(int).tolist() == wanted


# --- the same function ----------------------------------------------------------------------

T = 16
MODEL = tiny.model(
    vocab_size=32, context=T, width=16, heads=4, kv_heads=2, layers=2,
    rope_base=100.0, rope_factor=2.0, rope_original_context=8, rope_rotations=(0.1, 0.5),
)  # fmt: skip
AXES: dict[str, dict[str, int]] = {
    "2": {"sequence": 2},
    "4": {"sequence": 4},
    "8": {"sequence": 8},  # a token a piece
    "fsdp": {"fsdp": 2, "sequence": 4},
    "all": {"fsdp": 2, "sequence": 2, "tensor": 2},
}
# tests/test_model.py has all pairs of knobs on two such meshes; here are those that read T, of
# rows with several documents.
CHANGES: list[tuple[dict[str, Any], str]] = [
    *(({"attention": "block", "position": position}, "4") for position in POSITION),
    ({"attention": "block", "position": "alibi", "windows": (5,)}, "8"),
    ({"attention": "block", "position": "rope", "rope_scaling": "dynamic"}, "fsdp"),
    ({"attention": "block", "value_residual": True, "windows": (None, 6), "scan_layers": True}, "all"),
    ({"attention": "block", "kv_heads": 1, "attention_softcap": 2.0, "qk_norm": True}, "8"),
    ({"attention": "block", "dropout": 0.3, "scan_layers": True, "remat": "full"}, "2"),
    ({"attention": "plain", "dropout": 0.3}, "all"),
    ({"attention": "plain", "position": "alibi", "windows": (5,)}, "8"),
    ({"attention": "plain", "position": "rope", "rope_scaling": "dynamic"}, "fsdp"),
    ({"attention": "plain", "products": "fp8"}, "4"),
]  # fmt: skip


def rows() -> Batch[np.ndarray]:
    """Four rows of several documents, one ending in padding, with weights."""
    random = np.random.default_rng(3)
    tokens, targets = random.integers(32, size=(2, 4, T)).astype(np.int32)
    weights = (random.random((4, T)) < 0.8).astype(np.float32)
    starts = random.random((4, T)) < 0.2
    starts[:, 0], place = True, np.arange(T, dtype=np.int32)
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    positions = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    segments[0, -3:], positions[0, -3:], weights[0, -3:] = -1, 0, 0
    return Batch(tokens, targets, weights, segments, positions.astype(np.int32))


def loss_and_gradients(config: Model, batch: Batch[Any], axes: dict[str, int] | None = None) -> Any:
    run = dataclasses.replace(
        tiny.BASE, model=config, optim=tiny.optim(z_loss=0.1, loss_vocab_chunk=16)
    )

    def loss(params: Any, batch: Batch[jax.Array]) -> tuple[jax.Array, Any]:
        sums = next_token(run, params, batch, jax.random.key(1) if config.dropout else None)
        return sums.objective / sums.weight, sums

    f = jax.jit(jax.value_and_grad(loss, has_aux=True))
    params = random_params(config)
    if axes is None:
        return f(params, batch)
    with jax.set_mesh(tiny.mesh(**axes)):
        specs = gpt.abstract_params(config)
        params = jax.tree.map(
            lambda p, s: jax.device_put(p, sharding.parameter_spec(s.dims)), params, specs
        )
        placed = sharding.place(lambda a, b: jax.tree.map(lambda x: x[a:b], batch), 4, "BT")
        return f(params, placed)


@pytest.mark.parametrize("changes, axes", CHANGES, ids=str)
def test_a_split_row_has_the_loss_and_the_gradients_of_a_whole_one(changes, axes):
    config = dataclasses.replace(MODEL, **changes)
    want = loss_and_gradients(dataclasses.replace(config, attention="plain"), rows())
    close(loss_and_gradients(config, rows(), AXES[axes]), want, 1e-5)


HALVES: list[tuple[dict[str, Any], str]] = [
    ({"attention": "block"}, "4"),
    ({"attention": "block", "windows": (5,), "attention_softcap": 2.0}, "8"),
    ({"attention": "plain", "position": "alibi"}, "fsdp"),
]


@pytest.mark.parametrize("changes, axes", HALVES, ids=str)
def test_in_bfloat16_a_split_row_is_as_near_to_float32_as_a_whole_one(changes, axes):
    """Each rounding to 8 bits adds an error of one size; the kernel of split rows rounds at twice as
    many places at most, in another order: the root of 2 as far, and 2 leaves room for chance."""
    config = dataclasses.replace(MODEL, **changes)
    half = dataclasses.replace(config, dtype="bfloat16")
    exact, whole = (
        loss_and_gradients(dataclasses.replace(c, attention="plain"), rows())
        for c in (config, half)
    )
    in_parts = loss_and_gradients(half, rows(), AXES[axes])

    def flat(found: Any) -> np.ndarray:
        return np.concatenate(
            [np.ravel(np.asarray(g, np.float64)) for g in jax.tree.leaves(found[1])]
        )

    def error(found: Any) -> float:
        return float(np.linalg.norm(flat(found) - flat(exact)) / np.linalg.norm(flat(exact)))

    assert 2**-9 < error(whole) < 2**-5  # a rounding, and what a few dozen of them add up to
    assert error(in_parts) < 2 * error(whole)
    (loss, _), (expected, _) = in_parts[0], exact[0]
    # A mean of logits that are rounded once, in which errors of 2**-9 do not all have one sign.
    assert float(loss) == pytest.approx(float(expected), rel=2**-8)


def test_a_fused_kernel_takes_its_part_of_a_row(monkeypatch):
    """Splash, interpreted: 128 tokens a device, of two pieces and two documents."""
    row = ATTENTION["splash"]._replace(kernel=functools.partial(splash, interpret=True))
    monkeypatch.setitem(ATTENTION, "splash", row)
    config = tiny.model(
        vocab_size=32, context=256, layers=1, kv_heads=2, windows=(150,), attention="splash"
    )
    random = np.random.default_rng(0)
    tokens_BT = random.integers(32, size=(1, 256)).astype(np.int32)
    segments_BT = (np.arange(256) >= 100).astype(np.int32)[None]
    weights = jnp.asarray(random.normal(size=(1, 256, 16)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(config: Model, params: Any) -> Any:
        f = lambda p: gpt.hidden(config, p, tokens_BT, segments_BT=segments_BT).x_BTD  # noqa: E731
        x_BTD, pull = jax.vjp(f, params)
        return x_BTD, pull(sharding.shard(weights, "BTD"))[0]

    want = run(dataclasses.replace(config, attention="plain"), random_params(config))
    for axes in ({"sequence": 2}, {"sequence": 2, "tensor": 2}):
        with jax.set_mesh(tiny.mesh(**axes)):
            close(run(config, random_params(config)), want)


def test_a_split_row_lowers_for_a_tpu_with_the_fused_kernel():
    config = tiny.model(
        context=512, layers=1, heads=2, head_dim=128, attention="splash", dtype="bfloat16"
    )
    run = dataclasses.replace(tiny.BASE, model=config, data=tiny.data(batch_size=2))
    with jax.set_mesh(tiny.mesh(fsdp=2, sequence=4)):
        ids, weights = (
            jax.ShapeDtypeStruct((2, 1, 512), dtype, sharding=sharding.spec("BAT"))
            for dtype in (jnp.int32, jnp.float32)
        )
        step: Any = state.make_train_step(run)
        traced = step.trace(state.abstract(run), Batch(ids, ids, weights, ids, ids))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 3  # o, dq, dk and dv
    assert not re.search(r"x128x512x", text), "scores of all pairs are in memory"


def test_what_is_heard_and_edited_is_in_order():
    config = dataclasses.replace(MODEL, position="rope", value_residual=True)
    batch, params = rows(), random_params(config)
    edit = {"stream": lambda x, layer: jnp.where(jnp.arange(T)[None, :, None] == 3, 0.0, x)}

    @jax.jit
    def run(params: Any) -> Any:
        return gpt.hidden(
            config, params, batch.tokens, position_BT=batch.positions, segments_BT=batch.segments,
            listen=[point for point in POINTS if point != "router"], edit=edit,
        )  # fmt: skip

    want = run(params)
    with jax.set_mesh(tiny.mesh(sequence=4)):
        close(run(params), want)


# --- which kernel ---------------------------------------------------------------------------


def test_where_a_fused_kernel_cannot_auto_takes_one_that_holds_no_scores():
    config = tiny.model(attention="auto", dtype="bfloat16", head_dim=16)
    chosen = {}
    for n in (1, 2, 4):
        with jax.set_mesh(tiny.mesh(sequence=n)):
            for platform in ("cpu", "gpu", "tpu", "other"):
                settled = resolve(config, platform)
                chosen[n, platform] = [kernel_for(settled, length) for length in (256, 512)]
    assert chosen == {
        (1, "cpu"): ["flash"] * 2, (1, "gpu"): ["cudnn"] * 2, (1, "tpu"): ["splash"] * 2,
        (2, "cpu"): ["block"] * 2, (2, "gpu"): ["block"] * 2, (2, "tpu"): ["splash"] * 2,
        (4, "cpu"): ["block"] * 2, (4, "gpu"): ["block"] * 2, (4, "tpu"): ["block", "splash"],
        **{(n, "other"): ["plain"] * 2 for n in (1, 2, 4)},
    }  # fmt: skip
    refused = {
        "cudnn": "rows that are split over devices",
        "splash": "256 tokens, no multiple of 512",
    }
    with jax.set_mesh(tiny.mesh(sequence=4)):
        for name, reason in refused.items():
            with pytest.raises(ConfigError, match=f"{name!r} does not support {reason}: use"):
                kernel_for(dataclasses.replace(config, attention=name), 256)


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "block", "splash"])
def test_no_kernel_keeps_keys_and_values_of_whole_rows(name):
    config = tiny.model(context=512, layers=3, head_dim=128, attention=name, scan_layers=True)
    run = dataclasses.replace(tiny.BASE, model=config)
    with jax.set_mesh(tiny.mesh(sequence=4)):
        row = jax.ShapeDtypeStruct((1, 512), jnp.int32, sharding=sharding.spec("BT"))
        specs = gpt.abstract_params(config)
        params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs)
        loss = lambda p, b: next_token(run, p, b, None).objective  # noqa: E731
        jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params, Batch(row, row, row, row, row)))
    # What is kept for each layer is stacked over layers.
    kept = set(re.findall(r":\w+\[(3,[^\]]*\b512\b[^\]]*)\]", jaxpr))
    assert any("512@sequence" in dims for dims in kept)
    assert all("512@sequence" in dims for dims in kept), kept


def temporaries(config: Model, n: int) -> int:
    """Bytes of a device, by XLA, for the loss and the gradient of a row over n devices."""
    run = dataclasses.replace(tiny.BASE, model=config, optim=tiny.optim(loss_vocab_chunk=16))

    def loss(params: Any, batch: Batch[jax.Array]) -> jax.Array:
        return next_token(run, params, batch, None).objective

    with jax.set_mesh(tiny.mesh(sequence=n)):
        row = jax.ShapeDtypeStruct((1, config.context), jnp.int32, sharding=sharding.spec("BT"))
        specs = gpt.abstract_params(config)
        params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs)
        batch = Batch(row, row, row)
        memory = jax.jit(jax.grad(loss)).lower(params, batch).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("name, least", [("plain", 1), ("block", 2)])
def test_memory_of_activations_falls_with_the_devices(name, least):
    """That of a layer as 1 / n; `block` of an unsplit row is another kernel."""
    # Scanned, because what is computed again with layers apart XLA finds to be the same on a CPU.
    config = tiny.model(
        vocab_size=32, context=1024, width=32, heads=4, ff_dim=128, attention=name,
        position="rope", scan_layers=True,
    )  # fmt: skip
    deep = dataclasses.replace(config, layers=4)
    measured = {n: (temporaries(deep, n) - temporaries(config, n)) / 2 for n in (1, 2, 4, 8)}
    # Each device has the gradients of a layer's parameters whole, apart and stacked.
    counts = [accounting.parameters(c)["total"] for c in (config, deep)]
    whole = 2 * 4 * (counts[1] - counts[0]) / 2
    for n in (2, 4, 8):
        assert measured[n] <= measured[least] * least / n + whole, measured
    # Keys and values of whole rows, if they were kept, would be seen.
    assert 2 * 4 * config.context * config.K * config.H > whole
