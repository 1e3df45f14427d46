"""How a model knows where a token stands: three hooks, any of which a variant may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ConfigError, Model, choose


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


def frequencies(config: Model) -> np.ndarray:
    """RoPE's angle a token of each channel pair, float64 (H/2,) (Su et al. 2021, eq. 15)."""
    return config.rope_base ** (-np.arange(0, config.H, 2) / config.H)


def _linear(config: Model, positions_BT: jax.Array) -> np.ndarray:
    """Positions divided by the factor (Chen et al. 2023, eq. 4)."""
    return frequencies(config) / config.rope_factor


def _dynamic(config: Model, positions_BT: jax.Array) -> jax.Array:
    """A base that grows once a row is longer than the original context (bloc97, emozilla 2023).

    The length is the row's highest position, so earlier tokens turn otherwise in a longer row;
    Hugging Face's takes the longest row of the batch. (B, 1, 1, H/2).
    """
    original, power = _original(config), config.H / (config.H - 2)
    length_B = jnp.maximum(positions_BT.max(axis=1) + 1, original)
    growth_B = (config.rope_factor * length_B / original - (config.rope_factor - 1)) ** power
    exponents = (np.arange(0, config.H, 2) / config.H).astype(np.float32)
    scale = growth_B[:, None, None, None] ** -exponents
    return scale * frequencies(config).astype(np.float32)


def _llama3(config: Model, positions_BT: jax.Array) -> np.ndarray:
    """Slow pairs divided by the factor, fast ones kept, blended between by turns in the
    original context (Llama 3.1, Grattafiori et al. 2024, section 3.4.2; Meta's code)."""
    low, high = config.rope_rotations
    plain = frequencies(config)
    turns = _original(config) * plain / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (keep + (1 - keep) / config.rope_factor)


def _yarn(config: Model, positions_BT: jax.Array) -> np.ndarray:
    """As llama3, but blended linearly in the channel, between whole channels (Peng et al. 2023).

    The ends of the blend are rounded outwards and clipped as in the authors' code.
    """
    low, high = config.rope_rotations

    def channel(turns: float) -> float:
        wavelengths = np.log(_original(config) / (turns * 2 * np.pi))
        return config.H * wavelengths / (2 * np.log(config.rope_base))

    first = max(np.floor(channel(high)), 0)
    last = min(np.ceil(channel(low)), config.H - 1)
    # Where both fall on one channel the authors make the blend a step.
    width = last - first or 1e-3
    keep = 1 - np.clip((np.arange(config.H // 2) - first) / width, 0, 1)
    plain = frequencies(config)
    return plain * (keep + (1 - keep) / config.rope_factor)


def _original(config: Model) -> int:
    if config.rope_original_context is None:
        raise ConfigError(
            f"model.rope_scaling={config.rope_scaling!r} needs model.rope_original_context, the "
            "tokens of context before stretching"
        )
    return config.rope_original_context


class Scaling(NamedTuple):
    """How RoPE was stretched to a longer context.

    Attributes:
        frequencies: (config, positions_BT) -> angle a token of each pair, (..., H/2).
        gain: config -> factor on queries and keys alike.
    """

    frequencies: Callable[[Model, jax.Array], np.ndarray | jax.Array]
    gain: Callable[[Model], float] = lambda config: 1.0


ROPE_SCALING: dict[str, Scaling] = {
    "none": Scaling(lambda config, positions_BT: frequencies(config)),
    "linear": Scaling(_linear),
    "dynamic": Scaling(_dynamic),
    "llama3": Scaling(_llama3),
    "yarn": Scaling(_yarn, lambda c: 0.1 * max(np.log(c.rope_factor), 0) + 1),  # YaRN, eq. 22
}


def rope(config: Model, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Rotates channel pairs by position-proportional angles (Su et al. 2021, eq. 34).

    Pairs are (i, i + H/2), as in Llama, not neighbours as in the paper: the same
    function up to a fixed permutation of channels. Angles are float32.
    """
    if config.H % 2:
        raise ConfigError(f"model.position='rope' needs an even head width, not {config.H}")
    scaling = choose(ROPE_SCALING, config.rope_scaling, "model.rope_scaling")
    turn = jnp.asarray(scaling.frequencies(config, positions_BT), jnp.float32)
    angles = positions_BT[..., None, None] * turn
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if (gain := scaling.gain(config)) != 1:
        cos, sin = gain * cos, gain * sin
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
