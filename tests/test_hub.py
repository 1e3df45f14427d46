"""Models by name, from a hub on this machine (tests/hub.py): fetched, checked, refused."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy

from gptjax import hub, model, tokenizer
from gptjax.cli import main
from gptjax.config import UserError
from gptjax.data import Store, prepare
from gptjax.interop import hf, pretrained
from gptjax.records import read_environment
from tests import hub as server
from tests import tiny
from tests.child import Child, free_port

KNOBS: dict[str, Any] = {"model__context": 64, "train__steps": 4, "mesh__data": 1}
TEMPLATE = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
SPEAK = ("--config.sample.max_new_tokens=3", "--config.sample.prompt=the ", "--config.mesh.data=1")
NEEDED = [
    "chat_template.jinja",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
BESIDE = ("README.md", "pytorch_model.bin", "tf_model.h5", "onnx/model.safetensors")

BYTES = tokenizer.load("bytes")


def launch(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "model"
    config = tiny.config(Path("none"), **KNOBS).model
    hf.export(out, config, model.init(config, 0), "bytes")
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(tiny.TEXT * 4)
    prepare([text], text.parent / "store", str(folder), val_fraction=0.2)
    return text.parent / "store"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def running(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[server.Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 10)
    tokenizer.load.cache_clear()
    with server.served(cache) as running:
        yield running


@pytest.fixture
def commit(running: server.Hub, folder: Path) -> str:
    """Of lab/tiny, which has what lies beside a model on the hub."""
    return running.model("lab/tiny", server.folder(folder) | dict.fromkeys(BESIDE, b"beside"))


def test_only_what_is_needed_is_fetched_and_once(
    running: server.Hub, commit: str, cache: Path, folder: Path
) -> None:
    found = pretrained.read("hf:lab/tiny")
    assert found.name == Path(f"hf:lab/tiny@{commit}") and found.tokenizer == str(found.name)
    assert "model.safetensors" not in running.fetched()  # until it is known that we can use it
    assert equal(pretrained.load(found), pretrained.load(pretrained.read(folder)))
    assert running.fetched() == NEEDED
    # It is the hub's own cache: its library finds the model there by its branch.
    theirs = huggingface_hub.snapshot_download("lab/tiny", local_files_only=True)
    assert Path(theirs) == found.path and sorted(p.name for p in found.path.iterdir()) == NEEDED
    running.asked.clear()
    again = pretrained.read(found.name)
    assert again == found and pretrained.weight_files(again) == [found.path / "model.safetensors"]
    assert running.asked == []  # a commit does not change


def equal(a: pretrained.Pretrained, b: pretrained.Pretrained) -> bool:
    same = jax.tree.map(lambda x, y: bool((x == y).all()), a.params, b.params)
    return a.model == b.model and all(jax.tree.leaves(same))


def test_a_name_is_a_branch_a_tag_or_a_commit(running: server.Hub, commit: str) -> None:
    repo = running.repos["models/lab/tiny"]
    repo.refs["v1"] = commit
    second = running.model("lab/tiny", {"config.json": b"{}"})
    for revision, meant in (
        ("", second),
        ("@main", second),
        ("@v1", commit),
        (f"@{commit}", commit),
    ):
        assert hub.pinned(Path(f"hf:lab/tiny{revision}")) == Path(f"hf:lab/tiny@{meant}")
    running.repos["models/gpt2"] = repo  # old names are without an organisation
    assert hub.pinned(Path("hf:gpt2")) == Path(f"hf:gpt2@{second}")
    assert hub.pinned(Path("models/gpt2")) == Path("models/gpt2")


def test_the_shards_of_an_index_are_fetched_and_no_others(
    running: server.Hub, folder: Path, tmp_path: Path
) -> None:
    files = server.folder(folder)
    tensors = safetensors.numpy.load(files.pop("model.safetensors"))
    names = {f"model-0000{i}-of-00002.safetensors": list(tensors)[i::2] for i in range(2)}
    for file, keys in names.items():
        files[file] = safetensors.numpy.save({key: tensors[key] for key in keys})
    index = {"weight_map": {key: file for file, keys in names.items() for key in keys}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    running.model("lab/large", files | {"consolidated.safetensors": b"other"})
    found = pretrained.load(pretrained.read("hf:lab/large"))
    assert equal(found, pretrained.load(pretrained.read(folder)))
    assert {*names} < {*running.fetched()} and "consolidated.safetensors" not in running.fetched()


# ---- on the way


def large(running: server.Hub, size: int) -> tuple[Path, bytes]:
    """The pinned name of a model whose weights are so many bytes."""
    content = np.random.default_rng(0).bytes(size)
    commit = running.model("lab/bytes", {"config.json": b"{}", "model.safetensors": content})
    return Path(f"hf:lab/bytes@{commit}"), content


def test_a_broken_connection_goes_on_where_it_broke(running: server.Hub) -> None:
    name, content = large(running, 1 << 20)
    running.cut = [300_000, 300_000]
    got = hub.fetched(name, ["model.safetensors"]) / "model.safetensors"
    assert got.read_bytes() == content
    spans = [span for _, path, span in running.asked if "/cdn/" in path and span is not None]
    assert len(spans) == 2 and len({*spans}) == 2
    (sent,) = running.sent.values()
    # What was on the way in the library when it broke, less than its chunk, comes again.
    assert len(content) <= sent < len(content) + 2 * 1024


FETCH = """
import sys
from pathlib import Path
from huggingface_hub import constants
from gptjax import hub
constants.DOWNLOAD_CHUNK_SIZE = 1 << 10
print(hub.fetched(Path(sys.argv[1]), ["model.safetensors"]))
"""


def arrived(running: server.Hub, size: int, *children: Child) -> None:
    """Returns once so many bytes are on their way to one of the processes."""
    while running.sent.total() < size:
        assert all(child.returncode is None for child in children), children[0].stderr
        time.sleep(0.01)


def test_a_killed_process_is_gone_on_after(running: server.Hub, cache: Path) -> None:
    name, content = large(running, 1 << 20)
    running.stall = [600_000]
    child = Child(FETCH, name)
    arrived(running, 500_000, child)
    (part,) = cache.glob("models--lab--bytes/blobs/*.gptjax")
    while part.stat().st_size < 300_000:
        time.sleep(0.01)
    child.kill()
    assert not [*cache.rglob("*.safetensors")] and (size := part.stat().st_size) >= 300_000
    running.stall = []
    got = hub.fetched(name, ["model.safetensors"]) / "model.safetensors"
    assert got.read_bytes() == content
    assert [span for _, path, span in running.asked if "/cdn/" in path][-1] == f"bytes={size}-"


def test_one_process_of_a_host_fetches(running: server.Hub) -> None:
    name, content = large(running, 1 << 20)
    running.stall = [500_000]
    pair = [Child(FETCH, name) for _ in range(2)]
    arrived(running, 400_000, *pair)
    time.sleep(1)  # so that the other has come by now
    running.stall = []
    outs = [child.wait(60).stdout for child in pair]
    assert outs[0] == outs[1] != "" and running.sent.total() == len(content)


def test_a_flipped_bit_is_found_and_not_kept(running: server.Hub, cache: Path) -> None:
    name, content = large(running, 1 << 16)
    running.flipped = True
    with pytest.raises(UserError, match=r"model.safetensors came with other bytes than .* again$"):
        hub.fetched(name, ["model.safetensors"])
    assert not [p for p in cache.rglob("*") if p.is_file() and p.stat().st_size == len(content)]
    running.flipped = False
    got = hub.fetched(name, ["model.safetensors"]) / "model.safetensors"
    assert got.read_bytes() == content


def test_a_part_that_is_too_long_is_fetched_anew(running: server.Hub, cache: Path) -> None:
    """As two hosts leave it that share a disk but no locks."""
    name, content = large(running, 1 << 16)
    hub.files(name)
    ((etag, _),) = [b for f, b in hub._listing(hub._parse(name)).items() if "safe" in f]
    part = cache / "models--lab--bytes/blobs" / f"{etag}.gptjax"
    part.parent.mkdir()
    part.write_bytes(content + b"more")
    got = hub.fetched(name, ["model.safetensors"]) / "model.safetensors"
    assert got.read_bytes() == content


def test_a_full_disk_is_one_line(
    running: server.Hub, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(small_disk / "hub"))
    name, _ = large(running, 3 << 20)
    with pytest.raises(
        UserError, match=r"cannot be written into the hub's cache \(.*No space left"
    ):
        hub.fetched(name, ["model.safetensors"])


def test_what_is_fetched_is_said(
    running: server.Hub, commit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained.read("hf:lab/tiny")
    told = capsys.readouterr()
    assert re.fullmatch(rf"fetching hf:lab/tiny@{commit}: 0\.\d MB\n", told.err)
    assert not told.out
    pretrained.read("hf:lab/tiny")
    assert capsys.readouterr() == ("", "")


# ---- what is refused


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a command that ends with 2."""
    capsys.readouterr()
    assert launch(*words) == 2
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if not line.startswith("fetching ")]
    assert len(lines) == 1 and lines[0].startswith("gptjax: ") and not told.out, told
    return lines[0]


def test_each_refusal_is_one_line_that_says_what_to_do(
    running: server.Hub,
    commit: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = server.folder(folder)
    running.model("lab/private", files, private=True)
    running.model("lab/gated", files, gated=True)
    for name, message in (
        ("lab/none", "hf:lab/none@main: there is no such model, or it is private"),
        ("lab/private", "give a token that may read it by `hf auth login` or HF_TOKEN"),
        ("lab/gated", f"is gated: accept its terms at {running.url}/lab/gated"),
        ("lab/tiny@v9", "hf:lab/tiny@v9: no such revision: name a commit, or one of: main$"),
        ("lab/tiny@", "is not hf:ORG/NAME or hf:ORG/NAME@REVISION"),
        ("a/b/c", "is not hf:ORG/NAME or"),
        ("lab/tiny--x", "hf:lab/tiny--x@main: Cannot have -- or .."),
    ):
        line = refused(capsys, "generate", f"--workdir=hf:{name}", *SPEAK)
        assert re.search(message, line), line
    monkeypatch.setenv("HF_TOKEN", "wrong")
    line = refused(capsys, "generate", "--workdir=hf:lab/tiny", *SPEAK)
    assert "refuses (" in line and "check the token of HF_TOKEN" in line
    monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    for name in ("lab/private", "lab/gated"):
        assert launch("generate", f"--workdir=hf:{name}", *SPEAK) == 0


def test_weights_that_we_do_not_read_are_not_fetched(
    running: server.Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = server.folder(folder)
    weights = files.pop("model.safetensors")
    running.model("lab/pickle", files | {"pytorch_model.bin": weights})
    running.model("lab/adapter", files | {"adapter_config.json": b"{}", "x.safetensors": weights})
    running.model("lab/nothing", files)
    other = {"config.json": b'{"model_type": "mamba"}', "model.safetensors": weights}
    running.model("lab/mamba", other)
    running.model("lab/gguf", {"model.gguf": weights})
    for name, message in (
        ("pickle", r"its weights are a pickle \(pytorch_model.bin\), which may run any program"),
        ("adapter", "it holds an adapter"),
        ("nothing", "it holds no .safetensors file"),
        ("mamba", "model_type='mamba' is not one of: gpt2"),
        ("gguf", "holds no config.json: name a model"),
    ):
        line = refused(capsys, "generate", f"--workdir=hf:lab/{name}", *SPEAK)
        assert re.search(rf"^gptjax: hf:lab/{name}@.*{message}", line), line
    assert not running.sent[hash_of(folder / "model.safetensors")]


def test_without_the_extra_it_is_named(
    running: server.Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = refused(capsys, "generate", "--workdir=hf:lab/tiny", *SPEAK)
    assert "pip install 'gptjax[hub]'" in line


# ---- without a hub


@pytest.mark.parametrize("why", ["offline", "down", "gone"])
def test_without_a_hub_its_cache_will_do(
    why: str,
    running: server.Hub,
    commit: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert launch("generate", "--workdir=hf:lab/tiny", *SPEAK) == 0
    spoken = capsys.readouterr().out
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", why == "offline")
    running.down = why == "down"
    if why == "gone":
        endpoint = f"http://127.0.0.1:{free_port()}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    tokenizer.load.cache_clear()
    assert launch("generate", "--workdir=hf:lab/tiny", *SPEAK) == 0
    told = capsys.readouterr()
    assert told.out == spoken
    assert told.err.splitlines()[0] == (
        f"hf:lab/tiny@main: the hub is out of reach, so it is what it was: commit {commit}"
    )
    assert launch("generate", f"--workdir=hf:lab/tiny@{commit}", *SPEAK) == 0
    assert "out of reach" not in capsys.readouterr().err
    line = refused(capsys, "generate", "--workdir=hf:lab/other", *SPEAK)
    assert ("HF_HUB_OFFLINE forbids" if why == "offline" else "cannot be fetched from") in line


def test_what_another_program_has_fetched_will_do(
    running: server.Hub, commit: str, folder: Path
) -> None:
    huggingface_hub.snapshot_download("lab/tiny")
    running.down = True
    found = pretrained.load(pretrained.read("hf:lab/tiny"))
    assert equal(found, pretrained.load(pretrained.read(folder)))


# ---- every command


def test_every_command_that_takes_a_model_takes_its_name(
    running: server.Hub,
    commit: str,
    folder: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = tmp_path / "text.jsonl"
    lines.write_text('{"text": "the cat sees the sun"}\n')
    scored = (f"--config.data.sources=('{store}',)", "--config.eval.context=64")

    def said(name: str | Path, *words: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
        assert launch(words[0], f"--workdir={name}", *words[1:], *SPEAK) == 0
        return capsys.readouterr().out

    for words in (("generate",), ("ask", "a"), ("chat",), ("eval", *scored)):
        by_name, by_path = said("hf:lab/tiny", *words), said(folder, *words)
        by_path = by_path.replace(str(folder), f"hf:lab/tiny@{commit}")
        assert by_name == by_path, words
    records = [
        json.loads(said("hf:lab/tiny", *words, "--json"))
        for words in (("eval", *scored), ("tasks", f"--lambada={lines}"))
    ]
    sha256 = {file: hash_of(folder / file) for file in NEEDED}
    for record in records:
        assert record["workdir"] == record["tokenizer"] == f"hf:lab/tiny@{commit}"
        assert record["files"] == sha256
    assert launch("import", "hf:lab/tiny", f"--out={tmp_path / 'imported'}") == 0
    assert launch("import", folder, f"--out={tmp_path / 'copied'}") == 0
    assert server.folder(tmp_path / "imported") == server.folder(tmp_path / "copied")
    made = ("data", lines, f"--out={tmp_path / 'made'}", "--val_fraction=0")
    assert launch(*made, "--tokenizer=hf:lab/tiny") == 0


def hash_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_run_from_a_name_records_the_commit_and_demands_it(
    running: server.Hub,
    commit: str,
    folder: Path,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, knobs = tmp_path / "run", KNOBS | {"data__sources": f"('{store}',)"}
    words = [word for word in tiny.overrides(store, **knobs) if ".model." not in word]
    words = [word for word in words if ".tokenizer=" not in word]
    start = ("train", f"--config={tiny.RECIPE}", f"--workdir={run}", *words)
    assert launch(*start, "--from=hf:lab/tiny") == 0
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["tokenizer"] == f"hf:lab/tiny@{commit}"
    recorded = read_environment(run)[-1]["initial"]
    sha256 = {file: hash_of(folder / file) for file in NEEDED}
    assert recorded == {"model": f"hf:lab/tiny@{commit}", "files": sha256}
    assert launch(*start, "--from=hf:lab/tiny") == 0  # is done

    running.model("lab/tiny", server.folder(folder) | {"README.md": b"moved"})
    line = refused(capsys, *start, "--from=hf:lab/tiny")
    assert f"data.tokenizer was 'hf:lab/tiny@{commit}'" in line
    assert launch(*start, f"--from=hf:lab/tiny@{commit}") == 0
    assert f"name it by --from=hf:lab/tiny@{commit}" in refused(capsys, "replay", run)
    assert launch("replay", run, f"--from=hf:lab/tiny@{commit}") == 0
    # Elsewhere its tokenizer is fetched, and not the weights that it began with.
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    tokenizer.load.cache_clear()
    running.asked.clear()
    assert launch("generate", f"--workdir={run}", *SPEAK) == 0
    assert "tokenizer.json" in running.fetched() and "model.safetensors" not in running.fetched()


# ---- data sets

COMMANDS = """
import json, sys
from gptjax.cli import main
for words in json.loads(sys.argv[1]):
    print(main(words))
"""


def test_a_data_set_is_streamed_into_a_store(running: server.Hub, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    random = np.random.default_rng(0)
    rows = [{"text": random.bytes(50).hex()} for _ in range(2000)]
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    other = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:10]), other)
    repo = running.repos.setdefault("datasets/lab/rows", server.Repo())
    first = repo.commit(
        {
            "data/train-00000-of-00001.parquet": table.read_bytes(),
            "data/test-00000-of-00001.parquet": other.read_bytes(),
        }
    )
    repo.commit({"train.jsonl": b'{"body": "x"}'})
    out = [f"--out={tmp_path / name}" for name in "abcdef"]
    source = f"hub:lab/rows@{first},train"
    words = [
        ["data", source, out[0], "--tokenizer=bytes"],
        ["data", str(lines), out[1], "--tokenizer=bytes"],
        ["data", "hub:lab/rows,train", out[2], "--tokenizer=bytes"],
        ["data", "hub:lab/none,train", out[3]],
        ["data", f"hub:lab/rows@{first},dev", out[4]],
        ["data", "hub:lab/rows", out[5]],
    ]
    child = Child(COMMANDS, json.dumps(words)).wait()
    *_, d, e, f = re.findall("^gptjax: (.*)$", child.stderr, re.MULTILINE)
    told = [line for line in child.stdout.splitlines() if line.isdigit()]
    assert told == list("002222"), child.stderr
    assert "Traceback" not in child.stderr
    assert re.match("hub:lab/none,train cannot be read: DatasetNotFoundError: Dataset 'lab/n", d)
    assert "cannot be read: ValueError: Bad split: dev. Available splits: ['train', 'test']" in e
    assert f == "hub:lab/rows is not hub:DATASET[@REVISION][,CONFIG],SPLIT"
    assert "has no key 'text'; its keys: body" in child.stderr
    for split in ("train", "val"):
        made, expected = (Store.open(tmp_path / name / split, BYTES) for name in "ab")
        assert made.fingerprint == expected.fingerprint
    # Once, though a store is made by reading its text three times. (`datasets` opens the file twice.)
    assert running.sent[hash_of(table)] < 2.5 * table.stat().st_size
    assert not running.sent[hash_of(other)]
