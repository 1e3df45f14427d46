"""What is measured inside a model while it trains, to see an instability before the loss does.

Every `train.watch_every` steps, from the micro-batch that was trained on last, without dropout:

    stream_rms/LAYER   root mean square of the residual stream that a layer returns
    score_max/LAYER    the largest attention score, after softcap and ALiBi
    dead_units/LAYER   share of hidden units that no token moves: nowhere above 1% of the root mean
                       square of all hidden values of the layer
    update_rms/PART    root mean square of what the step changed in a part's parameters

Large scores and a growing stream come before a divergence (Dehghani et al. 2023,
arXiv:2302.05442, section 3.2; Wortsman et al. 2023, arXiv:2309.14322, section 3.1).

It is a program of its own, so that a run's numbers are the same with and without. Its cost: a
forward pass of one micro-batch, a copy of the trained parameters, one wait for the device; and
where scores are watched attention is "plain", which holds a layer's scores whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax import model
from gptjax.config import Config, choose
from gptjax.data.batches import Batch
from gptjax.layers.linear import largest
from gptjax.state import TrainState
from gptjax.trainable import trainable


class Statistic(NamedTuple):
    """One number a layer, made of the value at a point of `layers.context.POINTS`."""

    point: str
    of: Callable[[jax.Array], jax.Array]


def rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x.astype(jnp.float32)).mean())


def dead(hidden_BTF: jax.Array) -> jax.Array:
    """The share of units that stay within 1% of the layer's root mean square for every token."""
    return (jnp.abs(hidden_BTF).max((0, 1)) <= 0.01 * rms(hidden_BTF)).astype(jnp.float32).mean()


# Every row but the last hears a point; that one compares parameters.
STATISTICS: dict[str, Statistic | None] = {
    "stream_rms": Statistic("stream", rms),
    "score_max": Statistic("scores", largest),
    "dead_units": Statistic("feedforward_hidden", dead),
    "update_rms": None,
}

Watch = Callable[[model.Params, TrainState, Batch[jax.Array]], dict[str, jax.Array]]


def make_watch(config: Config) -> Watch:
    """(trained parameters before the step, state after it, its batch) -> float32 scalars by name.

    Raises:
        ConfigError: on a name of `train.watch` that is no row.
    """
    rows = {name: choose(STATISTICS, name, "train.watch") for name in config.train.watch}
    points: dict[str, dict[str, Callable[[jax.Array], jax.Array]]] = {}
    for name, row in rows.items():
        if row is not None:
            points.setdefault(row.point, {})[name] = row.of
    # Several statistics of a point are made where it is passed, and all that is kept of it.
    listen = {
        point: lambda x, makers=makers: {n: of(x).astype(jnp.float32) for n, of in makers.items()}
        for point, makers in points.items()
    }
    shape = config.model
    if "scores" in points:
        shape = dataclasses.replace(shape, attention="plain")
    realise = trainable(config).realise

    def watch(
        before: model.Params, state: TrainState, batch: Batch[jax.Array]
    ) -> dict[str, jax.Array]:
        values: dict[str, jax.Array] = {}
        if listen:
            micro = jax.tree.map(lambda x: x[:, 0], batch)
            heard: Any = model.hidden(
                shape,
                realise(state.params, state.frozen),
                micro.tokens,
                position_BT=micro.positions,
                segments_BT=micro.segments,
                listen=listen,
            ).heard
            for point in listen:
                for name, number_L in heard[point].items():
                    values |= {f"{name}/{i:02d}": x for i, x in enumerate(number_L)}
        if "update_rms" in rows:
            values |= {f"update_rms/{k}": v for k, v in _by_part(before, state.params).items()}
        return values

    return jax.jit(watch)


def _by_part(before: model.Params, after: model.Params) -> dict[str, jax.Array]:
    """The root mean square of the change of each part: "embed/tokens", "blocks/attention"."""
    squares: dict[str, list[jax.Array]] = {}
    sizes: dict[str, int] = {}
    pairs = jax.tree_util.tree_leaves_with_path(jax.tree.map(jnp.subtract, after, before))
    for path, change in pairs:
        part = "/".join(str(entry.key) for entry in path[:2])
        squares.setdefault(part, []).append(jnp.square(change).sum())
        sizes[part] = sizes.get(part, 0) + change.size
    return {
        part: jnp.sqrt(sum(s, start=jnp.zeros(())) / sizes[part]) for part, s in squares.items()
    }
