"""Generation against the full forward, the transformers library, and the laws of chance."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gptjax import decode, sharding
from gptjax import model as gpt
from gptjax.config import Model, Sample, UserError
from gptjax.decode import Sampling, Text, cast, generate, keep_largest, stream, transform
from gptjax.layers import kernels
from gptjax.layers.linear import PRODUCTS
from gptjax.layers.parameter import Turned
from gptjax.layers.position import POSITION, ROPE_SCALING
from tests import tiny

CONTEXT, V, KNOWN = 24, 64, 60  # the model's vocabulary is padded by four ids
EOT = KNOWN - 1
MODEL = tiny.model(vocab_size=V, context=CONTEXT)
GREEDY = tiny.sample(max_new_tokens=12, temperature=0.0, top_p=None)
DRAWN = tiny.sample(
    max_new_tokens=12, temperature=0.9, top_k=30, top_p=0.95, repetition_penalty=1.2
)
PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [1], [3, 3, 0, 17])
OPTIONS: Any = {"seed": 0, "vocab_size": KNOWN, "end_of_text": EOT}

VARIANTS: list[dict[str, Any]] = [
    *({"position": name} for name in POSITION),
    {"kv_heads": 2, "scan_layers": True, "remat": "full"},
    {"kv_heads": 1, "windows": (3, None), "scan_layers": True, "position": "rope"},
    {"windows": (2,), "attention": "block", "qk_norm": True},
    {"value_residual": True, "tied": False, "logit_softcap": 5.0},
    {"norm_placement": "post", "attention_softcap": 2.0, "bias": False},
    {"norm_placement": "sandwich", "norm": "rmsnorm", "feedforward": "swiglu"},
    {"norm": "parameterfree", "parallel_block": True},
    *(
        {"position": "rope", "rope_scaling": name, "rope_factor": 2.0, "rope_original_context": 24}
        for name in ROPE_SCALING
    ),
]
INT8 = {"products": "int8"}


def named(value: Any) -> str | None:
    """A test's id."""
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


def parameters(config: Model) -> Any:
    """Random values everywhere, gains and biases too, so that no part of the model is idle."""
    rng = np.random.default_rng(0)
    # The scale makes logits of size 1 or so: no near ties between the largest.
    make = lambda spec: jnp.asarray(rng.normal(spec.mean, 0.4, spec.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(make, gpt.abstract_params(config))


@functools.cache
def texts(sample: Sample = DRAWN, *rows: int, seed: int = 0) -> list[Text]:
    prompts = [PROMPTS[row] for row in rows or range(3)]
    return generate(MODEL, parameters(MODEL), prompts, sample, **OPTIONS | {"seed": seed})


def begun(config: Model, params: Any, tokens_BS: Any, n_B: Any, end_B: Any) -> decode.State:
    """Prompts read into an empty cache."""
    layers = decode.empty_layers(config, *tokens_BS.shape)
    return decode._begin(config, params, layers, 0 * n_B, tokens_BS, tokens_BS, n_B, end_B)


def full_logits(config: Model, params: Any, rows: list[list[int]]) -> np.ndarray:
    """logits_BTV by `model.apply` over whole texts; by causality those of every prefix."""
    tokens_BT = np.zeros((len(rows), CONTEXT), np.int32)
    for row, ids in zip(tokens_BT, rows, strict=True):
        row[: len(ids)] = ids
    return np.asarray(jax.jit(gpt.apply, static_argnums=0)(config, params, tokens_BT))


@pytest.mark.parametrize(
    "changes, penalty",
    [({}, 1.5), *((changes, 1.0) for changes in (*VARIANTS, INT8, INT8 | {"tied": False}))],
    ids=named,
)
def test_greedy_text_is_the_argmax_of_the_full_forward(changes, penalty):
    sample = dataclasses.replace(GREEDY, repetition_penalty=penalty)
    config = dataclasses.replace(MODEL, **changes)
    params = parameters(config)
    got = generate(config, params, PROMPTS, sample, **OPTIONS | {"end_of_text": 0})
    rows = [prompt + text.ids for prompt, text in zip(PROMPTS, got, strict=True)]
    logits_BTV = full_logits(config, params, rows)[..., :KNOWN]
    for prompt, row, text, logits_TV in zip(PROMPTS, rows, got, logits_BTV, strict=True):
        expected = list(prompt)
        while len(expected) < len(prompt) + 12 and (expected == prompt or expected[-1] != 0):
            z = logits_TV[len(expected) - 1].copy()
            for seen in set(expected):
                z[seen] *= penalty ** (-1 if z[seen] > 0 else 1)
            expected.append(int(z.argmax()))
        stopped = expected[-1] == 0
        assert (row, text.ended) == (
            expected[: -1 if stopped else None],
            ("length", "stop")[stopped],
        )


@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_a_cache_grows_with_its_texts(chunk, monkeypatch):
    """One row is full from the start, one ends in a cache of 2, 8 and then 24 slots."""
    rows = [[*range(CONTEXT)], [1], [3, 3, 0, 17], [5] * 7]

    def written() -> list[list[int]]:
        weights = cast(MODEL, parameters(MODEL))
        parts = stream(MODEL, weights, rows, DRAWN, chunk=chunk, **OPTIONS)
        return [[i for text in row for i in text.ids] for row in zip(*parts, strict=True)]

    whole = written()
    monkeypatch.setattr(decode, "ROOM", 2)
    sizes, grow = [], decode._grow
    monkeypatch.setattr(decode, "_grow", lambda s, n: sizes.append(n) or grow(s, n))
    assert written() == whole and whole[0] == [] and len(whole[3]) > 2
    assert sizes == []  # the full row needs the whole cache
    rows = rows[1:2]
    monkeypatch.setattr(decode, "ROOM", 128)
    whole = written()
    monkeypatch.setattr(decode, "ROOM", 2)
    assert written() == whole and len(whole[0]) > 7
    assert sizes == [8, 24]


@pytest.mark.parametrize("changes", VARIANTS, ids=named)
def test_cached_logits_after_a_padded_prompt_are_those_of_the_full_forward(changes):
    config = dataclasses.replace(MODEL, **changes)
    params = parameters(config)
    n_B = np.array([7, 1, 4], np.int32)
    tokens_BS = np.full((3, CONTEXT), 33, np.int32)  # padding that would be noticed
    for row, prompt in zip(tokens_BS, PROMPTS, strict=True):
        row[: len(prompt)] = prompt

    @jax.jit
    def last_logits(params: Any, cache: Any) -> jax.Array:
        last_BT = tokens_BS[np.arange(3), n_B - 1][:, None]
        return gpt.logits(config, params, gpt.hidden(config, params, last_BT, cache=cache)[0])[:, 0]

    ready = decode.cast(config, params).params
    got = last_logits(ready, begun(config, ready, tokens_BS, n_B, n_B).cache)
    want = full_logits(config, params, list(PROMPTS))[np.arange(3), n_B - 1]
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def test_no_id_beyond_the_tokenizer_is_drawn():
    config = dataclasses.replace(MODEL, tied=False)
    params = parameters(config)
    kernel_DV = params["unembed"]["kernel"]
    # Opposite columns: whatever the hidden state, one of the padded ids has the largest logit.
    padded = jnp.stack([10 * kernel_DV[:, 0], -10 * kernel_DV[:, 0]] * 2, axis=1)
    params["unembed"]["kernel"] = kernel_DV.at[:, KNOWN:].set(padded)
    assert (full_logits(config, params, list(PROMPTS)).argmax(-1) >= KNOWN).mean() > 0.8
    for sample in (GREEDY, DRAWN):
        for text in generate(config, params, PROMPTS, sample, **OPTIONS):
            assert text.ids
            assert max(text.ids) < KNOWN


# Transforms.


@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("top_k", [None, 1, 17, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.9])
@pytest.mark.parametrize("penalty", [None, 1.3])
def test_transforms_equal_those_of_transformers(temperature, top_k, top_p, penalty):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    logits_BV = rng.normal(size=(8, 500), scale=3).astype(np.float32)
    logits_BV = np.round(logits_BV, 2 if top_p is None else 6)  # two decimals make ties
    tokens_BT = rng.integers(0, 500, (8, 60))
    wanted = [
        (penalty, hf.RepetitionPenaltyLogitsProcessor),
        (temperature, hf.TemperatureLogitsWarper),
        (top_k, hf.TopKLogitsWarper),
        (top_p, hf.TopPLogitsWarper),
    ]
    processors = hf.LogitsProcessorList(
        [make(value) for value, make in wanted if value is not None]
    )
    want = processors(torch.tensor(tokens_BT), torch.tensor(logits_BV)).numpy()
    seen_BV = (tokens_BT[:, :, None] == np.arange(500)).any(1)
    sampling = Sampling(temperature, top_k, top_p, penalty)
    got = jax.jit(jax.vmap(transform, (0, 0, None)))(logits_BV, seen_BV, sampling)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    # One rounding of a product or quotient.
    np.testing.assert_allclose(got, want, rtol=2e-7)


INF = np.inf


@pytest.mark.parametrize(
    "logits, weights, enough, kept",
    [
        ([1, -2, 3, 0.5], [1, 1, 1, 1], 2, [1, -INF, 3, -INF]),
        ([1, 3, 3, 2], [1, 1, 1, 1], 1, [-INF, 3, 3, -INF]),  # a tie at the threshold stays
        ([-1, -3, -2, -9], [1, 1, 1, 1], 3, [-1, -3, -2, -INF]),
        ([1, -2, 3, -INF], [1, 1, 1, 1], 9, [1, -2, 3, -INF]),  # more than there are
        ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4], 1e-9, [-INF, -INF, -INF, 4]),
        ([1, 2, 3, 4], [0.125, 0.125, 0.25, 0.5], 0.75, [-INF, -INF, 3, 4]),
        ([1, 2, 3, 4], [0.125, 0.125, 0.25, 0.5], 0.76, [-INF, 2, 3, 4]),
        ([5, 5, 5, 5], [0.25] * 4, 0.5, [5, 5, 5, 5]),
        ([1e-38, -1e-38, 0, 3e38], [1] * 4, 3, [1e-38, -INF, 0, 3e38]),
        ([1, np.nextafter(np.float32(1), 2)], [1] * 2, 1, [-INF, np.nextafter(np.float32(1), 2)]),
    ],
)
def test_the_largest_logits_that_weigh_enough_are_kept(logits, weights, enough, kept):
    got = keep_largest(jnp.float32(logits), jnp.float32(weights), jnp.float32(enough))
    np.testing.assert_array_equal(got, np.float32(kept))


def test_draws_follow_the_transformed_distribution():
    rows, prompt, params = 4000, PROMPTS[0], parameters(MODEL)
    sample = dataclasses.replace(DRAWN, max_new_tokens=1)
    ended = [
        (t.ids or [EOT])[0] for t in generate(MODEL, params, [prompt] * rows, sample, **OPTIONS)
    ]
    logits_V = full_logits(MODEL, params, [prompt])[0, len(prompt) - 1, :KNOWN]
    seen_V = np.isin(np.arange(KNOWN), prompt)
    probability = jax.nn.softmax(transform(logits_V, seen_V, Sampling(0.9, 30, 0.95, 1.2)))
    probability = np.asarray(probability, np.float64)
    counts = np.bincount(ended, minlength=KNOWN)
    assert not counts[probability == 0].any()
    often = probability * rows >= 5  # the usual floor of the chi-square approximation
    expected = np.append(probability[often], 1 - probability[often].sum()) * rows
    observed = np.append(counts[often], rows - counts[often].sum())
    assert often.sum() >= 8
    assert stats.chisquare(observed, expected / expected.sum() * rows).pvalue > 0.01


def test_draws_of_neighbouring_rows_and_steps_are_independent():
    params = jax.tree.map(jnp.zeros_like, parameters(MODEL))  # every token is equally likely
    sample = tiny.sample(max_new_tokens=12, temperature=1.0, top_p=None)
    # End-of-text lies beyond the vocabulary: no row ends early.
    got = generate(MODEL, params, [[1]] * 300, sample, **OPTIONS | {"end_of_text": KNOWN})
    ids_BT = np.array([t.ids for t in got])
    for same in (ids_BT[:, 1:] == ids_BT[:, :-1], ids_BT[1:] == ids_BT[:-1]):
        error = (1 / KNOWN / same.size) ** 0.5
        assert abs(same.mean() - 1 / KNOWN) < 4 * error


def test_the_penalty_spares_what_is_not_in_the_text():
    run = functools.partial(generate, MODEL, prompts=[[1], [5, 6, 7]], **OPTIONS)
    sample = dataclasses.replace(GREEDY, max_new_tokens=1)
    params = parameters(MODEL)
    (first,) = run(params, sample=sample)[0].ids
    assert first not in (0, 1)
    # Renamed to 0, the id of empty slots, it is still the likeliest and still not in the text.
    tokens_VD = params["embed"]["tokens"]
    params["embed"]["tokens"] = tokens_VD.at[jnp.array([0, first])].set(
        tokens_VD[jnp.array([first, 0])]
    )
    penalised = dataclasses.replace(sample, repetition_penalty=100.0)
    assert run(params, sample=penalised)[0].ids == [0]


# What a text depends on.


def test_a_text_does_not_depend_on_the_rows_around_it():
    for row in (0, 1, 2):
        alone = [PROMPTS[1]] * row + [PROMPTS[row]]
        assert generate(MODEL, parameters(MODEL), alone, DRAWN, **OPTIONS)[row] == texts()[row]


@pytest.mark.parametrize("chunk", [1, 5])
def test_streamed_pieces_join_to_the_text(chunk):
    options = OPTIONS | {"end_of_text": texts()[1].ids[6]}
    whole = generate(MODEL, parameters(MODEL), PROMPTS, DRAWN, **options)
    pieces = list(
        stream(MODEL, cast(MODEL, parameters(MODEL)), PROMPTS, DRAWN, chunk=chunk, **options)
    )
    assert {t.ended for t in whole} == {"stop", "length"}
    assert all(len(t.ids) <= chunk for piece in pieces for t in piece)
    assert len(pieces) == -(-12 // chunk)
    for row, text in enumerate(whole):
        assert list(itertools.chain(*(piece[row].ids for piece in pieces))) == text.ids
        assert pieces[-1][row].ended == text.ended
        # A row says that it has ended when it ends, and from then on.
        ended = [piece[row].ended for piece in pieces]
        first = min(len(text.ids) // chunk, len(pieces) - 1)
        assert ended == [None] * first + [text.ended] * (len(pieces) - first)


def test_a_text_cut_and_given_back_goes_on_alike():
    prompts = [prompt + text.ids[:5] for prompt, text in zip(PROMPTS, texts(), strict=True)]
    sample = dataclasses.replace(DRAWN, max_new_tokens=7)
    rest = generate(MODEL, parameters(MODEL), prompts, sample, **OPTIONS)
    assert [t.ids for t in rest] == [t.ids[5:] for t in texts()]


def test_seeds_and_rows_differ():
    assert [t.ids for t in texts(seed=1)] != [t.ids for t in texts()]
    one, other = texts(DRAWN, 0, 0)
    assert one != other


def test_knobs_and_pieces_share_a_program():
    texts()
    compiled = decode._advance._cache_size()
    sample = tiny.sample(
        prompt="x", batch_size=3, max_new_tokens=11, temperature=0.5, top_k=20, top_p=0.5,
        repetition_penalty=1.1, stop="y",
    )  # fmt: skip
    list(
        stream(
            MODEL, cast(MODEL, parameters(MODEL)), PROMPTS, sample, chunk=2, **OPTIONS | {"seed": 9}
        )
    )
    assert decode._advance._cache_size() == compiled


# How a text ends.


def test_a_text_ends_at_a_stop_id_which_is_not_returned():
    ids = texts(GREEDY)[0].ids
    stop = next(i for i in ids if ids.index(i) >= 2)
    options = OPTIONS | {"stop_ids": [stop, 58]}
    got = generate(MODEL, parameters(MODEL), PROMPTS[:1], GREEDY, **options)
    assert got == [Text(ids[: ids.index(stop)], "stop")]
    got = generate(
        MODEL, parameters(MODEL), PROMPTS[:1], GREEDY, **OPTIONS | {"end_of_text": ids[0]}
    )
    assert got == [Text([], "stop")]


def test_a_text_ends_at_its_length_or_the_context():
    prompts = [[1], [1] * (CONTEXT - 12), [1] * (CONTEXT - 3), [1] * CONTEXT]
    got = generate(MODEL, parameters(MODEL), prompts, GREEDY, **OPTIONS)
    assert [len(t.ids) for t in got] == [12, 12, 3, 0]
    assert [t.ended for t in got] == ["length", "length", "context", "context"]
    pieces = list(stream(MODEL, cast(MODEL, parameters(MODEL)), prompts[2:], GREEDY, **OPTIONS))
    assert [[len(t.ids) for t in piece] for piece in pieces] == [[1, 0]] * 3


def test_an_empty_prompt_starts_from_end_of_text():
    run = functools.partial(generate, MODEL, parameters(MODEL), **OPTIONS)
    assert run([[], [2]], DRAWN) == run([[EOT], [2]], DRAWN)
    assert run([[]], DRAWN)[0].ids


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([1] * (CONTEXT + 1), r"^prompt 1 has 25 tokens, more than the context of 24: shorten it$"),
        ([1, KNOWN], r"^prompt 1 has a token id outside \[0, 60\): encode it with"),
        ([-1], r"^prompt 1 has a token id outside \[0, 60\): encode it with"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(prompt, message):
    with pytest.raises(UserError, match=message):
        generate(MODEL, parameters(MODEL), [[1], prompt], GREEDY, **OPTIONS)


def test_no_prompt_is_told_as_such():
    with pytest.raises(UserError, match="^there is no prompt: give one or more$"):
        generate(MODEL, parameters(MODEL), [], GREEDY, **OPTIONS)


def test_dynamic_scaling_is_refused_where_it_would_turn_cached_keys():
    """Up to the original context its angles stand still, and it decodes like the others."""
    rope = {"position": "rope", "rope_scaling": "dynamic", "rope_factor": 2.0}
    short = dataclasses.replace(MODEL, **rope, rope_original_context=13)
    assert len(generate(short, parameters(short), [[1]], GREEDY, **OPTIONS)) == 1
    with pytest.raises(UserError, match=r"^a text of 14 tokens is beyond .*original_context=13"):
        generate(short, parameters(short), [[1, 2]], GREEDY, **OPTIONS)


# Machines.


@pytest.mark.parametrize("sizes", [tiny.CUBE, tiny.TENSOR, tiny.DATA, tiny.SEQUENCE], ids=str)
@pytest.mark.parametrize("rows", [(1,), (0, 1, 2)])
def test_a_mesh_does_not_change_the_text(sizes, rows):
    with jax.set_mesh(tiny.mesh_of(sizes)):
        specs = gpt.abstract_params(MODEL)
        params = jax.tree.map(
            lambda p, spec: jax.device_put(p, sharding.parameter_spec(spec.dims)),
            parameters(MODEL),
            specs,
        )
        for sample in (GREEDY, DRAWN):
            got = generate(MODEL, params, [PROMPTS[r] for r in rows], sample, **OPTIONS)
            assert got == texts(sample, *rows)


def test_weights_are_gathered_once_and_not_for_each_token():
    """The rules of decoding: what a compiled step moves is what the host reads, all integers."""
    with jax.set_mesh(tiny.mesh(fsdp=8)):
        weights = decode.cast(MODEL, jax.jit(lambda: gpt.init(MODEL, 0))()).params
        lengths = np.full(8, 2, np.int32)
        state = begun(MODEL, weights, np.zeros((8, 8), np.int32), lengths, lengths + 2)
        arguments = (decode._sampling(GREEDY), np.array([EOT]), jax.random.key(0), 2)
        lowered = decode._advance.lower(MODEL, KNOWN, weights, state, *arguments)
    moved = re.findall(r"= \(?(\w+)\[[\d,]*\]\S* all-gather", lowered.compile().as_text())
    assert moved and set(moved) <= {"s32", "pred"}


def test_rows_added_for_the_mesh_keep_nobody_waiting(monkeypatch):
    begin, done = decode._begin, []

    def watched(*args: Any) -> decode.State:
        state = begin(*args)
        done.extend(np.asarray(state.done_B).tolist())
        return state

    monkeypatch.setattr(decode, "_begin", watched)
    with jax.set_mesh(tiny.mesh(data=8)):
        assert len(generate(MODEL, parameters(MODEL), PROMPTS, GREEDY, **OPTIONS)) == 3
    assert done == [False] * 3 + [True] * 5


@pytest.mark.parametrize("vocab_size", [64, 66])
@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, INT8], ids=named)
def test_no_narrow_product_has_one_row(changes, vocab_size):
    """On a CPU; but for the kernels, to which XLA gives the row."""
    config = dataclasses.replace(MODEL, vocab_size=vocab_size, width=64, **changes)
    weights = jax.eval_shape(functools.partial(decode.cast, config), parameters(config))
    x_BTD = jnp.zeros((1, 1, config.width), config.dtype)

    def logits(params: Any, x_BTD: jax.Array) -> jax.Array:
        with sharding.phase("decoding"):
            return gpt.logits(config, params, x_BTD)

    program = jax.jit(logits).lower(weights.params, x_BTD)
    by_kernel = vocab_size % kernels.OUTPUTS == 0
    assert ("gptjax_product" in program.as_text()) == by_kernel
    products = re.findall(r"\[(\d+),[\d,]*\]\S* dot\(", program.compile().as_text())
    assert products == ([] if by_kernel else ["2"])


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are written as for a GPU; the CPU runs them. Configs must be used nowhere else."""
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "tied": False, "kv_heads": 1, "feedforward": "swiglu"},
        {"width": 64, "heads": 1, "layers": 1, "vocab_size": V + 2},
    ],
    ids=named,
)
@pytest.mark.parametrize("meshed", [False, True])
def test_on_a_gpu_one_row_is_multiplied_as_sums(changes, meshed, on_a_gpu):
    config = dataclasses.replace(MODEL, ff_dim=20, **changes)
    with jax.set_mesh(tiny.mesh(data=1)) if meshed else contextlib.nullcontext():
        params = parameters(config)
        weights = cast(config, params)
        n_B = np.full(1, 2, np.int32)
        state = begun(config, weights.params, np.zeros((1, 8), np.int32), n_B, n_B + 2)
        arguments = (decode._sampling(GREEDY), np.array([EOT]), jax.random.key(0), 2)
        program = decode._advance.lower(config, KNOWN, weights.params, state, *arguments)
        # Products of queries and keys, of weights and values.
        assert program.as_text().count("stablehlo.dot_general") == 2 * config.layers
        (text,) = generate(config, params, PROMPTS[:1], GREEDY, **OPTIONS)
    row = PROMPTS[0] + text.ids
    logits_TV = full_logits(config, params, [row])[0, len(PROMPTS[0]) - 1 : len(row) - 1, :KNOWN]
    chosen = logits_TV[np.arange(len(text.ids)), text.ids]
    # Logits of size 1 or so: in bfloat16 those of the cache and of the whole differ by some 2^-8.
    close = 1e-4 if config.dtype == "float32" else 0.1
    assert len(text.ids) == 12 and (logits_TV.max(-1) - chosen < close).all()


def test_on_a_gpu_many_rows_and_few_bits_are_multiplied_as_they_were(on_a_gpu):
    """Weights that are turned for one row give several rows the products that they had."""
    config = dataclasses.replace(MODEL, ff_dim=28)
    params = parameters(config)
    got = generate(config, params, PROMPTS, GREEDY, **OPTIONS)
    rows = [prompt + text.ids for prompt, text in zip(PROMPTS, got, strict=True)]
    logits_BTV = full_logits(config, params, rows)[..., :KNOWN]
    for prompt, row, logits_TV in zip(PROMPTS, rows, logits_BTV, strict=True):
        assert row[len(prompt) :] == logits_TV[len(prompt) - 1 : len(row) - 1].argmax(-1).tolist()
    is_turned = lambda leaf: isinstance(leaf, Turned)  # noqa: E731
    for products, turned in (("dtype", True), ("int8", False)):
        kept = cast(dataclasses.replace(config, products=products), params)
        assert any(map(is_turned, jax.tree.leaves(kept, is_leaf=is_turned))) == turned


@pytest.mark.parametrize(
    "changes", [{"dtype": "bfloat16"}, INT8, INT8 | {"tied": False}, {"products": "fp8"}], ids=named
)
def test_casting_once_changes_nothing(changes):
    config = dataclasses.replace(MODEL, **changes)
    params, tokens_BT = parameters(config), np.array([PROMPTS[0]], np.int32)

    @jax.jit
    def cached(params: Any) -> jax.Array:
        return gpt.hidden(config, params, tokens_BT, cache=gpt.init_cache(config, 1, 8))[0]

    ready = decode.cast(config, params).params
    # In bfloat16 every bit; of 8 bits a scale may differ in its last one (test_layers.py).
    exact = config.products == "dtype"
    np.testing.assert_allclose(cached(ready), cached(params), rtol=0, atol=0 if exact else 1e-5)
    x_BTD = cached(params)
    _, kernel, dims = gpt.unembedding(config, params, x_BTD)
    sizes = (abs(np.float64(operand)) for operand in (x_BTD, kernel))
    most = np.einsum(f"BTD,{dims}->BTV", *sizes).max()
    logits = functools.partial(gpt.logits, config)
    # Sums of D products in float32 on one side, of whole numbers on the other.
    bound = (config.width + 4) * 2**-24 * most
    np.testing.assert_allclose(logits(ready, x_BTD), logits(params, x_BTD), atol=bound, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_weight_in_int8_takes_a_byte(tied):
    config = dataclasses.replace(MODEL, **INT8, tied=tied)
    params = parameters(config)
    specs = jax.tree.leaves(gpt.abstract_params(config))
    rounded = [spec for spec in specs if spec.role in PRODUCTS["int8"].roles]
    numbers = sum(spec.size(spec.dims) for spec in rounded)
    scales = sum(spec.size(spec.stacks + spec.fan_out) for spec in rounded)
    others = sum(spec.size(spec.dims) for spec in specs if spec not in rounded)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(decode.cast(config, params)))
    assert kept == numbers + 4 * (scales + others)
    assert {spec.role for spec in specs if spec not in rounded} == {"gain", "bias", "position"}


# A cache that is kept, and what a step's program does.


def programs() -> int:
    """Programs compiled for texts so far."""
    compiled: list[Any] = [decode.empty_layers, decode._begin, decode._grow, decode._advance]
    return sum(program._cache_size() for program in compiled)


@pytest.mark.parametrize("changes", [{}, {"position": "rope", "windows": (3, None)}], ids=named)
def test_a_kept_cache_gives_the_texts_of_a_new_one(changes, monkeypatch):
    """Turns of two dialogues: they go on, grow, are cut, differ in the middle, and are others."""
    monkeypatch.setattr(decode, "ROUND", 8)
    monkeypatch.setattr(decode, "ROOM", 8)
    config = dataclasses.replace(MODEL, **changes)
    weights, kept = cast(config, parameters(config)), decode.Kept()
    sample = dataclasses.replace(GREEDY, max_new_tokens=3)
    options = OPTIONS | {"end_of_text": KNOWN}  # no text ends early

    def texts_after(rows: list[list[int]], kept: decode.Kept) -> list[list[int]]:
        parts = stream(config, weights, rows, sample, chunk=2, kept=kept, **options)
        return [[i for text in row for i in text.ids] for row in zip(*parts, strict=True)]

    def answers(rows: list[list[int]]) -> list[list[int]]:
        new = texts_after(rows, decode.Kept())
        assert texts_after(rows, kept) == new
        return new

    rows, read = [[5, 6, 7], [8, 9, 10, 11]], []
    for turn in range(4):
        more = zip(rows, answers(rows), [[20 + turn], [30, 31]], strict=True)
        rows = [row + text + new for row, text, new in more]
        read.append(kept.tokens_read)
    # Prompts of 4, 9, 14 and 19 tokens lack the last one; shared, by the row that shares least,
    # are 0, 5, 9 and 13: the last token of a text is not cached.
    assert read == [3, 3, 4, 5]
    for others, count in (
        ([rows[0][:9], rows[1][:9]], 0),  # an earlier state
        ([[*rows[0][:5], 1, 2], [*rows[1][:7], 1]], 2),
        ([[1, 2, 3], rows[1][:4]], 3),
        ([rows[1][:4]], 3),  # fewer rows
        ([[1] * CONTEXT], CONTEXT - 1),
        ([[1, 1, 1]], 0),
    ):
        answers(others)
        assert kept.tokens_read == count


def test_a_decoder_that_is_warm_compiles_nothing():
    """Whatever the length of prompts and texts within the same rounding, cached or not."""
    weights, kept = cast(MODEL, parameters(MODEL)), decode.Kept()
    draw = functools.partial(stream, MODEL, weights, chunk=4, **OPTIONS)
    list(draw([[1, 2]], GREEDY))
    for prompt in ([1, 2], [1, 2, 3]):  # a first turn and a second one
        list(draw([prompt], GREEDY, kept=kept))
    warm = programs()
    for prompt in ([1, 2, 3], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10, 11]):
        list(draw([prompt], dataclasses.replace(GREEDY, max_new_tokens=7)))
        list(draw([prompt], dataclasses.replace(GREEDY, max_new_tokens=9), kept=kept))
    assert programs() == warm


@pytest.mark.parametrize("tied", [True, False])
def test_no_step_casts_or_copies_a_weight(tied):
    """In float32 a step reads each weight where it lies."""
    # No activation is as large as a weight, so that one is known by its size.
    config = dataclasses.replace(MODEL, tied=tied, width=96, ff_dim=256, vocab_size=1024)
    weights = cast(config, gpt.init(config, 0)).params
    n_B = np.full(1, 2, np.int32)
    state = begun(config, weights, np.zeros((1, 8), np.int32), n_B, n_B + 2)
    arguments = (decode._sampling(GREEDY), np.array([EOT]), jax.random.key(0), 2)
    lowered = decode._advance.lower(config, KNOWN, weights, state, *arguments)
    text = lowered.compile().as_text()
    made = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|convert|transpose|fusion)\(", text)
    assert made
    assert max(np.prod([int(n) for n in dims.split(",")]) for dims in made) < 96 * 96
