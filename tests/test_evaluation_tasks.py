"""Continuations against one unpadded forward each; LAMBADA and multiple choice by hand."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import model, tokenizer
from gptjax.cli import EXIT_USER_ERROR, main
from gptjax.config import Mesh, Model, UserError
from gptjax.evaluation import tasks
from gptjax.evaluation.tasks import TASKS, Figure, Likelihood, Request, encode, loglikelihoods
from gptjax.interop import hf
from tests import tiny

BYTES = tokenizer.load("bytes")
V, CONTEXT = 264, 40
MODEL = dataclasses.replace(
    tiny.config(Path("unused"), model__vocab_size=V).model, context=CONTEXT, attention="block"
)
MESHES = [tiny.DATA, tiny.CUBE, tiny.TENSOR, tiny.SEQUENCE]
# Nats of a continuation reach 300; the reference adds the same float32 products in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


@functools.cache
def parameters() -> model.Params:
    """Matrices so large that likelihoods differ by many nats and every token before matters."""
    drawn = jax.device_get(model.init(MODEL, 0))
    return jax.tree.map(lambda p: p * 10 if p.ndim > 1 else p, drawn)


def ask(
    requests: list[Request], config: Model = MODEL, sizes: Mesh = tiny.DATA, params: Any = None
) -> list[Likelihood]:
    with jax.set_mesh(tiny.mesh_of(sizes)):
        return loglikelihoods(config, params or parameters(), requests)


@functools.cache
def forward() -> Any:
    return jax.jit(lambda params, ids: model.apply(MODEL, params, ids))


def logits(ids: list[int]) -> np.ndarray:
    """logits_TV of one row, float64; what fills it up, ends of text, no token before can see."""
    row = np.full((1, CONTEXT), BYTES.eot)
    row[0, : len(ids)] = ids
    return np.asarray(forward()(parameters(), row), np.float64)[0, : len(ids)]


def reference(request: Request) -> Likelihood:
    """A forward of its own, float64 softmax, the tokens looked at one by one."""
    ids = (request.context + request.continuation)[-(CONTEXT + 1) :]
    logits_TV = logits(ids[:-1])
    logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    n = len(request.continuation)
    pairs = list(zip(logp_TV[len(logp_TV) - n :], request.continuation, strict=True))
    return Likelihood(sum(row[i] for row, i in pairs), all(row.argmax() == i for row, i in pairs))


def likeliest(context: list[int], count: int) -> Request:
    """A context with what greedy decoding makes of it."""
    ids = list(context)
    for _ in range(count):
        ids.append(int(logits(ids)[-1].argmax()))
    return Request(context, ids[len(context) :])


@functools.cache
def mixed() -> list[Request]:
    """Short and long ones, some longer than the context, some with a greedy continuation."""
    random = np.random.default_rng(0)
    sizes = [(1, 1), (1, 40), (5, 1), (7, 3), (12, 9), (30, 11), (39, 1), (40, 1), (60, 2), (3, 38)]
    drawn = [Request(*(random.integers(0, 256, n).tolist() for n in pair)) for pair in sizes]
    good = likeliest([1, 2, 3], 4)
    spoilt = Request(good.context, [*good.continuation[:-1], (good.continuation[-1] + 1) % V])
    return [*drawn, good, spoilt, likeliest(list(range(50, 85)), 5), Request([3, 4], [])]


def check(found: list[Likelihood], requests: list[Request]) -> None:
    wanted = [reference(request) for request in requests]
    np.testing.assert_allclose([f.nats for f in found], [w.nats for w in wanted], **CLOSE)
    assert [f.greedy for f in found] == [w.greedy for w in wanted]


def test_each_continuation_scores_as_in_a_forward_of_its_own():
    requests = mixed()
    found = ask(requests)
    check(found, requests)
    assert sum(f.greedy for f in found) == 3  # both greedy ones and the empty one
    assert len({round(f.nats) for f in found}) > 8


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_mesh_does_not_matter(sizes):
    check(ask(mixed(), sizes=sizes), mixed())


def test_neither_order_nor_batch_matters(monkeypatch: pytest.MonkeyPatch):
    forwards = ask(mixed())
    backwards = ask(mixed()[::-1])[::-1]
    monkeypatch.setattr(tasks, "AT_ONCE", 2 * CONTEXT)
    for others in (backwards, ask(mixed())):
        np.testing.assert_allclose([f.nats for f in forwards], [o.nats for o in others], **CLOSE)


def test_a_uniform_model_gives_each_token_one_in_the_vocabulary():
    zero = jax.tree.map(np.zeros_like, parameters())
    found = ask([Request([7], [0] * n) for n in (1, 2, 30)], params=zero)
    np.testing.assert_allclose([f.nats for f in found], [-n * math.log(V) for n in (1, 2, 30)])
    assert all(f.greedy for f in found)  # among equals the first is drawn, as numpy and torch do
    assert not ask([Request([7], [1])], params=zero)[0].greedy


def test_a_continuation_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="continuation 1 has 41 tokens, more than the context of"):
        ask([Request([1], [2]), Request([1], [2] * (CONTEXT + 1))])
    with pytest.raises(ValueError, match="request 0 has no token"):
        ask([Request([], [2])])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 1500), min_size=1, max_size=200))
def test_batches_hold_every_request_once_in_few_shapes(lengths):
    config = dataclasses.replace(MODEL, context=1024)
    # The places of inputs: a longer request is cut to the context.
    with jax.set_mesh(tiny.mesh(data=8)):
        batches = list(tasks._batches(np.array(lengths), config))
    assert sorted(i for chosen, _, _ in batches for i in chosen) == list(range(len(lengths)))
    assert len(batches) <= 1 + 200 // (8 * tasks.AT_ONCE // config.context)
    widths = {width for _, _, width in batches}
    assert len(widths) <= 4 * 7  # four between powers of two, 16 to 1024
    for chosen, rows, width in batches:
        cut = min(max(lengths[i] for i in chosen), config.context)
        assert len(chosen) <= rows and rows % 8 == 0
        assert cut <= width <= min(config.context, max(16, 1.25 * (cut + 15)))
        assert rows * width <= 8 * max(tasks.AT_ONCE, width)


def test_the_tokens_of_a_context_and_its_continuation():
    ids = lambda text: list(text.encode())  # noqa: E731
    assert encode(BYTES, "a cat", " sat") == (ids("a cat"), ids(" sat"))
    # Spaces of the context belong to the word that follows.
    assert encode(BYTES, "a cat \n", "sat") == (ids("a cat"), ids(" \nsat"))
    assert encode(BYTES, "", "sat") == ([BYTES.eot], ids("sat"))
    assert encode(BYTES, "  ", "sat") == ([BYTES.eot], ids("  sat"))
    begun = dataclasses.replace(BYTES, bos=7)
    assert encode(begun, "a", "b") == ([7, *ids("a")], ids("b"))
    assert encode(begun, "", "b") == ([7], ids("b"))


def test_a_continuation_is_encoded_together_with_its_context():
    gpt2 = tokenizer.load("gpt2")
    context, continuation = encode(gpt2, "The quick brown ", "foxes jump")
    assert gpt2.decode(context) == "The quick brown" and gpt2.decode(continuation) == " foxes jump"
    # The whole is "hello|ing", of which one token is the context's by count.
    assert encode(gpt2, "hel", "loing") == (gpt2.encode("hel"), gpt2.encode("ing"))
    with pytest.raises(UserError, match="'lo' has no token of its own after 'hel'"):
        encode(gpt2, "hel", "lo")


def test_the_last_word_is_what_follows_the_last_space():
    (pair,) = TASKS["lambada"].requests({"text": "he said  hello, Anna's"})
    assert pair == ("he said  hello,", " Anna's")
    assert TASKS["lambada"].requests({"text": "word"}) == [("", " word")]


def test_figures_of_last_words_by_hand():
    nats = [0.5, 1.0, 3.0, 2.0] * 5
    found = [[Likelihood(-x, x < 0.9)] for x in nats]
    figures = TASKS["lambada"].figures([{}] * 20, found)
    assert figures["perplexity"].value == pytest.approx(math.exp(1.625), rel=1e-12)
    # The bootstrap's interval of a mean of 20 lies near mean -+ 2.09 standard errors.
    half = 2.09 * np.std(nats, ddof=1) / math.sqrt(20)
    assert np.log(figures["perplexity"][1:]) == pytest.approx([1.625 - half, 1.625 + half], abs=0.1)
    assert figures["accuracy"].value == 5 / 20
    # Wilson 1927: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    z, p, n = 1.959964, 0.25, 20
    middle, spread = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    wilson = [(middle + sign * spread) / (1 + z * z / n) for sign in (-1, 1)]
    assert figures["accuracy"][1:] == pytest.approx(wilson, rel=1e-6)


def test_figures_of_choices_by_hand():
    # Of equal nats the shorter loses by the byte; "七嘴" has six bytes, though two characters.
    lines = [
        {"query": "q", "choices": ["ab", "abcd"], "gold": 0},  # right by both: -2/2 > -8/4
        {"query": "q", "choices": ["ab", "abcd"], "gold": 1},  # only by bytes: -2/2 < -3/4
        {"query": "q", "choices": ["七嘴", "abcd"], "gold": 0},  # only by bytes, not characters
    ]
    nats = [(-2.0, -8.0), (-2.0, -3.0), (-6.0, -5.0)]
    found = [[Likelihood(x, False) for x in pair] for pair in nats]
    figures = TASKS["choices"].figures(lines, found)
    assert figures["accuracy"].value == 1 / 3
    assert figures["accuracy_bytes"].value == 1
    assert figures["accuracy_bytes"].high == 1 > figures["accuracy_bytes"].low


def test_a_model_that_says_nothing_is_never_right():
    line = {"query": "q", "choices": ["a", "b"], "gold": 0}
    for nats in ((math.nan, math.nan), (math.nan, -1.0), (-1.0, math.nan)):
        found = [[Likelihood(x, False) for x in nats]]
        assert TASKS["choices"].figures([line], found)["accuracy"].value == 0


def test_a_choice_follows_the_query_and_a_space():
    line = {"query": "2 + 2 =", "choices": ["4", "five"], "gold": 0}
    assert TASKS["choices"].requests(line) == [("2 + 2 =", " 4"), ("2 + 2 =", " five")]


def test_few_documents_have_no_interval_of_perplexity():
    figures = TASKS["lambada"].figures([{}], [[Likelihood(-1.0, True)]])
    assert figures["perplexity"].value == pytest.approx(math.e)
    assert np.isnan(figures["perplexity"][1:]).all()


GOOD = {
    "lambada": {"text": "the cat sees the sun"},
    "choices": {"query": "the cat", "choices": ["sees", "is"], "gold": 1},
}
BAD: list[tuple[str, Any]] = [
    ("lambada", {"Text": "a b"}),
    ("lambada", {"text": 3}),
    ("lambada", ["text"]),
    ("choices", {"query": "q", "choices": ["a"], "gold": 1}),
    ("choices", {"query": "q", "choices": ["a"], "gold": -1}),
    ("choices", {"query": "q", "choices": ["a"], "gold": "0"}),
    ("choices", {"query": "q", "choices": ["a", ""], "gold": 0}),
    ("choices", {"query": "q", "choices": ["a", 2], "gold": 0}),
    ("choices", {"query": 1, "choices": ["a"], "gold": 0}),
    ("choices", {"query": "q", "gold": 0}),
]


@pytest.mark.parametrize("name, line", BAD)
def test_a_malformed_line_is_named(tmp_path, name, line):
    file = tmp_path / "task.jsonl"
    file.write_text(f"{json.dumps(GOOD[name])}\n{json.dumps(line)}\n")
    with pytest.raises(UserError, match=r"task.jsonl, line 2: this is no JSON object with \""):
        tasks.read_lines(TASKS[name], file, None)
    assert tasks.read_lines(TASKS[name], file, 1) == [GOOD[name]]


@pytest.mark.parametrize(
    "content, message", [(b"{", "line 1: "), (b"\xff", "line 1: "), (b"", "empty")]
)
def test_what_is_no_jsonl_is_refused(tmp_path, content, message):
    file = tmp_path / "task.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        tasks.read_lines(TASKS["lambada"], file, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a pretrained one."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    hf.export(out, MODEL, jax.tree.map(jnp.asarray, parameters()), "bytes")
    return out


def words(line: dict[str, Any]) -> list[Likelihood]:
    return [reference(encode(BYTES, *pair)) for pair in TASKS["choices"].requests(line)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve last words; multiple choice that this very model solves, but for the last line."""
    out = tmp_path_factory.mktemp("files")
    texts = [" ".join(tiny.TEXT.split()[i : i + 4]) for i in range(12)]
    lines = [{"query": text, "choices": ["sun", "cats", "owl"], "gold": 0} for text in texts]
    for line in lines:
        line["gold"] = int(np.argmax([word.nats for word in words(line)]))
    assert len({line["gold"] for line in lines}) > 1
    lines[-1]["gold"] = (lines[-1]["gold"] + 1) % 3
    rows = {"lambada": [{"text": text} for text in texts], "choices": lines}
    for name, found in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return {name: out / f"{name}.jsonl" for name in rows}


def command(folder: Path, files: dict[str, Path], *more: str) -> list[str]:
    return ["tasks", f"--workdir={folder}", *(f"--{n}={f}" for n, f in files.items()), *more]


def test_the_command_measures_what_the_model_knows(folder, files, capsys):
    assert main(command(folder, files, "--json")) == 0
    record = json.loads(capsys.readouterr().out)
    texts = [json.loads(line)["text"] for line in files["lambada"].read_text().splitlines()]
    nats = [
        reference(encode(BYTES, *TASKS["lambada"].requests({"text": t})[0])).nats for t in texts
    ]
    found = record["tasks"]["lambada"]
    assert found["perplexity"] == pytest.approx(math.exp(-np.mean(nats)), rel=1e-4)
    low, high = found["interval"]["perplexity"]
    assert low < found["perplexity"] < high
    assert (found["documents"], found["requests"]) == (12, 12)
    assert found["scored_tokens"] == sum(len(t.split()[-1]) + 1 for t in texts)
    found = record["tasks"]["choices"]
    assert found["accuracy"] == 11 / 12
    assert (found["documents"], found["requests"]) == (12, 36)
    assert record["tokenizer_sha256"] == tokenizer.load(str(folder)).fingerprint


def test_the_command_prints_figures_and_their_convention(folder, files, capsys):
    assert main(command(folder, {"choices": files["choices"]}, "--limit=3")) == 0
    out = capsys.readouterr().out
    assert "accuracy 1.0000, 95% 0.4385 – 1.0000" in out
    assert "3 documents, 9 continuations" in out
    assert TASKS["choices"].convention in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--limit=2"], "at least one of --lambada, --choices, --harness"),
        (["--lambada=nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--lambada=nowhere.jsonl", "--limit=0"], "--limit=0 is no positive number"),
    ],
)
def test_a_mistake_is_one_line(folder, capsys, words, message):
    assert main(["tasks", f"--workdir={folder}", *words]) == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_every_task_tells_its_convention_and_form():
    for name, task in TASKS.items():
        assert task.valid(GOOD[name])
        assert "accuracy" in task.convention and "harness" in task.convention
        found = [[Likelihood(-1.0, True)] * len(task.requests(GOOD[name]))]
        assert all(isinstance(f, Figure) for f in task.figures([GOOD[name]], found).values())
