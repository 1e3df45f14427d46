"""Texts of an evaluation: what is counted, what is read alike, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import tokenizer
from gptjax.config import ConfigError, UserError
from gptjax.data import prepare
from gptjax.evaluation import texts
from gptjax.evaluation.detokenize import DETOKENIZERS, wikitext
from gptjax.evaluation.texts import Reading, count_words, open_text, parse_sets

BYTES = tokenizer.load("bytes")
# One document each; the second is empty and the fourth is nothing but whitespace.
DOCUMENTS = (
    "the cat , which sees\n the sun \n",
    "",
    "七嘴八舌的人們\u3000在山上",
    "  ",
    "an owl @-@ like bird\r\n",
)
DOMAINS = ("prose", "empty", "chinese", "blank", "prose")
KEPT = [d for d in DOCUMENTS if d]


def write(folder: Path, ending: str) -> Path:
    """DOCUMENTS with their domains, in a file of each kind."""
    path = folder / f"text{ending}"
    rows = [{"text": d, "kind": k} for d, k in zip(DOCUMENTS, DOMAINS, strict=True)]
    match ending:
        case ".jsonl":
            path.write_text("\n\n".join(json.dumps(row) for row in rows))
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case _:
            path.write_bytes("<|endoftext|>".join(DOCUMENTS).encode())
    return path


@given(st.lists(st.text(alphabet="ab \n\t\u3000\x1c", max_size=6), max_size=6))
def test_words_are_the_harness_s_however_the_text_is_cut(pieces):
    assert count_words(pieces) == len(re.split(r"\s+", "".join(pieces)))


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@pytest.mark.parametrize(
    "content", ["plain\n", "\ufeffline\r\nend", "人們在山上看見了月亮。\n" * 9]
)
def test_the_store_holds_every_byte_of_a_plain_text(tmp_path, name, content):
    path = tmp_path / "text.txt"
    path.write_bytes(content.encode())
    found = open_text("t", str(path), tokenizer.load(name), tmp_path / "store", Reading())
    text = content.removeprefix("\ufeff")  # a byte-order mark is no text
    assert found.store.manifest["bytes"] == len(text.encode())
    assert found.store.manifest["documents"] == 1


@pytest.mark.parametrize("ending", [".txt", ".raw", ".jsonl", ".parquet"])
def test_every_kind_of_file_makes_the_same_documents(tmp_path, ending):
    found = open_text("t", str(write(tmp_path, ending)), BYTES, tmp_path / "store", Reading())
    ends = found.store.document_ends
    ids = found.store.tokens(0, found.store.num_tokens)
    parts = [BYTES.decode(part[:-1]) for part in np.split(ids, ends[:-1])]
    assert parts == KEPT
    assert found.domains is None and found.original is None


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_domains_keep_step_with_documents(tmp_path, ending):
    path = str(write(tmp_path, ending))
    found = open_text("t", path, BYTES, tmp_path / "store", Reading(domain_key="kind"))
    assert found.domains == ["prose", "chinese", "blank", "prose"]
    # What a de-tokeniser leaves nothing of is no document either, nor is its domain one.
    DETOKENIZERS["strip"] = str.strip
    try:
        how = Reading(domain_key="kind", detokenizer="strip")
        found = open_text("t", path, BYTES, tmp_path / "stripped", how)
    finally:
        del DETOKENIZERS["strip"]
    assert found.domains == ["prose", "chinese", "prose"]
    assert found.original.shape == (2, 3) and len(found.store.document_ends) == 3


def test_words_and_bytes_are_those_before_the_detokeniser(tmp_path):
    how = Reading(detokenizer="wikitext")
    found = open_text("t", str(write(tmp_path, ".txt")), BYTES, tmp_path / "store", how)
    words, lengths = found.original
    assert words.tolist() == [len(re.split(r"\s+", d)) for d in KEPT]
    assert lengths.tolist() == [len(d.encode()) for d in KEPT]
    ids = found.store.tokens(0, found.store.num_tokens)
    assert BYTES.decode(ids[: found.store.document_ends[0] - 1]) == "the cat, which sees\nthe sun\n"


@pytest.mark.parametrize(
    "pretokenised, prose",
    [
        (" = Robert <unk> = \n", " = Robert <unk> =\n"),
        ("the 1 @,@ 000 well @-@ known 3 @.@ 5 s", "the 1,000 well-known 3.5 s"),
        ("Oh ! Why ? So , here ; there : . end", "Oh! Why? So, here; there:. end"),
        ("( in ) [ a ] { b }", "(in) [a] {b}"),
        ('he said " yes \n or " and " no "', 'he said "yes \n or" and "no"'.replace(" \n", "\n").replace("\n ", "\n")),
        ("the owner 's dogs ' tails", "the owner's dogs' tails"),
        ("= = = Early = = =", "=== Early ==="),
        ("at 5 ° C", "at 5°C"),
        ("about N of them", "about 1 of them"),
    ],
)  # fmt: skip
def test_wikitext_becomes_prose(pretokenised, prose):
    assert wikitext(pretokenised) == prose


def test_a_store_is_opened_where_it_lies(tmp_path):
    made = prepare([write(tmp_path, ".txt")], tmp_path / "made", "bytes", val_fraction=0.5)
    found = open_text("t", made["val"]["path"], BYTES, tmp_path / "unused", Reading())
    assert found.store.fingerprint == made["val"]["fingerprint"]
    assert not (tmp_path / "unused").exists()
    with pytest.raises(UserError, match=r"holds two stores: name .*train or .*val"):
        open_text("t", str(tmp_path / "made"), BYTES, tmp_path / "unused", Reading())
    with pytest.raises(UserError, match="was tokenised with 'bytes'"):
        open_text("t", made["val"]["path"], tokenizer.load("gpt2"), tmp_path / "u", Reading())


def test_names_of_sets():
    assert parse_sets(["a=b.txt", "c=hub:x,y=z"]) == {"a": "b.txt", "c": "hub:x,y=z"}
    for words in (["a.txt"], ["=a.txt"], ["a="]):
        with pytest.raises(UserError, match="is not NAME=PATH"):
            parse_sets(words)
    for words in (["a=b", "a=c"], ["all=b"]):
        with pytest.raises(UserError, match="needs another name"):
            parse_sets(words)


@pytest.mark.parametrize(
    "name, content, how, message",
    [
        ("empty.txt", "", {}, "empty.txt holds no text to score"),
        ("empty.jsonl", '{"text": ""}', {}, "empty.jsonl holds no text to score"),
        ("a.csv", "a", {}, r"ends in none of \.txt"),
        ("a.jsonl", "{", {}, "line 1 is not JSON"),
        ("a.jsonl", '{"text": "a"}', {"text_key": "t"}, r"no key 't': .* \(text\)"),
        ("a.jsonl", '{"text": "a"}', {"domain_key": "kind"}, "no key 'kind'"),
        ("a.txt", "a", {"domain_key": "kind"}, "plain text, which has no keys"),
        ("a.txt", "a" * 40, {"detokenizer": "wikitext"}, "more than 32 characters"),
        ("a.txt", b"\xff", {}, "not UTF-8: byte 0"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch, name, content, how, message):
    monkeypatch.setattr(texts, "DETOKENIZE_CHARS", 32)
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as refused:
        open_text("t", str(path), BYTES, tmp_path / "store", Reading(**how))
    assert "\n" not in str(refused.value)


def test_other_refusals(tmp_path):
    with pytest.raises(UserError, match=r"missing.txt is no file"):
        open_text("t", str(tmp_path / "missing.txt"), BYTES, tmp_path / "s", Reading())
    with pytest.raises(ConfigError, match="--detokenizer='ptb' is not one of: none, wikitext"):
        open_text("t", "a.txt", BYTES, tmp_path / "s", Reading(detokenizer="ptb"))
    for how in (Reading(detokenizer="wikitext"), Reading(domain_key="kind")):
        with pytest.raises(UserError, match="token"):
            open_text("t", str(tmp_path), BYTES, tmp_path / "s", how)


def test_a_document_larger_than_memory_is_told(tmp_path, monkeypatch):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(texts, "tokenise", exhausted)
    with pytest.raises(UserError, match="a document larger than memory: split it"):
        open_text("t", str(write(tmp_path, ".jsonl")), BYTES, tmp_path / "s", Reading())


def test_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"needs the datasets library: pip install 'gptjax\[hub\]'"):
        open_text("t", "hub:org/name,test", BYTES, tmp_path / "s0", Reading())

    asked = []

    def load_dataset(*words, **options):
        asked.append((words, options))
        if words[0] == "org/none":
            raise ConnectionError("no\nnetwork")
        return iter([{"text": "one", "kind": 1}, {"text": "two", "kind": 2}])

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = open_text(
        "t", "hub:org/name,raw,test", BYTES, tmp_path / "s1", Reading(domain_key="kind")
    )
    options = {"split": "test", "streaming": True, "revision": None}
    assert asked == [(("org/name", "raw"), options)]
    assert BYTES.decode(found.store.tokens(0, 3)) == "one" and found.domains == ["1", "2"]
    for source, how, message in (
        ("hub:name", {}, r"is not hub:DATASET\[@REVISION\]\[,CONFIG\],SPLIT"),
        ("hub:a,b,c,d", {}, "is not hub:"),
        ("hub:org/none,test", {}, "cannot be read: ConnectionError: no$"),
        ("hub:org/name,test", {"text_key": "t"}, "no key 't'; its keys: text, kind"),
        ("hub:org/name,test", {"text_key": "kind"}, "row 0 holds no text"),
    ):
        with pytest.raises(UserError, match=message):
            open_text("t", source, BYTES, tmp_path / "s2", Reading(**how))
        shutil.rmtree(tmp_path / "s2", ignore_errors=True)
