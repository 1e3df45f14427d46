"""Parameters, FLOPs and memory of a config: what its layers declare and what they multiply.

Nothing here knows an architecture. Parameters are those of `model.abstract_params`, FLOPs are
those of the matrix products in the jaxpr of the forward pass, or of forward and backward pass where a
part is trained, and memory is that of the abstract
state of training, with its shardings. So a new row of any table is counted as it is; the tests
compare with closed forms of the rows that there are.

FLOPs never come from XLA's `cost_analysis()`, which counts a scanned body once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import model as gpt
from gptjax import sharding, state
from gptjax.config import Config, ConfigError, Model, UserError
from gptjax.layers.attention import KERNEL, kernel_for
from gptjax.layers.feedforward import FEEDFORWARD
from gptjax.layers.norm import NORM
from gptjax.layers.parameter import Spec, laid
from gptjax.layers.position import POSITION
from gptjax.optim import state_specs
from gptjax.sharding import parameter_spec
from gptjax.trainable import TRAINABLE, trainable


def _rows(model: Model) -> tuple[Any, ...]:
    """The rows that multiply: with them products are remembered, so that a row that was written
    anew under its old name is counted anew."""
    return FEEDFORWARD.get(model.feedforward), NORM.get(model.norm), POSITION.get(model.position)


def parameters(model: Model) -> dict[str, int]:
    """Parameters of each part, and "total". A tied table counts once, as "embedding".

    Parts are the tables by their role, the branches of a block by their name, and "norm".
    """
    parts: Counter[str] = Counter()
    for path, spec in jax.tree_util.tree_leaves_with_path(gpt.abstract_params(model)):
        parts[_part([entry.key for entry in path], spec)] += math.prod(spec.shape)
    return {**parts, "total": parts.total()}


def active_parameters(model: Model) -> int:
    """Parameters that a token passes through: of the experts, those that are chosen for it."""

    def active(spec: Spec) -> int:
        stacked = math.prod(spec.shape)
        chosen = stacked * model.experts_per_token // model.experts
        return chosen if "E" in spec.stacks else stacked

    return sum(map(active, jax.tree.leaves(gpt.abstract_params(model))))


def _part(path: list[str], spec: Spec) -> str:
    if spec.kind in ("embedding", "unembedding"):
        return spec.role
    module = path[1] if path[0] == "blocks" else path[0]
    return "norm" if "norm" in module else module


def train_flops_per_token(of: Config | Model, causal: bool) -> float:
    """FLOPs of a forward and backward pass for each token of a full context.

    Every token passes through each of the experts that are chosen for it: with a capacity this is
    the most there can be, of which `Meter` takes off what was dropped. Slots that stay empty are not
    counted.

    Two for each multiply-add, times one forward and two backward products (6 N: Kaplan et al.
    2020, section 2.1; PaLM, Chowdhery et al. 2022, appendix B). Of what is frozen there is no
    gradient to count, nor of what lies below all that is trained. Not counted: whatever is no
    matrix product (norms, softmax, activations) and what is computed again (remat, a chunked
    loss), as is usual for model FLOPs.

    Args:
        of: a run, of which `train.trainable` says what is trained; or a model, which is then all.
        causal: attention's products are counted over the mean number of keys that a query may
            see, (T + 1) / 2 without a window, which is the work that is needed; else over T or
            the window, PaLM's convention, which is the work of a kernel that masks but does not
            skip.
    """
    return sum(flops_by_part(of, causal).values())


def flops_by_part(of: Config | Model, causal: bool) -> dict[str, float]:
    """`train_flops_per_token` by the module that multiplies; "scores" are those of the kernel.

    Raises:
        Uncountable: on a primitive of a row whose products cannot be counted.
    """
    model = of.model if isinstance(of, Config) else of
    T, pairs = model.context, 0
    for window in model.layer_windows:
        w = min(window or T, T)
        # Queries 1..w see as many keys as their index, the other T - w see w.
        pairs += w * (w + 1) // 2 + (T - w) * w if causal else T * w
    parts: Counter[str] = Counter()
    if isinstance(of, Config) and of.train.trainable != "all":
        whole = dataclasses.replace(of, model=_same_products(model, model.scan_layers))
        products = _trained_products(whole, (*_rows(model), TRAINABLE.get(of.train.trainable)))
        times = 1
    else:
        products, times = _products(_same_products(model), _rows(model), 1, ()), 3
    for product in products:
        parts[product.part] += times * product.flops
    # Whole numbers until the one division. Every layer was traced with all its pairs.
    every = model.layers * T * T
    return {
        part: n * pairs / (every * T) if part == "scores" else n / T for part, n in parts.items()
    }


class Uncountable(UserError):
    """A part of a model multiplies in a way whose FLOPs cannot be told."""


class Product(NamedTuple):
    """Matrix products of a forward pass that are alike.

    Attributes:
        part: of the model that multiplies, a value of `PARTS`.
        flops: of all devices together.
        bytes: of what it yields, on one device.
    """

    part: str
    flops: int
    bytes: int


def _same_products(model: Model, scan_layers: bool = True) -> Model:
    """The config that stands for all that multiply alike: every layer traced once, every pair, and
    every token through each of its experts."""
    return dataclasses.replace(
        model,
        attention="plain",
        windows=(None,),
        scan_layers=scan_layers,
        remat="none",
        dropout=0.0,
        capacity_factor=None,
    )


@functools.lru_cache(maxsize=1024)
def _products(
    model: Model, rows: tuple[Any, ...], batch: int, mesh_shape: tuple[tuple[str, int], ...]
) -> list[Product]:
    """The products of a forward pass of `batch` full rows, traced on an abstract mesh."""
    mesh = sharding.abstract_mesh(dict(mesh_shape))
    with jax.sharding.use_abstract_mesh(mesh):

        def placed(shape: tuple[int, ...], dtype: Any, where: PartitionSpec) -> Any:
            return jax.ShapeDtypeStruct(
                shape, dtype, sharding=NamedSharding(mesh, where) if mesh_shape else None
            )

        params = jax.tree.map(
            lambda s: placed(s.shape, jnp.float32, parameter_spec(s.dims)),
            gpt.abstract_params(model),
        )
        tokens_BT = placed((batch, model.context), jnp.int32, sharding.spec("BT"))
        jaxpr = jax.make_jaxpr(functools.partial(gpt.apply, model))(params, tokens_BT)
    return list(_walk(jaxpr.jaxpr, "", 1))


@functools.lru_cache(maxsize=64)
def _trained_products(config: Config, rows: tuple[Any, ...]) -> list[Product]:
    """The products of a forward and a backward pass of one full row, of what is trained."""
    del rows  # a part of the key alone
    model, row = config.model, trainable(config)

    def logits(trained: gpt.Params, frozen: gpt.Params | None, tokens_BT: jax.Array) -> jax.Array:
        return gpt.apply(model, row.realise(trained, frozen), tokens_BT).sum()

    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh({})):
        specs = gpt.abstract_params(model)
        params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs)
        trained, frozen = jax.eval_shape(row.split, params)
        tokens_BT = jax.ShapeDtypeStruct((1, model.context), jnp.int32)
        jaxpr = jax.make_jaxpr(jax.value_and_grad(logits))(trained, frozen, tokens_BT).jaxpr
    # XLA drops what nobody reads as well: gradients of what is frozen.
    read, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return list(_walk(read, "", 1))


# Of these it is not known what they multiply, or how often.
UNCOUNTED = ("while", "cond", "conv_general_dilated", "pallas_call", "ffi_call")


def _walk(jaxpr: Any, scope: str, times: int, devices: int = 1) -> Iterator[Product]:
    """Every matrix product in a jaxpr; those of a scan `times` its length.

    Inside of a `shard_map` shapes are those of one of so many `devices`.
    """
    for equation in jaxpr.eqns:
        if not equation.outvars:  # what is left of one whose results nobody reads
            continue
        name, out = equation.primitive.name, equation.outvars[0].aval
        inside = f"{scope}/{equation.source_info.name_stack}"
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            width = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            flops = 2 * times * devices * out.size * width
            yield Product(part_of(inside), flops, times * held_bytes(out))
        if name == "ragged_dot_general":  # each row of the left meets one group of the right
            dims = equation.params["ragged_dot_dimension_numbers"]
            (_, summed), (_, batch) = dims.dot_dimension_numbers
            left, right = (operand.aval for operand in equation.invars[:2])
            passed = {*summed, *batch, *dims.rhs_group_dimensions}
            width = math.prod(n for i, n in enumerate(right.shape) if i not in passed)
            flops = 2 * times * devices * left.size * width
            yield Product(part_of(inside), flops, times * held_bytes(out))
        repeats = times * equation.params["length"] if name == "scan" else times
        sharers = equation.params["mesh"].size if name == "shard_map" else devices
        products = [
            product
            for value in jax.tree.leaves(list(equation.params.values()))
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns")
            for product in _walk(inner, inside, repeats, sharers)
        ]
        if name == "ffi_call" and "_rows_" in equation.params["target_name"]:
            continue  # `layers.rows`, which multiplies no matrices
        if name in UNCOUNTED and (products or name not in ("while", "cond")):
            raise Uncountable(f"products of {name!r} in {inside} cannot be counted")
        yield from products


# Scopes of a program, those of Linen's modules and of `jax.named_scope`, and their parts.
PARTS: dict[str, str] = {
    "Embed": "embedding",
    "parameters": "parameters",  # of each layer, cut from the stack
    "Norm": "norm",
    **{f"attention_norm_{place}": "norm" for place in ("in", "out", "stream")},
    **{f"feedforward_norm_{place}": "norm" for place in ("in", "out", "stream")},
    "attention": "attention",
    KERNEL: "scores",
    "feedforward": "feedforward",
    "experts": "experts",  # those that a token is sent to
    "Block": "stream",  # sums of the residual stream, dropout
    "unembedding": "unembedding",
    "Unembed": "unembedding",
    "loss": "loss",
    "gradients": "gradients",  # summed over micro-batches
    "optimizer": "optimizer",
}


def part_of(scope: str) -> str:
    """Of a scope such as "jit(step)/jvp(Block)/attention/query": its innermost part, or "other"."""
    words = re.split("[/()]", scope)
    return next((PARTS[word] for word in reversed(words) if word in PARTS), "other")


def held_bytes(array: Any) -> int:
    """Bytes of a device's part of an abstract array that may be sharded, or be that part."""
    whole = array.sharding is None or array.sharding.mesh.manual_axes
    shape = array.shape if whole else array.sharding.shard_shape(array.shape)
    return math.prod(shape) * array.dtype.itemsize


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilisation: tokens/s * FLOPs/token / peak FLOP/s of all devices together."""
    return tokens_per_second * flops_per_token / peak


def memory_bytes(config: Config, mesh_shape: Mapping[str, int]) -> dict[str, int]:
    """Bytes a device holds in training, by purpose, and "total".

    Parameters, gradients, optimiser state and weight average are exact, those of the abstract
    state of training, sharded as it is; what is frozen has parameters alone. "activations" and
    "logits" are rough: what the backward pass needs of a device's micro-batch where all is trained,
    and model.remat is

        none          twice what the products of the blocks yield, as they are and after what
                      follows them (norm, rotation, activation, softmax); a kernel of attention
                      that never holds all scores yields none
        dots          once what all but the kernel's yield
        attention     3 L D
        full          L D

    and float32 logits and their gradient, of optim.loss_vocab_chunk columns at most.

    Args:
        config: the whole config.
        mesh_shape: devices along each mesh axis, such as `mesh.shape`.

    Raises:
        Uncountable: as `flops_by_part`, whose products "activations" and "logits" are made of.
    """
    m, mesh = config.model, tuple(mesh_shape.items())
    row = trainable(config)
    every, trained = flatten_dict(gpt.abstract_params(m), sep="/"), row.specs
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh({})):
        whole = {path: jax.ShapeDtypeStruct(s.shape, jnp.float32) for path, s in every.items()}
        params, frozen = jax.eval_shape(row.split, unflatten_dict(whole, sep="/"))
        optimizer = jax.eval_shape(state.make_optimizer(config).init, params)

    def held(array: jax.ShapeDtypeStruct, where: PartitionSpec) -> int:
        split = jax.tree.leaves(tuple(where))  # an entry is an axis, several or None
        ways = math.prod(mesh_shape.get(axis, 1) for axis in split)
        return math.prod(array.shape) * array.dtype.itemsize // ways

    def total(arrays: Any, where: Any) -> int:
        return sum(jax.tree.leaves(jax.tree.map(held, arrays, where)))

    of_trained = total(params, jax.tree.map(lambda s: parameter_spec(s.dims), trained))
    kept = flatten_dict(frozen or {}, sep="/").items()
    of_frozen = sum(
        held(array, parameter_spec(laid(every[path].dims, array.shape)))
        for path, leaf in kept
        for array in jax.tree.leaves(leaf)  # of a rounded one its scale too
    )

    rows = config.data.batch_size // config.train.accumulation
    traced = dataclasses.replace(_same_products(m), capacity_factor=m.capacity_factor)
    products = _products(traced, _rows(m), rows, mesh)
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(mesh_shape)):
        tokens = rows * m.context // (sharding.ways("B") * sharding.ways("T"))
        stores_scores = kernel_for(m, m.context) == "plain"
    stream = tokens * m.width * (2 if m.dtype == "bfloat16" else 4)
    match m.remat:
        case "full":
            activations = m.layers * stream
        case "attention":
            activations = 3 * m.layers * stream
        case "dots":
            activations = sum(p.bytes for p in products if p.part not in ("scores", "unembedding"))
        case _:
            products_kept = (p for p in products if p.part != "unembedding")
            activations = 2 * sum(
                p.bytes for p in products_kept if stores_scores or p.part != "scores"
            )
    logits = sum(p.bytes for p in products if p.part == "unembedding")
    columns = min(config.optim.loss_vocab_chunk or m.vocab_size, m.vocab_size)
    parts = {
        "parameters": of_trained + of_frozen,
        "gradients": of_trained,
        "optimizer": total(optimizer, state_specs(optimizer, trained)),
        "ema": 0 if config.optim.ema_decay is None else of_trained,
        "activations": activations,
        "logits": 2 * logits * columns // m.vocab_size,
    }
    return {**parts, "total": sum(parts.values())}


def costs(config: Config, mesh_shape: Mapping[str, int]) -> list[str]:
    """What a run costs, by purpose, for a person: parameters, FLOPs and bytes, a line each."""
    counts = parameters(config.model)
    if (active := active_parameters(config.model)) != counts["total"]:
        counts["active"] = active
    trained = sum(math.prod(s.shape) for s in jax.tree.leaves(trainable(config).specs))
    if config.train.trainable != "all":
        counts["trained"] = trained
    lines = [f"parameters: {', '.join(f'{part} {n:,}' for part, n in counts.items())}"]
    try:
        flops = flops_by_part(config, causal=True)
    except Uncountable as error:
        lines.append(f"FLOPs are not counted: {error}")
    else:
        flops |= {"total": sum(flops.values())}
        parts = ", ".join(f"{part} {n:.4g}" for part, n in flops.items())
        lines.append(f"FLOPs of a token, forward and backward, causal: {parts}")
    mesh = sharding.in_words(mesh_shape)
    return [*lines, f"memory of a device, mesh {mesh}: {memory(config, mesh_shape)}"]


def memory(config: Config, mesh_shape: Mapping[str, int]) -> str:
    """`memory_bytes`, or why there are none, for a person."""
    try:
        sharding.check_divisible(config, gpt.abstract_params(config.model), mesh_shape)
        sizes_in_bytes = memory_bytes(config, mesh_shape)
    except ConfigError as error:
        return f"none, {error}"
    except Uncountable as error:
        return f"not counted: {error}"
    sizes = {part: f"{n / 2**20:,.1f} MiB" for part, n in sizes_in_bytes.items()}
    sizes |= {part: f"about {sizes[part]}" for part in ("activations", "logits", "total")}
    return ", ".join(map(" ".join, sizes.items()))


# Dense bf16 FLOP/s of a device, by how its `device_kind` begins; the first match counts.
# TPUs: cloud.google.com/tpu/docs, "System architecture" of each version.
# NVIDIA: the data sheets of A100, H100, H200 and HGX B200, half of "with sparsity".
PEAK_BF16 = {
    "TPU v4 lite": 137e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,  # v6e
    "TPU7x": 2307e12 / 2,  # a chip is two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device) -> tuple[float | None, str]:
    """The peak FLOP/s of one device, None where unknown, and in words where it comes from.

    A CPU has no one published peak: it is measured, once a process, for 0.3 s. Several CPU
    devices of one process share the machine, and its rate.
    """
    if device.platform == "cpu":
        sharing = sum(d.process_index == device.process_index for d in device.client.devices())
        return matmul_rate() / sharing, "measured here, float32 matrix product"
    return published_peak(device.device_kind)


def published_peak(device_kind: str) -> tuple[float | None, str]:
    """The peak FLOP/s of a kind of device, None where none is on file, and in words which it is."""
    for kind, peak in PEAK_BF16.items():
        if device_kind.startswith(kind):
            return peak, f"published dense bf16 peak of {kind}"
    return None, f"no published peak on file for {device_kind!r}"


@functools.cache
def matmul_rate() -> float:
    """FLOP/s of this machine: of the best of the 1024 x 1024 float32 products that XLA does in 0.3 s.

    Not numpy's, whose BLAS was found half as fast where OPENBLAS_CORETYPE names an old CPU.
    """
    # A mesh of its own, because the current one may spread the product over virtual devices.
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.local_devices()[:1])):
        a = jnp.ones((1024, 1024))
        product = jax.jit(jnp.matmul).lower(a, a).compile()
        best, end = math.inf, time.perf_counter() + 0.3
        while (start := time.perf_counter()) < end:
            product(a, a).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
