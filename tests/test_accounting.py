"""Closed forms against the real parameter tree, the real jaxpr and the real optimiser state."""

from __future__ import annotations

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import model as gpt
from gptjax.accounting import (
    matmul_parameters,
    memory_bytes,
    mfu,
    parameters,
    peak_flops,
    tensors,
    train_flops_per_token,
)
from gptjax.config import ATTENTION_BIAS, Config, Model
from gptjax.layers.attention import BLOCK
from gptjax.layers.feedforward import FEEDFORWARD
from gptjax.layers.norm import NORM
from gptjax.layers.position import POSITION
from gptjax.losses import cross_entropy
from gptjax.model import PLACEMENT
from gptjax.optim import OPTIMIZERS, make_optimizer, state_specs
from gptjax.sharding import AXES, PARAMETER_RULES
from tests import tiny

SMALL = tiny.model(context=16, layers=3, width=32, ff_dim=48)

VARIANTS = [
    {},
    *({"feedforward": name, "bias": bias} for name in FEEDFORWARD for bias in (True, False)),
    *({"norm": name, "bias": bias} for name in NORM for bias in (True, False)),
    *({"norm_placement": p, "parallel_block": b} for p in PLACEMENT for b in (True, False)),
    *({"position": name} for name in POSITION),
    {"kv_heads": 1},
    {"kv_heads": 2, "head_dim": 16, "bias": False},
    *({"attention_bias": name} for name in ATTENTION_BIAS),
    {"qk_norm": True},
    {"value_residual": True},
    {"tied": False},
    {"ff_dim": None},
    {"ff_dim": None, "feedforward": "swiglu"},
]
NAMES = [",".join(f"{k}={v}" for k, v in changes.items()) or "base" for changes in VARIANTS]

# Where a parameter stands in the tree decides its part.
PARTS = {
    "embed/tokens": "embedding",
    "embed/positions": "position",
    "blocks/attention/": "attention",
    "blocks/feedforward/": "feedforward",
    "blocks/": "norm",
    "final_norm": "norm",
    "unembed": "unembedding",
}


def small(**changes) -> Model:
    return dataclasses.replace(SMALL, **changes)


def whole(model: Model, optimizer: str = "adamw", **train) -> Config:
    return dataclasses.replace(
        tiny.BASE,
        model=model,
        optim=tiny.optim(optimizer=optimizer, schedule="constant", ema_decay=0.99),
        train=tiny.train(accumulation=2),
    )


@pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)
def test_parameters_are_those_of_the_tree(changes):
    model = small(**changes)
    counts, dims = dict.fromkeys(parameters(model), 0), []
    for path, spec in jax.tree_util.tree_leaves_with_path(gpt.abstract_params(model)):
        name = "/".join(part.key for part in path)
        part = next(PARTS[start] for start in PARTS if name.startswith(start))
        counts[part] += math.prod(spec.shape)
        counts["total"] += math.prod(spec.shape)
        dims.append(spec.dims)
    assert parameters(model) == counts
    assert sorted(d for t in tensors(model) for d in [t.dims] * t.copies) == sorted(dims)


def test_parameters_of_gpt2():
    gpt2 = small(vocab_size=50257, context=1024, layers=12, width=768, heads=12, ff_dim=None)
    # The released model has 124,439,808 (Radford et al. 2019, counted in huggingface.co/gpt2).
    assert parameters(gpt2)["total"] == 124_439_808
    # 12 L D^2 (Kaplan et al. 2020, table 1) and the unembedding.
    assert matmul_parameters(gpt2) == 12 * 12 * 768**2 + 50257 * 768


def dot_flops(jaxpr) -> int:
    """FLOPs of every matrix product in a jaxpr, scans times their length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            width = math.prod(left[i] for i in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * width
        assert equation.primitive.name != "while", "a loop of unknown length"
        inner = sum(dot_flops(sub) for value in equation.params.values() for sub in jaxprs(value))
        total += inner * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def jaxprs(value):
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from jaxprs(item)


def counted_per_token(model: Model, chunk: int | None = None) -> float:
    rows = 2
    specs = gpt.abstract_params(model)
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs)
    tokens_BT = jax.ShapeDtypeStruct((rows, model.context), jnp.int32)

    def loss(params, tokens_BT):
        x_BTD, _ = gpt.hidden(model, params, tokens_BT)
        kernel, dims = gpt.unembedding(model, params)
        weights_BT = jnp.ones(tokens_BT.shape)
        return cross_entropy(
            x_BTD, kernel, dims, tokens_BT, weights_BT, chunk=chunk, softcap=None, z_loss=0.0
        ).objective

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params, tokens_BT)
    return dot_flops(jaxpr.jaxpr) / (rows * model.context)


def test_the_walker_counts_products_and_scans():
    def f(a, b):
        return jax.lax.scan(lambda carry, _: (carry @ b, None), a, None, length=5)[0]

    jaxpr = jax.make_jaxpr(jax.jit(f))(jnp.ones((2, 3)), jnp.ones((3, 3)))
    assert dot_flops(jaxpr.jaxpr) == 5 * 2 * 2 * 3 * 3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scan_layers": True},
        {"feedforward": "swiglu", "tied": False, "position": "rope", "norm": "rmsnorm"},
        {"kv_heads": 2, "head_dim": 16, "qk_norm": True, "value_residual": True},
        {"parallel_block": True, "norm_placement": "sandwich", "position": "alibi"},
    ],
    ids=lambda changes: ",".join(changes) or "base",
)
def test_flops_are_those_of_the_jaxpr(changes):
    model = small(**changes)
    # The plain kernel computes what it masks.
    assert counted_per_token(model) == train_flops_per_token(model, causal=False)


def test_a_chunked_loss_multiplies_once_more():
    model = small()
    extra = 2 * model.width * model.vocab_size
    expected = train_flops_per_token(model, causal=False) + extra
    assert counted_per_token(model, chunk=16) == expected


def test_causal_flops_count_the_visible_pairs():
    model = small(context=7, windows=(None, 3), layers=3)
    visible = np.tril(np.ones((7, 7)))
    narrow = visible - np.tril(visible, -3)
    pairs = (2 * visible.sum() + narrow.sum()) / 7
    matrices = 6 * matmul_parameters(model)
    expected = matrices + 12 * model.width * pairs
    assert train_flops_per_token(model, causal=True) == pytest.approx(expected, rel=1e-12)
    # A window wider than the context is none.
    assert train_flops_per_token(small(windows=(99,)), True) == train_flops_per_token(small(), True)
    full = train_flops_per_token(model, causal=False)
    assert full == matrices + 12 * model.width * (7 + 3 + 7)


def test_the_block_kernel_lies_between_causal_and_full():
    model = small(attention="block", context=4 * BLOCK)
    steps = 1 + 2 + 3 + 4
    matrices = 6 * matmul_parameters(model)
    counted = counted_per_token(model)
    assert counted == matrices + 12 * 3 * model.width * steps * BLOCK / 4
    assert train_flops_per_token(model, True) < counted < train_flops_per_token(model, False)


@pytest.mark.parametrize("shape", [tiny.axes(), tiny.CUBE, tiny.TENSOR], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_memory_is_that_of_the_sharded_state(optimizer, shape):
    mesh = dataclasses.asdict(shape)
    config = whole(small(width=64, head_dim=32, ff_dim=256, vocab_size=256), optimizer)
    specs = gpt.abstract_params(config.model)
    dims = jax.tree.map(lambda s: s.dims, specs)
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs)
    state = jax.eval_shape(make_optimizer(config.optim, 100, dims).init, params)

    def held(leaf, spec) -> int:
        axes = [
            a for entry in spec if entry for a in (entry if isinstance(entry, tuple) else (entry,))
        ]
        return leaf.size * leaf.dtype.itemsize // math.prod(mesh[axis] for axis in axes)

    real = sum(jax.tree.leaves(jax.tree.map(held, state, state_specs(state, params, dims))))
    got = memory_bytes(config, mesh)
    by_dims = [
        4
        * math.prod(s.shape)
        // math.prod(mesh[a] for d in s.dims for a in PARAMETER_RULES.get(d, ()))
        for s in jax.tree.leaves(specs)
    ]
    assert got["parameters"] == got["gradients"] == got["ema"] == sum(by_dims)
    # Counters, and Adafactor's replicated factors, are neglected.
    slack = 4 * 0.05 * parameters(config.model)["total"] if optimizer == "adafactor" else 200
    assert 0 <= real - got["optimizer"] <= slack
    assert got["total"] == sum(size for part, size in got.items() if part != "total")


def test_activations_by_hand():
    config = whole(small())  # 8 rows in 2 micro-batches, 16 tokens each
    got = memory_bytes(config, {"data": 2, "fsdp": 1, "tensor": 2})
    tokens, t = 8 / 2 * 16 / 2, 2
    values = 6 * 32 + (2 * 4 + 2 * 4) * 8 / t + 3 * 48 / t
    assert got["activations"] == tokens * 3 * (4 * values + 8 * 4 * 16 / t)
    assert got["logits"] == tokens * 8 * 64 / t
    full = whole(small(remat="full", attention="block", dtype="bfloat16"))
    assert memory_bytes(full, dict.fromkeys(AXES, 1))["activations"] == 4 * 16 * 3 * 2 * 32


def test_mfu():
    assert mfu(1000.0, 2e9, 4e12) == 0.5


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("Abacus", None),
    ],
)
def test_published_peaks(kind, peak):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind)
    got, source = peak_flops(device)  # type: ignore[arg-type]
    assert got == peak
    assert ("no published peak" in source) == (peak is None)


def test_a_cpu_is_measured_and_its_devices_share_it():
    devices = jax.devices()
    peak, source = peak_flops(devices[0])
    assert "measured" in source and peak is not None
    # Between a slow core and a very large server.
    assert 1e9 < peak * len(devices) < 1e14
    assert peak_flops(devices[-1])[0] == peak
