"""Processes that watch each other: each fault is one of a real process, on loopback."""

from __future__ import annotations

import itertools
import re
import signal
import socket
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from jax._src import distributed

from gptjax import alive
from gptjax.alive import HEARTBEAT_SECONDS
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.positions import SILENT_SECONDS, Position, Seen
from tests.child import GPTJAX, Child, free_port, pair_of

HOST = socket.gethostname()
# What a job that has lost a process takes at most. The rest is for a machine with other work.
SECONDS = 15 + 15
ENDLESS = {
    "train__steps": 1_000_000,
    "train__eval_every": 1_000_000,
    "train__checkpoint_every": 20,
    "optim__schedule": "constant",  # so that a run may be given another end
}


@pytest.fixture(scope="module")
def store(text: Path) -> Path:
    return text


def wait_for_lines(workdir: Path, pair: list[Child], count: int = 30) -> None:
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert time.monotonic() < deadline
        assert all(p.returncode is None for p in pair), [p.stderr for p in pair]
        time.sleep(0.02)


def last_line(child: Child) -> str:
    """What it said at its end: one line, after which and before which is nothing of C++ or Python."""
    lines = child.stderr.splitlines()
    assert not any("Traceback" in line or re.match(r"[EFW]\d{4} |    @ ", line) for line in lines)
    assert sum(line.startswith("gptjax: ") for line in lines) == 1, lines
    return lines[-1]


def finish(pair: list[Child], indexes: tuple[int, ...] = (0, 1), seconds: float = SECONDS) -> None:
    until = time.monotonic() + seconds
    for i in indexes:
        pair[i].wait(max(until - time.monotonic(), 0.1))


@pytest.mark.slow
def test_a_kill_of_one_process_ends_the_other_which_names_it(store: Path, tmp_path: Path) -> None:
    with pair_of(store, tmp_path, devices=1, **ENDLESS) as pair:
        wait_for_lines(tmp_path, pair)
        pair[1].kill()
        finish(pair, (0,))
    assert pair[0].returncode == 75, pair[0].stderr
    said = last_line(pair[0])
    assert re.match(rf"gptjax: lost: process 1 on {HOST}, at step \d+ \(\w", said), said
    assert said.endswith("The same command goes on from the last save"), said
    # Nothing half-written results, and the same command goes on.
    saved = Checkpoints(tmp_path / CHECKPOINTS).steps()
    assert saved
    knobs = ENDLESS | {"train__steps": saved[-1] + 20}
    with pair_of(store, tmp_path, devices=1, **knobs) as pair:
        outputs = [p.wait().stderr for p in pair]
    assert [p.returncode for p in pair] == [0, 0], outputs
    assert f"resumed at step {saved[-1]}" in outputs[0]


@pytest.mark.slow
def test_a_kill_of_the_coordinator_ends_the_others(store: Path, tmp_path: Path) -> None:
    with pair_of(store, tmp_path, devices=1, **ENDLESS) as pair:
        wait_for_lines(tmp_path, pair)
        pair[0].kill()
        finish(pair, (1,))
    assert pair[1].returncode == 75, pair[1].stderr
    assert f"lost: the coordinator, process 0 on {HOST}, at step " in last_line(pair[1])


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_job(store: Path, tmp_path: Path, stopped: int) -> None:
    with pair_of(store, tmp_path, devices=1, **ENDLESS) as pair:
        wait_for_lines(tmp_path, pair)
        pair[stopped].signal(signal.SIGSTOP)
        finish(pair, (1 - stopped,))
        pair[stopped].signal(signal.SIGCONT)  # it finds that the others have gone
        finish(pair, (stopped,))
    assert [p.returncode for p in pair] == [75, 75], [p.stderr for p in pair]
    assert f"process {stopped} on {HOST}, at step " in last_line(pair[1 - stopped])
    assert re.search(r"stood still for \d+ s", last_line(pair[stopped]))


@pytest.mark.slow
def test_when_all_are_stopped_for_a_while_none_says_that_others_went_on(
    store: Path, tmp_path: Path
) -> None:
    """As a host that sleeps, or a job that its cluster suspends.

    Should jax hear all of them again before it looks for whom it has not heard, they go on.
    """
    with pair_of(store, tmp_path, devices=1, **ENDLESS) as pair:
        wait_for_lines(tmp_path, pair)
        for number, seconds in ((signal.SIGSTOP, 2 * HEARTBEAT_SECONDS), (signal.SIGCONT, 0)):
            for process in pair:
                process.signal(number)
            time.sleep(seconds)
        lines = (tmp_path / "metrics.jsonl").read_text().count("\n")
        until = time.monotonic() + SECONDS
        while time.monotonic() < until and all(p.returncode is None for p in pair):
            time.sleep(0.1)
        if all(p.returncode is None for p in pair):
            wait_for_lines(tmp_path, pair, lines + 10)
            return
        finish(pair)
    assert [p.returncode for p in pair] == [75, 75], [p.stderr for p in pair]
    for process in pair:
        assert re.search(r"stood still for \d+ s, longer than", last_line(process))


# One process, by its index, does something else than to read the batch of step 13.
FAULTY = """
    import ctypes, os, sys, time
    from gptjax import loop
    from gptjax.cli import main
    from gptjax.config import UserError

    load_batch = loop.load_batch

    def faulty(setup, step):
        if step == 12 and ",2,{index} " in " ".join(sys.argv):
            {fault}
        return load_batch(setup, step)

    loop.load_batch = faulty
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("index", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stuck_process_ends_the_job_and_is_named(store: Path, tmp_path: Path, index: int) -> None:
    """It reads a pipe into which nobody writes, as from a file system that has gone."""
    code = FAULTY.format(
        index=index,
        fault="os.mkfifo(sys.argv[3][10:] + '/pipe') or open(sys.argv[3][10:] + '/pipe')",
    )
    with pair_of(store, tmp_path, code, 1, **ENDLESS, train__hang_seconds=5) as pair:
        finish(pair, seconds=120)
    assert [p.returncode for p in pair] == [75, 75], [p.stderr for p in pair]
    for p in pair:
        assert "no progress for " in (said := last_line(p)), said
        assert f"all wait for process {index} on {HOST}, at step 13 (reading the batch)" in said
    assert re.search(r"this one is at <string>:\d+ \(faulty\)", last_line(pair[index]))


@pytest.mark.slow
def test_a_process_that_keeps_the_lock_of_python_ends_too(store: Path, tmp_path: Path) -> None:
    """Not even the thread that watches runs there: it ends by faulthandler, with its stack."""
    code = FAULTY.format(index=1, fault="time.sleep(2.5) or ctypes.PyDLL(None).sleep(600)")
    with pair_of(store, tmp_path, code, 1, **ENDLESS, train__hang_seconds=4) as pair:
        finish(pair, seconds=120)
    assert [p.returncode for p in pair] == [75, 1], [p.stderr for p in pair]
    assert f"process 1 on {HOST}, at step 13 (reading the batch)" in last_line(pair[0])
    assert "in faulty" in pair[1].stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "fault", "status", "words"),
    [
        (0, "raise UserError('the disk is full')", 2, "the disk is full"),
        (1, "raise TypeError('a fault of ours')", 1, "TypeError: a fault of ours"),
    ],
)
def test_an_error_of_one_process_is_told_by_the_others(
    store: Path, tmp_path: Path, index: int, fault: str, status: int, words: str
) -> None:
    code = FAULTY.format(index=index, fault=fault)
    with pair_of(store, tmp_path, code, 1, **ENDLESS) as pair:
        finish(pair, seconds=120)
    assert [p.returncode for p in pair] == [status, status], [p.stderr for p in pair]
    told = f"process {index} on {HOST}, at step 13 (reading the batch), has ended: {words}"
    assert told in last_line(pair[1 - index])
    assert ("Traceback" in pair[index].stderr) == (status == 1)
    assert words in pair[index].stderr


@pytest.mark.slow
def test_ctrl_c_in_all_and_sigterm_twice_save_once_at_one_step(store: Path, tmp_path: Path) -> None:
    with pair_of(store, tmp_path, devices=1, **ENDLESS) as pair:
        wait_for_lines(tmp_path, pair)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            for p in pair:
                p.signal(number)
        finish(pair, seconds=120)
    assert [p.returncode for p in pair] == [75, 75], [p.stderr for p in pair]
    (step,) = map(int, re.findall(r"stopped at step (\d+), saved", pair[0].stderr))
    assert Checkpoints(tmp_path / CHECKPOINTS).latest() == step


def alone(address: str, seconds: float = 3) -> Child:
    """A process of `eval` that is to meet others."""
    code = f"import os; os.environ[{alive.MEET_SECONDS!r}] = '{seconds}'; {GPTJAX}"
    return Child(code, "eval", "--workdir=nowhere", f"--distributed={address}")


def test_processes_that_do_not_meet_say_why_in_time() -> None:
    with closing(socket.create_server(("localhost", 0))) as taken:
        port, free, other = taken.getsockname()[1], free_port(), free_port()
        children = {
            f"process 0 cannot serve at port {port}": alone(f"localhost:{port},2,0"),
            f"nobody answers at localhost:{other}": alone(f"localhost:{other},2,1"),
            f"not all of 2 processes came to localhost:{free}": alone(f"localhost:{free},2,0"),
        }
        for words, child in children.items():
            assert child.wait(SECONDS).returncode == 2, child.stderr
            assert words in last_line(child)


def test_processes_that_were_told_different_counts_end() -> None:
    port = free_port()
    pair = [alone(f"localhost:{port},{2 + i},{i}", 60) for i in range(2)]
    for p in pair:
        assert p.wait(120).returncode == 2, p.stderr
    assert "process 1 was told of 3 processes, process 0 of 2" in last_line(pair[1])


@pytest.mark.parametrize(
    "address", ["localhost:1,2", "localhost:x,2,0", "localhost:1,2,2", ":,2,0", "h:70000,1,0"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(alive.UserError, match=re.escape(address)):
        alive._parse(address)


@pytest.mark.parametrize("client", ["gone", None, object()])
def test_a_jax_that_hides_its_store_is_told(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is private: another release may have it elsewhere, or by other names."""
    if client == "gone":
        monkeypatch.delattr(distributed, "global_state")
    else:
        monkeypatch.setattr(distributed.global_state, "client", client)
    with pytest.raises(alive.UserError, match=r"jax \d\S* has not the key-value store .*install"):
        alive._store()


def test_one_process_is_not_watched() -> None:
    threads = threading.active_count()
    with alive.watched(1.0):
        alive.moves("training", 1)
        alive.leave(2, "nothing to tell")
        assert threading.active_count() == threads
    assert alive.gather("words", "mine", 1.0) == ["mine"]


def seen(*processes: tuple[int, float, float | None]) -> list[Seen]:
    """Of (moves, moved, patience) each; the time of the last beat is that of the move."""
    return [
        Seen(Position("h", 1, moves, "training", 1, patience), moved, moved)
        for moves, moved, patience in processes
    ]


@pytest.mark.parametrize(
    ("processes", "behind"),
    [
        ([(5, 0, 10), (6, 0, 10)], [0]),
        ([(6, 0, 10), (5, 0, 10)], [1]),
        ([(5, 0, 10), (5, 0, 10)], [0, 1]),
        ([(5, 2, 10), (6, 0, 10)], []),  # the one behind has its patience yet
        ([(5, 0, 60), (6, 0, 10)], []),  # it saves, which may take long: the other waits
        ([(5, 0, 10), (5, 2, 10)], []),
        ([(5, 0, None), (6, 0, 10)], []),  # not watched
        ([(5, 0, 10)], [0]),
    ],
)
def test_those_behind_are_hung_once_their_patience_is_over(
    processes: list[Any], behind: list[int]
) -> None:
    assert alive.hung(seen(*processes), 11.0) == behind


def test_at_no_moment_is_a_process_hung_that_others_do_not_wait_for() -> None:
    for moves in itertools.product(range(3), repeat=3):
        for moved in itertools.product((0.0, 5.0), repeat=3):
            those = seen(*((m, t, 10.0) for m, t in zip(moves, moved, strict=True)))
            for i in alive.hung(those, 12.0):
                assert moves[i] == min(moves) and moved[i] == 0.0


def test_a_beat_or_a_move_renews() -> None:
    first = Seen.first(Position("h", beat=1, moves=1), 0.0)
    assert first.again(Position("h", beat=2, moves=1), 5.0)[1:] == (5.0, 0.0)
    assert first.again(Position("h", beat=2, moves=2), 5.0)[1:] == (5.0, 5.0)
    still = first.again(Position("h", beat=1, moves=1), 5.0)
    assert alive.silent([still, first.again(Position("h", beat=2), 5.0)], 5.0) == [0]
    assert SILENT_SECONDS < HEARTBEAT_SECONDS  # who is silent is known when jax ends the job
