"""Figures and intervals: closed forms, the field's definitions, and coverage by simulation."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import model, tokenizer
from gptjax.config import Config, UserError
from gptjax.data.store import Store, StoreWriter
from gptjax.evaluation import audit, bootstrap, measure
from gptjax.evaluation.bootstrap import MIN_UNITS, effective_units, interval
from gptjax.evaluation.measure import Scored, Sums, account, blocks, joined, score, summary, units
from gptjax.evaluation.summary import show
from gptjax.evaluation.texts import Reading, Text, open_text
from gptjax.perplexity import Evaluator
from tests import tiny

BYTES, GPT2 = tokenizer.load("bytes"), tokenizer.load("gpt2")
V = 264
DOCUMENTS = ("the cat sees the sun. ", "an owl!", "七嘴八舌 of dogs\n")


def configure(**changes: Any) -> Config:
    """The tiny config with other fields of `eval`."""
    config = tiny.config(Path("unused"), model__layers=1, model__position="rope")
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changes))


def make_text(
    folder: Path, *documents: str, tokens: tokenizer.Tokenizer = BYTES, domains: Any = None
) -> Text:
    writer = StoreWriter(folder, tokens)
    for document in documents:
        writer.write(np.array(tokens.encode(document), np.int32), True)
    writer.close()
    return Text("t", str(folder), Store.open(folder, tokens), domains=domains)


def told(
    text: Text, nats: Any = None, tokens: tokenizer.Tokenizer = BYTES, **changes: Any
) -> Scored:
    """`account` of given nats (random ones by default), without a model."""
    with jax.set_mesh(tiny.mesh(data=8)):
        evaluator = Evaluator(configure(**changes), text.store, tokens)
    if nats is None:
        nats = np.random.default_rng(0).gamma(1, 3, evaluator.tokens)
    return account(evaluator, text, tokens, np.asarray(nats, np.float32))


# ---- intervals


def simulated(rng: np.random.Generator, simulations: int, documents: int) -> tuple[Any, Any]:
    """nats and tokens (S, D) of documents of uneven length, each with a difficulty of its own."""
    shape = (simulations, documents)
    tokens = np.maximum(1, rng.lognormal(6, 0.7, shape)).round()
    # Longer ones are easier, some are much harder, and the tokens of one add noise.
    level = 3 + 0.4 * rng.standard_normal(shape) - 0.1 * (np.log(tokens) - 6)
    level += 0.5 * (rng.random(shape) < 0.1)
    return tokens * level + 3 * np.sqrt(tokens) * rng.standard_normal(shape), tokens


@pytest.mark.parametrize("documents", [40, 100])
def test_the_interval_covers_the_truth_as_often_as_it_says(documents):
    rng = np.random.default_rng(documents)
    nats, tokens = simulated(rng, 1_000_000, 1)
    truth = nats.sum() / tokens.sum()
    ends = np.array([interval(n, t) for n, t in zip(*simulated(rng, 2000, documents), strict=True)])
    given = ~np.isnan(ends[:, 0])  # a few sets are decided by one giant document
    assert given.mean() > 0.99
    ends = ends[given]
    covered = ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean()
    assert 0.90 <= covered <= 0.98
    # It misses on both sides, so it is no one-sided bound in disguise.
    assert (ends[:, 0] > truth).any() and (ends[:, 1] < truth).any()


def test_resampling_tokens_in_place_of_documents_would_not():
    """Why documents: the interval of independent tokens covers the truth far too rarely."""
    rng = np.random.default_rng(0)
    nats, tokens = simulated(rng, 1_000_000, 1)
    truth = nats.sum() / tokens.sum()
    nats, tokens = simulated(rng, 500, 100)
    mean = nats.sum(1) / tokens.sum(1)
    error = 3 / np.sqrt(tokens.sum(1))  # a token's own noise is 3 nats
    assert (abs(mean - truth) < 1.96 * error).mean() < 0.7


def test_the_interval_is_the_textbook_s(monkeypatch):
    """A loop over replicates as Efron and Tibshirani write it, with another random generator."""
    nats, tokens = (x[0] for x in simulated(np.random.default_rng(1), 1, 30))

    def ratio_and_error(x, y):
        r = x.sum() / y.sum()
        return r, math.sqrt(((x - r * y) ** 2).sum()) / y.sum()

    r, error = ratio_and_error(nats, tokens)
    rng, t = np.random.default_rng(2), []
    for _ in range(20_000):
        drawn = rng.integers(0, 30, 30)
        again, its_error = ratio_and_error(nats[drawn], tokens[drawn])
        t.append((again - r) / its_error)
    low, high = np.quantile(t, [0.025, 0.975])
    monkeypatch.setattr(bootstrap, "REPLICATES", 20_000)
    monkeypatch.setattr(bootstrap, "_counts", bootstrap._counts.__wrapped__)
    # Two draws of 20,000: their quantiles differ by about 2% of the interval's width.
    width = (high - low) * error
    assert interval(nats, tokens) == pytest.approx(
        (r - high * error, r - low * error), abs=0.04 * width
    )


def test_the_interval_follows_its_units_and_its_seed():
    nats, tokens = (x[0] for x in simulated(np.random.default_rng(1), 1, 40))
    ends = interval(nats, tokens)
    assert ends.low < nats.sum() / tokens.sum() < ends.high
    assert interval(nats, tokens) == ends
    assert interval(nats, 8 * tokens) == pytest.approx(np.array(ends) / 8, rel=1e-12)
    assert interval(-nats, tokens) == pytest.approx((-ends.high, -ends.low), rel=1e-12)


def test_very_many_documents_are_joined_at_random(monkeypatch):
    nats, tokens = (x[0] for x in simulated(np.random.default_rng(1), 1, 3000))
    joined_ends = interval(nats, tokens)
    monkeypatch.setattr(bootstrap, "MAX_UNITS", 3000)
    ends = interval(nats, tokens)
    width = ends.high - ends.low
    # The standard error of 1000 sums is itself known to 1 / sqrt(2000), a bit over 2%.
    assert joined_ends == pytest.approx(ends, abs=0.08 * width)
    assert joined_ends != ends


@pytest.mark.parametrize("ratio", [0.0, 2.5])
def test_documents_all_alike_leave_no_doubt(ratio):
    tokens = np.arange(10.0, 50.0)
    assert interval(ratio * tokens, tokens) == (ratio, ratio)


def test_a_difference_in_one_document_of_many_is_finite():
    difference = np.zeros(20)
    difference[3] = 5.0
    low, high = interval(difference, np.full(20, 10.0))
    assert low == 0.0 < 5 / 200 < high <= 5 / 20


def test_too_few_documents_have_no_interval():
    tokens = np.full(MIN_UNITS - 1, 100.0)
    assert np.isnan(interval(tokens, tokens)).all()
    assert effective_units(tokens) == pytest.approx(MIN_UNITS - 1)
    # Nor do many of which one is nearly all.
    giant = np.append(np.full(200, 1.0), 10_000.0)
    assert effective_units(giant) < 1.1
    assert np.isnan(interval(giant, giant)).all()


# ---- figures


def test_figures_are_those_of_lm_evaluation_harness():
    """Its metrics, as lm_eval/api/metrics.py and wikitext's process_results define them."""
    rng = np.random.default_rng(0)
    documents = ["one two\n three ", "四 five", "\n six seven"]
    items = []  # (loglikelihood, words, bytes)
    for page in documents:
        loglikelihood = -rng.gamma(5, 8)
        items.append((loglikelihood, len(re.split(r"\s+", page)), len(page.encode("utf-8"))))
    logs, words, bytes_ = zip(*items, strict=True)
    word_perplexity = math.exp(-sum(logs) / sum(words))
    byte_perplexity = math.exp(-sum(logs) / sum(bytes_))
    bits_per_byte = -(sum(logs) / sum(bytes_)) / math.log(2)

    ours = Sums(*(np.array(x, np.float64) for x in ([-v for v in logs], words, words, bytes_)))
    found = summary(ours, units(ours))
    assert found["word_perplexity"] == pytest.approx(word_perplexity, rel=1e-12)
    assert found["byte_perplexity"] == pytest.approx(byte_perplexity, rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-12)


def test_by_hand(tmp_path):
    """ "a bc" and "é": 5 + 3 tokens with their ends, 2 + 1 words, 4 + 2 bytes."""
    nats = [1, 2, 3, 4, 0.5, 2.5, 1.5, 1.5]
    scored = told(make_text(tmp_path / "s", "a bc", "é"), nats)
    sums = scored.documents
    assert (sums.nats.tolist(), sums.tokens.tolist()) == ([10.5, 5.5], [5, 3])
    assert (sums.words.tolist(), sums.bytes.tolist()) == ([2, 1], [4, 2])
    found = summary(sums, units(sums))
    assert found["loss"] == 2.0 and found["perplexity"] == math.exp(2)
    assert found["word_perplexity"] == math.exp(16 / 3)
    assert found["bits_per_byte"] == 16 / 6 / math.log(2)
    assert found["interval"]["loss"] == [None, None]
    assert found["interval_by"] == "none: 2 documents, and it takes at least 10"


def test_uniform_logits_by_the_model(tmp_path):
    """All parameters zero: every token has one chance in V."""
    text = make_text(tmp_path / "s", *DOCUMENTS)
    config = configure()
    with jax.set_mesh(tiny.mesh(data=8)):
        zeros = jax.tree.map(np.zeros_like, jax.device_get(model.init(config.model, 0)))
        scored = score(config, zeros, text, BYTES)
    found = summary(scored.documents, None)
    size = len("".join(DOCUMENTS).encode())
    # float32 holds ln V to 1e-7.
    assert found["perplexity"] == pytest.approx(V, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(
        math.log2(V) * (size + len(DOCUMENTS)) / size, rel=1e-7
    )
    assert found["bytes"] == size


@pytest.mark.parametrize("tokens", [BYTES, GPT2], ids=lambda t: t.name)
@pytest.mark.parametrize("changes", [{}, {"prefix": "none"}, {"max_tokens": 9, "context": 4}])
def test_counts_are_of_what_is_scored(tmp_path, tokens, changes):
    text = make_text(tmp_path / "s", *DOCUMENTS, tokens=tokens)
    scored = told(text, None, tokens, **changes)
    shown = [
        tokens.decode_bytes(part[part != tokens.eot])
        for part in np.split(scored.targets_I, scored.ends_D[:-1])
    ]
    assert scored.documents.bytes.tolist() == [len(part) for part in shown]
    assert scored.documents.words.tolist() == [
        len(re.split(r"\s+", part.decode(errors="replace"))) for part in shown
    ]
    assert scored.documents.nats.sum() == pytest.approx(scored.nats_I.sum(dtype=np.float64))
    if not changes:
        assert b"".join(shown).decode() == "".join(DOCUMENTS)


def test_long_documents_are_counted_in_pieces(tmp_path, monkeypatch):
    text = make_text(tmp_path / "s", *DOCUMENTS)
    whole = told(text)
    monkeypatch.setattr(measure, "_PIECE_TOKENS", 1)  # within every character
    pieces = told(text)
    assert pieces.text_sha256 == whole.text_sha256
    assert pieces.documents.words.tolist() == whole.documents.words.tolist()


def test_the_text_s_fingerprint_does_not_depend_on_the_tokenizer(tmp_path):
    digests = {
        told(make_text(tmp_path / f"{i}{t.name}", *documents, tokens=t), None, t).text_sha256
        for i, documents in enumerate((DOCUMENTS, (DOCUMENTS[0] + DOCUMENTS[1], DOCUMENTS[2])))
        for t in (BYTES, GPT2)
    }
    assert len(digests) == 2


def test_words_and_bytes_before_a_detokeniser(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("a , b")
    text = open_text("t", str(file), BYTES, tmp_path / "s", Reading(detokenizer="wikitext"))
    scored = told(text, np.ones(5))  # "a, b" and its end
    assert (scored.documents.words.tolist(), scored.documents.bytes.tolist()) == ([3], [5])
    config = configure(max_tokens=3)
    with (
        jax.set_mesh(tiny.mesh(data=8)),
        pytest.raises(UserError, match="max_tokens cuts"),
    ):
        score(config, {}, text, BYTES)


def test_blocks_are_documents_cut_up(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "BLOCK_BYTES", 8)
    scored = told(make_text(tmp_path / "s", "x" * 20 + " y", "z z", "w" * 8))
    found = blocks(scored)
    # 22 bytes and an end, 3 and an end, 8 and an end (which begins a block of its own).
    assert found.tokens.tolist() == [8, 8, 7, 4, 8, 1]
    assert found.bytes.tolist() == [8, 8, 6, 3, 8, 0]
    for name in ("nats", "tokens", "words", "bytes"):
        total = getattr(scored.documents, name).sum()
        assert getattr(found, name).sum() == pytest.approx(total, rel=1e-12)


def test_one_long_document_is_resampled_by_stretches_and_says_so(tmp_path):
    long = make_text(tmp_path / "s", "words of one text " * 10_000)
    scored = told(long)
    found = summary(scored.documents, units(scored.documents, lambda: blocks(scored)))
    low, high = found["interval"]["loss"]
    assert low < found["loss"] < high
    assert (
        "22 stretches of 8,192 bytes of 1 document: it speaks of more text from this"
        in (found["interval_by"])
    )


@pytest.mark.parametrize("changes", [{}, {"stride": 3}, {"prefix": "none", "context": 5}])
def test_positions_share_out_all_tokens(tmp_path, changes):
    scored = told(make_text(tmp_path / "s", *DOCUMENTS), **changes)
    rows = scored.by_position
    assert sum(r["tokens"] for r in rows) == len(scored.nats_I)
    nats = sum(r["tokens"] * r["loss"] for r in rows)
    assert nats == pytest.approx(scored.nats_I.sum(dtype=np.float64), rel=1e-12)
    assert [r["from"] for r in rows] == sorted(r["from"] for r in rows)
    assert rows[-1]["to"] == changes.get("context", 16)


def test_loss_at_a_position_is_of_the_tokens_there(tmp_path):
    """Windows of 4: prediction i sees 0, 1, 2, 3, then 1, 2, 3, 4 of each later window."""
    scored = told(make_text(tmp_path / "s", "x" * 11), np.arange(12.0), context=4)
    losses = {(r["from"], r["to"]): r["loss"] for r in scored.by_position}
    assert losses == {
        (0, 0): 0.0,
        (1, 1): (1 + 4 + 8) / 3,
        (2, 3): (2 + 3 + 5 + 6 + 9 + 10) / 6,
        (4, 4): (7 + 11) / 2,
    }


def test_domains_are_told_apart(tmp_path):
    domains = ["a", "b"] * 15
    text = make_text(tmp_path / "s", *["easy", "hard"] * 15, domains=domains)
    nats = np.concatenate([np.full(5, 1.0), np.full(5, 3.0)] * 15)
    scored = told(text, nats)
    found = {
        name: summary(scored.documents[which], units(scored.documents[which]))
        for name, which in scored.domains().items()
    }
    assert {name: s["loss"] for name, s in found.items()} == {"a": 1.0, "b": 3.0}
    assert {name: s["interval"]["loss"] for name, s in found.items()} == {"a": [1, 1], "b": [3, 3]}
    assert found["a"]["documents"] == 15
    # Of a text that is cut the documents that are left keep their domains.
    cut = told(text, nats[:12], max_tokens=12)
    assert {name: w.tolist() for name, w in cut.domains().items()} == {"a": [0, 2], "b": [1]}


def test_a_sum_over_texts_has_no_interval(tmp_path):
    parts = [told(make_text(tmp_path / str(i), *["a b"] * 20)).documents for i in range(2)]
    found = summary(joined(parts), None)
    assert found["nats"] == pytest.approx(sum(p.nats.sum() for p in parts))
    assert found["documents"] == 40 and found["interval_by"] == "none: texts of several kinds"


# ---- the same number whatever the machinery


@pytest.mark.parametrize("prefix", ["eot", "none"])
def test_meshes_and_batches_change_no_figure(tmp_path, prefix):
    text = make_text(tmp_path / "s", *DOCUMENTS * 8)
    found, digests = [], set()
    for sizes, rows in ((tiny.DATA, 8), (tiny.CUBE, 3), (tiny.TENSOR, 64), (tiny.SEQUENCE, 8)):
        config = configure(batch_size=rows, stride=5, prefix=prefix)
        with jax.set_mesh(tiny.mesh_of(sizes)):
            params = model.init(config.model, 0)
            scored = score(config, params, text, BYTES)
            digests.add(audit.fingerprint(params))
        found.append(summary(scored.documents, units(scored.documents)))
    assert len(digests) == 1
    for other in found[1:]:
        for figure in measure.FIGURES:
            assert other[figure] == pytest.approx(found[0][figure], rel=1e-6)
            # The ends are quantiles of the same draws.
            expected = pytest.approx(found[0]["interval"][figure], rel=1e-6)
            assert other["interval"][figure] == expected


def test_the_fingerprint_sees_names_shapes_and_every_bit():
    params = {
        "a": np.arange(6.0, dtype=np.float32).reshape(2, 3),
        "b": {"c": np.zeros(3, np.float32)},
    }
    params = jax.tree.map(jax.numpy.asarray, params)
    same = {"b": params["b"], "a": params["a"]}
    others = [
        {"a": params["a"].at[1, 2].add(1e-6), "b": params["b"]},
        {"a": params["a"].reshape(3, 2), "b": params["b"]},
        {"aa": params["a"], "b": params["b"]},
        {"a": params["a"], "b": {"c": params["b"]["c"].astype("int32")}},
    ]
    assert audit.fingerprint(params) == audit.fingerprint(same)
    assert len({audit.fingerprint(p) for p in (params, *others)}) == 5


def test_a_record_is_json_and_a_table_shows_it(tmp_path, capsys):
    one = told(make_text(tmp_path / "a", *["a b"] * 20, domains=["[/red]:x:"] * 20))
    other = told(make_text(tmp_path / "b", "c"), np.full(2, 1e4))  # beyond what exp can tell
    found = audit.Audit(
        "runs/[/b]:x:", 7, 10, "0" * 64, "float32", BYTES, {"one": one, "[/b]:x:": other}
    )
    record = json.loads(json.dumps(audit.record(found), allow_nan=False))
    assert record["scores"]["[/b]:x:"]["perplexity"] is None
    assert record["scores"]["all"]["tokens"] == 82
    assert list(record["scores"]["one"]["by_domain"]) == ["[/red]:x:"]
    show(record)
    shown = capsys.readouterr().out
    assert "context 16, stride 16, prefix eot, documents joined" in shown
    assert "bootstrap over 20 documents" in shown and "[/red]:x:" in shown
    assert "model: runs/[/b]:x:" in shown and "│ [/b]:x:" in shown
    for figure in ("loss", "bits_per_byte"):
        assert f"{record['scores']['one'][figure]:.4f}" in shown
