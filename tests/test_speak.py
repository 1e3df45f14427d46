"""Generation in the terminal: the same text however it is shown, and whole characters."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import decode, model, speak, tokenizer, trained
from gptjax.commands import models
from gptjax.config import Config, ConfigError, UserError
from gptjax.decode import Text
from gptjax.speak import _Writer
from tests import tiny

BYTES = tokenizer.load("bytes")
CHINESE = "床前明月光，疑是地上霜。é😀"


def configure(**sample: Any) -> Config:
    config = tiny.config(Path("unused"), model__context=64, model__attention="plain")
    sample = {"max_new_tokens": 24, "top_p": None, "temperature": 1.0, **sample}
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, **sample))


PARAMS = jax.device_get(model.init(configure().model, 0))


def written(config: Config, tokenizer: tokenizer.Tokenizer) -> list[str]:
    return speak.generate(config, decode.cast(config.model, PARAMS), tokenizer)


def generate(**sample: Any) -> tuple[list[str], str, str]:
    """The texts, and what was printed on standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with (
        jax.set_mesh(tiny.mesh(data=8)),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        texts = written(configure(**sample), BYTES)
    return texts, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_a_text_is_the_same_however_it_is_shown(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    config = configure()
    with jax.set_mesh(tiny.mesh(data=8)):
        (whole,) = decode.generate(
            config.model,
            PARAMS,
            [BYTES.encode(config.sample.prompt)],
            config.sample,
            seed=config.seed,
            vocab_size=BYTES.vocab_size,
            end_of_text=BYTES.eot,
        )
    assert len(whole.ids) == 24
    # Bytes of an untrained model are no UTF-8; only a character that is not over stays away.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = decoder.decode(BYTES.decode_bytes(whole.ids))
    monkeypatch.setattr(speak, "CHUNK", chunk)
    assert generate() == ([text], f"the {text}\n", "")


def test_several_texts_are_shown_one_after_another() -> None:
    ((alone,), _, _) = generate()
    texts, out, _ = generate(batch_size=3)
    assert texts[0] == alone and len(set(texts)) == 3
    assert out == "".join(f"--- text {i}\nthe {text}\n" for i, text in enumerate(texts))


def test_a_text_ends_before_its_stop() -> None:
    ((whole,), _, _) = generate()
    stop = next(c for c in whole[1:] if c.isascii() and c.isprintable())
    ((text,), out, _) = generate(stop=stop)
    assert text == whole[: whole.index(stop)]
    assert out == f"the {text}\n"


def test_a_text_ends_before_any_token_that_ends_one() -> None:
    """As `generation_config.json` may list several; `sample.stop` is one more."""
    ((whole,), _, _) = generate()
    stop = next(c for c in whole[1:] if c.isascii() and c.isprintable())
    own = dataclasses.replace(BYTES, stops=BYTES.stops | {*BYTES.encode(stop)})
    with jax.set_mesh(tiny.mesh(data=8)), redirect_stdout(io.StringIO()):
        for sample in ({}, {"stop": "\x00"}):
            assert written(configure(**sample), own) == [whole[: whole.index(stop)]]


@pytest.mark.parametrize("prompts", [[], ()])
def test_no_prompt_at_all_is_refused(prompts: Any) -> None:
    config = configure()
    with pytest.raises(UserError, match="there is no prompt: give one or more"):
        decode.generate(
            config.model, PARAMS, prompts, config.sample, seed=0, vocab_size=257, end_of_text=256
        )


def test_a_begin_token_takes_its_place_in_the_context() -> None:
    own = dataclasses.replace(BYTES, bos=256)
    speak.check_sample(configure(prompt="x" * 63), own)
    with pytest.raises(ConfigError, match=r"prompt has 65 tokens, more than model.context=64"):
        speak.check_sample(configure(prompt="x" * 64), own)


@pytest.mark.parametrize("process", [0, 1])
def test_a_question_is_shown_once(monkeypatch: pytest.MonkeyPatch, process: int) -> None:
    opened = trained.Opened(configure(), 0, {}, BYTES)
    monkeypatch.setattr(trained, "opened", lambda *_, **__: contextlib.nullcontext(opened))
    monkeypatch.setattr(models, "model_of", lambda *_: None)
    monkeypatch.setattr(decode, "cast", lambda *_: None)
    monkeypatch.setattr(models, "prepare_jax", lambda _: None)
    monkeypatch.setattr(speak, "answer", lambda *_: "no")
    monkeypatch.setattr(jax, "process_index", lambda: process)
    words = argparse.Namespace(
        distributed=None, system=None, workdir=Path("unused"), questions=["why?", "[/b]"]
    )
    with redirect_stdout(io.StringIO()) as out:
        models.ask(words, [])
    assert out.getvalue() == ("" if process else "> why?\n> [/b]\n")


def test_a_chat_reads_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are those to each whole dialogue; what is forgotten makes it read anew."""
    template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}\n{% endfor %}a"
    own = dataclasses.replace(BYTES, chat_template=template)
    config, typed = (
        configure(max_new_tokens=8, temperature=0.0),
        ["one", "two", "three", "four", ""],
    )
    answered: list[tuple[list[int], int]] = []
    monkeypatch.setattr("builtins.input", lambda _: typed.pop(0))
    monkeypatch.setattr(decode, "ROUND", 8)  # of the 64 tokens of the context
    with jax.set_mesh(tiny.mesh(data=8)), redirect_stdout(io.StringIO()):
        weights = decode.cast(config.model, PARAMS)
        answer = speak._answer

        def compare(*words: Any) -> str:
            *same, ids, kept = words
            reply = answer(*words)
            assert reply == answer(*same, ids, decode.Kept())
            answered.append((ids, kept.tokens_read))
            return reply

        monkeypatch.setattr(speak, "_answer", compare)
        with redirect_stderr(io.StringIO()) as err:
            speak.chat(config, weights, own)
    assert "forgotten" in err.getvalue()
    (first, read_first), (second, read_second), *_ = answered
    assert read_first == len(first) - 1
    assert 0 < read_second < len(second) - len(first)


@pytest.mark.parametrize("process", [0, 1])
def test_only_process_0_reads_what_is_typed(monkeypatch: pytest.MonkeyPatch, process: int) -> None:
    """The other processes get its lines, and say the same dialogue without a word."""
    typed, sent = ["why?", ""], iter(["why?", ""])
    prompts: list[str] = []

    def read_line(prompt: str) -> str:
        prompts.append(prompt)
        return typed.pop(0)

    heard: list[list[dict[str, str]]] = []

    def encode(_: Any, dialogue: list[dict[str, str]]) -> list[int]:
        heard.append([*dialogue])
        return [1]

    monkeypatch.setattr("builtins.input", read_line)
    monkeypatch.setattr(speak, "from_process_0", lambda line: next(sent))
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(speak, "encode_dialogue", encode)
    monkeypatch.setattr(speak, "_answer", lambda *_: "because")
    with redirect_stdout(io.StringIO()) as out:
        speak.chat(configure(), decode.Weights({}), BYTES)
    assert heard == [[{"role": "user", "content": "why?"}]]
    assert prompts == ([] if process else ["> ", "> "]) and not out.getvalue()


def test_the_template_that_was_taken_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for choice, line in (("", ""), ("'default' of two", "chat template: 'default' of two\n")):
        own = dataclasses.replace(BYTES, chat_template="{{ 1 }}", template_choice=choice)
        speak.check_chat(configure(), own, None)
        assert capsys.readouterr().err == line


def test_a_full_context_is_told() -> None:
    ((_,), _, err) = generate(
        max_new_tokens=60, temperature=0.0
    )  # which fill it to the last token, as asked
    assert err == ""
    ((_,), _, err) = generate(max_new_tokens=61, temperature=0.0)
    assert err == "(the context of 64 tokens is full)\n"


def test_the_token_that_begins_a_text_counts() -> None:
    begun = dataclasses.replace(BYTES, bos=BYTES.eot)
    assert speak.check_sample(configure(prompt="x" * 63), begun) == [BYTES.eot, *b"x" * 63]
    with pytest.raises(
        ConfigError, match="sample.prompt has 65 tokens, more than model.context=64"
    ):
        speak.check_sample(configure(prompt="x" * 64), begun)


@pytest.mark.parametrize("prompt, longest", [("", 7), ("x", 7), ("xxx", 5)])
def test_a_text_that_cannot_be_cached_is_refused_before_a_training(
    prompt: str, longest: int
) -> None:
    """The same length is refused before and when the text is drawn: original is 8 tokens."""
    stretched = {"position": "rope", "rope_scaling": "dynamic", "rope_original_context": 8}
    message = "a text of 9 tokens is beyond model.rope_original_context=8"
    for most in (longest, longest + 1):
        config = configure(prompt=prompt, max_new_tokens=most)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **stretched))
        text = BYTES.encode(prompt)
        drawn = decode.stream(
            config.model, PARAMS, [text], config.sample, seed=0, vocab_size=257, end_of_text=256
        )
        if most == longest:
            assert speak.check_sample(config, BYTES) == text
            continue
        with pytest.raises(ConfigError, match=message):
            speak.check_sample(config, BYTES)
        with pytest.raises(ConfigError, match=message):
            next(drawn)


def test_more_tokens_than_32_bits_count_are_as_many_as_the_context_takes() -> None:
    texts = [generate(max_new_tokens=n, temperature=0.0)[0] for n in (61, 2**31 - 1)]
    assert texts[0] == texts[1] != [""]


def test_what_cannot_be_generated() -> None:
    speak.check_sample(configure(stop="\n", prompt="x" * 64), BYTES)
    for sample, message in (
        ({"stop": "é"}, "sample.stop='é' is 2 tokens of 'bytes': give a text of one"),
        ({"stop": ""}, "sample.stop='' is 0 tokens of 'bytes'"),
        ({"prompt": "x" * 65}, "sample.prompt has 65 tokens, more than model.context=64"),
    ):
        with pytest.raises(ConfigError, match=message):
            speak.check_sample(configure(**sample), BYTES)
        out = io.StringIO()
        with pytest.raises(ConfigError, match=message), redirect_stdout(out):
            written(configure(**sample), BYTES)
        assert not out.getvalue()


# ---- characters


@given(text=st.text(max_size=12) | st.just(CHINESE), sizes=st.lists(st.integers(0, 5), max_size=9))
def test_characters_come_whole(text: str, sizes: list[int]) -> None:
    ids, writer, pieces = BYTES.encode(text), _Writer(BYTES), []
    ends = np.cumsum(sizes).tolist()
    for start, end in zip([0, *ends], [*ends, len(ids)], strict=True):
        pieces.append(writer.add(ids[start : max(start, end)]))
        told = BYTES.decode_bytes(ids[: max(start, end)])
        # All characters that are over, and nothing of the next.
        assert "".join(pieces) == writer.text == told.decode(errors="ignore")
    assert writer.text == text


def test_bytes_that_are_no_text_show_as_such() -> None:
    writer = _Writer(BYTES)
    assert writer.add([0xE5]) == ""  # it could begin a character
    assert writer.add([0x41]) == "\ufffdA"  # it did not
    assert writer.add([0xFF]) == "\ufffd"
    assert writer.add([0xE5, 0xBA]) == ""
    assert writer.text == "\ufffdA\ufffd"


@pytest.mark.parametrize("process", [0, 1])
def test_a_text_appears_while_it_is_made(monkeypatch: pytest.MonkeyPatch, process: int) -> None:
    ids, out = BYTES.encode(CHINESE), io.StringIO()

    def stream(*_: Any, **options: Any) -> Iterator[list[Text]]:
        for at in range(0, len(ids), options["chunk"]):
            shown = BYTES.decode_bytes(ids[:at]).decode(errors="ignore")
            assert out.getvalue() == ("" if process else f"the {shown}")
            yield [Text(ids[at : at + options["chunk"]], None)]

    monkeypatch.setattr(decode, "stream", stream)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    with redirect_stdout(out):
        assert written(configure(), BYTES) == [CHINESE]
    # Of several processes one writes; all have the text.
    assert out.getvalue() == ("" if process else f"the {CHINESE}\n")
