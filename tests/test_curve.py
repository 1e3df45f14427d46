"""A golden loss curve at full precision: a refactor shows the identical one.

Floats depend on the machine and on XLA, so curves are kept by jax version, CPU and number of
CPUs. Where one is known, 50 losses are compared bit by bit; elsewhere with a tolerance. A change
of numbers that is meant is recorded by

    GPTJAX_UPDATE_GOLDEN=1 python -m pytest tests/test_curve.py

with each jax version at hand: it drops the curves of the numbers before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from pathlib import Path

import jax
import numpy as np

from gptjax import sharding, state
from gptjax.data.batches import Batches
from gptjax.layers import attention
from gptjax.tokenizer import load
from tests import tiny

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "curve.json"
UPDATE = "GPTJAX_UPDATE_GOLDEN" in os.environ
STEPS = 50


def machine() -> str:
    """What decides the last bit: jax, the CPU's instructions, and how many CPUs share a sum."""
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        wanted = ("model name", "cpu family", "model\t", "flags", "Features", "CPU part")
        facts = sorted({line for line in lines if line.startswith(wanted)})
        cpu += "-" + hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    return f"jax {jax.__version__}, {cpu}, {os.cpu_count()} CPUs"


def curve() -> list[float]:
    """The loss of each step of a tiny model on the built-in text, byte by byte."""
    config = dataclasses.replace(
        tiny.BASE,
        model=dataclasses.replace(
            tiny.BASE.model, vocab_size=260, context=32, layers=2, width=32, heads=4, kv_heads=2,
            feedforward="swiglu", position="rope", dropout=0.1,
        ),
        optim=tiny.optim(
            peak_lr=1e-2, warmup_steps=5, z_loss=1e-4, loss_vocab_chunk=100
        ),
        data=tiny.data(tokenizer="bytes", packing="masked", batch_size=8),
        train=tiny.train(steps=STEPS, accumulation=2),
    )  # fmt: skip
    config = dataclasses.replace(config, model=attention.resolve(config.model, "cpu"))
    batches = Batches(config.data, config.model.context, config.seed, "train", load("bytes"))
    with jax.set_mesh(tiny.mesh()):
        now, step, losses = state.create(config), state.make_train_step(config), []
        for i in range(STEPS):
            rows = jax.tree.map(lambda x: x.reshape(4, 2, -1), batches.rows(i, 0, 8))
            placed = sharding.place(lambda a, b, rows=rows: rows, 4, "BAT")
            now, metrics = step(now, placed)
            losses.append(float(metrics["loss"]))
    return losses


def test_the_golden_curve(tmp_path):
    code = "import json; from tests import test_curve as t; print(json.dumps(t.curve()))"
    losses = json.loads(tiny.as_users_compile(code, GPTJAX_CACHE=str(tmp_path)))
    assert losses[0] > 5.4 and min(losses) == min(losses[-10:]) < 3.3
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if UPDATE:
        # Curves that this one is not another rounding of are of other numbers.
        golden = {k: v for k, v in golden.items() if near(losses, v)}
        golden[machine()] = [loss.hex() for loss in losses]
        GOLDEN.write_text(json.dumps(dict(sorted(golden.items())), indent=1) + "\n")
    known = golden.get(machine())
    if known is not None:
        assert [loss.hex() for loss in losses] == known
    assert golden and all(near(losses, other) for other in golden.values())


def near(losses: list[float], golden: list[str]) -> bool:
    """Equality but for rounding: 1e-7 a step, which 50 steps of Adam at a high rate carry on."""
    wanted = [float.fromhex(loss) for loss in golden]
    return bool(np.allclose(losses, wanted, rtol=1e-5, atol=0))
