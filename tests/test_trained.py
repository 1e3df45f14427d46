"""A model in a folder, a run's or a pretrained one: evaluated, trained on, spoken with."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax import decode, setup, trained
from gptjax.cli import main
from gptjax.model import apply
from gptjax.records import read_metrics
from gptjax.sharding import make_mesh
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
def one_device() -> Any:
    """Commands see one device."""
    devices = jax.devices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: devices(*a)[:1])
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_store(tmp_path_factory.mktemp("text"), tiny.TEXT * 4)


@pytest.fixture(scope="module")
def run(store: Path, one_device: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    with jax.set_mesh(make_mesh(config.mesh)):
        _, params = trained.restore(config, run)
        settled = setup.set_up(config)
        batch = jax.tree.map(lambda x: x[:, 0], setup.load_batch(settled, 0))
        logp = jax.nn.log_softmax(apply(settled.config.model, params, batch.tokens))
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
