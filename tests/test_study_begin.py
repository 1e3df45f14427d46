"""Studies whose runs begin with a pretrained model: as `train --from` would, each in a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from gptjax import configure, loop, model, records, trained
from gptjax.cli import main
from gptjax.config import UserError
from gptjax.interop import hf
from gptjax.records import read_environment
from gptjax.study import results, runner, spec, store
from gptjax.study.spec import Study
from tests import tiny
from tests.test_loop import timeless

SLOW: dict[str, Any] = {"slow": {"optim.peak_lr": 1e-5}}
LORA: dict[str, Any] = {"rank 2": {"train.trainable": "lora", "train.lora_rank": 2}}


def pretrained(folder: Path, text: Path, seed: int, **knobs: object) -> Path:
    config = tiny.config(text, **knobs)
    hf.export(folder, config.model, model.init(config.model, seed), "bytes")
    return folder


@pytest.fixture(scope="module")
def base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("model") / "base", text, 7)


def study(
    text: Path, begin: Path | str, arms: dict[str, Any] | None = None, **fields: Any
) -> Study:
    return tiny.study(text, arms or LORA, begin=str(begin), **{"seeds": 1} | fields)


class Ran:
    def __init__(self, study: Study, cells: Path) -> None:
        self.study, self.cells = study, cells
        self.outcomes = runner.run_study(study, cells).outcomes


@pytest.fixture(scope="module")
def ran(text: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(study(text, base, LORA | SLOW), tmp_path_factory.mktemp("cells"))


def test_a_cell_is_the_run_of_train_from(ran: Ran, text: Path, base: Path, tmp_path: Path) -> None:
    """Bit for bit, with and without adapters."""
    for o, settings in zip(ran.outcomes, ({}, *LORA.values(), *SLOW.values()), strict=True):
        words = tiny.overrides(text) + [f"--config.{k}={v}" for k, v in settings.items()]
        config, begin = trained.start_from(configure.from_file(tiny.RECIPE, words), base, words)
        assert o.cell.config == config and o.cell.initial == begin.fingerprint
        with jax.set_mesh(tiny.mesh()):
            loop.train(config, tmp_path / o.cell.arm, begin)
        assert timeless(o.folder) == timeless(tmp_path / o.cell.arm) != []
        (ours,), (theirs,) = (read_environment(f) for f in (o.folder, tmp_path / o.cell.arm))
        assert ours["initial"] == theirs["initial"] and ours["initial"]["model"] == str(base)
    # All began with the model, whose loss is that of no random one.
    first = [timeless(o.folder)[0]["loss"] for o in ran.outcomes]
    assert first[0] == pytest.approx(first[1], rel=1e-6) and first[0] == first[2]


def test_weights_decide_where_a_run_lies(ran: Ran, text: Path, base: Path, tmp_path: Path) -> None:
    """Equal configs, other weights or none: other folders; the same weights elsewhere: the same."""
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    other = pretrained(tmp_path / "other", text, 8)
    found = [spec.cells(study(text, begin), {}) for begin in (base, copy, other)]
    assert [[cell.config for cell in cells] for cells in found] == [
        [c.config for c in found[0]]
    ] * 3
    of_base, of_copy, of_other = ([cell.address for cell in cells] for cells in found)
    assert of_base == of_copy == [o.folder.name for o in ran.outcomes[:2]]
    assert len({*of_base, *of_other, *(spec.address(cell.config) for cell in found[0])}) == 6


def test_a_run_is_not_taken_for_one_that_began_at_random(ran: Ran, text: Path) -> None:
    """Its config alone, by which older versions named folders, is not what it is."""
    cell = ran.outcomes[0].cell
    plain = spec.Cell(cell.scale, cell.arm, cell.seed, cell.config, cell.solved)
    assert store.place(plain, ran.cells, now=False).name == plain.address != cell.address
    assert store.place(cell, ran.cells, now=True) == ran.outcomes[0].folder
    old = ran.cells / "0123456789abcdef"
    moved = Path(shutil.move(ran.outcomes[0].folder, old))
    try:
        assert store.place(cell, ran.cells, now=False) == old
        assert store.place(plain, ran.cells, now=False).name == plain.address
    finally:
        shutil.move(moved, ran.outcomes[0].folder)


def test_what_is_done_is_read_by_other_code_too(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run computes includes its beginning, recorded and determined alike."""
    before = tiny.files(ran.cells)
    for module in (store, records):
        monkeypatch.setattr(module, "code_fingerprint", lambda: "other")
    found = results.read(ran.study, ran.cells, now=True).outcomes
    assert [(o.status, o.folder) for o in found] == [("finished", o.folder) for o in ran.outcomes]
    runner.run_study(ran.study, ran.cells)
    assert tiny.files(ran.cells) == before
    cell = found[0].cell
    facts = (store.facts(cell.config, tiny.mesh(), x) for x in (cell.initial, "other"))
    ours, others = facts
    assert [name for name in ours if ours[name] != others[name]] == ["initial"]


def test_a_run_that_broke_off_goes_on(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop.train
    monkeypatch.setattr(loop, "train", lambda *given: whole(*given, until=10))
    broken = runner.run_study(ran.study, tmp_path).outcomes
    assert [o.status for o in broken] == ["started"] * 3
    monkeypatch.setattr(loop, "train", whole)
    done = runner.run_study(ran.study, tmp_path).outcomes
    assert [len(read_environment(o.folder)) for o in done] == [2, 2, 2]
    for one, other in zip(done, ran.outcomes, strict=True):
        assert one.folder.name == other.folder.name
        assert timeless(one.folder) == timeless(other.folder)


def test_the_command_names_the_model_and_reports(
    ran: Ran, text: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ranks.py"
    file.write_text(
        "from gptjax.study.spec import Study\n"
        f"STUDY = Study('?', {tiny.RECIPE!r}, {LORA | SLOW!r}, seeds=1, begin='nowhere', "
        f"overrides={tuple(tiny.overrides(text))!r})\n"
    )
    here = [f"--store={ran.cells}", f"--from={base}"]
    before = tiny.files(ran.cells)
    assert main(["study", str(file), *here, "--dry_run"]) == 0
    assert f"from {base}\n" in capsys.readouterr().out
    assert main(["study", str(file), *here, f"--out={tmp_path / 'out'}"]) == 0
    report = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert f"data initial: {ran.outcomes[0].cell.initial}" in report
    assert tiny.files(ran.cells) == before
    capsys.readouterr()
    words = ["--seeds=2", f"--config={tiny.RECIPE}", *tiny.overrides(text)]
    assert main(["noise", *words, *here]) == 0
    assert "1 there, 1 to run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--from=nowhere"], "nowhere"),
        ([], "gone is no pretrained model"),
        (["--from=BASE", "--config.model.width=32"], "model.width=32, where they have 16"),
        (
            ["--from=BASE", "--config.train.branch=runs/a@1#0123456789abcdef"],
            "is another beginning than",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(
    words: list[str], told: str, text: Path, base: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "ranks.py"
    file.write_text(
        "from gptjax.study.spec import Study\n"
        f"STUDY = Study('?', {tiny.RECIPE!r}, {LORA!r}, begin='gone', "
        f"overrides={tuple(tiny.overrides(text))!r})\n"
    )
    named = [word.replace("BASE", str(base)) for word in words]
    assert main(["study", str(file), f"--store={tmp_path / 'cells'}", *named]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error and "\n" not in error
    assert not (tmp_path / "cells").exists()


def test_arms_of_another_architecture_are_refused(text: Path, base: Path) -> None:
    with pytest.raises(UserError, match="arm 'deep': .*model.layers=2, where they have 1"):
        spec.cells(study(text, base, {"deep": {"model.layers": 2}}), {})


def test_a_launch_does_not_look_for_the_model(text: Path) -> None:
    spec.check_names(study(text, "hf:nobody/nothing"))
    with pytest.raises(UserError, match="peak_rate"):
        spec.check_names(study(text, "hf:nobody/nothing", {"a": {"optim.peak_rate": 1}}))
