"""GPT: the block, the stack, and the waist of the codebase: `init` and `apply`.

Shape alphabet, used in names (`x_BTD`), einsums and sharding rules:

    B  batch row            D  width of the residual stream    V  vocabulary
    T  query position       N  query heads                     L  layers
    S  key position         K  key-value heads                 P  learned positions
    A  accumulation step    G  query heads a key-value head    C  vocabulary chunk
    H  head width           F  feed-forward width              E  experts
    R  rank of an adapter   1  one row that stands for all

Parameters are one plain nested dict of float32 arrays. Those of the blocks are stacked
along L whether the layers are scanned or unrolled, so both run the same checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from gptjax import parametrisation, sharding
from gptjax.config import Model, check_seed, choose
from gptjax.layers.attention import Attention
from gptjax.layers.blocks import Blocks
from gptjax.layers.context import (
    INSIDE,
    Cache,
    Context,
    Edit,
    Listen,
    Tap,
    check_met,
    check_points,
)
from gptjax.layers.feedforward import FEEDFORWARD, FeedForward
from gptjax.layers.linear import drop_inputs, linear, look_up, on_grid
from gptjax.layers.norm import NORM, Norm
from gptjax.layers.parameter import INIT, Declared, Scaled, Turned, draw_all, parameter, turned
from gptjax.layers.position import POSITION

Params = dict[str, Any]


class Placement(NamedTuple):
    branch_in: bool  # normalise what a branch reads
    branch_out: bool  # normalise what a branch writes
    stream: bool  # normalise the residual stream after the sum


PLACEMENT: dict[str, Placement] = {
    "pre": Placement(branch_in=True, branch_out=False, stream=False),  # Radford et al. 2019
    "post": Placement(branch_in=False, branch_out=False, stream=True),  # Vaswani et al. 2017
    "sandwich": Placement(branch_in=True, branch_out=True, stream=False),  # Ding et al. 2021
}

# What the backward pass may keep of a block; the rest is computed again.
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # weights' products
    "attention": jax.checkpoint_policies.save_only_these_names("attention", "feedforward"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def dropout(
    x_BTD: jax.Array, rate: float, key: jax.Array | None, name: int, balanced: bool = False
) -> jax.Array:
    """Zeroes a share `rate` of x and scales the rest by 1 / (1 - rate); no key, no dropout.

    Srivastava et al. 2014. On embeddings and branch outputs, not on attention weights,
    which fused kernels never form. `name` separates the places of a layer. Tokens that stand
    `balanced` are dropped as if they stood in order.
    """
    if key is None or rate == 0:
        return x_BTD
    keep = jax.random.bernoulli(
        jax.random.fold_in(key, name), 1 - rate, x_BTD.shape, out_sharding=sharding.out("BTD")
    )
    if balanced:
        keep = sharding.balance(keep, "BTD")
    return jnp.where(keep, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream."""

    config: Model

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        """Runs the layer that `context` tells of.

        Returns:
            The stream (B, T, D), this layer's values (B, T, K, H) and the new cache.
        """
        c, kind = self.config, choose(PLACEMENT, self.config.norm_placement, "model.norm_placement")
        attention, feedforward = Attention(c, name="attention"), FeedForward(c, name="feedforward")
        tap = context.tap

        def norm(use: bool, name: str, x: jax.Array) -> jax.Array:
            return Norm(c, name=name)(x) if use else x

        def add(x: jax.Array, name: str, branch: Callable[[jax.Array], jax.Array]) -> jax.Array:
            y = branch(tap(f"{name}_in", norm(kind.branch_in, f"{name}_norm_in", x)))
            y = norm(kind.branch_out, f"{name}_norm_out", y)
            if (scale := parametrisation.branch_multiplier(c)) != 1:
                y = scale * y
            number = ("attention", "feedforward").index(name)
            y = dropout(y, c.dropout, context.dropout_key, number, context.order_T is not None)
            return norm(kind.stream, f"{name}_norm_stream", x + tap(f"{name}_added", y))

        extras: list[Any] = []  # the value and the cache of `attention`

        def attend(y: jax.Array) -> jax.Array:
            y, *value_and_cache = attention(y, context)
            extras.extend(value_and_cache)
            return checkpoint_name(tap("attention_out", y), "attention")

        def feed(y: jax.Array) -> jax.Array:
            return checkpoint_name(tap("feedforward_out", feedforward(y, tap)), "feedforward")

        x_BTD = tap("stream_in", x_BTD)
        if c.parallel_block:  # GPT-J, Wang & Komatsuzaki 2021: one norm, both branches at once
            x_BTD = add(x_BTD, "attention", lambda y: attend(y) + feed(y))
        else:
            x_BTD = tap("stream_middle", add(x_BTD, "attention", attend))
            x_BTD = add(x_BTD, "feedforward", feed)
        value, cache = extras
        return tap("stream", x_BTD), value, cache


class Embed(nn.Module):
    """Token ids and positions -> x_BTD."""

    config: Model

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, position_BT: jax.Array) -> jax.Array:
        c, position = self.config, choose(POSITION, self.config.position, "model.position")

        def table(
            name: str, dims: str, rows: int, role: str, ids_BT: jax.Array, to: str
        ) -> jax.Array:
            E = parameter(self, c, name, dims, (rows, c.width), role, fan_in="D")
            return look_up(c.products, E, role, ids_BT, to)

        x_BTD = table("tokens", "VD", c.vocab_size, "embedding", tokens_BT, "BTD")
        if position.learned:
            to = "1TD" if position_BT.shape[0] == 1 else "BTD"
            x_BTD += table("positions", "PD", c.context, "position", position_BT, to)
        if position.embed is not None:
            x_BTD += position.embed(c, position_BT)
        return x_BTD.astype(c.dtype)


class Unembed(nn.Module):
    """The output projection (D, V) of a model that does not reuse its token table."""

    config: Model

    @nn.compact
    def __call__(self) -> jax.Array:
        c = self.config
        shape = (c.width, c.vocab_size)
        return parameter(self, c, "kernel", "DV", shape, "unembedding", fan_in="D")


# What a config declares, and the rows that declared it.
_declared: dict[Model, tuple[list[Any], Params]] = {}


def abstract_params(config: Model) -> Params:
    """The parameter tree with a `Spec` (shape, dims, initial distribution) at each leaf.

    Asked for many times, traced once; anew where a row was written anew under its old name.
    """
    rows: list[Any] = [
        FEEDFORWARD.get(config.feedforward),
        NORM.get(config.norm),
        POSITION.get(config.position),
        PLACEMENT.get(config.norm_placement),
        INIT.get(config.init),
        parametrisation.PARAMETRISATION.get(config.parametrisation),
    ]
    if _declared.get(config, ([], {}))[0] != rows:
        _declared[config] = rows, _declare(config)
    return jax.tree.map(lambda spec: spec, _declared[config][1])  # a dict of the caller's own


def _declare(config: Model) -> Params:
    # Fused kernels refuse the one token that shapes are asked for with.
    config = dataclasses.replace(config, attention="plain")

    def specs(declare: Callable[[jax.Array], Any]) -> Params:
        # Shapes are asked for with one row, which no mesh divides: look away from the mesh.
        with jax.sharding.use_abstract_mesh(sharding.abstract_mesh({})):
            boxed = jax.eval_shape(lambda: declare(jax.random.key(0))).get("params", {})
        return jax.tree.map(lambda box: box.spec, boxed, is_leaf=lambda x: isinstance(x, Declared))

    def x_BTD() -> jax.Array:
        return jnp.zeros((1, 1, config.width), config.dtype)

    def ids_BT() -> jax.Array:
        return jnp.zeros((1, 1), jnp.int32)

    def context() -> Context:
        return Context(ids_BT(), ids_BT(), Tap())

    params = {
        "embed": specs(lambda key: Embed(config).init(key, ids_BT(), ids_BT())),
        "blocks": specs(lambda key: Block(config).init(key, x_BTD(), context())),
    }
    params["blocks"] = jax.tree.map(lambda spec: spec.stacked(config.layers), params["blocks"])
    if not choose(PLACEMENT, config.norm_placement, "model.norm_placement").stream:
        params["final_norm"] = specs(lambda key: Norm(config).init(key, x_BTD()))
    if not config.tied:
        params["unembed"] = specs(Unembed(config).init)
    return {name: part for name, part in params.items() if part}


def init(config: Model, seed: int) -> Params:
    """Initial parameters, float32, each a function of (seed, its path, its shape) alone.

    Where a mesh is set they are born sharded: no device ever holds a whole one.
    """
    specs, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config))
    name = lambda path: "/".join(part.key for part in path)  # noqa: E731
    named = tuple((name(path), spec) for path, spec in specs)
    return jax.tree.unflatten(tree, draw_all(named, jax.random.key(check_seed(seed))))


def init_cache(config: Model, rows: int, length: int) -> Params:
    """An empty key-value cache for `rows` rows of at most `length` tokens.

    Each layer's arrays stand apart, so that a loop over tokens writes them in place; a head's keys
    lie together, as products take them.
    """

    def zeros(dims: str, dtype: jax.typing.DTypeLike, *shape: int) -> jax.Array:
        return sharding.shard(jnp.zeros((rows, *shape), dtype), dims)

    kv = lambda: zeros("BKSH", config.dtype, config.K, length, config.H)  # noqa: E731
    layers = tuple({"key": kv(), "value": kv()} for _ in range(config.layers))
    return {"layers": layers, "length": zeros("B", jnp.int32)}


def split_layers(config: Model, params: Params) -> Params:
    """`params` with a tuple of each layer's parameters in place of the stacked blocks.

    `hidden` takes either. Sliced once, they are not sliced again for every token.
    """
    return params | {"blocks": layers_of(params["blocks"], config.layers)}


def layers_of(blocks: Params, count: int) -> tuple[Params, ...]:
    """Each layer's parameters, of stacks of so many."""
    with jax.named_scope("parameters"):
        return tuple(jax.tree.map(lambda p, i=i: p[i], blocks) for i in range(count))


class Hidden(NamedTuple):
    """What `hidden` returns.

    Attributes:
        x_BTD: the stream that is unembedded, in `config.dtype`.
        cache: extended by these tokens; None without one.
        heard: the points listened to, auxiliary losses under "loss/NAME", and likewise what `Tap`
            reports or moves. All of the blocks have a leading dim L.
    """

    x_BTD: jax.Array
    cache: Params | None
    heard: dict[str, Any]


def hidden(
    config: Model,
    params: Params,
    tokens_BT: jax.Array,
    *,
    position_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    cache: Params | None = None,
    listen: Listen = (),
    edit: Mapping[str, Edit] | None = None,
) -> Hidden:
    """The residual stream after the last layer, final norm and multiplier: what is unembedded.

    Arguments and results are in the order of the text, also where the mesh splits rows.

    Args:
        config: the architecture.
        params: the tree of `init`, or that of `split_layers`, whose layers are not scanned; a
            matrix of either may be `Adapted`, `Scaled` or, on one device, `Blocks`.
        tokens_BT: int32 ids in [0, V); an id outside is not noticed here but in the data.
        position_BT: int32 positions below `config.context`; None counts from the row's start.
        segments_BT: int32 document of each token; attention stays inside; None: one document.
        dropout_key: drops out with this key; None is evaluation.
        cache: of `init_cache`, holding the tokens before `tokens_BT`; one document a row. Where its
            layers have other rows than `tokens_BT`, "row" says which of them each continues.
        listen: points of `layers.context.POINTS` to return in `heard`; or point -> what to
            return of the value (arrays), which is then all that is kept: {"scores": jnp.max}.
        edit: point -> (value, layer's number) -> the value to go on with. It is called once for
            layers that share a compiled body, with a traced number: choose by `jnp.where`.

    Raises:
        ValueError: on segments together with a cache, which does not keep its tokens' segments.
        ConfigError: on a point that is none, or that this architecture does not have; on rows that
            do not divide over the mesh.
    """
    if cache is not None and segments_BT is not None:
        raise ValueError("segments_BT does not go with a cache: it holds one document a row")
    edit = edit or {}
    check_points([*listen, *edit])
    T = tokens_BT.shape[1]
    index_BT = jnp.arange(T)[None]
    if cache is not None:
        index_BT = index_BT + cache["length"][:, None]
    position_BT = index_BT if position_BT is None else position_BT
    tap = Tap(listen, edit)
    order_T = tap.order(T)
    if order_T is not None:  # from here to the end of this function
        places: Any = (tokens_BT, index_BT, position_BT, segments_BT)
        places = jax.tree.map(
            lambda x: sharding.balance(x, "1T" if x.shape[0] == 1 else "BT"), places
        )
        tokens_BT, index_BT, position_BT, segments_BT = places
    context = Context(
        position_BT,
        index_BT,
        tap,
        segments_BT,
        None if cache is None else cache["length"],
        None if cache is None else cache.get("row"),
        dropout_key=dropout_key,
        order_T=order_T,
    )
    x_BTD = _apply(Embed(config), params, "embed", tokens_BT, position_BT)
    x_BTD = tap("embedding", dropout(x_BTD, config.dropout, dropout_key, 2, order_T is not None))
    caches = None if cache is None else cache["layers"]
    x_BTD, caches, heard = _blocks(config, params, x_BTD, context, caches, listen, edit)
    if not PLACEMENT[config.norm_placement].stream:
        x_BTD = _apply(Norm(config), params, "final_norm", x_BTD)
    x_BTD = tap("final", x_BTD)
    if (scale := parametrisation.logit_multiplier(config)) != 1:
        x_BTD = scale * x_BTD  # here, so that no way from the stream to logits can miss it
    if order_T is not None:
        x_BTD = sharding.balance(x_BTD, "BTD", back=True)
    if cache is not None:
        cache = {"layers": caches, "length": cache["length"] + tokens_BT.shape[1]}
    return Hidden(x_BTD, cache, tap.heard | heard)


def unembedding(config: Model, params: Params, x_BTD: jax.Array) -> tuple[jax.Array, Any, str]:
    """What logits are the product of.

    Returns:
        The stream that `hidden` returned and the output projection, both rounded as
        `config.products` says, and the projection's dims: "DV", or "VD" for the token table.
    """
    dims, role = ("VD", "embedding") if config.tied else ("DV", "unembedding")
    with jax.named_scope("unembedding"):
        tied = config.tied
        kernel = params["embed"]["tokens"] if tied else _apply(Unembed(config), params, "unembed")
        if isinstance(kernel, Turned):
            kernel, dims = kernel.matrix, turned(dims, "D")
        if isinstance(kernel, Scaled | Blocks):
            return x_BTD, kernel, dims  # x is rounded where it meets them
        if tied:
            kernel = sharding.gather(kernel, dims, config.dtype)
        x_BTD = on_grid(config.products, x_BTD, role)
        return x_BTD, on_grid(config.products, kernel, role, dims.index("D")), dims


def logits(config: Model, params: Params, x_BTD: jax.Array) -> jax.Array:
    """logits_BTV, float32, of the stream that `hidden` returns."""
    x_BTD, kernel, dims = unembedding(config, params, x_BTD)
    with jax.named_scope("unembedding"):
        products = config.products if isinstance(kernel, Scaled) else "dtype"
        logits_BTV = linear(f"BTD,{dims}->BTV", x_BTD, kernel, products, jnp.float32)
        cap = config.logit_softcap
        return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)


def apply(config: Model, params: Params, tokens_BT: jax.Array, **kwargs: Any) -> jax.Array:
    """logits_BTV, float32, of the next token at every position; arguments as `hidden`."""
    return logits(config, params, hidden(config, params, tokens_BT, **kwargs).x_BTD)


def _apply(module: nn.Module, params: Params, name: str, *inputs: Any) -> Any:
    # A module without parameters (parameter-free norm) has no entry in the tree.
    return module.apply({"params": params.get(name, {})}, *inputs)


def _turn(windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The windows of the least number of layers after which all repeat."""
    L = len(windows)
    n = next(n for n in range(1, L + 1) if L % n == 0 and windows == windows[:n] * (L // n))
    return windows[:n]


def _scan(
    steps: Sequence[Callable[[Any, Any], tuple[Any, Any]]], carry: Any, stacked: Any
) -> tuple[Any, dict[str, Any]]:
    """Scans over layers, as many a turn as there are `steps`, so that each has its own window.

    Returns:
        The last carry, and what was heard with a leading dim L.
    """
    n = len(steps)

    def turn(carry: Any, layers: Any) -> tuple[Any, Any]:
        each = []
        for i, step in enumerate(steps):
            carry, (_, heard) = step(carry, jax.tree.map(lambda x, i=i: x[i], layers))
            each.append(heard)
        return carry, jax.tree.map(lambda *layers: jnp.stack(layers), *each)

    def shaped(x: jax.Array, lead: tuple[int, ...], drop: int) -> jax.Array:
        to = sharding.like(x)
        to = to if to is None else jax.P(*(None for _ in lead), *to[drop:])
        return jnp.reshape(x, (*lead, *x.shape[drop:]), out_sharding=to)

    if n == 1:
        carry, (_, heard) = jax.lax.scan(steps[0], carry, stacked)
        return carry, heard
    turns = jax.tree.map(lambda x: shaped(x, (x.shape[0] // n, n), 1), stacked)
    carry, heard = jax.lax.scan(turn, carry, turns)
    return carry, jax.tree.map(lambda x: shaped(x, (x.shape[0] * n,), 2), heard)


def _blocks(
    config: Model,
    params: Params,
    x_BTD: jax.Array,
    shared: Context,
    caches: tuple[Cache, ...] | None,
    listen: Listen,
    edit: Mapping[str, Edit],
) -> tuple[jax.Array, tuple[Cache, ...] | None, dict[str, Any]]:
    """All layers, scanned or unrolled: the same function of the same stacked parameters.

    With a cache always unrolled: a scan would copy the whole cache for every token.
    """
    windows = config.layer_windows
    met: set[str] = set()

    def body(carry: Any, layer: Any, window: int | None) -> tuple[Any, Any]:
        x_BTD, first_value = carry
        index, block_params, layer_cache = layer
        key = shared.dropout_key
        if key is not None:
            key = jax.random.fold_in(key, index)
            block_params = drop_inputs(block_params, key, shared.order_T is not None)
        context = shared._replace(
            window=window,
            layer=index,
            first_value_BTKH=first_value,
            cache=layer_cache,
            dropout_key=key,
            tap=Tap(listen, edit, index),
        )
        block: Any = Block(config)
        x_BTD, value, layer_cache = block.apply({"params": block_params}, x_BTD, context)
        if config.value_residual:
            first_value = jnp.where(index == 0, value, first_value)
        met.update(context.tap.met)
        return (x_BTD, first_value), (layer_cache, context.tap.heard)

    B, T = x_BTD.shape[:2]
    first_value = None
    if config.value_residual:
        zeros = jnp.zeros((B, T, config.K, config.H), x_BTD.dtype)
        first_value = sharding.shard(zeros, "BTKH")
    carry, policy = (x_BTD, first_value), choose(REMAT, config.remat, "model.remat")

    scanned = config.scan_layers and caches is None and isinstance(params["blocks"], dict)

    def step(window: int | None) -> Callable[[Any, Any], tuple[Any, Any]]:
        run = functools.partial(body, window=window)
        # Beside its forward pass XLA would find a layer that is computed again to be the same, and
        # keep it; a scan has them apart.
        return (
            run if policy is None else jax.checkpoint(run, policy=policy, prevent_cse=not scanned)
        )

    new: Any = None
    # One function for each window, so that remat traces layers alike once.
    steps, each = {window: step(window) for window in set(windows)}, []
    if scanned:
        stacked = (jnp.arange(config.layers), params["blocks"], None)
        carry, heard = _scan([steps[window] for window in _turn(windows)], carry, stacked)
    else:
        if not isinstance(params["blocks"], tuple):
            params = split_layers(config, params)
        for i, window in enumerate(windows):
            layer = (i, params["blocks"][i], None if caches is None else caches[i])
            carry, layer_outputs = steps[window](carry, layer)
            each.append(layer_outputs)
        new = None if caches is None else tuple(cache for cache, _ in each)
        heard = jax.tree.map(lambda *layers: jnp.stack(layers), *(heard for _, heard in each))
    check_met([name for name in (*listen, *edit) if name in INSIDE], met)
    return carry[0], new, heard
