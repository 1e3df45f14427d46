"""The edge: recipe files and command-line overrides, by ml_collections, to one strict `Config`."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from gptjax.config import Config, ConfigError, UserError, flatten, from_dict, unknown_key


def from_file(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The config of FILE or FILE:ARGUMENT, whose `get_config(ARGUMENT)` returns a ConfigDict.

    Args:
        recipe: "configs/gpt2.py:124m".
        overrides: "--config.optim.peak_lr=6e-4", or the two halves apart.

    Raises:
        ConfigError: on a missing or failing file, an unknown key or an ill-typed value.
    """
    path = recipe.partition(":")[0]
    if not Path(path).is_file():
        raise ConfigError(f"no config file {path}: name one, such as configs/shakespeare.py")
    # So that recipes can build on each other: `from configs import base`.
    for folder in (Path.cwd(), Path(path).absolute().parent.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    values, argv = flags.FlagValues(), ["gptjax", f"--config={recipe}"]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        found = values["config"].value
    except Exception as error:  # whatever the file's own code raises
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"config {recipe} cannot be read: {told[-1]}") from error
    if not isinstance(found, ConfigDict):
        raise ConfigError(f"get_config() of {path} must return a ConfigDict")
    return _override(found, overrides)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` changed by "--config.optim.peak_lr=6e-4"."""
    return _override(editable(config), overrides)


def of_run(workdir: Path, overrides: Sequence[str] = ()) -> Config:
    """The config that a run was made with, changed by `overrides`.

    Its mesh is that of the devices at hand, batch-parallel, unless an override says else: a
    model trained on a pod is evaluated on a laptop.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(
            f"{workdir} holds no run: it has no config.json; train one, or name another --workdir"
        )
    try:
        tree = json.loads(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError
        config: Config = from_dict(tree)
    except ConfigError as error:
        raise UserError(f"{path} is not of this version of gptjax: {error}") from None
    except ValueError:
        raise UserError(f"{path} is damaged, it is no JSON object: restore it") from None
    mesh = dataclasses.replace(config.mesh, data=None, fsdp=1, tensor=1)
    return override(dataclasses.replace(config, mesh=mesh), overrides)


def editable(section: Any) -> ConfigDict:
    """A config dataclass as a ConfigDict whose None values know their type."""
    hints = typing.get_type_hints(type(section))
    found = ConfigDict()
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            value = editable(value)
        elif value is None:
            kind = next(k for k in typing.get_args(hints[field.name]) if k is not type(None))
            value = placeholder(typing.get_origin(kind) or kind)
        found[field.name] = value
    return found


def difference(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """{knob: (in a, in b)} of the knobs that differ."""
    one, other = flatten(dataclasses.asdict(a)), flatten(dataclasses.asdict(b))
    return {knob: (one[knob], other[knob]) for knob in one if one[knob] != other[knob]}


def _override(found: ConfigDict, overrides: Sequence[str]) -> Config:
    """`found` with "--config.a.b=value" applied; ml_collections reads the values by type."""
    knobs, nothing = flatten(found.to_dict()), []
    words: list[str] = []
    for word in overrides:
        if word == "None" and words and words[-1].removeprefix("--config.") in knobs:
            word = f"{words.pop()}=None"  # its two halves stood apart
        name, _, value = word.removeprefix("--config.").partition("=")
        if word.startswith("--config.") and name not in knobs:
            raise ConfigError(unknown_key(name, knobs))
        if value == "None":  # of which ml_collections would make a text
            nothing.append(name)
        else:
            words.append(word)
    values, argv = flags.FlagValues(), ["gptjax", *words]
    config_flags.DEFINE_config_dict("config", found, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)[1:]
    except (flags.Error, ValueError, TypeError, SyntaxError) as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(told[0].removeprefix("flag ")) from error
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}: overrides look like --config.seed=1")
    tree = found.to_dict()
    for name in nothing:
        *sections, knob = name.split(".")
        functools.reduce(dict.__getitem__, sections, tree)[knob] = None
    return from_dict(tree)
