"""Each cell runs once, whatever is killed, fails or diverges; what is in one table compares."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax import loop, records, storage
from gptjax.cli import main
from gptjax.config import UserError
from gptjax.records import read_environment, read_metrics
from gptjax.setup import Setup
from gptjax.storage import Place
from gptjax.study import results, runner
from gptjax.study.results import Outcome, at_edge, check_alike, outcome, read
from gptjax.study.spec import Cell, Study, cells, load, tuning_cells
from gptjax.study.store import COMPUTES
from tests import buckets, tiny
from tests.child import Child
from tests.test_loop import timeless

LABELS = ["base, seed 0", "base, seed 1", "rope, seed 0", "rope, seed 1"]


# A process of its own: runs the study of a file and prints its table, all digits.
SCRIPT = """
import json, sys
from pathlib import Path
from gptjax import storage
from gptjax.study import runner, spec
found = runner.run_study(spec.load(Path(sys.argv[1])), storage.expand(sys.argv[2]))
print(json.dumps([
    [o.cell.label, o.status, o.metric, *(a.tolist() for a in o.curve)] for o in found.outcomes
]))
"""


@pytest.fixture(scope="module")
def file(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "positions.py"
    words = tuple(tiny.overrides(text))
    path.write_text(
        "from gptjax.study.spec import Study\n"
        f"STUDY = Study('?', {tiny.RECIPE!r}, {tiny.ARMS!r}, seeds=2, overrides={words!r})\n"
    )
    return path


def table(stdout: str) -> list[Any]:
    """Its last line, below the samples."""
    return json.loads(stdout.splitlines()[-1])


def begun(stderr: str) -> list[str]:
    """The cells that a process says to run, in order."""
    return re.findall(r"^\[\d/\d\] (.*)$", stderr, re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A study that nothing interrupted.

    Attributes:
        cells: the store.
        table: what it printed.
    """

    study: Study
    cells: Path
    table: list[Any]


@pytest.fixture(scope="module")
def whole(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    store = tmp_path_factory.mktemp("whole")
    child = Child(SCRIPT, file, store).wait()
    assert child.returncode == 0, child.stderr
    assert begun(child.stderr) == LABELS
    return Whole(load(file), store, table(child.stdout))


@pytest.fixture
def copied(whole: Whole, tmp_path: Path) -> Path:
    """Its cells, to alter."""
    return Path(shutil.copytree(whole.cells, tmp_path / "cells"))


def starts(store: Place) -> dict[str, int]:
    """How often each cell was started."""
    folders = [f for f in storage.children(store) if f.name != ".locks"]
    return {f.name: len(read_environment(f)) for f in folders}


def logs(store: Place) -> dict[str, Any]:
    """What every cell logged, but for the time it took."""
    return {name: timeless(store / name) for name in starts(store)}


# ---- each cell once


def test_a_cell_is_an_ordinary_run_at_its_address(whole: Whole) -> None:
    expected = cells(whole.study, {})
    assert [cell.label for cell in expected] == LABELS
    assert starts(whole.cells) == {cell.address: 1 for cell in expected}
    for cell in expected:
        folder = whole.cells / cell.address
        assert {"config.json", "metrics.jsonl", "checkpoints"} <= {p.name for p in folder.iterdir()}
        assert json.loads((folder / "config.json").read_text())["seed"] == cell.config.seed
        # A sample of the first seed alone.
        assert (folder / "sample.txt").exists() == (cell.seed == 0)


def test_an_outcome_is_what_the_run_logged(whole: Whole) -> None:
    found = read(whole.study, whole.cells)
    assert found.tuning == [] and found.tuned == {}
    assert len(found.outcomes) == 4
    for o, (label, status, metric, steps, curve) in zip(found.outcomes, whole.table, strict=True):
        lines = read_metrics(o.folder)
        scored = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
        assert (o.cell.label, o.status, o.reason) == (label, "finished", "") == (label, status, "")
        assert list(scored) == [10, 20] == steps == o.curve[0].tolist()
        assert list(scored.values()) == curve == o.curve[1].tolist()
        assert o.metric == metric == scored[20]
        speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
        assert o.tokens_per_second == np.median(speeds) > 0
        (cost,) = (line for line in lines if "compile_seconds" in line)
        assert o.compile_seconds == cost["compile_seconds"] > 0
        assert o.program_bytes == cost["program_bytes"] > 0
    assert len({o.metric for o in found.outcomes}) == 4
    # Another metric of the same runs.
    by_byte = read(dataclasses.replace(whole.study, metric="val_bits_per_byte"), whole.cells)
    for nats, bits in zip(found.outcomes, by_byte.outcomes, strict=True):
        assert bits.metric == read_metrics(bits.folder)[-1]["val_bits_per_byte"] != nats.metric


def test_a_second_run_does_nothing(whole: Whole) -> None:
    before = tiny.files(whole.cells)
    found = runner.run_study(whole.study, whole.cells)
    assert [o.metric for o in found.outcomes] == [row[2] for row in whole.table]
    assert tiny.files(whole.cells) == before


def test_studies_share_their_cells(whole: Whole, copied: Path, text: Path) -> None:
    """The other's arm is this one's baseline, and only a third arm is missing."""
    other = tiny.study(
        text,
        {"learned": {"model.position": "learned"}, "none": {"model.position": "none"}},
        settings={"model.position": "rope"}, baseline="rope", seeds=1,
    )  # fmt: skip
    assert [o.status for o in read(other, copied).outcomes] == ["finished", "finished", "missing"]
    before = tiny.files(copied)
    found = runner.run_study(other, copied)
    assert [o.status for o in found.outcomes] == ["finished"] * 3
    by_label = {row[0]: row[2] for row in whole.table}
    assert found.outcomes[0].metric == by_label["rope, seed 0"]
    assert found.outcomes[1].metric == by_label["base, seed 0"]
    assert {p: b for p, b in tiny.files(copied).items() if p in before} == before
    assert starts(copied) == dict.fromkeys([*starts(whole.cells), found.outcomes[2].folder.name], 1)


def test_a_process_that_holds_a_cell_is_waited_for(
    copied: Path, text: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process is at the first cell, and finishes it while this one waits."""
    first = cells(whole.study, {})[0]
    away = copied.parent / "away"
    (copied / first.address).rename(away)
    naps: list[float] = []
    with runner._claim(copied, copied / first.address) as mine:
        assert mine
        with runner._claim(copied, copied / first.address) as again:
            assert not again

        def nap(seconds: float) -> None:
            naps.extend([seconds] * (seconds >= 1))  # the others are of a lock
            if len(naps) == 2 and not (copied / first.address).exists():
                away.rename(copied / first.address)

        monkeypatch.setattr(runner.time, "sleep", nap)
        found = runner.run_study(whole.study, copied)
    assert naps == [runner.POLL_SECONDS] * 2
    assert [o.metric for o in found.outcomes] == [row[2] for row in whole.table]
    assert set(starts(copied).values()) == {1}


def test_a_worker_stays_while_it_is_not_known_whether_a_cell_is_held(
    copied: Path, text: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease in a bucket tells only after a while that its holder is gone."""
    first = cells(whole.study, {})[0]
    shutil.rmtree(copied / first.address)
    asked = 0

    class Slow(runner.Lock):
        def __init__(self, path: Path) -> None:
            nonlocal asked
            asked += path.name == first.address
            if path.name == first.address and asked < 3:
                raise runner.Held("process 1 on other", certain=False)
            super().__init__(path)

    monkeypatch.setattr(runner, "Lock", Slow)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    found = runner.run_study(whole.study, copied, worker=True)
    assert asked >= 3 and {o.status for o in found.outcomes} == {"finished"}


def test_a_run_that_ends_while_it_is_read_is_not_read_half(
    whole: Whole, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process logs the last step and saves it, just after the log was read."""
    cell = cells(whole.study, {})[1]
    log, done = copied / cell.address / "metrics.jsonl", copied / cell.address / "checkpoints"
    finished, away = log.read_text(), copied.parent / "away"
    log.write_text("".join(line for line in finished.splitlines(True) if '"step": 20' not in line))
    done.rename(away)

    def read_then_end(folder: Path) -> Any:
        lines = read_metrics(folder)
        log.write_text(finished)
        away.rename(done)
        return lines

    with monkeypatch.context() as patch:
        patch.setattr(results, "read_metrics", read_then_end)
        o = outcome(whole.study, cell, copied)
    assert (o.status, o.curve[0].tolist()) == ("started", [10]) and math.isnan(o.metric)
    assert outcome(whole.study, cell, copied).metric == whole.table[1][2]


# ---- what goes wrong


def test_a_diverged_cell_is_kept_with_its_reason(
    text: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MAX_SKIPPED", 2)
    wild = tiny.study(text, {"wild": {"optim.peak_lr": 1e30, "optim.clip": None}}, seeds=1)
    base, o = runner.run_study(wild, copied).outcomes
    assert (base.status, o.status) == ("finished", "diverged")
    assert "2 updates in a row" in o.reason and math.isnan(o.metric)
    assert not (o.folder / "sample.txt").exists()
    before = tiny.files(copied)
    base, again = runner.run_study(wild, copied).outcomes
    assert (again.status, again.reason) == ("diverged", o.reason)
    assert tiny.files(copied) == before


def test_a_run_that_ends_without_a_number_has_diverged(whole: Whole, copied: Path) -> None:
    cell = cells(whole.study, {})[1]
    path = copied / cell.address / "metrics.jsonl"
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps(json.loads(last) | {"val_loss": "NaN"})]) + "\n")
    o = outcome(whole.study, cell, copied)
    assert (o.status, o.reason) == ("diverged", "val_loss is nan at the last step")
    assert math.isnan(o.metric)


def test_a_finished_run_whose_log_was_lost_is_told(whole: Whole, copied: Path) -> None:
    cell = cells(whole.study, {})[1]
    path = copied / cell.address / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match=r"lacks val_loss of the last step: remove .* to run it"):
        read(whole.study, copied)
    path.unlink()
    with pytest.raises(UserError, match=r"lacks val_loss of the last step: remove .* to run it"):
        runner.run_study(whole.study, copied)


def test_a_cell_that_cannot_run_is_told_and_the_others_run(text: Path, copied: Path) -> None:
    """Its fault shows only when its tokenizer is loaded; it stands before a missing arm."""
    arms = {"bad": {"model.vocab_size": 128}, "fine": {"optim.weight_decay": 0.2}}
    broken = tiny.study(text, arms, seeds=1)
    with pytest.raises(UserError) as error:
        runner.run_study(broken, copied)
    told = str(error.value)
    assert told.startswith("1 cells could not run; the first, bad, seed 0: tokenizer 'bytes' has")
    assert "\n" not in told
    base, bad, fine = read(broken, copied).outcomes
    assert [o.status for o in (base, bad, fine)] == ["finished", "failed", "finished"]
    assert "more than model.vocab_size=128" in bad.reason
    assert math.isnan(bad.metric)
    before = tiny.files(copied)
    with pytest.raises(UserError, match="bad, seed 0"):
        runner.run_study(broken, copied)
    assert tiny.files(copied) == before


def test_what_failed_is_tried_again(text: Path, whole: Whole, tmp_path: Path) -> None:
    """The text is away at first, and then back."""
    here = Path(shutil.copytree(text, tmp_path / "here"))
    one, away = tiny.study(here, {}, seeds=1), here.rename(tmp_path / "away")
    with pytest.raises(UserError, match="1 cells could not run; .*/here"):
        runner.run_study(one, tmp_path / "cells")
    (o,) = read(one, tmp_path / "cells").outcomes
    assert o.status == "failed" and str(here) in o.reason
    away.rename(here)
    (o,) = runner.run_study(one, tmp_path / "cells").outcomes
    assert (o.status, o.reason, o.metric) == ("finished", "", whole.table[0][2])
    assert not (o.folder / records.FAILED).exists()


def test_what_a_full_disk_broke_goes_on(
    small_disk: Path, text: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, store = tiny.study(text, {}, seeds=1), small_disk / "cells"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2**21 - 2**18))
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")  # no git, whose diff could fill the disk alone
        with pytest.raises(UserError, match="No space left on device") as error:
            runner.run_study(one, store)
        assert "\n" not in str(error.value)
        (o,) = read(one, store).outcomes
        # Whether a word of it still fitted depends on what the save in flight has freed.
        assert o.status in ("failed", "started")
        ballast.unlink()
        (o,) = runner.run_study(one, store).outcomes
    assert (o.status, o.metric) == ("finished", whole.table[0][2])
    assert timeless(o.folder) == timeless(whole.cells / o.folder.name)


def test_a_store_that_cannot_be_written_is_told(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        runner.run_study(tiny.study(text), tmp_path / "file" / "cells")


def test_a_prompt_that_cannot_be_continued_costs_no_training(text: Path, tmp_path: Path) -> None:
    long = tiny.study(text, {}, seeds=1, settings={"optim.b1": 0.8})
    words = (*long.overrides, f"--config.sample.prompt={'x' * 17}")
    with pytest.raises(UserError, match="sample.prompt has 17 tokens"):
        runner.run_study(dataclasses.replace(long, overrides=words), tmp_path)
    assert set(starts(tmp_path).values()) == {0}


# ---- tuning


def test_tuning_chooses_and_the_choice_decides(text: Path, tmp_path: Path) -> None:
    """A rate at which nothing is learned cannot win."""
    tuned = tiny.study(text, {}, seeds=1, tune={"optim.peak_lr": (1e-9, 1e-2)})
    found = runner.run_study(tuned, tmp_path)
    best = {"optim.peak_lr": 1e-2}
    assert found.tuned == {("", "base"): best}
    assert [(o.status, v["optim.peak_lr"]) for o, v in found.tuning] == [
        ("finished", 1e-9),
        ("finished", 1e-2),
    ]
    worse, better = (o.metric for o, _ in found.tuning)
    assert better < worse
    (o,) = found.outcomes
    assert (o.status, o.cell.config.optim.peak_lr, o.cell.config.seed) == ("finished", 1e-2, 0)
    assert o.metric != better
    assert set(starts(tmp_path).values()) == {1} and len(starts(tmp_path)) == 3
    assert at_edge(tuned, best) == ["optim.peak_lr"]


def tried(text: Path, *metrics: float | str) -> tuple[Study, list[Any]]:
    """Two tuning runs at each of three rates; a word is the status of one that has no number."""
    tuned = tiny.study(text, {}, tune={"optim.peak_lr": (1e-3, 1e-2, 1e-1)}, tuning_seeds=2)
    none = np.array([])
    found = [
        (
            Outcome(
                cell, Path(), "finished" if isinstance(m, float) else m, "",
                m if isinstance(m, float) else math.nan, (none, none), 0.0, 0.0, 0.0,
            ),
            values,
        )
        for m, (cell, values) in zip(metrics, tuning_cells(tuned), strict=True)
    ]  # fmt: skip
    return tuned, found


@pytest.mark.parametrize(
    "metrics, rate",
    [
        ((3.0, 3.0, 2.0, 3.5, 2.5, 4.0), 1e-2),  # means 3.0, 2.75, 3.25
        ((3.0, 3.0, 2.0, 4.5, 1.0, "diverged"), 1e-3),  # a rate at which one run diverges is out
        (("diverged", "diverged", 2.0, 4.5, 1.0, 1.0), 1e-1),
        ((3.0, 3.0, 2.0, 2.0, 1.0, "started"), None),  # not yet
        ((3.0, 3.0, 2.0, 2.0, "failed", 1.0), None),
        (("missing",) * 6, None),
        (("diverged",) * 6, None),
    ],
)
def test_the_best_is_the_lowest_mean(text: Path, metrics: Any, rate: float | None) -> None:
    best = results._best(*tried(text, *metrics))
    assert best == ({} if rate is None else {("", "base"): {"optim.peak_lr": rate}})


def test_a_best_value_at_the_edge_is_told(text: Path) -> None:
    tune = {
        "optim.peak_lr": (1e-2, 1e-3, 1e-1),  # in any order
        "optim.clip": (None, 0.5, 1.0, 2.0),
        "optim.schedule": ("cosine", "wsd"),  # has no edge
        "optim.b2": (0.9,),  # was not searched
    }
    tuned = tiny.study(text, {}, tune=tune)
    rest = {"optim.schedule": "cosine", "optim.b2": 0.9}
    for rate, clip, told in (
        (1e-2, 1.0, []),
        (1e-3, None, ["optim.peak_lr"]),
        (1e-1, 0.5, ["optim.peak_lr", "optim.clip"]),
        (1e-2, 2.0, ["optim.clip"]),
    ):
        assert at_edge(tuned, {"optim.peak_lr": rate, "optim.clip": clip, **rest}) == told


# ---- one table, one code, one data


def alter(store: Path, cell: Cell, change: Callable[[dict[str, Any]], None]) -> Path:
    """Changes the last start that a cell's folder tells of."""
    path = store / cell.address / "environment.json"
    history = json.loads(path.read_text())
    change(history[-1])
    path.write_text(json.dumps(history))
    return path.parent


def set_to(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        for key in keys[:-1]:
            record = record[key]
        name = next(k for k in record if k.startswith(keys[-1]))
        record[name] = "another"

    return change


@pytest.mark.parametrize(
    "change, told",
    [
        (set_to("versions", "jax"), "different version of jax in one table"),
        (set_to("fingerprints", "data."), "different data."),
        (set_to("fingerprints", "held_out."), "different held_out."),
        (set_to("fingerprints", "tokenizer"), "different tokenizer"),
    ],
    ids=["version", "data", "held-out", "tokenizer"],
)
def test_a_mixture_is_refused_and_both_are_named(
    change: Any, told: str, whole: Whole, copied: Path
) -> None:
    first, *_, last = cells(whole.study, {})
    folder = alter(copied, last, change)
    for attempt in (read, runner.run_study):
        with pytest.raises(UserError) as error:
            attempt(whole.study, copied)
        said = str(error.value)
        assert told in said and "\n" not in said
        assert f"another in {folder} (rope, seed 1)" in said
        assert f"{copied / first.address} (base, seed 0)" in said


def test_a_run_that_went_on_with_other_packages_is_a_mixture_itself(
    whole: Whole, copied: Path
) -> None:
    cell = cells(whole.study, {})[0]
    path = copied / cell.address / "environment.json"
    (record,) = json.loads(path.read_text())
    older = record | {"versions": record["versions"] | {"jax": "0.1"}}
    path.write_text(json.dumps([older, record]))
    with pytest.raises(UserError, match=r"different version of jax in one table: 0\.1 in"):
        read(whole.study, copied)


def test_cells_of_other_code_that_did_not_tell_are_refused_before_any_is_run(
    whole: Whole, copied: Path
) -> None:
    """All agree, but not with what would run now."""
    first, *others = cells(whole.study, {})
    shutil.rmtree(copied / first.address)
    for cell in others:
        (alter(copied, cell, set_to("code")) / COMPUTES).unlink()
    read(whole.study, copied)
    with pytest.raises(UserError) as error:
        runner.run_study(whole.study, copied)
    said = str(error.value)
    assert "was run with another code, another, than this, " in said and "\n" not in said
    assert str(copied / others[0].address) in said
    assert not (copied / first.address).exists()


def test_two_tokenizers_are_no_mixture_of_data(whole: Whole, copied: Path) -> None:
    """Each has its own tokens of the text; two data of one tokenizer are still refused."""
    first, *_, last = read(whole.study, copied).outcomes
    alter(copied, last.cell, set_to("fingerprints", "data."))
    with pytest.raises(UserError, match="different data."):
        check_alike([first, last])
    config = last.cell.config
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="gpt2"))
    last = dataclasses.replace(last, cell=dataclasses.replace(last.cell, config=other))
    check_alike([first, last])
    (alter(copied, first.cell, set_to("code")) / COMPUTES).unlink()
    with pytest.raises(UserError, match="different code in one table"):
        check_alike([first, last])


# ---- interruptions


def test_sigterm_saves_stops_and_goes_on(
    text: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tiny.study(text, {}, seeds=1)
    load_batch = loop.load_batch

    def planted(setup: Setup, step: int) -> Any:
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return load_batch(setup, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "load_batch", planted)
        with pytest.raises(loop.Stopped):
            runner.run_study(one, tmp_path)
    (o,) = read(one, tmp_path).outcomes
    assert (o.status, o.reason) == ("started", "") and math.isnan(o.metric)
    (o,) = runner.run_study(one, tmp_path).outcomes
    assert (o.status, o.metric) == ("finished", whole.table[0][2])
    assert [r["resume_step"] for r in read_environment(o.folder)] == [None, 8]
    assert timeless(o.folder) == timeless(whole.cells / o.folder.name)


def test_two_processes_share_the_cells(file: Path, whole: Whole, tmp_path: Path) -> None:
    both = [Child(SCRIPT, file, tmp_path) for _ in range(2)]
    assert [c.wait().returncode for c in both] == [0, 0], [c.stderr for c in both]
    assert [table(c.stdout) for c in both] == [whole.table] * 2
    assert sorted(label for c in both for label in begun(c.stderr)) == LABELS
    assert set(starts(tmp_path).values()) == {1}
    assert logs(tmp_path) == logs(whole.cells)


def test_a_worker_takes_what_is_free_and_the_last_one_reports(
    file: Path, whole: Whole, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process is at the last cell; a worker runs the first, and ends without a report."""
    first, *_, last = [cell.address for cell in cells(load(file), {})]
    for name in (first, last):
        shutil.rmtree(copied / name)
    monkeypatch.chdir(copied.parent)
    words = ["study", str(file), "--worker", f"--store={copied}", "--out=report"]
    with runner._claim(copied, copied / last) as locked:
        assert locked
        assert main(words) == 0
    assert set(starts(whole.cells)) - set(starts(copied)) == {last}
    assert not Path("report").exists()
    assert main(words) == 0
    assert Path("report/report.md").is_file()
    assert logs(copied) == logs(whole.cells)


# A process of its own, which is killed at its first cell, as by a system without memory.
KILLED = """
import os, signal, sys
from pathlib import Path
from gptjax.study import runner, spec
runner.cells_store.write = lambda *_: None
runner.loop.train = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
runner.run_study(spec.load(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_cell_that_was_killed_comes_after_the_others(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = Child(KILLED, file, tmp_path).wait()
    assert killed.returncode == -signal.SIGKILL
    one, two, *rest = [tmp_path / cell.address for cell in cells(load(file), {})]
    assert runner.kills(one) == 1 and not two.exists()
    order: list[Path] = []
    monkeypatch.setattr(runner, "train_cell", lambda o, begin: order.append(o.folder))
    monkeypatch.setattr(runner, "_sample", lambda o: None)
    runner.run_study(load(file), tmp_path)
    assert order == [two, *rest, one]
    # The one that was killed more often is the likelier to be killed again.
    (one / records.BEGUN).write_bytes(b"..")
    two.mkdir()
    (two / records.BEGUN).write_bytes(b".")
    order.clear()
    runner.run_study(load(file), tmp_path)
    assert order == [*rest, two, one]


def test_a_cell_that_ended_or_failed_was_not_killed(text: Path, whole: Whole, copied: Path) -> None:
    assert not list(whole.cells.rglob(records.BEGUN))
    with pytest.raises(runner.Failed):
        runner.run_study(tiny.study(text, {"bad": {"model.vocab_size": 128}}, seeds=1), copied)
    assert not list(copied.rglob(records.BEGUN))


def test_a_sample_that_a_kill_prevented_is_made_later(whole: Whole, copied: Path) -> None:
    sample = copied / cells(whole.study, {})[0].address / "sample.txt"
    text = sample.read_text()
    sample.unlink()
    runner.run_study(whole.study, copied)
    assert text == sample.read_text() != ""


@pytest.mark.slow
def test_a_study_killed_six_times_has_the_same_table(
    file: Path, whole: Whole, tmp_path: Path
) -> None:
    """Each start after a random number of steps, at any moment of the next, or of a save."""
    chance = random.Random(0)
    for _ in range(6):
        child = Child(SCRIPT, file, tmp_path)
        left = chance.randrange(20)  # of 80 steps, and some are lost: six starts do not finish
        for line in child.lines():
            left -= line.startswith("step ")
            if left <= 0 and (begun(line) or line.startswith("step ")):
                break
        time.sleep(chance.uniform(0, 0.1))
        child.kill()
        assert child.returncode == -signal.SIGKILL, child.stderr
    # They found several cells at work, before their first checkpoint and after it.
    begins = {
        n: [r["resume_step"] for r in read_environment(tmp_path / n)] for n in starts(tmp_path)
    }
    assert len(begins) > 1 and sum(map(len, begins.values())) >= 5
    resumed = [step for begin in begins.values() for step in begin]
    assert None in resumed and any(resumed)
    child = Child(SCRIPT, file, tmp_path).wait()
    assert child.returncode == 0, child.stderr
    assert table(child.stdout) == whole.table
    assert logs(tmp_path) == logs(whole.cells)


@pytest.mark.slow
def test_a_study_in_a_bucket_killed_and_gone_on_with_by_two_has_the_same_table(
    file: Path, whole: Whole
) -> None:
    """Each cell that is left is begun by one of the two, and told so to the other."""
    with buckets.served("s3"):
        store = storage.expand(f"s3://{buckets.BUCKET}/cells")
        killed = Child(SCRIPT, file, str(store))
        for line in killed.lines():
            if line.startswith("step 10") and begun(killed.stderr) == LABELS[:2]:
                break
        killed.kill()
        assert set(starts(store).values()) == {1} and len(starts(store)) == 2
        workers = [Child(SCRIPT, file, str(store)) for _ in range(2)]
        for child in workers:
            assert child.wait().returncode == 0, child.stderr
        assert sorted(begun(workers[0].stderr) + begun(workers[1].stderr)) == LABELS[1:]
        assert sorted(starts(store).values()) == [1, 1, 1, 2]
        assert [table(child.stdout) for child in workers] == [whole.table] * 2
        assert logs(store) == logs(whole.cells)
