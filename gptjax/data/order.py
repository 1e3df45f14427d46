"""Which row of which source is read where: pure functions of (seed, index), no iterators.

Everything here answers "what stands at place k" directly, for any k, in constant time. So
the state of a run's data is one integer, the step, and every process can compute its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHARE_BITS = 24  # shares are multiples of 2^-24, rows may number 2^39


def key(*parts: int | np.ndarray) -> np.ndarray:
    """A uint64 hash of integers (or arrays of them, broadcast), for `permute`."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = _mix(state + np.asarray(part).astype(np.uint64) + _GOLDEN)
    return state


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """The images of `index` under a pseudorandom permutation of range(size).

    A balanced Feistel network (Luby and Rackoff 1988) over the least power of 4 that holds
    `size`; images beyond `size` are sent through it again until they fall inside (cycle
    walking, Black and Rogaway 2002), fewer than 4 times on average. Exactly a permutation
    for every size from 1 up. `grain`'s index_shuffle is one too, but walks a much larger
    domain: milliseconds for an index of a small store, and one Python call for each.

    Args:
        index: int64, any shape, in [0, size).
        size: of the permuted range.
        key: uint64, broadcastable to `index`; each key is another permutation.

    Returns:
        int64, the shape of `index`.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    image = _feistel(index.astype(np.uint64), key, half, mask)
    while (outside := image >= size).any():
        image = np.where(outside, _feistel(image, key, half, mask), image)
    return image.astype(np.int64)


def mix_sources(
    rows: np.ndarray, weights: Sequence[float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The source of each global row, and how many rows that source has given before it.

    A quota scheme, not a random draw. Source 0 with share p takes row g when
    floor(g p + phase) steps up between g and g + 1 (Bresenham's line), so it has given exactly
    floor(g p + phase) rows before g. The rows it leaves are numbered anew and shared out in
    the same way among the others. So both answers are O(number of sources) for any row, and
    after any number of rows each source is within a few rows of its share, `seed` choosing
    only the phases.

    Args:
        rows: int64 (R,) global row indices, step * batch_size + row.
        weights: relative shares, above 0; rounded to multiples of 2^-24.
        seed: shifts the pattern.

    Returns:
        source int64 (R,) in range(len(weights)); draw int64 (R,).
    """
    one = 1 << _SHARE_BITS
    source = np.full(rows.shape, len(weights) - 1, np.int64)
    draw, remaining = rows.copy(), rows
    for i in range(len(weights) - 1):
        share = min(max(round(weights[i] / sum(weights[i:]) * one), 1), one - 1)
        phase = int(key(seed, i)[0]) % one
        draw_of_source = (remaining * share + phase) >> _SHARE_BITS
        is_of_source = ((remaining + 1) * share + phase) >> _SHARE_BITS > draw_of_source
        free = source == len(weights) - 1
        source = np.where(free & is_of_source, i, source)
        draw = np.where(free & is_of_source, draw_of_source, draw)
        remaining = remaining - draw_of_source
        draw = np.where(free & ~is_of_source, remaining, draw)
    return source, draw


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood 2014): a bijection that mixes all bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(x: np.ndarray, key: np.ndarray, half: np.uint64, mask: np.uint64) -> np.ndarray:
    left, right = x >> half, x & mask
    for _ in range(ROUNDS):
        key = key + _GOLDEN
        left, right = right, left ^ (_mix(_mix(key) ^ right) & mask)
    return left << half | right
