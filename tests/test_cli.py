"""Every command as a person runs it: what it prints, and what it says to a mistake."""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from gptjax import cli, configure, loop, records, setup
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.cli import COMMANDS, EXIT_USER_ERROR, main
from gptjax.commands.command import EXIT_FAILED
from gptjax.config import Config, ConfigError, UserError, flatten, from_dict, to_dict
from gptjax.data import Store
from gptjax.model import abstract_params
from gptjax.records import read_metrics
from gptjax.sharding import make_mesh
from gptjax.study.store import COMPUTES
from gptjax.tokenizer import END_OF_TEXT
from tests import tiny

REPO = Path(__file__).parents[1]
RECIPE = str(REPO / "configs" / "base.py")
STEPS = 4
DOCUMENTS = [" ".join(str(n * n) for n in range(i, 400, 7)) for i in range(5)]


class Done(NamedTuple):
    status: Any
    out: str
    err: str


def gptjax(*words: str) -> Done:
    """Runs a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status: Any = main(words)
        except SystemExit as end:  # argparse's own way out
            status = end.code
    return Done(status, out.getvalue(), err.getvalue())


def works(*words: str) -> Done:
    done = gptjax(*words)
    assert done.status == 0, done.err
    return done


def refused(message: str, *words: str) -> None:
    """One line on standard error, status 2, and nothing else."""
    done = gptjax(*words)
    assert done.status == EXIT_USER_ERROR and not done.out, done
    assert re.fullmatch("gptjax: [^\n]*\n", done.err), done.err
    assert re.search(message, done.err), done.err


def files(folder: Path) -> dict[str, str]:
    """Content of all files below a folder, by their path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        # But for locks, which tell who looked last.
        if path.is_file() and path.suffix != ".lock" and ".locks" not in path.parts
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "squares.txt"
    file.write_text(f"{END_OF_TEXT}\n".join(DOCUMENTS))
    return file


@pytest.fixture(scope="module")
def store(text: Path) -> Path:
    out = text.parent / "store"
    works("data", str(text), f"--out={out}", "--tokenizer=bytes", "--val_fraction=0.2")
    return out


def knobs(store: Path, **changes: object) -> list[str]:
    steps = {"train__steps": STEPS, "train__checkpoint_every": STEPS, "train__eval_every": STEPS}
    return [f"--config={RECIPE}", *tiny.overrides(store, **{**steps, **changes})]


class Trained(NamedTuple):
    workdir: Path
    done: Done

    @property
    def last_val_loss(self) -> float:
        return [line["val_loss"] for line in read_metrics(self.workdir) if "val_loss" in line][-1]


def train(workdir: Path, store: Path, **changes: object) -> Trained:
    return Trained(workdir, works("train", f"--workdir={workdir}", *knobs(store, **changes)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Trained:
    return train(tmp_path_factory.mktemp("runs") / "run", store)


@pytest.fixture
def workdir(run: Trained, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return shutil.copytree(run.workdir, tmp_path / "copy")


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---- help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_flag(name: str) -> None:
    parser = argparse.ArgumentParser()
    COMMANDS[name].add_arguments(parser)
    for word in ("--help", "-h"):
        done = works(*name.split(), word)
        assert COMMANDS[name].summary in done.out and not done.err
        for action in parser._actions:
            assert action.help, f"{action.dest} has no help"
            shown = action.option_strings or [action.metavar or action.dest]
            assert all(flag in done.out for flag in shown), action
        assert "--debug" in done.out
        # Each shows how it is used.
        assert re.search(rf"^  {name} ", done.out, re.MULTILINE)
        assert max(map(len, done.out.splitlines())) <= 100


def test_the_overview_lists_every_command() -> None:
    for words in (["--help"], ["-h"], ["help"]):
        done = works(*words)
        assert all(f"{n}" in done.out and c.summary in done.out for n, c in COMMANDS.items())
    assert gptjax() == (EXIT_USER_ERROR, done.out, "")


def test_launch_and_its_exit_status(store: Path, tmp_path: Path) -> None:
    def launch(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPO / "launch.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    done = launch("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: launch.py COMMAND" in done.stdout
    done = launch("trian")
    assert (done.returncode, done.stdout) == (EXIT_USER_ERROR, "")
    assert done.stderr == f"gptjax: no command 'trian'; commands: {', '.join(COMMANDS)}\n"
    done = launch("train", "--workdir=run", *knobs(store))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the ") and len(done.stdout) > len("the \n")
    assert "new run" in done.stderr and f"step {STEPS}: held-out" in done.stderr
    assert "Traceback" not in done.stderr
    assert Checkpoints(tmp_path / "run" / CHECKPOINTS).latest() == STEPS


# ---- config


def printed(text: str) -> Config:
    """The config that `config` has printed."""
    tree: dict[str, Any] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.split(" = ", 1)
            *sections, knob = name.split(".")
            section = tree
            for part in sections:
                section = section.setdefault(part, {})
            section[knob] = ast.literal_eval(value)
    return from_dict(tree)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("base.py", []),
        ("gpt2.py:124m", ["--config.optim.peak_lr=6e-4", "--config.model.windows=(None,256)"]),
        ("modern.py", ["--config.optim.clip=None", "--config.optim.ema_decay", "None"]),
    ],
)
def test_config_prints_every_knob(recipe: str, overrides: list[str]) -> None:
    path = str(REPO / "configs" / recipe)
    found = configure.from_file(path, overrides)
    done = works("config", f"--config={path}", *overrides)
    assert printed(done.out) == found
    assert "# parameters: " in done.out and "# training: " in done.out
    done = works("config", f"--config={path}", "--json", *overrides)
    assert from_dict(json.loads(done.out)) == found
    if "--config.optim.clip=None" in overrides:
        assert found.optim.clip is None and found.optim.ema_decay is None
    if "gpt2" in recipe:
        assert found.optim.peak_lr == 6e-4 and found.model.windows == (None, 256)


def test_config_json_is_what_a_run_keeps(run: Trained, store: Path) -> None:
    done = works("config", "--json", *knobs(store))
    assert done.out == (run.workdir / records.CONFIG).read_text() + "\n"


def test_config_diff() -> None:
    recipes = [str(REPO / "configs" / name) for name in ("base.py", "gpt2.py:355m")]
    done = works("config", f"--config={recipes[0]}", f"--diff={recipes[1]}", "--config.seed=3")
    a, b = (flatten(to_dict(configure.from_file(recipe))) for recipe in recipes)
    a["seed"] = 3
    expected = [f"{k}: {a[k]!r} -> {b[k]!r}" for k in a if a[k] != b[k]]
    assert done.out.splitlines() == expected and len(expected) > 5
    assert "model.width: 128 -> 1024" in expected and "seed: 3 -> 0" in expected
    assert works("config", f"--config={RECIPE}", f"--diff={RECIPE}").out == ""


# ---- data


def test_data_tells_what_it_made(text: Path, store: Path) -> None:
    words = ["data", str(text), f"--out={store}", "--tokenizer=bytes", "--val_fraction=0.2"]
    before = files(store)
    done = works(*words)  # again: checked, and left as it is
    assert files(store) == before
    for line, split in zip(done.out.splitlines(), ("train", "val"), strict=True):
        found = Store.open(store / split, None)
        counts = f"{found.num_tokens:,} tokens, {len(found.document_ends):,} documents"
        assert line.startswith(f"{store / split}: {counts}, ") and line.endswith(f"({split})")
        assert f"{found.num_tokens - len(found.document_ends):,} bytes" in line
        assert found.fingerprint[:12] in line


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_show_prints_the_text_of_a_batch(store: Path, split: str) -> None:
    done = works("data", "show", *knobs(store), "--step=1", "--rows=5", f"--split={split}")
    blocks = re.split(r"^--- step 1, row (\d) of 8: .*\n", done.out, flags=re.MULTILINE)
    assert blocks[0] == "" and blocks[1::2] == list("01234")
    whole = "".join(DOCUMENTS)
    cut = int(len(whole) * 0.8)
    corpus, at = "", 0
    for document in DOCUMENTS:
        inside = slice(*(max(0, c - at) for c in ((0, cut) if split == "train" else (cut, 10**9))))
        corpus += document[inside] + END_OF_TEXT if document[inside] else ""
        at += len(document)
    context = tiny.KNOBS["model.context"]
    for block in blocks[2::2]:
        shown = re.sub("[⟦⟧]", "", block.removesuffix("\n"))
        assert shown in corpus
        assert len(shown.replace(END_OF_TEXT, "|")) == 1 + context
        assert re.match("⟦[^⟦⟧]+⟧", block)


def test_data_show_prints_what_the_loop_reads(store: Path) -> None:
    done = works("data", "show", *knobs(store, data__packing="document"), "--step=2")
    config = configure.from_file(RECIPE, knobs(store, data__packing="document")[1:])
    with jax.set_mesh(make_mesh(config.mesh)):
        opened = setup.set_up(config)
        batch = jax.device_get(setup.load_batch(opened, 2))
    blocks = re.split(r"^--- step 2, row \d of 8: .*\n", done.out, flags=re.MULTILINE)[1:]
    origins = re.findall(r"^--- step 2, row \d of 8: (.*)$", done.out, flags=re.MULTILINE)
    assert origins == list(map(str, opened.batches.origins(2)))
    assert all(re.fullmatch(rf"row \d+ of {store} \(document \d+\)", o) for o in origins)
    for row, block in enumerate(blocks):
        scored = batch.weights[row, 0] > 0
        text = opened.tokenizer.decode(batch.targets[row, 0][scored])
        assert block.startswith(f"⟦{opened.tokenizer.decode(batch.tokens[row, 0, :1])}⟧{text}")
    assert len(blocks) == 8


# ---- train, eval, generate


def test_training_ends_with_scores_and_a_sample(run: Trained) -> None:
    assert f"step {STEPS}: held-out" in run.done.err and "perplexity" in run.done.err
    assert re.search(rf"^step {STEPS} +loss \d", run.done.err, re.MULTILINE)
    assert run.done.out.startswith(str(tiny.KNOBS["sample.prompt"]))


def test_training_again_says_that_it_is_done(workdir: Path, store: Path) -> None:
    before = files(workdir)
    done = works("train", f"--workdir={workdir}", *knobs(store))
    assert f"{workdir} is done: {STEPS} of {STEPS} steps" in done.err
    assert f"generate --workdir={workdir}" in done.out
    after = files(workdir)
    kept = [name for name in before if name != records.ENVIRONMENT]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_eval_gives_the_number_that_training_logged(run: Trained, store: Path) -> None:
    done = works("eval", f"--workdir={run.workdir}", "--json")
    found = json.loads(done.out)
    assert found["step"] == STEPS
    (score,) = found["scores"].values()
    assert score["loss"] == run.last_val_loss  # bitwise
    assert score["tokens"] == Store.open(store / "val", None).num_tokens
    assert found["convention"]["context"] == found["convention"]["stride"] == 16
    # In the words of a person, and by another convention, which is an override.
    done = works("eval", f"--workdir={run.workdir}", "--config.eval.stride=5")
    assert "context 16, stride 5, prefix eot, documents joined" in done.out
    assert f"step {STEPS}" in done.out and f"{score['tokens']:,}" in done.out
    done = works("eval", f"--workdir={run.workdir}", "--config.eval.stride=5", "--json")
    (other,) = json.loads(done.out)["scores"].values()
    assert other["tokens"] == score["tokens"]
    assert other["loss"] != pytest.approx(score["loss"], rel=1e-6)


def test_eval_of_several_texts_gives_their_sum(run: Trained, store: Path, text: Path) -> None:
    other = text.parent / "other"
    words = ["data", str(text), f"--out={other}", "--tokenizer=bytes", "--val_fraction=0.5"]
    works(*words)
    sources = f"--config.data.sources=('{store}','{other}')"
    found = json.loads(works("eval", f"--workdir={run.workdir}", "--json", sources).out)["scores"]
    one, two, whole = (found[name] for name in (str(store), str(other), "all"))
    assert one["loss"] == run.last_val_loss
    for part in ("nats", "tokens", "bytes"):
        assert whole[part] == one[part] + two[part]


def test_generation_is_seeded(run: Trained) -> None:
    def text(*words: str) -> str:
        done = works("generate", f"--workdir={run.workdir}", "--prompt=1 4 9", *words)
        assert done.out.startswith("1 4 9")
        return done.out

    first = text()
    assert text() == first == text("--seed=0")
    assert text("--seed=1") != first
    # A run ends with what `generate` says with its own config.
    assert works("generate", f"--workdir={run.workdir}").out == run.done.out
    greedy = [text(f"--seed={seed}", "--config.sample.temperature=0") for seed in (0, 1)]
    assert greedy[0] == greedy[1]


@pytest.mark.usefixtures("eight_devices")
def test_a_sharded_run_is_used_on_another_mesh(tmp_path: Path, run: Trained, store: Path) -> None:
    axes = {"fsdp": 2, "sequence": 2, "tensor": 2}
    sharded = train(tmp_path / "run", store, **{f"mesh__{axis}": n for axis, n in axes.items()})
    kept = json.loads((sharded.workdir / records.CONFIG).read_text())
    assert kept["mesh"] == {"data": None, "expert": 1} | axes
    assert configure.of_run(sharded.workdir).mesh == configure.of_run(run.workdir).mesh
    done = works("eval", f"--workdir={sharded.workdir}", "--json")
    (score,) = json.loads(done.out)["scores"].values()
    assert score["loss"] == pytest.approx(sharded.last_val_loss, rel=1e-6)
    mesh = [f"--config.mesh.{axis}={n}" for axis, n in axes.items()]
    (score,) = json.loads(works("eval", f"--workdir={sharded.workdir}", "--json", *mesh).out)[
        "scores"
    ].values()
    assert score["loss"] == sharded.last_val_loss  # on the mesh of the run bitwise
    assert works("generate", f"--workdir={sharded.workdir}").out == sharded.done.out


# ---- mistakes in a config

MISTAKES: list[tuple[str, Sequence[str]]] = [
    (
        r"unknown config key 'optim.peek_lr' \(did you mean 'optim.peak_lr'\?\); valid keys: b1, ",
        ["--config.optim.peek_lr=1"],
    ),
    (r"'model' is a section of the config; its keys: ", ["--config.model=gpt"]),
    ("--config.model.layers=two: invalid literal", ["--config.model.layers=two"]),
    ("--config.model.layers=2.5: invalid literal", ["--config.model.layers", "2.5"]),
    ("model.layers must be int, got None", ["--config.model.layers", "None"]),
    ("Missing value for flag --config.seed", ["--config.seed"]),
    ("--config.seed=1=None: invalid literal", ["--config.seed=1=None", "None"]),
    (r"model.windows\[0\] must be int or None, got '\(None,x\)'", ["--config.model.windows=(None,x)"]),
    ("model.width=18 is not divisible by model.heads=4", ["--config.model.width=18"]),
    ("data.batch_size=8 is not divisible by train.acc", ["--config.train.accumulation=3"]),
    ("model.position='ropee' is not one of: .*rope.*did you mean", ["--config.model.position=ropee"]),
    ("model.attention='fused' is not one of: auto, plain, flash, block", ["--config.model.attention=fused"]),
    ("model.remat='some' is not one of: none, dots", ["--config.model.remat=some"]),
    ("optim.optimizer='adam' is not one of: adamw", ["--config.optim.optimizer=adam"]),
    ("optim.schedule='wsc' is not one of: constant", ["--config.optim.schedule=wsc"]),
    ("eval.prefix='begin' is not one of: eot, bos, none", ["--config.eval.prefix=begin"]),
    ("data.packing='padded' is not one of: stream", ["--config.data.packing=padded"]),
    ("data.tokenizer='gpt3' is not one of: .*gpt2", ["--config.data.tokenizer=gpt3"]),
    ("eval.context=17 is beyond the 16 learned positions", ["--config.eval.context=17"]),
    ("unexpected argument 'fast'", ["fast"]),
    ("unexpected argument 'None'", ["None"]),
    ("Unknown command line flag 'sed'", ["--sed=1"]),
    ("data.sources: 'nowhere' is neither a token store", ["--config.data.sources=('nowhere',)"]),
    ("'bytes' has 257 tokens, more than model.vocab_size=256", ["--config.model.vocab_size=256"]),
    (
        "was tokenised with 'bytes', but the tokenizer here is 'gpt2'",
        ["--config.data.tokenizer=gpt2", "--config.model.vocab_size=50264"],
    ),
    ("mesh data=3 x fsdp=1 x tensor=1 wants 3 devices, but this run has 8", ["--config.mesh.data=3"]),
    ("model.heads=4 does not divide over mesh axes tensor = 8", ["--config.mesh.tensor=8"]),
    ("data.batch_size / train.accumulation=6 does not divide", ["--config.data.batch_size=6"]),
    ("sample.prompt has 17 tokens, more than model.context=16", [f"--config.sample.prompt={'x' * 17}"]),
    ("sample.stop='ab' is 2 tokens of 'bytes'", ["--config.sample.stop=ab"]),
    ("less than one row of context", ["--config.model.context=4096", "--config.eval.context=16"]),
]  # fmt: skip


@pytest.mark.parametrize(("message", "overrides"), MISTAKES, ids=[" ".join(w) for _, w in MISTAKES])
@pytest.mark.usefixtures("eight_devices")
def test_a_mistake_is_told_before_anything_is_written(
    message: str, overrides: Sequence[str], store: Path, tmp_path: Path
) -> None:
    before = files(store)
    refused(message, "train", f"--workdir={tmp_path / 'run'}", *knobs(store), *overrides)
    assert not (tmp_path / "run").exists() and files(store) == before


@pytest.mark.parametrize(
    "words",
    [
        "train --workdir=NAME",
        "doctor --workdir=NAME",
        "train --workdir=NAME --on=slurm",
        "study --axis=seed=1,2 --store=NAME",
        "noise --store=NAME",
        "data text.txt --out=NAME",
        "import models/a --out=NAME",
    ],
)
def test_nothing_is_written_under_a_model_s_name_on_the_hub(words: str) -> None:
    """There `eval` and others would never find it: they ask the hub."""
    for name in ("hf:lab/gpt", "./hf:gpt"):
        refused("names a model on the hub", *words.replace("NAME", name).split())


def test_a_config_file_that_does_not_work(tmp_path: Path) -> None:
    refused("no config file nowhere.py", "train", "--config=nowhere.py")
    file = tmp_path / "recipe.py"
    for content, message in (
        ("def get_config(:", "cannot be read: invalid syntax"),
        ("1 / 0", "cannot be read: division by zero"),
        ("get_config = None", r"cannot be read: it defines no get_config\(\)"),
        ("get_config = 3", "cannot be read: 'int' object is not callable"),
        ("def get_config(): return 3", "must return a ConfigDict"),
    ):
        file.write_text(content)
        refused(message, "config", f"--config={file}")
    refused("no size '125m'; sizes: 124m", "config", f"--config={REPO / 'configs/gpt2.py'}:125m")


# ---- mistakes in the data


@pytest.mark.parametrize(
    ("name", "content", "words", "message"),
    [
        ("a.txt", None, [], "a.txt is no file"),
        ("a.txt", b"", [], "a.txt holds no text"),
        ("a.txt", b"abc\xff", [], "is not UTF-8: byte 3"),
        ("a.csv", b"abc", [], "'.csv' is not one of: .txt, .raw, .jsonl, .parquet"),
        ("a.txt", b"abc", ["--val_fraction=1"], r"val_fraction must lie in \[0, 1\), got 1.0"),
        ("a.txt", b"abc", ["--val_fraction=0.9"], "a text of 3 characters leaves none for 'train'"),
        ("a.txt", b"abc", ["--tokenizer=byte"], r"'byte' is not one of: .*did you mean 'bytes'"),
        ("a.txt", b"abc", ["--config.seed=1"], "unexpected argument '--config.seed=1'"),
        ("a.jsonl", b'{"body": "x"}', [], r"no key 'text': .* \(body\)"),
        ("a.jsonl", b"{", [], "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "a", "n": NaN}', [], "NaN is no number of JSON"),
        ("a.parquet", b"abc", [], "cannot be read as parquet"),
    ],
)
def test_a_text_that_cannot_be_used(
    tmp_path: Path, name: str, content: bytes | None, words: list[str], message: str
) -> None:
    file, out = tmp_path / name, tmp_path / "out"
    if content is not None:
        file.write_bytes(content)
    words = [f"--out={out}", "--tokenizer=bytes", *words]
    refused(message, "data", str(file), *words)
    assert list(tmp_path.iterdir()) == ([] if content is None else [file])


def test_a_store_is_not_replaced(tmp_path: Path, store: Path) -> None:
    file = tmp_path / "other.txt"
    file.write_text("another text")
    before = files(store)
    words = ["data", str(file), f"--out={store}", "--tokenizer=bytes"]
    refused("holds a store of another text or val_fraction", *words)
    refused("was tokenised with 'bytes'", *words[:3], "--tokenizer=gpt2")
    assert files(store) == before


def test_a_damaged_store_is_refused(tmp_path: Path, store: Path, run: Trained) -> None:
    damaged = shutil.copytree(store, tmp_path / "store")
    shard = damaged / "train" / "tokens-00000.bin"
    whole = shard.read_bytes()

    def all_refuse(message: str) -> None:
        refused(message, "train", f"--workdir={tmp_path / 'run'}", *knobs(damaged))
        refused(message, "data", "show", *knobs(damaged))

    flip(shard)
    all_refuse(r"tokens-00000.bin was altered \(wrong sha256\): delete the store and prepare")
    shard.write_bytes(whole[:-2])
    all_refuse("holds .* bytes where .* were written: the file is truncated or altered")
    shard.write_bytes(whole)
    flip(damaged / "val" / "tokens-00000.bin")
    eval_words = ["eval", f"--workdir={run.workdir}", f"--config.data.sources=('{damaged}',)"]
    refused("tokens-00000.bin was altered", *eval_words)
    (damaged / "train" / "manifest.json").write_text("{")
    all_refuse("manifest.json is damaged or of another version")
    assert not (tmp_path / "run").exists()


def test_a_token_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    ids = np.arange(4000, dtype="<u2") % 257
    for split in ("train", "val"):
        ids.tofile(tmp_path / f"{split}.bin")
    works("data", "show", *knobs(tmp_path))
    ids[1234] = 257
    ids.tofile(tmp_path / "train.bin")
    message = "train.bin holds token id 257, outside the vocabulary of 257"
    refused(message, "train", f"--workdir={tmp_path / 'run'}", *knobs(tmp_path))
    refused(message, "data", "show", *knobs(tmp_path))
    assert not (tmp_path / "run").exists()


def test_what_data_show_refuses(store: Path) -> None:
    words = ["data", "show", *knobs(store)]
    for step in (-1, 2**31, 10**30):
        refused(rf"--step must lie in \[0, 2\^31\), got {step}", *words, f"--step={step}")
    refused("no split 'test': choose one of train, val", *words, "--split=test")
    refused("unknown config key 'sed'", *words, "--config.sed=1")
    refused("--workdir shows what a run reads: leave --config out", *words, "--workdir=run")
    refused("run holds no run", "data", "show", "--workdir=run")
    for rows in (-1, 0):
        refused(f"--rows must be above 0, got {rows}", *words, f"--rows={rows}")


# ---- mistakes with a run


def test_a_folder_without_a_run(tmp_path: Path, workdir: Path) -> None:
    for command in ("eval", "generate"):
        refused("holds no run: it has no config.json", command, f"--workdir={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()
    shutil.rmtree(workdir / CHECKPOINTS)
    for command in ("eval", "generate"):
        refused("holds no complete checkpoint: train it first", command, f"--workdir={workdir}")
    for content, message in (
        ("{", "JSON object"),
        ("{}", "missing config keys: seed"),
        ("null", "JSON object"),
    ):
        (workdir / records.CONFIG).write_text(content)
        refused(f"config.json is .*{message}", "eval", f"--workdir={workdir}")
        with pytest.raises(UserError, match=f"config.json is .*{message}"):
            configure.of_run(workdir)


def test_another_model_or_config_in_the_same_folder(run: Trained, store: Path) -> None:
    before = files(run.workdir)
    here = f"--workdir={run.workdir}"
    message = "does not fit the weights in .*: model.layers=3, where they have 1$"
    for command in ("eval", "generate"):
        refused(message, command, here, "--config.model.layers=3")
        refused(
            "was tokenised|'gpt2' has 50257 tokens", command, here, "--config.data.tokenizer=gpt2"
        )
    refused("optim.peak_lr was 0.001, is 0.1", "train", here, *knobs(store, optim__peak_lr=0.1))
    refused("model.layers was 1, is 3", "train", here, *knobs(store, model__layers=3))
    assert files(run.workdir) == before


def test_a_damaged_checkpoint_is_refused(workdir: Path) -> None:
    state = workdir / CHECKPOINTS / f"{STEPS:08d}" / "state"
    flip(max((p for p in state.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
    for command in ("eval", "generate"):
        refused("is damaged: .* Delete that folder", command, f"--workdir={workdir}")


def test_what_generation_refuses(run: Trained) -> None:
    words = ["generate", f"--workdir={run.workdir}"]
    refused(
        "sample.prompt has 17 tokens, more than model.context=16", *words, f"--prompt={'x' * 17}"
    )
    refused("sample.stop='ab' is 2 tokens", *words, "--config.sample.stop=ab")
    refused("sample.temperature must not be negative", *words, "--config.sample.temperature=-1")
    assert gptjax("generate").status == EXIT_USER_ERROR
    assert gptjax(*words, "--seed=x").status == EXIT_USER_ERROR


def test_a_disk_that_fills_while_saving(small_disk: Path, store: Path) -> None:
    many = {"train__steps": 30, "train__checkpoint_every": 1, "train__keep_checkpoints": 30}
    words = ["train", f"--workdir={small_disk}", *knobs(store, train__eval_every=30, **many)]
    # A process of its own, at whose end asyncio reports what nobody awaited. It finds no git,
    # whose diff could fill the disk alone.
    done = subprocess.run(
        [sys.executable, str(REPO / "launch.py"), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": ""},
        check=False,
    )
    assert (done.returncode, done.stdout) == (EXIT_USER_ERROR, "")
    told = re.fullmatch(
        r"gptjax: could not write the checkpoint of step \d+ to .*: No space left on device\. "
        r"Free some space .* resumes from step (\d+)",
        done.stderr.splitlines()[-1],
    )
    assert told and "Traceback" not in done.stderr, done.stderr
    # Nothing is lost: what was saved is whole.
    done = works("eval", f"--workdir={small_disk}", "--json", "--config.eval.max_tokens=64")
    assert json.loads(done.out)["step"] == int(told[1]) > 0


# ---- studies

LADDER = [f"{10**n},{10**7},{2 + 50 / 10 ** (n * 0.3)}" for n in (4, 5, 6, 7, 8)]
ARM = 'Study("h", base={base!r}, arms={{"a": {arm}}}, {more})'


class Studied(NamedTuple):
    store: Path
    words: list[str]
    done: Done


def on_one_device(store: Path) -> list[str]:
    return knobs(store, mesh__data=1, eval__max_tokens=32, train__eval_every=2)


@pytest.fixture(scope="module")
def studied(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Studied:
    """A planted loss: the second arm learns at a ten-thousandth of the rate."""
    folder = tmp_path_factory.mktemp("study")
    axis = ["--axis", "optim.peak_lr=1e-2,1e-6", f"--store={folder / 'cells'}", "--seeds=3"]
    words = [*on_one_device(store), *axis]
    done = works("study", *words, f"--out={folder / 'out'}")
    return Studied(folder / "cells", words, done)


def test_a_study_runs_once_and_is_reported(studied: Studied, tmp_path: Path) -> None:
    assert "6 runs: 0 there, 6 to run" in studied.done.err
    assert "worse" in studied.done.out and "1 worse of 1 comparison" in studied.done.out
    made = {folder.name for folder in studied.store.glob("*")}
    before = files(studied.store)
    out = f"--out={tmp_path / 'out'}"
    again = works("study", *studied.words, out)
    assert "6 runs: 6 there, 0 to run" in again.err and "step 1" not in again.err
    assert files(studied.store) == before
    told = works("report", *studied.words, out)
    last = "the report: "
    assert told.out == again.out
    assert told.out.partition(last)[0] == studied.done.out.partition(last)[0]
    named = told.out.partition(last)[2].strip().split(", ")
    assert sorted(tmp_path.glob("out/*")) == [Path(name) for name in named]
    assert {Path(name).suffix for name in named} == {".html", ".md", ".csv", ".tex"}
    plan = works("study", *studied.words, "--seeds=4", "--dry_run")
    assert "8 runs: 6 there, 2 to run" in plan.out and not plan.err
    assert "peak_lr=1e-6  optim.peak_lr=1e-6; 512 tokens" in plan.out
    assert {folder.name for folder in studied.store.glob("*")} == made


def test_noise_of_runs_that_a_study_made(studied: Studied, store: Path) -> None:
    folders = [file.parent for file in studied.store.glob(f"*/{records.CONFIG}")]
    losses = [
        read_metrics(folder)[-1]["val_loss"]
        for folder in folders
        if configure.of_run(folder).optim.peak_lr == 1e-2
    ]
    sd = float(np.std(losses, ddof=1))
    words = [*on_one_device(store), "--config.optim.peak_lr=1e-2", f"--store={studied.store}"]
    done = works("noise", *words, "--seeds=3", f"--effect={sd}")
    assert "3 runs: 3 there, 0 to run" in done.err
    assert f"val_loss {np.mean(losses):.4f} nats/token, 3 seeds" in done.out
    assert f"sd between seeds: {sd:.2g} " in done.out
    # A difference of independent runs has sqrt(2) of their sd. By tables of the paired t test,
    # an effect of 0.707 sd is seen by 18 pairs with 80% power.
    assert re.search(r"^  a difference of \S+: 18 seeds \(", done.out, re.MULTILINE)


def test_runs_that_compute_something_else_are_not_mixed(studied: Studied, tmp_path: Path) -> None:
    """Code that computes the same may differ: a comment outlaws no finished run."""
    cells = shutil.copytree(studied.store, tmp_path / "cells")
    path = min(cells.glob(f"*/{records.ENVIRONMENT}"))
    history = json.loads(path.read_text())
    history[-1]["code"] = "0123456789abcdef"
    path.write_text(json.dumps(history))
    words = [*studied.words, f"--store={cells}", f"--out={tmp_path / 'out'}"]
    works("report", *words)
    shutil.rmtree(tmp_path / "out")
    computes = json.loads((path.parent / COMPUTES).read_text())
    computes["facts"]["step"] = "0123456789abcdef"
    (path.parent / COMPUTES).write_text(json.dumps(computes))
    other = f"{path.parent.name} .*does not compute what this code does: it differs in step"
    refused(other, "report", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("few_replicates")
def test_a_ladder_of_runs_is_fitted(store: Path, tmp_path: Path) -> None:
    """Of the same rungs, by the runs and by a table of what they logged, the same law."""
    cells, picture = tmp_path / "cells", tmp_path / "law.png"
    words = ["--axis", "train.steps=4,8,16,32", f"--store={cells}", "--seeds=1"]
    shared = [word for word in on_one_device(store) if "train.steps" not in word]
    done = works("scaling", *shared, *words, "--json", f"--png={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = ["parameters,tokens,loss"]
    for file in cells.glob(f"*/{records.CONFIG}"):
        config = configure.of_run(file.parent)
        count = sum(np.prod(p.shape) for p in jax.tree.leaves(abstract_params(config.model)))
        tokens = config.train.steps * config.data.batch_size * config.model.context
        table.append(f"{count},{tokens},{read_metrics(file.parent)[-1]['val_loss']!r}")
    (tmp_path / "ladder.csv").write_text("\n".join([table[0], *sorted(table[1:], key=_tokens)]))
    again = works("scaling", f"--points={tmp_path / 'ladder.csv'}", "--json")
    assert len(table) == 5 and again.out == done.out
    assert set(json.loads(done.out)["constants"]) == {"E", "B", "b"}


def _tokens(line: str) -> int:
    return int(line.split(",")[1])


@pytest.mark.parametrize("command", ["study", "report", "scaling"])
@pytest.mark.parametrize(
    ("message", "study", "words"),
    [
        ("name either a study's FILE or", None, []),
        ("names its own base", ARM.format(base=RECIPE, arm={"seed": 9}, more=""), [f"--config={RECIPE}"]),
        ("no study nowhere.py", None, ["nowhere.py"]),
        ("no config file nowhere.py", None, ["--config=nowhere.py", "--axis", "seed=1,9"]),
        ("must define STUDY", "None", []),
        ("cannot be read: NameError", "Nothing", []),
        ("--axis seed: write a knob and two or more", None, ["--axis", "seed"]),
        ("unknown config key 'model.positon'", None, ["--axis", "model.positon=rope,none"]),
        ("--axis seed is given twice", None, ["--axis", "seed=1,9", "--axis", "seed=2,3"]),
        ("'a' is the same as 'base'", ARM.format(base=RECIPE, arm={"model.position": "learned"}, more=""), []),
        (
            "arm 'a': parameters cannot be made equal",
            ARM.format(base=RECIPE, arm={"model.width": 8, "model.ff_dim": 8}, more="equal='parameters'"),
            [],
        ),
        ("it sets train.steps", ARM.format(base=RECIPE, arm={"train.steps": 2}, more=""), []),
        ("seeds must be above 0, got 0", None, ["--axis", "optim.b1=0.8,0.9", "--seeds=0"]),
        ("Unknown command line flag 'sed'", None, ["--axis", "optim.b1=0.8,0.9", "--sed=1"]),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 45 else "",
)  # fmt: skip
def test_a_study_that_cannot_be(
    command: str,
    message: str,
    study: str | None,
    words: Sequence[str],
    store: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.py"
    if study is not None:
        file.write_text(f"from gptjax.study.spec import Study\nSTUDY = {study}\n")
        words = [str(file), *words]
    recipe = [f"--config={RECIPE}"] if "--axis" in words and "--config" not in words[0] else []
    cells = tmp_path / "cells"
    refused(message, command, *words, *recipe, f"--store={cells}", *tiny.overrides(store))
    assert not cells.exists()


def test_what_the_commands_of_studies_refuse(tmp_path: Path) -> None:
    refused("--seeds=1: noise is measured between 2 seeds or more", "noise", "--seeds=1")
    refused("--effect=0 must be above 0", "noise", "--effect=0")
    refused("no config file nowhere.py", "noise", "--config=nowhere.py")
    table = tmp_path / "ladder.csv"
    refused("cannot read .*ladder.csv as a CSV table: No such file", "scaling", f"--points={table}")
    table.write_text("parameters,tokens,loss\n" + "\n".join(LADDER))
    points = f"--points={table}"
    refused("--points has all the numbers: leave FILE", "scaling", points, "--axis", "seed=1,2")
    refused("--png=x.gif must end in .png or", "scaling", points, "--png=x.gif")
    refused(
        "no folder .*nowhere, make it first", "scaling", points, f"--png={tmp_path}/nowhere/a.png"
    )
    refused("a budget is shared out only by a law of both", "scaling", points, "--flops", "1e18")
    table.write_text("parameters,tokens,loss\n" + "\n".join(LADDER[:3]))
    refused("3 points of 3 distinct sizes do not exceed the 3 constants", "scaling", points)


def test_what_coord_check_refuses(tmp_path: Path) -> None:
    words = ["coord-check", f"--config={RECIPE}", *tiny.overrides(tmp_path)]
    refused("needs two or more different --widths, or --depths", *words)
    refused("needs two or more different --widths", *words, "--widths=32")
    refused("--depths=2,two: write whole numbers", *words, "--depths=2,two")
    refused("--html=x.txt must end in .html", *words, "--widths=16,32", "--html=x.txt")


def test_coord_check_tells_by_its_status(store: Path, tmp_path: Path) -> None:
    """Without muP updates grow with the width."""
    words = [*on_one_device(store), "--widths=16,64", "--steps=1", "--seeds=1"]
    done = gptjax(
        "coord-check", *words, f"--png={tmp_path / 'c.png'}", f"--html={tmp_path / 'c.html'}"
    )
    assert done.status == EXIT_FAILED and "FAILED" in done.out
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "c.html").read_text()


def test_replay_tells_by_its_status(workdir: Path, run: Trained, tmp_path: Path) -> None:
    done = works("replay", str(workdir))
    assert "it is the same, bit for bit" in done.out
    log = workdir / records.METRICS
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[0]["loss"] *= 1.01
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = gptjax("replay", str(workdir), "--json")
    found = json.loads(done.out)
    assert done.status == EXIT_FAILED and not found["same"] and "loss" in found["reason"]
    refused("is no pretrained model", "replay", str(workdir), f"--from={run.workdir}")
    refused("unexpected argument '--config.seed=1'", "replay", str(workdir), "--config.seed=1")
    refused("holds no run", "replay", str(tmp_path / "none"))
    with (workdir / records.CONFIG).open("a") as file:
        file.write(" ")
    refused("config.json", "replay", str(workdir))


# ---- names, numbers and places


def test_a_name_or_number_that_cannot_be_is_refused_by_whatever_takes_a_config(
    store: Path, tmp_path: Path
) -> None:
    """Before any work: each alone is tested in test_config.py and test_study.py."""
    cells = tmp_path / "cells"
    for knob, message in (
        ("model.attention=flsh", "model.attention='flsh' is not one of: auto, plain"),
        ("data.packing=maskd", "data.packing='maskd' is not one of: stream, masked"),
        ("eval.prefix=eof", "eval.prefix='eof' is not one of: eot, bos"),
        ("data.tokenizer=gpt22", "data.tokenizer='gpt22' is not one of: bytes, gpt2"),
        ("optim.peak_lr=inf", "optim.peak_lr must be finite, got inf"),
        ("seed=4294967296", r"seed must lie in \[0, 2\^32\), got 4294967296"),
    ):
        words = [*knobs(store), f"--config.{knob}"]
        refused(message, "config", *words)
        refused(message, "train", *words, f"--workdir={tmp_path / 'run'}")
        axis = ["--axis", "model.qk_norm=False,True", "--dry_run", f"--store={cells}"]
        refused(message, "study", *words, *axis)
    assert not list(tmp_path.iterdir())


def test_a_sample_that_cannot_be_drawn_is_refused_before_a_training(
    store: Path, tmp_path: Path
) -> None:
    dynamic = {"model__position": "rope", "model__rope_scaling": "dynamic"}
    words = knobs(store, **dynamic, model__rope_original_context=8, sample__max_new_tokens=20)
    folder = tmp_path / "run"
    refused("a text of 16 tokens is beyond .*=8", "train", *words, f"--workdir={folder}")
    assert not folder.exists()


def test_a_seed_of_the_command_line_is_used_whole_or_refused(run: Trained) -> None:
    words = ["generate", f"--workdir={run.workdir}"]
    texts = {works(*words, f"--seed={seed}").out for seed in (0, 2**32 - 1)}
    assert len(texts) == 2
    for seed in (-1, 2**32):
        refused(rf"seed must lie in \[0, 2\^32\), got {seed}", *words, f"--seed={seed}")


@pytest.mark.parametrize("effect", ["nan", "inf", "-inf", "0"])
def test_noise_is_not_held_against_what_is_no_number(effect: str) -> None:
    refused(f"--effect={effect} must be above 0 and finite", "noise", f"--effect={effect}")


def test_every_command_works_outside_of_the_checkout(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = [
        works("config", f"--config={REPO}/configs/{name}") for name in ("base.py", "shakespeare.py")
    ]
    monkeypatch.chdir(tmp_path)
    assert works("config", "--config=configs/base.py").out == here[0].out
    assert works("config").out == here[1].out
    assert works("config", "--config=configs/gpt2.py:124m", "--diff=configs/gpt2.py:355m").out
    done = works("study", "--axis", "model.qk_norm=False,True", "--dry_run", "--seeds=1")
    assert "2 runs: 0 there, 2 to run" in done.out
    assert not list(tmp_path.iterdir())


def test_the_home_is_no_folder_of_that_name(
    run: Trained, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.workdir, home / "run")
    works("eval", "--workdir=~/run", "--html=~/page.html")
    works("export", "--workdir=~/run", "--out=~/model")
    works("data", str(store.parent / "squares.txt"), "--out=~/store", "--tokenizer=bytes")
    assert works("data", "show", *knobs(Path("~/store")), "--rows=1").out
    assert {p.name for p in home.iterdir()} >= {"run", "page.html", "model", "store"}
    refused("holds no run", "eval", "--workdir=~/none")
    refused("its home directory is not known", "eval", "--workdir=~nobody-is-called-so/run")
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


# ---- streams


@contextlib.contextmanager
def terminal(encoding: str) -> Iterator[io.BytesIO]:
    """What is shown on a terminal of that encoding, and errors with it."""
    shown = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stdout", "stderr"):
            stream = io.TextIOWrapper(shown, encoding=encoding, write_through=True)
            patch.setattr(sys, name, stream)
        yield shown
        sys.stdout.detach()
        sys.stderr.detach()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_no_terminal_kills_a_command(
    encoding: str, run: Trained, store: Path, tmp_path: Path
) -> None:
    prompt = "--config.sample.prompt=é月"
    here = f"--workdir={run.workdir}"
    for words in (
        ["config", f"--config={RECIPE}", prompt],
        ["data", "show", *knobs(store), "--rows=1"],
        ["eval", here],
        ["generate", here, prompt],
        ["train", f"--workdir={tmp_path / 'run'}", *knobs(store, sample__prompt="é月")],
    ):
        with terminal(encoding) as shown:
            assert main(words) == 0
        text = shown.getvalue().decode(encoding)
        if prompt in words:
            told = "é月".encode(encoding, errors="backslashreplace").decode(encoding)
            assert told in text


@pytest.mark.parametrize("words", [["data", "show"], ["config"], ["--help"], ["eval", "--help"]])
def test_a_reader_that_has_gone_is_no_error(
    words: list[str], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    err = io.StringIO()
    with os.fdopen(writing, "w") as pipe, redirect_stdout(pipe), redirect_stderr(err):
        more = knobs(store) if words[-1] != "--help" else []
        assert main([*words, *more]) == cli.EXIT_PIPE == 141
    assert not err.getvalue()


@pytest.mark.slow
def test_what_keeps_jax_from_starting_is_told_in_a_line() -> None:
    """Each in a process of its own, all at once: jax starts only once in a process."""
    started = {}
    for setting in (
        "JAX_PLATFORMS=gpu",
        "JAX_PLATFORMS=cuda",
        "JAX_PLATFORMS=x",
        "JAX_ENABLE_X64=x",
    ):
        name, _, value = setting.partition("=")
        command = [sys.executable, str(REPO / "launch.py"), "config", f"--config={RECIPE}"]
        started[setting] = subprocess.Popen(
            command, env=os.environ | {name: value}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    for setting, process in started.items():
        out, err = process.communicate()
        assert (process.returncode, out) == (EXIT_USER_ERROR, b"")
        lines = [line for line in err.decode().splitlines() if line.startswith("gptjax: ")]
        assert len(lines) == 1 and "Traceback" not in err.decode(), err
        assert lines[0].startswith("gptjax: jax cannot start: ") and setting in lines[0]


# ---- the frame


def test_a_word_that_is_no_command() -> None:
    refused("no command 'evaluate'; commands: train, doctor, eval", "evaluate", "--workdir=x")


def test_an_override_is_no_file_and_no_question(store: Path) -> None:
    """Neither where it has a space nor where its value stands apart."""
    file = str(REPO / "experiments" / "same.py")
    for words in (["--config.sample.prompt=a b"], ["--config.data.batch_size", "4"]):
        done = works("study", *words, file, "--seeds=1", "--dry_run", f"--store={store / 'none'}")
        assert f"{' '.join(words)}\n" in done.out and "3 runs: 0 there, 3 to run" in done.out
    refused("unexpected argument '4'", "config", f"--config={RECIPE}", "--config.seed=1", "4")


def test_debug_shows_where(store: Path, tmp_path: Path) -> None:
    words = ["train", f"--workdir={tmp_path / 'run'}", *knobs(store), "--config.mesh.data=3"]
    with pytest.raises(ConfigError, match="wants 3 devices"):
        main([*words, "--debug"])


def test_what_is_no_mistake_of_the_user_s_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def command(error: BaseException) -> None:
        def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
            raise error

        monkeypatch.setitem(cli.COMMANDS, "config", COMMANDS["config"]._replace(run=run))

    command(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        main(["config"])
    for error, status, message in (
        (UserError("do that"), EXIT_USER_ERROR, "gptjax: do that\n"),
        (KeyboardInterrupt(), 130, "gptjax: interrupted\n"),
        (loop.Stopped(), cli.EXIT_STOPPED, ""),
        (PermissionError(13, "Permission denied", "x"), 2, "gptjax: x: Permission denied\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3G"), 2, "gptjax: out of memory (RESOURCE_EXH"),
        (
            RuntimeError("INTERNAL: x: Out of memory allocating 3"),
            2,
            "gptjax: out of memory (INTERNAL: x: Out of memory allocating 3): raise ",
        ),
        (MemoryError(), 2, "gptjax: out of memory (the host): raise train.accumulation, lower"),
    ):
        command(error)
        done = gptjax("config")
        assert (done.status, done.out) == (status, "")
        assert done.err.startswith(message) and done.err.count("\n") == bool(message)


def test_distributed_wants_an_address(run: Trained) -> None:
    words = ["eval", f"--workdir={run.workdir}", "--distributed=localhost:1234,2"]
    refused("--distributed=localhost:1234,2 is neither 'auto' nor HOST:PORT", *words)


def test_a_study_whose_runs_cannot_run_reports_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["study", "--config=configs/ablation.py", "--axis", "model.position=rope,alibi"]
    words += ["--seeds=1", f"--store={tmp_path / 'cells'}", f"--out={tmp_path / 'out'}"]
    assert main([*words, "--config.sample.stop=abc"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("gptjax: 2 cells could not run; the first, position=rope, seed 0: ")
    assert "(1 failed)" in (tmp_path / "out" / "report.md").read_text()
