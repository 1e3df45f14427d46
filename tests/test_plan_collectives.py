"""Collectives of a program: known ones on virtual devices, and how TPUs and GPUs write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.plan import collectives
from gptjax.plan.collectives import Collective, Unknown, read
from tests import tiny

HALVES = [0, 0, 0, 0, 1, 1, 1, 1]  # two hosts of four
N = 64  # numbers of an array on one device, float32


def compiled(f: Callable[[Any], Any]) -> list[Collective]:
    """Of `f` on each shard of a mesh of 4 x 2 devices, which the hosts split along "a"."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), devices=tiny.devices())
    split = P(("a", "b"))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    array = jax.ShapeDtypeStruct((8 * N,), jnp.float32, sharding=NamedSharding(mesh, split))
    program = jax.jit(mapped).lower(array).compile()
    return read(program.as_text(), HALVES)


def ring(axis: str, n: int) -> Callable[[Any], Any]:
    pairs = [(i, (i + 1) % n) for i in range(n)]
    return lambda x: jax.lax.ppermute(x, axis, pairs)


KNOWN: dict[str, tuple[Callable[[Any], Any], Collective, float]] = {
    # What is written, what it is of 4 N bytes, and what a device sends.
    "sum over a": (
        lambda x: jax.lax.psum(x, "a"),
        Collective("all-reduce", 4 * N, 4, True, 1),
        2 * 4 * N * 3 / 4,
    ),
    "sum over b, in a host": (
        lambda x: jax.lax.psum(x, "b"),
        Collective("all-reduce", 4 * N, 2, False, 1),
        2 * 4 * N / 2,
    ),
    "sum over all": (
        lambda x: jax.lax.psum(x, ("a", "b")),
        Collective("all-reduce", 4 * N, 8, True, 1),
        2 * 4 * N * 7 / 8,
    ),
    "gather": (
        lambda x: jax.lax.all_gather(x, "a", tiled=True).reshape(4, N).sum(0),
        Collective("all-gather", 4 * 4 * N, 4, True, 1),
        4 * 4 * N * 3 / 4,
    ),
    "scatter": (
        lambda x: jnp.tile(jax.lax.psum_scatter(x, "b", tiled=True), 2),
        Collective("reduce-scatter", 4 * N, 2, False, 1),
        4 * N / 2,
    ),
    "exchange": (
        lambda x: jax.lax.all_to_all(x, "a", 0, 0, tiled=True),
        Collective("all-to-all", 4 * N, 4, True, 1),
        4 * N * 3 / 4,
    ),
    "permute": (ring("a", 4), Collective("collective-permute", 4 * N, 2, True, 1), 4 * N),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_collective_is_found_with_its_bytes(name: str) -> None:
    f, expected, sent = KNOWN[name]
    (found,) = compiled(f)
    assert found == expected
    assert found.sent == sent


@pytest.mark.parametrize("name", KNOWN)
def test_in_a_scan_it_counts_as_often_as_the_scan_turns(name: str) -> None:
    f, expected, sent = KNOWN[name]

    def inner(x: Any, _: Any) -> tuple[Any, None]:
        return f(x) * 0.5, None

    def outer(x: Any, _: Any) -> tuple[Any, None]:
        return jax.lax.scan(inner, jnp.sin(x), None, length=7)[0], None

    found = compiled(lambda x: jax.lax.scan(outer, x, None, length=3)[0])
    # XLA may split a loop of known length into parts, never change how often it sends.
    assert sum(c.sent for c in found) == 21 * sent
    assert {c.kind for c in found} == {expected.kind}


def test_nothing_is_sent_by_one_that_takes_part_alone() -> None:
    assert compiled(lambda x: x + 1) == []
    with pytest.raises(Unknown, match="unknown number of times"):
        # As long as something holds: nobody knows how often.
        compiled(
            lambda x: jax.lax.while_loop(lambda c: c.sum() < 10, lambda c: jax.lax.psum(c, "a"), x)
        )


# ---- as the compilers of TPUs and GPUs write it, cut short


TPU = """\
HloModule jit_update, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  ROOT %sum = bf16[] add(%x, %y)
}

%all-reduce-scatter.2 (input: bf16[3072,768]) -> bf16[384,768] {
  %input = bf16[3072,768]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[3072,768]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %slice = bf16[384,768]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={384,768}
}

%start (param: bf16[96,3072]) -> (bf16[96,3072], bf16[768,3072]) {
  %all-gather.1 = bf16[768,3072]{1,0:T(8,128)(2,1)} all-gather(%param), channel_id=2, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  ROOT %custom-call.1 = (bf16[96,3072]{1,0}, bf16[768,3072]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (param: bf16[96,3072]) -> bf16[768,3072] {
  %all-gather.2 = bf16[768,3072]{1,0:T(8,128)(2,1)} all-gather(%param), channel_id=2, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  ROOT %custom-call.2 = bf16[768,3072]{1,0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%body (p: (s32[], bf16[96,3072])) -> (s32[], bf16[96,3072]) {
  %fusion.1 = (bf16[96,3072]{1,0}, bf16[768,3072]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %fusion.2 = bf16[768,3072]{1,0} fusion(%x), kind=kCustom, calls=%done
  %fusion.3 = bf16[384,768]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.2
  ROOT %tuple = (s32[], bf16[96,3072]) tuple(%i, %x)
}

%condition (p: (s32[], bf16[96,3072])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12), metadata={}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (p: bf16[96,3072]) -> bf16[96,3072] {
  %while.1 = (s32[]{:T(128)}, bf16[96,3072]{1,0}) while(%tuple.0), condition=%condition, body=%body
  %send.19 = (f32[9432,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%b, %t), channel_id=32, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.19 = (f32[9432,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%t), channel_id=31, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = bf16[96,3072]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_a_program_for_tpus() -> None:
    """Its loops do not say their length, and what is asynchronous stands in several fusions."""
    assert read(TPU, [0] * 8) == [
        Collective("all-gather", 768 * 3072 * 2, 8, False, 12),
        Collective("reduce-scatter", 3072 * 768 * 2, 8, False, 12),
        Collective("all-reduce", 9432 * 8 * 128 * 4, 4, True, 1),  # between four slices
    ]


GPU = """\
HloModule jit_update, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %reduce-scatter-start = ((bf16[768,8]{1,0}, f32[768]{0}), (bf16[96,8]{1,0}, f32[96]{0})) reduce-scatter-start(%a, %b), channel_id=80, replica_groups=[1,8]<=[8], use_global_device_ids=true, dimensions={0}, to_apply=%add
  %reduce-scatter-done = (bf16[96,8]{1,0}, f32[96]{0}) reduce-scatter-done(%reduce-scatter-start)
  %all-reduce-start = f32[5376]{0} all-reduce-start(%c), channel_id=15, replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}, use_global_device_ids=true, to_apply=%add
  %all-reduce-done = f32[5376]{0} all-reduce-done(%all-reduce-start)
  ROOT %tuple = (s32[], f32[8]) tuple(%i, %x)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%tuple.0), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"60"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %out = f32[8]{0} get-tuple-element(%while.1), index=1
}
"""


def test_a_program_for_gpus() -> None:
    assert read(GPU, [0] * 8) == [
        Collective("reduce-scatter", 768 * 8 * 2 + 768 * 4, 8, False, 60),
        # Devices 0, 2, 4, 6 and 1, 3, 5, 7.
        Collective("all-reduce", 5376 * 4, 4, False, 60),
    ]
    assert {c.crosses for c in read(GPU, [0, 1] * 4) if c.kind == "all-reduce"} == {False}
    assert {c.crosses for c in read(GPU, HALVES)} == {True}


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
    ],
)
def test_groups_in_every_way_that_they_are_written(text: str, groups: list[list[int]]) -> None:
    assert np.array_equal(collectives._groups(text, "all-reduce", 4), groups)


def test_what_is_written_anew_is_not_guessed() -> None:
    with pytest.raises(Unknown, match="written anew"):
        read(GPU.replace("[1,8]<=[8]", "<<8>>"), [0] * 8)
    with pytest.raises(Unknown, match="unknown number"):
        read(TPU.replace("direction=LT", "direction=GE"), [0] * 8)


def test_totals_are_by_kind_and_by_what_lies_between() -> None:
    alike = [Collective("all-reduce", 80, 8, False, 3), Collective("all-reduce", 16, 2, False, 1)]
    across = Collective("all-reduce", 10, 2, True, 5)
    assert collectives.totals([*alike, across]) == {
        ("all-reduce", False): (4, 3 * 80 * 2 * 7 / 8 + 16),
        ("all-reduce", True): (5, 50.0),
    }
