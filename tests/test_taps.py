"""Points of the model: what is heard is what was computed, and what is edited is what goes on."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import model as gpt
from gptjax import sharding
from gptjax.config import ConfigError
from gptjax.layers import context
from gptjax.layers.context import INSIDE, OUTSIDE, Tap
from tests import tiny

L, B, T, D, N, K, H, F, V = 3, 8, 16, 16, 8, 4, 4, 24, 64
TOKENS = np.random.default_rng(0).integers(V, size=(B, T)).astype(np.int32)
OTHER = np.random.default_rng(1).integers(V, size=(B, T)).astype(np.int32)
SEGMENTS = (np.arange(T) >= np.arange(1, B + 1)[:, None]).astype(np.int32)
DIRECTION = np.random.default_rng(2).normal(size=(L, B, T, D)).astype(np.float32)
# Of a mixture of experts, tests/test_experts.py hears and edits its own.
POINTS = {point: dims for point, dims in context.POINTS.items() if point != "router"}
SIZES = dict(zip("LBTSDNKGHF", (L, B, T, T, D, N, K, N // K, H, F), strict=True))

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": {
        "norm": "rmsnorm", "feedforward": "swiglu", "position": "rope", "qk_norm": True,
        "bias": False, "tied": False, "attention_softcap": 5.0,
    },
    "sandwich": {"norm_placement": "sandwich", "position": "alibi", "value_residual": True},
    "post": {"norm_placement": "post", "windows": (None, 4)},
    "parallel": {"parallel_block": True},
}  # fmt: skip


def make(**changes: Any) -> Any:
    shape = {"layers": L, "heads": N, "kv_heads": K, "head_dim": H, "context": T}
    return tiny.model(**(shape | changes))


@functools.cache
def params(config: Any) -> Any:
    return gpt.init(config, 0)


def points(config: Any) -> tuple[str, ...]:
    """Those that the architecture has."""
    absent = ("stream_middle", "feedforward_in", "feedforward_added")
    return tuple(p for p in POINTS if not (config.parallel_block and p in absent))


@functools.partial(jax.jit, static_argnames=("config", "listen"))
def hear(config: Any, params: Any, tokens: Any, listen: Any = (), edit: Any = None) -> gpt.Hidden:
    return gpt.hidden(config, params, tokens, segments_BT=SEGMENTS, listen=listen, edit=edit)


def close(a: Any, b: Any, terms: int) -> None:
    """Equal up to the rounding of float32 sums of so many terms, relative to the largest value."""
    bound = 4 * np.finfo(np.float32).eps * terms * np.abs(b).max()
    np.testing.assert_allclose(a, b, rtol=0, atol=bound)


# --- nothing asked ----------------------------------------------------------------------------


def lowered(config: Any, **asked: Any) -> str:
    run = jax.jit(lambda p, t: gpt.hidden(config, p, t, **asked))
    return run.lower(params(config), TOKENS).as_text()


@pytest.mark.parametrize("changes", [{}, {"scan_layers": True}, {"remat": "dots"}])
def test_nothing_asked_leaves_no_trace_in_the_program(changes, monkeypatch):
    config = make(**changes)
    with_points = lowered(config)
    assert lowered(config, listen=("stream",)) != with_points
    monkeypatch.setattr(Tap, "__call__", lambda self, name, x: x)
    assert lowered(config) == with_points


# --- hearing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_heard_fits_together(name):
    """Every point follows from the ones before it by the model's own formulas, in numpy."""
    config = make(**ARCHITECTURES[name])
    p = jax.device_get(params(config))
    x_BTD, cache, heard = jax.device_get(hear(config, p, TOKENS, points(config)))
    assert cache is None and heard.keys() == set(points(config))
    for point, x in heard.items():
        dims = ("L" if point in INSIDE else "") + POINTS[point]
        assert x.shape == tuple(SIZES[dim] for dim in dims), point
        assert x.dtype == np.float32

    h, block = heard, p["blocks"]
    attention, feedforward = block["attention"], block["feedforward"]
    np.testing.assert_array_equal(h["stream_in"][0], h["embedding"])
    np.testing.assert_array_equal(h["stream_in"][1:], h["stream"][:-1])
    weights, value = h["weights"], h["value"]
    close(weights.sum(-1), np.ones((L, B, K, N // K, T)), T)
    unseen = np.tril(np.ones((T, T))) * (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) == 0
    if config.windows == (None, 4):
        near = np.arange(T)[:, None] - np.arange(T) < 4
        unseen = unseen | (np.arange(L)[:, None, None, None] % 2 == 1) & ~near
    unseen = np.broadcast_to(unseen.reshape(-1, B, 1, 1, T, T), (L, B, K, N // K, T, T))
    assert (weights[unseen] == 0).all() and (weights[~unseen] > 0).all()
    largest = np.where(unseen, -np.inf, h["scores"]).max(-1, keepdims=True)
    softmax = np.where(unseen, 0, np.exp(h["scores"] - largest))
    close(weights, softmax / softmax.sum(-1, keepdims=True), T)
    heads = np.einsum("LBKGTS,LBSKH->LBTKGH", weights, value).reshape(L, B, T, N, H)
    close(h["heads"], heads, T)
    out = np.einsum("LBTNH,LNHD->LBTD", h["heads"], attention["out"])
    close(h["attention_out"], out + _bias(attention, "out_bias"), N * H)
    if name == "gpt2":  # where nothing is rotated, capped, normalised or mixed
        for point, n in (("query", "N"), ("key", "K"), ("value", "K")):
            own = np.einsum(f"LBTD,LD{n}H->LBT{n}H", h["attention_in"], attention[point])
            close(h[point], own + attention[f"{point}_bias"][:, None, None], D)
        q = h["query"].reshape(L, B, T, K, N // K, H)
        scores = np.einsum("LBTKGH,LBSKH->LBKGTS", q, h["key"]) * H**-0.5
        close(np.where(unseen, 0, h["scores"]), np.where(unseen, 0, scores), H)
    down = np.einsum("LBTF,LFD->LBTD", h["feedforward_hidden"], feedforward["down"])
    close(h["feedforward_out"], down + _bias(feedforward, "down_bias"), F)
    if name == "parallel":
        close(h["attention_added"], h["attention_out"] + h["feedforward_out"], 2)
        close(h["stream"], h["stream_in"] + h["attention_added"], 2)
    elif config.norm_placement != "post":
        close(h["stream_middle"], h["stream_in"] + h["attention_added"], 2)
        close(h["stream"], h["stream_middle"] + h["feedforward_added"], 2)
        if config.norm_placement == "pre":
            close(h["attention_added"], h["attention_out"], 1)
            close(h["feedforward_added"], h["feedforward_out"], 1)
    np.testing.assert_array_equal(h["final"], x_BTD)


def _bias(part: Any, name: str) -> Any:
    return part[name][:, None, None] if name in part else 0


@functools.cache
def heard_with_a_gradient(**changes: Any) -> Any:
    """All points of the windowed post-norm model, with a gradient through them."""
    config = make(**ARCHITECTURES["post"], **changes)

    def loss(p: Any) -> Any:
        heard = gpt.hidden(config, p, TOKENS, segments_BT=SEGMENTS, listen=points(config)).heard
        return (heard["stream"] * DIRECTION).sum(), heard

    return jax.jit(jax.grad(loss, has_aux=True))(gpt.init(make(**ARCHITECTURES["post"]), 0))


@pytest.mark.parametrize("changes", [{"scan_layers": True, "remat": "full"}, {"remat": "dots"}])
def test_layers_scanned_or_computed_again_are_heard_alike(changes):
    (slope, heard), (other_slope, other) = heard_with_a_gradient(), heard_with_a_gradient(**changes)
    assert heard.keys() == other.keys() == set(POINTS)
    for point in heard:
        close(other[point], heard[point], 8 * D)
    for a, b in zip(jax.tree.leaves(other_slope), jax.tree.leaves(slope), strict=True):
        if np.abs(b).max() > 1e-6:  # a key's bias moves all scores alike: its gradient is 0
            close(a, b, T)


@pytest.mark.parametrize("sizes", [tiny.CUBE, tiny.SEQUENCE], ids=str)
def test_a_mesh_hears_what_one_device_hears(sizes):
    config = make(**ARCHITECTURES["modern"], scan_layers=True)
    alone = jax.device_get(hear(config, params(config), TOKENS, points(config)).heard)
    with jax.set_mesh(tiny.mesh_of(sizes)):
        there = gpt.init(config, 0)
        placed = sharding.place(lambda a, b: (TOKENS[a:b], SEGMENTS[a:b]), B, "BT")
        run = jax.jit(
            lambda p, t, s: gpt.hidden(config, p, t, segments_BT=s, listen=points(config)).heard
        )
        heard = run(there, *placed)
        for point, x in heard.items():
            dims = ("L" if point in INSIDE else "") + POINTS[point]
            assert x.sharding.spec == sharding.spec(dims), point
    for point in alone:
        close(heard[point], alone[point], 8 * D)


def test_the_smallest_model_is_heard_under_vmap():
    config = make(layers=1, heads=1, kv_heads=1, head_dim=1, width=1, ff_dim=1, norm="parameterfree",
                  norm_placement="post")  # fmt: skip
    p, one = gpt.init(config, 0), np.zeros((4, 1, 1), np.int32)
    listen = tuple(POINTS)
    heard = jax.vmap(lambda t: gpt.hidden(config, p, t, listen=listen).heard)(one)
    assert {name: x.shape[0] for name, x in heard.items()} == dict.fromkeys(POINTS, 4)
    assert heard["weights"].shape == (4, 1, 1, 1, 1, 1, 1) and (heard["weights"] == 1).all()


def test_cached_tokens_are_heard_as_in_the_whole_text():
    config = make(**ARCHITECTURES["modern"])
    listen = tuple(p for p in points(config) if p not in ("scores", "weights"))
    whole = jax.jit(lambda p: gpt.hidden(config, p, TOKENS, listen=listen).heard)(params(config))

    @jax.jit
    def halves(p):
        cache, parts = gpt.init_cache(config, B, T), []
        for half in np.split(TOKENS, 2, axis=1):
            _, cache, heard = gpt.hidden(config, p, half, cache=cache, listen=listen)
            parts.append(heard)
        return parts

    first, second = halves(params(config))
    for point in listen:
        axis = 1 if point in OUTSIDE else 2
        close(jnp.concatenate([first[point], second[point]], axis), whole[point], 8 * D)


def test_only_what_a_function_keeps_is_heard():
    config = make(scan_layers=True)
    whole = hear(config, params(config), TOKENS, ("scores",)).heard["scores"]
    largest = jax.jit(
        lambda p: (
            gpt.hidden(config, p, TOKENS, segments_BT=SEGMENTS, listen={"scores": jnp.max}).heard
        )
    )(params(config))
    np.testing.assert_array_equal(largest["scores"], whole.max((1, 2, 3, 4, 5)))


# --- editing ----------------------------------------------------------------------------------


@functools.cache
def editable(scan: bool) -> Any:
    """One program for all edits: (parameters, tokens, values of all points, edit of each) -> Hidden.

    The edit of a point is 0: none, 1: its value put in, 2: zeros.
    """
    config = make(scan_layers=scan)

    def run(p: Any, tokens: Any, values: Any, how: dict[str, Any]) -> gpt.Hidden:
        def edit(point: str) -> Any:
            def change(x: jax.Array, layer: Any) -> jax.Array:
                value = values[point] if point in OUTSIDE else values[point][layer]
                return jnp.select([how[point] == 1, how[point] == 2], [value, 0 * x], x)

            return change

        edits = {point: edit(point) for point in POINTS}
        return gpt.hidden(config, p, tokens, segments_BT=SEGMENTS, listen=tuple(POINTS), edit=edits)

    return jax.jit(run)


@functools.cache
def unedited(scan: bool) -> tuple[gpt.Hidden, gpt.Hidden]:
    """TOKENS and OTHER in the program of `editable`, so that equal means bitwise equal."""
    config = make(scan_layers=scan)
    shapes = jax.eval_shape(lambda p: hear(config, p, TOKENS, tuple(POINTS)), params(config)).heard
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    run = editable(scan)
    return tuple(run(params(config), t, zeros, dict.fromkeys(POINTS, 0)) for t in (TOKENS, OTHER))


@pytest.mark.parametrize("scan", [False, True])
def test_own_values_change_nothing_and_zeros_at_any_point_do(scan):
    p, plain = params(make(scan_layers=scan)), unedited(scan)[0]
    again = editable(scan)(p, TOKENS, plain.heard, dict.fromkeys(POINTS, 1))
    np.testing.assert_array_equal(again.x_BTD, plain.x_BTD)
    for point in POINTS:
        how = dict.fromkeys(POINTS, 0) | {point: 2}
        zeros = editable(scan)(p, TOKENS, plain.heard, how)
        assert np.abs(zeros.x_BTD - plain.x_BTD).max() > 1e-3, point
        assert not zeros.heard[point].any()  # what is heard is the edited value


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("point", ["embedding", "stream", "final"])
def test_all_of_another_text_put_in_gives_the_other_text(point, scan):
    _, other = unedited(scan)
    how = dict.fromkeys(POINTS, 0) | {point: 1}
    put_in = editable(scan)(params(make(scan_layers=scan)), TOKENS, other.heard, how)
    np.testing.assert_array_equal(put_in.x_BTD, other.x_BTD)


@pytest.mark.parametrize("scan", [False, True])
def test_a_head_of_one_layer_taken_out_is_its_rows_of_out_set_to_zero(scan):
    config = make(scan_layers=scan)

    def without(x: jax.Array, layer: Any) -> jax.Array:
        return jnp.where((jnp.asarray(layer) == 1) & (jnp.arange(N)[:, None] == 2), 0, x)

    run = jax.jit(
        lambda p: gpt.hidden(config, p, TOKENS, segments_BT=SEGMENTS, edit={"heads": without})
    )
    p = jax.tree.map(jnp.copy, params(config))
    p["blocks"]["attention"]["out"] = p["blocks"]["attention"]["out"].at[1, 2].set(0)
    close(run(params(config)).x_BTD, hear(config, p, TOKENS).x_BTD, 8 * D)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["listen", "edit"])
def test_a_point_that_is_none_is_refused_with_the_list(asked):
    value = {"strem": lambda x, layer: x} if asked == "edit" else ("strem",)
    with pytest.raises(ConfigError, match=r"'strem' is not one of: embedding, final.*'stream'"):
        gpt.hidden(make(), params(make()), TOKENS, **{asked: value})


@pytest.mark.parametrize(
    "changes, point",
    [
        ({"parallel_block": True}, "stream_middle"),
        ({"parallel_block": True, "scan_layers": True}, "feedforward_in"),
        ({"attention": "block"}, "weights"),
    ],
)
@pytest.mark.parametrize("asked", ["listen", "edit"])
def test_a_point_that_this_model_does_not_have_is_refused(changes, point, asked):
    config = make(**changes)
    value = {point: lambda x, layer: x} if asked == "edit" else (point,)
    with pytest.raises(ConfigError, match=rf"'{point}' does not exist .* it has: .*stream_in"):
        gpt.hidden(config, params(config), TOKENS, **{asked: value})


@pytest.mark.parametrize("bad", [lambda x, _: x[:, :1], lambda x, _: x.astype(jnp.bfloat16)])
def test_an_edit_that_changes_shape_or_dtype_is_refused(bad):
    config = make()
    with pytest.raises(ValueError, match=r"the edit at 'stream' made .* must keep shape and dtype"):
        gpt.hidden(config, params(config), TOKENS, edit={"stream": bad})
