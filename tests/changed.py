"""Prints the test files to ask first: of what differs from main, committed or not, and the floors.

A changed test file is asked itself. Of a changed room its mirror is: gptjax/data/store.py is
answered for by test_data_store.py, or else by test_data.py. A room without a mirror is answered
for by the test files that import it, or else by those of the rooms that do.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.test_floors import ROOT, imports, modules

TESTS = ROOT / "tests"
# Of what is no room: a part of the path, and who answers.
OTHERS = {".md": "test_docs.py", "Makefile": "test_docs.py", "configs/": "test_configs.py"}


def changed() -> list[str]:
    """Paths from the root of the files that differ from the commit where this branch left main."""

    def git(*words: str) -> list[str]:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.split()

    (fork,) = git("merge-base", "HEAD", "main")
    return [*git("diff", "--name-only", fork), *git("ls-files", "--others", "--exclude-standard")]


def tests_of(file: str) -> set[str]:
    """The names of the test files that answer for a file, given by its path from the root."""
    path = Path(file)
    if path.parts[0] == "tests":
        return {path.name} if path.name.startswith("test_") and (ROOT / path).exists() else set()
    if path.parts[0] != "gptjax" or path.suffix != ".py":
        return {test for part, test in OTHERS.items() if part in file}
    if not (ROOT / path).exists():  # it moved, or went
        return set()
    parts = path.with_suffix("").parts[1:]
    for mirror in ("_".join(parts), parts[0], parts[-1]):
        if (TESTS / f"test_{mirror}.py").exists():
            return {f"test_{mirror}.py"}
    rooms, targets = modules(ROOT), targets_of_files()
    (module,) = (name for name, room in rooms.items() if room == ROOT / path)
    importers = [file for file in targets if module in targets[file] and file != ROOT / path]
    if tests := {file.name for file in importers if file.parent == TESTS}:
        return tests
    return set().union(*(tests_of(str(room.relative_to(ROOT))) for room in importers))


@functools.cache
def targets_of_files() -> dict[Path, set[str]]:
    """The rooms that every room and every test file imports."""
    rooms = modules(ROOT)
    files = [*rooms.values(), *TESTS.glob("test_*.py")]
    return {file: imports(file.stem, file.read_text(), set(rooms)) for file in files}


def to_run(files: Iterable[str]) -> list[str]:
    return sorted({"test_floors.py"}.union(*map(tests_of, files)))


if __name__ == "__main__":
    print(*(f"tests/{name}" for name in to_run(changed())))
