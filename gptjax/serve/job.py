"""What the engine is asked for and what it tells: no jax here, and no HTTP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

TOP = 20  # likeliest tokens that are told beside the one that was drawn


class Knobs(NamedTuple):
    """How a text is drawn; with these values the likeliest token always.

    Arrays of one for each row in a program. As of `config.Sample`, but off is 0 of `top_k` and 1
    of `top_p` and `repetition_penalty`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


GREEDY = Knobs()


class Scored(NamedTuple):
    """A token of a text, drawn or of its prompt.

    Attributes:
        id: the token.
        logprob: nats, by the model itself: no knob changes it. NaN of a prompt's first token.
        top: the likeliest tokens there with theirs, the likeliest first, `TOP` if there are as
            many; empty if nobody asked.
    """

    id: int
    logprob: float
    top: list[tuple[int, float]]


class News(NamedTuple):
    """What is new of a text.

    Attributes:
        prompt: tokens of the prompt, each once and in order; only if `Job.echo`.
        text: tokens that were drawn, the one that ends the text among them.
        ended: as `decode.Text`; "failed": the engine is no more.
    """

    prompt: list[Scored]
    text: list[Scored]
    ended: str | None


@dataclasses.dataclass(eq=False)
class Job:
    """A text that is asked for.

    Attributes:
        prompt: its ids, at least one.
        most: tokens to draw at most; 0 only reads the prompt.
        knobs: how they are drawn.
        seed: with `choice` and a token's index it decides every draw, in [0, 2^32).
        choice: tells texts of one prompt and seed apart.
        stop_ids: tokens that end the text.
        top: whether `Scored.top` is told.
        echo: whether the prompt is scored. None of it then comes from the cache.
        send: is given what is new, by the engine's thread, and must not wait.
        cached: tokens of the prompt that were not read anew; told before the first news.
        cancelled: set it, and the text is written no further and `send` called no more.
    """

    prompt: list[int]
    most: int
    send: Callable[[News], None]
    knobs: Knobs = GREEDY
    seed: int = 0
    choice: int = 0
    stop_ids: frozenset[int] = frozenset()
    top: bool = False
    echo: bool = False
    cached: int = 0
    cancelled: bool = False
