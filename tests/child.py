"""Processes of their own for tests, forked from one that has imported the package.

Each is a process that the system knows, signals and kills as any other; it only starts without the
seconds that importing takes. What a new interpreter alone shows is started as one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import tiny

REPO = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
# None of these starts a backend of jax, which no fork survives.
CONTEXT.set_forkserver_preload(
    [f"gptjax.{name}" for name in ("loop", "study.runner", "commands.runs", "commands.studies")]
)
GPTJAX = "import sys; from gptjax.cli import main; sys.exit(main(sys.argv[1:]))"


class Child:
    """`code` in a process of its own, begun in the checkout, with `words` as its arguments."""

    def __init__(self, code: str, *words: str | Path, devices: int = 1) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        arguments = (code, [str(word) for word in words], tiny.environment(devices), self._files)
        self._process = CONTEXT.Process(target=_run, args=arguments, daemon=True)
        self._process.start()

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return self._files[0].read_text()

    @property
    def stderr(self) -> str:
        return self._files[1].read_text()

    @property
    def returncode(self) -> int | None:
        """Of subprocess.Popen: minus the signal that killed it, None while it runs."""
        return self._process.exitcode

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def lines(self, stream: str = "stderr") -> Iterator[str]:
        """What it writes to a stream, line by line as it comes, until it ends."""
        line, ended = "", False
        with Path(self._folder.name, stream).open() as file:
            while not ended:
                ended = self.returncode is not None
                while part := file.readline():
                    line += part
                    if line.endswith("\n"):
                        yield line
                        line = ""
                time.sleep(0.005)

    def wait(self, seconds: float = 300) -> Child:
        """Itself, once it has ended; after so many seconds it is killed, and that is an error."""
        self._process.join(seconds)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"a child ran for more than {seconds} s: {self.stderr}")
        return self

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it if it still runs."""
        self._process.kill()
        self._process.join()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@contextmanager
def pair_of(
    store: Path, workdir: Path, code: str = GPTJAX, devices: int = 2, **knobs: Any
) -> Iterator[list[Child]]:
    """Two processes of some devices each that train together; none outlives the context."""
    port = free_port()
    pair = [
        Child(
            *(code, "train", f"--config={tiny.RECIPE}", f"--workdir={workdir}"),
            *(f"--distributed=localhost:{port},2,{i}", *tiny.overrides(store, **knobs)),
            devices=devices,
        )
        for i in range(2)
    ]
    try:
        yield pair
    finally:
        for p in pair:
            p.kill()


def _run(code: str, words: list[str], environment: dict[str, str], files: list[Path]) -> None:
    os.chdir(REPO)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["-c", *words]
    try:
        exec(textwrap.dedent(code), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
