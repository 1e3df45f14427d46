"""What a token costs with a cache of 128 slots and of 2,048: at most 1.2 times as much.

    JAX_PLATFORMS=cpu python docs/bench_decode.py

Counts CPU seconds of this process, least of five turns. Since jaxlib 0.11.1 a small
`dynamic_update_slice` in a loop may rewrite its whole buffer on CPUs (jax-ml/jax#40101), which
would show in the first line: the write alone, always into the same 128 slots. The second is a
whole token of `decode.stream`, of a text of 100 tokens that may have 128 or 2,048.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptjax import decode, model
from gptjax.layers.attention import _extend
from tests import tiny

SLOTS, TOKENS, MOST = (128, 2048), 100, 1.2
ROWS, K, H = 4, 4, 8  # 128 bytes a row: 40101 is of updates below 256


def least(run: Callable[[], object]) -> float:
    """CPU seconds."""
    seconds = []
    for _ in range(6):  # the first compiles
        start = time.process_time()
        jax.block_until_ready(run())
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


def write(slots: int, writes: int = 500_000) -> float:
    @jax.jit
    def fill(cache_BKSH: jax.Array, new_BKTH: jax.Array) -> jax.Array:
        step = lambda i, cache: _extend(cache, new_BKTH + i, jnp.full(ROWS, i % SLOTS[0]))  # noqa: E731
        return jax.lax.fori_loop(0, writes, step, cache_BKSH)

    cache_BKSH, new_BKTH = jnp.zeros((ROWS, K, slots, H)), jnp.ones((ROWS, K, 1, H))
    return least(lambda: fill(cache_BKSH, new_BKTH)) / writes


def token(slots: int) -> float:
    config = tiny.model(vocab_size=256, context=SLOTS[1], width=256, ff_dim=1024)
    sample = tiny.sample(max_new_tokens=slots - 1)
    options = {"seed": 0, "vocab_size": 256, "end_of_text": 255, "chunk": TOKENS}
    weights = decode.cast(config, model.init(config, 0))
    return least(lambda: next(decode.stream(config, weights, [[1]], sample, **options))) / TOKENS


def main() -> None:
    for name, cost in {"write": write, "token": token}.items():
        few, many = map(cost, SLOTS)
        verdict = "passes" if many <= MOST * few else f"FAILS: more than {MOST}"
        print(f"{name}: {few * 1e6:.2f} us, {many * 1e6:.2f} us, {many / few:.2f} times, {verdict}")


if __name__ == "__main__":
    main()
