"""A run recurs from its folder; a changed byte of what it read, or number of what it wrote, shows."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import loop, model, records, replay, setup
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, UserError
from tests import tiny
from tests.test_interop_tokenizer import trained, write

KNOBS: dict[str, Any] = {
    "train__steps": 6,
    "train__eval_every": 3,
    "train__checkpoint_every": 2,
    "train__keep_every": 2,
}
COUNTED = 6 * 6 + 2 * 3  # loss, z, norm, rate, tokens, skipped; val_loss, perplexity, bits per byte


def train(config: Config, folder: Path, *how: Any, tensor: int = 1) -> Path:
    with jax.set_mesh(tiny.mesh(tensor=tensor)):
        loop.train(config, folder, *how)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_store(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny.config(store, **KNOBS), tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to alter."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def environment(folder: Path, alter: Callable[[list[dict[str, Any]]], None]) -> None:
    path = folder / "environment.json"
    history = json.loads(path.read_text())
    alter(history)
    path.write_text(json.dumps(history))


def compared(folder: Path, finished: Path) -> dict[str, Any]:
    """As `replay.replay_run` would find, the log of `finished` standing for that of the new training."""
    again = replay.by_step(records.read_metrics(finished), finished)
    return replay.compare(replay.verify(folder), again, None)


# --- what recurs ----------------------------------------------------------------------------


def test_a_run_recurs_bit_for_bit(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    record = replay.replay_run(finished)
    assert record == {
        "workdir": str(finished), "same": True, "reason": None, "bitwise": True, "differs": [],
        "bound": None, "steps": 6, "of": 6, "numbers": COUNTED, "largest": None,
    }  # fmt: skip
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before
    replay.show(record)
    assert "6 of 6 steps; 42 numbers" in (out := capsys.readouterr().out)
    assert "it is the same, bit for bit" in out


def test_a_run_recurs_on_its_mesh_and_elsewhere_within_the_bound(
    store: Path,
    tmp_path: Path,
    eight_devices: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A tensor split adds in another order: about 1e-6 in the loss."""
    folder = train(tiny.config(store, **KNOBS), tmp_path / "run", tensor=4)
    record = replay.replay_run(folder)
    assert (record["differs"], record["bitwise"]) == ([], True)
    monkeypatch.setattr(jax, "devices", lambda: tiny.devices()[:1])
    record = replay.replay_run(folder)
    assert record["differs"] == ["mesh.tensor was 4, is 1"]
    assert record["same"] and not record["bitwise"]
    assert 0 < record["largest"]["relative"] < 1e-4
    json.dumps(record, allow_nan=False)
    replay.show(record)
    out = capsys.readouterr().out
    assert "mesh.tensor was 4, is 1" in out and "it is the same within 1e-03" in out
    assert f"of {record['largest']['name']} at step {record['largest']['step']}" in out


def test_an_unfinished_run_recurs_and_so_it_does_once_resumed(store: Path, tmp_path: Path) -> None:
    """Resumed with another rhythm: what the log holds is compared, at the steps it has."""
    config, folder = tiny.config(store, **KNOBS, train__log_every=2), tmp_path / "run"
    train(config, folder, None, 5)
    record = replay.replay_run(folder)
    assert (record["steps"], record["of"], record["bitwise"]) == (4, 6, True)
    assert record["numbers"] == 3 * 6 + 3

    train(tiny.config(store, **KNOBS | {"train__log_every": 5, "train__eval_every": 5}), folder)
    train(tiny.config(store, **KNOBS | {"model__remat": "full"}), folder)  # done: trains nothing
    assert len(replay.verify(folder).starts) == 2
    record = replay.replay_run(folder)
    assert (record["differs"], record["bitwise"]) == ([], True)
    # Steps 1, 2 and 4, then 5 and the last; evaluated at 3, then at 5 and the last.
    assert (record["steps"], record["numbers"]) == (6, 5 * 6 + 3 * 3)


def test_an_extended_run_recurs(store: Path, tmp_path: Path) -> None:
    """What it logged at its first end, which the longer run does not, is passed over."""
    config = tiny.config(store, **KNOBS | {"train__log_every": 4}, optim__schedule="constant")
    folder = train(config, tmp_path / "run", None)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8))
    train(longer, folder)
    past = replay.verify(folder)
    assert (past.config, past.last, past.ends) == (longer, 8, {6})
    record = replay.replay_run(folder)
    assert (record["differs"], record["bitwise"]) == ([], True)
    # Steps 1, 4 and 8 of 1, 4, 6 and 8; evaluated at 3, 6 and 8.
    assert (record["steps"], record["of"], record["numbers"]) == (8, 8, 3 * 6 + 3 * 3)


def test_a_run_that_is_being_trained_is_not_replayed(run: Path) -> None:
    with Checkpoints(run / "checkpoints", keep=1), pytest.raises(UserError) as caught:
        replay.replay_run(run)
    assert f"{run} is being trained by process {os.getpid()} on" in str(caught.value)


def test_a_diverged_run_diverges_again(store: Path, tmp_path: Path) -> None:
    knobs = {"optim__peak_lr": 1e30, "train__steps": 30, "train__eval_every": 30}
    config = tiny.config(store, **knobs, train__checkpoint_every=30, train__keep_every=30)
    with pytest.raises(UserError, match="the run has diverged") as caught:
        train(config, tmp_path / "run")
    record = replay.replay_run(tmp_path / "run")
    assert record["bitwise"] and f"the last at step {record['steps']}," in str(caught.value)
    last = records.read_metrics(tmp_path / "run")[-1]
    assert math.isnan(last["loss"]) or math.isinf(last["gradient_norm"])


def test_a_run_begun_with_a_pretrained_model_needs_it(store: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny.config(store, **KNOBS), seed=7)
    begin = setup.Start(lambda: model.init(config.model, 3), "prints", {"model": "models/it"})
    folder = train(config, tmp_path / "run", begin, 2)
    assert replay.replay_run(folder, begin)["bitwise"]
    with pytest.raises(
        UserError, match="began with a pretrained model: name it by --from=models/it"
    ):
        replay.verify(folder)
    with pytest.raises(UserError, match="model of --from is not what .* was prints, is others"):
        replay.verify(folder, begin._replace(fingerprint="others"))


def test_a_run_begun_at_random_takes_no_model(finished: Path) -> None:
    with pytest.raises(UserError, match="random parameters: leave --from out"):
        replay.verify(finished, setup.Start(dict, "prints", {}))


# --- what was read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, told",
    [
        (b'"seed": 0', b'"seed": 1', "seed was 0, is 1"),
        (b'"layers": 1', b'"layers": 3', "model.layers was 1, is 3"),
        (b'"peak_lr"', b'"peak_lR"', "unknown config key 'optim.peak_lR' (did you mean"),
        (b'"train": {', b'"train":{', "each knob has its value, but is spelled in other bytes"),
        (b'"train": {', b'"train": [', "it is no config in JSON"),
        (b'"batch_size": 8', b'"batch_size": x', "it is no config in JSON"),
        (b'"dropout": 0', b'"dropout": -', "it is no config in JSON"),
    ],
)
def test_a_changed_byte_of_the_config_is_named(
    run: Path, old: bytes, new: bytes, told: str
) -> None:
    content = (run / "config.json").read_bytes()
    assert old in content
    (run / "config.json").write_bytes(content.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        replay.replay_run(run)
    assert "config.json is not what the run wrote: " + told in str(caught.value)


def test_without_a_checkpoint_a_changed_config_is_told_all_the_same(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert compared(run, run)["bitwise"]
    content = (run / "config.json").read_bytes()
    (run / "config.json").write_bytes(content.replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(UserError, match="no checkpoint tells which knob"):
        replay.verify(run)


FILES = ("manifest.json", "tokens-00000.bin", "document_ends.bin")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_of_the_data_is_named(
    finished: Path, store: Path, split: str, name: str
) -> None:
    path = store / split / name
    content = path.read_bytes()
    try:
        path.write_bytes(content[:3] + bytes([content[3] ^ 1]) + content[4:])
        with pytest.raises(UserError, match=f"{split}/{name} (was altered|is damaged)"):
            replay.replay_run(finished)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("split", ["train", "val"])
def test_another_text_in_its_place_is_named(
    finished: Path, store: Path, tmp_path: Path, split: str
) -> None:
    """Whole by its own manifest, but not what the run read."""
    other = tiny.make_store(tmp_path, tiny.TEXT.replace("cat", "cow"))
    aside = store / f"{split}.aside"
    (store / split).rename(aside)
    try:
        shutil.copytree(other / split, store / split)
        with pytest.raises(UserError, match=f"{split} is not what the run read: its fingerprint"):
            replay.verify(finished)
    finally:
        shutil.rmtree(store / split)
        aside.rename(store / split)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_changed_byte_goes_unnoticed(finished: Path, store: Path, data: st.DataObject) -> None:
    paths = [finished / "config.json"]
    paths += [store / split / name for split in ("train", "val") for name in FILES]
    path = data.draw(st.sampled_from(paths), "file")
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1), "byte")
    flipped = bytes([content[at] ^ data.draw(st.integers(1, 255), "bits")])
    try:
        path.write_bytes(content[:at] + flipped + content[at + 1 :])
        with pytest.raises(UserError):
            replay.verify(finished)
    finally:
        path.write_bytes(content)
    if at == 0:
        replay.verify(finished)  # so that it is the byte which is refused


def test_a_changed_tokenizer_is_named(store: Path, tmp_path: Path) -> None:
    """Even one that this process read before."""
    tree = trained()
    name = write(tmp_path / "bpe", tree)
    knobs = {"data__tokenizer": name, "model__vocab_size": 344}
    config = tiny.config(tiny.make_store(tmp_path), **knobs)
    prints = {"tokenizer": setup.load_tokenizer(config).fingerprint}
    one, other = tree["model"]["merges"][:2]
    tree["model"]["merges"][:2] = other, one
    (tmp_path / "bpe" / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=f"tokenizer {name} is not what the run read"):
        replay.verify_content(config, prints, None)


# --- what was written -----------------------------------------------------------------------


def altered(run: Path, alter: Callable[[list[bytes]], None]) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    alter(lines)
    (run / "metrics.jsonl").write_bytes(b"".join(lines))


def test_a_changed_digit_of_the_log_is_named(run: Path, finished: Path) -> None:
    loss = records.read_metrics(finished)[1]["loss"]
    digits = repr(loss)
    changed = digits[:-1] + str((int(digits[-1]) + 1) % 10)
    altered(
        run, lambda lines: lines.__setitem__(1, lines[1].replace(digits.encode(), changed.encode()))
    )
    record = compared(run, finished)
    assert (record["same"], record["bitwise"]) == (False, False)
    assert record["reason"] == f"step 2: loss was {changed}, is {digits}"
    assert record["largest"]["name"] == "loss" and record["largest"]["step"] == 2


def test_a_run_that_does_not_recur_is_told(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through `run`: the log of the untouched run stands for the new training."""
    again = replay.by_step(records.read_metrics(finished), finished)
    monkeypatch.setattr(replay, "_train", lambda *_: again)
    altered(run, lambda lines: lines.reverse())
    assert replay.replay_run(run)["bitwise"], "their order says nothing"
    altered(run, lambda lines: lines.pop(3))
    record = replay.replay_run(run)
    assert record["differs"] == [] and not record["same"]
    replay.show(record)
    assert f"it is not the same: {record['reason']}" in capsys.readouterr().out


# Lines: steps 1, 2, 3, the evaluation of 3, steps 4, 5, 6 and the last evaluation.
@pytest.mark.parametrize(
    "line, told",
    [(1, "step 2: metrics.jsonl has no gradient_norm and no learning_rate and no loss and no "
         "skipped and no tokens and no z"),
     (3, "step 3: metrics.jsonl has no val_bits_per_byte and no val_loss and no val_perplexity"),
     (7, "step 6: metrics.jsonl has no val_bits_per_byte and no val_loss and no val_perplexity")],
)  # fmt: skip
def test_a_missing_line_is_named(run: Path, finished: Path, line: int, told: str) -> None:
    altered(run, lambda lines: lines.pop(line))
    assert compared(run, finished)["reason"] == told


def test_a_cut_log_is_told_where_a_checkpoint_stands_for_more(run: Path, finished: Path) -> None:
    altered(run, lambda lines: lines.__delitem__(slice(5, None)))
    record = compared(run, finished)
    assert record["steps"] == 6 and record["reason"].startswith("step 5: metrics.jsonl has no ")
    assert record["reason"].endswith(" (and 1 more that differ)")


def test_a_missing_or_doubled_number_is_named(run: Path, finished: Path) -> None:
    altered(run, lambda lines: lines.__setitem__(4, lines[4].replace(b'"z"', b'"y"')))
    record = compared(run, finished)
    assert record["reason"].startswith("step 4: metrics.jsonl has no z")
    altered(run, lambda lines: lines.insert(2, lines[2]))
    with pytest.raises(UserError, match=r"metrics.jsonl was altered: step 3 has \w+ twice"):
        replay.verify(run)


def test_an_evaluation_that_a_kill_prevented_is_not_missed(run: Path, finished: Path) -> None:
    """The log ends with step 3, the latest checkpoint is of step 2."""
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"{step:08d}", ignore_errors=True)
    altered(run, lambda lines: lines.__delitem__(slice(3, None)))
    past = replay.verify(run)
    assert past.last == 3
    again = replay.by_step(records.read_metrics(finished), finished)
    record = replay.compare(past, {step: again[step] for step in (1, 2, 3)}, None)
    assert record["bitwise"] and record["numbers"] == 3 * 6


def test_a_log_without_a_step_is_told(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="has logged no step"):
        replay.verify(run)


# --- the bound ------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", replay.BOUNDS)
@pytest.mark.parametrize("name", ["loss", "val_loss", "z", "gradient_norm"])
def test_the_bound_lets_rounding_pass_and_nothing_else(
    finished: Path, name: str, precision: str
) -> None:
    """Of step 6: 6 hundredths of what it is from step 100 on."""
    past = replay.verify(finished)
    row = replay.BOUNDS[precision]
    limit = 0.06 * row.get(name, row["loss"])
    for factor, same in ((1 + 0.9 * limit, True), (1 - 1.1 * limit, False), (math.nan, False)):
        now = {step: dict(numbers) for step, numbers in past.logged.items()}
        now[6][name] *= factor
        record = replay.compare(past, now, precision)
        assert (record["same"], record["bitwise"]) == (same, False), factor
        assert not replay.compare(past, now, None)["same"]
        json.dumps(record, allow_nan=False)


def test_the_bound_stops_growing_and_is_narrow_where_rounding_hardly_counts() -> None:
    assert replay.bound("loss", 1, "float32") == 1e-5
    assert replay.bound("loss", 100, "float32") == replay.bound("val_loss", 9999, "float32") == 1e-3
    for precision in replay.BOUNDS:
        assert replay.bound("tokens", 9, precision) == replay.bound("skipped", 9, precision) == 0
        assert 0 < replay.bound("learning_rate", 9, precision) < 1e-4
    assert {replay.bound(name, 200, None) for name in ("loss", "learning_rate")} == {0}


def test_accelerators_and_bfloat16_have_the_wider_bound(finished: Path) -> None:
    past = replay.verify(finished)
    assert replay._precision(past) == "float32"
    ((_, record),) = past.starts
    on_gpu = dataclasses.replace(past, starts=[(0, record | {"backend": "gpu"})])
    assert replay._precision(on_gpu) == "bfloat16"
    half = dataclasses.replace(past.config.model, dtype="bfloat16")
    config = dataclasses.replace(past.config, model=half)
    assert replay._precision(dataclasses.replace(past, config=config)) == "bfloat16"


def test_numbers_that_are_none_are_the_same_only_to_themselves() -> None:
    nan, inf = math.nan, math.inf
    assert replay.relative(nan, nan) == replay.relative(inf, inf) == replay.relative(0, 0) == 0
    for pair in ((nan, 1), (1, nan), (inf, 1), (inf, -inf), (nan, inf)):
        assert replay.relative(*pair) == inf
    assert replay.relative(2, 1) == replay.relative(1, 2) == 0.5


def test_what_differs_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def alter(history: list[dict[str, Any]]) -> None:
        (record,) = history
        record |= {"python": "2.7", "cpu": "abacus", "devices": {"cpu": 99}, "code": "c0de"}
        record["versions"]["jax"], record["xla_flags"] = "0.1", "--on"
        record["jax_settings"]["jax_enable_x64"] = "True"

    environment(run, alter)
    monkeypatch.setattr(records, "code_fingerprint", lambda: "0123456789abcdef")
    with jax.set_mesh(tiny.mesh()):
        now = records.environment()
        assert replay.differences(replay.verify(run)) == [
            f"python was '2.7', is {now['python']!r}",
            f"versions.jax was '0.1', is {jax.__version__!r}",
            "code was 'c0de', is '0123456789ab'",
            f"cpu was 'abacus', is {now['cpu']!r}",
            f"xla_flags was '--on', is {now['xla_flags']!r}",
            "jax_settings.jax_enable_x64 was 'True', is 'False'",
        ]


def test_a_change_on_the_way_is_told(store: Path, run: Path) -> None:
    """Of the starts that trained: not what a later start of the done run ran on."""

    def alter(history: list[dict[str, Any]]) -> None:
        (first,) = history
        knobs = {"model.remat": ["none", "full"], "sample.prompt": ["the ", "a "]}
        second = first | {"resume_step": 4, "changed_knobs": knobs, "cpu": "abacus"}
        third = first | {"resume_step": 6, "changed_knobs": {}, "python": "2.7"}
        history[:] = [first | {"resume_step": None, "python": "1.5"}, first, second, third]

    environment(run, alter)
    past = replay.verify(run)
    assert past.config.model.remat == "none" and past.config.sample.prompt == "the "
    with jax.set_mesh(tiny.mesh()):
        cpu = records.environment()["cpu"]
        assert replay.differences(past) == [
            f"cpu was 'abacus' since step 4, is {cpu!r}",
            "model.remat was 'full' since step 4, is 'none'",
        ]


@pytest.mark.parametrize(
    "flags, told", [("", True), ("--x --xla_gpu_deterministic_ops=true", False)]
)
def test_a_gpu_recurs_bit_for_bit_only_where_it_is_told_to(
    run: Path, monkeypatch: pytest.MonkeyPatch, flags: str, told: bool
) -> None:
    (record,) = records.read_environment(run)
    record |= {"backend": "gpu", "devices": {"NVIDIA": 8}, "xla_flags": flags}
    environment(run, lambda history: history.__setitem__(0, record))
    here = record | {"cpu": "another, which does not matter"}
    monkeypatch.setattr(records, "environment", lambda: here)
    found = replay.differences(replay.verify(run))
    assert [line.startswith("a GPU adds in any order") for line in found] == [True] * told


def test_what_is_no_run_of_this_version_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run: it has no environment.json"):
        replay.replay_run(tmp_path)
    content = (run / "config.json").read_bytes()
    (run / "config.json").unlink()
    with pytest.raises(UserError, match="holds no run: it has no config.json"):
        replay.replay_run(run)
    (run / "config.json").write_bytes(content)
    environment(run, lambda history: history[0].pop("config_sha256"))
    with pytest.raises(UserError, match=r"recorded less \('config_sha256'\)"):
        replay.replay_run(run)
