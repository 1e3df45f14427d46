"""A model small enough to train in a second, for tests of whole runs."""

from __future__ import annotations

from pathlib import Path

from gptjax import configure
from gptjax.config import Config
from gptjax.data import prepare

RECIPE = "configs/base.py"
KNOBS = {
    "model.vocab_size": 264,  # 257 bytes, rounded up so that it divides over 8 devices
    "model.context": 16,
    "model.layers": 2,
    "model.width": 16,
    "model.heads": 4,
    "data.tokenizer": "bytes",
    "data.batch_size": 8,
    "optim.warmup_steps": 3,
    "train.steps": 20,
    "train.log_every": 1,
    "train.eval_every": 10,
    "train.checkpoint_every": 5,
    "eval.batch_size": 8,
    "sample.max_new_tokens": 8,
    "sample.prompt": "the ",
}
TEXT = "".join(
    f"the {a} sees the {b}.\n" for a in ("cat", "dog", "owl") * 9 for b in ("sun", "sea")
)


def make_store(folder: Path, text: str = TEXT) -> Path:
    """A token store of `text` in bytes, a fifth held out."""
    file = folder / "text.txt"
    file.write_text(text)
    prepare([file], folder / "store", "bytes", val_fraction=0.2)
    return folder / "store"


def overrides(store: Path, **knobs: object) -> list[str]:
    """The words that make configs/base.py tiny; knobs are given as model__width=32."""
    changed = {name.replace("__", "."): value for name, value in knobs.items()}
    named = {**KNOBS, "data.sources": f"('{store}',)", **changed}
    return [f"--config.{name}={value}" for name, value in named.items()]


def config(store: Path, **knobs: object) -> Config:
    return configure.from_file(RECIPE, overrides(store, **knobs))
