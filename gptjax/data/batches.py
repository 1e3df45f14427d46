"""Batches as a pure function of (seed, step), and the ways documents become rows.

The rows of all steps are numbered on: row r of step s is global row s * batch_size + r. A
global row belongs to a source (`order.mix_sources`), where it is that source's k-th draw; the
draw falls in epoch k // rows and is place k % rows of that epoch's permutation
(`order.permute`). None of this depends on processes, workers, devices or history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from gptjax.config import Data, UserError, check_seed, choose
from gptjax.data.order import key, mix_sources, permute
from gptjax.data.sources import open_source
from gptjax.data.store import ROWS, Store
from gptjax.progress import say
from gptjax.tokenizer import Tokenizer

PAD = -1  # the segment of positions that hold no token


A = TypeVar("A")  # numpy's arrays where rows are read, jax's where they are used


class Batch(NamedTuple, Generic[A]):
    """Rows of tokens; all arrays have one shape, (R, T), or (B, A, T) for the step of training.

    Attributes:
        tokens: int32 inputs.
        targets: int32, the token after each input.
        weights: float32, what each target counts, by the store; 0 where nothing is scored.
        segments: int32 document within the row, from 0; -1 is padding. Attention stays within
            a segment. None: each row is one document.
        positions: int32, counted from the segment's start; None: from the row's.
        reference: float32, each target's negative log-likelihood in nats under the model that
            training began with; NaN before it is known (`Pairs.reference`). None: rows are no pairs.
        sampled: float32, each target's log-likelihood in nats when it was drawn; NaN before it is.
            None: rows are no prompts.
        advantages: float32, what the answer that a target is of was worth; likewise.
    """

    tokens: A
    targets: A
    weights: A
    segments: A | None = None
    positions: A | None = None
    reference: A | None = None
    sampled: A | None = None
    advantages: A | None = None


class Packing(Protocol):
    """How the documents of a store become rows of T tokens.

    `len` is the rows of an epoch, in which every target is scored exactly once, but for those of
    documents that are left out.

    Attributes:
        segmented: whether a row's segments and positions say more than that it is one text.
        whole: whether a document is scored as it is read here alone, uncut, and is held out so too.
        extra: the fields that rows have beyond those of each packing.
        takes: the kinds of stores, of those that `data` makes, that it does not read as something else.
    """

    segmented: bool
    whole: bool
    extra: tuple[str, ...]
    takes: tuple[str, ...]

    def __init__(self, store: Store, context: int, eot: int) -> None: ...
    def __len__(self) -> int: ...
    def rows(self, index: np.ndarray) -> Batch[np.ndarray]:
        """Rows `index`, int64 (R,) in range(len), with all fields up to `positions`, and `extra`."""
        ...

    def documents(self, index: np.ndarray) -> np.ndarray:
        """The first and the last document of rows `index`, 0-based in their store, (R, 2)."""
        ...


class Stream:
    """Consecutive windows of T tokens; documents run into each other (GPT-2, nanoGPT).

    Window i predicts tokens iT + 1 to iT + T. The last one ends with the store: it overlaps
    its neighbour, and the targets scored there already have weight 0. Token 0 is never a
    target, as nothing stands before it.
    """

    segmented, whole = False, False
    extra: tuple[str, ...] = ()
    takes: tuple[str, ...] = ("texts",)

    def __init__(self, store: Store, context: int, eot: int) -> None:
        self.store, self.context, self.eot = store, context, eot
        if store.num_tokens < context + 1:
            raise UserError(
                f"{store.path} holds {store.num_tokens} tokens, less than one row of context + 1 "
                f"= {context + 1}: prepare more text, or set a shorter model.context"
            )

    def __len__(self) -> int:
        return (self.store.num_tokens - 2) // self.context + 1

    def rows(self, index: np.ndarray) -> Batch[np.ndarray]:
        T, starts = self.context, self._starts(index)
        window = np.stack([self.store.tokens(start, start + T + 1) for start in starts.tolist()])
        place = np.arange(T, dtype=np.int32)
        scored = starts[:, None] + place >= (index * T)[:, None]
        return Batch(
            tokens=window[:, :-1],
            targets=window[:, 1:],
            weights=scored
            * np.stack([self.store.weights(s + 1, s + T + 1) for s in starts.tolist()]),
            segments=np.zeros((len(index), T), np.int32),
            positions=np.broadcast_to(place, (len(index), T)),
        )

    def documents(self, index: np.ndarray) -> np.ndarray:
        starts = self._starts(index)
        ends = np.stack([starts, starts + self.context], axis=1)  # first input, last target
        return np.searchsorted(self.store.document_ends, ends, side="right")

    def _starts(self, index: np.ndarray) -> np.ndarray:
        return np.minimum(index * self.context, self.store.num_tokens - 1 - self.context)


class Masked(Stream):
    """The windows of `Stream`, each document a segment that sees only itself.

    End-of-text as an input begins the next document's segment, at position 0, and so acts as
    its start token; as a target it ends its own document. Positions count from the segment's
    start, or from the window's first token where that stands within a document.
    """

    segmented = True

    def rows(self, index: np.ndarray) -> Batch[np.ndarray]:
        batch = super().rows(index)
        return mark_documents(batch, self.eot)


def mark_documents(batch: Batch[np.ndarray], eot: int) -> Batch[np.ndarray]:
    """`batch` with the segments and positions of its tokens, as `Masked` says."""
    tokens = batch.tokens
    starts = tokens == eot
    starts[:, 0] = True
    place = np.arange(tokens.shape[1], dtype=np.int32)
    begun = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    segments = np.cumsum(starts, axis=1, dtype=np.int32) - 1
    return batch._replace(segments=segments, positions=place - begun)


class Document:
    """One document a row: inputs end-of-text + tokens, targets tokens + end-of-text.

    A document with more than T targets goes on in further rows, each beginning with its
    preceding token as an input, so that every token is scored exactly once an epoch. Shorter
    rows are padded: token end-of-text, weight 0, segment -1, position 0.
    """

    segmented, whole = True, False
    extra: tuple[str, ...] = ()
    # Of a dialogue the first token would follow an end-of-text, and of a long one the end would be
    # scored without its beginning.
    takes: tuple[str, ...] = ("texts",)

    def __init__(self, store: Store, context: int, eot: int) -> None:
        self.store, self.context, self.eot = store, context, eot
        self.starts = np.append(0, store.document_ends[:-1])
        lengths = store.document_ends - self.starts
        self.first_row = np.append(0, np.cumsum(-(-lengths // context)))

    def __len__(self) -> int:
        return int(self.first_row[-1])

    def rows(self, index: np.ndarray) -> Batch[np.ndarray]:
        shape = (len(index), self.context)
        inputs, targets = np.full(shape, self.eot, np.int32), np.full(shape, self.eot, np.int32)
        document = np.searchsorted(self.first_row, index, side="right") - 1
        piece = index - self.first_row[document]
        starts = self.starts[document] + piece * self.context
        stops = np.minimum(starts + self.context, self.store.document_ends[document])
        weights = np.zeros(shape, np.float32)  # padding's
        for row, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            targets[row, : stop - start] = self.store.tokens(start, stop)
            weights[row, : stop - start] = self.store.weights(start, stop)
        inputs[:, 1:] = targets[:, :-1]
        for row in np.flatnonzero(piece).tolist():
            inputs[row, 0] = self.store.tokens(int(starts[row]) - 1, int(starts[row]))[0]
        place = np.arange(self.context, dtype=np.int32)
        real = place < (stops - starts)[:, None]
        return Batch(
            tokens=inputs,
            targets=targets,
            weights=weights,
            segments=np.where(real, 0, PAD).astype(np.int32),
            positions=np.where(real, place, 0),
        )

    def documents(self, index: np.ndarray) -> np.ndarray:
        document = np.searchsorted(self.first_row, index, side="right") - 1
        return np.stack([document, document], axis=1)


class Whole:
    """As many whole documents a row as fit, in the store's order, each a segment; none is cut.

    A document is read as a model reads a prompt: no end-of-text stands before it, so its first token
    is no target. What is left of a row is padding, as in `Document`. A document of more than T
    targets is left out, which a line tells.
    """

    segmented, whole = True, True
    extra: tuple[str, ...] = ()
    takes: tuple[str, ...] = ("texts", "dialogues")

    def __init__(self, store: Store, context: int, eot: int) -> None:
        self.store, self.context, self.eot = store, context, eot
        starts = np.append(0, store.document_ends[:-1])
        lengths = store.document_ends - starts - 1  # targets
        self.kept = _fitting(store, lengths, context, "document")
        self.bounds = np.stack([starts, store.document_ends], axis=1)[self.kept]
        ends = np.append(0, np.cumsum(lengths[self.kept]))
        first = [0]  # of each row, and one past the last row's last
        while first[-1] < len(self.kept):
            first.append(int(np.searchsorted(ends, ends[first[-1]] + context, side="right")) - 1)
        self.first = np.array(first)

    def __len__(self) -> int:
        return len(self.first) - 1

    def rows(self, index: np.ndarray) -> Batch[np.ndarray]:
        shape = (len(index), self.context)
        tokens, targets = np.full(shape, self.eot, np.int32), np.full(shape, self.eot, np.int32)
        weights, positions = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
        segments = np.full(shape, PAD, np.int32)
        for row, place in enumerate(index.tolist()):
            at = 0
            bounds = self.bounds[self.first[place] : self.first[place + 1]].tolist()
            for segment, (start, stop) in enumerate(bounds):
                here = slice(at, at + stop - start - 1)
                text = self.store.tokens(start, stop)
                tokens[row, here], targets[row, here] = text[:-1], text[1:]
                weights[row, here] = self.store.weights(start + 1, stop)
                segments[row, here] = segment
                positions[row, here] = np.arange(stop - start - 1)
                at = here.stop
        return Batch(tokens, targets, weights, segments, positions)

    def documents(self, index: np.ndarray) -> np.ndarray:
        return self.kept[np.stack([self.first[index], self.first[index + 1] - 1], axis=1)]


class Pairs(Whole):
    """Two documents a row, the chosen text and the rejected one: documents 2i and 2i + 1.

    As in `Whole`, but that a pair of more than T targets is left out.

    Attributes:
        targets: of all rows together.
        reference: float32, of each of these in their order what `Batch.reference` says; None before it
            is known.
    """

    extra: tuple[str, ...] = ("reference",)
    takes: tuple[str, ...] = ("pairs",)

    def __init__(self, store: Store, context: int, eot: int) -> None:
        self.store, self.context, self.eot = store, context, eot
        ends = store.document_ends
        if len(ends) % 2:
            raise UserError(
                f"{store.path} holds {len(ends)} documents, an odd number: data.packing='pairs' takes "
                "a store of pairs, which `data pairs` makes"
            )
        starts = np.append(0, ends[:-1])
        lengths = (ends - starts - 1).reshape(-1, 2).sum(1)
        pairs = _fitting(store, lengths, context, "pair")
        self.kept = (2 * pairs[:, None] + np.array([0, 1])).reshape(-1)
        self.bounds = np.stack([starts, ends], axis=1)[self.kept]
        self.first = np.arange(0, len(self.kept) + 1, 2)
        self.first_target = np.append(0, np.cumsum(lengths[pairs]))
        self.targets = int(self.first_target[-1])
        self.reference: np.ndarray | None = None

    def rows(self, index: np.ndarray) -> Batch[np.ndarray]:
        batch = super().rows(index)
        reference = np.full(batch.tokens.shape, np.nan, np.float32)
        if self.reference is not None:
            reference[:] = 0
            for row, place in enumerate(index.tolist()):
                first, last = self.first_target[place : place + 2]
                reference[row, : last - first] = self.reference[first:last]
        return batch._replace(reference=reference)


class Prompts(Whole):
    """A prompt a row, a document that a model is to answer; what is left of the row is for that.

    As in `Whole`, but that none of its tokens is scored, and that a prompt that leaves no token of
    the context for an answer is left out.
    """

    segmented = False
    extra: tuple[str, ...] = ("sampled", "advantages")
    takes: tuple[str, ...] = ("prompts",)

    def __init__(self, store: Store, context: int, eot: int) -> None:
        self.store, self.context, self.eot = store, context, eot
        if len(store.row_ends) != len(store.document_ends):
            raise UserError(
                f"{store.path} does not hold the rows that its documents were made of: "
                "data.packing='prompts' takes a store of prompts, which `data prompts` makes"
            )
        starts = np.append(0, store.document_ends[:-1])
        # In place of the end-of-text, which is not read, there is to be a token of the answer.
        self.kept = _fitting(store, store.document_ends - starts, context, "prompt")
        self.bounds = np.stack([starts, store.document_ends], axis=1)[self.kept]
        self.first = np.arange(len(self.kept) + 1)

    def rows(self, index: np.ndarray) -> Batch[np.ndarray]:
        batch = super().rows(index)
        unknown = np.full(batch.tokens.shape, np.nan, np.float32)
        return batch._replace(
            weights=np.zeros_like(batch.weights), sampled=unknown, advantages=unknown
        )

    def source(self, document: int) -> tuple[str, dict[str, Any]]:
        """The row that a document's prompt is of, and where it stands, in words."""
        return f"{self.store.path / ROWS} line {document + 1}", self.store.row(document)


def _fitting(store: Store, lengths: np.ndarray, context: int, what: str) -> np.ndarray:
    """Which of the documents or pairs, of `lengths` targets, fit a row; tells of those that do not."""
    kept = np.flatnonzero(lengths <= context)
    if not len(kept):
        raise UserError(
            f"each {what} of {store.path} has more than model.context={context} targets, the shortest "
            f"{lengths.min()}: raise it"
        )
    if left_out := len(lengths) - len(kept):
        say(
            f"{store.path}: {left_out} of {len(lengths)} {what}s are left out: they have more than "
            f"model.context={context} targets (the longest {lengths.max()})"
        )
    return kept


PACKING: dict[str, type[Packing]] = {
    "stream": Stream,
    "masked": Masked,
    "document": Document,
    "whole": Whole,
    "pairs": Pairs,
    "prompts": Prompts,
}


def _check_taken(name: str, store: Store, packing: str) -> None:
    """Refuses a store that a packing would read as something else; one by `StoreWriter` may be any."""
    made = store.manifest
    kind = made.get("kind", "texts" if not made or "text_sha256" in made else None)
    if kind is not None and kind not in PACKING[packing].takes:
        fit = " or ".join(row for row, pack in PACKING.items() if kind in pack.takes)
        raise UserError(
            f"data.packing={packing!r} does not take {kind}, which {name} holds: set data.packing={fit}"
        )


class Origin(NamedTuple):
    """Where a row comes from: a source, which of its rows, and its first and last document."""

    source: str
    row: int
    first: int
    last: int

    def __str__(self) -> str:
        plural = f"s {self.first} to {self.last}" if self.last > self.first else f" {self.first}"
        return f"row {self.row} of {self.source} (document{plural})"


class Batches:
    """The rows of every step of a run.

    Attributes:
        names, sources: each source of the config, and it under its packing; `len` is its rows an
            epoch.
        segmented: see `Packing`.
        fingerprint: source -> its store's fingerprint, to be recorded and checked on resume.
    """

    def __init__(
        self, config: Data, context: int, seed: int, split: str, tokenizer: Tokenizer
    ) -> None:
        """Opens and checks the stores.

        Args:
            config: the section `data`. `weights` are shares of rows; None gives each source
                the share of its rows an epoch, so that all sources end their epochs together.
            context: T, tokens a row.
            seed: decides the order; the same for every process.
            split: "train" or "val".
            tokenizer: the stores' own.

        Raises:
            UserError: if a source cannot be opened, is of another kind than the packing takes or
                too short for a row, or on a seed that `check_seed` refuses.
        """
        check_seed(seed)
        pack = choose(PACKING, config.packing, "data.packing")
        stores = {name: open_source(name, tokenizer, split) for name in config.sources}
        for name, store in stores.items():
            _check_taken(name, store, config.packing)
        self.names = config.sources
        self.sources = [pack(stores[name], context, tokenizer.eot) for name in config.sources]
        self.segmented, self._extra = pack.segmented, pack.extra
        self.fingerprint = {name: store.fingerprint for name, store in stores.items()}
        self.batch_size, self.context, self.seed = config.batch_size, context, seed
        self._group = config.group
        self.weights = config.weights or [len(source) for source in self.sources]

    def rows(self, step: int, start: int, stop: int) -> Batch[np.ndarray]:
        """Rows [start, stop) of the batch at `step`, R of them, each array (R, T)."""
        shape = (stop - start, self.context)
        *ids, weights = "tokens", "targets", "segments", "positions", "weights"
        fields = [*ids, weights, *self._extra]
        batch: Any = Batch(
            **{f: np.empty(shape, np.int32 if f in ids else np.float32) for f in fields}
        )
        for source, rows_of_source, index in self._drawn(step, start, stop):
            drawn = self.sources[source].rows(index)
            for name in fields:
                getattr(batch, name)[rows_of_source] = getattr(drawn, name)
        return batch

    def origins(self, step: int) -> list[Origin]:
        """Where each row of the batch at `step` comes from, in the rows' order."""
        origins: dict[int, Origin] = {}
        for i, rows_of_source, index in self._drawn(step, 0, self.batch_size):
            documents = self.sources[i].documents(index).tolist()
            for row, of_source, (first, last) in zip(
                rows_of_source.tolist(), index.tolist(), documents, strict=True
            ):
                origins[row] = Origin(self.names[i], of_source, first, last)
        return [origins[row] for row in sorted(origins)]

    def prompts(self, step: int) -> list[tuple[str, dict[str, Any]]]:
        """Of each row of the batch at `step` what `Prompts.source` says, for the packing of prompts."""
        packed: Any = dict(zip(self.names, self.sources, strict=True))
        return [packed[origin.source].source(origin.first) for origin in self.origins(step)]

    def _drawn(
        self, step: int, start: int, stop: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(source, which of the rows [start, stop) are its, which of its own rows they are)."""
        rows = (step * self.batch_size + np.arange(start, stop)) // self._group
        source_R, draw_R = mix_sources(rows, self.weights, self.seed)
        for i, source in enumerate(self.sources):
            rows_of_source = np.flatnonzero(source_R == i)
            if len(rows_of_source):
                epoch, place = np.divmod(draw_R[rows_of_source], len(source))
                yield i, rows_of_source, permute(place, len(source), key(self.seed, i, epoch))


def describe(
    batch: Batch[np.ndarray],
    tokenizer: Tokenizer,
    scored: Callable[[str], str] = str,
    read: Callable[[str], str] = "⟦{}⟧".format,
) -> list[str]:
    """The exact text of each row: its first input, then every target.

    A document's end shows as <|endoftext|>, a change of segment as a double bar, and what is
    not scored stands in double brackets: ⟦first input⟧ targets ‖ next document ⟦padding x 7⟧.

    Args:
        batch: numpy rows.
        tokenizer: theirs.
        scored: how a text is shown that is scored.
        read: how one is shown that is read alone.
    """
    texts = []
    assert batch.segments is not None
    rows = zip(batch.tokens, batch.targets, batch.weights, batch.segments, strict=True)
    for tokens, targets, weights, segments in rows:
        counts = weights > 0
        changes = np.flatnonzero((np.diff(segments) != 0) | (np.diff(counts) != 0)) + 1
        shown = [read(tokenizer.decode(tokens[:1]))]
        for part in np.split(np.arange(len(tokens)), changes):
            first = part[0]
            text = tokenizer.decode(targets[part])
            if segments[first] == PAD:
                text = f"padding x {len(part)}"
            elif first and segments[first] != segments[first - 1]:
                shown.append("‖")
            shown.append(scored(text) if counts[first] else read(text))
        texts.append("".join(shown))
    return texts
