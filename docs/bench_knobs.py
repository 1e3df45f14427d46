"""Times knobs of speed against the recipe as it is, turn by turn.

    python docs/bench_knobs.py configs/nanogpt_char.py [--config.data.batch_size=4 ...]

Random tokens in the recipe's shapes, so no data is needed. Prints, for each row of `KNOBS`, the
median milliseconds of a step and its range over the turns, tokens/s as a multiple of the recipe's
in the same turn (median and range), the seconds to compile and the MiB of the program. Each turn
times every row once.
"""

import statistics
import sys
import time

import jax
import numpy as np

from gptjax import configure, loop, setup, sharding, state
from gptjax.config import Config
from gptjax.data.batches import Batch

STEPS, TURNS = 5, 7
KNOBS = {
    "the recipe": [],
    "layers scanned": ["model.scan_layers=True"],
    "remat dots": ["model.remat=dots"],
    "remat full": ["model.remat=full"],
    "attention plain": ["model.attention=plain"],
    "bfloat16": ["model.dtype=bfloat16"],
    "loss by 64 columns": ["optim.loss_vocab_chunk=64"],
    "2 micro-batches": ["train.accumulation=2"],
    "muon": ["optim.optimizer=muon"],
    "weight average": ["optim.ema_decay=0.999"],
    "dropout": ["model.dropout=0.1"],
}


class Side:
    """The step of a config, its state, and what it cost to compile."""

    def __init__(self, config: Config) -> None:
        self.state = state.create(config)
        self.batch = sharding.place(
            lambda start, stop: jax.tree.map(lambda x: x[start:stop], batch(config)),
            config.data.batch_size // config.train.accumulation,
            "BAT",
        )
        step = state.make_train_step(config)
        self.step, self.cost = loop.compile_step(step, self.state, self.batch)

    def run(self, steps: int) -> float:
        """Seconds a step."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - begin) / steps


def batch(config: Config) -> Batch[np.ndarray]:
    shape = (config.data.batch_size // config.train.accumulation, config.train.accumulation)
    rng = np.random.default_rng(config.seed)
    tokens = rng.integers(config.model.vocab_size, size=(*shape, config.model.context + 1))
    weights = np.ones((*shape, config.model.context), np.float32)
    return Batch(tokens[..., :-1].astype(np.int32), tokens[..., 1:].astype(np.int32), weights)


def main(recipe: str, *overrides: str) -> None:
    sides: dict[str, Side] = {}
    seconds: dict[str, list[float]] = {name: [] for name in KNOBS}
    with jax.set_mesh(sharding.make_mesh(configure.from_file(recipe, list(overrides)).mesh)):
        for name, words in KNOBS.items():
            more = [f"--config.{word}" for word in words]
            sides[name] = Side(setup.settle(configure.from_file(recipe, [*overrides, *more])))
            sides[name].run(2)
        for _ in range(TURNS):
            for name, side in sides.items():
                seconds[name].append(side.run(STEPS))
    print(f"{jax.devices()[0].device_kind}, {recipe} {' '.join(overrides)}")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["the recipe"], times, strict=True)]
        ms = [1e3 * t for t in times]
        print(
            f"{name:<18}{statistics.median(ms):9.2f} ms ({min(ms):.2f} to {max(ms):.2f}), "
            f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"compile {sides[name].cost['compile_seconds']:.1f} s, "
            f"{sides[name].cost['program_bytes'] / 2**20:,.1f} MiB"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
