"""Run records: real files, real kills, a real full disk."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gptjax
from configs.base import get_config
from gptjax import config, records, storage
from gptjax.config import UserError
from gptjax.records import open_run, read_metrics
from tests import buckets
from tests.test_floors import imports, modules

REPO = Path(__file__).parents[1]
CONFIG = config.to_dict(config.from_dict(get_config().to_dict()))
event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")
PRINTS = {"data": "d1", "tokenizer": "t1"}


def having(**knobs: Any) -> dict[str, Any]:
    """CONFIG with dotted knobs (written a__b) set anew."""
    tree = json.loads(json.dumps(CONFIG))
    for name, value in knobs.items():
        *sections, knob = name.split("__")
        section = tree
        for key in sections:
            section = section[key]
        assert knob in section
        section[knob] = value
    return tree


def environment(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "environment.json").read_text())


def events(folder: Path) -> list[Any]:
    """Every event of a run in order, by the record format itself: length, crc, bytes, crc."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda p: p.suffix):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return found


def curves(folder: Path) -> dict[int, dict[str, float]]:
    """What TensorBoard shows: a session's start hides earlier events from its step on."""
    shown: dict[int, dict[str, float]] = {}
    for event in events(folder):
        if event.session_log.status == event_pb2.SessionLog.START:
            shown = {step: v for step, v in shown.items() if step < event.step}
        for value in event.summary.value:
            shown.setdefault(event.step, {})[value.tag] = value.simple_value
    return shown


def log(run: records.Run, steps: range) -> None:
    for step in steps:
        run.log(step, {"loss": 1 / step, "lr": np.float32(step)})


@pytest.mark.usefixtures("eight_devices")
def test_a_run_leaves_its_config_environment_metrics_and_curves(tmp_path: Path) -> None:
    with open_run(tmp_path / "a" / "run", CONFIG, PRINTS, None) as run:
        run.log(1, {"loss": 2.5, "eval/perplexity": jax.numpy.float32(0.1)})
        # Before it is closed: a kill loses nothing.
        assert read_metrics(run.folder) == [
            {"step": 1, "loss": 2.5, "eval/perplexity": float(np.float32(0.1))}
        ]
    folder = tmp_path / "a" / "run"
    assert config.from_dict(json.loads((folder / "config.json").read_text())) == config.from_dict(
        CONFIG
    )
    (record,) = environment(folder)
    assert record["versions"]["jax"] == jax.__version__
    assert record["versions"]["gptjax"] == gptjax.__version__
    assert set(record["versions"]) == {
        *("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    }
    assert record["python"] == sys.version.split()[0]
    assert record["devices"] == {"cpu": 8} and record["backend"] == "cpu"
    assert record["processes"] == 1
    assert record["xla_flags"] == os.environ["XLA_FLAGS"]
    assert record["fingerprints"] == PRINTS
    assert (record["resume_step"], record["changed_knobs"]) == (None, {})
    assert curves(folder) == {1: {"loss": 2.5, "eval/perplexity": pytest.approx(0.1, rel=1e-7)}}


def test_non_finite_numbers_are_valid_json_and_return(tmp_path: Path) -> None:
    with open_run(tmp_path, CONFIG, PRINTS, None) as run:
        run.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=refuse)
    assert line == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.0}
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["a"])
    assert (read["b"], read["c"], read["d"]) == (math.inf, -math.inf, 1.0)


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    with open_run(tmp_path / "whole", CONFIG, PRINTS, None) as run:
        log(run, range(1, 10))
    with open_run(tmp_path / "parts", CONFIG, PRINTS, None) as run:
        log(run, range(1, 8))
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # torn by a kill
    with open_run(tmp_path / "parts", CONFIG, PRINTS, 4) as run:
        assert [line["step"] for line in read_metrics(run.folder)] == [1, 2, 3, 4]
        log(run, range(5, 10))
    whole, parts = (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes()
    assert curves(tmp_path / "parts") == curves(tmp_path / "whole")
    assert [r["resume_step"] for r in environment(tmp_path / "parts")] == [None, 4]


def test_a_start_without_a_checkpoint_empties_the_log(tmp_path: Path) -> None:
    for last in (5, 2):
        with open_run(tmp_path, CONFIG, PRINTS, None) as run:
            run.log(0, {"loss": 9.0})
            log(run, range(1, last))
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]
    assert sorted(curves(tmp_path)) == [0, 1]


def test_a_broken_line_before_the_last_is_told(tmp_path: Path) -> None:
    with open_run(tmp_path, CONFIG, PRINTS, None) as run:
        log(run, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text("{oops\n" + path.read_text())
    for opened in (lambda: read_metrics(tmp_path), lambda: open_run(tmp_path, CONFIG, PRINTS, 1)):
        with pytest.raises(UserError, match="metrics.jsonl:1 is not a line of metrics"):
            opened()


@pytest.mark.parametrize(
    "name, content",
    [
        *(("config.json", content) for content in ("x", "null", "[]", "1")),
        *(("environment.json", content) for content in ("x", "null", "{}", "[1]", "[{}]")),
        *(("metrics.jsonl", line) for line in ('{"step": "x"}\n', '{"step": 1, "loss": "x"}\n')),
    ],
)
def test_an_odd_record_is_named(tmp_path: Path, name: str, content: str) -> None:
    with open_run(tmp_path, CONFIG, PRINTS, None) as run:
        log(run, range(1, 3))
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / name}")) as caught:
        open_run(tmp_path, CONFIG, PRINTS, 2)
    assert "\n" not in str(caught.value)
    assert (tmp_path / name).read_text() == content


def saved(folder: Path, spelt: dict[str, Any] = CONFIG, prints: dict[str, str] = PRINTS) -> None:
    """A run that has saved, by its log; its checkpoints were removed."""
    with open_run(folder, spelt, prints, None) as run:
        log(run, range(1, spelt["train"]["checkpoint_every"] + 1))


def test_another_config_is_refused_by_its_knobs(tmp_path: Path) -> None:
    saved(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    other = having(seed=3, model__windows=[8, None], eval__prefix="none", mesh__fsdp=2)
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, other, PRINTS, None)
    assert str(caught.value) == (
        f"{tmp_path} holds a run of another config: seed was 0, is 3; model.windows was [None], "
        "is [8, None]; eval.prefix was 'eot', is 'none'. Use another --workdir"
    )
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_a_run_that_has_saved_nothing_begins_anew_under_another_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after an error for want of memory; what it logged is of the old config, and goes."""
    with open_run(tmp_path, CONFIG, PRINTS, None) as run:
        log(run, range(1, CONFIG["train"]["checkpoint_every"]))
    smaller = having(data__batch_size=CONFIG["data"]["batch_size"] // 2)
    open_run(tmp_path, smaller, PRINTS | {"tokenizer": "t2"}, None).close()
    was = CONFIG["data"]["batch_size"]
    assert (
        f"holds a run of another config: data.batch_size was {was}, is {was // 2}. "
        "It had saved nothing, and begins anew"
    ) in (told := capsys.readouterr().err)
    assert "the content of tokenizer changed since it started. It had saved nothing" in told
    assert read_metrics(tmp_path) == [] and len(environment(tmp_path)) == 2
    open_run(tmp_path, smaller, PRINTS | {"tokenizer": "t2"}, 5).close()  # from a checkpoint
    for step in (5, None):  # it is there, or was removed
        with pytest.raises(UserError, match=r"another config: data\.batch_size was"):
            open_run(tmp_path, CONFIG, PRINTS, step)


@pytest.mark.parametrize("place", ["./store", "store/", "WHOLE", "link", "other/../store"])
def test_a_place_is_the_same_however_it_is_spelt(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("store", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("store")
    place = place.replace("WHOLE", str(tmp_path / "store"))

    def run(place: str, digest: str = "d1", **knobs: Any) -> tuple[dict[str, Any], dict[str, str]]:
        places = {"data__sources": [place], "data__tokenizer": place}
        knobs = places | {"train__branch": f"{place}@10#0123456789abcdef"} | knobs
        return having(**knobs), {f"data.{place}": digest, f"held_out.{place}": "h1"}

    saved(tmp_path / "run", *run("store"))
    open_run("run", *run(place), 100).close()
    assert environment(tmp_path / "run")[-1]["changed_knobs"] == {}
    with pytest.raises(UserError, match="on other data: the content of data"):
        open_run("run", *run(place, "d2"), 100)
    for knob, value in {
        **{"data__sources": ["other"], "data__tokenizer": "other"},
        **{"train__branch": f"{place}@9#0123456789abcdef"},
    }.items():
        with pytest.raises(UserError, match=f"another config: {knob.replace('__', '.')} was"):
            open_run("run", *run(place, **{knob: value}), 100)


def test_every_knob_that_may_change_exists(tmp_path: Path) -> None:
    knobs = config.flatten(CONFIG)
    for name in records.MAY_CHANGE:
        assert name in CONFIG or name in knobs, name


@pytest.mark.parametrize("knob", config.flatten(CONFIG))
def test_a_knob_may_change_only_where_documented(tmp_path: Path, knob: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    other = having(**{knob.replace(".", "__"): "changed"})
    if knob in records.LENGTH:
        return  # below
    if knob in records.MAY_CHANGE or knob.split(".")[0] in records.MAY_CHANGE:
        value = config.flatten(CONFIG)[knob]
        assert records._changed_knobs(tmp_path, other, 5) == {knob: [value, "changed"]}
    else:
        with pytest.raises(UserError, match=f"another config: {knob} was .*, is 'changed'. Use"):
            records._changed_knobs(tmp_path, other, 5)


# schedule, steps done of 500, what is asked; in the base recipe 50 warm up.
EXTENDED = [
    ("constant", 500, {"train__steps": 900}),
    ("constant", 300, {"train__steps": 400}),  # shorter, but not than what is done
    ("cosine", 51, {"train__steps": 900}),  # at the peak, where the warmup ends
    ("cosine", 500, {"train__steps": 900, "optim__schedule_steps": 500}),
    ("cosine", 300, {"optim__schedule_steps": 500}),
    ("linear", 500, {"train__steps": 900, "optim__schedule_steps": 500}),
    ("wsd", 400, {"train__steps": 900}),  # its last fifth decays
    ("wsd", 500, {"train__steps": 900, "optim__schedule_steps": 500}),
]


@pytest.mark.parametrize("schedule, done, change", EXTENDED)
def test_a_run_may_become_longer_where_its_rates_so_far_stay(
    tmp_path: Path, schedule: str, done: int, change: dict[str, int]
) -> None:
    open_run(tmp_path, having(optim__schedule=schedule), PRINTS, None).close()
    open_run(tmp_path, having(optim__schedule=schedule, **change), PRINTS, done).close()
    flat = config.flatten(CONFIG)
    knobs = {name.replace("__", "."): value for name, value in change.items()}
    assert environment(tmp_path)[-1]["changed_knobs"] == {
        knob: [flat[knob], value] for knob, value in knobs.items()
    }


@pytest.mark.parametrize(
    "schedule, done, change",
    [
        ("cosine", 52, {"train__steps": 900}),
        ("cosine", 500, {"train__steps": 501}),
        ("linear", 500, {"train__steps": 900}),
        ("wsd", 402, {"train__steps": 900}),
        ("wsd", 500, {"train__steps": 900, "optim__schedule_steps": 900}),
    ],
)
def test_a_run_that_would_have_had_other_rates_is_not_extended(
    tmp_path: Path, schedule: str, done: int, change: dict[str, int]
) -> None:
    open_run(tmp_path, having(optim__schedule=schedule), PRINTS, None).close()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, having(optim__schedule=schedule, **change), PRINTS, done)
    said = str(caught.value)
    assert f"cannot go on from step {done} of 500 to {change['train__steps']}" in said
    assert f"optim.schedule={schedule!r} would have given its steps other learning rates" in said
    assert "by --config.optim.schedule_steps=500, after which" in said and "\n" not in said
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    with pytest.raises(UserError, match=f"has trained {done} steps already, more than train.ste"):
        open_run(tmp_path, having(optim__schedule=schedule, train__steps=done - 1), PRINTS, done)
    # Not with another change beside it.
    with pytest.raises(UserError, match="another config: seed was 0, is 1; train.steps was 500"):
        other = having(seed=1, optim__schedule=schedule, train__steps=900)
        open_run(tmp_path, other, PRINTS, done)


def test_a_run_of_before_a_knob_goes_on_and_one_of_a_knob_unknown_does_not(tmp_path: Path) -> None:
    open_run(tmp_path, CONFIG, PRINTS, None).close()
    path = tmp_path / "config.json"
    old = json.loads(path.read_text())
    for name in config.off_values(config.Model):
        if CONFIG["model"][name] == json.loads(json.dumps(config.off_values(config.Model)[name])):
            del old["model"][name]
    path.write_text(json.dumps(old))
    open_run(tmp_path, CONFIG, PRINTS, 5).close()
    assert environment(tmp_path)[-1]["changed_knobs"] == {}
    path.write_text(json.dumps(old))
    with pytest.raises(UserError, match="another config: model.qk_norm was False, is True. Use"):
        open_run(tmp_path, having(model__qk_norm=True), PRINTS, 5)
    for wrong, told in (
        ({**old, "experts": {}}, "unknown config key 'experts'"),
        ({k: v for k, v in old.items() if k != "seed"}, "missing config keys: seed"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=f"{path} is not of this version of gptjax: {told}"):
            open_run(tmp_path, CONFIG, PRINTS, 5)


def test_a_change_on_resume_is_recorded(tmp_path: Path) -> None:
    open_run(tmp_path, CONFIG, PRINTS, None).close()
    open_run(tmp_path, having(mesh__fsdp=4, sample__prompt="A"), PRINTS, 5).close()
    first, second = environment(tmp_path)
    assert first["changed_knobs"] == {}
    assert second["changed_knobs"] == {"mesh.fsdp": [1, 4], "sample.prompt": ["KING.\n", "A"]}
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["fsdp"] == 4


def test_changed_data_is_refused(tmp_path: Path) -> None:
    open_run(tmp_path, CONFIG, PRINTS, None).close()
    with pytest.raises(UserError, match="on other data: the content of tokenizer changed"):
        open_run(tmp_path, CONFIG, PRINTS | {"tokenizer": "t2"}, 5)
    assert len(environment(tmp_path)) == 1


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_revision_and_diff_reproduce_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    package = source / "gptjax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("one\n")
    monkeypatch.setattr(gptjax, "__file__", str(package / "__init__.py"))
    open_run(run, CONFIG, PRINTS, None).close()
    assert environment(run)[-1]["git"] is None, "not a checkout"

    git(source, "init")
    (source / "README.md").write_text("other\n")
    git(source, "add", "README.md")
    git(source, "commit", "-m", "x")
    open_run(run, CONFIG, PRINTS, None).close()
    assert environment(run)[-1]["git"] is None, "a checkout, but not of this package"

    git(source, "add", "-A")
    git(source, "commit", "-m", "y")
    head = git(source, "rev-parse", "HEAD")
    open_run(run, CONFIG, PRINTS, None).close()
    clean = {"revision": head, "dirty": False, "diff": None, "untracked": []}
    assert environment(run)[-1]["git"] == clean
    assert not list(run.glob("*.diff"))

    (package / "__init__.py").write_bytes(b"two \0\xff\n")
    (source / "README.md").write_text("changed too\n")
    (source / "new.py").write_text("")
    open_run(run, CONFIG, PRINTS, None).close()
    state = environment(run)[-1]["git"]
    assert state == clean | {"dirty": True, "diff": "git.3.diff", "untracked": ["new.py"]}
    changed = (package / "__init__.py").read_bytes()
    git(source, "reset", "--hard")
    git(source, "apply", str(run / "git.3.diff"))
    assert (package / "__init__.py").read_bytes() == changed
    assert (source / "README.md").read_text() == "changed too\n"

    open_run(tmp_path / "second", CONFIG, PRINTS, None).close()
    assert environment(tmp_path / "second")[0]["git"]["diff"] == "git.diff"
    assert (tmp_path / "second" / "git.diff").read_bytes() == (run / "git.3.diff").read_bytes()


def test_only_process_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with open_run(tmp_path / "run", CONFIG, PRINTS, None) as run:
        run.log(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run's records in .*: Not a directory"):
        open_run(tmp_path / "file" / "run", CONFIG, PRINTS, None)


def test_a_full_disk_is_told_and_the_log_stays_readable(small_disk: Path) -> None:
    folder = small_disk / "run"
    run = open_run(folder, CONFIG, PRINTS, None)
    with pytest.raises(UserError, match=r"records in .*/run: No space left on device") as caught:
        for step in range(100_000):
            run.log(step, {"loss": 0.5})
    assert "\n" not in str(caught.value)
    logged = read_metrics(folder)
    assert [line["step"] for line in logged] == list(range(len(logged)))
    assert len(logged) > 1000
    # Not even the last bytes of the curves fit; that must not hide what ended the run.
    with pytest.raises(KeyboardInterrupt), run:
        raise KeyboardInterrupt


def test_a_line_that_only_partly_fits_is_told(tmp_path: Path) -> None:
    class Short:
        """A raw file on a disk with one byte too few: it takes what fits, and raises nothing."""

        def write(self, line: bytes) -> int:
            return len(line) - 1

        def close(self) -> None:
            pass

    with open_run(tmp_path, CONFIG, PRINTS, None) as run:
        run._metrics.close()
        run._metrics = Short()  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(UserError, match="No space left on device"):
            run.log(1, {"loss": 1.0})


def test_files_are_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(tmp_path, CONFIG, PRINTS, None) as run:
        log(run, range(1, 5))
    names = ("config.json", "environment.json", "metrics.jsonl")
    before = {name: (tmp_path / name).read_bytes() for name in names}

    def die_at(name: str) -> None:
        def replace(aside: Path, path: Path) -> None:
            if path.name == name:
                raise OSError(28, "No space left on device")
            os.rename(aside, path)

        monkeypatch.setattr(os, "replace", replace)

    for name in names:
        die_at(name)
        with pytest.raises(UserError, match="No space left on device"):
            open_run(tmp_path, having(mesh__fsdp=2), PRINTS, 2)
        assert (tmp_path / name).read_bytes() == before[name]


WRITER = """
    import json, sys
    from pathlib import Path
    from gptjax.records import open_run, read_metrics
    folder, config, resume = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    run = open_run(folder, config, {}, resume)
    print("open", flush=True)
    for step in range(resume + 1, 10**9):
        run.log(step, {"loss": 1 / step})
"""


def test_sigkill_at_any_moment_leaves_whole_files(tmp_path: Path) -> None:
    """Killed while it opens (every file rewritten) and while it logs, each time resumed."""
    moments = random.Random(0)
    resume = 0
    for waits in ("", "open", "open", ""):
        arguments = [str(tmp_path), json.dumps(CONFIG), str(resume)]
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), *arguments],
            env=os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert child.stdout is not None
            if waits:
                assert child.stdout.readline() == "open\n"
                time.sleep(moments.uniform(0, 0.1))
            else:
                time.sleep(moments.uniform(0.9, 1.3))
        finally:
            child.kill()
            child.communicate(timeout=60)
            assert child.returncode == -signal.SIGKILL
        for name in ("config.json", "environment.json"):
            if (tmp_path / name).exists():
                json.loads((tmp_path / name).read_text())
        if (tmp_path / "metrics.jsonl").exists():
            steps = [line["step"] for line in read_metrics(tmp_path)]
            assert steps == list(range(1, len(steps) + 1))
            resume = len(steps) // 2
    assert resume > 0
    shutil.rmtree(tmp_path / "tensorboard")
    open_run(tmp_path, CONFIG, {}, resume).close()
    assert len(read_metrics(tmp_path)) == resume


def test_the_record_tells_the_config_s_bytes_the_code_and_the_mesh(tmp_path: Path) -> None:
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "tensor"))):
        open_run(tmp_path, CONFIG, PRINTS, None).close()
    open_run(tmp_path, having(mesh__fsdp=2), PRINTS, 5).close()
    first, second = environment(tmp_path)
    written = hashlib.sha256((tmp_path / "config.json").read_bytes()).hexdigest()
    assert second["config_sha256"] == written != first["config_sha256"]
    assert first["code"] == second["code"] == records.code_fingerprint()
    assert (first["mesh"], second["mesh"]) == ({"data": 2, "tensor": 4}, {})


def test_a_start_that_was_overtaken_in_a_bucket_puts_no_records() -> None:
    with buckets.served("gs"):
        folder = storage.expand(f"gs://{buckets.BUCKET}/run")
        first = open_run(folder, CONFIG, {}, None)
        first.log(1, {"loss": 1.0})
        first.sync()
        second = open_run(folder, CONFIG, {}, 1)
        for step in (2, 3):
            second.log(step, {"loss": 1.0})
        second.close()
        first.log(2, {"loss": 9.0})
        with pytest.raises(UserError, match="another process writes there"):
            first.close()
        assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3]


def test_a_run_that_goes_on_with_other_software_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_run(tmp_path, CONFIG, {}, None).close()
    open_run(tmp_path, CONFIG, {}, 5).close()
    assert caplog.messages == []
    starts = environment(tmp_path)
    starts[-1]["versions"]["jax"], starts[-1]["code"] = "0.1.0", "ab12"
    (tmp_path / "environment.json").write_text(json.dumps(starts))
    open_run(tmp_path, CONFIG, {}, 5).close()
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path} goes on with other software, so the last bits of its")
    assert message.endswith(f"numbers may differ: jax 0.1.0 -> {jax.__version__}, gptjax's code")
    # A new run in its place goes on with nothing.
    caplog.clear()
    (tmp_path / "environment.json").write_text(json.dumps(starts))
    open_run(tmp_path, CONFIG, {}, None).close()
    assert not [m for m in caplog.messages if "software" in m]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package's source."""
    source = Path(gptjax.__file__).parent
    return Path(
        shutil.copytree(source, tmp_path / "gptjax", ignore=shutil.ignore_patterns("*.txt"))
    )


@pytest.mark.parametrize("file", ["model.py", "layers/attention.py", "interop/hf.py", "new.py"])
def test_code_that_computes_counts(package: Path, file: str) -> None:
    before = records._code_sha256(package)
    assert before == records.code_fingerprint()
    with (package / file).open("a") as stream:
        stream.write("#\n")
    assert records._code_sha256(package) != before


def test_moving_code_between_files_counts(package: Path) -> None:
    before = records._code_sha256(package)
    (package / "model.py").rename(package / "models.py")
    assert records._code_sha256(package) != before


@pytest.mark.parametrize("name", records.NOT_COMPUTING)
def test_code_that_looks_on_or_serves_does_not_count(package: Path, name: str) -> None:
    before = records._code_sha256(package)
    for file in [package / name] if name.endswith(".py") else (package / name).rglob("*.py"):
        file.write_text("#\n")
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__" / "model.pyc").write_bytes(b"")
    assert records._code_sha256(package) == before


def test_no_code_that_computes_imports_code_that_does_not_count() -> None:
    """But for these, by which the loop only shows, names, times and writes down."""
    shown = {"accounting", "alive", "ledger", "profile", "progress", "records"}
    idle = {name.removesuffix(".py").replace("/", ".") for name in records.NOT_COMPUTING}
    files = modules(REPO)
    for module, file in files.items():
        name = module.removeprefix("gptjax").removeprefix(".")
        if name not in idle and name.partition(".")[0] not in idle:
            for target in imports(module, file.read_text(), set(files)):
                used = target.removeprefix("gptjax").removeprefix(".")
                assert used in shown or {used, used.partition(".")[0]}.isdisjoint(idle), (
                    f"{module} imports {target}: take {used} out of records.NOT_COMPUTING"
                )
