"""Every recipe in configs/ resolves, is checked in shape on a mesh, and says what it said before.

A recipe is tested by standing in configs/, in each of its `SIZES`. What was meant to change is
written anew by

    GPTJAX_UPDATE_GOLDEN=1 python -m pytest tests/test_configs.py

and then read as a diff: golden/configs.json holds every knob of the base recipe as resolved and of each other
recipe what differs from it, golden/shardings.txt the mesh axes of each dim of each parameter.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import sys
from pathlib import Path

import jax
import pytest

from gptjax import model, sharding, state
from gptjax.accounting import parameters
from gptjax.config import Config, ConfigError, flatten, to_dict
from gptjax.configure import from_file
from gptjax.layers.feedforward import hidden_width
from gptjax.plan.compile import abstract_batch
from tests import tiny

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
UPDATE = "GPTJAX_UPDATE_GOLDEN" in os.environ
sys.path.insert(0, str(ROOT))  # recipes import each other from the root, as under launch.py

SIZES = {"depth": ("4", "12", "24")}  # of recipes whose argument is no row of a table


def recipes() -> list[str]:
    """What --config can name below configs/: "gpt2:124m", "modern"."""
    names = []
    for file in sorted((ROOT / "configs").glob("*.py")):
        sizes = getattr(importlib.import_module(f"configs.{file.stem}"), "SIZES", None)
        sizes = SIZES.get(file.stem, ()) if sizes is None else sizes
        names += [f"{file.stem}:{size}" for size in sizes] or [file.stem]
    return names


RECIPES = recipes()


def resolve(name: str) -> Config:
    """The config of a recipe, as on the command line."""
    file, _, size = name.partition(":")
    return from_file(f"{ROOT / 'configs' / file}.py" + (size and f":{size}"))


def compare(file: Path, text: str) -> None:
    """Compares with a golden file, or writes it."""
    if UPDATE:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert file.is_file(), f"no golden file {file}: see the top of {__file__}"
    assert text == file.read_text(), f"not what {file} says: see the top of {__file__}"


def test_the_recipes_are_found():
    assert {"base", "gpt2:1558m", "gpt3:175b", "depth:24", "modern"} <= set(RECIPES)


def test_resolved_configs():
    resolved = {name: flatten(to_dict(resolve(name))) for name in RECIPES}
    base = resolved.pop("base")
    differences = {
        name: {knob: value for knob, value in knobs.items() if value != base[knob]}
        for name, knobs in resolved.items()
    }
    compare(GOLDEN / "configs.json", json.dumps({"base": base} | differences, indent=1) + "\n")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_as_a_lab_note(name):
    note = importlib.import_module(f"configs.{name.partition(':')[0]}").__doc__
    summary = note.splitlines()[0]
    assert summary.endswith((".", "b."))
    assert "Source:" in note and "Command:" in note
    assert f"configs/{name.partition(':')[0]}.py" in note


FIRST = {name.partition(":")[0]: name for name in reversed(RECIPES)}  # the first size of each


@pytest.mark.parametrize(
    "name, rows, devices",
    [*((name, None, 4) for name in RECIPES), *((name, 1, 1) for name in FIRST.values())],
)
def test_the_whole_step_has_matching_shapes_and_shardings(name, rows, devices):
    """At the recipe's batch over devices, and at one row a micro-batch on one."""
    config = resolve(name)
    if rows is not None:
        data = dataclasses.replace(config.data, batch_size=rows * config.train.accumulation)
        config = dataclasses.replace(config, data=data)
    mesh = tiny.mesh(fsdp=devices)
    specs = model.abstract_params(config.model)
    sharding.check_divisible(config, specs, mesh.shape)
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(specs)]
    assert sum(sizes) == parameters(config.model)["total"]
    # Every layer is traced as the first two.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=2))
    with jax.set_mesh(mesh):
        before, batch = state.abstract(config), abstract_batch(config)
        after, metrics = jax.eval_shape(state.make_train_step(config), before, batch)
    assert all(metric.shape == () for metric in metrics.values())

    def facts(leaf):
        return leaf.shape, leaf.dtype, leaf.sharding.spec, leaf.weak_type

    # The step yields exactly what it takes, so that the next one need not be compiled anew.
    assert jax.tree.map(facts, after) == jax.tree.map(facts, before)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(before.params)} == {"float32"}


def gpt_parameters(layers: int, width: int, vocab: int, context: int) -> int:
    """Of GPT-2: tables; in a block 12 D^2, 9 D of biases and 4 D of two norms; the last norm."""
    return (vocab + context) * width + layers * (12 * width**2 + 13 * width) + 2 * width


@pytest.mark.parametrize(
    "name, published",
    [
        # The counts of OpenAI's released checkpoints, with 50,257 tokens.
        ("gpt2:124m", 124_439_808),
        ("gpt2:355m", 354_823_168),
        ("gpt2:774m", 774_030_080),
        ("gpt2:1558m", 1_557_611_200),
    ],
)
def test_gpt2_has_the_published_parameters(name, published):
    m = resolve(name).model
    assert gpt_parameters(m.layers, m.width, 50257, 1024) == published
    assert parameters(m)["total"] == published + (m.vocab_size - 50257) * m.width


@pytest.mark.parametrize(
    "name, layers, width, heads, head_dim, millions, batch_tokens, rate",
    [
        # Brown et al. 2020, table 2.1, save 1.3b's heads and 13b's width (see the recipe).
        ("125m", 12, 768, 12, 64, 125, 0.5e6, 6.0e-4),
        ("350m", 24, 1024, 16, 64, 350, 0.5e6, 3.0e-4),
        ("760m", 24, 1536, 16, 96, 760, 0.5e6, 2.5e-4),
        ("1.3b", 24, 2048, 16, 128, 1300, 1e6, 2.0e-4),
        ("2.7b", 32, 2560, 32, 80, 2700, 1e6, 1.6e-4),
        ("6.7b", 32, 4096, 32, 128, 6700, 2e6, 1.2e-4),
        ("13b", 40, 5120, 40, 128, 13000, 2e6, 1.0e-4),
        ("175b", 96, 12288, 96, 128, 175000, 3.2e6, 0.6e-4),
    ],
)
def test_gpt3_is_the_papers_table(
    name, layers, width, heads, head_dim, millions, batch_tokens, rate
):
    c = resolve(f"gpt3:{name}")
    m = c.model
    assert (m.layers, m.width, m.heads, m.H, m.context) == (layers, width, heads, head_dim, 2048)
    assert 4 * width == hidden_width(m) and c.optim.peak_lr == rate
    assert (c.optim.b1, c.optim.b2, c.optim.eps) == (0.9, 0.95, 1e-8)
    assert (c.optim.clip, c.optim.weight_decay, c.optim.final_lr_fraction) == (1.0, 0.1, 0.1)
    # Rounded to multiples of 64 rows, and to whole steps.
    tokens = c.data.batch_size * m.context
    assert tokens == pytest.approx(batch_tokens, abs=32 * m.context)
    assert c.train.steps * tokens == pytest.approx(300e9, rel=1e-5)
    assert c.optim.warmup_steps * tokens == pytest.approx(375e6, rel=5e-3)
    assert parameters(m)["total"] == gpt_parameters(layers, width, 50304, 2048)
    # The table prints two or three digits.
    assert parameters(m)["total"] / 1e6 == pytest.approx(millions, rel=0.02)


def test_the_nanogpt_recipe_is_nanogpts():
    c = resolve("nanogpt_char")
    m, o = c.model, c.optim
    assert (m.layers, m.heads, m.width, m.context) == (4, 4, 128, 64)
    assert (m.bias, m.tied, m.dropout, m.feedforward, hidden_width(m)) == (
        False,
        True,
        0.0,
        "gelu",
        512,
    )
    assert (m.position, m.norm, m.norm_placement, m.init) == ("learned", "layernorm", "pre", "gpt2")
    assert (c.data.batch_size, c.train.steps, c.train.accumulation) == (12, 2000, 1)
    assert (o.optimizer, o.schedule, o.warmup_steps) == ("adamw", "cosine", 100)
    assert o.peak_lr == 1e-3 and o.peak_lr * o.final_lr_fraction == pytest.approx(1e-4, rel=1e-12)
    assert (o.b1, o.b2, o.weight_decay, o.decay_mask, o.clip) == (0.9, 0.99, 0.1, "matrices", 1.0)


@pytest.mark.parametrize("d", [4, 12, 24])
def test_the_depth_dial_follows_its_formulas(d):
    c = resolve(f"depth:{d}")
    m = c.model
    assert (m.layers, m.width, m.heads, m.H, m.heads % m.K) == (d, 64 * d, d, 64, 0)
    tokens = c.data.batch_size * m.context
    assert tokens == {4: 2**16, 12: 2**16, 24: 2**17}[d]
    assert c.train.steps == round(20 * 49152 * d**3 / tokens)
    assert c.optim.peak_lr == pytest.approx(3e-4 * (12 / d) ** 0.5)
    assert c.optim.warmup_steps == round(0.02 * c.train.steps)


@pytest.mark.parametrize("depth", ["0", "-4", "4.5", "deep"])
def test_the_depth_dial_refuses_what_is_no_depth(depth):
    with pytest.raises(ConfigError, match=f"'{depth}' is not a whole number"):
        resolve(f"depth:{depth}")


def test_an_unknown_size_is_refused_with_the_sizes():
    message = "no size '125m'; sizes: 124m, 355m, 774m, 1558m"
    with pytest.raises(ConfigError, match=message):
        resolve("gpt2:125m")


def axes(leaf: jax.ShapeDtypeStruct) -> str:
    """The mesh axes of each dim: "-" none, "data+fsdp" two."""
    entries = [*leaf.sharding.spec, *[None] * leaf.ndim][: leaf.ndim]
    names = [e if isinstance(e, str) else "+".join(e or "-") for e in entries]
    return f"{'x'.join(map(str, leaf.shape)):20} {' '.join(names)}"


def test_shardings_of_the_parameters():
    lines = []
    with jax.set_mesh(tiny.mesh(data=2, fsdp=2, tensor=2)):
        for name in ("gpt2:124m", "modern"):
            lines.append(f"# {name}")
            params = state.abstract(resolve(name)).params
            for path, leaf in jax.tree_util.tree_leaves_with_path(params):
                lines.append(f"{'/'.join(part.key for part in path):33} {axes(leaf)}".rstrip())
    compare(GOLDEN / "shardings.txt", "\n".join(lines) + "\n")
