"""Checkpoints: orbax writes the arrays, a sha256 manifest makes them trustworthy and complete.

    FOLDER/00000250/               a complete step, on a disk or in a bucket
        state/                     orbax's own folder, arrays keyed by their dotted path
        meta.json                  step, shape and dtype of every array, the caller's meta
        manifest.json              bytes and sha256 of every other file; written last
    FOLDER/00000500.3f9a1c02.partial/  on a disk, a save in flight or the leftover of a killed one
    FOLDER.lock                    who writes there

Every process has orbax write its part of the arrays by itself, hashes these files, and brings them
to their place; process 0 then joins the parts, by tensorstore's own means, so that orbax finds one
checkpoint. So no process reads or hashes what another wrote, and none talks to another meanwhile:
they leave notes beside the files. A restore divides the hashing alike, and reads the arrays by
tensorstore, of each what the process holds.

Why not orbax alone (measured on orbax 0.12.8): it restores flipped bits silently, casts
int32 to float32 and float32 to bfloat16 silently, never removes the leftovers of a killed
save, reports a full disk only when somebody waits, refuses s3://, and takes a path for a pattern:
below "runs/a[1-3]" it saves without a word what it can never read. Its
`post_finalization_callback` runs before orbax writes its last two files, so the manifest is made
here, in a thread that waits for orbax and looks that every array is there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import jax
import orbax.checkpoint as ocp
import tensorstore

from gptjax import locks, storage
from gptjax.config import UserError
from gptjax.locks import Held, Lock
from gptjax.progress import from_any_process, from_process_0, say
from gptjax.storage import Place, Unreachable

CHECKPOINTS = "checkpoints"  # the folder of the checkpoints in a run's folder
STATE, META, MANIFEST, PARTIAL = "state", "meta.json", "manifest.json", ".partial"
# Orbax begins another file of arrays after so many bytes, and cuts a larger array into chunks of no
# more: so no file, which is put in a bucket and hashed at once, has twice as many. S3 takes 5 GB.
FILE_BYTES = 1 << 28
READERS = 4  # threads that read or put files; hashlib and tensorstore leave the interpreter's lock
PART_SECONDS = 1200.0  # for which process 0 waits for the parts of others

State = TypeVar("State")
logger = logging.getLogger(__name__)

# Orbax prints the traceback of a failed write once per thread it passes through, and asyncio once
# for each of its tasks that nobody awaited. The error itself reaches the caller of `check`, `wait`
# or `save`; the pages of traceback say no more.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
)
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())


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
        save = _Save(self._folder, step, from_process_0(secrets.token_hex(4)), list(arrays), text)
        with ExitStack() as stack:
            try:
                _quieten()
                orbax = _orbax(jax.process_index())
                scratch = stack.enter_context(save.scratch())
                arguments = ocp.args.PyTreeSave(arrays, ocdbt_target_data_file_size=FILE_BYTES)
                orbax.save(scratch / STATE, args=arguments)
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
        damage = _damage(folder, jax.process_index(), jax.process_count())
        if damage := from_any_process(damage):
            raise self._damaged(step, damage)
        try:
            with (
                _neutral(folder) as named,
                storage.asking(named),
                ThreadPoolExecutor(READERS) as pool,
            ):
                store = _arrays(named, storage.context())
                arrays = list(pool.map(lambda path: _read(store, path, leaves[path]), leaves))
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
        self, save: _Save, orbax: ocp.AsyncCheckpointer, scratch: Path, cleaning: ExitStack
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

    def _failed(self, save: _Save, error: Exception) -> Exception:
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
        earlier = [s for s in self.steps() if s < step]
        back = f"step {earlier[-1]}" if earlier else "the beginning (no earlier step is there)"
        return UserError(
            f"checkpoint {self._final(step)} is damaged: {damage}. "
            f"Delete that folder to go back to {back}"
        )


def outdated(steps: Sequence[int], keep: int, keep_every: int | None) -> list[int]:
    """Which of the ascending `steps` a save removes: neither of the latest `keep` nor a multiple."""
    return [s for s in steps[:-keep] if keep_every is None or s % keep_every]


class _Save:
    """One process's part in one save.

    Attributes:
        unwritten: arrays that are not whole, known once the parts are joined.
        ours: whether the step's folder may be removed, should the save fail. In a bucket not once it
            is complete, or seems to be another process's.
    """

    def __init__(self, folder: Place, step: int, name: str, arrays: list[str], meta: str) -> None:
        self.step, self.arrays, self._meta = step, arrays, meta
        self._final = folder / f"{step:08d}"
        self._partial = folder / f"{step:08d}.{name}{PARTIAL}"
        # A disk renames a folder at once; a bucket does not, and there the manifest alone counts.
        self._folder = self._partial if isinstance(folder, Path) else self._final
        self.ours = True
        self._me, self._count = jax.process_index(), jax.process_count()
        self.unwritten: list[str] = []

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Where orbax writes: on the disk of the checkpoint, or on this machine's for a bucket."""
        if isinstance(self._folder, Path):
            scratch = self._folder / f"process_{self._me}"
            scratch.mkdir(parents=True)
            with _neutral(scratch) as folder:
                yield Path(str(folder))
            storage.remove(scratch)
        else:
            with locks.scratch() as folder:
                yield folder

    def bring(self, scratch: Path) -> dict[str, Any]:
        """Hashes what this process wrote and brings it to its place; what a manifest says of it."""
        part = f"{STATE}/ocdbt.process_{self._me}/"
        joined = (f"{STATE}/d/", f"{STATE}/manifest.ocdbt")  # `join` makes them
        names = [
            name
            for name in storage.files(scratch)
            if name.startswith(part)
            or (self._me == 0 and not name.startswith((*joined, f"{STATE}/ocdbt.process_")))
        ]

        def publish(name: str) -> dict[str, Any]:
            entry = _entry(scratch / name)
            storage.publish(scratch / name, self._folder / name)
            return entry

        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(names, pool.map(publish, names), strict=True))

    def leave(self, note: dict[str, Any]) -> None:
        """Tells process 0: {"files": ...} of `bring`, or {"error": why, "again": may it succeed}."""
        content = json.dumps(note).encode()
        storage.replace_file(self._partial / self._note(self._me), content)

    def join(self) -> None:
        """On process 0: waits for all parts, and makes one checkpoint of them."""
        self._entries: dict[str, Any] = {}
        end = time.monotonic() + PART_SECONDS
        for process in range(self._count):
            self._entries |= self._await(process, end)
        with _neutral(self._folder) as folder, storage.asking(folder):
            # A cache of its own: a step that is saved again is another in the same place.
            context = storage.context()
            whole = _arrays(folder, context)
            transaction = tensorstore.Transaction(atomic=True)
            for process in range(self._count):
                part = _arrays(folder, context, f"{STATE}/ocdbt.process_{process}")
                part.experimental_copy_range_to(whole.with_transaction(transaction)).result()
            transaction.commit_async().result()
            self.unwritten = _lost(whole, self.arrays)

    def complete(self) -> None:
        """On process 0: writes what is left, the manifest last. May be called again if it fails."""
        for process in range(self._count):
            storage.remove(self._partial / self._note(process))
        storage.create(self._folder / META, self._meta.encode())
        for name in storage.files(self._folder):
            if name not in self._entries:
                self._entries[name] = _entry(self._folder / name)
        self.ours = isinstance(self._folder, Path)
        if not storage.create(self._folder / MANIFEST, _manifest(self._entries)):
            raise FileExistsError(errno.EEXIST, f"another process has saved step {self.step}")
        if isinstance(self._folder, Path) and isinstance(self._final, Path):
            os.rename(self._folder, self._final)

    def fail(self, error: Exception) -> None:
        """Tells process 0; there, frees the space."""
        reason = next(iter(str(error).splitlines()), "it failed")
        with contextlib.suppress(OSError):
            if self._me == 0:
                storage.remove(self._partial)
                if self.ours:
                    storage.remove(self._folder)
            else:
                self.leave({"error": reason, "again": isinstance(error, Unreachable)})

    def _note(self, process: int) -> str:
        return f"written.{process}.json"

    def _await(self, process: int, end: float) -> dict[str, Any]:
        """The files that a process wrote, once it has."""
        place = self._partial / self._note(process)
        while True:
            with contextlib.suppress(FileNotFoundError):
                note = json.loads(place.read_bytes())
                if "error" in note:
                    kind = Unreachable if note["again"] else OSError
                    reason = f"process {process} could not write its part: {note['error']}"
                    raise kind(errno.EIO, reason, str(place))
                return note["files"]
            if time.monotonic() > end:
                reason = f"process {process} has not written its part"
                raise OSError(errno.ETIMEDOUT, reason, str(place))
            time.sleep(0.05)


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


def _quieten() -> None:
    """No traceback for each write that is still under way when a save gives up.

    Tensorstore's threads report to the event loop of the save, find it closed, and print that,
    before the failure reaches anyone here.
    """
    before = sys.unraisablehook
    if getattr(before, "__name__", "") == "quiet":  # a hook may be any callable
        return

    def quiet(raised: Any) -> None:
        if not (
            raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"
        ):
            before(raised)

    sys.unraisablehook = quiet


def _orbax(process: int) -> ocp.AsyncCheckpointer:
    """A fresh one for each save: one that met a full disk raises for ever after.

    It takes this process for the only one, so that it writes all that the process holds.
    """
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process_{process}",
    )
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(primary_host=process))
    )
    common: dict[str, Any] = {"multiprocessing_options": alone, "type_handler_registry": registry}
    # Float noise does not compress: zstd made a save 6 times slower and 8% smaller. A part is not
    # whole, so it is not for orbax to look.
    writer = ocp.BasePyTreeCheckpointHandler(
        use_ocdbt=True, use_compression=False, enable_post_merge_validation=False, **common
    )
    handler = ocp.PyTreeCheckpointHandler(handler_impl=writer, **common)
    # Directories at once: else processes signal each other, by names that all of these share.
    at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(handler, multiprocessing_options=alone, async_options=at_once)


@contextlib.contextmanager
def _neutral(folder: Place) -> Iterator[Place]:
    """A name of `folder` without characters that orbax or tensorstore take for more than names.

    Measured on orbax 0.12.8: below "[1-3]", "**", "a\\b" and "gs:" it saves what it cannot read,
    or nothing.
    """
    if not isinstance(folder, Path) or re.fullmatch(r"[\w/. -]+", str(folder)):
        yield folder
        return
    with locks.scratch() as parent:
        link = parent / "checkpoint"
        link.symlink_to(folder)
        yield link


def _arrays(folder: Place, context: Any, state: str = STATE) -> Any:
    """The key-value store of a checkpoint's arrays, or of a process's part of them."""
    base = storage.kvstore(folder / state)
    return storage.open_kvstore({"driver": "ocdbt", "base": base}, context)


def _lost(store: Any, arrays: Iterable[str]) -> list[str]:
    """Those of the arrays, by dotted path, that are not whole in a checkpoint.

    Each must have its description and each of its chunks: one that lacks is read as zeros.
    """
    keys = [key.decode() for key in store.list().result()]
    chunks = Counter(key.rpartition("/")[0] for key in keys if not key.endswith("/.zarray"))

    def whole(path: str, described: bytes) -> bool:
        if not described:
            return False
        shape, chunk = (json.loads(described)[name] for name in ("shape", "chunks"))
        return chunks[path] == math.prod(-(-s // c) for s, c in zip(shape, chunk, strict=True))

    reads = {path: store.read(f"{path}/.zarray") for path in arrays}  # all at once
    return [path for path, read in reads.items() if not whole(path, read.result().value)]


def _read(store: Any, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of a checkpoint: of it what this process holds, and no piece twice."""
    saved = tensorstore.open({"driver": "zarr"}, kvstore=store / f"{path}/", open=True).result()
    pieces: dict[str, Any] = {}

    def piece(index: Any) -> Any:
        if str(index) not in pieces:
            pieces[str(index)] = saved[index].read().result()
        return pieces[str(index)]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, piece)


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


def _entry(file: Place) -> dict[str, Any]:
    """What a manifest says of a file."""
    if isinstance(file, Path):
        return {"bytes": file.stat().st_size, "sha256": storage.sha256(file)}
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _manifest(entries: Mapping[str, Any]) -> bytes:
    """Bytes and sha256 of every other file, as canonical JSON."""
    return json.dumps(dict(sorted(entries.items())), indent=1).encode()


def _damage(folder: Place, process: int, processes: int) -> str:
    """How files differ from the manifest, by the first that does; "" when they are intact.

    Each process hashes its share of the files. The manifest guards itself: it is canonical, and
    each number in it is compared.
    """
    try:
        stored, names = (folder / MANIFEST).read_bytes(), storage.files(folder)
        try:
            listed = dict(json.loads(stored))
            sizes = {name: -entry["bytes"] for name, entry in listed.items()}
            if _manifest(listed) != stored or any(len(e) != 2 for e in listed.values()):
                return f"{MANIFEST} was altered"
        except (ValueError, TypeError, LookupError, AttributeError):
            return f"{MANIFEST} was altered"
        for name in sorted({*names, *listed} - {MANIFEST}):
            if name not in names:
                return f"{name} is missing"
            # In a bucket it may be of a process that had lost its lease, and harms nobody.
            if name not in listed and isinstance(folder, Path):
                return f"{name} is not in the manifest"
        # The largest first, in turn, so that the shares are about equal.
        share = sorted(listed, key=lambda name: (sizes[name], name))[process::processes]
        with ThreadPoolExecutor(READERS) as pool:
            entries = pool.map(lambda name: _entry(folder / name), share)
            for name, entry in zip(share, entries, strict=True):
                if entry != listed[name]:
                    return f"{name} was altered or cut short (it holds {entry['bytes']} bytes)"
    except Unreachable:
        raise
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return ""
