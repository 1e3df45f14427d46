"""The README's commands run, its map is the tree, and its links lead somewhere."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from gptjax.cli import COMMANDS, main
from tests import tiny

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text()
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
LAUNCHES = [shlex.split(line, comments=True)[2:] for line in LINES if "launch.py" in line]
# Small enough to run here; what a command of the README sets itself is overruled.
SMALL = {
    k: v for k, v in tiny.KNOBS.items() if k.startswith(("model.", "train.", "optim.", "eval."))
}
SMALL |= {
    "train.steps": 4,
    "model.vocab_size": 50304,
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
TEMPLATE = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"


def name_of(words: list[str]) -> str:
    two = " ".join(words[:2])
    return two if two in COMMANDS else words[0]


def test_every_command_is_shown() -> None:
    assert {name_of(words) for words in LAUNCHES} == set(COMMANDS)


def test_the_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/positions.py").write_text(STUDY)
    (tmp_path / "ladder.csv").write_text(LADDER)
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("It was a dark and stormy night.\n" * 40)
    (tmp_path / "lambada.jsonl").write_text(json.dumps({"text": "It was a dark night"}) + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    small = [f"--config.{knob}={value}" for knob, value in SMALL.items()]
    for words in LAUNCHES:
        more = small if name_of(words) in TRAINS and "--compare" not in words else []
        if words[0] == "train" and words[1].startswith("--from"):
            more = [word for word in small if "model." not in word]
        if words[0] in ("train", "generate", "ask", "chat"):
            more = [*more, "--config.sample.max_new_tokens=4", "--config.sample.prompt=A"]
        if words[0] == "import":  # the model that was exported stands in for one that is not here
            words = ["import", "models/mine", *words[2:]]
        more = [*more, *FEW.get(words[0], [])]
        assert main(words + more) == 0, words
        if words[0] == "import":
            (tmp_path / "models/smollm2/chat_template.jinja").write_text(TEMPLATE)
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert "<svg" in (tmp_path / "runs/studies/positions/report.html").read_text()
    # Two arms, two rates and, for the noise, two seeds of one: what is asked twice ran once.
    assert len(list((tmp_path / "runs/cells").glob("*/config.json"))) == 5


def test_studies_that_are_shown_are_there() -> None:
    files = [word for words in LAUNCHES for word in words if word.startswith("experiments/")]
    assert files
    assert all((REPO / file).is_file() for file in files)


def test_make_has_its_targets() -> None:
    for line in LINES:
        if line.startswith("make "):
            words = shlex.split(line, comments=True)
            done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=REPO, capture_output=True)
            assert done.returncode == 0, done.stderr


def test_the_map_names_every_module() -> None:
    tree = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    missing = [
        path.name
        for path in (REPO / "gptjax").rglob("*.py")
        if path.name != "__init__.py" and path.name not in tree[1]
    ]
    assert not missing, f"the map in README.md lacks {missing}"
    there = {path.name for top in ("gptjax", "configs") for path in (REPO / top).rglob("*")}
    there |= {path.name for path in REPO.iterdir()}
    for name in re.findall(r"(\w+\.py|\w+/)", tree[1]):
        assert name.rstrip("/") in there, f"the map names {name}, which is not there"


def test_links_lead_somewhere() -> None:
    for document in (REPO / "README.md", REPO / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (REPO / target).exists(), f"{document.name} links to {target}"


def test_adding_a_variant_names_files_that_exist() -> None:
    rows = re.findall(r"^\| .*? \| `([\w/.]+)`", README, re.MULTILINE)
    assert rows
    for file in rows:
        assert (REPO / file).exists(), file
