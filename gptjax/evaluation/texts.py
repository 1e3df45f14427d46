"""The texts of an evaluation: files, token stores and hub datasets, each under a name.

A file is tokenised as a stream into a temporary store, so its text is never in memory as a whole;
what a score keeps there is some numbers for each token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.config import UserError, choose
from gptjax.data.prepare import HUB, READERS, Encoders, Parts, hub_rows, open_parts, tokenise
from gptjax.data.store import MANIFEST, Store, StoreWriter
from gptjax.evaluation.detokenize import DETOKENIZERS
from gptjax.storage import local
from gptjax.tokenizer import Tokenizer

# A de-tokeniser reads a document as a whole; a larger one is refused.
DETOKENIZE_CHARS = 1 << 28

# Text of a document, whether the document ends with it, the document's domain.
Part = tuple[str, bool, str | None]


class Reading(NamedTuple):
    """How files are read."""

    text_key: str = "text"
    domain_key: str | None = None
    detokenizer: str = "none"


@dataclass(frozen=True)
class Text:
    """A text to be scored.

    Attributes:
        source: where it came from.
        domains: of each document; None: unknown.
        original: words and bytes of each document before the de-tokeniser, int64 (2, D);
            None: none was applied, so the store's own text is the original.
    """

    name: str
    source: str
    store: Store
    detokenizer: str = "none"
    domains: list[str] | None = None
    original: np.ndarray | None = None


def parse_sets(words: Iterable[str]) -> dict[str, str]:
    """{NAME: PATH} of NAME=PATH ...

    Raises:
        UserError: on another form, a name given twice, or "all", the name of the total.
    """
    sets: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise UserError(f"--set {word!r} is not NAME=PATH, such as --set wiki=wiki.test.raw")
        if name in sets or name == "all":
            raise UserError(f"--set {name}=... needs another name: {name!r} is taken")
        sets[name] = path
    return sets


def open_text(name: str, source: str, tokenizer: Tokenizer, folder: Path, how: Reading) -> Text:
    """Opens a token store, or tokenises a file or hub dataset into `folder`.

    Args:
        source: a .txt, .raw, .jsonl or .parquet file; a token store or nanoGPT .bin file of
            this tokenizer; or `hub:DATASET[@REVISION][,CONFIG],SPLIT` for the `datasets` library.
        folder: does not exist yet; remains empty-handed for a store.

    Raises:
        UserError: on what cannot be read, holds no text, or lacks the keys of `how`.
    """
    detokenise = choose(DETOKENIZERS, how.detokenizer, "--detokenizer")
    path = local(source)
    if not source.startswith(HUB):
        if path.is_dir() or path.suffix == ".bin":
            return _open_store(name, path, tokenizer, how)
        if how.domain_key is not None and path.suffix in (".txt", ".raw"):
            raise UserError(f"--domain_key: {path} is plain text, which has no keys")
    parts = _hub(source, how) if source.startswith(HUB) else _file(path, how)
    domains: list[str] = []
    original: list[tuple[int, int]] = []

    def cleaned() -> Parts:
        pieces: list[str] = []
        for text, ends, domain in parts:
            if detokenise is not None:
                pieces.append(text)
                if sum(map(len, pieces)) > DETOKENIZE_CHARS:
                    raise UserError(
                        f"{source} has a document of more than {DETOKENIZE_CHARS:,} characters, "
                        "too long for a de-tokeniser: split it into documents"
                    )
                if not ends:
                    continue
                document = "".join(pieces)
                pieces.clear()
                text = detokenise(document)
                if text:
                    original.append((count_words([document]), len(document.encode())))
            if text and ends and domain is not None:
                domains.append(domain)
            yield text, ends

    writer = StoreWriter(folder, tokenizer)
    try:
        with Encoders(tokenizer) as encoders:
            tokenise(cleaned(), writer, encoders, lambda characters: None)
    except MemoryError:
        raise UserError(
            f"{source} has a document larger than memory: split it, or give it as a .txt file, "
            "which is read in pieces"
        ) from None
    if not writer.tokens:
        raise UserError(f"{source} holds no text to score")
    writer.close()
    return Text(
        name,
        source,
        Store.open(folder, tokenizer),
        how.detokenizer,
        None if how.domain_key is None else domains,
        None if detokenise is None else np.array(original, np.int64).T,
    )


def count_words(pieces: Iterable[str]) -> int:
    """Words of the text that `pieces` make: one more than its runs of whitespace.

    That is len(re.split(r"\\s+", text)), the count behind lm-evaluation-harness' word
    perplexity. Whitespace at the start or end of a document so counts for a word more.
    """
    words, within = 1, False
    for piece in pieces:
        if piece:
            words += len(re.findall(r"\s+", piece)) - (within and piece[0].isspace())
            within = piece[-1].isspace()
    return words


def _open_store(name: str, path: Path, tokenizer: Tokenizer, how: Reading) -> Text:
    if how.detokenizer != "none":
        raise UserError(f"--detokenizer: {path} is tokenised already; give the text itself")
    if how.domain_key is not None:
        raise UserError(f"--domain_key: {path} is a token store, which has no keys")
    if (path / "val" / MANIFEST).is_file():
        raise UserError(f"{path} holds two stores: name {path / 'train'} or {path / 'val'}")
    return Text(name, str(path), Store.open(path, tokenizer))


def _file(path: Path, how: Reading) -> Iterator[Part]:
    if path.suffix not in READERS:
        raise UserError(
            f"{path} is no folder and ends in none of {', '.join(READERS)}, .bin: check the path"
        )
    parts = open_parts(path, how.text_key)()
    if how.domain_key is None:
        return ((text, ends, None) for text, ends in parts)
    # In these files each part is a whole document, so two readers keep step.
    domains = open_parts(path, how.domain_key)()
    return ((text, ends, domain) for (text, ends), (domain, _) in zip(parts, domains, strict=True))


def _hub(source: str, how: Reading) -> Iterator[Part]:
    keys = [key for key in (how.text_key, how.domain_key) if key is not None]
    for number, row in enumerate(hub_rows(source, keys)):
        text = row[how.text_key]
        if not isinstance(text, str):
            raise UserError(f"{source} row {number} holds no text under '{how.text_key}'")
        yield text, True, None if how.domain_key is None else str(row[how.domain_key])
