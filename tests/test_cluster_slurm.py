"""On a real Slurm: started here, on loopback, with two nodes on this host.

Its munge and its files are of its own, in a temporary folder; whatever Slurm the host has is left
alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptjax import status
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.cli import main
from gptjax.study.results import read
from tests import tiny
from tests.child import REPO, free_port
from tests.test_loop import timeless
from tests.test_study_runner import begun, starts

pytestmark = pytest.mark.slow

DAEMONS = ("munged", "slurmctld", "slurmd")
# A job that is queued again waits until its credential has expired, two minutes if nothing is said.
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=30
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=1
ReturnToService=2
KillWait=5
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=4 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# Runs gptjax, but lets the first start of a job train slowly enough to be told of its limit.
SLOW = """
import os, sys, time
sys.path.insert(0, {repo!r})
from gptjax import cli, loop
if "SLURM_RESTART_COUNT" not in os.environ:
    load_batch = loop.load_batch
    loop.load_batch = lambda *where: (time.sleep(1), load_batch(*where))[1]
sys.exit(cli.main())
"""


def wait_for(what: Callable[[], object], seconds: float, told: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def queued() -> list[str]:
    """The jobs that wait or run; of those of an array, the array."""
    done = subprocess.run(
        ["squeue", "--noheader", "--format=%F"], capture_output=True, text=True, check=False
    )
    return done.stdout.split()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a Slurm that runs."""
    if missing := [name for name in DAEMONS if shutil.which(name) is None]:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons run as root")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    ports = [free_port() for _ in range(2)]
    (folder / "slurm.conf").write_text(
        CONF.format(host=host, folder=folder, port=free_port(), ports=ports)
    )
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    socket_file = f"--socket={folder}/munge.socket"
    commands = [
        ["munged", "--foreground", "--force", socket_file, *files],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "n0"],
        ["slurmd", "-D", "-N", "n1"],
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    with pytest.MonkeyPatch.context() as patch, (folder / "said").open("wb") as said:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setattr(sys, "argv", [str(REPO / "launch.py")])
        try:
            for command in commands:
                daemons.append(subprocess.Popen(command, stdout=said, stderr=said))
                if command[0] == "munged":
                    wait_for((folder / "munge.socket").exists, 20, (folder / "said").read_text)

            def up() -> bool:
                nodes = subprocess.run(
                    ["sinfo", "--noheader", "--Node", "--format=%T"], capture_output=True
                )
                return nodes.stdout.split() == [b"idle", b"idle"]

            wait_for(up, 60, (folder / "said").read_text)
            yield folder
        finally:
            # A test that failed leaves jobs, which would outlive the daemons.
            subprocess.run(["scancel", "--user=root"], check=False)
            deadline = time.monotonic() + 20
            while queued() and time.monotonic() < deadline:
                time.sleep(0.2)
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in reversed(daemons):
                daemon.wait(30)


def site(folder: Path, **fields: object) -> str:
    path = folder / "site.toml"
    # JSON's texts, numbers and lists of texts are TOML's.
    path.write_text("".join(f"{name} = {json.dumps(v)}\n" for name, v in fields.items()))
    return f"--site={path}"


def submitted(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The number of the job that a launch submits."""
    capfd.readouterr()
    assert main([*words, "--on=slurm"]) == 0
    return capfd.readouterr().out.split()[-1]


def ended(job: str, seconds: float) -> None:
    """Waits until a job is no longer queued or running."""

    def told() -> str:
        logs = [file.read_text() for file in Path().glob("slurm-*.out")]
        return "\n".join([asked("scontrol", "show", "job", job), *logs])

    wait_for(lambda: job not in queued(), seconds, told)


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """XLA_FLAGS of processes with a device each; jobs begin in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    tiny.devices()  # this process's own eight, before the flags are those of others
    monkeypatch.setenv("XLA_FLAGS", tiny.environment(1)["XLA_FLAGS"])
    return os.environ["XLA_FLAGS"]


def test_a_job_is_told_of_its_limit_and_goes_on_and_a_study_is_an_array(
    slurm: Path, text: Path, tmp_path: Path, flags: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both at once, since Slurm looks for limits every half a minute only."""
    (tmp_path / "slow.py").write_text(SLOW.format(repo=str(REPO)))
    knobs = {"train__steps": 60, "train__eval_every": 20, "train__checkpoint_every": 50}
    words = [f"--config={tiny.RECIPE}", *tiny.overrides(text, **knobs)]
    # A start may take a minute. It is told at the first look after 20 seconds: 10 before the end,
    # and half a minute earlier since the next look would come too late.
    particulars = site(
        tmp_path,
        time="00:01:00",
        notice=10,
        program=[sys.executable, str(tmp_path / "slow.py")],
        environment=[f"JAX_COORDINATOR_ADDRESS=127.0.0.1:{free_port()}", f"XLA_FLAGS={flags}"],
    )
    job = submitted(capfd, "train", *words, "--workdir=queued", "--processes=2", particulars)
    array = submitted(
        capfd, "study", "asked.py", *study_of(text, tmp_path, "array"), "--processes=2"
    )

    assert main(["train", *words, "--workdir=through", "--on=local", "--processes=2"]) == 0
    assert main(["study", "asked.py", *study_of(text, tmp_path, "one")]) == 0
    ended(array, 100)
    assert table(text, Path("array")) == table(text, Path("one"))
    assert (tmp_path / "array/out/report.md").is_file()
    cells = [starts(tmp_path / name / "cells") for name in ("array", "one")]
    assert cells[0] == cells[1] and set(cells[0].values()) == {1}
    logs = [(tmp_path / f"slurm-{array}_{i}.out").read_text() for i in range(2)]
    assert all(begun(log) for log in logs), logs  # both had a part
    assert sum("the report: " in log for log in logs) >= 1
    ended(job, 150)
    log = (tmp_path / f"slurm-{job}.out").read_text()
    assert "SIGTERM caught" in log and "saved: run the same command to go on" in log
    assert "queued: resumed at step" in log
    assert timeless(tmp_path / "queued") == timeless(tmp_path / "through")


def study_of(text: Path, folder: Path, name: str) -> list[str]:
    """The words of the study in asked.py, whose files are all below `name`."""
    (folder / "asked.py").write_text(
        "from gptjax.study.spec import Study\n"
        f"STUDY = Study('?', {tiny.RECIPE!r}, {tiny.ARMS!r}, seeds=2)\n"
    )
    return [f"--store={name}/cells", f"--out={name}/out", *tiny.overrides(text)]


def table(text: Path, folder: Path) -> list[Any]:
    """All that a study's table is made of, to the last bit, but for speeds."""
    outcomes = read(tiny.study(text, seeds=2), folder / "cells").outcomes
    return [(o.cell.label, o.status, o.metric, o.curve[1].tolist()) for o in outcomes]


# Stands in for a command whose first task saves when it is told to stop, and whose second fails.
TASKS = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if sys.argv[1:3] == ["train", "--workdir=fails"] and os.environ["SLURM_PROCID"] == "1":
    sys.exit(2)
Path(f"begun.{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_PROCID']}").touch()
time.sleep(100)
"""


def test_a_job_whose_task_fails_ends_and_so_does_one_that_is_cancelled(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither goes back into the queue, though some task of each has saved."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.py").write_text(TASKS)
    told = [site(tmp_path, program=[sys.executable, str(tmp_path / "tasks.py")]), "--processes=2"]
    fails, cancelled = (
        submitted(capfd, "train", f"--workdir={name}", f"--config={tiny.RECIPE}", *told)
        for name in ("fails", "cancelled")
    )
    held = submitted(
        capfd, *("train", "--workdir=some where/held", f"--config={tiny.RECIPE}"),
        site(tmp_path, options=["--hold"]),
    )  # fmt: skip
    wait_for(lambda: len(list(tmp_path.glob(f"begun.{cancelled}.*"))) == 2, 60, lambda: "no start")
    seen = {s.run: (s.state, s.job) for s in status.statuses(tmp_path)}
    assert seen["some where/held"] == ("queued", f"Slurm job {held}: pending, JobHeldUser")
    assert seen["cancelled"] == ("running", f"Slurm job {cancelled}: running, n[0-1]")
    asked("scancel", held)
    asked("scancel", cancelled)
    ended(fails, 60)
    ended(cancelled, 60)
    for job, state in ((fails, "FAILED"), (cancelled, "CANCELLED")):
        shown = asked("scontrol", "show", "job", job)
        assert f"JobState={state}" in shown and "Restarts=0" in shown


def processes_of(node: str, folder: Path) -> dict[int, str]:
    """What runs on a node of this Slurm, {number: name}: its daemon, steps and tasks."""
    found: dict[int, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = set((process / "environ").read_bytes().split(b"\0"))
            if f"SLURM_CONF={folder}/slurm.conf".encode() not in variables:
                continue
            status = (process / "status").read_text()
            if words[:4] == [b"slurmd", b"-D", b"-N", node.encode()]:
                found[int(process.name)] = "slurmd"
            elif f"SLURMD_NODENAME={node}".encode() in variables:
                parent = int(re.search(r"PPid:\t(\d+)", status)[1])
                found[int(process.name)] = "task"
                if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                    found[parent] = "step"
    return found


def test_a_node_disappears_and_the_job_goes_on_once_it_is_back(
    slurm: Path,
    text: Path,
    tmp_path: Path,
    flags: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """That of the batch script and the coordinator, with all that runs there. Slurm queues the job
    again by itself. The last of these tests: the node goes with it.
    """
    (tmp_path / "slow.py").write_text(SLOW.format(repo=str(REPO)))
    words = [f"--config={tiny.RECIPE}", *tiny.overrides(text, train__steps=20)]
    particulars = site(
        tmp_path,
        program=[sys.executable, str(tmp_path / "slow.py")],
        environment=[f"JAX_COORDINATOR_ADDRESS=127.0.0.1:{free_port()}", f"XLA_FLAGS={flags}"],
    )
    assert main(["train", *words, "--workdir=through", "--on=local", "--processes=2"]) == 0
    job = submitted(capfd, "train", *words, "--workdir=queued", "--processes=2", particulars)

    def trained() -> bool:
        return Checkpoints(Path("queued") / CHECKPOINTS).latest() is not None

    log = tmp_path / f"slurm-{job}.out"
    wait_for(trained, 300, log.read_text)
    killed, begin = processes_of("n0", slurm), time.monotonic()
    assert set(killed.values()) == {"slurmd", "step", "task"}
    for number in killed:
        os.kill(number, signal.SIGKILL)

    def waits() -> bool:
        """Slurm knows that the node is lost, and has queued the job again."""
        nodes = asked("sinfo", "--noheader", "--Node", "--format=%N %t")  # "n0 down*"
        job_state = asked("squeue", "--noheader", "--format=%T", f"--job={job}").strip()
        return "n0 down" in nodes and job_state == "PENDING"

    wait_for(waits, 300, log.read_text)
    with capfd.disabled():
        print(f"\nn0 killed: queued again after {time.monotonic() - begin:.0f} s")
    daemon = subprocess.Popen(["slurmd", "-D", "-N", "n0"])
    try:
        ended(job, 150)
    finally:
        daemon.terminate()
        daemon.wait(30)
    assert "queued: resumed at step" in log.read_text()
    assert timeless(tmp_path / "queued") == timeless(tmp_path / "through")
