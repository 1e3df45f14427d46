"""The engine: what `decode` writes, and bit for bit the same whatever stands beside a text."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import decode
from gptjax import model as gpt
from gptjax.config import ConfigError, Model, UserError
from gptjax.layers.attention import TILES
from gptjax.serve import engine
from gptjax.serve.engine import PIECE, Engine
from gptjax.serve.job import TOP, Job, Knobs, News
from tests import tiny

V, KNOWN = 64, 60  # the model's vocabulary is padded by four ids
EOT = KNOWN - 1
CONTEXT = 400  # more than three tiles
MODEL = tiny.model(vocab_size=V, context=CONTEXT, position="rope", kv_heads=2, heads=4)
# What the kernel of the cache, or a batch, could do otherwise.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"position": "learned", "norm_placement": "sandwich", "logit_softcap": 5.0},
    {"position": "alibi", "attention_softcap": 2.0, "value_residual": True},
    {"windows": (150, None), "kv_heads": 1, "qk_norm": True, "tied": False},
    {"products": "int8"},
    {"dtype": "bfloat16"},
    {"feedforward": "swiglu_experts", "experts": 4, "ff_dim": 24},
]
KNOBS = [
    Knobs(), Knobs(1.0), Knobs(0.8, 10), Knobs(0.7, 0, 0.9), Knobs(1.5, 20, 0.8, 1.3),
    Knobs(0.0, 0, 1.0, 1.5),
]  # fmt: skip
SLOTS = 4


def weights_of(config: Model, seed: int = 0) -> decode.Weights:
    rng = np.random.default_rng(seed)
    # The scale makes logits of size 1 or so: no near ties between the largest.
    make = lambda spec: np.asarray(rng.normal(spec.mean, 0.4, spec.shape), np.float32)  # noqa: E731
    return decode.cast(config, jax.tree.map(make, gpt.abstract_params(config)))


def engine_of(config: Model = MODEL, slots: int = SLOTS, known: int = KNOWN) -> Engine:
    made = Engine(config, weights_of(config), vocab_size=known, slots=slots)
    made.warm_up()
    return made


@functools.cache
def shared() -> Engine:
    """For tests that leave it idle: its programs are compiled once."""
    return engine_of()


class Heard(Job):
    """A job that keeps what it is told."""

    def __init__(self, prompt: list[int], most: int, **about: Any) -> None:
        self.news: list[News] = []
        super().__init__(prompt, most, self.news.append, **about)

    @property
    def ids(self) -> list[int]:
        return [token.id for news in self.news for token in news.text]

    @property
    def ended(self) -> str | None:
        return self.news[-1].ended if self.news else None

    @property
    def bits(self) -> list[Any]:
        """All that it was told, floats as their bits."""

        def bits(x: float) -> bytes:
            return np.float64(x).tobytes()

        told = [token for news in self.news for token in (*news.prompt, *news.text)]
        return [(t.id, bits(t.logprob), [(i, bits(x)) for i, x in t.top]) for t in told]


def finish(texts: Engine, *jobs: Job) -> None:
    for job in jobs:
        texts.submit(job)
    while texts.step():
        pass


def prompt_of(rng: np.random.Generator, n: int, known: int = KNOWN - 1) -> list[int]:
    return rng.integers(0, known, n).tolist()


# In bfloat16 logits are near others.
@pytest.mark.parametrize("changes", [c for c in VARIANTS if "dtype" not in c], ids=str)
def test_a_text_is_that_of_decode(changes: dict[str, Any]) -> None:
    """In tokens: sums are in another order, and no logit is near another."""
    config = dataclasses.replace(MODEL, **changes)
    weights, texts, rng = weights_of(config), engine_of(config), np.random.default_rng(1)
    cases = list(zip(KNOBS, (1, 2, 65, 64, 130, 200), strict=True))
    number = VARIANTS.index(changes)
    for knobs, n in cases[number - 1 :: 4] if number else cases:
        prompt = prompt_of(rng, n)
        sample = tiny.sample(
            max_new_tokens=10,
            temperature=knobs.temperature,
            top_k=knobs.top_k or None,
            top_p=knobs.top_p,
            repetition_penalty=knobs.repetition_penalty,
        )
        (expected,) = next(
            decode.stream(
                config,
                weights,
                [prompt],
                sample,
                seed=n,
                vocab_size=KNOWN,
                end_of_text=EOT,
                chunk=10,
            )
        )
        job = Heard(prompt, 10, knobs=knobs, seed=n, stop_ids=frozenset([EOT]))
        finish(texts, job)
        assert (job.ids[:-1] if job.ended == "stop" else job.ids) == expected.ids
        assert job.ended == expected.ended


def asked(rng: np.random.Generator, heads: list[list[int]], known: int, most: int) -> Heard:
    """A job of any kind; its prompt may begin like others'."""
    head = heads[rng.integers(len(heads))]
    prompt = head[: rng.integers(len(head) + 1)] + prompt_of(rng, int(rng.integers(1, 80)), known)
    return Heard(
        prompt,
        int(rng.integers(0, most)),
        knobs=KNOBS[rng.integers(len(KNOBS))],
        seed=int(rng.integers(3)),
        choice=int(rng.integers(3)),
        stop_ids=frozenset([known]),
        top=bool(rng.integers(2)),
        echo=bool(rng.integers(4) == 0),
    )


def again(job: Heard) -> Heard:
    about = {f.name: getattr(job, f.name) for f in dataclasses.fields(Job)}
    for name in ("send", "cached", "cancelled"):
        del about[name]
    return Heard(**about)


def mixed(config: Model, slots: int, known: int, jobs: int, seed: int, most: int = 40) -> None:
    """Texts that come and go at random have the bits that each has alone, and nothing compiles.

    So do texts of which as few rows as are enough are computed, in the middle of one more or fewer.
    """
    rng = np.random.default_rng(seed)
    heads = [prompt_of(rng, 200, known), prompt_of(rng, 70, known)]
    texts, alone = engine_of(config, slots, known + 1), engine_of(config, slots, known + 1)
    compiled: list[str] = []
    heard = lambda event, seconds, **_: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        waiting = [asked(rng, heads, known, most) for _ in range(jobs)]
        came: list[Heard] = []
        while waiting or texts.busy or texts.waiting:
            while waiting and rng.random() < 0.4:
                came.append(waiting.pop())
                texts.submit(came[-1])
            if came and rng.random() < 0.03:
                texts.cancel(came[rng.integers(len(came))])
            texts.step()
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert [event for event in compiled if "compile" in event] == []
    assert texts.counts.cached_tokens > 0 and texts.sure
    assert set(texts.counts.writes) == set(texts.sizes)
    checked = 0
    for job in came:
        job_alone = again(job)
        # Nothing is cached for it, whatever was before.
        for slot in alone._slots:
            slot.kept = []
        finish(alone, job_alone)
        assert job_alone.cached == 0
        if not job.cancelled:
            assert job.bits == job_alone.bits and job.ended == job_alone.ended
            checked += 1
        assert job.bits == job_alone.bits[: len(job.bits)]
    assert checked > jobs // 2 and set(alone.counts.writes) == {alone.sizes[0]}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_text_does_not_depend_on_what_is_beside_it(changes: dict[str, Any]) -> None:
    mixed(dataclasses.replace(MODEL, **changes), SLOTS, KNOWN - 1, jobs=12, seed=len(str(changes)))


def as_users_compile(slots: int, changes: dict[str, Any]) -> None:
    """For a process of its own: a model whose products are large enough to be split."""
    config = tiny.model(
        vocab_size=2048, context=512, width=320, layers=2, ff_dim=864, heads=5, kv_heads=5,
        position="rope", norm="rmsnorm", feedforward="swiglu", bias=False,
    )  # fmt: skip
    config = dataclasses.replace(config, **changes)
    mixed(config, slots, 2000, jobs=12 + slots, seed=slots, most=100)
    if not changes:
        every_slot(config, slots, 2000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "slots, changes",
    [
        (8, {}),
        (32, {}),
        (8, {"dtype": "bfloat16"}),
        (8, {"products": "int8"}),
        (8, {"feedforward": "swiglu_experts", "experts": 4, "ff_dim": 192}),
        (8, {"qk_norm": True, "kv_heads": 1}),
    ],
    ids=str,
)
def test_it_holds_as_users_compile(slots: int, changes: dict[str, Any]) -> None:
    tiny.as_users_compile(
        f"from tests import test_serve_engine as t; t.as_users_compile({slots}, {changes})"
    )


@pytest.mark.parametrize(
    "fault, sizes",
    [(None, [1, 2, 4, 8, 9]), ("logits", [1, 4, 8, 9]), ("key", [1, 2, 8, 9]), ("place", [9])],
)
def test_rows_are_computed_by_programs_that_agree(
    fault: str | None, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that gives a row other bits, as made here, is left out."""

    def advance(
        config: Model, params: Any, layers: Any, row_B: Any, last_B: Any, length_B: Any
    ) -> tuple[Any, jax.Array]:
        size = len(row_B)
        logits_BV = np.sin(np.outer(last_B + 1, np.arange(V))).astype(np.float32)
        written_B = np.cos(last_B).astype(np.float32)
        if fault == "logits" and size == 2:
            logits_BV[1, 7] = np.nextafter(logits_BV[1, 7], 2)
        if fault == "key" and size == 4:
            written_B[0] = np.nextafter(written_B[0], 2)
        if fault == "place":
            logits_BV[0] *= 2
        put = lambda a: a.at[row_B, :, length_B].set(written_B[:, None, None], mode="drop")  # noqa: E731
        return jax.tree.map(put, layers), jax.numpy.asarray(logits_BV)

    monkeypatch.setattr(engine, "_advance", advance)
    texts = engine_of(slots=9)
    assert texts.sizes == sizes and texts.sure == (fault != "place")


def test_no_more_rows_are_computed_than_are_enough() -> None:
    texts = engine_of(slots=8)
    for at_once in (1, 2, 3, 5, 8):
        texts.counts.writes.clear()
        finish(texts, *(Heard([i], 3) for i in range(at_once)))
        assert set(texts.counts.writes) == {min(n for n in texts.sizes if n >= at_once)}


def test_a_step_copies_no_cache() -> None:
    """It is written in place; beside it less is taken than half a slot's row."""
    config = dataclasses.replace(MODEL, context=64 * 128, head_dim=32)
    weights, arrays = weights_of(config), [np.zeros(2, np.int32)] * 3
    layers = decode.empty_layers(config, 8, config.context)
    size = sum(a.nbytes for a in jax.tree.leaves(layers))
    advance = engine._advance.lower(config_of_tiles(config), weights.params, layers, *arrays)
    piece = (np.zeros(1, np.int32), np.zeros((1, PIECE), np.int32), np.zeros(1, np.int32))
    read = engine._read.lower(config_of_tiles(config), weights.params, layers, *piece)
    for lowered in (advance, read):
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes == size
        assert memory.temp_size_in_bytes < size / 16


def config_of_tiles(config: Model) -> Model:
    return dataclasses.replace(config, attention=TILES)


def every_slot(config: Model, slots: int, known: int) -> None:
    rng = np.random.default_rng(0)
    prompt, told, first = prompt_of(rng, 150, known), [], None
    texts = engine_of(config, slots, known)
    for number in range(slots):
        texts._slots = [engine._Slot(index) for index in range(slots)]
        before = [Heard(prompt_of(rng, 3, known), 200, knobs=Knobs(1.0)) for _ in range(number)]
        for job in before:
            texts.submit(job)
        job = Heard(prompt, 8, knobs=Knobs(1.0), top=True, echo=number % 2 == 1)
        texts.submit(job)
        while job.ended is None:
            texts.step()
            if texts._slots[number].job is job:
                told.append(number)
        bits = job.bits[len(prompt) * (number % 2) :]
        first = first or bits
        assert bits == first, f"slot {number}"
    assert set(told) == set(range(slots))


def test_a_text_does_not_depend_on_its_slot() -> None:
    every_slot(MODEL, SLOTS, KNOWN)


def test_what_was_read_is_read_once() -> None:
    texts, rng = engine_of(), np.random.default_rng(2)
    head = prompt_of(rng, 3 * PIECE)
    one, two = (Heard([*head, i], 4) for i in (1, 2))
    finish(texts, one, two)  # beside it: copied
    assert (one.cached, two.cached) == (0, 3 * PIECE)
    # After it: taken over. Its last token is not read by a piece, so the third piece is not whole.
    three, four = Heard(list(head), 4), Heard(head[: 2 * PIECE] + [3] * PIECE, 4)
    finish(texts, three)
    finish(texts, four)
    assert (three.cached, four.cached) == (2 * PIECE, 2 * PIECE)
    assert texts.counts.cached_tokens == sum(j.cached for j in (two, three, four))
    # What a text went on with was not read as a prompt is.
    long = Heard([1] * 10, 2 * PIECE)
    finish(texts, long)
    after = Heard([1] * 10 + long.ids, 1)
    finish(texts, after)
    assert after.cached == 0


def test_logprobs_are_those_of_the_model() -> None:
    """Of prompt and text, whatever the knobs; the likeliest are in order."""
    texts, rng = shared(), np.random.default_rng(3)
    job = Heard(prompt_of(rng, 100), 12, knobs=KNOBS[4], top=True, echo=True)
    finish(texts, job)
    ids = job.prompt + job.ids
    params = weights_of(MODEL).params
    logits_TV = gpt.apply(MODEL, stacked(params), np.asarray([ids], np.int32))[0]
    logprobs = np.asarray(jax.nn.log_softmax(logits_TV))  # over ids that are never drawn, too
    told = [token for news in job.news for token in (*news.prompt, *news.text)]
    assert [token.id for token in told] == ids and np.isnan(told[0].logprob)
    for i, token in enumerate(told[1:]):
        assert token.logprob == pytest.approx(logprobs[i, token.id], abs=1e-4)
        expected = sorted(logprobs[i, :KNOWN], reverse=True)[:TOP]
        np.testing.assert_allclose([p for _, p in token.top], expected, atol=1e-4)
        assert dict(token.top).get(token.id, token.logprob) == token.logprob


def stacked(params: Any) -> Any:
    """The tree of `init`, of weights whose layers stand apart."""
    return params | {"blocks": jax.tree.map(lambda *p: np.stack(p), *params["blocks"])}


def test_a_prompt_alone_is_scored() -> None:
    one, many = Heard([7], 0, echo=True), Heard([7] * 130, 0, echo=True, top=True)
    finish(shared(), one, many)
    assert [len(n.prompt) for n in one.news] == [1, 0] and one.ended == many.ended == "length"
    assert sum(len(news.prompt) for news in many.news) == 130 and many.ids == []


def test_a_cancelled_text_gives_its_slot_to_the_next() -> None:
    texts = engine_of(slots=1)
    first, waits, last = Heard([1], 300), Heard([2], 300), Heard([3], 3)
    for job in (first, waits, last):
        texts.submit(job)
    for _ in range(5):
        texts.step()
    texts.cancel(first)
    texts.cancel(waits)
    finish(texts)
    assert (len(first.ids), len(waits.ids), len(last.ids)) == (5, 0, 3)
    assert (first.ended, last.ended, texts.busy, texts.waiting) == (None, "length", 0, 0)


def test_prompts_are_read_between_tokens() -> None:
    """A long prompt keeps no other text waiting for more than a piece."""
    texts = engine_of()
    short, long = Heard([1], 30), Heard([2] * 300, 2)
    texts.submit(short)
    texts.step()
    texts.submit(long)
    for step in range(5):
        texts.step()
        assert len(short.ids) == 2 + step
    finish(texts)


@pytest.mark.parametrize(
    "job, words",
    [
        (Heard([], 1), "the prompt is empty"),
        (Heard([KNOWN], 1), "a token id outside"),
        (Heard([-1], 1), "a token id outside"),
        (Heard([1], CONTEXT), "more than the context"),
        (Heard([1], -1), "more than the context"),
    ],
)
def test_what_cannot_be_written_is_refused(job: Job, words: str) -> None:
    with pytest.raises(UserError, match=words):
        shared().submit(job)


def test_models_whose_rows_see_one_another_are_refused() -> None:
    with pytest.raises(ConfigError, match="fp8"):
        engine.check(dataclasses.replace(MODEL, products="fp8"))
    dynamic = {"rope_scaling": "dynamic", "rope_factor": 2.0, "rope_original_context": 100}
    with pytest.raises(ConfigError, match="dynamic"):
        engine.check(dataclasses.replace(MODEL, **dynamic))


def test_whoever_waits_is_told_of_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = engine_of(slots=1)

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine, "_advance", fail)
    jobs = [Heard([1], 4), Heard([2], 4)]
    for job in jobs:
        texts.submit(job)
    texts.start()
    texts._thread.join(30)  # type: ignore[union-attr]
    assert [job.ended for job in jobs] == ["failed", "failed"] and texts.failed
    with pytest.raises(UserError, match="closed"):
        texts.submit(Heard([1], 1))


def test_it_works_in_a_thread_and_ends() -> None:
    texts = engine_of()
    texts.start()
    jobs = [Heard([i], 20) for i in range(10)]
    for job in jobs:
        texts.submit(job)
    while any(job.ended is None for job in jobs):
        time.sleep(0.01)
    texts.close()
    expected = [again(job) for job in jobs]
    finish(shared(), *expected)
    assert [job.ids for job in jobs] == [job.ids for job in expected]
