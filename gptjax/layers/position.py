"""How a model knows where a token stands: three hooks, any of which a variant may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ConfigError, Model


class Position(NamedTuple):
    """A variant. A hook that is None does nothing.

    Attributes:
        learned: whether there is a table of one vector a position, added to the embedding.
        embed: (config, positions_BT) -> x_BTD float32, added to the embedding.
        rotate: (config, x_BTNH, positions_BT) -> x_BTNH, applied to queries and keys.
        slopes: config -> slopes_N float32; scores gain -slope times the distance.
    """

    learned: bool = False
    embed: Callable[[Model, jax.Array], jax.Array] | None = None
    rotate: Callable[[Model, jax.Array, jax.Array], jax.Array] | None = None
    slopes: Callable[[Model], np.ndarray] | None = None


def sinusoid(config: Model, positions_BT: jax.Array) -> jax.Array:
    """x_BTD: sine on even and cosine on odd channels (Vaswani et al. 2017, section 3.5)."""
    if config.width % 2:
        raise ConfigError(
            f"model.position='sinusoidal' needs an even model.width, not {config.width}"
        )
    frequencies = 1e4 ** (-np.arange(0, config.width, 2) / config.width)
    angles = positions_BT[..., None] * frequencies.astype(np.float32)
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return pairs.reshape(*positions_BT.shape, config.width)


def rope(config: Model, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Rotates channel pairs by position-proportional angles (Su et al. 2021, eq. 34).

    Pairs are (i, i + H/2), as in Llama, not neighbours as in the paper: the same
    function up to a fixed permutation of channels. Angles are float32.
    """
    if config.H % 2:
        raise ConfigError(f"model.position='rope' needs an even head width, not {config.H}")
    frequencies = config.rope_base ** (-np.arange(0, config.H, 2) / config.H)
    angles = positions_BT[..., None, None] * frequencies.astype(np.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def alibi_slopes(config: Model) -> np.ndarray:
    """slopes_N: 2^(-8/N), 2^(-16/N), ..., 2^-8 (Press et al. 2022, section 3).

    Where N is no power of two the paper interleaves two such sequences; here the same
    geometric formula serves every N.
    """
    return 2.0 ** (-8.0 * np.arange(1, config.heads + 1, dtype=np.float32) / config.heads)


POSITION: dict[str, Position] = {
    "learned": Position(learned=True),
    "sinusoidal": Position(embed=sinusoid),
    "rope": Position(rotate=rope),
    "alibi": Position(slopes=alibi_slopes),
    "none": Position(),
}
