"""What the documents say holds: commands run, names are there, links lead somewhere.

The commands of the README, docs/features.md, docs/plan.md and docs/speed.md run in their order, in this
process.
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import json
import pkgutil
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

import gptjax
from gptjax import model
from gptjax.cli import COMMANDS, main
from gptjax.layers import feedforward
from tests import hub, tiny

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text()
FEATURES, PLAN, SPEED, ADDING, READING, ROAD = (
    (REPO / "docs" / f"{name}.md").read_text()
    for name in ("features", "plan", "speed", "adding", "reading", "road")
)
WORDS = 900  # of the README at most: a reader is to finish it


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a document in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


LINES = [
    line
    for document in (README, FEATURES, PLAN, SPEED)
    for block in blocks(document, "sh")
    for line in block.replace("\\\n", " ").splitlines()
]
LAUNCHES = [shlex.split(line, comments=True)[2:] for line in LINES if "launch.py" in line]
# Small enough to run here; what a command of the README sets itself is overruled.
SMALL = {
    k: v for k, v in tiny.KNOBS.items() if k.startswith(("model.", "train.", "optim.", "eval."))
}
SMALL |= {
    "train.steps": 4,
    "model.vocab_size": 2048,
    "model.layers": 2,
    "optim.warmup_steps": 1,
    "data.batch_size": 8,
    "train.accumulation": 1,
}
SMALL |= {
    "model.context": 64,
    "eval.max_tokens": 64,
    "optim.loss_vocab_chunk": "None",
    "data.sources": "shakespeare",
}
TRAINS = ("train", "eval", "generate", "tasks")
# What overrules a command of the README so that it runs here in seconds.
STUDIED = [
    *(f"--config.{knob}={value}" for knob, value in (SMALL | {"model.vocab_size": 264}).items()),
    "--config.sample.max_new_tokens=4",
]
FEW: dict[str, list[str]] = {
    "study": [*STUDIED, "--seeds=1"],
    "report": [*STUDIED, "--seeds=1"],
    "noise": [*STUDIED, "--seeds=2"],
    "data vocabulary": ["--size=270"],
    # For one device of this machine; axes win over knobs.
    "plan": [*STUDIED, "--config.mesh.fsdp=1", "--on=cpu-1"],
    "coord-check": [*STUDIED, "--widths=64,128", "--steps=1", "--seeds=1"],
}
# Stands in for experiments/positions.py, which has five arms.
STUDY = """
from gptjax.study.spec import Study
STUDY = Study("Alike.", "configs/ablation.py", {"alibi": {"model.position": "alibi"}})
"""
# An exact law: loss = 2 + 50 / N^0.3 + 90 / D^0.25.
LADDER = "parameters,tokens,loss\n" + "".join(
    f"{10**n},{10**7 * d},{2 + 50 / 10 ** (n * 0.3) + 90 / (10**7 * d) ** 0.25}\n"
    for n in (4, 5, 6)
    for d in (1, 4, 16)
)
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # for which a tiny model stands in
TEMPLATE = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"


def name_of(words: list[str]) -> str:
    two = " ".join(words[:2])
    return two if two in COMMANDS else words[0]


def test_every_command_is_shown() -> None:
    assert {name_of(words) for words in LAUNCHES} == set(COMMANDS)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[hub.Hub]:
    with hub.served(tmp_path / "hub") as running:
        yield running


@pytest.mark.usefixtures("few_replicates")
def test_the_commands_run_in_their_order(
    tmp_path: Path, running: hub.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/positions.py").write_text(STUDY)
    (tmp_path / "ladder.csv").write_text(LADDER)
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("It was a dark and stormy night.\n" * 40)
    talks = json.dumps({"prompt": "Who is it?", "completion": "The king."}) + "\n"
    (tmp_path / "talks.jsonl").write_text(20 * talks)
    pairs = {"prompt": "Who is it?", "chosen": "The king!", "rejected": "It is the king."}
    (tmp_path / "pairs.jsonl").write_text(20 * (json.dumps(pairs) + "\n"))
    question = {"prompt": "Who is it?", "answer": "king"}
    (tmp_path / "questions.jsonl").write_text(20 * (json.dumps(question) + "\n"))
    (tmp_path / "mine.py").write_text(blocks(FEATURES, "python")[0])
    (tmp_path / "lambada.jsonl").write_text(json.dumps({"text": "It was a dark night"}) + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    # It would serve for ever; tests/test_serve_page.py lets it.
    monkeypatch.setattr("gptjax.serve.app.run", lambda *_: 0)
    small = [f"--config.{knob}={value}" for knob, value in SMALL.items()]
    for words in LAUNCHES:
        more = small if name_of(words) in TRAINS and "--compare" not in words else []
        if words[0] == "train" and words[1].startswith("--from"):
            more = [word for word in small if "model." not in word]
        if any(word.startswith("--config.data.sources") for word in words):
            more = [word for word in more if "data.sources" not in word]
        if words[0] == "serve":
            more = ["--config.model.context=64", "--slots=2"]
        if words[0] in ("train", "generate", "ask", "chat"):
            more = [*more, "--config.sample.max_new_tokens=4", "--config.sample.prompt=A"]
        if words[0] == "import":  # the model that was exported stands in for one that is not here
            words = ["import", "models/mine", *words[2:]]
        if any(word.startswith("--profile") for word in words):
            more = [*more, "--profile=2:3"]  # of the few steps here
        more = [*more, *FEW.get(name_of(words), [])]
        assert main(words + more) == 0, words
        if words[0] == "import":
            (tmp_path / "models/smollm2/chat_template.jinja").write_text(TEMPLATE)
            running.model(SMOLLM2, hub.folder(tmp_path / "models/smollm2"))
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert "<svg" in (tmp_path / "runs/studies/positions/report.html").read_text()
    # Two arms, two rates and, for the noise, two seeds of one: what is asked twice ran once.
    assert len(list((tmp_path / "runs/cells").glob("*/config.json"))) == 5


def test_studies_that_are_shown_are_there() -> None:
    files = [word for words in LAUNCHES for word in words if word.startswith("experiments/")]
    assert files
    assert all((REPO / file).is_file() for file in files)


def test_scripts_that_are_shown_run(capsys: pytest.CaptureFixture[str]) -> None:
    shown = [shlex.split(line)[1:] for line in LINES if line.startswith("python docs/")]
    assert shown
    knobs = ("vocab_size", "context", "layers", "width", "heads")
    small = [f"--config.model.{name}={SMALL[f'model.{name}']}" for name in knobs]
    for file, *words in shown:
        main = runpy.run_path(str(REPO / file))["main"]
        names = main.__globals__
        few = dict(list(names["KNOBS"].items())[:2])
        names.update(STEPS=1, TURNS=1, KNOBS=few)
        main(*words, *small)
        said = capsys.readouterr().out
        assert all(name in said for name in few)


def test_what_a_save_costs_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(REPO / "docs")
    monkeypatch.chdir(REPO)
    page = (REPO / "docs" / "clusters.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^python docs/bench_save.py (.*)$", page, re.MULTILINE)
    main = runpy.run_path(str(REPO / "docs" / "bench_save.py"))["main"]
    main.__globals__.update(measure=functools.partial(main.__globals__["measure"], turns=1))
    main(*command.split(), *(f"--config.{knob}={value}" for knob, value in SMALL.items()))
    said = capsys.readouterr().out
    assert re.search(r"of which it stands still \d+\.\d+ s .* a save costs -?\d", said, re.DOTALL)


def test_make_has_its_targets() -> None:
    for line in LINES:
        if line.startswith("make "):
            words = shlex.split(line, comments=True)
            done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=REPO, capture_output=True)
            assert done.returncode == 0, done.stderr


def test_the_map_names_only_what_is_there() -> None:
    """That it names every module, on its floor, is held in test_floors.py."""
    tree = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    there = {path.name for top in ("gptjax", "configs") for path in (REPO / top).rglob("*")}
    there |= {path.name for path in REPO.iterdir()}
    for name in re.findall(r"(\w+\.py|\w+/)", tree[1]):
        assert name.rstrip("/") in there, f"the map names {name}, which is not there"


def test_links_lead_somewhere() -> None:
    documents = [*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), REPO / "experiments/README.md"]
    assert len(documents) > 7
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_readme_is_short() -> None:
    # All of it: prose, map, commands and links, as `wc -w` counts.
    assert len(README.split()) <= WORDS


def names_in(file: Path) -> set[str]:
    """What a file defines at its top: functions, classes, tables."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def test_anchors_are_names_in_the_code() -> None:
    stops = re.findall(r"^\d+\. \*\*.*?(?=^\d+\. |^The tests)", READING, re.DOTALL | re.MULTILINE)
    assert len(stops) == 10
    for stop in stops:
        anchors = re.findall(r"`([\w/]+\.py):(\w+)`", stop)
        assert anchors, stop
        for file, name in anchors:
            assert name in names_in(REPO / file), f"docs/reading.md: {file}:{name}"


def test_the_faults_have_their_tests() -> None:
    named = re.findall(r"`(test_\w+)(?:::(test_\w+))?`", (REPO / "docs" / "faults.md").read_text())
    assert len(named) > 40
    for file, name in named:
        source = (REPO / "tests" / f"{file}.py").read_text()
        assert not name or f"\ndef {name}(" in source, f"{file}::{name} is not there"


def test_the_readme_counts_the_faults() -> None:
    page = (REPO / "docs" / "faults.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|") and "`test_" in line]
    assert f"All [{len(rows)} faults](docs/faults.md) that tests inject" in " ".join(README.split())


def test_what_to_edit_is_there() -> None:
    rows = re.findall(r"^\| [^|`]+ \| `([\w/.]+)`(.*?) \|$", ADDING, re.MULTILINE)
    assert len(rows) > 15
    for file, what in rows:
        assert (REPO / file).is_file(), file
        for table in re.findall(r"`([A-Z_]+)`", what):
            assert table in names_in(REPO / file), f"docs/adding.md: {file}: {table}"
    for file in re.findall(r"`((?:gptjax|configs)/[\w/]+\.py)`", ADDING):
        assert (REPO / file).is_file(), file


def test_the_row_that_is_added_is_a_choice_is_counted_and_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (row, study), commands = blocks(ADDING, "python"), blocks(ADDING, "sh")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/reglu.py").write_text(study)
    words = [shlex.split(line)[2:] for block in commands for line in block.splitlines()]
    config, dry_run, run = words
    assert dry_run == [*run, "--dry_run"]  # the runs themselves would take minutes
    assert main(config) != 0
    assert "reglu" in capsys.readouterr().err
    for name, branch in eval(f"{{{row}}}", vars(feedforward)).items():
        monkeypatch.setitem(feedforward.FEEDFORWARD, name, branch)
    assert main(config) == 0
    # Three matrices of D by F in each layer, and the biases of the ablation recipe's block.
    D, F, layers = 64, 192, 4
    assert f"feedforward {layers * (3 * D * F + 2 * F + D):,}," in capsys.readouterr().out
    assert main(dry_run) == 0
    assert "10 runs: 0 there, 10 to run" in capsys.readouterr().out
    small = tiny.model(feedforward="reglu", width=16, ff_dim=24)
    x_BTD = model.hidden(small, model.init(small, 0), jax.numpy.zeros((1, 4), int)).x_BTD
    assert jax.numpy.isfinite(x_BTD).all()


@pytest.mark.slow
def test_the_road_can_be_walked(
    tmp_path: Path, running: hub.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sections = re.split(r"^## ", ROAD, flags=re.MULTILINE)[1:]
    names: dict[str, object] = {}
    for section in sections:
        title, steps = section.splitlines()[0], blocks(section, "python")
        assert steps, title
        if title == "By name":
            assert names.pop("reply") is not None
            running.model(SMOLLM2, hub.folder(tmp_path / "models/first"))
        for step in steps:
            exec(compile(step, f"docs/road.md, {title}", "exec"), names)
    assert names["reply"] is not None


def test_the_commands_beside_the_road_are_as_the_command_line_has_them() -> None:
    text = re.sub(r"^```.*?^```", "", ROAD, flags=re.DOTALL | re.MULTILINE)
    spans = [shlex.split(span) for span in re.findall(r"`([^`]+)`", text)]
    commands = [words for words in spans if name_of(words) in COMMANDS and len(words) > 1]
    assert len(commands) >= 9
    for words in commands:
        name = name_of(words)
        parser = argparse.ArgumentParser(allow_abbrev=False)
        COMMANDS[name].add_arguments(parser)
        parser.parse_args(words[len(name.split()) :])  # exits on a word that it does not know


def entries(nav: list[Any]) -> Iterator[str]:
    """The pages that a menu of mkdocs names: of {title: page}, {title: menu} and bare pages."""
    for entry in nav:
        for page in entry.values() if isinstance(entry, dict) else [entry]:
            yield from entries(page) if isinstance(page, list) else [page]


def test_the_menu_of_the_site_names_every_document_and_every_module() -> None:
    nav = yaml.safe_load((REPO / "mkdocs.yml").read_text())["nav"]
    documents = [*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("experiments/*.md")]
    assert sorted(entries(nav)) == sorted(str(file.relative_to(REPO)) for file in documents)
    hook = runpy.run_path(str(REPO / "docs/api_pages.py"))  # needs no mkdocs until it adds pages
    packages = pkgutil.walk_packages(gptjax.__path__, "gptjax.")
    assert set(hook["modules"]()) == {"gptjax", *(module.name for module in packages)}
    pages = map(hook["page_of"], hook["modules"]().values())
    assert sorted(entries(hook["menu"]())) == sorted(pages)
