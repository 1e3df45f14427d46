"""The cache: what can be made again, and near copies of what lies in a bucket."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.config import UserError
from gptjax.locks import alone
from gptjax.storage import BucketPath, Place, files, local, remove, replace_file, sha256

REMEMBERED_BYTES = 1 << 24  # what is smaller is examined sooner than looked up


def cache() -> Path:
    """The folder of what can be made again: $GPTJAX_CACHE, or ~/.cache/gptjax. Made if absent.

    Raises:
        UserError: where it is not known, or cannot be written.
    """
    instead = "set GPTJAX_CACHE to a folder that can be"
    try:
        folder = local(os.environ.get("GPTJAX_CACHE") or Path.home() / ".cache" / "gptjax")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # which tells more than permissions do
            return folder.absolute()
    except RuntimeError:
        raise UserError(
            f"no home directory is known to keep a cache in: {instead} written"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write the cache {folder} ({error.strerror}): {instead}") from None


def fetched(file: Place, sha256: str) -> Path:
    """A file of a known content on this machine: itself, or its copy in the cache.

    What is fetched is checked; the copy may have been altered since, as any file.

    Raises:
        UserError: if it holds another content.
    """
    if isinstance(file, Path):
        return file
    copy = cache() / "fetched" / sha256
    with alone(copy.with_suffix(".lock")):
        if not copy.is_file():
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() != sha256:
                raise UserError(f"{file} was altered (wrong sha256): bring the right file there")
            replace_file(copy, content)
    return copy


def near(place: Place) -> Path:
    """A file or folder on this machine: itself, or its copy in the cache, compared with it anew.

    A copy is taken where the bucket's object has the same generation and the copy its content.
    """
    if isinstance(place, Path):
        return place
    copy = cache() / "near" / hashlib.sha256(str(place).encode()).hexdigest()[:32]
    names = files(place)
    with alone(copy.with_suffix(".lock")):
        if copy.is_dir() != bool(names):  # a folder that became a file, or the other way
            remove(copy)
        for name in names or [""]:
            _update(copy / name, place / name)
        for name in files(copy) if names else []:
            if name.removesuffix(_SEEN) not in names:
                (copy / name).unlink()
    return copy


_SEEN = ".seen.json"  # beside a copy: the generation that it was taken of, and its sha256


def _update(copy: Path, original: BucketPath) -> None:
    seen = copy.with_name(copy.name + _SEEN)
    if copy.is_file() and seen.is_file():
        with contextlib.suppress(ValueError, LookupError, TypeError):  # a record cut short is none
            record = json.loads(seen.read_bytes())
            intact = sha256(copy) == record["sha256"]
            if intact and original.unchanged_since(bytes.fromhex(record["generation"])):
                return
    content, generation = original.read_with_generation()
    seen.unlink(missing_ok=True)
    copy.parent.mkdir(parents=True, exist_ok=True)
    replace_file(copy, content)
    record = {"generation": generation.hex(), "sha256": hashlib.sha256(content).hexdigest()}
    replace_file(seen, json.dumps(record).encode())


def remembered(file: Path, examine: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `examine` says of a large file; from memory where the file is as it was then.

    The memory is the cache's. A file is as it was if its size, inode and times are. The processes
    of a host that ask at the same time wait for the first. `forget` forgets all.
    """
    stat = file.stat()
    if stat.st_size < REMEMBERED_BYTES:
        return examine()
    identity = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    record = _folder("examined") / hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:32]
    with alone(record.with_suffix(".lock")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # cut short, or none
            before = json.loads(record.read_bytes())
            if before["identity"] == identity:
                return before["facts"]
        facts = examine()
        replace_file(record, json.dumps({"identity": identity, "facts": facts}).encode())
    return facts


def kept(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives, or what it gave under this name before; made anew if that was altered."""
    file = _folder("kept") / name
    stored = file.read_bytes() if file.is_file() else b""
    digest, content = stored[:32], stored[32:]
    if hashlib.sha256(content).digest() != digest:
        content = make()
        replace_file(file, hashlib.sha256(content).digest() + content)
    return content


def forget() -> None:
    """Has all large files examined anew, and what is `kept` made anew."""
    for record in [*_folder("examined").iterdir(), *_folder("kept").iterdir()]:
        record.unlink(missing_ok=True)


def _folder(name: str) -> Path:
    folder = cache() / name
    folder.mkdir(exist_ok=True)
    return folder
