"""Where tokens come from: stores on disk, nanoGPT folders, and texts shipped in the package."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from gptjax.config import UserError
from gptjax.data.prepare import SPLITS, prepare
from gptjax.data.store import MANIFEST, Store
from gptjax.places import cache
from gptjax.storage import expand
from gptjax.tokenizer import ASSETS, Tokenizer


class Dataset(NamedTuple):
    """A text small enough to ship.

    Attributes:
        files: read in this order.
        val_fraction: the share of its characters that is held out, at its end.
    """

    files: tuple[Path, ...]
    val_fraction: float


# Both hold out The Tempest and the last scenes before it, 103,599 characters.
DATASETS: dict[str, Dataset] = {
    "shakespeare": Dataset((ASSETS / "shakespeare.txt",), 0.1),  # eight plays
    "shakespeare_complete": Dataset(
        (ASSETS / "shakespeare_more.txt", ASSETS / "shakespeare.txt"), 103_598.5 / 5_052_189
    ),
}


def open_source(name_or_path: str, tokenizer: Tokenizer, split: str) -> Store:
    """Opens one split of a built-in text, a token store or a nanoGPT folder.

    A built-in text is tokenised once into $GPTJAX_CACHE (default ~/.cache/gptjax), under a
    name that holds the fingerprints of text and tokenizer; processes may race for it.

    Args:
        name_or_path: a key of DATASETS, or a folder with `train` and `val` stores or with
            nanoGPT's `train.bin` and `val.bin`. A folder named like a dataset needs "./".
        tokenizer: must be the one the store was made with.
        split: "train" or "val".

    Raises:
        UserError: if there is no such source or split, or `Store.open` refuses it.
    """
    if split not in SPLITS:
        raise UserError(f"no split '{split}': choose one of {', '.join(SPLITS)}")
    folder = expand(name_or_path)
    if name_or_path in DATASETS:
        folder = _cached(name_or_path, tokenizer)
    if (folder / split / MANIFEST).is_file():
        return Store.open(folder / split, tokenizer)
    if (folder / f"{split}.bin").is_file():
        return Store.open(folder / f"{split}.bin", tokenizer)
    if any((folder / other / MANIFEST).is_file() for other in SPLITS):
        raise UserError(
            f"{folder} holds no split '{split}': prepare the text anew with a val_fraction above 0"
        )
    raise UserError(
        f"data.sources: '{name_or_path}' is neither a token store, nor a folder with nanoGPT's "
        f"{split}.bin, nor a built-in text ({', '.join(DATASETS)}); make a store with `data`"
    )


def _cached(name: str, tokenizer: Tokenizer) -> Path:
    """The folder of a built-in text's store, made where it is not there yet."""
    files, val_fraction = DATASETS[name]
    text = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    folder = cache() / f"{name}-{tokenizer.fingerprint[:12]}-{text[:12]}"
    if not folder.is_dir():
        prepare(list(files), folder, tokenizer.name, val_fraction)
    return folder
