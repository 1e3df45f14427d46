"""Runs what a study lacks, each cell once, in any number of processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from gptjax import ensemble, loop, setup, speak, trained
from gptjax.config import Config, UserError
from gptjax.files import disk, replace_file
from gptjax.progress import say
from gptjax.records import CONFIG, code_fingerprint, environment, read_environment
from gptjax.sharding import make_mesh
from gptjax.study.results import (
    ENDED,
    FAILED,
    SAMPLE,
    Outcome,
    Results,
    check_alike,
    made_by,
    outcome,
    read,
)
from gptjax.study.spec import Cell, Study, address, tuning_cells

POLL_SECONDS = 2.0  # between two looks at what other processes are running


class Failed(UserError):
    """Some cells could not run; the others did."""


def run(study: Study, store: Path, together: int = 1) -> Results:
    """Runs every cell that is not there, goes on with those that broke, and reads the results.

    Several processes, on several hosts that share the store, may run the same study or others:
    each takes cells that nobody holds. A cell that diverged is left as it is; one that failed is
    tried once more.

    Args:
        study: what is asked.
        store: the folder of all cells.
        together: so many cells at most train in one program, where they differ in numbers alone
            (`ensemble.VARIED`). One that was begun goes on as it was begun, with its group or
            alone.

    Raises:
        Stopped: on SIGTERM or Ctrl-C, once the running cells are saved.
        Failed: if some cell cannot run, once all others have.
        UserError: if finished cells were made by other code.
    """
    failures = _run(study, [cell for cell, _ in tuning_cells(study)], store, together)
    results = read(study, store)
    failures += _run(study, [o.cell for o in results.outcomes], store, together)
    if failures:
        raise Failed(
            f"{len(failures)} cells could not run; the first, {failures[0].cell.label}: "
            f"{failures[0].reason}. Mend it and run the same command again"
        )
    found = read(study, store)
    for o in found.outcomes:
        with _claim(store, [o.cell.address]) as held:
            # One that was killed between its last checkpoint and its sample.
            if held and o.status == "finished":
                _sample([o.cell], store)
    return found


def _run(study: Study, cells: Sequence[Cell], store: Path, together: int) -> list[Outcome]:
    """Runs `cells`; returns those that failed."""
    tried: set[str] = set()
    waiting = False
    while True:
        outcomes = [outcome(study, cell, store) for cell in cells]
        _made_by_this_code(outcomes)
        todo = [o.cell for o in outcomes if o.status not in ENDED and o.cell.address not in tried]
        if not todo:
            return [o for o in outcomes if o.status == "failed"]
        ran = False
        for group in _groups(todo, store, together):
            here = {address(config): config for config in group}
            mine = [cell for cell in todo if cell.address in here]
            with _claim(store, here) as held:
                if held and any(outcome(study, c, store).status not in ENDED for c in mine):
                    for cell in mine:
                        say(f"[{cells.index(cell) + 1}/{len(cells)}] {cell.label}")
                    tried.update(here)
                    train(here, store)
                    _sample(mine, store)
                    ran = True
        if not ran:
            if not waiting:
                say(f"waiting for {len(todo)} cells that other processes run")
            waiting = True
            time.sleep(POLL_SECONDS)


def _groups(cells: Sequence[Cell], store: Path, together: int) -> Iterator[list[Config]]:
    """What trains in one program each; between them all cells, each once.

    A group that was begun stays as it is, whichever of its members `cells` has, so that what a
    kill broke off gives the same bits as what ran through.
    """
    fresh: dict[str, list[Config]] = {}
    begun: set[str] = set()
    for cell in cells:
        folder = store / cell.address
        if cell.address in begun:
            continue
        if (folder / CONFIG).is_file():
            alone = not (folder / ensemble.ENSEMBLE).is_file()
            group = [cell.config] if alone else ensemble.group_of(folder)[0]
            begun.update(address(config) for config in group)
            yield group
        else:
            alike = cell.address if together == 1 else ensemble.key(cell.config)
            fresh.setdefault(alike, []).append(cell.config)
    for configs in fresh.values():
        left = [config for config in configs if address(config) not in begun]
        for i in range(0, len(left), together):
            yield left[i : i + together]


def train(group: Mapping[str, Config], store: Path) -> None:
    """Runs or goes on with the cells of a group, by address; what ends one is in its folder."""
    folders = [store / name for name in group]
    for folder in folders:
        (folder / FAILED).unlink(missing_ok=True)
    try:
        for config in group.values():  # else found out after the training
            speak.check(config, setup.load_tokenizer(config))
        if len(group) > 1:
            ensemble.train(list(group.values()), folders)
            return
        (config,), (folder,) = group.values(), folders
        with jax.set_mesh(make_mesh(config.mesh)):
            loop.train(config, folder)
    except loop.Diverged as error:
        say(f"{folder}: {error}")
        with disk(folder):
            error.write(folder)
    except UserError as error:
        for folder in folders:
            say(f"{folder}: {error}")
            with disk(folder):
                folder.mkdir(parents=True, exist_ok=True)
                replace_file(folder / FAILED, json.dumps({"reason": str(error)}).encode())


def _sample(cells: Sequence[Cell], store: Path) -> None:
    """Lets the first seed of what has finished speak, once, for the report."""
    for cell in cells:
        folder = store / cell.address
        if cell.seed or any((folder / f).exists() for f in (FAILED, loop.DIVERGED, SAMPLE)):
            continue
        opened = trained.opened(cell.config, folder)
        # Shown with the progress: what a command prints is its answer alone.
        with opened as m, contextlib.redirect_stdout(sys.stderr):
            texts = speak.generate(m.config, m.params, m.tokenizer)
        with disk(folder):
            replace_file(folder / SAMPLE, "\n".join(texts).encode())


@contextlib.contextmanager
def _claim(store: Path, addresses: Iterable[str]) -> Iterator[bool]:
    """Holds cells for as long as the context lasts, or tells that another process has one.

    The lock is the operating system's and falls with the process, however that ends.
    """
    locks = store / ".locks"
    with contextlib.ExitStack() as stack:
        with disk(store):
            locks.mkdir(parents=True, exist_ok=True)
            files = [stack.enter_context((locks / name).open("wb")) for name in addresses]
        try:
            for file in files:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        else:
            held = True
        yield held


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
