"""Continuous batching: many texts written at once, each as if it were alone.

A fixed number of slots share one cache. Texts join and leave between two steps. A step reads at
most one piece of one prompt, and draws a token of every text whose prompt is read.

What a text becomes does not depend, to the last bit, on the texts beside it, on its slot, on when
it came, or on what the cache held of its prompt:

- There is one program for each thing that is done, whose shapes never change, so that nothing is
  compiled once `Engine.warm_up` is done and no sum is ever split otherwise. A program's rows do
  not see one another.
- Tokens are written by a program for so many rows, of a few for more and more rows. Before the
  first text each is tried on the model's weights: one by which a row has other bits than by that
  for all slots is not used.
- Attention goes over the cache by tiles, of which a row passes over those that it does not see
  (`layers.attention.tiles`).
- A prompt, all but its last token, is read in pieces that begin at multiples of `PIECE`, whatever
  was cached, and the last one is padded. The cache of prompts holds whole pieces, as they were
  read: tokens that a text was continued with are read anew when they come back in a prompt.
- The token at index i of a text is drawn with a key folded from (seed, choice, i), as in
  `decode`, and how a row is drawn from is an array, not another program.

What rests on the compiler is that a row of a product has the same bits at every place of a batch,
whatever stands in the other rows. It is tried at some places, and tests hold it for what they run on.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import decode, sharding
from gptjax import model as gpt
from gptjax.config import ConfigError, Model, UserError
from gptjax.layers.attention import TILE, TILES
from gptjax.model import Params
from gptjax.serve.job import TOP, Job, Knobs, News, Scored

PIECE = 64  # tokens of a prompt that are read at once; the cache of prompts holds multiples of it
TRIES = 4  # sets of rows on which a program has to agree


@dataclasses.dataclass(eq=False)
class _Slot:
    """A row of the cache.

    Attributes:
        index: which.
        job: whose text it is; None: it is free.
        tokens: of prompt and text.
        read: how many of them the cache holds.
        kept: the tokens, whole pieces, whose keys and values lie there as a prompt's reading
            left them. A later job may begin with them.
        used: when it was taken last, on the engine's own clock.
    """

    index: int
    job: Job | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    read: int = 0
    kept: list[int] = dataclasses.field(default_factory=list)
    used: int = 0

    @property
    def reading(self) -> bool:
        return self.job is not None and self.read < len(self.job.prompt) - 1

    @property
    def writing(self) -> bool:
        return self.job is not None and not self.reading


class Counts:
    """What an engine has done since its start.

    Attributes:
        prompt_tokens: of prompts that were begun; cached_tokens of them were not read.
        text_tokens: drawn.
        steps: of `Engine.step` that did something.
        writes: steps that drew tokens, by the number of rows that were computed.
    """

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.text_tokens = self.steps = 0
        self.writes: collections.Counter[int] = collections.Counter()


class Engine:
    """Writes texts with one model on one device.

    Args:
        config: the architecture, settled.
        weights: of `decode.cast`.
        vocab_size: ids the tokenizer knows, at most `config.vocab_size`; no other is drawn.
        slots: texts that are written at once.

    Attributes:
        sizes: the numbers of rows that may be computed at a step, rising to `slots`; of
            `warm_up`. A step takes the least that is enough.
        sure: whether a row had the same bits at each place where it was tried, by each of them.

    Raises:
        ConfigError: on a model whose answers would depend on what is beside them.
    """

    def __init__(
        self, config: Model, weights: decode.Weights, *, vocab_size: int, slots: int
    ) -> None:
        check(config)
        self._config = dataclasses.replace(config, attention=TILES)
        # A thread of its own has no mesh, and one device needs none.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self._params = jax.device_put(weights.params, here)
        self._vocab_size = vocab_size
        self._room = -(-config.context // TILE) * TILE
        # As every later one, so that none is another argument to a program.
        self._layers = jax.device_put(decode.empty_layers(self._config, slots, self._room), here)
        self._slots = [_Slot(index) for index in range(slots)]
        self.sizes, self.sure = [slots], False
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._clock = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        self.counts = Counts()
        self.failed = False

    @property
    def context(self) -> int:
        return self._config.context

    @property
    def busy(self) -> int:
        """Texts that are being read or written."""
        return sum(slot.job is not None for slot in self._slots)

    @property
    def waiting(self) -> int:
        """Texts that have no slot yet."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Any thread may.

        Raises:
            UserError: on an empty prompt, an id outside the vocabulary, or a text that would not
                fit the context.
        """
        prompt = job.prompt
        if not prompt:
            raise UserError("the prompt is empty: give one token or more")
        if not 0 <= min(prompt) <= max(prompt) < self._vocab_size:
            raise UserError(f"the prompt has a token id outside [0, {self._vocab_size})")
        if job.most < 0 or len(prompt) + job.most > self.context:
            raise UserError(
                f"{len(prompt)} tokens of the prompt and {job.most} to come are more than the "
                f"context of {self.context}"
            )
        with self._changed:
            if self._closed:
                raise UserError("the engine is closed")
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Any thread may; its slot is free at the next step."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def warm_up(self) -> None:
        """Chooses `sizes`, and compiles all programs, by running each once."""
        slots = len(self._slots)
        same = self._same([*(2**i for i in range(slots.bit_length()) if 2**i < slots), slots])
        for size in same | {slots}:
            self.sizes = [size]
            job = Job([0] * 2, 2, lambda news: None, Knobs(1.0, 1, 0.5, 2.0), top=True, echo=True)
            self._waiting.append(job)
            while self.step():
                pass
        self._layers = _copy(self._layers, np.int32(0), np.int32(0))
        self._slots = [_Slot(index) for index in range(slots)]
        self.sizes, self.sure = sorted(same | {slots}), slots in same
        self.counts = Counts()

    def _same(self, sizes: Sequence[int]) -> set[int]:
        """The sizes by which rows have the bits that they have by all slots in their order.

        Some of the rows at a time, each at any place, after a random token and random keys and
        values: what they write into the cache, and their logits.
        """
        rng, slots = np.random.default_rng(0), len(self._slots)
        self._layers = _noise(self._layers)
        last, length = (rng.integers(0, n, slots) for n in (self._vocab_size, self.context))

        def bits(rows: np.ndarray) -> dict[int, list[bytes]]:
            row_B, last_B, length_B = (a.astype(np.int32) for a in (rows, last[rows], length[rows]))
            self._layers, logits_BV = _advance(
                self._config, self._params, self._layers, row_B, last_B, length_B
            )
            made = [logits_BV, *_written(self._layers, row_B, length_B)]
            each = [[row.tobytes() for row in np.asarray(a)] for a in made]
            return dict(zip(rows.tolist(), map(list, zip(*each, strict=True)), strict=True))

        whole = bits(np.arange(slots))

        def agrees(size: int) -> bool:
            tries = (rng.permutation(slots)[:size] for _ in range(TRIES))
            return all(bits(rows).items() <= whole.items() for rows in tries)

        return {size for size in sizes if agrees(size)}

    def start(self) -> None:
        """Works in a thread of its own from here on."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the step that it is at; texts that are not done stay so."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        try:
            while not self._closed:
                if not self.step():
                    with self._changed:
                        if not self._waiting and not self._closed:
                            self._changed.wait()
        except Exception:  # out of memory, or a defect of ours: whoever waits is told
            logging.getLogger(__name__).exception("the engine failed")
            with self._changed:
                self._closed = self.failed = True
                jobs = [*(slot.job for slot in self._slots if slot.job), *self._waiting]
            for job in jobs:
                job.send(News([], [], "failed"))

    def step(self) -> bool:
        """A piece of a prompt, and a token of every text. False: there is nothing to do."""
        for slot in self._slots:
            if slot.job is not None and slot.job.cancelled:
                self._free(slot)
        self._admit()
        reading = [slot for slot in self._slots if slot.reading]
        if reading:  # the first that came
            self._read(min(reading, key=lambda slot: slot.used))
        writing = [slot for slot in self._slots if slot.writing]
        if writing:
            self._write(writing)
        did = bool(reading or writing)
        self.counts.steps += did
        return did

    def _admit(self) -> None:
        """Gives free slots to whoever waits, unless a prompt that came before is still read.

        So texts of one prompt, which come together, find it read but for its last piece.
        """
        while not any(slot.reading for slot in self._slots):
            free = [slot for slot in self._slots if slot.job is None]
            with self._changed:
                while self._waiting and self._waiting[0].cancelled:
                    self._waiting.popleft()
                if not free or not self._waiting:
                    return
                job = self._waiting.popleft()
            hits = [0 if job.echo else _hit(job.prompt, slot.kept) for slot in self._slots]
            best = max(hits)
            inside = [slot for slot in free if hits[slot.index] == best]
            slot = min(inside or free, key=lambda slot: slot.used)
            if best and not inside:
                source = hits.index(best)
                self._layers = _copy(self._layers, np.int32(source), np.int32(slot.index))
            self._clock += 1
            slot.job, slot.tokens, slot.read, slot.used = job, list(job.prompt), best, self._clock
            slot.kept = job.prompt[:best]
            job.cached = best
            self.counts.prompt_tokens += len(job.prompt)
            self.counts.cached_tokens += best
            if job.echo:
                job.send(News([Scored(job.prompt[0], float("nan"), [])], [], None))
            if job.most == 0 and not slot.reading:
                self._end(slot, News([], [], "length"))

    def _read(self, slot: _Slot) -> None:
        """The next piece of a prompt."""
        job = slot.job
        assert job is not None
        start, last = slot.read, len(job.prompt) - 1
        stop = min(start + PIECE, last)
        piece = np.zeros((1, PIECE), np.int32)
        piece[0, : stop - start] = job.prompt[start:stop]
        self._layers, x_BTD = _read(
            self._config,
            self._params,
            self._layers,
            np.full(1, slot.index, np.int32),
            piece,
            np.full(1, start, np.int32),
        )
        slot.read = stop
        if stop - start == PIECE:
            slot.kept = job.prompt[:stop]
        scored: list[Scored] = []
        if job.echo:
            next_T = np.zeros(PIECE, np.int32)
            next_T[: stop - start] = job.prompt[start + 1 : stop + 1]
            logits = _logits(self._config, self._params, x_BTD)
            scored = self._told(logits, jnp.asarray(next_T), stop - start, job.top)
        ended = "length" if job.most == 0 and not slot.reading else None
        if ended:
            self._end(slot, News(scored, [], ended))
        elif scored:
            job.send(News(scored, [], None))

    def _write(self, writing: Sequence[_Slot]) -> None:
        """A token of each of these slots."""
        size = next(size for size in self.sizes if size >= len(writing))
        # No two rows are of one slot, whatever an idle one writes.
        idle = [slot for slot in self._slots if not slot.writing][: size - len(writing)]
        row_B = np.array([slot.index for slot in (*writing, *idle)], np.int32)
        last_B, choice_B = np.zeros((2, size), np.int32)
        seed_B = np.zeros(size, np.uint32)
        length_B = np.full(size, self._room, np.int32)  # beyond the cache: idle
        tokens_BS = np.full((size, self._room), self._vocab_size, np.int32)  # none
        knobs = [np.full(size, value, np.float32) for value in Knobs()]
        for row, slot in enumerate(writing):
            assert slot.job is not None
            last_B[row], length_B[row] = slot.tokens[-1], slot.read
            tokens_BS[row, : len(slot.tokens)] = slot.tokens
            seed_B[row], choice_B[row] = slot.job.seed, slot.job.choice
            for knob, value in zip(knobs, slot.job.knobs, strict=True):
                knob[row] = value
        self._layers, logits_BV = _advance(
            self._config, self._params, self._layers, row_B, last_B, length_B
        )
        each: Any = Knobs(*knobs)  # type: ignore[arg-type]
        new_B = _draw(self._vocab_size, logits_BV, tokens_BS, length_B, each, seed_B, choice_B)
        some_want_top = any(slot.job is not None and slot.job.top for slot in writing)
        scored = self._told(logits_BV, new_B, len(writing), some_want_top)
        self.counts.writes[size] += 1
        for slot, token in zip(writing, scored, strict=True):
            job = slot.job
            assert job is not None
            slot.read += 1
            slot.tokens.append(token.id)
            self.counts.text_tokens += 1
            ended = None
            if token.id in job.stop_ids:
                ended = "stop"
            elif len(slot.tokens) == len(job.prompt) + job.most:
                ended = "length"
            if not job.top:
                token = token._replace(top=[])
            news = News([], [token], ended)
            if ended:
                self._end(slot, news)
            elif not job.cancelled:
                job.send(news)

    def _told(self, logits_BV: jax.Array, id_B: jax.Array, count: int, top: bool) -> list[Scored]:
        """What is said of the first `count` tokens of `id_B`, drawn or given."""
        logprob_B, scale_B = _logprob(logits_BV, id_B)
        new, logprobs = np.asarray(id_B).tolist(), np.asarray(logprob_B).tolist()
        tops: list[list[tuple[int, float]]] = [[]] * count
        if top:
            values, ids = (np.asarray(a) for a in _top(self._vocab_size, logits_BV, scale_B))
            tops = [
                list(zip(i.tolist(), v.tolist(), strict=True))
                for i, v in zip(ids[:count], values[:count], strict=True)
            ]
        return [Scored(new[i], logprobs[i], tops[i]) for i in range(count)]

    def _end(self, slot: _Slot, news: News) -> None:
        job = slot.job
        assert job is not None
        self._free(slot)
        if not job.cancelled:
            job.send(news)

    def _free(self, slot: _Slot) -> None:
        """Its cache stays as it is for a later prompt that begins alike."""
        slot.job, slot.tokens, slot.read = None, [], 0


def check(config: Model) -> None:
    """Refuses a model whose answers would depend on what is beside them.

    Raises:
        ConfigError: saying why.
    """
    if config.products == "fp8":
        raise ConfigError(
            "model.products='fp8' rounds a text by what stands beside it in the batch: serve with "
            "model.products='int8' or 'dtype'"
        )
    decode.check_length(config, config.context)


def _hit(prompt: list[int], kept: list[int]) -> int:
    """How many tokens of a prompt need not be read again; a multiple of PIECE."""
    most = min(len(prompt) - 1, len(kept)) // PIECE
    same = (i for i in range(most) if prompt[i * PIECE : i * PIECE + PIECE] != kept[i * PIECE : i * PIECE + PIECE])  # fmt: skip
    return next(same, most) * PIECE


@functools.partial(jax.jit, donate_argnames="layers")
def _copy(layers: Any, source: jax.Array, to: jax.Array) -> Any:
    """The cache with one slot's row copied to another's."""

    def copy(a: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(a, source, 1)
        return jax.lax.dynamic_update_slice_in_dim(a, row, to, 0)

    return jax.tree.map(copy, layers)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="layers")
@sharding.phase("decoding")
def _read(
    config: Model,
    params: Params,
    layers: Any,
    row_B: jax.Array,
    tokens_BT: jax.Array,
    start_B: jax.Array,
) -> tuple[Any, jax.Array]:
    """A piece of the prompt of one slot, B = 1: the cache with it, and x_BTD."""
    x_BTD, cache, _ = gpt.hidden(
        config,
        params,
        tokens_BT,
        # What pads the last piece has a position that there is, too.
        position_BT=jnp.minimum(start_B[:, None] + jnp.arange(PIECE), config.context - 1),
        cache={"layers": layers, "length": start_B, "row": row_B},
    )
    assert cache is not None
    return cache["layers"], x_BTD


@functools.partial(jax.jit, static_argnames="config", donate_argnames="layers")
@sharding.phase("decoding")
def _advance(
    config: Model,
    params: Params,
    layers: Any,
    row_B: jax.Array,
    last_B: jax.Array,
    length_B: jax.Array,
) -> tuple[Any, jax.Array]:
    """Reads the last token of each of these slots, which stands at `length_B`.

    Returns:
        The cache with it, and logits_BV of the next, float32.

    A row beyond the cache is idle: what it writes falls on the last place of its row, which
    whoever needs it writes first.
    """
    x_BTD, cache, _ = gpt.hidden(
        config,
        params,
        last_B[:, None],
        # Idle rows too have a position that there is.
        position_BT=jnp.minimum(length_B, config.context - 1)[:, None],
        cache={"layers": layers, "length": length_B, "row": row_B},
    )
    assert cache is not None
    return cache["layers"], gpt.logits(config, params, x_BTD)[:, 0]


@functools.partial(jax.jit, static_argnames="config")
@sharding.phase("decoding")
def _logits(config: Model, params: Params, x_BTD: jax.Array) -> jax.Array:
    """logits_TV of the one row of `_read`."""
    return gpt.logits(config, params, x_BTD)[0]


@functools.partial(jax.jit, donate_argnames="layers")
def _noise(layers: Any) -> Any:
    """An empty cache with random keys and values, in all rows the same."""
    leaves, tree = jax.tree.flatten(layers)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noise = [
        jax.random.normal(key, a.shape[1:], a.dtype) for key, a in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, [a + x for a, x in zip(leaves, noise, strict=True)])


@jax.jit
def _written(layers: Any, row_B: jax.Array, at_B: jax.Array) -> list[jax.Array]:
    """Each layer's key and value of one place of each of these rows, (B, K, H)."""
    return [a[row_B, :, at_B] for a in jax.tree.leaves(layers)]


@jax.jit
def _logprob(logits_BV: jax.Array, id_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """That of each row's token, and the logarithm of what the softmax divides by."""
    picked_B = jnp.take_along_axis(logits_BV, id_B[:, None], axis=1)[:, 0]
    scale_B = jax.lax.map(jax.nn.logsumexp, logits_BV)  # as in `_draw`
    return picked_B - scale_B, scale_B


@functools.partial(jax.jit, static_argnames="vocab_size")
def _top(vocab_size: int, logits_BV: jax.Array, scale_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """logprobs and ids of the likeliest tokens that the tokenizer knows; of equal ones the first."""
    values, ids = jax.lax.top_k(logits_BV[:, :vocab_size], min(TOP, vocab_size))
    return values - scale_B[:, None], ids


@functools.partial(jax.jit, static_argnames="vocab_size")
def _draw(
    vocab_size: int,
    logits_BV: jax.Array,
    tokens_BS: jax.Array,
    length_B: jax.Array,
    knobs: Knobs,
    seed_B: jax.Array,
    choice_B: jax.Array,
) -> jax.Array:
    """The next token of each row, as `decode` draws it.

    Row after row: so no sum is another among more rows, and a row pays for what it asks for.
    """

    def draw(row: Any) -> jax.Array:
        logits_V, tokens_S, length, (temperature, k, p, penalty), seed, choice = row
        x_V = logits_V[:vocab_size]

        def penalised() -> jax.Array:
            seen_V = jnp.zeros(vocab_size, bool).at[tokens_S].set(True, mode="drop")
            return decode.penalise(x_V, seen_V, penalty)

        x_V = jax.lax.cond(penalty != 1, penalised, lambda: x_V)

        def by_chance() -> jax.Array:
            y_V = x_V / temperature
            keep = decode.keep_largest
            y_V = jax.lax.cond(k > 0, lambda y: keep(y, jnp.ones_like(y), k), lambda y: y, y_V)
            y_V = jax.lax.cond(p < 1, lambda y: keep(y, jax.nn.softmax(y), p), lambda y: y, y_V)
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), choice), length + 1)
            return jax.random.categorical(key, y_V)

        drawn = jax.lax.cond(temperature > 0, by_chance, lambda: jnp.argmax(x_V))
        return drawn.astype(jnp.int32)

    return jax.lax.map(draw, (logits_BV, tokens_BS, length_B, knobs, seed_B, choice_B))
