"""`status` tells what each run of a folder is doing, by real runs; it only reads and never fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import pytest

from gptjax import loop, records, setup, status
from gptjax.cli import main
from gptjax.cluster import slurm
from gptjax.config import UserError
from gptjax.study import runner
from tests import tiny
from tests.child import Child
from tests.test_loop import SIGKILL, at_step, run

KNOBS: dict[str, Any] = {"train__steps": 12, "train__eval_every": 6}
VERSIONS = sorted(Path("tests/fixtures/runs").iterdir())


@pytest.fixture(scope="module")
def store(text: Path) -> Path:
    return text


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(store, folder)
    return folder


def train(store: Path, folder: Path, **knobs: Any) -> None:
    with jax.set_mesh(tiny.mesh()):
        loop.train(tiny.config(store, **KNOBS | knobs), folder)


def of(folder: Path) -> status.Status:
    (only,) = status.statuses(folder)
    return only


def test_a_finished_run(finished: Path) -> None:
    seen = of(finished)
    lines = records.read_metrics(finished)
    *_, last, scored = lines
    assert (seen.run, seen.state, seen.who, seen.why) == (str(finished), "finished", None, None)
    assert (seen.step, seen.steps, seen.saved) == (12, 12, 12)
    assert (seen.loss, seen.val_loss) == (last["loss"], scored["val_loss"])
    assert seen.tokens_per_second == last["tokens_per_second"]
    assert seen.seconds_left is None and seen.seconds_since is not None
    # Numbers that the last lines lack are found further up.
    assert "loss" not in scored and "val_loss" not in last


def test_a_run_that_trains_then_is_stopped(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, load = [], loop.load_batch

    def planted(found: setup.Setup, step: int) -> Any:
        if step == 8:
            seen.append(of(tmp_path))
            os.kill(os.getpid(), signal.SIGTERM)
        return load(found, step)

    monkeypatch.setattr(loop, "load_batch", planted)
    with pytest.raises(loop.Stopped):
        train(store, tmp_path)
    (running,) = seen
    assert running.state == "running" and (running.who or "").startswith(
        f"process {os.getpid()} on {os.uname().nodename}, since"
    )
    # The numbers of step 8 come with step 9; by then none was measured since the save of step 5.
    assert running.step == 7 and running.tokens_per_second is not None
    tokens = (12 - 7) * tiny.KNOBS["data.batch_size"] * tiny.KNOBS["model.context"]
    assert running.seconds_left == pytest.approx(tokens / running.tokens_per_second)
    stopped = of(tmp_path)
    assert (stopped.state, stopped.step, stopped.saved) == ("stopped", 9, 9)
    assert stopped.who is None and stopped.seconds_left is None


def test_a_killed_run(store: Path, tmp_path: Path) -> None:
    killed = run(store, tmp_path, at_step(8, SIGKILL), **KNOBS)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    seen = of(tmp_path)
    assert (seen.state, seen.step) == ("killed", 7)
    assert seen.saved in (0, 5)  # in flight, perhaps
    assert seen.why == f"resumes at step {seen.saved}"


def test_a_run_that_diverged_until_it_is_started_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(loop, "MAX_SKIPPED", 2)
    wild = tiny.overrides(store, **KNOBS, optim__peak_lr=1e30, optim__clip=None)
    words = [f"--config={tiny.RECIPE}", f"--workdir={tmp_path}", *wild]
    assert main(["train", *words]) == 2
    assert "the run has diverged" in capsys.readouterr().err
    seen = of(tmp_path)
    assert seen.state == "diverged" and "2 updates in a row" in (seen.why or "")
    config = json.loads((tmp_path / records.CONFIG).read_text())
    prints = records.read_environment(tmp_path)[-1]["fingerprints"]
    records.open_run(tmp_path, config, prints, None).close()
    assert of(tmp_path).state == "waiting"


def test_what_a_study_leaves(finished: Path, tmp_path: Path) -> None:
    """Failed before anything; killed before its first record; claimed, and not yet training."""
    for name, file, content in (
        ("failed", records.FAILED, b'{"reason": "the disk is full"}'),
        ("killed", records.BEGUN, b"."),
        ("claimed", records.BEGUN, b"."),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(content)
    shutil.copytree(finished, tmp_path / "finished")
    with runner._claim(tmp_path, tmp_path / "claimed") as locked:
        assert locked
        seen = [(s.run, s.state, s.who, s.why) for s in status.statuses(tmp_path)]
    assert seen == [
        ("claimed", "running", "another process", None),
        ("killed", "killed", None, "resumes at step 0"),
        ("failed", "failed", None, "the disk is full"),
        ("finished", "finished", None, None),
    ]
    assert of(tmp_path / "claimed").state == "killed"


@pytest.mark.parametrize("version", VERSIONS, ids=lambda folder: folder.name)
def test_runs_of_a_study_are_told_apart(version: Path) -> None:
    base, rope = status.statuses(version / "cells")
    assert (base.state, base.differs) == ("finished", {})
    assert (rope.state, rope.differs) == ("finished", {"model.position": "rope"})
    inside = status.statuses(version)
    assert [s.run for s in inside] == ["run", f"cells/{base.run}", f"cells/{rope.run}", "store"]
    assert [s.differs for s in inside] == [None, {}, {"model.position": "rope"}, None]
    assert inside[-1].state == "no run"


def test_what_differs_is_what_most_have_otherwise(store: Path, tmp_path: Path) -> None:
    """Seeds always, for none is the usual one; in the order of numbers, not of their digits."""
    for seed in (9, 10):
        for rate in (1e-3, 5e-3, 1e-3):
            config = tiny.config(store, seed=seed, optim__peak_lr=rate)
            name = f"{seed}{rate}".encode().hex().ljust(16, "0")[:16]
            records.open_run(tmp_path / name, loop.to_dict(config), {}, None).close()
    seen = [s.differs for s in status.statuses(tmp_path)]
    assert seen == [
        {"seed": 9}, {"seed": 10},
        {"seed": 9, "optim.peak_lr": 5e-3}, {"seed": 10, "optim.peak_lr": 5e-3},
    ]  # fmt: skip


DAMAGE: dict[str, Any] = {
    "config cut short": ("config.json", b'{"seed": 1'),
    "config of something else": ("config.json", b'{"model_type": "gpt2"}'),
    "config is a list": ("config.json", b"[]"),
    "config in no encoding": ("config.json", b"\xff\xfe"),
    "a line of the log": ("metrics.jsonl", b'{"step": 1}\nnonsense\n'),
    "a number of the log": ("metrics.jsonl", b'{"step": {}, "loss": 1}\n'),
    "diverged without why": ("diverged.json", b"{}"),
    "failed in half": ("failed.json", b'{"reas'),
    "a deep one": ("config.json", b"[" * 100_000),
}


@pytest.mark.parametrize("damage", [*DAMAGE, "config is a folder", "log is a folder"])
def test_a_damaged_run_is_a_row(damage: str, finished: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(finished, tmp_path / "bad"))
    shutil.copytree(finished, tmp_path / "good")
    if damage in DAMAGE:
        file, content = DAMAGE[damage]
        (bad / file).write_bytes(content)
    else:
        file = {"config": "config.json", "log": "metrics.jsonl"}[damage.split()[0]]
        (bad / file).unlink()
        (bad / file).mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("?")
    (tmp_path / "away").symlink_to(tmp_path / "nowhere")
    one, two, three = status.statuses(tmp_path)
    assert (one.run, one.state) == ("bad", "damaged")
    assert one.why and "\n" not in one.why and len(one.why) < 500
    if damage.startswith("config"):
        assert "bad/config.json" in one.why
    assert (two.run, two.state, three.run, three.state) == ("good", "finished", "foreign", "no run")


def test_a_torn_last_line_is_no_damage(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    with (folder / records.METRICS).open("a") as file:
        file.write('{"step": 13, "lo')
    assert of(folder).state == "finished"


def test_nothing_is_written_and_no_device_is_asked_for(finished: Path, tmp_path: Path) -> None:
    """As on the login node of a cluster, or beside the run that holds the TPU."""
    shutil.copytree(finished, tmp_path / "run")
    before = {
        p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*")
    }
    code = """
        import sys, jax
        jax.config.update("jax_platforms", "none_such")
        from gptjax.cli import main
        sys.exit(main(["status", sys.argv[1], *sys.argv[2:]]))
    """
    told = Child(code, tmp_path, "--json").wait()
    assert told.returncode == 0, told.stderr
    (record,) = json.loads(told.stdout)
    assert (record["run"], record["state"], record["step"]) == ("run", "finished", 12)
    shown = Child(code, tmp_path).wait()
    assert re.search(r"run .* finished .* 12 of 12 ", shown.stdout) and shown.returncode == 0
    assert before == {
        p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*")
    }


def test_a_number_that_is_none_is_strict_json(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    with (folder / records.METRICS).open("a") as file:
        file.write('{"step": 13, "loss": "NaN"}\n')
    assert main(["status", str(folder), "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (record,) = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (record["loss"], record["state"]) == ("NaN", "finished")


def test_a_folder_that_is_none_is_refused(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UserError, match="is no folder"):
        status.statuses(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(UserError, match="is no folder"):
        status.statuses(tmp_path / "link")
    assert main(["status", str(tmp_path)]) == 0
    assert "holds no run" in capsys.readouterr().out


def test_any_name_of_a_folder_has_its_place(tmp_path: Path) -> None:
    """Digits that are no number, too; 10 behind 9."""
    for name in ("run10", "run9", "run1²", "run²", "run1", "run٣"):
        (tmp_path / name).mkdir()
    names = [s.run for s in status.statuses(tmp_path)]
    assert names == ["run1", "run1²", "run٣", "run9", "run10", "run²"]


def stands_in_for_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """The real one is asked in test_cluster_slurm.py."""
    (folder / "bin").mkdir()
    (folder / "bin/squeue").write_text(f"#!/bin/sh\n{code}\n")
    (folder / "bin/squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def test_what_slurm_has_is_queued(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(finished, runs / "finished")
    (runs / "cells" / "new").mkdir(parents=True)
    (runs / "cells" / "new" / records.BEGUN).write_bytes(b".")
    (tmp_path / "link").symlink_to(runs)
    jobs = {
        "4_[2-7]": f"PENDING|(Resources)|gptjax {runs}/cells",
        "4_0": f"RUNNING|n0|gptjax {runs}/cells",
        "5": f"RUNNING|n[0-1]|gptjax {runs}/cells/new",
        "6": f"PENDING|(Priority)|gptjax {runs}/a b/c",
        "7": f"PENDING|(Priority)|gptjax {runs}/too/deep/here",
        "8": "PENDING|(Priority)|gptjax gs://lab/run",
        "9": f"RUNNING|n0|{runs}/of another",
        "10": "RUNNING|n0|",
        "11": f"COMPLETING|n0|gptjax {runs}/finished",
        "12": f"COMPLETING|n0|gptjax {runs}/ended",
        "13": "PENDING|(Priority)|a comment\n|in|four lines\n|gptjax\n",
        **{f"2{i}": f"PENDING|(Priority)|gptjax {runs}/many" for i in range(3)},
        "23": f"RUNNING|n1|gptjax {runs}/many",
    }
    (runs / "ended").mkdir()
    (runs / "ended" / records.BEGUN).write_bytes(b".")
    lines = "\n".join(f"{number}|{rest}" for number, rest in jobs.items())
    stands_in_for_squeue(
        tmp_path, monkeypatch, f"cat <<'END'\n{lines}\nEND\nprintf '14|RUNNING|n0|caf\\351\\n'"
    )
    seen = {s.run: (s.state, s.why, s.job) for s in status.statuses(tmp_path / "link")}
    assert seen == {
        "a b/c": ("queued", None, "Slurm job 6: pending, Priority"),
        "ended": ("killed", "resumes at step 0", "Slurm job 12: completing, n0"),
        "many": (
            *("running", None),
            "; ".join(f"Slurm job 2{i}: pending, Priority" for i in range(3)) + "; 1 more",
        ),
        "cells": (
            *("running", None),
            "Slurm job 4_[2-7]: pending, Resources; Slurm job 4_0: running, n0",
        ),
        "cells/new": ("running", "resumes at step 0", "Slurm job 5: running, n[0-1]"),
        "finished": ("finished", None, "Slurm job 11: completing, n0"),
    }
    (new,) = status.statuses(runs / "a b" / "c")
    assert (new.run, new.state) == (str(runs / "a b" / "c"), "queued")
    with pytest.raises(UserError, match="is no folder"):
        status.statuses(runs / "elsewhere")


@pytest.mark.parametrize("code", ["echo 'no controller' >&2; exit 1", "exit 3", "exec sleep 60"])
def test_a_queue_that_does_not_answer_changes_nothing(
    code: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(slurm, "SQUEUE_SECONDS", 0.5)
    stands_in_for_squeue(tmp_path, monkeypatch, code)
    assert of(finished).state == "finished"
    assert "Slurm's queue is not known: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (2e6, "23 d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert status.duration(seconds) == text
