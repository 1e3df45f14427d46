"""Preferences: pairs as rows, their losses, the reference, and runs on them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import branch, loop, model, preferences, replay, setup, state, trained
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.config import Config, ConfigError, UserError
from gptjax.configure import from_file
from gptjax.data.batches import Pairs
from gptjax.data.store import Store, StoreWriter
from gptjax.dialogues import PAIR, prepare_dialogues, prepare_pairs
from gptjax.interop import hf
from gptjax.objectives import OBJECTIVE, count_pairs
from gptjax.records import read_metrics
from gptjax.tokenizer import Tokenizer, load
from tests import tiny

BYTES = load("bytes")
PREFERENCES = [name for name, row in OBJECTIVE.items() if row.weight is count_pairs]
# (prompt, chosen, rejected)
PAIRS = [
    (f"{a}? ", f"{b}!", f"{b} and {b}.")
    for a in ("cat", "dog", "owl", "ant", "bee")
    for b in ("sun", "sea", "sky", "ice")
]


def write(folder: Path, pairs: list[tuple[str, str, str]], tokenizer: Tokenizer = BYTES) -> Store:
    """A store of pairs in which the answers are scored, their ends too."""
    writer = StoreWriter(folder, tokenizer, weighted=True)
    for prompt, *answers in pairs:
        for answer in answers:
            before, said = tokenizer.encode(prompt), tokenizer.encode(answer)
            weights = np.repeat([0.0, 1.0], [len(before), len(said)])
            writer.write(np.array(before + said), True, weights)
    writer.close()
    return Store.open(folder, tokenizer)


def tokenizer_folder(folder: Path, template: str, context: int = 16) -> None:
    """A model's folder, of bytes, with a chat template."""
    small = tiny.model(vocab_size=264, context=context)
    hf.export(folder, small, model.init(small, 0), "bytes")
    (folder / "chat_template.jinja").write_text(template)


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PREFER: dict[str, object] = {"train__objective": "dpo", "data__packing": "pairs"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write(folder / "train", PAIRS)
    write(folder / "val", PAIRS[3::4])
    return folder


def configure(store: Path, objective: str = "dpo", **knobs: object) -> Config:
    knobs = {"model__context": 40, "train__steps": 8, "train__eval_every": 4} | knobs
    return tiny.config(store, train__objective=objective, data__packing="pairs", **knobs)


def run(config: Config, folder: Path, **how: Any) -> list[dict[str, float]]:
    with jax.set_mesh(tiny.mesh()):
        loop.train(config, folder, **how)
    return read_metrics(folder)


# --- rows -------------------------------------------------------------------------------------


def test_a_pair_is_a_row_of_two_segments(tmp_path: Path) -> None:
    rows = Pairs(write(tmp_path / "s", [("ab", "c", "de")]), 10, BYTES.eot)
    rows.reference = np.arange(1, 8, dtype=np.float32)
    batch = rows.rows(np.array([0]))
    E = BYTES.eot
    a, b, c, d, e = BYTES.encode("abcde")
    wanted = {
        "tokens": [a, b, c, a, b, d, e, E, E, E],
        "targets": [b, c, E, b, d, e, E, E, E, E],
        "weights": [0, 1, 1, 0, 1, 1, 1, 0, 0, 0],
        "segments": [0, 0, 0, 1, 1, 1, 1, -1, -1, -1],
        "positions": [0, 1, 2, 0, 1, 2, 3, 0, 0, 0],
        "reference": [1, 2, 3, 4, 5, 6, 7, 0, 0, 0],
    }
    given = {name: array for name, array in batch._asdict().items() if array is not None}
    assert {name: array[0].tolist() for name, array in given.items()} == wanted
    assert rows.documents(np.array([0])).tolist() == [[0, 1]]


def test_a_pair_that_does_not_fit_is_left_out_and_told(tmp_path: Path, capsys: Any) -> None:
    long = ("ab", "c", "d" * 9)
    rows = Pairs(write(tmp_path / "s", [long, ("ab", "c", "de"), long]), 7, BYTES.eot)
    assert len(rows) == 1 and rows.documents(np.array([0])).tolist() == [[2, 3]]
    assert (
        "2 of 3 pairs are left out: they have more than model.context=7 targets (the longest 14)"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match=r"each pair of .* more than model.context=6 .* shortest 7"):
        Pairs(write(tmp_path / "t", [("ab", "c", "de")]), 6, BYTES.eot)


def test_a_store_of_single_texts_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", BYTES)
    for _ in range(3):
        writer.write(np.array(BYTES.encode("abc")), True)
    writer.close()
    with pytest.raises(UserError, match="holds 3 documents, an odd number"):
        Pairs(Store.open(tmp_path / "s", BYTES), 10, BYTES.eot)


# --- data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["texts", "messages", "dialogues"])
def test_a_pair_is_prompt_and_answer_in_the_models_template(kind: str, tmp_path: Path) -> None:
    """However it is written, two documents, in which the answers and their ends are scored."""
    folder = tmp_path / "model"
    tokenizer_folder(folder, TEMPLATE)
    user, answers = {"role": "user", "content": "cat?"}, ["sun!", "the sun."]
    said = [{"role": "assistant", "content": answer} for answer in answers]
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows: dict[str, list[Any]] = {
        "texts": ["cat?", *answers],
        "messages": [[user], *([message] for message in said)],
        "dialogues": ["cat?", *([*earlier, user, message] for message in said)],
    }
    row = json.dumps(dict(zip(PAIR, rows[kind], strict=True))) + "\n"
    (tmp_path / "rows.jsonl").write_text(10 * row)
    prepare_pairs([tmp_path / "rows.jsonl"], tmp_path / "store", str(folder))
    tokenizer = load(str(folder))
    store = Store.open(tmp_path / "store/train", tokenizer)
    before = "user: a\nassistant: b<|endoftext|>\n" if kind == "dialogues" else ""
    start = 0
    for stop, answer in zip(store.document_ends[:2], answers, strict=True):
        ids, scored = store.tokens(start, stop), store.weights(start, stop) > 0
        text = f"{before}user: cat?\nassistant: {answer}<|endoftext|>\n<|endoftext|>"
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids[scored]) == f"{answer}<|endoftext|>"
        start = stop


def test_without_a_template_texts_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [dict(zip(PAIR, pair, strict=True)) for pair in PAIRS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_pairs([tmp_path / "rows.jsonl"], tmp_path / "store", "bytes")
    store, plain = Store.open(tmp_path / "store/train", BYTES), write(tmp_path / "plain", PAIRS[:1])
    stop = int(plain.document_ends[0])
    # Its end is scored; the one that each document of a store has is not.
    assert store.tokens(0, stop).tolist() == plain.tokens(0, stop).tolist()
    assert store.weights(0, stop + 1).tolist() == [*plain.weights(0, stop).tolist(), 0]


def test_a_row_that_is_no_pair_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for row, words in (
        ({"prompt": "a", "chosen": "b"}, "line 1 has no 'rejected'"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "line 1 holds messages, but tokenizer"),
    ):
        file.write_text(10 * (json.dumps(row) + "\n"))
        with pytest.raises(UserError, match=words):
            prepare_pairs([file], tmp_path / "store", "bytes")


# --- losses -----------------------------------------------------------------------------------


def written_out(name: str, config: Config, texts: list[list[np.ndarray]]) -> float:
    """The loss of a pair by its paper's formula, in numpy, of (log-likelihoods, reference's)."""
    beta, gamma = config.train.beta, config.train.gamma
    (policy_w, reference_w), (policy_l, reference_l) = texts
    ratio_w, ratio_l = policy_w - reference_w, policy_l - reference_l
    if name == "dpo":
        return math.log1p(math.exp(-beta * (ratio_w.sum() - ratio_l.sum())))
    if name == "ipo":
        return (ratio_w.mean() - ratio_l.mean() - 1 / (2 * beta)) ** 2
    assert name == "simpo"
    return math.log1p(math.exp(-(beta * policy_w.mean() - beta * policy_l.mean() - gamma)))


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize("chunk", [None, 100])
def test_losses_are_those_of_the_papers(name: str, chunk: int | None, store: Path) -> None:
    """Each text alone in a row, its logits whole, in float64 from there on."""
    config = configure(store, name, train__beta=0.7, optim__loss_vocab_chunk=chunk)
    params = model.init(config.model, 1)
    opened = setup.make_evaluators(config, BYTES)[str(store)]
    rng = np.random.default_rng(0)
    rows = opened.rows
    rows.reference = rng.normal(3, 1, rows.first_target[-1]).astype(np.float32)
    batch = rows.rows(np.arange(4))
    expected = []
    for row in range(4):
        texts = []
        for segment in (0, 1):
            here = batch.segments[row] == segment
            logits = model.apply(config.model, params, batch.tokens[row, here][None])[0]
            log_p = jax.nn.log_softmax(np.asarray(logits, np.float64))
            scored = batch.weights[row, here] > 0
            policy = np.asarray(log_p)[np.arange(here.sum()), batch.targets[row, here]][scored]
            texts.append([policy, -batch.reference[row, here][scored].astype(np.float64)])
        expected.append(written_out(name, config, texts))
    got = OBJECTIVE[name].totals(config, params, jax.tree.map(jnp.asarray, batch), None)
    # float32 sums of some ten terms of some six nats.
    assert float(got.metrics["loss"]) == pytest.approx(sum(expected), rel=1e-5)
    assert float(got.weight) == 4


@pytest.mark.parametrize("name", PREFERENCES)
def test_what_a_preference_does_not_go_with_is_refused(name: str, store: Path) -> None:
    for knobs, words in (
        ({"data__packing": "document"}, "set data.packing='pairs'"),
        ({"model__dropout": 0.1}, "model.dropout=0 and train.lora_dropout=0 only"),
        ({"optim__z_loss": 1e-4}, "set optim.z_loss=0"),
    ):
        config = tiny.config(
            store, train__objective=name, **({"data__packing": "pairs"} | dict(knobs))
        )
        with pytest.raises(ConfigError, match=words):
            setup.check_names(config)


def test_rejected_texts_are_not_trained_on_by_mistake(store: Path) -> None:
    with pytest.raises(ConfigError, match="holds rejected texts too: set train.objective"):
        setup.check_names(tiny.config(store, data__packing="pairs"))


def test_without_its_reference_no_loss_is_finite(store: Path) -> None:
    config = configure(store)
    with jax.set_mesh(tiny.mesh()):
        opened = setup.set_up(config)
        metrics = state.make_train_step(config)(state.create(config), setup.load_batch(opened, 0))[
            1
        ]
    assert metrics["skipped"] == 1


# --- runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_run_learns_to_prefer(name: str, store: Path, tmp_path: Path) -> None:
    lines = run(configure(store, name, train__steps=60, train__eval_every=30), tmp_path / "run")
    first, last = lines[0], lines[-1]
    if name == "dpo":
        assert abs(first["loss"] - math.log(2)) < 1e-6
        assert abs(first["drift_chosen"]) < 1e-5 and abs(first["margin"]) < 1e-6
    if name == "ipo":
        assert first["loss"] == pytest.approx(25, rel=1e-5)  # (1 / (2 beta))^2
    assert last["val_accuracy"] == 1 and last["val_margin"] > 0
    assert last["val_loss"] < first["loss"]
    assert ("val_drift_chosen" in last) == OBJECTIVE[name].reference
    assert first["tokens"] == 8  # pairs


def test_a_killed_run_goes_on_bit_for_bit_and_is_replayed(store: Path, tmp_path: Path) -> None:
    config = configure(store)
    whole = run(config, tmp_path / "whole")
    run(config, tmp_path / "cut", until=5)
    cut = run(config, tmp_path / "cut")
    clock = (*replay.TIMINGS,)
    plain = [
        [{k: v for k, v in line.items() if k not in clock} for line in lines]
        for lines in (whole, cut)
    ]
    assert plain[0] == plain[1]
    assert replay.replay_run(tmp_path / "cut")["bitwise"]
    run(config, tmp_path / "damaged", until=5)
    (tmp_path / "damaged" / preferences.REFERENCE).write_bytes(b"")
    with pytest.raises(UserError, match="is not what the run wrote"):
        run(config, tmp_path / "damaged")


def test_a_reference_is_scored_once_for_all_runs_of_the_same(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another objective and beta take it, bit for bit; another model, rows at once or store do not."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    scored: list[str] = []
    reference = preferences.reference
    monkeypatch.setattr(preferences, "reference", lambda *how: scored.append("") or reference(*how))
    compile_step = loop.compile_step

    def begun(name: str, folder: Path = store, **knobs: Any) -> bytes:
        """The reference of a run, which, but for one, ends before its step is compiled."""

        def compiled(*how: Any, **and_how: Any) -> Any:
            if name != "beta":
                raise ZeroDivisionError
            return compile_step(*how, **and_how)

        monkeypatch.setattr(loop, "compile_step", compiled)
        ends = contextlib.nullcontext() if name == "beta" else pytest.raises(ZeroDivisionError)
        with ends:
            run(configure(folder, **FEW, **knobs), tmp_path / name)
        return (tmp_path / name / preferences.REFERENCE).read_bytes()

    first = begun("first")
    assert len(scored) == 1
    for name, knobs in (
        ("again", {}), ("beta", {"train__beta": 0.5}), ("ipo", {"objective": "ipo"}),
        ("rate", {"optim__peak_lr": 1e-4}),
    ):  # fmt: skip
        assert begun(name, **knobs) == first
    assert len(scored) == 1
    assert begun("seed", seed=1) != first and len(scored) == 2
    begun("rows", train__accumulation=2)
    begun("chunk", optim__loss_vocab_chunk=100)
    begun("adapters", train__trainable="lora")
    assert len(scored) == 5
    write(tmp_path / "other/train", PAIRS[1:])
    write(tmp_path / "other/val", PAIRS[3::4])
    begun("others", tmp_path / "other")
    assert len(scored) == 6
    # What is damaged there is found out, and made anew.
    for file in (tmp_path / "cache/kept").iterdir():
        content = bytearray(file.read_bytes())
        content[-40] ^= 1
        file.write_bytes(content)
    assert begun("damaged") == first and len(scored) == 7
    assert begun("mended") == first and len(scored) == 7
    # A replay is no replay of what was kept.
    monkeypatch.setattr(loop, "compile_step", compile_step)
    assert replay.replay_run(tmp_path / "beta")["bitwise"] and len(scored) == 8


FEW: dict[str, object] = {"train__steps": 2, "optim__warmup_steps": 1, "train__eval_every": 2}


@pytest.fixture(scope="module")
def plain(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Of a run on one device."""
    return run(configure(store, **FEW), tmp_path_factory.mktemp("plain") / "run")


def close(was: list[dict[str, float]], now: list[dict[str, float]]) -> None:
    for a, b in zip(was, now, strict=True):
        for name in a.keys() - set(replay.TIMINGS):
            assert b[name] == pytest.approx(a[name], rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize("axes", tiny.MESHES, ids=str)
def test_meshes_change_rounding_alone(
    axes: Any, store: Path, tmp_path: Path, plain: list[dict[str, float]]
) -> None:
    config = dataclasses.replace(configure(store, **FEW), mesh=axes)
    with jax.set_mesh(tiny.mesh_of(axes)):
        loop.train(config, tmp_path / "split")
    close(plain, read_metrics(tmp_path / "split"))


def test_micro_batches_change_rounding_alone(
    store: Path, tmp_path: Path, plain: list[dict[str, float]]
) -> None:
    close(plain, run(configure(store, **FEW, train__accumulation=4), tmp_path / "cut"))


def test_a_branch_keeps_the_reference_of_its_trunk(store: Path, tmp_path: Path) -> None:
    config = configure(store)
    whole = run(config, tmp_path / "whole")
    named = dataclasses.replace(config.train, branch=f"{tmp_path / 'whole'}@5")
    again = run(branch.resolve(dataclasses.replace(config, train=named)), tmp_path / "branch")
    results = [
        {k: v for k, v in line.items() if k not in replay.TIMINGS}
        for line in (whole[-1], again[-1])
    ]
    assert results[0] == results[1]
    sha256 = [
        Checkpoints(tmp_path / name / CHECKPOINTS).meta(8)["reference"]
        for name in ("whole", "branch")
    ]
    assert sha256[0] == sha256[1]


# --- the chain ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_chain_from_a_text_to_preferences_is_replayed_bitwise(tmp_path: Path) -> None:
    """Each link begins with what the one before it exported, and is trained again from its records."""
    answers = [
        (f"{a}?", f"{b}!", f"{b} and {b}.") for a, b in (("cat", "sun"), ("dog", "sea"))
    ] * 10
    talks = [{"prompt": p, "completion": c} for p, c, _ in answers]
    pairs = [dict(zip(PAIR, row, strict=True)) for row in answers]
    for name, rows in (("talks", talks), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small: dict[str, object] = {
        "model__position": "rope", "model__norm": "rmsnorm", "model__feedforward": "swiglu",
        "model__bias": False, "model__context": 64, "train__steps": 4, "train__eval_every": 2,
    }  # fmt: skip
    config, begin = tiny.config(tiny.make_store(tmp_path), **small), None
    models: list[Path] = []
    for link in ("text", "talks", "pairs"):
        workdir = tmp_path / "runs" / link
        if link != "text":
            make = {"talks": prepare_dialogues, "pairs": prepare_pairs}[link]
            make([tmp_path / f"{link}.jsonl"], tmp_path / link, str(models[-1]))
            more = {"talks": {"data__packing": "whole"}, "pairs": PREFER}[link]
            words = tiny.overrides(tmp_path / link, **small, **more)
            words = [w for w in words if not w.startswith("--config.data.tokenizer")]
            config, begin = trained.start_from(from_file(tiny.RECIPE, words), models[-1], words)
        lines = run(config, workdir, begin=begin)
        assert link != "pairs" or abs(lines[0]["loss"] - math.log(2)) < 1e-6
        with trained.opened(trained.find(workdir)) as mine:
            hf.export(
                tmp_path / f"models/{link}", mine.config.model, mine.params, mine.tokenizer.name
            )
        models.append(tmp_path / f"models/{link}")
        (models[-1] / "chat_template.jinja").write_text(TEMPLATE)
    for link, start in zip(("text", "talks", "pairs"), (None, *models), strict=False):
        begin = None if start is None else trained.start_of(start)
        assert replay.replay_run(tmp_path / "runs" / link, begin)["bitwise"]
    record = json.loads((tmp_path / "runs/pairs/environment.json").read_text())[0]
    assert record["initial"]["model"] == str(models[1])


@pytest.mark.slow
def test_the_study_of_a_habit_runs_and_goes_on(tmp_path: Path) -> None:
    names = runpy.run_path("experiments/dpo.py")
    tokenizer_folder(tmp_path / "model", TEMPLATE, context=names["WINDOW"])
    few = [f"--config.train.{knob}=2" for knob in ("steps", "eval_every", "checkpoint_every")]
    few += ["--config.optim.warmup_steps=1", "--config.data.batch_size=2"]
    arm, out = names["Arm"], tmp_path / "out"
    arms = {"sft": arm("sft"), "dpo": arm("dpo"), "lora": arm("dpo", names["LORA"])}

    def study(seeds: int, arms: Any = arms, text: Path | None = None) -> Any:
        return names["study"](tmp_path / "model", out, seeds, arms, few, text, tokens=3200)

    first = study(1)
    assert set(first) == set(arms)
    for result in first.values():
        assert result["habit_before"] == 0 and 0 <= result["win_rate"][0] <= 1
        low, high = result["loss_more_by_windows"]
        assert low <= result["loss_more"][0] <= high
        expected = math.exp(result["loss_before"] + result["loss_more"][0])
        assert result["perplexity"] == pytest.approx(expected)
    assert json.loads((out / "results.json").read_text()).keys() == set(arms)

    # A second seed runs what is new alone, and gives each arm its interval over seeds.
    was = {f: f.stat().st_mtime_ns for f in out.glob("*-0-*/*/*")}
    second = study(2, {name: arms[name] for name in ("dpo", "lora")})
    assert was == {f: f.stat().st_mtime_ns for f in out.glob("*-0-*/*/*")} and was
    for name, result in second.items():
        assert result["loss_more"][0] == first[name]["loss_more"][0]
        low, high = result["loss_more_by_seeds"]
        assert low <= np.mean(result["loss_more"]) <= high
    told = list(names["lines"](second, "dpo"))
    assert any(line.startswith("lora: loss beside dpo: undecided") for line in told)

    # Another text is another measurement of the same run.
    (tmp_path / "other.txt").write_text("Nothing of the kind was said. " * 200)
    other = study(1, {"dpo": arms["dpo"]}, tmp_path / "other.txt")
    assert other["dpo"]["loss_before"] != first["dpo"]["loss_before"]
    (log,) = out.glob("dpo-0-*/metrics.jsonl")
    assert len(read_metrics(log.parent)) == 3


def test_the_habit_is_measured() -> None:
    names = runpy.run_path("experiments/dpo.py")
    rows, held_out = names["preferences"]()
    train = {row["prompt"] for row in rows[:-held_out]}
    assert len(rows) - held_out > held_out >= 20
    assert not train & {row["prompt"] for row in rows[-held_out:]}
    assert all(names["has_habit"](row["chosen"]) for row in rows)
    assert not any(names["has_habit"](row["rejected"]) for row in rows)
    measured = names["Measured"]
    answers = ["No.", "Yes!", "No."] * 10
    asked = [{"chosen": "Yes!"}] * 30
    tokens = 12 * names["WINDOW"]
    base = measured(answers, np.zeros(tokens, np.float32))
    tuned = measured(["Yes!", "Yes!", "No."] * 10, np.full(tokens, 0.25, np.float32))
    told = names["compare"](base, [tuned, tuned], asked)
    # A third is won, the rest are ties.
    assert told["win_rate"] == pytest.approx([2 / 3] * 2)
    assert told["habit"] == pytest.approx([2 / 3] * 2)
    assert told["right_before"] == pytest.approx(1 / 3)
    assert told["right_more"] == pytest.approx([1 / 3] * 2)
    assert names["holds"]("It is Cairo, of course.", "Cairo!") and not names["holds"](
        "located", "Cat!"
    )
    low, high = told["win_rate_by_prompts"]
    assert 0.5 < low < 2 / 3 < high < 1
    assert told["loss_more_by_windows"] == pytest.approx((0.25, 0.25))
    assert told["perplexity"] == pytest.approx(math.exp(0.25))
    # Seeds whose runs differ in the third win alone: 2/3 and 1/2.
    by_seeds = names["compare"](base, [tuned, base], asked)["win_rate_by_seeds"]
    assert (by_seeds.low + by_seeds.high) / 2 == pytest.approx(7 / 12)
