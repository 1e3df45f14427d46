"""Signals that must be heard while C++ runs: jaxlib's abort, and SIGTERM before training.

A handler of Python's runs only once the main thread comes back from C++.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import IO

from gptjax.config import EXIT_STOPPED

# Words of jaxlib before it aborts because a process, or the service, is lost.
LOST = b"distributed service detected fatal errors"
_UNDO: list[Callable[[], object]] = []  # what `again_on_sigterm` does before it ends the process


class Native:
    """What C++ writes, which is held back for a second, and the abort by which jaxlib ends.

    jaxlib answers a lost process by pages and an abort, and asks nobody (client.h). Its callback
    for that, which jax does not set, cannot be written in Python: a status that is not OK does not
    pass to it (std::bad_cast, jaxlib 0.10.2 to 0.12.0). So what C++ writes is held back, and the
    signal of the abort is heard. Aborts of other kinds stay as they are. Python's own words go on
    as before.

    Args:
        lost: is called instead of that abort; it ends the process.

    Attributes:
        stderr: the descriptor that stays standard error.
    """

    def __init__(self, lost: Callable[[], object]) -> None:
        self.stderr = os.dup(2)
        self._lost = lost
        self._held: IO[bytes] | None = None
        self._copied = 0  # bytes that were passed on
        self._new = 0  # those after them that the next call passes on

    def hold_back(self) -> None:
        """Begins to; once."""
        if self._held is not None:
            return
        self._held = tempfile.TemporaryFile()  # noqa: SIM115
        # Standard output too, which is for results such as JSON: gloo tells there whom it has met.
        for number, name in ((1, "stdout"), (2, "stderr")):
            getattr(sys, name).flush()
            own, encoding = os.dup(number), getattr(sys, name).encoding
            buffering = 1 if number == 2 or os.isatty(own) else -1
            setattr(sys, name, os.fdopen(own, "w", buffering, encoding, "backslashreplace"))
            os.dup2(self._held.fileno(), number)

        def heard(number: int) -> None:
            text = self._held_back()
            if LOST in text:
                self._lost()
            os.write(self.stderr, text)

        libc = ctypes.CDLL(None)
        self._heard = ctypes.CFUNCTYPE(None, ctypes.c_int)(heard)  # kept: C does not
        libc.signal(signal.SIGABRT, self._heard)

    def pass_on(self) -> None:
        """What was written before the last call; to be called every second."""
        text = self._held_back()
        os.write(self.stderr, text[: self._new])
        self._copied += self._new
        self._new = len(text) - self._new

    def let_go(self) -> None:
        """Passes on all, and holds nothing back from here on."""
        self.pass_on()
        self.pass_on()
        os.dup2(self.stderr, 2)

    def _held_back(self) -> bytes:
        if self._held is None:
            return b""
        fd = self._held.fileno()
        return os.pread(fd, os.fstat(fd).st_size - self._copied, self._copied)


@contextlib.contextmanager
def again_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the process with the status that means again, until something else hears it.

    That is training (`loop.Stop`), or jax among several processes. Before and after, as while a
    sample is drawn, nothing is there to be saved, and the main thread may be in C++ for long: it
    waits for others, or compiles. So a thread hears the signal.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    ending = threading.Lock()

    def end(*_: object) -> None:
        # The main thread stands still meanwhile; not for ever, as this may need a lock that it has.
        if ending.acquire(timeout=1):
            for undo in _UNDO:
                with contextlib.suppress(Exception):  # it ends either way
                    undo()
            words = b"gptjax: SIGTERM while nothing trains: the same command goes on\n"
            os.write(sys.stderr.fileno(), words)
            os._exit(EXIT_STOPPED)

    def listen() -> None:
        while number := os.read(read, 1):
            if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is end:
                end(signal.SIGTERM, None)
        os.close(read)

    handler = signal.signal(signal.SIGTERM, end)
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=listen, name="sigterm", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        os.close(write)


@contextlib.contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """Calls `undo` when the context ends, also where SIGTERM ends the process in it.

    Args:
        undo: may be called twice, and by another thread.
    """
    _UNDO.append(undo)
    try:
        yield
    finally:
        undo()
        _UNDO.remove(undo)
