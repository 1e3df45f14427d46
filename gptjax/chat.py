"""Dialogues as a pretrained model was taught to read them: its own chat template.

Templates are programs that came with the weights, so they run in jinja2's sandbox. They are given
all that `transformers` 5 gives them (`utils/chat_template_utils.py`), and nothing else.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptjax.config import UserError
from gptjax.tokenizer import Tokenizer

# Set into a message's text to break up the name of a special token. Unicode calls it no
# character, so no text has it.
BREAK = "\ufdd0"


def encode(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids that a model continues with its answer: those of `render`, by `ids`."""
    return ids(tokenizer, render(tokenizer, messages))


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], answer: bool = True) -> str:
    """The text of a dialogue; in what a message says the names of special tokens are broken up.

    What a message says is plain text: "<|im_end|>" in it does not end the turn.

    Args:
        tokenizer: one with a chat template.
        messages: [{"role": "user", "content": "What is the capital of France?"}, ...]; a value
            may be a list or dict of texts too.
        answer: whether what begins an answer follows.

    Raises:
        UserError: if there is no template, or it refuses the dialogue, which may not be empty.
    """
    template = template_of(tokenizer)
    if not messages:
        raise UserError("the dialogue is empty: give at least one message")
    special = _special(tokenizer)

    def guarded(value: Any) -> Any:
        match value:
            case str():
                return special.sub(lambda m: m[0][0] + BREAK + m[0][1:], value)
            case Mapping():
                return {key: guarded(item) for key, item in value.items()}
            case list() | tuple():
                return [guarded(item) for item in value]
        return value

    guarded_messages = [
        {k: guarded(v) for k, v in message.items() if v is not None} for message in messages
    ]
    try:
        return _compiled(template).render(
            messages=guarded_messages,
            tools=None,
            documents=None,
            add_generation_prompt=answer,
            **tokenizer.template_names,
        )
    except Exception as error:  # a template may fail in any way that a program can
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"the chat template refuses this dialogue: {reason}") from error


def template_of(tokenizer: Tokenizer) -> str:
    """The chat template.

    Raises:
        UserError: if there is none.
    """
    if tokenizer.chat_template is None and tokenizer.template_choice:
        raise UserError(
            f"tokenizer {tokenizer.name!r} has no chat template to take: "
            f"{tokenizer.template_choice}; rename one, or write it to chat_template.jinja"
        )
    if tokenizer.chat_template is None:
        raise UserError(
            f"tokenizer {tokenizer.name!r} has no chat template: this model was not taught to "
            "hold a dialogue; let it continue a text instead"
        )
    return tokenizer.chat_template


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of what `render` made."""
    found: list[int] = []
    for i, part in enumerate(_special(tokenizer).split(text)):  # every second one is special
        found += [tokenizer.specials[part]] if i % 2 else tokenizer.encode(part.replace(BREAK, ""))
    return found


def _special(tokenizer: Tokenizer) -> re.Pattern[str]:
    """A special token's name, one group."""
    names = sorted(tokenizer.specials, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, names)) + ")")


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} round what the assistant says: shown as it is.

    A variable that is set inside is not seen outside.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2 types it as an instance's)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_shown"), [], [], body).set_lineno(line)

    def _shown(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """A name that begins with an underscore, which may lead out of the sandbox, is refused."""

    def __init__(*args: Any, **values: Any) -> None:  # "self" may be one of the values
        values = dict(*args[1:], **values)
        for name in values:
            _public(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        jinja2.utils.Namespace.__setitem__(self, _public(name), value)


def _public(name: str) -> str:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")
    return name


class _Dict:
    """`dict` without its other attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template cannot be read: {error}") from error
