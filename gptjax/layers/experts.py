"""A mixture of experts: feed-forwards, of which each token passes through the few that suit it.

    y = sum over the chosen experts e of gate_e(x) f_e(x), and of the shared ones f_s(x)

Shazeer et al. 2017, arXiv:1701.06538; shared experts: Dai et al. 2024, arXiv:2401.06066. A router
scores the experts in float32 and the highest `experts_per_token` are chosen, of equal scores the
first. Gates are their shares in a softmax over all experts, divided by their sum where
`normalise_gates` says so, which is a softmax over the chosen (Mixtral, Jiang et al. 2024). With a
`balance_rate` a bias, which no gradient moves, is added to choose, but not in the gates.

Without a capacity nothing is dropped: tokens are sorted by expert, and `jax.lax.ragged_dot`
multiplies each group by its expert (MegaBlocks, Gale et al. 2022). With one, each row of a batch
gives an expert at most C = ceil(factor * T * k / E) of its T tokens, in the order of the row, and of a
token in that of its scores. So neither a later token nor another row decides what a token gets, as
they do where all first choices go before all second ones (GShard, Lepikhin et al. 2020); what is
beyond passes by on the residual stream. Text is generated without a capacity.

Over a mesh each device has its experts and its tokens. Two all-to-alls bring tokens to experts and
back: with a capacity C slots for each row and expert, without one as many as could come at worst.
Of a row that is split a device would fill few of C slots: there no token is left out before its
experts, and what they make of one that is beyond the capacity is dropped after them.

In names, k numbers the choices of a token, M any rows of tokens and C an expert's slots.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax import parametrisation, sharding
from gptjax.config import Model
from gptjax.layers.context import Tap
from gptjax.layers.linear import linear, on_grid
from gptjax.layers.parameter import Adapted, Scaled, add_bias, parameter, wide

Activation = Callable[[jax.Array], jax.Array]
# (x, name of a weight) -> their product, and the bias of that name where there is one.
Product = Callable[[jax.Array, str], jax.Array]
Weights = dict[str, Any]  # arrays, or `Adapted`


def experts(
    module: nn.Module,
    c: Model,
    x_BTD: jax.Array,
    tap: Tap,
    F: int,
    activation: Activation,
    gated: bool,
) -> jax.Array:
    """y_BTD, as said above, in x's dtype; for `feedforward.Branch`.

    Losses: balance and router_z. Metrics: busiest_expert, its load over an even share, and with a
    capacity dropped_share, of the choices of all tokens.

    Args:
        module: declares the parameters.
        c: says how many experts, and how they are chosen.
        x_BTD: what the branch reads.
        tap: hears the scores at "router".
        F: width of an expert.
        activation: of its hidden units.
        gated: whether these are activation(x W_gate) * (x W_up), or activation(x W_up).
    """

    def layer(x: jax.Array, product: Product) -> jax.Array:
        hidden = activation(product(x, "gate" if gated else "up"))
        return product(hidden * product(x, "up") if gated else hidden, "down")

    weights, specs = _declare(module, c, F, gated)
    gate_BTk, id_BTk = _route(module, c, x_BTD, tap)
    slot_BTk, capacity, split = None, 0, sharding.ways("T") > 1
    if c.capacity_factor is not None and not sharding.decoding():
        _, T, k = id_BTk.shape
        capacity = min(math.ceil(c.capacity_factor * T * k / c.experts), T)
        slot_BTk = _slots(id_BTk, c.experts, tap.order(T))
        tap.metric("dropped_share", (slot_BTk >= capacity).mean())

    def routed(
        x_BTD: jax.Array,
        gate_BTk: jax.Array,
        id_BTk: jax.Array,
        slot_BTk: jax.Array | None,
        weights: Weights,
    ) -> jax.Array:
        """Of the tokens, the experts and the part of F of one device."""
        x_BTkD = jnp.broadcast_to(x_BTD[:, :, None], (*id_BTk.shape, x_BTD.shape[2]))
        if slot_BTk is None or split:
            y_BTkD = _dropless(x_BTkD, id_BTk, weights, layer)
        else:
            y_BTkD = _with_capacity(x_BTkD, id_BTk, slot_BTk, capacity, weights, layer)
        if slot_BTk is not None and split:
            y_BTkD = jnp.where(slot_BTk[..., None] < capacity, y_BTkD, 0)
        # One sum in one order, so that no scatter adds in another.
        return (y_BTkD.astype(jnp.float32) * gate_BTk[..., None]).sum(2).astype(x_BTD.dtype)

    with jax.named_scope("experts"):
        if sharding.out("BTD") is None:
            y_BTD = routed(x_BTD, gate_BTk, id_BTk, slot_BTk, weights)
        else:
            token = sharding.spec("BT1")
            over: Any = jax.shard_map(
                routed,
                in_specs=(token, token, token, None if slot_BTk is None else token, specs),
                out_specs=token,
            )
            y_BTD = over(x_BTD, gate_BTk, id_BTk, slot_BTk, weights)
    if c.shared_experts:
        y_BTD = y_BTD + layer(x_BTD, _shared(module, c, c.shared_experts * F))
    return y_BTD


def _declare(module: nn.Module, c: Model, F: int, gated: bool) -> tuple[Weights, dict[str, Any]]:
    """The weights of all experts, those of each device's own ready for use, and their specs."""
    E, D = c.experts, c.width
    weights: Weights = {}
    specs: dict[str, Any] = {}

    def rounded(w: Any, role: str) -> jax.Array:  # not what they meet
        if isinstance(w, Scaled):
            return wide(w, c.dtype)
        return on_grid(c.products, w, role, summed=1, stacks=1)

    def add(name: str, dims: str, shape: tuple[int, ...], role: str, fan_in: str = "") -> None:
        w: Any = parameter(module, c, name, dims, shape, role, fan_in=fan_in, stacks="E")
        specs[name] = sharding.stacked_spec(dims, "E")
        if isinstance(w, Adapted):
            placed = [sharding.stacked_spec(d, "E") for d in (f"E{dims[1]}R", f"ER{dims[2]}")]
            specs[name] = w.replace(base=specs[name], a=placed[0], b=placed[1])
            w = w.replace(base=rounded(jax.lax.stop_gradient(w.base), role))
        elif fan_in:
            w = rounded(w, role)
        weights[name] = w

    for name in ("gate", "up") if gated else ("up",):
        add(name, "EDF", (E, D, F), "matrix", fan_in="D")
        if c.bias:
            add(f"{name}_bias", "EF", (E, F), "bias")
    add("down", "EFD", (E, F, D), "residual", fan_in="F")
    if c.bias:
        add("down_bias", "ED", (E, D), "bias")
    return weights, specs


def _shared(module: nn.Module, c: Model, F: int) -> Product:
    """The products of the shared experts, which are one feed-forward F wide."""

    def product(x: jax.Array, name: str) -> jax.Array:
        into, out, role = ("D", "F", "matrix") if name != "down" else ("F", "D", "residual")
        shape = (x.shape[2], F if out == "F" else c.width)
        kernel = parameter(module, c, f"shared_{name}", into + out, shape, role, fan_in=into)
        y = linear(f"BT{into},{into}{out}->BT{out}", x, kernel, c.products)
        return add_bias(module, c, f"shared_{name}_bias", out, y) if c.bias else y

    return product


def _route(module: nn.Module, c: Model, x_BTD: jax.Array, tap: Tap) -> tuple[jax.Array, jax.Array]:
    """The gates and the numbers of each token's experts, float32 and int32 (B, T, k)."""
    router = parameter(module, c, "router", "DE", (c.width, c.experts), "router", fan_in="D")
    logits_BTE = parametrisation.logit_multiplier(c) * jnp.einsum(
        "BTD,DE->BTE",
        x_BTD.astype(jnp.float32),
        router,
        precision=jax.lax.Precision.HIGHEST,  # or GPUs and TPUs would round what they multiply
        out_sharding=sharding.out("BTE"),
    )
    logits_BTE = tap("router", logits_BTE)
    share_BTE = jax.nn.softmax(logits_BTE)
    preference_BTE = jax.lax.stop_gradient(share_BTE)
    if c.balance_rate is not None:  # DeepSeek-V3, arXiv:2412.19437, 2.1.2; shares of a softmax
        preference_BTE += parameter(module, c, "balance", "E", (c.experts,), "moved")
    id_BTk = jax.lax.top_k(preference_BTE, c.experts_per_token)[1]
    chosen_BTkE = jax.nn.one_hot(id_BTk, c.experts)
    gate_BTk = (share_BTE[:, :, None] * chosen_BTkE).sum(-1)
    if c.normalise_gates:
        gate_BTk /= gate_BTk.sum(-1, keepdims=True)
    load_E = chosen_BTkE.mean((0, 1, 2))
    tap.metric("busiest_expert", c.experts * load_E.max())
    if c.balance_rate is not None:
        tap.move("feedforward/balance", 1 / c.experts - load_E)
    if c.balance_loss:
        # Switch Transformer, Fedus et al. 2021, eq. 4, over all tokens of the micro-batch; f counts
        # all k choices of a token and is divided by k, so that even experts give 1 for any k.
        tap.loss("balance", c.balance_loss * c.experts * (load_E * share_BTE.mean((0, 1))).sum())
    if c.router_z_loss:  # ST-MoE, Zoph et al. 2022, eq. 5
        z_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
        tap.loss("router_z", c.router_z_loss * jnp.square(z_BT).mean())
    return gate_BTk, id_BTk


def _slots(id_BTk: jax.Array, kinds: int, order_T: np.ndarray | None) -> jax.Array:
    """`_rank` of choices whose row the mesh may split; they stand as `Tap.order` says."""
    if sharding.ways("T") == 1:
        return _rank(id_BTk, kinds)
    moved = order_T is not None
    slot_BTk = _rank(sharding.gather_sequence(id_BTk, "BT1", moved), kinds)
    return sharding.balance(slot_BTk, "BT1") if moved else sharding.shard(slot_BTk, "BT1")


def _rank(id_BTk: jax.Array, kinds: int) -> jax.Array:
    """How many of the choices before it, in its row's order, are the same; int32 (B, T, k)."""
    B, T, k = id_BTk.shape
    is_BME = id_BTk.reshape(B, T * k)[..., None] == jnp.arange(kinds)
    before_BME = is_BME.cumsum(1, dtype=jnp.int32) - 1
    return (before_BME * is_BME).sum(-1).reshape(B, T, k)


def _dropless(
    x_BTkD: jax.Array,
    id_BTk: jax.Array,
    weights: Weights,
    layer: Callable[[jax.Array, Product], jax.Array],
) -> jax.Array:
    """Each token through each of its experts, wherever these are."""
    (B, T, k, D), E = x_BTkD.shape, _experts(weights)
    ways = _devices("E")
    # Tokens are spread over slots: so many of a device's could all be meant for another.
    room = B * T * min(k, E)
    to = id_BTk // E
    at_M = (to * room + _rank(to.reshape(1, -1, 1), ways).reshape(to.shape)).reshape(-1)
    x_MD, id_M = x_BTkD.reshape(-1, D), id_BTk.reshape(-1) % E
    if ways > 1:
        slots = ways * room
        x_MD = _exchange(jnp.zeros((slots, D), x_MD.dtype).at[at_M].set(x_MD, **ONCE), ways)
        empty_M = jnp.full(slots, E, id_M.dtype)
        id_M = _exchange(empty_M.at[at_M].set(id_M, **ONCE), ways)
    order_M = jnp.argsort(id_M)
    sorted_M = id_M[order_M]
    sizes_E = (id_M[:, None] == jnp.arange(E)).sum(0, dtype=jnp.int32)

    def product(x_MD: jax.Array, name: str) -> jax.Array:
        y_MF = _with_adapter(x_MD, weights[name], lambda x, w: jax.lax.ragged_dot(x, w, sizes_E))
        return _finish(y_MF, name, weights, lambda bias_EF: bias_EF[sorted_M])

    y_MD = layer(x_MD.at[order_M].get(**ONCE), product)
    y_MD = y_MD.at[jnp.argsort(order_M)].get(**ONCE)
    if ways > 1:
        y_MD = _exchange(y_MD, ways).at[at_M].get(**ONCE)
    return y_MD.reshape(x_BTkD.shape)


def _with_capacity(
    x_BTkD: jax.Array,
    id_BTk: jax.Array,
    slot_BTk: jax.Array,
    C: int,
    weights: Weights,
    layer: Callable[[jax.Array, Product], jax.Array],
) -> jax.Array:
    """Each token through those of its experts that have a slot for it, zeros for the others."""
    (B, T, k, D), E = x_BTkD.shape, _experts(weights)
    ways = _devices("E")
    slots = ways * E * C
    nowhere = slots + jnp.arange(T * k).reshape(T, k)  # beyond the slots, each place once
    at_BM = jnp.where(slot_BTk < C, id_BTk * C + slot_BTk, nowhere).reshape(B, T * k)
    put = lambda x_MD, at_M: jnp.zeros((slots, D), x_MD.dtype).at[at_M].set(x_MD, **OR_NOWHERE)  # noqa: E731
    x_BMD = jax.vmap(put)(x_BTkD.reshape(B, T * k, D), at_BM)
    # Of the experts of each device all rows: then from each device its rows.
    x = x_BMD.reshape(B, ways, E, C, D).swapaxes(0, 1)
    x_BECD = _exchange(x, ways).reshape(ways * B, E, C, D)

    def product(x_BECD: jax.Array, name: str) -> jax.Array:
        multiply = functools.partial(jnp.einsum, "BECD,EDF->BECF")
        y_BECF = _with_adapter(x_BECD, weights[name], multiply)
        return _finish(y_BECF, name, weights, lambda bias_EF: bias_EF[:, None])

    y = _exchange(layer(x_BECD, product).reshape(ways, B, E, C, D), ways)
    y_BMD = y.swapaxes(0, 1).reshape(B, slots, D)
    take = lambda y_MD, at_M: y_MD.at[at_M].get(fill_value=0, **OR_NOWHERE)  # noqa: E731
    return jax.vmap(take)(y_BMD, at_BM).reshape(x_BTkD.shape)


def _with_adapter(
    x: jax.Array, w: jax.Array | Adapted, multiply: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """The product of x and the weights of its experts, and of their adapter where there is one."""
    if not isinstance(w, Adapted):
        return multiply(x, w)
    base: Any = w.base
    return multiply(x, base) + w.scale * multiply(multiply(x, w.a), w.b)


def _experts(weights: Weights) -> int:
    """How many are on this device."""
    return len(jax.tree.leaves(weights["down"])[0])


# Places of which none is named twice, so that no order of adding up decides a gradient.
ONCE: Any = {"unique_indices": True, "mode": "promise_in_bounds"}
OR_NOWHERE: Any = {"unique_indices": True, "mode": "fill"}


def _finish(
    y: jax.Array, name: str, weights: Weights, along: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """A product, summed over the devices that share it, and with the bias of its expert."""
    if name == "down" and sharding.out("") is not None:
        y = jax.lax.psum(y, sharding.axis_of("F"))
    bias = weights.get(f"{name}_bias")
    return y if bias is None else (y + along(bias)).astype(y.dtype)


def _devices(dim: str) -> int:
    """Among how many a dim of the weights is split; 1 where no mesh is set."""
    return jax.sharding.get_abstract_mesh().shape.get(sharding.axis_of(dim), 1)


def _exchange(x: jax.Array, ways: int) -> jax.Array:
    """`ways` equal parts of the first dim, one to each device, for one from each."""
    if ways == 1:
        return x
    return jax.lax.all_to_all(x, sharding.axis_of("E"), 0, 0, tiled=True)
