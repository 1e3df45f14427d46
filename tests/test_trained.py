"""A model in a folder, a run's or a pretrained one: evaluated, trained on, spoken with."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax import decode, setup, trained
from gptjax.cli import main
from gptjax.config import UserError
from gptjax.interop import pretrained
from gptjax.model import apply
from gptjax.records import read_metrics
from gptjax.tokenizer import load as load_tokenizer
from tests import tiny

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# What transformers has a place for: GPT-2's block, with the context that chat needs.
KNOBS: dict[str, Any] = {"model__context": 64, "train__steps": 6, "mesh__data": 1}


def launch(*words: object) -> int:
    """A command on one device: the suite's eight would only be slower."""
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_store(tmp_path_factory.mktemp("text"), tiny.TEXT * 4)


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    words = tiny.overrides(store, **KNOBS)
    assert launch("train", f"--config={tiny.RECIPE}", f"--workdir={folder}", *words) == 0
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as a Hugging Face folder that was taught, so it says, to hold a dialogue."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert launch("export", f"--workdir={run}", f"--out={folder}") == 0
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def scores(folder: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    words = (f"--config.data.sources=('{store}',)", "--config.data.tokenizer=bytes")
    assert launch("eval", f"--workdir={folder}", "--json", *words, "--config.eval.context=64") == 0
    return json.loads(capsys.readouterr().out)


def test_an_exported_run_evaluates_alike(
    run: Path, exported: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = (scores(folder, store, capsys) for folder in (run, exported))
    assert ours["scores"] == theirs["scores"]
    assert ours["model_sha256"] == theirs["model_sha256"]
    assert (ours["step"], theirs["step"]) == (6, 0)


def fine_tune(exported: Path, store: Path, workdir: Path, *more: str, **knobs: Any) -> int:
    words = tiny.overrides(store, **(KNOBS | knobs))
    start = () if exported is None else (f"--from={exported}",)
    recipe = f"--config={tiny.RECIPE}"
    return launch("train", recipe, f"--workdir={workdir}", *start, *words, *more)


def test_fine_tuning_begins_at_the_models_loss(
    run: Path, exported: Path, store: Path, tmp_path: Path
) -> None:
    """Seed 1 draws other batches and would draw other parameters."""
    assert fine_tune(exported, store, tmp_path / "tuned", seed=1) == 0
    assert fine_tune(None, store, tmp_path / "fresh", seed=1) == 0
    first, fresh = (read_metrics(tmp_path / name)[0]["loss"] for name in ("tuned", "fresh"))
    config = tiny.config(store, **(KNOBS | {"seed": 1}))
    with trained.opened(trained.Trained(run, config)) as model:
        settled = setup.set_up(config)
        batch = jax.tree.map(lambda x: x[:, 0], setup.load_batch(settled, 0))
        logp = jax.nn.log_softmax(apply(settled.config.model, model.params, batch.tokens))
        picked = np.take_along_axis(np.asarray(logp), np.asarray(batch.targets)[..., None], -1)
    weights = np.asarray(batch.weights)
    expected = -(picked[..., 0] * weights).sum() / weights.sum()
    assert first == pytest.approx(expected, abs=1e-5)  # float32 sums in another order
    assert fresh > first + 0.05


def test_fine_tuning_resumes_only_from_the_same_model(
    run: Path, exported: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fine_tune(exported, store, tmp_path / "run") == 0
    assert fine_tune(exported, store, tmp_path / "run") == 0  # is done
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    tensors = load_file(other / "model.safetensors")
    next(iter(tensors.values())).flat[0] += 1
    save_file(tensors, other / "model.safetensors")
    capsys.readouterr()
    assert fine_tune(other, store, tmp_path / "run") == 2
    assert "the content of initial changed" in capsys.readouterr().err


def test_fine_tuning_wants_a_pretrained_model(
    run: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fine_tune(run, store, tmp_path / "new") == 2
    assert "is no pretrained model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of every prompt that a model is given."""
    prompts: list[str] = []
    stream = decode.stream

    def listen(config: Any, params: Any, given: Any, *args: Any, **options: Any) -> Any:
        prompts.append(load_tokenizer("bytes").decode(given[0]))
        return stream(config, params, given, *args, **options)

    monkeypatch.setattr(decode, "stream", listen)
    return prompts


def test_ask_puts_each_question_afresh(
    exported: Path, heard: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--config.sample.temperature=0", "--config.sample.max_new_tokens=3")
    assert launch("ask", f"--workdir={exported}", "Who?", "Where?", *words) == 0
    assert heard == [f"user: {q}<|endoftext|>assistant: " for q in ("Who?", "Where?")]
    assert capsys.readouterr().out.startswith("> Who?\n")


def chat(exported: Path, typed: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    tokens = "--config.sample.max_new_tokens=3"
    return launch("chat", f"--workdir={exported}", "--config.sample.temperature=0", tokens, *words)


def test_a_dialogue_remembers_its_turns(
    exported: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat(exported, "a\nb\n", monkeypatch) == 0
    first, second = heard
    assert first == "user: a<|endoftext|>assistant: "
    assert second.startswith("user: a<|endoftext|>assistant: ")
    assert second.endswith("<|endoftext|>user: b<|endoftext|>assistant: ")


def test_a_full_context_forgets_the_oldest_turns(
    exported: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """64 tokens of a byte each hold one turn of these; the system's message stays."""
    assert chat(exported, "first one\nsecond one\n", monkeypatch, "--system=s") == 0
    assert heard[1] == "system: s<|endoftext|>user: second one<|endoftext|>assistant: "
    assert "oldest turns are forgotten" in capfd.readouterr().err


def test_what_cannot_be_said_is_one_line(
    run: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("ask", f"--workdir={exported}", "x" * 100) == 2
    assert "leaves no room for an answer" in capsys.readouterr().err
    assert launch("ask", f"--workdir={run}", "Who?") == 2
    assert "has no chat template" in capsys.readouterr().err
    assert chat(run, "hello\n", monkeypatch) == 2
    assert "has no chat template" in capsys.readouterr().err


# ---- a config that is not the weights'

SHAPING = {
    "model.layers": 40,
    "model.width": 32,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.head_dim": 8,
    "model.ff_dim": 8,
    "model.vocab_size": 272,
    "model.context": 128,  # as many learned positions
    "model.feedforward": "swiglu",
    "model.position": "rope",
    "model.norm": "rmsnorm",
    "model.norm_placement": "sandwich",
    "model.bias": False,
    "model.attention_bias": "qkv",
    "model.qk_norm": True,
    "model.value_residual": True,
    "model.tied": False,
}
# What an exported run is scored on as the run is.
SCORED = "--config.data.sources=('{store}',) --config.data.tokenizer=bytes"
# What changes the function alone may be tried on any weights.
FREE = ("model.windows=(8,)", "model.norm_eps=1e-3", "model.logit_softcap=30.0")


def restored(folder: Path, *words: str) -> Any:
    """Step and parameters."""
    found = trained.find(folder, None, [f"--config.{word}" for word in words])
    with trained.opened(found) as model:
        return model.step, model.params


def test_a_knob_that_shapes_parameters_is_held_against_them(run: Path, exported: Path) -> None:
    for folder, knobs in ((exported, [*SHAPING]), (run, ["model.layers", "model.context"])):
        weights = trained.find(folder).config.model
        for knob, value in ((knob, SHAPING[knob]) for knob in knobs):
            with pytest.raises(UserError) as error:
                restored(folder, f"{knob}={value}")
            has = getattr(weights, knob.removeprefix("model."))
            assert str(error.value) == (
                f"this config does not fit the weights in {folder}: {knob}={value!r}, where they "
                f"have {has!r}"
            )


def test_every_knob_that_shapes_parameters_is_named(run: Path) -> None:
    with pytest.raises(UserError) as error:
        restored(run, "model.layers=3", "model.norm_eps=1e-3", "model.width=8")
    told = str(error.value)
    for part in ("layers=3, where they have 1", "width=8, where they have 16"):
        assert part in told
    assert "norm_eps" not in told


def test_what_shapes_nothing_is_free(exported: Path) -> None:
    same, other = (jax.tree.leaves(restored(exported, *words)[1]) for words in ((), FREE))
    assert all((a == b).all() for a, b in zip(same, other, strict=True))


def test_no_command_runs_weights_by_another_config(
    exported: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, new = tmp_path / "text.jsonl", tmp_path / "new"
    text.write_text('{"text": "the cat sees the sun"}\n')
    for words in (
        ("eval",),
        ("generate",),
        ("ask", "Who?"),
        ("chat",),
        ("export", f"--out={new}"),
        ("tasks", f"--lambada={text}"),
    ):
        more = (*words[1:], *SCORED.format(store=store).split(), "--config.model.layers=40")
        assert launch(words[0], f"--workdir={exported}", *more) == 2
        told = capsys.readouterr()
        assert "model.layers=40, where they have 1" in told.err and not told.out
    assert fine_tune(exported, store, new, model__layers=4) == 2
    assert "model.layers=4, where they have 1" in capsys.readouterr().err
    assert not new.exists()


# ---- a model that says nothing


@pytest.fixture(scope="module")
def silent(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model with one NaN."""
    folder = shutil.copytree(exported, tmp_path_factory.mktemp("silent") / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = np.nan
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_what_is_no_number_is_told_as_such(
    silent: Path, exported: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*SCORED.format(store=store).split(), "--config.eval.context=64")
    page = tmp_path / "page.html"
    assert launch("eval", f"--workdir={silent}", "--json", f"--html={page}", *words) == 0
    (score,) = json.loads(capsys.readouterr().out)["scores"].values()
    for figure in ("nats", "loss", "perplexity", "word_perplexity", "bits_per_byte"):
        assert score[figure] == "NaN"
    assert {p["loss"] for p in score["by_position"]} == {"NaN"}
    assert 'title="nan nats"' in page.read_text() or "nan nats" in page.read_text()
    assert launch("eval", f"--workdir={silent}", *words) == 0
    assert "nan" in capsys.readouterr().out
    pair = ("--compare", exported, silent)
    assert launch("eval", *pair, "--json", f"--html={page}", *words) == 0
    (text,) = json.loads(capsys.readouterr().out)["texts"].values()
    assert text["loss"]["b"] == text["loss"]["difference"] == "NaN" and text["loss"]["a"] > 0
    assert launch("eval", *pair, *words) == 0


def test_what_is_no_number_is_not_brought_in_or_out(
    silent: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    large = shutil.copytree(exported, tmp_path / "large")
    tensors = load_file(large / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = 1e5  # beyond float16
    save_file(tensors, large / "model.safetensors")
    for command, kind in (
        (("import", silent), "float32"),
        (("export", f"--workdir={silent}"), "float32"),
        (("export", f"--workdir={large}", "--dtype=float16"), "float16"),
    ):
        assert launch(*command, f"--out={out}") == 2
        told = f"transformer.ln_f.weight has values that are no finite {kind}"
        assert told in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large"]
    assert launch("export", f"--workdir={large}", f"--out={out}", "--dtype=bfloat16") == 0


def test_a_run_that_is_nothing_but_nan_has_not_ended_well(
    silent: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fine_tune(silent, store, tmp_path / "run") == 2
    told = capsys.readouterr()
    assert "6 updates in a row, the last at step 6, had no finite gradient" in told.err
    assert "perplexity inf" not in told.err and not told.out
    assert {line["loss"] != line["loss"] for line in read_metrics(tmp_path / "run")} == {True}


def test_a_run_whose_last_update_breaks_it_has_not_ended_well(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = {"optim__peak_lr": 1e38, "optim__warmup_steps": 0, "train__steps": 1}
    wild |= {"optim__schedule": "constant", "optim__eps": 1e-30}
    for _ in range(2):  # the second time it is done
        assert fine_tune(None, store, tmp_path / "run", **wild) == 2
        told = capsys.readouterr()
        assert "the held-out loss after the last step, 1, is nan" in told.err and not told.out
    assert read_metrics(tmp_path / "run")[-1]["val_perplexity"] != 1


# ---- wherever one stands


def test_a_pretrained_model_needs_no_local_recipe(
    exported: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained.find(exported).config
    monkeypatch.chdir(tmp_path)
    assert trained.find(exported).config == config
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text("raise ValueError('another')")
    assert trained.find(exported).config == config


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff{}", b""])
def test_a_damaged_config_is_told_with_its_path(
    exported: Path, tmp_path: Path, content: bytes
) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        trained.find(folder)
    told = str(error.value)
    assert (
        told
        == f"{folder / 'config.json'} is damaged, it is no JSON object: restore it, or fetch it again"
    )


def test_a_model_is_read_settled_and_cast_once_however_many_turns(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    count(pretrained, "find")
    count(pretrained, "read")
    count(setup, "settle")
    count(decode, "cast")
    assert chat(exported, "Who?\nWhere?\nWhy?\n", monkeypatch) == 0
    assert calls == {"find": 1, "settle": 1, "cast": 1}


# ---- what is refused before weights are read


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(trained, "_latest", read)
    monkeypatch.setattr(pretrained, "load", read)


@pytest.mark.parametrize(
    "words, message",
    [
        (["generate", "--prompt=" + "x" * 65], "sample.prompt has 65 tokens"),
        (["generate", "--prompt=\udcff"], "holds bytes that are no UTF-8"),
        (["generate", "--config.sample.stop=é"], "sample.stop='é' is 2 tokens"),
        (["generate", "--config.sample.temperature=-1"], "sample.temperature must not be negative"),
        (["generate", "--config.sample.top_k=0"], "sample.top_k must be above 0"),
        (["generate", "--config.sample.max_new_tokens=0"], "sample.max_new_tokens must be above 0"),
        (["ask", "why?"], "has no chat template"),
        (["chat"], "has no chat template"),
    ],
)
def test_what_cannot_be_said_is_refused_before_weights_are_read(
    run: Path, unread: None, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert launch(words[0], f"--workdir={run}", *words[1:]) == 2
    refusal = capsys.readouterr().err
    assert message in refusal and refusal.count("\n") == 1


def test_a_dialogue_without_room_is_refused_before_weights_are_read(
    exported: Path, unread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["ask", "why?", "x" * 64], ["chat", "--system=" + "x" * 64]):
        capsys.readouterr()
        assert launch(words[0], f"--workdir={exported}", *words[1:]) == 2
        streams = capsys.readouterr()
        assert "leaves no room for an answer" in streams.err and not streams.out
