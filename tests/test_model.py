"""What must hold of every architecture, checked on a set that covers all pairs of choices."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import accounting, sharding
from gptjax import model as gpt
from gptjax.config import ATTENTION_BIAS, ConfigError, Model
from gptjax.layers import attention
from gptjax.layers.attention import ATTENTION, splash
from gptjax.layers.feedforward import FEEDFORWARD
from gptjax.layers.norm import NORM
from gptjax.layers.parameter import INIT
from gptjax.layers.position import POSITION, ROPE_SCALING
from gptjax.losses import cross_entropy
from gptjax.model import PLACEMENT, REMAT
from tests import tiny

B, T, V = 4, 8, 48
# Every way to stretch RoPE does something to it within T tokens.
MODEL = tiny.model(vocab_size=V, context=T,
    rope_base=100.0, rope_factor=2.0, rope_original_context=4, rope_rotations=(0.1, 0.5),
)  # fmt: skip

# Every choice and its values; each pair of values of two choices meets in some combination.
CHOICES: dict[str, tuple[Any, ...]] = {
    "attention": ("plain", "block"),  # splash wants 128 tokens and cudnn a GPU: apart, below
    "position": tuple(POSITION),
    "norm": tuple(NORM),
    "norm_placement": tuple(PLACEMENT),
    "feedforward": tuple(FEEDFORWARD),
    "init": tuple(INIT),
    "remat": tuple(REMAT),
    "kv_heads": (None, 2, 1),
    "windows": ((None,), (2,), (None, 3)),
    "attention_bias": tuple(ATTENTION_BIAS),
    # How "dynamic" turns a token depends on the length of its row, so that a cache, which
    # keeps keys as they were turned, is another function there.
    "rope_scaling": tuple(name for name in ROPE_SCALING if name != "dynamic"),
    "attention_softcap": (None, 2.0),
    "logit_softcap": (None, 3.0),
    **dict.fromkeys(
        ("bias", "parallel_block", "qk_norm", "value_residual", "tied", "scan_layers"),
        (False, True),
    ),
    "segments": (False, True),
    "mesh": ("cube", "sequence", "short"),
}
MESHES = {
    "cube": {"data": 2, "fsdp": 2, "tensor": 2},
    "sequence": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "short": {"data": 2, "sequence": 4},  # a token a piece
}


def pairs(combination: dict[str, Any]) -> set[Any]:
    return set(itertools.combinations(combination.items(), 2))


def all_pairs(choices: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Combinations in which every pair of values of two choices occurs, by a greedy rule.

    Each combination starts from a pair that is still missing and takes, choice by choice,
    the value that completes most missing pairs; the longest lists come first.
    """
    choices = dict(sorted(choices.items(), key=lambda item: -len(item[1])))
    missing = dict.fromkeys(
        ((a, x), (b, y))
        for a, b in itertools.combinations(choices, 2)
        for x, y in itertools.product(choices[a], choices[b])
    )
    combinations = []
    while missing:
        chosen = dict(next(iter(missing)))
        for name, values in choices.items():
            if name not in chosen:
                gain = lambda value, name=name: sum(  # noqa: E731
                    ((other, x), (name, value)) in missing or ((name, value), (other, x)) in missing
                    for other, x in chosen.items()  # noqa: B023
                )
                chosen[name] = max(values, key=gain)
        combination = {name: chosen[name] for name in choices}
        combinations.append(combination)
        for pair in pairs(combination):
            missing.pop(pair, None)
    return combinations


COMBINATIONS = all_pairs(CHOICES)


def test_the_combinations_cover_all_pairs():
    met = {frozenset(pair) for combination in COMBINATIONS for pair in pairs(combination)}
    for a, b in itertools.combinations(CHOICES, 2):
        for x, y in itertools.product(CHOICES[a], CHOICES[b]):
            assert frozenset({(a, x), (b, y)}) in met
    # The two longest lists alone need so many.
    longest, second = sorted(map(len, CHOICES.values()))[-1:-3:-1]
    assert longest * second <= len(COMBINATIONS) <= longest * second + 10


def model(**changes: Any) -> Model:
    return dataclasses.replace(MODEL, **changes)


def named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(part.key for part in path): leaf for path, leaf in leaves}


def random_params(config: Model) -> Any:
    """Parameters on the scale of the scheme of `init`, with no gain 1, no bias 0, no writer 0."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.float32(s.mean + (s.std + 0.15) * random.normal(size=s.shape)),
        gpt.abstract_params(config),
    )


def on_mesh(config: Model, params: Any, mesh: jax.sharding.Mesh) -> Any:
    def put(spec: Any, value: Any) -> jax.Array:
        return jax.device_put(value, NamedSharding(mesh, sharding.parameter_spec(spec.dims)))

    return jax.tree.map(put, gpt.abstract_params(config), params)


def rows_on_mesh(mesh: jax.sharding.Mesh, rows: Any) -> Any:
    return jax.device_put(rows, NamedSharding(mesh, sharding.spec("B")))


# Each token occurs once, so that the gradient of its row of the table is that of its place.
TOKENS = np.random.default_rng(1).permutation(B * T).reshape(B, T).astype(np.int32)
STARTS = np.asarray([[0, 2, 2], [0, 1, 5], [0, 3, 4], [0, 0, 0]])  # of the documents of each row
SEGMENTS = (np.arange(T)[None, :, None] >= STARTS[:, None]).sum(-1).astype(np.int32)
POSITIONS = np.arange(T, dtype=np.int32) - np.take_along_axis(
    np.sort(STARTS), SEGMENTS - 1, axis=1
).astype(np.int32)
# What the gradient is taken of: random sums of logits, of tokens that do not occur, because
# a tied table's rows also gain from the logits of their tokens.
WEIGHTS = np.random.default_rng(2).normal(size=(B, T, V)).astype(np.float32)
WEIGHTS[..., : B * T] = 0


def receptive_field(config: Model, segments: bool) -> np.ndarray:
    """(B, T, T): whether logits at t depend on the token at s, through all layers."""
    t, s = np.mgrid[:T, :T]
    reach = np.broadcast_to(np.eye(T, dtype=bool), (B, T, T))
    for window in config.layer_windows:
        sees = (s <= t) & (t - s < (window or T))
        sees = sees & (SEGMENTS[:, :, None] == SEGMENTS[:, None]) if segments else sees
        reach = np.matmul(sees, reach)
    return reach


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(config: Model, params: Any, rows: Any) -> tuple[jax.Array, Any]:
    logits_BTV, pull = jax.vjp(lambda p: gpt.apply(config, p, **rows), params)
    return logits_BTV, pull(jnp.asarray(WEIGHTS))[0]


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients_by_place(config: Model, params: Any, rows: Any) -> tuple[Any, Any, Any]:
    """Likewise, and influence[b, t, c, s]: of the token at (c, s) on the logits at (b, t)."""
    logits_BTV, pull = jax.vjp(lambda p: gpt.apply(config, p, **rows), params)
    places = jnp.eye(B * T).reshape(B * T, B, T, 1)
    # jax cannot yet map products by group where only some operands are mapped.
    one_by_one = FEEDFORWARD[config.feedforward].experts
    pulled = functools.partial(jax.lax.map, pull) if one_by_one else jax.vmap(pull)
    (gradients,) = pulled(places * WEIGHTS)
    influence = jnp.abs(gradients["embed"]["tokens"]).sum(-1)[:, rows["tokens_BT"]]
    return logits_BTV, jax.tree.map(lambda g: g.sum(0), gradients), influence.reshape(B, T, B, T)


def cached_logits(config: Model, params: Any, tokens_BT: np.ndarray, pieces: int) -> Any:
    """Logits of tokens that are fed in equal pieces; tests/test_decode.py feeds them one by one."""

    @jax.jit
    def feed(params: Any, tokens_BT: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        x_BTD, cache, _ = gpt.hidden(config, params, tokens_BT, cache=cache)
        return gpt.logits(config, params, x_BTD), cache

    cache: Any = gpt.init_cache(config, len(tokens_BT), T + 2)
    logits = []
    for piece_BT in np.split(tokens_BT, pieces, axis=1):
        logits_BTV, cache = feed(params, piece_BT, cache)
        logits.append(np.asarray(logits_BTV))
    assert (np.asarray(cache["length"]) == tokens_BT.shape[1]).all()
    return np.concatenate(logits, axis=1)


# Of a whole model's gradients, by any way of computing them: from the tokens to the loss and back
# a value passes 34 sums (8 a block and the unembedding, twice) of 16 to 64 terms, so some 1,000
# roundings of 2^-24 (Higham 2002, section 3.1: an error of at most terms x rounding a sum). 2e-5
# was too little: a processor with other vector units needs 2.03e-5.
GRADIENTS = 1024 * 2.0**-24


def close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    """Equal up to `tolerance` of the largest value: float32 sums in another order."""

    def compare(path: Any, g: Any, w: Any) -> None:
        g, w = np.asarray(g), np.asarray(w)
        error = abs(g - w).max() / max(1.0, abs(w).max())
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.2g}"  # NaN fails too

    jax.tree.map_with_path(compare, got, want)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """`block` in several blocks, the last one ragged."""
    monkeypatch.setattr(attention, "BLOCK", 4)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=range(len(COMBINATIONS)))
def test_an_architecture(combination):
    """One function of one parameter tree: causal, and equal scanned, sharded and cached."""
    changes = dict(combination)
    segments, axes = changes.pop("segments"), MESHES[changes.pop("mesh")]
    config = model(**changes)
    params = random_params(config)
    total = sum(p.size for p in jax.tree.leaves(params))
    assert total == accounting.parameters(config)["total"]

    rows = {"tokens_BT": TOKENS}
    if segments:
        rows |= {"segments_BT": SEGMENTS, "position_BT": POSITIONS}
    logits_BTV, gradients, influence = values_and_gradients_by_place(config, params, rows)
    expected = np.zeros((B, T, B, T), bool)
    for b, field in enumerate(receptive_field(config, segments)):
        expected[b, :, b, :] = field
    assert ((influence != 0) == expected).all()
    for name, gradient in named(gradients).items():
        assert np.isfinite(gradient).all(), name
        assert gradient.any(), f"{name} has no influence"

    # Sharded and, in the same program, unrolled if it was scanned and the other way round.
    other = dataclasses.replace(config, scan_layers=not config.scan_layers)
    mesh = tiny.mesh(**(axes if config.K % 2 == 0 else axes | {"tensor": 1}))
    with jax.set_mesh(mesh):
        sharded = values_and_gradients(
            other, on_mesh(config, params, mesh), rows_on_mesh(mesh, rows)
        )
    close(sharded, (logits_BTV, gradients), GRADIENTS)

    if segments:
        logits_BTV = jax.jit(functools.partial(gpt.apply, config))(params, TOKENS)
    close(cached_logits(config, params, TOKENS, pieces=2), logits_BTV)


@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "cudnn"])  # needs a GPU
def test_a_kernel_in_the_model(name, monkeypatch):
    """At a length that every kernel takes: causal, and the function of `plain`, on a mesh too."""
    row = ATTENTION["splash"]._replace(kernel=functools.partial(splash, interpret=True))
    monkeypatch.setitem(ATTENTION, "splash", row)
    context, window = 128, 70
    config = model(
        vocab_size=256,
        context=context,
        layers=1,
        kv_heads=2,
        head_dim=8,
        attention=name,
        windows=(window,),
    )
    params = random_params(config)
    random = np.random.default_rng(0)
    tokens_BT = random.permutation(256).reshape(2, context).astype(np.int32)
    weights = random.normal(size=(2, context, config.width)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(config, params, tokens_BT, weights):
        f = lambda p: gpt.hidden(config, p, tokens_BT)[0]  # noqa: E731
        x_BTD, pull = jax.vjp(f, params)
        return x_BTD, pull(weights)[0]

    for t in (0, 69, 70, 127):
        only = weights * (np.arange(context) == t)[:, None]
        influence = run(config, params, tokens_BT, only)[1]["embed"]["tokens"][tokens_BT]
        s = np.arange(context)
        expected = (s <= t) & (t - s < window)
        assert ((np.asarray(influence) != 0).any(-1) == expected).all()

    got = run(config, params, tokens_BT, weights)
    want = run(dataclasses.replace(config, attention="plain"), params, tokens_BT, weights)
    close(got, want)
    mesh = tiny.mesh(data=2, tensor=2)
    with jax.set_mesh(mesh):
        rows = rows_on_mesh(mesh, (tokens_BT, weights))
        sharded = run(config, on_mesh(config, params, mesh), *rows)
    close(sharded, want)


def loss_and_gradients(config, params, tokens_BT, positions_BT=None):
    def loss(params):
        x_BTD = gpt.hidden(config, params, tokens_BT, position_BT=positions_BT)[0]
        x_BTD, kernel, dims = gpt.unembedding(config, params, x_BTD)
        ones_BT = jnp.ones_like(tokens_BT)
        return cross_entropy(
            x_BTD, kernel, dims, tokens_BT, ones_BT, chunk=None, softcap=None, z_loss=1e-3
        ).objective

    return jax.jit(jax.value_and_grad(loss))(params)


ONE = {"layers": 1, "heads": 1}


@pytest.mark.parametrize(
    "rows, tokens, axes, changes, given",
    [
        (1, 1, {}, ONE | {"scan_layers": True}, "split"),
        (1, 1, {}, ONE | {"value_residual": True, "position": "rope"}, "whole"),
        (1, T, {}, {"scan_layers": True, "value_residual": True}, "positions"),
        (1, T, {"tensor": 2}, {"scan_layers": True, "attention": "block"}, "whole"),
        (2, 1, {"fsdp": 2}, ONE | {"scan_layers": True, "tied": False}, "positions"),
    ],
    ids=str,
)
def test_one_row_one_token_one_layer_one_head(rows, tokens, axes, changes, given):
    """On a mesh as on none, however the caller laid the rows."""
    config = model(**changes)
    params = random_params(config)
    tokens_BT = TOKENS[:rows, :tokens]
    want = loss_and_gradients(config, params, tokens_BT)
    mesh = tiny.mesh(**axes)
    with jax.set_mesh(mesh):
        inputs = [rows_on_mesh(mesh, tokens_BT)]
        if given == "whole":
            inputs = [jax.device_put(tokens_BT, NamedSharding(mesh, PartitionSpec()))]
        if given == "positions":
            positions_BT = np.broadcast_to(np.arange(tokens), tokens_BT.shape)
            inputs.append(rows_on_mesh(mesh, positions_BT))
        placed = on_mesh(config, params, mesh)
        close(loss_and_gradients(config, placed, *inputs), want)


@pytest.mark.parametrize("name", ATTENTION)
def test_parameters_do_not_depend_on_the_kernel(name):
    assert gpt.abstract_params(model(attention=name)) == gpt.abstract_params(MODEL)


# Decoding.


@pytest.mark.parametrize("position", POSITION)
def test_rows_of_different_lengths_decode_as_alone(position):
    """Prompts padded on the right; then each row's length is set to its own, and all go on."""
    config = model(position=position, context=8, windows=(None, 3))
    params = random_params(config)
    lengths, length = np.asarray([2, 4, 1, 3], np.int32), 4
    tokens = np.random.default_rng(0).integers(V, size=(B, 8)).astype(np.int32)

    @jax.jit
    def feed(params, tokens_BT, cache):
        x_BTD, cache, _ = gpt.hidden(config, params, tokens_BT, cache=cache)
        return gpt.logits(config, params, x_BTD), cache

    def decode(params: Any, put: Any) -> np.ndarray:
        """logits[b, i] of row b's token number lengths[b] + i."""
        prompts = np.where(np.arange(length) < lengths[:, None], tokens[:, :length], V - 1)
        _, cache = feed(params, put(prompts), gpt.init_cache(config, B, 8))
        cache = cache | {"length": put(lengths)}
        steps = []
        for i in range(3):
            token = tokens[np.arange(B), lengths + i][:, None]
            logits_BTV, cache = feed(params, put(token), cache)
            steps.append(np.asarray(logits_BTV)[:, 0])
        return np.stack(steps, axis=1)

    whole = np.asarray(jax.jit(functools.partial(gpt.apply, config))(params, tokens))
    alone = np.stack([whole[b, n : n + 3] for b, n in enumerate(lengths)])
    close(decode(params, jnp.asarray), alone)
    if position == "rope":
        mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
        with jax.set_mesh(mesh):
            placed = on_mesh(config, params, mesh)
            close(decode(placed, functools.partial(rows_on_mesh, mesh)), alone)


def test_a_cache_keeps_no_documents_apart():
    config = model()
    with pytest.raises(ValueError, match="segments_BT does not go with a cache"):
        gpt.hidden(
            config, random_params(config), TOKENS, segments_BT=SEGMENTS,
            cache=gpt.init_cache(config, B, T),
        )  # fmt: skip


@pytest.mark.parametrize("position", POSITION)
def test_packed_documents_are_read_as_alone(position):
    config = model(position=position, scan_layers=True)
    params = random_params(config)
    run = jax.jit(functools.partial(gpt.apply, config))
    packed = run(params, TOKENS, segments_BT=SEGMENTS, position_BT=POSITIONS)
    alone = np.zeros((B, T, V), np.float32)
    for b, t in zip(*np.nonzero(POSITIONS == 0), strict=True):
        # What follows a document in its row does not matter: shift its start to the front.
        rolled = np.asarray(run(params, np.roll(TOKENS[b : b + 1], -t, axis=1)))[0]
        alone[b, t:] = rolled[: T - t]
    close(packed, alone)


# Parts with a closed form in the model.


def test_value_residual_with_shares_one_and_zero_is_none():
    config = model(value_residual=True)
    params = random_params(config)
    shares = {"value_own": np.ones(2, np.float32), "value_first": np.zeros(2, np.float32)}
    mixed = params["blocks"]["attention"] | shares
    params["blocks"]["attention"] = mixed
    own = gpt.apply(config, params, TOKENS)
    bare = params | {
        "blocks": params["blocks"]
        | {"attention": {k: v for k, v in mixed.items() if k not in shares}}
    }
    close(own, gpt.apply(model(), bare, TOKENS), 1e-7)
    # The first layer's own values are its first: shares (0, 1) change only later layers.
    mixed |= {"value_own": np.float32([0, 1]), "value_first": np.float32([1, 0])}
    close(gpt.apply(config, params, TOKENS), own, 1e-7)
    mixed |= {"value_own": np.float32([1, 0]), "value_first": np.float32([0, 1])}
    assert abs(gpt.apply(config, params, TOKENS) - own).max() > 0.01


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_value_residual_is_that_of_the_first_layer(scan_layers):
    """The last of three layers takes the first's values alone, and the second writes nothing."""
    config = model(value_residual=True, layers=3, scan_layers=scan_layers)
    params = random_params(config)
    params["blocks"]["attention"] |= {
        "value_own": jnp.float32([1, 1, 0]),
        "value_first": jnp.float32([0, 0, 1]),
        "out": params["blocks"]["attention"]["out"].at[:2].set(0),
    }
    f = lambda params: (gpt.apply(config, params, TOKENS) * WEIGHTS).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(f))(params)["blocks"]["attention"]["value"]
    assert [bool(layer.any()) for layer in gradient] == [True, False, False]


def test_the_softcap_bounds_logits():
    params = random_params(model())
    raw = 20 * np.asarray(gpt.apply(model(), params, TOKENS))
    x_BTD = 20 * gpt.hidden(model(), params, TOKENS)[0]
    capped = np.asarray(gpt.logits(model(logit_softcap=3.0), params, x_BTD))
    assert abs(raw).max() > 30 and 2.9 < abs(capped).max() <= 3
    np.testing.assert_allclose(capped, 3 * np.tanh(raw / 3), atol=2e-5)


def test_a_tied_model_unembeds_with_its_table():
    config = model()
    params = random_params(config)
    x_BTD = gpt.hidden(config, params, TOKENS).x_BTD
    close(gpt.logits(config, params, x_BTD), np.asarray(x_BTD) @ params["embed"]["tokens"].T, 1e-6)


def test_dropout_keeps_the_mean_and_needs_a_key():
    x_BTD = jnp.full((8, 64, 128), 3.0)
    y_BTD = gpt.dropout(x_BTD, 0.25, jax.random.key(0), 0)
    kept, n = np.asarray(y_BTD) != 0, x_BTD.size
    assert abs(kept.mean() - 0.75) < 4 * (0.75 * 0.25 / n) ** 0.5  # four standard errors
    np.testing.assert_allclose(np.asarray(y_BTD)[kept], 4.0, rtol=1e-6)
    assert gpt.dropout(x_BTD, 0.25, None, 0) is x_BTD
    assert gpt.dropout(x_BTD, 0.0, jax.random.key(0), 0) is x_BTD


def test_dropout_differs_at_each_place_of_each_layer_and_between_keys(monkeypatch):
    config, masks = model(dropout=0.5), []
    dropout = gpt.dropout

    params = random_params(config)

    def spy(x_BTD, *args):
        masks.append(np.asarray(dropout(jnp.ones((B, T, 16)), *args)) != 0)
        return x_BTD

    monkeypatch.setattr(gpt, "dropout", spy)
    for seed in (0, 1):
        gpt.hidden(config, params, TOKENS, dropout_key=jax.random.key(seed))
    assert len(masks) == 2 * (1 + 2 * config.layers)  # the embedding; attention, feed-forward
    for a, b in itertools.combinations(masks, 2):
        assert 0.3 < (a != b).mean() < 0.7  # independent coins: 1/2 +- 0.025


@pytest.mark.parametrize(
    "layers, windows, turns",
    [(4, (3,), 4), (4, (None, 3), 2), (6, (2, None, 3), 2), (4, (2, None, 3), 1)],
    ids=str,
)
def test_scanned_layers_of_several_windows_take_turns(layers, windows, turns):
    """Each with its own window, known while tracing, as the fused kernels want it."""
    scanned = model(layers=layers, windows=windows, value_residual=True, scan_layers=True)
    apart = dataclasses.replace(scanned, scan_layers=False)
    params = random_params(scanned)

    def run(config: Model, params: Any) -> Any:
        found = gpt.hidden(config, params, TOKENS, listen=("stream",))
        return found.x_BTD, found.heard["stream"]

    jaxpr = str(jax.make_jaxpr(functools.partial(run, scanned))(params))
    assert f"length={turns}\n" in jaxpr and len(set(scanned.layer_windows)) == len(windows)
    want, got = (jax.vjp(jax.jit(functools.partial(run, c)), params) for c in (apart, scanned))
    weights = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), want[0])
    close((got[0], got[1](weights)), (want[0], want[1](weights)))


def test_dropout_is_one_function_scanned_and_sharded_and_off_without_a_key():
    config = model(dropout=0.3, remat="full")
    params = random_params(config)
    run = jax.jit(gpt.apply, static_argnums=0)
    key = jax.random.key(3)
    dropped = run(config, params, TOKENS, dropout_key=key)
    scanned = model(dropout=0.3, scan_layers=True)
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        tokens_BT = rows_on_mesh(mesh, TOKENS)
        close(run(scanned, on_mesh(config, params, mesh), tokens_BT, dropout_key=key), dropped)
    off = run(config, params, TOKENS)
    assert (off == run(model(remat="full"), params, TOKENS)).all()
    assert abs(off - dropped).max() > 0.1


def test_bfloat16_is_near_float32_and_parameters_and_logits_stay_float32():
    params = random_params(model())
    exact = np.asarray(gpt.apply(model(), params, TOKENS))
    low = model(dtype="bfloat16")
    assert gpt.hidden(low, params, TOKENS)[0].dtype == jnp.bfloat16
    assert {a.dtype.name for a in jax.tree.leaves(gpt.init_cache(low, 1, 2))} == {
        "bfloat16",
        "int32",  # the length
    }
    assert {p.dtype.name for p in jax.tree.leaves(gpt.init(low, 0))} == {"float32"}
    got = gpt.apply(low, params, TOKENS)
    assert got.dtype == jnp.float32
    error = np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2))
    assert 1e-3 < error < 2e-2  # a rounding is 2^-9 at most; some twenty add up


@pytest.mark.parametrize(
    "knobs",
    [
        {"bias": True, "value_residual": True, "attention_bias": "all"},
        {"bias": True, "tied": False, "feedforward": "swiglu", "qk_norm": True},
        {"norm": "rmsnorm", "position": "rope", "products": "fp8"},
    ],
    ids=["biased", "gated", "fp8"],
)
def test_gradients_in_bfloat16_are_those_of_float32(knobs):
    """However many tokens they are sums over: a sum in bfloat16 is soon too large for its terms."""
    config = model(norm_placement="sandwich", windows=(None,), **knobs)
    params, rng = random_params(config), np.random.default_rng(0)
    tokens = np.where(rng.random((512, T + 1)) < 0.5, 0, rng.integers(V, size=(512, T + 1)))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(config, params):
        def loss(params):
            x_BTD = gpt.hidden(config, params, tokens[:, :-1]).x_BTD
            x_BTD, kernel, dims = gpt.unembedding(config, params, x_BTD)
            weights = jnp.full((512, T), 1 / (512 * T))
            return cross_entropy(
                x_BTD, kernel, dims, tokens[:, 1:], weights, chunk=None, softcap=None, z_loss=0.0
            ).objective

        return jax.grad(loss)(params)

    exact = gradients(config, params)
    got = gradients(dataclasses.replace(config, dtype="bfloat16"), params)
    norm = lambda a: float(jnp.linalg.norm(a.ravel()))  # noqa: E731
    for (path, e), g in zip(jax.tree.leaves_with_path(exact), jax.tree.leaves(got), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("key_bias"):
            continue  # the softmax is blind to it
        # bfloat16 rounds by 2^-9 at most; some tens of roundings add up, in fp8 more.
        assert norm(g - e) < (0.2 if config.products == "fp8" else 0.02) * norm(e), name


def test_what_remat_computes_again_is_not_taken_for_what_was_computed_before():
    """By XLA, which would keep it for the backward pass after all."""

    def flops(remat: str) -> float:
        config = model(remat=remat, scan_layers=False, tied=False, attention="plain")
        loss = lambda params: gpt.apply(config, params, TOKENS).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(random_params(config)).compile()
        return compiled.cost_analysis()["flops"]

    # A forward pass more of three that the blocks take, but for the last product of each layer.
    assert 1.15 < flops("full") / flops("none") < 4 / 3


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_keeps_less_for_the_backward_pass(scan_layers):
    def kept(remat: str) -> int:
        """Bytes that a forward pass leaves to the backward pass."""
        config = model(remat=remat, scan_layers=scan_layers)
        f = lambda params: jax.vjp(lambda p: gpt.apply(config, p, TOKENS), params)[1]  # noqa: E731
        residuals = jax.tree.leaves(jax.eval_shape(f, random_params(config)))
        return sum(r.size * r.dtype.itemsize for r in residuals)

    none, dots, attention, full = map(kept, ("none", "dots", "attention", "full"))
    assert none > dots > attention > full


# Initial values.


def test_initial_values_have_the_scale_of_their_role():
    config = model(
        vocab_size=512, context=256, width=64, ff_dim=256, tied=False, value_residual=True,
        init="fan_in", feedforward="swiglu", qk_norm=True,
    )  # fmt: skip
    two_writers_a_layer = 1 / (2 * config.layers) ** 0.5
    stds = {
        "embed/tokens": 1 / 8,
        "embed/positions": 1 / 8,
        "blocks/attention/query": 1 / 8,
        "blocks/attention/key": 1 / 8,
        "blocks/attention/value": 1 / 8,
        "blocks/attention/out": 1 / 8 * two_writers_a_layer,
        "blocks/feedforward/gate": 1 / 8,
        "blocks/feedforward/up": 1 / 8,
        "blocks/feedforward/down": 1 / 16 * two_writers_a_layer,
        "unembed/kernel": 1 / 8,
    }
    constants = {"scale": 1, "bias": 0, "value_own": 0.5, "value_first": 0.5}
    for name, value in named(gpt.init(config, 0)).items():
        if name in stds:
            # The smallest has 8,192 values: four standard errors are 3.2%.
            assert np.std(value) == pytest.approx(stds.pop(name), rel=0.032), name
            assert abs(np.mean(value) / np.std(value)) < 4 / value.size**0.5
        else:
            constant = next(c for end, c in constants.items() if name.endswith(end))
            assert (value == constant).all(), name
    assert not stds


def test_zero_out_starts_every_block_as_the_identity():
    config = model(init="zero_out", position="rope")
    params = gpt.init(config, 0)
    x_BTD = params["embed"]["tokens"][TOKENS]
    centred = x_BTD - x_BTD.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    close(gpt.hidden(config, params, TOKENS)[0], expected, 1e-6)


ARMS = [
    {"parallel_block": True},
    {"norm_placement": "sandwich"},
    {"norm_placement": "post"},
    {"norm": "rmsnorm"},
    {"feedforward": "swiglu"},
    {"position": "rope", "qk_norm": True},
    {"bias": False, "tied": False},
    {"kv_heads": 1},
    {"ff_dim": 40},
    {"value_residual": True, "windows": (2,)},
    {"scan_layers": True, "remat": "full", "attention": "block", "dtype": "bfloat16"},
]


@functools.cache
def initial(config: Model, seed: int = 0) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, named(gpt.init(config, seed)))


@pytest.mark.parametrize("changes", ARMS, ids=lambda changes: ",".join(changes))
def test_architectures_share_the_initial_values_of_shared_paths(changes):
    base, arm = initial(MODEL), initial(model(**changes))
    shared = {name for name in base.keys() & arm.keys() if base[name].shape == arm[name].shape}
    drawn = {name for name in shared if base[name].std() > 0}
    assert len(drawn) >= 4
    for name in shared:
        assert (base[name] == arm[name]).all(), name


def test_initial_values_are_the_same_within_another_program():
    alone, within = gpt.init(MODEL, 3), jax.jit(lambda: gpt.init(MODEL, 3))()
    assert jax.tree.all(jax.tree.map(jnp.array_equal, alone, within))


def test_no_two_paths_layers_or_seeds_share_initial_values():
    arrays = [a for name, a in initial(MODEL).items() if a.std() > 0]
    arrays += [a for name, a in initial(MODEL, 1).items() if a.std() > 0]
    layers = [layer for a in arrays for layer in (a if len(a) == MODEL.layers else [a])]
    for a, b in itertools.combinations(layers, 2):
        n = min(a.size, b.size)
        assert abs(np.corrcoef(a.ravel()[:n], b.ravel()[:n])[0, 1]) < 5 / n**0.5


def test_a_layer_starts_alike_at_every_depth():
    shallow, deep = initial(model(layers=2)), initial(model(layers=8))
    assert shallow.keys() == deep.keys()
    for name, value in shallow.items():
        # Residual writers shrink with the root of depth: here by exactly 2.
        ratio = 2 if name in ("blocks/attention/out", "blocks/feedforward/down") else 1
        assert (value == ratio * deep[name][: len(value)]).all(), name


@pytest.mark.parametrize("shape", tiny.MESHES, ids=str)
def test_initial_values_are_bitwise_equal_on_every_mesh(shape):
    config = model(init="fan_in", tied=False, qk_norm=True, value_residual=True)
    mesh = tiny.mesh_of(shape)
    with jax.set_mesh(mesh):
        params = gpt.init(config, 0)
        specs = named(gpt.abstract_params(config))
    for name, value in named(params).items():
        wanted = NamedSharding(mesh, sharding.parameter_spec(specs[name].dims))
        assert value.sharding.is_equivalent_to(wanted, value.ndim), name
        assert (np.asarray(value) == initial(config)[name]).all(), name


# Choices that are not in the tables.


def test_what_is_declared_is_asked_for_without_computing():
    """A plan asks where the devices of the mesh are only compiled for."""
    unasked = dataclasses.replace(MODEL, norm_eps=1.25e-5)  # what was declared before is kept
    with jax.transfer_guard("disallow"):
        gpt.abstract_params(unasked)


@pytest.mark.parametrize(
    "knob",
    ["position", "norm", "norm_placement", "feedforward", "init", "remat", "attention", "products"],
)
def test_an_unknown_choice_is_one_line_with_the_choices(knob):
    config = model(**{knob: "nonesuch"})
    with pytest.raises(ConfigError) as error:
        gpt.apply(config, random_params(config), TOKENS)
    assert str(error.value).startswith(f"model.{knob}='nonesuch' is not one of: ")
    assert "\n" not in str(error.value)
