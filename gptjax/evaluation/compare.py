"""Two models on the same text: how much they differ, how sure that is, and where.

Tokenizers may differ. Both cut a document's bytes into tokens, and wherever both have a cut the
nats of each so far are known exactly. Between two such cuts lies a piece: the smallest stretch
whose difference is a fact. No nats are shared out by guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.evaluation.audit import Audit, identity
from gptjax.evaluation.bootstrap import interval
from gptjax.evaluation.measure import BLOCK_BYTES, Scored, Sums, stretches, units
from gptjax.tokenizer import Tokenizer

PASSAGE_BYTES = 240
PASSAGES = 20  # told of each text


@dataclass(frozen=True)
class Pieces:
    """A text in the smallest pieces of whole characters at whose ends both models have a token's.

    Attributes:
        ends_a, ends_b: one past each piece's last token, int64 (P,).
        nats_a, nats_b: float64 (P,).
        offset: bytes of its document before each piece, int64 (P,).
        document: which it lies in, int64 (P,).
    """

    ends_a: np.ndarray
    ends_b: np.ndarray
    nats_a: np.ndarray
    nats_b: np.ndarray
    offset: np.ndarray
    document: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """Nats of B minus nats of A: below 0 where B is better."""
        return self.nats_b - self.nats_a


def align(a: Scored, b: Scored) -> Pieces:
    """The pieces of a text that two models scored.

    Raises:
        UserError: if it is not the same text.
    """
    if a.text_sha256 != b.text_sha256:
        raise UserError(
            f"the two runs score different texts as {a.text.name!r}: give one by --set, and where "
            "tokenizers differ set eval.prefix=eot and leave eval.max_tokens at None"
        )
    place_a, place_b = np.cumsum(a.lengths_I), np.cumsum(b.lengths_I)
    cuts = np.intersect1d(place_a, place_b, assume_unique=True)
    last_a = np.searchsorted(place_a, cuts)
    # A cut before a continuation byte is within a character.
    following = a.targets_I[np.minimum(last_a + 1, len(place_a) - 1)]
    at_character = ~_continues(a.tokenizer)[following]
    at_character[-1] = True
    cuts, last_a = cuts[at_character], last_a[at_character]
    ends_a, ends_b = last_a + 1, np.searchsorted(place_b, cuts) + 1
    starts_a, starts_b = np.append(0, ends_a[:-1]), np.append(0, ends_b[:-1])
    document = np.searchsorted(a.ends_D, starts_a, side="right")
    begins = np.append(0, place_a[a.ends_D[:-1] - 1])  # of each document, in places
    return Pieces(
        ends_a,
        ends_b,
        np.add.reduceat(a.nats_I, starts_a, dtype=np.float64),
        np.add.reduceat(b.nats_I, starts_b, dtype=np.float64),
        np.append(0, cuts[:-1]) - begins[document],
        document,
    )


def _continues(tokenizer: Tokenizer) -> np.ndarray:
    """Whether an id's bytes begin within a character, bool (vocab_size,)."""
    continues = np.zeros(tokenizer.vocab_size, bool)
    for i in np.flatnonzero(tokenizer.bytes_per_token).tolist():
        continues[i] = tokenizer.decode_bytes([i])[0] & 0xC0 == 0x80
    return continues


@dataclass(frozen=True)
class Passage:
    """Some pieces in a row, [start, stop)."""

    start: int
    stop: int
    nats: float  # of B minus A


def passages(pieces: Pieces) -> list[Passage]:
    """The text in stretches of about PASSAGE_BYTES within a document; the largest first."""
    starts = stretches(pieces.offset, pieces.document, PASSAGE_BYTES)
    nats = np.add.reduceat(pieces.difference, starts)
    stops = np.append(starts[1:], len(pieces.offset))
    order = np.argsort(-np.abs(nats), kind="stable")
    return [Passage(int(starts[i]), int(stops[i]), float(nats[i])) for i in order]


def text_of(scored: Scored, pieces: Pieces, start: int, stop: int) -> str:
    """The text of pieces [start, stop) of A."""
    first = pieces.ends_a[start - 1] if start else 0
    ids = scored.targets_I[first : pieces.ends_a[stop - 1]]
    return scored.tokenizer.decode(ids[ids != scored.tokenizer.eot].tolist())


def compare(a: Audit, b: Audit) -> dict[str, Any]:
    """The difference of B to A on each text, as JSON holds it.

    Raises:
        UserError: if they did not score the same texts.
    """
    if a.scored.keys() != b.scored.keys():
        raise UserError(
            f"{a.workdir} holds out {', '.join(a.scored)} and {b.workdir} holds out "
            f"{', '.join(b.scored)}: give both the same texts by --set NAME=PATH"
        )
    return {
        "a": identity(a),
        "b": identity(b),
        "texts": {name: _difference(a.scored[name], b.scored[name]) for name in a.scored},
    }


def _difference(a: Scored, b: Scored) -> dict[str, Any]:
    pieces = align(a, b)
    difference = Sums(b.documents.nats - a.documents.nats, *_denominators(a.documents))
    resampled = units(difference, lambda: _blocks(a, pieces))
    same = a.tokenizer.fingerprint == b.tokenizer.fingerprint
    figures = {"bits_per_byte": ("bytes", math.log(2))} | (
        {"loss": ("tokens", 1.0)} if same else {}
    )
    record: dict[str, Any] = {
        "source": a.text.source,
        "text_sha256": a.text_sha256,
        "documents": len(difference),
        "bytes": int(difference.bytes.sum()),
        "interval_by": resampled.method,
        "same_tokenizer": same,
    }
    for figure, (by, unit) in figures.items():
        total = getattr(difference, by).sum() * unit
        ends = interval(resampled.sums.nats, getattr(resampled.sums, by) * unit)
        record[figure] = {
            "a": float(a.documents.nats.sum() / total),
            "b": float(b.documents.nats.sum() / total),
            "difference": float(difference.nats.sum() / total),
            "interval": [None if math.isnan(e) else e for e in ends],
        }
    largest = passages(pieces)
    total_nats = sum(abs(p.nats) for p in largest)
    record["documents_better"] = {
        "a": int((difference.nats > 0).sum()),
        "b": int((difference.nats < 0).sum()),
    }
    record["by_domain"] = {
        domain: _of_domain(difference[which]) for domain, which in a.domains().items()
    }
    bits_D = difference.nats / math.log(2) / np.maximum(difference.bytes, 1)
    record["bits_per_byte_of_documents"] = bits_D.tolist()
    record["passages"] = [_passage(a, pieces, p, total_nats) for p in largest[:PASSAGES]]
    return record


def _passage(a: Scored, pieces: Pieces, p: Passage, every: float) -> dict[str, Any]:
    peak = p.start + int(np.argmax(np.abs(pieces.difference[p.start : p.stop])))
    return {
        "document": int(pieces.document[p.start]),
        "byte": int(pieces.offset[p.start]),
        "nats": p.nats,
        "share": abs(p.nats) / every if every else 0.0,
        "text": text_of(a, pieces, p.start, p.stop),
        # Characters of the text before the piece that differs most.
        "peak": len(text_of(a, pieces, p.start, peak)) if peak > p.start else 0,
    }


def _of_domain(difference: Sums) -> dict[str, Any]:
    ends = interval(difference.nats, difference.bytes * math.log(2))
    return {
        "documents": len(difference),
        "difference": float(difference.nats.sum() / difference.bytes.sum() / math.log(2)),
        "interval": [None if math.isnan(e) else e for e in ends],
    }


def _denominators(documents: Sums) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return documents.tokens, documents.words, documents.bytes


def _blocks(a: Scored, pieces: Pieces) -> Sums:
    """`measure.blocks` of the difference: a piece belongs to where it begins."""
    first = stretches(pieces.offset, pieces.document, BLOCK_BYTES)
    ends = np.append(first[1:], len(pieces.offset)) - 1
    starts_a = np.append(0, pieces.ends_a[ends][:-1])
    lengths_I = a.tokenizer.bytes_per_token[a.targets_I]
    bytes_of_block = np.add.reduceat(lengths_I, starts_a, dtype=np.float64)
    document = pieces.document[first]
    share = bytes_of_block / np.maximum(np.bincount(document, bytes_of_block), 1)[document]
    return Sums(
        np.add.reduceat(pieces.difference, first),
        np.diff(pieces.ends_a[ends], prepend=0).astype(np.float64),
        share * a.documents.words[document],
        share * a.documents.bytes[document],
    )
