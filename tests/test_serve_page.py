"""The page that talks to a model, in a real browser, and the command that serves both."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gptjax import model
from gptjax.cli import EXIT_USER_ERROR, main
from gptjax.interop import hf
from tests import tiny
from tests.test_serve_api import TEMPLATE, serving, texts

REPO = Path(__file__).parents[1]
CONTEXT = 256


class Browser:
    """A page in Chromium, spoken to through two pipes (its DevTools protocol)."""

    def __init__(self, url: str, profile: Path) -> None:
        (from_us, to_browser), (from_browser, to_us) = os.pipe(), os.pipe()
        self._process = subprocess.Popen(
            [
                "bash", "-c", f'exec "$@" 3<&{from_us} 4>&{to_us}', "-", "chromium", "--headless",
                "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
            ],
            pass_fds=(from_us, to_us), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(from_us)
        os.close(to_us)
        self._out, self._in = os.fdopen(to_browser, "wb", 0), os.fdopen(from_browser, "rb")
        self._number, self._session = 0, {}
        self.events: list[Any] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)

    def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            content = b""
            while not content.endswith(b"\0"):
                part = self._in.read(1)
                assert part, "the browser is gone"
                content += part
            answer = json.loads(content[:-1])
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def value(self, code: str) -> Any:
        return self.call("Runtime.evaluate", expression=code, returnByValue=True)["result"].get(
            "value"
        )

    def until(self, code: str) -> Any:
        deadline = time.monotonic() + 60
        while not (value := self.value(code)):
            assert time.monotonic() < deadline, (code, self.value("document.body.innerText"))
            time.sleep(0.02)
        return value

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._out.close()
        self._in.close()


@contextlib.contextmanager
def browser(url: str, profile: Path) -> Iterator[Browser]:
    shown = Browser(url, profile)
    try:
        yield shown
    finally:
        shown.close()


chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")


def send(page: Browser, text: str) -> None:
    page.value("document.getElementById('text').focus()")
    page.call("Input.insertText", text=text)
    for kind in ("keyDown", "keyUp"):
        page.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13
        )


DONE = "document.getElementById('send').textContent === 'Send'"
ANSWERS = "[...document.querySelectorAll('.assistant')].map(d => d.firstChild?.textContent ?? '')"


@chromium
@pytest.mark.slow
def test_a_browser_talks_to_a_model(tmp_path: Path) -> None:
    with serving(texts()) as running, browser(running.url, tmp_path) as page:
        page.until("document.getElementById('name').textContent === 'tiny'")
        page.value("document.getElementById('temperature').value = 0")
        page.value(
            "window.lengths = new Set(); new MutationObserver(() => window.lengths.add("
            "document.querySelector('.assistant')?.textContent.length)).observe("
            "document.getElementById('talk'), {childList: true, subtree: true})"
        )
        send(page, "<b>What</b> does the cat see?")
        page.until(f"{DONE} && !!document.querySelector('.assistant small')")
        messages = [{"role": "user", "content": "<b>What</b> does the cat see?"}]
        client = running.client()
        (choice,) = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0
        ).choices
        assert page.value(ANSWERS) == [choice.message.content]
        assert page.value("window.lengths.size") > 5  # it came in parts
        assert page.value("document.querySelector('.user').textContent") == messages[0]["content"]
        assert page.value("document.querySelector('b')") is None
        # The second turn has the first before it.
        send(page, "Why?")
        page.until(f"{DONE} && document.querySelectorAll('.user').length === 2")
        page.until(DONE)
        words = page.value("document.getElementById('talk').innerText")
        assert "Why?" in words
        problems = [
            event for event in page.events
            if event["method"] == "Runtime.exceptionThrown"
            or event.get("params", {}).get("entry", {}).get("level") == "error"
        ]  # fmt: skip
        asked = [
            event["params"]["request"]["url"] for event in page.events
            if event["method"] == "Network.requestWillBeSent"
        ]  # fmt: skip
        assert all(url.startswith(running.url) for url in asked if not url.startswith("about:"))
        # The second turn may not fit the small context, which is the answer then.
        assert [p for p in problems if "400" not in str(p) and "favicon" not in str(p)] == []


@chromium
@pytest.mark.slow
def test_a_browser_is_asked_for_the_token(tmp_path: Path) -> None:
    with serving(texts(), token="secret") as running, browser(running.url, tmp_path) as page:
        page.until("!document.getElementById('locked').hidden")
        assert "token is needed" in page.until("document.querySelector('.error')?.textContent")
        page.value("document.getElementById('token').value = 'secret'")
        send(page, "Hello")
        page.until(f"{DONE} && document.querySelector('.assistant')?.textContent.length > 5")


def test_the_page_needs_nothing_else() -> None:
    page = (REPO / "gptjax/serve/page.html").read_text()
    for word in ("http:", "https:", "//cdn", "import ", "src=", "innerHTML", "eval("):
        assert word not in page


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model as a Hugging Face folder, with a template."""
    out = tmp_path_factory.mktemp("serve") / "small"
    config = tiny.config(Path("unused"), model__context=CONTEXT)
    hf.export(out, config.model, model.init(config.model, 0), config.data.tokenizer)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


@contextlib.contextmanager
def command(folder: Path, *words: str, **more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "launch.py", "serve", f"--workdir={folder}", "--port=0", *words],
        cwd=REPO, env=tiny.environment(1) | more, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines: list[str] = []
    assert process.stderr is not None
    try:
        for line in process.stderr:
            lines.append(line)
            if " on http://" in line:
                break
        else:
            raise AssertionError("".join(lines))
        assert any(line.startswith("rows computed at once: ") for line in lines)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, line.rpartition(" ")[2].strip()
    finally:
        process.kill()
        process.wait()


BODY = {"model": "small", "prompt": "the", "seed": 0}


def ask(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=BODY | fields, timeout=60)


@pytest.mark.slow
def test_sigterm_lets_what_was_begun_end(exported: Path) -> None:
    with command(exported, "--slots=2", "--drain=120") as (process, url):
        assert ask(url, max_tokens=3).json()["usage"]["completion_tokens"] == 3
        long = BODY | {"max_tokens": 250, "n": 16, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as answer:
            parts = answer.iter_lines()
            next(parts)
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while httpx.get(f"{url}/health").status_code != 503:
                assert time.monotonic() < deadline
            assert ask(url, max_tokens=1).status_code == 503
            lines = [line for line in parts if line]
        assert lines[-1] == "data: [DONE]"
        told = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        ends = [c["index"] for part in told for c in part["choices"] if c["finish_reason"]]
        assert sorted(ends) == list(range(16))
        assert process.wait(30) == 0


@pytest.mark.slow
def test_sigterm_waits_no_longer_than_it_is_told(exported: Path) -> None:
    with command(exported, "--slots=1", "--drain=0.2") as (process, url):
        long = BODY | {"max_tokens": 250, "n": 100, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as answer:
            parts = answer.iter_lines()
            next(parts)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(httpx.TransportError):
                assert "data: [DONE]" not in list(parts)
        assert process.wait(30) == 0 and time.monotonic() - began < 10


def test_mistakes_are_a_line(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def told(*words: str) -> str:
        assert main(["serve", f"--workdir={exported}", *words]) == EXIT_USER_ERROR
        return capsys.readouterr().err.splitlines()[-1]

    monkeypatch.delenv("GPTJAX_SERVE_TOKEN", raising=False)
    assert "--token_file" in told("--host=0.0.0.0")
    (tmp_path / "token").write_text("\n")
    assert "must hold a token" in told(f"--token_file={tmp_path / 'token'}")
    assert "--slots" in told("--slots=0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "choose another" in told(f"--port={port}", "--slots=1")


@pytest.mark.usefixtures("eight_devices")
def test_several_devices_are_refused(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", f"--workdir={exported}"]) == EXIT_USER_ERROR
    assert "serve runs on one device, and 8 are here" in capsys.readouterr().err
