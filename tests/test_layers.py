"""The parts of a block against closed forms, literal masks and a loop in float64."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import model as gpt
from gptjax import sharding
from gptjax.config import ConfigError, Model
from gptjax.layers import attention, feedforward
from gptjax.layers.attention import (
    ATTENTION,
    Row,
    block,
    choices,
    kernel_for,
    resolve,
    splash,
    tiles,
)
from gptjax.layers.context import Tap
from gptjax.layers.feedforward import FEEDFORWARD, FeedForward, hidden_width
from gptjax.layers.linear import PRODUCTS, keep, linear, on_grid
from gptjax.layers.norm import NORM, HeadNorm, Norm, row_sums
from gptjax.layers.parameter import INIT, Scaled, Spec, draw
from gptjax.layers.position import alibi_slopes, rope, sinusoid
from gptjax.layers.scores import Scores
from tests import tiny


def model(**changes) -> Model:
    return tiny.model(**changes)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# What a query may see.


def visible(T: int = 5, **changes) -> np.ndarray:
    index = jnp.arange(T)[None]
    return np.asarray(Scores(index, index, **changes).visible()).astype(int)


def test_the_causal_mask():
    assert visible()[0].tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("window", [2, jnp.int32(2)], ids=["static", "traced"])
def test_a_window_of_two_sees_itself_and_one_before(window):
    assert visible(window=window)[0].tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_segments_see_only_themselves():
    segments = jnp.asarray([[7, 7, 2, 2, 2], [1, 1, 1, 1, 1]])
    mask = visible(q_segments_BT=segments, k_segments_BS=segments)
    assert mask[0].tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert (mask[1] == visible()[0]).all()


def test_a_segment_and_a_window_together():
    segments = jnp.asarray([[0, 0, 0, 0, 1]])
    mask = visible(window=3, q_segments_BT=segments, k_segments_BS=segments)
    assert mask[0].tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_queries_that_follow_a_cache_start_at_each_rows_length():
    scores = Scores(jnp.asarray([[3, 4], [0, 1]]), jnp.arange(6)[None], window=4, cached=True)
    assert scores.visible().astype(int).tolist() == [
        [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]],
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
    ]


# The kernels.


def attend_by_loops(q, k, v, visible_BTS, slopes_N=None, softcap=None) -> np.ndarray:
    """Attention of one query, row and head at a time, in float64, from its definition."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    (B, T, N, H), K = q.shape, k.shape[2]
    o = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        seen = np.flatnonzero(visible_BTS[b, t])
        z = k[b, seen, n // (N // K)] @ q[b, t, n] / np.sqrt(H)
        if softcap is not None:
            z = softcap * np.tanh(z / softcap)
        if slopes_N is not None:
            z = z - slopes_N[n] * (t - seen)
        w = np.exp(z - z.max())
        o[b, t, n] = (w / w.sum()) @ v[b, seen, n // (N // K)]
    return o


SCORES = [
    {},
    {"window": 5},
    {"segments": True},
    {"softcap": 1.5},
    {"slopes": True},
    {"window": 5, "segments": True, "softcap": 1.5},
]
# Each kernel at a length that its blocks do not divide, where it allows that.
KERNELS = {
    name: (functools.partial(splash, interpret=True), 128)
    if row.kernel is splash
    else (row.kernel, 11)
    for name, row in ATTENTION.items()
    if name != "cudnn"  # needs a GPU; its refusals are tested below
}


def scores_of(T: int, rows: int, window=None, segments=False, softcap=None, slopes=False) -> Scores:
    index = jnp.arange(T)[None]
    ids = jnp.asarray([np.arange(T) >= 4 + 3 * b for b in range(rows)], jnp.int32)
    ids = ids if segments else None
    slopes_N = alibi_slopes(tiny.MODEL) if slopes else None
    return Scores(index, index, ids, ids, window, slopes_N, softcap)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)


CASES = [
    (name, changes)
    for name in KERNELS
    for changes in SCORES
    if not (name in ("splash", "flash") and "slopes" in changes)  # refused, see below
    and not (name == "flash" and "softcap" in changes)
]


@pytest.mark.parametrize(
    "name, changes", CASES, ids=[f"{name}-{','.join(c) or 'causal'}" for name, c in CASES]
)
def test_a_kernel_is_attention_by_loops_and_its_gradient_is_plains(name, changes, small_blocks):
    kernel, T = KERNELS[name]
    rows, heads, K, H = 2, 4, 2, 8
    q, k, v, do = (normal(rows, T, n, H, seed=i) for i, n in enumerate((heads, K, K, heads)))
    scores = scores_of(T, rows, **changes)

    @functools.partial(jax.jit, static_argnums=0)
    def run(kernel, q, k, v):
        o, pull = jax.vjp(lambda *qkv: kernel(*qkv, scores), q, k, v)
        return o, pull(do)

    o, gradients = run(kernel, q, k, v)
    visible = np.broadcast_to(scores.visible(), (rows, T, T))
    expected = attend_by_loops(q, k, v, visible, scores.slopes_N, scores.softcap)
    np.testing.assert_allclose(o, expected, atol=2e-6)  # float32 sums of 128 at most
    for got, want in zip(gradients, run(ATTENTION["plain"].kernel, q, k, v)[1], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"window": 5, "segments": True}])
def test_blocks_on_a_mesh_are_those_of_one_device(changes, small_blocks):
    inputs = [normal(4, 11, n, 8, seed=i) for i, n in enumerate((4, 2, 2, 4))]

    @jax.jit
    def run(q, k, v, do):
        o, pull = jax.vjp(lambda *qkv: block(*qkv, scores_of(11, 4, **changes)), q, k, v)
        return o, pull(do)

    expected = run(*inputs)
    with jax.set_mesh(tiny.mesh_of(tiny.CUBE)):
        dims = ("BTNH", "BSKH", "BSKH", "BTNH")
        got = run(*map(jax.device_put, inputs, map(sharding.out, dims)))
        for x, d in zip(jax.tree.leaves(got), (dims[0], *dims[:3]), strict=True):
            assert jax.typeof(x).sharding.spec == sharding.out(d)
    # Rows and heads are apart: no sum is taken in another order.
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-6), got, expected)


def test_the_gradient_of_plain_is_that_of_finite_differences(small_blocks):
    q, k, v = (normal(1, 5, n, 4, seed=i) for i, n in enumerate((4, 2, 2)))
    scores = scores_of(5, 1, window=3, softcap=1.5, slopes=True)
    direction = [normal(*a.shape, seed=9) for a in (q, k, v)]
    f = jax.jit(
        lambda q, k, v: (ATTENTION["plain"].kernel(q, k, v, scores) * normal(1, 5, 4, 4)).sum()
    )
    slope = sum(
        jnp.vdot(g, d) for g, d in zip(jax.grad(f, (0, 1, 2))(q, k, v), direction, strict=True)
    )

    def f64(step: float) -> float:
        moved = [
            np.asarray(a, float) + step * np.asarray(d)
            for a, d in zip((q, k, v), direction, strict=True)
        ]
        o = attend_by_loops(*moved, scores.visible(), scores.slopes_N, scores.softcap)
        return (o * np.asarray(normal(1, 5, 4, 4))).sum()

    assert slope == pytest.approx((f64(1e-5) - f64(-1e-5)) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_grouped_heads_are_repeated_heads(name, small_blocks):
    kernel, T = KERNELS[name]
    scores = scores_of(T, 1)
    run = jax.jit(lambda q, k, v: kernel(q, k, v, scores))
    for K in (1, 2):
        q, k, v = (normal(1, T, n, 8, seed=i) for i, n in enumerate((4, K, K)))
        repeated = (jnp.repeat(a, 4 // K, axis=2) for a in (k, v))
        np.testing.assert_allclose(run(q, k, v), run(q, *repeated), atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"window": 5}, {"softcap": 1.5}, {"slopes_N": True}])
def test_tiles_are_attention_to_a_cache_whatever_its_room(changes, monkeypatch):
    """By loops; and bit for bit the same in a larger cache, and beside a longer or an idle row."""
    monkeypatch.setattr(attention, "TILE", 4)
    if "slopes_N" in changes:
        changes = {"slopes_N": alibi_slopes(tiny.MODEL)}
    T, heads, K, H, S = 3, 4, 2, 8, 12
    q = normal(2, T, heads, H, seed=1)
    k, v = (normal(2, 2 * S, K, H, seed=i) for i in (2, 3))

    @functools.partial(jax.jit, static_argnums=0)
    def run(room, start_B):
        index = start_B[:, None] + jnp.arange(T)
        scores = Scores(index, jnp.arange(room)[None], cached=True, **changes)
        return tiles(q, k[:, :room], v[:, :room], scores)

    start_B = np.array([6, 1])
    o = run(S, start_B)
    visible = Scores(
        start_B[:, None] + np.arange(T), np.arange(S)[None], window=changes.get("window")
    )
    slopes, softcap = changes.get("slopes_N"), changes.get("softcap")
    want = attend_by_loops(q, k[:, :S], v[:, :S], visible.visible(), slopes, softcap)
    np.testing.assert_allclose(o, want, atol=1e-6)
    np.testing.assert_array_equal(run(2 * S, start_B), o)
    for other in (20, 2 * S):
        np.testing.assert_array_equal(run(2 * S, np.array([6, other]))[0], o[0])
        assert np.isfinite(run(2 * S, np.array([6, other]))).all()


def test_tiles_read_the_rows_of_a_cache_that_they_are_told(monkeypatch):
    monkeypatch.setattr(attention, "TILE", 4)
    q = normal(2, 1, 4, 8, seed=1)
    k, v = (normal(5, 12, 2, 8, seed=i) for i in (2, 3))
    row_B = np.array([3, 1])
    scores = Scores(np.array([[7], [2]]), np.arange(12)[None], cached=True)
    chosen = tiles(q, k, v, dataclasses.replace(scores, row_B=row_B))
    np.testing.assert_array_equal(chosen, tiles(q, k[row_B], v[row_B], scores))


@pytest.mark.parametrize("rows", [None, [2, 0, 3]])
def test_keys_are_kept_alike_whatever_the_platform(rows, monkeypatch):
    row_B = None if rows is None else jnp.array(rows)
    cache, new = normal(5 if rows else 3, 2, 6, 4), normal(3, 2, 1, 4, seed=1)
    start_B = jnp.array([3, 0, 5])
    want = np.array(cache)
    want[rows or [0, 1, 2], :, start_B] = new[:, :, 0]
    np.testing.assert_array_equal(attention._extend(cache, new, start_B, row_B), want)
    elsewhere = lambda *arrays, default, **_: default(*arrays)  # noqa: E731
    monkeypatch.setattr(jax.lax, "platform_dependent", elsewhere)
    np.testing.assert_array_equal(attention._extend(cache, new, start_B, row_B), want)


@pytest.mark.parametrize("width", [3, 64, 576])
def test_a_row_has_one_sum_however_many_rows_there_are(width):
    """While text is generated, also where the compiler orders the sum of few numbers otherwise."""
    x = normal(64, width)

    @jax.jit
    @sharding.phase("decoding")
    def sums(x):
        return row_sums(x)

    whole = sums(x)
    assert whole.shape == (64, 1)
    np.testing.assert_allclose(whole[:, 0], np.sum(np.asarray(x, np.float64), -1), atol=1e-4)
    for rows in (1, 2, 3, 8, 33):
        np.testing.assert_array_equal(sums(x[:rows]), whole[:rows])
        np.testing.assert_array_equal(sums(x[:rows].reshape(1, rows, width))[0], whole[:rows])


# Which kernel, and what it refuses.

AUTO = model(attention="auto", dtype="bfloat16", head_dim=16)
REFUSED = {
    "cudnn": [
        ({"attention_softcap": 1.0}, 128, "softcapped scores"),
        ({"position": "alibi"}, 128, "ALiBi"),
        ({"dtype": "float32"}, 128, "model.dtype='float32'"),
        ({}, 127, "127 tokens, no multiple of 2"),
        ({"head_dim": 12}, 128, "heads of width 12"),
        ({"head_dim": 264}, 128, "heads of width 264"),
    ],
    "flash": [
        ({"dtype": "float32", "attention_softcap": 1.0}, 128, "softcapped scores"),
        ({"dtype": "float32", "position": "alibi"}, 128, "ALiBi"),
        ({"dtype": "float32", "head_dim": 12}, 128, "heads of width 12"),
    ],
    "splash": [
        ({"position": "alibi"}, 128, "ALiBi"),
        ({}, 100, "100 tokens, no multiple of 128"),
        ({}, 1, "1 tokens, no multiple of 128"),
    ],
}


def refusal(config, length, platform=None):
    """Why a config is refused at a length, in a line; None if it is not."""
    try:
        if platform is not None:
            attention.check(config, platform)
            config = resolve(config, platform)
        kernel_for(config, length)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "name, changes, length, reason",
    [(name, *case) for name, cases in REFUSED.items() for case in cases],
)
def test_a_refusal_is_one_line_that_says_what_to_use(name, changes, length, reason):
    config = dataclasses.replace(AUTO, attention=name, **changes)
    advice = "use model.attention='auto' or 'plain'"
    assert refusal(config, length).startswith(f"model.attention={name!r} does not support {reason}")
    assert refusal(config, length).endswith(advice) and "\n" not in refusal(config, length)
    # In the model too, whoever forgot to ask before.
    x_BTNH = jnp.zeros((1, length, 4, 16))
    with pytest.raises(ConfigError, match=re.escape(advice)):
        attention.attend(config, x_BTNH, x_BTNH, x_BTNH, scores_of(length, 1))


@pytest.mark.parametrize("length", [1, 2, 100, 127, 128, 200, 256])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu", "other"])
@pytest.mark.parametrize(
    "changes", [{}, *(case[0] for cases in REFUSED.values() for case in cases)]
)
def test_what_is_advised_is_not_refused_nor_what_was_asked(changes, platform, length):
    for name in choices():
        config = dataclasses.replace(AUTO, attention=name, **changes)
        if name in ("plain", "block") or name.startswith("auto"):
            assert refusal(config, length, platform) is None
        elif ATTENTION[name].auto != platform:
            assert f"devices of platform '{platform}'" in refusal(config, length, platform)
        # `auto` takes a platform's kernel wherever it is not refused.
        else:
            chosen = kernel_for(
                resolve(dataclasses.replace(config, attention="auto"), platform), length
            )
            otherwise = "block" if platform == "cpu" else "plain"
            assert chosen == (otherwise if refusal(config, length, platform) else name)


@pytest.mark.parametrize(
    "changes, length, cpu, gpu, tpu",
    [
        ({}, 128, "flash", "cudnn", "splash"),
        ({"dtype": "float32"}, 128, "flash", "plain", "splash"),
        ({"dtype": "float32", "windows": (64,)}, 1, "flash", "plain", "plain"),
        ({"dtype": "float32", "position": "alibi"}, 128, "block", "plain", "plain"),
        ({"dtype": "float32", "attention_softcap": 50.0}, 128, "block", "plain", "splash"),
        ({"dtype": "float32", "head_dim": 12}, 128, "block", "plain", "splash"),
        ({"windows": (64,), "scan_layers": True}, 128, "flash", "cudnn", "splash"),
        ({"windows": (64, None)}, 128, "flash", "cudnn", "splash"),
        ({"windows": (64, None), "scan_layers": True}, 128, "flash", "cudnn", "splash"),
        ({"position": "alibi"}, 128, "block", "plain", "plain"),
        ({"attention_softcap": 50.0}, 128, "block", "plain", "splash"),
        ({}, 100, "flash", "cudnn", "plain"),
        ({}, 127, "flash", "plain", "plain"),
        ({}, 256, "flash", "cudnn", "splash"),
        ({"head_dim": 12}, 128, "block", "plain", "splash"),
        ({"head_dim": 264}, 128, "flash", "plain", "splash"),
        ({"attention": "plain"}, 128, "plain", "plain", "plain"),
        ({"attention": "block"}, 128, "block", "block", "block"),
    ],
)
def test_auto_is_the_platforms_kernel_where_it_can_and_plain_where_it_cannot(
    changes, length, cpu, gpu, tpu
):
    """By the length at hand, whatever the context that the model is trained with."""
    for context in (length, 256, 512):
        config = dataclasses.replace(AUTO, context=context, **changes)
        for platform, kernel in {"cpu": cpu, "gpu": gpu, "tpu": tpu}.items():
            settled = resolve(config, platform)
            assert resolve(settled, platform) == settled
            assert kernel_for(settled, length) == kernel


@pytest.mark.parametrize(
    "name", ["xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops"]
)
def test_what_is_to_be_the_same_bits_on_a_gpu_is_not_cudnns(name, monkeypatch):
    settled, asked = resolve(AUTO, "gpu"), dataclasses.replace(AUTO, attention="cudnn")
    for value, kernel in {"true": "plain", "false": "cudnn"}.items():
        monkeypatch.setenv("XLA_FLAGS", f"--xla_gpu_autotune_level=0 --{name}={value}")
        assert kernel_for(settled, 128) == kernel
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=true")
    assert f"does not support XLA_FLAGS=--{name}=true" in refusal(asked, 128)


def test_auto_that_was_not_settled_is_plain():
    assert kernel_for(AUTO, 128) == "plain"


def test_a_new_kernel_is_a_function_and_a_row(monkeypatch):
    met = []

    def kernel(q, k, v, scores):
        met.append(q.shape[1])
        return ATTENTION["plain"].kernel(q, k, v, scores)

    rows = {"new": Row(kernel, auto="cpu", multiple=4, lacks=lambda c: {"bias": c.bias})}
    monkeypatch.setattr(attention, "ATTENTION", rows | ATTENTION)
    settled = resolve(model(attention="auto", bias=False), "cpu")
    assert [kernel_for(settled, length) for length in (8, 9)] == ["new", "block"]
    assert kernel_for(dataclasses.replace(settled, bias=True), 8) == "block"
    x_BTNH = normal(1, 8, 4, 4)
    attention.attend(settled, x_BTNH, x_BTNH, x_BTNH, scores_of(8, 1))
    cached = dataclasses.replace(scores_of(8, 1), cached=True)
    attention.attend(settled, x_BTNH, x_BTNH, x_BTNH, cached)  # by `plain`
    assert met == [8]


def test_an_unknown_kernel_is_one_line_with_the_choices():
    message = "'fused' is not one of: auto, plain, flash, block, cudnn, splash"
    with pytest.raises(ConfigError, match=message):
        resolve(model(attention="fused"), "cpu")
    with pytest.raises(ConfigError, match=message):
        kernel_for(model(attention="fused"), 8)


# Products.


def on_floats(x, mantissa: int, least: int, largest: float) -> np.ndarray:
    """x in float64 on a grid of floats, its largest number scaled to the grid's."""
    x = np.asarray(x, np.float64)
    scale = abs(x).max() / largest
    exponent = np.maximum(np.frexp(x / scale)[1] - 1, least)
    spacing = 2.0 ** (exponent - mantissa)
    return np.round(x / scale / spacing) * spacing * scale  # np.round: ties to even


# Mantissa bits, exponent of the least normal number, largest number: Micikevicius et al. 2022.
E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)


def test_fp8_products_are_those_of_numbers_on_its_grids():
    x, kernel, g = normal(2, 5, 16), normal(16, 4, 8, seed=1), normal(2, 5, 4, 8, seed=2)
    y, pull = jax.vjp(lambda x, k: linear("BTD,DNH->BTNH", x, k, "fp8"), x, kernel)
    for got, equation, a, b in (
        (y, "BTD,DNH->BTNH", on_floats(x, *E4M3), on_floats(kernel, *E4M3)),
        (pull(g)[0], "BTNH,DNH->BTD", on_floats(g, *E5M2), on_floats(kernel, *E4M3)),
        (pull(g)[1], "BTD,BTNH->DNH", on_floats(x, *E4M3), on_floats(g, *E5M2)),
    ):
        # Float32 sums of 32 products at most, and three roundings of scales.
        most = np.einsum(equation, abs(a), abs(b)).max()
        np.testing.assert_allclose(got, np.einsum(equation, a, b), atol=35 * 2**-24 * most)


def on_integers(x, *summed: int) -> np.ndarray:
    """x in float64 on 255 even steps, each group along the axes `summed` on steps of its own."""
    x = np.asarray(x)
    step = abs(x).max(summed, keepdims=True) / np.float32(127)
    return np.round(x / step).astype(np.float64) * step


def test_int8_products_are_those_of_whole_numbers():
    """Each token and each output has its own step; gradients are those of what is multiplied."""
    kernel, g = normal(4, 16, 8, seed=1), normal(2, 5, 8, seed=2)
    x = normal(2, 5, 4, 16) * np.array([1, 100, 0.01, 7, 3])[:, None, None]
    # As the attention's output, which sums two dims.
    y, pull = jax.vjp(lambda x, k: linear("BTNX,NXD->BTD", x, k, "int8"), x, kernel)
    whole_x, whole_kernel, g_wide = on_integers(x, 2, 3), on_integers(kernel, 0, 1), np.float64(g)
    for got, equation, a, b in (
        (y, "BTNX,NXD->BTD", whole_x, whole_kernel),
        (pull(g)[0], "BTD,NXD->BTNX", g_wide, whole_kernel),
        (pull(g)[1], "BTNX,BTD->NXD", whole_x, g_wide),
    ):
        # Of y only the scales and their product are rounded, of gradients sums of at most 10.
        most = np.einsum(equation, abs(a), abs(b))
        np.testing.assert_array_less(abs(got - np.einsum(equation, a, b)), 14 * 2**-24 * most)


def test_products_of_bfloat16_are_summed_in_float32_on_a_cpu():
    """Else XLA would widen the operands, and processors that multiply bfloat16 would not do it."""
    config = model(dtype="bfloat16", attention="flash", head_dim=8)
    params = jax.tree.map(lambda spec: spec.shape, gpt.abstract_params(config))
    params = jax.tree.map(jnp.zeros, params, is_leaf=lambda leaf: isinstance(leaf, tuple))
    tokens_BT = jnp.zeros((2, 8), jnp.int32)
    grad = jax.grad(lambda params: gpt.apply(config, params, tokens_BT).sum())
    lowered = jax.jit(grad).lower(params).as_text()
    dots = re.findall(r"dot_general.*-> tensor<[\dx]*(\w+)>", lowered)
    assert len(dots) > 20 and set(dots) == {"f32"}


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_parameter_that_is_kept_rounded_gives_the_same_products(products):
    """Of one layer of a stack, whose layers share no scale."""
    x = normal(2, 5, 16)
    for role, fan_in, equation in (
        ("matrix", "D", "BTD,DNH->BTNH"),
        ("unembedding", "D", "BTD,DV->BTV"),
        ("embedding", "D", "BTD,VD->BTV"),
    ):
        dims = equation.replace("->", ",").split(",")[1]
        kernel = normal(3, *({"D": 16, "N": 4, "H": 8, "V": 12}[d] for d in dims), seed=1)
        kernel = kernel * jnp.arange(1, 4).reshape(3, *(1 for _ in dims))
        spec = Spec(kernel.shape[1:], dims, 0.0, 1.0, role, fan_in).stacked(3)
        kept = jax.tree.map(lambda k: k[1], keep(products, spec, kernel))
        rounds = role in PRODUCTS[products].roles
        assert isinstance(kept, Scaled) == rounds
        name = products if rounds else "dtype"
        got, want = (linear(equation, x, k, name) for k in (kept, kernel[1]))
        # The same numbers of 8 bits; XLA may divide a vector of scales and one scale differently,
        # by a last bit, and each result is rounded twice more.
        np.testing.assert_allclose(got, want, rtol=3 * 2**-23 if rounds else 0)
        if rounds:
            assert kept.values.dtype.itemsize == 1
            assert (got != linear(equation, x, kernel[1])).any()


def test_what_is_rounded_for_logits_has_the_gradient_of_what_it_was():
    x = normal(2, 5, 16)
    np.testing.assert_allclose(on_grid("int8", x, "embedding"), on_integers(x, 2), rtol=2**-22)
    y, pull = jax.vjp(lambda x: on_grid("int8", x, "embedding"), x)
    assert (y != x).any()
    np.testing.assert_array_equal(pull(3 * x)[0], 3 * x)
    assert on_grid("fp8", x, "embedding") is x


@pytest.mark.parametrize("size", [8, 72])  # XLA's maximum of many numbers is another program
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_rounded_products_of_zeros_are_zeros_and_what_is_not_finite_shows(name, size):
    x, kernel = normal(1, size, size), normal(size, size, seed=1)
    product = jax.jit(lambda x, kernel: linear("BTD,DF->BTF", x, kernel, name))
    assert (product(0 * x, kernel) == 0).all() and (product(x, 0 * kernel) == 0).all()
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert jnp.isnan(product(x.at[0, 1, 2].set(bad), kernel)[0, 1]).all()
        assert jnp.isnan(product(x, kernel.at[2, 1].set(bad))[..., 1]).all()
    assert product(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_rounded_products_on_a_mesh_are_those_of_one_device(name):
    inputs = normal(4, 6, 16), normal(16, 8, seed=1), normal(4, 6, 8, seed=2)

    @jax.jit
    def run(x, kernel, g):
        y, pull = jax.vjp(lambda x, k: linear("BTD,DF->BTF", x, k, name), x, kernel)
        return y, *pull(g)

    expected = run(*inputs)
    with jax.set_mesh(tiny.mesh_of(tiny.CUBE)):
        dims = ("BTD", "DF", "BTF")
        got = run(*map(jax.device_put, inputs, map(sharding.out, dims)))
        for x, d in zip(got, ("BTF", "BTD", "DF"), strict=True):
            assert jax.typeof(x).sharding.spec == sharding.out(d)
    # The scales are equal, as is each number on its grid: only sums of 24 at most differ.
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=2e-5), got, expected)


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_what_one_device_has_that_is_not_finite_shows_in_rounded_products(name):
    """Of a sum over numbers that are on several."""
    x, kernel = normal(4, 6, 16).at[1, 2, 3].set(jnp.nan), normal(16, 8, seed=1)
    with jax.set_mesh(tiny.mesh_of(tiny.CUBE)):
        placed = map(jax.device_put, (x, kernel), map(sharding.out, ("BTF", "FD")))
        y = jax.jit(lambda x, kernel: linear("BTF,FD->BTD", x, kernel, name))(*placed)
        assert np.isnan(y)[1, 2].all()


# Positions.


def test_alibi_slopes_of_eight_heads():
    expected = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(model(heads=8)).tolist() == expected  # exact powers of two
    index = jnp.arange(3)[None]
    bias = Scores(index, index, slopes_N=alibi_slopes(model(heads=8))).bias()
    assert bias[0, 1].tolist() == [[0, 1 / 4, 2 / 4], [-1 / 4, 0, 1 / 4], [-2 / 4, -1 / 4, 0]]


def test_rope_turns_channel_pairs_by_their_angles():
    c = model(head_dim=4, rope_base=100.0)  # angles p and p / 100^(2/4)
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    p = 5
    first, second = (1 + 3j) * np.exp(1j * p), (2 + 4j) * np.exp(1j * p / 10)
    expected = [first.real, second.real, first.imag, second.imag]
    got = rope(c, x, jnp.full((1, 1), p))
    np.testing.assert_allclose(got.ravel(), expected, rtol=1e-6)


def test_rope_keeps_norms_and_scores_depend_on_the_distance_alone():
    c, T = model(head_dim=16), 6
    q, k = normal(1, T, 4, 16, seed=1), normal(1, T, 4, 16, seed=2)

    def scores(shift: int) -> jax.Array:
        position = jnp.arange(T)[None] + shift
        rotated = rope(c, q, position)
        np.testing.assert_allclose(
            jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-6
        )
        return jnp.einsum("BTNH,BSNH->BNTS", rotated, rope(c, k, position))

    np.testing.assert_allclose(scores(0), scores(50), atol=2e-5)  # sines of up to 56 radians
    assert abs(scores(0) - jnp.einsum("BTNH,BSNH->BNTS", q, k)).max() > 1
    # The same query and key, at equal distances everywhere.
    same = jnp.broadcast_to(q[:, :1], q.shape)
    rotated = rope(c, same, jnp.arange(T)[None])
    table = jnp.einsum("BTNH,BSNH->BNTS", rotated, rotated)[0, 0]
    np.testing.assert_allclose(table[1:, 1:], table[:-1, :-1], atol=1e-5)


def test_sinusoids_by_hand():
    got = sinusoid(model(width=4), jnp.asarray([[0, 3]]))
    expected = [[0, 1, 0, 1], [np.sin(3), np.cos(3), np.sin(0.03), np.cos(0.03)]]
    np.testing.assert_allclose(got[0], expected, atol=1e-7)


@pytest.mark.parametrize(
    "hook, changes, knob",
    [
        (lambda c: sinusoid(c, jnp.zeros((1, 1))), {"width": 15, "head_dim": 4}, "model.width"),
        (lambda c: rope(c, jnp.zeros((1, 1, 4, 5)), jnp.zeros((1, 1))), {"head_dim": 5}, "width"),
    ],
)
def test_an_odd_width_has_no_pairs(hook, changes, knob):
    with pytest.raises(ConfigError, match=f"even .*{knob}"):
        hook(model(**changes))


# Norms and the feed-forward.


def applied(module, x, *others, **params):
    return np.asarray(module.apply({"params": params}, x, *others))


@pytest.mark.parametrize("name", NORM)
def test_a_norm_by_its_definition_in_float64(name):
    c = model(norm=name, norm_eps=0.1)  # large enough to be seen
    x = 3 * normal(2, 5, 16) + 1
    scale, bias = normal(16, seed=1), normal(16, seed=2)
    params = {
        "layernorm": {"scale": scale, "bias": bias},
        "rmsnorm": {"scale": scale},
        "parameterfree": {},
    }[name]
    y = np.asarray(x, np.float64)
    if name != "rmsnorm":
        y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 0.1)
    y = y * np.asarray(params.get("scale", 1.0)) + np.asarray(params.get("bias", 0.0))
    np.testing.assert_allclose(applied(Norm(c), x, **params), y, atol=2e-6)
    # float32 inside, whatever comes in.
    low = Norm(c).apply({"params": params}, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    exact = Norm(c).apply({"params": params}, x.astype(jnp.bfloat16).astype(jnp.float32))
    assert (low == exact.astype(jnp.bfloat16)).all()


def test_norms_of_a_literal():
    x = jnp.asarray([[1.0, 3.0]])
    c = model(width=2, heads=1, norm_eps=1e-12)
    one = jnp.ones(2)
    centred = applied(Norm(c), x, scale=2 * one, bias=one)
    np.testing.assert_allclose(centred, [[-1, 3]], rtol=1e-6)
    rms = applied(Norm(dataclasses.replace(c, norm="rmsnorm")), x, scale=one)
    np.testing.assert_allclose(rms, [[5**-0.5, 3 * 5**-0.5]], rtol=1e-6)
    free = applied(Norm(dataclasses.replace(c, norm="parameterfree")), x)
    np.testing.assert_allclose(free, [[-1, 1]], rtol=1e-6)


def test_heads_are_normalised_each_for_itself():
    x, scale = 5 * normal(1, 3, 4, 4), normal(4, seed=1)
    got = applied(HeadNorm(model()), x, scale=scale)
    x64 = np.asarray(x, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def gelu(z):  # Hendrycks & Gimpel 2016, the tanh form
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


ACTIVATIONS = {
    "relu": lambda z: z * (z > 0),
    "gelu": gelu,
    "relu2": lambda z: z**2 * (z > 0),
    "swiglu": lambda z: z * sigmoid(z),
    "geglu": gelu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_feedforward_by_its_formula_in_float64(name):
    c = model(feedforward=name)
    D, F = c.width, hidden_width(c)
    p = {
        "up": normal(D, F, seed=1) / 4, "up_bias": normal(F, seed=2),
        "down": normal(F, D, seed=3) / 4, "down_bias": normal(D, seed=4),
    }  # fmt: skip
    gated = name in ("swiglu", "geglu")
    if gated:
        p |= {"gate": normal(D, F, seed=5) / 4, "gate_bias": normal(F, seed=6)}
    x = normal(2, 3, D)
    q = {key: np.asarray(value, np.float64) for key, value in p.items()}
    up = np.asarray(x, np.float64) @ q["up"] + q["up_bias"]
    f = ACTIVATIONS[name]
    hidden = f(x @ q["gate"] + q["gate_bias"]) * up if gated else f(up)
    expected = hidden @ q["down"] + q["down_bias"]
    np.testing.assert_allclose(applied(FeedForward(c), x, Tap(), **p), expected, atol=5e-6)


@pytest.mark.parametrize(
    ("ours", "own"), [(feedforward.gelu, jax.nn.gelu), (feedforward.silu, jax.nn.silu)]
)
def test_the_gradient_of_an_activation_from_its_input_and_result_is_that_of_float64(ours, own):
    ends = [0.0, 1e-38, 1e-29, 100.0, 1e10]  # of the least ones 1 / u is no normal number, or large
    u = np.concatenate([np.linspace(-12, 12, 2001), *([x, -x] for x in ends)]).astype(np.float32)
    y, pull = jax.vjp(ours, u)
    (slope,) = pull(jnp.ones_like(u))
    with jax.enable_x64(True):
        right, pull = jax.vjp(own, jnp.asarray(u, jnp.float64))
        (right_slope,) = pull(jnp.ones_like(right))
    # Roundings of 6e-8: of h, that of half an ulp of |u| < 6 is multiplied by k'(u) < 10; else h is u.
    np.testing.assert_allclose(y, right, rtol=4e-7, atol=1e-7)
    np.testing.assert_allclose(slope, right_slope, rtol=0, atol=4e-6)


# Initial values.


def test_draws_are_standard_normal_times_their_scale():
    got = np.asarray(draw(Spec((256, 256), "DF", 0.0, 0.5, "matrix"), "x", jax.random.key(0)))
    n = got.size
    # Moments of 65,536 values: within four standard errors.
    assert abs(got.mean()) < 4 * 0.5 / n**0.5
    assert abs(got.std() / 0.5 - 1) < 4 / (2 * n) ** 0.5
    z = got / 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs(np.mean(abs(z) < 1) - 0.682689) < 4 * (0.2166 / n) ** 0.5
    assert abs(z).max() < 4.4


def test_a_draw_depends_on_seed_and_path():
    spec = Spec((8, 8), "DF", 0.0, 1.0, "matrix")
    first = draw(spec, "a", jax.random.key(0))
    assert (first == draw(spec, "a", jax.random.key(0))).all()
    assert (first != draw(spec, "b", jax.random.key(0))).mean() > 0.9
    assert (first != draw(spec, "a", jax.random.key(1))).mean() > 0.9


# fan-in 16 and 4 layers, from the papers named in INIT.
SCALES = {
    "gpt2": {
        "embedding": 0.02, "position": 0.02, "matrix": 0.02, "router": 0.02,
        "residual": 0.02 / 8**0.5, "unembedding": 0.02,
    },
    "fan_in": {
        "embedding": 1 / 4, "position": 1 / 4, "matrix": 1 / 4, "router": 1 / 4,
        "residual": 1 / 4 / 8**0.5, "unembedding": 1 / 4,
    },
    "zero_out": {
        "embedding": 1 / 4, "position": 1 / 4, "matrix": 1 / 4, "router": 1 / 4, "residual": 0,
        "unembedding": 1 / 4,
    },
}  # fmt: skip


def test_every_feedforward_has_its_formula():
    assert {*ACTIVATIONS} == {name for name, row in FEEDFORWARD.items() if not row.experts}


@pytest.mark.parametrize("scheme", INIT)
def test_the_scale_of_each_role(scheme):
    got = {role: scale(16, 4) for role, scale in INIT[scheme].items()}
    assert got == pytest.approx(SCALES[scheme], rel=1e-12)
