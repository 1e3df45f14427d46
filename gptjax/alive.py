"""Several processes watch each other: one that dies, hangs or stops ends the job, and is named.

jax alone ends a job whose process was killed only after a barrier of 100 s, by an abort, and waits
for ever for one that hangs. The engine is jax's: its coordination service, which process 0 holds,
finds processes that are gone by their heartbeats, and its key-value store carries where each is.

A daemon thread of each process writes there every second how far its main thread came. Process 0
reads them all and writes its judgement, which the others read; so a process does as much work
among a thousand as among two. A job ends in these ways:

    a process was killed, stopped, or its host is gone: jax's heartbeats miss it (HEARTBEAT_SECONDS)
    process 0 is such a one: the connection to it breaks, or heartbeats find no answer
    a process has not moved on for train.hang_seconds: process 0 says so, or it itself
    a process ended by an error of its own: it says so before it leaves

All but the last end with status 75: the same command goes on from the last save. None of it exists
in a run of one process.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from gptjax.config import EXIT_STOPPED, UserError
from gptjax.positions import (
    SILENT_SECONDS,
    Position,
    Seen,
    describe,
    hung,
    listed,
    position_of,
    silent,
)
from gptjax.signals import Native

HEARTBEAT_SECONDS = 10  # jax counts a process as lost that was silent for so long
BEAT_SECONDS = 1.0  # how often a process says where it is
GRACE_SECONDS = 5.0  # in which a process whose peers end tells its own error, if it has one
PATIENCE = 6  # so many times train.hang_seconds where a process may be long: compiling, saving
MEET_SECONDS = "GPTJAX_MEET_SECONDS"  # how long processes wait for each other at the start
PREFIX = "gptjax/alive/"


class Watch:
    """This process among the others; made by `meet`."""

    def __init__(self) -> None:
        self._position = Position(socket.gethostname())  # the main thread's alone to change
        self._beat = 0
        self.native = Native(self._end_as_concluded)
        self._ending = threading.Lock()  # whoever has it ends the process
        self._ticking = threading.Lock()
        self._stopped = False
        self._client: Any = None
        self._index, self._count = 0, 1
        self._seen: list[Seen] = []  # of process 0
        self._zero: Position | None = None
        self._lost: list[str] = []  # who is silent, as process 0 says
        self._verdict: tuple[int, str] | None = None
        self._asleep: float | None = None  # since when the thread sleeps, which is for a second
        self._pause = (0.0, 0.0)  # the last such sleep that was longer, and when it ended
        self._hang_seconds: float | None = None
        self._main = threading.main_thread().ident or 0

    def start(self) -> None:
        """Begins to watch and to be watched, once jax is initialized.

        Raises:
            UserError: if the processes were told different counts, or jax has no such service.
        """
        client, index, count = _store()
        self._client, self._index, self._count = client, index, count
        self.native.hold_back()
        if index == 0:
            self._tick()  # so that the others find a judgement
            client.key_value_set("gptjax/processes", str(count))
        told = client.blocking_key_value_get("gptjax/processes", 60_000)
        threading.Thread(target=self._run, name="alive", daemon=True).start()
        atexit.register(self.stop)
        if int(told) != count:
            raise UserError(
                f"process {index} was told of {count} processes, process 0 of {told}: start all with "
                "the same number"
            )

    def stop(self) -> None:
        """All is well: waits for the others, and ends the service."""
        import jax

        self._stopped = True
        faulthandler.cancel_dump_traceback_later()
        with self._ticking:
            jax.distributed.shutdown()
            self.native.let_go()

    def give_up(self, words: str) -> NoReturn:
        """Ends the process by a mistake of the user's."""
        self._end(2, words)

    # What the main thread says.

    def moves(self, doing: str, step: int | None, slow: bool) -> None:
        seconds = self._hang_seconds
        patience = None if seconds is None else seconds * (PATIENCE if slow else 1)
        position = self._position
        self._position = position._replace(
            moves=position.moves + 1, doing=doing, step=step, patience=patience
        )

    @contextlib.contextmanager
    def watched(self, seconds: float) -> Iterator[None]:
        self._hang_seconds = seconds
        self.moves("setting up", None, True)
        yield
        self._hang_seconds = None  # not after an error, which may be long in unwinding
        faulthandler.cancel_dump_traceback_later()
        self.moves("done", self._position.step, True)

    def leave(self, status: int | None, message: str) -> None:
        """An error ends this process: ends it here, or returns to let it be told as it is.

        Args:
            status: that the error means; None: what is wrong is not known, and another process that
                is lost may be what is.
        """
        if status is None:
            until = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < until and not (self._lost or self._verdict):
                time.sleep(BEAT_SECONDS / 10)
            if self._verdict:
                self._end_as_concluded()
            if self._lost:
                # Should the fault be of this process after all, it is not hidden.
                error = " ".join(traceback.format_exception_only(*sys.exc_info()[:2])[-1].split())
                self._end(EXIT_STOPPED, f"{self._conclusion()[1]}; this process met: {error[:120]}")
            traceback.print_exc()
            status = 1
        elif message:
            print(f"gptjax: {message}", file=sys.stderr)
        words = f"{describe(self._index, self._position)}, has ended: {message}"
        self._position = self._position._replace(left=(status, words))
        # The service ends with process 0: the others must have read why.
        with contextlib.suppress(Exception):
            self._tick()
        until = time.monotonic() + GRACE_SECONDS
        while self._index == 0 and time.monotonic() < until and not self._all_left():
            time.sleep(BEAT_SECONDS / 10)
        self._end(status, "")

    def gather(self, name: str, text: str, seconds: float) -> list[str]:
        """What each process passed under this name, by index; all must call it."""
        key = f"gptjax/{name}/"
        self._client.key_value_set(f"{key}{self._index}", text)
        failure = ""
        try:
            self._client.wait_at_barrier(f"gptjax-{name}", int(seconds * 1000))
        except Exception as error:
            failure = str(error).splitlines()[0]
        texts = _by_index(self._client.key_value_dir_get(key))
        missing = [f"process {i}" for i in range(self._count) if i not in texts]
        if missing:
            raise UserError(f"no word from {listed(missing)} within {seconds:g} s ({name})")
        if failure:
            raise UserError(f"the processes do not meet ({name}): {failure}")
        return [texts[i] for i in range(self._count)]

    # What the thread does.

    def _run(self) -> None:
        while not self._stopped:
            self._asleep = time.monotonic()
            time.sleep(BEAT_SECONDS)
            now = time.monotonic()
            if now - self._asleep > SILENT_SECONDS:
                self._pause = (now - self._asleep, now)
            self._asleep = None
            # A service that does not answer is for jax's heartbeats to judge.
            with contextlib.suppress(Exception), self._ticking:
                self.native.pass_on()
                self._tick()
            if self._verdict and not self._stopped:
                status, words = self._conclusion()
                # Meanwhile the others read it; or tell an error that all have.
                time.sleep(2 * BEAT_SECONDS if status == EXIT_STOPPED else GRACE_SECONDS)
                self._end(status, words)

    def _line_of_main(self) -> str:
        frame = sys._current_frames()[self._main]
        return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"

    def _tick(self) -> None:
        if self._stopped:
            return
        if self._hang_seconds is not None:
            # Should even this thread be stuck, because the main thread keeps Python's lock.
            seconds = self._hang_seconds * PATIENCE + 10
            faulthandler.dump_traceback_later(seconds, exit=True, file=self.native.stderr)
        self._beat += 1
        position = json.dumps(self._position._replace(beat=self._beat))
        self._client.key_value_set(f"{PREFIX}{self._index}", position, allow_overwrite=True)
        if self._index == 0:
            self._judge()
        else:
            said = json.loads(self._client.key_value_try_get("gptjax/judged"))
            self._zero, self._lost = position_of(said["zero"]), said["lost"]
            self._verdict = tuple(said["verdict"]) if said["verdict"] else None

    def _judge(self) -> None:
        now = time.monotonic()
        texts = _by_index(self._client.key_value_dir_get(PREFIX))
        positions = [
            position_of(json.loads(texts[i])) if i in texts else Position("a host")
            for i in range(self._count)
        ]
        self._seen = (
            [
                seen.again(position, now)
                for seen, position in zip(self._seen, positions, strict=True)
            ]
            if self._seen
            else [Seen.first(position, now) for position in positions]
        )
        quiet = silent(self._seen, now)
        names = [
            describe(i, s.position) + f", silent for {now - s.beaten:.0f} s" * (i in quiet)
            for i, s in enumerate(self._seen)
        ]
        self._lost = [names[i] for i in quiet]
        left = [s.position.left for s in self._seen if s.position.left]
        stuck = hung(self._seen, now)
        if left:
            self._verdict = self._verdict or left[0]
        elif stuck:
            seconds = now - min(self._seen[i].moved for i in stuck)
            words = (
                f"no progress for {seconds:.0f} s (train.hang_seconds): all wait for "
                f"{listed([names[i] for i in stuck])}"
            )
            self._verdict = self._verdict or (EXIT_STOPPED, words)
        said = {"zero": self._position, "lost": self._lost[:4], "verdict": self._verdict}
        self._client.key_value_set("gptjax/judged", json.dumps(said), allow_overwrite=True)

    def _all_left(self) -> bool:
        others = [s for i, s in enumerate(self._seen) if i != 0]
        return all(s.position.left for s in others)

    # The end.

    def _conclusion(self) -> tuple[int, str]:
        """Exit status, and why the job ends, as far as this process knows."""
        if self._position.left:
            return self._position.left[0], ""  # it has said why
        if self._verdict:
            status, words = self._verdict
            here = f"; this one is at {self._line_of_main()}" * (status == EXIT_STOPPED)
            return status, words + here
        return EXIT_STOPPED, self._who()

    def _end_as_concluded(self) -> NoReturn:
        self._end(*self._conclusion())

    def _who(self) -> str:
        lost = f"lost: {listed(self._lost)}" if self._lost else ""
        now = time.monotonic()
        length, end = self._pause
        recent = length if now - end < HEARTBEAT_SECONDS else 0.0
        pause = max(recent, now - (now if self._asleep is None else self._asleep))
        if pause > SILENT_SECONDS:
            words = f"this process stood still for {pause:.0f} s, longer than others wait for it"
            return "; ".join(filter(None, (words, lost)))
        if lost:
            return lost
        if self._index and self._zero is not None:
            return f"lost: the coordinator, {describe(0, self._zero)}"
        return "the processes have lost each other"

    def _end(self, status: int, words: str) -> NoReturn:
        """Ends the process without the barrier of jax's, in which it would wait for the others."""
        if not self._ending.acquire(blocking=False):
            while True:  # another thread is at it
                time.sleep(1)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        if os.isatty(self.native.stderr):
            os.write(self.native.stderr, b"\x1b[?25h")  # the cursor, which a bar hides
        if words:
            again = ". The same command goes on from the last save" * (status == EXIT_STOPPED)
            os.write(self.native.stderr, f"gptjax: {words}{again}\n".encode())
        os._exit(status)


_watch: Watch | None = None


def meet(distributed: str) -> None:
    """Starts jax among several processes, which watch each other from here on.

    Args:
        distributed: "HOST:PORT,PROCESSES,INDEX", or "auto": a cluster that jax knows tells it.

    Raises:
        UserError: if it says something else, the port is taken, or the processes were told
            different counts. If they do not meet in the time of GPTJAX_MEET_SECONDS, 300 by
            default, the process ends: jax would abort it.
    """
    global _watch
    import jax

    seconds = float(os.environ.get(MEET_SECONDS, "300"))
    arguments = {} if distributed == "auto" else _parse(distributed)
    if arguments.get("process_id") == 0:
        _check_port(arguments["coordinator_address"])
    watch = Watch()
    if arguments:  # else a fault at the start, such as a port that is taken, is jax's to tell
        watch.native.hold_back()
    # jax's own limit ends in an abort, so that this one comes first.
    timer = threading.Timer(seconds, _alone, (watch, arguments, seconds))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=int(seconds) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    finally:
        timer.cancel()
    _watch = watch
    watch.start()


def _store() -> tuple[Any, int, int]:
    """jax's key-value store, this process's index, and the count of all."""
    import jax

    try:
        # jax 0.10 to 0.12 have no public way to it: of `jax.distributed` only initialize,
        # is_initialized and shutdown are public. Orbax takes it in this way too.
        from jax._src.distributed import global_state

        client: Any = global_state.client
        for name in ("key_value_set", "key_value_try_get", "wait_at_barrier"):
            getattr(client, name)
        return client, global_state.process_id, global_state.num_processes
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"jax {jax.__version__} has not the key-value store by which processes watch each "
            f"other ({error}): install one that pyproject.toml allows"
        ) from error


def _parse(distributed: str) -> dict[str, Any]:
    try:
        address, count, index = distributed.split(",")
        processes, process = int(count), int(index)
        port = int(address.rpartition(":")[2])
    except ValueError as error:
        raise UserError(
            f"--distributed={distributed} is neither 'auto' nor HOST:PORT,PROCESSES,INDEX"
        ) from error
    if not (0 <= process < processes and 0 < port < 2**16):
        raise UserError(
            f"--distributed={distributed}: the index must be one of 0 to {processes - 1}, and the "
            "port one of 1 to 65535"
        )
    return {"coordinator_address": address, "num_processes": processes, "process_id": process}


def _check_port(address: str) -> None:
    """Refuses a port that is taken, at which jaxlib 0.10.2 and 0.12 end by a segmentation fault."""
    port = int(address.rpartition(":")[2])
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6
        ).close()
    except OSError as error:
        raise UserError(
            f"process 0 cannot serve at port {port} of {socket.gethostname()}: "
            f"{error.strerror or error}. Give --distributed another port, on every process"
        ) from error


def _alone(watch: Watch, arguments: dict[str, Any], seconds: float) -> None:
    """Tells why the processes have not met in time, and ends this one."""
    address = arguments.get("coordinator_address", "the coordinator")
    reached = arguments.get("process_id") == 0
    if arguments and not reached:
        host, _, port = address.rpartition(":")
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), 2).close()
            reached = True
    watch.give_up(
        f"not all of {arguments.get('num_processes', 'the')} processes came to {address} within "
        f"{seconds:g} s ({MEET_SECONDS}): start each index once, on each the same number of them"
        if reached or not arguments
        else f"nobody answers at {address} within {seconds:g} s ({MEET_SECONDS}): is process 0 "
        "running there, and may this host reach that port?"
    )


def moves(doing: str, step: int | None = None, slow: bool = False) -> None:
    """Says that the main thread got on, and what it does next; free in a run of one process.

    Args:
        slow: it may take `PATIENCE` times as long as the steps of training.
    """
    if _watch is not None:
        _watch.moves(doing, step, slow)


@contextlib.contextmanager
def watched(seconds: float) -> Iterator[None]:
    """A job of several processes ends if one has not moved for so long, until this one leaves."""
    with contextlib.nullcontext() if _watch is None else _watch.watched(seconds):
        yield


def leave(status: int | None, message: str) -> None:
    """An error ends the process: tells the others, or is told that another one is lost.

    Args:
        status: that the error means; None if what is wrong is not known.
        message: one line.
    """
    if _watch is not None:
        _watch.leave(status, message)


def gather(name: str, text: str, seconds: float) -> list[str]:
    """What each process passed, by its index; all must call it. The name is used once.

    Raises:
        UserError: naming who passed nothing for so many seconds.
    """
    return [text] if _watch is None else _watch.gather(name, text, seconds)


def _by_index(pairs: Sequence[tuple[str, str]]) -> dict[int, str]:
    """Of keys that end in "/INDEX"."""
    return {int(key.rpartition("/")[2]): text for key, text in pairs}
