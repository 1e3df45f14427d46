"""What a person sees: a bar on a terminal, plain lines elsewhere, from one process alone."""

from __future__ import annotations

import io

import jax
import pytest

from gptjax import progress
from gptjax.progress import Progress, readable, say


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    for name, value in {"_file": io.StringIO(), "_force_terminal": request.param}.items():
        monkeypatch.setattr(progress.console, name, value)
    monkeypatch.setattr(progress.console, "_width", 100)
    return request.param


def seen() -> str:
    file = progress.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_bar_or_lines(terminal: bool) -> None:
    with Progress("training", 30, done=7) as bar:
        bar.status("loss 1.25")
        bar.advance(2)
        bar.line("step 9 has loss 1.25")
        with bar.task("evaluating", 5) as advance:
            advance(4)
        say("saved")
    if terminal:
        for text in ("training", "9/30", "loss 1.25", "saved"):
            assert text in seen()
        assert "step 9" not in seen()
    else:
        assert seen() == "step 9 has loss 1.25\nsaved\n"


def test_a_line_is_said_as_it_is(terminal: bool) -> None:
    line = "model.windows[0] is [bold] [/b] :smile:" + " word" * 40
    say(line)
    assert seen() == f"{line}\n"


NAME = "x[/b]:smile:[red]y"  # neither markup nor an emoji


def test_names_on_a_bar_are_shown_as_they_are(terminal: bool) -> None:
    with Progress(f"evaluating {NAME}", 30) as bar:
        bar.status(f"status {NAME}")
        bar.advance(1)
    for what in ("evaluating", "status"):
        assert (f"{what} {NAME}" in seen()) is terminal


def test_one_process_speaks(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Progress("training", 30) as bar:
        bar.status("loss 1.25")
        bar.advance(30)
        bar.line("step 30")
        say("saved")
    assert seen() == ""


def test_the_numbers_of_a_step() -> None:
    assert readable({"loss": 1.23456, "z": 3.0}) == "loss 1.2346"
    assert readable({"loss": -1e-9}) == "loss 0.0000"
    values = {"loss": 1.0, "tokens_per_second": 12345.6, "mfu": 0.4567}
    assert readable(values) == "loss 1.0000  12,346 tokens/s  MFU 45.7%"
