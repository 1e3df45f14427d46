"""What tests are made of, small enough for a second, each with every knob that a test leaves out.

`model`, `optim`, `data`, `train` and `sample` are sections of a config by the names of what
differs, `axes` and `mesh` meshes by the sizes of their axes; `config` is a whole run on a store, `study` several.
A new knob is stated in the config and its recipe alone.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest

from gptjax import configure, sharding
from gptjax.config import Config, Data, Mesh, Model, Optim, Sample, Train
from gptjax.data import prepare
from gptjax.layers.feedforward import Branch
from gptjax.layers.parameter import parameter
from gptjax.study.spec import Study

RECIPE = "configs/base.py"
BASE = configure.from_file(str(Path(__file__).parents[1] / RECIPE))

# GPT-2's block.
MODEL = dataclasses.replace(
    BASE.model, vocab_size=64, context=128, width=16, layers=2, ff_dim=24, attention="plain"
)


def model(**knobs: Any) -> Model:
    return dataclasses.replace(MODEL, **knobs)


def optim(**knobs: Any) -> Optim:
    return dataclasses.replace(BASE.optim, **knobs)


def data(**knobs: Any) -> Data:
    return dataclasses.replace(BASE.data, **knobs)


def train(**knobs: Any) -> Train:
    return dataclasses.replace(BASE.train, **knobs)


def environment(devices: int) -> dict[str, str]:
    """Of a child process with so many virtual devices, which compiles as these tests do."""
    flags = re.sub(r"(?<=device_count=)\d+", str(devices), os.environ["XLA_FLAGS"])
    return os.environ | {"XLA_FLAGS": flags}


def as_users_compile(code: str, **environment: str) -> str:
    """What `code` prints in a process of its own: tests compile with fewer optimisations."""
    hidden = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    users = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=users | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sample(**knobs: Any) -> Sample:
    return dataclasses.replace(BASE.sample, **knobs)


def axes(**sizes: int | None) -> Mesh:
    """The mesh section of a config: an axis that is not named has one device."""
    ones = {field.name: 1 for field in dataclasses.fields(Mesh)}
    return Mesh(**{**ones, **sizes})


# All eight: tests see the first alone as `jax.devices()`, unless they ask for `eight_devices`.
devices = jax.devices


@contextmanager
def seeing(count: int) -> Iterator[None]:
    """Commands see so many of the devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: devices(*backend)[:count])
        yield


def mesh(**sizes: int) -> jax.sharding.Mesh:
    """A mesh of the first devices, as many as it takes; without a name, of one."""
    return mesh_of(axes(**sizes))


def mesh_of(section: Mesh) -> jax.sharding.Mesh:
    """As `mesh`, of the section of a config; an axis of None has what the others leave of eight."""
    sizes = dataclasses.astuple(section)
    count = None if None in sizes else math.prod(sizes)
    return sharding.make_mesh(section, devices()[:count])


# Over eight devices: rows, parameters, both with the heads, mostly heads, and parts of rows.
DATA, FSDP, CUBE, TENSOR, SEQUENCE = MESHES = (
    axes(data=8), axes(fsdp=8), axes(data=2, fsdp=2, tensor=2), axes(fsdp=2, tensor=4),
    axes(fsdp=2, sequence=2, tensor=2),
)  # fmt: skip

KNOBS = {
    "model.vocab_size": 264,  # 257 bytes, rounded up so that it divides over 8 devices
    "model.context": 16,
    "model.layers": 1,
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


def either(module: Any, c: Model, x_BTD: jax.Array, tap: Any) -> jax.Array:
    """A feed-forward that cannot be counted: how often it multiplies depends on the values."""
    w = parameter(module, c, "w", "DF", (c.width, c.width), "matrix", fan_in="D")
    return jax.lax.cond(x_BTD.sum() > 0, lambda x: x + (x @ w).sum(), lambda x: x, x_BTD)


UNCOUNTABLE = Branch(either, lambda width: width)


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


# The one arm of a study whose baseline has learned positions.
ARMS: dict[str, Any] = {"rope": {"model.position": "rope"}}


def study(
    store: Path, arms: dict[str, Any] = ARMS, knobs: dict[str, object] | None = None, **fields: Any
) -> Study:
    """A study of tiny runs; `knobs` as for `overrides`."""
    return Study("?", RECIPE, arms, overrides=tuple(overrides(store, **(knobs or {}))), **fields)


def files(folder: Path) -> dict[Path, bytes]:
    """What lies in a study's store, but for its locks."""
    paths = [p for p in folder.rglob("*") if p.is_file() and ".locks" not in p.parts]
    return {p.relative_to(folder): p.read_bytes() for p in paths}
