"""A Hugging Face hub on this machine, as far as huggingface_hub and datasets ask it, with faults.

It answers as the real one does: a small file itself, with git's sha1 as its ETag; a large one by a
redirect to where its bytes lie under their sha256, whole or from an offset; what is not there, or
may not be read, with the codes of the real one (X-Error-Code).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest

from tests.buckets import Server, _Handler

TOKEN = "hf_test"
LARGE = (".safetensors", ".bin", ".parquet")  # kept by git-lfs


@dataclasses.dataclass
class Repo:
    """Commits by their id, and the ids of branches."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        text = "".join(f"{name} {hashlib.sha1(files[name]).hexdigest()}" for name in sorted(files))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit


def folder(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


class Hub(Server):
    """Repositories, by "models/ORG/NAME" and "datasets/ORG/NAME".

    Attributes:
        asked: each request as (method, path, Range header).
        sent: bytes of each file's content that went out, by its sha256.
        cut: after so many bytes the connection breaks; once for each number.
        stall: after so many bytes nothing comes, until it is emptied.
        flipped: whether a file's last byte is another.
        down: whether each request is answered 503.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.sent: Counter[str] = Counter()
        self.cut: list[int] = []
        self.stall: list[int] = []
        self.flipped = self.down = False
        self.lock = threading.Lock()
        super().__init__(_Hub)

    def model(self, name: str, files: dict[str, bytes], **access: bool) -> str:
        """The commit."""
        repo = self.repos.setdefault(f"models/{name}", Repo(**access))
        return repo.commit(files)

    def content(self, sha256: str) -> bytes:
        commits = [files for repo in self.repos.values() for files in repo.commits.values()]
        contents = [content for files in commits for content in files.values()]
        return next(c for c in contents if hashlib.sha256(c).hexdigest() == sha256)

    def fetched(self) -> list[str]:
        """The files whose content was asked for."""
        paths = [path for method, path, _ in self.asked if method == "GET"]
        return sorted(path.rpartition("/")[2] for path in paths if "/resolve/" in path)


class _Hub(_Handler):
    server: Hub

    def _answer(self) -> None:
        with self.server.lock:
            self.server.asked.append((self.command, self.path, self.headers.get("Range")))
        url, body = urlsplit(self.path), self.body()
        parts = unquote(url.path).strip("/").split("/")
        if self.server.down:
            return self.answer(503, b"busy")
        if parts[0] == "cdn":
            assert "Authorization" not in self.headers  # a token is for the hub alone
            return self._content(self.server.content(parts[-1]))
        api = parts[0] == "api"
        if api:
            kind, parts = parts[1], parts[2:]
        elif parts[0] == "datasets":
            kind, parts = parts[0], parts[1:]
        else:
            kind = "models"
        verbs = ("revision", "tree", "refs", "resolve", "paths-info", "parquet")
        size = next((i for i, part in enumerate(parts[:3]) if i and part in verbs), len(parts))
        name, rest = "/".join(parts[:size]), parts[size:]
        repo = self.server.repos.get(f"{kind}/{name}")
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            text = "Invalid credentials in Authorization header"
            return self.answer(401, b"{}", X_Error_Message=text)
        if repo is None or (repo.private and token is None):
            status = 401 if token is None else 404
            return self.answer(status, b"{}", X_Error_Code="RepoNotFound")
        if rest[:1] == ["refs"]:
            refs = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c}
                for n, c in repo.refs.items()
            ]
            return self._json({"branches": refs, "converts": [], "tags": []})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        files = repo.commits[commit]
        if api:
            return self._api(kind, name, commit, files, rest, parse_qs(url.query), body)
        if repo.gated and token is None:
            return self.answer(401, b"{}", X_Error_Code="GatedRepo", X_Repo_Commit=commit)
        return self._resolve(commit, files, "/".join(rest[2:]))

    def _api(
        self,
        kind: str,
        name: str,
        commit: str,
        files: dict[str, bytes],
        rest: list[str],
        query: dict[str, list[str]],
        body: bytes,
    ) -> None:
        if rest[:1] == ["tree"]:
            return self._tree(files, "".join(f"{part}/" for part in rest[2:]), query)
        if rest[:1] == ["paths-info"]:
            paths = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            return self._json([_entry(f, files[f]) for f in paths if f in files])
        siblings = [_sibling(f, files[f], "blobs" in query) for f in sorted(files)]
        info = {"id": name, "sha": commit, "private": False, "siblings": siblings, "tags": []}
        return self._json(
            info | {"downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z"}
        )

    def _tree(self, files: dict[str, bytes], below: str, query: dict[str, list[str]]) -> None:
        inside = [file for file in sorted(files) if file.startswith(below)]
        if not inside:
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
        entries = [_entry(f, files[f]) for f in inside]
        if query.get("recursive") != ["true"]:
            names = [f.removeprefix(below) for f in inside]
            entries = [e for e, name in zip(entries, names, strict=True) if "/" not in name]
            for folder in sorted({name.partition("/")[0] for name in names if "/" in name}):
                oid = _sha1(folder.encode())
                entries.append({"type": "directory", "path": below + folder, "size": 0, "oid": oid})
        return self._json(entries)

    def _json(self, tree: object) -> None:
        self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")

    def _resolve(self, commit: str, files: dict[str, bytes], file: str) -> None:
        if file not in files:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = files[file]
        if not file.endswith(LARGE):
            return self._content(content, ETag=f'"{_sha1(content)}"', X_Repo_Commit=commit)
        sha256 = hashlib.sha256(content).hexdigest()
        return self.answer(
            302,
            X_Repo_Commit=commit,
            X_Linked_Etag=f'"{sha256}"',
            X_Linked_Size=str(len(content)),
            Location=f"{self.server.url}/cdn/{sha256}".replace("127.0.0.1", "localhost"),
        )

    def _content(self, content: bytes, **headers: str) -> None:
        sha256 = hashlib.sha256(content).hexdigest()
        if self.server.flipped:
            content = content[:-1] + bytes([content[-1] ^ 1])
        first, _, last = (
            (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        )
        start, stop = int(first), int(last) + 1 if last else len(content)
        if start >= len(content):
            return self.answer(416, Content_Range=f"bytes */{len(content)}")
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        end = start + self.server.cut.pop(0) if self.server.cut else stop
        with contextlib.suppress(ConnectionError):
            while start < min(stop, end):
                part = content[start : min(start + (1 << 16), stop, end)]
                while (
                    self.server.stall
                    and self.server.sent[sha256] + len(part) > self.server.stall[0]
                ):
                    time.sleep(0.02)
                self.wfile.write(part)
                self.server.sent[sha256] += len(part)
                start += len(part)
        if start < stop:
            self.close_connection = True
        return None

    do_GET = do_POST = do_HEAD = _answer


def _sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(name: str, content: bytes, blobs: bool) -> dict[str, object]:
    if not blobs:
        return {"rfilename": name}
    entry = _entry(name, content)
    lfs = entry.get("lfs")
    told = {"rfilename": name, "size": len(content), "blobId": entry["oid"]}
    return told | ({"lfs": lfs | {"sha256": lfs["oid"]}} if isinstance(lfs, dict) else {})


def _entry(name: str, content: bytes) -> dict[str, object]:
    entry = {"type": "file", "path": name, "size": len(content), "oid": _sha1(content)}
    sha256 = hashlib.sha256(content).hexdigest()
    lfs = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return entry | ({"lfs": lfs} if name.endswith(LARGE) else {})


@contextlib.contextmanager
def served(cache: Path) -> Iterator[Hub]:
    """An empty hub that this process and its children ask; `cache` is the hub's cache."""
    hub = Hub()
    constants = huggingface_hub.constants
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HUB_CACHE", str(cache))
        patch.setenv("HF_DATASETS_CACHE", str(cache.with_name("datasets")))
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        for variable in ("HF_TOKEN", *offline):
            patch.delenv(variable, raising=False)
        # What the library has read of them already.
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
        yield hub
    hub.close()
