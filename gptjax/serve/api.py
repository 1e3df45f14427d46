"""OpenAI's forms: what a request may say, and how an answer is written down.

A request is checked whole before anything is computed. What it asks for and is not done here is
refused, never passed over: a field is read, has to be what it would be if it were left out, or is
none of ours. See platform.openai.com/docs/api-reference/completions and .../chat.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gptjax import chat
from gptjax.config import UserError
from gptjax.serve.job import TOP, Job, Knobs, News, Scored
from gptjax.tokenizer import Tokenizer

MOST_TEXTS = 128  # of a request: prompts times n
MOST_STOPS = 16
SEEDS = 2**32
COLDEST = 1e-5  # a temperature below draws the likeliest token, as 0 does
LEAST_LOGPROB = -9999.0  # JSON has no -inf

Form = dict[str, Any]


class Refused(Exception):
    """A request that is answered by an error, in OpenAI's form.

    Args:
        param: the field that is wrong.
        status: of HTTP.
        code: a word for programs.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    @property
    def form(self) -> Form:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class Served(NamedTuple):
    """The model that is served.

    Attributes:
        name: what requests call it by.
        context: tokens of a prompt and its text.
        created: seconds since 1970.
    """

    name: str
    tokenizer: Tokenizer
    context: int
    created: int


class Asked(NamedTuple):
    """A request, checked.

    Attributes:
        chat: whether in the form of chats.
        prompts: their ids.
        most: tokens to draw for each.
        n: texts for each.
        seed: of all.
        stop: texts that end a text.
        logprobs: how many of the likeliest tokens are told at each; None: no logprobs.
        echo: the prompt is part of the text.
        stream: told while it is written.
        usage: of a stream, whether its last part counts tokens.
    """

    chat: bool
    prompts: list[list[int]]
    most: list[int]
    n: int
    knobs: Knobs
    seed: int
    stop: list[str]
    logprobs: int | None
    echo: bool
    stream: bool
    usage: bool


# --- reading ------------------------------------------------------------------------------------

# Fields that change no answer.
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")
# Fields that may only say what holds without them.
COMPLETION_ONLY: Form = {"suffix": [""], "best_of": [1]}
CHAT_ONLY: Form = {
    "audio": [], "function_call": ["none", "auto"], "functions": [[]], "modalities": [["text"]],
    "parallel_tool_calls": [True, False], "prediction": [], "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}], "store": [False], "tool_choice": ["none", "auto"],
    "tools": [[]], "verbosity": ["medium"], "web_search_options": [],
}  # fmt: skip
EITHER: Form = {"frequency_penalty": [0], "presence_penalty": [0], "logit_bias": [{}]}


class _Fields:
    """The fields of a request, each read once; `rest` are those that nobody read."""

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise Refused("the body must be a JSON object")
        self.rest: Form = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, kinds: tuple[type, ...], what: str, default: Any) -> Any:
        value = self.rest.pop(name, default)
        # In Python True is a number.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise Refused(f"{name} must be {what}", name)
        return value

    def flag(self, name: str) -> bool:
        return bool(self.take(name, (bool,), "true or false", False))

    def whole(self, name: str, default: int | None, least: int, most: int) -> Any:
        """An integer; None where there is none and that is the default."""
        what = f"an integer from {least} to {most}"
        if default is None and name not in self.rest:
            return None
        value = self.take(name, (int,), what, default)
        if not least <= value <= most:
            raise Refused(f"{name} must be {what}, not {_short(value)}", name)
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        what = f"a number from {least:g} to {most:g}"
        value = self.take(name, (int, float), what, default)
        if not least <= value <= most:  # nor is NaN
            raise Refused(f"{name} must be {what}, not {_short(value)}", name)
        return float(value)

    def only(self, allowed: Form) -> None:
        """Refuses what is asked for beyond what is done, and fields that are none."""
        for name in LABELS:
            self.rest.pop(name, None)
        for name, value in self.rest.items():
            if name not in allowed:
                raise Refused(f"{_short(name)} is no field of this request", _short(name))
            if not any(value == a and type(value) in (type(a), float) for a in allowed[name]):
                raise Refused(f"{name}={_short(value)} is not supported: leave {name} out", name)


def _short(value: Any) -> str:
    """A value as a message may show it."""
    words = value if isinstance(value, str) else type(value).__name__
    if isinstance(value, (int, float)) and abs(value) < 1e18:
        words = repr(value)
    return words if len(words) < 60 else words[:57] + "..."


def parse_json(body: bytes) -> Any:
    """What a body says, strictly.

    Raises:
        Refused: if it is no JSON, or too deep.
    """

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no number of JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise Refused("the body is nested too deeply") from None
    except ValueError as error:  # bad UTF-8 and too long an integer too
        raise Refused(f"the body is no JSON: {_short(str(error))}") from None


def completion(served: Served, body: Any) -> Asked:
    """A request to /v1/completions.

    Raises:
        Refused: saying which field is wrong.
    """
    fields = _Fields(body)
    _model(served, fields)
    prompts = _prompts(served, fields.rest.pop("prompt", "<|endoftext|>"))
    most = fields.whole("max_tokens", 16, 0, served.context)
    logprobs, echo = fields.whole("logprobs", None, 0, TOP), fields.flag("echo")
    if not most and not echo:
        raise Refused("max_tokens is 0 and echo is off: nothing is asked for", "max_tokens")
    if fields.rest.get("best_of") == fields.rest.get("n", 1):
        fields.rest.pop("best_of", None)
    asked = _common(served, fields, False, prompts, [most] * len(prompts), logprobs, echo)
    fields.only(EITHER | COMPLETION_ONLY)
    return asked


def chat_completion(served: Served, body: Any) -> Asked:
    """A request to /v1/chat/completions.

    Raises:
        Refused: as `completion`; also where the model's template refuses the dialogue.
    """
    fields = _Fields(body)
    _model(served, fields)
    messages = _messages(fields.take("messages", (list,), "a list of messages", None))
    try:
        prompt = chat.encode(served.tokenizer, messages)
    except UserError as error:
        raise Refused(str(error), "messages") from None
    room = max(0, served.context - len(prompt))
    name = "max_completion_tokens"
    if name in fields.rest:
        fields.rest.pop("max_tokens", None)  # the older name of the same
    else:
        name = "max_tokens"
    most = fields.whole(name, None, 1, served.context)
    shown = fields.flag("logprobs")
    top = fields.whole("top_logprobs", None, 0, TOP)
    if top is not None and not shown:
        raise Refused("top_logprobs needs logprobs=true", "top_logprobs")
    logprobs = (top or 0) if shown else None
    # A prompt that fills the context is refused for its length.
    each = [max(1, room) if most is None else most]
    asked = _common(served, fields, True, [prompt], each, logprobs, False)
    fields.only(EITHER | CHAT_ONLY)
    return asked


def _model(served: Served, fields: _Fields) -> None:
    name = fields.take("model", (str,), "the name of a model", None)
    if name != served.name:
        raise Refused(
            f"there is no model {_short(name)!r}, only {served.name!r}",
            "model", 404, "model_not_found",
        )  # fmt: skip


def _common(
    served: Served,
    fields: _Fields,
    chat: bool,
    prompts: list[list[int]],
    most: list[int],
    logprobs: int | None,
    echo: bool,
) -> Asked:
    for prompt, more in zip(prompts, most, strict=True):
        if not prompt:
            raise Refused("a prompt has no token: give one or more", "prompt")
        if len(prompt) + more > served.context:
            raise Refused(
                f"the context has {served.context} tokens; the prompt has {len(prompt)}, and "
                f"{more} are to come: shorten the prompt, or ask for fewer",
                "messages" if chat else "prompt", code="context_length_exceeded",
            )  # fmt: skip
    n = fields.whole("n", 1, 1, MOST_TEXTS)
    if n * len(prompts) > MOST_TEXTS:
        raise Refused(f"{len(prompts)} prompts times n={n} are more than {MOST_TEXTS} texts", "n")
    temperature = fields.number("temperature", 1, 0, 2)
    knobs = Knobs(
        temperature if temperature >= COLDEST else 0.0,
        fields.whole("top_k", 0, 0, 2**24),
        fields.number("top_p", 1, 0, 1),
        fields.number("repetition_penalty", 1, 0.01, 100),
    )
    stream = fields.flag("stream")
    options = fields.take("stream_options", (dict,), "an object", {})
    if options and (not stream or set(options) != {"include_usage"}):
        raise Refused("of stream_options there is include_usage, for streams", "stream_options")
    usage = options.get("include_usage", False)
    if not isinstance(usage, bool):
        raise Refused("stream_options.include_usage must be true or false", "stream_options")
    seed = fields.whole("seed", None, 0, SEEDS - 1)
    return Asked(
        chat=chat,
        prompts=prompts,
        most=most,
        n=n,
        knobs=knobs,
        seed=secrets.randbelow(SEEDS) if seed is None else seed,
        stop=_stops(fields.rest.pop("stop", [])),
        logprobs=logprobs,
        echo=echo,
        stream=stream,
        usage=usage,
    )


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise Refused("stop must be a text or a list of texts, none of them empty", "stop")
    if len(stops) > MOST_STOPS:
        raise Refused(f"stop has {len(stops)} texts, more than {MOST_STOPS}", "stop")
    return stops


def _prompts(served: Served, value: Any) -> list[list[int]]:
    """A text, a list of texts, ids, or a list of lists of ids."""

    def ids(value: Any) -> bool:
        return isinstance(value, list) and all(type(i) is int for i in value)

    if isinstance(value, str) or (value and ids(value)):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(p, str) or ids(p) for p in value):  # fmt: skip
        raise Refused("prompt must be a text, a list of texts, ids, or a list of lists of ids", "prompt")  # fmt: skip
    if len(value) > MOST_TEXTS:
        raise Refused(f"{len(value)} prompts are more than {MOST_TEXTS}", "prompt")
    prompts = []
    for prompt in value:
        if isinstance(prompt, str):
            prompt = _encode(served.tokenizer, prompt)
        elif not all(0 <= i < served.tokenizer.vocab_size for i in prompt):
            raise Refused(
                f"a prompt has an id outside [0, {served.tokenizer.vocab_size})", "prompt"
            )
        prompts.append(prompt)
    return prompts


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as a model reads it; an empty one is what every text begins after."""
    try:
        ids = tokenizer.encode(text)
    except UserError as error:
        raise Refused(str(error), "prompt") from None
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    return [*begin, *ids] or [tokenizer.eot]


def _messages(value: list[Any]) -> list[dict[str, str]]:
    """Roles and texts; parts of a text are put together."""
    if not value:
        raise Refused("messages is empty: give one or more", "messages")
    messages = []
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise Refused(f"{where} must be an object", where)
        content = message.get("content")
        if isinstance(content, list) and all(
            isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
            for p in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(message.get("role"), str) or not isinstance(content, str):
            raise Refused(f"{where} must have a role and a content, both text", where)
        if set(message) - {"role", "content", "name"}:
            raise Refused(f"{where} may have role, content and name only", where)
        name = {"name": message["name"]} if isinstance(message.get("name"), str) else {}
        messages.append({"role": message["role"], "content": content, **name})
    return messages


# --- writing ------------------------------------------------------------------------------------


class Writer:
    """Text from tokens as they come, up to the first stop text.

    A part that may be the beginning of a stop text, or of a character, is held back until it is
    not. Special tokens have no text.

    Attributes:
        stopped: whether a stop text was written; it is no part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._specials = frozenset(tokenizer.specials.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def add(self, id: int) -> str:
        """What is certain now."""
        content = b"" if id in self._specials else _bytes(self._tokenizer, id)
        return self._certain(self._decoder.decode(content))

    def end(self) -> str:
        """The rest, when no token follows."""
        text = self._certain(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _certain(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        places = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """How long an end of the text is that begins a stop text."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


def _bytes(tokenizer: Tokenizer, id: int) -> bytes:
    try:
        return tokenizer.decode_bytes([id])
    except KeyError:  # an id that the encoding leaves unused
        return b""


def token_name(tokenizer: Tokenizer, id: int) -> str:
    """A token as logprobs show it; of bytes that are no text as "bytes:\\xe2\\x80"."""
    content = _bytes(tokenizer, id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


@dataclasses.dataclass
class Choice:
    """A text of an answer, as far as it is written.

    Attributes:
        job: what the engine does for it; it is told the news of it alone.
        finish: "stop" or "length"; None: it goes on.
        text: all of it.
        tokens: told so far, of the prompt where it is echoed, each with where its text begins.
        drawn: how many tokens of the text.
    """

    asked: Asked
    tokenizer: Tokenizer
    index: int
    job: Job
    finish: str | None = None
    text: str = ""
    tokens: list[tuple[Scored, int]] = dataclasses.field(default_factory=list)
    drawn: int = 0

    def __post_init__(self) -> None:
        self._writer = Writer(self.tokenizer, self.asked.stop)
        self._counts = Writer(self.tokenizer)
        self._offset = 0  # where the next token's text begins
        self._told = 0  # tokens, by `delta`
        self._new = ""
        if self.asked.echo:
            prompt = Writer(self.tokenizer)
            self._write("".join(map(prompt.add, self.job.prompt)) + prompt.end())

    def take(self, news: News) -> None:
        """What the engine tells. After the end nothing changes."""
        for scored in news.prompt:
            self._place(scored)
        for scored in news.text:
            if self.finish:
                return
            if not self.drawn:
                self._counts, self._offset = Writer(self.tokenizer), len(self.text)
            self._place(scored)
            self.drawn += 1
            ends = news.ended is not None and scored is news.text[-1]
            self._write(self._writer.add(scored.id))
            if self._writer.stopped:
                self.finish = "stop"
            elif ends:
                self._write(self._writer.end())
                self.finish = "stop" if self._writer.stopped else news.ended
        if news.ended and not self.finish:  # without a token
            self.finish = news.ended

    def _write(self, text: str) -> None:
        self.text += text
        self._new += text

    def _place(self, scored: Scored) -> None:
        self.tokens.append((scored, self._offset))
        self._offset += len(self._counts.add(scored.id))

    def whole(self) -> Form:
        """The choice of an answer that is told at once."""
        form: Form = {"index": self.index, "finish_reason": self.finish}
        form["logprobs"] = self._logprobs(self.tokens)
        if self.asked.chat:
            return form | {"message": {"role": "assistant", "content": self.text, "refusal": None}}
        return form | {"text": self.text}

    def delta(self) -> Form | None:
        """What is new of it since the last call, for a stream; None: nothing."""
        tokens, self._told = self.tokens[self._told :], len(self.tokens)
        text, self._new = self._new, ""
        if not text and not self.finish and not (tokens and self.asked.logprobs is not None):
            return None
        form: Form = {"index": self.index, "finish_reason": self.finish}
        form["logprobs"] = self._logprobs(tokens)
        if self.asked.chat:
            return form | {"delta": {"content": text} if text else {}}
        return form | {"text": text}

    def _logprobs(self, tokens: list[tuple[Scored, int]]) -> Form | None:
        if self.asked.logprobs is None:
            return None
        if self.asked.chat:
            return {"content": [self._in_chat(scored) for scored, _ in tokens], "refusal": None}
        names = [token_name(self.tokenizer, scored.id) for scored, _ in tokens]
        return {
            "tokens": names,
            "token_logprobs": [_logprob(scored.logprob) for scored, _ in tokens],
            "top_logprobs": [self._likeliest(scored) for scored, _ in tokens],
            "text_offset": [offset for _, offset in tokens],
        }

    def _likeliest(self, scored: Scored) -> dict[str, float | None] | None:
        """The likeliest tokens, and the one that stands there."""
        if math.isnan(scored.logprob):
            return None
        assert self.asked.logprobs is not None
        likeliest: dict[str, float | None] = {}
        for id, logprob in [*scored.top[: self.asked.logprobs], (scored.id, scored.logprob)]:
            likeliest.setdefault(token_name(self.tokenizer, id), _logprob(logprob))
        return likeliest

    def _in_chat(self, scored: Scored) -> Form:
        def entry(id: int, logprob: float) -> Form:
            content = list(_bytes(self.tokenizer, id))
            name = token_name(self.tokenizer, id)
            return {"token": name, "logprob": _logprob(logprob), "bytes": content}

        top = [entry(*likely) for likely in scored.top[: self.asked.logprobs]]
        return entry(scored.id, scored.logprob) | {"top_logprobs": top}


def _logprob(value: float) -> float | None:
    return None if math.isnan(value) else max(value, LEAST_LOGPROB)


class Answer:
    """The answer to a request: its choices, and what is said round them.

    Args:
        send: (number of a choice, what is new of it), called by the engine's thread.
    """

    def __init__(self, served: Served, asked: Asked, send: Callable[[int, News], None]) -> None:
        self._served, self._asked = served, asked
        prefix = "chatcmpl" if asked.chat else "cmpl"
        self.id, self._created = f"{prefix}-{secrets.token_hex(12)}", int(time.time())
        self.choices: list[Choice] = []
        scored = asked.logprobs is not None
        for prompt, most in zip(asked.prompts, asked.most, strict=True):
            for choice in range(asked.n):
                index = len(self.choices)
                job = Job(
                    prompt=prompt,
                    most=most,
                    send=lambda news, index=index: send(index, news),  # type: ignore[misc]
                    knobs=asked.knobs,
                    seed=asked.seed,
                    choice=choice,
                    stop_ids=served.tokenizer.stops,
                    top=bool(asked.logprobs),
                    echo=asked.echo and scored,
                )
                self.choices.append(Choice(asked, served.tokenizer, index, job))

    @property
    def done(self) -> bool:
        return all(choice.finish for choice in self.choices)

    def whole(self) -> Form:
        kind = "chat.completion" if self._asked.chat else "text_completion"
        choices = [choice.whole() for choice in self.choices]
        return self._form(kind, choices) | {"usage": self.usage()}

    def begin(self) -> list[Form]:
        """Of a stream, what comes first."""
        if not self._asked.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        choices = [
            {"index": c.index, "delta": delta, "logprobs": None, "finish_reason": None}
            for c in self.choices
        ]
        return [self._chunk([choice]) for choice in choices]

    def part(self, choice: Choice) -> Form | None:
        """Of a stream, what is new of a choice."""
        delta = choice.delta()
        return None if delta is None else self._chunk([delta])

    def end(self) -> list[Form]:
        """Of a stream, what comes last."""
        return [self._chunk([]) | {"usage": self.usage()}] if self._asked.usage else []

    def usage(self) -> Form:
        """Tokens: of each prompt once, and all that were drawn, also those that end a text."""
        prompt = sum(map(len, self._asked.prompts))
        drawn = sum(choice.drawn for choice in self.choices)
        first = self.choices[:: self._asked.n]  # of each prompt
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_tokens_details": {"cached_tokens": sum(c.job.cached for c in first)},
        }

    def _chunk(self, choices: list[Form]) -> Form:
        kind = "chat.completion.chunk" if self._asked.chat else "text_completion"
        usage = {"usage": None} if self._asked.usage else {}
        return self._form(kind, choices) | usage

    def _form(self, kind: str, choices: list[Form]) -> Form:
        about = {"id": self.id, "object": kind, "created": self._created}
        return about | {"model": self._served.name, "choices": choices}


def models(served: Served) -> Form:
    """The answer to /v1/models."""
    return {"object": "list", "data": [model(served)]}


def model(served: Served) -> Form:
    about = {"id": served.name, "object": "model", "created": served.created}
    has_template = served.tokenizer.chat_template is not None
    return about | {"owned_by": "gptjax", "context_length": served.context, "chat": has_template}
