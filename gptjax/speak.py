"""Generation as a person meets it: text in, text out, shown while it is made."""

from __future__ import annotations

import codecs
import dataclasses

import jax

from gptjax import decode, model
from gptjax.config import Config, ConfigError
from gptjax.progress import say
from gptjax.tokenizer import Tokenizer

CHUNK = 4  # tokens between two looks at what was made


def generate(config: Config, params: model.Params, tokenizer: Tokenizer) -> list[str]:
    """Continues `sample.prompt` `sample.batch_size` times, printing the texts.

    A single text appears while it is made; of several each appears when all are done. The same
    seed gives the same texts.

    Returns:
        The continuations, without the prompt.

    Raises:
        ConfigError: as `check`.
    """
    check(config, tokenizer)
    sample = config.sample
    prompts = [tokenizer.encode(sample.prompt)] * sample.batch_size
    stops = () if sample.stop is None else (_one_token(sample.stop, tokenizer),)
    writers = [_Writer(tokenizer) for _ in prompts]
    # One process of a cluster writes; the others compute along, in the same chunks.
    show, alone = jax.process_index() == 0, len(prompts) == 1
    live = show and alone
    ended: list[str | None] = [None] * len(prompts)
    if live:
        print(sample.prompt, end="", flush=True)
    for news in decode.stream(
        config.model,
        params,
        prompts,
        sample,
        seed=config.seed,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.eot,
        stop_ids=stops,
        chunk=CHUNK if alone else sample.max_new_tokens,
    ):
        for row, (writer, new) in enumerate(zip(writers, news, strict=True)):
            text = writer.add(new.ids)
            ended[row] = new.ended
            if live:
                print(text, end="", flush=True)
    if live:
        print(flush=True)
    elif show:
        for row, writer in enumerate(writers):
            print(f"--- text {row}\n{sample.prompt}{writer.text}", flush=True)
    if "context" in ended:
        say(f"(the context of {config.model.context} tokens is full)")
    return [writer.text for writer in writers]


def check(config: Config, tokenizer: Tokenizer) -> None:
    """Refuses what cannot be generated, for before a model is loaded or trained.

    Raises:
        ConfigError: if `sample.stop` is not one token, or the prompt is longer than the context.
    """
    if config.sample.stop is not None:
        _one_token(config.sample.stop, tokenizer)
    tokens = len(tokenizer.encode(config.sample.prompt))
    if tokens > config.model.context:
        raise ConfigError(
            f"sample.prompt has {tokens} tokens, more than model.context={config.model.context}: "
            "shorten it"
        )


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
