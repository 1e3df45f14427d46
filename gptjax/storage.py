"""Where files lie, on a disk or in a bucket, and how they appear there: whole or not at all.

A `Place` is a `pathlib.Path`, or a `BucketPath` for gs:// and s3://. A BucketPath has those of a
Path's methods that this package uses, and every function here takes both, so that nothing else asks
where a file lies. Buckets are reached by tensorstore alone. It is told of another server by
AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, of a region by AWS_REGION or AWS_DEFAULT_REGION, and of
another server for gs:// by its own TENSORSTORE_GCS_HTTP_URL.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from gptjax.config import UserError

SCHEMES = ("gs", "s3")
HUB = "hf:"  # before the name of a model on the Hugging Face hub
RETRIES = {"max_retries": 6, "initial_delay": "200ms", "max_delay": "2s"}  # some 6 s in all
ANSWER_SECONDS = 60.0  # within which a request ends, and a second more for each 4 MB
READ_SECONDS = 900.0  # the same of a read, whose size is not known
REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_ARGUMENT", "NOT_FOUND")  # for good
PATIENCE_SECONDS = 180.0  # of `patient`
logger = logging.getLogger(__name__)


class Unreachable(OSError):
    """A bucket does not do what it was asked; a while later it may.

    The command line prints a line, and exits with `config.EXIT_STOPPED`.
    """


@dataclasses.dataclass(frozen=True, order=True)
class BucketPath:
    """A name in a bucket: s3://BUCKET/KEY. Folders are what names have in common."""

    scheme: str
    bucket: str
    key: str  # without slashes at its ends

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str | os.PathLike[str]) -> BucketPath:
        parts = [part for part in (self.key, str(name).strip("/")) if part]
        return dataclasses.replace(self, key="/".join(parts))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> BucketPath:
        return dataclasses.replace(self, key=self.key.rpartition("/")[0])

    def with_name(self, name: str) -> BucketPath:
        return self.parent / name

    def absolute(self) -> BucketPath:
        return self

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        import tensorstore

        only = tensorstore.KvStore.KeyRange(self.key, self.key + "\0")
        return bool(self.key) and bool(self._do(lambda kv: kv.list(only)))

    def is_dir(self) -> bool:
        return bool(self._names())

    def iterdir(self) -> Iterator[BucketPath]:
        """As that of a Path, but an absent folder is an empty one."""
        names = {name.partition("/")[0] for name in self._names()}
        return (self / name for name in sorted(names))

    def read_bytes(self) -> bytes:
        return self.read_with_generation()[0]

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def find(self) -> tuple[bytes, bytes] | None:
        """Content and generation; None where there is nothing."""
        result = self._do(lambda kv: kv.read(self.key), READ_SECONDS)
        return (result.value, result.stamp.generation) if result.state == "value" else None

    def read_with_generation(self) -> tuple[bytes, bytes]:
        """Content, and what changes with each write."""
        if (found := self.find()) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return found

    def unchanged_since(self, generation: bytes) -> bool:
        """Whether the last write was that one; the content is not fetched to tell."""
        result = self._do(lambda kv: kv.read(self.key, if_not_equal=generation))
        return result.state == "unspecified"

    def write_bytes(self, content: bytes) -> int:
        self._write(content)
        return len(content)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a bucket has no folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        self._write(None)

    def _names(self) -> list[str]:
        """All names below this one, relative to it."""
        import tensorstore

        prefix = f"{self.key}/" if self.key else ""
        end = prefix[:-1] + "0" if prefix else ""  # "0" follows "/"
        keys = tensorstore.KvStore.KeyRange(prefix, end)
        names = [key.decode() for key in self._do(lambda kv: kv.list(keys))]
        # A server that lists more than it was asked for must not have that taken for ours. Consoles
        # make objects "folder/", which are no files.
        return sorted(
            name.removeprefix(prefix)
            for name in names
            if name.startswith(prefix) and not name.endswith("/")
        )

    def _write(
        self, content: bytes | None, generation: bytes | None = None, wait: bool = True
    ) -> bytes | None:
        """Puts, or deletes with None; the new generation.

        With a generation, only where that is still the one there (`_absent()`: where nothing is);
        None where it is not.
        """
        seconds = ANSWER_SECONDS + len(content or b"") / 4e6
        stamp = self._do(lambda kv: kv.write(self.key, content, if_equal=generation), seconds, wait)
        refused = generation is not None and stamp.generation in (b"", _absent())
        if not refused or content is None:
            return bytes(stamp.generation)
        # What was refused may be ours: the answer to the first try got lost, and it was repeated.
        found = self.find()
        if found is None and generation == _absent():
            reason = "nothing is there, and yet nothing can be created: no such bucket"
            raise FileNotFoundError(errno.ENOENT, reason, str(self))
        return found[1] if found is not None and found[0] == content else None

    def _do(
        self, request: Callable[[Any], Any], seconds: float = ANSWER_SECONDS, wait: bool = True
    ) -> Any:
        end, told = time.monotonic() + PATIENCE_SECONDS, False
        while True:
            try:
                with asking(self):
                    return request(_open(self.scheme, self.bucket)).result(timeout=seconds)
            except Unreachable as error:
                if not wait or not _patient.is_set():
                    raise
                if time.monotonic() > end:
                    _patient.clear()  # what is asked while the process ends is not waited for too
                    raise
                if not told:
                    words = "%s is out of reach (%s): trying again for %.0f s"
                    logger.warning(words, self, error.strerror, PATIENCE_SECONDS)
                told = True
            time.sleep(1.0)


Place = Path | BucketPath
_patient = threading.Event()


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """As long as it lasts, a bucket that is away is asked again for `PATIENCE_SECONDS`.

    For what trains; whoever waits at a terminal is told after the seconds of `RETRIES`.
    """
    before = _patient.is_set()
    _patient.set()
    try:
        yield
    finally:
        if not before:
            _patient.clear()


@contextlib.contextmanager
def asking(place: Place) -> Iterator[None]:
    """What tensorstore raises of a bucket is an OSError that names the place.

    Raises:
        Unreachable: where a later try may succeed.
    """
    try:
        yield
    except Exception as error:  # tensorstore's are ValueErrors for the most part
        if isinstance(place, Path) or (isinstance(error, OSError) and error.filename):
            raise
        late = "no answer" if isinstance(error, TimeoutError) else ""
        reason = late or re.split(r" \[|\n", str(error))[0].strip() or type(error).__name__
        kind = OSError if reason.startswith(REFUSALS) else Unreachable
        raise kind(errno.EIO, reason, str(place)) from error


def context(retries: Mapping[str, Any] | None = None) -> Any:
    """One of tensorstore's: stores of one context share a cache, and can copy from each other.

    Its requests are tried again as this process is `patient`, unless `retries` says how.
    """
    import tensorstore

    often = int(PATIENCE_SECONDS / 2) if _patient.is_set() else RETRIES["max_retries"]
    tries = dict(retries or RETRIES | {"max_retries": often})
    settings = {"s3_request_retries": tries, "gcs_request_retries": tries}
    return tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 26}, **settings})


@functools.cache
def _absent() -> bytes:
    """The generation of what is not there."""
    import tensorstore

    nothing = tensorstore.KvStore.open({"driver": "memory"}).result().read("x").result()
    return bytes(nothing.stamp.generation)


@functools.cache
def _open(scheme: str, bucket: str) -> Any:
    return open_kvstore(kvstore(BucketPath(scheme, bucket, "")), context(RETRIES))


def open_kvstore(spec: dict[str, Any], context: Any) -> Any:
    """A key-value store of tensorstore."""
    import tensorstore

    return tensorstore.KvStore.open(spec, context=context).result(timeout=ANSWER_SECONDS)


def kvstore(folder: Place) -> dict[str, Any]:
    """A folder as tensorstore is told of it."""
    if isinstance(folder, Path):
        # It refuses "..", of which a checkpoint would be called damaged.
        whole = folder.resolve() if ".." in folder.parts else folder.absolute()
        return {"driver": "file", "path": f"{whole}/"}
    path = f"{folder.key}/" if folder.key else ""
    if folder.scheme == "gs":
        return {"driver": "gcs", "bucket": folder.bucket, "path": path}
    spec: dict[str, Any] = {"driver": "s3", "bucket": folder.bucket, "path": path}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        spec["endpoint"] = endpoint
    if region or endpoint:
        spec["aws_region"] = region or "us-east-1"
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else tensorstore complains of an absent ~/.aws
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def expand(path: str | Place) -> Place:
    """What a path or URL names; ~/x lies in the home directory, as a shell reads it.

    Raises:
        UserError: on another kind of URL, or one without a bucket or with a single slash; on "";
            where the home directory is not known.
    """
    text = str(path)
    if not text:  # as of a variable that is not set
        raise UserError("a place is named by an empty text: write a path")
    match = re.fullmatch(r"([\w.+-]+)://([^/]*)/*(.*?)/*", text, re.DOTALL)
    mistyped = re.match(rf"({'|'.join(SCHEMES)}):/(?!/)", text)  # which pathlib makes of a URL, too
    if match is None and not mistyped:
        try:
            return Path(text).expanduser()
        except RuntimeError:
            raise UserError(
                f"{text}: its home directory is not known, write the whole path"
            ) from None
    scheme, bucket, key = match.groups() if match else ("", "", "")
    if scheme not in SCHEMES or len(bucket) < 3:
        raise UserError(
            f"{text} is no place for files: write a path, gs://BUCKET/X or s3://BUCKET/X"
        )
    return BucketPath(scheme, bucket, re.sub("/+", "/", key))


def on_hub(place: str | Place) -> bool:
    """Whether it is a model's name on the hub, which `gptjax/hub.py` reads, rather than a place."""
    return str(place).startswith(HUB)


def for_files(path: str | Place) -> Place:
    """As `expand`, where a model's name on the hub has no meaning.

    Raises:
        UserError: as `expand`; on such a name.
    """
    if on_hub(expanded := expand(path)):
        raise UserError(f"{path} names a model on the hub, where no files are put: write a path")
    return expanded


def local(path: str | Place) -> Path:
    """As `for_files`, for what must lie on this machine.

    Raises:
        UserError: as `for_files`; on the URL of a bucket.
    """
    expanded = for_files(path)
    if isinstance(expanded, Path):
        return expanded
    raise UserError(
        f"{path} must be a path on this machine: only runs, stores of studies, data "
        "sources and models may lie in a bucket"
    )


def whole(place: str | Place) -> str:
    """A place as every process knows it: one text, however it is spelt or linked to."""
    place = expand(place)
    # Path.resolve raises on links that lead to each other.
    return os.path.realpath(place) if isinstance(place, Path) else str(place)


def children(folder: Place) -> list[Place]:
    """What lies in a folder, sorted; nothing where there is no such folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(folder.iterdir())
    return []


def nearest_folder(place: Place) -> Path:
    """Whose disk fills as files come to a place: the folder, the first above it that is there, or
    that of temporary files, where a bucket's grow."""
    if isinstance(place, Path):
        return next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
    return Path(tempfile.gettempdir())


def sha256(file: Path) -> str:
    """Of a file's content, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def changed(path: Place) -> int:
    """When a file changed, in ns since 1970; 0 in a bucket, where that is not asked."""
    return path.stat().st_mtime_ns if isinstance(path, Path) else 0


def replace_file(path: Place, content: bytes) -> None:
    """Writes so that no reader, no kill and no loss of power ever leaves half a file."""
    if isinstance(path, BucketPath):
        path.write_bytes(content)
        return
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content)
        _to_disk(file)
    rename(aside, path)


def rename(path: Path, to: Path) -> None:
    """Gives a file or folder another name, over a file that has it; no loss of power undoes it."""
    os.replace(path, to)
    names_to_disk(to.parent)


def names_to_disk(folder: Path) -> None:
    """Returns once the disk has the names in a folder, as `_to_disk` does of a file's content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file system that knows no such thing
            raise
    finally:
        os.close(descriptor)


def _to_disk(file: IO[bytes]) -> None:
    """Returns once the disk has a file: its name must never reach it before its content."""
    file.flush()
    os.fsync(file.fileno())


def replace_unchanged(
    path: BucketPath, content: bytes, generation: bytes | None, wait: bool = True
) -> bytes:
    """Writes over that generation alone, None for nothing; returns the new one.

    Args:
        wait: as `patient` says; without it a bucket that is away is not waited for.

    Raises:
        FileExistsError: if something else is there by now.
    """
    new = path._write(content, _absent() if generation is None else generation, wait)
    if new is None:
        raise FileExistsError(errno.EEXIST, "another process writes there", str(path))
    return new


def remove_unchanged(path: BucketPath, generation: bytes) -> None:
    """Removes that generation alone."""
    path._write(None, generation)


def create(path: Place, content: bytes) -> bool:
    """Writes durably where nothing is; False where something is. In a bucket one of several wins."""
    if isinstance(path, BucketPath):
        return path._write(content, _absent()) is not None
    if path.exists():
        return False
    replace_file(path, content)
    return True


def publish(file: Path, path: Place) -> None:
    """Brings a finished file from this machine to its place, where nothing lies yet; it is gone then.

    On a disk both must be of one file system.

    Raises:
        FileExistsError: if something is there.
    """
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as stream:
            _to_disk(stream)
        os.rename(file, path)
        return
    content = file.read_bytes()
    if not create(path, content):
        raise FileExistsError(errno.EEXIST, "another process writes there", str(path))
    file.unlink()


def remove(path: Place) -> None:
    """Removes a file, or a folder with all that it holds; nothing where there is neither."""
    if isinstance(path, BucketPath):
        for name in [*path._names(), ""]:
            (path / name)._write(None)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def files(folder: Place) -> list[str]:
    """The names of all files below a folder, relative to it, sorted."""
    if isinstance(folder, BucketPath):
        return folder._names()
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@contextlib.contextmanager
def disk(folder: Place) -> Iterator[None]:
    try:
        yield
    except Unreachable:
        raise
    except OSError as error:
        raise UserError(
            f"cannot write the run's records in {folder}: {error.strerror or error}. Free some "
            "space or choose another --workdir"
        ) from error


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `out` at the end, removed on any error."""
    if out.exists():
        raise UserError(f"{out} exists: name a folder that is not there")
    import jax

    aside = out.parent / f".{out.name}.{uuid.uuid4().hex}.partial"
    try:
        yield aside
        if jax.process_index() == 0:
            rename(aside, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
