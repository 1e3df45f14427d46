"""Parameters, FLOPs and memory of a config, in closed form; tests audit them.

The tests compare the counts with the real parameter tree, the FLOPs with the matrix
products in the jaxpr of the real model, and the optimiser's bytes with its real state.
FLOPs never come from XLA's `cost_analysis()`, which counts a scanned body once.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import Config, Model
from gptjax.sharding import PARAMETER_RULES


class Tensor(NamedTuple):
    part: str
    dims: str
    copies: int = 1  # how many there are alike (layers are in L)


def tensors(model: Model) -> Iterator[Tensor]:
    """Every parameter of the model by its part and dims, norms and biases included."""
    m = model
    yield Tensor("embedding", "VD")
    if m.position == "learned":
        yield Tensor("position", "PD")

    yield Tensor("attention", "LDNH")  # query
    yield Tensor("attention", "LDKH", 2)  # key, value
    yield Tensor("attention", "LNHD")  # out
    if "query" in m.biased:
        yield Tensor("attention", "LNH")
        yield Tensor("attention", "LKH", 2)
    if "out" in m.biased:
        yield Tensor("attention", "LD")
    if m.qk_norm:
        yield Tensor("attention", "LH", 2)
    if m.value_residual:
        yield Tensor("attention", "L", 2)

    inputs = 2 if m.gated else 1
    yield Tensor("feedforward", "LDF", inputs)
    yield Tensor("feedforward", "LFD")
    if m.bias:
        yield Tensor("feedforward", "LF", inputs)
        yield Tensor("feedforward", "LD")

    # Gain, and the offset of a LayerNorm.
    vectors = 0 if m.norm == "parameterfree" else 1 + (m.norm == "layernorm" and m.bias)
    branches = 1 if m.parallel_block else 2
    yield Tensor("norm", "LD", vectors * branches * (2 if m.norm_placement == "sandwich" else 1))
    if m.norm_placement != "post":
        yield Tensor("norm", "D", vectors)  # before the unembedding
    if not m.tied:
        yield Tensor("unembedding", "DV")


def _sizes(model: Model) -> dict[str, int]:
    m = model
    return {
        "L": m.layers, "D": m.width, "N": m.heads, "K": m.K, "H": m.H, "F": m.F,
        "V": m.vocab_size, "P": m.context,
    }  # fmt: skip


def _size(tensor: Tensor, model: Model) -> int:
    return tensor.copies * math.prod(_sizes(model)[dim] for dim in tensor.dims)


def parameters(model: Model) -> dict[str, int]:
    """Parameters of each part, and "total". A tied table counts once, as "embedding"."""
    parts: dict[str, int] = {}
    for tensor in tensors(model):
        parts[tensor.part] = parts.get(tensor.part, 0) + _size(tensor, model)
    return {**parts, "total": sum(parts.values())}


def matmul_parameters(model: Model) -> int:
    """Weights of the matrix products: blocks and unembedding, not the embedding look-ups."""
    inner = (t for t in tensors(model) if t.dims in ("LDNH", "LDKH", "LNHD", "LDF", "LFD"))
    return sum(_size(t, model) for t in inner) + model.width * model.vocab_size


def train_flops_per_token(model: Model, causal: bool) -> float:
    """FLOPs of a forward and backward pass for each token of a full context.

        6 * matmul_parameters + sum over layers of 12 * N * H * S

    (PaLM, Chowdhery et al. 2022, appendix B; 6 N: Kaplan et al. 2020, section 2.1): two for
    each multiply-add, times one forward and two backward products. S is how many keys a
    query meets. Not counted: whatever is no matrix product (norms, softmax, activations) and
    what is computed again (remat, a chunked loss), as is usual for model FLOPs.

    Args:
        model: the architecture.
        causal: S is the mean number of keys a query may see, (T + 1) / 2 without a window,
            which is the work that is needed; else S is T or the window, PaLM's convention,
            which is the work of a kernel that masks but does not skip.
    """
    T = model.context
    attended = 0.0
    for window in model.layer_windows:
        w = min(window or T, T)
        # Queries 1..w see as many keys as their index, the other T - w see w.
        attended += (w * (w + 1) / 2 + (T - w) * w) / T if causal else w
    return 6.0 * matmul_parameters(model) + 12.0 * model.heads * model.H * attended


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilisation: tokens/s * FLOPs/token / peak FLOP/s of all devices together."""
    return tokens_per_second * flops_per_token / peak


def _moments(optimizer: str, dims: str) -> int:
    """Values of the size of the parameter that the optimiser keeps; factors are neglected."""
    matrix = "D" in dims and len(dims.removeprefix("L")) > 1
    match optimizer:
        case "lion":
            return 1
        case "adafactor":
            return 0 if matrix else 1
        case "muon":
            return 1 if matrix and not set(dims) & set("VP") else 2
    return 2  # adamw: m, v; schedule_free: v, z


def memory_bytes(config: Config, mesh_shape: Mapping[str, int]) -> dict[str, int]:
    """Bytes a device holds in training, by purpose, and "total".

    Parameters, gradients, optimiser state and weight average are float32 and exact up to
    Adafactor's factors. "activations" and "logits" are rough: what the backward pass needs of
    the b tokens of a device's micro-batch, in values of model.dtype,

        none, dots    L (6 D + (2 N + 2 K) H / t + (3 or 5 with a gate) F / t)
        attention     3 L D
        full          L D

    with t the tensor axis, plus, where model.attention is "plain", float32 scores before and
    after the softmax, 2 L N T / t; and float32 logits and their gradient, 2 V / t or 2 chunks.

    Args:
        config: the whole config.
        mesh_shape: devices along each mesh axis, such as `mesh.shape`.
    """
    m, o = config.model, config.optim

    def share(dims: str) -> int:
        """How many devices a tensor is split over."""
        return math.prod(mesh_shape[axis] for dim in dims for axis in PARAMETER_RULES.get(dim, ()))

    held = [(t.dims, 4 * _size(t, m) // share(t.dims)) for t in tensors(m)]
    parameter_bytes = sum(size for _, size in held)
    rows = math.prod(mesh_shape[axis] for axis in PARAMETER_RULES["B"])
    tokens = config.data.batch_size // config.train.accumulation * m.context / rows
    tensor = share("V")
    values: float  # kept of a token and layer
    split = (2 * m.heads + 2 * m.K) * m.H + (5 if m.gated else 3) * m.F
    match m.remat:
        case "full":
            values = m.width
        case "attention":
            values = 3 * m.width
        case _:
            values = 6 * m.width + split / tensor
    scores = 8 * m.heads * m.context / tensor if m.attention == "plain" else 0
    itemsize = 2 if m.dtype == "bfloat16" else 4
    parts = {
        "parameters": parameter_bytes,
        "gradients": parameter_bytes,
        "optimizer": sum(_moments(o.optimizer, dims) * size for dims, size in held),
        "ema": 0 if o.ema_decay is None else parameter_bytes,
        "activations": int(tokens * m.layers * (values * itemsize + scores)),
        "logits": int(tokens * 8 * min(o.loss_vocab_chunk or m.vocab_size, m.vocab_size) / tensor),
    }
    return {**parts, "total": sum(parts.values())}


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
        return _matmul_rate() / sharing, "measured here, float32 matrix product"
    for kind, peak in PEAK_BF16.items():
        if device.device_kind.startswith(kind):
            return peak, f"published dense bf16 peak of {kind}"
    return None, f"no published peak on file for {device.device_kind!r}"


@functools.cache
def _matmul_rate() -> float:
    """FLOP/s of the best of the 1024 x 1024 float32 products that XLA does in 0.3 s.

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
