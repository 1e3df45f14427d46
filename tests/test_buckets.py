"""Runs, studies, data and models in buckets are what they are on a disk."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptjax import model, places, status, storage, tokenizer, trained
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.cli import EXIT_USER_ERROR
from gptjax.cluster import slurm
from gptjax.config import EXIT_STOPPED, UserError
from gptjax.data import store as data_store
from gptjax.data.store import Store
from gptjax.interop import hf, pretrained
from gptjax.records import read_metrics
from gptjax.storage import BucketPath, Place
from gptjax.study.runner import run_study
from tests import buckets, tiny
from tests.child import GPTJAX, Child, pair_of
from tests.test_cli import gptjax, refused, works
from tests.test_loop import SIGKILL, SIGTERM, at_step, run, timeless

SCHEMES = ("gs", "s3")


@pytest.fixture(scope="module", params=SCHEMES)
def bucket(request: pytest.FixtureRequest) -> Iterator[BucketPath]:
    with buckets.served(request.param):
        yield BucketPath(request.param, buckets.BUCKET, "lab")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


TEN: dict[str, Any] = {"train__steps": 10}


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps on a disk."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(text, folder, **TEN).returncode == 0
    return folder


def put(folder: Path, place: Place) -> None:
    for name in storage.files(folder):
        storage.replace_file(place / name, (folder / name).read_bytes())


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_is_the_run_on_a_disk(
    bucket: BucketPath, text: Path, whole: Path, own_cache: Path
) -> None:
    """Its tokens lie there too. Killed with a checkpoint in flight, then run again."""
    put(text, bucket / "data")
    knobs: dict[str, Any] = {"data__sources": f"('{bucket / 'data'}',)"} | TEN
    killed = run(text, bucket / "run", at_step(7, SIGKILL), **knobs)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert run(text, bucket / "run", **knobs).returncode == 0
    assert timeless(bucket / "run") == timeless(whole)
    assert Checkpoints(bucket / "run" / CHECKPOINTS).steps() == [5, 10]
    assert not [n for n in storage.files(bucket) if n.endswith((".tmp", ".lock", ".partial"))]
    assert any(name.startswith("tensorboard/events") for name in storage.files(bucket / "run"))
    (row,) = status.statuses(bucket / "run")
    assert (row.state, row.step, row.steps) == ("finished", 10, 10)
    again = run(text, bucket / "run", **knobs)
    assert again.returncode == 0 and "is done: 10 of 10 steps" in again.stderr
    # What a checkpoint stands for was there before it.
    assert [line["step"] for line in read_metrics(bucket / "run")][-1] == 10


# Short tries, and patience for so many seconds.
PATIENCE = """
from gptjax import storage
storage.RETRIES |= {{"max_retries": 1}}
storage.PATIENCE_SECONDS = {}
"""


def away(seconds: float, after: Callable[[str, str], bool]) -> buckets.Fault:
    """A store that is away for so long from the first request on of which `after` is true."""
    begin = math.inf

    def fault(method: str, path: str) -> str:
        nonlocal begin
        if after(method, path):
            begin = min(begin, time.monotonic())
        return "busy" if begin <= time.monotonic() < begin + seconds else "pass"

    return fault


MOMENTS: dict[str, Callable[[str, str], bool]] = {
    "at the start": lambda method, path: True,
    "while saving": lambda method, path: method in ("PUT", "POST") and "00000005" in path,
    "while restoring": lambda method, path: method == "GET" and "00000008/state" in path,
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_outlasts_a_bucket_that_is_away(moment: str, text: Path, whole: Path) -> None:
    """For longer than one request is tried; and where it does not, the same command goes on."""
    with buckets.served("s3") as proxy:
        workdir = storage.expand(f"s3://{buckets.BUCKET}/run")
        if moment == "while restoring":
            assert run(text, workdir, at_step(7, SIGTERM), **TEN).returncode == EXIT_STOPPED
        proxy.fault = away(600, MOMENTS[moment])
        given_up = run(text, workdir, PATIENCE.format(2), **TEN)
        assert given_up.returncode == EXIT_STOPPED, given_up.stderr
        assert re.search(r"gptjax: s3://lab/\S+ is out of reach \(ABORTED.*\n$", given_up.stderr)
        assert "Traceback" not in given_up.stderr
        proxy.fault = away(4, MOMENTS[moment])
        waited = run(text, workdir, PATIENCE.format(60), **TEN)
        assert waited.returncode == 0 and "trying again for 60 s" in waited.stderr, waited.stderr
        proxy.fault = lambda method, path: "pass"
        assert timeless(workdir) == timeless(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, status", [("busy", EXIT_STOPPED), ("forbidden", EXIT_USER_ERROR), (1.0, 0)]
)
def test_a_process_that_cannot_save_its_part_ends_all(
    fault: str | float, status: int, text: Path
) -> None:
    """With its name, and no step half complete; one whose puts are slow is waited for."""
    with buckets.served("s3") as proxy:
        workdir = storage.expand(f"s3://{buckets.BUCKET}/run")
        of_1 = "00000010/state/ocdbt.process_1/"
        proxy.fault = lambda method, path: fault if method == "PUT" and of_1 in path else "pass"
        with pair_of(text, workdir, f"{PATIENCE.format(2)}\n{GPTJAX}", **TEN) as pair:
            assert [p.wait(100).returncode for p in pair] == [status] * 2, pair[0].stderr
        assert ("process 1" in pair[0].stderr) == bool(status)
        assert "Traceback" not in pair[0].stderr + pair[1].stderr
        proxy.fault = lambda method, path: "pass"
        assert Checkpoints(workdir / CHECKPOINTS).steps() == ([5] if status else [5, 10])
        with pair_of(text, workdir, **TEN) as pair:
            assert [p.wait(100).returncode for p in pair] == [0, 0], pair[0].stderr
        told = "resumed at step 5" if status else "is done: 10 of 10"
        assert told in pair[0].stderr and Checkpoints(workdir / CHECKPOINTS).steps() == [5, 10]


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_a_study_in_a_bucket_has_the_results_of_one_on_a_disk(
    bucket: BucketPath, text: Path, tmp_path: Path
) -> None:
    knobs = {"train__steps": 4, "train__eval_every": 4, "train__checkpoint_every": 4}
    study = tiny.study(text, knobs=knobs, seeds=1)
    far, near = (run_study(study, store) for store in (bucket / "cells", tmp_path))
    assert [o.status for o in far.outcomes] == ["finished"] * 2
    assert [(o.cell, o.folder.name) for o in far.outcomes] == [
        (o.cell, o.folder.name) for o in near.outcomes
    ]
    assert [timeless(o.folder) for o in far.outcomes] == [timeless(o.folder) for o in near.outcomes]
    requests = run_study(study, bucket / "cells")
    assert requests.outcomes == far.outcomes


def test_a_shard_of_a_bucket_is_checked_and_its_copy_too(
    bucket: BucketPath, text: Path, own_cache: Path
) -> None:
    put(text / "train", bucket / "tokens")
    here, there = Store.open(text / "train", None), Store.open(bucket / "tokens", None)
    assert there.fingerprint == here.fingerprint
    assert there.tokens(0, here.num_tokens).tolist() == here.tokens(0, here.num_tokens).tolist()
    sha256 = there.manifest["shards"][0]["sha256"]
    copy = own_cache / "fetched" / sha256
    flipped = bytearray(copy.read_bytes())
    flipped[0] ^= 1
    copy.write_bytes(flipped)
    again = Store.open(bucket / "tokens", None)
    assert again.tokens(0, 9).tolist() == here.tokens(0, 9).tolist()
    # Altered where it came from: refused, and never kept.
    storage.replace_file(bucket / "tokens" / "tokens-00000.bin", bytes(flipped))
    copy.unlink()
    with pytest.raises(UserError, match=r"tokens-00000.bin was altered \(wrong sha256\)"):
        Store.open(bucket / "tokens", None)
    assert not copy.exists()


def test_a_near_copy_is_what_lies_in_the_bucket_now(bucket: BucketPath, own_cache: Path) -> None:
    folder = bucket / "model"
    storage.replace_file(folder / "a.txt", b"1")
    storage.replace_file(folder / "b" / "c.txt", b"2")
    copy = places.near(folder)
    assert (copy / "a.txt").read_bytes() == b"1" and (copy / "b" / "c.txt").read_bytes() == b"2"
    (copy / "a.txt").write_bytes(b"x")  # a disk that forgot
    storage.replace_file(folder / "b" / "c.txt", b"3")
    storage.replace_file(folder / "d.txt", b"4")
    assert places.near(folder) == copy
    assert (copy / "a.txt").read_bytes() == b"1" and (copy / "b" / "c.txt").read_bytes() == b"3"
    (folder / "d.txt").unlink()
    assert not (places.near(folder) / "d.txt").exists()
    with pytest.raises(FileNotFoundError):
        places.near(bucket / "absent")


def test_a_pretrained_model_in_a_bucket_is_found_by_its_name(
    bucket: BucketPath, tmp_path: Path, own_cache: Path
) -> None:
    config = tiny.model(position="learned", context=16)
    hf.export(tmp_path / "gpt2", config, model.init(config, 0), None)
    put(tmp_path / "gpt2", bucket / "gpt2")
    source = trained.find(bucket / "gpt2").source
    assert source is not None and source.model.layers == config.layers
    loaded, expected = (
        pretrained.load(pretrained.read(p)).params for p in (bucket / "gpt2", tmp_path / "gpt2")
    )
    assert str(loaded) == str(expected)


def test_a_large_file_is_examined_once(
    tmp_path: Path, own_cache: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(text / "train", tmp_path / "tokens")
    examined: list[int] = []
    examine = data_store._examine

    def count(ids: Any) -> dict[str, Any]:
        examined.append(len(ids))
        return examine(ids)

    monkeypatch.setattr(data_store, "_examine", count)
    monkeypatch.setattr(places, "REMEMBERED_BYTES", 0)
    for times in (2, 2):  # tokens and ends; the second start reads neither
        Store.open(tmp_path / "tokens", None)
        assert len(examined) == times
    places.forget()
    Store.open(tmp_path / "tokens", None)
    assert len(examined) == 4
    shard = tmp_path / "tokens" / "tokens-00000.bin"
    flipped = bytearray(shard.read_bytes())
    flipped[0] ^= 1
    shard.write_bytes(flipped)
    for _ in range(2):
        with pytest.raises(UserError, match="was altered"):
            Store.open(tmp_path / "tokens", None)
    assert len(examined) == 5


SAVER = """
    import json, sys
    import jax
    index, count = int(sys.argv[2]), int(sys.argv[3])
    if count > 1:
        jax.distributed.initialize(sys.argv[1], count, index, initialization_timeout=60)
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec as P
    from gptjax import checkpoint, manifest, storage

    entry, hashed = manifest.entry, []

    def counted(file):
        found = entry(file)
        hashed.append(found["bytes"])
        return found

    manifest.entry = counted
    mesh = jax.make_mesh((4,), ("x",))
    make = jax.jit(lambda: jnp.arange(2**18, dtype=jnp.float32), out_shardings=NamedSharding(mesh, P("x")))
    state = {"x": make()}
    with checkpoint.Checkpoints(sys.argv[4], keep=1) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        saved = sum(hashed)
        checkpoints.latest()
        hashed.clear()
        like = {"x": jax.ShapeDtypeStruct(state["x"].shape, "float32", sharding=state["x"].sharding)}
        again = checkpoints.restore(1, like)
        assert (again["x"] == state["x"]).all()
    print(json.dumps([saved, sum(hashed)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "s3"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_one_process_hashes_falls_with_their_number(
    where: str, count: int, tmp_path: Path
) -> None:
    with buckets.served("s3"), socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        folder = tmp_path if where == "disk" else storage.expand(f"s3://{buckets.BUCKET}/x")
        workers = [
            Child(SAVER, address, str(i), str(count), str(folder), devices=4 // count)
            for i in range(count)
        ]
        for worker in workers:
            assert worker.wait(120).returncode == 0, worker.stderr
        for saved, restored in (json.loads(worker.stdout.splitlines()[-1]) for worker in workers):
            # A part is a mebibyte over their number, and the small files that orbax adds.
            assert saved < 2**20 / count + 30_000
            assert restored < 2**20 / count + 30_000
        assert Checkpoints(folder).steps() == [1]


# The words of each command that takes a place; FAR is a bucket, NEAR a folder of this machine.
WORDS: dict[str, str] = {
    "train": "train --workdir=FAR/run KNOBS",
    "doctor": "doctor --workdir=FAR/run KNOBS",
    "eval": "eval --workdir=FAR/run --json",
    "compare": "eval --compare FAR/run FAR/run --json",
    "tasks": "tasks --workdir=FAR/model --lambada=NEAR/words.jsonl --json",
    "status of a run": "status FAR/run",
    "status of a folder": "status FAR",
    "replay": "replay FAR/run",
    "generate": "generate --workdir=FAR/run --prompt=the",
    "ask": "ask --workdir=FAR/model --config.sample.max_new_tokens=4 the",
    "chat": "chat --workdir=FAR/model --config.sample.max_new_tokens=4",
    "export": "export --workdir=FAR/run --out=NEAR/exported",
    "import": "import FAR/model --out=NEAR/imported",
    "fine-tune": "train --from=FAR/model --workdir=FAR/tuned KNOBS",
    "branch": "train --branch=FAR/run@4 --workdir=FAR/branched --config.train.steps=6",
    "tokenizer": "data NEAR/text.txt --out=NEAR/tokens --tokenizer=FAR/model",
    "batches": "data show --workdir=FAR/run",
    "study": "study --axis=optim.peak_lr=1e-3,2e-3 --seeds=1 --store=FAR/cells --out=NEAR/out KNOBS",
    "report": "report --axis=optim.peak_lr=1e-3,2e-3 --seeds=1 --store=FAR/cells --out=NEAR/out KNOBS",
    "noise": "noise --seeds=2 --store=FAR/cells KNOBS",
    "plan": "plan --on=cpu-1 --calibrate=FAR/run KNOBS",
}


def words(command: str, far: object, near: Path) -> list[str]:
    """Those of a row of `WORDS`."""
    steps = {"train__steps": 4, "train__eval_every": 4, "train__checkpoint_every": 4}
    small = [f"--config={tiny.RECIPE}", *tiny.overrides(Path("FAR/data"), **steps)]
    of_row = WORDS[command].split()
    found = [*of_row, *small] if of_row[-1] == "KNOBS" else of_row
    return [
        word.replace("FAR", str(far)).replace("NEAR", str(near))
        for word in found
        if word != "KNOBS"
    ]


@pytest.fixture(scope="module")
def lab(
    text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[BucketPath, Path, buckets.Proxy]]:
    """A bucket with data, a run on it and a model that holds dialogues; a folder on this machine."""
    near = tmp_path_factory.mktemp("near")
    with buckets.served("s3") as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTJAX_CACHE", str(near / "cache"))
        patch.setattr(slurm, "queued", dict)  # of a Slurm on this machine
        far = BucketPath("s3", buckets.BUCKET, "lab")
        put(text, far / "data")
        (near / "text.txt").write_text(tiny.TEXT)
        (near / "words.jsonl").write_text('{"text": "the cat sees the sun"}\n')
        works(*words("train", far, near))
        works("export", f"--workdir={far / 'run'}", f"--out={near / 'model'}")
        (near / "model" / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
        )
        put(near / "model", far / "model")
        yield far, near, proxy


@pytest.mark.slow
def test_commands_take_places_in_a_bucket(
    lab: tuple[BucketPath, Path, buckets.Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    far, near, _ = lab
    for command in WORDS:
        monkeypatch.setattr("sys.stdin", io.StringIO("the\n"))
        works(*words(command, far, near))
    assert Checkpoints(far / "branched" / CHECKPOINTS).steps()[-1] == 6
    assert tokenizer.load(str(far / "model")).name == str(far / "model"), "not that of the copy"


@pytest.mark.parametrize("command", WORDS)
def test_commands_refuse_what_is_no_place_in_a_line(
    lab: tuple[BucketPath, Path, buckets.Proxy], command: str, tmp_path: Path
) -> None:
    far, _, proxy = lab
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    for place in ("s3:/lab", "s3://"):
        refused("is no place for files: write a path", *words(command, place, tmp_path))
    refused("NoSuchBucket|no such bucket", *words(command, "s3://absent", tmp_path))
    proxy.fault = lambda method, path: "forbidden"
    tokenizer.load.cache_clear()
    try:
        refused("PERMISSION_DENIED", *words(command, far, tmp_path))
    finally:
        proxy.fault = lambda method, path: "pass"


def test_what_only_reads_ends_within_seconds_where_a_bucket_is_away(
    lab: tuple[BucketPath, Path, buckets.Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    far, near, proxy = lab
    monkeypatch.setattr(storage, "RETRIES", storage.RETRIES | {"max_retries": 1})
    storage._open.cache_clear()
    proxy.fault = lambda method, path: "busy"
    try:
        for command in ("eval", "status of a folder", "generate", "replay", "batches", "report"):
            done = gptjax(*words(command, far, near))
            assert done.status == EXIT_STOPPED and not done.out, done
            assert re.fullmatch(r"gptjax: s3://lab/\S+ is out of reach \(.*\n", done.err), done.err
    finally:
        proxy.fault = lambda method, path: "pass"
        storage._open.cache_clear()
