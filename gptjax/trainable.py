"""Which parameters are trained, and how the model's tree is made of them: a table.

The optimiser, its gradient and the average see the trained tree alone. What is not trained is
carried beside it, and neither differentiated nor averaged.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

from gptjax import model
from gptjax.config import Config, ConfigError, choose
from gptjax.model import Params


class Trainable(NamedTuple):
    """A row, for one config.

    Attributes:
        specs: the trained tree, with a `Spec` at each leaf.
        split: the model's tree -> the trained tree and the frozen one, None where it is empty.
        realise: (trained, frozen) -> the model's tree.
    """

    specs: Params
    split: Callable[[Params], tuple[Params, Params | None]]
    realise: Callable[[Params, Params | None], Params]


def everything(config: Config) -> Trainable:
    """The model's own tree, but for what moves without a gradient."""
    if config.train.frozen:
        raise ConfigError(
            "train.frozen names parameters, but train.trainable='all' trains them: set "
            "train.trainable='unfrozen', or train.frozen=()"
        )
    return _without(config, set())


def unfrozen(config: Config) -> Trainable:
    """All but the parameters whose path matches a pattern of `train.frozen`, "embed/*"."""
    specs = flatten_dict(model.abstract_params(config.model), sep="/")
    patterns = config.train.frozen
    frozen = {path for path in specs if any(fnmatch.fnmatchcase(path, p) for p in patterns)}
    idle = [p for p in patterns if not fnmatch.filter(specs, p)]
    if idle or not frozen or len(frozen) == len(specs):
        wrong = f"{idle[0]!r} matches none" if idle else "must match some, and not all"
        raise ConfigError(f"train.frozen: {wrong} of the parameters: {', '.join(sorted(specs))}")
    return _without(config, frozen)


def _without(config: Config, frozen: set[str]) -> Trainable:
    """All but the parameters at `frozen`, and those that move without a gradient."""
    specs = flatten_dict(model.abstract_params(config.model), sep="/")
    frozen = frozen | {path for path, spec in specs.items() if spec.role == "moved"}
    if not frozen:
        whole = model.abstract_params(config.model)
        return Trainable(whole, lambda params: (params, None), lambda trained, frozen: trained)

    def split(params: Params) -> tuple[Params, Params | None]:
        leaves = flatten_dict(params, sep="/")
        frozen_leaves = {path: leaf for path, leaf in leaves.items() if path in frozen}
        trained_leaves = {path: leaf for path, leaf in leaves.items() if path not in frozen}
        return unflatten_dict(trained_leaves, sep="/"), unflatten_dict(frozen_leaves, sep="/")

    def realise(trained: Params, kept: Params | None) -> Params:
        leaves = flatten_dict(trained, sep="/") | flatten_dict(kept or {}, sep="/")
        return unflatten_dict(leaves, sep="/")

    trained = {path: spec for path, spec in specs.items() if path not in frozen}
    return Trainable(unflatten_dict(trained, sep="/"), split, realise)


TRAINABLE: dict[str, Callable[[Config], Trainable]] = {"all": everything, "unfrozen": unfrozen}


def trainable(config: Config) -> Trainable:
    """What the config trains.

    Raises:
        ConfigError: on an unknown `train.trainable`, or patterns that do not fit it.
    """
    return choose(TRAINABLE, config.train.trainable, "train.trainable")(config)
