"""Where files lie: homes, and the cache."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from gptjax.config import UserError


def expand(path: str | Path) -> Path:
    """A path as a shell reads it: ~/x lies in the home directory.

    Raises:
        UserError: where that is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: its home directory is not known, write the whole path") from None


def cache() -> Path:
    """The folder of what can be made again: $GPTJAX_CACHE, or ~/.cache/gptjax. Made if absent.

    Raises:
        UserError: where it is not known, or cannot be written.
    """
    instead = "set GPTJAX_CACHE to a folder that can be"
    try:
        folder = expand(os.environ.get("GPTJAX_CACHE") or Path.home() / ".cache" / "gptjax")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # which tells more than permissions do
            return folder.absolute()
    except RuntimeError:
        raise UserError(
            f"no home directory is known to keep a cache in: {instead} written"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write the cache {folder} ({error.strerror}): {instead}") from None
