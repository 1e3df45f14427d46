"""Generation as a person meets it: text in, text out, shown while it is made."""

from __future__ import annotations

import codecs
import dataclasses
import sys
from typing import TextIO

import jax

from gptjax import decode, model
from gptjax.config import Config, ConfigError
from gptjax.progress import say
from gptjax.tokenizer import Tokenizer

CHUNK = 4  # tokens between two looks at what was made


def generate(
    config: Config, params: model.Params, tokenizer: Tokenizer, out: TextIO = sys.stdout
) -> list[str]:
    """Continues `sample.prompt` `sample.batch_size` times, writing the texts to `out`.

    A single text appears while it is made; of several each appears when all are done. The same
    seed gives the same texts.

    Returns:
        The continuations, without the prompt.

    Raises:
        ConfigError: if `sample.stop` is not one token.
        UserError: if the prompt is longer than the context.
    """
    sample = config.sample
    prompts = [tokenizer.encode(sample.prompt)] * sample.batch_size
    stops = () if sample.stop is None else (_one_token(sample.stop, tokenizer),)
    writers = [_Writer(tokenizer) for _ in prompts]
    # One process of a cluster writes; the others compute along, in the same chunks.
    show, alone = jax.process_index() == 0, len(prompts) == 1
    live = show and alone
    ended: list[str | None] = [None] * len(prompts)
    if live:
        print(sample.prompt, end="", file=out, flush=True)
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
                print(text, end="", file=out, flush=True)
    if live:
        print(file=out, flush=True)
    elif show:
        for row, writer in enumerate(writers):
            print(f"--- text {row}\n{sample.prompt}{writer.text}", file=out, flush=True)
    if "context" in ended:
        say(f"(the context of {config.model.context} tokens is full)")
    return [writer.text for writer in writers]


@dataclasses.dataclass
class _Writer:
    """Turns tokens into text as they come: a character's bytes may span several tokens."""

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
