"""Normalisation and softmax by programs for CPUs: values and gradients against float64, bits of a row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import native
from gptjax.layers import rows
from gptjax.layers.kernels import LANES
from gptjax.layers.norm import normalise

EPS = 1e-5


def operands(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, ...]:
    """x that is off 0, gain and dy."""
    rng = np.random.default_rng(seed)
    x = 3 * rng.standard_normal(shape) + 1
    return x, 1 + rng.standard_normal(shape[-1]), rng.standard_normal(shape)


def exact(x: Any, gain: Any, dy: Any, centre: bool) -> tuple[np.ndarray, ...]:
    """y, dx and dgain in float64, by the textbook's formulas."""
    off = x - x.mean(-1, keepdims=True) if centre else x
    scale = ((off**2).mean(-1, keepdims=True) + EPS) ** -0.5
    unit = off * scale
    back = dy * gain
    dx = back - unit * (back * unit).mean(-1, keepdims=True)
    if centre:
        dx -= back.mean(-1, keepdims=True)
    return unit * gain, scale * dx, (dy * unit).reshape(-1, x.shape[-1]).sum(0)


def computed(x: Any, gain: Any, dy: Any, centre: bool) -> tuple[jax.Array, ...]:
    @jax.jit
    def run(x: jax.Array, gain: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x, gain: normalise(x, gain, EPS, centre), x, gain)
        return y, *pull(dy)

    return run(*(jnp.asarray(a, jnp.float32) for a in (x, gain, dy)))


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (64, 24), (65, 384), (2, 3, 40), (0, 8)], ids=str)
def test_values_and_gradients_are_those_of_float64(shape, centre):
    x, gain, dy = operands(shape)
    for got, right in zip(computed(x, gain, dy, centre), exact(x, gain, dy, centre), strict=True):
        assert got.shape == right.shape
        # A sum of n terms may be off by n roundings of 6e-8, but errs as their root; some sums.
        n = max(shape[-1], int(np.prod(shape[:-1])))
        np.testing.assert_allclose(got, right, atol=6e-8 * 16 * max(n, 1) ** 0.5 + 1e-6, rtol=2e-6)


@pytest.mark.parametrize("centre", [True, False])
def test_rows_of_bfloat16_are_those_of_the_same_numbers_in_float32(centre):
    x, gain, dy = operands((65, 24))
    narrow = jnp.asarray(x, jnp.bfloat16)
    right = computed(narrow, gain, dy, centre)
    y, pull = jax.vjp(lambda x, g: normalise(x, g, EPS, centre), narrow, jnp.float32(gain))
    got = y, *pull(jnp.float32(dy))
    assert [a.dtype.name for a in got] == ["float32", "bfloat16", "float32"]
    for a, b in zip(got, right, strict=True):
        np.testing.assert_array_equal(a, b.astype(a.dtype))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_registers_of_every_width_give_it(lanes, monkeypatch):
    monkeypatch.setattr(native, "machine", lambda: native.Machine(lanes, 8))
    x, gain, dy = operands((9, 48))
    for got, right in zip(computed(x, gain, dy, True), exact(x, gain, dy, True), strict=True):
        np.testing.assert_allclose(got, right, atol=1e-5)


def test_a_row_has_the_same_bits_beside_others():
    x, gain, _ = operands((130, 64))
    whole = jax.jit(lambda x: normalise(x, jnp.float32(gain), EPS, True))(jnp.float32(x))
    for row in (0, 63, 64, 129):
        alone = jax.jit(lambda x: normalise(x, jnp.float32(gain), EPS, True))
        assert (alone(jnp.float32(x[row : row + 1]))[0] == whole[row]).all()


def test_a_nan_stays_in_its_row():
    x, gain, dy = operands((3, 16))
    x[1, 5] = np.nan
    y, dx, _ = computed(x, gain, dy, True)
    for value in (y, dx):
        assert np.isnan(value[1]).all() and np.isfinite(np.asarray(value)[[0, 2]]).all()


def test_it_is_mapped_over_members():
    x, gain, _ = operands((4, 3, 16))
    gains = jnp.float32(np.stack([gain, 2 * gain, 0 * gain, -gain]))
    mapped = jax.vmap(lambda x, gain: normalise(x, gain, EPS, False))(jnp.float32(x), gains)
    for one, x_i, gain_i in zip(mapped, x, gains, strict=True):
        right, *_ = exact(x_i, gain_i, x_i, False)
        np.testing.assert_allclose(one, right, rtol=1e-6, atol=1e-6)  # some roundings


def test_other_platforms_get_xla_s_own():
    x, gain = jnp.ones((4, 16)), jnp.ones(16)
    run = jax.jit(lambda x: normalise(x, gain, EPS, True)).trace(x)
    assert "ffi" not in run.lower(lowering_platforms=("cuda",)).as_text()
    assert rows.serves(16) and "normalise" in run.lower(lowering_platforms=("cpu",)).as_text()


def softmax_sums(logits: Any, targets: Any, stale: int = 0) -> tuple[np.ndarray, ...]:
    operands = jnp.float32(logits), jnp.int32(targets), jnp.int32(stale)
    return tuple(np.asarray(a) for a in jax.jit(rows.softmax_sums)(*operands))


@pytest.mark.parametrize(
    "shape, stale",
    [
        ((1, 16), 0),
        ((1, 17), 0),
        ((65, 65), 3),
        ((2, 31), 30),
        ((0, 16), 0),
        ((130, 512), 0),
        ((2, 50_257), 0),
        ((3, 50_257), 49_000),
    ],
    ids=str,
)
def test_sums_of_softmax_are_those_of_float64(shape: tuple[int, int], stale: int) -> None:
    (R, C), rng = shape, np.random.default_rng(0)
    logits = np.float32(5 * rng.standard_normal(shape))
    targets = rng.integers(C, size=R)
    top, total, target = softmax_sums(logits, targets, stale)
    counted = logits[:, stale:].astype(np.float64)
    np.testing.assert_array_equal(top, counted.max(-1))
    # A lane adds PART / LANES terms, then C / PART sums; each errs by 2**-24, and a term by 1e-6.
    right = np.exp(counted - top[:, None].astype(np.float64)).sum(-1)
    roundings = rows.PART / LANES + C / rows.PART + 4
    np.testing.assert_allclose(total, right, rtol=1e-6 + roundings * 2**-24)
    found = np.where(targets >= stale, logits[range(R), targets], 0)
    np.testing.assert_array_equal(target, found)


def test_a_target_that_is_no_column_has_a_logit_of_0() -> None:
    targets = [-(2**31), -1, 15, 16, 2**31 - 1]
    _, _, target = softmax_sums(np.full((5, 16), 3.0), targets)
    assert target.tolist() == [0, 0, 3, 0, 0]


def test_logits_that_are_no_numbers() -> None:
    """As plain numpy has it: what is not finite at the top, or is no number, makes the sum none."""
    logits = np.zeros((5, 33), np.float32)
    logits[0, 32], logits[1, 7], logits[2], logits[3, 3] = np.inf, np.nan, -np.inf, -np.inf
    logits[4] = np.where(np.arange(33) == 20, 3e38, -3e38)
    top, total, _ = softmax_sums(logits, [0] * 5)
    assert np.isnan(total[:3]).all()
    assert total[3:].tolist() == [32, 1]
    assert top[3:].tolist() == [0, np.float32(3e38)]


def test_sums_of_softmax_have_the_same_bits_beside_others_and_in_registers_of_every_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, targets = 5 * np.random.default_rng(0).standard_normal((130, 300)), [7] * 130
    whole = softmax_sums(logits, targets)
    for machine in (native.machine(), native.Machine(8, 8), native.Machine(4, 16)):
        monkeypatch.setattr(native, "machine", lambda machine=machine: machine)
        for got, right in zip(softmax_sums(logits[64:67], targets[:3]), whole, strict=True):
            np.testing.assert_array_equal(got, right[64:67])


def softmax_gradient(logits: Any, targets: Any, stale: int, *numbers: Any) -> np.ndarray:
    operands = jnp.float32(logits), jnp.int32(targets), jnp.int32(stale)
    return np.asarray(jax.jit(rows.softmax_gradient)(*operands, *map(jnp.float32, numbers)))


@pytest.mark.parametrize(
    "shape, stale",
    [
        ((1, 16), 0),
        ((65, 64), 3),
        ((2, 32), 31),
        ((0, 16), 0),
        ((130, 512), 0),
        ((3, 50_304), 49_001),
    ],
    ids=str,
)
def test_gradients_of_logits_are_those_of_float64(shape: tuple[int, int], stale: int) -> None:
    (R, C), rng = shape, np.random.default_rng(0)
    logits = np.float32(5 * rng.standard_normal(shape))
    targets = rng.integers(C, size=R)
    log_z = np.float32(np.log(np.exp(logits.astype(np.float64)).sum(-1)))
    factor, of_target = np.float32(rng.standard_normal((2, R)))
    got = softmax_gradient(logits, targets, stale, log_z, factor, of_target)
    probabilities = np.exp(logits.astype(np.float64) - log_z[:, None])
    hit = np.arange(C) == targets[:, None]
    right = factor[:, None] * probabilities - np.where(hit, of_target[:, None], 0)
    right[:, :stale] = 0
    # The exponent, of up to 50 bits here, errs by 2**-24 of itself, and the difference at the target.
    np.testing.assert_allclose(got, right, rtol=50 * 2**-24, atol=2**-23)
    assert (got[:, :stale] == 0).all()


def test_a_target_that_is_no_column_has_no_gradient_of_its_own() -> None:
    targets = [-(2**31), -1, 15, 16, 2**31 - 1]
    got = softmax_gradient(np.zeros((5, 16)), targets, 0, np.zeros(5), np.ones(5), np.full(5, 3))
    assert got[2].tolist() == [1] * 15 + [-2]
    assert (np.delete(got, 2, 0) == 1).all()


def test_gradients_lie_where_the_logits_did() -> None:
    R, C = 64, 4096
    shapes = [((R, C), jnp.float32), ((R,), jnp.int32), ((), jnp.int32), *[((R,), jnp.float32)] * 3]
    operands = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    step = jax.jit(rows.softmax_gradient, donate_argnums=0).lower(*operands).compile()
    memory = step.memory_analysis()
    assert memory.temp_size_in_bytes == 0 and memory.alias_size_in_bytes == 4 * R * C
