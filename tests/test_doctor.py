"""What differs between processes is named: by the rules on numbers, and on real processes."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

import gptjax
from gptjax import cli, doctor
from gptjax.doctor import CHECKS, MEASURED
from tests import tiny
from tests.child import GPTJAX, Child, free_port

HOST = socket.gethostname()


def test_what_differs_from_most_is_named() -> None:
    assert doctor.same(["a", "a", "b"]) == {2: "b, elsewhere a"}
    assert doctor.same(["b", "a", "a"]) == {0: "b, elsewhere a"}
    assert doctor.same(["a", "b"]) == {1: "b, elsewhere a"}
    assert doctor.same(["a", "b", "c"]) == {1: "b, elsewhere a", 2: "c, elsewhere a"}
    assert doctor.same(["a"]) == doctor.same(["a", "a"]) == {}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_process_is_slow_below_half_of_the_median(count: int) -> None:
    for rates in itertools.product([1e9, 2e9, 3e9, 5e9], repeat=count):
        median = sorted(rates)[count // 2]
        slow = [i for i, rate in enumerate(rates) if 2 * rate < median]
        assert list(doctor.fast(rates)) == slow, rates
        assert len(slow) <= count // 2  # never most of them


def test_half_of_the_median_exactly_is_not_slow() -> None:
    assert doctor.fast([1e9, 2e9, 2e9]) == {}
    (words,) = doctor.fast([0.99e9, 2e9, 2e9]).values()
    assert words == "0.99 GFLOP/s, less than half of the 2 GFLOP/s of the others"


def test_a_clock_that_is_off_is_named_and_jitter_is_not() -> None:
    moments = [100.0, 101.0, 102.0]
    late = [100.01, 101.9, 102.01]  # once it woke up late
    off = [t - 7 for t in moments]
    assert doctor.clock_offsets([moments, late, off]) == pytest.approx([0, 0.01, -7])
    assert doctor.together([moments, late, off]) == {2: "-7.0 s from the others"}
    assert doctor.together([moments]) == {}


def test_a_disk_that_fills_is_named() -> None:
    room, full = {"free": 10e9, "needed": 9e9}, {"free": 8e9, "needed": 9e9}
    assert doctor.enough([room, full]) == {1: "8.0 GB free, checkpoints take 9.0 GB"}


def test_each_fault_that_a_process_tells_of_itself_is_one() -> None:
    assert doctor.no_fault(["", "cannot write"]) == {1: "cannot write"}


def test_one_process_sees_itself_and_leaves_nothing(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", f"--config={tiny.RECIPE}", f"--workdir={tmp_path / 'runs' / 'new'}"]
    words += tiny.overrides(text)
    assert cli.main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    (process,) = record["processes"]
    assert process.keys() == {"host", *CHECKS, *MEASURED} and process["host"] == HOST
    assert process["product"] > 0 and record["faults"] == []
    assert cli.main(words) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_that_the_devices_do_not_fill_is_told(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `train` tells it."""
    words = [f"--config={tiny.RECIPE}", f"--workdir={tmp_path / 'new'}", *tiny.overrides(text)]
    words.append("--config.mesh.fsdp=7")
    told = "mesh data=1 x fsdp=7 x tensor=1 wants 7 devices, but"
    assert cli.main(["train", *words]) == 2
    assert told in capsys.readouterr().err
    assert cli.main(["doctor", *words]) == 1
    assert f"process 0 on {HOST}: mesh: {told}" in capsys.readouterr().out


def pair(*words: tuple[str, list[str], int]) -> list[Child]:
    """Two processes, each of (code before the command, its words, its devices), once they ended."""
    port = free_port()
    children = [
        Child(f"{prelude}; {GPTJAX}", *own, f"--distributed=localhost:{port},2,{i}", devices=count)
        for i, (prelude, own, count) in enumerate(words)
    ]
    return [child.wait() for child in children]


def test_two_processes_that_are_alike_are_measured_together(tmp_path: Path, text: Path) -> None:
    words = ["doctor", "--json", f"--config={tiny.RECIPE}", f"--workdir={tmp_path}/new"]
    words += tiny.overrides(text)
    first, second = pair(("pass", words, 1), ("pass", words, 1))
    assert second.stdout == "", second.stdout
    record = json.loads(first.stdout)  # nothing but JSON, whatever gloo has to say
    # That one is slow is true here at times, where other work takes the cores.
    assert {fault["check"] for fault in record["faults"]} <= {"product"}
    expected = 1 if record["faults"] else 0
    assert [first.returncode, second.returncode] == [expected] * 2, first.stderr
    for process in record["processes"]:
        assert process["all-reduce"] > 0 and abs(process["clock"]) < 1
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_differs_is_named_by_all_that_it_differs_in(tmp_path: Path, text: Path) -> None:
    """Other devices, other code, another config, and a folder which is not the run's."""
    copy = tmp_path / "copy" / "gptjax"
    shutil.copytree(Path(gptjax.__file__).parent, copy, ignore=shutil.ignore_patterns("assets"))
    (copy / "model.py").write_text("# another\n")
    words: list[Any] = ["doctor", "--json", f"--config={tiny.RECIPE}"]
    other_code = f"import gptjax; gptjax.__file__ = {str(copy / '__init__.py')!r}"
    first, second = pair(
        ("pass", [*words, f"--workdir={tmp_path}/a", *tiny.overrides(text)], 2),
        (
            other_code,
            [*words, f"--workdir={tmp_path}/b", *tiny.overrides(text, optim__peak_lr=0.5)],
            1,
        ),
    )
    assert (first.returncode, second.returncode) == (1, 1), first.stderr + second.stderr
    assert second.stdout == ""
    record = json.loads(first.stdout)
    faults = {fault["check"]: fault for fault in record["faults"]}
    assert faults.keys() == {"devices", "code", "config", "run folder", "write access"}
    assert all((f["process"], f["host"], f["ends"]) == (1, HOST, True) for f in faults.values())
    assert faults["devices"]["words"] == "1 cpu, elsewhere 2 cpu"
    assert faults["run folder"]["words"] == f"{tmp_path}/b on {HOST} is not process 0's"
    # Nothing is measured by one program on what may not run it.
    assert all(process.keys() == {"host", *CHECKS} for process in record["processes"])
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["copy"]


def test_train_refuses_a_run_folder_that_is_not_shared(tmp_path: Path, text: Path) -> None:
    (tmp_path / "b").mkdir()
    words = ["train", f"--config={tiny.RECIPE}", *tiny.overrides(text)]
    children = pair(*(("pass", [*words, f"--workdir={tmp_path}/{name}"], 1) for name in "ab"))
    for child in children:
        assert child.returncode == 2, child.stderr
        assert child.stderr == (
            f"gptjax: process 1 on {HOST}: run folder: {tmp_path}/b on {HOST} is not process 0's\n"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
