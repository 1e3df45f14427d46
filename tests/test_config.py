"""The one strict crossing into a config: what it refuses, and what it leaves alone."""

from __future__ import annotations

import ast
import copy
import dataclasses
import hashlib
import importlib
import re
import sys
import types
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import decode, model, setup, state
from gptjax.config import (
    Config,
    ConfigError,
    Mesh,
    UserError,
    choose,
    fingerprint,
    flatten,
    from_dict,
    off,
    off_values,
    recorded,
    to_dict,
)
from gptjax.data.batches import Batches
from gptjax.layers.feedforward import hidden_width
from gptjax.tokenizer import load
from tests import tiny

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # recipes import each other from the root, as under launch.py

from configs import base  # noqa: E402

TREE = base.get_config().to_dict()
BASE_FINGERPRINT = "6955bc6b59cb93678abda9f6eed46dafb2142a1f5532cf16a464cb991952550a"  # of the base recipe, for ever, unless that recipe changes


def changed(**changes) -> dict:
    """The base recipe's tree with dotted keys changed, "model.width" as model__width."""
    tree = copy.deepcopy(TREE)
    for key, value in changes.items():
        *sections, name = key.split("__")
        part = tree
        for section in sections:
            part = part[section]
        part[name] = value
    return tree


def refusal(tree: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        from_dict(tree)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- keys and types -----------------------------------------------------------------------


def test_an_unknown_key_is_named_with_the_nearest_and_all_valid_ones():
    message = refusal(changed(model__widht=64))
    assert "'model.widht'" in message and "width'?)" in message
    assert all(
        f.name in message for f in dataclasses.fields(typing.get_type_hints(Config)["model"])
    )
    message = refusal(changed(optimiser={}))
    assert "'optimiser'" in message and "(did you mean 'optim'?)" in message
    assert "did you mean" not in refusal(changed(zzz=1))


def test_missing_keys_are_all_named():
    tree = changed()
    del tree["model"]["width"], tree["model"]["heads"]
    assert refusal(tree) == "missing config keys: model.width, model.heads"
    assert refusal({}).startswith("missing config keys: seed, model, ")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model__layers": "4"}, "model.layers must be int, got '4' (str)"),
        ({"model__layers": 4.0}, "model.layers must be int, got 4.0 (float)"),
        ({"model__layers": True}, "model.layers must be int, got True (bool)"),
        ({"model__layers": None}, "model.layers must be int, got None (NoneType)"),
        ({"model__kv_heads": 1.5}, "model.kv_heads must be int or None, got 1.5 (float)"),
        ({"model__bias": 1}, "model.bias must be bool, got 1 (int)"),
        ({"model__norm": None}, "model.norm must be str, got None (NoneType)"),
        ({"model__dropout": False}, "model.dropout must be float, got False (bool)"),
        ({"model__windows": [8, "all"]}, "model.windows[1] must be int or None, got 'all' (str)"),
        ({"data__sources": "shakespeare"}, "data.sources must be tuple, got 'shakespeare' (str)"),
        ({"data__weights": [1, "2"]}, "data.weights[1] must be float, got '2' (str)"),
        ({"model": 3}, "model must be a section, got 3"),
    ],
)
def test_an_ill_typed_value_is_told_with_its_path_and_the_valid_types(change, message):
    assert refusal(changed(**change)).startswith(message)


def test_int_counts_as_float_and_list_as_tuple():
    config = from_dict(changed(optim__peak_lr=1, model__windows=[None, 8], data__weights=[2]))
    assert type(config.optim.peak_lr) is float
    assert config.model.windows == (None, 8) and config.data.weights == (2.0,)
    assert config == from_dict(
        changed(optim__peak_lr=1.0, model__windows=(None, 8), data__weights=(2.0,))
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__width": 130}, "model.width=130 is not divisible by model.heads=4: change one"),
        ({"model__kv_heads": 3}, "model.heads=4 is not a multiple of model.kv_heads=3"),
        ({"model__kv_heads": 8}, "model.heads=4 is not a multiple of model.kv_heads=8"),
        ({"model__windows": ()}, "model.windows must hold a width above 0"),
        ({"model__windows": (0,)}, "model.windows must hold a width above 0"),
        ({"model__dtype": "float16"}, "model.dtype='float16' is not one of: float32, bfloat16"),
        ({"model__dropout": 1.0}, r"model.dropout must lie in [0, 1), got 1.0"),
        ({"model__layers": 0}, "model.layers must be above 0, got 0"),
        ({"model__rope_base": float("nan")}, "model.rope_base must be finite, got nan"),
        ({"optim__peak_lr": -1e-3}, "optim.peak_lr must be above 0, got -0.001"),
        ({"optim__b2": 1.0}, "optim.b2 must lie in [0, 1), got 1.0"),
        ({"optim__ema_decay": 1.0}, "optim.ema_decay must lie in [0, 1), got 1.0"),
        ({"optim__warmup_steps": -1}, "optim.warmup_steps must not be negative"),
        ({"optim__weight_decay": -0.1}, "optim.weight_decay must not be negative"),
        ({"optim__z_loss": -1.0}, "optim.z_loss must not be negative"),
        ({"optim__decay_fraction": 0.0}, "optim.decay_fraction must lie in (0, 1]"),
        ({"optim__final_lr_fraction": 1.5}, "optim.final_lr_fraction must lie in [0, 1]"),
        ({"data__sources": ()}, "data.sources is empty"),
        ({"data__weights": (1.0, 2.0)}, "data.weights must hold one weight above 0 for each of"),
        ({"data__weights": (0.0,)}, "data.weights must hold one weight above 0 for each of"),
        ({"train__accumulation": 3}, "data.batch_size=8 is not divisible by train.accumulation=3"),
        ({"train__steps": 0}, "train.steps must be above 0, got 0"),
        ({"train__keep_every": 0}, "train.keep_every must be above 0, got 0"),
        ({"train__keep_every": 375}, "train.keep_every=375 is not a multiple of train.checkpoint_"),
        ({"train__keep_every": 125}, "train.keep_every=125 is not a multiple of train.checkpoint_"),
        ({"mesh__fsdp": 0}, "mesh.fsdp must be above 0, got 0"),
        ({"eval__stride": 257}, "eval.stride=257 exceeds the evaluation context of 256 tokens"),
        ({"eval__context": 64, "eval__stride": 65}, "eval.stride=65 exceeds"),
        ({"sample__temperature": -0.1}, "sample.temperature must not be negative"),
        ({"sample__top_p": 0.0}, "sample.top_p must lie in (0, 1], got 0.0"),
    ],
)
def test_an_impossible_combination_is_refused(changes, message):
    assert refusal(changed(**changes)).startswith(message)


def alternatives(hint) -> tuple:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def knobs_of(kind: type) -> list[tuple[str, bool]]:
    """Each knob whose values are of `kind`, and whether it holds several."""
    found = []
    for section in typing.get_type_hints(Config).values():
        hints = typing.get_type_hints(section) if dataclasses.is_dataclass(section) else {}
        for name, hint in hints.items():
            for option in alternatives(hint):
                several = typing.get_origin(option) is tuple
                inner = typing.get_args(option)[0] if several else option
                if kind in alternatives(inner):
                    found.append((f"{section.__name__.lower()}.{name}", several))
    return found


@pytest.mark.parametrize(
    "value", [float("inf"), float("-inf"), float("nan"), 10**400], ids=lambda v: repr(v)[:5]
)
def test_no_knob_takes_what_is_no_number(value):
    knobs = knobs_of(float)
    assert len(knobs) > 20 and ("data.weights", True) in knobs
    for knob, several in knobs:
        given = (1.0, value) if several else value
        message = refusal(changed(**{knob.replace(".", "__"): given}))
        assert re.match(rf"{re.escape(knob)}(\[1\])? must be finite, got ", message)


def test_no_knob_takes_a_number_that_a_device_cannot_count_to():
    knobs = knobs_of(int)
    assert len(knobs) > 20
    for knob, several in knobs:
        given = (2**31,) if several else 2**31
        message = refusal(changed(**{knob.replace(".", "__"): given}))
        assert message.startswith(f"{knob} must be below 2^31, got ")


@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 7, 10**30])
def test_a_seed_that_would_wrap_is_refused_wherever_one_is_taken(seed, tmp_path):
    message = f"seed must lie in [0, 2^32), got {seed}"
    config, vocabulary = from_dict(TREE), load("bytes")
    store = tiny.make_store(tmp_path)
    data = dataclasses.replace(config.data, sources=(str(store),))
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(config, seed=seed)
    assert str(caught.value) == message
    for use in (
        lambda: model.init(tiny.MODEL, seed),
        lambda: Batches(data, 8, seed, "train", vocabulary),
        lambda: next(
            decode.stream(
                tiny.MODEL,
                {},
                [[1]],
                config.sample,
                seed=seed,
                vocab_size=64,
                end_of_text=0,
            )
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            use()
        assert str(caught.value) == message


def test_the_largest_seed_is_used_whole():
    whole = model.init(tiny.MODEL, 2**32 - 1)["embed"]["tokens"]
    other = model.init(tiny.MODEL, 2**31 - 1)["embed"]["tokens"]
    assert not (whole == other).any()


def test_what_only_looks_impossible_is_allowed():
    assert from_dict(changed(model__width=130, model__head_dim=32)).model.H == 32
    config = from_dict(changed(eval__stride=256, sample__top_p=1.0, model__kv_heads=1))
    assert config.model.K == 1


def test_derived_sizes():
    def sizes(**changes):
        m = from_dict(changed(**changes)).model
        return m.K, m.H, hidden_width(m)

    assert sizes() == (4, 32, 512)
    # 8/3 of 128 is 341.3: the next multiple of 64.
    assert sizes(model__feedforward="swiglu", model__kv_heads=2) == (2, 32, 384)
    assert sizes(model__feedforward="geglu", model__width=192) == (4, 48, 512)
    assert sizes(model__ff_dim=100, model__head_dim=8) == (4, 8, 100)
    windows = from_dict(changed(model__windows=(None, 8, 16))).model.layer_windows
    assert windows == (None, 8, 16, None)


# --- what was recorded before a knob existed ------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LaterMesh(Mesh):
    pipeline: int = dataclasses.field(metadata=off(1))


@dataclasses.dataclass(frozen=True)
class Probe:
    every: int | None = dataclasses.field(metadata=off(None))


@dataclasses.dataclass(frozen=True)
class Later:
    """A version to come: a knob more in a section, and one more section."""

    seed: int
    mesh: LaterMesh
    probe: Probe


@dataclasses.dataclass(frozen=True)
class Before:
    """Its predecessor."""

    seed: int
    mesh: Mesh


def test_a_knob_that_is_not_recorded_is_off():
    mesh = dataclasses.asdict(tiny.axes(data=None))
    now = recorded({"seed": 3, "mesh": mesh}, Later)
    assert (now.seed, now.mesh.pipeline, now.probe.every) == (3, 1, None)
    before = recorded({"seed": 3, "mesh": mesh}, Before)
    assert fingerprint(now) == fingerprint(before)
    on = dataclasses.replace(now, probe=Probe(every=5))
    assert fingerprint(on) != fingerprint(now)
    assert recorded(to_dict(on), Later) == on
    # A recipe states all, and a knob without an off-value is needed everywhere.
    with pytest.raises(ConfigError, match=r"missing config keys: probe$"):
        from_dict({"seed": 3, "mesh": mesh}, Later)
    with pytest.raises(ConfigError, match=r"missing config keys: mesh.fsdp$"):
        recorded({"seed": 3, "mesh": {"data": 1, "tensor": 1}}, Later)
    with pytest.raises(ConfigError, match=r"unknown config key 'mesh.pipelines' \(did you mean"):
        recorded({"seed": 3, "mesh": {**mesh, "pipelines": 1}}, Later)


def test_off_values_never_change():
    """Fingerprints that were recorded rest on them: here they may only be added."""
    assert fingerprint(from_dict(TREE)) == BASE_FINGERPRINT
    without = changed()
    for section, cls in typing.get_type_hints(Config).items():
        for name, value in off_values(cls).items() if dataclasses.is_dataclass(cls) else ():
            if TREE[section][name] == value:
                del without[section][name]
    assert from_dict(TREE) == recorded(without)
    assert len(flatten(without)) < len(flatten(TREE))


# --- round trip and fingerprint -----------------------------------------------------------

positive = st.floats(1e-30, 1e30)
share = st.floats(0, 1, exclude_max=True)
count = st.integers(1, 2**31 - 1)


@settings(deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**32 - 1),
            "model__windows": st.lists(st.none() | count, min_size=1).map(tuple),
            "model__rope_base": positive,
            "model__attention_softcap": st.none() | positive,
            "model__tied": st.booleans(),
            "optim__peak_lr": positive,
            "optim__ema_decay": st.none() | share,
            "data__sources": st.lists(st.text(), min_size=1).map(tuple),
            "train__steps": count,
            "sample__prompt": st.text(),
            "sample__stop": st.none() | st.text(),
            "mesh__data": st.none() | count,
        }
    )
)
def test_round_trip(changes):
    config = from_dict(changed(**changes))
    assert from_dict(to_dict(config)) == config
    assert fingerprint(from_dict(to_dict(config))) == fingerprint(config)


def test_to_dict_is_plain_json():
    def plain(value):
        if isinstance(value, dict):
            return all(type(key) is str and plain(v) for key, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str)

    assert plain(to_dict(from_dict(TREE)))


@dataclasses.dataclass(frozen=True)
class Toy:
    b: float
    a: tuple[int | None, ...]


def test_a_fingerprint_is_the_hash_of_canonical_json():
    # Spelled out, because records of old runs hold fingerprints: they must not change.
    text = b'{"a": [1, null], "b": 0.001}'
    assert fingerprint(Toy(b=1e-3, a=(1, None))) == hashlib.sha256(text).hexdigest()


def test_every_knob_changes_the_fingerprint():
    seen = {fingerprint(from_dict(TREE))}
    flat = flatten(TREE)
    for path in flat:
        others = (1, 2, 4096, 500, 0.5, True, False, "x", "bfloat16", ("x",), (7,), (7, 8))
        for other in others:
            try:
                config = from_dict(changed(**{path.replace(".", "__"): other}))
            except ConfigError:
                continue
            if config != from_dict(TREE):
                seen.add(fingerprint(config))
                break
        else:
            pytest.fail(f"found no other valid value of {path}")
    assert len(seen) == len(flat) + 1


# --- base.py states every knob --------------------------------------------------------------


def fields(cls: type, path: str = "") -> set[str]:
    names = set()
    for name, hint in typing.get_type_hints(cls).items():
        nested = dataclasses.is_dataclass(hint)
        names |= fields(hint, f"{path}{name}.") if nested else {path + name}
    return names


def test_the_base_recipe_has_every_field_and_no_other():
    assert set(flatten(TREE)) == fields(Config)
    source = (ROOT / "configs" / "base.py").read_text()
    assigned = re.findall(
        r"^    \w+(?:\.\w+)*\.(\w+) = (?!\w+ = ConfigDict|ConfigDict)", source, re.M
    )
    assert len(assigned) == len(fields(Config)), "a knob is set twice, or by other means"


def tables() -> dict[str, dict]:
    """Knob -> table, from each `choose(TABLE, name, "section.knob")` in the package."""
    found: dict[str, dict] = {}
    for file in sorted((ROOT / "gptjax").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(
                    func=ast.Name("choose"),
                    args=[ast.Name(table), _, ast.Constant(str(knob))],
                ) if knob in fields(Config):  # other tables read the words of other formats
                    parts = file.relative_to(ROOT).with_suffix("").parts
                    module = importlib.import_module(".".join(parts))
                    assert found.setdefault(knob, getattr(module, table)) is getattr(module, table)
    return found


TABLES = tables()
# Choices that are no row: "auto" becomes one when the devices are known.
BESIDES = {"model.attention": ["auto"]}


def documented() -> dict[str, list[str]]:
    """Knob -> the choices that base.py lists as "a | b (why) | c: consequence"."""
    source, found = (ROOT / "configs" / "base.py").read_text(), {}
    sections = dict(re.findall(r"c\.(\w+) = (\w) = ConfigDict", source))
    letters = {letter: section for section, letter in sections.items()}
    for letter, knob, comment in re.findall(r"^    (\w)\.(\w+) = .*?  # (.*\|.*)$", source, re.M):
        choices = [re.match(r"\w+", part.strip()) for part in comment.split("|")]
        found[f"{letters[letter]}.{knob}"] = [choice.group() for choice in choices if choice]
    return found


def test_the_search_for_tables_finds_them():
    assert len(TABLES) >= 13 and {"model.position", "optim.optimizer"} <= set(TABLES)


@pytest.mark.parametrize("knob", sorted(set(TABLES) | set(documented())))
def test_the_base_recipe_lists_the_rows_of_every_table(knob):
    if knob == "data.tokenizer":
        return  # "any tiktoken encoding", whose names are tiktoken's to list
    rows = BESIDES.get(knob, []) + list(TABLES[knob])
    # Where there is one row the value lists it.
    assert documented().get(knob, [flatten(TREE)[knob]]) == rows


def test_choose_lists_the_rows_and_suggests_the_nearest():
    with pytest.raises(ConfigError) as caught:
        choose({"rope": 1, "none": 2}, "rop", "model.position")
    message = str(caught.value)
    assert message == "model.position='rop' is not one of: rope, none (did you mean 'rope'?)"
    assert choose({"rope": 1}, "rope", "model.position") == 1


@pytest.mark.parametrize("knob", sorted(TABLES))
def test_a_name_that_is_no_row_is_refused_before_anything_compiles(knob):
    name = next(iter(TABLES[knob]))[:-1] + "_"
    many = isinstance(flatten(TREE)[knob], tuple)  # a knob that names several rows
    value = (name,) if many else name
    config = from_dict(changed(model__layers=1, **{knob.replace(".", "__"): value}))
    with pytest.raises(ConfigError) as caught:
        setup.check_names(config)
    message, rows = str(caught.value), BESIDES.get(knob, []) + list(TABLES[knob])
    assert message.startswith(f"{knob}={name!r} is not one of: {', '.join(rows)}")
    assert "\n" not in message
    if knob.startswith(("model.", "optim.")) and knob not in ("model.remat", "model.attention"):
        with pytest.raises(ConfigError):
            state.abstract(config)


def test_a_folder_is_a_tokenizers_name_where_one_lies_in_it(tmp_path):
    def check():
        setup.check_names(from_dict(changed(data__tokenizer=str(tmp_path))))

    with pytest.raises(UserError, match="is a folder without a tokenizer.json"):
        check()
    (tmp_path / "tokenizer.json").write_text("{}")
    check()
