"""Tokenizers in and out of Hugging Face's `tokenizer.json`."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from gptjax.tokenizer import FILES, TOKENIZER_FILE, TOKENIZERS, byte_alphabet, folder_of, load

# Spells bytes in GPT-2's alphabet, and cuts nothing.
BYTES: dict[str, Any] = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
}  # fmt: skip


def write_tokenizer(name: str, folder: Path) -> None:
    """Writes the tokenizer `name` (see `tokenizer.load`) for `transformers` to find in `folder`."""
    if (own := folder_of(name)) is not None:
        for file in FILES:
            if (own / file).is_file():
                shutil.copy(own / file, folder)
        return
    parts, eot = TOKENIZERS[name](), load(name).eot
    specials = parts["special_tokens"]
    tree = tokenizer_json(
        ranks_to_vocab(parts["mergeable_ranks"]),
        ranks_to_merges(parts["mergeable_ranks"]),
        specials,
        split(parts["pat_str"]),
    )
    (folder / TOKENIZER_FILE).write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    eos = next(text for text, i in specials.items() if i == eot)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": eos}
    settings |= {"clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def tokenizer_json(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    specials: dict[str, int],
    pre_tokenizers: list[dict[str, Any]],
    *,
    whole_pieces: bool = False,
    others: dict[str, int] | None = None,
    bos: str | None = None,
) -> dict[str, Any]:
    """A byte-level BPE as the content of a tokenizer.json.

    Args:
        vocab: token in GPT-2's byte alphabet -> id.
        merges: pairs, the most urgent first.
        specials: text -> id of tokens that no ordinary text has.
        pre_tokenizers: what cuts a text into pieces, the last making bytes of it.
        whole_pieces: a piece that is a token is one, whatever the merges say.
        others: text -> id of further tokens found in ordinary text before it is cut.
        bos: a special token to stand before every text.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [(i, text, True) for text, i in specials.items()]
    added += [(i, text, False) for text, i in (others or {}).items()]
    start = [] if bos is None else [{"SpecialToken": {"id": bos, "type_id": 0}}]
    template: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": [*start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*start, *({"Sequence": {"id": x, "type_id": 0}} for x in "AB")],
        "special_tokens": {}
        if bos is None
        else {bos: {"id": bos, "ids": [specials[bos]], "tokens": [bos]}},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **flags, "special": special}
            for i, text, special in sorted(added)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": template,
        "decoder": BYTES,
        "model": {
            "type": "BPE",
            "ignore_merges": whole_pieces,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }


def split(pattern: str) -> list[dict[str, Any]]:
    """Pre-tokenizers that cut at a regular expression's matches, then spell bytes."""
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [cut, BYTES]


def ranks_to_vocab(ranks: dict[bytes, int]) -> dict[str, int]:
    alphabet = byte_alphabet()
    return {"".join(alphabet[b] for b in token): rank for token, rank in ranks.items()}


def ranks_to_merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The pair that each token is merged from, by merging its bytes with lower ranks only."""
    alphabet, merges = byte_alphabet(), []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [
                (ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts))
            ]
            lowest, i = min(pairs)
            if lowest >= rank:
                raise ValueError(f"{token!r} cannot be merged from tokens of lower rank")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        a, b = ("".join(alphabet[x] for x in part) for part in parts)
        merges.append((a, b))
    return merges
