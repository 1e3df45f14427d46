"""Text to token ids and back: byte-pair encodings and plain bytes.

`gpt2` (Radford et al. 2019) is built from ranks inside the package and needs neither network
nor cache. `bytes` is the same machinery with no merges at all. The remaining names are OpenAI's
later encodings, read from tiktoken's own cache or, where there is a network, downloaded by it.
`shakespeare2k` ships as a folder with a `tokenizer.json` (byte-level BPE); any other name is such a
folder, made by `data vocabulary` or a pretrained model's own. These run in the library which
defines the format: tiktoken wants the order of merges to be that of ids, which SmolLM2's
vocabulary, for one, is not.

Text is always ordinary text: "<|endoftext|>" inside it is encoded letter by letter, so no
document can smuggle in the id that ends a document.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import tiktoken
from tiktoken_ext import openai_public

from gptjax import hub
from gptjax.config import UserError, choose
from gptjax.places import near
from gptjax.storage import expand, on_hub

TOKENIZER_FILE = "tokenizer.json"
# What a folder may hold of a tokenizer and of how to talk with the model.
FILES = (
    TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
END_OF_TEXT = "<|endoftext|>"
# The tokens with a part to play, as tokenizer_config.json and chat templates name them.
NAMED = tuple(f"{part}_token" for part in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
ASSETS = Path(__file__).parent / "data" / "assets"
RANKS_FILE = ASSETS / "r50k_base.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# GPT-2's pattern in the equivalent form that tiktoken runs fastest.
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)


# Characters that are encoded at once, whatever the length of a text: a pattern's engine gives up on
# a run of a million blanks, and ids take many times the memory of their text.
PIECE = 1 << 18
# Characters round a place where a text is cut that are looked at, more than any token has. Before
# it several numbers of them: in a run of one to eight characters that repeat, tokens that are counted
# from different beginnings end at different places.
AFTER, BEFORE = 256, range(256, 265)
TRIES = 64  # places


class Encoding(Protocol):
    """What a `Tokenizer` asks of tiktoken."""

    def encode_ordinary(self, text: str) -> list[int]: ...
    def encode_to_numpy(self, text: str, *, disallowed_special: Collection[str]) -> np.ndarray: ...
    def decode_bytes(self, tokens: Sequence[int]) -> bytes: ...


@dataclass(frozen=True)
class Tokenizer:
    """A reversible map between text and ids in [0, vocab_size).

    Attributes:
        name: the key in `TOKENIZERS` or `FOLDERS`, or a folder.
        vocab_size: one above the highest id; some encodings leave unused ids below it.
        eot: the id that follows every document; no text is ever encoded to it.
        fingerprint: sha256 over ranks, special tokens and pattern. Equal fingerprints mean
            equal ids for every text, whatever the name.
        specials: the ids of special tokens by their names, as a chat template writes them.
        bos: the id that the model was trained to find before every text; None: there is none.
        stops: ids after which nothing more is to be said: `eot`, and the end of a chat's turn.
        chat_template: the model's own, in Jinja; None where it has none.
        template_choice: which of several templates that is, in words; "" where there is no other.
        template_names: what the template knows tokens by: {"eos_token": "<|im_end|>"}.
    """

    name: str
    vocab_size: int
    eot: int
    fingerprint: str
    specials: Mapping[str, int] = field(repr=False)
    bos: int | None
    stops: frozenset[int]
    chat_template: str | None = field(repr=False)
    template_choice: str
    template_names: Mapping[str, str] = field(repr=False)
    _encoding: Encoding = field(repr=False, compare=False)

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text; special tokens in it count as plain characters.

        Raises:
            UserError: on a character that the tokenizer has no token for, or a part of one.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # what a shell or terminal hands over that is no text
            around = text[max(0, error.start - 20) : error.end + 20]
            raise UserError(f"{around!r} holds bytes that are no UTF-8: write it as text") from None
        return [i for piece in self._pieces(text) for i in self._encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, as `encode`, int32 arrays; other threads run in the meantime."""
        encode = functools.partial(self._encoding.encode_to_numpy, disallowed_special=())
        return [
            np.concatenate([encode(piece) for piece in self._pieces(text)]).astype(np.int32)
            for text in texts
        ]

    def for_a_thread(self) -> Tokenizer:
        """The same, for one thread alone.

        The caches of a regular expression are quick for the first thread that matches by it. All
        others look for one at each match, while the first makes them wait for its mark.
        """
        return dataclasses.replace(self, _encoding=copy.copy(self._encoding))

    def cut(self, text: str, start: int = 0) -> int | None:
        """Where a piece of `text` that begins at `start` may end, so that no token changes.

        That is a place at most PIECE characters on, or beyond only where all of these are within
        one token. None: less than PIECE + AFTER characters are left, which are a piece if no more
        text follows.

        A token depends on what is round it, not on what is far away, but there is no telling how
        far: pieces of a pattern, like three digits, may be counted from the beginning of a long
        run. So a place is tried in several surroundings of different lengths, and where these
        disagree, together with all that stands before it.
        """
        for size in itertools.accumulate(itertools.repeat(2), int.__mul__, initial=PIECE):
            stop = start + size
            if stop + AFTER > len(text):
                return None
            place = self._cut_near(text, start, stop) or self._cut_behind(text, start, stop)
            if place is not None:
                return place
        return None

    def _cut_near(self, text: str, start: int, stop: int) -> int | None:
        encode = self._encoding.encode_ordinary
        for place in range(stop, max(start, stop - TRIES), -1):
            after = text[place : place + AFTER]
            ids = encode(after)
            befores = (text[max(start, place - n) : place] for n in BEFORE)
            if all(encode(before) + ids == encode(before + after) for before in befores):
                return place
        return None

    def _cut_behind(self, text: str, start: int, stop: int) -> int | None:
        """The end of a token of the text from `start`, where encoding may begin anew."""
        encode = self._encoding.encode_ordinary
        ids, content = encode(text[start : stop + AFTER]), text[start : stop + AFTER].encode()
        ends = np.cumsum(self.bytes_per_token[ids])
        inside = np.flatnonzero(ends <= len(text[start:stop].encode()))
        for i in inside[: -TRIES - 1 : -1].tolist():
            before, after = content[: ends[i]], content[ends[i] :]
            if after[0] & 0xC0 == 0x80:  # within a character
                continue
            if encode(after.decode()) == ids[i + 1 :] and encode(before.decode()) == ids[: i + 1]:
                return start + len(before.decode())
        return None

    def _pieces(self, text: str) -> list[str]:
        places = [0]
        while (place := self.cut(text, places[-1])) is not None:
            places.append(place)
        return [text[a:b] for a, b in itertools.pairwise([*places, len(text)])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`; end-of-text shows as its name.

        Raises:
            KeyError: on an id that the encoding does not use.
        """
        return self._encoding.decode_bytes([int(i) for i in ids])

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 (vocab_size,); 0 for specials and gaps.

        Summed over `encode(text)` this is exactly the length of the text in bytes, which is
        what turns a loss in nats per token into bits per byte.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        for i in set(range(self.vocab_size)) - set(self.specials.values()):
            try:
                lengths[i] = len(self._encoding.decode_bytes([i]))
            except KeyError:  # an id below vocab_size that the encoding leaves unused
                continue
        lengths.flags.writeable = False
        return lengths


def _gpt2() -> dict[str, Any]:
    contents = RANKS_FILE.read_bytes()
    if hashlib.sha256(contents).hexdigest() != RANKS_SHA256:
        raise UserError(f"{RANKS_FILE} is damaged (wrong sha256): install gptjax anew")
    lines = (line.split() for line in contents.splitlines())
    return {
        "pat_str": GPT2_PATTERN,
        "mergeable_ranks": {base64.b64decode(token): int(rank) for token, rank in lines},
        "special_tokens": {END_OF_TEXT: 50256},
    }


def _bytes() -> dict[str, Any]:
    return {
        # Pieces of any text whatever, short because a piece costs the square of its length.
        "pat_str": r"[\s\S]{1,16}",
        "mergeable_ranks": {bytes([i]): i for i in range(256)},
        "special_tokens": {END_OF_TEXT: 256},
    }


# Name -> the arguments of tiktoken.Encoding (a tiktoken plugin's shape).
TOKENIZERS: dict[str, Callable[[], dict[str, Any]]] = {
    "bytes": _bytes,
    "gpt2": _gpt2,
    "r50k_base": openai_public.r50k_base,
    "p50k_base": openai_public.p50k_base,
    "p50k_edit": openai_public.p50k_edit,
    "cl100k_base": openai_public.cl100k_base,
    "o200k_base": openai_public.o200k_base,
    "o200k_harmony": openai_public.o200k_harmony,
}


# Name -> a folder that ships. shakespeare2k is what `data vocabulary --size=2048` makes of the
# training part of shakespeare_complete.
FOLDERS: dict[str, Path] = {"shakespeare2k": ASSETS / "shakespeare2k"}


def folder_of(name: str) -> Path | None:
    """The folder of a tokenizer.json, a row of `FOLDERS` or a path; None: a row of `TOKENIZERS`.

    Raises:
        UserError: on a name that is neither, so that `load` would not know it. Nothing is read.
    """
    if name in FOLDERS:
        return FOLDERS[name]
    folder = hub.fetched(hub.pinned(expand(name)), (*FILES, "config.json"))
    if (folder / TOKENIZER_FILE).is_file():
        return near(folder)
    if folder.is_dir():
        raise UserError(f"data.tokenizer={name!r} is a folder without a {TOKENIZER_FILE}")
    if name not in TOKENIZERS and folder.name != name:  # a path
        raise UserError(
            f"data.tokenizer={name!r}: there is no such folder; set it to where the folder is now, "
            f"or to one of: {', '.join({**TOKENIZERS, **FOLDERS})}"
        )
    choose({**TOKENIZERS, **FOLDERS}, name, "data.tokenizer")
    return None


@functools.cache
def load(name: str) -> Tokenizer:
    """The tokenizer `name`: one of `TOKENIZERS` or `FOLDERS`, or a folder with a tokenizer.json.

    Raises:
        ConfigError: on an unknown name.
        UserError: where the ranks are neither in tiktoken's cache nor to be downloaded, or a
            folder is not there or its tokenizer is no reversible byte-level BPE.
    """
    if on_hub(name):
        name = str(hub.pinned(expand(name)))
    if (folder := folder_of(name)) is not None:
        return _from_folder(name if name in FOLDERS else str(expand(name)), folder)
    try:
        parts = TOKENIZERS[name]()
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer '{name}' is neither in tiktoken's cache nor to be downloaded "
            f"({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a folder that holds it, or "
            "choose data.tokenizer gpt2 or bytes, which need no download"
        ) from error
    ranks, specials = parts["mergeable_ranks"], parts["special_tokens"]
    encoding = tiktoken.Encoding(name, **{k: v for k, v in parts.items() if k != "name"})
    return Tokenizer(
        name=name,
        vocab_size=encoding.n_vocab,
        eot=encoding.eot_token,
        fingerprint=_fingerprint(ranks, specials, parts["pat_str"]),
        specials=specials,
        bos=None,
        stops=frozenset({encoding.eot_token}),
        chat_template=None,
        template_choice="",
        template_names={},
        _encoding=encoding,
    )


def _fingerprint(ranks: dict[bytes, int], specials: dict[str, int], pattern: str) -> str:
    digest = hashlib.sha256()
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d:%d:" % (rank, len(token)) + token)
    digest.update(json.dumps([specials, pattern], sort_keys=True).encode())
    return digest.hexdigest()


def byte_alphabet() -> dict[int, str]:
    """The visible character that stands for each byte in a tokenizer.json (GPT-2's encoder.py)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(others)}


class _ByteLevel:
    """A tokenizer.json behind tiktoken's methods.

    Steps that change a text, so that decoding would not return it and its bytes could not be
    counted, are left out: Qwen's normaliser, NFC, and tokens that swallow the blanks beside them
    (`lstrip`, `rstrip`). Text that is in NFC already, and has no blanks there, has the same ids.
    """

    def __init__(self, tree: dict[str, Any]) -> None:
        import tokenizers

        if tree["model"]["type"] != "BPE" or tree["model"].get("byte_fallback"):
            raise ValueError("it is no byte-level BPE")
        if (tree.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
            raise ValueError(f"its normaliser {tree['normalizer']['type']} changes texts")
        _check_pre_tokenizer(tree.get("pre_tokenizer"))
        if tree["model"].get("dropout"):
            raise ValueError("its model draws ids at random (dropout)")
        # Names of special tokens are never found in a text.
        strip = {"lstrip": False, "rstrip": False}
        added = [t if t["special"] else t | strip for t in tree["added_tokens"]]
        tree = tree | {"added_tokens": added, "normalizer": None}
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tree))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        marked = self._tokenizer.encode("a").ids  # with what the model was trained to find round it
        self._tokenizer.encode_special_tokens = True
        self.specials = {t["content"]: t["id"] for t in added if t["special"]}
        self.fingerprint = hashlib.sha256(
            json.dumps([tree["model"], tree.get("pre_tokenizer"), added], sort_keys=True).encode()
        ).hexdigest()
        byte_of = {char: byte for byte, char in byte_alphabet().items()}
        self._bytes = {t["id"]: t["content"].encode() for t in added}
        for token, i in tree["model"]["vocab"].items():
            if i not in self._bytes:
                if not set(token) <= byte_of.keys():
                    raise ValueError(f"its token {token!r} is not spelled in GPT-2's byte alphabet")
                self._bytes[i] = bytes(byte_of[char] for char in token)
        self.vocab_size = 1 + max(self._bytes)
        self._lengths = np.zeros(self.vocab_size, np.int64)
        for i, content in self._bytes.items():
            self._lengths[i] = len(content)
        self._check()
        plain = self.encode_ordinary("a")
        if marked[-len(plain) :] != plain or len(marked) > len(plain) + 1:
            raise ValueError("it puts more round a text than one token before it")
        self.bos = marked[0] if len(marked) > len(plain) else None

    def _check(self) -> None:
        text = "a b  c\n\n 12 e\u0301 \u00e9 \U0001f642" + "".join(self.specials)
        if self.decode_bytes(self.encode_ordinary(text)).decode() != text:
            raise ValueError("it changes text, so that a text cannot be had back from its ids")

    def encode_ordinary(self, text: str) -> list[int]:
        [encoded] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoded.ids
        # The library silently skips a byte that has no token: SmolLM2 lacks 21 of them.
        if self._lengths[ids].sum() != len(text.encode()):
            self._refuse(text)
        return ids

    def encode_to_numpy(self, text: str, *, disallowed_special: Collection[str]) -> np.ndarray:
        return np.array(self.encode_ordinary(text), np.uint32)

    def _refuse(self, text: str) -> NoReturn:
        for i, char in enumerate(text):
            [encoded] = self._tokenizer.encode_batch_fast([char], add_special_tokens=False)
            if self.decode_bytes(encoded.ids) != char.encode():
                around = text[max(0, i - 20) : i + 20]
                raise UserError(
                    f"the tokenizer has no token for {char!r}, in the midst of {around!r}: take it "
                    "out of the text, or choose another data.tokenizer"
                )
        raise UserError(f"the tokenizer changes the text {text[:40]!r}: choose another one")

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self._bytes[i] for i in tokens)


# Kinds of pre-tokenisers that cut a text and leave it whole.
CUTTERS = (
    "Sequence",
    "ByteLevel",
    "Split",
    "Digits",
    "Punctuation",
    "UnicodeScripts",
)


def _check_pre_tokenizer(tree: dict[str, Any] | None) -> None:
    if tree is None:
        return
    for part in tree.get("pretokenizers", ()):
        _check_pre_tokenizer(part)
    if (
        tree["type"] not in CUTTERS
        or tree.get("behavior") == "Removed"
        or tree.get("add_prefix_space")
    ):
        raise ValueError(f"its pre-tokeniser {tree['type']} changes text, or its like is not known")


def _from_folder(name: str, folder: Path) -> Tokenizer:
    try:
        encoding = _ByteLevel(json.loads((folder / TOKENIZER_FILE).read_bytes()))
    except Exception as error:  # the library raises bare Exceptions
        reason = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{folder / TOKENIZER_FILE} cannot be used: {reason[0]}") from error
    settings = _json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # where older folders name their tokens
        settings |= _json(folder / "special_tokens_map.json")
    settings_of_tokens = {key: settings[key] for key in NAMED if settings.get(key)}
    named = {k: v["content"] if isinstance(v, dict) else v for k, v in settings_of_tokens.items()}
    candidates = (END_OF_TEXT, "<|end_of_text|>", named.get("eos_token"))
    ends = [name for name in candidates if name in encoding.specials]
    if not ends:
        raise UserError(
            f"{folder} names no token that ends a document: set eos_token in tokenizer_config.json"
        )
    settled = _json(folder / "config.json") | _json(folder / "generation_config.json")
    template, choice = _chat_template(folder, settings)
    stop = settled.get("eos_token_id")
    stops = {*(stop if isinstance(stop, list) else [stop])} - {None}
    return Tokenizer(
        name=name,
        vocab_size=encoding.vocab_size,
        eot=encoding.specials[ends[0]],
        fingerprint=encoding.fingerprint,
        specials=encoding.specials,
        bos=encoding.bos,
        stops=frozenset(stops | {encoding.specials[name] for name in ends}),
        chat_template=template,
        template_choice=choice,
        template_names=named,
        _encoding=encoding,
    )


def _json(path: Path) -> dict[str, Any]:
    """A folder's optional file; {} where it is missing."""
    try:
        tree = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no JSON object: fetch it again")
    return tree


def _chat_template(folder: Path, settings: dict[str, Any]) -> tuple[str | None, str]:
    """`chat_template` and `template_choice`: the file goes before the config, as in transformers."""
    file, configured = folder / "chat_template.jinja", settings.get("chat_template")
    if file.is_file():
        try:
            template = file.read_text(encoding="utf-8-sig")
        except ValueError as error:
            raise UserError(f"{file} is not UTF-8 ({error}): fetch it again") from None
        other = configured is not None and configured != template
        return template, f"{file.name}, not that of tokenizer_config.json" if other else ""
    if not isinstance(configured, list):
        return configured, ""
    named = {entry["name"]: entry["template"] for entry in configured}
    names = ", ".join(map(repr, named))
    if "default" not in named:
        return None, f"tokenizer_config.json names {names}, of which none is 'default'"
    choice = f"'default' of {names} in tokenizer_config.json" if len(named) > 1 else ""
    return named["default"], choice
