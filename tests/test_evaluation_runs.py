"""Whole evaluations from the command line, and parity with `transformers` on its own model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax import cli, tokenizer
from gptjax.interop import tokenizer_files
from tests import tiny
from tests.child import GPTJAX, Child, free_port

SENTENCES = [f"the {a} sees the {b}.\n" for a in ("cat", "dog", "owl") for b in ("sun", "sea")]
DOCUMENTS = [s * (1 + i % 3) for i, s in enumerate(SENTENCES * 4)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_store(tmp_path_factory.mktemp("store"))


def train(folder: Path, store: Path, **knobs: Any) -> Path:
    words = tiny.overrides(
        store, train__steps=2, train__eval_every=2, optim__warmup_steps=1, **knobs
    )
    assert cli.main(["train", f"--config={tiny.RECIPE}", f"--workdir={folder}", *words]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    return train(tmp_path_factory.mktemp("run"), store)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents as text and as jsonl, and a Chinese text."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "plain.txt").write_text("<|endoftext|>".join(DOCUMENTS))
    lines = [{"text": d, "kind": d.split()[1]} for d in DOCUMENTS]
    (folder / "lines.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "chinese.raw").write_text("七嘴八舌的人們在山上看見了月亮。\n" * 3)
    (folder / "empty.txt").write_text("")
    return folder


def evaluate(capsys: Any, *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["eval", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_several_sets_at_once(run: Path, texts: Path, tmp_path: Path, capsys: Any) -> None:
    sets = [f"plain={texts}/plain.txt", f"lines={texts}/lines.jsonl", f"zh={texts}/chinese.raw"]
    page = tmp_path / "page.html"
    found = evaluate(capsys, f"--workdir={run}", "--set", *sets, f"--html={page}")
    scores = found["scores"]
    assert list(scores) == ["plain", "lines", "zh", "all"]
    same = ("nats", "tokens", "words", "bytes", "interval", "text_sha256", "by_position")
    assert {k: scores["plain"][k] for k in same} == {k: scores["lines"][k] for k in same}
    assert scores["zh"]["bytes"] == (texts / "chinese.raw").stat().st_size
    assert scores["plain"]["documents"] == 24 and scores["plain"]["interval"]["loss"][0]
    total = sum(scores[name]["nats"] for name in ("plain", "lines", "zh"))
    assert scores["all"]["nats"] == pytest.approx(total, rel=1e-12)
    assert "bootstrap over 24 documents" in page.read_text()
    kinds = evaluate(
        capsys, f"--workdir={run}", "--domain_key=kind", "--set", f"lines={texts}/lines.jsonl"
    )["scores"]["lines"]["by_domain"]
    assert {name: kind["documents"] for name, kind in kinds.items()} == dict.fromkeys(
        ("cat", "dog", "owl"), 8
    )
    assert sum(k["nats"] for k in kinds.values()) == pytest.approx(scores["lines"]["nats"])


def test_the_convention_is_in_the_number_and_beside_it(run: Path, texts: Path, capsys: Any) -> None:
    text = f"t={texts}/plain.txt"
    losses = {}
    for name, knobs in {
        "default": [],
        "stride": ["--config.eval.stride=3"],
        "context": ["--config.eval.context=4"],
        "prefix": ["--config.eval.prefix=none"],
        "apart": ["--config.eval.documents=apart"],
    }.items():
        found = evaluate(capsys, f"--workdir={run}", "--set", text, *knobs)
        losses[name] = (found["scores"]["t"]["nats"], json.dumps(found["convention"]))
    assert len({nats for nats, _ in losses.values()}) == 5
    assert len({told for _, told in losses.values()}) == 5


def test_two_runs_are_compared(
    run: Path, texts: Path, store: Path, tmp_path: Path, capsys: Any
) -> None:
    other = train(tmp_path / "other", store, seed=1)
    sets = ["--set", f"plain={texts}/plain.txt"]
    page = tmp_path / "page.html"
    found = evaluate(capsys, "--compare", run, other, *sets, f"--html={page}")
    d = found["texts"]["plain"]["loss"]
    alone = [
        evaluate(capsys, f"--workdir={w}", *sets)["scores"]["plain"]["loss"] for w in (run, other)
    ]
    assert [d["a"], d["b"]] == pytest.approx(alone, rel=1e-12)
    assert d["difference"] == pytest.approx(alone[1] - alone[0], rel=1e-6)
    assert d["interval"][0] < d["difference"] < d["interval"][1]
    assert found["a"]["model_sha256"] != found["b"]["model_sha256"]
    assert "Two models on the same text" in page.read_text()
    # With no set, the text that both hold out.
    found = evaluate(capsys, "--compare", run, run)
    assert found["texts"][str(store)]["loss"]["difference"] == 0.0


def test_a_knob_of_b_alone_shows_what_it_costs(run: Path, texts: Path, capsys: Any) -> None:
    words = ["--set", f"plain={texts}/plain.txt"]
    found = evaluate(capsys, "--compare", run, run, "--b_with", "model.products=int8", *words)
    assert found["a"]["model_sha256"] == found["b"]["model_sha256"]
    assert [found[side]["numerics"] for side in "ab"] == ["float32", "float32, products in int8"]
    d = found["texts"]["plain"]["loss"]
    alone = evaluate(capsys, f"--workdir={run}", "--config.model.products=int8", *words)
    assert d["b"] == pytest.approx(alone["scores"]["plain"]["loss"], rel=1e-12)
    # Each number is rounded by at most 1/254 of the largest beside it.
    assert 0 < abs(d["difference"]) < 0.01


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "either --workdir=DIR or --compare DIR DIR"),
        (["--workdir={run}", "--compare", "{run}", "{run}"], "either --workdir=DIR or --compare"),
        (["--compare", "{run}", "{run}", "--config=configs/base.py"], "leave --config out"),
        (["--workdir={run}", "--b_with", "model.products=int8"], "give two folders by --compare"),
        (["--compare", "{run}", "{run}", "--b_with", "model.product=x"], "model.product"),
        (["--workdir={run}", "--set", "plain.txt"], "is not NAME=PATH"),
        (["--workdir={run}", "--set", "a={texts}/none.txt"], "none.txt is no file"),
        (["--workdir={run}", "--set", "a={texts}/empty.txt"], "empty.txt holds no text to score"),
        (["--workdir={run}", "--set", "a={texts}"], "is no token store"),
        (
            ["--workdir={run}", "--set", "a={texts}/plain.txt", "--detokenizer=prose"],
            "--detokenizer='prose' is not one of: none, wikitext",
        ),
        (["--workdir={run}", "--domain_key=kind"], "tell how the files of --set are read"),
        (
            ["--workdir={run}", "--set", "a={texts}/plain.txt", "--html=none/page.html"],
            "--html=none/page.html: no folder none",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(
    run: Path, texts: Path, capsys: Any, words: Sequence[str], message: str
) -> None:
    capsys.readouterr()
    filled = [w.format(run=run, texts=texts) for w in words]
    assert cli.main(["eval", *filled]) == cli.EXIT_USER_ERROR
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and not told.out


@pytest.mark.slow
def test_two_processes_give_the_number_of_one(
    run: Path, texts: Path, tmp_path: Path, capsys: Any
) -> None:
    port, page = free_port(), tmp_path / "page.html"
    words = [f"--workdir={run}", "--set", f"t={texts}/plain.txt", "--json", f"--html={page}"]
    pair = [
        Child(GPTJAX, "eval", *words, f"--distributed=localhost:{port},2,{i}", devices=8)
        for i in range(2)
    ]
    assert [p.wait().returncode for p in pair] == [0, 0], [p.stderr for p in pair]
    out, silent = (p.stdout for p in pair)
    # gloo itself writes on standard output, from threads whose lines may run into each other.
    assert "{" not in silent and page.is_file()
    found, alone = json.loads(out[out.index("{") :].splitlines()[0]), evaluate(capsys, *words[:-2])
    assert found["model_sha256"] == alone["model_sha256"]
    for name in ("nats", "loss", "bits_per_byte", "word_perplexity"):
        assert found["scores"]["t"][name] == pytest.approx(alone["scores"]["t"][name], rel=1e-6)
    assert found["scores"]["t"]["text_sha256"] == alone["scores"]["t"]["text_sha256"]


# ---- transformers


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 that `transformers` wrote, with a tokenizer of bytes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=12, n_embd=16, n_layer=2, n_head=4, attn_implementation="eager"
    )
    found = transformers.GPT2LMHeadModel(config)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    found.save_pretrained(folder)
    tokenizer_files.write_tokenizer("bytes", folder)
    return folder


@pytest.mark.parametrize("stride", [4, 11])
def test_the_documented_recipe_of_transformers(
    pretrained: Path, texts: Path, tmp_path: Path, capsys: Any, stride: int
) -> None:
    """The loop of huggingface.co/docs/transformers/perplexity, with that library's model.

    There a window of max_length tokens makes max_length - 1 predictions. It knows no
    end-of-text, which our text of one document ends with: that one is not scored here. And it
    counts one token less of every window than its loss is the mean of, which is right of the
    first alone (whose first token has no prediction): here each counts for what it is.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(pretrained).eval()
    text = "".join(DOCUMENTS[:9])
    file = tmp_path / "t.txt"
    file.write_text(text)

    input_ids = torch.tensor([tokenizer.load(str(pretrained)).encode(text)])
    seq_len, max_length = input_ids.size(1), model.config.n_positions
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        window = input_ids[:, begin_loc:end_loc]
        target_ids = window.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            neg_log_likelihood = model(window, labels=target_ids).loss
        num_valid_tokens = (target_ids != -100).sum().item()
        num_loss_tokens = num_valid_tokens - target_ids.size(0) * (begin_loc == 0)
        nll_sum += neg_log_likelihood.item() * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break

    knobs = {
        "context": max_length - 1,
        "stride": stride,
        "prefix": "none",
        "max_tokens": seq_len - 1,
    }
    found = evaluate(
        capsys,
        f"--workdir={pretrained}",
        "--set",
        f"t={file}",
        *(f"--config.eval.{name}={value}" for name, value in knobs.items()),
    )["scores"]["t"]
    assert found["tokens"] == n_tokens
    # Two float32 forward passes by different libraries.
    assert found["loss"] == pytest.approx(nll_sum / n_tokens, rel=2e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nll_sum / n_tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(
        nll_sum / math.log(2) / len(text[1:].encode()), rel=2e-6
    )
    assert not np.isclose(found["loss"], math.log(257), rtol=1e-2)
