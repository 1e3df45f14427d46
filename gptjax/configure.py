"""The edge: recipe files and command-line overrides, by ml_collections, to one strict `Config`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import re
import runpy
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

import gptjax
from gptjax.config import (
    BATCH_PARALLEL,
    Config,
    ConfigError,
    UserError,
    flatten,
    from_dict,
    recorded,
    unknown_key,
)
from gptjax.storage import Place, local

# The recipes that come with the package: by this name in a wheel, which shares its folder.
RECIPES = Path(gptjax.__file__).absolute().parents[1] / "gptjax_configs"
if not RECIPES.is_dir():
    RECIPES = RECIPES.with_name("configs")


def from_file(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The config of FILE or FILE:ARGUMENT, whose `get_config(ARGUMENT)` returns a ConfigDict.

    Args:
        recipe: "configs/gpt2.py:124m".
        overrides: "--config.optim.peak_lr=6e-4", or the two halves apart.

    Raises:
        ConfigError: on a missing or failing file, an unknown key or an ill-typed value.
    """
    path, argument = find(recipe)
    try:
        with _neighbours(path.absolute().parent):
            get_config = runpy.run_path(str(path)).get("get_config")
            if get_config is None:
                raise ConfigError("it defines no get_config()")
            settings = get_config() if argument is None else get_config(argument)
    except Exception as error:  # whatever the file's own code raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"config {recipe} cannot be read: {reason[-1]}") from error
    if not isinstance(settings, ConfigDict):
        raise ConfigError(f"get_config() of {path} must return a ConfigDict")
    return _override(settings, overrides)


def find(recipe: str) -> tuple[Path, str | None]:
    """The file and the argument of FILE[:ARGUMENT].

    configs/NAME.py is the recipe that comes with the package where there is no such file.

    Raises:
        ConfigError: if there is no such file.
    """
    ends = [len(recipe), *(match.start() for match in re.finditer(":", recipe))]
    for end in ends:
        path, argument = local(recipe[:end]), recipe[end + 1 :] if end < len(recipe) else None
        if path.is_file():
            return path, argument
        if path == Path("configs", path.name) and (RECIPES / path.name).is_file():
            return RECIPES / path.name, argument
    recipes = ", ".join(sorted(f"configs/{file.name}" for file in RECIPES.glob("*.py")))
    raise ConfigError(f"no config file {recipe.partition(':')[0]}: name one, such as {recipes}")


@contextlib.contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """Lets a recipe in `folder` import others, `from configs import base`, and forgets them.

    Another checkout's recipes have the same names. Besides its own neighbours a recipe finds
    those of the package.
    """
    packages = {"configs": [folder.parent / "configs", RECIPES] if folder != RECIPES else [RECIPES]}
    if folder.name not in sys.modules:
        packages.setdefault(folder.name, [folder])
    hidden = {n: sys.modules.pop(n) for n in list(sys.modules) if n.partition(".")[0] in packages}
    for name, places in packages.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(place) for place in places]
    sys.path.insert(0, str(folder.parent))
    importlib.invalidate_caches()  # files may be a moment old
    try:
        yield
    finally:
        sys.path.remove(str(folder.parent))
        for name in [n for n in sys.modules if n.partition(".")[0] in packages]:
            del sys.modules[name]
        sys.modules.update(hidden)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` changed by "--config.optim.peak_lr=6e-4"."""
    return _override(editable(config), overrides)


def check(overrides: Sequence[str]) -> None:
    """Refuses overrides that fit no config, where the one that they are for is not here.

    Raises:
        ConfigError: on an unknown key or an ill-typed value.
    """
    _overridden(editable(from_file("configs/base.py")), overrides)


def of_run(workdir: Place, overrides: Sequence[str] = ()) -> Config:
    """The config that a run was made with, changed by `overrides`.

    Its mesh is that of the devices at hand, batch-parallel, unless an override says else: a
    model trained on a pod is evaluated on a laptop.
    """
    config = dataclasses.replace(as_recorded(workdir), mesh=BATCH_PARALLEL)
    return override(config, overrides)


def as_recorded(workdir: Place) -> Config:
    """The config that a run was made with, its mesh as well."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(
            f"{workdir} holds no run: it has no config.json; train one, or name another --workdir"
        )
    return of_file(path, path.read_bytes())


def of_file(path: Place, content: bytes) -> Config:
    """The config in a config.json, of which its name is told where that holds none."""
    try:
        tree = json.loads(content)
        if not isinstance(tree, dict):
            raise ValueError
        return recorded(tree)
    except ConfigError as error:
        raise UserError(f"{path} is not of this version of gptjax: {error}") from None
    except ValueError:
        raise UserError(f"{path} is damaged, it is no JSON object: restore it") from None


def editable(section: Any) -> ConfigDict:
    """A config dataclass as a ConfigDict whose None values know their type."""
    hints = typing.get_type_hints(type(section))
    section_dict = ConfigDict()
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            value = editable(value)
        elif value is None:
            kind = next(k for k in typing.get_args(hints[field.name]) if k is not type(None))
            value = placeholder(typing.get_origin(kind) or kind)
        section_dict[field.name] = value
    return section_dict


def difference(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """{knob: (in a, in b)} of the knobs that differ."""
    fields_a, fields_b = flatten(dataclasses.asdict(a)), flatten(dataclasses.asdict(b))
    return {
        knob: (fields_a[knob], fields_b[knob])
        for knob in fields_a
        if fields_a[knob] != fields_b[knob]
    }


def _override(settings: ConfigDict, overrides: Sequence[str]) -> Config:
    return from_dict(_overridden(settings, overrides))


def _overridden(settings: ConfigDict, overrides: Sequence[str]) -> dict[str, Any]:
    """`settings` with "--config.a.b=value" applied; ml_collections reads the values by type.

    Of a knob that is named again the last value counts; of a tuple ml_collections would join them.
    """
    knobs, nothing = flatten(settings.to_dict()), []
    given: dict[str, list[str]] = {"": []}  # by knob, the words of its value
    name = ""
    for word in overrides:
        if word.startswith("--config."):
            name = word.removeprefix("--config.").partition("=")[0]
            if name not in knobs:
                raise ConfigError(unknown_key(name, knobs))
            given[name] = []
        given[name].append(word)
    words: list[str] = []
    for name, of_knob in given.items():
        # Of "None" ml_collections would make a text.
        if of_knob in ([f"--config.{name}=None"], [f"--config.{name}", "None"]):
            nothing.append(name)
        else:
            words += of_knob
    values, argv = flags.FlagValues(), ["gptjax", *words]
    config_flags.DEFINE_config_dict("config", settings, flag_values=values, sys_argv=argv)
    try:
        surplus = values(argv)[1:]
    except (flags.Error, ValueError, TypeError, SyntaxError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(reason[0].removeprefix("flag ")) from error
    if surplus:
        raise ConfigError(
            f"unexpected argument {surplus[0]!r}: overrides look like --config.seed=1"
        )
    tree = settings.to_dict()
    for name in nothing:
        *sections, knob = name.split(".")
        functools.reduce(dict.__getitem__, sections, tree)[knob] = None
    return tree
