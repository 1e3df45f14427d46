"""Models small enough for a second: one to take apart, and a recipe for tests of whole runs."""

from __future__ import annotations

from pathlib import Path

from gptjax import configure
from gptjax.config import Config, Model
from gptjax.data import prepare

# GPT-2's block; tests state what they change by `dataclasses.replace`.
MODEL = Model(
    vocab_size=64, context=128, layers=2, width=16, heads=4, kv_heads=None, head_dim=None,
    feedforward="gelu", ff_dim=24, position="learned", rope_base=1e4, rope_scaling="none",
    rope_factor=1.0, rope_original_context=None, rope_rotations=(1.0, 32.0), norm="layernorm",
    norm_placement="pre", norm_eps=1e-5, bias=True, attention_bias="same", parallel_block=False,
    qk_norm=False, windows=(None,), attention_softcap=None, logit_softcap=None,
    value_residual=False, tied=True, dropout=0.0, init="gpt2", init_scale=1.0,
    parametrisation="standard", mup_base_width=None, mup_base_heads=None, mup_base_layers=None,
    attention="plain", scan_layers=False, remat="none", dtype="float32",
)  # fmt: skip

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
