"""A spike of the loss: the run goes back and past its batches, and every later start does the same."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import jax
import pytest

from gptjax import branch, loop, replay, setup, spike
from gptjax.config import Config, UserError
from gptjax.data.prepare import prepare
from tests import tiny
from tests.child import GPTJAX, Child
from tests.test_loop import SIGKILL, at_step, bits, final_state, timeless

FEW = {"FEWEST": 5, "RECENT": 8}
ODD, ALIKE = "QZ~J#X!K@V^W&Y*", "the cat sees it"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that are all alike, and one of other letters."""
    folder = tmp_path_factory.mktemp("odd")
    texts = [ALIKE] * 40 + [ODD] + [ALIKE] * 60
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prepare([folder / "text.jsonl"], folder / "store", "bytes", val_fraction=0.2)
    return folder / "store"


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FEW.items():
        monkeypatch.setattr(spike, name, value)


KNOBS: dict[str, Any] = {
    "data__packing": "document", "data__batch_size": 2, "train__steps": 24, "train__spike": 3.0,
    "train__checkpoint_every": 5, "train__eval_every": 6, "train__keep_every": 5,
    "optim__peak_lr": 1e-2, "optim__schedule": "constant",
}  # fmt: skip


def odd_batch(config: Config) -> int:
    """Which batch has the odd document."""
    with jax.set_mesh(tiny.mesh()):
        batches = setup.set_up(config).batches
    return next(i for i in range(40) if any(o.first == 40 for o in batches.origins(i)))


@pytest.fixture(scope="module")
def knobs(store: Path) -> dict[str, Any]:
    """With a seed for which it is read when the loss has come down, and not just after a save."""
    for seed in range(100):
        if odd_batch(tiny.config(store, **KNOBS, seed=seed)) in (12, 13, 17, 18):
            return {**KNOBS, "seed": seed}
    raise AssertionError


def go(config: Config, workdir: Path) -> Path:
    with jax.set_mesh(tiny.mesh()):
        loop.train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def whole(store: Path, knobs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW.items():
            patch.setattr(spike, name, value)
        return go(tiny.config(store, **knobs), tmp_path_factory.mktemp("whole"))


def test_it_goes_back_and_past_the_batches(
    store: Path, knobs: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(store, **knobs)
    odd = odd_batch(config)
    back = odd // 5 * 5
    (only,) = spike.read(whole)
    assert (only.step, only.checkpoint) == (odd + 1, back)
    lines = [line for line in timeless(whole) if "loss" in line]
    assert [line["step"] for line in lines] == [*range(1, 25)]
    assert only.loss > max(line["loss"] for line in lines if line["step"] > 10)
    # The same run, had it passed over these batches from the beginning and knew of no spikes.
    read, load = [], loop.load_batch

    def heard(opened: setup.Setup, index: int) -> Any:
        read.append(index)
        return load(opened, index)

    monkeypatch.setattr(loop, "load_batch", heard)
    spike.write(tmp_path, [only])
    known = {**knobs, "train__spike": None}
    go(tiny.config(store, **known), tmp_path)
    assert timeless(tmp_path) == timeless(whole)
    assert bits(final_state(store, tmp_path, 24, **knobs)) == bits(
        final_state(store, whole, 24, **knobs)
    )
    passed = only.step - back
    assert read[1:] == [*range(back), *range(back + passed, 24 + passed)]
    assert odd not in read[1:]


def test_without_the_knob_the_odd_batch_is_read(
    store: Path, knobs: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """So the comparison above can fail."""
    go(tiny.config(store, **{**knobs, "train__spike": None}), tmp_path)
    assert not (tmp_path / spike.SPIKES).exists()
    (only,) = spike.read(whole)
    losses = {line["step"]: line["loss"] for line in timeless(tmp_path) if "loss" in line}
    assert losses[only.step] == only.loss
    assert timeless(tmp_path) != timeless(whole)


def test_killed_before_and_behind_it_the_run_is_the_same(
    store: Path, knobs: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    few = "from gptjax import spike\n" + "".join(f"spike.{k} = {v}\n" for k, v in FEW.items())
    words = ["train", f"--config={tiny.RECIPE}", f"--workdir={tmp_path}"]
    words += tiny.overrides(store, **knobs)
    (only,) = spike.read(whole)
    # Where the spike's batch is being read: its loss is known a step later.
    for index in (only.step - 1, 24 + only.step - only.checkpoint - 1):
        killed = Child(f"{few}{at_step(index, SIGKILL)}\n{GPTJAX}", *words).wait()
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = Child(f"{few}{GPTJAX}", *words).wait()
    assert done.returncode == 0, done.stderr
    assert spike.read(tmp_path) == [only]
    assert timeless(tmp_path) == timeless(whole)
    assert bits(final_state(store, tmp_path, 24, **knobs)) == bits(
        final_state(store, whole, 24, **knobs)
    )


def test_it_recurs_and_a_branch_goes_on_behind_it(whole: Path, tmp_path: Path) -> None:
    record = replay.replay_run(whole)
    assert record["bitwise"] and record["steps"] == 24, record
    go(branch.of_run(f"{whole}@20", tmp_path), tmp_path)
    assert timeless(tmp_path) == [line for line in timeless(whole) if line["step"] > 20]
    assert spike.read(tmp_path) == spike.read(whole)


def test_a_run_that_spikes_for_ever_has_diverged(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rate to speak of: every loss above the mean is called a spike."""
    monkeypatch.setattr(spike, "MOST", 2)
    config = tiny.config(
        store, **{**KNOBS, "train__spike": 1e-9, "optim__peak_lr": 1e-9, "train__steps": 60}
    )
    with pytest.raises(UserError, match=r"has diverged: its loss spiked 3 times behind step \d+"):
        go(config, tmp_path)
    assert len(spike.read(tmp_path)) >= 2


def test_which_batch_a_step_reads() -> None:
    spikes = [spike.Spike(8, 9.0, 5), spike.Spike(7, 9.0, 5), spike.Spike(12, 9.0, 10)]
    # Two attempts behind step 5 read 3 and 2 batches, one behind step 10 read 2.
    assert [spike.batch(spikes, step) for step in (1, 5, 6, 10, 11)] == [0, 4, 10, 14, 17]
    assert spike.batch([], 6) == 5
    assert spike.parse(json.loads(json.dumps(spike.plain(spikes)))) == spikes


def test_what_is_a_spike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    recent = [2.0, 4.0] * 10  # mean 3, standard deviation sqrt(20/19)
    deviation = (20 / 19) ** 0.5
    assert spike.is_spike(3 + 2.001 * deviation, recent, 2.0)
    assert not spike.is_spike(3 + 1.999 * deviation, recent, 2.0)
    assert not spike.is_spike(3 - 9 * deviation, recent, 2.0)
    assert not spike.is_spike(1e9, recent[1:], 2.0)  # too few to say
    assert not spike.is_spike(float("nan"), recent, 2.0)  # an update that is skipped
    kept: list[float] = []
    for n in range(150):
        spike.remember(float(n), kept)
    spike.remember(float("inf"), kept)
    assert kept == [float(n) for n in range(50, 150)]


@pytest.mark.parametrize(
    "content", ["x", "{}", "null", "[1]", "[{}]", '[{"step": "x", "loss": 1.0, "checkpoint": 2}]']
)
def test_an_odd_record_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / spike.SPIKES).write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path / spike.SPIKES} is not a list of spikes") as e:
        spike.read(tmp_path)
    assert "\n" not in str(e.value)
