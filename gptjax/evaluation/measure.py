"""How well a model predicts a text: every figure of the table, from each scored token's nats."""

from __future__ import annotations

import codecs
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax import model
from gptjax.config import Config, UserError
from gptjax.evaluation.bootstrap import MIN_UNITS, effective_units, interval
from gptjax.evaluation.texts import Text, count_words
from gptjax.perplexity import Convention, Evaluator
from gptjax.report.interval import CONFIDENCE
from gptjax.tokenizer import Tokenizer

# Of a text with too few documents, stretches of so many bytes are resampled in their place.
BLOCK_BYTES = 8192
_PIECE_TOKENS = 1 << 20  # decoded at a time


@dataclass(frozen=True)
class Sums:
    """Of each unit (a document, or a block of one), float64 (U,); they add up over units."""

    nats: np.ndarray
    tokens: np.ndarray  # end-of-text included
    words: np.ndarray  # see `texts.count_words`
    bytes: np.ndarray  # of UTF-8

    def __getitem__(self, units: np.ndarray) -> Sums:
        return Sums(self.nats[units], self.tokens[units], self.words[units], self.bytes[units])

    def __len__(self) -> int:
        return len(self.nats)


@dataclass(frozen=True)
class Scored:
    """A text as one model scored it.

    Attributes:
        convention: what the nats depend on besides model and text.
        targets_I: the scored tokens, int32.
        nats_I: negative log-likelihood of each, float32.
        ends_D: one past each document's last scored token, int64.
        documents: sums of each document.
        by_position: see `_by_position`.
        text_sha256: over the scored text, the byte 0xff after each document; the same for
            every tokenizer.
    """

    text: Text
    tokenizer: Tokenizer
    convention: Convention
    targets_I: np.ndarray
    nats_I: np.ndarray
    ends_D: np.ndarray
    documents: Sums
    by_position: list[dict[str, Any]]
    text_sha256: str

    @property
    def starts_D(self) -> np.ndarray:
        return np.append(0, self.ends_D[:-1])

    @property
    def lengths_I(self) -> np.ndarray:
        """Bytes that each token takes in its document, int64; end-of-text takes one too.

        So every token has a place, and documents of equal text have equal lengths.
        """
        return np.maximum(self.tokenizer.bytes_per_token[self.targets_I], 1).astype(np.int64)

    def domains(self) -> dict[str, np.ndarray]:
        """The documents of each domain, by name; empty where no domains are known."""
        if self.text.domains is None:
            return {}
        names = np.array(self.text.domains[: len(self.ends_D)])
        return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}


def score(
    config: Config,
    params: model.Params,
    text: Text,
    tokenizer: Tokenizer,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Scored:
    """Scores a text by the convention of `config`, on the current mesh.

    Raises:
        UserError: if `eval.max_tokens` cuts a text whose words and bytes are only known of
            whole documents.
    """
    evaluator = Evaluator(config, text.store, tokenizer)
    complete = evaluator.tokens == text.store.num_tokens - (evaluator.convention.prefix == "none")
    if text.original is not None and not complete:
        raise UserError(
            "eval.max_tokens cuts a document whose words and bytes were counted before the "
            "de-tokeniser: score the whole text, or cut the file"
        )
    return account(evaluator, text, tokenizer, evaluator.token_nats(params, advance))


def account(evaluator: Evaluator, text: Text, tokenizer: Tokenizer, nats_I: np.ndarray) -> Scored:
    """The sums over documents of each scored token's nats, and the rest of `Scored`."""
    targets_I, ends_D = evaluator.targets(0, evaluator.tokens), evaluator.document_ends
    starts_D = np.append(0, ends_D[:-1])
    words, bytes_, digest = _survey(targets_I, ends_D, tokenizer)
    if text.original is not None:
        words, bytes_ = text.original
    documents = Sums(
        np.add.reduceat(nats_I, starts_D, dtype=np.float64),
        (ends_D - starts_D).astype(np.float64),
        words.astype(np.float64),
        bytes_.astype(np.float64),
    )
    return Scored(
        text,
        tokenizer,
        evaluator.convention,
        targets_I,
        nats_I,
        ends_D,
        documents,
        _by_position(evaluator.tokens_before(), nats_I, evaluator.convention.context),
        digest,
    )


def _survey(
    targets_I: np.ndarray, ends_D: np.ndarray, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, str]:
    """Words and bytes of each document of scored tokens, and the sha256 of `Scored`."""
    words: list[int] = []
    lengths: list[int] = []
    digest = hashlib.sha256()

    def decoded(start: int, end: int) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for at in range(start, end, _PIECE_TOKENS):
            ids = targets_I[at : min(at + _PIECE_TOKENS, end)]
            raw = tokenizer.decode_bytes(ids[ids != tokenizer.eot].tolist())
            digest.update(raw)
            lengths[-1] += len(raw)
            yield decoder.decode(raw)

    for start, end in zip([0, *ends_D[:-1].tolist()], ends_D.tolist(), strict=True):
        lengths.append(0)
        words.append(count_words(decoded(start, end)))
        digest.update(b"\xff")
    return np.array(words, np.int64), np.array(lengths, np.int64), digest.hexdigest()


def _by_position(before_I: np.ndarray, nats_I: np.ndarray, context: int) -> list[dict[str, Any]]:
    """Loss by how many tokens a prediction could see: 0, 1, 2 to 3, 4 to 7, ... `context`."""
    bin_I = np.frexp(before_I)[1]
    tokens = np.bincount(bin_I)
    nats = np.bincount(bin_I, nats_I)
    return [
        {
            "from": 2**b // 2,
            "to": min(2**b - 1, context),
            "tokens": int(tokens[b]),
            "loss": float(nats[b] / tokens[b]),
        }
        for b in np.flatnonzero(tokens).tolist()
    ]


def blocks(scored: Scored) -> Sums:
    """Sums of stretches of BLOCK_BYTES, which never cross a document.

    A token belongs to where it begins. Words, and bytes before a de-tokeniser, are known of
    whole documents: they are shared out as the tokens' bytes are.
    """
    lengths_I = scored.lengths_I
    offset_I = np.cumsum(lengths_I) - lengths_I
    offset_I -= np.repeat(offset_I[scored.starts_D], np.diff(scored.ends_D, prepend=0))
    document_I = np.repeat(np.arange(len(scored.ends_D)), np.diff(scored.ends_D, prepend=0))
    first = stretches(offset_I, document_I, BLOCK_BYTES)
    bytes_I = scored.tokenizer.bytes_per_token[scored.targets_I]
    bytes_of_block = np.add.reduceat(bytes_I, first, dtype=np.float64)
    document = document_I[first]
    share = bytes_of_block / np.maximum(np.bincount(document, bytes_of_block), 1)[document]
    return Sums(
        np.add.reduceat(scored.nats_I, first, dtype=np.float64),
        np.diff(np.append(first, len(bytes_I))).astype(np.float64),
        share * scored.documents.words[document],
        share * scored.documents.bytes[document],
    )


def stretches(offset: np.ndarray, document: np.ndarray, size: int) -> np.ndarray:
    """Where stretches of about `size` bytes begin, which never cross a document.

    Args:
        offset: bytes of its document before each token or piece.
        document: which it lies in.
    """
    new = (np.diff(offset // size, prepend=-1) != 0) | (np.diff(document, prepend=-1) != 0)
    return np.flatnonzero(new)


def joined(parts: Sequence[Sums]) -> Sums:
    """The units of several texts as those of one."""
    names = ("nats", "tokens", "words", "bytes")
    return Sums(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


def _exp(value: float) -> float | None:
    return None if value >= 700 else math.exp(value)  # beyond a float


def _bits(value: float) -> float:
    return value / math.log(2)


# Figure -> what the nats are divided by, and what is made of the quotient (which must grow with
# it, so that an interval's ends can be mapped). The last three are lm-evaluation-harness'.
FIGURES: dict[str, tuple[str, Callable[[float], float | None]]] = {
    "loss": ("tokens", float),
    "perplexity": ("tokens", _exp),
    "word_perplexity": ("words", _exp),
    "byte_perplexity": ("bytes", _exp),
    "bits_per_byte": ("bytes", _bits),
}


@dataclass(frozen=True)
class Units:
    """What is resampled for the intervals of a text, and the sentence that says so."""

    sums: Sums
    method: str


def units(documents: Sums, of_blocks: Callable[[], Sums] | None = None) -> Units:
    """Documents where there are enough, else blocks; with too few of both, no interval."""
    count = len(documents)
    some = f"{count:,} document{'s' * (count != 1)}"
    if effective_units(documents.tokens) >= MIN_UNITS:
        return Units(documents, f"{CONFIDENCE:.0%}, bootstrap over {some}")
    if (
        of_blocks is not None
        and effective_units((sums_of_blocks := of_blocks()).tokens) >= MIN_UNITS
    ):
        description = (
            f"{CONFIDENCE:.0%}, bootstrap over {len(sums_of_blocks):,} stretches of {BLOCK_BYTES:,} bytes of "
            f"{some}: it speaks of more text from {'this document' if count == 1 else 'these'}, "
            "not of other documents"
        )
        return Units(sums_of_blocks, description)
    alike = "" if count < MIN_UNITS else " of similar length"
    return Units(documents, f"none: {some}, and it takes at least {MIN_UNITS}{alike}")


def summary(documents: Sums, resampled: Units | None) -> dict[str, Any]:
    """Counts, and each figure with its interval; None where there is none, or it is too large.

    Args:
        resampled: None for a sum over several texts: these are no sample of one kind of text.
    """
    figures: dict[str, Any] = {
        "documents": len(documents),
        **{name: int(getattr(documents, name).sum()) for name in ("tokens", "words", "bytes")},
        "nats": float(documents.nats.sum()),
    }
    intervals: dict[str, list[float | None]] = {}
    for figure, (by, make) in FIGURES.items():
        total = getattr(documents, by).sum()
        figures[figure] = make(figures["nats"] / total) if total else None
        intervals[figure] = [None, None]
        if resampled is not None:
            ends = interval(resampled.sums.nats, getattr(resampled.sums, by))
            intervals[figure] = [None if math.isnan(e) else make(e) for e in ends]
    interval_by = "none: texts of several kinds" if resampled is None else resampled.method
    return figures | {"interval": intervals, "interval_by": interval_by}
