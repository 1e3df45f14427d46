"""Faults of the machine below a run of `train`: its disk, its memory, its life. docs/faults.md."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptjax import records, storage
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.cli import main
from gptjax.status import status
from tests import buckets, tiny
from tests.child import GPTJAX, Child, pair_of
from tests.test_loop import at_step, run, timeless


@pytest.fixture(scope="module")
def store(text: Path) -> Path:
    return text


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The records of 20 steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(store, folder).returncode == 0
    return timeless(folder)


def system(*command: str | Path, skip: bool = False) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and skip:
        pytest.skip(f"{command[0]}: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def mounted(what: str | Path, at: Path, *options: str) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    system("mount", *options, what, at, skip=True)
    try:
        yield at
    finally:
        system("umount", "--lazy", at)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk with a journal, to be mounted as a loop."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(64 * 2**20)
    system("mkfs.ext4", "-q", path)
    return path


def told(child: Child, *words: str) -> str:
    """The one line in which a run tells a user's mistake."""
    assert child.returncode == 2, child.stderr
    lines = child.stderr.splitlines()
    assert "Traceback" not in child.stderr
    assert sum(line.startswith("gptjax: ") for line in lines) == 1, lines
    assert all(word in lines[-1] for word in words), lines[-1]
    return lines[-1]


# ---- the disk


def test_a_read_only_folder_is_told_and_read(
    store: Path, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(store, small_disk / "done", train__steps=5).returncode == 0
    system("mount", "-o", "remount,ro", small_disk)
    for name in ("new", "done"):
        folder = small_disk / name
        told(run(store, folder, train__steps=10), f"cannot write in {folder}: Read-only file")
    words = ["--config.eval.max_tokens=64", "--json"]
    assert main(["eval", f"--workdir={small_disk / 'done'}", *words]) == 0
    assert main(["generate", f"--workdir={small_disk / 'done'}", "--prompt=the "]) == 0
    assert main(["status", str(small_disk)]) == 0
    assert "finished" in capsys.readouterr().out


def test_a_disk_that_turns_read_only(store: Path, whole: Any, image: Path, tmp_path: Path) -> None:
    """As the kernel makes one in which it met an error."""
    disk = tmp_path / "disk"
    with mounted(image, disk, "-o", "loop,errors=remount-ro"):
        abort = f"os.system('mount -o remount,abort {disk}')"
        child = run(store, disk / "run", at_step(12, abort))
        told(child, f"in {disk / 'run'}", "Read-only file system")
    with mounted(image, disk, "-o", "loop"):
        # What is seen before may be in memory alone.
        saved = Checkpoints(disk / "run" / CHECKPOINTS).latest()
        assert saved in (5, 10)  # that of step 10 may be in flight
        assert f"resumed at step {saved}" in run(store, disk / "run").stderr
        assert timeless(disk / "run") == whole


@pytest.fixture
def slow_disk(image: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A disk, and what puts a process into a group that may write 50 kB a second there.

    By the kernel's own throttle, of either version of its control groups.
    """
    old, new = Path("/sys/fs/cgroup/blkio"), Path("/sys/fs/cgroup")
    group = (old if old.is_dir() else new) / f"gptjax-{os.getpid()}"
    try:
        with mounted(image, tmp_path / "disk", "-o", "loop") as disk:
            device = os.stat(disk).st_dev
            number = f"{os.major(device)}:{os.minor(device)}"
            try:
                group.mkdir()
                if old.is_dir():
                    (group / "blkio.throttle.write_bps_device").write_text(f"{number} 50000")
                else:
                    (group / "io.max").write_text(f"{number} wbps=50000")
            except OSError as error:
                pytest.skip(f"no disk can be slowed down here: {error}")
            yield disk, f"open('{group}/cgroup.procs', 'w').write(str(os.getpid()))"
    finally:
        if group.is_dir():
            group.rmdir()


@pytest.mark.slow
def test_a_slow_disk_holds_up_the_loop_and_loses_nothing(
    store: Path, whole: Any, slow_disk: tuple[Path, str]
) -> None:
    """A save takes seconds and is due after each 5 steps, of some milliseconds."""
    disk, slow = slow_disk
    timed = """
from gptjax.checkpoint import Checkpoints
finish = Checkpoints._finish
def timed(*args):
    begin = time.monotonic()
    finish(*args)
    print("wrote", begin, time.monotonic())
Checkpoints._finish = timed
"""
    child = run(store, disk / "run", f"import os, time\n{slow}\n{timed}")
    assert child.returncode == 0, child.stderr
    wrote = [
        tuple(map(float, line.split()[1:]))
        for line in child.stdout.splitlines()
        if line.startswith("wrote ")
    ]
    assert len(wrote) == 4
    assert all(end - begin > 1 for begin, end in wrote)
    assert all(begin > end for (_, end), (begin, _) in itertools.pairwise(wrote))
    assert timeless(disk / "run") == whole


@pytest.mark.slow
def test_a_slow_disk_is_no_process_that_hangs(store: Path, slow_disk: tuple[Path, str]) -> None:
    """A save takes longer than a step may, and the others wait for it."""
    disk, slow = slow_disk
    code = f"import os\n{slow}\n{GPTJAX}"
    with pair_of(store, disk / "run", code, 1, train__hang_seconds=3) as pair:
        outputs = [p.wait().stderr for p in pair]
    assert [p.returncode for p in pair] == [0, 0], outputs


# Of names, so that each file or folder in turn cannot be made; of pages, so that each cannot be
# filled.
@pytest.mark.slow
@pytest.mark.parametrize(("quota", "least", "more"), [("nr_inodes", 2, 1), ("nr_blocks", 1, 3)])
def test_a_quota_reached_at_each_file_in_turn(
    quota: str,
    least: int,
    more: int,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """First there is room for nothing, then for a little more each time, until it is enough."""
    monkeypatch.setattr(records, "_git", lambda *_: b"a revision, a diff, a name")
    knobs = tiny.overrides(store, train__steps=4, train__eval_every=4, train__checkpoint_every=2)

    def train(folder: Path) -> tuple[int, str]:
        status = main(["train", f"--config={tiny.RECIPE}", f"--workdir={folder}", *knobs])
        return status, capsys.readouterr().err

    def filled(folder: Path) -> set[str]:
        """The files that hold something, TensorBoard's without its time and process."""
        names = {name for name in storage.files(folder) if (folder / name).stat().st_size}
        return {re.sub(r"(?<=events).*", "", name) for name in names}

    assert train(tmp_path / "whole")[0] == 0
    written, refused = filled(tmp_path / "whole"), set()
    for n in itertools.count(least, more):
        with mounted("none", tmp_path / "disk", "-t", "tmpfs", "-o", f"{quota}={n}") as disk:
            (disk / "full").write_text(".")
            status, said = train(disk / "run")
            if status == 0:
                break
            assert status == 2 and "Traceback" not in said, said
            told = r"gptjax: (cannot|could not) write .*: No space left on device\. Free some space"
            assert re.match(told, said.splitlines()[-1]), said
            refused |= written - filled(disk / "run")
            saved = Checkpoints(disk / "run" / CHECKPOINTS).latest()
            # With more room the same command goes on.
            system("mount", "-o", f"remount,{quota}=10000", disk)
            status, said = train(disk / "run")
            assert status == 0, said
            assert ("new run" if saved is None else f"resumed at step {saved}") in said
            assert timeless(disk / "run") == timeless(tmp_path / "whole")
    assert refused == written


# ---- what it reaches over a network


@pytest.mark.slow
def test_a_bucket_that_is_away_for_more_than_a_minute(
    store: Path, whole: Any, tmp_path: Path
) -> None:
    """Nobody listens at its port from the middle of the training on, for 70 s."""
    with buckets.served("s3") as proxy:
        folder = storage.expand(f"s3://{buckets.BUCKET}/run")
        words = ["train", f"--config={tiny.RECIPE}", f"--workdir={folder}"]
        go_on = tmp_path / "go_on"
        wait = f"(print('waits', flush=True), [time.sleep(0.1) for _ in iter(lambda: os.path.exists('{go_on}'), True)])"
        child = Child(f"{at_step(7, wait)}\n{GPTJAX}", *words, *tiny.overrides(store))
        try:
            assert any("waits" in line for line in child.lines("stdout"))
            proxy.leave()
            go_on.touch()
            time.sleep(70)
            assert child.returncode is None, child.stderr
            proxy.come_back()
            assert child.wait().returncode == 0, child.stderr
        finally:
            child.kill()
        assert timeless(folder) == whole
        assert Checkpoints(folder / CHECKPOINTS).latest() == 20


# ---- memory


@pytest.mark.parametrize(
    ("when", "part", "knobs"),
    [
        ("loop.set_up", "parameters", {"model__ff_dim": 2**22}),
        ("heap.keep", "logits", {"data__batch_size": 2**14}),
    ],
)
def test_too_little_memory_is_told_with_what_takes_it(
    when: str, part: str, knobs: dict[str, int], store: Path, tmp_path: Path
) -> None:
    """200 MiB of addresses are left before the state is made, or there is room for a step."""
    prelude = f"""
import resource
from gptjax import heap, loop
real = {when}
def leave_little(*args, **more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, resource.RLIM_INFINITY))
    return real(*args, **more)
{when} = leave_little
"""
    said = told(run(store, tmp_path, prelude, **knobs), "lower data.batch_size")
    line = r"gptjax: out of memory \((.*)\)\. A device holds (parameters .*): raise train.accum"
    match = re.match(line, said)
    assert match, said
    sizes = dict(re.findall(r"(\w+)(?: about)? ([\d,.]+) MiB", match[2]))
    assert {
        "parameters",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "total",
    } <= sizes.keys()
    assert float(sizes[part].replace(",", "")) > 200


# ---- its life


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(
    store: Path, tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is killed and started again until it is done; then another, until all kills are spent."""
    knobs = {"train__steps": 100, "train__eval_every": 50, "train__checkpoint_every": 10}
    for name in ("compiled", "whole"):
        draw, begin = random.Random(0), time.monotonic()
        assert run(store, tmp_path / name, **knobs).returncode == 0
    longest = time.monotonic() - begin
    left, found = pytestconfig.getoption("kills"), Counter[str]()
    for number in itertools.count():
        folder, ended = tmp_path / str(number), False
        while not ended:
            words = ["train", f"--config={tiny.RECIPE}", f"--workdir={folder}"]
            child = Child(GPTJAX, *words, *tiny.overrides(store, **knobs))
            if left:
                time.sleep(draw.uniform(0, longest))
                child.kill()
            ended = child.wait().returncode == 0
            if child.returncode == -signal.SIGKILL:
                left -= 1
                found[moment(child, folder)] += 1
                if folder.exists():
                    assert status(folder).state in READABLE
            else:
                assert ended, child.stderr
        assert timeless(folder) == timeless(tmp_path / "whole")
        if not left:
            break
    with capsys.disabled():
        print(f"\n{found.total()} kills, {number + 1} runs: {dict(found)}")


# Of a run that is whole as far as it went.
READABLE = ("no run", "waiting", "stopped", "killed", "finished")


def moment(child: Child, folder: Path) -> str:
    """In which a run was killed."""
    if any(folder.glob(f"{CHECKPOINTS}/*.partial")):
        return "while saving"
    if f"{folder}: " not in child.stderr:
        return "before it began"
    if "step " not in child.stderr.partition("MFU")[2]:
        return "before a step"
    return "between saves"
