"""Runs what a study lacks, each cell once, in any number of processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from gptjax import loop, speak
from gptjax.config import UserError
from gptjax.progress import say
from gptjax.records import code_fingerprint, disk, environment, read_environment, replace_file
from gptjax.sharding import make_mesh
from gptjax.study.results import (
    FAILED,
    SAMPLE,
    Outcome,
    Results,
    check_alike,
    made_by,
    outcome,
    read,
)
from gptjax.study.spec import Cell, Study, tuning_cells

POLL_SECONDS = 2.0  # between two looks at what other processes are running
ENDED = ("finished", "diverged")


def run(study: Study, store: Path) -> Results:
    """Runs every cell that is not there, goes on with those that broke, and reads the results.

    Several processes, on several hosts that share the store, may run the same study or others:
    each takes cells that nobody holds. A cell that diverged is left as it is; one that failed is
    tried once more.

    Raises:
        Stopped: on SIGTERM or Ctrl-C, once the running cell is saved.
        UserError: if finished cells were made by other code, or some cell cannot run.
    """
    failures = _run(study, [cell for cell, _ in tuning_cells(study)], store)
    results = read(study, store)
    failures += _run(study, [o.cell for o in results.outcomes], store)
    if failures:
        raise UserError(
            f"{len(failures)} cells could not run; the first, {failures[0].cell.label}: "
            f"{failures[0].reason}. Mend it and run the same command again"
        )
    return read(study, store)


def _run(study: Study, cells: Sequence[Cell], store: Path) -> list[Outcome]:
    """Runs `cells`; returns those that failed."""
    tried: dict[str, Cell] = {}
    waiting = False
    while True:
        outcomes = [outcome(study, cell, store) for cell in cells]
        _made_by_this_code(outcomes)
        todo = [o.cell for o in outcomes if o.status not in ENDED and o.cell.address not in tried]
        if not todo:
            return [o for o in outcomes if o.status == "failed"]
        ran = False
        for cell in todo:
            with _claim(store, cell) as mine:
                if mine and outcome(study, cell, store).status not in ENDED:
                    say(f"[{cells.index(cell) + 1}/{len(cells)}] {cell.label}")
                    tried[cell.address] = cell
                    train(cell, store / cell.address)
                    ran = True
        if not ran:
            if not waiting:
                say(f"waiting for {len(todo)} cells that other processes run")
            waiting = True
            time.sleep(POLL_SECONDS)


def train(cell: Cell, folder: Path) -> None:
    """Runs or goes on with one cell; what ends it early is written into its folder."""
    (folder / FAILED).unlink(missing_ok=True)
    try:
        vocabulary = loop.load_tokenizer(cell.config)
        speak.check(cell.config, vocabulary)
        with jax.set_mesh(make_mesh(cell.config.mesh)):
            params = loop.train(cell.config, folder)
            if params is not None and cell.seed == 0 and not (folder / SAMPLE).exists():
                texts = speak.generate(loop.settle(cell.config), params, vocabulary)
                with disk(folder):
                    replace_file(folder / SAMPLE, "\n".join(texts).encode())
    except loop.Diverged as error:
        say(f"{folder}: {error}")
        with disk(folder):
            error.write(folder)
    except UserError as error:
        say(f"{folder}: {error}")
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / FAILED, json.dumps({"reason": str(error)}).encode())


@contextlib.contextmanager
def _claim(store: Path, cell: Cell) -> Iterator[bool]:
    """Holds a cell for as long as the context lasts, or tells that another process holds it.

    The lock is the operating system's and falls with the process, however that ends.
    """
    locks = store / ".locks"
    with disk(store):
        locks.mkdir(parents=True, exist_ok=True)
        file = (locks / cell.address).open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _made_by_this_code(outcomes: Sequence[Outcome]) -> None:
    """Refuses to add runs to those of other code, before any hour is spent."""
    check_alike(outcomes)
    now = made_by({"code": code_fingerprint(), "versions": environment()["versions"]})
    for o in outcomes:
        for record in read_environment(o.folder)[-1:]:
            for name, then in made_by(record).items():
                if then != now[name]:
                    raise UserError(
                        f"{o.folder} ({o.cell.label}) was run with another {name}, {then[:12]}, "
                        f"than this, {now[name][:12]}: their results would not compare. Remove "
                        "it, or use another --store"
                    )
