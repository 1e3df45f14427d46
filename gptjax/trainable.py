"""Which parameters are trained, and how the model's tree is made of them: a table.

The optimiser, its gradient and the average see the trained tree alone. What is not trained is
carried beside it, and neither differentiated nor averaged.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gptjax import model, sharding
from gptjax.config import Config, ConfigError, Model, choose
from gptjax.layers.linear import is_adapted, keep
from gptjax.layers.parameter import Adapted, Spec, draw_all, widen
from gptjax.model import Params


class Trainable(NamedTuple):
    """A row, for one config.

    Attributes:
        specs: the trained tree, with a `Spec` at each leaf.
        split: the model's tree -> the trained tree and the frozen one, None where it is empty.
        realise: (trained, frozen) -> the parameters that `model.hidden` takes.
        whole: (trained, frozen) -> the same as the model's tree, whose matrices may be `Adapted` and
            `Scaled`.
        dropout: whether what is trained drops anything out, besides the model.
    """

    specs: Params
    split: Callable[[Params], tuple[Params, Params | None]]
    realise: Callable[[Params, Params | None], Params]
    whole: Callable[[Params, Params | None], Params]
    dropout: bool = False


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
    specs = _specs(config)
    patterns = config.train.frozen
    frozen = {path for path in specs if any(fnmatch.fnmatchcase(path, p) for p in patterns)}
    idle = [p for p in patterns if not fnmatch.filter(specs, p)]
    if idle or not frozen or len(frozen) == len(specs):
        wrong = f"{idle[0]!r} matches none" if idle else "must match some, and not all"
        raise ConfigError(f"train.frozen: {wrong} of the parameters: {', '.join(sorted(specs))}")
    return _without(config, frozen)


def heads_only(config: Config) -> Trainable:
    """The output projection alone: a linear classifier of tokens on the frozen stream."""
    if config.model.tied:
        raise ConfigError(
            "train.trainable='heads_only' trains the output projection, which is the token table "
            "where model.tied is True: set it to False, or name another row"
        )
    return _without(config, {path for path in _specs(config) if not path.startswith("unembed/")})


def last_n_layers(config: Config) -> Trainable:
    """The last `train.last_layers` blocks, without the norm and the projection behind them."""
    n, L = config.train.last_layers, config.model.layers
    if n > L:
        raise ConfigError(f"train.last_layers={n} exceeds model.layers={L}: lower it")
    specs, first = _specs(config), L - n
    trained = {
        path: dataclasses.replace(spec, shape=(n, *spec.shape[1:]))
        for path, spec in specs.items()
        if path.startswith("blocks/") and spec.role != "moved"
    }

    def split(params: Params) -> tuple[Params, Params | None]:
        leaves, last = flatten_dict(params, sep="/"), {}
        for path in trained:
            leaf = leaves.pop(path)
            last[path] = leaf[first:]
            if first:
                leaves[path] = leaf[:first]
        return unflatten_dict(last, sep="/"), unflatten_dict(leaves, sep="/") or None

    def realise(last: Params, kept: Params | None) -> Params:
        """Layers apart, so that no gradient is made of those that are not trained."""
        ours, theirs = flatten_dict(last, sep="/"), flatten_dict(kept or {}, sep="/")

        def leaf(path: str, i: int) -> jax.Array:
            return ours[path][i - first] if path in ours and i >= first else theirs[path][i]

        blocks = [path for path in specs if path.startswith("blocks/")]
        with jax.named_scope("parameters"):
            layers = ({path: leaf(path, i) for path in blocks} for i in range(L))
            apart = tuple(unflatten_dict(layer, sep="/")["blocks"] for layer in layers)
        return (kept or {}) | {"blocks": apart}

    def whole(last: Params, kept: Params | None) -> Params:
        leaves = flatten_dict(kept or {}, sep="/")
        for path, leaf in flatten_dict(last, sep="/").items():
            leaves[path] = jnp.concatenate([leaves[path], leaf]) if path in leaves else leaf
        return unflatten_dict(leaves, sep="/")

    return Trainable(unflatten_dict(trained, sep="/"), split, realise, whole)


def lora(config: Config) -> Trainable:
    """Adapters of the blocks' matrices that `train.lora_matrices` names (Hu et al. 2022,
    arXiv:2106.09685), which begin as peft's do: B is 0, so that the model is the base."""
    t, specs = config.train, _specs(config)
    names = {
        path.removeprefix("blocks/"): path
        for path, spec in specs.items()
        if path.startswith("blocks/") and spec.kind == "matrix"
    }
    patterns = t.lora_matrices or ("*",)
    if idle := [p for p in patterns if not fnmatch.filter(names, p)]:
        raise ConfigError(
            f"train.lora_matrices: {idle[0]!r} matches none of the matrices of the blocks, which "
            f"alone have adapters: {', '.join(names)}. A table that is tied would have one for the "
            "rows looked up and another for the logits"
        )
    adapted = [
        path for n, path in names.items() if any(fnmatch.fnmatchcase(n, p) for p in patterns)
    ]
    routed = [path for path in adapted if "E" in specs[path].stacks]
    if routed and t.lora_dropout:
        raise ConfigError(
            f"train.lora_dropout={t.lora_dropout} does not go with adapters of experts "
            f"({routed[0]}): set it to 0, or name other train.lora_matrices"
        )
    factors = {
        f"{path}/{name}": spec
        for path in adapted
        for name, spec in zip("ab", adapter_specs(specs[path], t.lora_rank), strict=True)
    }
    scale = t.lora_alpha / t.lora_rank

    def split(params: Params) -> tuple[Params, Params | None]:
        leaves = flatten_dict(params, sep="/")
        given = {path: leaf for path, leaf in leaves.items() if is_adapted(leaf)}
        if given:
            trained = {f"{p}/{n}": getattr(x, n) for p, x in given.items() for n in "ab"}
            leaves |= {path: leaf.base for path, leaf in given.items()}
        else:
            drawn = draw_all(tuple(factors.items()), jax.random.key(config.seed))
            trained = dict(zip(factors, drawn, strict=True))
        return unflatten_dict(trained, sep="/"), unflatten_dict(leaves, sep="/")

    def realise(trained: Params, kept: Params | None) -> Params:
        leaves, ours = flatten_dict(kept or {}, sep="/"), flatten_dict(trained, sep="/")
        for path in adapted:
            a, b = (ours[f"{path}/{name}"] for name in "ab")
            leaves[path] = Adapted(leaves[path], a, b, scale=scale, dropout=t.lora_dropout)
        return unflatten_dict(leaves, sep="/")

    tree = unflatten_dict(factors, sep="/")
    return Trainable(tree, split, realise, realise, dropout=t.lora_dropout > 0)


def qlora(config: Config) -> Trainable:
    """`lora` on a base whose matrices are held in 8 bits (Dettmers et al. 2023, arXiv:2305.14314).

    They are rounded once, when training begins, with a scale for each output, and widened in their
    product: what they meet is not rounded. The paper has 4 bits of a normal distribution and a scale
    for each 64 weights, and leaves the tables as they are likewise.
    """
    row, specs = lora(config), _specs(config)
    rounded = jax.jit(keep, static_argnums=(0, 1))

    def split(params: Params) -> tuple[Params, Params | None]:
        trained, frozen = row.split(params)
        leaves = flatten_dict(frozen or {}, sep="/")
        for path in leaves:
            if specs[path].kind == "matrix":
                leaves[path] = rounded("int8", specs[path], leaves[path])
        return trained, unflatten_dict(leaves, sep="/")

    def realise(trained: Params, kept: Params | None) -> Params:
        # A product that rounds takes a base of float32, and rounds it by its own rule.
        return row.realise(trained, kept if config.model.products == "dtype" else widen(kept))

    return row._replace(split=split, realise=realise, whole=realise)


def adapter_specs(spec: Spec, rank: int) -> tuple[Spec, Spec]:
    """What the adapter of a matrix declares: A, uniform within 1 / sqrt(fan-in), and B, 0.

    The bound is that of `kaiming_uniform_(a=sqrt(5))` in PyTorch, sqrt(6 / (1 + 5)) / sqrt(fan-in).
    """
    sizes = dict(zip(spec.dims, spec.shape, strict=True)) | {"R": rank}

    def factor(dims: str, std: float, role: str, fan_in: str) -> Spec:
        shape = tuple(sizes[dim] for dim in dims)
        return Spec(shape, dims, 0.0, std, role, fan_in, spec.stacks)

    a_dims, b_dims = spec.adapter
    std = (3 * spec.size(spec.fan_in)) ** -0.5
    return factor(a_dims, std, "adapter_in", spec.fan_in), factor(b_dims, 0.0, "adapter_out", "R")


def has_adapters(params: Params) -> bool:
    return any(map(is_adapted, jax.tree.leaves(params, is_leaf=is_adapted)))


def without_adapters(params: Params) -> Params:
    """The base of a model with adapters, such as the reference of one that is taught."""
    off = lambda leaf: leaf.base if is_adapted(leaf) else leaf  # noqa: E731
    return jax.tree.map(off, params, is_leaf=is_adapted)


def merged(config: Model, params: Params) -> Params:
    """The model's tree with each adapter added to its matrix, in float32; a base of 8 bits is widened."""

    def one(leaf: jax.Array | Adapted, spec: Spec) -> jax.Array:
        if not isinstance(leaf, Adapted):
            return leaf
        a_dims, b_dims = spec.adapter
        where = None if sharding.out("") is None else sharding.parameter_spec(spec.dims)
        exact = jax.lax.Precision.HIGHEST
        equation = f"{a_dims},{b_dims}->{spec.dims}"
        delta = jnp.einsum(equation, leaf.a, leaf.b, precision=exact, out_sharding=where)
        base: Any = leaf.base
        return base + leaf.scale * delta

    return jax.tree.map(one, widen(params), model.abstract_params(config), is_leaf=is_adapted)


def _specs(config: Config) -> dict[str, Spec]:
    return flatten_dict(model.abstract_params(config.model), sep="/")


def _without(config: Config, frozen: set[str]) -> Trainable:
    """All but the parameters at `frozen`, and those that move without a gradient."""
    specs = _specs(config)
    frozen = frozen | {path for path, spec in specs.items() if spec.role == "moved"}
    if not frozen:
        every = lambda trained, frozen: trained  # noqa: E731
        return Trainable(unflatten_dict(specs, sep="/"), lambda p: (p, None), every, every)

    def split(params: Params) -> tuple[Params, Params | None]:
        leaves = flatten_dict(params, sep="/")
        frozen_leaves = {path: leaf for path, leaf in leaves.items() if path in frozen}
        trained_leaves = {path: leaf for path, leaf in leaves.items() if path not in frozen}
        return unflatten_dict(trained_leaves, sep="/"), unflatten_dict(frozen_leaves, sep="/")

    def realise(trained: Params, kept: Params | None) -> Params:
        leaves = flatten_dict(trained, sep="/") | flatten_dict(kept or {}, sep="/")
        return unflatten_dict(leaves, sep="/")

    trained = {path: spec for path, spec in specs.items() if path not in frozen}
    return Trainable(unflatten_dict(trained, sep="/"), split, realise, realise)


TRAINABLE: dict[str, Callable[[Config], Trainable]] = {
    "all": everything,
    "unfrozen": unfrozen,
    "lora": lora,
    "qlora": qlora,
    "last_n_layers": last_n_layers,
    "heads_only": heads_only,
}


def trainable(config: Config) -> Trainable:
    """What the config trains.

    Raises:
        ConfigError: on an unknown `train.trainable`, or patterns that do not fit it.
    """
    return choose(TRAINABLE, config.train.trainable, "train.trainable")(config)
