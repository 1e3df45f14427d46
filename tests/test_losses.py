"""Cross-entropy against closed forms and a float64 reference, whole, chunked and sharded."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import losses
from gptjax.losses import Sums, cross_entropy, token_nll
from gptjax.sharding import out
from tests import tiny

B, T, D, V = 4, 6, 16, 24
LAYOUTS = ("DV", "VD")
# None, a divisor of V, two that leave a rest, one column, more columns than there are.
CHUNKS = (None, 8, 7, 17, 1, 100)
MESHES = (tiny.CUBE, tiny.TENSOR, tiny.SEQUENCE)


def make(dims: str, seed: int = 0):
    rng = np.random.default_rng(seed)
    x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    kernel = rng.normal(size=(D, V)).astype(np.float32)
    targets_BT = rng.integers(0, V, (B, T)).astype(np.int32)
    weights_BT = rng.uniform(0.5, 2, (B, T)).astype(np.float32)
    weights_BT[0, :3] = 0
    return x_BTD, kernel if dims == "DV" else kernel.T.copy(), targets_BT, weights_BT


def reference(x_BTD, kernel, dims, targets_BT, weights_BT, softcap, z_loss):
    """Sums, dx and dkernel of the objective in numpy float64, from the textbook formulas."""
    x_BTD, kernel = x_BTD.astype(np.float64), kernel.astype(np.float64)
    kernel = kernel if dims == "DV" else kernel.T
    raw = x_BTD @ kernel
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    log_z = np.log(np.exp(logits).sum(-1))
    onehot = np.eye(V)[targets_BT]
    nll = log_z - (logits * onehot).sum(-1)
    sums = [(weights_BT * value).sum() for value in (nll + z_loss * log_z**2, nll, log_z**2)]
    softmax = np.exp(logits - log_z[..., None])
    d = weights_BT[..., None] * (softmax - onehot + z_loss * 2 * log_z[..., None] * softmax)
    if softcap is not None:
        d *= 1 / np.cosh(raw / softcap) ** 2
    dkernel = np.einsum("btd,btv->dv", x_BTD, d)
    dkernel = dkernel if dims == "DV" else dkernel.T
    return Sums(*sums, weights_BT.sum()), (d @ kernel.T, dkernel)


def value_and_grads(x_BTD, kernel, dims, targets_BT, weights_BT, **knobs):
    @jax.jit
    def run(x_BTD, kernel, targets_BT, weights_BT):
        def objective(x_BTD, kernel):
            sums = cross_entropy(x_BTD, kernel, dims, targets_BT, weights_BT, **knobs)
            return sums.objective, sums

        (_, sums), grads = jax.value_and_grad(objective, (0, 1), has_aux=True)(x_BTD, kernel)
        return sums, grads

    return run(x_BTD, kernel, targets_BT, weights_BT)


def assert_close(got, expected, tolerance):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        e = np.asarray(e)
        np.testing.assert_allclose(g, e, rtol=tolerance, atol=tolerance * np.abs(e).max())


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dims", LAYOUTS)
def test_uniform_logits_cost_log_v(dims, chunk):
    _, kernel, targets_BT, weights_BT = make(dims)
    zeros = jnp.zeros((B, T, D))
    nll_BT, log_z_BT = token_nll(zeros, kernel, dims, targets_BT, chunk=chunk, softcap=None)
    # One rounding of log(24) in float32.
    np.testing.assert_allclose(nll_BT, math.log(V), rtol=1.2e-7)
    np.testing.assert_allclose(log_z_BT, math.log(V), rtol=1.2e-7)
    sums = cross_entropy(
        zeros, kernel, dims, targets_BT, weights_BT, chunk=chunk, softcap=None, z_loss=0.5
    )
    assert float(sums.nll / sums.weight) == pytest.approx(math.log(V), rel=3e-7)
    expected = sums.nll + 0.5 * sums.z
    assert float(sums.objective) == pytest.approx(float(expected), rel=1e-7)


@pytest.fixture(params=[None, "in_passes", "in_one_pass"])  # as here, on a TPU, and on a GPU
def statistics(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(losses, "_statistics", getattr(losses, f"_{request.param}"))


@pytest.mark.parametrize("softcap, z_loss", [(None, 0.0), (3.0, 0.1)])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dims", LAYOUTS)
def test_values_and_gradients_match_float64(dims, chunk, softcap, z_loss, statistics):
    inputs = make(dims)
    x_BTD, kernel, targets_BT, weights_BT = inputs
    got = value_and_grads(
        x_BTD, kernel, dims, targets_BT, weights_BT, chunk=chunk, softcap=softcap, z_loss=z_loss
    )
    expected = reference(x_BTD, kernel, dims, targets_BT, weights_BT, softcap, z_loss)
    # float32 sums of 16 to 24 terms.
    assert_close(got, expected, 2e-6)


def test_weight_zero_hides_a_token():
    x_BTD, kernel, targets_BT, weights_BT = make("DV")
    knobs = {"chunk": 8, "softcap": None, "z_loss": 0.1}
    _, (dx_BTD, _) = value_and_grads(x_BTD, kernel, "DV", targets_BT, weights_BT, **knobs)
    np.testing.assert_array_equal(dx_BTD[0, :3], 0)
    assert np.all(np.any(np.asarray(dx_BTD)[weights_BT > 0] != 0, axis=-1))


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("target", [-1, V])
def test_a_target_outside_the_vocabulary_is_nan_unless_its_weight_is_zero(target, chunk):
    x_BTD, kernel, targets_BT, weights_BT = make("DV")
    knobs = {"chunk": chunk, "softcap": None, "z_loss": 0.1}
    expected = value_and_grads(x_BTD, kernel, "DV", targets_BT, weights_BT, **knobs)
    targets_BT[0, 0] = target  # weight 0
    got = value_and_grads(x_BTD, kernel, "DV", targets_BT, weights_BT, **knobs)
    jax.tree.map(np.testing.assert_array_equal, got, expected)

    targets_BT[1, 2] = target
    sums, (dx_BTD, dkernel) = value_and_grads(x_BTD, kernel, "DV", targets_BT, weights_BT, **knobs)
    assert np.isnan(sums.nll) and np.isnan(sums.objective)
    assert np.all(np.isnan(dx_BTD[1, 2])) and np.all(np.isnan(dkernel))
    nll_BT, _ = token_nll(x_BTD, kernel, "DV", targets_BT, chunk=chunk, softcap=None)
    np.testing.assert_array_equal(np.isnan(nll_BT), targets_BT == target)


def test_logits_far_from_zero_do_not_overflow(statistics):
    _, _, targets_BT, _ = make("DV")
    targets_BT[:] = 23
    x_BTD = jnp.full((B, T, 1), 1.0)
    kernel = jnp.linspace(-1e4, 1e4, V)[None]
    for chunk in CHUNKS:
        nll_BT, log_z_BT = token_nll(x_BTD, kernel, "DV", targets_BT, chunk=chunk, softcap=None)
        np.testing.assert_array_equal(nll_BT, 0)
        np.testing.assert_array_equal(log_z_BT, 1e4)


@pytest.mark.parametrize("dims", LAYOUTS)
def test_bfloat16_inputs_are_accumulated_in_float32(dims):
    x_BTD, kernel, targets_BT, weights_BT = make(dims)
    x_BTD, kernel = jnp.asarray(x_BTD, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
    expected = reference(
        np.asarray(x_BTD), np.asarray(kernel), dims, targets_BT, weights_BT, None, 0.0
    )
    for chunk in (None, 7):
        sums, grads = value_and_grads(
            x_BTD, kernel, dims, targets_BT, weights_BT, chunk=chunk, softcap=None, z_loss=0.0
        )
        assert all(value.dtype == jnp.float32 for value in sums)
        # Only the inputs are rounded, and the reference has them rounded too.
        assert_close(sums, expected[0], 1e-6)
        assert all(grad.dtype == jnp.bfloat16 for grad in grads)
        # bfloat16 has 8 bits: the logits' gradient and the results are rounded to it.
        assert_close([np.float32(grad) for grad in grads], expected[1], 2e-2)


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("chunk", [None, 8, 9])
@pytest.mark.parametrize("dims", LAYOUTS)
def test_meshes_agree_with_no_mesh(shape, chunk, dims, statistics):
    x_BTD, kernel, targets_BT, weights_BT = make(dims)
    knobs = {"chunk": chunk, "softcap": 5.0, "z_loss": 0.1}
    expected = value_and_grads(x_BTD, kernel, dims, targets_BT, weights_BT, **knobs)
    with jax.set_mesh(tiny.mesh_of(shape)):
        placed = [
            jax.device_put(array, out(letters))
            for array, letters in ((x_BTD, "BTD"), (kernel, dims), (targets_BT, "BT"))
        ]
        x, k, t = placed
        got = value_and_grads(x, k, dims, t, jax.device_put(weights_BT, out("BT")), **knobs)
        dx_BTD, dkernel = got[1]
        assert jax.typeof(dx_BTD).sharding.spec == out("BTD")
        assert jax.typeof(dkernel).sharding.spec == out(dims)
    # The sums of a split vocabulary and batch are taken in another order.
    assert_close(got, expected, 1e-6)


def test_a_gpu_reads_the_logits_once_a_cpu_by_a_program_and_others_in_loops_of_one_sum():
    x_BTD, kernel, targets_BT, _ = make("DV")
    run = jax.jit(lambda *a: token_nll(*a, chunk=None, softcap=None), static_argnums=2)
    traced = run.trace(x_BTD, kernel, "DV", targets_BT)
    # A reduction of the logits over their columns: how many arrays it reads and yields.
    reductions = re.compile(r"stablehlo\.reduce\((.*?)\) .*dimensions = \[3\]")
    platforms = ("cpu", "cuda", "tpu")
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in platforms}
    arrays = {
        name: [found.count("init:") for found in reductions.findall(text)]
        for name, text in texts.items()
    }
    assert arrays == {"cpu": [], "cuda": [3], "tpu": [1, 1, 1]}
    programs = {name: text.count("softmax_sums") for name, text in texts.items()}
    assert programs == {"cpu": 1, "cuda": 0, "tpu": 0}


@pytest.mark.parametrize("vocab", [5, V, 300])
def test_a_likelihood_has_the_bits_of_the_loss(vocab):
    rng = np.random.default_rng(0)
    x_BTD = jnp.float32(rng.normal(size=(B, T, D)))
    kernel = jnp.float32(rng.normal(size=(D, vocab)))
    ids_BT = jnp.int32(rng.integers(vocab, size=(B, T)))
    nll_BT, _ = jax.jit(lambda *a: token_nll(*a, chunk=None, softcap=None), static_argnums=2)(
        x_BTD, kernel, "DV", ids_BT
    )
    ll_BT = jax.jit(lambda x, k, ids: losses.log_likelihood(x @ k, ids))(x_BTD, kernel, ids_BT)
    np.testing.assert_array_equal(-ll_BT, nll_BT)


@pytest.mark.parametrize("dims", LAYOUTS)
def test_chunks_keep_the_logits_out_of_memory(dims):
    rows, columns, chunk = 64, 4096, 256
    shape = (D, columns) if dims == "DV" else (columns, D)
    arguments = (
        jax.ShapeDtypeStruct((1, rows, D), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct((1, rows), jnp.int32),
    )

    def temporaries(chunk: int | None) -> int:
        def objective(x_BTD, kernel, targets_BT):
            weights_BT = jnp.ones((1, rows))
            knobs = {"chunk": chunk, "softcap": None, "z_loss": 0.1}
            return cross_entropy(x_BTD, kernel, dims, targets_BT, weights_BT, **knobs).objective

        compiled = jax.jit(jax.grad(objective, (0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = rows * columns * 4
    assert temporaries(None) >= logits
    # A few chunk-wide buffers and one copy of the kernel's gradient.
    assert temporaries(chunk) < logits / 2
