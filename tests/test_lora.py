"""What is trained: each row of the table is a run like any other; adapters as `peft` has them."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from gptjax import branch, decode, loop, model, setup, sharding, state, trainable, trained
from gptjax.checkpoint import Checkpoints
from gptjax.cli import main
from gptjax.config import Config, ConfigError, UserError
from gptjax.data.batches import Batch
from gptjax.interop import hf, pretrained
from gptjax.layers.parameter import Adapted, Scaled, laid, widen
from gptjax.objectives import OBJECTIVE
from gptjax.optim import OPTIMIZERS
from gptjax.records import read_metrics
from gptjax.replay import TIMINGS
from gptjax.trainable import TRAINABLE
from tests import tiny

V, B, T = 64, 8, 16

# Of each row one that trains a part.
ROWS: dict[str, dict[str, Any]] = {
    "all": {},
    "unfrozen": {"frozen": ("embed/*", "blocks/attention/*")},
    "lora": {"lora_rank": 3},
    "qlora": {"lora_rank": 3},
    "last_n_layers": {"last_layers": 1},
    "heads_only": {"tied": False},
}


def configure(row: str, **knobs: Any) -> Config:
    knobs = ROWS[row] | {"trainable": row} | knobs
    optim = {k: knobs.pop(k) for k in list(knobs) if hasattr(tiny.BASE.optim, k)}
    shape = {k: knobs.pop(k) for k in list(knobs) if hasattr(tiny.BASE.model, k)}
    return dataclasses.replace(
        tiny.BASE,
        model=tiny.model(**({"vocab_size": V, "context": T, "heads": 4} | shape)),
        optim=tiny.optim(**({"warmup_steps": 0, "peak_lr": 1e-2} | optim)),
        data=tiny.data(batch_size=B),
        train=tiny.train(**({"steps": 10} | knobs)),
    )


def rows(seed: int = 0, micros: int = 1) -> Batch[np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (B // micros, micros, T)
    tokens, targets = (rng.integers(V, size=shape).astype(np.int32) for _ in range(2))
    return Batch(tokens, targets, np.ones(shape, np.float32))


def step(config: Config, now: state.TrainState, seed: int = 0) -> tuple[state.TrainState, Any]:
    batch = rows(seed, config.train.accumulation)
    if not jax.sharding.get_mesh().empty:
        cut = lambda a, b: jax.tree.map(lambda x: x[a:b], batch)  # noqa: E731
        batch = sharding.place(cut, len(batch.tokens), "BAT")
    return state.make_train_step(config)(now, batch)


def train(config: Config, steps: int = 3) -> tuple[state.TrainState, dict[str, float]]:
    now, metrics = state.create(config), {}
    for i in range(steps):
        now, metrics = step(config, now, i)
    return now, metrics


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def logits(config: Config, params: Any) -> np.ndarray:
    tokens = rows().tokens[:, 0]
    return np.asarray(jax.jit(functools.partial(model.apply, config.model))(params, tokens))


def is_scaled(leaf: Any) -> bool:
    return isinstance(leaf, Scaled)


def held(row: str, params: Any, config: Config) -> Any:
    """The model that a row begins with: of `qlora` each matrix on 255 steps an output."""
    if row != "qlora":
        return params
    frozen = trainable.trainable(config).split(params)[1]

    def one(spec: Any, x: jax.Array, kept: Any) -> Any:
        if not is_scaled(kept):
            assert spec.kind != "matrix"
            return x
        wide, summed = np.asarray(x), tuple(map(spec.dims.index, spec.fan_in))
        values, scale = map(np.asarray, kept)
        # XLA may multiply by 1 / 127.
        largest = np.abs(wide).max(summed, keepdims=True)
        np.testing.assert_allclose(scale, largest / np.float32(127), rtol=2**-22)
        np.testing.assert_array_equal(values, np.round(wide / scale))
        return values * scale

    return jax.tree.map(one, model.abstract_params(config.model), params, frozen)


def same(a: Any, b: Any) -> bool:
    a, b = jax.device_get((a, b))
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all((x == y).all() for x, y in pairs)


def test_every_row_is_a_case():
    assert ROWS.keys() == TRAINABLE.keys()


# --- every row ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_step_0_is_the_base_bitwise(row, scan):
    config = configure(row, scan_layers=scan, layers=3)
    base = held(row, model.init(config.model, config.seed), config)
    start = state.create(config)
    of_row = trainable.trainable(config)
    assert (logits(config, base) == logits(config, state.evaluation_params(config, start))).all()
    # What the step trains on; layers apart are another program than a scan, to the last bits.
    trained = logits(config, of_row.realise(start.params, start.frozen))
    apart = scan and row == "last_n_layers"
    np.testing.assert_allclose(trained, logits(config, base), rtol=0, atol=2e-6 * apart)
    assert jax.tree.map(lambda s: s.shape, of_row.specs) == jax.tree.map(np.shape, start.params)


@pytest.mark.parametrize("row", ROWS)
def test_what_is_frozen_stays_bitwise_and_what_is_trained_moves(row):
    config = configure(row, layers=3, ema_decay=0.5)
    base = leaves(held(row, model.init(config.model, config.seed), config))
    now, metrics = train(config)
    assert np.isfinite(metrics["loss"]) and not metrics["skipped"]
    before = state.create(config)
    assert same(now.frozen, before.frozen)
    for path, value in leaves(now.params).items():
        assert (value != leaves(before.params)[path]).any(), path
    after = flatten_dict(state.evaluation_params(config, now), sep="/")
    assert after.keys() == base.keys()
    for path, value in flatten_dict(widen(after), sep="/").items():
        if isinstance(value, Adapted):
            assert (np.asarray(value.base) == base[path]).all()
    moments = sum(x.size for x in jax.tree.leaves(now.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(now.params))  # AdamW's two


@pytest.mark.parametrize("row", ROWS)
def test_a_run_resumes_bit_for_bit(row, text, tmp_path):
    knobs = {f"model__{k}" if k == "tied" else f"train__{k}": v for k, v in ROWS[row].items()}
    rhythm = {"train__steps": 4, "train__checkpoint_every": 2, "train__eval_every": 2}
    config = tiny.config(text, train__trainable=row, model__layers=2, **rhythm, **knobs)
    with jax.set_mesh(tiny.mesh()):
        whole = loop.train(config, tmp_path / "whole")
        loop.train(config, tmp_path / "parts", until=3)
        parts = loop.train(config, tmp_path / "parts")
    assert same(whole, parts)
    logs = [read_metrics(tmp_path / name) for name in ("whole", "parts")]
    kept = [[{k: x for k, x in line.items() if k not in TIMINGS} for line in log] for log in logs]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("row", ["lora", "qlora"])
def test_what_is_frozen_is_saved_once_and_refused_if_it_is_another(row, text, tmp_path):
    rhythm = {"train__steps": 4, "train__checkpoint_every": 2, "train__eval_every": 2}
    config = tiny.config(text, train__trainable=row, **rhythm)
    run, base = tmp_path / "run", tmp_path / "run" / state.BASE
    with jax.set_mesh(tiny.mesh()):
        loop.train(config, run, until=3)
        held = json.loads((run / "checkpoints" / "00000002" / "meta.json").read_text())["tree"]
        assert not any(path.startswith("frozen") for path in held)
        assert any(path.startswith("params") for path in held)
        # A branch takes its trunk's, and saves it as its own.
        told = dataclasses.replace(config.train, branch=f"{run}@2")
        branched = branch.resolve(dataclasses.replace(config, train=told))
        found = loop.train(branched, tmp_path / "branch")
        assert same(found, loop.train(config, run))
    with trained.opened(trained.find(run)) as at_hand:
        assert at_hand.step == 4 and same(at_hand.params, found)

    def refused() -> None:
        words = "does not hold the frozen parameters that step 4"
        with pytest.raises(UserError, match=words), trained.opened(trained.find(run)):
            pass

    shutil.move(base, tmp_path / "kept")
    refused()
    # One that is whole in itself, but not this run's.
    other = state.create(dataclasses.replace(config, seed=1))
    with Checkpoints(base, keep=1) as saved:
        saved.save(0, other.frozen, {}, wait=True)
    refused()


@pytest.mark.parametrize("row", ROWS)
def test_sharded_as_plain(row):
    knobs: dict[str, Any] = {"accumulation": 2}
    if "lora" in row:
        knobs |= {"feedforward": "swiglu", "kv_heads": 4}
    config = configure(row, **knobs)
    alone, metrics = train(config, 2)
    for axes in (tiny.CUBE, tiny.SEQUENCE):
        with jax.set_mesh(tiny.mesh_of(axes)):
            sharded, theirs = train(config, 2)
            for path, spec in flatten_dict(trainable.trainable(config).specs, sep="/").items():
                leaf = flatten_dict(sharded.params, sep="/")[path]
                assert leaf.sharding.spec == sharding.parameter_spec(spec.dims), path
        assert float(theirs["loss"]) == pytest.approx(float(metrics["loss"]), rel=2e-6)
        for path, value in leaves(sharded.params).items():
            # Adam divides a gradient by its size: where that is rounding, its sign is too.
            off = np.abs(value - leaves(alone.params)[path])
            assert np.median(off) < 1e-5 and off.max() < 2e-2, path


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_adapters_go_with_every_optimiser(optimizer):
    schedule = "constant" if optimizer == "schedule_free" else "cosine"
    config = configure("lora", optimizer=optimizer, schedule=schedule)
    losses = []
    now = state.create(config)
    for _ in range(8):
        now, metrics = step(config, now)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.003 and not metrics["skipped"]


# --- adapters -----------------------------------------------------------------------------------


def adapted(config: Config, std: float = 0.1) -> Any:
    """Parameters with adapters that do something."""
    start = state.create(config)
    key = jax.random.key(7)
    draw = lambda p: p + std * jax.random.normal(key, p.shape)  # noqa: E731
    return trainable.trainable(config).whole(jax.tree.map(draw, start.params), start.frozen)


# That no layer takes another's adapter is seen where there are several.
KINDS = {
    "gpt2": {"layers": 2},
    "one head, rank 1": {"heads": 1, "lora_rank": 1},
    "llama": {"feedforward": "swiglu", "position": "rope", "bias": False, "kv_heads": 2},
    "some": {"lora_matrices": ("attention/query", "feedforward/*")},
    "scanned": {"scan_layers": True, "layers": 3},
    "again": {"remat": "full"},
    "mup": {"parametrisation": "mup", "mup_base_width": 8},
    "experts": {"feedforward": "swiglu_experts", "experts": 4, "shared_experts": 1},
    "capacity": {"feedforward": "gelu_experts", "experts": 4, "capacity_factor": 1.0},
}
KINDS = {kind: {"layers": 1} | knobs for kind, knobs in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_as_if_it_were_merged(kind):
    """In value; and the gradients of A and B are those of the sum, by the chain rule."""
    config = configure("lora", **KINDS[kind])
    params = adapted(config)
    whole = trainable.merged(config.model, params)
    assert (
        np.abs(logits(config, whole) - logits(config, trainable.without_adapters(params))).max()
        > 0.05
    )
    np.testing.assert_allclose(logits(config, params), logits(config, whole), rtol=0, atol=2e-5)

    micro = jax.tree.map(lambda x: x[:, 0], rows())

    def objective(p: Any) -> Any:
        return OBJECTIVE["next_token"].totals(config, p, micro, None).objective / (B * T)

    of_row = trainable.trainable(config)
    trained, frozen = of_row.split(params)
    ours = jax.jit(jax.grad(lambda t: objective(of_row.realise(t, frozen))))(trained)
    theirs = jax.jit(
        jax.grad(lambda t: objective(trainable.merged(config.model, of_row.realise(t, frozen))))
    )(trained)
    for path, slope in leaves(ours).items():
        atol = 1e-4 * np.abs(slope).max()  # the sum rounds each weight anew, in float32
        np.testing.assert_allclose(slope, leaves(theirs)[path], rtol=0, atol=atol, err_msg=path)


@pytest.mark.parametrize("kind", [*KINDS, "bfloat16"])
def test_on_a_base_of_8_bits_it_is_as_on_the_same_base_widened(kind):
    """In value and gradients: what matrices meet is not rounded."""
    knobs = KINDS.get(kind, {"dtype": "bfloat16", "layers": 1})
    config, plain = configure("qlora", **knobs), configure("lora", **knobs)
    start = state.create(config)
    draw = lambda p: p + 0.1 * jax.random.normal(jax.random.key(7), p.shape)  # noqa: E731
    factors, micro = jax.tree.map(draw, start.params), jax.tree.map(lambda x: x[:, 0], rows())

    def objective(config: Config, trained: Any, frozen: Any) -> Any:
        params = trainable.trainable(config).realise(trained, frozen)
        return OBJECTIVE["next_token"].totals(config, params, micro, None).objective / (B * T)

    def both(config: Config, frozen: Any) -> Any:
        return jax.jit(jax.value_and_grad(functools.partial(objective, config)))(factors, frozen)

    loss, slopes = both(config, start.frozen)
    wanted, theirs = both(plain, widen(start.frozen))
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    for path, slope in leaves(slopes).items():
        atol = 1e-6 * np.abs(slope).max()
        np.testing.assert_allclose(slope, leaves(theirs)[path], rtol=0, atol=atol, err_msg=path)


def test_a_base_of_8_bits_takes_a_quarter_and_is_widened_in_its_products_alone():
    """Not for all layers at once, in no pass: of a scan no float array has a stack's shape."""
    knobs = {"layers": 5, "scan_layers": True, "width": 32, "ff_dim": 96, "heads": 4}
    config = configure("qlora", **knobs)
    start, specs = state.create(config), model.abstract_params(config.model)
    stacks = []
    for path, spec in flatten_dict(specs, sep="/").items():
        leaf = flatten_dict(start.frozen, sep="/")[path]
        assert is_scaled(leaf) == (spec.kind == "matrix"), path
        if is_scaled(leaf):
            outputs = leaf.values.size // spec.size(spec.fan_in)
            assert sum(x.nbytes for x in leaf) == leaf.values.size + 4 * outputs
            stacks.append(leaf.values.shape)
    micro = jax.tree.map(lambda x: x[:, 0], rows())

    def made(config: Config, frozen: Any) -> list[Any]:
        def objective(trained: Any, frozen: Any) -> Any:
            params = trainable.trainable(config).realise(trained, frozen)
            return OBJECTIVE["next_token"].totals(config, params, micro, None).objective

        jaxpr = jax.make_jaxpr(jax.grad(objective))(start.params, frozen).jaxpr
        found = [v.aval for equation in jaxpr.eqns for v in equation.outvars]
        return [a for a in found if a.shape in stacks and a.dtype == np.float32]

    assert not made(config, start.frozen)
    # Widened before the scan it would be one.
    rounding = dataclasses.replace(config, model=dataclasses.replace(config.model, products="fp8"))
    assert made(rounding, start.frozen)


def test_a_base_of_8_bits_lies_as_its_matrices_do():
    config = configure("qlora")
    specs = flatten_dict(model.abstract_params(config.model), sep="/")
    alone = flatten_dict(state.create(config).frozen, sep="/")
    with jax.set_mesh(tiny.mesh_of(tiny.CUBE)):
        for path, leaf in flatten_dict(state.create(config).frozen, sep="/").items():
            assert same(leaf, alone[path])
            for x in jax.tree.leaves(leaf):
                dims = laid(specs[path].dims, x.shape)
                assert x.sharding.spec == sharding.parameter_spec(dims), path


def test_a_begins_uniform_as_kaiming_has_it_and_b_at_0():
    config = configure("lora", width=64, ff_dim=256, lora_rank=16)
    start = leaves(state.create(config).params)
    for path, value in start.items():
        if path.endswith("/b"):
            assert not value.any()
            continue
        fan_in = {"feedforward/down": 256}.get("/".join(path.split("/")[1:3]), 64)
        bound = fan_in**-0.5
        assert np.abs(value).max() <= bound and np.abs(value).max() > 0.98 * bound
        assert value.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    other = leaves(state.create(dataclasses.replace(config, seed=1)).params)
    assert (other["blocks/attention/query/a"] != start["blocks/attention/query/a"]).any()
    a = start["blocks/attention/query/a"]
    assert (a[0] != a[1]).any() and (a != start["blocks/attention/key/a"]).any()


def test_dropout_is_of_what_the_adapter_reads_alone():
    """Its mean is what is read; each matrix, each layer and each step draws its own."""
    config = configure("lora", lora_dropout=0.5, layers=1, lora_matrices=("attention/value",))
    params = adapted(config, 0.3)
    tokens = rows().tokens[:, 0]
    heard = jax.jit(
        lambda params, key: model.hidden(
            config.model, params, tokens, dropout_key=key, listen=("value",)
        ).heard["value"]
    )
    values = np.stack([heard(params, jax.random.key(i)) for i in range(200)])
    still = jax.jit(
        lambda p: model.hidden(config.model, p, tokens, listen=("value",)).heard["value"]
    )
    assert values.std(0).min() > 0
    spread = values.std(0).max() / len(values) ** 0.5
    assert np.abs(values.mean(0) - still(params)).max() < 6 * spread  # of 2,048 normal numbers
    # The base is not dropped: without an adapter's part nothing is drawn.
    off = jax.tree.map(
        lambda x: dataclasses.replace(x, b=0 * x.b) if isinstance(x, Adapted) else x,
        params, is_leaf=lambda x: isinstance(x, Adapted),
    )  # fmt: skip
    drawn = [heard(off, jax.random.key(i)) for i in range(2)]
    np.testing.assert_array_equal(*drawn)
    # Another program than that without dropout: a value is a sum over 32 numbers of float32.
    np.testing.assert_allclose(drawn[0], still(off), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_a_run_with_dropout_depends_on_its_seed_and_not_on_the_mesh(scan):
    config = configure("lora", lora_dropout=0.3, scan_layers=scan)
    _, metrics = train(config, 2)
    without = train(configure("lora", scan_layers=scan), 2)[1]
    assert float(metrics["loss"]) != float(without["loss"])
    again = train(config, 2)[1]
    assert float(again["loss"]) == float(metrics["loss"])
    with jax.set_mesh(tiny.mesh_of(tiny.SEQUENCE)):
        sharded = train(config, 2)[1]
    assert float(sharded["loss"]) == pytest.approx(float(metrics["loss"]), rel=2e-6)


@pytest.mark.parametrize("row", ["lora", "qlora"])
@pytest.mark.parametrize("products", ["dtype", "int8"])
def test_generation_reads_adapters(products, row):
    config = configure(row, products=products)
    params = adapted(config, 0.3)
    sample = tiny.sample(temperature=0.0, max_new_tokens=6)

    def text(params: Any) -> list[int]:
        weights = decode.cast(config.model, params)
        told = {"seed": 0, "vocab_size": V, "end_of_text": 0}
        return [
            i
            for texts in decode.stream(config.model, weights, [[1, 2, 3]], sample, **told)
            for i in texts[0].ids
        ]

    ids = text(params)
    assert ids != text(trainable.without_adapters(params))
    if products == "dtype":
        assert ids == text(trainable.merged(config.model, params))


@pytest.mark.slow
def test_a_run_on_8_bits_is_evaluated_written_and_gone_on_from(text, tmp_path, capsys):
    """By every command as one of `lora`; merged it is the rounded base with its adapters."""
    base, run = tmp_path / "base", tmp_path / "run"
    shape = {"layers": 2, "width": 32, "heads": 4, "vocab_size": 264, "context": 16}
    small = tiny.model(**shape, **{"position": "rope", "norm": "rmsnorm", "bias": False})
    small = dataclasses.replace(small, feedforward="swiglu", tied=False, ff_dim=64)
    hf.export(base, small, model.init(small, 0), "bytes")
    told = tiny.overrides(text, train__steps=4, train__trainable="qlora", mesh__data=1)
    told = [word for word in told if not word.startswith("--config.model.")]
    how = [f"--config={tiny.RECIPE}", *told, "--config.model.context=16"]

    def launch(*words: object) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    launch("train", *how, f"--from={base}", f"--workdir={run}")
    with trained.opened(trained.find(run)) as at_hand:
        config, params = at_hand.config, at_hand.params
        kept = [x for x in jax.tree.leaves(params, is_leaf=is_scaled) if is_scaled(x)]
        assert len(kept) == 7 and all(x.values.dtype == np.int8 for x in kept)
        whole = trainable.merged(config.model, params)
        # What generation and `serve` read is the same model in float32.
        plain = widen(params)
        assert same(decode.cast(config.model, params), decode.cast(config.model, plain))
    assert "perplexity" in launch("eval", f"--workdir={run}", *told)
    assert launch("generate", f"--workdir={run}", "--prompt=the ").startswith("the ")
    launch("export", f"--workdir={run}", f"--out={tmp_path / 'adapter'}", "--adapter")
    merges = launch("export", f"--workdir={run}", f"--out={tmp_path / 'whole'}")
    assert "adapters merged, which moves logits by" in merges
    written = pretrained.load(pretrained.read(tmp_path / "whole")).params
    assert same(written, whole)
    # Rounded anew from the base that the adapter names, it is the model that it was.
    more = tmp_path / "more"
    launch("train", *how, f"--from={tmp_path / 'adapter'}", f"--workdir={more}")
    with trained.opened(trained.find(more)) as at_hand:
        assert same(*map(trainable.without_adapters, (params, at_hand.params)))
    first, last = (read_metrics(folder) for folder in (more, run))
    assert first[0]["loss"] < last[0]["loss"]
    launch("replay", run, f"--from={base}")


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"trainable": "heads_only"}, "is the token table where model.tied is True"),
        ({"trainable": "last_n_layers", "last_layers": 3}, "last_layers=3 exceeds model.layers=2"),
        (
            {"trainable": "lora", "lora_matrices": ("embed/*",)},
            "'embed/\\*' matches none of the matrices of the blocks, which alone have adapters: "
            "attention/key, ",
        ),
        (
            {"trainable": "lora", "lora_dropout": 0.1, "feedforward": "gelu_experts"},
            "lora_dropout=0.1 does not go with adapters of experts",
        ),
        ({"trainable": "lora", "lora_rank": 0}, "train.lora_rank must be above 0"),
        ({"trainable": "lora", "lora_dropout": 1.0}, "train.lora_dropout must lie in"),
    ],
)
def test_what_cannot_be_is_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        setup.check_names(configure("all", **knobs))
