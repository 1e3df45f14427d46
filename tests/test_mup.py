"""muP: its table, its way into the model and the optimiser, and what it is for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import configure, model, optim, parametrisation, state
from gptjax.config import Config, ConfigError, UserError, from_dict, to_dict
from gptjax.data.batches import Batch
from gptjax.interop import families
from gptjax.layers.parameter import INIT, Spec
from gptjax.parametrisation import MUP, PARAMETRISATION, Powers
from gptjax.perplexity import batch_nll
from gptjax.sizes import coordinates, coordinates_report
from tests import tiny

V, T = 264, 16
BASE = {"parametrisation": "mup_depth", "mup_base_width": 16, "mup_base_layers": 2}


def recipe(**knobs: Any) -> Config:
    """The tiny run, of width 16, 4 heads and 2 layers, with knobs of the model changed."""
    words = [f"--config.{name}={value}" for name, value in tiny.KNOBS.items()]
    words += [
        "--config.model.layers=2",
        "--config.data.sources=('shakespeare',)",
        "--config.optim.clip=None",
    ]
    words += [f"--config.{name.replace('__', '.')}={value}" for name, value in knobs.items()]
    return configure.from_file(tiny.RECIPE, words)


def shape(**knobs: Any) -> Config:
    return recipe(**{f"model__{name}": value for name, value in knobs.items()})


def named(tree: Any) -> dict[str, Any]:
    """Leaves by path, "blocks/attention/query"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Spec))
    return {"/".join(part.key for part in path): leaf for path, leaf in leaves}


def batch(seed: int = 0) -> Batch[jax.Array]:
    tokens = np.random.default_rng(seed).integers(0, V, (8, 1, T + 1)).astype(np.int32)
    ones = jnp.ones((8, 1, T), jnp.float32)
    return Batch(tokens[..., :-1], tokens[..., 1:], ones)


# --- the table ------------------------------------------------------------------------------

# By hand from Yang et al. 2022, table 8, Adam column, and Yang et al. 2023, table 1, at four
# times the width and four times the depth: path -> initial std over the base's, rate over peak.
FOURFOLD = {
    "embed/tokens": (1, 1),
    "embed/positions": (1, 1),
    "blocks/attention_norm_in/scale": (None, 1 / 2),
    "blocks/attention_norm_in/bias": (None, 1 / 2),
    "blocks/attention/query": (1 / 2, 1 / 4 * 1 / 2),
    "blocks/attention/key": (1 / 2, 1 / 4 * 1 / 2),
    "blocks/attention/value": (1 / 2, 1 / 4 * 1 / 2),
    "blocks/attention/out": (1 / 2, 1 / 4 * 1 / 2),
    "blocks/attention/query_bias": (None, 1 / 2),
    "blocks/attention/key_bias": (None, 1 / 2),
    "blocks/attention/value_bias": (None, 1 / 2),
    "blocks/attention/out_bias": (None, 1 / 2),
    "blocks/feedforward_norm_in/scale": (None, 1 / 2),
    "blocks/feedforward_norm_in/bias": (None, 1 / 2),
    "blocks/feedforward/up": (1 / 2, 1 / 4 * 1 / 2),
    "blocks/feedforward/down": (1 / 2, 1 / 4 * 1 / 2),
    "blocks/feedforward/up_bias": (None, 1 / 2),
    "blocks/feedforward/down_bias": (None, 1 / 2),
    "final_norm/scale": (None, 1),
    "final_norm/bias": (None, 1),
    "unembed/kernel": (1, 1),
}


def specs(**knobs: Any) -> tuple[Config, dict[str, Spec]]:
    config = shape(tied=False, **knobs)
    return config, named(model.abstract_params(config.model))


def rate_of(config: Config, spec: Spec) -> float:
    return parametrisation.rate_multiplier(config.model, spec.kind, "L" in spec.stacks)


@pytest.mark.parametrize("init", INIT)
def test_the_multipliers_are_those_of_the_papers(init):
    _, base = specs(init=init)
    large, found = specs(init=init, width=64, layers=8, **BASE)
    assert found.keys() == FOURFOLD.keys()
    for path, (std, rate) in FOURFOLD.items():
        assert rate_of(large, found[path]) == rate, path
        assert found[path].std == pytest.approx((std or 0) * base[path].std, rel=1e-15), path
    m = large.model
    assert parametrisation.logit_multiplier(m) == 1 / 4
    assert parametrisation.branch_multiplier(m) == 1 / 2
    # Scores: H is 16 in place of 4, so 4^(1/2) / 16 is 1/2 of 1 / sqrt(16).
    assert parametrisation.score_multiplier(m) == 1 / 2


def test_without_the_depth_version_depth_changes_nothing():
    knobs = BASE | {"parametrisation": "mup"}
    large, found = specs(width=64, layers=8, **knobs)
    _, deep = specs(layers=8)
    for path, (std, _) in FOURFOLD.items():
        rate = 1 / 4 if std == 1 / 2 else 1
        assert rate_of(large, found[path]) == rate
        assert found[path].std == pytest.approx((std or 0) * deep[path].std, rel=1e-15)
    assert parametrisation.branch_multiplier(large.model) == 1


def test_scores_follow_the_width_of_a_head_not_of_the_model():
    wider_heads = shape(width=64, **BASE)
    more_heads = shape(width=64, heads=16, mup_base_heads=4, **BASE)
    stated = shape(width=64, heads=16, head_dim=4, mup_base_heads=4, **BASE)
    found = [parametrisation.score_multiplier(c.model) for c in (wider_heads, more_heads, stated)]
    assert found == [1 / 2, 1, 1]


@pytest.mark.parametrize("name", PARAMETRISATION)
def test_at_the_base_shape_every_row_is_the_standard_one(name):
    def losses(config: Config) -> list[float]:
        now, step = state.create(config), state.make_train_step(config)
        found = []
        for i in range(4):
            now, metrics = step(now, batch(i))
            found.append(float(metrics["loss"]))
        return found

    assert losses(shape(**BASE | {"parametrisation": name})) == losses(shape())


def test_the_base_is_read_only_by_rows_that_need_it():
    knobs = {"width": 64, "layers": 8, "mup_base_width": 16, "mup_base_layers": 2}
    assert named(model.abstract_params(shape(**knobs).model)) == named(
        model.abstract_params(shape(width=64, layers=8).model)
    )
    for missing, parametrised in (("width", "mup"), ("layers", "mup_depth")):
        config = shape(**BASE | {"parametrisation": parametrised, f"mup_base_{missing}": None})
        with pytest.raises(ConfigError, match=f"needs model.mup_base_{missing}"):
            model.abstract_params(config.model)
    with pytest.raises(ConfigError, match="needs model.mup_base_heads"):
        parametrisation.score_multiplier(shape(head_dim=4, **BASE).model)


def test_the_scale_of_initial_values_multiplies_what_is_drawn():
    plain, scaled = (named(model.init(shape(init_scale=s).model, 0)) for s in (1.0, 2.0))
    drawn = {path for path in plain if not path.endswith(("bias", "scale"))}
    assert len(drawn) == 8
    for path, value in plain.items():
        assert np.array_equal(scaled[path], (2 if path in drawn else 1) * value), path
    with pytest.raises(ConfigError, match="model.init_scale must be above 0"):
        shape(init_scale=0.0)


# --- the optimiser --------------------------------------------------------------------------


@pytest.mark.parametrize("name", optim.ADAM_LIKE)
def test_rates_are_multiplied_and_the_decay_is_not(name):
    large = shape(width=64, layers=8, tied=False, **BASE)
    config = dataclasses.replace(
        large,
        optim=dataclasses.replace(
            large.optim, optimizer=name, schedule="constant", warmup_steps=0, peak_lr=1e-2,
            weight_decay=0.3, decay_mask="all",
        ),
    )  # fmt: skip
    params = jax.tree.map(
        lambda s: jnp.ones(s.shape),
        model.abstract_params(config.model),
        is_leaf=lambda x: isinstance(x, Spec),
    )
    grads = jax.tree.map(lambda p: -3.0 * p, params)
    optimizer = state.make_optimizer(config)
    updates, _ = jax.jit(lambda: optimizer.update(grads, optimizer.init(params), params))()
    for path, update in named(updates).items():
        # The first update of all three is the gradient's sign, here -1.
        wanted = -1e-2 * (-FOURFOLD[path][1] + 0.3)
        np.testing.assert_allclose(update, wanted, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("name", sorted(set(optim.OPTIMIZERS) - set(optim.ADAM_LIKE)))
def test_other_optimisers_are_refused(name):
    knobs = {f"model__{k}": v for k, v in BASE.items()}
    with pytest.raises(ConfigError, match=f"{name!r}.*adamw, lion, schedule_free"):
        state.make_optimizer(recipe(optim__optimizer=name, **knobs))
    state.make_optimizer(recipe(optim__optimizer=name))


# --- every way to the logits ----------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def large(request: pytest.FixtureRequest) -> tuple[Config, model.Params]:
    """Every multiplier differs from 1, and every parameter from 0."""
    config = shape(width=32, layers=4, tied=request.param, init="fan_in", **BASE)
    params = model.init(config.model, 0)
    return config, jax.tree.map(
        lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params
    )


def test_the_multipliers_act_where_the_papers_have_them(large):
    config, params = large
    tokens = batch().tokens[:, 0]
    standard = dataclasses.replace(config.model, parametrisation="standard")
    # The same function without multipliers: each folded into the parameters before it.
    factors = {"query": 2**-0.5, "query_bias": 2**-0.5, "out": 2**-0.5, "out_bias": 2**-0.5}
    factors |= {"down": 2**-0.5, "down_bias": 2**-0.5}
    folded = dict(params)
    folded["blocks"] = {
        name: {k: p * factors.get(k, 1) for k, p in part.items()}
        for name, part in params["blocks"].items()
    }
    folded["final_norm"] = jax.tree.map(lambda p: p / 2, params["final_norm"])
    apply = jax.jit(model.apply, static_argnums=0)
    wanted = apply(standard, folded, tokens)
    np.testing.assert_allclose(apply(config.model, params, tokens), wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(apply(standard, params, tokens) - wanted).max() > 0.1


def test_training_evaluation_and_decoding_see_the_multipliers(large):
    config, params = large
    one = batch()
    tokens, targets = one.tokens[:, 0], one.targets[:, 0]
    logits = jax.jit(model.apply, static_argnums=0)(config.model, params, tokens)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
    wanted = float(-chosen.mean())
    _, metrics = state.make_train_step(config)(
        state.create(config, jax.tree.map(jnp.copy, params)), one
    )
    assert float(metrics["loss"]) == pytest.approx(wanted, rel=1e-5)

    with jax.set_mesh(tiny.mesh()):
        nll_BT = batch_nll(
            config.model, 100, params, Batch(tokens, targets, jnp.ones(targets.shape))
        )
    np.testing.assert_allclose(nll_BT, -chosen[..., 0], rtol=1e-4, atol=1e-5)

    @jax.jit
    def decoded() -> jax.Array:
        cache, found = model.init_cache(config.model, len(tokens), T), []
        for i in range(3):
            x_BTD, cache, _ = model.hidden(config.model, params, tokens[:, i : i + 1], cache=cache)
            found.append(model.logits(config.model, params, x_BTD))
        return jnp.concatenate(found, 1)

    np.testing.assert_allclose(decoded(), logits[:, :3], rtol=1e-4, atol=1e-5)


def test_a_folder_of_hugging_face_cannot_hold_it():
    config = shape(**BASE)
    with pytest.raises(UserError, match="lacks model.parametrisation='mup_depth'"):
        families.to_theirs(config.model)
    families.to_theirs(shape(init_scale=2.0).model)


# --- what it is for -------------------------------------------------------------------------

WIDTHS, DEPTHS = (32, 256), (2, 8)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def small(name: str, **knobs: Any) -> Config:
    base = {"context": 32, "width": 32, "mup_base_width": 32, "position": "rope"}
    base |= {"layers": 2, "init": "fan_in", "scan_layers": True, "parametrisation": name}
    config = shape(**BASE | base | knobs)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, peak_lr=5e-3))


@pytest.fixture(scope="module")
def checked() -> dict[str, Any]:
    return coordinates.coordinate_check(small("mup"), widths=WIDTHS, steps=3)


@pytest.mark.slow
def test_under_mup_updates_keep_their_size_at_any_width(checked):
    found = checked["sweeps"]["model.width"]
    assert checked["passed"] and found["faults"] == []
    for name in coordinates.KEPT["model.width"]:
        assert np.abs(found["places"][name]["change"]["slopes"]).max() < coordinates.TOLERANCE
    # What the theory says of the logits at initialisation.
    assert found["places"]["logits"]["size"]["slopes"][0] == pytest.approx(-0.5, abs=0.1)


WRONG = {
    "logits": (MUP._replace(logits=0), "readout: its change grows"),
    "rate": (
        MUP._replace(kinds=MUP.kinds | {"matrix": Powers(std=-1 / 2, rate=0)}),
        "feedforward: its change grows",
    ),
    "table": (
        MUP._replace(kinds=MUP.kinds | {"embedding": Powers(std=0, rate=-1)}),
        "embedding: its change shrinks",
    ),
    "std": (
        MUP._replace(kinds=MUP.kinds | {"matrix": Powers(std=0, rate=-1)}),
        "attention grows with the width at initialisation",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", *WRONG])
def test_any_other_power_fails_and_is_named(name, monkeypatch, fresh_programs):
    wanted = "feedforward: its change grows"
    if name in WRONG:
        rules, wanted = WRONG[name]
        monkeypatch.setitem(PARAMETRISATION, "mup", rules)
    record = coordinates.coordinate_check(
        small("standard" if name == "standard" else "mup"), widths=WIDTHS, steps=3, seeds=1
    )
    assert not record["passed"]
    assert any(wanted in fault for fault in record["sweeps"]["model.width"]["faults"])


@pytest.mark.slow
def test_depth():
    deep, wide = (
        coordinates.coordinate_check(small(name), depths=DEPTHS, steps=3)["sweeps"]["model.layers"]
        for name in ("mup_depth", "mup")
    )
    assert deep["faults"] == []
    assert any("stream: its change grows with the layers" in fault for fault in wide["faults"])


def test_activations_are_those_of_the_model():
    config = small("mup_depth", layers=3, parallel_block=False).model
    first, params = model.init(config, 0), model.init(config, 1)
    one = batch()
    positions = jnp.arange(T)[None] + jnp.zeros((8, 1), int)
    probe = jax.tree.map(lambda x: x[:, 0], one)._replace(positions=positions)
    found = jax.jit(coordinates.activations, static_argnums=0)(config, first, params, probe)
    shapes = {name: x.shape for name, x in found.items()}
    layers, last = (3, 8, T, 32), (1, 8, T, 32)
    assert shapes == {
        "embedding": (8, T, 32), "attention": layers, "feedforward": layers, "stream": last,
        "readout": (8, T, V), "logits": (8, T, V),
    }  # fmt: skip
    branches = found["attention"].sum(0) + found["feedforward"].sum(0)
    scale = parametrisation.branch_multiplier(config)
    np.testing.assert_allclose(
        found["stream"][0], found["embedding"] + scale * branches, rtol=1e-4, atol=1e-5
    )
    logits = model.apply(config, params, probe.tokens)
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-4, atol=1e-5)
    # The logits are linear in the table: the part of the first one is what readout lacks.
    frozen = params | {"embed": first["embed"]}
    x_BTD = model.hidden(config, params, probe.tokens).x_BTD
    rest = model.logits(config, frozen, x_BTD)
    np.testing.assert_allclose(found["readout"], logits - rest, rtol=1e-4, atol=1e-5)


def test_slopes_are_the_powers():
    values, powers = (16, 32, 128), np.array([0.5, -1.0])
    rms = 3.0 * np.array(values)[None, :, None] ** powers * np.ones((2, 1, 1))
    np.testing.assert_allclose(coordinates.slopes(values, rms), powers, rtol=1e-12)


def test_a_check_is_told_drawn_and_kept(checked, tmp_path, capsys):
    assert json.loads(json.dumps(checked, allow_nan=False)) == checked
    assert from_dict(checked["config"]) and to_dict(small("mup")).keys() == checked["config"].keys()
    coordinates_report.show(checked)
    out = capsys.readouterr().out
    assert "slopes against model.width=32, 256" in out and "passed" in out
    coordinates_report.figure(checked).savefig(tmp_path / "check.png")
    assert (tmp_path / "check.png").stat().st_size > 10_000
    page = coordinates_report.page(checked)
    assert "<svg" in page and "http" not in page and page.count("<tr>") == 7


@pytest.mark.parametrize(
    "sweeps, knobs, message",
    [
        ({}, {}, "--widths, or --depths"),
        ({"widths": (32, 32)}, {}, "two or more different"),
        ({"depths": (2, 4), "steps": 0}, {}, "above 0"),
        ({"widths": (32, 64)}, {"ff_dim": 64}, "model.ff_dim must be None"),
        ({"widths": (32, 64)}, {"head_dim": 8}, "model.head_dim must be None"),
        ({"widths": (30, 64)}, {}, "not divisible by model.heads"),
    ],
)
def test_a_check_that_cannot_be_made(sweeps, knobs, message):
    with pytest.raises(UserError, match=message):
        coordinates.coordinate_check(small("mup", **knobs), **sweeps)
