"""A hook of mkdocs: the site has a page of docstrings for each module, named in its menu."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]


def modules() -> dict[str, Path]:
    """The file of each module by its dotted name, a package before its modules."""
    files = {}
    for file in (ROOT / "gptjax").rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return dict(sorted(files.items()))


def page_of(file: Path) -> str:
    """Where the site has the docstrings of a file; those of a package are its folder's index."""
    path = file.relative_to(ROOT / "gptjax").with_suffix(".md").as_posix()
    return "docs/api/" + path.replace("__init__.md", "index.md")


def menu() -> list[Any]:
    """The pages as mkdocs' `nav` has them, the modules of a package under its own page."""
    packages: dict[str, list[Any]] = {"": []}
    for name, file in modules().items():
        package, _, module = name.rpartition(".")
        if file.name == "__init__.py":
            packages[name] = [page_of(file)]
            packages[package].append({module: packages[name]})
        else:
            packages[package].append({module: page_of(file)})
    return packages["gptjax"]


def content(name: str, file: Path) -> str:
    """A page for mkdocstrings: all of a module, or a package's own words and its modules'."""
    if file.name != "__init__.py":
        return f"::: {name}\n"
    lines = [f"::: {name}", "    options:", "      members: false", ""]
    for module, its_file in modules().items():
        if module.rpartition(".")[0] == name:
            words = ast.get_docstring(ast.parse(its_file.read_text(encoding="utf-8"))) or ""
            lines.append(f"- [{module}][]: {words.partition(chr(10))[0]}")
    return "\n".join(lines)


def on_config(config: MkDocsConfig) -> None:
    config.nav = [*(config.nav or []), {"API": menu()}]


def on_files(files: Files, config: MkDocsConfig) -> None:
    from mkdocs.structure.files import File

    for name, file in modules().items():
        files.append(File.generated(config, page_of(file), content=content(name, file)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    # Of a study's two reports the site has the one with pictures; both would be report.html.
    return markdown.replace("/report.md)", "/report.html)")
