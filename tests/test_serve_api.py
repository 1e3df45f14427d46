"""OpenAI's forms, by the official client and by whoever means ill."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax import chat, tokenizer
from gptjax.serve import api
from gptjax.serve.api import Refused, Writer
from gptjax.serve.job import TOP
from tests import tiny
from tests.test_serve_engine import Heard, engine_of, finish

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
app = pytest.importorskip("gptjax.serve.app")

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and loop.index0 %}"
    "{{ raise_exception('a system turn stands first') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BYTES = dataclasses.replace(tokenizer.load("bytes"), chat_template=TEMPLATE)
CONTEXT = 256
MODEL = tiny.model(vocab_size=264, context=CONTEXT, position="rope")
SERVED = api.Served("tiny", BYTES, CONTEXT, 0)
SLOTS = 4
MESSAGES = [{"role": "user", "content": "What does the cat see?"}]


class Serving(NamedTuple):
    url: str
    app: Any
    engine: Any

    def client(self, **about: Any) -> Any:
        about = {"api_key": "none", "max_retries": 0, "timeout": 60} | about
        return openai.OpenAI(base_url=f"{self.url}/v1", **about)


@contextmanager
def serving(
    texts: Any, served: api.Served = SERVED, token: str | None = None, hosts: Any = None
) -> Iterator[Serving]:
    made = app.App(served, texts, token, hosts)
    server = uvicorn.Server(uvicorn.Config(made.asgi, port=0, lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Serving(f"http://127.0.0.1:{port}", made, texts)
    server.should_exit = True
    thread.join(30)


@functools.cache
def texts() -> Any:
    made = engine_of(MODEL, SLOTS, BYTES.vocab_size)
    made.start()
    return made


@pytest.fixture(scope="module")
def running() -> Iterator[Serving]:
    with serving(texts()) as running:
        yield running


@pytest.fixture(scope="module")
def client(running: Serving) -> Any:
    return running.client()


@functools.cache
def alone() -> Any:
    return engine_of(MODEL, SLOTS, BYTES.vocab_size)


def expected(prompt: list[int], most: int, **about: Any) -> Heard:
    """What the engine itself writes."""
    job = Heard(prompt, most, stop_ids=BYTES.stops, **about)
    finish(alone(), job)
    return job


def text_of(ids: list[int]) -> str:
    return BYTES.decode([i for i in ids if i != BYTES.eot])


def test_a_completion_is_what_the_engine_writes(client: Any) -> None:
    answer = client.completions.create(model="tiny", prompt="the cat", temperature=0, max_tokens=9)
    job = expected(BYTES.encode("the cat"), 9)
    (choice,) = answer.choices
    assert choice.text == text_of(job.ids)
    assert choice.finish_reason == job.ended and choice.logprobs is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (7, len(job.ids))
    assert usage.total_tokens == 7 + len(job.ids) and answer.object == "text_completion"


def test_prompts_times_n(client: Any) -> None:
    """Texts of a list are those of its parts, and the choices of a seed are always the same."""
    prompts = ["the cat", [116, 104, 101], "x" * 150]
    with_ids = [prompts[0], BYTES.decode(prompts[1]), prompts[2]]
    knobs = {"model": "tiny", "seed": 3, "max_tokens": 8, "n": 3}
    answer = client.completions.create(prompt=with_ids, **knobs)
    assert [choice.index for choice in answer.choices] == list(range(9))
    each = [client.completions.create(prompt=prompt, **knobs) for prompt in prompts]
    written = [choice.text for part in each for choice in part.choices]
    assert [choice.text for choice in answer.choices] == written
    assert len(set(written)) == 9
    assert answer.usage.prompt_tokens == 7 + 3 + 150
    first = client.completions.create(prompt=prompts[0], **knobs | {"n": 1})
    assert first.choices[0].text == written[0]
    ids = client.completions.create(prompt=[prompts[1], [120] * 150], **knobs)
    assert [choice.text for choice in ids.choices] == written[3:]


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_tells_what_an_answer_does(client: Any, n: int) -> None:
    asked = {
        "model": "tiny", "messages": MESSAGES, "seed": 1, "n": n, "max_completion_tokens": 30,
        "logprobs": True, "top_logprobs": 2, "stop": ["e", "th"],
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    parts = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": parts[-1].usage.prompt_tokens_details}
    )
    assert all(part.usage is None for part in parts[:-1])
    assert len({part.id for part in parts}) == 1
    for choice in whole.choices:
        told = [c for part in parts for c in part.choices if c.index == choice.index]
        assert told[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in told) == choice.message.content
        assert [c.finish_reason for c in told if c.finish_reason] == [choice.finish_reason]
        assert told[-1].finish_reason
        tokens = [token for c in told if c.logprobs for token in c.logprobs.content]
        assert tokens == choice.logprobs.content
    assert whole.usage.completion_tokens == sum(len(c.logprobs.content) for c in whole.choices)


def test_completions_stream(client: Any) -> None:
    asked = {
        "model": "tiny",
        "prompt": "the",
        "seed": 1,
        "max_tokens": 20,
        "echo": True,
        "logprobs": 1,
    }
    (whole,) = client.completions.create(**asked).choices
    parts = [c for part in client.completions.create(**asked, stream=True) for c in part.choices]
    assert "".join(part.text for part in parts) == whole.text
    assert whole.text.startswith("the")
    for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
        told = [item for part in parts for item in getattr(part.logprobs, name)]
        assert told == getattr(whole.logprobs, name)


def test_events_are_server_sent(running: Serving) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "stream": True}
    answer = httpx.post(f"{running.url}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_logprobs_of_a_completion(client: Any) -> None:
    answer = client.completions.create(
        model="tiny", prompt="the é", temperature=0, max_tokens=5, logprobs=2, echo=True
    )
    job = expected(BYTES.encode("the é"), 5, top=True, echo=True)
    told = [token for news in job.news for token in (*news.prompt, *news.text)]
    (choice,) = answer.choices
    got = choice.logprobs
    assert len(got.tokens) == len(told) == 6 + len(job.ids)
    assert got.token_logprobs == [None, *(token.logprob for token in told[1:])]
    assert got.tokens[:6] == ["t", "h", "e", " ", "bytes:\\xc3", "bytes:\\xa9"]
    assert got.text_offset[:5] == [0, 1, 2, 3, 4]
    assert choice.text[: got.text_offset[6]] == "the é"
    assert got.top_logprobs[0] is None
    for token, top in zip(told[1:], got.top_logprobs[1:], strict=True):
        likeliest = {api.token_name(BYTES, i): value for i, value in token.top[:2]}
        assert top == likeliest | {api.token_name(BYTES, token.id): token.logprob}


def test_nothing_but_the_prompt(client: Any) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["the cat", "a"], max_tokens=0, echo=True, logprobs=0
    )
    assert [choice.text for choice in answer.choices] == ["the cat", "a"]
    assert [len(choice.logprobs.tokens) for choice in answer.choices] == [7, 1]
    assert answer.usage.completion_tokens == 0
    assert {choice.finish_reason for choice in answer.choices} == {"length"}


def test_logprobs_of_a_chat(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    (choice,) = answer.choices
    job = expected(chat.encode(BYTES, MESSAGES), 4, top=True)
    tokens = [token for news in job.news for token in news.text]
    for entry, token in zip(choice.logprobs.content, tokens, strict=True):
        assert entry.logprob == token.logprob and entry.bytes == list(
            BYTES.decode_bytes([token.id])
        )
        assert [top.logprob for top in entry.top_logprobs] == [p for _, p in token.top[:3]]
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy
    bare = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=4, logprobs=True
    )
    assert bare.choices[0].message.content == choice.message.content
    assert all(entry.top_logprobs == [] for entry in bare.choices[0].logprobs.content)


def test_a_chat_goes_on_to_the_end_of_its_context(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=0)
    if answer.choices[0].finish_reason == "length":
        assert answer.usage.total_tokens == CONTEXT


def test_an_end_token_ends_a_text_and_is_counted(client: Any) -> None:
    """A text that ends by itself is found by trying seeds."""
    for seed in range(20):
        answer = client.completions.create(
            model="tiny", prompt="a", max_tokens=200, seed=seed, temperature=2, logprobs=0
        )
        (choice,) = answer.choices
        if choice.finish_reason == "stop":
            break
    assert choice.finish_reason == "stop" and "<|endoftext|>" not in choice.text
    assert choice.logprobs.tokens[-1] == "<|endoftext|>"
    assert answer.usage.completion_tokens == len(choice.logprobs.tokens) < 200


def test_parts_of_a_message_are_one_text(client: Any) -> None:
    parts = [{"type": "text", "text": "What does "}, {"type": "text", "text": "the cat see?"}]
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 5}
    a = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **asked)
    b = client.chat.completions.create(messages=MESSAGES, **asked)
    assert a.choices[0].message.content == b.choices[0].message.content


def test_what_was_read_is_told(client: Any) -> None:
    asked = {"model": "tiny", "prompt": "y" * 140, "max_tokens": 1}
    client.completions.create(**asked)
    answer = client.completions.create(**asked)
    assert answer.usage.prompt_tokens_details.cached_tokens == 128


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "gptjax"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


CHAT, TEXT = "chat/completions", "completions"
WRONG: list[tuple[str, dict[str, Any], str, int]] = [
    (TEXT, {"model": "gpt-4"}, "model", 404),
    (TEXT, {"model": 3}, "model", 400),
    (TEXT, {"model": None}, "model", 400),
    (TEXT, {"n": 10**9}, "n", 400),
    (TEXT, {"n": 0}, "n", 400),
    (TEXT, {"n": True}, "n", 400),
    (TEXT, {"n": 100, "prompt": ["a", "b"]}, "n", 400),
    (TEXT, {"max_tokens": 10**400}, "max_tokens", 400),
    (TEXT, {"max_tokens": -1}, "max_tokens", 400),
    (TEXT, {"max_tokens": 0}, "max_tokens", 400),
    (TEXT, {"max_tokens": CONTEXT}, "prompt", 400),
    (TEXT, {"max_tokens": 1.5}, "max_tokens", 400),
    (TEXT, {"prompt": "a" * 300}, "prompt", 400),
    (TEXT, {"prompt": []}, "prompt", 400),
    (TEXT, {"prompt": [[]]}, "prompt", 400),
    (TEXT, {"prompt": [257]}, "prompt", 400),
    (TEXT, {"prompt": [-1]}, "prompt", 400),
    (TEXT, {"prompt": [2**70]}, "prompt", 400),
    (TEXT, {"prompt": [True]}, "prompt", 400),
    (TEXT, {"prompt": ["a", [1]] * 100}, "prompt", 400),
    (TEXT, {"prompt": {"a": 1}}, "prompt", 400),
    (TEXT, {"prompt": "\ud800"}, "prompt", 400),
    (TEXT, {"temperature": -1}, "temperature", 400),
    (TEXT, {"temperature": "hot"}, "temperature", 400),
    (TEXT, {"top_p": 1.1}, "top_p", 400),
    (TEXT, {"stop": ["a"] * 17}, "stop", 400),
    (TEXT, {"stop": ""}, "stop", 400),
    (TEXT, {"stop": [3]}, "stop", 400),
    (TEXT, {"seed": -1}, "seed", 400),
    (TEXT, {"seed": 2**32}, "seed", 400),
    (TEXT, {"logprobs": TOP + 1}, "logprobs", 400),
    (TEXT, {"logprobs": True}, "logprobs", 400),
    (TEXT, {"stream": "yes"}, "stream", 400),
    (TEXT, {"stream_options": {"include_usage": True}}, "stream_options", 400),
    (TEXT, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", 400),
    (TEXT, {"frequency_penalty": 0.5}, "frequency_penalty", 400),
    (TEXT, {"presence_penalty": -1}, "presence_penalty", 400),
    (TEXT, {"logit_bias": {"50256": -100}}, "logit_bias", 400),
    (TEXT, {"best_of": 3}, "best_of", 400),
    (TEXT, {"suffix": "!"}, "suffix", 400),
    (TEXT, {"min_p": 0.1}, "min_p", 400),
    (CHAT, {"messages": []}, "messages", 400),
    (CHAT, {"messages": "hello"}, "messages", 400),
    (CHAT, {"messages": [3]}, "messages[0]", 400),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0]", 400),
    (CHAT, {"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, "messages[0]", 400),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]", 400),
    # What the template itself refuses, and what fills the context.
    (CHAT, {"messages": [*MESSAGES, {"role": "system", "content": "x"}]}, "messages", 400),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 300}]}, "messages", 400),
    (CHAT, {"chat_template": "{{ 1 }}"}, "chat_template", 400),
    (CHAT, {"tools": [{"type": "function"}]}, "tools", 400),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format", 400),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", 400),
    (CHAT, {"echo": True}, "echo", 400),
]  # fmt: skip
RIGHT: dict[str, Any] = {TEXT: {"prompt": "a"}, CHAT: {"messages": MESSAGES}}


def ask(running: Serving, path: str, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "max_tokens": 2, **RIGHT[path], **fields}
    return post(running, path, json.dumps(body).encode())


def post(running: Serving, path: str, body: Any, **headers: str) -> httpx.Response:
    headers = {"Content-Type": "application/json"} | headers
    return httpx.post(f"{running.url}/v1/{path}", content=body, headers=headers, timeout=60)


def refused(answer: httpx.Response, status: int, param: str | None = None) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["param"] == param and len(error["message"]) < 300
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")


@pytest.mark.parametrize("path, fields, param, status", WRONG, ids=str)
def test_what_is_wrong_is_refused(
    running: Serving, path: str, fields: dict[str, Any], param: str, status: int
) -> None:
    refused(ask(running, path, **fields), status, param)


@pytest.mark.parametrize(
    "path, fields",
    [
        (TEXT, {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "suffix": None}),
        (TEXT, {"best_of": 2, "n": 2, "user": "me"}),
        (TEXT, {"top_k": 3, "repetition_penalty": 1.2, "top_p": 0}),
        (TEXT, {"temperature": 1e-40}),
        (CHAT, {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}),
        (CHAT, {"store": False, "metadata": {"a": "b"}, "stream_options": None}),
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_nothing_may_be_said(
    running: Serving, path: str, fields: dict[str, Any]
) -> None:
    assert ask(running, path, **fields).status_code == 200


def test_the_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a" * 300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"3", b'"a"', b"[]", b"null",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}', b'{"n": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', b'{"model": "tiny"} x',
    ],
    ids=lambda body: str(body[:40]),
)  # fmt: skip
def test_what_is_no_request_is_refused(running: Serving, body: bytes) -> None:
    answer = post(running, TEXT, body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_other_ways_in_are_refused(running: Serving) -> None:
    refused(post(running, TEXT, b"{}", **{"Content-Type": "text/plain"}), 415)
    refused(httpx.get(f"{running.url}/v1/completions"), 405)
    refused(httpx.get(f"{running.url}/v1/../secret"), 404)
    refused(httpx.get(f"{running.url}/v1/embeddings"), 404)


def test_a_long_body_is_refused(running: Serving) -> None:
    """100 MB, without a length beforehand; it is not read to its end."""
    sent = 0

    def parts() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b" " * 1_000_000

    try:
        refused(post(running, TEXT, parts()), 413)
    except httpx.TransportError:  # the connection was closed under its hands
        assert sent < 100
    assert ask(running, TEXT).status_code == 200


def test_a_body_that_does_not_come_is_refused(
    running: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "PATIENCE", 0.2)
    with raw(running, b'{"model"', length=100) as connection:
        assert b" 408 " in connection.recv(1000).split(b"\r\n")[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["tiny", "a", 1, 0, -1, 2**63, 0.5, "user", "system", "text"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "include_usage"]) | st.text(max_size=5),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
NAMES = sorted(
    {*api.LABELS, *api.EITHER, *api.COMPLETION_ONLY, *api.CHAT_ONLY, "prompt", "messages"}
    | {"n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "stream"}
    | {"repetition_penalty", "stream_options", "seed", "stop", "logprobs", "top_logprobs", "echo"}
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), JSON, max_size=5), st.booleans()
)
def test_any_request_is_read_or_refused(fields: dict[str, Any], talk: bool) -> None:
    read, path = (api.chat_completion, CHAT) if talk else (api.completion, TEXT)
    try:
        asked = read(SERVED, {"model": "tiny", **RIGHT[path], **fields})
    except Refused as refusal:
        answer = refusal
    else:
        answer = None
    if answer is not None:
        assert 400 <= answer.status < 500 and len(str(answer)) < 400
        return
    assert len(asked.prompts) * asked.n <= api.MOST_TEXTS and 0 <= asked.seed < 2**32
    for prompt, most in zip(asked.prompts, asked.most, strict=True):
        assert 0 < len(prompt) <= len(prompt) + most <= CONTEXT
        assert all(0 <= i < BYTES.vocab_size for i in prompt)
    assert all(math.isfinite(knob) for knob in asked.knobs)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()), st.booleans())
def test_the_server_lives_whatever_comes(running: Serving, body: bytes, talk: bool) -> None:
    assert 400 <= post(running, CHAT if talk else TEXT, body).status_code < 500


def stopped(text: str, stops: list[str]) -> tuple[str, bool]:
    """A text up to the stop text that is complete first, letter by letter."""
    for end in range(len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: end - max(map(len, ends))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="abé😀", max_size=12),
    st.lists(st.text(alphabet="abé😀", min_size=1, max_size=4), max_size=3),
)
@example("aab", ["ab"])
@example("abab", ["abb", "baa"])
def test_a_text_ends_before_its_stop(text: str, stops: list[str]) -> None:
    writer, told = Writer(BYTES, stops), []
    for i in BYTES.encode(text):
        told.append(writer.add(i))
        held = stopped(text, stops)[0]
        assert held.startswith("".join(told))  # nothing is told that is taken back
    assert ("".join(told) + writer.end(), writer.stopped) == stopped(text, stops)


@given(st.binary(max_size=12), st.integers(0, 12))
def test_texts_are_those_of_the_tokenizer(content: bytes, special: int) -> None:
    ids = list(content)
    writer = Writer(BYTES)
    with_special = [*ids[:special], BYTES.eot, *ids[special:]]
    text = "".join(map(writer.add, with_special)) + writer.end()
    assert text == BYTES.decode(ids)


# --- who may ask, and how much ------------------------------------------------------------------


def test_a_token_is_wanted() -> None:
    with serving(texts(), token="secret") as running:
        assert running.client(api_key="secret").models.list().data[0].id == "tiny"
        for key in ("wrong", "secret2", "séc"):
            answer = httpx.get(
                f"{running.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()}
            )
            refused(answer, 401)
        refused(httpx.get(f"{running.url}/metrics"), 401)
        refused(post(running, TEXT, b"{}"), 401)
        assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
        assert "<textarea" in httpx.get(running.url).text


def test_another_name_does_not_lead_here() -> None:
    with serving(texts(), hosts=["127.0.0.1"]) as running:
        assert httpx.get(f"{running.url}/health").status_code == 200
        answer = httpx.get(f"{running.url}/health", headers={"Host": "evil.example"})
        assert answer.status_code == 400


@pytest.mark.parametrize(
    "host, alone",
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_only_loopback_needs_no_token(host: str, alone: bool) -> None:
    assert app.is_loopback(host) == alone


def test_more_than_can_wait_is_refused(running: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MOST_WAITING", 3)
    refused(ask(running, TEXT, n=4), 429)
    assert ask(running, TEXT, n=3).status_code == 200


def test_a_server_that_goes_refuses(running: Serving) -> None:
    running.app.draining = True
    try:
        refused(ask(running, TEXT), 503)
        assert httpx.get(f"{running.url}/health").status_code == 503
    finally:
        running.app.draining = False


@contextmanager
def raw(running: Serving, body: bytes, length: int | None = None) -> Iterator[socket.socket]:
    port = int(running.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body) if length is None else length, body)
        )
        yield connection


LONG = {"model": "tiny", "prompt": "a", "max_tokens": 250, "n": 64, "seed": 0}


def until_idle(running: Serving) -> None:
    deadline = time.monotonic() + 30
    while running.engine.busy or running.engine.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_is_gone_frees_its_rows(running: Serving, stream: bool) -> None:
    until_idle(running)
    before = running.engine.counts.text_tokens
    with raw(running, json.dumps(LONG | {"stream": stream}).encode()):
        while running.engine.counts.text_tokens < before + 10:
            time.sleep(0.001)
    until_idle(running)
    assert running.engine.counts.text_tokens - before < 64 * 250 / 2


def test_a_client_that_does_not_read_keeps_nobody_waiting(running: Serving) -> None:
    with raw(running, json.dumps(LONG | {"stream": True, "n": 4}).encode()):
        assert ask(running, TEXT).status_code == 200
        deadline = time.monotonic() + 60
        while running.engine.busy or running.engine.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_many_at_once_are_what_each_is_alone(running: Serving) -> None:
    async def all_of() -> list[Any]:
        client = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=120)
        return await asyncio.gather(
            *(
                client.completions.create(
                    model="tiny", prompt="the " * (i % 7 + 1), seed=i, max_tokens=5 + i, logprobs=1
                )
                for i in range(24)
            )
        )

    for i, answer in enumerate(asyncio.run(all_of())):
        job = expected(BYTES.encode("the " * (i % 7 + 1)), 5 + i, seed=i, knobs=api.Knobs(1.0))
        tokens = [token for news in job.news for token in news.text]
        assert answer.choices[0].text == text_of(job.ids)
        assert answer.choices[0].logprobs.token_logprobs == [token.logprob for token in tokens]


def test_metrics_are_prometheus(running: Serving) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    ask(running, TEXT, prompt="z" * 130)
    ask(running, TEXT, prompt="z" * 130)
    ask(running, TEXT, n=0)
    text = httpx.get(f"{running.url}/metrics").text
    families = {f.name: f for f in parser.text_string_to_metric_families(text)}
    value = {(s.name, *s.labels.values()): s.value for f in families.values() for s in f.samples}
    counts = running.engine.counts
    assert value["gptjax_prompt_tokens_total",] == counts.prompt_tokens
    assert value["gptjax_cached_tokens_total",] >= 128
    assert value["gptjax_text_tokens_total",] == counts.text_tokens
    assert [int(k[1]) for k in value if k[0] == "gptjax_writes_total"] == running.engine.sizes
    assert value["gptjax_writes_total", str(running.engine.sizes[0])] >= 2
    assert value["gptjax_requests_total", "/v1/completions", "200"] >= 2
    assert value["gptjax_requests_total", "/v1/completions", "400"] >= 1
    assert families["gptjax_request_seconds"].type == "histogram"
    buckets = [v for k, v in value.items() if k[0] == "gptjax_request_seconds_bucket"]
    assert buckets == sorted(buckets)
    assert buckets[-1] == value["gptjax_request_seconds_count",] > 0
    assert np.isfinite(value["gptjax_first_token_seconds_sum",])
