"""A trained model in a folder: a run of ours, or a pretrained model (a Hugging Face folder).

Whatever works on a model works on either, by the folder's path alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptjax import configure, setup, sharding, state
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.config import Config, ConfigError, Model, UserError
from gptjax.interop import hf, pretrained
from gptjax.model import Params, abstract_params
from gptjax.sharding import make_mesh
from gptjax.tokenizer import Tokenizer

# A pretrained model has no settings of ours for evaluation and sampling: these are taken.
SETTINGS = str(configure.RECIPES / "base.py")
LONGEST = 2048  # of a pretrained model's context so much is used unless an override says else


def is_pretrained(folder: Path) -> bool:
    """Whether `folder` is a Hugging Face folder, not a run of ours.

    Raises:
        UserError: if its config.json is damaged.
    """
    path = folder / hf.CONFIG
    if not path.is_file():
        return False
    try:
        tree = json.loads(path.read_bytes())
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is damaged, it is no JSON object: restore it")
    return "model_type" in tree


def config_of(folder: Path, recipe: str | None, overrides: Sequence[str] = ()) -> Config:
    """The config to use a model by.

    Args:
        folder: a run or a pretrained model.
        recipe: FILE[:ARG] for the settings; None: the run's own, or `SETTINGS`.
        overrides: "--config.eval.stride=64".

    Raises:
        UserError: if it is neither, or the config cannot be read.
    """
    if is_pretrained(folder):
        settings = configure.from_file(recipe or SETTINGS)
        wide = dataclasses.replace(settings.model, context=LONGEST)
        config = pretrained.adopt(dataclasses.replace(settings, model=wide), folder)
        return configure.override(config, overrides)
    if recipe is not None:
        return configure.from_file(recipe, overrides)
    return configure.of_run(folder, overrides)


def restore(config: Config, folder: Path) -> tuple[int, Params]:
    """The step of a model (0 of a pretrained one) and its parameters, on the current mesh.

    Raises:
        UserError: if there is no complete checkpoint, or it is damaged or of another model.
    """
    setup.check_names(config)
    config = setup.settle(config)
    sharding.check_model_divisible(abstract_params(config.model), jax.sharding.get_mesh().shape)
    if is_pretrained(folder):
        _check_fits(config.model, pretrained.adopt(config, folder).model, folder)
        return 0, pretrained.load(folder).params
    _check_fits(config.model, configure.of_run(folder).model, folder)
    with Checkpoints(folder / CHECKPOINTS) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{folder} holds no complete checkpoint: train it first")
        saved = checkpoints.restore(step, state.abstract(config))
        return step, state.evaluation_params(config, saved)


def _check_fits(config: Model, weights: Model, folder: Path) -> None:
    """Refuses a config by which a model's parameters would be others than those in `folder`.

    jax would not: of layers that are not there it takes the last again.

    Args:
        weights: the config that they were made by, or are described by.
    """
    one, other = dataclasses.asdict(config), dataclasses.asdict(weights)
    differ = [knob for knob in one if one[knob] != other[knob]]
    if not differ or _shapes(config) == (have := _shapes(weights)):
        return

    def matters(knob: str) -> bool:
        try:
            return _shapes(dataclasses.replace(weights, **{knob: one[knob]})) != have
        except ConfigError:  # not without another
            return True

    differences = [
        f"model.{k}={one[k]!r}, where they have {other[k]!r}" for k in differ if matters(k)
    ]
    raise UserError(f"this config does not fit the weights in {folder}: {'; '.join(differences)}")


def _shapes(config: Model) -> Any:
    return jax.tree.map(lambda spec: spec.shape, abstract_params(config))


class Opened(NamedTuple):
    """A model at hand: its config settled for the mesh, its step (0 of a pretrained one)."""

    config: Config
    step: int
    params: Params
    tokenizer: Tokenizer


@contextlib.contextmanager
def opened(config: Config, folder: Path) -> Iterator[Opened]:
    """A model and its tokenizer, on the mesh of `config`, which is set while the context lasts.

    Raises:
        UserError: as `restore`, or if the tokenizer does not fit the model.
    """
    with jax.set_mesh(make_mesh(config.mesh)):
        step, params = restore(config, folder)
        yield Opened(setup.settle(config), step, params, setup.load_tokenizer(config))


def start_from(
    config: Config, folder: Path, overrides: Sequence[str]
) -> tuple[Config, setup.Start]:
    """`config` with a pretrained model's architecture and tokenizer, and its parameters.

    What `overrides` set outright is set all the same.

    Raises:
        UserError: if `folder` is no pretrained model, or has other parameters than `overrides` ask
            for.
    """
    start = start_of(folder)
    config = configure.override(pretrained.adopt(config, folder), overrides)
    _check_fits(config.model, pretrained.adopt(config, folder).model, folder)
    return config, start


def start_of(folder: Path) -> setup.Start:
    """A pretrained model's parameters to begin a run with.

    Raises:
        UserError: if `folder` is no pretrained model.
    """
    if not is_pretrained(folder):
        raise UserError(
            f"{folder} is no pretrained model: make one with `import`, or `export` a run"
        )
    digest = hashlib.sha256()
    with hf.about(folder):
        files = hf.weight_files(folder)
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return setup.Start(lambda: pretrained.load(folder).params, digest.hexdigest())
