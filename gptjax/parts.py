"""One process's part in the save of a checkpoint, and the one checkpoint that all parts make.

Every process has orbax write its part of the arrays by itself, hashes these files, and brings them
to their place; process 0 then joins the parts, by tensorstore's own means, so that orbax finds one
checkpoint. So no process reads or hashes what another wrote, and none talks to another meanwhile:
they leave notes beside the files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore

from gptjax import locks, manifest, storage
from gptjax.manifest import MANIFEST, READERS
from gptjax.storage import Place, Unreachable

STATE, META, PARTIAL = "state", "meta.json", ".partial"
# Orbax begins another file of arrays after so many bytes, and cuts a larger array into chunks of no
# more: so no file, which is put in a bucket and hashed at once, has twice as many. S3 takes 5 GB.
FILE_BYTES = 1 << 28
PART_SECONDS = 1200.0  # for which process 0 waits for the parts of others

# Orbax prints the traceback of a failed write once per thread it passes through, and asyncio once
# for each of its tasks that nobody awaited. The error itself reaches the caller of `check`, `wait`
# or `save`; the pages of traceback say no more.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
)
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())


class Save:
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
            with neutral(scratch) as folder:
                yield Path(str(folder))
            storage.remove(scratch)
        else:
            with locks.scratch() as folder:
                yield folder

    def write(self, arrays: Mapping[str, Any], scratch: Path) -> ocp.AsyncCheckpointer:
        """Orbax writes what this process holds; returns once the buffers may be donated."""
        _quieten()
        orbax = _writer(self._me)
        arguments = ocp.args.PyTreeSave(arrays, ocdbt_target_data_file_size=FILE_BYTES)
        orbax.save(scratch / STATE, args=arguments)
        return orbax

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
            entry = manifest.entry(scratch / name)
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
        with neutral(self._folder) as folder, storage.asking(folder):
            # A cache of its own: a step that is saved again is another in the same place.
            context = storage.context()
            whole = open_arrays(folder, context)
            transaction = tensorstore.Transaction(atomic=True)
            for process in range(self._count):
                part = open_arrays(folder, context, f"{STATE}/ocdbt.process_{process}")
                part.experimental_copy_range_to(whole.with_transaction(transaction)).result()
            transaction.commit_async().result()
            self.unwritten = lost(whole, self.arrays)

    def complete(self) -> None:
        """On process 0: writes what is left, the manifest last. May be called again if it fails."""
        for process in range(self._count):
            storage.remove(self._partial / self._note(process))
        storage.create(self._folder / META, self._meta.encode())
        for name in storage.files(self._folder):
            if name not in self._entries:
                self._entries[name] = manifest.entry(self._folder / name)
        if isinstance(self._folder, Path):
            for folder in [p for p in self._folder.rglob("*") if p.is_dir()]:
                storage.names_to_disk(folder)
        self.ours = isinstance(self._folder, Path)
        if not storage.create(self._folder / MANIFEST, manifest.text(self._entries)):
            raise FileExistsError(errno.EEXIST, f"another process has saved step {self.step}")
        if isinstance(self._folder, Path) and isinstance(self._final, Path):
            storage.rename(self._folder, self._final)

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


def _writer(process: int) -> ocp.AsyncCheckpointer:
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
def neutral(folder: Place) -> Iterator[Place]:
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


def open_arrays(folder: Place, context: Any, state: str = STATE) -> Any:
    """The key-value store of a checkpoint's arrays, or of a process's part of them."""
    base = storage.kvstore(folder / state)
    return storage.open_kvstore({"driver": "ocdbt", "base": base}, context)


def lost(store: Any, arrays: Iterable[str]) -> list[str]:
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


def read_array(store: Any, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of a checkpoint: of it what this process holds, and no piece twice."""
    saved = tensorstore.open({"driver": "zarr"}, kvstore=store / f"{path}/", open=True).result()
    pieces: dict[str, Any] = {}

    def piece(index: Any) -> Any:
        if str(index) not in pieces:
            pieces[str(index)] = saved[index].read().result()
        return pieces[str(index)]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, piece)
