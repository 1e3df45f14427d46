"""Vocabularies trained on a text: merges worked out by hand, any text back, the same bytes again."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import tokenizer as tokenizer_module
from gptjax.cli import EXIT_USER_ERROR, main
from gptjax.config import ConfigError, UserError
from gptjax.data import vocabulary
from gptjax.data.sources import ASSETS, open_source
from gptjax.data.vocabulary import train_vocabulary
from gptjax.interop.tokenizer_files import write_tokenizer
from gptjax.tokenizer import END_OF_TEXT, byte_alphabet, load
from tests import tiny

PLAY = (ASSETS / "shakespeare.txt").read_text(encoding="utf-8")[:100_000]
TEXT = PLAY + "naïve café 你好 世界 🙂🙂 12 345\r\n\t  x\x00\x1f\x85 \u3000z" * 9


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary([write(base / "text.txt", TEXT)], base / "own", 600)
    return base / "own"


def merges(folder: Path) -> list[str]:
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return [" ".join(pair) for pair in tree["model"]["merges"]]


@pytest.mark.parametrize(
    "text, expected",
    [
        # aa is in aaabdaaabac four times. Then Zabdzabac, with Z for aa, has Za and ab twice each:
        # ab, of lower ids. Then ZYdZYac, with Y for ab, has ZY twice, and then XdXac, with X for
        # ZY, each pair once: ac is the lowest.
        ("aaabdaaabac", ["a a", "a b", "aa ab", "a c"]),
        # The words are the, " the" twice, and " cat". he and th are there three times, and h is lower
        # than t; then t and he; then the blank, spelled Ġ, and the. The rest is there once: of "at",
        # "ca" and " c" a is lowest, then c, and Ġ is above all letters.
        ("the the the cat", ["h e", "t he", "Ġ the", "a t", "c at", "Ġ cat"]),
        # No pair reaches across a cut between words: "b " is there as often, and b is lower than Ġ.
        ("b b b b", ["Ġ b"]),
        # é is two bytes, C3 A9: the first merge makes a character of them.
        ("éé", ["Ã ©", "Ã© Ã©"]),
    ],
)  # fmt: skip
def test_merges_of_a_text_of_one_line(text: str, expected: list[str], tmp_path: Path):
    made = train_vocabulary(
        [write(tmp_path / "a.txt", text)], tmp_path / "own", 257 + len(expected)
    )
    assert merges(tmp_path / "own") == expected
    alphabet = sorted(byte_alphabet().values())
    tree = json.loads((tmp_path / "own" / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [*alphabet, *(pair.replace(" ", "") for pair in expected)]
    assert tree["model"]["vocab"] == {token: i for i, token in enumerate(tokens)}
    assert (made.vocab_size, made.eot) == (257 + len(expected), 256 + len(expected))
    assert made.specials == {END_OF_TEXT: made.eot} and made.stops == {made.eot}


def test_the_smallest_is_bytes_and_end_of_text(tmp_path: Path):
    made = train_vocabulary([write(tmp_path / "a.txt", "abc")], tmp_path / "own", 257)
    assert merges(tmp_path / "own") == [] and made.vocab_size == 257 and made.eot == 256
    assert made.decode_bytes(made.encode("né\n")) == "né\n".encode()
    assert len(made.encode("né\n")) == 4


@given(
    text=st.text()
    | st.lists(st.sampled_from([*"aé 哈🙂\n\t\x00", "the ", END_OF_TEXT])).map("".join)
)
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(folder: Path, text: str):
    for own in (load(str(folder)), load("shakespeare2k")):
        ids = own.encode(text)
        assert own.decode_bytes(ids) == text.encode() and own.decode(ids) == text
        assert own.bytes_per_token[ids].sum() == len(text.encode())
        assert own.eot not in ids
        assert [*map(int, own.encode_batch([text])[0])] == ids


def test_every_byte_has_an_id(folder: Path):
    own = load(str(folder))
    assert {own.decode_bytes([i]) for i in range(256)} == {bytes([b]) for b in range(256)}
    assert own.decode([own.eot]) == END_OF_TEXT and own.bytes_per_token[own.eot] == 0


def test_the_same_text_and_size_give_the_same_bytes(folder: Path, tmp_path: Path, monkeypatch):
    """However the text is cut and in whatever order its documents come."""
    documents = [TEXT[:30_000], TEXT[30_000:]]
    one = write(tmp_path / "one.txt", END_OF_TEXT.join(documents))
    lines = (json.dumps({"body": document}) for document in reversed(documents))
    other = write(tmp_path / "other.jsonl", "\n".join(lines))
    train_vocabulary([one], tmp_path / "a", 600)
    monkeypatch.setattr(vocabulary, "_PIECE", re.compile(r".{50,}?\S(?=[ \n])", re.DOTALL))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    train_vocabulary([other], tmp_path / "b", 600, text_key="body")
    train_vocabulary([folder.parent / "text.txt"], tmp_path / "c", 600)
    for name, as_before in (("b", tmp_path / "a"), ("c", folder)):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / name / file).read_bytes() == (as_before / file).read_bytes()


def test_transformers_reads_it(folder: Path):
    transformers = pytest.importorskip("transformers")
    theirs, own = transformers.AutoTokenizer.from_pretrained(folder), load(str(folder))
    text = TEXT[-3000:]
    assert theirs.encode(text, add_special_tokens=False) == own.encode(text)
    assert (theirs.eos_token_id, len(theirs)) == (own.eot, own.vocab_size)


def test_the_vocabulary_that_ships_is_of_the_training_part_of_all_plays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path))
    plain, plays = load("bytes"), open_source("shakespeare_complete", load("bytes"), "train")
    ends = plays.document_ends.tolist()
    texts = [plain.decode(plays.tokens(a, b - 1)) for a, b in itertools.pairwise([0, *ends])]
    file = write(tmp_path / "plays.txt", f"{END_OF_TEXT}\n".join(texts))
    made = train_vocabulary([file], tmp_path / "own", 2048)
    shipped = load("shakespeare2k")
    assert (shipped.name, shipped.vocab_size) == ("shakespeare2k", 2048)
    # The fingerprint and not the file: another version of the library may spell it otherwise.
    assert shipped.fingerprint == made.fingerprint
    assert (tmp_path / "own/tokenizer_config.json").read_bytes() == (
        tokenizer_module.FOLDERS["shakespeare2k"] / "tokenizer_config.json"
    ).read_bytes()


def test_a_folder_that_ships_is_known_by_its_name(tmp_path: Path):
    write_tokenizer("shakespeare2k", tmp_path)
    shipped, again = load("shakespeare2k"), load(str(tmp_path))
    assert again.fingerprint == shipped.fingerprint and again.eot == shipped.eot
    with pytest.raises(ConfigError, match="not one of: bytes, gpt2.*, shakespeare2k"):
        load("shakespeare2")
    with pytest.raises(UserError, match="there is no such folder.*shakespeare2k"):
        load(str(tmp_path / "none"))


# ---- refusals


def refusal(*args) -> str:
    with pytest.raises(UserError) as caught:
        train_vocabulary(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("size", [-1, 0, 256, 2**24 + 1, 10**30])
def test_sizes_out_of_range(size: int, tmp_path: Path):
    file = write(tmp_path / "a.txt", "text")
    assert f"--size={size} must lie in [257, 16777216]" in refusal([file], tmp_path / "own", size)
    assert [*tmp_path.iterdir()] == [file]


def test_a_text_with_too_few_pairs(tmp_path: Path):
    file = write(tmp_path / "a.txt", "abab")
    message = refusal([file], tmp_path / "own", 2048)
    assert "pairs for 259 tokens only" in message and "--size of at most 259" in message
    assert [*tmp_path.iterdir()] == [file]
    assert train_vocabulary([file], tmp_path / "own", 259).vocab_size == 259


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("latin.txt", b"caf\xe9", "is not UTF-8: byte 3 cannot be decoded"),
        ("empty.txt", b"", "holds no text"),
        ("only.txt", END_OF_TEXT.encode(), "holds no text"),
        ("missing.txt", None, "is no file"),
        ("a.pdf", b"x", "is not one of: .txt, .raw, .jsonl, .parquet"),
        ("a.jsonl", b'{"body": "x"}', "line 1 has no key 'text'"),
        ("half.jsonl", b'{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes | None, message: str, tmp_path: Path):
    good, bad = write(tmp_path / "good.txt", TEXT), tmp_path / name
    if content is not None:
        write(bad, content)
    before = {*tmp_path.iterdir()}
    told = refusal([good, bad], tmp_path / "deep" / "own", 300)
    assert message in told and str(bad) in told
    assert {*tmp_path.iterdir()} == before


def test_no_files_and_a_folder_that_is_there(folder: Path, tmp_path: Path):
    assert "no files to read" in refusal([], tmp_path / "own", 300)
    before = (folder / "tokenizer.json").read_bytes()
    assert "exists: name a folder that is not there" in refusal(
        [folder.parent / "text.txt"], folder, 300
    )
    assert (folder / "tokenizer.json").read_bytes() == before
    file = write(tmp_path / "file", "")
    assert "cannot write" in refusal([folder.parent / "text.txt"], file / "own", 300)
    assert [*tmp_path.iterdir()] == [file]


# ---- every command takes it


def works(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    status = main(words)
    told = capsys.readouterr()
    assert status == 0, told.err
    return told.out


def test_from_a_text_to_a_trained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "text.txt", tiny.TEXT)
    out = works(capsys, "data", "vocabulary", "text.txt", "--size=264", "--out=own")
    own = load("own")
    assert out == f"own: 264 tokens, fingerprint {own.fingerprint[:12]}\n"
    told = works(capsys, "data", "text.txt", "--out=store", "--tokenizer=own", "--val_fraction=0.2")
    assert f"{len(tiny.TEXT) * 4 // 5:,} bytes" in told
    words = [f"--config={Path(__file__).parents[1] / tiny.RECIPE}"]
    words += tiny.overrides(Path("store"), data__tokenizer="own", optim__warmup_steps=1)
    words += ["--config.train.steps=2"]
    run = ["train", "--workdir=run", *words]
    works(capsys, *run)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment[-1]["fingerprints"]["tokenizer"] == own.fingerprint
    assert "bits/byte" in works(capsys, "eval", "--workdir=run")
    assert works(capsys, "generate", "--workdir=run", "--prompt=the cat").startswith("the cat")
    assert "sees" in works(capsys, "data", "show", *words, "--rows=1")

    # Another vocabulary in its place: neither the run nor its store goes on.
    shutil.rmtree(tmp_path / "own")
    write(tmp_path / "other.txt", tiny.TEXT.replace("the", "and"))
    works(capsys, "data", "vocabulary", "other.txt", "--size=264", "--out=own")
    assert load("own").fingerprint != own.fingerprint
    tokenizer_module.load.cache_clear()
    assert main(run) == EXIT_USER_ERROR
    message = "gptjax: store/train was tokenised with 'own'[^\n]*\n"
    assert re.fullmatch(message, capsys.readouterr().err)
    works(capsys, "data", "text.txt", "--out=store2", "--tokenizer=own", "--val_fraction=0.2")
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store2").rename(tmp_path / "store")
    assert main(run) == EXIT_USER_ERROR
    message = "gptjax: run holds a run on other data: the content of .*tokenizer.* changed.*\n"
    assert re.fullmatch(message, capsys.readouterr().err)
