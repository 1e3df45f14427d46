"""The rules table, the mesh, and where arrays really are: on 8 virtual devices."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import model, sharding, state
from gptjax.config import ConfigError
from gptjax.optim import OPTIMIZERS
from gptjax.sharding import (
    AXES,
    check_divisible,
    gather,
    make_mesh,
    merge_tokens,
    out,
    parameter_spec,
    place,
    round_up,
    spec,
)
from tests import tiny

pytestmark = pytest.mark.usefixtures("eight_devices")

ROWS = ("data", "fsdp", "expert")
CONFIG = dataclasses.replace(
    tiny.BASE,
    model=tiny.model(
        vocab_size=64, context=16, layers=2, width=32, heads=8, kv_heads=4, ff_dim=48,
        bias=False, qk_norm=True, tied=False, scan_layers=True,
    ),
    optim=tiny.optim(warmup_steps=0, ema_decay=0.9),
    data=tiny.data(batch_size=16),
)  # fmt: skip


# --- the rules ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dims, activation, parameter",
    [
        ("BTD", P(ROWS, "sequence", None), None),
        ("BAT", P(ROWS, None, "sequence"), None),
        ("BTNH", P(ROWS, "sequence", "tensor", None), None),
        ("BSKH", P(ROWS, None, "tensor", None), None),
        ("BKGTS", P(ROWS, "tensor", None, "sequence", None), None),
        ("BTF", P(ROWS, "sequence", "tensor"), None),
        ("BTV", P(ROWS, "sequence", "tensor"), None),
        ("1TD", P(None, "sequence", None), None),
        ("LDNH", P(None, None, "tensor", None), P(None, "fsdp", "tensor", None)),
        ("LDKH", P(None, None, "tensor", None), P(None, "fsdp", "tensor", None)),
        ("LNHD", P(None, "tensor", None, None), P(None, "tensor", None, "fsdp")),
        ("LDF", P(None, None, "tensor"), P(None, "fsdp", "tensor")),
        ("LEDF", P(None, None, None, "tensor"), P(None, "expert", "fsdp", "tensor")),
        ("LEFD", P(None, None, "tensor", None), P(None, "expert", "tensor", "fsdp")),
        ("LDE", P(None, None, None), P(None, "fsdp", "expert")),
        ("BTE", P(ROWS, "sequence", None), None),
        ("VD", P("tensor", None), P("tensor", "fsdp")),
        ("PD", P(None, None), P(None, "fsdp")),
        ("LH", P(None, None), P(None, None)),
        ("D", P(None), P("fsdp")),
        ("", P(), P()),
    ],
)
def test_specs(dims, activation, parameter):
    assert spec(dims) == activation
    if parameter is not None:
        assert parameter_spec(dims) == parameter


@pytest.mark.parametrize("rule, dims", [(spec, "NF"), (spec, "BTKF"), (parameter_spec, "BD")])
def test_two_dims_that_claim_one_axis_are_refused(rule, dims):
    with pytest.raises(ValueError, match=f"dims '{dims}' claim a mesh axis twice"):
        rule(dims)


def test_a_letter_outside_the_alphabet_is_refused():
    with pytest.raises(ValueError, match=r"dims 'BTX': no such letter .*\['X'\]"):
        spec("BTX")


def test_the_rules_name_only_axes_of_the_mesh_and_letters_of_the_alphabet():
    for rules in (rules for phase in sharding.RULES.values() for rules in phase):
        for letter, axes in rules.items():
            assert letter in sharding.LETTERS - {"1"} and set(axes) <= set(AXES)
    # The legend atop the model and the table's alphabet are one.
    legend = re.findall(r"(?:^    |  )([A-Z1])  \w", model.__doc__ or "", re.M)
    assert set(legend) == set(sharding.LETTERS)


def test_out_is_none_where_no_mesh_is_set():
    assert out("BTD") is None
    with jax.set_mesh(tiny.mesh(data=8)):
        assert out("BTD") == P(("data", "fsdp"), None, None)
    with jax.set_mesh(tiny.mesh(sequence=8)):
        assert out("BTD") == P(("data", "fsdp"), "sequence", None)


def test_rules_know_their_phase():
    """One token does not divide, and its rows divide over all devices but those of a layer."""
    with jax.set_mesh(tiny.mesh(data=2, sequence=2, tensor=2)):
        assert [sharding.ways(dim) for dim in "BTNS"] == [2, 2, 2, 1]
        with sharding.phase("decoding"):
            assert [sharding.ways(dim) for dim in "BTNS"] == [4, 1, 2, 1]
            assert out("BTNH") == P(("data", "fsdp", "sequence"), None, "tensor", None)
            assert sharding.balanced(1) is None


# --- the mesh -------------------------------------------------------------------------------


def test_make_mesh_takes_the_devices_that_remain():
    assert dict(make_mesh(tiny.axes(data=None, fsdp=2, tensor=2)).shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
    }
    assert dict(tiny.mesh(fsdp=2, tensor=4).shape) == {"data": 1, "fsdp": 2, "tensor": 4}
    # An axis that came later is there where its knob is on: programs from before are the same.
    long = tiny.mesh(fsdp=2, sequence=4)
    assert list(long.shape.items()) == [("data", 1), ("fsdp", 2), ("sequence", 4), ("tensor", 1)]
    for made in (long, tiny.mesh(fsdp=2)):
        assert sharding.make_mesh(sharding.section(made.shape), made.devices.flatten()) == made
    few = make_mesh(tiny.axes(data=None), jax.devices()[:3])
    assert dict(few.shape) == {"data": 3, "fsdp": 1, "tensor": 1}
    assert set(few.devices.flat) == set(jax.devices()[:3])


@pytest.mark.parametrize(
    "sizes, wants",
    [
        (tiny.axes(fsdp=2, tensor=2), 4),
        (tiny.axes(data=None, fsdp=3), 6),
        (tiny.axes(data=None, fsdp=16), 16),
    ],
)
def test_make_mesh_refuses_another_number_of_devices(sizes, wants):
    message = f"wants {wants} devices, but this run has 8: .*whose product is 8$"
    with pytest.raises(ConfigError, match=message):
        make_mesh(sizes)


def test_round_up_is_the_next_multiple_of_the_devices_of_a_dim():
    assert round_up(5, "B") == 5
    with jax.set_mesh(tiny.mesh(data=2, fsdp=2, tensor=2)):
        assert [round_up(n, "B") for n in (1, 4, 5)] == [4, 4, 8]
        assert [round_up(n, "V") for n in (1, 2, 3)] == [2, 2, 4]
        assert round_up(5, "T") == 5
    with jax.set_mesh(tiny.mesh(sequence=4)):
        assert [round_up(n, "T") for n in (1, 8, 9)] == [8, 8, 16]  # two pieces a device


@pytest.mark.parametrize(
    "changes, sizes, message",
    [
        ({"batch_size": 12}, tiny.DATA, "data.batch_size / train.accumulation=12 .* data x fsdp x expert = 8"),
        ({"accumulation": 4}, tiny.axes(data=4, fsdp=2), "data.batch_size / train.accumulation=4 .* data x fsdp x expert = 8"),
        ({"heads": 4, "kv_heads": 4}, tiny.axes(tensor=8), "model.heads=4 .* tensor = 8"),
        ({"kv_heads": 4}, tiny.axes(tensor=8), "model.kv_heads=4 .* tensor = 8"),
        ({"ff_dim": 50}, tiny.TENSOR, "model.ff_dim=50 .* tensor = 4"),
        ({"vocab_size": 257}, tiny.CUBE, "model.vocab_size=257 .* tensor = 2"),
        ({"width": 36, "head_dim": 8}, tiny.FSDP, "model.width=36 .* fsdp = 8"),
        ({"context": 12}, tiny.axes(data=2, sequence=4), "model.context=12 .* two pieces on each of mesh axes sequence = 4: make it a multiple of 8"),
        ({"stride": 2, "eval_context": 2}, tiny.axes(data=4, sequence=2), "eval.context=2 .* sequence = 2: make it a multiple of 4"),
    ],
)  # fmt: skip
def test_an_indivisible_config_is_refused_by_its_knob(changes, sizes, message):
    def change(section):
        names = {f.name for f in dataclasses.fields(section)} & set(changes)
        return dataclasses.replace(section, **{name: changes[name] for name in names})

    parts = {name: change(getattr(CONFIG, name)) for name in ("model", "data", "train", "eval")}
    if "eval_context" in changes:
        parts["eval"] = dataclasses.replace(parts["eval"], context=changes["eval_context"])
    config = dataclasses.replace(CONFIG, **parts)
    specs = model.abstract_params(config.model)
    if "make it" not in message:
        message += f": make it a multiple of {message[-1]}"
    with pytest.raises(ConfigError, match=f"^{message}, or change the mesh$"):
        check_divisible(config, specs, sharding.mesh_shape(sizes, 8))
    check_divisible(config, specs, dict.fromkeys(AXES, 1))


def test_a_divisible_config_passes_on_every_mesh():
    specs = model.abstract_params(CONFIG.model)
    for sizes in tiny.MESHES:
        check_divisible(CONFIG, specs, sharding.mesh_shape(sizes, 8))


# --- gather -----------------------------------------------------------------------------------


def collectives(text: str, kind: str) -> list[str]:
    """What the collectives of compiled HLO yield: "bf16[32,8]"."""
    return re.findall(rf"= \(?(\w+\[[\d,]*\])\S* {kind}(?:-start)?\(", text)


def test_gather_casts_before_it_moves():
    with jax.set_mesh(tiny.mesh(fsdp=4, tensor=2)):
        where = NamedSharding(jax.sharding.get_mesh(), parameter_spec("DF"))
        kernel = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=where)
        use = jax.jit(lambda p: gather(p, "DF", jnp.bfloat16))
        lowered = use.lower(kernel)
        result = lowered.out_info
        assert (result.dtype, result.sharding.spec) == (jnp.bfloat16, P(None, "tensor"))
        names = [e.primitive.name for e in use.trace(kernel).jaxpr.eqns]
        assert names == ["convert_element_type", "reshard"]
        # XLA makes it one all-gather, over fsdp alone. (Its CPU compiler widens any bf16
        # collective to f32, so the dtype that moves is read off the jaxpr.)
        (moved,) = collectives(lowered.compile().as_text(), "all-gather")
        assert moved.endswith("[32,8]")


def test_gather_without_a_mesh_only_casts():
    p = jnp.ones((4, 4))
    assert gather(p, "DF", jnp.bfloat16).dtype == jnp.bfloat16


# --- products over all tokens -----------------------------------------------------------------


@pytest.mark.parametrize("sizes", tiny.MESHES, ids=str)
def test_merged_tokens_are_summed_over_alike_and_move_nowhere(sizes):
    rng = np.random.default_rng(0)
    # Small whole numbers: their sums are exact in any order.
    x, g = (rng.integers(-9, 10, (8, 16, width)).astype(np.float32) for width in (8, 32))
    equation = "BTF,BTD->FD"

    def product(x, g):
        x, g = sharding.shard(x, "BTF"), sharding.shard(g, "BTD")
        merged, operands = merge_tokens(equation, x, g)
        assert (merged == equation) == (sizes.sequence > 1)
        return jnp.einsum(merged, *operands, out_sharding=out("FD"))

    with jax.set_mesh(make_mesh(sizes)):
        where = [NamedSharding(jax.sharding.get_mesh(), spec(dims)) for dims in ("BTF", "BTD")]
        compiled = jax.jit(product).lower(*map(jax.device_put, (x, g), where)).compile()
        result = compiled(*map(jax.device_put, (x, g), where))
    assert (np.asarray(result) == np.einsum(equation, x, g)).all()
    text = compiled.as_text()
    assert not any(collectives(text, kind) for kind in ("all-gather", "all-to-all"))


# --- place ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [*tiny.MESHES, tiny.axes(tensor=8)], ids=str)
@pytest.mark.parametrize("dims", ["BT", "BAT"])
def test_place_gives_each_device_its_rows(sizes, dims):
    rows, ways = 16, sizes.data * sizes.fsdp
    rest = (2, 4)[2 - len(dims) + 1 :]
    whole = np.arange(rows * math.prod(rest), dtype=np.int32).reshape(rows, *rest)
    asked = []

    def load(start, stop):
        asked.append((start, stop))
        return {"x": whole[start:stop], "y": whole[start:stop] * 0.5}

    with jax.set_mesh(make_mesh(sizes)):
        placed = place(load, rows, dims)
    assert asked == [(0, rows)]  # of one process all, and once
    np.testing.assert_array_equal(placed["x"], whole)
    np.testing.assert_array_equal(placed["y"], whole * 0.5)
    devices = make_mesh(sizes).devices.reshape(ways, sizes.sequence, -1)
    for shard in placed["x"].addressable_shards:
        ((row, part, _),) = np.argwhere(devices == shard.device)
        mine = np.split(np.split(whole, ways)[row], sizes.sequence, axis=-1)[part]
        np.testing.assert_array_equal(shard.data, mine)


# --- born sharded -----------------------------------------------------------------------------


def test_the_state_is_born_sharded_and_never_whole():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, width=256))
    with jax.set_mesh(tiny.mesh(fsdp=8)):
        compiled = jax.jit(lambda: state.create(config)).lower().compile()
        made = compiled()
    params = jax.tree.leaves(made.params)
    dims = [s.dims for s in jax.tree.leaves(model.abstract_params(config.model))]
    for leaf, letters in zip(params, dims, strict=True):
        (shape,) = {shard.data.shape for shard in leaf.addressable_shards}
        # Each device has an eighth of all that has a width, which is all that is large.
        wanted = [n // 8 if d == "D" else n for n, d in zip(leaf.shape, letters, strict=True)]
        assert shape == tuple(wanted)
        assert len({shard.device for shard in leaf.addressable_shards}) == 8
    moments = made.opt_state[1][0]
    for tree in (made.ema, moments.mu, moments.nu):
        assert [leaf.sharding for leaf in jax.tree.leaves(tree)] == [p.sharding for p in params]

    # Nor does any device hold a whole one for a moment: no value of the compiled program is
    # larger than a share of the largest parameter, save the table of normal quantiles.
    values = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    sizes = {math.prod(map(int, value.split(","))) for value in values} - {2**16}
    least = min(p.size for p, d in zip(params, dims, strict=True) if "D" in d and len(d) > 2)
    assert max(sizes) <= max(p.size for p in params) // 8 < least


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_keeps_a_whole_matrix_on_a_device(optimizer):
    optim = dataclasses.replace(CONFIG.optim, optimizer=optimizer)
    config = dataclasses.replace(CONFIG, optim=optim)
    with jax.set_mesh(tiny.mesh(fsdp=8)):
        leaves = jax.tree.leaves(state.abstract(config).opt_state)
    for leaf in leaves:
        share = math.prod(leaf.sharding.shard_shape(leaf.shape))
        # Adafactor's factors are whole: a matrix less one of its dims.
        assert share * 8 == leaf.size or leaf.size <= 32 * 8 * 2


# --- the axes have one home -------------------------------------------------------------------


def axes_named(source: str) -> list[str]:
    """Where code names a mesh axis: mesh.fsdp, fsdp=2, "tensor", "mesh.data=2"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(ast.Name(of) | ast.Attribute(attr=of), attr=name):
                named = of == "mesh" and name in AXES
            case ast.keyword(str(name)):
                named = name in AXES and name != "data"  # which means other things too
            case ast.Constant(str(text)):
                named = (text in AXES and text != "data") or re.search(
                    rf"mesh\.({'|'.join(AXES)})", text
                )
            case _:
                named = False
        if named:
            found.append(ast.unparse(node))
    return found


def test_only_the_rules_and_the_config_name_a_mesh_axis():
    package = Path(sharding.__file__).parent
    named = {
        f.relative_to(package).as_posix(): axes_named(f.read_text()) for f in package.rglob("*.py")
    }
    assert {file for file, names in named.items() if names} == {"sharding.py", "config.py"}


@pytest.mark.parametrize(
    "source", ["c.mesh.fsdp", "mesh.data", "replace(m, tensor=1)", "P('fsdp')", "'set mesh.fsdp'"]
)
def test_a_named_mesh_axis_is_found(source):
    assert axes_named(source)
