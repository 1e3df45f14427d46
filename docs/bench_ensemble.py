"""Times seeds trained together against the same seeds one after another, turn by turn.

    python docs/bench_ensemble.py configs/nanogpt_char.py [--config.model.width=64 ...]
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python docs/bench_ensemble.py ...

Random tokens in the recipe's shapes, so no data is needed. One after another they use the first
device, together all. Prints the seconds to compile either step, which no turn includes, seconds a
step of one member in each turn, and the ratio of throughputs; the last losses of both must agree.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gptjax import configure, ensemble, loop, setup, state
from gptjax.config import Config
from gptjax.data.batches import Batch
from gptjax.sharding import make_mesh, section

SEEDS, STEPS, TURNS = 8, 10, 5


def main(recipe: str, *overrides: str) -> None:
    compare(configure.from_file(recipe, list(overrides)))


def compare(base: Config, turns: int = TURNS) -> list[float]:
    """The ratio of throughputs in each turn, together over one by one."""
    configs = [dataclasses.replace(base, seed=base.seed + i) for i in range(SEEDS)]
    batches = [batch(config) for config in configs]
    sides = {"one by one": one_by_one(configs, batches), "together": together(configs, batches)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        for name, run in sides.items():
            begin = time.perf_counter()
            losses = run()
            took = (time.perf_counter() - begin) / STEPS / SEEDS
            print(f"turn {turn}  {name:<10}  {took:.5f} s/step of one, loss {losses}", flush=True)
            seconds[name].append(took)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(
        f"{SEEDS} seeds on {jax.device_count()} {jax.devices()[0].device_kind}: together "
        f"{statistics.median(ratios):.2f} times the throughput ({min(ratios):.2f} to "
        f"{max(ratios):.2f})"
    )
    return ratios


def batch(config: Config) -> Batch[np.ndarray]:
    shape = (config.data.batch_size // config.train.accumulation, config.train.accumulation)
    rng = np.random.default_rng(config.seed)
    tokens = rng.integers(config.model.vocab_size, size=(*shape, config.model.context + 1))
    return Batch(
        tokens[..., :-1].astype(np.int32),
        tokens[..., 1:].astype(np.int32),
        np.ones((*shape, config.model.context), np.float32),
    )


def one_by_one(configs: list[Config], batches: list[Any]) -> Callable[[], str]:
    mesh = make_mesh(section({"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1])
    with jax.set_mesh(mesh):
        settled = setup.settle(configs[0])
        states = [state.create(config) for config in configs]
        shardings = jax.sharding.NamedSharding(mesh, jax.P())
        placed = [jax.device_put(b, shardings) for b in batches]
        step, cost = loop.compile_step(state.make_train_step(settled), states[0], placed[0])
    print(f"one by one: compiled in {cost['compile_seconds']:.1f} s")

    def run() -> str:
        losses = []
        for r in range(SEEDS):
            for _ in range(STEPS):
                states[r], metrics = step(states[r], placed[r])
            losses.append(metrics["loss"])
        return f"{np.mean(jax.device_get(losses)):.4f}"

    return run


def together(configs: list[Config], batches: list[Any]) -> Callable[[], str]:
    ways = max(n for n in range(1, jax.device_count() + 1) if SEEDS % n == 0)
    split = ensemble.over_members(jax.devices()[:ways])
    with jax.set_mesh(make_mesh(section({"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1])):
        settled = setup.settle(configs[0])
        states = jax.device_get([state.create(config) for config in configs])
    states = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *states), split)
    placed = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *batches), split)
    knobs = jax.device_put(ensemble.stack_knobs(configs), split)
    step, cost = loop.compile_step(ensemble.make_step(settled, split), states, placed, knobs)
    print(f"together: compiled in {cost['compile_seconds']:.1f} s")

    def run() -> str:
        nonlocal states
        for _ in range(STEPS):
            states, metrics = step(states, placed, knobs)
        return f"{np.mean(jax.device_get(metrics['loss'])):.4f}"

    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
