"""Two models on one text: exact alignment, paired intervals, and the place of a difference."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import UserError
from gptjax.evaluation import compare as module
from gptjax.evaluation import summary
from gptjax.evaluation.audit import Audit
from gptjax.evaluation.bootstrap import interval
from gptjax.evaluation.compare import align, compare, passages, text_of
from gptjax.evaluation.measure import Scored
from tests.test_evaluation import BYTES, DOCUMENTS, GPT2, make_text, told

PLACE = 7  # the document in which a difference is planted


def pair(folder: Path, *documents: str, seed: int = 0) -> tuple[Scored, Scored]:
    """The same documents by two tokenizers, with nats drawn for each."""
    rng = np.random.default_rng(seed)
    found = []
    for tokens in (GPT2, BYTES):
        text = make_text(folder / tokens.name, *documents, tokens=tokens)
        found.append(told(text, rng.gamma(1, 3, text.store.num_tokens), tokens))
    return found[0], found[1]


def audit(scored: Scored, name: str = "t") -> Audit:
    return Audit(f"runs/{name}", 1, 10, "0" * 64, "float32", scored.tokenizer, {"t": scored})


def total(scored: Scored) -> float:
    return scored.nats_I.sum(dtype=np.float64)


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(
        st.text(alphabet="ab c七嘴é🙂\n", min_size=1, max_size=12), min_size=1, max_size=5
    )
)
def test_every_piece_is_the_same_text_to_both_and_no_nats_are_lost(documents, tmp_path_factory):
    a, b = pair(tmp_path_factory.mktemp("pair"), *documents)
    pieces = align(a, b)
    assert pieces.nats_a.sum() == pytest.approx(total(a), rel=1e-12)
    assert pieces.nats_b.sum() == pytest.approx(total(b), rel=1e-12)
    shown = []
    for i in range(len(pieces.ends_a)):
        parts = [
            scored.targets_I[(ends[i - 1] if i else 0) : ends[i]]
            for scored, ends in ((a, pieces.ends_a), (b, pieces.ends_b))
        ]
        raw = [
            s.tokenizer.decode_bytes(ids[ids != s.tokenizer.eot])
            for s, ids in zip((a, b), parts, strict=True)
        ]
        # Equal bytes, whole characters, and an end-of-text with the same text in both.
        assert raw[0] == raw[1] and raw[0].decode() == text_of(a, pieces, i, i + 1)
        assert (GPT2.eot in parts[0]) == (BYTES.eot in parts[1])
        shown.append(raw[0])
    assert b"".join(shown).decode() == "".join(documents)
    # Offsets count each document's own bytes; its end takes a place.
    for d, document in enumerate(documents):
        here = np.flatnonzero(pieces.document == d)
        lengths = [max(len(shown[i]), 1) for i in here]
        assert pieces.offset[here].tolist() == [0, *np.cumsum(lengths)[:-1]]
        assert sum(len(shown[i]) for i in here) == len(document.encode())


def test_pieces_are_as_small_as_both_tokenizers_allow(tmp_path):
    """Bytes cut everywhere, so the pieces are GPT-2's tokens, joined within a character."""
    a, b = pair(tmp_path, "the cat sees 七!")
    assert [text_of(a, align(a, b), i, i + 1) for i in range(7)] == [
        "the", " cat", " sees", " ", "七", "!", "",
    ]  # fmt: skip


def test_the_same_tokenizer_gives_tokens(tmp_path):
    a, _ = pair(tmp_path, "the cat sees the sun", "an owl")
    b = told(a.text, np.ones(len(a.nats_I)), GPT2)
    pieces = align(a, b)
    assert pieces.ends_a.tolist() == pieces.ends_b.tolist() == list(range(1, len(a.nats_I) + 1))
    np.testing.assert_array_equal(pieces.difference, 1 - a.nats_I.astype(np.float64))


@pytest.mark.parametrize("which", [0, 1])
def test_a_model_does_not_differ_from_itself(tmp_path, which):
    found = audit(pair(tmp_path, *DOCUMENTS * 8)[which])
    record = compare(found, found)["texts"]["t"]
    for figure in ("bits_per_byte", "loss"):
        assert record[figure]["difference"] == 0.0
        assert record[figure]["interval"] == [0.0, 0.0]
    assert record["documents_better"] == {"a": 0, "b": 0}
    assert {p["nats"] for p in record["passages"]} == {0.0}


def planted(folder: Path) -> tuple[Audit, Audit, list[str]]:
    """B has 3 nats more on each byte of "needle", in one document of 30, and is else alike."""
    words = " ".join(["hay and straw in a stack of it"] * 20)
    documents = [f"{i} {words}" for i in range(30)]
    documents[PLACE] += " the needle " + words
    a, _ = pair(folder / "a", *documents)
    text = make_text(folder / "b", *documents)
    # A's nats, each shared by the bytes of its token: the same model in other tokens.
    lengths = a.lengths_I
    nats = np.repeat(a.nats_I / lengths, lengths)
    start = sum(len(d) + 1 for d in documents[:PLACE]) + documents[PLACE].index("needle")
    nats[start : start + 6] += 3
    return audit(a, "a"), audit(told(text, nats), "b"), documents


def test_a_planted_difference_is_found_at_its_place(tmp_path):
    a, b, documents = planted(tmp_path)
    record = compare(a, b)["texts"]["t"]
    first, second, *_ = record["passages"]
    assert "needle" in first["text"] and first["document"] == PLACE
    start = documents[PLACE].index("needle")
    assert first["byte"] <= start < first["byte"] + len(first["text"])
    # Each byte's nats are rounded to float32: 1e-6 of what is planted.
    assert first["nats"] == pytest.approx(18, abs=1e-3)
    assert first["text"][first["peak"] :].lstrip().startswith("needle")
    assert first["share"] > 0.99 and abs(second["nats"]) < 1e-3
    d = record["bits_per_byte"]
    size = sum(len(x) for x in documents)
    assert d["difference"] == pytest.approx(18 / math.log(2) / size, rel=1e-3)
    assert d["b"] - d["a"] == pytest.approx(d["difference"], rel=1e-6)
    assert d["interval"][0] < d["difference"] < d["interval"][1]
    assert "loss" not in record and not record["same_tokenizer"]
    # Turned round, everything changes its sign.
    back = compare(b, a)["texts"]["t"]
    assert back["bits_per_byte"]["difference"] == pytest.approx(-d["difference"], rel=1e-9)
    assert back["passages"][0]["nats"] == pytest.approx(-18, abs=1e-3)


def test_passages_share_out_the_whole_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PASSAGE_BYTES", 8)
    a, b = pair(tmp_path, *DOCUMENTS, "a longer document, in several passages")
    pieces = align(a, b)
    found = sorted(passages(pieces), key=lambda p: p.start)
    assert [p.start for p in found] == [0, *(p.stop for p in found[:-1])]
    assert found[-1].stop == len(pieces.ends_a)
    assert sum(p.nats for p in found) == pytest.approx(total(b) - total(a), rel=1e-12)
    for p in found:
        assert len(set(pieces.document[p.start : p.stop])) == 1
    sizes = [abs(p.nats) for p in passages(pieces)]
    assert sizes == sorted(sizes, reverse=True)


def test_the_interval_is_that_of_paired_documents(tmp_path):
    """Documents differ much from each other, and the models by a little on each."""
    rng = np.random.default_rng(0)
    text = make_text(tmp_path / "s", *["some words"] * 40, domains=["x", "y"] * 20)
    nats = np.repeat(rng.gamma(4, 1, 40), 11)
    extra = np.repeat(0.1 + 0.01 * rng.standard_normal(40), 11)
    a, b = told(text, nats), told(text, nats + extra)
    record = compare(audit(a), audit(b))["texts"]["t"]
    low, high = record["loss"]["interval"]
    assert 0.09 < low < record["loss"]["difference"] < high < 0.11
    # Unpaired, the documents' own differences would drown it.
    alone = interval(a.documents.nats, a.documents.tokens)
    assert alone.high - alone.low > 10 * (high - low)
    assert (record["loss"]["b"] - record["loss"]["a"]) == pytest.approx(0.1, abs=0.01)
    assert record["documents_better"] == {"a": 40, "b": 0}
    per_document = np.array(record["bits_per_byte_of_documents"])
    np.testing.assert_allclose(per_document, extra[::11] * 11 / 10 / math.log(2), rtol=1e-3)
    assert set(record["by_domain"]) == {"x", "y"}
    assert all(0.14 < d["interval"][0] < 0.18 for d in record["by_domain"].values())


def test_one_long_document_is_compared_by_stretches(tmp_path):
    documents = ["words of one text " * 6000]
    a, b = pair(tmp_path, *documents)
    record = compare(audit(a), audit(b))["texts"]["t"]
    d = record["bits_per_byte"]
    assert d["interval"][0] < d["difference"] < d["interval"][1]
    assert "14 stretches of 8,192 bytes of 1 document" in record["interval_by"]


@pytest.mark.parametrize("changes", [{"prefix": "none"}, {"max_tokens": 9}])
def test_texts_that_are_not_the_same_are_refused(tmp_path, changes):
    a, b = (
        told(make_text(tmp_path / t.name, *DOCUMENTS, tokens=t), None, t, **changes)
        for t in (GPT2, BYTES)
    )
    with pytest.raises(UserError, match=r"different texts as 't': .* eval.prefix=eot") as refused:
        compare(audit(a), audit(b))
    assert "\n" not in str(refused.value)
    other = Audit("runs/b", 1, 10, "0" * 64, "float32", BYTES, {"u": b})
    with pytest.raises(UserError, match="runs/t holds out t and runs/b holds out u: give both"):
        compare(audit(a), other)


def test_a_comparison_is_json_and_a_table_shows_it(tmp_path, capsys: Any):
    a, b, _ = planted(tmp_path)
    a = dataclasses.replace(a, workdir="runs/[/b]:x:")
    record = json.loads(json.dumps(compare(a, b), allow_nan=False))
    summary.show_comparison(record)
    shown = capsys.readouterr().out
    assert "needle" in shown and "+18.00" in shown and "A: runs/[/b]:x:" in shown
    assert f"{record['texts']['t']['bits_per_byte']['difference']:.4f}" in shown
