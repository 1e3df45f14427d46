"""SIGTERM while nothing trains, wherever the main thread is: each command is a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from gptjax.config import EXIT_STOPPED
from gptjax.records import BEGUN
from gptjax.signals import again_on_sigterm
from tests import tiny
from tests.child import REPO, Child, free_port

# Says that it is there, and stays.
STAYS = """
    import hashlib, sys, time
    import jax
    from gptjax import loop, setup, speak
    from gptjax.cli import main
    from gptjax.commands import runs

    before = {function}

    def stays(*args, **kwargs):
        print("here", flush=True)
        {stay}

    {function} = stays
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("function", "stay"),
    [
        ("runs.prepare_jax", "time.sleep(60)"),  # as importing does, in Python
        ("jax.distributed.initialize", "before(*args, **kwargs)"),  # nobody else comes
        # As compiling does: for minutes in C, which gives way to no handler.
        ("loop.compile_step", "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"),
        ("speak.generate", "time.sleep(60)"),  # the sample of a finished run
    ],
)
def test_sigterm_while_nothing_trains_means_again(
    function: str, stay: str, text: Path, tmp_path: Path
) -> None:
    meet = [f"--distributed=localhost:{free_port()},2,1"] * function.startswith("jax")
    child = Child(
        STAYS.format(function=function, stay=stay),
        *("train", f"--config={tiny.RECIPE}", f"--workdir={tmp_path / 'run'}", *meet),
        *tiny.overrides(text),
    )
    assert next(child.lines("stdout")) == "here\n", child.stderr
    time.sleep(0.5)  # by now it is in C
    child.signal(signal.SIGTERM)
    assert child.wait(20).returncode == EXIT_STOPPED, child.stderr
    said = [line for line in child.stderr.splitlines() if line.startswith("gptjax: ")]
    assert said == ["gptjax: SIGTERM while nothing trains: the same command goes on"]


@pytest.mark.parametrize(
    ("function", "stay"),
    [
        ("setup.load_tokenizer", "time.sleep(60)"),
        ("loop.compile_step", "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"),
    ],
)
def test_sigterm_while_a_run_of_a_study_sets_up_is_no_kill(
    function: str, stay: str, text: Path, tmp_path: Path
) -> None:
    """A kill would put the run behind all others, as one that may need too much memory."""
    child = Child(
        STAYS.format(function=function, stay=stay),
        *("study", f"--config={tiny.RECIPE}", "--axis=optim.peak_lr=1e-3,2e-3"),
        *("--seeds=1", f"--store={tmp_path}", *tiny.overrides(text)),
    )
    assert next(child.lines("stdout")) == "here\n", child.stderr
    assert len(list(tmp_path.glob(f"*/{BEGUN}"))) == 1
    time.sleep(0.5)
    child.signal(signal.SIGTERM)
    assert child.wait(20).returncode == EXIT_STOPPED, child.stderr
    assert not list(tmp_path.glob(f"*/{BEGUN}"))


def test_sigterm_while_the_interpreter_shuts_down_changes_no_status(tmp_path: Path) -> None:
    code = """
        import atexit, sys, time
        from gptjax.cli import main

        atexit.register(time.sleep, 2)
        atexit.register(print, "ending", flush=True)
        sys.exit(main())
    """
    words = [sys.executable, "-c", textwrap.dedent(code), "status", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=REPO) as process:
        assert process.stdout is not None
        while process.stdout.readline() not in ("ending\n", ""):
            pass
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def test_whoever_hears_it_meanwhile_is_left_to_it() -> None:
    heard: list[int] = []
    before, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    with again_on_sigterm():
        signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
    assert heard == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before
    time.sleep(0.1)
    assert threading.active_count() == threads
