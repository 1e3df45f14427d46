"""Perplexity: every token of a text scored once, by a convention that is told with the number.

The text is a stream s of tokens, each document followed by end-of-text. Window j reads
s[j * stride], ..., `context` tokens in all, and predicts the token after each. Of its
predictions those count that no earlier window made: all of the first window, the last `stride`
of any other, whatever weight the store gives them. So each scored token has at least context -
stride tokens before it (but for the first window), and the sum runs over every token exactly once,
whatever the batch or the mesh.
This is the strided recipe of Hugging Face's "Perplexity of fixed-length models", save that
there a window of `context` tokens makes context - 1 predictions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from gptjax import model, sharding
from gptjax.config import Config, ConfigError, Model, UserError, choose
from gptjax.data.batches import PACKING, Batch, mark_documents
from gptjax.data.store import Store
from gptjax.layers.attention import kernel_for
from gptjax.layers.position import POSITION
from gptjax.losses import token_nll
from gptjax.tokenizer import Tokenizer

# What is put before the first token, which is then scored like any other; without it, it is not.
PREFIX: dict[str, Callable[[Tokenizer], int | None]] = {
    "eot": lambda tokenizer: tokenizer.eot,
    "bos": lambda tokenizer: tokenizer.bos,
    "none": lambda tokenizer: None,
}
# Whether attention stays within a document.
DOCUMENTS: dict[str, bool] = {"joined": False, "apart": True}


@dataclasses.dataclass(frozen=True)
class Convention:
    """What a perplexity depends on besides model and text."""

    context: int  # tokens a window reads
    stride: int  # tokens from one window to the next
    prefix: str  # a row of PREFIX
    apart: bool  # attention stays within a document
    max_tokens: int | None = None  # so many of each text are scored, from its beginning; None: all

    def __str__(self) -> str:
        documents = "apart" if self.apart else "joined"
        cut = "" if self.max_tokens is None else f", at most {self.max_tokens:,} tokens of a text"
        return (
            f"context {self.context}, stride {self.stride}, prefix {self.prefix}, documents "
            f"{documents}, end-of-text scored{cut}"
        )


@dataclasses.dataclass(frozen=True)
class Score:
    """Sums over scored tokens, which add up over texts, and what is made of them."""

    nats: float  # negative log-likelihood
    tokens: float  # scored, end-of-text included; of weighted ones the sum of their weights
    bytes: int  # UTF-8 bytes of the scored tokens; end-of-text has none

    def __add__(self, other: Self) -> Self:
        return dataclasses.replace(
            self,
            nats=self.nats + other.nats,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
        )

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss): of a token, so it compares only between equal tokenizers."""
        return math.inf if self.loss >= 700 else math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Compares across tokenizers: nats / ln 2 / bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def values(self) -> dict[str, float]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }

    def __str__(self) -> str:
        return (
            f"{self.loss:.4f} nats/token, perplexity {self.perplexity:.2f}, "
            f"{self.bits_per_byte:.4f} bits/byte ({self.tokens:,.0f} tokens, {self.bytes:,} bytes)"
        )


class Evaluator:
    """Scores one store with any parameters of one architecture, on the current mesh.

    Args:
        config: the sections model, eval and data.packing decide; `model.attention` settled.
        store: the text to score.
        tokenizer: the store's.

    Attributes:
        convention: what the score depends on besides model and text.
        tokens: how many are scored.
        fingerprint: the store's.
        document_ends: int64, one past each document's last scored token; the last of them is
            `tokens`, even where `eval.max_tokens` cuts a document.

    Raises:
        ConfigError: on an unknown `eval.prefix`, `eval.documents` or `data.packing`, or a
            context beyond the learned positions, that `model.attention` cannot do, or that does
            not divide over the mesh.
        UserError: on a text without a token to score.
    """

    def __init__(self, config: Config, store: Store, tokenizer: Tokenizer) -> None:
        e = config.eval
        context = e.context or config.model.context
        self.convention = Convention(
            context,
            e.stride or context,
            e.prefix,
            choose(PACKING, config.data.packing, "data.packing").segmented
            if e.documents is None
            else choose(DOCUMENTS, e.documents, "eval.documents"),
            e.max_tokens,
        )
        if choose(POSITION, config.model.position, "model.position").learned:
            _within_positions(context, config.model)
        sharding.check_context("eval.context" if e.context else "model.context", context)
        kernel_for(config.model, context)
        self._model, self._chunk = config.model, config.optim.loss_vocab_chunk
        self._store, self._tokenizer = store, tokenizer
        self.fingerprint = store.fingerprint
        self._prefix = choose(PREFIX, e.prefix, "eval.prefix")(tokenizer)
        if e.prefix == "bos" and self._prefix is None:
            raise ConfigError(
                f"eval.prefix=bos: tokenizer {tokenizer.name!r} has no such token; set it to eot"
            )
        self._offset = int(self._prefix is None)
        available = store.num_tokens - self._offset
        if available < 1:
            raise UserError(f"{store.path} holds a single token: nothing to score without a prefix")
        self.tokens = min(available, e.max_tokens or available)
        ends = np.unique(np.minimum(store.document_ends - self._offset, self.tokens))
        self.document_ends = ends[ends > 0]
        self.windows = 1 + max(0, -(-(self.tokens - context) // self.convention.stride))
        # Rounded up to what the mesh divides; surplus rows are windows beyond the last.
        self._rows = sharding.round_up(min(e.batch_size, self.windows), "B")

    def __call__(
        self, params: model.Params, advance: Callable[[int], None] = lambda tokens: None
    ) -> Score:
        """The score of the whole text; `advance` hears of every so many tokens scored."""
        nats = self.token_nats(params, advance)
        scored = self.targets(0, self.tokens)
        # float64, so that the sum is the same to the last printed digit in any order.
        total = float(nats.sum(dtype=np.float64))
        return Score(total, self.tokens, int(self._tokenizer.bytes_per_token[scored].sum()))

    def token_nats(
        self, params: model.Params, advance: Callable[[int], None] = lambda tokens: None
    ) -> np.ndarray:
        """Each scored token's negative log-likelihood in nats, float32 (tokens,), in order."""
        nats = np.empty(self.tokens, np.float32)
        pending: list[tuple[int, jax.Array]] = []

        def collect() -> None:
            first, nll_BT = pending.pop(0)
            done = 0
            for row, nll_T in enumerate(np.asarray(nll_BT)):
                start, begin, end = self._span(first + row)
                nats[begin:end] = nll_T[begin - start : end - start]
                done += end - begin
            advance(done)

        for first in range(0, self.windows, self._rows):
            batch = self.batch(first)
            pending.append((first, self.program(params, batch)))
            if len(pending) > 1:  # one batch runs while the one before is read
                collect()
        while pending:
            collect()
        return nats

    def batch(self, first: int) -> Batch[jax.Array]:
        """The windows from `first` on that are scored at once, on the current mesh."""
        return sharding.place(functools.partial(self._load, first), self._rows, "BT")

    def program(self, params: model.Params, batch: Batch[jax.Array]) -> jax.Array:
        """What is computed of a batch: `batch_nll`."""
        return batch_nll(self._model, self._chunk, params, batch)

    def targets(self, start: int, stop: int) -> np.ndarray:
        """Scored tokens [start, stop), int32."""
        return self._store.tokens(start + self._offset, stop + self._offset)

    def tokens_before(self) -> np.ndarray:
        """Of each scored token, the tokens that its prediction could see; int64 (tokens,).

        From context - stride + 1 to context, but for the first window and, where documents are
        apart, their beginnings. What stands before the whole text, or before a document that
        sees no other, is not counted.
        """
        index = np.arange(self.tokens)
        context, stride = self.convention.context, self.convention.stride
        window = np.maximum(0, -(-(index + 1 - context) // stride))
        # The first input of a later window is the token before its first target.
        before = index - window * stride + np.where(window > 0, 1, self._offset)
        if self.convention.apart:
            starts = np.append(-self._offset, self.document_ends[:-1])
            document = np.searchsorted(self.document_ends, index, side="right")
            before = np.minimum(before, index - starts[document])
        return before

    def _span(self, window: int) -> tuple[int, int, int]:
        """Of a window: its first target, its first scored target, one past its last."""
        context, stride = self.convention.context, self.convention.stride
        start = window * stride
        end = min(start + context, self.tokens)
        return start, min(start if window == 0 else start + context - stride, end), end

    def _load(self, first: int, start_row: int, stop_row: int) -> Batch[np.ndarray]:
        """Rows of the batch that begins with window `first`; what lies beyond the text is padding."""
        shape = (stop_row - start_row, self.convention.context)
        inputs = np.full(shape, self._tokenizer.eot, np.int32)
        targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, window in enumerate(range(first + start_row, first + stop_row)):
            start, begin, end = self._span(window)
            if start >= end:
                continue
            weights[row, begin - start : end - start] = 1
            scored = self.targets(start, end)
            targets[row, : len(scored)] = scored
            if start:
                inputs[row, 0] = self.targets(start - 1, start)[0]
            elif self._prefix is None:
                inputs[row, 0] = self._store.tokens(0, 1)[0]
            else:
                inputs[row, 0] = self._prefix
            inputs[row, 1 : len(scored)] = scored[:-1]
        batch = Batch(inputs, targets, weights)
        return mark_documents(batch, self._tokenizer.eot) if self.convention.apart else batch


class RowEvaluator:
    """Scores one store in the rows that training would read, by what its tokens weigh.

    Args:
        config: the sections model, eval.batch_size, eval.max_tokens and data.packing decide.
        store: the documents to score.
        tokenizer: the store's.

    Attributes:
        rows: those.
        tokens: places of the rows that are scored, `eval.max_tokens` or a few more.
        fingerprint: the store's.

    Raises:
        UserError: as the packing.
    """

    def __init__(self, config: Config, store: Store, tokenizer: Tokenizer) -> None:
        context, most = config.model.context, config.eval.max_tokens
        pack = choose(PACKING, config.data.packing, "data.packing")
        self.rows = pack(store, context, tokenizer.eot)
        self._count = len(self.rows) if most is None else min(len(self.rows), -(-most // context))
        self.tokens, self.fingerprint = self._count * context, store.fingerprint
        self._model, self._chunk = config.model, config.optim.loss_vocab_chunk
        self._tokenizer = tokenizer
        self._at_once = sharding.round_up(min(config.eval.batch_size, self._count), "B")

    def __call__(
        self, params: model.Params, advance: Callable[[int], None] = lambda tokens: None
    ) -> Score:
        """The score of all rows; `advance` hears of every so many places scored."""
        scores = []
        for first in range(0, self._count, self._at_once):
            nll_BT = np.asarray(self.program(params, self.batch(first)))
            read = self._load(first, 0, self._at_once)
            scored, weights = read.targets[read.weights > 0], read.weights.astype(np.float64)
            size = int(self._tokenizer.bytes_per_token[scored].sum())
            scores.append(Score(float((weights * nll_BT).sum()), float(weights.sum()), size))
            advance(min(self._at_once, self._count - first) * read.tokens.shape[1])
        return sum(scores[1:], start=scores[0])

    def batch(self, first: int) -> Batch[jax.Array]:
        """The rows from `first` on that are scored at once, on the current mesh."""
        return sharding.place(functools.partial(self._load, first), self._at_once, "BT")

    def program(self, params: model.Params, batch: Batch[jax.Array]) -> Any:
        """What is computed of a batch: `batch_nll`."""
        return batch_nll(self._model, self._chunk, params, batch)

    def _load(self, first: int, start_row: int, stop_row: int) -> Batch[np.ndarray]:
        """Rows of the batch that begins with row `first`; those beyond the last weigh nothing."""
        index = first + np.arange(start_row, stop_row)
        batch = self.rows.rows(np.minimum(index, self._count - 1))
        batch.weights[index >= self._count] = 0
        return batch


def _within_positions(context: int, config: Model) -> None:
    # jax would clamp the look-up, and give every late token the last position.
    if context > config.context:
        raise ConfigError(
            f"eval.context={context} is beyond the {config.context} learned positions: set it to "
            "at most model.context"
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def batch_nll(
    config: Model, chunk: int | None, params: model.Params, batch: Batch[jax.Array]
) -> jax.Array:
    """nll_BT, float32, of every target whatever it weighs; whole on every process."""
    x_BTD = model.hidden(
        config,
        params,
        batch.tokens,
        position_BT=batch.positions,
        segments_BT=batch.segments,
    ).x_BTD
    x_BTD, kernel, dims = model.unembedding(config, params, x_BTD)
    softcap = config.logit_softcap
    nll_BT, _ = token_nll(x_BTD, kernel, dims, batch.targets, chunk=chunk, softcap=softcap)
    return jax.reshard(nll_BT, P())
