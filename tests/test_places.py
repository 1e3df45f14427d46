"""Homes and the cache: found wherever one stands, told in a line where they are not."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from gptjax import configure, places, tokenizer
from gptjax.config import UserError
from gptjax.data.sources import open_source
from gptjax.evaluation.texts import Reading, open_text
from gptjax.places import cache
from gptjax.storage import expand
from tests import tiny

REPO = Path(__file__).parents[1]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GPTJAX_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_a_path_is_read_as_by_a_shell(home: Path) -> None:
    assert expand("~/x") == home / "x" and expand(Path("~")) == home
    assert expand("a/~/b") == Path("a/~/b") and expand("/a~") == Path("/a~")
    with pytest.raises(UserError, match=r"^~nobody-is-called-so/x: .* write the whole path$"):
        expand("~nobody-is-called-so/x")


def test_whatever_names_a_path_may_begin_with_the_home(home: Path) -> None:
    store, bytes_ = tiny.make_store(home), tokenizer.load("bytes")
    assert open_source("~/store", bytes_, "val").path == store / "val"
    text = open_text("t", "~/store/train", bytes_, home / "new", Reading())
    assert text.store.path == store / "train"
    (home / "recipe.py").write_text((configure.RECIPES / "base.py").read_text())
    assert configure.from_file("~/recipe.py") == configure.from_file("configs/base.py")
    with pytest.raises(UserError, match="is a folder without a tokenizer.json"):
        tokenizer.load("~/store")
    assert [p.name for p in home.parent.iterdir()] == ["home"]


def test_the_cache_is_where_it_is_said_to_be(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache() == home / ".cache" / "gptjax" and cache().is_dir()
    monkeypatch.setenv("GPTJAX_CACHE", "~/mine")
    assert cache() == home / "mine" and cache().is_dir()
    monkeypatch.setenv("GPTJAX_CACHE", "here")
    assert cache() == home.parent / "here"
    assert not any(cache().iterdir())


@pytest.mark.parametrize("place", ["/proc/none", "/dev/null/none"])
def test_a_cache_that_cannot_be_written_names_the_variable(
    home: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    for variable in ("HOME", "GPTJAX_CACHE"):
        monkeypatch.setenv(variable, place)
        for use in (cache, lambda: open_source("shakespeare", tokenizer.load("bytes"), "val")):
            with pytest.raises(UserError) as error:
                use()
            told = str(error.value)
            assert told.startswith(f"cannot write the cache {place}") and "\n" not in told
            assert told.endswith("set GPTJAX_CACHE to a folder that can be")


def test_what_is_kept_is_made_once_and_anew_where_it_was_altered(home: Path) -> None:
    made: list[bytes] = []

    def get(name: str, content: bytes) -> bytes:
        return places.kept(name, lambda: made.append(content) or content)

    assert get("a", b"one") == get("a", b"two") == b"one" and get("b", b"") == get("b", b"x") == b""
    assert made == [b"one", b""]
    (file,) = (cache() / "kept").glob("a")
    for damaged in (b"", file.read_bytes()[:-1], file.read_bytes() + b"0", b"0" * 40):
        file.write_bytes(damaged)
        made.clear()
        assert get("a", b"one") == get("a", b"two") == b"one" and made == [b"one"]
    places.forget()
    assert get("a", b"three") == b"three"


def test_without_a_home_the_variable_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # who has no entry
    with pytest.raises(UserError, match="no home directory is known .*: set GPTJAX_CACHE to"):
        cache()
    with pytest.raises(UserError, match="write the whole path"):
        expand("~/x")
    monkeypatch.setenv("GPTJAX_CACHE", str(home / "given"))
    assert places.cache() == home / "given"


def opened_as_the_terminal_says(source: str) -> list[str]:
    """The calls that open a file as text in whatever encoding the machine is set to."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="open"), args=[_, *mode]):
                text = not mode or "b" not in ast.literal_eval(mode[0])
            case ast.Call(func=ast.Attribute(attr="open"), args=[ast.Constant(str(mode))]):
                text = "b" not in mode
            case ast.Call(func=ast.Attribute(attr="open"), args=[]):
                text = True
            case ast.Call(func=ast.Attribute(attr="read_text" | "write_text")):
                text = True
            case ast.Call(keywords=[*keywords]) if {"text"} & {k.arg for k in keywords}:
                text = isinstance(node.func, ast.Attribute) and node.func.attr in ("run", "Popen")
            case _:
                continue
        if text and "encoding" not in {keyword.arg for keyword in node.keywords}:
            found.append(ast.unparse(node))
    return found


def test_every_file_states_its_encoding() -> None:
    planted = """
open(x); open(x, "w"); p.open(); p.open("a"); p.read_text(); p.write_text(t); subprocess.run(c, text=True)
open(x, "rb"); p.open("wb"); p.read_text(encoding="utf-8"); Store.open(path, t); open(x, encoding="utf-8")
"""
    assert len(opened_as_the_terminal_says(planted)) == 7
    files = [
        *REPO.glob("*.py"),
        *(f for d in ("gptjax", "configs", "docs") for f in (REPO / d).rglob("*.py")),
    ]
    assert len(files) > 80
    assert [call for f in files for call in opened_as_the_terminal_says(f.read_text())] == []
