"""Checkpoints: bitwise round trips over meshes, damage refused, kills and full disks survived."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import checkpoint, manifest, parts, storage
from gptjax.checkpoint import Checkpoints
from gptjax.config import UserError
from gptjax.manifest import MANIFEST
from gptjax.parts import META, PARTIAL
from gptjax.sharding import make_mesh
from gptjax.storage import BucketPath
from tests import buckets, tiny
from tests.child import Child

MESHES = {
    **{str(axes): tiny.mesh(**dataclasses.asdict(axes)) for axes in tiny.MESHES},
    "one": make_mesh(tiny.axes(), jax.devices()[3:4]),
}
DATA = {"config": {"model": {"layers": 2}}, "position": 7, "fingerprint": "ab12"}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict[str, Any]
    moments: Any
    ema: Any


def make_state(mesh: jax.sharding.Mesh, seed: int = 0, width: int = 16) -> State:
    """Every hard case: bfloat16, NaN payloads, -0.0, zeros (sparse on disk), a scalar, None."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (8, width), dtype=np.uint32)
    bits[0, :4] = [0x7FC00001, 0x80000000, 0x7F800000, 1]  # NaN payload, -0.0, inf, denormal
    host = {
        "kernel": (bits.view(np.float32), P("fsdp", "tensor")),
        "half": (rng.standard_normal((width, 8)).astype(jnp.bfloat16), P(None, ("data", "fsdp"))),
        "zeros": (np.zeros((8,), np.float32), P()),
    }
    params = {
        name: jax.device_put(x, NamedSharding(mesh, spec)) for name, (x, spec) in host.items()
    }
    step = jax.device_put(np.int32(seed), NamedSharding(mesh, P()))
    return State(step=step, params={"block": params}, moments=({"count": step},), ema=None)


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_bitwise(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


@pytest.fixture(scope="module")
def state() -> State:
    return make_state(tiny.mesh(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, state: State) -> Path:
    """A folder with steps 1 and 2, to be read or copied."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, make_state(tiny.mesh(data=2, fsdp=2, tensor=2), seed=1), DATA)
        checkpoints.save(2, state, DATA)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copied"))


@pytest.mark.parametrize("every, kept", [(None, [6, 7]), (1, range(1, 8)), (3, [3, 6, 7])])
def test_every_so_many_steps_are_kept_for_ever(
    every: int | None, kept: Sequence[int], tmp_path: Path
) -> None:
    """And still when a later start keeps others: what is there and due to stay, stays."""
    state = {"x": jnp.zeros(2)}
    for steps in ((1, 2, 3, 4), (5, 6, 7)):
        with Checkpoints(tmp_path, keep=2, keep_every=every) as checkpoints:
            for step in steps:
                checkpoints.save(step, state, DATA)
    reader = Checkpoints(tmp_path)
    assert reader.steps() == list(kept)
    assert_bitwise(reader.restore(kept[0], abstract(state)), state)


@pytest.mark.parametrize("source", MESHES)
def test_a_state_returns_bitwise_on_every_mesh(source: str, tmp_path: Path) -> None:
    old = make_state(MESHES[source])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(0, old, DATA, wait=True)
        for target in MESHES:
            like = make_state(MESHES[target], seed=1)
            new = checkpoints.restore(0, abstract(like))
            assert_bitwise(new, old)
            assert [x.sharding for x in jax.tree.leaves(new)] == [
                x.sharding for x in jax.tree.leaves(like)
            ]


# What a shell, a glob, a URL or a file system of another kind reads as more than a name.
NAMES = (
    *("a[1-3]", "[!a]", "a?b", "a*", "**", "a b ", "ä日本😀", "a\\b", "{a,b}", "~", "$HOME", "-x"),
    *("a%20b", "a#b", "a:b", "gs:", "gs:/x", "s3:", "file:", "a'b\"c", "a\nb", "a..b", "a" * 200),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name(name: str, tmp_path: Path) -> None:
    old = {"x": jnp.arange(6.0).reshape(2, 3), "zeros": jnp.zeros(3)}
    with Checkpoints(tmp_path / name, keep=1) as checkpoints:
        checkpoints.save(1, old, DATA, wait=True)
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["00000001"]
    with Checkpoints(tmp_path / name) as reader:
        assert_bitwise(reader.restore(1, abstract(old)), old)


def test_a_save_that_is_not_whole_is_dropped_and_told(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orbax that leaves out an array and says nothing, as it does below "a[1-3]"."""
    write = checkpoint.ocp.args.PyTreeSave

    def write_less(arrays: dict[str, Any], **options: Any) -> Any:
        return write({"step": arrays["step"]}, **options)

    monkeypatch.setattr(checkpoint.ocp.args, "PyTreeSave", write_less)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        told = r"step 1 in .* dropped: of 5 arrays 4 were not written, such as .*from the beginning"
        with pytest.raises(UserError, match=told) as caught:
            checkpoints.save(1, state, DATA, wait=True)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir()) and checkpoints.latest() is None


def test_an_array_without_one_of_its_chunks_is_not_whole(copied: Path, state: State) -> None:
    folder, arrays = copied / "00000002", list(checkpoint._by_path(state))
    store = parts.open_arrays(folder, storage.context())
    assert parts.lost(store, arrays) == []
    assert parts.lost(store, [*arrays, "params.other"]) == ["params.other"]
    keys = [key.decode() for key in store.list().result()]
    kernel = "params.block.kernel"
    assert sum(key.startswith(f"{kernel}/") for key in keys) > 2, "of several chunks"
    store.delete_range(tensorstore.KvStore.KeyRange(f"{kernel}/1", f"{kernel}/1.0~")).result()
    assert parts.lost(store, arrays) == [kernel]


def test_meta_returns_as_saved(saved: Path) -> None:
    assert Checkpoints(saved).meta(2) == DATA


def test_only_the_latest_remain(tmp_path: Path, state: State) -> None:
    with Checkpoints(tmp_path / "new", keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (9, 10, 100):
            checkpoints.save(step, state, DATA, wait=True)
            assert checkpoints.latest() == step
        assert checkpoints.steps() == [10, 100]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["00000010", "00000100"]


def test_misuse_is_refused(copied: Path, state: State) -> None:
    with Checkpoints(copied, keep=2) as checkpoints:
        with pytest.raises(ValueError, match="step 2 is already saved"):
            checkpoints.save(2, state, DATA)
        with pytest.raises(ValueError, match="JSON"):
            checkpoints.save(3, state, {"loss": float("nan")})
        with pytest.raises(ValueError, match="contains a dot"):
            checkpoints.save(3, {"a.b": state.step, "a": {"b": state.step}}, DATA)
        with pytest.raises(ValueError, match="holds no array"):
            checkpoints.save(3, {"a": None}, DATA)
        with pytest.raises(ValueError, match="without an element: a.b"):
            checkpoints.save(3, {"a": {"b": jnp.zeros((0, 3))}, "c": state.step}, DATA)
        assert sorted(p.name for p in copied.iterdir()) == ["00000001", "00000002"]
        with pytest.raises(UserError, match="no complete checkpoint of step 3 .* steps: 1, 2"):
            checkpoints.restore(3, abstract(state))
    with Checkpoints(copied) as reader, pytest.raises(ValueError, match="only read"):
        reader.save(3, state, DATA)


def test_a_folder_has_one_writer_and_says_which(tmp_path: Path, state: State) -> None:
    folder = tmp_path / "run" / "checkpoints"
    with Checkpoints(folder, keep=1) as first:
        first.save(1, state, DATA, wait=True)
        with pytest.raises(checkpoint.Busy) as caught:
            Checkpoints(folder, keep=1)
        holder = rf"process {os.getpid()} on {socket.gethostname()}, since \d{{4}}-.*"
        told = rf"{tmp_path / 'run'} is being trained by {holder}: wait for its end or stop it"
        assert re.match(told, str(caught.value)) and "\n" not in str(caught.value)
        # Whoever reads need not wait.
        with Checkpoints(folder) as reader:
            assert_bitwise(reader.restore(1, abstract(state)), state)
            assert re.fullmatch(holder, reader.writer())
    assert reader.writer() == ""
    with Checkpoints(folder, keep=1) as second:
        assert second.latest() == 1


@pytest.mark.parametrize("moment", ["before", "while"])
def test_no_save_is_completed_by_who_lost_the_lock_file(
    tmp_path: Path, state: State, moment: str
) -> None:
    """Another writer begins, before a save or in one, and removes what is there of it."""
    folder, lock = tmp_path / "run" / "checkpoints", tmp_path / "run" / "checkpoints.lock"
    told = rf"step 2 was not saved: {folder.parent} is trained by process {os.getpid()} on"
    with ExitStack() as others, Checkpoints(folder, keep=2) as first:
        first.save(1, state, DATA, wait=True)

        def begin_another() -> None:
            lock.unlink()
            others.enter_context(Checkpoints(folder, keep=2)).save(2, state, {}, wait=True)

        create = storage.create

        def overtaken(path: Any, content: bytes) -> bool:
            patch.undo()
            begin_another()
            return create(path, content)

        with pytest.MonkeyPatch.context() as patch:
            if moment == "before":
                begin_another()
            else:
                patch.setattr(storage, "create", overtaken)
            with pytest.raises(UserError, match=told) as caught:
                first.save(2, state, DATA, wait=True)
        assert "\n" not in str(caught.value)
    assert Checkpoints(folder).meta(2) == {}
    assert sorted(p.name for p in folder.iterdir()) == ["00000001", "00000002"]


def test_a_killed_writer_frees_the_folder(tmp_path: Path) -> None:
    code = """
    import sys, time
    from gptjax.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], keep=1)
    print("held", flush=True)
    time.sleep(100)
    """
    process = Child(code, tmp_path / "checkpoints")
    assert next(process.lines("stdout")) == "held\n"
    with pytest.raises(checkpoint.Busy, match=f"is being trained by process {process.pid} on"):
        Checkpoints(tmp_path / "checkpoints", keep=1)
    process.kill()
    with Checkpoints(tmp_path / "checkpoints", keep=1) as free:
        assert free.latest() is None


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write in .*file/run: Not a directory\. Free"):
        Checkpoints(tmp_path / "file" / "run" / "checkpoints", keep=1)


def test_donating_the_state_during_a_save_is_safe(tmp_path: Path) -> None:
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    sharding = NamedSharding(mesh, P("fsdp", "tensor"))
    # 32 MiB, so that the write outlives the first of the donations.
    old = {"x": jax.device_put(np.arange(2**23, dtype=np.float32).reshape(2**11, -1), sharding)}
    expected = np.array(old["x"])
    like = abstract(old)
    update = jax.jit(lambda s: {"x": -s["x"] - 1}, donate_argnums=0)
    new = {"x": old["x"] + 0}
    jax.block_until_ready(update({"x": old["x"] + 0}))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(0, new, DATA)
        later = update(new)
        for _ in range(4):
            later = update(later)
        jax.block_until_ready(later)
        assert new["x"].is_deleted()
        checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.restore(0, like)["x"], expected)


def refuses(folder: Path, step: int, state: State, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        Checkpoints(folder).restore(step, abstract(state))
    assert "\n" not in str(caught.value)


def flips(path: Path, count: int) -> list[int]:
    """Bit positions: both ends of a file and `count` between."""
    bits = 8 * path.stat().st_size
    inner = random.Random(path.name).sample(range(bits), min(count, bits))
    return sorted({0, bits - 1, *inner})


def test_every_flipped_bit_is_refused(copied: Path, state: State, monkeypatch: Any) -> None:
    """In every file. Not one array may be read: tensorstore would not notice most of them."""
    checkpoints = Checkpoints(copied)
    monkeypatch.setattr(parts, "read_array", lambda *_: pytest.fail("an array was read"))
    files = [p for p in (copied / "00000002").rglob("*") if p.is_file()]
    assert {META, MANIFEST, "_METADATA"} < {p.name for p in files}
    for path in files:
        intact = path.read_bytes()
        for bit in flips(path, 24):
            flipped = bytearray(intact)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            name = path.relative_to(copied / "00000002").as_posix()
            # A flip in the manifest may accuse the file whose entry it hit.
            match = "is damaged: " if path.name == MANIFEST else f"is damaged: {name}.* altered"
            with pytest.raises(UserError, match=match) as caught:
                checkpoints.restore(2, abstract(state))
            assert "Delete that folder to go back to step 1" in str(caught.value)
        path.write_bytes(intact)
    monkeypatch.undo()
    assert_bitwise(checkpoints.restore(2, abstract(state)), state)


def test_missing_extra_and_truncated_files_are_refused(copied: Path, state: State) -> None:
    folder = copied / "00000001"
    data = max((folder / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    name = data.relative_to(folder).as_posix()
    intact = data.read_bytes()
    data.write_bytes(intact[:-1])
    cut = rf"{name} was altered or cut short \(it holds {len(intact) - 1} bytes\)"
    refuses(copied, 1, state, cut)
    data.unlink()
    refuses(copied, 1, state, f"{name} is missing.*go back to the beginning")
    data.write_bytes(intact)
    (folder / "state" / "stray").touch()
    refuses(copied, 1, state, "state/stray is not in the manifest")
    (folder / "state" / "stray").unlink()
    (folder / META).unlink()
    refuses(copied, 1, state, "meta.json is missing")


def test_altered_meta_is_refused_before_it_is_believed(copied: Path) -> None:
    meta = copied / "00000002" / META
    meta.write_text(meta.read_text().replace('"layers": 2', '"layers": 3'))
    with pytest.raises(UserError, match="meta.json or manifest.json was altered"):
        Checkpoints(copied).meta(2)


def test_a_step_under_another_number_is_refused(copied: Path, state: State) -> None:
    (copied / "00000002").rename(copied / "00000003")
    refuses(copied, 3, state, "00000003 is damaged: it is step 2. .*go back to step 1")
    with pytest.raises(UserError, match="it is step 2"):
        Checkpoints(copied).meta(3)


def test_another_architecture_is_refused(saved: Path, state: State) -> None:
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    wide = make_state(mesh, width=32)
    refuses(
        saved, 2, wide,
        r"another architecture: params\.block\.half is bfloat16\[16,8\] in .*00000002 but "
        r"bfloat16\[32,8\] in this run, and 1 other array differs",
    )  # fmt: skip
    block = state.params["block"]
    cast = dataclasses.replace(
        state, params={"block": {**block, "half": block["half"].astype(jnp.float32)}}
    )
    refuses(saved, 2, cast, r"half is bfloat16\[16,8\] in .* but float32\[16,8\] .* 0 other arrays")
    less = {name: x for name, x in block.items() if name != "half"}
    refuses(
        saved,
        2,
        dataclasses.replace(state, params={"block": less}),
        r"half is bfloat16\[16,8\] .* absent",
    )
    more = dataclasses.replace(state, ema=state.params)
    refuses(saved, 2, more, r"ema\.block\.half is absent in .* and 2 other arrays differ")


def test_a_new_writer_removes_what_a_killed_save_left(
    copied: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    (copied / "00000003.1.partial" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (copied / "notes").mkdir()
    assert (copied / "00000003.1.partial").exists(), "a reader removed a save in flight"
    assert Checkpoints(copied, keep=2).latest() == 2
    assert sorted(p.name for p in copied.iterdir()) == ["00000001", "00000002", "notes"]
    assert [record.args for record in caplog.records] == [(copied / "00000003.1.partial",)]


def test_a_lost_manifest_costs_no_checkpoint_in_silence(copied: Path, state: State) -> None:
    (copied / "00000002" / MANIFEST).unlink()
    assert Checkpoints(copied).latest() == 1
    refuses(copied, 2, state, "no complete checkpoint of step 2 .* steps: 1")
    for _ in range(2):
        told = (
            "00000002 is damaged: manifest.json is missing. Delete that folder to go on from step 1"
        )
        with pytest.raises(UserError, match=told):
            Checkpoints(copied, keep=2)
    shutil.rmtree(copied / "00000002")
    assert Checkpoints(copied, keep=2).latest() == 1


def test_a_full_disk_is_told_and_costs_no_earlier_checkpoint(small_disk: Path) -> None:
    def noise(seed: int) -> dict[str, jax.Array]:
        return {"x": jax.random.normal(jax.random.key(seed), (2**18,))}  # 1 MiB

    told = r"checkpoint of step 2 to .*: No space left on device\. .* resumes from step 1"
    with Checkpoints(small_disk, keep=2) as checkpoints:
        checkpoints.save(1, noise(1), DATA, wait=True)
        checkpoints.save(2, noise(2), DATA)
        with pytest.raises(UserError, match=told) as caught:
            while True:
                checkpoints.check()
                time.sleep(0.01)
        assert "\n" not in str(caught.value)
        checkpoints.check()  # told once
        with pytest.raises(UserError, match=told):
            checkpoints.save(2, noise(2), DATA, wait=True)
        # Not a byte free: not even the folder's first file can be written.
        with (small_disk / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError):
            while True:
                ballast.write(bytes(4096))
        with pytest.raises(UserError, match=told):
            checkpoints.save(2, noise(2), DATA, wait=True)
        (small_disk / "ballast").unlink()
        assert checkpoints.latest() == 1
        assert_bitwise(checkpoints.restore(1, abstract(noise(1))), noise(1))
        # Once there is room the same object saves again; the next start clears the rest.
        shutil.rmtree(small_disk / "00000001")
        checkpoints.save(2, noise(2), DATA, wait=True)
        assert_bitwise(checkpoints.restore(2, abstract(noise(2))), noise(2))
    Checkpoints(small_disk, keep=2)
    assert [p.name for p in small_disk.iterdir()] == ["00000002"]


def test_a_failed_save_frees_its_space(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint.storage, "create", fail)
    error: Exception = OSError(5, "Input/output error")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(UserError, match="Input/output error.* resumes from the beginning"):
            checkpoints.save(1, state, DATA, wait=True)
        assert not list(tmp_path.iterdir())
        # What is no fault of the disk is not dressed up as one.
        error = ZeroDivisionError()
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(1, state, DATA, wait=True)
        # An error on its way out of the loop is not replaced by that of the save in flight.
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, DATA)
        raise KeyboardInterrupt


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to("scratch")
    for keep in (None, 1):
        with pytest.raises(UserError, match="no folder, or a link to one that is not there"):
            Checkpoints(tmp_path / "checkpoints", keep)
    (tmp_path / "scratch").mkdir()
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        checkpoints.save(1, make_state(tiny.mesh()), DATA, wait=True)
    assert Checkpoints(tmp_path / "scratch").steps() == [1]


def test_a_step_that_its_run_removes_meanwhile_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads a run that trains, as `eval` and a branch do, may be slower than it saves."""
    state, damage = make_state(tiny.mesh()), manifest.damage
    with Checkpoints(tmp_path, 1) as writer:
        writer.save(1, state, DATA, wait=True)

        def overtaken(*arguments: Any) -> str:
            writer.save(2, state, DATA, wait=True)
            return damage(*arguments)

        with monkeypatch.context() as patch, pytest.raises(UserError, match="was removed while"):
            patch.setattr(manifest, "damage", overtaken)
            Checkpoints(tmp_path).restore(1, abstract(state))
        assert_bitwise(Checkpoints(tmp_path).restore(2, abstract(state)), state)


def test_names_are_on_the_disk_once_a_step_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is not flushed may lose a name with the power, though its file is there."""
    flushed: dict[Path, set[str]] = {}
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            flushed[path] = {p.name for p in path.iterdir()}

    monkeypatch.setattr(os, "fsync", noted)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, make_state(tiny.mesh()), DATA, wait=True)
    assert "00000001" in flushed[tmp_path]
    (partial,) = {p for p in flushed if p.name.endswith(PARTIAL)}
    step = tmp_path / "00000001"
    folders = [p for p in (step, *step.rglob("*")) if p.is_dir()]
    for folder in folders:
        names = {p.name for p in folder.iterdir()}
        assert names <= flushed.get(partial / folder.relative_to(step), set()), folder


# Saves steps 1, 2, ... until it is killed; the content of a step is a function of the step.
SAVER = """
    import os, signal, sys
    import jax, jax.numpy as jnp
    from gptjax import checkpoint, storage

    folder, fatal = sys.argv[1], sys.argv[2]
    action, _, suffix = fatal.partition(" ")

    def die_before(name, real):
        def patched(path, *args, **kwargs):
            if action == name and "00000003" in str(path) and str(path).endswith(suffix):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(path, *args, **kwargs)
        return patched

    os.rename, storage.rename = die_before("rename", os.rename), die_before("rename", storage.rename)
    storage.create, storage.remove = die_before("create", storage.create), die_before("remove", storage.remove)
    with checkpoint.Checkpoints(folder, keep=2) as checkpoints:
        for step in range(1, 10_000):
            state = {"x": jnp.arange(2**19) * step, "y": jnp.full((2**19,), step, jnp.float32)}
            checkpoints.save(step, state, {"step": step})
            print("saving", step, flush=True)
"""


def killed_state(step: int) -> dict[str, jax.Array]:
    return {"x": jnp.arange(2**19) * step, "y": jnp.full((2**19,), step, jnp.float32)}


def assert_survived(folder: Path) -> int:
    """The folder restores a complete step bitwise, and a new writer leaves nothing half-done."""
    checkpoints = Checkpoints(folder, keep=2)
    step = checkpoints.latest()
    assert step is not None
    assert checkpoints.meta(step) == {"step": step}
    for kept in checkpoints.steps():
        assert_bitwise(checkpoints.restore(kept, abstract(killed_state(kept))), killed_state(kept))
    assert {p.name for p in folder.iterdir()} == {f"{s:08d}" for s in checkpoints.steps()}
    return step


def saver_killed(folder: Path, fatal: str, delay: float) -> None:
    """Kills the saver `delay` seconds after it began step 3, or waits for its own suicide."""
    child = Child(SAVER, folder, fatal)
    try:
        for line in child.lines("stdout"):
            if line.startswith("saving 3") and not fatal:
                time.sleep(delay)
                break
    finally:
        if not fatal:
            child.kill()
    assert child.wait().returncode == -signal.SIGKILL, child.stderr


@pytest.mark.parametrize("delay", [0.0, *random.Random(0).choices(range(1, 150), k=2)])
def test_sigkill_at_any_moment_leaves_a_complete_step(tmp_path: Path, delay: float) -> None:
    saver_killed(tmp_path, "", delay / 1000)
    assert assert_survived(tmp_path) >= 2


@pytest.mark.parametrize(
    ("fatal", "latest"),
    [
        *[("rename .ocdbt", 2), ("create meta.json", 2), ("create manifest.json", 2)],
        *[("rename .partial", 2), ("remove .removed.partial", 5)],
    ],
)
def test_sigkill_at_the_worst_moments(tmp_path: Path, fatal: str, latest: int) -> None:
    """A part of the arrays; no meta; no manifest; all but the rename; an old step half removed."""
    saver_killed(tmp_path, fatal, 0)
    assert [p for p in tmp_path.iterdir() if p.suffix == ".partial"]
    assert assert_survived(tmp_path) == latest


WORKER = """
    import sys
    import jax
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from gptjax.checkpoint import Checkpoints
    from gptjax.config import UserError
    from tests import tiny

    host = {"x": np.arange(64.0, dtype=np.float32).reshape(8, 8), "step": np.int32(5)}

    def on(mesh, spec):
        shardings = {"x": NamedSharding(mesh, spec), "step": NamedSharding(mesh, P())}
        return {k: jax.make_array_from_callback(v.shape, shardings[k], lambda i, v=v: v[i])
                for k, v in host.items()}

    old = on(tiny.mesh(data=2, fsdp=2, tensor=2), P("fsdp", "tensor"))
    new = on(tiny.mesh(fsdp=8), P(None, "fsdp"))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), new)
    with Checkpoints(sys.argv[3], keep=2) as checkpoints, jax.set_mesh(tiny.mesh(data=2, fsdp=2, tensor=2)):
        assert checkpoints.latest() is None
        for step in (1, 2, 3):
            checkpoints.save(step, old, {"step": step})
        checkpoints.wait()
        assert checkpoints.latest() == 3
        restored = checkpoints.restore(3, like)
        for name, array in restored.items():
            assert array.sharding == like[name].sharding
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, host[name][shard.index])
        # Process 0 alone sees the damage, both refuse.
        if jax.process_index() == 0:
            (checkpoints._final(3) / "state" / "_METADATA").write_text("{}")
        try:
            checkpoints.restore(3, like)
        except UserError as error:
            print("refused:", error)
"""


def test_two_processes_save_and_restore_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    workers = [Child(WORKER, address, str(i), tmp_path, devices=4) for i in range(2)]
    for worker in workers:
        assert worker.wait().returncode == 0, worker.stderr
        output = worker.stdout
        assert "refused: checkpoint" in output and "state/_METADATA was altered" in output, output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000002", "00000003"]
    # One process reads what two wrote.
    like = {"x": jnp.zeros((8, 8)), "step": jnp.int32(0)}
    restored = Checkpoints(tmp_path).restore(2, abstract(like))
    assert_bitwise(
        restored, {"x": np.arange(64.0, dtype=np.float32).reshape(8, 8), "step": np.int32(5)}
    )


def test_the_manifest_lists_every_file(saved: Path) -> None:
    folder = saved / "00000002"
    listed = json.loads((folder / MANIFEST).read_text())
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    del files[MANIFEST]
    assert {name: entry["bytes"] for name, entry in listed.items()} == {
        name: path.stat().st_size for name, path in files.items()
    }
    # The digest anybody can check by hand.
    by_hand = subprocess.run(
        ["sha256sum", folder / META], capture_output=True, text=True, check=True
    ).stdout
    assert listed[META]["sha256"] == by_hand.split()[0]


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest) -> Iterator[tuple[BucketPath, buckets.Proxy]]:
    with buckets.served(request.param) as proxy:
        folder = storage.expand(f"{request.param}://{buckets.BUCKET}/a b/[run]/checkpoints")
        assert isinstance(folder, BucketPath)
        yield folder, proxy


@pytest.fixture
def far(bucket: tuple[BucketPath, buckets.Proxy], state: State) -> Iterator[BucketPath]:
    """A folder in a bucket, with steps 1 and 2."""
    folder, proxy = bucket
    storage.remove(folder.parent)
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, DATA | {"step": step}, wait=True)
    yield folder
    proxy.fault = lambda method, path: "pass"


def test_a_bucket_keeps_checkpoints_as_a_disk_does(
    far: BucketPath, state: State, tmp_path: Path
) -> None:
    like = abstract(make_state(MESHES["one"], seed=1))
    with Checkpoints(far, keep=2) as checkpoints:
        assert checkpoints.steps() == [1, 2] and checkpoints.meta(2) == DATA | {"step": 2}
        assert_bitwise(checkpoints.restore(2, like), state)
        with pytest.raises(checkpoint.Busy, match=rf"is being trained by process {os.getpid()} on"):
            Checkpoints(far, keep=2)
        checkpoints.save(3, state, DATA, wait=True)
        assert checkpoints.steps() == [2, 3]
        assert {name.partition("/")[0] for name in storage.files(far)} == {"00000002", "00000003"}
    assert storage.files(far.parent) == [f"checkpoints/{name}" for name in storage.files(far)]
    # What orbax would find on a disk is there.
    for name in storage.files(far / "00000003"):
        (tmp_path / "3" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "3" / name).write_bytes((far / "00000003" / name).read_bytes())
    assert_orbax_reads(tmp_path / "3" / "state", state)


def assert_orbax_reads(folder: Path, state: State) -> None:
    leaves = checkpoint._by_path(state)
    arguments = {
        path: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype) for path, x in leaves.items()
    }
    with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as reader:
        restored = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arguments))
    assert_bitwise(restored, leaves)


def test_orbax_reads_what_is_saved(saved: Path, state: State) -> None:
    assert_orbax_reads(saved / "00000002" / "state", state)


def test_no_file_of_a_large_array_is_more_than_a_bucket_takes(
    far: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one device, so that orbax would make one chunk of each; small, the bound with it."""
    large = make_state(MESHES["one"], width=2**18)  # 8 and 4 MiB
    for folder in (far, tmp_path):
        monkeypatch.setattr(parts, "FILE_BYTES", 2**20)
        with Checkpoints(folder, keep=2) as checkpoints:
            checkpoints.save(3, large, DATA, wait=True)
            assert_bitwise(checkpoints.restore(3, abstract(large)), large)
        names = storage.files(folder / "00000003")
        sizes = [len((folder / "00000003" / name).read_bytes()) for name in names]
        assert sum(sizes) > 12 * 2**20 and max(sizes) < 2 * 2**20
    assert_orbax_reads(tmp_path / "00000003" / "state", large)


def test_a_flipped_bit_in_a_bucket_is_refused(far: BucketPath, state: State) -> None:
    for name in storage.files(far / "00000002"):
        intact = (far / "00000002" / name).read_bytes()
        flipped = bytearray(intact)
        flipped[len(intact) // 2] ^= 1
        storage.replace_file(far / "00000002" / name, bytes(flipped))
        with pytest.raises(UserError, match=r"is damaged: .*Delete that folder to go back to step"):
            Checkpoints(far).restore(2, abstract(state))
        storage.replace_file(far / "00000002" / name, intact)
    (far / "00000002" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(UserError, match="is damaged: state/manifest.ocdbt is missing"):
        Checkpoints(far).restore(2, abstract(state))


@pytest.mark.parametrize("fault", ["busy", "unheard", "unanswered", "twice"])
def test_a_save_outlasts_a_bucket_s_faults(
    far: BucketPath, bucket: tuple[BucketPath, buckets.Proxy], state: State, fault: str
) -> None:
    """Every fifth request meets one."""
    requests = itertools.count()
    bucket[1].fault = lambda method, path: fault if next(requests) % 5 == 0 else "pass"
    with Checkpoints(far, keep=2) as checkpoints:
        checkpoints.save(3, state, DATA, wait=True)
        assert_bitwise(checkpoints.restore(3, abstract(state)), state)
    assert next(requests) > 30


def test_a_save_is_not_completed_by_who_lost_the_lease(far: BucketPath, state: State) -> None:
    with Checkpoints(far, keep=2) as checkpoints:
        lease = b'{"holder": "process 1 on other, since then", "renewed": 0}'
        storage.replace_file(far.with_name("checkpoints.lock"), lease)
        with pytest.raises(
            UserError, match="step 3 was not saved: .* trained by process 1 on other"
        ):
            checkpoints.save(3, state, DATA, wait=True)
    assert Checkpoints(far).steps() == [1, 2]


def test_a_failing_save_leaves_what_is_another_s(far: BucketPath, state: State) -> None:
    """The other, who took the lease over, has completed the same step meanwhile."""
    with Checkpoints(far, keep=3) as checkpoints:
        lease = b'{"holder": "process 1 on other, since then", "renewed": 0}'
        theirs = {n: (far / "00000002" / n).read_bytes() for n in storage.files(far / "00000002")}
        create = storage.create

        def overtaken(path: Any, content: bytes) -> bool:
            storage.replace_file(far.with_name("checkpoints.lock"), lease)
            for name, data in theirs.items():
                storage.replace_file(far / "00000003" / name, data)
            return create(path, content)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "create", overtaken)
            with pytest.raises(UserError, match="step 3"):
                checkpoints.save(3, state, DATA, wait=True)
    assert {n: (far / "00000003" / n).read_bytes() for n in theirs} == theirs
    assert not [name for name in storage.files(far) if ".partial" in name]


def test_a_step_that_is_complete_stays_though_older_ones_cannot_be_removed(
    far: BucketPath,
    bucket: tuple[BucketPath, buckets.Proxy],
    state: State,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "RETRIES", {"max_retries": 1, "initial_delay": "10ms"})
    storage._open.cache_clear()
    with Checkpoints(far, keep=1) as checkpoints:
        bucket[1].fault = lambda method, path: (
            "busy" if method == "DELETE" and "00000001" in path else "pass"
        )
        with pytest.raises(storage.Unreachable, match="ABORTED"):
            checkpoints.save(3, state, DATA, wait=True)
        bucket[1].fault = lambda method, path: "pass"
        assert 3 in checkpoints.steps()
        assert_bitwise(checkpoints.restore(3, abstract(state)), state)
    storage._open.cache_clear()


def test_a_save_killed_in_a_bucket_leaves_the_steps_before(far: BucketPath, state: State) -> None:
    code = """
    import os, signal, sys
    import jax.numpy as jnp
    from gptjax import checkpoint, storage

    real = storage.create

    def die_before(path, content):
        if path.name == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, content)

    storage.create = die_before
    with checkpoint.Checkpoints(sys.argv[1], keep=2) as checkpoints:
        checkpoints.save(3, {"x": jnp.arange(4.0)}, {}, wait=True)
    """
    for fatal in ("_METADATA", "meta.json", "manifest.json"):
        child = Child(code, str(far), fatal)
        assert child.wait().returncode == -signal.SIGKILL, child.stderr
        assert Checkpoints(far).steps() == [1, 2]
    with Checkpoints(far, keep=2) as checkpoints:  # the holder is gone: its lease too
        assert not any(name.startswith("00000003") for name in storage.files(far))
        checkpoints.save(3, state, DATA, wait=True)
        assert_bitwise(checkpoints.restore(3, abstract(state)), state)
