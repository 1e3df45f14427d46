"""Checkpoints: orbax writes the arrays, a sha256 manifest makes them trustworthy and complete.

    FOLDER/00000250/               a complete step, on a disk or in a bucket
        state/                     orbax's own folder, arrays keyed by their dotted path
        meta.json                  step, shape and dtype of every array, the caller's meta
        manifest.json              bytes and sha256 of every other file; written last
    FOLDER/00000500.3f9a1c02.partial/  on a disk, a save in flight or the leftover of a killed one
    FOLDER.lock                    who writes there

`gptjax/parts.py` has what each process does in a save. A restore divides the hashing alike, and
reads the arrays by tensorstore, of each what the process holds.

Why not orbax alone (measured on orbax 0.12.8): it restores flipped bits silently, casts
int32 to float32 and float32 to bfloat16 silently, never removes the leftovers of a killed
save, reports a full disk only when somebody waits, refuses s3://, and takes a path for a pattern:
below "runs/a[1-3]" it saves without a word what it can never read. Its
`post_finalization_callback` runs before orbax writes its last two files, so the manifest is made
here, in a thread that waits for orbax and looks that every array is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import jax
import orbax.checkpoint as ocp

from gptjax import locks, manifest, parts, storage
from gptjax.config import UserError
from gptjax.locks import Held, Lock
from gptjax.manifest import MANIFEST, READERS
from gptjax.parts import META, PARTIAL
from gptjax.progress import from_any_process, from_process_0, say
from gptjax.storage import Place, Unreachable

CHECKPOINTS = "checkpoints"  # the folder of the checkpoints in a run's folder

State = TypeVar("State")
logger = logging.getLogger(__name__)


class Busy(UserError):
    """Another process writes in the folder."""


class Checkpoints:
    """The checkpoints of one run, in a folder that all processes share.

    `save`, `latest` and `restore` are collective, and so is making a writer: every process calls
    them in the same order.

    Args:
        folder: where the steps lie; made by the first save.
        keep: how many of the latest complete steps remain after a save. A number also makes
            this object the folder's one writer, which removes what a killed save left there;
            None only reads, and may do so while a run is writing.
        keep_every: complete steps that are multiples of it remain as well, for ever.

    Raises:
        Busy: if there is another writer, in this process or any other; it says which.
        UserError: if the folder cannot be written.
    """

    def __init__(
        self, folder: Place | str, keep: int | None = None, keep_every: int | None = None
    ) -> None:
        self._folder = storage.expand(folder).absolute()
        self._keep, self._keep_every = keep, keep_every
        if (
            isinstance(self._folder, Path)
            and os.path.lexists(self._folder)
            and not self._folder.is_dir()
        ):
            raise UserError(
                f"{self._folder} is no folder, or a link to one that is not there: bring it back, "
                "or remove that name"
            )
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        if keep is not None:
            self._lock = self._hold()
            unsealed = ""
            if jax.process_index() == 0:
                self._remove_incomplete()
                unsealed = max((p.name for p in self._unsealed()), key=int, default="")
            if unsealed := from_process_0(unsealed):
                if self._lock is not None:
                    self._lock.close()
                raise UserError(
                    f"checkpoint {self._folder / unsealed} is damaged: {MANIFEST} is missing. "
                    f"Delete that folder to go on from {self._resumes_from()}"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finishes the save in flight; its failure is raised unless another error is on its way."""
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            logger.error("%s", failure)
        finally:
            self._background.shutdown()
            if self._keep is not None and self._lock is not None:
                self._lock.close()

    @property
    def folder(self) -> Place:
        return self._folder

    def writer(self) -> str:
        """Who writes in the folder now, "process 12 on host, since ..."; "" if nobody does."""
        return locks.holder(self._lock_path)

    def steps(self) -> list[int]:
        """The complete steps as this process sees them, ascending."""
        return sorted(int(path.name) for path in self._step_folders() if (path / MANIFEST).exists())

    def latest(self) -> int | None:
        """The latest complete step as process 0 sees it, or None."""
        step = int(from_process_0(str(max(self.steps(), default=-1))))
        return None if step < 0 else step

    def save(self, step: int, state: Any, meta: Mapping[str, Any], wait: bool = False) -> None:
        """Saves `state`; returns once its buffers may be donated, and writes in the background.

        Args:
            step: names the checkpoint; each step is saved once.
            state: a pytree of jax arrays.
            meta: anything JSON can hold: resolved config, data position, fingerprints.
            wait: return only when the checkpoint is complete.

        Raises:
            UserError: if this or the previous save met a full or failing disk.
            Unreachable: if it met a bucket that is away.
            ValueError: if `step` is saved already, `meta` is not JSON, or `keep` was None; if
                `state` holds no array, or one without an element, which orbax cannot store.
        """
        self.wait()
        if self._keep is None:
            raise ValueError("these Checkpoints only read: pass `keep` to write")
        overtaken = ""
        if self._lock is not None:  # on process 0
            try:
                self._lock.confirm()
                self._remove_incomplete()
            except Held as held:
                overtaken = held.holder
        if overtaken := from_process_0(overtaken):
            raise self._overtaken(step, overtaken)
        if self._final(step).exists():
            raise ValueError(f"step {step} is already saved in {self._folder}")
        arrays = _by_path(state)
        if not arrays:
            raise ValueError("the state holds no array to save")
        if empty := [path for path, array in arrays.items() if array.size == 0]:
            raise ValueError(f"orbax cannot store an array without an element: {empty[0]}")
        description = {"step": step, "tree": _describe(arrays), "meta": meta}
        text = json.dumps(description, indent=1, allow_nan=False)
        # Drawn anew: after a failed write orbax's other threads go on filling its folder. No process
        # goes on before process 0 has drawn it, and removed what was there.
        save = parts.Save(
            self._folder, step, from_process_0(secrets.token_hex(4)), list(arrays), text
        )
        with ExitStack() as stack:
            try:
                scratch = stack.enter_context(save.scratch())
                orbax = save.write(arrays, scratch)
            except Exception as error:
                raise self._failed(save, error) from error
            cleaning = stack.pop_all()
        self._saving = self._background.submit(self._finish, save, orbax, scratch, cleaning)
        if wait:
            self.wait()

    def check(self) -> None:
        """Raises the failure of a background save, once; costs nothing otherwise.

        Raises:
            UserError: if the save met a full or failing disk.
            Unreachable: if it met a bucket that is away.
        """
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Returns when this process's part of the save in flight is done; raises as `check`.

        On process 0 the step is then complete.
        """
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def meta(self, step: int) -> dict[str, Any]:
        """The `meta` saved with `step`, as JSON gives it back (tuples are lists).

        Raises:
            UserError: if there is no such complete step, or its meta.json was altered.
        """
        return self._read_meta(step)["meta"]

    def fingerprint(self, step: int) -> str:
        """A sha256 of all that was saved with `step`: that of its manifest.

        Raises:
            UserError: as `meta`.
        """
        self._read_meta(step)
        return hashlib.sha256((self._final(step) / MANIFEST).read_bytes()).hexdigest()

    def drop_after(self, step: int) -> None:
        """Removes the complete steps after `step`: the run goes on from there, and saves them anew."""
        self._remove([s for s in self.steps() if s > step])

    def restore(self, step: int, abstract_state: State) -> State:
        """The state of `step`, bitwise as saved, on the shardings of `abstract_state`.

        Args:
            step: a complete step.
            abstract_state: a pytree of `jax.ShapeDtypeStruct` with shardings, on any mesh.

        Raises:
            UserError: if there is no such complete step, if the tree's paths, shapes or dtypes
                are not the saved ones, or if any file is missing, extra, truncated or altered;
                no array is read before all of that is checked.
        """
        self.wait()
        leaves = _by_path(abstract_state)
        _same_tree(self._read_meta(step)["tree"], _describe(leaves), self._final(step))
        folder = self._final(step)
        damage = manifest.damage(folder, jax.process_index(), jax.process_count())
        if damage := from_any_process(damage):
            raise self._damaged(step, damage)
        try:
            with (
                parts.neutral(folder) as named,
                storage.asking(named),
                ThreadPoolExecutor(READERS) as pool,
            ):
                store = parts.open_arrays(named, storage.context())
                arrays = list(
                    pool.map(lambda path: parts.read_array(store, path, leaves[path]), leaves)
                )
        except Unreachable:
            raise
        except (ValueError, OSError) as error:  # it was whole a moment ago
            raise self._damaged(step, str(error).splitlines()[0]) from error
        return jax.tree.unflatten(jax.tree.structure(abstract_state), arrays)

    @property
    def _lock_path(self) -> Place:
        return self._folder.with_name(self._folder.name + ".lock")

    def _hold(self) -> Lock | None:
        """The lock, on process 0; freed when it is closed."""
        lock, other, failure = None, "", ""
        if jax.process_index() == 0:
            try:
                lock = _wait_for(self._lock_path)
            except Held as held:
                other = held.holder
            except Unreachable:
                raise
            except OSError as error:
                failure = error.strerror or str(error)
        # One line on all processes, instead of some that wait for the first for ever.
        if other := from_process_0(other):
            raise Busy(
                f"{self._folder.parent} is being trained by {other}: wait for its end or stop it, "
                "or use another --workdir"
            )
        if failure := from_process_0(failure):
            raise UserError(
                f"cannot write in {self._folder.parent}: {failure}. Free some space or choose "
                "another --workdir"
            )
        return lock

    def _final(self, step: int) -> Place:
        return self._folder / f"{step:08d}"

    def _step_folders(self) -> list[Place]:
        return [p for p in storage.children(self._folder) if re.fullmatch(r"\d{8,}", p.name)]

    def _unsealed(self) -> list[Place]:
        return [p for p in self._step_folders() if not (p / MANIFEST).exists()]

    def _remove_incomplete(self) -> None:
        # On a disk a step has its name once it is complete: without a manifest it is damaged.
        unsealed = [] if isinstance(self._folder, Path) else self._unsealed()
        partial = [p for p in storage.children(self._folder) if p.name.endswith(PARTIAL)]
        for path in [*partial, *unsealed]:
            logger.warning("removing the incomplete checkpoint %s", path)
            storage.remove(path)

    def _finish(
        self, save: parts.Save, orbax: ocp.AsyncCheckpointer, scratch: Path, cleaning: ExitStack
    ) -> None:
        """Runs in the background: waits for this process's arrays, then for all, and completes."""
        try:
            with cleaning:
                orbax.close()
                files = save.bring(scratch)
            save.leave({"files": files})
            if jax.process_index() != 0:
                return
            save.join()
            if save.unwritten:
                raise UserError(
                    f"the checkpoint of step {save.step} in {self._folder} is not complete and was "
                    f"dropped: of {len(save.arrays)} arrays {len(save.unwritten)} were not written, "
                    f"such as {save.unwritten[0]}. Start the run again: it resumes from "
                    f"{self._resumes_from()}"
                )
            if self._lock is not None:
                self._lock.confirm()
            save.complete()
            self._remove(outdated(self.steps(), self._keep or 0, self._keep_every))
        except Exception as error:
            raise self._failed(save, error) from error

    def _remove(self, steps: Iterable[int]) -> None:
        """Removes complete steps, so that a kill leaves no half of one."""
        for step in steps:
            folder = self._final(step)
            if isinstance(folder, Path):
                folder = folder.rename(f"{folder}.removed{PARTIAL}")
            else:
                (folder / MANIFEST).unlink(missing_ok=True)
            storage.remove(folder)

    def _failed(self, save: parts.Save, error: Exception) -> Exception:
        """Frees what a failed save wrote; the error to raise, in a user's words where it is his."""
        if isinstance(self._folder, Path) and self._lock is not None:
            try:
                self._lock.confirm()
            except Held as held:  # another writer has removed what this one was writing
                error = held
        save.ours &= not isinstance(error, (Held, FileExistsError))
        save.fail(error)
        if isinstance(error, Held):
            return self._overtaken(save.step, error.holder)
        if isinstance(error, Unreachable):
            return error
        # Tensorstore words a failed system call as a ValueError "...: REASON [os_error_code=..",
        # before 0.1.86 with [source locations=..] between the two.
        words = r"([^:]+?) \[(?:source locations='[^']*'\] \[)?os_error_code"
        system_error = re.search(words, str(error))
        if system_error is None and not isinstance(error, OSError):
            return error
        reason = system_error[1].strip() if system_error else error.strerror or str(error)  # type: ignore[attr-defined]
        on_disk = isinstance(self._folder, Path)
        mend = "Free some space or repair the disk" if on_disk else "See that it may be written"
        return UserError(
            f"could not write the checkpoint of step {save.step} to {self._folder}: {reason}. "
            f"{mend}, then start the run again: it resumes from {self._resumes_from()}"
        )

    def _overtaken(self, step: int, holder: str) -> UserError:
        return UserError(
            f"step {step} was not saved: {self._folder.parent} is trained by {holder} since this "
            "process lost its lock. Leave the run to it, or start it again if nobody trains it"
        )

    def _resumes_from(self) -> str:
        return (
            f"step {max(self.steps())}" if self.steps() else "the beginning (no step is complete)"
        )

    def _read_meta(self, step: int) -> dict[str, Any]:
        folder = self._final(step)
        if step not in self.steps():
            steps = ", ".join(map(str, self.steps())) or "none"
            raise UserError(
                f"no complete checkpoint of step {step} in {self._folder}; steps: {steps}"
            )
        try:
            text = (folder / META).read_bytes()
            listed = json.loads((folder / MANIFEST).read_bytes())[META]["sha256"]
        except FileNotFoundError:
            raise self._damaged(step, f"{META} is missing") from None
        except (ValueError, LookupError, TypeError):
            raise self._damaged(step, f"{MANIFEST} was altered") from None
        if hashlib.sha256(text).hexdigest() != listed:
            raise self._damaged(step, f"{META} or {MANIFEST} was altered")
        found = json.loads(text)
        if found["step"] != step:  # a folder that was renamed or copied
            raise self._damaged(step, f"it is step {found['step']}")
        return found

    def _damaged(self, step: int, damage: str) -> UserError:
        if step not in self.steps():
            return UserError(
                f"checkpoint {self._final(step)} was removed while it was read, by the run that "
                "goes on there: give the same command again, or keep more by train.keep_every"
            )
        earlier = [s for s in self.steps() if s < step]
        back = f"step {earlier[-1]}" if earlier else "the beginning (no earlier step is there)"
        return UserError(
            f"checkpoint {self._final(step)} is damaged: {damage}. "
            f"Delete that folder to go back to {back}"
        )


def outdated(steps: Sequence[int], keep: int, keep_every: int | None) -> list[int]:
    """Which of the ascending `steps` a save removes: neither of the latest `keep` nor a multiple."""
    return [s for s in steps[:-keep] if keep_every is None or s % keep_every]


def _wait_for(path: Place) -> Lock:
    """The lock; while it is not known whether a lease's holder still lives, that is awaited."""
    waiting = False
    while True:
        try:
            return Lock(path)
        except Held as held:
            if held.certain:
                raise
            if not waiting:
                say(
                    f"{path.parent} was held by {held.holder}: waiting for at most "
                    f"{locks.LEASE_SECONDS:.0f} s to see whether it still is"
                )
            waiting = True
        time.sleep(1.0)


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their dotted path: {"params.embed.tokens": leaf}."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(k, simple=True, separator="."): leaf for k, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves share a dotted path: a key of the tree contains a dot")
    return leaves


def _describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    """{"params.embed.tokens": "float32[50304,128]"}."""
    return {k: f"{v.dtype.name}[{','.join(map(str, v.shape))}]" for k, v in leaves.items()}


def _same_tree(saved: dict[str, str], expected: dict[str, str], folder: Place) -> None:
    paths = [*expected, *(path for path in saved if path not in expected)]
    differ = [path for path in paths if saved.get(path) != expected.get(path)]
    if differ:
        path, others = differ[0], len(differ) - 1
        raise UserError(
            f"checkpoint of another architecture: {path} is {saved.get(path, 'absent')} in "
            f"{folder} but {expected.get(path, 'absent')} in this run, and {others} other "
            f"{'array differs' if others == 1 else 'arrays differ'}: run with the config it was "
            "saved with, or use another --workdir"
        )
