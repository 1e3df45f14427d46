"""This host: as many processes of it as are asked for, each with its share of the GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import IO

from gptjax.cluster.job import Job, this_program
from gptjax.config import EXIT_STOPPED, UserError

GRACE_SECONDS = 15.0  # in which the others may end by themselves, once a process has failed
POLL_SECONDS = 0.05
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that processes hear as SIGTERM


@dataclasses.dataclass(frozen=True)
class Site:
    """This host has no particulars: its environment is the processes'."""


def script(job: Job, site: Site) -> str:
    """The processes as a shell would start them."""
    lines = []
    for command, variables in _processes(job):
        settings = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        lines.append(" ".join([*settings, shlex.join(command), "&"]))
    return "\n".join([*lines, "wait", ""])


def _processes(job: Job) -> list[tuple[list[str], dict[str, str]]]:
    """The words of each, and what its environment has beside this process's."""
    gpus, count = visible_gpus(), job.processes
    if gpus and len(gpus) % count:
        fitting = [str(n) for n in range(1, len(gpus) + 1) if len(gpus) % n == 0]
        raise UserError(
            f"--processes={count} cannot share {len(gpus)} GPUs: use {' or '.join(fitting)}, or "
            "JAX_PLATFORMS=cpu"
        )
    address, share = f"127.0.0.1:{_free_port()}", len(gpus) // count
    processes = []
    for i in range(count):
        variables = {}
        if gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i * share : (i + 1) * share])
            # Of these all: on a node of Slurm's, jax would take one.
            variables["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(share)))
        meet = f"--distributed={address},{count},{i}"
        processes.append((job.command(this_program(), meet), variables))
    return processes


def visible_gpus() -> list[str]:
    """The GPUs that processes may use, as CUDA_VISIBLE_DEVICES names them; jax is not asked, which
    would take them."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if (names := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in names.split(",") if name not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, check=False)
    lines = [line for line in listed.stdout.splitlines() if line.startswith(b"GPU ")]
    return [str(i) for i in range(len(lines))]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(job: Job, site: Site) -> int:
    """Runs the processes to their end, and returns the exit status of the whole.

    Ctrl-C, SIGTERM and the end of a terminal reach all processes as SIGTERM, on which they save and
    stop; the second time they are killed. When a process of one program fails the others, which cannot go on
    without it, are killed after GRACE_SECONDS; workers go on. What processes write to standard error
    has their number before it, but for the first's.

    Returns:
        That of the process that failed first; 75 if they were stopped and have saved; 0.
    """
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    # What nohup and a shell's background ignore stays ignored.
    numbers = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in numbers}
    children: list[subprocess.Popen[bytes]] = []
    writers: list[threading.Thread] = []
    try:
        for i, (command, variables) in enumerate(_processes(job)):
            child = subprocess.Popen(
                command,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if i else None,
                stderr=subprocess.PIPE if i else None,
                process_group=0,  # what a terminal sends comes once, by `hear`
            )
            children.append(child)
            for pipe, stream, mark in (
                (child.stdout, sys.stdout, ""),
                (child.stderr, sys.stderr, f"[{i}] "),
            ):
                if pipe is not None:
                    writers.append(threading.Thread(target=_copy, args=(pipe, stream, mark)))
                    writers[-1].start()
        return _end(job, children, heard)
    finally:
        for child in children:
            child.kill()
            child.wait()
        for writer in writers:
            writer.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(job: Job, children: list[subprocess.Popen[bytes]], heard: list[int]) -> int:
    """Waits for all to end, and passes on what is heard meanwhile."""
    passed_on, failed, deadline = 0, None, float("inf")
    while None in (codes := [child.poll() for child in children]):
        while passed_on < len(heard):
            for child in children:
                child.send_signal(signal.SIGKILL if passed_on else signal.SIGTERM)
            passed_on += 1
        failed = failed or _failed(codes)
        if failed and job.together and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(POLL_SECONDS)
    if failed := failed or _failed(codes):
        i, code = failed
        how = (
            f"ended with status {code}"
            if code > 0
            else f"was killed by {signal.Signals(-code).name}"
        )
        print(f"gptjax: process {i} of {job.processes} {how}", file=sys.stderr)
        return code if code > 0 else 128 - code
    return EXIT_STOPPED if EXIT_STOPPED in codes else 0


def _failed(codes: list[int | None]) -> tuple[int, int] | None:
    """The first process that has failed, and how."""
    return next(((i, c) for i, c in enumerate(codes) if c and c != EXIT_STOPPED), None)


def _copy(pipe: IO[bytes], stream: IO[str], mark: str) -> None:
    for line in pipe:
        with contextlib.suppress(OSError):  # whoever read has gone: the process must not wait
            stream.write(f"{mark}{line.decode(errors='replace')}")
            stream.flush()
