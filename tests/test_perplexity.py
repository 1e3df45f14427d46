"""Perplexity: closed forms, one forward per token, and the same number whatever the machinery."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax import model, perplexity, tokenizer
from gptjax.config import Config, ConfigError, Mesh, UserError
from gptjax.data.batches import PACKING
from gptjax.data.store import Store, StoreWriter
from gptjax.perplexity import Convention, Evaluator, Score
from tests import tiny

BYTES = tokenizer.load("bytes")
V = 264
DOCUMENTS = ("the cat sees the sun. ", "an owl! ", "七嘴八舌 of dogs")
LENGTHS = [len(text.encode()) + 1 for text in DOCUMENTS]
TOKENS = sum(LENGTHS)
MESHES = [tiny.DATA, tiny.CUBE, tiny.TENSOR, tiny.SEQUENCE]
# The reference's sums run in another order; losses reach some 20 nats, logits some 30.
CLOSE = {"rtol": 1e-5, "atol": 3e-5}


def write(folder: Path, *documents: str, tokens: tokenizer.Tokenizer = BYTES) -> Store:
    writer = StoreWriter(folder, tokens)
    for document in documents:
        writer.write(np.array(tokens.encode(document), np.int32), True)
    writer.close()
    return Store.open(folder, tokens)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write(tmp_path_factory.mktemp("text") / "store", *DOCUMENTS)


def configure(packing: str = "stream", chunk: int | None = None, **changes: Any) -> Config:
    """The tiny config with other fields of `eval`, or of the model as model_NAME."""
    config = tiny.config(Path("unused"), model__vocab_size=V, model__layers=1)
    fields = {n.removeprefix("model_"): v for n, v in changes.items() if n.startswith("model_")}
    parts = {n: v for n, v in changes.items() if not n.startswith("model_")}
    return dataclasses.replace(
        config,
        eval=dataclasses.replace(config.eval, **parts),
        model=dataclasses.replace(
            config.model, **{"attention": "plain", "position": "rope", **fields}
        ),
        data=dataclasses.replace(config.data, packing=packing),
        optim=dataclasses.replace(config.optim, loss_vocab_chunk=chunk),
    )


@functools.cache
def parameters() -> model.Params:
    """Matrices so large that losses differ by many nats and a token before changes them."""
    drawn = jax.device_get(model.init(configure().model, 0))
    return jax.tree.map(lambda p: p * 15 if p.ndim > 1 else p, drawn)


def evaluator(config: Config, store: Store, tokens: tokenizer.Tokenizer = BYTES) -> Evaluator:
    """On the current mesh; without one, on eight devices."""
    with jax.set_mesh(tiny.mesh(data=8)):
        return Evaluator(config, store, tokens)


def token_nats(
    config: Config, store: Store, sizes: Mesh = tiny.DATA, params: Any = None
) -> np.ndarray:
    # On eight devices rows beyond the last window occur.
    with jax.set_mesh(tiny.mesh_of(sizes)):
        return Evaluator(config, store, BYTES).token_nats(params or parameters())


def score(config: Config, store: Store, params: Any = None) -> Score:
    with jax.set_mesh(tiny.mesh(data=8)):
        return Evaluator(config, store, BYTES)(params or parameters())


# ---- closed forms


@pytest.mark.parametrize("chunk", [None, 100])
def test_uniform_logits_have_the_vocabulary_as_perplexity(store: Store, chunk: int | None) -> None:
    found = score(configure(chunk=chunk), store, jax.tree.map(np.zeros_like, parameters()))
    assert found.tokens == TOKENS
    # log V in float32 is within 2^-24 of it, relatively, and so is each token's loss.
    assert found.perplexity == pytest.approx(V, rel=1e-6)
    bits = math.log2(V) * TOKENS / (TOKENS - len(DOCUMENTS))
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-6)


def test_three_tokens_by_hand(tmp_path: Path) -> None:
    # Zero blocks and embeddings leave the final norm's bias as the stream: every token has the
    # same distribution, p(a) = 1/2, p(b) = 1/4, p(end) = 1/8, and the rest of it shared.
    config = configure(model_tied=False, model_position="none")
    params = jax.tree.map(
        lambda spec: np.zeros(spec.shape, np.float32), model.abstract_params(config.model)
    )
    p = np.full(V, 1 / 8 / (V - 3))
    p[BYTES.encode("a")], p[BYTES.encode("b")], p[BYTES.eot] = 1 / 2, 1 / 4, 1 / 8
    params["final_norm"]["bias"][0] = 1
    params["unembed"]["kernel"][0] = np.log(p)
    text = write(tmp_path / "text", "ab")
    bits = token_nats(config, text, params=params) / np.log(2)
    np.testing.assert_allclose(bits, [1, 2, 3], rtol=1e-6)
    found = score(config, text, params)
    assert (found.tokens, found.bytes) == (3, 2)
    assert found.loss == pytest.approx(2 * math.log(2), rel=1e-6)
    assert found.perplexity == pytest.approx(4, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(3, rel=1e-6)
    # Without a prefix the a goes unscored, and so do its bytes.
    found = score(configure(model_tied=False, model_position="none", prefix="none"), text, params)
    assert (found.tokens, found.bytes) == (2, 1)
    assert found.nats == pytest.approx(5 * math.log(2), rel=1e-6)


def test_what_is_made_of_the_sums() -> None:
    found = Score(nats=2.0, tokens=4, bytes=8) + Score(nats=1.0, tokens=2, bytes=1)
    assert found == Score(3.0, 6, 9)
    assert found.loss == 0.5 and found.perplexity == math.exp(0.5)
    assert found.bits_per_byte == pytest.approx(3 / math.log(2) / 9, rel=1e-15)
    assert Score(1e6, 1, 1).perplexity == math.inf
    assert math.isnan(Score(1.0, 1, 0).bits_per_byte)
    assert str(found) == "0.5000 nats/token, perplexity 1.65, 0.4809 bits/byte (6 tokens, 9 bytes)"


# ---- one forward for each token


@functools.partial(jax.jit, static_argnums=0)
def _apply(config: Any, params: Any, tokens_BT: jax.Array) -> jax.Array:
    return model.apply(config, params, tokens_BT)


def losses(logits_BV: jax.Array, targets_B: Sequence[int]) -> np.ndarray:
    """-log softmax at the targets, in float64."""
    x_BV = np.asarray(logits_BV, np.float64)
    top_B = x_BV.max(-1)
    log_z_B = np.log(np.exp(x_BV - top_B[:, None]).sum(-1)) + top_B
    return log_z_B - x_BV[np.arange(len(targets_B)), list(targets_B)]


@functools.cache
def one_by_one(stream: tuple[int, ...], context: int, stride: int) -> np.ndarray:
    """Nats of stream[1:], each by a forward of its own over what its window has before it."""
    rows, last = np.zeros((len(stream) - 1, context), np.int32), []
    for k in range(len(stream) - 1):
        # The first window whose `context` inputs reach up to stream[k].
        window = max(0, math.ceil((k + 1 - context) / stride))
        seen = stream[window * stride : k + 1]
        rows[k, : len(seen)] = seen
        last.append(len(seen) - 1)
    logits_BTV = np.asarray(_apply(configure().model, parameters(), rows))
    return losses(logits_BTV[np.arange(len(last)), last], stream[1:])


CONVENTIONS = st.fixed_dictionaries(
    {
        "context": st.sampled_from([5, 8]),  # few shapes, so that few programs are compiled
        "stride": st.integers(1, 5),
        "prefix": st.sampled_from(["eot", "none"]),
        "max_tokens": st.none() | st.integers(1, TOKENS + 9),
        "batch_size": st.sampled_from([3, 8, 16]),
    }
)


@given(convention=CONVENTIONS)
@example({"context": 8, "stride": None, "prefix": "eot", "max_tokens": None, "batch_size": 16})
@example({"context": 5, "stride": 2, "prefix": "none", "max_tokens": 6, "batch_size": 3})
@settings(max_examples=30, deadline=None)
def test_strided_windows_are_one_forward_for_each_token(
    store: Store, convention: dict[str, Any]
) -> None:
    context, stride = convention["context"], convention["stride"]
    tokens = store.tokens(0, store.num_tokens).tolist()
    stream = (BYTES.eot, *tokens) if convention["prefix"] == "eot" else tuple(tokens)
    expected = one_by_one(stream, context, stride or context)[: convention["max_tokens"]]
    np.testing.assert_allclose(token_nats(configure(**convention), store), expected, **CLOSE)


def test_the_parameters_of_these_tests_tell_conventions_apart(store: Store) -> None:
    stream = (BYTES.eot, *store.tokens(0, store.num_tokens).tolist())
    found = [one_by_one(stream, *rule).mean() for rule in ((5, 5), (8, 8), (8, 3), (8, 1))]
    assert np.ptp(found) > 0.1 and min(np.diff(sorted(found))) > 100 * CLOSE["atol"]


# ---- every token once


@given(
    tokens=st.integers(2, 70),
    context=st.integers(1, 20),
    share=st.floats(0, 1),
    prefix=st.sampled_from(["eot", "none"]),
    max_tokens=st.none() | st.integers(1, 80),
    batch_size=st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_every_token_is_scored_once_by_the_window_that_should(
    tmp_path_factory: pytest.TempPathFactory,
    tokens: int,
    context: int,
    share: float,
    prefix: str,
    max_tokens: int | None,
    batch_size: int,
) -> None:
    stride = max(1, round(share * context))
    text = write(tmp_path_factory.mktemp("text") / "store", "x" * (tokens - 1))
    config = configure(
        context=context, stride=stride, prefix=prefix, max_tokens=max_tokens, batch_size=batch_size
    )
    windows = 0

    def stub(config: Any, chunk: Any, params: Any, batch: Any) -> np.ndarray:
        """Each prediction's window and place, as one number."""
        nonlocal windows
        rows, T = batch.tokens.shape
        first, windows = windows, windows + rows
        return (first + np.arange(rows))[:, None] * 1000.0 + np.arange(T)

    scored: list[int] = []
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(tiny.mesh(data=8)):
        patch.setattr(perplexity, "batch_nll", stub)
        evaluator = Evaluator(config, text, BYTES)
        found = evaluator.token_nats({}, scored.append)
    window, place = np.divmod(found, 1000)
    here = np.arange(min(tokens - (prefix == "none"), max_tokens or tokens))
    assert sum(scored) == len(here) == len(found)
    np.testing.assert_array_equal(window * stride + place, here)
    np.testing.assert_array_equal(window, np.maximum(0, -(-(here + 1 - context) // stride)))
    # What a prediction sees is the inputs up to it, of which a prefix is no token of the text.
    prefixed = (window == 0) & (prefix == "eot")
    np.testing.assert_array_equal(evaluator.tokens_before(), place + 1 - prefixed)
    assert evaluator.document_ends.tolist() == [len(here)]


# ---- the same number whatever the machinery


def test_meshes_batches_and_chunks_change_no_number(store: Store) -> None:
    plain = token_nats(configure(stride=7), store)
    with jax.set_mesh(tiny.mesh()):
        alone = Evaluator(configure(stride=7), store, BYTES).token_nats(parameters())
    found = {
        "one device": alone,
        "batches of 3": token_nats(configure(stride=7, batch_size=3), store),
        "batches of 24": token_nats(configure(stride=7, batch_size=24), store),
        "chunks of 100": token_nats(configure(stride=7, chunk=100), store),
        **{str(sizes): token_nats(configure(stride=7), store, sizes) for sizes in MESHES[1:]},
    }
    for name, nats in found.items():
        np.testing.assert_allclose(nats, plain, **CLOSE, err_msg=name)
        assert nats.mean() == pytest.approx(plain.mean(), rel=1e-6), name


@pytest.mark.parametrize("axes", [{}, {"tensor": 2}], ids=str)
def test_a_single_window_of_scanned_layers(tmp_path: Path, axes: dict[str, int]) -> None:
    """One row a batch, where a mesh does not add any."""
    short = write(tmp_path / "short", "the cat")
    config = configure(model_scan_layers=True)
    with jax.set_mesh(tiny.mesh(**axes)):
        found = Evaluator(config, short, BYTES)
        assert found.windows == 1
        nats = found.token_nats(parameters())
    np.testing.assert_allclose(nats, token_nats(configure(), short), **CLOSE)


def test_scores_of_parts_add_up(tmp_path: Path) -> None:
    # Parts that begin where a window does, after an end-of-text: what stands before is the same.
    documents = ["the cat sees it", "dogs " * 6 + "_", "owl", "sun and sea"]
    assert np.cumsum([len(d) + 1 for d in documents]).tolist() == [16, 48, 52, 64]
    whole = score(configure(), write(tmp_path / "whole", *documents))
    for cut in (1, 2):
        parts = [documents[:cut], documents[cut:]]
        one, other = (
            score(configure(), write(tmp_path / f"{cut}{i}", *part)) for i, part in enumerate(parts)
        )
        total = one + other
        assert (total.tokens, total.bytes) == (whole.tokens, whole.bytes)
        assert total.nats == pytest.approx(whole.nats, rel=1e-6)
        assert one.loss != pytest.approx(other.loss, rel=1e-3)


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_the_bytes_are_the_text_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tokens = tokenizer.load(name)
    text = write(tmp_path / "text", *DOCUMENTS, tokens=tokens)
    monkeypatch.setattr(
        perplexity, "batch_nll", lambda c, k, p, batch: np.zeros(batch.tokens.shape)
    )
    with jax.set_mesh(tiny.mesh(data=8)):
        every = Evaluator(configure(), text, tokens)({})
        less = Evaluator(configure(prefix="none"), text, tokens)({})
    assert every.bytes == len("".join(DOCUMENTS).encode())
    first = tokens.decode_bytes(text.tokens(0, 1).tolist())
    assert every.bytes - less.bytes == len(first) == {"bytes": 1, "gpt2": 3}[name]


def test_parameters_stay_as_they_are(store: Store) -> None:
    with jax.set_mesh(tiny.mesh(data=2, fsdp=2, tensor=2)):
        config = configure()
        params = model.init(config.model, 0)
        before = jax.device_get(params)
        evaluator = Evaluator(config, store, BYTES)
        assert evaluator(params) == evaluator(params)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), before)


# ---- Hugging Face's recipe


def hugging_face(tokens: list[int], max_length: int, stride: int) -> list[tuple[float, int]]:
    """(mean loss, tokens that it is the mean of) of each window.

    The loop of "Perplexity of fixed-length models" (huggingface.co/docs/transformers/perplexity);
    its model shifts the labels by one and leaves out those of -100.
    """
    found, prev_end_loc, seq_len = [], 0, len(tokens)
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = np.array(tokens[begin_loc:end_loc])
        target_ids = input_ids.copy()
        target_ids[:-trg_len] = -100
        rows = np.zeros((1, max_length), np.int32)
        rows[0, : len(input_ids)] = input_ids
        logits_TV = np.asarray(_apply(configure().model, parameters(), rows))[0]
        labels, logits_TV = target_ids[1:], logits_TV[: len(input_ids) - 1]
        keep = labels != -100
        found.append((losses(logits_TV[keep], labels[keep]).mean(), keep.sum()))
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return found


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_hugging_face_s_recipe_with_one_token_more_a_window(store: Store, stride: int) -> None:
    expected = hugging_face(store.tokens(0, store.num_tokens).tolist(), 9, stride)
    nats = token_nats(configure(context=8, stride=stride, prefix="none"), store)
    loss, count = (np.array(column) for column in zip(*expected, strict=True))
    assert count.sum() == len(nats) == TOKENS - 1
    windows = np.split(nats, np.cumsum(count)[:-1])
    np.testing.assert_allclose([part.mean() for part in windows], loss, **CLOSE)
    whole = score(configure(context=8, stride=stride, prefix="none"), store)
    assert whole.loss == pytest.approx((loss * count).sum() / count.sum(), rel=1e-6)


# ---- documents apart


@pytest.mark.parametrize(
    ("packing", "documents", "apart"),
    [(packing, None, row.segmented) for packing, row in PACKING.items()]
    + [("stream", documents, apart) for documents, apart in perplexity.DOCUMENTS.items()]
    + [("masked", "joined", False)],
)
def test_neighbours_matter_only_where_documents_are_joined(
    tmp_path: Path, packing: str, documents: str | None, apart: bool
) -> None:
    # Learned positions, so that a document that is apart must also count from its own start.
    config = configure(
        packing, documents=documents, context=64, model_context=64, model_position="learned"
    )
    rows = jax.random.normal(jax.random.key(1), (64, config.model.width))
    embed = parameters()["embed"] | {"positions": np.asarray(rows)}
    params = parameters() | {"embed": embed}

    def by_document(*order: int) -> dict[int, np.ndarray]:
        text = write(tmp_path / f"text{order}", *(DOCUMENTS[i] for i in order))
        nats = token_nats(config, text, params=params)
        ends = np.cumsum([LENGTHS[i] for i in order])
        return dict(zip(order, np.split(nats, ends[:-1]), strict=True))

    one, other, alone = by_document(0, 1, 2), by_document(2, 0, 1), by_document(1)
    pairs = [(one[i], other[i]) for i in one] + [(one[1], alone[1])]
    furthest = [np.abs(a - b).max() for a, b in pairs]
    assert max(furthest) < CLOSE["atol"] if apart else min(furthest[1:]) > 0.1
    text = write(tmp_path / "joined", *DOCUMENTS)
    seen = np.split(evaluator(config, text).tokens_before(), np.cumsum(LENGTHS)[:-1])
    starts = [0, 0, 0] if apart else np.append(0, np.cumsum(LENGTHS)[:-1])
    assert [part[0] for part in seen] == list(starts)
    assert evaluator(config, text).document_ends.tolist() == np.cumsum(LENGTHS).tolist()


# ---- what is told and what is refused


def test_the_convention_is_told(store: Store) -> None:
    found = evaluator(configure(), store)
    assert found.convention == Convention(16, 16, "eot", apart=False)
    found = evaluator(configure("masked", context=8, stride=3, prefix="none"), store)
    assert found.convention == Convention(8, 3, "none", apart=True)
    assert str(found.convention) == (
        "context 8, stride 3, prefix none, documents apart, end-of-text scored"
    )
    # Whoever inherits a run's cut must see it.
    found = evaluator(configure(max_tokens=1200), store)
    assert str(found.convention) == (
        "context 16, stride 16, prefix eot, documents joined, end-of-text scored, at most 1,200 "
        "tokens of a text"
    )


def test_what_cannot_be_scored_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval.prefix='begin' is not one of: eot, bos, none"):
        evaluator(configure(prefix="begin"), store)
    with pytest.raises(ConfigError, match="data.packing='padded' is not one of: stream"):
        evaluator(configure("padded"), store)
    with pytest.raises(ConfigError, match="eval.documents='alone' is not one of: joined, apart"):
        evaluator(configure(documents="alone"), store)
    with pytest.raises(ConfigError, match="eval.context=17 is beyond the 16 learned positions"):
        evaluator(configure(context=17, model_position="learned"), store)
    # The training context is one that the kernel takes.
    fused = configure(context=100)
    fused = dataclasses.replace(
        fused, model=dataclasses.replace(fused.model, attention="splash", context=128)
    )
    with pytest.raises(ConfigError, match="'splash' does not support 100 tokens, no multiple"):
        evaluator(fused, store)
    for position, context in (("learned", 16), ("rope", 17)):
        evaluator(configure(context=context, model_position=position), store)
    np.array([65], "<u2").tofile(tmp_path / "val.bin")
    single = Store.open(tmp_path / "val.bin", BYTES)
    with pytest.raises(UserError, match="holds a single token"):
        evaluator(configure(prefix="none"), single)
    assert evaluator(configure(), single).tokens == 1
