"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax

from gptjax.config import UserError


def replace_file(path: Path, content: bytes) -> None:
    """Writes aside and renames, so that no reader and no kill ever sees half a file."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content)
    os.replace(aside, path)


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[None]:
    try:
        yield
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
    aside = out.parent / f".{out.name}.{uuid.uuid4().hex}.partial"
    try:
        yield aside
        if jax.process_index() == 0:
            os.rename(aside, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
