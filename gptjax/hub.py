"""Models of the Hugging Face hub by name, hf:ORG/NAME[@REVISION], fetched into the hub's own cache.

What tells huggingface_hub tells us: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT. A
name is pinned first: its revision becomes a commit, whose files never change. Of those only what is
asked for is fetched; each goes on where it broke off, and is in the cache once its hash is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from rich.progress import DownloadColumn

from gptjax.config import UserError
from gptjax.locks import alone
from gptjax.progress import Progress, from_process_0, say
from gptjax.storage import HUB, Place, children, on_hub, replace_file, sha256

BUSY = (408, 429)  # what a hub answers that may answer otherwise later, as do those from 500 on


class _Name(NamedTuple):
    repo: str
    revision: str

    def __str__(self) -> str:
        return f"{HUB}{self.repo}@{self.revision}"

    @property
    def pinned(self) -> bool:
        return re.fullmatch("[0-9a-f]{40}", self.revision) is not None

    @property
    def storage(self) -> Path:
        """What the hub's cache has of the model: blobs, snapshots, refs."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.repo.replace('/', '--')}"

    @property
    def snapshot(self) -> Path:
        return self.storage / "snapshots" / self.revision


class _Blob(NamedTuple):
    """A file by its content: the sha256 of a large one, git's sha1 of another; its bytes."""

    etag: str
    size: int

    def is_in(self, file: Path) -> bool:
        if len(self.etag) == 64:
            return sha256(file) == self.etag
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.sha1(b"blob %d\0" % self.size))
        return digest.hexdigest() == self.etag


def pinned(place: Place) -> Place:
    """A name with the commit that its revision is now, the same on every process; another place as
    it is.

    All processes call it. Where the hub is out of reach its cache tells, and that is said.

    Raises:
        UserError: if there is no such model or revision, or none that may be read; if the hub is out
            of reach and its cache does not hold the model; without the extra `hub`.
    """
    if not on_hub(place) or (name := _parse(place)).pinned:
        return place
    import jax  # which a command that makes data otherwise does without

    told = ""
    if jax.process_index() == 0:
        try:
            told = _commit(name)
        except UserError as error:
            told = f"!{error}"
    told = from_process_0(told)
    if told.startswith("!"):
        raise UserError(told[1:])
    return Path(str(name._replace(revision=told)))


def files(place: Place) -> set[str]:
    """The names of the files at the top of a pinned name, fetched or not.

    Raises:
        UserError: as `pinned`.
    """
    return {file for file in _listing(_parse(place)) if "/" not in file}


def fetched(place: Place, names: Collection[str]) -> Place:
    """The folder on this machine with those of a pinned name's files that it has of `names`; another
    place as it is.

    One process of a host fetches, the others wait for it.

    Raises:
        UserError: as `pinned`; if the model is gated, or a file comes with other bytes.
    """
    if not on_hub(place):
        return place
    name = _parse(place)
    there = _listing(name)

    def lacking() -> dict[str, _Blob]:
        wanted = {file: there[file] for file in names if file in there}
        return {file: blob for file, blob in wanted.items() if not (name.snapshot / file).is_file()}

    if lacking():
        with _told(name), alone(name.storage.parent / ".locks" / name.storage.name / "gptjax.lock"):
            _fetch(name, lacking())
    return name.snapshot


def _parse(place: Place) -> _Name:
    match = re.fullmatch(rf"{HUB}([\w.-]+(?:/[\w.-]+)?)(?:@(.+))?", str(place))
    if match is None:
        raise UserError(f"{place} is not hf:ORG/NAME or hf:ORG/NAME@REVISION")
    try:
        from huggingface_hub import utils
    except ImportError:
        raise UserError(
            f"{place} needs the huggingface_hub library: pip install 'gptjax[hub]', or name a folder"
        ) from None
    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    return _Name(match[1], match[2] or "main")


def _commit(name: _Name) -> str:
    """The commit of a revision: by the hub, or by its cache where the hub is out of reach."""
    from huggingface_hub import errors

    ref = name.storage / "refs" / name.revision
    with _told(name):
        try:
            commit = _asked(name)[0]
        except (errors.HTTPError, OSError) as error:
            if not _out_of_reach(error) or not ref.is_file():
                raise
            commit = ref.read_text(encoding="utf-8").strip()
            say(f"{name}: the hub is out of reach, so it is what it was: commit {commit}")
            return commit
        ref.parent.mkdir(parents=True, exist_ok=True)
        replace_file(ref, commit.encode())
        return commit


def _listing(name: _Name) -> dict[str, _Blob]:
    """The files of a pinned name: by memory, by the hub, or those that its cache happens to hold."""
    from huggingface_hub import errors

    with contextlib.suppress(OSError, ValueError, TypeError):  # none, or cut short
        listed = json.loads(_memory(name).read_bytes())
        return {file: _Blob(*blob) for file, blob in listed.items()}
    with _told(name):
        try:
            return _asked(name)[1]
        except (errors.HTTPError, OSError) as error:
            held = {file.name: _Blob("", 0) for file in children(name.snapshot)}
            if not _out_of_reach(error) or not held:
                raise
            return held


def _memory(name: _Name) -> Path:
    return name.storage / "gptjax" / f"{name.revision}.json"


def _asked(name: _Name) -> tuple[str, dict[str, _Blob]]:
    """What the hub says: the commit, and its files."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(
        name.repo,
        revision=name.revision,
        files_metadata=True,
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )
    listed = {
        file.rfilename: _Blob(file.lfs.sha256 if file.lfs else file.blob_id or "", file.size or 0)
        for file in info.siblings or []
    }
    assert info.sha is not None
    memory = _memory(name._replace(revision=info.sha))
    with contextlib.suppress(OSError):  # of a cache that is only read
        memory.parent.mkdir(parents=True, exist_ok=True)
        replace_file(memory, json.dumps(listed).encode())
    return info.sha, listed


class _Counted(io.BufferedWriter):
    """A file that grows, and tells by how much."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._advance = advance

    def write(self, data: Any) -> int:
        self._advance(len(data))
        return super().write(data)

    def __enter__(self) -> Self:
        return self


def _fetch(name: _Name, blobs: dict[str, _Blob]) -> None:
    """Brings files into the cache, as huggingface_hub lays it."""
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    total, what = sum(blob.size for blob in blobs.values()), f"fetching {name}"
    with Progress(what, total, transient=True, counted=DownloadColumn()) as progress:
        if total:
            progress.line(f"{what}: {total / 1e6:,.1f} MB")
        for file, blob in blobs.items():
            whole = name.storage / "blobs" / blob.etag
            part = whole.with_name(f"{blob.etag}.gptjax")
            whole.parent.mkdir(parents=True, exist_ok=True)
            if not whole.is_file():
                if part.is_file() and part.stat().st_size > blob.size:
                    part.unlink()  # of hosts that share a disk, but no locks
                with _Counted(part, progress.advance) as stream:
                    progress.advance(stream.tell())
                    url = hf_hub_url(name.repo, file, revision=name.revision)
                    http_get(
                        url,
                        stream,
                        resume_size=stream.tell(),
                        headers=build_hf_headers(),
                        expected_size=blob.size,
                    )
                if not blob.is_in(part):
                    part.unlink()
                    raise UserError(
                        f"{name}: {file} came with other bytes than those of its hash, "
                        f"{blob.etag[:16]}: fetch it again"
                    )
                os.replace(part, whole)
            hf_hub_download(name.repo, file, revision=name.revision)


def _out_of_reach(error: Exception) -> bool:
    """Whether the hub did not answer, or had no time to; rather than that it refuses."""
    response = getattr(error, "response", None)
    return response is None or response.status_code in BUSY or response.status_code >= 500


@contextlib.contextmanager
def _told(name: _Name) -> Iterator[None]:
    """Whatever goes wrong between us and the hub, as a user's mistake in one line."""
    from huggingface_hub import HfApi, constants, errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name.repo}, and give a "
            "token of your account by `hf auth login` or HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: there is no such model, or it is private: check the name, or give a token that "
            "may read it by `hf auth login` or HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        refs = HfApi().list_repo_refs(name.repo)
        choices = ", ".join(ref.name for ref in [*refs.branches, *refs.tags])
        raise UserError(f"{name}: no such revision: name a commit, or one of: {choices}") from None
    except errors.HFValidationError as error:
        raise UserError(f"{name}: {error}".replace("\n", " ")) from None
    except (errors.HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{name} is not whole in the hub's cache, {constants.HF_HUB_CACHE}, and "
                "HF_HUB_OFFLINE forbids to fetch it: unset that, or name another cache by HF_HUB_CACHE"
            ) from None
        if getattr(error, "response", None) is not None and not _out_of_reach(error):
            raise UserError(
                f"{name}: {constants.ENDPOINT} refuses ({reason}): check the token of HF_TOKEN or "
                "`hf auth login`"
            ) from None
        if isinstance(error, OSError) and error.errno is not None:  # of a disk
            raise UserError(
                f"{name} cannot be written into the hub's cache ({reason}): free some space, or "
                "name another by HF_HUB_CACHE"
            ) from None
        raise UserError(
            f"{name} cannot be fetched from {constants.ENDPOINT} ({reason}): the same command goes on "
            "where it stopped"
        ) from None
