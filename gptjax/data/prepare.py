"""Text files to token stores: read as a stream, tokenised once, renamed into place.

The text is read once to count its characters and once to encode them, a chunk at a time, so that a
corpus may be larger than memory (one jsonl line or parquet batch may not).
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gptjax.config import UserError, choose
from gptjax.data.store import MANIFEST, Store, StoreWriter
from gptjax.locks import alone
from gptjax.tokenizer import END_OF_TEXT, Tokenizer, load

SPLITS = ("train", "val")
HUB = "hub:"
CHUNK_BYTES = 1 << 17  # of a text file, read at a time: what is made of it stays in a cache
BATCH_BYTES = 1 << 17  # encoded at once by a thread; a token has one or more

# A separator's own line end is no part of the document that follows.
_SEPARATOR = re.compile(re.escape(END_OF_TEXT) + "\n?")

# Consecutive parts of documents; True where the document ends.
Parts = Iterator[tuple[str, bool]]


def prepare(
    files: list[Path],
    out: Path,
    tokenizer_name: str,
    val_fraction: float = 0.1,
    text_key: str = "text",
) -> dict[str, Any]:
    """Tokenises files into OUT/train and OUT/val, which appear together or not at all.

    If its process is killed, the same call goes on from the last whole shard; what it makes is the
    same. Several processes that make the same wait for the first.

    A .txt or .raw file is one document, or several where the literal "<|endoftext|>" stands
    between them; a .jsonl file has one document a line, a .parquet file one a row. The last
    `val_fraction` of the characters is held out: of n characters the first
    int(n * (1 - val_fraction)) train (nanoGPT's cut), and a document astride the cut is cut.

    Args:
        files: in the order given; `hub:DATASET[@REVISION][,CONFIG],SPLIT` is one of the Hugging Face
            hub, read as a stream, whose text a temporary file keeps for the second reading.
        out: folder to make; where it already holds this very text, tokenizer and
            val_fraction it is checked and left as it is.
        tokenizer_name: as for `tokenizer.load`.
        val_fraction: share of characters in [0, 1); 0 writes no OUT/val.
        text_key: the jsonl key or parquet column that holds the text.

    Returns:
        For each split: path, tokens, documents, bytes, fingerprint.

    Raises:
        UserError: on a missing, empty, non-UTF-8 or malformed file, naming the place; or if
            `out` holds anything else.
    """
    check_given(files, val_fraction)
    tokenizer = load(tokenizer_name)
    parts = [open_parts(Path(file), text_key) for file in files]
    total, text_sha256 = _survey(files, parts)
    characters = _Characters(parts)

    def fill(writer: StoreWriter, start: int, stop: int, advance: Callable[[int], None]) -> None:
        advance(writer.written)
        tokenise(characters(start + writer.written, stop), writer, encoders, advance)
        if not writer.tokens:
            raise UserError(
                f"a text of {total} characters leaves none for '{writer.folder.name}' with "
                f"val_fraction={val_fraction}: give more text or another fraction"
            )

    recipe = {"text_sha256": text_sha256, "val_fraction": val_fraction}
    with Encoders(tokenizer) as encoders:
        return build(Path(out), tokenizer, recipe, total, fill)


def check_given(files: Sequence[Path], val_fraction: float) -> None:
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction must lie in [0, 1), got {val_fraction}")
    if not files:
        raise UserError("no files to read: name at least one")


def build(
    out: Path,
    tokenizer: Tokenizer,
    recipe: dict[str, Any],
    total: int,
    fill: Callable[[StoreWriter, int, int, Callable[[int], None]], None],
    weighted: bool = False,
) -> dict[str, Any]:
    """Makes OUT/train and OUT/val, together or not at all, or goes on making them.

    Args:
        recipe: what the store is made of, which its manifest has: a store of the same is left as it
            is; `val_fraction` of it cuts.
        total: what there is, in characters or whatever `fill` counts.
        fill: (writer, start, stop, advance) -> None writes what lies in [start, stop), and lets
            `advance` hear of its progress.
        weighted: whether the stores hold weights.

    Returns:
        As `prepare`.
    """
    val_fraction = recipe["val_fraction"]
    if (out.is_dir() and any(out.iterdir())) or out.is_file():
        return _existing(out, tokenizer, recipe)

    cut = int(total * (1 - val_fraction))
    bounds = {"train": (0, cut), "val": (cut, total)}
    # Notes of texts count characters: those of an older gptjax, which counted pieces, are not read.
    of = json.dumps([recipe, tokenizer.fingerprint, "characters"], sort_keys=True).encode()
    name = f".{out.name}.{hashlib.sha256(of).hexdigest()[:12]}"
    aside, lock = out.parent / f"{name}.partial", out.parent / f"{name}.lock"
    try:
        with alone(lock), _removed_on_error(aside):
            if out.is_dir() and any(out.iterdir()):  # another process has made it meanwhile
                shutil.rmtree(aside, ignore_errors=True)
                return _existing(out, tokenizer, recipe)
            console = Console(stderr=True)
            # Where standard error is no terminal, even a bar that vanishes leaves an empty line.
            columns = (
                TextColumn("{task.description}", markup=False),  # a folder may be named "x[/b]"
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            with Progress(
                *columns, console=console, transient=True, disable=not console.is_terminal
            ) as progress:
                task = progress.add_task(f"tokenising into {out}", total=total)
                for split in SPLITS if val_fraction else SPLITS[:1]:
                    if (aside / split / MANIFEST).is_file():
                        continue  # an interrupted preparation has closed it
                    writer = StoreWriter(aside / split, tokenizer, weighted)
                    if writer.written:
                        where = f"{out}: going on after {writer.tokens:,} tokens of {split}"
                        progress.console.print(where, soft_wrap=True, markup=False)
                    fill(writer, *bounds[split], lambda done: progress.advance(task, done))
                    writer.close(split=split, **recipe)
            try:
                os.rename(aside, out)
            except OSError:
                if not out.is_dir():
                    raise
                shutil.rmtree(aside)  # a host that shares no locks was quicker
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    return _existing(out, tokenizer, recipe)


@contextlib.contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """But not by Ctrl-C, after which as after a kill the next preparation goes on there."""
    try:
        yield
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _existing(out: Path, tokenizer: Tokenizer, recipe: dict[str, Any]) -> dict[str, Any]:
    """The summary of a store that is already there, if it is this very one and whole."""
    summary = {}
    for split in SPLITS if recipe["val_fraction"] else SPLITS[:1]:
        if not (out / split / MANIFEST).is_file():
            raise UserError(f"{out} exists and is not this store: name a folder that is not there")
        store = Store.open(out / split, tokenizer)
        manifest = store.manifest
        if any(manifest.get(name) != value for name, value in recipe.items()):
            raise UserError(
                f"{out} holds a store of another text or val_fraction: name another folder, or "
                "delete this one"
            )
        counts = {name: manifest[name] for name in ("tokens", "documents", "bytes")}
        summary[split] = {"path": str(out / split), **counts, "fingerprint": store.fingerprint}
    return summary


def _survey(files: Iterable[Path], parts: list[Callable[[], Parts]]) -> tuple[int, str]:
    """Characters in all, and a sha256 over the text and its document bounds."""
    total, digest = 0, hashlib.sha256()
    for file, read in zip(files, parts, strict=True):
        before = total
        for text, ends in read():
            total += len(text)
            digest.update(text.encode())
            if ends:
                digest.update(b"\xff")  # a byte that UTF-8 never has
        if total == before:
            raise UserError(f"{file} holds no text: leave it out")
    return total, digest.hexdigest()


class _Characters:
    """The text of all files by the numbers of its characters."""

    def __init__(self, readers: list[Callable[[], Parts]]) -> None:
        self._readers, self._at = readers, 0
        self._parts = self._all()

    def _all(self) -> Parts:
        return (part for read in self._readers for part in read())

    def __call__(self, start: int, stop: int) -> Parts:
        """The parts of [start, stop), read on from the last `stop`; the last document ends there."""
        if start != self._at:
            self._at, self._parts = 0, self._all()
        for text, ends in self._parts:
            inside = text[max(start - self._at, 0) : max(stop - self._at, 0)]
            self._at += len(text)
            if self._at >= stop:
                rest = text[len(text) - (self._at - stop) :]
                self._at, self._parts = stop, itertools.chain([(rest, ends)], self._parts)
                yield inside, True
                return
            if self._at >= start:
                yield inside, ends


def _pieces(parts: Parts, tokenizer: Tokenizer) -> Parts:
    """The same documents in pieces that can be encoded apart."""
    pending = ""
    for text, ends in parts:
        pending += text
        at = 0
        while (stop := tokenizer.cut(pending, at)) is not None:
            yield pending[at:stop], False
            at = stop
        pending = pending[at:]
        if ends:
            yield pending, True
            pending = ""


def _batches(pieces: Parts) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for text, ends in pieces:
        batch.append((text, ends))
        size += len(text.encode())
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


class Encoders(ThreadPoolExecutor):
    """Encodes on all cores, one of which is the caller's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.cores, self._own = tokenizer, os.cpu_count() or 1, threading.local()
        self._room = threading.Semaphore(2 * (self.cores - 1))  # so that none waits for the caller

        def begin() -> None:
            self._own.tokenizer = tokenizer.for_a_thread()

        super().__init__(max(self.cores - 1, 1), initializer=begin)

    def encode(self, texts: Sequence[str]) -> Future[list[np.ndarray]]:
        """As `Tokenizer.encode_batch`, elsewhere or, where all others have enough to do, here."""
        if self._room.acquire(blocking=False):
            return self.submit(self._elsewhere, texts)
        here: Future[list[np.ndarray]] = Future()
        here.set_result(self.tokenizer.encode_batch(texts))
        return here

    def _elsewhere(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            return self._own.tokenizer.encode_batch(texts)
        finally:
            self._room.release()


def tokenise(
    parts: Parts, writer: StoreWriter, encoders: Encoders, advance: Callable[[int], None]
) -> None:
    """Encodes on all cores, while more is read and what is done is written, in order."""
    waiting: deque[tuple[list[tuple[str, bool]], Future[list[np.ndarray]]]] = deque()

    done, shards = writer.written, writer.shards  # characters

    def write_first() -> None:
        nonlocal done, shards
        batch, encoded = waiting.popleft()
        for ids, (text, ends) in zip(encoded.result(), batch, strict=True):
            writer.write(ids, ends)
            advance(len(text))
            done += len(text)
        if writer.shards > shards:
            shards = writer.shards
            writer.note(done)

    for batch in _batches(_pieces(parts, writer.tokenizer)):
        waiting.append((batch, encoders.encode([text for text, _ in batch])))
        while waiting and (waiting[0][1].done() or len(waiting) > 4 * encoders.cores):
            write_first()
    while waiting:
        write_first()


def open_parts(file: Path, text_key: str) -> Callable[[], Parts]:
    if str(file).startswith(HUB):
        rows = _kept(str(file), (text_key,), required=True)
        return lambda: ((_text(row[text_key], place), True) for place, row in rows())
    read = choose(READERS, file.suffix, f"the file ending of {file}")
    if not file.is_file():
        raise UserError(f"{file} is no file: check the path")

    def parts() -> Parts:
        try:
            yield from read(file, text_key)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from error

    return parts


# (place, row): where a row of data stands, in words, and its values by their keys.
Rows = Iterator[tuple[str, dict[str, Any]]]


def open_rows(file: Path, keys: Sequence[str]) -> Callable[[], Rows]:
    """Rows of a .jsonl or .parquet file or a data set of the hub, with those of `keys` they have.

    Without `keys` rows are whole.
    """
    if str(file).startswith(HUB):
        return _kept(str(file), keys, required=False)
    read = choose(ROW_READERS, file.suffix, f"the file ending of {file}")
    if not file.is_file():
        raise UserError(f"{file} is no file: check the path")

    def rows() -> Rows:
        for place, row in read(file, keys):
            yield place, {key: row[key] for key in keys or row if key in row}

    return rows


def _kept(source: str, keys: Sequence[str], required: bool) -> Callable[[], Rows]:
    """Reads a data set of the hub once, and after that what it said."""
    # Gone with the process, however it ends.
    kept = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (what is returned has it)
    whole = False

    def rows() -> Rows:
        nonlocal whole
        kept.seek(0)
        if whole:
            yield from ((f"{source} row {n}", json.loads(line)) for n, line in enumerate(kept))
            return
        kept.truncate()
        for number, row in enumerate(hub_rows(source, keys if required else ())):
            row = {key: row[key] for key in keys or row if key in row}
            kept.write(json.dumps(row, default=str) + "\n")
            yield f"{source} row {number}", row
        whole = True

    return rows


def hub_rows(source: str, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The rows of `hub:DATASET[@REVISION][,CONFIG],SPLIT`, as a stream.

    Raises:
        UserError: if it is written otherwise, cannot be read, or lacks one of `keys`; without the
            extra `hub`.
    """
    words = source.removeprefix(HUB).split(",")
    if len(words) not in (2, 3) or not all(words):
        raise UserError(f"{source} is not hub:DATASET[@REVISION][,CONFIG],SPLIT")
    *names, split = words
    names[0], _, revision = names[0].partition("@")
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source} needs the datasets library: pip install 'gptjax[hub]', or give a file"
        ) from None
    try:
        options = {"split": split, "streaming": True, "revision": revision or None}
        for row in datasets.load_dataset(*names, **options):
            if missing := [key for key in keys if key not in row]:
                raise UserError(f"{source} has no key '{missing[0]}'; its keys: {', '.join(row)}")
            yield row
    except UserError:
        raise
    except Exception as error:  # whatever the library meets: no network, no such data set
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{source} cannot be read: {type(error).__name__}: {reason}") from error


def _decoded(file: Path) -> Iterator[tuple[str, bool]]:
    """Chunks of a UTF-8 file, line ends as they are; True with the last chunk.

    A byte-order mark at the beginning is no text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with file.open("rb") as stream:
        offset = len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0
        stream.seek(offset)
        while True:
            chunk = stream.read(CHUNK_BYTES)
            incomplete = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file} is not UTF-8: byte {offset - incomplete + error.start} cannot be decoded; "
                    "convert it, for example with iconv -t UTF-8"
                ) from error
            yield text, not chunk
            if not chunk:
                return
            offset += len(chunk)


def _read_text(file: Path, text_key: str) -> Parts:
    buffer = ""
    for chunk, last in _decoded(file):
        buffer += chunk
        at = 0
        for match in _SEPARATOR.finditer(buffer):
            if match.end() == len(buffer) and not last:
                break  # its line end may come with the next chunk
            yield buffer[at : match.start()], True
            at = match.end()
        # What could still become a separator and its line end waits.
        upto = len(buffer) if last else max(at, len(buffer) - len(END_OF_TEXT) - 1)
        yield buffer[at:upto], last
        buffer = buffer[upto:]


def _refuse(constant: str) -> None:
    """Python's own NaN, Infinity and -Infinity."""
    raise ValueError(f"{constant} is no number of JSON")


def _jsonl_rows(file: Path, keys: Sequence[str]) -> Rows:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode(), parse_constant=_refuse)
            except ValueError as error:
                reason = str(error).replace("\n", " ")
                raise UserError(f"{file} line {number} is not JSON in UTF-8: {reason}") from error
            yield f"{file} line {number}", row if isinstance(row, dict) else {}


def _read_jsonl(file: Path, text_key: str) -> Parts:
    for place, row in _jsonl_rows(file, (text_key,)):
        if text_key not in row:
            raise UserError(
                f"{place} has no key '{text_key}': set the text key to one of "
                f"its keys ({', '.join(row) or 'none'})"
            )
        yield _text(row[text_key], place), True


def _parquet_rows(file: Path, keys: Sequence[str]) -> Rows:
    """With all columns where it has none of `keys`."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            columns = [key for key in keys if key in names] or names
            for batch in table.iter_batches(columns=columns, batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file} row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = f"{file} cannot be read as parquet beyond row {number}: {error}"
        raise UserError(reason.replace("\n", " ")) from error


def _read_parquet(file: Path, text_key: str) -> Parts:
    for place, row in _parquet_rows(file, (text_key,)):
        if text_key not in row:
            raise UserError(
                f"{file} has no column '{text_key}': set the text key to one of its columns "
                f"({', '.join(row)})"
            )
        yield _text(row[text_key], place), True


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place} holds {type(value).__name__} where text was expected")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" is JSON, but no character
        raise UserError(f"{place} holds half a surrogate pair, which is no text") from error
    return value


ROW_READERS: dict[str, Callable[[Path, Sequence[str]], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}
READERS: dict[str, Callable[[Path, str], Parts]] = {
    ".txt": _read_text,
    ".raw": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
