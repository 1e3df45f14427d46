"""Our adapter against the harness's own Hugging Face backend: the same weights, local tasks."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}  # read once, when imported

import jax
import numpy as np
import pytest
import yaml

from gptjax import decode, model, trained
from gptjax.cli import EXIT_USER_ERROR, main
from gptjax.config import UserError
from gptjax.evaluation import tasks
from gptjax.evaluation.tasks import Request
from gptjax.interop import hf, pretrained
from gptjax.interop.tokenizer_files import split, tokenizer_json
from gptjax.setup import load_tokenizer, settle
from tests import tiny
from tests.test_interop_tokenizer import CORPUS, PATTERN, SPECIALS
from tests.test_interop_tokenizer import trained as trained_tokenizer
from tests.test_interop_tokenizer import write as write_tokenizer

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # of the harness's Hugging Face backend
Instance = pytest.importorskip("lm_eval.api.instance").Instance
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
harness = pytest.importorskip("gptjax.evaluation.harness")

CONTEXT = 48
NATS = {"rtol": 0, "atol": 1e-3}
# With two layers no id beyond the tokenizer is the likeliest, which the harness's own backend takes.
KNOBS = {
    "model__vocab_size": 344, "model__layers": 2, "model__context": CONTEXT, "eval__batch_size": 4,
}  # fmt: skip
LLAMA = {
    "model__position": "rope",
    "model__norm": "rmsnorm",
    "model__feedforward": "swiglu",
    "model__bias": False,
    "model__kv_heads": 2,
    "model__tied": False,
}
# What a model is, and whether its tokenizer sets a begin token before every text.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {"gpt2": ({}, False), "llama-begin": (LLAMA, True)}

WORDS = CORPUS.split()
# Longer than the context, of one word, with spaces at the end, of several bytes a character.
TEXTS = [
    " ".join(WORDS[:12]), " ".join(WORDS[30:110]), "the cat saw", "你好 世界 the", "def f(x):\n    return  x",
    "naïve café Привет", "   it's 2024", "the", " ".join(WORDS[-40:]), "we'll see\t\t dogs", "Привет мир hahaha",
    "12 dogs and the cat",
]  # fmt: skip
PAGES = [" ".join(WORDS[i : i + n]) for i, n in ((0, 100), (20, 12), (50, 1), (3, 60), (90, 33))]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "words": (
        [{"text": text} for text in TEXTS],
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
    ),
    "choices": (
        [
            {
                "query": text,
                "choices": [WORDS[i], "世界 cat", "see the dogs 12 times"],
                "gold": i % 3,
            }
            for i, text in enumerate(TEXTS)
        ],
        {
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
        },
    ),
    "pages": (
        [{"page": page} for page in PAGES],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "page",
            "metric_list": [
                {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
            ],
        },
    ),
    "answers": (
        [{"text": text} for text in TEXTS],
        {
            "output_type": "generate_until",
            "doc_to_text": "text",
            "doc_to_target": "text",
            "generation_kwargs": {"until": ["a", "\n\n"], "max_gen_toks": 20, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
}


only_one = pytest.mark.parametrize("made", ["gpt2"], indirect=True)


class Made(NamedTuple):
    model: trained.Trained
    params: model.Params


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random model in a folder, with matrices so large that likelihoods differ by nats."""
    out = tmp_path_factory.mktemp(request.param)
    knobs, begins = KINDS[request.param]
    bpe = trained_tokenizer()["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    bos = "<|im_start|>" if begins else None
    tree = tokenizer_json(bpe["vocab"], merges, SPECIALS, split(PATTERN), bos=bos)
    named = {"eos_token": "<|endoftext|>"} | ({"bos_token": bos} if begins else {})
    name = write_tokenizer(out / "tokenizer", tree, **named)
    config = tiny.config(out, **{**KNOBS, **knobs, "data__tokenizer": name}).model
    params = jax.tree.map(lambda p: p * 6 if p.ndim > 1 else p, model.init(config, 0))
    hf.export(out / "model", config, params, name)
    overrides = [f"--config.model.context={CONTEXT}", "--config.eval.batch_size=4"]
    return Made(trained.find(out / "model", None, overrides), params)


@contextmanager
def adapter(made: Made) -> Iterator[Any]:
    with jax.set_mesh(tiny.mesh(data=8)):
        settled = settle(made.model.config)
        yield harness.Harness(settled, made.params, load_tokenizer(settled))


def ask(made: Made, requests: list[Request]) -> list[tasks.Likelihood]:
    with jax.set_mesh(tiny.mesh(data=8)):
        return tasks.loglikelihoods(settle(made.model.config).model, made.params, requests)


def write(made: Made, texts: list[str], **settings: Any) -> list[str]:
    with adapter(made) as lm:
        return lm.generate_until(
            [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(texts)]
        )


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tasks, as a user writes them."""
    out = tmp_path_factory.mktemp("tasks")
    for name, (rows, settings) in TASKS.items():
        file = out / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"data_files": {"test": str(file)}, "cache_dir": str(out / "cache")}
        about = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": data}
        (out / f"{name}.yaml").write_text(
            yaml.safe_dump({**about, "test_split": "test", **settings})
        )
    return out


class Told(NamedTuple):
    ours: dict[str, Any]
    theirs: dict[str, Any]

    def results(self, name: str) -> list[dict[str, float]]:
        """Our figures of a task, and theirs, which have the same names."""
        pair = [
            {k.partition(",")[0]: v for k, v in side["results"][f"local_{name}"].items()}
            for side in self
        ]
        assert pair[0].keys() == pair[1].keys()
        return pair

    def answers(self, name: str) -> list[list[Any]]:
        """What each document's requests were answered, ours and theirs."""
        sides = [
            sorted(side["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
            for side in self
        ]
        return [[sample["resps"] for sample in side] for side in sides]


@pytest.fixture(scope="module")
def told(made: Made, local: Path) -> Told:
    """All tasks, by both."""
    names = [f"local_{name}" for name in TASKS]
    with pytest.MonkeyPatch.context() as patch:
        # Reading the harness's own 14,000 tasks takes seven seconds.
        patch.setattr(
            harness, "TaskManager", functools.partial(TaskManager, include_defaults=False)
        )
        manager = harness.manager_of(names, local)
        with trained.opened(made.model) as opened:
            ours = harness.evaluate(opened, names, manager)
    theirs = lm_eval.simple_evaluate(
        HFLM(
            str(made.model.folder), device="cpu", dtype="float32", batch_size=4, max_length=CONTEXT
        ),
        tasks=names,
        task_manager=TaskManager(include_path=local, include_defaults=False),
    )
    return Told(ours, theirs)


def test_words_are_as_likely_document_by_document(told):
    ours, theirs = ([resps[0][0] for resps in side] for side in told.answers("words"))
    assert len(ours) == len(TEXTS)
    np.testing.assert_allclose([o[0] for o in ours], [t[0] for t in theirs], **NATS)
    assert [bool(o[1]) for o in ours] == [bool(t[1]) for t in theirs]
    assert np.ptp([o[0] for o in ours]) > 5
    a, b = told.results("words")
    assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-3)
    assert a["acc"] == b["acc"]


def test_choices_are_as_likely_document_by_document(told):
    ours, theirs = (
        np.array([[float(r[0][0]) for r in resps] for resps in side])
        for side in told.answers("choices")
    )
    assert ours.shape == (len(TEXTS), 3)
    np.testing.assert_allclose(ours, theirs, **NATS)
    a, b = told.results("choices")
    assert [a[k] for k in ("acc", "acc_norm", "acc_bytes")] == [
        b[k] for k in ("acc", "acc_norm", "acc_bytes")
    ]


def test_texts_have_the_same_perplexity(told, made):
    ours, theirs = (np.array([float(r[0][0]) for r in side]) for side in told.answers("pages"))
    if (begin := load_tokenizer(made.model.config).bos) is not None:
        # Theirs has the begin token twice and scores the second, here where all fits a window.
        ids = [[begin, begin, *load_tokenizer(made.model.config).encode(page)] for page in PAGES]
        short = np.array([len(i) <= CONTEXT for i in ids])
        twice = ask(made, [Request(i[:1], i[1:]) for i in ids if len(i) <= CONTEXT])
        np.testing.assert_allclose(theirs[short], [t.nats for t in twice], **NATS)
        once = ask(made, [Request(i[:1], i[2:]) for i in ids if len(i) <= CONTEXT])
        np.testing.assert_allclose(ours[short], [o.nats for o in once], **NATS)
        assert short.sum() == 2
        return
    np.testing.assert_allclose(ours, theirs, **NATS)
    a, b = told.results("pages")
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert a[name] == pytest.approx(b[name], rel=1e-5)
    assert a["bits_per_byte"] == pytest.approx(math.log2(a["byte_perplexity"]), rel=1e-6)


def test_greedy_texts_are_the_same(told):
    ours, theirs = ([resps[0][0] for resps in side] for side in told.answers("answers"))
    assert ours == theirs
    assert any(text and "a" not in text for text in ours)


def test_our_own_figures_are_the_harness_s(told, made, local):
    files = {"lambada": local / "words.jsonl", "choices": local / "choices.jsonl"}
    lines = tasks.read_files(files, None)
    with trained.opened(made.model) as opened:
        own = tasks.evaluate(made.model, opened, files, lines)["tasks"]
    words, choices = told.results("words")[0], told.results("choices")[0]
    assert own["lambada"]["accuracy"] == pytest.approx(words["acc"])
    assert own["lambada"]["perplexity"] == pytest.approx(words["perplexity"], rel=1e-6)
    assert own["choices"]["accuracy"] == pytest.approx(choices["acc"])
    assert own["choices"]["accuracy_bytes"] == pytest.approx(choices["acc_bytes"])


@only_one
def test_a_text_ends_before_its_first_stop_text(made):
    whole = write(made, TEXTS[:3], max_gen_toks=20)
    assert all(len(text) > 8 for text in whole)
    stops = [whole[0][5:8], whole[1][2:4], whole[2][-1:], ""]
    for text, cut in zip(whole, write(made, TEXTS[:3], until=stops, max_gen_toks=20), strict=True):
        assert cut == min((text.partition(stop)[0] for stop in stops if stop), key=len)
    assert write(made, TEXTS[:3], max_gen_toks=20, until="nowhere") == whole


@only_one
def test_a_token_that_ends_a_turn_ends_a_text(made):
    with adapter(made) as lm:
        known = {"vocab_size": lm._tokenizer.vocab_size, "end_of_text": lm._tokenizer.eot}
        greedy = tiny.sample(max_new_tokens=12, temperature=0.0, top_p=None)
        prompt = lm._tokenizer.encode("the cat")
        [text] = decode.generate(lm._config.model, made.params, [prompt], greedy, seed=0, **known)
        ids = text.ids
        end = next(i for i in ids if i != ids[0])
        lm._tokenizer = dataclasses.replace(lm._tokenizer, stops=frozenset({end}))
        request = Instance("generate_until", {}, ("the cat", {"max_gen_toks": 12}), 0)
        wanted = lm._tokenizer.decode(ids[: ids.index(end)])
        assert lm.generate_until([request]) == [wanted] != [""]


@only_one
def test_drawn_texts_differ_and_come_again(made):
    knobs = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}
    drawn = write(made, ["the cat"] * 6, **knobs)
    assert len(set(drawn)) == 6
    assert write(made, ["the cat"] * 6, **knobs) == drawn
    greedy = write(made, ["the cat"], max_gen_toks=12)
    assert write(made, ["the cat"], **knobs, top_k=1) == greedy
    # As the harness has it, a temperature means nothing where nothing is to be drawn.
    assert write(made, ["the cat"], **{**knobs, "do_sample": False}) == greedy


def test_settings_that_are_not_ours_are_refused(made):
    with pytest.raises(UserError, match="setting 'num_beams' is not ours: until, max_gen_toks"):
        write(made, ["a"], num_beams=3)
    with pytest.raises(UserError, match=f"max_gen_toks={CONTEXT} leaves no room for a prompt"):
        write(made, ["a"], max_gen_toks=CONTEXT)
    with pytest.raises(UserError, match="top_p must lie in"):
        write(made, ["a"], max_gen_toks=4, do_sample=True, top_p=2.0)


def test_figures_that_are_no_numbers_are_none():
    found = {"results": {"a": {"alias": "a", "acc,none": 0.5, "x,none": math.nan}}}
    assert harness.figures(found) == {"a": {"alias": "a", "acc,none": 0.5, "x,none": None}}


@only_one
def test_the_command_prints_the_harness_s_table(made, local, monkeypatch, capsys):
    quick = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", quick)
    words = ["tasks", f"--workdir={made.model.folder}", f"--harness_path={local}", "--limit=2"]
    context = f"--config.model.context={CONTEXT}"
    assert main([*words, context, "--harness", "local_choices"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("|") and re.search(r"\|local_choices\|.*\|acc +\|", out)


@only_one
def test_the_model_is_opened_once_for_all_tasks(made, local, monkeypatch, capsys):
    quick = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", quick)
    times, load = [], pretrained.load
    monkeypatch.setattr(pretrained, "load", lambda *of: times.append(of) or load(*of))
    words = ["tasks", f"--workdir={made.model.folder}", f"--harness_path={local}", "--limit=2"]
    own = f"--choices={local / 'choices.jsonl'}"
    context = f"--config.model.context={CONTEXT}"
    assert main([*words, context, own, "--json", "--harness", "local_choices"]) == 0
    record = json.loads(capsys.readouterr().out)
    theirs = record["harness"]["local_choices"]["acc,none"]
    assert record["tasks"]["choices"]["accuracy"] == pytest.approx(theirs)
    assert len(times) == 1


def test_an_unknown_task_is_one_line(made, local, monkeypatch, capsys):
    quick = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", quick)
    words = [
        "tasks",
        f"--workdir={made.model.folder}",
        f"--harness_path={local}",
        "--harness",
        "none",
    ]
    assert main(words) == EXIT_USER_ERROR
    assert "gptjax: the harness knows no task 'none': " in capsys.readouterr().err


def test_without_the_harness_the_extra_is_named(made, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "gptjax.evaluation.harness")
    monkeypatch.delattr("gptjax.evaluation.harness")
    words = ["tasks", f"--workdir={made.model.folder}", "--harness", "arc_easy"]
    assert main(words) == EXIT_USER_ERROR
    assert "pip install 'gptjax[harness]'" in capsys.readouterr().err


# A machine on which torch and transformers are not installed.
PROGRAM = """
import functools, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = {"torch", "transformers", "accelerate"}
PathFinder.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
from gptjax.cli import main
from gptjax.evaluation import harness
harness.TaskManager = functools.partial(harness.TaskManager, include_defaults=False)
status = main(sys.argv[1:])
assert not hidden & sys.modules.keys()
sys.exit(status)
"""


@only_one
def test_the_command_needs_no_torch(made, told, local):
    names = [f"local_{name}" for name in TASKS]
    words = [
        "tasks",
        f"--workdir={made.model.folder}",
        f"--harness_path={local}",
        "--harness",
        *names,
    ]
    knobs = [f"--config.model.context={CONTEXT}", "--config.eval.batch_size=4", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words, *knobs], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["harness"]
    for name in names:
        wanted = told.ours["results"][name]
        assert found[name].keys() == wanted.keys()
        numbers = {key: value for key, value in wanted.items() if isinstance(value, float)}
        assert {key: found[name][key] for key in numbers} == pytest.approx(numbers, rel=1e-6)
