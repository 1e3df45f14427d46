"""The house stands: every file imports from lower floors only, and no two import each other."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A folder stands for all its files.
FLOORS: list[set[str]] = [
    {"config"},
    {"sharding", "parametrisation", "optim", "losses", "tokenizer", "accounting"},
    {"layers", "data"},
    {"model"},
    {"state", "checkpoint", "records", "evaluate", "decode", "progress", "configure"},
    {"loop", "ensemble", "speak", "trained", "replay", "interop", "audit", "tasks"},
    {"cli", "commands", "study", "plan", "cluster"},
]


def floor(module: str) -> int:
    """The floor of "gptjax.layers.norm"; the package itself, a version, is below all."""
    name = module.removeprefix("gptjax").removeprefix(".").partition(".")[0]
    found = [number for number, names in enumerate(FLOORS) if name in names]
    assert found or not name, f"{module} is on no floor: add {name!r} to FLOORS in {__file__}"
    return found[0] if name else -1


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for file in sorted((root / "gptjax").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(module: str, source: str, known: set[str]) -> set[str]:
    """The modules of the package that a file imports anywhere: deferred, TYPE_CHECKING and all."""
    found = set()
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
        found |= {target for target in targets if target.partition(".")[0] == "gptjax"}
    return found - {module}


def violations(root: Path) -> list[str]:
    files = modules(root)
    floors = {name: floor(name) for name in files}
    graph = {name: imports(name, file.read_text(), set(files)) for name, file in files.items()}
    wrong = [
        f"{name} (floor {floors[name]}) imports {target} (floor {floor(target)})"
        for name, targets in graph.items()
        for target in sorted(targets)
        if floor(target) > floors[name]
    ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append(f"imports in a circle: {' <- '.join(error.args[1])}")
    return wrong


def test_every_file_imports_from_its_own_floor_or_below():
    assert len(modules(ROOT)) > 20
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    "file, source, message",
    [
        ("config.py", "import gptjax.losses", ["config (floor 0) imports gptjax.losses (floor 1)"]),
        ("losses.py", "from gptjax import model", ["imports gptjax.model (floor 3)"]),
        ("model.py", "def f():\n    from gptjax.state import create", ["imports gptjax.state"]),
        (
            "layers/norm.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gptjax.loop import train",
            ["gptjax.layers.norm (floor 2) imports gptjax.loop (floor 5)"],
        ),
        ("data/store.py", "from gptjax.data.order import key", []),
        ("data/order.py", "from gptjax.data import store", ["imports in a circle: "]),
        ("loop.py", "from gptjax.config import Config\nimport gptjax, jax", []),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, source, message):
    sources = {"data/store.py": "from gptjax.data.order import key", file: source}
    for name in ("__init__.py", "loop.py", "model.py", "state.py", "losses.py", "data/order.py"):
        sources.setdefault(name, "")
    for name, text in sources.items():
        (tmp_path / "gptjax" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "gptjax" / name).write_text(text)
    found = violations(tmp_path)
    assert len(found) == len(message)
    assert all(part in line for part, line in zip(message, found, strict=True))


def test_a_file_on_no_floor_is_told_where_to_go(tmp_path):
    (tmp_path / "gptjax").mkdir()
    (tmp_path / "gptjax" / "stray.py").write_text("")
    with pytest.raises(AssertionError, match=r"'stray' to FLOORS in .*test_floors\.py"):
        violations(tmp_path)


def test_relative_imports_are_refused(tmp_path):
    (tmp_path / "gptjax").mkdir()
    (tmp_path / "gptjax" / "config.py").write_text("from .loop import train")
    with pytest.raises(AssertionError, match="absolute"):
        violations(tmp_path)


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
