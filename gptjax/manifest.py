"""A checkpoint's manifest: bytes and sha256 of every other file, and how files differ from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gptjax import storage
from gptjax.storage import Place, Unreachable

MANIFEST = "manifest.json"
READERS = 4  # threads that read or put files; hashlib and tensorstore leave the interpreter's lock


def entry(file: Place) -> dict[str, Any]:
    """What a manifest says of a file."""
    if isinstance(file, Path):
        return {"bytes": file.stat().st_size, "sha256": storage.sha256(file)}
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def text(entries: Mapping[str, Any]) -> bytes:
    """Bytes and sha256 of every other file, as canonical JSON."""
    return json.dumps(dict(sorted(entries.items())), indent=1).encode()


def damage(folder: Place, process: int, processes: int) -> str:
    """How files differ from the manifest, by the first that does; "" when they are intact.

    Each process hashes its share of the files. The manifest guards itself: it is canonical, and
    each number in it is compared.
    """
    try:
        stored, names = (folder / MANIFEST).read_bytes(), storage.files(folder)
        try:
            listed = dict(json.loads(stored))
            sizes = {name: -entry["bytes"] for name, entry in listed.items()}
            if text(listed) != stored or any(len(e) != 2 for e in listed.values()):
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
            entries = pool.map(lambda name: entry(folder / name), share)
            for name, found in zip(share, entries, strict=True):
                if found != listed[name]:
                    return f"{name} was altered or cut short (it holds {found['bytes']} bytes)"
    except Unreachable:
        raise
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return ""
