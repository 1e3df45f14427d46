"""Continuous batching: many texts written at once, each as if it were alone.

A fixed number of slots share one cache. Texts join and leave between two steps. A step reads at
most one piece of one prompt, and draws a token of every text whose prompt is read.

What a text becomes does not depend, to the last bit, on the texts beside it, on its slot, on when
it came, or on what the cache held of its prompt:

- There is one program for each thing that is done, whose shapes never change, so that nothing is
  compiled once `Engine.warm_up` is done and no sum is ever split otherwise. A program's rows do
  not see one another.
- Attention goes over the cache by tiles, of which a row passes over those that it does not see
  (`layers.attention.tiles`).
- A prompt, all but its last token, is read in pieces that begin at multiples of `PIECE`, whatever
  was cached, and the last one is padded. The cache of prompts holds whole pieces, as they were
  read: tokens that a text was continued with are read anew when they come back in a prompt.
- The token at index i of a text is drawn with a key folded from (seed, choice, i), as in
  `decode`, and how a row is drawn from is an array, not another program.

What rests on the compiler is that a row of a product has the same bits at every place of a batch
of one size, whatever stands in the other rows. Tests hold it for what they run on.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Sequence
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


@dataclasses.dataclass
class _Slot:
    """A row of the cache.

    Attributes:
        job: whose text it is; None: it is free.
        tokens: of prompt and text.
        read: how many of them the cache holds.
        kept: the tokens, whole pieces, whose keys and values lie there as a prompt's reading
            left them. A later job may begin with them.
        used: when it was taken last, on the engine's own clock.
    """

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
    """

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.text_tokens = self.steps = 0


class Engine:
    """Writes texts with one model on one device.

    Args:
        config: the architecture, settled.
        weights: of `decode.cast`.
        vocab_size: ids the tokenizer knows, at most `config.vocab_size`; no other is drawn.
        slots: texts that are written at once. All of them are computed at each step.

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
        self._slots = [_Slot() for _ in range(slots)]
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
        """Compiles all programs, by running each once."""
        job = Job([0] * 2, 2, lambda news: None, Knobs(1.0, 1, 0.5, 2.0), top=True, echo=True)
        self._waiting.append(job)
        while self.step():
            pass
        self._layers = _copy(self._layers, np.int32(0), np.int32(0))
        self._slots = [_Slot() for _ in self._slots]
        self.counts = Counts()

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
            inside = [slot for slot in free if hits[self._slots.index(slot)] == best]
            slot = min(inside or free, key=lambda slot: slot.used)
            if best and not inside:
                source = hits.index(best)
                to = self._slots.index(slot)
                self._layers = _copy(self._layers, np.int32(source), np.int32(to))
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
            np.int32(self._slots.index(slot)),
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
            scored = self._told(logits, next_T, stop - start, job.top)
        ended = "length" if job.most == 0 and not slot.reading else None
        if ended:
            self._end(slot, News(scored, [], ended))
        elif scored:
            job.send(News(scored, [], None))

    def _write(self, writing: Sequence[_Slot]) -> None:
        """A token of each of these slots."""
        rows = len(self._slots)
        last_B, choice_B = np.zeros((2, rows), np.int32)
        seed_B = np.zeros(rows, np.uint32)
        length_B = np.full(rows, self._room, np.int32)  # beyond the cache: idle
        tokens_BS = np.full((rows, self._room), self._vocab_size, np.int32)  # none
        knobs = [np.full(rows, value, np.float32) for value in Knobs()]
        for row, slot in enumerate(self._slots):
            if not slot.writing:
                continue
            assert slot.job is not None
            last_B[row], length_B[row] = slot.tokens[-1], slot.read
            tokens_BS[row, : len(slot.tokens)] = slot.tokens
            seed_B[row], choice_B[row] = slot.job.seed, slot.job.choice
            for knob, value in zip(knobs, slot.job.knobs, strict=True):
                knob[row] = value
        self._layers, logits_BV = _advance(
            self._config, self._params, self._layers, last_B, length_B
        )
        each: Any = Knobs(*knobs)  # type: ignore[arg-type]
        drawn = _draw(self._vocab_size, logits_BV, tokens_BS, length_B, each, seed_B, choice_B)
        new_B = np.asarray(drawn)
        some_want_top = any(slot.job is not None and slot.job.top for slot in writing)
        scored = self._told(logits_BV, new_B, rows, some_want_top)
        for slot in writing:
            job, token = slot.job, scored[self._slots.index(slot)]
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

    def _told(self, logits_BV: jax.Array, id_B: np.ndarray, count: int, top: bool) -> list[Scored]:
        """What is said of the first `count` tokens of `id_B`, drawn or given."""
        logprob_B, scale_B = _logprob(logits_BV, id_B)
        logprobs = np.asarray(logprob_B)
        tops: list[list[tuple[int, float]]] = [[]] * count
        if top:
            values, ids = (np.asarray(a) for a in _top(self._vocab_size, logits_BV, scale_B))
            tops = [
                list(zip(i.tolist(), v.tolist(), strict=True))
                for i, v in zip(ids[:count], values[:count], strict=True)
            ]
        return [Scored(int(id_B[i]), float(logprobs[i]), tops[i]) for i in range(count)]

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
    slot: jax.Array,
    tokens_BT: jax.Array,
    start_B: jax.Array,
) -> tuple[Any, jax.Array]:
    """A piece of the prompt of one slot, B = 1: the cache with it, and x_BTD."""
    own = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, slot, 1), layers)
    x_BTD, cache, _ = gpt.hidden(
        config,
        params,
        tokens_BT,
        # What pads the last piece has a position that there is, too.
        position_BT=jnp.minimum(start_B[:, None] + jnp.arange(PIECE), config.context - 1),
        cache={"layers": own, "length": start_B},
    )
    assert cache is not None
    put = lambda a, row: jax.lax.dynamic_update_slice_in_dim(a, row, slot, 0)  # noqa: E731
    return jax.tree.map(put, layers, cache["layers"]), x_BTD


@functools.partial(jax.jit, static_argnames="config", donate_argnames="layers")
@sharding.phase("decoding")
def _advance(
    config: Model,
    params: Params,
    layers: Any,
    last_B: jax.Array,
    length_B: jax.Array,
) -> tuple[Any, jax.Array]:
    """Reads the last token of each row, which stands at `length_B`; logits of the next, float32.

    A row beyond the cache is idle: what it writes falls on the last place of its row, which
    whoever needs it writes first.
    """
    x_BTD, cache, _ = gpt.hidden(
        config,
        params,
        last_B[:, None],
        # Idle rows too have a position that there is.
        position_BT=jnp.minimum(length_B, config.context - 1)[:, None],
        cache={"layers": layers, "length": length_B},
    )
    assert cache is not None
    return cache["layers"], gpt.logits(config, params, x_BTD)[:, 0]


@functools.partial(jax.jit, static_argnames="config")
@sharding.phase("decoding")
def _logits(config: Model, params: Params, x_BTD: jax.Array) -> jax.Array:
    """logits_TV of the one row of `_read`."""
    return gpt.logits(config, params, x_BTD)[0]


@jax.jit
def _logprob(logits_BV: jax.Array, id_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """That of each row's token, and the logarithm of what the softmax divides by."""
    picked_B = jnp.take_along_axis(logits_BV, id_B[:, None], axis=1)[:, 0]
    scale_B = jax.nn.logsumexp(logits_BV, axis=1)
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

    What no row asks for is left out, and changes no row that does not ask for it.
    """
    temperature_B, k_B, p_B, penalty_B = (jnp.asarray(knob) for knob in knobs)
    logits_BV, V = logits_BV[:, :vocab_size], vocab_size

    def apply(
        wanted_B: jax.Array, change: Callable[..., jax.Array], x_BV: jax.Array, *rest: jax.Array
    ) -> jax.Array:
        def changed() -> jax.Array:
            return jnp.where(wanted_B[:, None], jax.vmap(change)(x_BV, *rest), x_BV)

        return jax.lax.cond(wanted_B.any(), changed, lambda: x_BV)

    def penalise(x_V: jax.Array, tokens_S: jax.Array, penalty: jax.Array) -> jax.Array:
        seen_V = jnp.zeros(V, bool).at[tokens_S].set(True, mode="drop")
        return decode.penalise(x_V, seen_V, penalty)

    def top_k(x_V: jax.Array, k: jax.Array) -> jax.Array:
        return decode.keep_largest(x_V, jnp.ones_like(x_V), k)

    def top_p(x_V: jax.Array, p: jax.Array) -> jax.Array:
        return decode.keep_largest(x_V, jax.nn.softmax(x_V), p)

    def draw(x_V: jax.Array, seed: jax.Array, choice: jax.Array, length: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), choice), length + 1)
        return jax.random.categorical(key, x_V)

    x_BV = apply(penalty_B != 1, penalise, logits_BV, tokens_BS, penalty_B)
    greedy_B = jnp.argmax(x_BV, axis=1)
    warm_B = temperature_B > 0
    x_BV = jnp.where(warm_B[:, None], x_BV / jnp.where(warm_B, temperature_B, 1)[:, None], x_BV)
    x_BV = apply(warm_B & (k_B > 0), top_k, x_BV, k_B)
    x_BV = apply(warm_B & (p_B < 1), top_p, x_BV, p_B)
    drawn_B = jax.lax.cond(
        warm_B.any(),
        lambda: jnp.where(warm_B, jax.vmap(draw)(x_BV, seed_B, choice_B, length_B), greedy_B),
        lambda: greedy_B,
    )
    return drawn_B.astype(jnp.int32)
