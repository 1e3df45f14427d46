"""Text generation: token ids in, token ids out, with a key-value cache.

The prompts of a batch are padded on the right and read at once, all but the last token of
each. From there one compiled loop reads a token of every row and draws the next, until all
rows have ended or it has made as many steps as it was asked for; streaming is the same loop
asked for few. Keys of padding lie beyond a row's length, where no query looks, and are
overwritten as the row grows.

The token at index i of row b is drawn with a key folded from (seed, b, i), so a text depends
neither on the rows around it nor on how many steps a call makes, and a text that is cut and
given back as a prompt goes on as it would have.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gptjax import model as gpt
from gptjax import sharding
from gptjax.config import ConfigError, Model, Sample, UserError, check_seed
from gptjax.layers.blocks import Blocks
from gptjax.layers.linear import by_kernels, by_sums, keep, turn
from gptjax.layers.parameter import Adapted, Scaled, Spec, Turned, widen
from gptjax.losses import log_likelihood
from gptjax.model import Params

# Lengths are rounded up to a multiple of this, so that texts of like length share a program.
ROUND = 64
# A token costs as much as the cache has slots, so it begins with so many and has 4 times as many
# each time they are full: few programs, and a short text costs the same whatever it may become.
ROOM = 128


@dataclasses.dataclass(frozen=True)
class Text:
    """What was generated for one prompt.

    Attributes:
        ids: the new tokens, without the one that stopped the text.
        ended: "stop": a stop token was drawn; "length": `sample.max_new_tokens` is reached;
            "context": prompt and text fill `model.context`; None: it goes on.
    """

    ids: list[int]
    ended: str | None


class Sampling(NamedTuple):
    """The knobs of `config.Sample` that change logits. None is off, without temperature greedy.

    A pytree: a program is compiled for which knobs are on, not for their values.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None


def penalise(logits_V: jax.Array, seen_V: jax.Array, penalty: jax.typing.ArrayLike) -> jax.Array:
    """Makes seen tokens less likely for a penalty above 1 (Keskar et al. 2019, section 4.1).

    The paper divides the logit, which makes a negative one more likely: those are multiplied.
    """
    weaker = jnp.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    return jnp.where(seen_V, weaker, logits_V)


def keep_largest(logits_V: jax.Array, weight_V: jax.Array, enough: jax.Array) -> jax.Array:
    """The largest logits, as few as together weigh at least `enough`; the others become -inf.

    Logits equal to the smallest one kept stay too, so nothing depends on the order of ids.
    The largest always stays.

    It halves the range of possible thresholds 32 times, which finds the exact one among all
    float32 values and is 20 times faster than sorting 50,257 logits on a CPU.
    """
    # As integers the bits of floats >= 0 are in order, those of floats < 0 in reverse order.
    bits_V = jax.lax.bitcast_convert_type(logits_V, jnp.int32)
    order_V = jnp.where(bits_V < 0, bits_V ^ 0x7FFFFFFF, bits_V)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        holds = jnp.sum(jnp.where(order_V >= middle, weight_V, 0)) >= enough
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle - 1)

    threshold, _ = jax.lax.fori_loop(0, 32, halve, (order_V.min(), order_V.max()))
    return jnp.where(order_V >= threshold, logits_V, -jnp.inf)


def transform(logits_V: jax.Array, seen_V: jax.Array | None, sampling: Sampling) -> jax.Array:
    """The logits that a token is drawn from, float32; -inf where it cannot be.

    Args:
        logits_V: the model's, float32.
        seen_V: bool, the tokens of prompt and text; needed for the repetition penalty only.
        sampling: which transforms apply, always in this order.
    """
    temperature, k, p, penalty = sampling
    if penalty is not None and seen_V is not None:
        logits_V = penalise(logits_V, seen_V, penalty)
    if temperature is not None:
        logits_V = logits_V / temperature
    if k is not None:  # Fan et al. 2018, section 5.4
        logits_V = keep_largest(logits_V, jnp.ones_like(logits_V), jnp.asarray(k))
    if p is not None:  # the nucleus: Holtzman et al. 2020, section 3.1
        logits_V = keep_largest(logits_V, jax.nn.softmax(logits_V), jnp.asarray(p))
    return logits_V


class State(NamedTuple):
    """Texts being written; row b is tokens_BS[b, : length_B[b] + 1].

    Attributes:
        cache: of `model.init_cache`; it holds all tokens of a row but the last, and length_B.
        tokens_BS: int32 prompts and texts, each token at its index.
        end_B: int32 tokens at which a row ends.
        done_B: whether it has ended. Such a row is computed along, to no effect.
    """

    cache: Params
    tokens_BS: jax.Array
    end_B: jax.Array
    done_B: jax.Array


class Weights(NamedTuple):
    """Parameters as every step of `stream` uses them: matrices cast or rounded, layers apart."""

    params: Params


@functools.partial(jax.jit, static_argnames="config")
@sharding.phase("decoding")
def cast(config: Model, params: Params) -> Weights:
    """A copy of the tree of `init` for `stream`: made once, not for each token or text.

    What is in `Blocks` stays so.
    """

    def store(parameter: Any, spec: Spec) -> jax.Array | Scaled | Turned | Blocks | Adapted:
        if isinstance(parameter, Blocks):
            return parameter
        dtype = jnp.float32 if spec.exact else config.dtype
        parameter = jax.tree.map(lambda x: x.astype(dtype), parameter)
        return turn(spec, keep(config.products, spec, parameter))

    specs = gpt.abstract_params(config)
    leaf = lambda leaf: isinstance(leaf, Adapted | Blocks)  # noqa: E731
    kept = jax.tree.map(store, widen(params), specs, is_leaf=leaf)
    return Weights(gpt.split_layers(config, kept))


@dataclasses.dataclass
class Kept:
    """The cache of texts that are over, for texts that begin alike: the turns of a dialogue.

    Attributes:
        texts: the tokens of each row whose keys and values are cached.
        layers: those, of `model.init_cache`; None before the first text.
        tokens_read: tokens a row of the last prompts that were read, padding left out.
    """

    texts: list[list[int]] = dataclasses.field(default_factory=list)
    layers: Any = None
    tokens_read: int = 0

    @property
    def room(self) -> int:
        """Slots a row."""
        return self.layers[0]["key"].shape[2]

    def common(self, texts: Sequence[Sequence[int]]) -> int:
        """How many first tokens every row shares with what is cached; 0 of other rows."""
        if self.layers is None or len(texts) != len(self.texts):
            return 0
        return min(map(_common, texts, self.texts))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    same = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(same, min(len(a), len(b)))


@functools.partial(jax.jit, static_argnames=("config", "rows", "room"))
@sharding.phase("decoding")
def empty_layers(config: Model, rows: int, room: int) -> Any:
    """The layers of a cache of `model.init_cache` that holds nothing."""
    return gpt.init_cache(config, rows, room)["layers"]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="layers")
@sharding.phase("decoding")
def _begin(
    config: Model,
    params: Params,
    layers: Any,
    start_B: jax.Array,
    unread_BT: jax.Array,
    tokens_BS: jax.Array,
    n_B: jax.Array,
    end_B: jax.Array,
) -> State:
    """Reads what a cache of `start_B` tokens lacks of all but the last of each row's n_B tokens."""
    tokens_BS = sharding.shard(tokens_BS, "BS")
    start_B, n_B, end_B = (sharding.shard(a, "B") for a in (start_B, n_B, end_B))
    cache: Any = {"layers": layers, "length": start_B}
    if unread_BT.shape[1]:
        unread_BT = sharding.shard(unread_BT, "BT")
        cache = gpt.hidden(config, params, unread_BT, cache=cache).cache
    return State(cache | {"length": n_B - 1}, tokens_BS, end_B, n_B >= end_B)


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"), donate_argnames="state")
@sharding.phase("decoding")
def _advance(
    config: Model,
    vocab_size: int,
    params: Params,
    state: State,
    sampling: Sampling,
    stop_ids: jax.Array,
    key: jax.Array,
    count: jax.Array,
) -> tuple[State, tuple[jax.Array, ...]]:
    """At most `count` more tokens a row. Returns the state, and what the host reads of it."""

    def goes_on(carry: tuple[jax.Array, State]) -> jax.Array:
        return (carry[0] < count) & ~carry[1].done_B.all()

    def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        tokens_made, (cache, tokens_BS, end_B, done_B) = carry
        new_cache: Any
        length_B, index_S = cache["length"], jnp.arange(tokens_BS.shape[1])
        last_B = jnp.where(index_S == length_B[:, None], tokens_BS, 0).sum(1)
        x_BTD, new_cache, _ = gpt.hidden(config, params, last_B[:, None], cache=cache)
        logits_BV = gpt.logits(config, params, x_BTD)[:, 0]
        row_B = jnp.arange(len(length_B))
        new_B = _draw(logits_BV, tokens_BS, length_B, row_B, sampling, vocab_size, key)
        length_B = jnp.where(done_B, length_B, length_B + 1)
        here_BS = (index_S == length_B[:, None]) & ~done_B[:, None]
        tokens_BS = jnp.where(here_BS, new_B[:, None], tokens_BS)
        done_B |= (new_B[:, None] == stop_ids).any(1) | (length_B + 1 >= end_B)
        new_cache |= {"length": length_B}
        return tokens_made + 1, State(new_cache, tokens_BS, end_B, done_B)

    _, state = jax.lax.while_loop(goes_on, step, (jnp.zeros((), jnp.int32), state))
    view = (state.tokens_BS, state.cache["length"], state.done_B)
    # Whole on every device, so that every process of a cluster can read it.
    return state, view if sharding.out("B") is None else jax.reshard(view, P())


@functools.partial(jax.jit, static_argnames="room")
def _grow(arrays: Any, room: int) -> Any:
    """A cache, or tokens_BS too, with room for more tokens a row."""

    def pad(a: jax.Array) -> jax.Array:
        before = [(0, 0)] * (2 if a.ndim == 4 else 1)  # BKSH, or BS
        shape = [*before, (0, room - a.shape[len(before)])]
        return jnp.pad(a, shape + [(0, 0)] * (a.ndim - len(shape)))

    return jax.tree.map(pad, arrays)


def _draw(
    logits_BV: jax.Array,
    tokens_BS: jax.Array,
    length_B: jax.Array,
    row_B: jax.Array,
    sampling: Sampling,
    vocab_size: int,
    key: jax.Array,
) -> jax.Array:
    """The next token of each row, int32 below `vocab_size`; rows do not see one another."""

    def one(
        logits_V: jax.Array,
        tokens_S: jax.Array,
        length: jax.Array,
        row: jax.Array,
        sampling: Sampling,
        key: jax.Array,
    ) -> jax.Array:
        seen_V = None
        if sampling.repetition_penalty is not None:
            # Slots beyond the text count as a token beyond the vocabulary, which is dropped.
            tokens_S = jnp.where(jnp.arange(tokens_S.size) <= length, tokens_S, vocab_size)
            seen_V = jnp.zeros(vocab_size, bool).at[tokens_S].set(True, mode="drop")
        logits_V = transform(logits_V[:vocab_size], seen_V, sampling)
        if sampling.temperature is None:
            return jnp.argmax(logits_V).astype(jnp.int32)
        key = jax.random.fold_in(jax.random.fold_in(key, row), length + 1)
        return jax.random.categorical(key, logits_V).astype(jnp.int32)

    rows: Any = jax.vmap(one, in_axes=(0, 0, 0, 0, None, None))
    operands = (logits_BV, tokens_BS, length_B, row_B)
    if sharding.out("B") is None:
        return rows(*operands, sampling, key)
    # A row is drawn from all its logits, so their second dim is whole, like that of "BS".
    specs = tuple(sharding.spec(dims) for dims in ("BS", "BS", "B", "B"))
    draw: Any = jax.shard_map(rows, in_specs=(*specs, P(), P()), out_specs=sharding.spec("B"))
    return draw(*jax.reshard(operands, specs), sampling, key)


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"))
def draw_again(
    config: Model,
    vocab_size: int,
    params: Params,
    x_BTD: jax.Array,
    row_B: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What `stream` draws at temperature 1 after each token of texts, had it their stream x_BTD.

    Args:
        params: whose logits they are.
        x_BTD: of `model.hidden`.
        row_B: the number that each text has among those of `stream`.
        key: of the seed of `stream`.

    Returns:
        The token after each, and its log-likelihood in nats, float32: both (B, T).
    """
    logits_BTV = sharding.shard(gpt.logits(config, params, x_BTD), "BSV")  # rows whole
    B, T = x_BTD.shape[:2]

    def at(index: jax.Array) -> jax.Array:
        logits_BV = logits_BTV.at[:, index].get(out_sharding=sharding.out("BV"))
        length_B, no_tokens = jnp.full(B, index), jnp.zeros((B, 1), jnp.int32)
        return _draw(logits_BV, no_tokens, length_B, row_B, Sampling(1.0), vocab_size, key)

    ids_BT = jax.lax.map(at, jnp.arange(T)).T
    drawn = ids_BT, log_likelihood(logits_BTV, ids_BT)
    # Whole on every device, so that every process of a cluster can read it.
    return drawn if sharding.out("B") is None else jax.reshard(drawn, P())


def stream(
    config: Model,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    sample: Sample,
    *,
    seed: int,
    vocab_size: int,
    end_of_text: int,
    stop_ids: Collection[int] = (),
    chunk: int = 1,
    kept: Kept | None = None,
) -> Iterator[list[Text]]:
    """Continues each prompt and yields the new tokens of every row as they are made.

    Where a mesh is set it runs on it, on any number of prompts.

    Args:
        config: the architecture.
        weights: of `cast`.
        prompts: ids of each row; an empty one starts from end-of-text.
        sample: how to draw, and how long; its texts `prompt` and `stop` are the caller's to
            encode, and `batch_size` the caller's to repeat.
        seed: with the row's number and a token's index it decides every draw.
        vocab_size: ids the tokenizer knows, at most `config.vocab_size`; no other is drawn.
        end_of_text: ends a text, like the ids of `stop_ids`.
        stop_ids: further ids that end a text.
        chunk: tokens a row between two yields, at most.
        kept: the cache of the prompts and texts of an earlier call with these weights. Of
            prompts that begin like them only the rest is read; it is brought up to date at each
            yield.

    Raises:
        UserError: without a prompt, on one longer than the context or with an id outside the
            vocabulary, or a text longer than dynamic RoPE scaling can be cached for.
    """
    check_seed(seed)
    if not prompts:
        raise UserError("there is no prompt: give one or more")
    texts = [list(prompt) or [end_of_text] for prompt in prompts]
    _check(texts, config.context, vocab_size)
    # No text is longer than the context; more could not be counted in 32 bits.
    stops, most = sorted({end_of_text, *stop_ids}), min(sample.max_new_tokens, config.context)
    longest = max(map(len, texts))
    # A dialogue goes on: sizes that do not depend on one turn's length share their programs.
    whole = min(config.context, _round_up(longest + most))
    size = whole if kept is None else config.context
    check_length(config, longest + most)
    narrow = config.dtype == "bfloat16" or config.products == "int8"
    with sharding.phase("decoding"):
        # Of one row, a narrow product takes XLA longer than of two, on CPUs ten times as long.
        one = by_kernels() or (by_sums() and config.products == "dtype")
        fewest = 2 if narrow and not one else 1
        surplus = sharding.round_up(max(fewest, len(texts)), "B") - len(texts)
    n_B = np.array([len(text) for text in texts] + [1] * surplus, np.int32)
    room = _room(longest, size)
    start = 0 if kept is None else min(kept.common(texts), longest - 1)
    if kept is not None and start:
        room = max(room, kept.room)
        layers = kept.layers if room == kept.room else _grow(kept.layers, room)
    else:
        layers = empty_layers(config, len(n_B), room)
    # So many columns, from `start`, hold what is unread; earlier ones are read again if need be.
    width = min(room, _round_up(longest - 1 - start))
    start = min(start, room - width)
    read = longest - 1 - start
    tokens_BS = np.zeros((len(n_B), room), np.int32)
    for row, text in enumerate(texts):
        tokens_BS[row, : len(text)] = text
    end_B = np.minimum(n_B + most, config.context)
    end_B[len(texts) :] = 0  # surplus rows have ended before they begin
    params, start_B = weights.params, np.full(len(n_B), start, np.int32)
    unread_BT = tokens_BS[:, start : start + width]
    state = _begin(config, params, layers, start_B, unread_BT, tokens_BS, n_B, end_B)
    key, stop_array = jax.random.key(seed), np.array(stops, np.int32)
    length_B, done_B = n_B - 1, n_B >= end_B
    sent, going = [0] * len(texts), True
    while going:
        if kept is not None:
            kept.layers = None  # given away
        left = chunk
        while True:
            longest = int(length_B.max(initial=0, where=~done_B)) + 1  # of those that go on
            if longest >= room:
                room = _room(longest, size)
                layers, tokens_BS = _grow((state.cache["layers"], state.tokens_BS), room)
                cache = state.cache | {"layers": layers}
                state = state._replace(cache=cache, tokens_BS=tokens_BS)
            count = min(left, room - longest)
            state, view = _advance(
                config, vocab_size, params, state, _sampling(sample), stop_array, key, count
            )
            tokens, length_B, done_B = jax.device_get(view)
            left -= count
            if not left or done_B.all():
                break
        new = []
        for row, n in enumerate(n_B[: len(texts)]):
            ids, ended = tokens[row, n : length_B[row] + 1].tolist(), None
            if done_B[row]:
                ended = "length" if len(ids) == most else "context"
            if ids and ids[-1] in stops:
                ids, ended = ids[:-1], "stop"
            new.append(Text(ids[sent[row] :], ended))
            sent[row] = len(ids)
        if kept is not None:
            kept.layers, kept.tokens_read = state.cache["layers"], read
            kept.texts = [tokens[row, : length_B[row]].tolist() for row in range(len(texts))]
        yield new
        going = any(text.ended is None for text in new)


def generate(
    config: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sample: Sample,
    **options: Any,
) -> list[Text]:
    """Continues each prompt to its end: `stream` with no stop but for a larger cache."""
    weights = cast(config, params)
    return next(stream(config, weights, prompts, sample, chunk=sample.max_new_tokens, **options))


def _sampling(sample: Sample) -> Sampling:
    greedy = sample.temperature == 0  # the largest logit is always kept
    return Sampling(
        None if greedy else sample.temperature,
        None if greedy else sample.top_k,
        None if greedy or sample.top_p == 1 else sample.top_p,
        None if sample.repetition_penalty == 1 else sample.repetition_penalty,
    )


def _check(texts: list[list[int]], context: int, vocab_size: int) -> None:
    for row, text in enumerate(texts):
        if len(text) > context:
            raise UserError(
                f"prompt {row} has {len(text)} tokens, more than the context of {context}: shorten it"
            )
        if not 0 <= min(text) <= max(text) < vocab_size:
            raise UserError(
                f"prompt {row} has a token id outside [0, {vocab_size}): encode it with the "
                "tokenizer that the model was trained with"
            )


def check_length(config: Model, length: int) -> None:
    """Refuses a text of `length` tokens (or as many as the context takes) that cannot be cached.

    Raises:
        ConfigError: beyond where dynamic RoPE scaling turns all earlier keys anew.
    """
    length = min(config.context, length)
    dynamic = config.position == "rope" and config.rope_scaling == "dynamic"
    original = config.rope_original_context
    if dynamic and original is not None and length > original:
        raise ConfigError(
            f"a text of {length} tokens is beyond model.rope_original_context={original}, where "
            "model.rope_scaling='dynamic' changes the keys that are cached: make it shorter"
        )


def _room(tokens: int, size: int) -> int:
    """Slots of a cache that holds so many tokens and has room for one more: `size` at most."""
    room = ROOM
    while room <= tokens:
        room *= 4
    return min(room, size)


def _round_up(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND
