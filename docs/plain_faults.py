"""What a fault does to `train`, and to a plain loop of optax and orbax in the same place, measured.

    sudo .venv/bin/python docs/plain_faults.py

Each fault hits a real process of either: a signal, a mount, a flipped bit, a batch of NaN. The plain
loop is `plain` below: the same number of parameters, AdamW, and orbax's CheckpointManager with its
defaults. Printed as a table are the exit status, the seconds from the fault to the end of the process
(of faults that lie in wait, from its start), its last words, and what the next start does. Mounts
take root; the folders lie in TMPDIR.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).parents[1]
EVERY = 20  # steps between two saves
STEPS = 100  # of a run that is not endless
FLIPS = 10


def plain(folder: str, steps: str, rate: str, nan_at: str) -> None:
    """The loop that anybody would write."""
    import jax
    import jax.numpy as jnp
    import optax
    import orbax.checkpoint as ocp

    def loss_of(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - x) ** 2)

    optimizer = optax.adamw(float(rate))
    params = {"w": jnp.full((512, 512), 0.01), "v": jnp.full((512, 512), 0.01)}
    state = (params, optimizer.init(params))

    @jax.jit
    def step_of(state, x):
        loss, grads = jax.value_and_grad(loss_of)(state[0], x)
        updates, moments = optimizer.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), moments), loss

    options = ocp.CheckpointManagerOptions(save_interval_steps=EVERY, max_to_keep=2)
    with ocp.CheckpointManager(Path(folder).absolute(), options=options) as manager:
        if (start := manager.latest_step()) is not None:
            state = manager.restore(start, args=ocp.args.StandardRestore(state))
            print(f"resumed at step {start}", file=sys.stderr)
        for step in range((start or 0) + 1, int(steps) + 1):
            x = jax.random.normal(jax.random.key(step), (64, 512))
            state, loss = step_of(state, x * jnp.nan if step == int(nan_at) else x)
            print(f"step {step} loss {loss}", file=sys.stderr)
            manager.save(step, args=ocp.args.StandardSave(state))


class Program(NamedTuple):
    """How to start a run: of a folder, steps, a learning rate, and the step of a batch of NaN."""

    name: str
    words: Callable[[Path, int, str, int], list[str]]


# What is fed at one step is multiplied by NaN: in `train` the weights of the targets.
OURS = """
import sys
from gptjax import cli, loop
load = loop.load_batch
def planted(setup, step):
    batch = load(setup, step)
    return batch._replace(weights=batch.weights * float("nan")) if step + 1 == {nan_at} else batch
loop.load_batch = planted
sys.exit(cli.main())
"""


def ours(folder: Path, steps: int, rate: str, nan_at: int) -> list[str]:
    knobs = {
        "model.layers": 2, "model.width": 128, "model.context": 64, "data.tokenizer": "bytes",
        "data.batch_size": 8, "optim.peak_lr": rate, "optim.schedule": "constant",
        "optim.warmup_steps": 1, "train.steps": steps, "train.log_every": 1, "train.eval_every": 10**6,
        "train.checkpoint_every": EVERY, "eval.max_tokens": 512, "sample.max_new_tokens": 1,
    }  # fmt: skip
    words = [f"--config.{name}={value}" for name, value in knobs.items()]
    code = OURS.format(nan_at=nan_at)
    return ["-c", code, "train", "--config=configs/shakespeare.py", f"--workdir={folder}", *words]


def theirs(folder: Path, steps: int, rate: str, nan_at: int) -> list[str]:
    return [__file__, "plain", str(folder), str(steps), rate, str(nan_at)]


PROGRAMS = (Program("ours", ours), Program("plain", theirs))
ENDLESS = 10**6


class Ran(NamedTuple):
    status: int
    seconds: float
    said: str


class Run:
    """A process of a program, whose words are kept."""

    def __init__(
        self,
        program: Program,
        folder: Path,
        steps: int = STEPS,
        rate: str = "1e-3",
        nan_at: int = -1,
    ) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._begin = time.monotonic()
        words = [sys.executable, *program.words(folder, steps, rate, nan_at)]
        self.process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=self._said, cwd=REPO
        )

    @property
    def said(self) -> str:
        self._said.seek(0)
        return self._said.read()

    def until(self, happened: Callable[[str], object]) -> None:
        while not happened(self.said):
            if self.process.poll() is not None:
                raise RuntimeError(self.said)
            time.sleep(0.002)

    def end(self, since: float | None = None, seconds: float = 120) -> Ran:
        self.process.wait(seconds)
        return Ran(self.process.returncode, time.monotonic() - (since or self._begin), self.said)


def last_step(said: str) -> int:
    return max(map(int, re.findall(r"^step +(\d+) +loss", said, re.MULTILINE)), default=0)


def resumed(said: str) -> int:
    return int(next(iter(re.findall(r"resumed at step (\d+)", said)), 0))


def ended(ran: Ran) -> str:
    lines = [line for line in ran.said.splitlines() if line.strip()] or [""]
    words = re.sub(r"/\S*/", "", lines[-1])[:110]
    trace = f" after {len(lines)} lines" if "Traceback" in ran.said else ""
    return f"status {ran.status}, {ran.seconds:.1f} s, says{trace}: {words}"


def again(program: Program, folder: Path, before: int) -> str:
    """What the next start does after a run that had done `before` steps."""
    ran = Run(program, folder, steps=before + 2 * EVERY).end()
    if ran.status:
        return f"the next start fails: {ended(ran)}"
    return f"the next start repeats {before - resumed(ran.said)} steps"


def trained(program: Program, folder: Path) -> None:
    ran = Run(program, folder).end()
    assert ran.status == 0, ran.said


def killed_while_saving(program: Program, folder: Path) -> str:
    run = Run(program, folder, ENDLESS)
    run.until(lambda said: last_step(said) > 3 * EVERY)
    while not [p for p in folder.rglob("*") if re.search("partial|tmp", p.name)]:
        time.sleep(0.0005)
    begin = time.monotonic()
    run.process.kill()
    ran = run.end(begin)
    return f"{ended(ran)}; {again(program, folder, last_step(ran.said))}"


def told_to_end(program: Program, folder: Path) -> str:
    run = Run(program, folder, ENDLESS)
    run.until(lambda said: last_step(said) % EVERY == EVERY // 2)
    begin = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    ran = run.end(begin)
    return f"{ended(ran)}; {again(program, folder, last_step(ran.said))}"


@contextmanager
def disk(at: Path, size: str) -> Iterator[Path]:
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)


def full_disk(program: Program, folder: Path) -> str:
    with disk(folder, "64m"):
        run = Run(program, folder / "run", ENDLESS)
        run.until(lambda said: last_step(said) > 2 * EVERY + 5)
        begin = time.monotonic()
        with (folder / "other").open("wb", buffering=0) as other:
            try:
                while other.write(bytes(2**12)):
                    pass
            except OSError:
                pass
        ran = run.end(begin)
        (folder / "other").unlink()
        return f"{ended(ran)}; {again(program, folder / 'run', last_step(ran.said))}"


def read_only(program: Program, folder: Path) -> str:
    with disk(folder, "64m"):
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        return ended(Run(program, folder / "run").end())


def largest(folder: Path) -> Path:
    """Of the files of the latest checkpoint."""
    steps = {
        int(p.name): p for p in folder.rglob("*") if re.fullmatch(r"\d+", p.name) and p.is_dir()
    }
    return max(
        (p for p in steps[max(steps)].rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


def flipped(program: Program, folder: Path) -> str:
    trained(program, folder)
    file = largest(folder)
    intact, refused = file.read_bytes(), []
    for n in range(FLIPS):
        content = bytearray(intact)
        content[(2 * n + 1) * len(content) // (2 * FLIPS)] ^= 16
        file.write_bytes(content)
        refused.append(Run(program, folder, STEPS + 5).end())
        if refused[-1].status == 0:
            return f"bit {n + 1} of {FLIPS}: {ended(refused[-1])}"
    return f"all of {FLIPS} refused; {ended(refused[-1])}"


def missing(program: Program, folder: Path) -> str:
    trained(program, folder)
    largest(folder).unlink()
    return ended(Run(program, folder, STEPS + 5).end())


def two_at_once(program: Program, folder: Path) -> str:
    first = Run(program, folder, ENDLESS)
    first.until(lambda said: last_step(said) > EVERY)
    second = Run(program, folder, ENDLESS)
    ends: dict[str, Ran] = {}
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for name, run in (("first", first), ("second", second)):
            if name not in ends and run.process.poll() is not None:
                ends[name] = run.end()
        time.sleep(0.05)
    for run in (first, second):
        run.process.kill()
        run.process.wait()
    told = [f"the {name}: {ended(ran)}" for name, ran in ends.items()]
    on = [name for name in ("first", "second") if name not in ends]
    return "; ".join([*told, *(f"the {name} goes on" for name in on)])


def nan_batch(program: Program, folder: Path) -> str:
    ran = Run(program, folder, nan_at=10).end()
    losses = re.findall(r"^step +\d+ +loss (\S+)", ran.said, re.MULTILINE)
    told = next((line for line in ran.said.splitlines() if "is skipped" in line), "nothing")
    return f"status {ran.status}; the last loss is {losses[-1]}; told: {re.sub(r'/[^ ]*/', '', told)[:110]}"


def other_config(program: Program, folder: Path) -> str:
    trained(program, folder)
    return ended(Run(program, folder, STEPS + 20, rate="1e-2").end())


FAULTS = (
    killed_while_saving, told_to_end, full_disk, read_only, flipped, missing, two_at_once, nan_batch,
    other_config,
)  # fmt: skip


def main(*names: str) -> None:
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as parent:
        trained(PROGRAMS[0], Path(parent, "compiled"))
        for fault in FAULTS:
            if names and fault.__name__ not in names:
                continue
            for program in PROGRAMS:
                found = fault(program, Path(parent, str(next(numbers))))
                print(f"| {fault.__name__} | {program.name} | {found} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain"]:
        plain(*sys.argv[2:])
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        main(*sys.argv[1:])
