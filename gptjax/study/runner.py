"""Runs what a study lacks, each cell once, in any number of processes."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence

import jax

from gptjax import loop, setup, speak, trained
from gptjax.checkpoint import Busy
from gptjax.config import LESS_MEMORY, Config, UserError, out_of_memory
from gptjax.locks import Held, Lock
from gptjax.progress import say
from gptjax.records import BEGUN, DIVERGED, FAILED, read_environment
from gptjax.sharding import make_mesh
from gptjax.signals import undone
from gptjax.storage import Place, disk, patient, replace_file
from gptjax.study import store as cells_store
from gptjax.study.results import ENDED, SAMPLE, Outcome, Results, check_alike, outcome, read
from gptjax.study.spec import Cell, Study, beginning, tuning_cells
from gptjax.study.store import (
    code_and_versions,
    computation_recorded,
    current_code_and_versions,
)

POLL_SECONDS = 2.0  # between two looks at what other processes are running
ERRORS = (UserError, MemoryError, jax.errors.JaxRuntimeError)  # that `_reason` looks into


class Failed(UserError):
    """Some cells could not run; the others did."""


class Elsewhere(Exception):
    """Other processes have what is left to run."""


@patient()
def run_study(study: Study, store: Place, worker: bool = False) -> Results:
    """Runs every cell that is not there, goes on with those that broke, and reads the results.

    Several processes, on several hosts that share the store, may run the same study or others:
    each takes cells that nobody holds. A cell that diverged is left as it is; one that failed is
    tried once more.

    Args:
        study: what is asked.
        store: the folder of all cells.
        worker: ends, where others have all that is left, rather than wait for them.

    Raises:
        Elsewhere: to a worker; the process that ends the last cell is told of none.
        Stopped: on SIGTERM or Ctrl-C, once the running cells are saved.
        Failed: if some cell cannot run, once all others have.
        UserError: if cells were made by other code that did not record what it computes.
    """
    failures = _run(study, [cell for cell, _ in tuning_cells(study)], store, worker)
    results = read(study, store, now=True)
    failures += _run(study, [o.cell for o in results.outcomes], store, worker)
    if failures:
        raise Failed(
            f"{len(failures)} cells could not run; the first, {failures[0].cell.label}: "
            f"{failures[0].reason}. Mend it and run the same command again"
        )
    complete = read(study, store, now=True)
    for o in complete.outcomes:
        with _claim(store, o.folder) as locked:
            # One that was killed between its last checkpoint and its sample.
            if locked and o.status == "finished":
                _sample(o)
    return complete


def _run(study: Study, cells: Sequence[Cell], store: Place, worker: bool) -> list[Outcome]:
    """Runs `cells`; returns those that failed."""
    begin, tried = beginning(study), set[Place]()
    waiting = False
    while True:
        outcomes = [outcome(study, cell, store, now=True) for cell in cells]
        check_alike(outcomes)
        todo = [o for o in outcomes if o.status not in ENDED and o.folder not in tried]
        if not todo:
            return [o for o in outcomes if o.status == "failed"]
        _refuse_other_code(outcomes)
        ran = undecided = False
        for o in sorted(todo, key=_setbacks):
            with _claim(store, o.folder) as locked:
                undecided |= locked is None
                current = outcome(study, o.cell, store, now=True)
                # Another process may have ended it, or begun it by other code.
                if locked and current.folder == o.folder and current.status not in ENDED:
                    say(f"[{cells.index(o.cell) + 1}/{len(cells)}] {o.cell.label}")
                    for other, names in cells_store.other_computations(o.cell, store).items():
                        say(f"{other} stays: it differs in {', '.join(names)}")
                    try:
                        train_cell(o, begin)
                    except Busy as error:  # by a `train` in that folder
                        say(str(error))
                        continue
                    tried.add(o.folder)
                    _sample(o)
                    ran = True
        if not ran:
            if worker and not undecided:
                say(f"other processes run the {len(todo)} cells that are left, and will report")
                raise Elsewhere
            if not waiting:
                say(f"waiting for {len(todo)} cells that other processes run")
            waiting = True
            time.sleep(POLL_SECONDS)


def _setbacks(o: Outcome) -> tuple[bool, int]:
    """By which cells are sorted: what failed before comes last, so that it keeps no other from
    running; behind it what was killed, maybe by the system because it takes too much memory."""
    failed, times = (o.folder / FAILED).exists(), kills(o.folder)
    return failed or times > 0, times


def train_cell(o: Outcome, begin: setup.Start | None = None) -> None:
    """Runs or goes on with a cell; what ends it is in its folder.

    Args:
        begin: what it begins with, where not at random.

    Raises:
        Stopped: as `loop.train`.
        Busy: if another process trains there.
    """
    (o.folder / FAILED).unlink(missing_ok=True)

    def not_begun() -> None:  # which a kill leaves out
        (o.folder / BEGUN).unlink(missing_ok=True)

    with undone(not_begun):
        _train_cell(o.folder, o.cell.config, begin)


def _train_cell(folder: Place, config: Config, begin: setup.Start | None) -> None:
    try:
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / BEGUN, b"." * (kills(folder) + 1))
        # Else found out after the training.
        speak.check_sample(config, setup.load_tokenizer(config))
        mesh = make_mesh(config.mesh)
        if not read_environment(folder):
            initial = "" if begin is None else begin.fingerprint
            cells_store.write(folder, config, mesh, initial)
        with jax.set_mesh(mesh):
            loop.train(config, folder, begin)
    except Busy:
        raise
    except loop.Diverged as error:
        say(f"{folder}: {error}")
        with disk(folder):
            error.write(folder)
    except ERRORS as error:
        if (reason := _reason(error)) is None:
            raise
        say(f"{folder}: {reason}")
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / FAILED, json.dumps({"reason": reason}).encode())


def kills(folder: Place) -> int:
    """How many times in a row the process that trained a cell was killed."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return len((folder / BEGUN).read_bytes())
    return 0


def _reason(error: Exception) -> str | None:
    """Why a cell failed, in a line; None of an error that is no matter of the cell."""
    if isinstance(error, UserError):
        return str(error)
    if words := out_of_memory(error):
        return f"{words}: {LESS_MEMORY}"
    return None


def _sample(o: Outcome) -> None:
    """Lets the first seed of what has finished speak, once, for the report."""
    if o.cell.seed or any((o.folder / file).exists() for file in (FAILED, DIVERGED, SAMPLE)):
        return
    try:
        opened = speak.opened(trained.Trained(o.folder, o.cell.config))
        # Shown with the progress: what a command prints is its answer alone.
        with opened as speaker, contextlib.redirect_stdout(sys.stderr):
            texts = speak.generate(*speaker)
    except ERRORS as error:  # a sample decides nothing, and must stop no other cell
        if (reason := _reason(error)) is None:
            raise
        texts = [f"no sample: {reason}"]
        say(f"{o.folder}: {texts[0]}")
    with disk(o.folder):
        replace_file(o.folder / SAMPLE, "\n".join(texts).encode())


@contextlib.contextmanager
def _claim(store: Place, folder: Place) -> Iterator[bool | None]:
    """Holds a cell for as long as the context lasts, or tells that another process has it.

    None: it is not known yet whether that process still lives; ask again.
    """
    locked: bool | None = True
    with contextlib.ExitStack() as stack:
        try:
            with disk(store):
                stack.enter_context(Lock(store / ".locks" / folder.name))
        except Held as held:
            locked = False if held.certain else None
        yield locked


@contextlib.contextmanager
def reporting(study: Study, store: Place) -> Iterator[None]:
    """Lets processes that end a study together report it one after the other."""
    while True:
        with _claim(store, store / f"report.{study.name}") as locked:
            if locked:
                yield
                return
        time.sleep(POLL_SECONDS)


def _refuse_other_code(outcomes: Sequence[Outcome]) -> None:
    """Refuses to add runs to those of other code that did not record what it computes."""
    current = current_code_and_versions()
    for o in outcomes:
        for record in [] if computation_recorded(o.folder) else read_environment(o.folder)[-1:]:
            for name, was in code_and_versions(record).items():
                if was != current[name]:
                    raise UserError(
                        f"{o.folder} ({o.cell.label}) was run with another {name}, {was[:12]}, "
                        f"than this, {current[name][:12]}, and did not record what it computes: "
                        "whether the results would compare cannot be told. Remove it, or use "
                        "another --store"
                    )
