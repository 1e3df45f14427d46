"""What is counted against closed forms, the real tree, jaxpr and optimiser state, and new rows."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import model as gpt
from gptjax import sharding, state
from gptjax.accounting import (
    Uncountable,
    costs,
    flops_by_part,
    memory_bytes,
    mfu,
    parameters,
    peak_flops,
    train_flops_per_token,
)
from gptjax.config import ATTENTION_BIAS, Config, Mesh, Model
from gptjax.layers.attention import BLOCK
from gptjax.layers.feedforward import FEEDFORWARD, Branch, hidden_width
from gptjax.layers.linear import linear
from gptjax.layers.norm import NORM
from gptjax.layers.parameter import parameter
from gptjax.layers.position import POSITION
from gptjax.losses import cross_entropy
from gptjax.model import PLACEMENT
from gptjax.optim import OPTIMIZERS, adamw
from gptjax.sharding import AXES
from tests import tiny

SMALL = tiny.model(context=16, layers=3, width=32, ff_dim=48)

VARIANTS = [
    {},
    *({"feedforward": name, "bias": bias} for name in FEEDFORWARD for bias in (True, False)),
    {"feedforward": "swiglu_experts", "bias": False, "shared_experts": 1, "experts_per_token": 3},
    {"feedforward": "gelu_experts", "capacity_factor": 3.0, "experts": 6},
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


def small(**changes) -> Model:
    return dataclasses.replace(SMALL, **changes)


def whole(model: Model, optimizer: str = "adamw", **train) -> Config:
    return dataclasses.replace(
        tiny.BASE,
        model=model,
        optim=tiny.optim(optimizer=optimizer, schedule="constant", ema_decay=0.99),
        train=tiny.train(accumulation=2),
    )


# --- closed forms of the rows that there are: the audit -----------------------------------------


def tensors(model: Model) -> Iterator[tuple[str, str, int]]:
    """Every parameter of the model: its part, its dims and how many there are alike."""
    m = model
    yield "embedding", "VD", 1
    if m.position == "learned":
        yield "position", "PD", 1

    yield "attention", "LDNH", 1  # query
    yield "attention", "LDKH", 2  # key, value
    yield "attention", "LNHD", 1  # out
    if "query" in m.biased:
        yield "attention", "LNH", 1
        yield "attention", "LKH", 2
    if "out" in m.biased:
        yield "attention", "LD", 1
    if m.qk_norm:
        yield "attention", "LH", 2
    if m.value_residual:
        yield "attention", "L", 2

    inputs = 2 if m.feedforward in ("swiglu", "geglu", "swiglu_experts") else 1
    E = ""
    if m.feedforward.endswith("_experts"):
        E = "E"
        yield "feedforward", "LDE", 1  # router
    yield "feedforward", f"L{E}DF", inputs
    yield "feedforward", f"L{E}FD", 1
    if m.bias:
        yield "feedforward", f"L{E}F", inputs
        yield "feedforward", f"L{E}D", 1
    if E and m.shared_experts:
        assert m.shared_experts == 1 and not m.bias
        yield "feedforward", "LDF", inputs
        yield "feedforward", "LFD", 1

    # Gain, and the offset of a LayerNorm.
    vectors = 0 if m.norm == "parameterfree" else 1 + (m.norm == "layernorm" and m.bias)
    branches = 1 if m.parallel_block else 2
    if vectors:
        yield "norm", "LD", vectors * branches * (2 if m.norm_placement == "sandwich" else 1)
        if m.norm_placement != "post":
            yield "norm", "D", vectors  # before the unembedding
    if not m.tied:
        yield "unembedding", "DV", 1


def size(model: Model, dims: str) -> int:
    m = model
    sizes = {
        "L": m.layers, "D": m.width, "N": m.heads, "K": m.K, "H": m.H, "F": hidden_width(m),
        "V": m.vocab_size, "P": m.context, "E": m.experts,
    }  # fmt: skip
    return math.prod(sizes[dim] for dim in dims)


def matmul_parameters(model: Model) -> int:
    """Weights of the matrix products: blocks and unembedding, not the embedding look-ups."""
    """Of the experts, those that a token meets."""
    one = ("LDNH", "LDKH", "LNHD", "LDF", "LFD", "LDE")
    inner = sum(n * size(model, d) for _, d, n in tensors(model) if d in one)
    routed = sum(n * size(model, d) for _, d, n in tensors(model) if d in ("LEDF", "LEFD"))
    return inner + routed * model.experts_per_token // model.experts + size(model, "DV")


def closed_flops(model: Model, causal: bool) -> float:
    """6 * matmul_parameters + sum over layers of 12 * N * H * S (Chowdhery et al. 2022, B)."""
    T, attended = model.context, 0.0
    for window in model.layer_windows:
        seen = np.minimum(np.arange(T) + 1, window or T)  # keys of each query
        attended += seen.mean() if causal else min(window or T, T)
    return 6.0 * matmul_parameters(model) + 12.0 * model.heads * model.H * attended


@pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)
def test_what_is_counted_is_the_closed_form(changes):
    model = small(**changes)
    counts: Counter[str] = Counter()
    for part, dims, copies in tensors(model):
        counts[part] += copies * size(model, dims)
    assert parameters(model) == {**counts, "total": counts.total()}
    declared = jax.tree.leaves(gpt.abstract_params(model))
    assert sorted(d for _, dims, n in tensors(model) for d in [dims] * n) == sorted(
        spec.dims for spec in declared
    )
    for causal in (True, False):
        assert train_flops_per_token(model, causal) == closed_flops(model, causal)


def test_counts_of_gpt2():
    gpt2 = small(vocab_size=50257, context=1024, layers=12, width=768, heads=12, ff_dim=None)
    # The released model has 124,439,808 (Radford et al. 2019, counted in huggingface.co/gpt2).
    assert parameters(gpt2)["total"] == 124_439_808
    # 12 L D^2 (Kaplan et al. 2020, table 1) and the unembedding; 12 L D T for the scores.
    products = 12 * 12 * 768**2 + 50257 * 768
    assert train_flops_per_token(gpt2, causal=False) == 6 * products + 12 * 12 * 768 * 1024
    assert flops_by_part(gpt2, causal=True) == {
        "attention": 6 * 12 * 4 * 768**2,
        "scores": 12 * 12 * 768 * 1025 / 2,
        "feedforward": 6 * 12 * 8 * 768**2,
        "unembedding": 6 * 50257 * 768,
    }


# --- the jaxpr of training ---------------------------------------------------------------------


def dot_flops(jaxpr) -> int:
    """FLOPs of every matrix product in a jaxpr, scans times their length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            width = math.prod(left[i] for i in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * width
        if equation.primitive.name == "ragged_dot_general":  # (rows, in) by (groups, in, out)
            rows, out = equation.invars[0].aval, equation.outvars[0].aval
            assert rows.ndim == 2
            total += 2 * rows.size * out.shape[-1]
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
        x_BTD = gpt.hidden(model, params, tokens_BT).x_BTD
        x_BTD, kernel, dims = gpt.unembedding(model, params, x_BTD)
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
        {"feedforward": "swiglu_experts", "scan_layers": True, "shared_experts": 1},
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
    assert train_flops_per_token(model, causal=True) == pytest.approx(expected, rel=1e-15)
    # A window wider than the context is none.
    assert train_flops_per_token(small(windows=(99,)), True) == train_flops_per_token(small(), True)
    full = train_flops_per_token(model, causal=False)
    assert full == matrices + 12 * model.width * (7 + 3 + 7)


def training(row: str, model: Model, **knobs) -> Config:
    return dataclasses.replace(whole(model), train=tiny.train(trainable=row, **knobs))


def test_what_is_frozen_has_no_gradient_to_count():
    """Closed forms of each row, of 3 layers: 2 FLOPs a parameter forward, to the input, to itself."""
    model = small(tied=False)
    D, F, V, T = 32, 48, 64, 16
    head, attention, feed = V * D, 4 * D * D, 2 * D * F
    layer, scores = attention + feed, 4 * T * D  # forward, of each layer
    forward = 2 * (3 * layer + head) + 3 * scores

    def flops(row: str, causal: bool = False, **knobs) -> float:
        scanned = dataclasses.replace(model, scan_layers=knobs.pop("scan", True))
        return train_flops_per_token(training(row, scanned, **knobs), causal)

    assert train_flops_per_token(model, False) == flops("all") == 3 * forward
    assert flops("unfrozen", frozen=("blocks/attention/*",)) == 3 * forward - 2 * 3 * attention
    rank = 5
    adapters = 3 * rank * (4 * 2 * D + 2 * (D + F))
    lora = 3 * forward - 2 * (3 * layer + head) + 6 * adapters
    assert flops("lora", lora_rank=rank) == flops("qlora", lora_rank=rank) == lora
    # Below the first layer nothing is trained: unrolled, its inputs need no gradient of the base, nor
    # of what reads into the adapters.
    spared = 2 * 3 * (D * D + rank * D)
    assert flops("lora", lora_rank=rank, scan=False) == lora - spared
    one = 4 * layer + 2 * scores + 2 * head  # the norms of the block are trained too
    assert flops("last_n_layers") == flops("last_n_layers", scan=False) == forward + one
    assert flops("heads_only") == forward + 2 * head
    # Of scores the visible pairs count, (T + 1) / 2 of T.
    unseen = 1 - (T + 1) / (2 * T)
    assert flops("lora", True, lora_rank=rank) == pytest.approx(lora - 9 * scores * unseen)


@pytest.mark.parametrize("feedforward", FEEDFORWARD)
def test_training_all_counts_alike_forward_and_back(feedforward):
    """What the gradient's jaxpr multiplies is three times the forward pass, for any feed-forward."""
    model = small(feedforward=feedforward, experts=4, qk_norm=True, scan_layers=True)
    none = training("unfrozen", model, frozen=("embed/positions",))
    assert train_flops_per_token(none, True) == pytest.approx(train_flops_per_token(model, True))


def test_the_block_kernel_lies_between_causal_and_full():
    model = small(attention="block", context=4 * BLOCK)
    steps = 1 + 2 + 3 + 4
    matrices = 6 * matmul_parameters(model)
    counted = counted_per_token(model)
    assert counted == matrices + 12 * 3 * model.width * steps * BLOCK / 4
    assert train_flops_per_token(model, True) < counted < train_flops_per_token(model, False)


# --- memory ------------------------------------------------------------------------------------

MESHES = [tiny.axes(), tiny.CUBE, tiny.TENSOR, tiny.SEQUENCE]


def check_memory(config: Config, axes: Mesh) -> None:
    """Against what a device of a real mesh holds of the state that training begins with."""
    mesh = dataclasses.asdict(axes)
    devices = tiny.devices()[: math.prod(mesh.values())]
    with jax.set_mesh(sharding.make_mesh(axes, devices)):
        real = state.abstract(config)

    def held(tree) -> int:
        leaves = jax.tree.leaves(tree)
        shards = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves]
        return sum(n * leaf.dtype.itemsize for n, leaf in zip(shards, leaves, strict=True))

    got = memory_bytes(config, mesh)
    assert got["parameters"] == held((real.params, real.frozen))
    assert got["gradients"] == held(real.params)
    assert got["optimizer"] == held(real.opt_state)
    assert got["ema"] == held(real.ema)
    assert got["total"] == sum(bytes for part, bytes in got.items() if part != "total")


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_memory_is_that_of_the_sharded_state(optimizer, axes):
    config = whole(small(width=64, head_dim=32, ff_dim=256, vocab_size=256), optimizer)
    check_memory(config, axes)


@pytest.mark.parametrize("axes", [tiny.axes(expert=2, fsdp=2), tiny.axes(expert=4, tensor=2)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_memory_of_experts_is_that_of_the_sharded_state(optimizer, axes):
    knobs = {"feedforward": "gelu_experts", "experts": 4, "balance_rate": 1e-3}
    config = whole(small(width=64, head_dim=32, ff_dim=256, vocab_size=256, **knobs), optimizer)
    check_memory(config, axes)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_what_is_frozen_has_neither_gradient_nor_state(optimizer):
    config = whole(small(), optimizer)
    train = dataclasses.replace(config.train, trainable="unfrozen", frozen=("embed/*", "blocks/*"))
    config = dataclasses.replace(config, train=train)
    check_memory(config, tiny.CUBE)
    got = memory_bytes(config, dict.fromkeys(AXES, 1))
    assert got["gradients"] == 4 * 2 * 32  # the final norm's gain and offset
    assert got["parameters"] == 4 * parameters(config.model)["total"]


@pytest.mark.parametrize("row", ["lora", "qlora", "last_n_layers", "heads_only"])
def test_memory_of_what_is_trained_is_that_of_the_sharded_state(row):
    model = small(width=64, head_dim=32, ff_dim=256, vocab_size=256, tied=False)
    check_memory(training(row, model), tiny.CUBE)
    assert "trained " in costs(training(row, model), dict.fromkeys(AXES, 1))[0]


def test_matrices_of_8_bits_take_a_quarter_and_a_scale_for_each_output():
    model = small(tied=False)
    D, F, L, rank = 32, 48, 3, 5
    entries, outputs = L * (4 * D * D + 2 * D * F), L * (4 * D + F + D)
    one = dict.fromkeys(AXES, 1)
    lora, qlora = (memory_bytes(training(r, model, lora_rank=rank), one) for r in ("lora", "qlora"))
    assert lora["parameters"] - qlora["parameters"] == 3 * entries - 4 * outputs
    others = ("gradients", "optimizer", "ema", "activations", "logits")
    assert all(lora[part] == qlora[part] for part in others)


def test_activations_by_hand():
    config = whole(small())  # 8 rows in 2 micro-batches, 16 tokens each
    got = memory_bytes(config, {"data": 2, "fsdp": 1, "tensor": 2})
    tokens, t = 8 / 2 * 16 / 2, 2
    # Query, key, value, heads' outputs and up are split over the tensor axis, as scores are.
    values = (4 * 32 + 48 + 4 * 16) / t + 2 * 32
    assert got["activations"] == tokens * 3 * 2 * 4 * values
    assert got["logits"] == 2 * tokens * 4 * 64 / t
    # A row that is split has half of its tokens on a device, as half of the rows have.
    split = memory_bytes(config, {"data": 1, "fsdp": 1, "sequence": 2, "tensor": 2})
    assert (split["activations"], split["logits"]) == (got["activations"], got["logits"])
    dots = memory_bytes(whole(small(remat="dots")), {"data": 2, "fsdp": 1, "tensor": 2})
    assert dots["activations"] == tokens * 3 * 4 * ((3 * 32 + 48) / t + 2 * 32)
    chunked = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, loss_vocab_chunk=16)
    )
    assert memory_bytes(chunked, dict.fromkeys(AXES, 1))["logits"] == 2 * 4 * 16 * 4 * 16
    full = whole(small(remat="full", attention="block", dtype="bfloat16"))
    assert memory_bytes(full, dict.fromkeys(AXES, 1))["activations"] == 4 * 16 * 3 * 2 * 32
    one = dict.fromkeys(AXES, 1)
    assert memory_bytes(full, one | {"sequence": 4})["activations"] == 4 * 16 * 3 * 2 * 32 / 4


# --- rows that are not there: each one row of one table ------------------------------------------


def tanh_norm(module, c, x):
    """Dynamic tanh (Zhu et al. 2025): a scalar, a gain and an offset."""
    vectors = [("alpha", "", (), "gain"), ("scale", "D", (c.width,), "gain"),
               ("bias", "D", (c.width,), "bias")]  # fmt: skip
    alpha, scale, bias = (parameter(module, c, *vector) for vector in vectors)
    return scale * jnp.tanh(alpha * x.astype(jnp.float32)) + bias


EXPERTS = 3


def experts(module, c, x_BTD, tap):
    """Every token through every expert, weighted by a softmax over the router's logits."""
    D, F, E = c.width, hidden_width(c), EXPERTS
    router = parameter(module, c, "router", "DE", (D, E), "matrix", fan_in="D")
    up = parameter(module, c, "up", "EDF", (E, D, F), "matrix", fan_in="D", stacks="E")
    down = parameter(module, c, "down", "EFD", (E, F, D), "residual", fan_in="F", stacks="E")
    share_BTE = jax.nn.softmax(linear("BTD,DE->BTE", x_BTD, router))
    # An einsum that is not `linear` counts as well.
    h_BTEF = jax.nn.relu(jnp.einsum("BTD,EDF->BTEF", x_BTD, up, out_sharding=sharding.out("BTEF")))
    return linear("BTEF,EFD->BTD", h_BTEF * share_BTE[..., None], down)


def sgd(config, rates, specs):
    return optax.chain(optax.identity(), optax.scale_by_learning_rate(rates.schedule))


def third_moment(config, rates, specs):
    """A state of another size: one more value for each row of a matrix."""

    def init(params):
        return jax.tree.map(lambda p: jnp.zeros(p.shape[:-1]), params)

    def update(updates, state, params=None):
        return updates, jax.tree.map(lambda s, u: s + u.mean(-1) if u.ndim else s, state, updates)

    extra = optax.GradientTransformation(init, update)
    return optax.chain(extra, adamw(config, rates, specs))


PLANTED = {
    "norm": (NORM, tanh_norm),
    "feedforward": (FEEDFORWARD, Branch(experts, lambda width: 2 * width)),
}


@pytest.mark.parametrize("knob", PLANTED)
def test_a_planted_layer_is_counted_as_it_is(knob, monkeypatch):
    table, row = PLANTED[knob]
    monkeypatch.setitem(table, "planted", row)
    model = small(**{knob: "planted", "ff_dim": None, "scan_layers": True, "remat": "full"})
    real = gpt.init(model, 0)
    assert parameters(model)["total"] == sum(leaf.size for leaf in jax.tree.leaves(real))
    D, L, E, F = model.width, model.layers, EXPERTS, 2 * model.width
    by_hand = {
        "norm": ("norm", (2 * L + 1) * (2 * D + 1)),
        "feedforward": ("feedforward", L * (D * E + 2 * E * D * F)),
    }
    part, count = by_hand[knob]
    assert parameters(model)[part] == count
    # The products of the real gradient, without those that remat makes again.
    kept = dataclasses.replace(model, remat="none")
    assert train_flops_per_token(model, causal=False) == counted_per_token(kept)
    if knob == "feedforward":
        assert flops_by_part(model, causal=True)["feedforward"] == 6 * count
    for axes in MESHES:
        check_memory(whole(model), axes)


def test_a_row_written_anew_under_its_name_is_counted_anew(monkeypatch, fresh_programs):
    before = parameters(small())["total"], train_flops_per_token(small(), True)
    monkeypatch.setitem(FEEDFORWARD, small().feedforward, PLANTED["feedforward"][1])
    monkeypatch.setitem(NORM, small().norm, tanh_norm)
    after = parameters(small())["total"], train_flops_per_token(small(), True)
    assert after[0] == sum(leaf.size for leaf in jax.tree.leaves(gpt.init(small(), 0)))
    assert after[0] > before[0] and after[1] > before[1]


@pytest.mark.parametrize("row", [sgd, third_moment])
def test_a_planted_optimiser_is_counted_as_it_is(row, monkeypatch, fresh_programs):
    monkeypatch.setitem(OPTIMIZERS, "planted", row)
    config = whole(small(), "planted")
    for axes in MESHES:
        check_memory(config, axes)
    weights = 4 * parameters(config.model)["total"]
    got = memory_bytes(config, dict.fromkeys(AXES, 1))["optimizer"]
    assert got < 100 if row is sgd else 2 * weights < got < 3 * weights


def test_products_that_cannot_be_counted_are_refused(monkeypatch):
    def loop(module, c, x_BTD, tap):
        w = parameter(module, c, "w", "DF", (c.width, c.width), "matrix", fan_in="D")
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x + jnp.sum(x @ w), x_BTD)

    monkeypatch.setitem(FEEDFORWARD, "planted", Branch(loop, lambda width: width))
    model = small(feedforward="planted")
    with pytest.raises(Uncountable, match="products of 'while' in .*feedforward"):
        train_flops_per_token(model, causal=True)
    with pytest.raises(Uncountable):
        memory_bytes(whole(model), dict.fromkeys(AXES, 1))
    # What only tells of costs says that it cannot, and goes on.
    first, flops, memory = costs(whole(model), dict.fromkeys(AXES, 1))
    assert first.startswith("parameters: ") and f"total {parameters(model)['total']:,}" in first
    assert re.match("FLOPs are not counted: products of 'while' in .*feedforward", flops)
    assert re.search(": not counted: products of 'while' in .*feedforward", memory)


# --- rates ---------------------------------------------------------------------------------------


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
    devices = tiny.devices()
    peak, source = peak_flops(devices[0])
    assert "measured" in source and peak is not None
    # Between a slow core and a very large server.
    assert 1e9 < peak * len(devices) < 1e14
    assert peak_flops(devices[-1])[0] == peak
