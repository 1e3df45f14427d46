"""What a study says becomes runs that compare: equal budgets, pairs, each run once."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gptjax import accounting, configure, model, tokenizer
from gptjax.config import Config, ConfigError, UserError
from gptjax.data.batches import Batch, Batches
from gptjax.layers.feedforward import FEEDFORWARD
from gptjax.perplexity import Score
from gptjax.study.equalise import EQUAL, TOLERANCE, Equal, equalise
from gptjax.study.spec import (
    METRICS,
    TUNING,
    Cell,
    Study,
    cells,
    cross,
    load,
    of_axes,
    tuning_cells,
)
from gptjax.study.tables import stated
from tests import tiny

REPO = Path(__file__).parents[1]
FILES = sorted(p for p in (REPO / "experiments").glob("*.py") if "STUDY" in p.read_text())
# Wide and long enough for budgets to be met to a fraction of a percent.
SIZE = {"model__layers": 4, "model__width": 64, "train__steps": 300}


def study(arms: dict[str, Any], store: Path = Path("store"), **fields: Any) -> Study:
    words = tuple(tiny.overrides(store, **SIZE))
    return Study("It helps.", tiny.RECIPE, arms, overrides=words, **fields)


def configs(of: Study) -> dict[str, Config]:
    """Each arm's config at its first seed."""
    return {cell.arm: cell.config for cell in cells(of, {}) if cell.seed == 0}


def refused(error: pytest.ExceptionInfo[ConfigError], *parts: str) -> None:
    told = str(error.value)
    assert all(part in told for part in parts), told
    assert "\n" not in told


# ---- axes


@pytest.mark.parametrize(
    "words, values",
    [
        ("model.position=rope,none", ["rope", "none"]),
        ("model.windows=(None,),(None,8)", ["(None,)", "(None,8)"]),
        ("model.windows=(None, 8),(4,),(2, 4, 8)", ["(None, 8)", "(4,)", "(2, 4, 8)"]),
        ("model.position=rope, none", ["rope", "none"]),
        ("model.kv_heads=None,1", ["None", "1"]),
    ],
)
def test_an_axis_is_split_at_commas_outside_of_brackets(words: str, values: list[str]) -> None:
    found = of_axes(tiny.RECIPE, [words])
    knob, name = words.partition("=")[0], words.partition("=")[0].rpartition(".")[2]
    assert found.settings == {knob: values[0]}
    assert found.baseline == f"{name}={values[0]}"
    assert found.arms == {f"{name}={value}": {knob: value} for value in values[1:]}
    resolved = cells(found, {})
    assert {cell.arm for cell in resolved} == {f"{name}={value}" for value in values}
    assert len({cell.address for cell in resolved}) == len(values) * found.seeds


def test_the_values_of_an_axis_reach_the_config() -> None:
    windows = configs(of_axes(tiny.RECIPE, ["model.windows=(None,),(None,8)"]))
    assert [c.model.windows for c in windows.values()] == [(None,), (None, 8)]
    heads = configs(of_axes(tiny.RECIPE, ["model.kv_heads=None,1"]))
    assert [c.model.kv_heads for c in heads.values()] == [None, 1]


def test_crossed_axes_are_every_combination() -> None:
    crossed = of_axes(tiny.RECIPE, ["model.qk_norm=False,True", "optim.peak_lr=1e-3,3e-3,1e-2"])
    found = {
        (c.model.qk_norm, c.optim.peak_lr): arm for arm, c in configs(crossed).items()
    }  # fmt: skip
    assert found == {
        (norm, float(rate)): f"qk_norm={norm}, peak_lr={rate}"
        for norm in (False, True)
        for rate in ("1e-3", "3e-3", "1e-2")
    }
    assert crossed.baseline == "qk_norm=False, peak_lr=1e-3"


@pytest.mark.parametrize(
    "axes",
    [
        ["model.position"],
        ["model.position="],
        ["model.position=rope"],
        ["model.position=rope,rope"],
        ["model.position=rope, rope"],
        ["model.position=rope,,none"],
        ["model.windows=(None,),(None,8"],
        ["model.windows=(None,),8)"],
    ],
)
def test_an_axis_without_two_values_is_refused(axes: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        of_axes(tiny.RECIPE, axes)
    refused(error, f"--axis {axes[0]}: write a knob and two or more different values")


def test_an_axis_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        of_axes(tiny.RECIPE, ["model.layers=1,2", "model.layers=3,4"])
    refused(error, "--axis model.layers is given twice")


@pytest.mark.parametrize(
    "axis, told",
    [
        ("model.positon=rope,none", "unknown config key 'model.positon' (did you mean 'model.position'?)"),
        ("peak_lr=1e-3,1e-2", "unknown config key 'peak_lr' (did you mean 'optim.peak_lr'?)"),
        ("optim=adamw,muon", "'optim' is a section of the config"),
        ("model.layers=2,two", "arm 'layers=two': --config.model.layers=two: invalid literal"),
        ("model.position=rope,ropee", "arm 'position=ropee': model.position='ropee' is not one of"),
        ("model.attention=auto,flsh", "arm 'attention=flsh': model.attention='flsh' is not one of: auto, "),
        ("data.packing=stream,maskd", "arm 'packing=maskd': data.packing='maskd' is not one of: stream, "),
        ("data.tokenizer=gpt2,gpt22", "arm 'tokenizer=gpt22': data.tokenizer='gpt22' is not one of: bytes, "),
        ("model.heads=4,5", "arm 'heads=5': model.width=128 is not divisible by model.heads=5"),
        ("optim.peak_lr=1e-3,0.001", "arm 'peak_lr=0.001' is the same as 'peak_lr=1e-3'"),
    ],
)  # fmt: skip
def test_an_axis_that_is_no_knob_or_no_value_is_refused_before_any_run(
    axis: str, told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        cells(of_axes(tiny.RECIPE, [axis]), {})
    refused(error, told)


# ---- what a study may say


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"metric": "val_los"}, "metric='val_los' is not one of: val_loss, val_bits_per_byte (did"),
        ({"equal": "flop"}, "(did you mean 'flops'?)"),
        ({"seeds": 0}, "seeds must be above 0, got 0"),
        ({"seeds": 2.5}, "seeds must be a whole number, got 2.5"),
        ({"seeds": True}, "seeds must be a whole number, got True"),
        ({"seeds": "5"}, "seeds must be a whole number, got '5'"),
        ({"seeds": 1001}, "seeds=1001 is more than 1000, where those of `tune` begin"),
        ({"tuning_seeds": 1.0}, "tuning_seeds must be a whole number, got 1.0"),
        ({"smallest": "0.01"}, "smallest must be a number, got '0.01'"),
        ({"smallest": math.nan}, "smallest must be above 0, got nan"),
        ({"smallest": math.inf}, "smallest must be above 0, got inf"),
        ({"name": None}, "name must be a text, got None"),
        ({"metric": ["val_loss"]}, "metric must be a text, got ['val_loss']"),
        ({"settings": ["seed"]}, "settings must be a mapping, got ['seed']"),
        ({"scales": ("small",)}, "scales must be a mapping, got ('small',)"),
        ({"scales": {"small": 3}}, "write a name and its knobs, not 'small': 3"),
        ({"scales": {3: {}}}, "write a name and its knobs, not 3: {}"),
        ({"tune": {"optim.b1": 0.9}}, "optim.b1 must be a tuple of values, got 0.9"),
        ({"tuning_seeds": 0}, "tuning_seeds must be above 0"),
        ({"smallest": 0.0}, "smallest must be above 0"),
        ({"baseline": "rope"}, "'rope' is the baseline: name the arm otherwise"),
        ({"tune": {"train.steps": (1, 2)}}, "train.steps is no optim.* knob"),
        ({"tune": {"optim.b1": ()}}, "optim.b1 must be a tuple of values, got ()"),
        ({"tune": {"optim.b1": "0.9"}}, "optim.b1 must be a tuple of values, got '0.9'"),
        ({"tune": {"optim.b2": (0.9,)}}, "optim.b2 is tuned for each arm and scale"),
        (
            {"tune": {"optim.b1": (0.9,)}, "scales": {"": {"optim.b1": 0.5}}},
            "optim.b1 is tuned for each arm and scale",
        ),
        ({"scales": {}}, "scales is empty"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(fields: dict[str, Any], told: str) -> None:
    arms = {"rope": {"model.position": "rope"}, "slow": {"optim.b2": 0.99}}
    with pytest.raises(ConfigError) as error:
        study(arms, **fields)
    refused(error, told)


def test_overrides_are_words() -> None:
    with pytest.raises(ConfigError) as error:
        Study("?", tiny.RECIPE, {}, overrides="--config.seed=1")  # type: ignore[arg-type]
    refused(error, "overrides must be a tuple of words, got '--config.seed=1'")


def test_no_tuning_has_a_name_that_is_no_row() -> None:
    with pytest.raises(ConfigError) as error:
        tuning_cells(study({}, tune={"optim.schedule": ("cosine", "cosin")}))
    refused(error, "optim.schedule='cosin' is not one of: ")


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400"])
def test_no_arm_and_no_tuning_has_a_rate_that_is_no_number(value: str) -> None:
    for asked in (
        study({"wild": {"optim.peak_lr": value}}),
        study({"wild": {"optim.peak_lr": float(value)}}),
        study({}, tune={"optim.peak_lr": (1e-3, float(value))}),
        of_axes(tiny.RECIPE, [f"optim.peak_lr=1e-3,{value}"]),
    ):
        with pytest.raises(ConfigError) as error:
            cells(asked, {})
        refused(error, "optim.peak_lr must be finite, got ")


def test_no_seed_of_a_study_wraps() -> None:
    last = 2**32 - 1
    for fields in ({"seeds": 2}, {"seeds": 1, "tune": {"optim.b1": (0.8, 0.9)}}):
        asked = study({}, settings={"seed": last}, **fields)
        with pytest.raises(ConfigError) as error:
            cells(asked, {})
            tuning_cells(asked)
        refused(error, "seed must lie in [0, 2^32), got ")
    assert [c.config.seed for c in cells(study({}, settings={"seed": last}, seeds=1), {})] == [last]


@pytest.mark.parametrize(
    "arms, told",
    [
        ({"again": {"model.position": "learned"}}, ("arm 'again' is the same as 'base'",)),
        (
            {"one": {"model.norm": "rmsnorm"}, "two": {"model.norm": "rmsnorm"}},
            ("arm 'two' is the same as 'one'",),
        ),
        ({"x": {"model.nrom": "rmsnorm"}}, ("arm 'x'", "did you mean 'model.norm'?")),
        ({"x": {"model.norm": "rms"}}, ("arm 'x'", "model.norm='rms' is not one of: layernorm")),
        ({"x": {"optim.optimizer": "mun"}}, ("arm 'x'", "(did you mean 'muon'?)")),
        ({"x": {"train.steps": 20}}, ("arm 'x'", "train.steps, which equal='tokens' solves for")),
        ({"x": {"seed": 4}}, ("arm 'x' shares runs with 'base': set their seeds 5 apart",)),
        ({"x": {"eval.stride": 8}}, ("arm 'x' is scored on other text", "eval.*")),
        ({"x": {"data.sources": ("y",)}}, ("arm 'x' is scored on other text", "data.sources")),
    ],
)
def test_an_arm_that_cannot_be_judged_is_refused(arms: dict[str, Any], told: Any) -> None:
    with pytest.raises(ConfigError) as error:
        cells(study(arms), {})
    refused(error, *told)


def test_the_same_recipe_with_seeds_apart_is_an_arm() -> None:
    found = cells(study({"again": {"seed": 5}}), {})
    assert [cell.config.seed for cell in found] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [cell.seed for cell in found] == [0, 1, 2, 3, 4] * 2


def test_a_tuned_knob_that_is_none_is_refused_before_any_run() -> None:
    tuned = study({"x": {"model.norm": "rmsnorm"}}, tune={"optim.peak_rl": (1e-3, 1e-2)})
    with pytest.raises(ConfigError) as error:
        tuning_cells(tuned)
    refused(error, "did you mean 'optim.peak_lr'?")


def test_another_tokenizer_compares_by_byte_alone() -> None:
    arms = {"gpt2": {"data.tokenizer": "gpt2", "model.vocab_size": 50304, "data.sources": ("y",)}}
    with pytest.raises(ConfigError) as error:
        cells(study(arms), {})
    refused(error, "arm 'gpt2' has another tokenizer", "metric='val_bits_per_byte'")
    found = configs(study(arms, metric="val_bits_per_byte"))
    assert found["gpt2"].data.tokenizer == "gpt2"


def test_who_overrides_whom() -> None:
    """The recipe, the study, the scale, the command line, the arm: each the one before."""
    of = Study(
        "?", tiny.RECIPE, {"x": {"optim.b1": 0.4}},
        settings={"optim.b1": 0.1, "optim.b2": 0.1, "optim.eps": 0.1, "optim.momentum": 0.1},
        scales={"": {"optim.b1": 0.2, "optim.b2": 0.2, "optim.eps": 0.2}},
        overrides=("--config.optim.b1=0.3", "--config.optim.b2=0.3"),
    )  # fmt: skip
    for arm, b1 in (("base", 0.3), ("x", 0.4)):
        o = configs(of)[arm].optim
        assert (o.b1, o.b2, o.eps, o.momentum) == (b1, 0.3, 0.2, 0.1)


# ---- a study's file


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_study_of_the_project_resolves(path: Path) -> None:
    found = load(path)
    assert found.name == path.stem and found.hypothesis
    # A law is fitted to all runs of a ladder, and the place of a best rate needs no verdict.
    assert found.seeds >= (1 if found.name in ("ladder", "transfer") else 3)
    first = next(iter(cross(found.tune).values()), {})
    decide = cells(found, {(scale, arm): first for scale in found.scales for arm in found.all_arms})
    assert len(decide) == len(found.scales) * (1 + len(found.arms)) * found.seeds
    assert len({cell.address for cell in decide}) == len(decide)
    values = math.prod(len(v) for v in found.tune.values()) if found.tune else 0
    tuning = {cell.address for cell, _ in tuning_cells(found)}
    arms = len(found.scales) * (1 + len(found.arms))
    assert len(tuning) == arms * values * found.tuning_seeds
    assert tuning.isdisjoint(cell.address for cell in decide)


@pytest.mark.parametrize(
    "text, told",
    [
        (None, "no study .*x.py: name a file"),
        ("STUDY = 1", "x.py must define STUDY = Study"),
        ("1 / 0", "x.py cannot be read: ZeroDivisionError: division by zero"),
        ("def", "x.py cannot be read: SyntaxError"),
        (
            "from gptjax.study.spec import Study\nSTUDY = Study('?', 'x', {}, seeds=0)",
            "x.py: seeds must be above 0",
        ),
    ],
)
def test_a_file_that_holds_no_study_is_refused(text: str | None, told: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "x.py").write_text(text)
    with pytest.raises(UserError, match=told) as error:
        load(tmp_path / "x.py")
    assert "\n" not in str(error.value)


# ---- equal budgets, counted again


def real_parameters(config: Config) -> int:
    """Of the model's own tree of shapes."""
    leaves = jax.tree.leaves(model.abstract_params(config.model))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def counted_tokens(config: Config) -> int:
    return sum(config.data.batch_size * config.model.context for _ in range(config.train.steps))


def counted_flops(config: Config) -> float:
    """Two for each multiply-add, forward and twice that backward, pair of tokens by pair."""
    m = config.model
    blocks = jax.tree_util.tree_leaves_with_path(model.abstract_params(m)["blocks"])
    matrices = ("query", "key", "value", "out", "up", "gate", "down")
    kernels = [s.shape for path, s in blocks if path[-1].key in matrices]
    assert len(kernels) == (7 if m.feedforward in ("swiglu", "geglu") else 6)
    products = sum(math.prod(shape) for shape in kernels) + m.width * m.vocab_size
    T = m.context
    pairs = sum(
        sum(1 for t in range(T) for s in range(t + 1) if window is None or t - s < window)
        for window in m.layer_windows
    )
    scores_and_values = 2 * m.heads * m.H * pairs / T
    return counted_tokens(config) * 6 * (products + scores_and_values)


COUNTED: dict[str, Callable[[Config], float]] = {
    "tokens": counted_tokens,
    "flops": counted_flops,
    "parameters": real_parameters,
}
ARMS: dict[str, dict[str, Any]] = {
    "layers": {"model.layers": 3},
    "deeper": {"model.layers": 12},
    "wider": {"model.width": 80},
    "gated": {"model.feedforward": "swiglu"},
    "batch": {"data.batch_size": 24},
    "windows": {"model.windows": (4, None)},
    "context": {"model.context": 32},
    "vocabulary": {"model.vocab_size": 320},
    "untied": {"model.tied": False},
    "one key-value head": {"model.kv_heads": 1},
    "QK-norm": {"model.qk_norm": True},
    "wide heads": {"model.head_dim": 24},
    "no biases": {"model.bias": False},
    "rope": {"model.position": "rope"},
}


def test_a_new_budget_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a batch, which no other row solves for: planted, solved, told."""

    def solve(config: Config, base: Config, fixed: Collection[str]) -> Config:
        data = dataclasses.replace(config.data, batch_size=base.data.batch_size)
        return dataclasses.replace(config, data=data)

    own = ("data.batch_size",)
    row = Equal("rows of a step", own, lambda config: float(config.data.batch_size), solve)
    monkeypatch.setitem(EQUAL, "rows", row)
    asked = study({"wider": {"model.width": 80}, "rope": {"model.position": "rope"}}, equal="rows")
    assert "Held equal: rows of a step" in stated(asked)
    base = budget_base()
    large = configure.override(base, [f"--config.data.batch_size={2 * base.data.batch_size}"])
    found, solved = equalise(large, base, "rows", ())
    assert (found, solved) == (base, {"data.batch_size": base.data.batch_size})
    with pytest.raises(ConfigError, match="it sets data.batch_size, which equal='rows' solves for"):
        equalise(large, base, "rows", own)


@pytest.mark.parametrize("equal", COUNTED)
@pytest.mark.parametrize("arm", ARMS)
def test_budgets_are_equal(arm: str, equal: str) -> None:
    base = budget_base()
    said = configure.override(base, [f"--config.{k}={v}" for k, v in ARMS[arm].items()])
    found, solved = equalise(said, base, equal, ARMS[arm])
    count = COUNTED[equal]
    assert count(found) == pytest.approx(count(base), rel=TOLERANCE)
    # What the arm says stands, and nothing moves but what is told.
    moved = configure.difference(said, found)
    assert {knob: new for knob, (_, new) in moved.items()} == solved
    assert set(solved).isdisjoint(ARMS[arm])
    allowed = {"train.steps"} if equal in ("tokens", "flops") else {"model.width", "model.ff_dim"}
    assert set(solved) <= allowed


@functools.cache
def budget_base() -> Config:
    return tiny.config(Path("store"), **SIZE)


def test_arms_would_not_be_equal_by_themselves() -> None:
    """So the comparison above can fail."""
    base = budget_base()
    for equal, arm in (("tokens", "batch"), ("flops", "layers"), ("parameters", "gated")):
        said = configure.override(base, [f"--config.{k}={v}" for k, v in ARMS[arm].items()])
        assert COUNTED[equal](said) != pytest.approx(COUNTED[equal](base), rel=2 * TOLERANCE)


def test_a_study_solves_for_each_arm_and_tells_it() -> None:
    of = study(
        {"layers": {"model.layers": 2}, "lr": {"optim.peak_lr": 0.1}}, equal="flops", seeds=3
    )
    by_arm = {cell.arm: cell for cell in cells(of, {})}
    base, layers, rate = by_arm["base"], by_arm["layers"], by_arm["lr"]
    assert base.solved == rate.solved == {}
    assert layers.solved == {"train.steps": layers.config.train.steps}
    assert layers.config.train.steps > base.config.train.steps == rate.config.train.steps == 300
    assert counted_flops(layers.config) == pytest.approx(counted_flops(base.config), rel=TOLERANCE)


@pytest.mark.parametrize(
    "arm, equal, told",
    [
        ({"model.layers": 40}, "flops", "flops cannot be made equal"),
        ({"data.batch_size": 4096}, "tokens", "tokens cannot be made equal"),
        ({"model.vocab_size": 50304, "model.width": 64}, "parameters", "parameters cannot be"),
        ({"model.width": 96, "model.ff_dim": 384}, "parameters", "parameters cannot be"),
        ({"train.steps": 100}, "tokens", "it sets train.steps, which equal='tokens' solves for"),
        ({"train.steps": 100}, "flops", "it sets train.steps, which equal='flops' solves for"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(arm: dict[str, Any], equal: str, told: str) -> None:
    of = study({"x": arm}, equal=equal)
    words = (*of.overrides, "--config.train.steps=9")  # few, so that one more is a large share
    with pytest.raises(ConfigError) as error:
        cells(dataclasses.replace(of, overrides=words), {})
    refused(error, "arm 'x'", told)
    if "cannot" in told:
        refused(error, "hold something else equal: tokens, flops, parameters")


def test_with_equal_parameters_an_arm_may_train_longer() -> None:
    found = configs(study({"longer": {"train.steps": 400}}, equal="parameters"))
    assert [c.train.steps for c in found.values()] == [300, 400]


@settings(max_examples=20, deadline=None)
@given(
    equal=st.sampled_from(list(COUNTED)),
    layers=st.integers(1, 9),
    heads=st.sampled_from([2, 4, 8]),
    width=st.integers(1, 5).map(lambda n: 16 * n),
    kind=st.sampled_from(list(FEEDFORWARD)),
    tied=st.booleans(),
    rows=st.integers(1, 40),
    window=st.sampled_from([None, 1, 5]),
)
def test_any_arm_is_equal_or_refused(
    equal: str,
    layers: int,
    heads: int,
    width: int,
    kind: str,
    tied: bool,
    rows: int,
    window: int | None,
) -> None:
    """With the formulas of accounting, which tests/test_accounting.py audits."""
    base = budget_base()
    m = dataclasses.replace(
        base.model, layers=layers, heads=heads, width=width, feedforward=kind, tied=tied,
        windows=(window, None),
    )  # fmt: skip
    arm = dataclasses.replace(base, model=m, data=dataclasses.replace(base.data, batch_size=rows))

    def count(config: Config) -> float:
        tokens = config.train.steps * config.data.batch_size * config.model.context
        return {
            "tokens": tokens,
            "flops": tokens * accounting.train_flops_per_token(config.model, causal=True),
            "parameters": accounting.parameters(config.model)["total"],
        }[equal]

    def steps(config: Config, n: int) -> Config:
        return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=n))

    target = count(base)
    found = None
    with contextlib.suppress(ConfigError):
        found, _ = equalise(arm, base, equal, ())
    if found is None:
        assume(equal != "parameters")  # a width is found or not; steps can be tried
        nearest = min(abs(count(steps(arm, n)) - target) for n in range(1, 3000))
        assert nearest > TOLERANCE * target
        return
    miss = abs(count(found) - target)
    assert miss <= TOLERANCE * target
    if equal != "parameters":
        for beside in (found.train.steps - 1, found.train.steps + 1):
            assert beside < 1 or miss <= abs(count(steps(found, beside)) - target)
        assert steps(found, 300) == steps(arm, 300)


# ---- pairs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_store(tmp_path_factory.mktemp("text"))


# Few, for initial values take seconds to compile.
SHARING: dict[str, dict[str, Any]] = {
    "attention": {"model.position": "rope", "model.qk_norm": True, "model.norm": "rmsnorm"},
    "feedforward": {
        "model.feedforward": "swiglu", "model.ff_dim": 256, "model.tied": False,
        "optim.optimizer": "muon", "optim.weight_decay": 0.0, "train.accumulation": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def paired(store: Path) -> dict[tuple[str, int], Config]:
    found = cells(study(SHARING, store, seeds=2), {})
    return {(cell.arm, cell.seed): cell.config for cell in found}


def rows(config: Config, step: int) -> Batch[np.ndarray]:
    vocabulary = tokenizer.load(config.data.tokenizer)
    batches = Batches(config.data, config.model.context, config.seed, "train", vocabulary)
    return batches.rows(step, 0, config.data.batch_size)


@pytest.mark.parametrize("arm", SHARING)
def test_a_pair_sees_the_same_batches(arm: str, paired: dict[tuple[str, int], Config]) -> None:
    for seed in (0, 1):
        for step in (0, 7, 299):  # in the first epoch and in later ones
            ours, theirs = rows(paired[arm, seed], step), rows(paired["base", seed], step)
            assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
    assert (rows(paired[arm, 0], 7).tokens != rows(paired[arm, 1], 7).tokens).any()


@functools.cache
def initial(config: Any, seed: int) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(model.init(config, seed))
    return {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}


@pytest.mark.parametrize("arm", SHARING)
def test_a_pair_begins_with_the_same_values(
    arm: str, paired: dict[tuple[str, int], Config]
) -> None:
    ours = initial(paired[arm, 1].model, paired[arm, 1].seed)
    theirs = initial(paired["base", 1].model, paired["base", 1].seed)
    shared = [n for n in ours if n in theirs and ours[n].shape == theirs[n].shape]
    assert all((ours[name] == theirs[name]).all() for name in shared)
    drawn = [name for name in shared if np.unique(ours[name]).size > 2]
    assert len(drawn) >= 6  # token table, four projections, feed-forward
    other = initial(paired["base", 0].model, paired["base", 0].seed)
    assert all((ours[name] != other[name]).any() for name in drawn)


# ---- addresses


def test_equal_configs_of_two_studies_are_one_cell() -> None:
    one = study({"rope": {"model.position": "rope"}}, seeds=2)
    other = Study(
        "Another claim.", tiny.RECIPE, {"learned": {"model.position": "learned"}},
        baseline="rotary", settings={"model.position": "rope"}, seeds=3, smallest=0.1,
        overrides=one.overrides, name="other",
    )  # fmt: skip
    mine = {(c.arm, c.seed): c.address for c in cells(one, {})}
    theirs = {(c.arm, c.seed): c.address for c in cells(other, {})}
    for seed in (0, 1):
        assert mine["rope", seed] == theirs["rotary", seed]
        assert mine["base", seed] == theirs["learned", seed]
    assert len({*mine.values(), *theirs.values()}) == 6


def test_any_changed_knob_is_another_cell() -> None:
    config = budget_base()
    found = {"": Cell("", "base", 0, config, {}).address}
    sections = [f.name for f in dataclasses.fields(config) if f.name != "seed"]
    for section in sections:
        for field in dataclasses.fields(getattr(config, section)):
            changed = copy.deepcopy(config)
            # Past the checks: most knobs have few values that go with the others'.
            object.__setattr__(getattr(changed, section), field.name, "another")
            found[f"{section}.{field.name}"] = Cell("", "base", 0, changed, {}).address
    found["seed"] = Cell("", "base", 0, dataclasses.replace(config, seed=1), {}).address
    assert len(found) > 70
    assert len(set(found.values())) == len(found)


def test_names_and_what_was_solved_are_no_part_of_an_address() -> None:
    config = budget_base()
    one = Cell("", "base", 0, config, {})
    assert one.address == Cell("large", "x", 3, config, {"train.steps": 300}).address
    assert len(one.address) == 16


# ---- tuning


def test_arms_are_tuned_apart_with_seeds_of_their_own() -> None:
    tune = {"optim.peak_lr": (1e-3, 1e-2), "optim.b2": (0.9, 0.99)}
    of = study({"muon": {"optim.optimizer": "muon"}}, tune=tune, tuning_seeds=2, seeds=3)
    tuning = tuning_cells(of)
    assert len(tuning) == 2 * 4 * 2
    for cell, values in tuning:
        assert (cell.config.optim.peak_lr, cell.config.optim.b2) == tuple(values.values())
        assert cell.config.optim.optimizer == ("muon" if cell.arm == "muon" else "adamw")
    # Nothing decides before it is tuned, and then at what was chosen.
    assert cells(of, {}) == []
    chosen = {"optim.peak_lr": 1e-2, "optim.b2": 0.9}
    found = cells(of, {("", "muon"): chosen})
    assert [cell.arm for cell in found] == ["muon"] * 3
    for cell in found:
        assert (cell.config.optim.peak_lr, cell.config.optim.b2) == (1e-2, 0.9)
        assert cell.solved == chosen
    seeds = {cell.config.seed for cell, _ in tuning}
    assert seeds == {TUNING, TUNING + 1}
    assert seeds.isdisjoint(cell.config.seed for cell in found)


def test_every_metric_is_recorded() -> None:
    """A study's metric is a field that a run writes beside its loss."""
    assert {f"val_{name}" for name in Score(1.0, 1, 1).values} >= set(METRICS)
