"""Answers to prompts: their rows, their rewards, the loss of GRPO, and runs on them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import decode, loop, model, objectives, replay, rollouts, setup, state
from gptjax.cli import main
from gptjax.config import Config, ConfigError, UserError
from gptjax.data.batches import Batch, Batches, Prompts
from gptjax.data.store import ROWS, Store
from gptjax.dialogues import prepare_prompts
from gptjax.objectives import CLIP, OBJECTIVE, Totals
from gptjax.preferences import Means
from gptjax.records import read_metrics
from gptjax.study import runner
from gptjax.study import store as study_store
from gptjax.tokenizer import load
from gptjax.trainable import trainable
from tests import tiny
from tests.test_preferences import TEMPLATE, tokenizer_folder

BYTES = load("bytes")
ROWS_OF_DATA = [{"prompt": f"{a}{b}", "letter": "e"} for a in "abcdef" for b in "xyz"]
# The share of a letter, which the row names.
SHARE = "def reward(row, answer):\n    return answer.count(row['letter']) / 6\n"


def prepare(folder: Path, rows: list[dict[str, Any]], tokenizer: str = "bytes") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_prompts([folder / "rows.jsonl"], folder / "store", tokenizer, val_fraction=0.2)
    return folder / "store"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "share.py").write_text(SHARE)
    return prepare(folder, ROWS_OF_DATA)


def configure(store: Path, **knobs: object) -> Config:
    return tiny.config(store, **words(store) | knobs)


def words(store: Path) -> dict[str, object]:
    return {
        "train__objective": "grpo", "train__beta": 0.0, "data__packing": "prompts",
        "data__group": 4, "data__batch_size": 16, "train__answer_tokens": 6,
        "train__reward": f"{store.parent / 'share.py'}:reward", "train__steps": 6,
        "train__eval_every": 3, "optim__peak_lr": 1e-2, "optim__schedule": "constant",
    }  # fmt: skip


def run(config: Config, folder: Path, mesh: Any = None, **how: Any) -> list[dict[str, float]]:
    with jax.set_mesh(mesh or tiny.mesh()):
        loop.train(config, folder, **how)
    return read_metrics(folder)


def results(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in replay.TIMINGS} for line in lines]


# --- data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_a_prompt_ends_where_the_answer_begins(kind: str, tmp_path: Path) -> None:
    tokenizer_folder(tmp_path / "model", TEMPLATE)
    prompt = {"text": "cat?", "messages": [{"role": "user", "content": "cat?"}]}[kind]
    rows = [{"prompt": prompt, "answer": ["sun", {"n": i}]} for i in range(10)]
    store = Store.open(
        prepare(tmp_path / "data", rows, str(tmp_path / "model")) / "train",
        tokenizer := load(str(tmp_path / "model")),
    )
    text = tokenizer.decode(store.tokens(0, int(store.document_ends[0])))
    assert text == "user: cat?\nassistant: <|endoftext|>"
    assert not store.weights(0, store.num_tokens).any()
    assert [store.row(i) for i in range(8)] == rows[:8]  # whole, as they were


def test_rows_stand_beside_their_prompts_and_are_checked(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "answer": "né\n"} for i in range(10)]
    folder = prepare(tmp_path, rows) / "val"
    store = Store.open(folder, BYTES)
    assert [store.row(i) for i in range(2)] == rows[8:]
    assert BYTES.decode(store.tokens(0, 1)) == "8"
    (folder / ROWS).write_bytes((folder / ROWS).read_bytes().replace(b"9", b"7"))
    with pytest.raises(UserError, match="was altered"):
        Store.open(folder, BYTES)


def test_a_row_without_a_prompt_is_refused(tmp_path: Path) -> None:
    for row, told in (
        ({"question": "a"}, "line 1 has no 'prompt': its keys are question"),
        ({"prompt": [{"role": "user", "content": "a"}]}, "line 1 holds messages, but tokenizer"),
    ):
        with pytest.raises(UserError, match=told):
            prepare(tmp_path, [row] * 10)


def test_a_prompt_is_a_row_with_room_for_an_answer(tmp_path: Path, capsys: Any) -> None:
    rows = [{"prompt": text} for text in ("abc", "abcd", "ab", *"yyyyyyy")]
    store = Store.open(prepare(tmp_path, rows) / "train", BYTES)
    packed = Prompts(store, 4, BYTES.eot)
    assert "1 of 8 prompts are left out" in capsys.readouterr().err
    batch, E = packed.rows(np.array([1, 0])), BYTES.eot
    a, b, c = BYTES.encode("abc")
    assert batch.tokens.tolist() == [[a, b, E, E], [a, b, c, E]]
    assert batch.targets.tolist() == [[b, E, E, E], [b, c, E, E]]
    assert batch.segments is not None
    assert batch.segments.tolist() == [[0, 0, -1, -1], [0, 0, 0, -1]]
    assert not batch.weights.any() and np.isnan([batch.sampled, batch.advantages]).all()
    assert packed.documents(np.array([1, 0])).tolist() == [[2, 2], [0, 0]]
    place, row = packed.source(2)
    assert place.endswith("train/rows.jsonl line 3") and row == {"prompt": "ab"}


def test_a_store_without_rows_is_no_store_of_prompts(tmp_path: Path) -> None:
    text = Store.open(tiny.make_store(tmp_path) / "train", BYTES)
    with pytest.raises(UserError, match="takes a store of prompts, which `data prompts` makes"):
        Prompts(text, 16, BYTES.eot)


def test_a_group_is_rows_of_one_prompt(store: Path) -> None:
    config = configure(store)
    batches = Batches(config.data, config.model.context, 0, "train", BYTES)
    rows = batches.rows(3, 0, 16)
    assert (rows.tokens.reshape(4, 4, -1) == rows.tokens[::4, None]).all()
    assert len(np.unique(rows.tokens, axis=0)) == 4
    for tokens, (_, row) in zip(rows.tokens, batches.prompts(3), strict=True):
        assert BYTES.decode(tokens[:2]) == row["prompt"]
    once = Batches(dataclasses.replace(config.data, group=1, batch_size=4), 16, 0, "train", BYTES)
    assert (once.rows(3, 0, 4).tokens == rows.tokens[::4]).all()
    np.testing.assert_array_equal(batches.rows(3, 5, 9).tokens, rows.tokens[5:9])


def test_commands_make_and_show_prompts(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "share.py").write_text(SHARE)
    rows = [{"prompt": f"n{i}", "letter": "é"} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = ["data", "prompts", str(tmp_path / "rows.jsonl"), f"--out={tmp_path / 'store'}"]
    assert main([*made, "--tokenizer=bytes"]) == 0
    assert "9 documents" in capsys.readouterr().out
    shown = tiny.overrides(tmp_path / "store", **words(tmp_path / "store"))
    assert main(["data", "show", f"--config={tiny.RECIPE}", "--rows=5", *shown]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15 and lines[1].startswith("⟦n⟧⟦") and "padding" in lines[1]
    assert lines[2] == lines[5] == lines[8] == lines[11] != lines[14]  # a group, and the next
    assert json.loads(lines[2]) in rows


# --- advantages and the loss ------------------------------------------------------------------


def test_advantages_are_of_the_group_alone() -> None:
    rewards = np.array([1.0, 0, 0, 0, 7, 7, 7, 7, 3, 1, 2, 2])
    got = rollouts.advantages(rewards, 4)
    # Deviations of samples: 1/2, 0 and sqrt(2 / 3).
    np.testing.assert_allclose(got[:4], np.array([0.75, -0.25, -0.25, -0.25]) / 0.5001)
    assert not got[4:8].any()
    np.testing.assert_allclose(got[8:], np.array([1, -1, 0, 0]) / (np.sqrt(2 / 3) + 1e-4))
    assert not rollouts.advantages(np.full(6, 0.7), 6).any()  # whose mean is not 0.7


def test_an_answer_is_scored_with_the_token_that_ends_it_and_nothing_else() -> None:
    answers = [rollouts.Drawn([7, 9], [-1.0, -2.0]), rollouts.Drawn([8, 8], [-3.0, -4.0])]
    batch = rollouts.lay([[1, 2], [3]], answers, np.array([0.5, -0.5]), 5, eot=9)
    wanted = {
        "tokens": [[1, 2, 7, 9, 9], [3, 8, 9, 9, 9]],
        "targets": [[2, 7, 9, 9, 9], [8, 8, 9, 9, 9]],
        "weights": [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]],
        "segments": None,
        "positions": None,
        "reference": None,
        "sampled": [[0, -1, -2, 0, 0], [-3, -4, 0, 0, 0]],
        "advantages": [[0, 0.5, 0.5, 0, 0], [-0.5, -0.5, 0, 0, 0]],
    }
    assert jax.tree.map(np.ndarray.tolist, batch)._asdict() == wanted


def drawn(config: Config, params: Any, seed: int = 0, off: float = 0.0) -> Batch[Any]:
    """Eight answers at random; `off` is how far what they were drawn by lies from `params`."""
    rng = np.random.default_rng(seed)
    B, T = 8, config.model.context
    ids = rng.integers(257, size=(B, T + 1)).astype(np.int32)
    tokens, targets = ids[:, :-1], ids[:, 1:]
    weights = np.zeros((B, T), np.float32)
    for row in weights:
        start = rng.integers(1, 8)
        row[start : start + rng.integers(1, 8)] = 1
    said_BT = log_likelihood(config, params, tokens, targets)
    sampled = said_BT + off * rng.normal(size=(B, T))
    worth = np.abs(rng.normal(size=(B, 1))) * np.tile([[1.0], [-1.0]], (B // 2, 1)) * weights
    return Batch(
        tokens, targets, weights,
        sampled=(sampled * weights).astype(np.float32), advantages=worth.astype(np.float32),
    )  # fmt: skip


def log_likelihood(config: Config, params: Any, tokens: Any, targets: Any) -> np.ndarray:
    """Of each target, float64 from the logits on."""
    logits = np.asarray(model.apply(config.model, params, tokens), np.float64)
    log_p = np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return np.take_along_axis(log_p, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [None, 100])
def test_the_loss_is_that_of_the_paper(chunk: int | None, store: Path) -> None:
    """Token by token in numpy; half of the ratios lie beyond the clip, on all four sides."""
    config = configure(store, optim__loss_vocab_chunk=chunk)
    params = model.init(config.model, 1)
    batch = drawn(config, params, off=0.3)
    said = log_likelihood(config, params, batch.tokens, batch.targets)
    total, clipped, count, gaps = 0.0, set(), 0, []
    for place in zip(*np.nonzero(batch.weights), strict=True):
        ratio, worth = np.exp(said[place] - batch.sampled[place]), batch.advantages[place]
        held = min(max(ratio, 1 - CLIP), 1 + CLIP)
        total -= min(ratio * worth, held * worth)
        clipped |= {(ratio > held, worth > 0)} if ratio != held else set()
        count += 1
        gaps.append(abs(said[place] - batch.sampled[place]))
    assert len(clipped) == 4
    got = OBJECTIVE["grpo"].totals(config, params, batch, None)
    assert float(got.weight) == count
    # float32 log-likelihoods of some six nats, in a sum of some thirty terms.
    assert float(got.objective) == pytest.approx(total, abs=1e-4)
    assert float(got.metrics["loss"]) == float(got.objective)
    assert float(got.metrics["sampler_gap_mean"]) == pytest.approx(sum(gaps), rel=1e-4)
    assert got.largest is not None
    assert float(got.largest["sampler_gap"]) == pytest.approx(max(gaps), rel=1e-4)


def test_a_likelihood_that_is_no_number_shows(store: Path) -> None:
    """Among 4,096, in whose maximum XLA overlooks it, on CPUs."""
    config = configure(store)
    params = model.init(config.model, 1)
    batch = drawn(config, params)
    batch = Batch(*(None if x is None else np.tile(x, (32, 1)) for x in batch))
    batch.sampled[tuple(np.argwhere(batch.weights)[0])] = np.nan
    got = jax.jit(lambda p, b: OBJECTIVE["grpo"].totals(config, p, b, None))(params, batch)
    assert not np.isfinite(got.metrics["sampler_gap_mean"])
    assert got.largest is not None and not np.isfinite(got.largest["sampler_gap"])


def test_where_the_ratio_is_1_the_gradient_is_that_of_reinforce(store: Path) -> None:
    config = configure(store)
    params = model.init(config.model, 1)
    batch = drawn(config, params)

    def reinforce(params: Any) -> jax.Array:
        log_p = jax.nn.log_softmax(model.apply(config.model, params, batch.tokens))
        said = jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
        return -jnp.sum(batch.advantages * said)

    slope = jax.grad(lambda p: OBJECTIVE["grpo"].totals(config, p, batch, None).objective)(params)
    wanted = jax.grad(reinforce)(params)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


def test_what_is_not_scored_counts_nothing(store: Path) -> None:
    """Not the prompt, nor what lies behind the end, which no scored token sees."""
    config = configure(store)
    params = model.init(config.model, 1)
    batch = drawn(config, params)
    objective = lambda p, b: OBJECTIVE["grpo"].totals(config, p, b, None).objective  # noqa: E731
    other = Batch(*(None if x is None else x.copy() for x in batch))
    assert other.sampled is not None and other.advantages is not None
    unscored = batch.weights == 0
    for array, value in ((other.targets, 5), (other.sampled, -3.0), (other.advantages, 2.0)):
        array[unscored] = value
    for row, scored in zip(other.tokens, batch.weights, strict=True):
        row[int(np.flatnonzero(scored)[-1]) + 1 :] = 3
    slopes = [jax.grad(objective)(params, b) for b in (batch, other)]
    for a, b in zip(*map(jax.tree.leaves, slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(a).max()))


def test_a_group_of_equal_rewards_teaches_nothing(store: Path) -> None:
    config = configure(store)
    params = model.init(config.model, 1)
    batch = drawn(config, params, off=0.3)._replace(advantages=np.zeros((8, 16), np.float32))
    slope = jax.grad(lambda p: OBJECTIVE["grpo"].totals(config, p, batch, None).objective)(params)
    assert not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(slope))


def test_the_largest_of_micro_batches_is_no_sum() -> None:
    one = jnp.ones(())
    a, b = (Totals(one, {"loss": one}, one, None, {"gap": gap * one}) for gap in (3, 2))
    both = a + b
    assert both.metrics["loss"] == 2 and both.largest == {"gap": 3}


def test_the_divergence_is_from_the_base_of_the_adapters(store: Path) -> None:
    config = configure(store, train__trainable="lora", train__beta=0.5)
    now = state.create(config)
    adapted = state.trainable(config).realise
    totals = OBJECTIVE["grpo"].totals
    batch = drawn(config, model.init(config.model, config.seed))
    first = totals(config, adapted(now.params, now.frozen), batch, None)
    assert float(first.metrics["kl"]) == 0  # the adapters are 0
    trained = jax.tree.map(lambda x: x + 0.2, now.params)
    params = adapted(trained, now.frozen)
    ours = log_likelihood(config, params, batch.tokens, batch.targets)
    base = log_likelihood(config, now.frozen, batch.tokens, batch.targets)
    apart = (base - ours)[batch.weights > 0]
    wanted = (np.exp(apart) - apart - 1).sum()
    without = dataclasses.replace(config, train=dataclasses.replace(config.train, beta=0.0))
    got, plain = totals(config, params, batch, None), totals(without, params, batch, None)
    assert float(got.metrics["kl"]) == pytest.approx(wanted, rel=1e-4) and wanted > 0.05
    assert float(got.objective - plain.objective) == pytest.approx(wanted / 2, rel=1e-4)
    assert "kl" not in plain.metrics


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs, told",
    [
        ({"data__packing": "document", "data__group": 1}, "set data.packing='prompts'"),
        ({"data__group": 1}, "set data.group to 2 or more"),
        ({"data__group": 3}, "data.batch_size=16 is not divisible by data.group=3"),
        ({"train__reward": None}, "set train.reward='FILE.py:FUNCTION'"),
        ({"train__beta": 0.1}, "set train.trainable to lora or qlora, or train.beta=0"),
        ({"model__dropout": 0.1}, "model.dropout=0 and train.lora_dropout=0 only"),
        ({"optim__z_loss": 1e-4}, "set optim.z_loss=0"),
        ({"train__objective": "next_token"}, "holds no answers to learn: set train.objective"),
        (
            {"train__objective": "next_token", "data__packing": "whole"},
            "data.group=4 repeats each row, which train.objective='next_token' has no use for",
        ),
        (
            {"train__objective": "dpo", "train__beta": 0.1, "data__packing": "pairs"},
            "data.group=4 repeats each row, which train.objective='dpo' has no use for",
        ),
        (
            {"train__objective": "dpo", "data__packing": "pairs", "data__group": 1},
            "train.beta must be above 0 for train.objective='dpo'",
        ),
    ],
)
def test_what_grpo_does_not_go_with_is_refused(
    knobs: dict[str, object], told: str, store: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        setup.check_names(configure(store, **knobs))


@pytest.mark.parametrize(
    "code, told",
    [
        ("def reward(row, answer):\n    return row['gold']\n", r"failed on .*KeyError: 'gold'"),
        ("def reward(row, answer):\n    return 'much'\n", r"failed on .*ValueError"),
        ("def reward(row, answer):\n    return float('nan')\n", "gave nan on .*rows.jsonl line"),
        ("def reward(row, answer):\n    return '0.5'\n", "gave '0.5' on .*is a number below"),
        ("def reward(row, answer):\n    return 1e200\n", "gave 1e\\+200 on .*a number below 1e"),
        ("def reward(row, answer):\n    raise SystemExit(0)\n", "failed on .*SystemExit: 0"),
        ("raise SystemExit(0)\n", "the file cannot be run: 0"),
        ("def other(row, answer):\n    return 1\n", "the file has no function reward"),
        ("import nothing_like_this\n", "cannot be run: No module named 'nothing_like_this'"),
        (None, "no file .*; it is FILE.py:FUNCTION"),
    ],
)
def test_a_reward_that_is_none_ends_the_run_in_a_line(
    code: str | None, told: str, store: Path, tmp_path: Path
) -> None:
    if code is not None:
        (tmp_path / "bad.py").write_text(code)
    config = configure(store, train__reward=f"{tmp_path / 'bad.py'}:reward")
    with pytest.raises(UserError, match=told) as raised:
        run(config, tmp_path / "run")
    assert "\n" not in str(raised.value)


def test_a_reward_imports_its_neighbours_when_it_is_called(store: Path, tmp_path: Path) -> None:
    (tmp_path / "beside_the_reward.py").write_text("WORTH = 3\n")
    code = "def reward(row, answer):\n    import beside_the_reward as b\n    return b.WORTH\n"
    (tmp_path / "mine.py").write_text(code)
    assert rollouts.load_reward(f"{tmp_path / 'mine.py'}:reward")({}, "", "line 1") == 3
    with pytest.raises(UserError, match="it is FILE.py:FUNCTION"):
        rollouts.load_reward("mine")


def test_a_study_of_rewarded_runs(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arms = {"slow": {"optim.peak_lr": 1e-4}}
    done = runner.run_study(tiny.study(store, arms, words(store), seeds=1), tmp_path).outcomes
    assert [o.status for o in done] == ["finished"] * 2
    folder, cell = done[0].folder, done[0].cell
    assert "val_reward" in read_metrics(folder)[-1]
    assert main(["eval", f"--workdir={folder}"]) == 2
    assert "are no text to score: name one by --set NAME=PATH" in capsys.readouterr().err
    assert study_store.differences(folder, cell) == []
    # Another code may answer otherwise.
    other = {"code": "other", "versions": {}}
    monkeypatch.setattr(study_store, "current_code_and_versions", lambda: other)
    monkeypatch.setattr(study_store, "code_fingerprint", lambda: "other")
    study_store._evaluation.cache_clear()
    assert study_store.differences(folder, cell) == ["evaluation"]
    study_store._evaluation.cache_clear()


def test_prompts_that_nobody_answered_train_nothing(store: Path) -> None:
    config = configure(store)
    with jax.set_mesh(tiny.mesh()):
        opened = setup.set_up(config)
        step, begun = state.make_train_step(config), state.create(config)
        metrics = step(begun, setup.load_batch(opened, 0))[1]
    assert metrics["skipped"] == 1


def test_each_step_of_each_seed_draws_anew_and_each_time_alike(store: Path) -> None:
    config = configure(store)
    with jax.set_mesh(tiny.mesh()):
        opened, begun = setup.set_up(config), state.create(config)
        assert opened.rollouts is not None
        first, again = (jax.device_get(opened.rollouts(begun, 1)[0]) for _ in range(2))
        prompts = [row[:2].tolist() for row in first.tokens[:, 0]]
        texts = [
            [a.ids for a in rollouts.answer_as_trained(config, begun, BYTES, prompts, seed)[0]]
            for seed in (rollouts.seed_of(0, 1), rollouts.seed_of(0, 2), rollouts.seed_of(1, 1))
        ]
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    rows = zip(first.targets[:, 0], texts[0], strict=True)
    assert [row[1 : 1 + len(ids)].tolist() for row, ids in rows] == texts[0]
    for other in texts[1:]:
        assert sum(a == b for a, b in zip(texts[0], other, strict=True)) == 0


# --- answers, drawn by what training computes -------------------------------------------------

# Of which a quarter of the draws end an answer.
ENDING = dataclasses.replace(BYTES, stops=frozenset({256, *range(0, 256, 4)}))
PROMPTS = [[97, 98], [99], [100] * 13, [101, 102, 103]] * 2


def with_peaks(config: Config) -> state.TrainState:
    """A state whose model prefers some tokens."""
    begun = state.create(config)
    return begun.replace(params=jax.tree.map(lambda p: 3 * p, begun.params))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_answers_are_those_of_whole_rows_read_anew_for_each_token(
    store: Path, accumulation: int
) -> None:
    """An independent loop without a cache: logits of all of a row, and the same noise."""
    config = configure(store, data__batch_size=8, train__accumulation=accumulation)
    seed = 5
    with jax.set_mesh(tiny.mesh()):
        now = with_peaks(config)
        answers, _ = rollouts.answer_as_trained(config, now, ENDING, PROMPTS, seed)
    now = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), now)  # of no mesh
    params = trainable(config).whole(now.params, now.frozen)
    logits_of = jax.jit(functools.partial(model.apply, config.model))
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        text, said = list(prompt), []
        key = jax.random.fold_in(jax.random.key(seed), row)
        while len(text) < min(len(prompt) + 6, 16) and (
            len(text) == len(prompt) or text[-1] not in ENDING.stops
        ):
            padded = np.array([text + [0] * (16 - len(text))])
            logits_V = logits_of(params, padded)[0, len(text) - 1]
            noise_V = jax.random.gumbel(jax.random.fold_in(key, len(text)), (257,))
            text.append(int((logits_V[:257] + noise_V).argmax()))
            said.append(float(jax.nn.log_softmax(logits_V)[text[-1]]))
        assert answer.ids == text[len(prompt) :]
        np.testing.assert_allclose(answer.log_likelihood, said, atol=2e-5)
    lengths = {len(answer.ids) for answer in answers}
    assert len(lengths) > 2 and len(answers[2].ids) <= 3  # there the context is full


def wrong_drafts(kind: str) -> Callable[..., list[decode.Text]]:
    drafts = rollouts.answer

    def draft(config: Config, params: Any, tokenizer: Any, prompts: Any, seed: int) -> Any:
        texts = drafts(config, params, tokenizer, prompts, seed)
        changed = {
            "empty": lambda ids: [],
            "too long": lambda ids: [*ids, 70] * 2,
            "last token": lambda ids: [*ids[:-1], 71],
            "first token": lambda ids: [72, *ids[1:]],
        }[kind]
        return [dataclasses.replace(text, ids=changed(text.ids)) for text in texts]

    return draft


# Of 6 tokens; the last needs no draft after it.
@pytest.mark.parametrize(
    ("kind", "takes"), [("empty", 6), ("too long", 1), ("last token", 1), ("first token", 6)]
)
def test_a_wrong_draft_may_take_longer_and_changes_nothing(
    kind: str, takes: int, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(store, data__batch_size=8)
    with jax.set_mesh(tiny.mesh()):
        now = with_peaks(config)
        right, passes = rollouts.answer_as_trained(config, now, BYTES, PROMPTS, 5)
        monkeypatch.setattr(rollouts, "answer", wrong_drafts(kind))
        got, more = rollouts.answer_as_trained(config, now, BYTES, PROMPTS, 5)
    assert got == right and (passes, more) == (1, takes)


def test_answers_without_a_reward_have_a_loss_of_0_and_not_below(store: Path) -> None:
    config = configure(store)
    never = rollouts.Reward("never.py:reward", "", lambda row, answer: 0.0)
    with jax.set_mesh(tiny.mesh()):
        params = state.create(config).params
        held_out = Store.open(store / "val", BYTES)
        means = rollouts.RewardEvaluator(config, held_out, BYTES, never)(params)
    assert math.copysign(1, means.loss) == 1 and means.values["reward"] == 0
    assert str(means).startswith("loss 0.0000, reward 0.0000, ")
    # Nor is what rounds to it.
    assert str(Means({"loss": -1e-9}, 1.0, "answers")) == "loss 0.0000 (1 answers)"


# --- runs -------------------------------------------------------------------------------------


def test_a_run_learns_what_is_rewarded(store: Path, tmp_path: Path) -> None:
    config = configure(
        store, data__batch_size=64, data__group=16, train__steps=40, train__eval_every=20,
        optim__peak_lr=3e-2,
    )  # fmt: skip
    lines = run(config, tmp_path / "run")
    told = [line for line in lines if "reward" in line]
    first, last = (np.mean([line["reward"] for line in part]) for part in (told[:3], told[-3:]))
    # Of 257 tokens each is as likely at first.
    assert first < 0.05 and last > 0.5
    held_out = [line for line in lines if "val_reward" in line]
    assert held_out[-1]["val_reward"] > 0.5 and held_out[-1]["val_answer_tokens"] <= 6
    assert all(line["val_loss"] == -line["val_reward"] for line in held_out)
    for line in told:
        assert 0 <= line["flat_groups"] <= 1 and 1 <= line["answer_tokens"] <= 6
        assert line["tokens"] == 64 * line["answer_tokens"]
        assert line["clipped"] == 0  # the ratio is 1
        assert line["sampler_gap"] == line["sampler_gap_mean"] == 0 and line["passes"] == 1
        assert abs(line["loss"]) < 1


def test_a_killed_run_goes_on_bit_for_bit_and_is_replayed(store: Path, tmp_path: Path) -> None:
    config = configure(store)
    whole = run(config, tmp_path / "whole")
    run(config, tmp_path / "cut", until=5)
    (tmp_path / "elsewhere.py").write_text(SHARE)  # the same content
    moved = dataclasses.replace(config.train, reward=f"{tmp_path / 'elsewhere.py'}:reward")
    cut = run(dataclasses.replace(config, train=moved), tmp_path / "cut")
    assert results(whole) == results(cut)
    assert replay.replay_run(tmp_path / "cut")["bitwise"]


def test_another_reward_is_another_run(store: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SHARE)
    config = configure(store, train__reward=f"{tmp_path / 'mine.py'}:reward")
    run(config, tmp_path / "run", until=5)
    (tmp_path / "mine.py").write_text(SHARE + "# changed\n")
    with pytest.raises(UserError, match="the content of reward changed"):
        run(config, tmp_path / "run")
    with pytest.raises(UserError, match="mine.py:reward is not what the run read"):
        replay.replay_run(tmp_path / "run")


FEW: dict[str, object] = {"train__steps": 2, "optim__warmup_steps": 1, "train__eval_every": 2}


@pytest.fixture(scope="module")
def plain(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Of a run on one device."""
    return run(configure(store, **FEW), tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("axes", tiny.MESHES, ids=str)
def test_meshes_change_rounding_alone(
    axes: Any, store: Path, tmp_path: Path, plain: list[dict[str, float]]
) -> None:
    config = dataclasses.replace(configure(store, **FEW), mesh=axes)
    close(plain, run(config, tmp_path / "split", mesh=tiny.mesh_of(axes)))


def test_micro_batches_change_rounding_alone(
    store: Path, tmp_path: Path, plain: list[dict[str, float]]
) -> None:
    close(plain, run(configure(store, **FEW, train__accumulation=4), tmp_path / "cut"))


def close(plain: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    """The same but for rounding: a draw would differ once in some 10^6 tokens."""
    for was, now in zip(plain, other, strict=True):
        for name in was.keys() - set(replay.TIMINGS):
            assert now[name] == pytest.approx(was[name], rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize("trainable", ["lora", "qlora"])
def test_adapters_learn_from_answers_near_their_base(
    trainable: str, store: Path, tmp_path: Path
) -> None:
    config = configure(store, train__trainable=trainable, train__beta=0.01, train__steps=12)
    lines = [line for line in run(config, tmp_path / "run") if "kl" in line]
    assert lines[0]["kl"] == 0 and lines[-1]["kl"] > 0
    assert max(line["sampler_gap"] for line in lines) == 0


def test_the_recipe_rewards_exact_answers() -> None:
    reward = rollouts.load_reward("configs/grpo.py:reward")
    for answer, worth in (("It is 1,200.", 1), ("1200, or 7", 0), ("", 0), ("$**1200**", 1)):
        assert reward({"answer": "#### 1200"}, answer, "line 1") == worth


def test_the_objective_is_told_by_its_table() -> None:
    assert [name for name, row in objectives.OBJECTIVE.items() if row.rollouts] == ["grpo"]


# --- as users compile -------------------------------------------------------------------------

LLAMA: dict[str, object] = {
    "model__norm": "rmsnorm", "model__position": "rope", "model__feedforward": "swiglu",
}  # fmt: skip
ADAPTERS: dict[str, object] = {"train__trainable": "lora", "train__beta": 0.01}
KINDS: dict[int, list[dict[str, object]]] = {
    8: [{"model__scan_layers": True, "model__remat": "dots", "train__accumulation": 2}],
    64: [{}, LLAMA | ADAPTERS],
}


def gaps_as_users_compile(folder: str, rows: int) -> None:
    """For a process of its own."""
    for number, kind in enumerate(KINDS[rows]):
        config = configure(
            Path(folder) / "store", data__batch_size=rows, model__width=64, model__layers=2,
            model__context=128, train__answer_tokens=30, train__steps=2, train__eval_every=2,
            optim__warmup_steps=1, **kind,
        )  # fmt: skip
        lines = run(config, Path(folder) / f"run{number}")
        assert [line["sampler_gap"] for line in lines if "reward" in line] == [0, 0], kind


@pytest.mark.slow
@pytest.mark.parametrize("rows", KINDS)
def test_sampler_and_trainer_agree_as_users_compile(rows: int, store: Path, tmp_path: Path) -> None:
    """From 4,096 tokens on, XLA for CPUs joins other operations where nothing is to be kept."""
    shutil.copytree(store.parent, tmp_path, dirs_exist_ok=True)
    tiny.as_users_compile(
        f"from tests import test_rollouts as t; t.gaps_as_users_compile({str(tmp_path)!r}, {rows})"
    )
