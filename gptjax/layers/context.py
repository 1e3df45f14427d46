"""What a layer is told besides its input, and the points at which it can be heard and edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ConfigError, choose
from gptjax.sharding import balanced

Cache = dict[str, jax.Array]  # "key" and "value", each (B, K, S, H), slot s holds index s
# (value at the point, number of the layer) -> value of the same shape and dtype. The number is
# an int32 scalar where layers share one compiled body; it is -1 outside the blocks.
Edit = Callable[[jax.Array, int | jax.Array], jax.Array]
# Names of points, or name -> what to keep of the value there.
Listen = Sequence[str] | Mapping[str, Callable[[jax.Array], Any]]

# Every point that can be heard and edited, with its dims. This list is the whole list.
OUTSIDE: dict[str, str] = {
    "embedding": "BTD",  # what enters the first block, dropout applied
    "final": "BTD",  # after the final norm, before muP's multiplier of the logits
}
INSIDE: dict[str, str] = {  # of each block, in order; heard with a leading dim L
    "stream_in": "BTD",  # the residual stream that the block reads
    "attention_in": "BTD",  # what attention reads, normalised where the placement says so
    "query": "BTNH",  # as the kernel takes them: normalised, rotated, scaled
    "key": "BTKH",  # likewise; of the new tokens where there is a cache
    "value": "BTKH",  # likewise, the first layer's mixed in
    "scores": "BKGTS",  # float32, masked ones the lowest finite value; only of the kernel "plain"
    "weights": "BKGTS",  # after the softmax; only of the kernel "plain"
    "heads": "BTNH",  # each head's output, before `out` mixes the heads
    "attention_out": "BTD",  # what attention returns
    "attention_added": "BTD",  # what is added to the stream; in a parallel block, of both branches
    "stream_middle": "BTD",  # the stream between the branches; not in a parallel block
    "feedforward_in": "BTD",  # what the feed-forward reads; not in a parallel block
    "feedforward_hidden": "BTF",  # its hidden units, activated and gated; not of experts
    "router": "BTE",  # scores of the experts before the softmax, float32; only of experts
    "feedforward_out": "BTD",  # what it returns
    "feedforward_added": "BTD",  # what is added to the stream; not in a parallel block
    "stream": "BTD",  # the residual stream that the block returns
}
POINTS: dict[str, str] = OUTSIDE | INSIDE
# A loss, a metric or a move is heard under this and its name, whoever listens.
LOSS, METRIC, MOVE = "loss/", "metric/", "move/"


class Tap:
    """Hears and edits the points of one layer while it is traced.

    Without `listen` and `edit` every point is the identity, and leaves no trace in the program.

    Args:
        listen: which of `POINTS` to keep, whole or what a function makes of the value.
        edit: name -> how the value there changes; what is heard is the changed value.
        layer: the layer's number, for `edit`.

    Attributes:
        heard: what was kept so far, by name.
        met: the points that were passed.
    """

    def __init__(
        self,
        listen: Listen = (),
        edit: Mapping[str, Edit] | None = None,
        layer: int | jax.Array = -1,
    ) -> None:
        self._listen = listen if isinstance(listen, Mapping) else dict.fromkeys(listen)
        self._edit, self._layer = edit or {}, layer
        self.heard: dict[str, Any] = {}
        self.met: set[str] = set()

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        """`x`, or what `edit` makes of it, at the point `name`.

        Raises:
            ValueError: if `edit` changes shape or dtype.
        """
        self.met.add(name)
        if name in self._edit:
            edited = self._edit[name](x, self._layer)
            if (edited.shape, edited.dtype) != (x.shape, x.dtype):
                raise ValueError(
                    f"the edit at {name!r} made {edited.dtype.name}{list(edited.shape)} of "
                    f"{x.dtype.name}{list(x.shape)}: it must keep shape and dtype"
                )
            x = edited
        if name in self._listen:
            keep = self._listen[name]
            self.heard[name] = x if keep is None else keep(x)
        return x

    def order(self, tokens: int) -> np.ndarray | None:
        """Which index of a row of so many tokens stands at each place in the blocks; None: in order.

        Those of a row that is split stand as `sharding.balanced` says. Not so if somebody listens or
        edits, who is not to know of it: then devices wait for the last.
        """
        return None if self._listen or self._edit else balanced(tokens)

    def loss(self, name: str, value: jax.Array) -> None:
        """Adds `value`, a mean over the batch's tokens, to what training minimises.

        An auxiliary loss, such as one that balances experts: a float32 scalar, weighted already.
        """
        self.heard[LOSS + name] = value.astype(jnp.float32)

    def metric(self, name: str, value: jax.Array) -> None:
        """Reports `value`, a scalar and a mean over the batch's tokens, with the step's metrics."""
        self.heard[METRIC + name] = value.astype(jnp.float32)

    def move(self, name: str, direction: jax.Array) -> None:
        """Says where training is to move a parameter that has no gradient.

        A step moves it by model.balance_rate, up or down as the sign of the directions' sum over the
        micro-batches says.

        Args:
            name: of the parameter, whose role is "moved": "feedforward/balance".
            direction: in its shape.
        """
        self.heard[MOVE + name] = direction.astype(jnp.float32)


def check_points(names: Sequence[str]) -> None:
    """Refuses names that are no points.

    Raises:
        ConfigError: listing the points.
    """
    for name in names:
        choose(POINTS, name, "the point")


def check_met(names: Sequence[str], met: set[str]) -> None:
    """Refuses points that this architecture does not have.

    Raises:
        ConfigError: naming one that was asked for, and those that there are.
    """
    if missing := [name for name in names if name not in met]:
        raise ConfigError(
            f"the point {missing[0]!r} does not exist in this model (scores and weights need "
            f"model.attention='plain'); it has: {', '.join(p for p in POINTS if p in met)}"
        )


class Context(NamedTuple):
    """All that a layer reads besides the residual stream.

    Positions, indices, segments, `start_B` and `row_B` are shared by all layers.

    Attributes:
        position_BT: what position encodings see, int32; restarts with each document.
        index_BT: index in the row, int32; B may be 1. Decides causality.
        tap: hears and edits named points; each layer's own.
        segments_BT: document of each token; None: all is one document.
        start_B: where a cache row takes the new keys; None without a cache.
        row_B: which row of the cache that is; None: each its own.
        window: keys that a query sees, see `scores.Scores`.
        layer: which layer this is, from 0.
        first_value_BTKH: the first layer's values, for the value residual.
        cache: keys and values of earlier tokens; the new ones are written into it.
        dropout_key: None is evaluation.
        order_T: of `Tap.order`.
    """

    position_BT: jax.Array
    index_BT: jax.Array
    tap: Tap
    segments_BT: jax.Array | None = None
    start_B: jax.Array | None = None
    row_B: jax.Array | None = None
    window: int | None = None
    layer: int | jax.Array = 0
    first_value_BTKH: jax.Array | None = None
    cache: Cache | None = None
    dropout_key: jax.Array | None = None
    order_T: np.ndarray | None = None
