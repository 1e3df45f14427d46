"""One process at a time holds a name, on a disk and in a bucket."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import time
from pathlib import Path

import pytest

from gptjax import locks, storage
from gptjax.locks import Held, Lock
from gptjax.storage import BucketPath, Place
from tests import buckets
from tests.child import Child


def test_a_name_is_held_by_one(folder: Place) -> None:
    with Lock(folder / "run.lock"):
        told = f"process {os.getpid()} on {socket.gethostname()}, since "
        assert locks.holder(folder / "run.lock").startswith(told)
        with pytest.raises(Held, match=told):
            Lock(folder / "run.lock")
        Lock(folder / "other.lock").close()
    assert locks.holder(folder / "run.lock") == ""
    with Lock(folder / "run.lock") as again:
        again.confirm()


def test_a_lock_whose_file_was_removed_cannot_be_confirmed(tmp_path: Path) -> None:
    with Lock(tmp_path / "run.lock") as lock:
        lock.confirm()
        (tmp_path / "run.lock").unlink()
        with pytest.raises(Held, match=r"somebody else \(run.lock was removed\)"):
            lock.confirm()
        with Lock(tmp_path / "run.lock") as second:
            with pytest.raises(Held, match=f"process {os.getpid()} on"):
                lock.confirm()
            second.confirm()


def test_scratch_of_a_killed_process_goes_and_that_of_a_living_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
    import sys, tempfile, time
    from gptjax import locks
    tempfile.tempdir = sys.argv[1]
    with locks.scratch() as folder:
        (folder / "file").touch()
        print(folder, flush=True)
        time.sleep(100)
    """
    killed, living = (Child(code, tmp_path) for _ in range(2))
    # Not before: the first child starts a server, whose socket's path must be short.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = [Path(next(child.lines("stdout")).strip()) for child in (killed, living)]
    (tmp_path / "gptjax-other-1-1-x").mkdir()  # of another host
    killed.kill()
    with locks.scratch() as mine, locks.scratch() as another:
        assert not folders[0].exists() and (folders[1] / "file").exists()
        assert mine.is_dir() and another.is_dir()
    assert set(tmp_path.glob("gptjax-*")) == {folders[1], tmp_path / "gptjax-other-1-1-x"}
    living.kill()


HOLDER = """
    import sys, time
    from gptjax import locks, storage
    locks.RENEW_SECONDS, locks.LEASE_SECONDS = 0.1, float(sys.argv[2])
    lock = locks.Lock(storage.expand(sys.argv[1]))
    print("held", flush=True)
    for _ in range(600):
        time.sleep(0.1)
        if lock.lost:
            print("lost", flush=True)
            break
"""


def test_a_killed_holder_on_this_host_is_replaced_at_once(folder: Place) -> None:
    child = Child(HOLDER, str(folder / "run.lock"), "60")
    assert next(child.lines("stdout")) == "held\n", child.stderr
    with pytest.raises(Held, match=f"process {child.pid} on"):
        Lock(folder / "run.lock")
    child.kill()
    Lock(folder / "run.lock").close()


def test_a_lease_is_replaced_once_its_holder_stands_still_and_not_before(
    far: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No clock of another host is asked: what counts is that the lease does not change."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.5)
    child = Child(HOLDER, str(far / "run.lock"), "1.5")
    assert next(child.lines("stdout")) == "held\n", child.stderr

    def attempt() -> Lock | Held:
        try:
            return Lock(far / "run.lock")
        except Held as held:
            return held

    first = attempt()
    assert isinstance(first, Held) and not first.certain
    time.sleep(0.5)
    second = attempt()
    assert isinstance(second, Held) and second.certain, "it was renewed"
    child.signal(signal.SIGSTOP)
    end = time.monotonic() + 30
    while isinstance(taken := attempt(), Held):
        assert time.monotonic() < end
        time.sleep(0.1)
    child.signal(signal.SIGCONT)
    lines = child.lines("stdout")
    assert next(lines) == "held\n" and next(lines) == "lost\n", "it went on as if nothing were"
    taken.confirm()
    taken.close()
    child.kill()


def test_a_lease_whose_holder_lost_it_cannot_be_confirmed(far: BucketPath) -> None:
    lock = Lock(far / "run.lock")
    storage.replace_file(far / "run.lock", b'{"holder": "process 1 on other, since then"}')
    with pytest.raises(Held, match="process 1 on other"):
        lock.confirm()
    assert lock.lost
    lock.close()
    assert (far / "run.lock").exists(), "it removed another's lease"


def test_an_outage_longer_than_a_lease_does_not_end_it(
    bucket: buckets.Proxy, far: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(storage, "RETRIES", {"max_retries": 1, "initial_delay": "10ms"})
    storage._open.cache_clear()
    with Lock(far / "run.lock") as lock:
        bucket.fault = lambda method, path: "busy"
        time.sleep(1.5)
        bucket.fault = lambda method, path: "pass"
        lock.confirm()
        assert not lock.lost
    assert not (far / "run.lock").exists()
    storage._open.cache_clear()


def test_a_process_is_gone_only_where_its_number_means_the_same(far: BucketPath) -> None:
    """Another host, another boot, another namespace of numbers, or the number used again."""
    host, pid, started = locks._identity(os.getpid())
    assert host and started
    child = Child("print('done')")
    child.wait()
    lease = lambda *process: json.dumps({"holder": "x", "process": process}).encode()  # noqa: E731
    assert locks._gone(lease(host, child.pid, "1"))
    assert locks._gone(lease(host, pid, "1")), "a number that is used again"
    assert not locks._gone(lease(host, pid, started))
    assert not locks._gone(lease(host + "1", child.pid, "1"))
    assert not locks._gone(lease("", child.pid, "1"))
    assert not locks._gone(b"") and not locks._gone(b'{"pid": 1}')


def test_who_waits_for_a_name_gets_it_once_its_file_is_gone(tmp_path: Path) -> None:
    """Each holds the name alone, though each removes its file."""
    code = """
    import sys, time
    from pathlib import Path
    from gptjax import locks
    folder = Path(sys.argv[1])
    for _ in range(20):
        with locks.alone(folder / "name.lock"):
            (folder / "inside").mkdir()
            time.sleep(0.002)
            (folder / "inside").rmdir()
    """
    children = [Child(code, tmp_path) for _ in range(3)]
    for child in children:
        assert child.wait(60).returncode == 0, child.stderr
    assert list(tmp_path.iterdir()) == []
