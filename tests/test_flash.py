"""Attention for CPUs: against float64 and its closed gradient, and bits that nothing else decides."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import mmap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import native, sharding
from gptjax.layers.attention import plain
from gptjax.layers.flash import exp2, flash
from gptjax.layers.scores import Scores
from gptjax.native import Machine, Program
from tests import tiny


class Case(NamedTuple):
    B: int = 2
    T: int = 130
    N: int = 2
    K: int = 1
    H: int = 8
    window: int | None = None
    packed: bool = False


class Inputs(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    do: np.ndarray


def inputs(case: Case, seed: int = 0, scale: float = 1.0) -> Inputs:
    random = np.random.default_rng(seed)
    B, T, N, K, H, *_ = case
    q, k, v, do = (random.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K, N))
    return Inputs(q * np.float32(scale), k, v, do)


def scores(case: Case) -> Scores:
    """Documents of 1 to 90 tokens, whose numbers come again."""
    index_BT, ids_BT = jnp.arange(case.T)[None], None
    if case.packed:
        random = np.random.default_rng(1)
        rows = [
            np.repeat(np.arange(case.T) % 3, random.integers(1, 90, case.T)) for _ in range(case.B)
        ]
        ids_BT = jnp.asarray(np.stack([row[: case.T] for row in rows]), jnp.int32)
    return Scores(index_BT, index_BT, ids_BT, ids_BT, case.window)


def exact(case: Case, x: Inputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """o, dq, dk and dv in float64, from their definition, each with what float32 may err by.

    To first order, with u = 2**-24: what is summed errs by the errors of its terms, and n roundings
    of a sum together by some sqrt(n) u of the sum of the terms' sizes, as they rarely go one way
    (Higham & Mary 2019, doi:10.1137/18M1226312, with lambda = 1, as partial sums are smaller).
    """
    B, T, N, K, H, *_ = case
    G = N // K
    q, k, v, do = (np.asarray(a, np.float64) for a in x)
    k, v = (np.repeat(a, G, axis=2) for a in (k, v))
    dot = functools.partial(np.einsum, "btnh,bsnh->bnts")
    mean = lambda a, b: np.einsum("btnh,btnh->bnt", a, b)[..., None]  # noqa: E731
    for_queries = functools.partial(np.einsum, "bnts,bsnh->btnh")

    def for_keys(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.einsum("bnts,btnh->bsnh", a, b).reshape(B, T, K, G, H).sum(3)

    sees = np.asarray(scores(case).visible())[:, None]
    z = np.where(sees, dot(q, k) / H**0.5, -np.inf)
    z -= z.max(-1, keepdims=True)
    w = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    o, dw = for_queries(w, v), dot(do, v)
    dz = w * (dw - mean(o, do)) / H**0.5
    values = o, for_queries(dz, k), for_keys(dz, q), for_keys(w, do)

    u, (q, k, v, do, dz) = 2.0**-24, map(abs, (q, k, v, do, dz))
    # A weight by its scaled score, the largest less, the exponential, and the sum of all.
    err_w = (H + 1) ** 0.5 * u * dot(q, k) / H**0.5 + u * abs(np.where(sees, z, 0)) + 2 * u
    err_w = w * (err_w + (w * err_w).sum(-1, keepdims=True) + T**0.5 * u)
    err_o = for_queries(err_w + T**0.5 * u * w, v)
    err_dw = H**0.5 * u * (dot(do, v) + mean(abs(o), do)) + mean(err_o, do)
    err_dz = err_w * abs(dw - mean(o, x.do)) / H**0.5 + w * err_dw / H**0.5
    errors = (
        err_o,
        for_queries(err_dz + T**0.5 * u * dz, k),
        for_keys(err_dz + (T * G) ** 0.5 * u * dz, q),
        for_keys(err_w + (T * G) ** 0.5 * u * w, do),
    )
    return list(zip(values, errors, strict=True))


def run(kernel: Any, given: Scores, x: Inputs) -> list[np.ndarray]:
    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        o, pull = jax.vjp(lambda *qkv: kernel(*qkv, given), q, k, v)
        return o, *pull(do)

    return [np.asarray(a) for a in both(*x)]


def check(case: Case, x: Inputs) -> None:
    got = run(flash, scores(case), x)
    for name, a, (e, allowed) in zip(("o", "dq", "dk", "dv"), got, exact(case, x), strict=True):
        assert a.dtype == np.float32 and (abs(a - e) <= allowed).all(), name


def test_bfloat16_is_widened_and_the_results_are_rounded():
    case = Case(T=70)
    narrow = Inputs(*(jnp.asarray(a, jnp.bfloat16) for a in inputs(case)))
    right = run(flash, scores(case), Inputs(*(a.astype(jnp.float32) for a in narrow)))
    for a, b in zip(run(flash, scores(case), narrow), right, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(a.dtype))


CASES = [
    *(Case(T=T) for T in (1, 2, 63, 64, 65, 130)),
    Case(B=1, N=1, K=1, H=16),
    Case(N=3, K=3, H=24, T=70),
    Case(B=1, N=6, K=2, H=64),
    Case(B=3, N=2, K=2, H=128, T=65),
    Case(B=1, N=8, K=1, H=40, T=100),
    *(Case(window=window) for window in (1, 5, 64, 65, 70, 200)),
    Case(packed=True),
    Case(packed=True, N=4, K=2, H=16, T=200),
    Case(packed=True, window=5),
    Case(packed=True, window=70, H=16, T=200),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_attention_and_its_gradient(case):
    check(case, inputs(case))


NARROW = [Case(), Case(N=2, K=2, H=40, T=70), Case(packed=True, window=70, H=16, T=200)]


@pytest.mark.parametrize("case", NARROW, ids=str)
@pytest.mark.parametrize("machine", [(4, 16), (8, 8), (16, 16)], ids=str)
def test_a_machine_of_other_vectors_does_the_same(machine, case, monkeypatch):
    monkeypatch.setattr(native, "machine", lambda: Machine(*machine))
    check(case, inputs(case))


def test_a_machine_that_does_not_fuse_products_does_the_same(monkeypatch):
    """An old one: what LLVM takes for granted of the architecture."""
    monkeypatch.setattr(native, "machine", lambda: Machine(4, 6))
    monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "")
    monkeypatch.setattr(llvm, "get_host_cpu_features", llvm.FeatureMap)
    check(Case(N=2, K=2, H=16), inputs(Case(N=2, K=2, H=16)))


def test_powers_of_two_err_by_two_roundings():
    lanes = 4

    def task(code, arrays, number, memory):
        x = code.load(arrays[0].data, number * lanes, lanes)
        code.store(exp2(code, x, lanes), arrays[1].data, number * lanes)

    tasks = lambda code, arrays: arrays[0].before(code, 1)  # noqa: E731
    program = Program((1, 1), tasks, lambda code, arrays: code.number(0), task)
    name = native.register("test_exp2", lambda module: program)
    x = np.linspace(-126, 127, 400_000, dtype=np.float32).reshape(-1, lanes)
    got = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
    np.testing.assert_allclose(np.float64(got), np.exp2(np.float64(x)), rtol=2 * 2.0**-24)


LENGTHS = st.tuples(st.integers(1, 3), st.integers(1, 200))


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.sampled_from([None, 70]), st.booleans(), st.integers(0, 1000))
def test_it_is_attention_of_any_size(sizes, window, packed, seed):
    case = Case(*sizes, window=window, packed=packed)
    check(case, inputs(case, seed))


@pytest.mark.parametrize("case", [Case(), Case(window=70), Case(packed=True, window=64)], ids=str)
def test_a_query_meets_what_it_sees_and_nothing_else(case):
    x, given, see = inputs(case), scores(case), scores(case).visible()
    see = np.broadcast_to(see, (case.B, case.T, case.T))
    whole = run(flash, given, x)
    for t in (0, 1, 63, 64, 69, 70, 129):
        only = x._replace(do=np.where(np.arange(case.T)[:, None, None] == t, x.do, 0))
        _, dq, dk, dv = ((a != 0).any((2, 3)) for a in run(flash, given, only))
        np.testing.assert_array_equal(dv, see[:, t])
        if t:  # of one key there is no choice
            several = see[:, t].sum(-1) > 1
            np.testing.assert_array_equal(dk[several], see[several, t])
        assert not np.delete(dq, t, axis=1).any()
        other = inputs(case, seed=5)
        later = np.arange(case.T)[:, None, None] > t
        changed = Inputs(*(np.where(later, b, a) for a, b in zip(x, other, strict=True)))
        np.testing.assert_array_equal(
            run(flash, given, changed)[0][:, : t + 1], whole[0][:, : t + 1]
        )


def test_what_is_no_number_stays_in_its_row():
    case = Case(B=3, H=16)
    x, given = inputs(case), scores(case)
    bad = Inputs(*(a.copy() for a in x))
    bad.q[1, 7, 0, 3] = np.nan
    for a, b in zip(run(flash, given, x), run(flash, given, bad), strict=True):
        np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])
    o, dq, dk, dv = run(flash, given, bad)
    assert np.isnan(o[1, 7, 0]).all() and np.isfinite(o[1, :7]).all()
    assert np.isnan(dq[1, 7, 0]).all() and np.isnan(dk[1]).any() and np.isnan(dv[1]).any()


def guarded(a: np.ndarray) -> jax.Array:
    """The same, behind whose last number memory begins that nobody may read."""
    page = mmap.PAGESIZE
    size = -(-a.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), page, 0) == 0
    laid = np.frombuffer(memory, a.dtype, a.size, size - a.nbytes).reshape(a.shape)
    laid[:] = a
    array = jnp.from_dlpack(laid)
    assert array.unsafe_buffer_pointer() == laid.ctypes.data
    return array


def attend_guarded() -> None:
    for case in (Case(T=65, H=16), Case(B=1, T=80, H=16, packed=True)):
        given, x = scores(case), inputs(case)
        ids = given.q_segments_BT
        ids = ids if ids is None else guarded(np.asarray(ids))
        given = dataclasses.replace(given, q_segments_BT=ids)
        q, k, v, do = map(guarded, x)
        pull = jax.vjp(lambda *qkv, given=given: flash(*qkv, given), q, k, v)[1]
        jax.block_until_ready(pull(do))


def test_it_reads_nothing_behind_its_operands():
    """In a process of its own, which would end with SIGSEGV."""
    tiny.as_users_compile("from tests import test_flash; test_flash.attend_guarded()")


@pytest.mark.parametrize("scale", [1e4, 1e8, 1e20, 1e37])
def test_huge_scores_choose_the_largest(scale):
    case = Case(N=2, K=2, H=16, window=70)
    x = inputs(case, scale=scale)
    got, usual = (run(kernel, scores(case), x) for kernel in (flash, plain))
    assert all(np.isfinite(a).all() for a in got)
    # Weights are 0 and 1, but where two scores are as near as their own rounding.
    assert np.mean(abs(got[0] - usual[0]).max(-1) < 1e-3) > 0.99
    lowest = x._replace(q=-abs(x.q), k=abs(x.k))  # all of them far below 0
    assert np.isfinite(run(flash, scores(case), lowest)[0]).all()


@pytest.mark.parametrize("case", [Case(B=5), Case(B=5, packed=True, window=70)], ids=str)
def test_a_rows_bits_are_its_own(case):
    x, given = inputs(case), scores(case)
    whole = run(flash, given, x)
    ids = given.q_segments_BT
    for b in range(case.B):
        one = None if ids is None else ids[b : b + 1]
        alone = Scores(given.q_index_BT, given.k_index_BS, one, one, case.window)
        for a, w in zip(run(flash, alone, Inputs(*(a[b : b + 1] for a in x))), whole, strict=True):
            np.testing.assert_array_equal(a[0], w[b])


BITS = """
import hashlib, jax
from jax import monitoring
from tests import test_flash as t
seen = []
monitoring.register_event_listener(lambda event, **_: seen.append(event))
case = t.Case(B=3, N=4, K=2, H=16)
bits = b"".join(a.tobytes() for a in t.run(t.flash, t.scores(case), t.inputs(case)))
print(hashlib.sha256(bits).hexdigest(), "/jax/compilation_cache/cache_hits" in seen)
"""


def test_neither_threads_nor_a_compiled_program_of_before_change_a_bit(tmp_path):
    """The second process takes XLA's program from the first, and compiles its own of LLVM."""
    said = [
        tiny.as_users_compile(BITS, JAX_COMPILATION_CACHE_DIR=str(tmp_path / cache), NPROC=threads)
        for cache, threads in (("a", "1"), ("a", "1"), ("b", "2"), ("c", "7"))
    ]
    digests, hits = zip(*(line.split() for line in said), strict=True)
    assert len(set(digests)) == 1
    assert hits[:2] == ("False", "True")


@pytest.mark.parametrize("case", [Case(B=4, N=8, K=2), Case(B=4, N=4, K=4, packed=True, window=70)])
def test_on_a_mesh_it_is_that_of_one_device(case):
    x, given = inputs(case), scores(case)
    expected = run(flash, given, x)
    dims = ("BTNH", "BSKH", "BSKH", "BTNH")
    with jax.set_mesh(tiny.mesh_of(tiny.CUBE)):
        laid = Inputs(*map(jax.device_put, x, map(sharding.out, dims)))
        for a, e in zip(run(flash, given, laid), expected, strict=True):
            np.testing.assert_array_equal(a, e)


def test_it_is_mapped_as_a_loop_does():
    case = Case(B=2, T=70)
    many = [inputs(case, seed) for seed in range(4)]
    q, k, v, do = (np.stack(a).reshape(2, 2, *a[0].shape) for a in zip(*many, strict=True))
    for packed in (False, True):
        given = scores(case._replace(packed=packed))
        f = lambda q, k, v, given=given: flash(q, k, v, given)  # noqa: E731
        o, pull = jax.vjp(jax.vmap(jax.vmap(f)), q, k, v)
        mapped = [np.asarray(a).reshape(4, *a.shape[2:]) for a in (o, *pull(do))]
        for i, x in enumerate(many):
            for a, e in zip(mapped, run(flash, given, x), strict=True):
                np.testing.assert_array_equal(a[i], e)
        shared = jax.vmap(f, in_axes=(0, None, None))(q[0], k[0, 0], v[0, 0])
        one = Inputs(q[0, 1], k[0, 0], v[0, 0], do[0, 1])
        np.testing.assert_array_equal(shared[1], run(flash, given, one)[0])


def test_what_is_computed_again_is_the_same():
    case = Case(packed=True)
    x, given = inputs(case), scores(case)

    def again(q: jax.Array, k: jax.Array, v: jax.Array, given: Scores) -> jax.Array:
        return jax.checkpoint(functools.partial(flash, scores=given))(q, k, v)

    for a, e in zip(run(again, given, x), run(flash, given, x), strict=True):
        np.testing.assert_array_equal(a, e)


def test_a_second_derivative_is_refused():
    case = Case(T=5)
    q, k, v, _ = inputs(case)
    slope = jax.grad(lambda q: flash(q, k, v, scores(case)).sum())
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda q: slope(q).sum())(q)


@pytest.mark.parametrize("case", [Case(B=0, T=5), Case(T=0), Case(B=0, T=0)], ids=str)
def test_of_nothing_it_is_nothing(case):
    for a in run(flash, scores(case), inputs(case)):
        assert a.size == 0
