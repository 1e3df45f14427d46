"""Text to token ids and back: byte-pair encodings and plain bytes.

`gpt2` (Radford et al. 2019) is built from ranks inside the package and needs neither network
nor cache. `bytes` is the same machinery with no merges at all. The remaining names are OpenAI's
later encodings, read from tiktoken's own cache or, where there is a network, downloaded by it.
Any other name is a folder with a pretrained model's own `tokenizer.json` (byte-level BPE). That
runs in the library which defines the format: tiktoken wants the order of merges to be that of
ids, which SmolLM2's vocabulary, for one, is not.

Text is always ordinary text: "<|endoftext|>" inside it is encoded letter by letter, so no
document can smuggle in the id that ends a document.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
from tiktoken_ext import openai_public

from gptjax.config import UserError, choose

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
RANKS_FILE = Path(__file__).parent / "data" / "assets" / "r50k_base.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# GPT-2's pattern in the equivalent form that tiktoken runs fastest.
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)


class Encoding(Protocol):
    """What a `Tokenizer` asks of tiktoken."""

    def encode_ordinary(self, text: str) -> list[int]: ...
    def encode_ordinary_batch(self, text: list[str]) -> list[list[int]]: ...
    def decode_bytes(self, tokens: Sequence[int]) -> bytes: ...


@dataclass(frozen=True)
class Tokenizer:
    """A reversible map between text and ids in [0, vocab_size).

    Attributes:
        name: the key in `TOKENIZERS`, or a folder.
        vocab_size: one above the highest id; some encodings leave unused ids below it.
        eot: the id that follows every document; no text is ever encoded to it.
        fingerprint: sha256 over ranks, special tokens and pattern. Equal fingerprints mean
            equal ids for every text, whatever the name.
        specials: the ids of special tokens by their names, as a chat template writes them.
        bos: the id that the model was trained to find before every text; None: there is none.
        stops: ids after which nothing more is to be said: `eot`, and the end of a chat's turn.
        chat_template: the model's own, in Jinja; None where it has none.
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
    template_names: Mapping[str, str] = field(repr=False)
    _encoding: Encoding = field(repr=False, compare=False)

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text; special tokens in it count as plain characters."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, encoded by several threads; int32 arrays."""
        batch = self._encoding.encode_ordinary_batch(list(texts))
        return [np.array(ids, np.int32) for ids in batch]

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


@functools.cache
def load(name: str) -> Tokenizer:
    """The tokenizer `name`: one of `TOKENIZERS`, or a folder that holds a tokenizer.json.

    Raises:
        ConfigError: on an unknown name.
        UserError: where the ranks are neither in tiktoken's cache nor to be downloaded, or a
            folder's tokenizer is no reversible byte-level BPE.
    """
    if (Path(name) / TOKENIZER_FILE).is_file():
        return _from_folder(Path(name))
    if Path(name).is_dir():
        raise UserError(f"data.tokenizer={name!r} is a folder without a {TOKENIZER_FILE}")
    build = choose(TOKENIZERS, name, "data.tokenizer")
    try:
        parts = build()
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

    Qwen's normaliser, NFC, is left out: it changes texts, so that they could not be had back and
    their bytes not be counted. Text that is in NFC already has the same ids.
    """

    def __init__(self, text: str) -> None:
        import tokenizers

        tree = json.loads(text)
        if tree["model"]["type"] != "BPE" or tree["model"].get("byte_fallback"):
            raise ValueError("it is no byte-level BPE")
        if (tree.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
            raise ValueError(f"its normaliser {tree['normalizer']['type']} changes texts")
        added = tree["added_tokens"]
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tree | {"normalizer": None}))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        marked = self._tokenizer.encode("a").ids
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
        self.bos = marked[0] if marked[:1] != self.encode_ordinary("a")[:1] else None
        self._check(tree["model"]["merges"])

    def _check(self, merges: list[Any]) -> None:
        text = "a b  c\n\n 12 e\u0301 \u00e9 \U0001f642" + "".join(self.specials)
        if self.decode_bytes(self.encode_ordinary(text)).decode() != text:
            raise ValueError("it changes text, so that a text cannot be had back from its ids")
        # Corpora are cut between a letter and a space, see `gptjax.data.prepare`.
        split = self._tokenizer.pre_tokenizer
        cuts = split is not None and split.pre_tokenize_str("word word")[0][1] == (0, 4)
        if merges and not cuts:
            raise ValueError("its pieces run across the spaces between words")

    def encode_ordinary(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_ordinary_batch(self, text: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(text, add_special_tokens=False)]

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self._bytes[i] for i in tokens)


def _from_folder(folder: Path) -> Tokenizer:
    try:
        encoding = _ByteLevel((folder / TOKENIZER_FILE).read_text())
    except Exception as error:  # the library raises bare Exceptions
        told = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{folder / TOKENIZER_FILE} cannot be used: {told[0]}") from error
    settings = _json(folder / "tokenizer_config.json")
    said = {key: settings[key] for key in ("bos_token", "eos_token") if settings.get(key)}
    named = {k: v["content"] if isinstance(v, dict) else v for k, v in said.items()}
    known = (END_OF_TEXT, "<|end_of_text|>", named.get("eos_token"))
    ends = [name for name in known if name in encoding.specials]
    if not ends:
        raise UserError(
            f"{folder} names no token that ends a document: set eos_token in tokenizer_config.json"
        )
    settled = _json(folder / "config.json") | _json(folder / "generation_config.json")
    stop = settled.get("eos_token_id")
    stops = {*(stop if isinstance(stop, list) else [stop])} - {None}
    return Tokenizer(
        name=str(folder),
        vocab_size=encoding.vocab_size,
        eot=encoding.specials[ends[0]],
        fingerprint=encoding.fingerprint,
        specials=encoding.specials,
        bos=encoding.bos,
        stops=frozenset(stops | {encoding.specials[name] for name in ends}),
        chat_template=_chat_template(folder, settings),
        template_names=named,
        _encoding=encoding,
    )


def _json(path: Path) -> dict[str, Any]:
    """A folder's optional file; {} where it is not there."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template
