"""What a kernel of attention is told: which keys a query sees, and how scores change.

A kernel is a function (q_BTNH, k_BSKH, v_BSKH, Scores) -> o_BTNH; `gptjax.layers.attention` has
the table of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.layers.context import Tap
from gptjax.sharding import out, shard, spec


@dataclasses.dataclass(frozen=True)
class Scores:
    """Which keys a query sees, and how scores change before the softmax.

    Query t sees key s where s <= t, t - s < window, and both are of one segment.

    Attributes:
        q_index_BT: each query's index in its row, int32; B may be 1.
        k_index_BS: each key's index, int32; B may be 1.
        q_segments_BT: the document of each query; None: all is one document.
        k_segments_BS: the document of each key.
        window: keys seen, the query's own included; None sees all.
        slopes_N: ALiBi slopes; None adds no bias.
        softcap: c turns scores z into c tanh(z / c); None leaves them.
        cached: keys come from a cache, so query t does not stand at key t.
        row_B: which row of that cache each row of queries reads; None: its own. Only of `tiles`.
        order_T: q_index of every row where it is known while tracing; None: queries stand in order.
        tap: hears and edits "scores" and "weights" in a kernel that forms them whole.
    """

    q_index_BT: jax.Array
    k_index_BS: jax.Array
    q_segments_BT: jax.Array | None = None
    k_segments_BS: jax.Array | None = None
    window: int | None = None
    slopes_N: np.ndarray | jax.Array | None = None
    softcap: float | None = None
    cached: bool = False
    row_B: jax.Array | None = None
    order_T: np.ndarray | None = None
    tap: Tap = dataclasses.field(default_factory=Tap)

    def visible(self) -> jax.Array:
        """mask_BTS, bool: True where the query may look."""
        t, s = self.q_index_BT[:, :, None], self.k_index_BS[:, None, :]
        mask = s <= t
        if self.window is not None:
            mask &= t - s < self.window
        if self.q_segments_BT is not None and self.k_segments_BS is not None:
            mask &= self.q_segments_BT[:, :, None] == self.k_segments_BS[:, None, :]
        return mask

    def part(self, queries: slice, keys: slice) -> Scores:
        """The same rules for some of the queries and keys."""
        q, k = self.q_segments_BT, self.k_segments_BS
        return dataclasses.replace(
            self,
            q_index_BT=self.q_index_BT[:, queries],
            k_index_BS=self.k_index_BS[:, keys],
            q_segments_BT=None if q is None else q[:, queries],
            k_segments_BS=None if k is None else k[:, keys],
            tap=Tap(),  # a part of the scores is not the point "scores"
        )

    def bias(self) -> jax.Array | None:
        """bias_BNTS, float32: minus slope times distance; None without ALiBi."""
        if self.slopes_N is None:
            return None
        distance = self.q_index_BT[:, :, None] - self.k_index_BS[:, None, :]
        return -jnp.asarray(self.slopes_N)[None, :, None, None] * distance[:, None]


Kernel = Callable[[jax.Array, jax.Array, jax.Array, Scores], jax.Array]


def on_shards(kernel: Callable[..., jax.Array], *operands: tuple[Any, Any]) -> jax.Array:
    """Calls a kernel on each device's shard: custom calls cannot be partitioned by XLA.

    An operand is an array or None with its dims, or a tree that is laid already with its specs.
    """
    if out("B") is None:
        return kernel(*(operand for operand, _ in operands))
    laid = [
        operand if operand is None or not isinstance(how, str) else shard(operand, how)
        for operand, how in operands
    ]
    specs = tuple(spec(how) if isinstance(how, str) else how for _, how in operands)
    return jax.shard_map(kernel, in_specs=specs, out_specs=spec("BTNH"), check_vma=False)(*laid)
