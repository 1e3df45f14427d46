"""Dialogues as a pretrained model was taught to read them: its own chat template.

Templates are programs that came with the weights, so they run in jinja2's sandbox, set up as
`transformers` sets it up.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptjax.config import UserError
from gptjax.tokenizer import Tokenizer

# Set into a message's text to break up the name of a special token. Unicode calls it no
# character, so no text has it.
BREAK = "\ufdd0"


def encode(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids that a model continues with its answer.

    What a message says is plain text: "<|im_end|>" in it does not end the turn.

    Args:
        tokenizer: one with a chat template.
        messages: [{"role": "user", "content": "What is the capital of France?"}, ...].

    Raises:
        UserError: if there is no template, or it refuses the dialogue.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"tokenizer {tokenizer.name!r} has no chat template: this model was not taught to "
            "hold a dialogue; let it continue a text instead"
        )
    names = sorted(tokenizer.specials, key=len, reverse=True)
    special = re.compile("(" + "|".join(map(re.escape, names)) + ")")
    guarded = [
        {k: special.sub(lambda m: m[0][0] + BREAK + m[0][1:], text) for k, text in message.items()}
        for message in messages
    ]
    try:
        text = _compiled(tokenizer.chat_template).render(
            messages=guarded, add_generation_prompt=True, **tokenizer.template_names
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses this dialogue: {error}") from error
    ids: list[int] = []
    for i, part in enumerate(special.split(text)):  # every second part is a special token
        ids += [tokenizer.specials[part]] if i % 2 else tokenizer.encode(part.replace(BREAK, ""))
    return ids


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template cannot be read: {error}") from error
