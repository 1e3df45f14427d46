"""Recipes: found wherever one stands, and none knows of another that was read before."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gptjax.config import ConfigError, flatten
from gptjax.configure import RECIPES, difference, find, from_file

REPO = Path(__file__).parents[1]
SHIPPED = sorted(file.name for file in RECIPES.glob("*.py"))


def checkout(folder: Path, **changes: str) -> Path:
    """A copy of the recipes in which lines of base.py are others."""
    shutil.copytree(RECIPES, folder / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    base = folder / "configs" / "base.py"
    for old, new in changes.items():
        text = base.read_text()
        assert text.count(f"m.{old} = ") == 1
        base.write_text(text.replace(f"m.{old} = ", f"m.{old} = {new}  # "))
    return folder


def test_ours_are_found_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = [from_file(str(RECIPES / name)) for name in SHIPPED]
    monkeypatch.chdir(tmp_path)
    assert len(there) > 5 and [from_file(f"configs/{name}") for name in SHIPPED] == there
    assert from_file("configs/gpt2.py:355m").model.layers == 24
    with pytest.raises(ConfigError, match="no config file base.py: .* configs/base.py, "):
        from_file("base.py")


@pytest.mark.parametrize(
    "words, found",
    [
        ("--config.optim.peak_lr=1.0 --config.optim.peak_lr=2.0", 2.0),
        ("--config.data.sources=('a',) --config.data.sources=('b','c')", ("b", "c")),
        ("--config.data.sources ('a',) --config.seed=3 --config.data.sources ('b',)", ("b",)),
        ("--config.optim.clip=None --config.optim.clip=2.0", 2.0),
        ("--config.optim.clip=2.0 --config.optim.clip None", None),
        ("--config.eval.context=8 --config.eval.context=None --config.eval.context 16", 16),
    ],
)
def test_of_a_knob_that_is_named_again_the_last_value_counts(words: str, found: object) -> None:
    """A number's, a tuple's and None."""
    knob = words.partition(" ")[0].partition("=")[0].removeprefix("--config.")
    config = flatten(dataclasses.asdict(from_file("configs/base.py", words.split())))
    assert config[knob] == found


def test_a_word_too_many_is_refused() -> None:
    for words in (["a"], ["--config.seed=1", "a"], ["--config.seed=1", "None"]):
        with pytest.raises(ConfigError, match=f"unexpected argument '{words[-1]}'"):
            from_file("configs/base.py", words)


def test_a_local_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout(tmp_path, layers="7"))
    assert from_file("configs/base.py").model.layers == 7
    assert from_file("configs/shakespeare.py").model.layers == 7


def test_recipes_of_two_checkouts_share_nothing(tmp_path: Path) -> None:
    one, two = (
        checkout(tmp_path / "one"),
        checkout(tmp_path / "two", layers="7", parallel_block="True"),
    )
    for name in ("shakespeare.py", "modern.py", "base.py"):
        for _ in range(2):  # whichever was read before
            a, b = (from_file(str(place / "configs" / name)) for place in (one, two))
            differ = difference(a, b)
            assert "model.parallel_block" in differ
            assert differ.get("model.layers") == (None if name == "modern.py" else (4, 7))
    kept = [str(module) for name, module in sys.modules.items() if name.startswith("configs.")]
    assert not [module for module in kept if str(one) in module or str(two) in module]
    assert str(one) not in sys.path and str(two) not in sys.path


def test_neighbours_are_found_by_the_name_of_their_folder(tmp_path: Path) -> None:
    for place, seed in (("a", 1), ("b", 2)):
        folder = tmp_path / place / "recipes"
        folder.mkdir(parents=True)
        (folder / "shared.py").write_text(f"SEED = {seed}\n")
        (folder / "mine.py").write_text(
            "from configs import base\nfrom recipes.shared import SEED\n\n\n"
            "def get_config():\n    c = base.get_config()\n    c.seed = SEED\n    return c\n"
        )
    for place, seed in (("a", 1), ("b", 2), ("a", 1)):
        assert from_file(str(tmp_path / place / "recipes" / "mine.py")).seed == seed


def test_a_recipe_inherits_nothing_from_the_one_before(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(
        "from configs import base\n\n\ndef get_config(seed='3'):\n    c = base.get_config()\n"
        "    c.seed = int(seed)\n    return c\n"
    )
    bad.write_text("SEED = 4\n")
    assert from_file(str(good)).seed == 3 and from_file(f"{good}:5").seed == 5
    with pytest.raises(ConfigError, match=r"bad.py cannot be read: it defines no get_config\(\)$"):
        from_file(str(bad))
    with pytest.raises(ConfigError, match="cannot be read: invalid literal for int"):
        from_file(f"{good}:x")


def test_a_colon_may_stand_in_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    shutil.copy(RECIPES / "gpt2.py", folder)
    recipe = folder / "gpt2.py"
    assert find(str(recipe)) == (recipe, None) and find(f"{recipe}:x:y") == (recipe, "x:y")
    assert find(f"{recipe}:") == (recipe, "")
    assert from_file(f"{recipe}:355m").model.layers == 24


@pytest.mark.slow
def test_an_installed_package_has_its_recipes(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source, wheels, installed = (tmp_path / name for name in ("source", "wheels", "installed"))
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    for name in ("gptjax", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / name, source / name, ignore=ignore)
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(wheels)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    shutil.rmtree(source)
    ask = (
        "import sys; sys.path.insert(0, sys.argv[1]); from gptjax.cli import main; "
        "sys.exit(main(['config', '--config=configs/gpt2.py:124m', '--diff=configs/depth.py:4']))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", ask, str(installed)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {line.partition(":")[0]: line for line in done.stdout.splitlines()}
    assert found["model.layers"] == "model.layers: 12 -> 4"
    assert sorted(p.name for p in (installed / "gptjax_configs").glob("*.py")) == SHIPPED
    sites = {p.name for p in (REPO / "configs/sites").iterdir()}
    assert {p.name for p in (installed / "gptjax_configs/sites").iterdir()} == sites
    modules = {p.relative_to(REPO) for p in (REPO / "gptjax").rglob("*.py")}
    assert all((installed / module).is_file() for module in modules)
