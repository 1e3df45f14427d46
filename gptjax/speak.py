"""Generation as a person meets it: text in, text out, shown while it is made."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from gptjax import decode, trained
from gptjax.chat import encode as encode_dialogue
from gptjax.config import Config, ConfigError, UserError
from gptjax.progress import from_process_0, say
from gptjax.tokenizer import Tokenizer

CHUNK = 4  # tokens between two looks at what was made


class Speaker(NamedTuple):
    """A model ready to speak: its settled config, and weights of `decode.cast`."""

    config: Config
    weights: decode.Weights
    tokenizer: Tokenizer


@contextlib.contextmanager
def opened(
    model: trained.Trained, check: Callable[[Config, Tokenizer], object] | None = None
) -> Iterator[Speaker]:
    """As `trained.opened`; the parameters are not kept beside the weights."""
    with trained.opened(model, check, blocks=True) as at_hand:
        config, tokenizer = at_hand.config, at_hand.tokenizer
        weights = decode.cast(config.model, at_hand.params)
        del at_hand
        yield Speaker(config, weights, tokenizer)


def generate(config: Config, weights: decode.Weights, tokenizer: Tokenizer) -> list[str]:
    """Continues `sample.prompt` `sample.batch_size` times, printing the texts.

    A single text appears while it is made; of several each appears when all are done. The same
    seed gives the same texts.

    Args:
        weights: of `decode.cast`, which one cast makes for any number of texts.

    Returns:
        The continuations, without the prompt.

    Raises:
        ConfigError: as `check_sample`.
    """
    ids = check_sample(config, tokenizer)
    sample, single = config.sample, config.sample.batch_size == 1
    stops = {*tokenizer.stops}
    if sample.stop is not None:
        stops.add(_one_token(sample.stop, tokenizer))
    if single:
        print_text(sample.prompt, end="")
    texts = _write(config, weights, tokenizer, [ids] * sample.batch_size, stops, live=single)
    for row, text in enumerate(texts) if not single else ():
        print_text(f"--- text {row}\n{sample.prompt}{text}")
    return texts


def answer(
    config: Config, weights: decode.Weights, tokenizer: Tokenizer, dialogue: list[dict[str, str]]
) -> str:
    """Prints and returns the model's answer to a dialogue, in its own chat template.

    Args:
        weights: of `decode.cast`.
        dialogue: [{"role": "user", "content": "What is the capital of France?"}, ...].

    Raises:
        UserError: if the model has no chat template, or the dialogue fills the context.
    """
    return _answer(config, weights, tokenizer, encode_dialogue(tokenizer, dialogue))


def _answer(
    config: Config,
    weights: decode.Weights,
    tokenizer: Tokenizer,
    dialogue_ids: list[int],
    kept: decode.Kept | None = None,
) -> str:
    _check_room(config, dialogue_ids)
    # A turn ends with a token of its own, which `stops` has beside end-of-text.
    stops = set(tokenizer.stops)
    return _write(config, weights, tokenizer, [dialogue_ids], stops, True, kept)[0].strip()


def chat(
    config: Config, weights: decode.Weights, tokenizer: Tokenizer, system: str | None = None
) -> None:
    """A dialogue with whoever types into standard input, until an empty line or its end.

    Of each turn only what is new is read: the cache of the turns before it is kept. When the
    dialogue with an answer no longer fits into the context, the oldest turns go, and what is left
    is read anew.
    """
    kept = decode.Kept()
    first = system_turn(system)
    turns: list[dict[str, str]] = []
    room = config.model.context - min(config.sample.max_new_tokens, config.model.context // 2)
    while message := _hear():
        turns.append({"role": "user", "content": message})
        while len(ids := encode_dialogue(tokenizer, first + turns)) > room and len(turns) > 1:
            del turns[:2]
            say("(the context is full: the oldest turns are forgotten)")
        reply = _answer(config, weights, tokenizer, ids, kept)
        turns.append({"role": "assistant", "content": reply})


def _hear() -> str:
    """A line from the standard input of process 0, on every process; "" at its end."""
    line = ""
    if jax.process_index() == 0:
        with contextlib.suppress(EOFError):
            line = input("> ").strip()
    return from_process_0(line)


def system_turn(text: str | None) -> list[dict[str, str]]:
    """What stands before a dialogue: one message, or none."""
    return [] if text is None else [{"role": "system", "content": text}]


def check_chat(config: Config, tokenizer: Tokenizer, system: str | None) -> None:
    """As `check_dialogues`, of the shortest dialogue that `chat` could hold."""
    check_dialogues(config, tokenizer, [[*system_turn(system), {"role": "user", "content": "?"}]])


def check_dialogues(
    config: Config, tokenizer: Tokenizer, dialogues: Sequence[list[dict[str, str]]]
) -> None:
    """Refuses what cannot be answered before a model is loaded; says which template was taken.

    Raises:
        UserError: as `answer`.
    """
    for dialogue in dialogues:
        _check_room(config, encode_dialogue(tokenizer, dialogue))
    if tokenizer.template_choice:
        say(f"chat template: {tokenizer.template_choice}")


def _check_room(config: Config, dialogue_ids: list[int]) -> None:
    if len(dialogue_ids) >= config.model.context:
        raise UserError(
            f"the dialogue has {len(dialogue_ids)} tokens, which leaves no room for an answer in "
            f"model.context={config.model.context}: shorten it"
        )


def _write(
    config: Config,
    weights: decode.Weights,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    stops: set[int],
    live: bool,
    kept: decode.Kept | None = None,
) -> list[str]:
    """The continuation of each prompt; `live` prints the first while it is made."""
    writers = [_Writer(tokenizer) for _ in prompts]
    ended: list[str | None] = [None] * len(prompts)
    for news in decode.stream(
        config.model,
        weights,
        prompts,
        config.sample,
        seed=config.seed,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.eot,
        stop_ids=stops,
        # Alike on all processes of a cluster: they compute along though only one prints.
        chunk=CHUNK if live else config.sample.max_new_tokens,
        kept=kept,
    ):
        for row, (writer, new) in enumerate(zip(writers, news, strict=True)):
            text = writer.add(new.ids)
            ended[row] = new.ended
            if live and row == 0:
                print_text(text, end="")
    if live:
        print_text("")
    if "context" in ended:
        say(f"(the context of {config.model.context} tokens is full)")
    return [writer.text for writer in writers]


def print_text(text: str, end: str = "\n") -> None:
    """Prints on standard output, from process 0 alone."""
    if jax.process_index() == 0:
        print(text, end=end, flush=True)


def check_sample(config: Config, tokenizer: Tokenizer) -> list[int]:
    """The ids of `sample.prompt`; refuses what cannot be generated before a model is trained.

    Raises:
        ConfigError: if `sample.stop` is not one token, the prompt is longer than the context, or
            the text longer than dynamic RoPE scaling can be cached for.
    """
    if config.sample.stop is not None:
        _one_token(config.sample.stop, tokenizer)
    ids = tokenizer.encode(config.sample.prompt)
    if tokenizer.bos is not None:
        ids = [tokenizer.bos, *ids]
    if len(ids) > config.model.context:
        raise ConfigError(
            f"sample.prompt has {len(ids)} tokens, more than model.context={config.model.context}: "
            "shorten it"
        )
    # An empty prompt starts from end-of-text.
    decode.check_length(config.model, max(1, len(ids)) + config.sample.max_new_tokens)
    return ids


@dataclasses.dataclass
class _Writer:
    """Turns tokens into text as they come: a character's bytes may span several tokens.

    Where the tokens end within a character, the beginning of it is left out.
    """

    tokenizer: Tokenizer
    text: str = ""

    def __post_init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, ids: list[int]) -> str:
        new = self._decoder.decode(self.tokenizer.decode_bytes(ids))
        self.text += new
        return new


def _one_token(text: str, tokenizer: Tokenizer) -> int:
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise ConfigError(
            f"sample.stop={text!r} is {len(ids)} tokens of {tokenizer.name!r}: give a text of one"
        )
    return ids[0]
