"""The house stands: rooms import from lower floors only, and the README's map is what they do.

A room is a file of the package, or a folder with all its files. Its floor is the length of the
longest chain of imports below it, so two rooms of one floor never import each other; within a
folder files may, but not in a circle.
"""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = {}
    for file in sorted((root / "gptjax").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imports(module: str, source: str, known: set[str]) -> set[str]:
    """The modules of the package that a file imports anywhere: deferred, TYPE_CHECKING and all."""
    imported = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                targets = [name.name for name in names]
            case ast.ImportFrom(level=0, module=str(base), names=names):
                # `from gptjax import model` names a module, `from gptjax.model import init` not.
                targets = [f"{base}.{name.name}" for name in names]
                targets = [target if target in known else base for target in targets]
            case ast.ImportFrom(level=level) if level:
                raise AssertionError(f"{module}, line {node.lineno}: imports are absolute here")
            case _:
                continue
        imported |= {target for target in targets if target.partition(".")[0] == "gptjax"}
    return imported - {module}


def graph_of(root: Path) -> dict[str, set[str]]:
    files = modules(root)
    return {name: imports(name, file.read_text(), set(files)) for name, file in files.items()}


def in_order(graph: dict[str, set[str]]) -> list[str]:
    """The names, each after all that it imports."""
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"imports in a circle: {' <- '.join(error.args[1])}") from None


def room(module: str) -> str:
    """That of "gptjax.layers.norm": "layers"; of the package itself, a version: ""."""
    return module.removeprefix("gptjax").removeprefix(".").partition(".")[0]


def floors(root: Path) -> dict[str, int]:
    """Each room's floor, computed from the imports."""
    graph = graph_of(root)
    in_order(graph)
    rooms: dict[str, set[str]] = {room(module): set() for module in graph}
    for module, targets in graph.items():
        rooms[room(module)] |= {room(target) for target in targets} - {room(module), ""}
    level: dict[str, int] = {}
    for name in in_order(rooms):
        level[name] = max((level[below] + 1 for below in rooms[name]), default=0)
    del level[""]
    return level


def drawn(readme: str) -> tuple[dict[str, int], dict[str, set[str]]]:
    """What the map says: each room's floor, and the files of each folder."""
    package = re.search(r"^gptjax/\n((?: .*\n)+)", readme, re.MULTILINE)
    assert package, "README.md has no map of gptjax/"
    level: dict[str, int] = {}
    files: dict[str, set[str]] = {}
    number, name = 0, ""
    for line in package[1].splitlines():
        text = line
        if entry := re.match(r"^([ \d]{3}) (\w+)(\.py|/)(.*)", line):
            number, name = int(entry[1].strip() or number), entry[2]
            level[name], files[name], text = number, set(), entry[4]
        files[name] |= set(re.findall(r"(\w+\.py)", text))
    return level, files


def faults(root: Path, readme: str) -> list[str]:
    """Where the map and the imports differ."""
    real, (told, files) = floors(root), drawn(readme)
    wrong = [f"the map lacks {name}: floor {real[name]}" for name in sorted(real.keys() - told)]
    wrong += [f"the map has {name}, which is not there" for name in sorted(told.keys() - real)]
    wrong += [
        f"the map has {name} on floor {told[name]}, its imports put it on {real[name]}"
        for name in sorted(real.keys() & told)
        if told[name] != real[name]
    ]
    for name in sorted(real.keys() & told):
        here = {f.name for f in (root / "gptjax" / name).rglob("*.py")} - {"__init__.py"}
        wrong += [f"the map lacks {name}/{file}" for file in sorted(here - files[name])]
        if here:
            ghosts = sorted(files[name] - here)
            wrong += [f"the map has {name}/{file}, which is not there" for file in ghosts]
    return wrong


def test_the_map_of_the_readme_is_what_the_imports_make():
    assert len(floors(ROOT)) > 20
    assert faults(ROOT, (ROOT / "README.md").read_text()) == []


def test_no_list_of_rooms_names_one_that_is_not_there():
    from gptjax.records import NOT_COMPUTING

    assert [name for name in NOT_COMPUTING if not (ROOT / "gptjax" / name).exists()] == []


MAP = """
gptjax/
  0 config.py     knobs
  1 losses.py     as config.py says
    data/         order.py, then
                  store.py
  2 model.py      all
tests/            of all
"""
SOURCES = {
    "__init__.py": "",
    "config.py": "",
    "losses.py": "import gptjax.config",
    "data/__init__.py": "",
    "data/order.py": "from gptjax.config import Config",
    "data/store.py": "from gptjax.data.order import key",
    "model.py": "from gptjax.losses import nll\nfrom gptjax.config import Config",
}


def build(root: Path, sources: dict[str, str]) -> Path:
    for name, text in sources.items():
        (root / "gptjax" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "gptjax" / name).write_text(text)
    return root


def test_a_small_house_has_the_floors_that_its_imports_make(tmp_path):
    root = build(tmp_path, SOURCES)
    assert floors(root) == {"config": 0, "losses": 1, "data": 1, "model": 2}
    assert faults(root, MAP) == []


@pytest.mark.parametrize(
    "file, source, told",
    [
        # Up, and to a room of the same floor: that one is no longer on this floor.
        ("config.py", "import gptjax.losses", "imports in a circle: "),
        (
            "losses.py",
            "def f():\n    from gptjax.data.store import Store",
            "the map has losses on floor 1, its imports put it on 2",
        ),
        (
            "data/order.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gptjax import losses",
            "the map has data on floor 1, its imports put it on 2",
        ),
        # Round in a folder, and between two rooms though no two files do.
        ("data/order.py", "from gptjax.data import store", "imports in a circle: "),
        ("config.py", "from gptjax.data import order", "imports in a circle: "),
        ("losses.py", "", "the map has losses on floor 1, its imports put it on 0"),
        ("stray.py", "", "the map lacks stray: floor 0"),
        ("data/stray.py", "", "the map lacks data/stray.py"),
        ("config.py", "from .losses import nll", "imports are absolute here"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, source, told):
    root = build(tmp_path, SOURCES | {file: source})
    try:
        messages = faults(root, MAP)
    except AssertionError as error:
        messages = [str(error)]
    assert any(told in message for message in messages), messages


def test_two_rooms_that_import_each_other_are_found_though_no_two_files_do(tmp_path):
    losses = "from gptjax.data.order import key"
    store = "from gptjax.losses import nll"
    root = build(tmp_path, SOURCES | {"losses.py": losses, "data/store.py": store})
    in_order(graph_of(root))
    with pytest.raises(AssertionError, match="imports in a circle: .*data"):
        floors(root)


@pytest.mark.parametrize(
    "was, now, told",
    [
        ("  2 model.py      all\n", "", "the map lacks model: floor 2"),
        ("    data/ ", "    plan/ ", "the map has plan, which is not there"),
        ("  1 losses", "  2 losses", "the map has losses on floor 2, its imports put it on 1"),
        ("store.py", "shop.py", "the map has data/shop.py, which is not there"),
    ],
)
def test_a_wrong_map_is_found(tmp_path, was, now, told):
    assert MAP.count(was) == 1
    assert told in faults(build(tmp_path, SOURCES), MAP.replace(was, now))


def test_recipes_import_nothing_but_recipes_and_the_config():
    allowed = {"configs", "ml_collections", "math", "typing", "gptjax.config"}
    for file in (ROOT / "configs").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                names = {module if module == "gptjax.config" else module.partition(".")[0]}
            else:
                continue
            assert names <= allowed, f"{file.name} imports {names - allowed}"


def test_every_room_has_tests_that_answer_for_it():
    from tests import changed

    rooms = [str(file.relative_to(ROOT)) for file in modules(ROOT).values()]
    orphans = [
        file for file in rooms if not file.endswith("__init__.py") and not changed.tests_of(file)
    ]
    assert orphans == []
    assert changed.tests_of("gptjax/data/store.py") == {"test_data_store.py"}
    assert changed.tests_of("gptjax/data/order.py") == {"test_data.py"}  # of its folder
    assert "test_cli.py" in changed.tests_of("gptjax/commands/runs.py")  # of what imports it
    assert changed.to_run(["configs/base.py", "README.md", "tests/test_floors.py"]) == [
        "test_configs.py", "test_docs.py", "test_floors.py"
    ]  # fmt: skip
