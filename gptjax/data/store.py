"""The token store: a text tokenised once, memory-mapped, and checked whenever it is opened.

A store is a folder, one for each split:

    manifest.json        format, tokenizer, counts, sha256 of every other file
    tokens-00000.bin     little-endian uint16 (or uint32) ids, the shards in order
    document_ends.bin    little-endian int64, one past the last token of each document
    weights-00000.bin    little-endian float32, what each token counts as a target, shard by shard;
                         only in a store that was written with weights: else each counts 1
    rows.jsonl           what each document was made of, a line each; only where it is kept

Every document is followed by exactly one end-of-text token, which its bounds include.
nanoGPT's `train.bin` (raw uint16, no manifest) opens as a store too.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.places import fetched, near, remembered
from gptjax.storage import Place, expand, replace_file
from gptjax.tokenizer import Tokenizer

FORMAT = 1
MANIFEST = "manifest.json"
ENDS = "document_ends.bin"
ROWS = "rows.jsonl"
NOTE = "note.npz"  # of a writer that has not closed
ANEW = "delete the store and prepare the text anew"
SHARD_TOKENS = 1 << 26
_CHECK_TOKENS = 1 << 24  # read at a time while checking


@dataclass(frozen=True)
class Store:
    """Tokens and document bounds of one split.

    Attributes:
        path: the folder, or nanoGPT's .bin file.
        fingerprint: sha256 over the manifest, hence over every token; equal texts prepared
            alike have equal fingerprints.
        document_ends: int64 (documents,), one past each document's last token.
        manifest: as written by `StoreWriter`, its fingerprint apart; empty for a .bin file.
    """

    path: Place
    fingerprint: str
    document_ends: np.ndarray = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    _shards: list[np.ndarray] = field(repr=False)
    _starts: list[int] = field(repr=False)
    _weights: list[np.ndarray] = field(repr=False, default_factory=list)
    _rows: np.ndarray | None = field(repr=False, default=None)

    @functools.cached_property
    def row_ends(self) -> np.ndarray:
        """int64 (documents,), one past the last byte of each line of `ROWS`; empty without it."""
        return np.flatnonzero(np.array([] if self._rows is None else self._rows) == ord("\n")) + 1

    def row(self, document: int) -> dict[str, Any]:
        """What a document was made of, where `row_ends` says that it is kept."""
        assert self._rows is not None
        start = self.row_ends[document - 1] if document else 0
        return json.loads(bytes(self._rows[start : self.row_ends[document]]))

    @property
    def num_tokens(self) -> int:
        """All tokens, end-of-text included."""
        return self._starts[-1]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32, across shards.

        Raises:
            IndexError: where the range leaves [0, num_tokens].
        """
        return self._read(self._shards, start, stop, np.int32)

    def weights(self, start: int, stop: int) -> np.ndarray:
        """What tokens [start, stop) count as targets, float32, at least 0; 1 where none is held.

        Raises:
            IndexError: as `tokens`.
        """
        if not self._weights:
            return np.ones(max(stop - start, 0), np.float32)
        return self._read(self._weights, start, stop, np.float32)

    def _read(self, shards: list[np.ndarray], start: int, stop: int, dtype: Any) -> np.ndarray:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a store of {self.num_tokens}")
        out = np.empty(stop - start, dtype)
        at = start
        while at < stop:
            shard = bisect.bisect_right(self._starts, at) - 1
            piece = shards[shard][at - self._starts[shard] : stop - self._starts[shard]]
            out[at - start : at - start + len(piece)] = piece
            at += len(piece)
        return out

    @classmethod
    def open(cls, path: str | Place, tokenizer: Tokenizer | None) -> Store:
        """Opens a store folder or a nanoGPT .bin file, and checks every byte of it.

        A large file that is as it was when it was last checked on this machine is not read again
        (`places.remembered`). Files of a bucket are read by copies in the cache.

        Args:
            path: a folder with a manifest, or a file of little-endian uint16.
            tokenizer: the one that will read the tokens; None skips its checks.

        Raises:
            UserError: if it is missing, incomplete or altered, was made with another
                tokenizer, or holds an id outside the vocabulary (jax would clamp it silently).
        """
        path = expand(path)
        if path.is_file():
            return cls._open_bin(near(path), tokenizer)
        manifest = _read_manifest(path)
        recorded = manifest["tokenizer"]
        if tokenizer is not None and recorded["fingerprint"] != tokenizer.fingerprint:
            raise UserError(
                f"{path} was tokenised with '{recorded['name']}', but the tokenizer here is "
                f"'{tokenizer.name}' ({tokenizer.fingerprint[:12]}, the store has "
                f"{recorded['fingerprint'][:12]}): set data.tokenizer={recorded['name']}, or prepare "
                "the text anew"
            )
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        shards, weights = [], []
        for entry in manifest["shards"]:
            file, sha256, count = path / entry["file"], entry["sha256"], entry["tokens"]
            shards.append(_checked(file, dtype, count, sha256, recorded["vocab_size"]))
            if "weights" in entry:
                file, sha256 = path / entry["weights"], entry["weights_sha256"]
                weights.append(_checked(file, np.dtype("<f4"), count, sha256))
        sha256, count = manifest["document_ends_sha256"], manifest["documents"]
        ends = _checked(path / ENDS, np.dtype("<i8"), count, sha256)
        rows = None
        if (entry := manifest.get("rows")) is not None:
            rows = _checked(path / ROWS, np.dtype("u1"), entry["bytes"], entry["sha256"])
        starts = _starts(shards)
        return cls(path, fingerprint(manifest), ends, manifest, shards, starts, weights, rows)

    @classmethod
    def _open_bin(cls, path: Path, tokenizer: Tokenizer | None) -> Store:
        size = path.stat().st_size
        if size == 0 or size % 2:
            raise UserError(f"{path} holds {size} bytes, which is no list of uint16 token ids")
        shard = _map(path, np.dtype("<u2"), size // 2)
        digest = _check(path, shard, None, None if tokenizer is None else tokenizer.vocab_size)
        ends = np.array([], np.int64)
        if tokenizer is not None:
            ends = np.flatnonzero(shard == tokenizer.eot).astype(np.int64) + 1
        if not len(ends) or ends[-1] != len(shard):  # the last document lacks its end-of-text
            ends = np.append(ends, len(shard))
        return cls(path, digest, ends, {}, [shard], _starts([shard]))


class StoreWriter:
    """Writes a store into a fresh folder; `close` writes the manifest.

    What `note` recorded in the folder before its process was killed is gone on from.

    Attributes:
        written: the `written` of that note; 0 in a fresh folder.

    Args:
        folder: to make.
        tokenizer: of the ids.
        weighted: whether the store holds what each token counts as a target.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, weighted: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.tokenizer, self.weighted = folder, tokenizer, weighted
        self.written = 0
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.tokens = self.bytes = self._document_start = 0
        self._ends: list[int] = []
        self._shards: list[dict[str, Any]] = []
        self._held: list[np.ndarray] = []
        self._held_weights: list[np.ndarray] = []
        self._held_tokens = 0
        self._rows: dict[str, Any] = {}
        if (folder / NOTE).is_file():
            self._go_on()

    @property
    def shards(self) -> int:
        """Those that are on the disk."""
        return len(self._shards)

    def note(self, written: int) -> None:
        """Records how far it has come, for a writer of the same folder to go on from.

        Args:
            written: of the caller's own counting, which `written` gives back.
        """
        held = np.concatenate([*self._held, np.array([], self.dtype)])
        weights = np.concatenate([*self._held_weights, np.array([], "<f4")])
        counts = [written, self.tokens, self.bytes, self._document_start]
        with io.BytesIO() as buffer:
            np.savez(
                buffer, held=held, weights=weights, ends=np.array(self._ends, "<i8"),
                counts=np.array(counts, "<i8"), shards=np.array(json.dumps(self._shards)),
            )  # fmt: skip
            replace_file(self.folder / NOTE, buffer.getvalue())

    def _go_on(self) -> None:
        with np.load(self.folder / NOTE) as noted:
            self.written, self.tokens, self.bytes, self._document_start = noted["counts"].tolist()
            self._ends, self._shards = noted["ends"].tolist(), json.loads(str(noted["shards"]))
            self._held, self._held_tokens = [noted["held"]], len(noted["held"])
            self._held_weights = [noted["weights"]] if self.weighted else []

    def write(
        self,
        ids: np.ndarray,
        document_ends: bool,
        weights: np.ndarray | None = None,
        end_weight: float = 1.0,
    ) -> None:
        """Appends tokens.

        Args:
            ids: tokens of one document, integers (n,).
            document_ends: closes the document, unless it is empty.
            weights: what each counts as a target, (n,), for a weighted store.
            end_weight: what the end-of-text that closes the document counts there.

        Raises:
            ValueError: on weights of another length, that are negative or not finite, or that
                the store does not hold.
        """
        every = np.empty(0) if weights is None else np.append(weights, end_weight)
        if self.weighted != (weights is not None) or (self.weighted and len(every) != len(ids) + 1):
            raise ValueError("a weighted store takes one weight for each token, another takes none")
        if self.weighted and not (np.isfinite(every) & (every >= 0)).all():
            raise ValueError("weights are finite and at least 0")
        self._append(ids, every[:-1])
        self.bytes += int(self.tokenizer.bytes_per_token[ids].sum())
        if document_ends and self.tokens > self._document_start:
            self._append(np.array([self.tokenizer.eot]), every[-1:])
            self._document_start = self.tokens
            self._ends.append(self.tokens)

    def keep_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes what each document was made of, in their order, for `Store.row`."""
        lines = [json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows]
        content = np.frombuffer("".join(lines).encode(), np.uint8)
        self._rows = {"rows": {"bytes": len(content), "sha256": self._write(content, ROWS)}}

    def close(self, **provenance: Any) -> None:
        """Writes what is left and the manifest, with `provenance` added."""
        if self._held_tokens:
            self._flush(self._held_tokens)
        ends = np.array(self._ends, "<i8").tobytes()
        (self.folder / ENDS).write_bytes(ends)
        manifest = {
            "format": FORMAT,
            "tokenizer": {
                name: getattr(self.tokenizer, name)
                for name in ("name", "fingerprint", "vocab_size", "eot")
            },
            "dtype": self.dtype.name,
            "tokens": self.tokens,
            "documents": len(self._ends),
            "bytes": self.bytes,
            "shards": self._shards,
            "document_ends_sha256": hashlib.sha256(ends).hexdigest(),
            **self._rows,
            **provenance,
        }
        (self.folder / NOTE).unlink(missing_ok=True)
        (self.folder / MANIFEST).write_bytes(_signed(manifest))

    def _append(self, ids: np.ndarray, weights: np.ndarray) -> None:
        self._held.append(ids.astype(self.dtype))
        if self.weighted:
            self._held_weights.append(weights.astype("<f4"))
        self._held_tokens += len(ids)
        self.tokens += len(ids)
        while self._held_tokens >= SHARD_TOKENS:
            self._flush(SHARD_TOKENS)

    def _flush(self, count: int) -> None:
        buffer = np.concatenate(self._held)
        shard, self._held, self._held_tokens = buffer[:count], [buffer[count:]], len(buffer) - count
        number = f"{len(self._shards):05d}.bin"
        name = f"tokens-{number}"
        entry: dict[str, Any] = {"file": name, "tokens": len(shard)}
        entry["sha256"] = self._write(shard, name)
        if self.weighted:
            weights = np.concatenate(self._held_weights)
            self._held_weights = [weights[count:]]
            entry["weights"] = f"weights-{number}"
            entry["weights_sha256"] = self._write(weights[:count], entry["weights"])
        self._shards.append(entry)

    def _write(self, array: np.ndarray, name: str) -> str:
        """Writes a file of the store; returns its sha256."""
        with (self.folder / name).open("wb") as file:
            file.write(array.data)
            file.flush()
            os.fsync(file.fileno())  # a note that follows stands for it
        return hashlib.sha256(array.data).hexdigest()


def fingerprint(manifest: dict[str, Any]) -> str:
    """A sha256 over the canonical JSON of a manifest (without its own "fingerprint")."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _signed(manifest: dict[str, Any]) -> bytes:
    """The file: the manifest and its fingerprint."""
    return json.dumps(manifest | {"fingerprint": fingerprint(manifest)}, indent=1).encode()


def _read_manifest(folder: Place) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is no token store: it has no {MANIFEST}; make one with `data`")
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        del manifest["fingerprint"]
        # Byte for byte: not even its spelling changes unnoticed.
        if manifest["format"] == FORMAT and content == _signed(manifest):
            return manifest
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # not what `StoreWriter.close` wrote
    raise UserError(f"{path} is damaged or of another version: {ANEW}")


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    expected = count * dtype.itemsize
    have = path.stat().st_size if path.is_file() else 0
    if have != expected:
        raise UserError(
            f"{path} holds {have} bytes where {expected} were written: the file is truncated or "
            f"altered; {ANEW}"
        )
    return np.memmap(path, dtype, mode="r")


def _checked(
    place: Place, dtype: np.dtype, count: int, sha256: str, vocab_size: int | None = None
) -> np.ndarray:
    """A file of a store on this machine, mapped and checked."""
    path = fetched(place, sha256)
    try:
        array = _map(path, dtype, count)
        _check(path, array, sha256, vocab_size)
    except UserError:
        if path == place:
            raise
        path.unlink()  # the copy was altered: what is fetched anew is right, or tells why not
        array = _map(fetched(place, sha256), dtype, count)
        _check(path, array, sha256, vocab_size)
    return array


def _check(path: Path, ids: np.ndarray, sha256: str | None, vocab_size: int | None = None) -> str:
    """The sha256 of the file mapped as `ids`; compares it, and the highest id, where given."""
    facts = remembered(path, lambda: _examine(ids))
    if sha256 is not None and facts["sha256"] != sha256:
        raise UserError(f"{path} was altered (wrong sha256): {ANEW}")
    if vocab_size is not None and facts["highest"] >= vocab_size:
        raise UserError(
            f"{path} holds token id {facts['highest']}, outside the vocabulary of {vocab_size}: it "
            "was made with another tokenizer; set data.tokenizer to that one"
        )
    return facts["sha256"]


def _examine(ids: np.ndarray) -> dict[str, Any]:
    digest, highest = hashlib.sha256(), 0
    for at in range(0, len(ids), _CHECK_TOKENS):
        part = ids[at : at + _CHECK_TOKENS]
        digest.update(part.data)
        highest = max(highest, int(part.max()))
    return {"sha256": digest.hexdigest(), "highest": highest}


def _starts(shards: Iterable[np.ndarray]) -> list[int]:
    return [0, *np.cumsum([len(shard) for shard in shards]).tolist()]
