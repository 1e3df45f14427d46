"""What a step costs, counted and not timed: a slowdown shows here without a clock.

The step is compiled as for users, but for one thread and the instructions that all x86-64 of the
last ten years have, so that the counts are those of every such machine. They are golden values of
each jaxlib that is known: none may be larger. Smaller ones, or larger ones with a reason, are
recorded by

    GPTJAX_UPDATE_GOLDEN=1 python -m pytest tests/test_speed.py
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import accounting, loop, sharding, state
from gptjax.config import Config
from gptjax.data.batches import Batch
from gptjax.layers import attention
from tests import tiny

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "speed.json"
UPDATE = "GPTJAX_UPDATE_GOLDEN" in os.environ
# The last takes half the compiler's time away, and changes none of what is counted: machine code.
AS_EVERYWHERE = (
    "--xla_cpu_max_isa=AVX2 --xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"
)


def config() -> Config:
    """Two of GPT-2's blocks over two blocks of queries."""
    return dataclasses.replace(
        tiny.BASE,
        model=dataclasses.replace(
            tiny.BASE.model, vocab_size=512, context=128, layers=2, width=64, heads=4,
        ),
        data=tiny.data(batch_size=4),
    )  # fmt: skip


def count() -> dict[str, int]:
    """Of the compiled step of `config`."""
    c = config()
    c = dataclasses.replace(c, model=attention.resolve(c.model, "cpu"))
    ids = np.zeros((c.data.batch_size, 1, c.model.context), np.int32)
    with jax.set_mesh(tiny.mesh()):
        batch = sharding.place(
            lambda start, stop: Batch(ids, ids, ids.astype(np.float32)), c.data.batch_size, "BAT"
        )
        step: Any = state.make_train_step(c)
        compiled = step.lower(state.abstract(c), batch).compile()
    return {
        "FLOPs": round(compiled.cost_analysis()["flops"]),
        "bytes": round(compiled.cost_analysis()["bytes accessed"]),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        **operations(compiled.as_text()),
    }


def operations(hlo: str) -> dict[str, int]:
    """How many of each kind a program has, those within fusions too."""
    kinds = Counter(re.findall(r" = (?:\(.*?\)|\S+) ([a-z-]+)\(", hlo))
    kept = ("fusion", "copy", "transpose", "dot", "custom-call")
    return {kind: kinds[kind] for kind in kept}


def test_the_compiled_step_costs_no_more_than_it_did(tmp_path: Path) -> None:
    code = "import json; from tests import test_speed as t; print(json.dumps(t.count()))"
    environment = {"GPTJAX_CACHE": str(tmp_path), "XLA_FLAGS": AS_EVERYWHERE}
    counts = json.loads(tiny.as_users_compile(code, **environment))
    # Of the products that are needed, and less than a tenth beside them: norms, softmax, update.
    # Those of attention are in a program that is not XLA's.
    c = config()
    products = accounting.flops_by_part(c.model, causal=False)
    del products["scores"]
    # Forward and backward of each layer's attention, of its two norms and of the last norm, and the
    # sums and the gradient of softmax.
    assert counts["custom-call"] == 2 * (3 * c.model.layers + 1) + 2
    assert 1 < counts["FLOPs"] / sum(products.values()) / 4 / c.model.context < 1.1
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    which = f"jaxlib {version('jaxlib')}, {platform.machine()}"
    if UPDATE:
        golden[which] = counts
        GOLDEN.write_text(json.dumps(dict(sorted(golden.items())), indent=1) + "\n")
    if (known := golden.get(which)) is None:
        pytest.skip(f"no golden counts of {which}")
    more = {name: [known[name], n] for name, n in counts.items() if n > known[name]}
    assert not more, f"more than before, [then, now]: {more}"


def test_a_run_is_traced_and_compiled_once_and_a_step_moves_its_batch_and_its_numbers(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What crosses between host and device does so by request, and no more than it must."""
    steps = 20
    store = tiny.make_store(tmp_path)
    knobs = {"train__eval_every": 3, "train__checkpoint_every": 4, "eval__max_tokens": 16}
    config = tiny.config(store, train__steps=steps, **knobs)
    fetched: list[Any] = []
    device_get = jax.device_get
    monkeypatch.setattr(loop.jax, "device_get", lambda x: fetched.append(x) or device_get(x))
    with (
        jax.set_mesh(tiny.mesh()),
        jax.transfer_guard_host_to_device("log_explicit"),
        jax.transfer_guard_device_to_host("disallow"),
        jax.log_compiles(),
    ):
        loop.train(config, tmp_path / "run")
    said = [record.getMessage() for record in caplog.records]
    traced = [line for line in said if line.startswith("Finished tracing update for ")]
    compiled = [line for line in said if line.startswith("Compiling jit(update) ")]
    assert len(traced) == len(compiled) == 1, said
    # The numbers of a step come at once, and its batch goes as three arrays, as does the window of
    # an evaluation; one more batch tells the compiler the shapes. The rest is the first state.
    metrics = [x[0] for x in fetched if isinstance(x, tuple) and isinstance(x[0], dict)]
    assert sum("loss" in values for values in metrics) == len(metrics) == steps
    moved = capfd.readouterr().err.count("host-to-device transfer")
    evaluations = math.ceil(steps / 3)
    assert 0 <= moved - 3 * (1 + steps + evaluations) < steps
