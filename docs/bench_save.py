"""Times what a save costs the loop, checksums included, and a restore, turn by turn.

    python docs/bench_save.py configs/gpt2.py:124m --config.data.batch_size=2 ...
    python docs/bench_save.py configs/shakespeare.py

Random tokens in the recipe's shapes, so no data is needed. In each turn the same number of steps
runs twice, with a save at its beginning and without one; the difference is what the save costs,
whether it holds the loop up or takes cores from it in the background. The share is that of the
recipe's own interval, train.checkpoint_every. Checkpoints go to a temporary folder of TMPDIR.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from gptjax import configure, loop, setup, state
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config
from gptjax.data.batches import Batch
from gptjax.sharding import make_mesh

TURNS = 5
COVERS = 3.0  # so many times as long as a save takes are the steps that are timed


def main(recipe: str, *overrides: str) -> None:
    config = configure.from_file(recipe, list(overrides))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        config = setup.settle(config)
        measure(config, Path(folder))


def measure(config: Config, folder: Path, turns: int = 5) -> dict[str, float]:
    """Medians, in seconds, and the share of the loop's time."""
    placed = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P())
    train_state, batch = state.create(config), jax.device_put(random_batch(config), placed)
    step, _ = loop.compile_step(state.make_train_step(config), train_state, batch)
    abstract = state.abstract(config)
    numbers: dict[str, list[float]] = {}

    def run(steps: int) -> float:
        nonlocal train_state
        begin = time.perf_counter()
        for _ in range(steps):
            train_state, metrics = step(train_state, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - begin

    run(3)
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        begin = time.perf_counter()
        checkpoints.save(0, train_state, {}, wait=True)
        whole = time.perf_counter() - begin
        steps = max(10, int(COVERS * whole / (run(3) / 3)))
        for turn in range(1, turns + 1):
            begin = time.perf_counter()
            checkpoints.save(turn, train_state, {})
            held_up = time.perf_counter() - begin
            with_save = held_up + run(steps)
            begin = time.perf_counter()
            checkpoints.wait()
            late = time.perf_counter() - begin
            without = run(steps)
            begin = time.perf_counter()
            train_state = checkpoints.restore(turn, abstract)
            jax.block_until_ready(train_state)
            restored = time.perf_counter() - begin
            found = {
                "a step": without / steps,
                "a save, of the loop": with_save - without,
                "of which it stands still": held_up,
                "a restore": restored,
            }
            assert late < 1.0, "the save outlasted the steps: raise COVERS"
            print(f"turn {turn}  " + "  ".join(f"{k} {v:.3f} s" for k, v in found.items()))
            for name, value in found.items():
                numbers.setdefault(name, []).append(value)
    size = sum(x.nbytes for x in jax.tree.leaves(train_state))
    medians = {name: statistics.median(values) for name, values in numbers.items()}
    interval = config.train.checkpoint_every * medians["a step"]
    medians["share"] = medians["a save, of the loop"] / (interval + medians["a save, of the loop"])
    print(
        f"{size / 1e6:,.0f} MB on {jax.devices()[0].device_kind}: a save costs "
        f"{medians['a save, of the loop']:.2f} s, every {config.train.checkpoint_every} steps of "
        f"{medians['a step']:.3f} s {medians['share']:.2%} of the loop; a save alone takes "
        f"{whole:.2f} s, a restore {medians['a restore']:.2f} s"
    )
    return medians


def random_batch(config: Config) -> Batch[np.ndarray]:
    shape = (config.data.batch_size // config.train.accumulation, config.train.accumulation)
    rng = np.random.default_rng(config.seed)
    tokens = rng.integers(config.model.vocab_size, size=(*shape, config.model.context + 1))
    return Batch(
        tokens[..., :-1].astype(np.int32),
        tokens[..., 1:].astype(np.int32),
        np.ones((*shape, config.model.context), np.float32),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
