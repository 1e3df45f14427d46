"""Launching: what is submitted says what was asked, and processes of this host train as one.

Slurm itself is asked in test_cluster_slurm.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.cli import COMMANDS, main
from gptjax.cluster import job, kubernetes, local, slurm, tpu_vm
from gptjax.cluster.job import Job
from gptjax.cluster.launch import TARGETS, read_site
from gptjax.commands.command import without_launch
from gptjax.config import EXIT_STOPPED, UserError
from gptjax.records import read_metrics
from tests import tiny
from tests.child import REPO, Child
from tests.test_loop import timeless

SITES = REPO / "configs/sites"
PROGRAM = str(REPO / "launch.py")


def job_of(*words: str, processes: int = 2, together: bool = True) -> Job:
    return Job(words or ("train", "--workdir=runs/a"), processes, together)


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)


# ------------------------------------------------------------------------ words travel unchanged

# `printf` as the program shows the words that reach it, each ended by a NUL. What the clusters
# would do with the text is done by functions of the same names.
SHOW = ("printf", "%s\\0")
SRUN = 'srun() { while [[ "$1" == --* ]]; do shift; done; "$@"; }\n'
GCLOUD = 'gcloud() { local word; for word; do if [[ "$word" == --command=* ]]; then cd /; bash -c "${word#*=}"; fi; done; }\n'


def heard_by_bash(text: str) -> list[str]:
    done = subprocess.run(["bash"], input=text.encode(), capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def of_local(asked: Job, value: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "this_program", lambda: SHOW)
        patch.setenv("VALUE", value)
        return [*heard_by_bash(local.script(asked, local.Site())), value]


def of_slurm(asked: Job, value: str) -> list[str]:
    told = slurm.Site(environment=(f"VALUE={value}",), program=SHOW)
    after = 'trap \'printf "%s\\0" "$VALUE"\' EXIT\n'
    return heard_by_bash(SRUN + after + slurm.script(asked, told))


def of_tpu_vm(asked: Job, value: str) -> list[str]:
    told = tpu_vm.Site("pod", "zone", 1, environment=(f"VALUE={value}",), folder=".", program=SHOW)
    text = tpu_vm.script(asked, told).replace("exec printf", "after printf")
    after = 'after() { "$@"; printf "%s\\0" "$VALUE"; }; export -f after\n'
    return heard_by_bash(GCLOUD + after + text)


def of_kubernetes(asked: Job, value: str) -> list[str]:
    told = kubernetes.Site("image", environment=(f"VALUE={value}",), program=SHOW)
    spec = list(yaml.safe_load_all(kubernetes.manifest(asked, told)))[-1]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    words = [expanded(word) for word in container["command"]]
    assert words[:2] == list(SHOW)
    return [*words[2:], *(expanded(v["value"]) for v in container["env"] if v["name"] == "VALUE")]


def expanded(word: str) -> str:
    """As Kubernetes puts variables in (third_party/forked/golang/expansion/expand.go)."""
    variables = {"JOB_COMPLETION_INDEX": "0", "VALUE": "wrong", "HOME": "wrong"}
    pattern = r"\$\$|\$\((.*?)\)"
    return re.sub(
        pattern,
        lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]),
        word,
        flags=re.DOTALL,
    )


HEARD: dict[str, Callable[[Job, str], list[str]]] = {
    "local": of_local,
    "slurm": of_slurm,
    "kubernetes": of_kubernetes,
    "tpu-vm": of_tpu_vm,
}
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
TEXT |= st.sampled_from(
    ["$HOME", "$(VALUE)", "$$(VALUE)", "`id`", "a 'b' \"c\"", "\n", "\\", "{{ x }}", "#", "!!", "-"]
)


@pytest.mark.parametrize("on", TARGETS)
@settings(max_examples=40, deadline=None)
@given(words=st.lists(TEXT, max_size=4), value=TEXT)
def test_words_and_values_arrive_as_they_were_given(on: str, words: list[str], value: str) -> None:
    asked = Job(("train", *words), 1, True)
    *arrived, meet, told = HEARD[on](asked, value)
    assert arrived == ["train", *words]
    assert meet.startswith("--distributed")
    assert told == value


@pytest.mark.parametrize("folder", ["~/a b", "a b", "/tmp"])
def test_a_slice_runs_in_its_folder(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    told = tpu_vm.Site("pod", "zone", 1, folder=folder, program=("bash", "-c", "pwd"))
    gcloud = GCLOUD.replace("cd /;", "cd;")  # as ssh begins
    text = tpu_vm.script(Job(("train",), 1, True), told)
    done = subprocess.run(["bash"], input=gcloud + text, text=True, capture_output=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / Path(folder).expanduser()


@pytest.mark.parametrize("on", TARGETS)
def test_a_word_that_looks_like_a_template_is_none(on: str) -> None:
    asked = Job(("train", "{{ 7 * 7 }}", "{% raw %}"), 1, True)
    assert HEARD[on](asked, "{{ x }}")[1:3] == ["{{ 7 * 7 }}", "{% raw %}"]


def test_words_of_a_launch_are_no_words_of_the_command() -> None:
    words = "study a.py --on slurm --processes=2 --site x.toml --dry_run --seeds 2 --store=s"
    assert without_launch(words.split()) == ("study", "a.py", "--seeds", "2", "--store=s")
    assert without_launch(["train", "--on=local", "--config.a", "--x"]) == (
        "train", "--config.a", "--x"
    )  # fmt: skip


# --------------------------------------------------------------------- what is printed and refused


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("on", TARGETS)
def test_a_dry_run_prints_what_would_be_submitted_and_starts_nothing(
    on: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", f"--config={tiny.RECIPE}", "--config.seed=3", "--workdir=some where"]
    site = [] if on == "local" else [f"--site=configs/sites/{on}.toml"]
    monkeypatch.setattr(local, "_free_port", lambda: 1234)
    monkeypatch.setattr(sys, "argv", [PROGRAM])
    assert main([*words, f"--on={on}", "--processes=4", *site, "--dry_run"]) == 0
    told = read_site(*[s[7:] for s in site] or [None], on)
    asked = Job(tuple(words), 4, True, "some where")
    if bucket := getattr(told, "bucket", ""):
        asked = job.in_bucket(asked, bucket)
    text = TARGETS[on].text(asked, told)
    assert capsys.readouterr().out == text
    assert "some where" in text and "--config.seed=3" in text


@pytest.mark.parametrize(
    "words, arrive",
    [
        ("train --workdir=runs/a --config.x=1", "train --workdir=gs://lab/x/runs/a --config.x=1"),
        (
            "train --workdir ./a --branch=b@5",
            "train --workdir gs://lab/x/a --branch=gs://lab/x/b@5",
        ),
        ("train --workdir=/runs/a", "train --workdir=/runs/a"),
        ("train --workdir=~/a", "train --workdir=~/a"),
        ("train --workdir=s3://other/a", "train --workdir=s3://other/a"),
        ("train --workdir=a --from=b", "train --workdir=gs://lab/x/a --from=b"),
        ("eval --compare a /b c", "eval --compare gs://lab/x/a /b c"),
        ("eval --workdir=hf:lab/gpt@v1", "eval --workdir=hf:lab/gpt@v1"),
        ("eval --compare hf:a/b c", "eval --compare hf:a/b gs://lab/x/c"),
        ("train --config.train.branch=b@5", "train --config.train.branch=gs://lab/x/b@5"),
        ("train --config.train.branch b@5", "train --config.train.branch gs://lab/x/b@5"),
        ("train --config.train.branch=None", "train --config.train.branch=None"),
        ("train --config.train.branch None", "train --config.train.branch None"),
        ("study c.py --store cells --out out", "study c.py --store gs://lab/x/cells --out out"),
    ],
)
def test_folders_of_runs_lie_in_the_bucket_of_a_site(words: str, arrive: str) -> None:
    moved = job.in_bucket(job_of(*words.split())._replace(folder="a"), "gs://lab/x/")
    assert moved.words == tuple(arrive.split())
    assert moved.folder == "gs://lab/x/a"


@pytest.mark.parametrize(
    "words, arrive",
    [
        (f"train --config={tiny.RECIPE}", "--workdir=s3://lab/runs/base"),
        ("study experiments/positions.py", "--store=s3://lab/runs/cells"),
    ],
)
def test_what_a_launch_decides_is_shown(
    words: str, arrive: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder where none is named, too."""
    (tmp_path / "site.toml").write_text("bucket = 's3://lab'\n")
    launched = [*words.split(), "--on=slurm", f"--site={tmp_path / 'site.toml'}", "--dry_run"]
    assert main(launched) == 0
    assert f"{words} {arrive} " in capsys.readouterr().out
    assert main([*launched, "--store=../cells" if "study" in words else "--workdir=../a"]) == 2
    assert "leads out of the site's bucket s3://lab" in capsys.readouterr().err


@pytest.mark.parametrize("on", [on for on in TARGETS if on != "local"])
def test_a_site_that_is_shipped_states_every_key(on: str) -> None:
    stated = tomllib.loads((SITES / f"{on}.toml").read_text())
    assert set(stated) == {field.name for field in dataclasses.fields(TARGETS[on].site)}
    defaults = {f.name: f.default for f in dataclasses.fields(TARGETS[on].site)}
    text = (SITES / f"{on}.toml").read_text()
    for name, value in stated.items():
        if f"{name} " in text and re.search(rf"^{name} = .*\(default\)$", text, re.MULTILINE):
            assert value == defaults[name], name


def test_a_site_is_found_as_a_recipe_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_site("configs/sites/slurm.toml", "slurm").partition == "gpu"
    (tmp_path / "mine.toml").write_text('partition = "mine"\n')
    assert read_site("mine.toml", "slurm") == slurm.Site(partition="mine")
    assert read_site(None, "slurm") == slurm.Site()


@pytest.mark.parametrize(
    "time, told",
    [
        ("2", 120), ("2:30", 150), ("1:02:30", 3750), ("1-0", 86400), ("1-2:30", 95400),
        ("1-02:30:01", 95401), ("0", None), ("UNLIMITED", None), ("1:2:3:4", None), ("", None),
    ],
)  # fmt: skip
def test_a_limit_is_read_as_sbatch_reads_it(time: str, told: int | None) -> None:
    assert slurm.seconds(time) == told


def test_a_notice_is_shorter_than_the_limit() -> None:
    slurm.Site(time="00:02:01")
    slurm.Site(time="UNLIMITED", notice=10**6)
    for limit in ("2", "00:02:00", "0-00:01:59"):
        with pytest.raises(UserError, match="notice=120 seconds is no less than"):
            slurm.Site(time=limit)


TRAIN = ["train", f"--config={tiny.RECIPE}"]
REFUSED = [
    ([*TRAIN, "--on=moon"], "", r"--on='moon' is not one of: local, slurm, kubernetes, tpu-vm"),
    ([*TRAIN, "--on=local", "--processes=0"], "", "--processes=0 must be above 0"),
    ([*TRAIN, "--on=local", "--processes=-1"], "", "--processes=-1 must be above 0"),
    ([*TRAIN, "--on=local", "--site=SITE"], "", "local has no particulars: leave --site out"),
    ([*TRAIN, "--on=slurm", "--site=no.toml"], "", "no such file; name one, such as configs/sites/"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], "a = [", "site .*site.toml: "),
    ([*TRAIN, "--on=slurm", "--site=SITE"], "partion = 'a'", "did you mean 'partition'.*valid keys"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], "notice = '1'", "notice must be int, got '1'"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], "notice = 0", "notice must be at least 1, got 0"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], "time = '2'", "notice=120 .* time='2' .* is 120 seconds"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], "bucket = 'runs'", "bucket='runs' must be such as gs://"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], "bucket = 'gs://'", "gs:// is no place for files"),
    ([*TRAIN, "--on=slurm", "--site=SITE", "--workdir="], "bucket = 'gs://lab'", "an empty text"),
    ([*TRAIN, "--on=slurm", "--site=SITE", "--workdir=."], "bucket = 'gs://lab'", "would be all of"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], "environment = ['A']", "'A' is no NAME=VALUE"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], "environment = ['A B=1']", "no name of a variable"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], "environment = ['A=1', 'A=2']", "names one twice"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], 'options = ["a\\nb"]', "is not one line"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], "gpus_per_node = 8\ntasks_per_node = 3", "must be 1, or"),
    ([*TRAIN, "--on=slurm", "--site=SITE", "--processes=3"], "tasks_per_node = 2", "no multiple"),
    ([*TRAIN, "--on=kubernetes"], "", "needs a site: missing config keys: image"),
    ([*TRAIN, "--on=kubernetes", "--site=SITE"], "image='a'\nkind='pod'", "not one of: job, jobset"),
    ([*TRAIN, "--on=kubernetes", "--site=SITE"], "image='a'\nprogram=[]", "program must name"),
    ([*TRAIN, "--on=tpu-vm", "--site=SITE"], "name='a'\nzone='b'\nhosts=2", "but a has 2 hosts"),
    (["study", "experiments/positions.py", "--on=tpu-vm", "--site=SITE"], "name='a'\nzone='b'\nhosts=1", "a slice runs one"),
    ([*TRAIN, "--on=local", "--distributed"], "", "leave --distributed and --worker out"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], "program=['']", "program holds an empty text"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], "options=['']", "options holds an empty text"),
    ([*TRAIN, "--on=kubernetes", "--site=SITE"], "image=''", "image holds an empty text"),
    ([*TRAIN, "--on=kubernetes", "--site=SITE"], "image='a'\nvolumes=['a=/x','b=/x']", "two at one"),
    ([*TRAIN, "--on=tpu-vm", "--site=SITE"], "name=''\nzone='b'\nhosts=1", "name holds an empty"),
    ([*TRAIN, "--on=tpu-vm", "--site=SITE"], "name='a'\nzone=''\nhosts=1", "zone holds an empty"),
    ([*TRAIN, "--on=tpu-vm", "--site=SITE"], "name='a'\nzone='b'\nhosts=1\nfolder='~me'", "folder='~me'"),
    ([*TRAIN, "--on=slurm", "--site=SITE"], 'setup="\\u0000"', "setup: .* holds a NUL"),
    ([*TRAIN, "--on=kubernetes", "--site=SITE", "--workdir=a\0"], "image='a'", "holds a NUL"),
    (["study", "experiments/positions.py", "--on=local", "--worker"], "", "leave --distributed and --worker out"),
    *(
        ([*words.split(), "--on=slurm"], "", match)
        for words, match in (
            ("train --branch=a@5 --workdir=b --config.train.stepz=9", "key 'train.stepz'"),
            ("train --branch= --workdir=b", "--branch takes RUN@STEP"),
            ("train --config.model.feedforward=nonsense", "feedforward='nonsense' is not one of"),
            ("train --config.model.attention=nonsense", "attention='nonsense' is not one of"),
            ("train --config.data.tokenizer=nonsense", "tokenizer='nonsense' is not one of"),
            ("train --profile=x", "--profile=x is neither"),
            ("eval", "eval takes either"),
            ("eval --workdir=x --config.eval.strid=5", "key 'eval.strid'"),
            ("eval --workdir=x --set wiki", "is not NAME=PATH"),
            ("eval --compare a b --b_with model.product=int8", "key 'model.product'"),
            ("generate --workdir=x --config.sample.stopp=3", "key 'sample.stopp'"),
            ("generate --workdir=x --seed=-1", "seed must lie in"),
            ("tasks --workdir=x", "tasks takes at least one of"),
            ("tasks --workdir=x --harness a --limit=0", "--limit=0 is no positive"),
            ("tasks --workdir=x --harness a --config.eval.strid=1", "key 'eval.strid'"),
            ("study nosuch.py", "no study nosuch.py"),
            ("study", "name either a study's FILE"),
            ("study experiments/positions.py --config.train.stepz=3", "key 'train.stepz'"),
            ("study experiments/positions.py --seeds=0", "seeds must be above 0"),
            ("study --axis model.feedforward=gelu,nonsense", "'nonsense' is not one of"),
            ("noise --seeds=1", "between 2 seeds or more"),
        )
    ),
    ([*TRAIN, "--on=slurm", "--worjdir=a"], "", "unexpected argument '--worjdir=a'"),
    ([*TRAIN, "--on=slurm", "--config.optim.peak=1"], "", "unknown config key 'optim.peak'"),
    (["train", "--on=slurm", "--config.optim.peak=1"], "", "unknown config key 'optim.peak'"),
    ([*TRAIN, "--on=slurm", "--workdir=\udc80"], "", "is no UTF-8"),
    ([*TRAIN, "--processes=2"], "", "--processes=2 is of a launch: say where by --on"),
    ([*TRAIN, "--dry_run"], "", "--dry_run is of a launch"),
    (["noise", "--dry_run"], "", "--dry_run is of a launch"),
    (["config", "--on=slurm"], "", "config runs in one process, here: leave --on=slurm out"),
    (["replay", "runs/a", "--processes", "2"], "", "replay runs in one process, here"),
]  # fmt: skip


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("words, site, message", REFUSED)
def test_a_mistake_is_a_line(
    words: list[str], site: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site.toml").write_text(site)
    words = [word.replace("SITE", str(tmp_path / "site.toml")) for word in words]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gptjax: ") and re.search(message, line), line


@pytest.mark.parametrize("on, program", [("slurm", "sbatch"), ("kubernetes", "kubectl"), ("tpu-vm", "gcloud")])  # fmt: skip
def test_a_cluster_s_program_that_is_not_here_is_told(
    on: str, program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    site = f"--site=configs/sites/{on}.toml"
    assert main([*TRAIN, f"--on={on}", "--processes=4", site]) == 2
    assert f"no {program} here: " in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_whether_it_can_be_launched(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What takes --distributed is one jax program on all processes, what takes --worker an array."""
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    text = capsys.readouterr().out
    assert ("--on TARGET" in text) == ("--distributed" in text or "--worker" in text)


# ------------------------------------------------------------------------------------------- Slurm


@pytest.mark.parametrize(
    "status, restarts, requeued",
    [(0, "", False), (2, "", False), (75, "", True), (75, "1", True), (75, "2", False), (137, "", False)],
)  # fmt: skip
def test_a_job_that_saved_is_queued_again_so_often(
    status: int, restarts: str, requeued: bool
) -> None:
    scontrol = 'scontrol() { printf \'%s %s\' "$1" "$2"; }; sleep() { :; }\n'
    script = slurm.script(
        job_of(), slurm.Site(restarts=2, program=("bash", "-c", f"exit {status}"))
    )
    done = subprocess.run(
        ["bash"],
        input=SRUN + scontrol + script.replace("sleep 5", "true"),
        text=True,
        capture_output=True,
        env=os.environ | {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": restarts},
        check=False,
    )
    assert done.returncode == status
    assert done.stdout == ("requeue 17" if requeued else "")
    assert ("as often as the site allows" in done.stderr) == (status == 75 and not requeued)


def options(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)


def test_a_task_has_a_host_or_a_gpu() -> None:
    host = slurm.script(job_of(processes=4), slurm.Site(gpus_per_node=8))
    assert {"--nodes=4", "--ntasks=4", "--gpus-per-node=8"} < set(options(host))
    # Else jax would give a task the one GPU that has the number of the task.
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n" in host
    gpu = slurm.script(job_of(processes=16), slurm.Site(gpus_per_node=8, tasks_per_node=8))
    assert {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--gpus-per-node=8"} < set(
        options(gpu)
    )
    assert "JAX_LOCAL_DEVICE_IDS" not in gpu
    array = slurm.script(
        job_of("study", "a.py", processes=5, together=False),
        slurm.Site(gpus_per_node=8, tasks_per_node=8),
    )
    assert {"--array=0-4", "--nodes=1", "--ntasks=1", "--gpus-per-node=1"} < set(options(array))
    assert "a.py --worker" in array and "--distributed" not in array


# -------------------------------------------------------------------------------------- Kubernetes


def objects(kind: str, together: bool, **fields: Any) -> list[dict[str, Any]]:
    """What a manifest holds, a JobSet's jobs as Jobs of their own: they have no schema of theirs."""
    site = dataclasses.replace(read_site("configs/sites/kubernetes.toml", "kubernetes"), kind=kind)
    site = dataclasses.replace(site, **fields)
    asked = job_of("train" if together else "study", "a b", together=together)
    documents = list(yaml.safe_load_all(kubernetes.manifest(asked, site)))
    for i, document in enumerate(documents):
        if document["kind"] == "JobSet":
            (replicated,) = document["spec"]["replicatedJobs"]
            assert replicated["replicas"] == 1
            name = f"{document['metadata']['name']}-{replicated['name']}-0"
            spec = replicated["template"]["spec"]
            documents[i] = {
                "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec
            }  # fmt: skip
    return documents


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", kubernetes.KINDS)
def test_manifests_are_valid_and_a_misspelt_field_is_not(kind: str, together: bool) -> None:
    version = kubernetes_validate.latest_version()
    for whole in (True, False):
        bare = {
            field.name: field.default
            for field in dataclasses.fields(kubernetes.Site)
            if field.name not in ("image", "kind")
        }
        for document in objects(kind, together, **({} if whole else bare)):
            kubernetes_validate.validate(document, version, strict=True)
    (spec,) = (d["spec"] for d in objects(kind, together) if d["kind"] == "Job")
    wrong = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": spec}
    for part in (spec, spec["template"]["spec"], spec["template"]["spec"]["containers"][0]):
        part["comand"] = part.pop(next(iter(part)))
        with pytest.raises(kubernetes_validate.ValidationError, match="comand"):
            kubernetes_validate.validate(wrong, version, strict=True)
        del part["comand"]


@pytest.mark.parametrize("kind", kubernetes.KINDS)
def test_pods_meet_at_the_name_of_the_first(kind: str) -> None:
    *service, document = objects(kind, True)
    command = document["spec"]["template"]["spec"]["containers"][0]["command"]
    address, count, index = command[-1].removeprefix("--distributed=").split(",")
    assert (count, index) == ("2", "$(JOB_COMPLETION_INDEX)")
    host, port = address.split(":")
    pod, subdomain = host.split(".")
    # An Indexed Job calls its pods by its own name and their index.
    assert pod == document["metadata"]["name"] + "-0"
    if kind == "job":
        (headless,) = service
        assert headless["metadata"]["name"] == subdomain
        assert headless["spec"]["clusterIP"] == "None"
        assert headless["spec"]["ports"][0]["port"] == int(port)
        assert document["spec"]["template"]["spec"]["subdomain"] == subdomain
        assert headless["spec"]["selector"] == {
            "batch.kubernetes.io/job-name": document["metadata"]["name"]
        }
    else:  # JobSet makes a service of its own name
        assert not service and document["metadata"]["name"] == f"{subdomain}-gptjax-0"
    assert len(pod) <= 63


def test_the_same_command_has_the_same_name_and_another_not() -> None:
    names = [
        job_of(*words).digest for words in (("train",), ("train",), ("train", "--config.seed=1"))
    ]
    assert names[0] == names[1] != names[2]


# ---------------------------------------------------------------------------------------- this host

# The processes stand for ones that train: they act by their index, the end of the last word.
STANDS_IN = r"""
import os, signal, sys, time
i = int(sys.argv[-1].rpartition(",")[2] or 0) if "," in sys.argv[-1] else int(os.environ.get("I", 0))
def stop(*_):
    os.write(1, f"{i} saves\n".encode())
    sys.exit(75)
"""


@contextlib.contextmanager
def signals_heard() -> Iterator[None]:
    """As in a terminal: what runs in a shell's background, or by nohup, ignores some of them."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in local.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def stands_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def program(code: str) -> None:
        words = (sys.executable, "-c", STANDS_IN + code)
        monkeypatch.setattr(local, "this_program", lambda: words)

    monkeypatch.setattr(local, "GRACE_SECONDS", 0.5)
    with signals_heard():
        yield program


def test_what_fails_first_ends_the_others_and_is_told(
    stands_in: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    stands_in("""
print(f"{i} begins", file=sys.stderr, flush=True)
if i == 1: sys.exit(3)
time.sleep(60)
""")
    begin = time.monotonic()
    assert local.run(job_of(processes=3), local.Site()) == 3
    assert time.monotonic() - begin < 60
    error = capfd.readouterr().err
    assert "gptjax: process 1 of 3 ended with status 3\n" in error
    assert "\n[1] 1 begins\n" in f"\n{error}" and "[0]" not in error


def test_a_process_that_is_killed_is_told(
    stands_in: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    stands_in("os.kill(os.getpid(), signal.SIGKILL) if i == 0 else time.sleep(60)")
    assert local.run(job_of(), local.Site()) == 137
    assert "gptjax: process 0 of 2 was killed by SIGKILL\n" in capfd.readouterr().err


@pytest.mark.parametrize("number", local.SIGNALS)
def test_a_signal_reaches_all_and_they_save(
    number: signal.Signals, stands_in: Callable[[str], None], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stands_in(f"""
signal.signal(signal.SIGTERM, stop)
open(f"{tmp_path}/{{i}}", "w").close()
time.sleep(60)
""")
    send = threading.Thread(target=once_all_are_there, args=(tmp_path, [number]), daemon=True)
    send.start()
    before = signal.getsignal(number)
    assert local.run(job_of(), local.Site()) == EXIT_STOPPED
    assert signal.getsignal(number) == before
    send.join()
    assert sorted(capfd.readouterr().out.split("\n")) == ["", "0 saves", "1 saves"]


def once_all_are_there(folder: Path, numbers: list[signal.Signals]) -> None:
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.02)
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.3)


def test_a_second_signal_kills(stands_in: Callable[[str], None], tmp_path: Path) -> None:
    stands_in(f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"{tmp_path}/{{i}}", "w").close()
time.sleep(60)
""")
    numbers = [signal.SIGTERM, signal.SIGINT]
    send = threading.Thread(target=once_all_are_there, args=(tmp_path, numbers), daemon=True)
    send.start()
    assert local.run(job_of(), local.Site()) == 137
    send.join()


def test_workers_go_on_when_one_fails(
    stands_in: Callable[[str], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first to make the file fails; the other outlives it by more than the grace."""
    stands_in(f"""
assert sys.argv[-1] == "--worker"
try: os.mkdir("{tmp_path}/first")
except FileExistsError: time.sleep(1.5); print("done", flush=True)
else: sys.exit(2)
""")
    asked = job_of("study", together=False)
    assert local.run(asked, local.Site()) == 2
    assert capfd.readouterr().out == "done\n"


def test_a_reader_that_has_gone_holds_no_process() -> None:
    read, write = os.pipe()
    os.close(read)
    lines = io.BytesIO(b"one\ntwo\n")
    stream = os.fdopen(write, "w")
    local._copy(lines, stream, "")
    assert lines.read() == b""
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    asked = job_of(processes=2)
    shares = [v for _, v in local._processes(asked)]
    assert [v["CUDA_VISIBLE_DEVICES"] for v in shares] == ["4,5", "6,7"]
    assert [v["JAX_LOCAL_DEVICE_IDS"] for v in shares] == ["0,1", "0,1"]
    one_each = [v["CUDA_VISIBLE_DEVICES"] for _, v in local._processes(job_of(processes=4))]
    assert one_each == ["4", "5", "6", "7"]
    for count in (3, 8):
        with pytest.raises(job.UserError, match=f"={count} cannot share 4 GPUs: use 1 or 2 or 4"):
            local._processes(job_of(processes=count))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert [v for _, v in local._processes(job_of(processes=3))] == [{}] * 3


@pytest.mark.slow
def test_two_processes_train_as_one_stop_and_go_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The words of one process: stopped by Ctrl-C, and started again."""
    monkeypatch.chdir(tmp_path)
    tiny.devices()  # this process's own eight, before the flags are those of others
    monkeypatch.setenv("XLA_FLAGS", tiny.environment(1)["XLA_FLAGS"])
    monkeypatch.setattr(sys, "argv", [PROGRAM])
    knobs = {"train__steps": 30, "train__checkpoint_every": 100}
    words = ["train", f"--config={tiny.RECIPE}", *tiny.overrides(text, **knobs)]
    launched = [*words, "--workdir=pair", "--on=local", "--processes=2"]
    metrics = Path("pair/metrics.jsonl")

    def interrupt() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with signals_heard():
        assert main(launched) == EXIT_STOPPED
    assert 3 <= read_metrics(Path("pair"))[-1]["step"] < 30
    assert main(launched) == 0
    assert "pair: resumed at step" in capfd.readouterr().err
    with tiny.seeing(2):
        assert main([*words, "--workdir=one"]) == 0
    pair_losses, one_losses = (
        [v for line in timeless(Path(f)) for k, v in line.items() if k in ("loss", "val_loss")]
        for f in ("pair", "one")
    )
    # gloo sums two processes' halves in another order than XLA those of one: float32 rounding over
    # 30 steps; test_loop.py compares meshes so.
    np.testing.assert_allclose(pair_losses, one_losses, rtol=0, atol=1e-5)


def test_a_launch_starts_no_device_and_asks_for_no_folder_of_the_cluster() -> None:
    """A GPU's memory would be taken from the processes of `--on=local`."""
    code = """
        import sys
        from jax._src.xla_bridge import backends_are_initialized
        from gptjax.cli import main

        for words in (
            "train --config.data.tokenizer=/there/tokens",
            "train --branch=/there/run@5 --workdir=/there/b --config.train.steps=9",
            "train --from=/there/model",
            "eval --workdir=/there/run --config.eval.stride=5",
            "study experiments/positions.py",
            "noise",
        ):
            assert main([*words.split(), "--on=slurm", "--dry_run"]) == 0, words
        sys.exit(backends_are_initialized())
    """
    child = Child(code).wait(60)
    assert child.returncode == 0, child.stderr


# -------------------------------------------------------------------------------------------- docs


@pytest.mark.usefixtures("nothing_starts")
def test_the_commands_of_the_page_can_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPO / "docs/clusters.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    launches = [shlex.split(line)[2:] for line in lines if line.startswith("python launch.py")]
    monkeypatch.chdir(REPO)
    assert {
        w.partition("=")[2] for words in launches for w in words if w.startswith("--on=")
    } == set(TARGETS)
    for words in launches:
        assert main([*words, "--dry_run"]) == 0, words
