"""Tokenizers against GPT-2's published ids, and the properties that perplexity rests on."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import tokenizer as module
from gptjax.config import ConfigError, UserError
from gptjax.tokenizer import load

OFFLINE = ("bytes", "gpt2")


def test_gpt2_ids_are_the_published_ones():
    gpt2 = load("gpt2")
    assert gpt2.encode("Hello, how are you?") == [15496, 11, 703, 389, 345, 30]
    # Runs of spaces, contractions, digits, a line end and letters beyond ASCII: ids of the
    # original encoder.py of the GPT-2 release.
    assert gpt2.encode("It's  2024\nnaïve") == [1026, 338, 220, 48609, 198, 2616, 38776]
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)


def test_bytes_are_the_utf8_bytes():
    assert load("bytes").encode("né\n") == [110, 195, 169, 10]
    assert (load("bytes").vocab_size, load("bytes").eot) == (257, 256)


@pytest.mark.parametrize("name", OFFLINE)
@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_text_survives_and_bytes_per_token_add_up(name: str, text: str):
    tokenizer = load(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
    assert tokenizer.eot not in ids
    [batch] = tokenizer.encode_batch([text])
    assert batch.dtype == np.int32 and batch.tolist() == ids


@pytest.mark.parametrize("name", OFFLINE)
def test_end_of_text_in_a_text_is_plain_text(name: str):
    tokenizer = load(name)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
    assert tokenizer.bytes_per_token[tokenizer.eot] == 0


@pytest.mark.parametrize("name", OFFLINE)
def test_what_is_no_text_is_refused(name: str):
    """A shell hands over a byte that is no UTF-8, here of Latin-1, as half a character."""
    with pytest.raises(UserError, match=r"'caf\\udce9' holds bytes that are no UTF-8"):
        load(name).encode("caf\udce9")


# Long runs, in which pieces of a pattern and tokens are counted from where the run begins.
RUNS = {
    "blanks": "a" + " " * 9000 + "b", "lines": "\n" * 9000 + "x", "both": " \n" * 4500,
    "digits": "x" + "1234567" * 1300, "letters": "ab" * 4500, "one letter": "a" * 9000,
    "Chinese": "床前明月光，疑是地上霜。" * 700, "one character": "哈" * 9000, "emoji": "😀" * 9000,
    "signs": "=" * 5000 + "-" * 4000, "quotes": "'s" * 4500, "words": "the cat's 12 dogs, " * 500,
}  # fmt: skip


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("kind", RUNS)
def test_a_long_text_is_encoded_in_pieces_with_the_same_ids(name, kind, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1000)
    text, tokenizer = RUNS[kind], load(name)
    pieces = tokenizer._pieces(text)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 1000 + module.AFTER
    ids = tokenizer._encoding.encode_ordinary(text)
    assert tokenizer.encode(text) == ids
    first, second, empty = tokenizer.encode_batch([text, "a b", ""])
    assert first.tolist() == ids and second.tolist() == tokenizer.encode("a b")
    assert empty.shape == (0,) and empty.dtype == np.int32


runs = st.lists(st.tuples(st.sampled_from("ab9 '.\n\té—s哈"), st.integers(1, 300)), max_size=25)


@pytest.mark.parametrize("name", OFFLINE)
@given(runs=runs)
@settings(max_examples=30, deadline=None)
def test_any_runs_are_cut_without_changing_a_token(name: str, runs: list[tuple[str, int]]):
    tokenizer, text = load(name), "".join(char * count for char, count in runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", 300)
        assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)


def test_a_million_blanks_are_encoded():
    # More than the engine of the pattern takes at once. GPT-2 merges no blanks with each other, but
    # the last one with the word.
    ids = load("gpt2").encode("a" + " " * 1_000_000 + "b")
    assert ids == [64, *[220] * 999_999, 275]


def test_half_a_character_decodes_to_the_replacement_character():
    assert load("bytes").decode([97, 195]) == "a\ufffd"
    assert load("bytes").decode_bytes([97, 195]) == b"a\xc3"


def test_embedded_ranks_are_the_official_file():
    assert hashlib.sha256(module.RANKS_FILE.read_bytes()).hexdigest() == module.RANKS_SHA256
    # The pattern too is tiktoken's own.
    assert module.openai_public.r50k_pat_str == module.GPT2_PATTERN


def test_damaged_ranks_are_refused(tmp_path, monkeypatch):
    data = bytearray(module.RANKS_FILE.read_bytes())
    data[1000] ^= 1
    (tmp_path / "ranks").write_bytes(data)
    monkeypatch.setattr(module, "RANKS_FILE", tmp_path / "ranks")
    with pytest.raises(UserError, match="damaged"):
        load.__wrapped__("gpt2")


def test_fingerprint_tells_ids_apart():
    ranks = {b"a": 0, b"b": 1}
    base = module._fingerprint(ranks, {"<e>": 2}, "x")
    assert base == module._fingerprint(dict(reversed(ranks.items())), {"<e>": 2}, "x")
    others = [
        module._fingerprint({b"a": 1, b"b": 0}, {"<e>": 2}, "x"),
        module._fingerprint(ranks, {"<e>": 3}, "x"),
        module._fingerprint(ranks, {"<e>": 2}, "y"),
    ]
    assert len({base, *others}) == 4


def test_unknown_name_lists_the_choices():
    with pytest.raises(ConfigError, match="not one of: bytes, gpt2.*did you mean 'gpt2'"):
        load("gpt-2")


def test_without_cache_or_network_the_error_names_the_remedy(tmp_path, monkeypatch):
    def no_network(path: str) -> bytes:
        raise ConnectionError(f"cannot reach {path}")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", no_network)
    with pytest.raises(UserError, match="set TIKTOKEN_CACHE_DIR") as caught:
        load.__wrapped__("cl100k_base")
    assert "\n" not in str(caught.value)


def test_other_encodings_come_from_tiktokens_cache(tmp_path, monkeypatch):
    def no_network(path: str) -> bytes:
        raise ConnectionError(f"cannot reach {path}")

    # r50k_base's ranks are the embedded file; its cache name is the sha1 of its address.
    address = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    name = hashlib.sha1(address.encode()).hexdigest()
    (tmp_path / name).write_bytes(module.RANKS_FILE.read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", no_network)
    r50k = load.__wrapped__("r50k_base")
    assert r50k.encode("Hello, how are you?") == [15496, 11, 703, 389, 345, 30]
    assert r50k.fingerprint == load("gpt2").fingerprint
