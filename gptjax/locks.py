"""What one process holds: locks on a disk, leases in a bucket, scratch folders."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Self

from gptjax.storage import BucketPath, Place, remove_unchanged, replace_unchanged

LEASE_SECONDS = 60.0  # a lease of this age is its holder's no more
RENEW_SECONDS = 10.0


class Held(Exception):
    """Somebody else holds a name.

    Attributes:
        holder: who.
        certain: False where it is not known yet whether the holder still lives.
    """

    def __init__(self, holder: str, certain: bool) -> None:
        super().__init__(holder)
        self.holder, self.certain = holder, certain


class Lock:
    """A name that this process holds until it is closed.

    On a disk it is a lock of the operating system, which falls with the process. In a bucket it is
    a lease: an object that is written anew each `RENEW_SECONDS`. Whoever sees the same generation
    of it for `LEASE_SECONDS`, by a clock of his own, may replace it, so clocks need not agree. The
    lease of a process that is gone from this host is replaced at once.

    Raises:
        Held: if another process holds it.
    """

    def __init__(self, path: Place) -> None:
        self._path = path
        self.lost = False
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        self._text = f"process {os.getpid()} on {socket.gethostname()}, since {now}"
        if isinstance(path, BucketPath):
            self._generation = self._lease(path)
            self._end, self._renewing = threading.Event(), threading.Lock()
            self._renewer = threading.Thread(target=self._renew, daemon=True)
            self._renewer.start()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = path.open("a+", encoding="utf-8")
            try:
                self._flock()
            except BlockingIOError:
                self._file.close()
                raise Held(holder(path) or "another process", certain=True) from None
            if self._in_place(path):
                break
            self._file.close()  # who held it before has removed this file
        self._file.truncate(0)
        self._file.write(self._text)
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if isinstance(self._path, Path):
            self._file.close()
            return
        self._end.set()
        self._renewer.join()
        if not self.lost:
            with contextlib.suppress(OSError):  # it ends by itself
                remove_unchanged(self._path, self._generation)

    def _in_place(self, path: Path) -> bool:
        """Whether the file that is locked is still the one of this name."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), path.stat())
        return False

    def _flock(self) -> None:
        for _ in range(5):  # `holder` has it for an instant
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.02)
        return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def confirm(self) -> None:
        """Looks that the name is still this process's; renews a lease now.

        Raises:
            Held: if it is not: the process stood still for longer than a lease lasts, or somebody
                removed the file of a lock.
        """
        if isinstance(self._path, Path):
            if not self._in_place(self._path):
                other = holder(self._path) or f"somebody else ({self._path.name} was removed)"
                raise Held(other, certain=True)
            return
        with self._renewing:
            try:
                self._generation = replace_unchanged(self._path, self._content(), self._generation)
            except FileExistsError:
                self.lost = True
                found = self._path.find()
                other = _holder(b"" if found is None else found[0])
                raise Held(other, certain=True) from None

    def _content(self) -> bytes:
        """Unlike any before: a lease shows by its change that its holder lives."""
        record = {"holder": self._text, "process": _identity(os.getpid())}
        return json.dumps(record | {"renewed": time.time(), "nonce": uuid.uuid4().hex}).encode()

    def _lease(self, path: BucketPath) -> bytes:
        found = path.find()
        if found is not None:
            content, generation = found
            before, since = _seen.get(path, (None, 0.0))
            if before != generation:
                _seen[path] = (generation, time.monotonic())
            over = before == generation and time.monotonic() - since >= LEASE_SECONDS
            if not over and not _gone(content):
                raise Held(_holder(content), certain=before not in (None, generation))
        try:
            taken = replace_unchanged(path, self._content(), None if found is None else found[1])
        except FileExistsError:  # somebody was faster
            raise Held("another process", certain=False) from None
        _seen.pop(path, None)
        return taken

    def _renew(self) -> None:
        while not self._end.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):  # the bucket may be back before anybody else comes
                try:
                    self.confirm()
                except Held:
                    return


# Of leases that others hold: the generation that was seen, and since when.
_seen: dict[BucketPath, tuple[bytes, float]] = {}


def _gone(lease: bytes) -> bool:
    """Whether the holder is a process of this host that has ended."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        host, pid, started = json.loads(lease)["process"]
        if host == _identity(os.getpid())[0] != "":
            return _identity(pid)[2] != started
    return False


def _identity(pid: int) -> tuple[str, int, str]:
    """A host as it booted and whose numbers of processes count, the number, and when it started.

    The host is "" where /proc does not tell, the start "" of a process that is not there.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        host = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "", pid, ""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *fields = stat.rpartition(")")[2].split()
        return host, pid, "" if state == "Z" else fields[18]
    except OSError:
        return host, pid, ""


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder among the temporary files, for as long as the context lasts.

    Its name tells whose it is, so that what killed processes left there is removed before.
    """
    host, pid, started = _identity(os.getpid())
    here = f"gptjax-{hashlib.sha256(host.encode()).hexdigest()[:16]}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{here}*-*-*") if host else ():
        its_pid, its_start, _ = folder.name.removeprefix(here).split("-")
        if _identity(int(its_pid))[2] != its_start:
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{here}{pid}-{started}-") as own:
        yield Path(own)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds a name on a disk, once no other process does; its file goes with the context."""
    while True:
        try:
            with Lock(path):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        except Held:
            time.sleep(0.2)


def _holder(lease: bytes) -> str:
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return str(json.loads(lease)["holder"])
    return "another process"


def holder(path: Place) -> str:
    """Who holds a name, "process 12 on host, since ..."; "" if nobody does.

    Of a lease that tells whose it was within `LEASE_SECONDS`, by the clocks of both.
    """
    if isinstance(path, BucketPath):
        found = path.find()
        with contextlib.suppress(ValueError, LookupError, TypeError):
            record = json.loads(b"{}" if found is None else found[0])
            if time.time() - float(record["renewed"]) < LEASE_SECONDS:
                return str(record["holder"])
        return ""
    with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read() or "another process"
    return ""
