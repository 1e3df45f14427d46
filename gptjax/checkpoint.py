"""Checkpoints: orbax writes the arrays, a sha256 manifest and one rename make them trustworthy.

    FOLDER/00000250/               a complete step: it appears by a single rename
        state/                     orbax's own folder, arrays keyed by their dotted path
        meta.json                  step, shape and dtype of every array, the caller's meta
        manifest.json              bytes and sha256 of every other file
    FOLDER/00000500.2.partial/       a save in flight, or the leftover of a killed one
    FOLDER.lock                    who writes there; the operating system frees it with the process

Why not orbax alone (measured on orbax 0.12.8): it restores flipped bits silently, casts
int32 to float32 and float32 to bfloat16 silently, never removes the leftovers of a killed
save, reports a full disk only when somebody waits, and takes a path for a pattern: below
"runs/a[1-3]" it saves without a word what it can never read. Its `post_finalization_callback`
runs before orbax writes its last two files, so the manifest is made here, in a thread that
waits for orbax and looks that every array is there, and the rename covers both: no step is ever
visible without its manifest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

import jax
import orbax.checkpoint as ocp
import tensorstore

from gptjax.config import UserError
from gptjax.progress import from_process_0

CHECKPOINTS = "checkpoints"  # the folder of the checkpoints in a run's folder
STATE, META, MANIFEST, PARTIAL = "state", "meta.json", "manifest.json", ".partial"

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
        self,
        folder: str | os.PathLike[str],
        keep: int | None = None,
        keep_every: int | None = None,
    ) -> None:
        self._folder = Path(folder).absolute()
        self._keep, self._keep_every = keep, keep_every
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self._attempts = 0
        if keep is not None:
            self._lock = self._hold()
            if jax.process_index() == 0:
                self._remove_incomplete()

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
        with contextlib.suppress(FileNotFoundError), self._lock_path.open(encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read() or "another process"
        return ""

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
            ValueError: if `step` is saved already, `meta` is not JSON, or `keep` was None.
        """
        self.wait()
        if self._keep is None:
            raise ValueError("these Checkpoints only read: pass `keep` to write")
        if self._final(step).exists():
            raise ValueError(f"step {step} is already saved in {self._folder}")
        arrays = _by_path(state)
        description = {"step": step, "tree": _describe(arrays), "meta": meta}
        text = json.dumps(description, indent=1, allow_nan=False)
        with ExitStack() as stack:
            try:
                self._attempts += 1
                if jax.process_index() == 0:
                    self._remove_incomplete()
                    self._partial(step).mkdir(parents=True)
                _quieten()
                orbax = _orbax()
                written = stack.enter_context(_neutral(self._partial(step))) / STATE
                orbax.save(written, args=ocp.args.PyTreeSave(arrays))
            except Exception as error:
                raise self._failed(step, error) from error
            link = stack.pop_all()
        self._saving = self._background.submit(
            self._finish, orbax, link, written, list(arrays), step, text
        )
        if wait:
            self.wait()

    def check(self) -> None:
        """Raises the failure of a background save, once; costs nothing otherwise.

        Raises:
            UserError: if the save met a full or failing disk.
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
                nothing is read by orbax before all of that is checked.
        """
        self.wait()
        leaves = _by_path(abstract_state)
        _same_tree(self._read_meta(step)["tree"], _describe(leaves), self._final(step))
        # One process reads the folder to hash it; the others take its word.
        damage = _damage(self._final(step)) if jax.process_index() == 0 else ""
        if damage := from_process_0(damage):
            raise self._damaged(step, damage)
        restore_args = {
            path: ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
            )
            for path, leaf in leaves.items()
        }
        restore = ocp.args.PyTreeRestore(item=leaves, restore_args=restore_args)
        with _neutral(self._final(step)) as folder, contextlib.closing(_orbax()) as orbax:
            arrays = orbax.restore(folder / STATE, args=restore)
        treedef = jax.tree.structure(abstract_state)
        return jax.tree.unflatten(treedef, [arrays[path] for path in leaves])

    @property
    def _lock_path(self) -> Path:
        return self._folder.with_name(self._folder.name + ".lock")

    def _hold(self) -> IO[str] | None:
        """The locked file, on process 0; freed when it is closed."""
        lock, holder, failure = None, "", ""
        if jax.process_index() == 0:
            try:
                self._lock_path.parent.mkdir(parents=True, exist_ok=True)
                lock = self._lock_path.open("a+", encoding="utf-8")
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.truncate(0)
                now = datetime.now().astimezone().isoformat(" ", "seconds")
                lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
                lock.flush()
            except BlockingIOError:
                holder = self.writer() or "another process"
            except OSError as error:
                failure = error.strerror or str(error)
        # One line on all processes, instead of some that wait for the first for ever.
        if holder := from_process_0(holder):
            raise Busy(
                f"{self._folder.parent} is being trained by {holder}: wait for its end or stop it, "
                "or use another --workdir"
            )
        if failure := from_process_0(failure):
            raise UserError(
                f"cannot write in {self._folder.parent}: {failure}. Free some space or choose "
                "another --workdir"
            )
        return lock

    def _final(self, step: int) -> Path:
        return self._folder / f"{step:08d}"

    def _partial(self, step: int) -> Path:
        # Counted, because after a failed write orbax's other threads go on filling its folder.
        return self._folder / f"{step:08d}.{self._attempts}{PARTIAL}"

    def _step_folders(self) -> list[Path]:
        return [p for p in self._folder.glob("*") if re.fullmatch(r"\d{8,}", p.name)]

    def _remove_incomplete(self) -> None:
        unsealed = [p for p in self._step_folders() if not (p / MANIFEST).exists()]
        for path in sorted([*self._folder.glob(f"*{PARTIAL}"), *unsealed]):
            logger.warning("removing the incomplete checkpoint %s", path)
            shutil.rmtree(path, ignore_errors=True)

    def _finish(
        self,
        orbax: ocp.AsyncCheckpointer,
        link: ExitStack,
        written: Path,
        arrays: list[str],
        step: int,
        meta: str,
    ) -> None:
        """Runs in the background: waits for all processes' arrays, then completes the step."""
        try:
            with link:
                orbax.close()
                unwritten = _lost(written, arrays) if jax.process_index() == 0 else []
            if unwritten:
                raise UserError(
                    f"the checkpoint of step {step} in {self._folder} is not complete and was "
                    f"dropped: of {len(arrays)} arrays {len(unwritten)} were not written, such as "
                    f"{unwritten[0]}. Start the run again: it resumes from {self._resumes_from()}"
                )
            if jax.process_index() == 0:
                partial = self._partial(step)
                _write(partial / META, meta.encode())
                _write(partial / MANIFEST, _manifest(partial))
                os.rename(partial, self._final(step))
                self._remove(outdated(self.steps(), self._keep or 0, self._keep_every))
        except Exception as error:
            raise self._failed(step, error) from error

    def _remove(self, steps: Iterable[int]) -> None:
        """Removes complete steps; renamed first, so that a kill leaves no half of one."""
        for step in steps:
            os.rename(self._final(step), self._partial(step))
            shutil.rmtree(self._partial(step))

    def _failed(self, step: int, error: Exception) -> Exception:
        """Frees what a failed save wrote; the error to raise, in a user's words where it is his."""
        if jax.process_index() == 0:
            shutil.rmtree(self._partial(step), ignore_errors=True)
        # Tensorstore words a failed system call as a ValueError "...: REASON [os_error_code=..",
        # before 0.1.86 with [source locations=..] between the two.
        words = r"([^:]+?) \[(?:source locations='[^']*'\] \[)?os_error_code"
        system_error = re.search(words, str(error))
        if system_error is None and not isinstance(error, OSError):
            return error
        reason = system_error[1].strip() if system_error else error.strerror or str(error)  # type: ignore[attr-defined]
        return UserError(
            f"could not write the checkpoint of step {step} to {self._folder}: {reason}. Free some "
            f"space or repair the disk, then start the run again: it resumes from "
            f"{self._resumes_from()}"
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
        return json.loads(text)

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


def _orbax() -> ocp.AsyncCheckpointer:
    """A fresh one for each save or restore: one that met a full disk raises for ever after."""
    # Float noise does not compress: zstd made a save 6 times slower and 8% smaller.
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


@contextlib.contextmanager
def _neutral(folder: Path) -> Iterator[Path]:
    """A name of `folder` without characters that orbax or tensorstore take for more than names.

    Measured on orbax 0.12.8: below "[1-3]", "**", "a\\b" and "gs:" it saves what it cannot read,
    or nothing.
    """
    if re.fullmatch(r"[\w/. -]+", str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="gptjax-") as parent:
        link = Path(parent) / "checkpoint"
        link.symlink_to(folder)
        yield link


def _lost(state: Path, arrays: Iterable[str]) -> list[str]:
    """Those of the arrays, by dotted path, that orbax did not write whole to its folder `state`.

    Each must have its description and each of its chunks: one that lacks is read as zeros.
    """
    base = {"driver": "file", "path": f"{state}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = [key.decode() for key in store.list().result()]
    chunks = Counter(key.rpartition("/")[0] for key in keys if not key.endswith("/.zarray"))

    def whole(path: str) -> bool:
        described = store.read(f"{path}/.zarray").result().value
        if not described:
            return False
        shape, chunk = (json.loads(described)[name] for name in ("shape", "chunks"))
        return chunks[path] == math.prod(-(-s // c) for s, c in zip(shape, chunk, strict=True))

    return [path for path in arrays if not whole(path)]


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


def _same_tree(saved: dict[str, str], expected: dict[str, str], folder: Path) -> None:
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


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        # The rename that follows must never reach the disk before the content.
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(folder: Path) -> bytes:
    """Bytes and sha256 of every file below `folder` but the manifest itself, as canonical JSON."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    # hashlib releases the interpreter lock; four readers saturate most disks.
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(_sha256, files)
        entries = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(files, digests, strict=True)
        }
    return json.dumps(entries, indent=1).encode()


def _damage(folder: Path) -> str:
    """How the files differ from the manifest, by the first that does; "" when they are intact.

    The manifest guards itself: it must equal, byte for byte, the one computed anew.
    """
    try:
        stored, actual = (folder / MANIFEST).read_bytes(), _manifest(folder)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    if stored == actual:
        return ""
    try:
        listed = dict(json.loads(stored))
    except (ValueError, TypeError):
        return f"{MANIFEST} was altered"
    current = json.loads(actual)
    for name in sorted(listed.keys() | current.keys()):
        if name not in current:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} is not in the manifest"
        if listed[name] != current[name]:
            return f"{name} was altered or cut short (it holds {current[name]['bytes']} bytes)"
    return f"{MANIFEST} was altered"
