"""A trained model: a run of ours, or a pretrained model (a Hugging Face folder, here or on the hub).

Whatever works on a model works on either, by its path or name alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from gptjax import configure, setup, sharding, state
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.config import Config, ConfigError, Model, UserError
from gptjax.interop import pretrained
from gptjax.model import Params, abstract_params
from gptjax.records import read_environment
from gptjax.sharding import make_mesh
from gptjax.storage import Place, expand, on_hub
from gptjax.tokenizer import Tokenizer

# A pretrained model has no settings of ours for evaluation and sampling: these are taken.
SETTINGS = str(configure.RECIPES / "base.py")
LONGEST = 2048  # of a pretrained model's context so much is used unless an override says else


class Trained(NamedTuple):
    """A trained model in a folder, and the config to use it by.

    Attributes:
        folder: its path or URL, or its pinned name on the hub.
        config: not yet settled for a mesh.
        source: what a Hugging Face folder says of itself; None of a run of ours.
    """

    folder: Place
    config: Config
    source: pretrained.Folder | None = None


def find(folder: Place, recipe: str | None = None, overrides: Sequence[str] = ()) -> Trained:
    """The model in a folder; no weights are read.

    Args:
        folder: a run or a pretrained model, or its name on the hub.
        recipe: FILE[:ARG] for the settings; None: the run's own, or `SETTINGS`.
        overrides: "--config.eval.stride=64".

    Raises:
        UserError: if it is neither, or the config cannot be read.
    """
    source = pretrained.find(folder)
    if source is not None:
        settings = configure.from_file(recipe or SETTINGS)
        wide = dataclasses.replace(settings.model, context=LONGEST)
        config = pretrained.adopt(dataclasses.replace(settings, model=wide), source)
        return Trained(source.name, configure.override(config, overrides), source)
    if recipe is not None:
        return Trained(folder, configure.from_file(recipe, overrides))
    return Trained(folder, configure.of_run(folder, overrides))


def _check_fits(config: Model, weights: Model, folder: Place) -> None:
    """Refuses a config by which a model's parameters would be others than those in `folder`.

    jax would not: of layers that are not there it takes the last again.

    Args:
        weights: the config that they were made by, or are described by.
    """
    config_fields, weights_fields = dataclasses.asdict(config), dataclasses.asdict(weights)
    differ = [knob for knob in config_fields if config_fields[knob] != weights_fields[knob]]
    if not differ or _shapes(config) == (have := _shapes(weights)):
        return

    def matters(knob: str) -> bool:
        try:
            return _shapes(dataclasses.replace(weights, **{knob: config_fields[knob]})) != have
        except ConfigError:  # not without another
            return True

    differences = [
        f"model.{k}={config_fields[k]!r}, where they have {weights_fields[k]!r}"
        for k in differ
        if matters(k)
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
def opened(
    model: Trained,
    check: Callable[[Config, Tokenizer], object] | None = None,
    blocks: bool = False,
) -> Iterator[Opened]:
    """A model and its tokenizer, on the mesh of its config, which is set while the context lasts.

    Args:
        check: refuses, before any weights are read, what the settled config and the tokenizer
            do not allow.
        blocks: weights may come in `layers.blocks`, where they are multiplied so: on one CPU.

    Raises:
        UserError: if there is no complete checkpoint, or it is damaged or of another model; if
            the tokenizer does not fit the model; or as `check`.
    """
    with jax.set_mesh(make_mesh(model.config.mesh)):
        setup.check_names(model.config)
        config = setup.settle(model.config)
        sharding.check_model_divisible(abstract_params(config.model), jax.sharding.get_mesh().shape)
        tokenizer = setup.load_tokenizer(config)
        if model.source is None:
            architecture = configure.of_run(model.folder).model
        else:
            architecture = pretrained.adopt(config, model.source).model
        _check_fits(config.model, architecture, model.folder)
        if check is not None:
            check(config, tokenizer)
        if model.source is None:
            yield Opened(config, *_latest(config, model.folder), tokenizer)
        else:
            blocks = blocks and sharding.alone_on("cpu") and config.model.products == "dtype"
            yield Opened(config, 0, pretrained.load(model.source, blocks).params, tokenizer)


def _latest(config: Config, folder: Place) -> tuple[int, Params]:
    """Step and parameters of a run's latest checkpoint."""
    with Checkpoints(folder / CHECKPOINTS) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{folder} holds no complete checkpoint: train it first")
        return step, state.evaluation_params(config, state.restore(config, checkpoints, step))


def start_from(
    config: Config, folder: Place, overrides: Sequence[str]
) -> tuple[Config, setup.Start]:
    """`config` with a pretrained model's architecture and tokenizer, and its parameters.

    What `overrides` set outright is set all the same.

    Raises:
        UserError: if `folder` is no pretrained model, or has other parameters than `overrides` ask
            for; if `train.branch` names another beginning.
    """
    source = _source(folder)
    return _adopted(config, source, overrides), _start(source)


def adopted(config: Config, folder: Place, overrides: Sequence[str]) -> Config:
    """The config of `start_from`, for which no weights are read."""
    return _adopted(config, _source(folder), overrides)


def _adopted(config: Config, source: pretrained.Folder, overrides: Sequence[str]) -> Config:
    if config.train.branch is not None:
        raise UserError(
            f"train.branch={config.train.branch} is another beginning than {source.name}: leave one "
            "of them out"
        )
    config = configure.override(pretrained.adopt(config, source), overrides)
    adopted = pretrained.adopt(config, source)
    _check_fits(config.model, adopted.model, source.name)
    if source.adapter is not None and (kept := adopted.train) != config.train:
        raise UserError(
            f"{source.name} is an adapter, with which training goes on at train.trainable="
            f"{kept.trainable!r}, train.lora_rank={kept.lora_rank}, train.lora_alpha="
            f"{kept.lora_alpha} and train.lora_matrices={kept.lora_matrices}: leave these as they "
            "are, or `export` it first, which merges it"
        )
    return config


def start_of(folder: Place) -> setup.Start:
    """A pretrained model's parameters to begin a run with.

    Raises:
        UserError: if `folder` is no pretrained model.
    """
    return _start(_source(folder))


def base_of(model: Trained) -> str:
    """The name of the pretrained model that a model's adapters adapt.

    Raises:
        UserError: if there is none.
    """
    if model.source is not None:
        adapter = model.source.adapter
        base = None if adapter is None else str(adapter.base.name)
    else:
        begun = [r["initial"] for r in read_environment(model.folder) if "initial" in r]
        base = begun[0].get("base", begun[0]["model"]) if begun else None
    if base is None:
        raise UserError(
            f"{model.folder} has no pretrained model as its base, whose name an adapter bears: "
            "export it whole"
        )
    return base if on_hub(base) else str(expand(base).absolute())


def _source(folder: Place) -> pretrained.Folder:
    source = pretrained.find(folder)
    if source is None:
        raise UserError(
            f"{folder} is no pretrained model: name one on the hub by hf:ORG/NAME, make one with "
            "`import`, or `export` a run"
        )
    return source


def _start(source: pretrained.Folder) -> setup.Start:
    files, digest = pretrained.files(source), hashlib.sha256()
    for file in pretrained.weight_files(source):
        digest.update(bytes.fromhex(files[file.name]))
    record = {"model": str(source.name), "files": files}
    if source.adapter is not None:
        record["base"] = str(source.adapter.base.name)
    return setup.Start(lambda: pretrained.load(source).params, digest.hexdigest(), record)
