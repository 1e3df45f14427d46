"""Dialogues as documents of a weighted store: scored is what the assistant says, and nothing else.

A dialogue is rendered by the model's own chat template, as when the model is asked. The assistant's
tokens are found by rendering its beginnings: what stands before a turn, with what begins an answer,
and what stands up to its end. Between the two lies the turn. Where a beginning is not the beginning
of the whole, in text or in tokens, nobody can say which tokens are the assistant's, and the dialogue
is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax import chat
from gptjax.config import UserError
from gptjax.data.prepare import build, check_given, open_rows
from gptjax.data.store import StoreWriter
from gptjax.progress import say
from gptjax.tokenizer import Tokenizer, load

ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, Any]


class Dialogue(NamedTuple):
    """A dialogue as a model reads it.

    Attributes:
        ids: (n,) all of it.
        scored: bool (n,), the assistant's tokens and what ends its turns.
    """

    ids: list[int]
    scored: np.ndarray


def encode(tokenizer: Tokenizer, messages: Sequence[Message], first: int = 0) -> Dialogue:
    """A dialogue, and which of its tokens are scored.

    Args:
        tokenizer: one with a chat template.
        messages: as of `chat.render`.
        first: turns before this one are read but not scored.

    Raises:
        UserError: if the template refuses the dialogue, does not render its beginnings as beginnings
            of the whole, or does not end a turn by a token that ends an answer; or if the tokenizer
            makes a token across the border of a turn.
    """
    text = chat.render(tokenizer, messages, answer=False)
    ids = chat.ids(tokenizer, text)
    scored = np.zeros(len(ids), bool)
    for turn, message in enumerate(messages):
        if turn < first or message["role"] != "assistant":
            continue
        if not turn:
            raise UserError("the dialogue begins with the assistant: leave out its first message")
        before = chat.render(tokenizer, messages[:turn])
        upto = chat.render(tokenizer, messages[: turn + 1], answer=False)
        if not (text.startswith(upto) and upto.startswith(before)):
            raise UserError(
                f"the chat template renders what stands before or up to turn {turn} otherwise than "
                "within the whole dialogue, so that nothing tells which tokens are the assistant's: "
                "cut the dialogue after its first answer, or take another template"
            )
        ids_before, ids_upto = chat.ids(tokenizer, before), chat.ids(tokenizer, upto)
        start, stops = len(ids_before), np.isin(ids_upto, sorted(tokenizer.stops))
        stops[:start] = False
        if not stops.any():
            names = {i: name for name, i in tokenizer.specials.items()}
            known = ", ".join(str(names.get(i, i)) for i in sorted(tokenizer.stops))
            raise UserError(
                f"the chat template ends turn {turn} by none of the tokens that end an answer "
                f"({known}), so that the model would never stop: name its own in "
                "generation_config.json, eos_token_id"
            )
        end = int(np.flatnonzero(stops)[-1]) + 1  # what follows it is the template's
        if ids[:start] != ids_before or ids[:end] != ids_upto[:end]:
            raise UserError(
                f"the tokenizer makes a token across the border of turn {turn}, so that it is half "
                "the assistant's: let the template set a special token there"
            )
        scored[start:end] = True
    return Dialogue(ids, scored)


def turns(row: Mapping[str, Any], place: str) -> tuple[list[Message], int]:
    """The messages of a row of data, and the first of them that is scored.

    Args:
        row: `messages`, or `prompt` and `completion`, each a text or messages.
        place: of the row, in words.

    Raises:
        UserError: if it has neither, or a message without a known role.
    """
    if row.get("messages") is not None:
        return _messages(row["messages"], place), 0
    if row.get("prompt") is not None and row.get("completion") is not None:
        before = said(row["prompt"], "user", place)
        return [*before, *said(row["completion"], "assistant", place)], len(before)
    raise UserError(
        f"{place} has neither 'messages' nor 'prompt' and 'completion': its keys are "
        f"{', '.join(row) or 'none'}"
    )


def said(value: Any, role: str, place: str) -> list[Message]:
    """Messages, or a text as what `role` says."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    return _messages(value, place)


def _messages(value: Any, place: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value) or not value:
        raise UserError(f"{place} holds no list of messages, each with a role and a content")
    for message in value:
        if message.get("role") not in ROLES:
            raise UserError(
                f"{place} has a message of role {message.get('role')!r}, which is none of "
                f"{', '.join(ROLES)}"
            )
    return value


def prepare_dialogues(
    files: Sequence[Path], out: Path, tokenizer_name: str, val_fraction: float = 0.1
) -> dict[str, Any]:
    """Dialogues into OUT/train and OUT/val, weighted stores, as `prepare` does texts.

    A dialogue is a document; what is scored counts 1, all else 0. Dialogues in which nothing is
    scored are left out, which a line tells.

    Args:
        files: .jsonl, .parquet or hub:DATASET..., whose rows are as for `turns`.
        out: folder to make, as in `prepare`.
        tokenizer_name: a model's folder or name, which has a chat template.
        val_fraction: the share of the dialogues, in [0, 1), that is held out at the end.

    Returns:
        As `prepare`.

    Raises:
        UserError: as `prepare`, `turns` and `encode`, naming the row.
    """

    def encoded(tokenizer: Tokenizer, row: Mapping[str, Any], place: str) -> list[Dialogue]:
        dialogue = encode(tokenizer, *turns(row, place))
        return [dialogue] if dialogue.scored.any() else []

    chat.template_of(load(tokenizer_name))
    return prepare_rows(files, out, tokenizer_name, val_fraction, "dialogues", encoded)


def prepare_pairs(
    files: Sequence[Path], out: Path, tokenizer_name: str, val_fraction: float = 0.1
) -> dict[str, Any]:
    """Preferences into OUT/train and OUT/val, as `prepare_dialogues`.

    The chosen and the rejected text of pair i are documents 2i and 2i + 1, for `data.Pairs`.

    Args:
        files: as there; a row has `prompt`, `chosen` and `rejected`, each a text or messages. Of a
            chosen and a rejected text that are whole dialogues what both begin with is the prompt.
        tokenizer_name: one without a chat template takes texts as they are: an answer follows its
            prompt and is ended by end-of-text.

    Raises:
        UserError: as there.
    """

    def encoded(tokenizer: Tokenizer, row: Mapping[str, Any], place: str) -> list[Dialogue]:
        if missing := [key for key in PAIR if row.get(key) is None]:
            raise UserError(f"{place} has no '{missing[0]}': a pair has {', '.join(PAIR)}")
        both = [_answered(tokenizer, row, key, place) for key in PAIR[1:]]
        return both if all(dialogue.scored.any() for dialogue in both) else []

    return prepare_rows(files, out, tokenizer_name, val_fraction, "pairs", encoded)


PAIR = ("prompt", "chosen", "rejected")
# What a row of each kind of store is read for; prompts are read with all that there is.
KEYS: dict[str, tuple[str, ...]] = {
    "dialogues": ("messages", "prompt", "completion"),
    "pairs": PAIR,
    "prompts": (),
}


def prepare_prompts(
    files: Sequence[Path], out: Path, tokenizer_name: str, val_fraction: float = 0.1
) -> dict[str, Any]:
    """Prompts into OUT/train and OUT/val, as `prepare_dialogues`, each with its whole row beside it.

    Prompt i, up to where its answer begins, is document i, for `data.Prompts`.

    Args:
        files: as there; a row has `prompt`, a text or messages, and whatever a reward is to know.
        tokenizer_name: one without a chat template takes texts as they are.

    Raises:
        UserError: as there.
    """

    def encoded(tokenizer: Tokenizer, row: Mapping[str, Any], place: str) -> list[Dialogue]:
        if row.get("prompt") is None:
            raise UserError(f"{place} has no 'prompt': its keys are {', '.join(row) or 'none'}")
        if _has_template(tokenizer, row["prompt"], place):
            ids = chat.encode(tokenizer, said(row["prompt"], "user", place))
        else:
            ids = tokenizer.encode(row["prompt"]) or [tokenizer.eot]
        return [Dialogue(ids, np.zeros(len(ids), bool))]

    return prepare_rows(files, out, tokenizer_name, val_fraction, "prompts", encoded)


def _has_template(tokenizer: Tokenizer, value: Any, place: str) -> bool:
    """Whether the chat template renders a prompt or an answer; else it is to be a text."""
    if tokenizer.chat_template is not None or tokenizer.template_choice:
        return True
    if not isinstance(value, str):
        raise UserError(
            f"{place} holds messages, but tokenizer {tokenizer.name!r} has no chat template: give "
            "texts"
        )
    return False


def _answered(tokenizer: Tokenizer, row: Mapping[str, Any], key: str, place: str) -> Dialogue:
    """The prompt of a row of preferences with its answer `key`, which is what is scored."""
    templated = [_has_template(tokenizer, row[name], place) for name in ("prompt", key)]
    if not all(templated):
        # Apart, as they are when an answer is generated.
        ids = tokenizer.encode(row["prompt"]) or [tokenizer.eot]
        answer = [*tokenizer.encode(row[key]), tokenizer.eot]
        return Dialogue(ids + answer, np.repeat([False, True], [len(ids), len(answer)]))
    messages = said(row[key], "assistant", place)
    if messages[0]["role"] == "assistant":
        before = said(row["prompt"], "user", place)
        return encode(tokenizer, [*before, *messages], len(before))
    chosen, rejected = (said(row[name], "assistant", place) for name in PAIR[1:])
    differ = [a != b for a, b in zip(chosen, rejected, strict=False)]
    return encode(tokenizer, messages, differ.index(True) if any(differ) else len(differ))


def prepare_rows(
    files: Sequence[Path],
    out: Path,
    tokenizer_name: str,
    val_fraction: float,
    kind: str,
    encoded: Callable[[Tokenizer, Mapping[str, Any], str], list[Dialogue]],
) -> dict[str, Any]:
    """As `prepare_dialogues`, of rows that `encoded` makes documents of, none where it leaves one out.

    Args:
        kind: of the store, which says of `KEYS` those of a row that are read.
        encoded: (tokenizer, row, its place in words) -> documents.
    """
    check_given(files, val_fraction)
    tokenizer = load(tokenizer_name)
    readers = [open_rows(Path(file), KEYS[kind]) for file in files]
    total, digest = 0, hashlib.sha256()
    for file, read in zip(files, readers, strict=True):
        before = total
        for _, row in read():
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            total += 1
        if total == before:
            raise UserError(f"{file} holds no rows: leave it out")

    def documents_of(place: str, row: Mapping[str, Any]) -> list[Dialogue]:
        try:
            return encoded(tokenizer, row, place)
        except UserError as error:
            told = str(error)
            raise UserError(told if place in told else f"{place}: {told}") from error

    def fill(writer: StoreWriter, start: int, stop: int, advance: Callable[[int], None]) -> None:
        shards, left_out = writer.shards, 0
        rows = itertools.chain.from_iterable(read() for read in readers)
        for number, (place, row) in enumerate(itertools.islice(rows, start, stop)):
            advance(1)
            if number < writer.written:
                continue
            documents = documents_of(place, row)
            left_out += not documents
            for ids, scored in documents:
                writer.write(np.array(ids), True, scored.astype(np.float32), end_weight=0)
            if writer.shards > shards:
                shards = writer.shards
                writer.note(number + 1)
        if left_out:
            say(
                f"{writer.folder.name}: {left_out} of {stop - start} rows are left out: nothing scored"
            )
        if not writer.tokens:
            for read in readers:  # of so few a split may have none, and the others may be wrong
                for place, row in read():
                    documents_of(place, row)
            raise UserError(
                f"{total} rows leave nothing for '{writer.folder.name}' with "
                f"val_fraction={val_fraction}: give more rows or another fraction"
            )
        if kind == "prompts":
            rows = itertools.chain.from_iterable(read() for read in readers)
            writer.keep_rows(row for _, row in itertools.islice(rows, start, stop))

    recipe = {
        "kind": kind,
        "rows_sha256": digest.hexdigest(),
        "chat_template_sha256": hashlib.sha256(
            (tokenizer.chat_template or "").encode()
        ).hexdigest(),
        "val_fraction": val_fraction,
    }
    return build(Path(out), tokenizer, recipe, total, fill, weighted=True)
