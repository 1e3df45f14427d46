"""Stores: what is written, what is refused, and every fault put there for real."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import tokenizer as tokenizer_module
from gptjax.config import ConfigError, UserError
from gptjax.data import DATASETS, Batches, Store, open_source, prepare
from gptjax.data import sources as sources_module
from gptjax.data import store as store_module
from gptjax.data.sources import ASSETS
from gptjax.tokenizer import END_OF_TEXT, Tokenizer, load
from tests import tiny
from tests.child import REPO, Child

# The package's attribute of this name is the function.
prepare_module = sys.modules["gptjax.data.prepare"]
BYTES, GPT2 = load("bytes"), load("gpt2")
PLAYS = (ASSETS / "shakespeare.txt").read_text(encoding="utf-8")


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def split_text(store: Path, split: str, tokenizer=BYTES) -> list[str]:
    """The documents of a split, decoded; each must end with one end-of-text."""
    opened = Store.open(store / split, tokenizer)
    documents, start = [], 0
    for end in opened.document_ends.tolist():
        *body, last = opened.tokens(start, end).tolist()
        assert last == tokenizer.eot and tokenizer.eot not in body
        documents.append(tokenizer.decode(body))
        start = end
    assert start == opened.num_tokens
    return documents


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is written


def test_the_cut_is_nanogpts(tmp_path):
    # nanoGPT, data/shakespeare/prepare.py, on text with characters of several bytes.
    data = PLAYS[:30_001].replace("e", "é").replace("<|endoftext|>", "")
    n = len(data)
    train_data = data[: int(n * 0.9)]
    val_data = data[int(n * 0.9) :]
    out = tmp_path / "out"
    prepare([write(tmp_path / "input.txt", data)], out, "gpt2")
    for split, text in (("train", train_data), ("val", val_data)):
        store = Store.open(out / split, GPT2)
        assert store.tokens(0, store.num_tokens).tolist() == [*GPT2.encode(text), GPT2.eot]


def test_separators_make_documents(tmp_path):
    text = "one\n<|endoftext|>\ntwo <|endoftext|>three<|endoftext|>\n<|endoftext|>\n"
    prepare([write(tmp_path / "a.txt", text)], tmp_path / "out", "bytes", 0.0)
    assert split_text(tmp_path / "out", "train") == ["one\n", "two ", "three"]
    assert not (tmp_path / "out" / "val").exists()


def test_a_document_astride_the_cut_is_cut_there(tmp_path):
    files = [write(tmp_path / "a.txt", "abcdef"), write(tmp_path / "b.txt", "ghijkl")]
    prepare(files, tmp_path / "out", "bytes", 0.25)  # 12 characters, 9 train
    assert split_text(tmp_path / "out", "train") == ["abcdef", "ghi"]
    assert split_text(tmp_path / "out", "val") == ["jkl"]
    prepare(files, tmp_path / "even", "bytes", 0.5)  # between the documents
    assert split_text(tmp_path / "even", "train") == ["abcdef"]
    assert split_text(tmp_path / "even", "val") == ["ghijkl"]


@given(
    texts=st.lists(st.text("ab é\n<|", max_size=9), min_size=1, max_size=6),
    chunk=st.integers(1, 30),
)
@settings(max_examples=60, deadline=None)
def test_reading_in_chunks_changes_nothing(texts, chunk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    path = write(folder / "a.txt", "<|endoftext|>\n".join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "CHUNK_BYTES", chunk)
        got, rest = [], ""
        for text, ends in prepare_module._read_text(path, "text"):
            rest += text
            if ends:
                got.append(rest)
                rest = ""
    assert rest == "" and got == texts


@pytest.mark.parametrize("text", [PLAYS[:20_000], "床前明月光，" * 2000, " " * 20_000], ids=len)
@pytest.mark.parametrize("chunk", [7, 700, 50_000])
def test_a_long_document_is_encoded_in_pieces(monkeypatch, text, chunk):
    monkeypatch.setattr(tokenizer_module, "PIECE", 1000)
    parts = [(text[i : i + chunk], False) for i in range(0, len(text), chunk)]
    pieces = [*prepare_module._pieces(iter([*parts, ("", True), ("next", True)]), GPT2)]
    assert pieces.pop() == ("next", True)
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece) for piece, _ in pieces) <= 1000 + tokenizer_module.AFTER
    ids = [i for piece, _ in pieces for i in GPT2.encode(piece)]
    assert ids == GPT2._encoding.encode_ordinary(text)


@pytest.mark.parametrize("text", ["the cat. ", "床前明月光，", "😀", " "])
def test_what_is_encoded_at_once_is_bounded_in_bytes(tmp_path, monkeypatch, text):
    monkeypatch.setattr(tokenizer_module, "PIECE", 1000)
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 5000)
    batches, encode = [], Tokenizer.encode_batch

    def spy(tokenizer, texts):
        batches.append(sum(len(part.encode()) for part in texts))
        return encode(tokenizer, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", spy)
    path = write(tmp_path / "a.txt", text * 20_000)
    prepare([path], tmp_path / "out", "gpt2", 0.0)
    assert max(batches) <= 5000 + 4 * (1000 + tokenizer_module.AFTER)
    assert len(batches) > 1
    assert split_text(tmp_path / "out", "train", GPT2) == [text * 20_000]


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_each_of_any_number_of_cores_has_an_encoding_of_its_own(tmp_path, monkeypatch, cores):
    monkeypatch.setattr(tokenizer_module, "PIECE", 1000)
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 2000)
    monkeypatch.setattr(prepare_module.os, "cpu_count", lambda: cores)
    encodings, encode = {}, Tokenizer.encode_batch

    def spy(tokenizer, texts):
        core = tokenizer._encoding._core_bpe
        assert encodings.setdefault(threading.get_ident(), core) is core
        return encode(tokenizer, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", spy)
    text = PLAYS[:100_000]
    prepare([write(tmp_path / "a.txt", text)], tmp_path / "out", "gpt2", 0.4)
    assert [split_text(tmp_path / "out", split, GPT2) for split in ("train", "val")] == [
        [text[:60_000]], [text[60_000:]],
    ]  # fmt: skip
    encodings[threading.get_ident()] = (
        GPT2._encoding._core_bpe
    )  # it cuts, though it need not encode
    assert min(cores, 2) <= len(encodings) <= cores
    assert len({id(core) for core in encodings.values()}) == len(encodings)


def test_a_million_blanks_in_one_document(tmp_path):
    path = write(tmp_path / "a.txt", "a" + " " * 1_000_000 + "b")
    prepare([path], tmp_path / "out", "gpt2", 0.0)
    store = Store.open(tmp_path / "out" / "train", GPT2)
    assert store.tokens(0, 1_000_002).tolist() == [64, *[220] * 999_999, 275, GPT2.eot]


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(prepare_module, "CHUNK_BYTES", chunk)
    mark = "\ufeff".encode()
    for name, content in (("a.txt", "é\ufeff"), ("b.raw", "é\ufeff")):  # inside it is text
        path = write(tmp_path / name, mark + content.encode())
        prepare([path], tmp_path / f"{name}.out", "bytes", 0.0)
        assert split_text(tmp_path / f"{name}.out", "train") == [content]
    path = write(tmp_path / "a.txt", mark + b"ab\xff")
    assert "byte 5 cannot be decoded" in refusal(prepare, [path], tmp_path / "out", "bytes")
    for lines in ('{"text": "é"}\n', '\n{"text": "é"}\n'):
        path = write(tmp_path / "c.jsonl", mark + lines.encode())
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        prepare([path], tmp_path / "c", "bytes", 0.0)
        assert split_text(tmp_path / "c", "train") == ["é"]


@pytest.mark.parametrize("text", ["", "a" * 9])
def test_a_mark_alone_is_no_text(tmp_path, text):
    path = write(tmp_path / "a.txt", "\ufeff" + text)
    if not text:
        assert "holds no text" in refusal(prepare, [path], tmp_path / "out", "bytes", 0.0)
    else:
        assert prepare([path], tmp_path / "out", "bytes", 0.0)["train"]["bytes"] == 9


def test_a_damaged_page_of_parquet_is_told_with_its_file(tmp_path):
    table = pyarrow.table({"text": [f"document {i}" for i in range(3000)]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=1000, compression="snappy")
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    for i in range(group.dictionary_page_offset, group.data_page_offset + 200):
        content[i] = 0xFF
    path.write_bytes(content)
    message = refusal(prepare, [path], tmp_path / "out", "bytes")
    assert f"{path} cannot be read as parquet beyond row 1024: " in message


def test_bytes_that_are_no_text_in_parquet_are_told_with_their_file(tmp_path):
    column = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    message = refusal(prepare, [tmp_path / "a.parquet"], tmp_path / "out", "bytes")
    assert f"{tmp_path / 'a.parquet'} cannot be read as parquet" in message


def test_a_file_that_cannot_be_read_on_is_named(tmp_path):
    path = Path("/proc/self/mem")  # reading it at 0 is an input/output error
    monkey = tmp_path / "a.txt"
    monkey.symlink_to(path)
    assert f"{monkey} cannot be read: " in refusal(prepare, [monkey], tmp_path / "out", "bytes")


def test_jsonl_and_parquet_give_the_same_store_as_text(tmp_path):
    texts = ["first", "", "second\nline <|endoftext|>", "dernière"]
    lines = "\n".join(json.dumps({"body": t, "id": i}) for i, t in enumerate(texts)) + "\n\n"
    write(tmp_path / "a.jsonl", lines)
    table = pyarrow.table({"id": range(4), "body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    prints = set()
    for kind in ("jsonl", "parquet"):
        out = tmp_path / kind
        summary = prepare([tmp_path / f"a.{kind}"], out, "bytes", 0.0, "body")
        prints.add(summary["train"]["fingerprint"])
        # In a field, the separator is text like any other; empty documents are dropped.
        assert split_text(out, "train") == [t for t in texts if t]
    assert len(prints) == 1


def test_summary_counts(tmp_path):
    path = write(tmp_path / "a.txt", "é" * 90 + "z" * 10)
    summary = prepare([path], tmp_path / "out", "bytes")
    assert set(summary) == {"train", "val"}
    fingerprint = Store.open(tmp_path / "out" / "val", BYTES).fingerprint
    assert summary["val"] == {
        "path": str(tmp_path / "out" / "val"),
        "tokens": 11,
        "documents": 1,
        "bytes": 10,
        "fingerprint": fingerprint,
    }
    assert (summary["train"]["tokens"], summary["train"]["bytes"]) == (181, 180)


def test_prepared_twice_is_the_same_store(tmp_path):
    path = write(tmp_path / "a.txt", PLAYS[:5000])
    first = prepare([path], tmp_path / "one", "gpt2")
    second = prepare([path], tmp_path / "two", "gpt2")
    for split in ("train", "val"):
        assert first[split]["fingerprint"] == second[split]["fingerprint"]
    before = (tmp_path / "one" / "train" / "manifest.json").stat().st_mtime_ns
    assert prepare([path], tmp_path / "one", "gpt2") == first
    assert (tmp_path / "one" / "train" / "manifest.json").stat().st_mtime_ns == before


def test_a_folders_name_is_shown_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # for rich: this is a terminal
    monkeypatch.setenv("COLUMNS", "300")
    out = tmp_path / "x[/b]:smile:[red]y"
    prepare([write(tmp_path / "a.txt", "some text")], out, "bytes")
    assert f"tokenising into {out}" in capsys.readouterr().err


def test_wide_ids_are_stored_wide(tmp_path):
    # A vocabulary beyond 65,536 without its download: the byte tokenizer with a higher bound.
    wide = dataclasses.replace(BYTES, vocab_size=70_000, eot=69_999)
    object.__setattr__(wide, "bytes_per_token", np.ones(70_000, np.int32))
    writer = store_module.StoreWriter(tmp_path / "train", wide)
    writer.write(np.array([1, 65_536, 69_998]), True)
    writer.close()
    store = Store.open(tmp_path / "train", wide)
    assert store.tokens(0, 4).tolist() == [1, 65_536, 69_998, 69_999]


# ---- what is refused


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(store_module, "SHARD_TOKENS", 40)
    path = write(tmp_path / "a.txt", "The quick brown fox jumps over the lazy dog. " * 4)
    prepare([path], tmp_path / "store", "bytes")
    return tmp_path / "store"


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokens-00002.bin", "document_ends.bin"])
def test_every_flipped_bit_is_noticed(store, name):
    path = store / "train" / name
    good = path.read_bytes()
    for byte in range(0, len(good), 7):
        bad = bytearray(good)
        bad[byte] ^= 1 << byte % 8
        path.write_bytes(bad)
        assert f"{name} was altered" in refusal(Store.open, store / "train", BYTES)
    path.write_bytes(good)
    Store.open(store / "train", BYTES)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "document_ends.bin"])
def test_a_truncated_or_missing_file_is_noticed(store, name):
    path = store / "train" / name
    good = path.read_bytes()
    for bad in (good[:-1], good[:-2], b"", good + b"\0\0"):
        path.write_bytes(bad)
        assert "truncated or altered" in refusal(Store.open, store / "train", BYTES)
    path.unlink()
    assert "holds 0 bytes" in refusal(Store.open, store / "train", BYTES)


def test_an_altered_manifest_is_noticed(store):
    path = store / "train" / "manifest.json"
    good = path.read_text()
    spelled = (good + "\n", good.replace(" ", "\t", 1))  # the same manifest in other bytes
    values = (good.replace("256", "999", 1), good.replace("1", "2", 1))
    for bad in (*values, *spelled, good[:-5], "[]", "{}"):
        assert bad != good
        path.write_text(bad)
        assert "manifest.json is damaged" in refusal(Store.open, store / "train", BYTES)
    path.unlink()
    assert "is no token store" in refusal(Store.open, store / "train", BYTES)


def test_another_tokenizer_is_refused(store):
    message = refusal(open_source, str(store), GPT2, "train")
    assert "tokenised with 'bytes'" in message and "set data.tokenizer=bytes" in message


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    writer = store_module.StoreWriter(tmp_path / "train", BYTES)
    writer._append(np.array([1, 2, 257, 3]), np.ones(4))
    writer.close()
    message = refusal(Store.open, tmp_path / "train", BYTES)
    assert "holds token id 257, outside the vocabulary of 257" in message


def test_unknown_sources_and_splits(store, tmp_path):
    message = refusal(open_source, str(tmp_path / "nowhere"), BYTES, "train")
    assert "neither a token store" in message and "shakespeare" in message
    assert "choose one of train, val" in refusal(open_source, str(store), BYTES, "test")
    shutil.rmtree(store / "val")
    assert "holds no split 'val'" in refusal(open_source, str(store), BYTES, "val")


def test_files_that_cannot_be_read(tmp_path):
    def message(name: str, content: str | bytes | None, key: str = "text") -> str:
        path = tmp_path / name
        if content is not None:
            write(path, content)
        text = refusal(prepare, [path], tmp_path / "out", "bytes", 0.1, key)
        assert str(path) in text and not (tmp_path / "out").exists()
        return text

    assert "is no file" in message("missing.txt", None)
    assert "holds no text" in message("empty.txt", "")
    assert "holds no text" in message("only.txt", "<|endoftext|>\n<|endoftext|>")
    assert "holds no text" in message("blank.jsonl", '{"text": ""}\n')
    assert "byte 7 cannot be decoded" in message("latin.txt", "abc dé".encode() + b"\xe9tre")
    assert "byte 2 cannot be decoded" in message("cut.txt", b"ab\xc3")
    good = '{"text": "a"}\n'
    assert "line 3 is not JSON" in message("bad.jsonl", good + "\n" + "{text: 1}\n")
    assert "line 2 is not JSON" in message("latin.jsonl", good.encode() + b'{"text": "\xe9"}\n')
    assert "line 2 has no key 'text'" in message("key.jsonl", good + '{"body": "b"}\n')
    assert "(body)" in message("key.jsonl", good + '{"body": "b"}\n')
    assert "line 1 has no key" in message("list.jsonl", '["text"]\n')
    assert "line 2 holds int" in message("int.jsonl", good + '{"text": 1}\n')
    assert "half a surrogate pair" in message("half.jsonl", '{"text": "\\ud800"}\n')
    assert "cannot be read as parquet" in message("text.parquet", "not parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", None]}), tmp_path / "t.parquet")
    assert "no column 'text'" in message("t.parquet", None) and "(body)" in message(
        "t.parquet", None
    )
    assert "row 2 holds NoneType" in message("t.parquet", None, "body")


def test_a_bad_byte_is_found_at_its_place_in_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "CHUNK_BYTES", 5)
    for at in range(12):
        content = "éé".encode() * 2 + b"abcd"
        content = ("a" * at).encode() + "é".encode() + b"\xff" + content
        message = refusal(prepare, [write(tmp_path / "a.txt", content)], tmp_path / "o", "bytes")
        assert f"byte {at + 2} cannot" in message


def test_unknown_endings_list_the_known(tmp_path):
    path = write(tmp_path / "a.pdf", "text")
    with pytest.raises(ConfigError, match=r"'.pdf' is not one of: .txt, .raw, .jsonl, .parquet"):
        prepare([path], tmp_path / "out", "bytes")


def test_impossible_requests(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    assert "leaves none for 'train'" in refusal(prepare, [path], tmp_path / "out", "bytes")
    assert "must lie in [0, 1)" in refusal(prepare, [path], tmp_path / "out", "bytes", 1.0)
    assert "no files" in refusal(prepare, [], tmp_path / "out", "bytes")
    assert list(tmp_path.iterdir()) == [path]  # nothing is left behind


def test_an_existing_folder_is_never_overwritten(tmp_path, store):
    path = write(tmp_path / "b.txt", "another text altogether")
    assert "store of another text" in refusal(prepare, [path], store, "bytes")
    assert "tokenised with 'bytes'" in refusal(prepare, [path], store, "gpt2")
    assert "store of another text" in refusal(prepare, [tmp_path / "a.txt"], store, "bytes", 0.2)
    (tmp_path / "notes").mkdir()
    write(tmp_path / "notes" / "x", "mine")
    assert "is not this store" in refusal(prepare, [path], tmp_path / "notes", "bytes")
    assert "is not this store" in refusal(prepare, [path], path, "bytes")
    assert path.read_text() == "another text altogether"
    (tmp_path / "empty").mkdir()
    assert "train" in prepare([path], tmp_path / "empty", "bytes")


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(self, **provenance):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.StoreWriter, "close", full_disk)
    path = write(tmp_path / "a.txt", "some text")
    message = refusal(prepare, [path], tmp_path / "out", "bytes")
    assert "cannot write" in message and "No space left" in message
    assert list(tmp_path.iterdir()) == [path]


# ---- nanoGPT and the built-in texts


PREPARER = """
    import os, signal, sys
    from pathlib import Path
    from gptjax import tokenizer
    from gptjax.data import store
    prepare_module = sys.modules["gptjax.data.prepare"]

    # So that some of what is gone on from is within a document.
    store.SHARD_TOKENS, prepare_module.BATCH_BYTES = 1000, 150
    tokenizer.PIECE, tokenizer.AFTER = 70, 30
    note, left = store.StoreWriter.note, int(sys.argv[3])

    def note_and_die(writer, written):
        global left
        note(writer, written)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    store.StoreWriter.note = note_and_die
    files = [Path(sys.argv[1]) / name for name in ("a.txt", "b.jsonl")]
    prepare_module.prepare(files, Path(sys.argv[2]), "bytes", val_fraction=0.4)
"""


def test_a_killed_preparation_goes_on_and_makes_the_same(tmp_path, capfd):
    """Killed after some shards of the training split, then after some of the other."""
    write(
        tmp_path / "a.txt", END_OF_TEXT.join(PLAYS[i * 700 : i * 700 + 300 + i] for i in range(8))
    )
    lines = (json.dumps({"text": PLAYS[i * 90 : i * 90 + 2 * i]}) for i in range(60))
    write(tmp_path / "b.jsonl", "\n".join(lines))
    whole = Child(PREPARER, tmp_path, tmp_path / "whole", "-1").wait()
    assert whole.returncode == 0, whole.stderr
    for kills in (2, 3):  # shards are 3 and 2
        killed = Child(PREPARER, tmp_path, tmp_path / "out", str(kills)).wait()
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / "out").exists()
    assert re.search(r"/out: going on after [\d,]+ tokens of train\n", killed.stderr)
    done = Child(PREPARER, tmp_path, tmp_path / "out", "-1").wait()
    assert done.returncode == 0
    assert re.search(r"/out: going on after [\d,]+ tokens of val\n", done.stderr), done.stderr
    assert tiny.files(tmp_path / "out") == tiny.files(tmp_path / "whole")
    assert len(list((tmp_path / "out" / "train").glob("tokens-*"))) >= 3
    assert not list(tmp_path.glob(".*"))


def test_the_command_starts_without_jax_whose_import_takes_longer_than_ten_megabytes(tmp_path):
    text, out = write(tmp_path / "a.txt", PLAYS[:1000]), tmp_path / "out"
    code = """
import sys
from gptjax.cli import main
main(["data", "--tokenizer=gpt2", "--out", *sys.argv[1:]])
assert "jax" not in sys.modules, "imported"
"""
    words = [sys.executable, "-c", code, str(out), str(text)]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert split_text(out, "train", GPT2) == [PLAYS[:900]]


def test_nanogpt_bins_open(tmp_path):
    ids = [*GPT2.encode("one document"), GPT2.eot, *GPT2.encode("and another, unfinished")]
    for split in ("train", "val"):
        np.array(ids, np.uint16).tofile(tmp_path / f"{split}.bin")
    store = open_source(str(tmp_path), GPT2, "val")
    assert store.tokens(0, store.num_tokens).tolist() == ids
    assert store.document_ends.tolist() == [ids.index(GPT2.eot) + 1, len(ids)]
    data = tiny.data(sources=(str(tmp_path),), packing="document", batch_size=2)
    rows = Batches(data, 16, 0, "val", GPT2).sources[0].rows(np.arange(2))
    assert rows.weights.sum() == len(ids)
    before = store.fingerprint
    ids[0] += 1
    np.array(ids, np.uint16).tofile(tmp_path / "val.bin")
    assert open_source(str(tmp_path), GPT2, "val").fingerprint != before
    assert "outside the vocabulary of 257" in refusal(open_source, str(tmp_path), BYTES, "val")
    write(tmp_path / "val.bin", b"abc")
    assert "holds 3 bytes" in refusal(open_source, str(tmp_path), GPT2, "val")


def test_shakespeare_is_eight_whole_plays():
    plays = PLAYS.split("<|endoftext|>\n")
    assert len(plays) == 8 and 1_000_000 < len(PLAYS) < 1_100_000
    assert all("by William Shakespeare" in play[:60] and play.endswith("\n") for play in plays)
    assert plays[0].startswith("HAMLET") and plays[-1].startswith("THE TEMPEST")
    # The held-out tenth is the last play, and the end of the one before.
    characters = sum(map(len, plays))
    assert 0 <= characters - int(characters * 0.9) - len(plays[-1]) < 6000


def test_all_of_shakespeare_holds_out_what_eight_plays_do(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path))
    more = (ASSETS / "shakespeare_more.txt").read_text(encoding="utf-8").split("<|endoftext|>\n")
    eight = PLAYS.split("<|endoftext|>\n")
    assert len(more) == 34 and all("by William Shakespeare" in work[:80] for work in more)
    titles = [work.partition("\n")[0] for work in (*more, *eight)]
    assert len(set(titles)) == 42
    held_out = [open_source(name, BYTES, "val") for name in DATASETS]
    assert [store.num_tokens for store in held_out] == [103_599 + 2] * 2  # two ends of a text
    a, b = (store.tokens(0, store.num_tokens) for store in held_out)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", DATASETS)
def test_built_in_texts_are_tokenised_once(name, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path))
    store = open_source(name, GPT2, "train")
    assert store.num_tokens > 100_000 and store.path.is_relative_to(tmp_path)
    # What the tokens stand for is the text, byte for byte.
    val = open_source(name, GPT2, "val")
    text = b"".join(
        GPT2.decode_bytes(t for t in s.tokens(0, s.num_tokens).tolist() if t != GPT2.eot)
        for s in (store, val)
    )
    files = DATASETS[name].files
    assert text == b"".join(f.read_bytes() for f in files).replace(b"<|endoftext|>\n", b"")
    assert store.manifest["bytes"] + val.manifest["bytes"] == len(text)
    monkeypatch.setattr(sources_module, "prepare", None)  # a second time would fail
    assert open_source(name, GPT2, "train").fingerprint == store.fingerprint


def test_losing_the_race_is_no_error(tmp_path, monkeypatch):
    out, path = tmp_path / "store", write(tmp_path / "a.txt", PLAYS[:2000])
    rename = prepare_module.os.rename

    def late(aside: Path, target: Path) -> None:
        shutil.copytree(aside, target)  # a rival's store, there just before ours
        rename(aside, target)

    monkeypatch.setattr(prepare_module.os, "rename", late)
    summary = prepare([path], out, "bytes")
    assert summary["train"]["fingerprint"] == Store.open(out / "train", BYTES).fingerprint
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "store"}


def test_processes_may_race_for_the_cache(tmp_path):
    out, path = tmp_path / "cache" / "store", write(tmp_path / "a.txt", PLAYS[:20_000])
    # Spawned, not forked: jax's threads may be running in this process.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=spawn) as pool:
        jobs = [pool.submit(prepare, [path], out, "bytes") for _ in range(6)]
        summaries = [job.result(timeout=60) for job in jobs]
    assert all(summary == summaries[0] for summary in summaries)
    assert [p.name for p in out.parent.iterdir()] == ["store"]
