"""Text to token ids and back: byte-pair encodings and plain bytes, all through tiktoken.

`gpt2` (Radford et al. 2019) is built from ranks inside the package and needs neither network
nor cache. `bytes` is the same machinery with no merges at all. The remaining names are OpenAI's
later encodings, read from tiktoken's own cache or, where there is a network, downloaded by it.

Text is always ordinary text: "<|endoftext|>" inside it is encoded letter by letter, so no
document can smuggle in the id that ends a document.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext import openai_public

from gptjax.config import UserError, choose

END_OF_TEXT = "<|endoftext|>"
RANKS_FILE = Path(__file__).parent / "data" / "assets" / "r50k_base.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# GPT-2's pattern in the equivalent form that tiktoken runs fastest.
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)


@dataclass(frozen=True)
class Tokenizer:
    """A reversible map between text and ids in [0, vocab_size).

    Attributes:
        name: the key in `TOKENIZERS`.
        vocab_size: one above the highest id; some encodings leave unused ids below it.
        eot: the id that follows every document; no text is ever encoded to it.
        fingerprint: sha256 over ranks, special tokens and pattern. Equal fingerprints mean
            equal ids for every text, whatever the name.
    """

    name: str
    vocab_size: int
    eot: int
    fingerprint: str
    _encoding: tiktoken.Encoding = field(repr=False, compare=False)

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
        special = {self._encoding.encode_single_token(s) for s in self._encoding.special_tokens_set}
        for i in set(range(self.vocab_size)) - special:
            try:
                lengths[i] = len(self._encoding.decode_single_token_bytes(i))
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
    """The tokenizer `name`, one of `TOKENIZERS`.

    Raises:
        ConfigError: on an unknown name.
        UserError: where the ranks are neither in tiktoken's cache nor to be downloaded.
    """
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
        _encoding=encoding,
    )


def _fingerprint(ranks: dict[bytes, int], specials: dict[str, int], pattern: str) -> str:
    digest = hashlib.sha256()
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d:%d:" % (rank, len(token)) + token)
    digest.update(json.dumps([specials, pattern], sort_keys=True).encode())
    return digest.hexdigest()
