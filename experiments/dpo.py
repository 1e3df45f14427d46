"""DPO teaches a habit: answers of at most eight words that end in "!". What does it cost?

Hypotheses, written before the runs: (1) after so few steps the model has the habit on most prompts
that it never saw, and (2) the general perplexity hardly moves at beta 0.1, and more at 0.01, which
holds the model less near to where it began.

The preferences are made here: of each question the chosen answer is a short one that ends in "!",
the rejected one a sentence that ends in ".". Questions of one kind are held out as a whole, beside
a fifth of the others. The habit is measured on greedy answers. A win over the model that training
began with is a prompt on which the run alone has the habit, a tie counts half; the interval is of
prompts, paired. Beside it stands the loss on a text of plays that nobody preferred, in nats a
token, with the paired interval over its windows.

    python experiments/dpo.py --model=models/smollm2 --out=runs/dpo --seeds=3
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from gptjax import chat, configure, decode, loop, trained
from gptjax.data import open_source
from gptjax.dialogues import prepare_pairs
from gptjax.evaluation.bootstrap import interval
from gptjax.perplexity import Evaluator
from gptjax.records import strict_json
from gptjax.sharding import make_mesh
from gptjax.storage import replace_file

WORDS = 8  # of an answer with the habit, at most

# kind: (question, plain answer, facts)
KINDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "capitals": (
        "What is the capital of {}?",
        "The capital of {} is {}, which is also one of its best known cities.",
        {
            "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
            "Egypt": "Cairo", "Greece": "Athens", "Norway": "Oslo", "Peru": "Lima",
            "Cuba": "Havana", "Kenya": "Nairobi", "Russia": "Moscow", "China": "Beijing",
            "Austria": "Vienna", "Ireland": "Dublin", "Sweden": "Stockholm", "Finland": "Helsinki",
            "Portugal": "Lisbon", "Poland": "Warsaw", "Hungary": "Budapest", "Chile": "Santiago",
        },
    ),
    "opposites": (
        "What is the opposite of {}?",
        "The opposite of {} is {}, although it depends on what you are talking about.",
        {
            "hot": "cold", "big": "small", "fast": "slow", "light": "dark", "early": "late",
            "rich": "poor", "young": "old", "happy": "sad", "wet": "dry", "full": "empty",
            "high": "low", "hard": "soft", "open": "closed", "strong": "weak", "loud": "quiet",
            "near": "far", "thick": "thin", "sharp": "blunt", "clean": "dirty", "good": "bad",
        },
    ),
    "sounds": (
        "Which animal says {}?",
        "The animal that says {} is the {}, and it has done so for a very long time.",
        {
            "meow": "cat", "woof": "dog", "moo": "cow", "quack": "duck", "oink": "pig",
            "baa": "sheep", "neigh": "horse", "buzz": "bee", "hiss": "snake", "roar": "lion",
            "croak": "frog", "hoot": "owl", "coo": "pigeon", "caw": "crow", "howl": "wolf",
        },
    ),
}  # fmt: skip
HELD_OUT_KIND = "sounds"


class Preferences(NamedTuple):
    """Rows of `prepare_pairs`: all of them, and how many, the last, are held out."""

    rows: list[dict[str, str]]
    held_out: int


def preferences() -> Preferences:
    train, held_out = [], []
    for kind, (question, plain, facts) in KINDS.items():
        for number, (fact, answer) in enumerate(facts.items()):
            row = {
                "prompt": question.format(fact),
                "chosen": f"{answer.capitalize()}!",
                "rejected": plain.format(fact, answer),
            }
            (held_out if kind == HELD_OUT_KIND or number % 5 == 4 else train).append(row)
    return Preferences(train + held_out, len(held_out))


def has_habit(answer: str) -> bool:
    return answer.strip().endswith("!") and len(answer.split()) <= WORDS


class Measured(NamedTuple):
    """Of a model: its answers to the held-out prompts, and its loss on each token of the plays."""

    answers: list[str]
    nats: np.ndarray


def measure(model: trained.Trained, questions: Sequence[str], max_tokens: int) -> Measured:
    with trained.opened(model) as (config, _, params, tokenizer):
        prompts = [chat.encode(tokenizer, [{"role": "user", "content": q}]) for q in questions]
        sample = dataclasses.replace(config.sample, temperature=0.0, max_new_tokens=40)
        texts = decode.generate(
            config.model, params, prompts, sample, seed=0, vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.eot, stop_ids=tokenizer.stops,
        )  # fmt: skip
        general = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, packing="stream"),
            eval=dataclasses.replace(config.eval, max_tokens=max_tokens, batch_size=4),
        )
        plays = Evaluator(general, open_source("shakespeare", tokenizer, "val"), tokenizer)
        return Measured([tokenizer.decode(text.ids) for text in texts], plays.token_nats(params))


def compare(base: Measured, tuned: Measured, window: int) -> dict[str, Any]:
    """What a run won and lost, with 95% intervals over prompts and over windows of the plays."""
    had, has = (np.array([has_habit(a) for a in m.answers], float) for m in (base, tuned))
    wins = (1 + has - had) / 2
    starts = np.arange(0, len(base.nats), window)
    more = np.add.reduceat((tuned.nats - base.nats).astype(np.float64), starts)
    tokens = np.add.reduceat(np.ones(len(base.nats)), starts)
    return {
        "habit_before": had.mean(),
        "habit": has.mean(),
        "win_rate": wins.mean(),
        "win_rate_interval": interval(wins, np.ones(len(wins))),
        "loss_before": float(base.nats.mean(dtype=np.float64)),
        "loss": float(tuned.nats.mean(dtype=np.float64)),
        "loss_more_interval": interval(more, tokens),
    }


def study(
    model: Path, out: Path, seeds: int, arms: dict[str, list[str]], common: list[str],
    max_tokens: int = 8192,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Trains each arm with each seed from `model`, in folders below `out`, and compares each with it.

    Args:
        arms: name -> overrides.
        common: overrides of all.

    Returns:
        arm -> for each seed what `compare` says, also written to `out`/results.json.
    """
    rows, held_out = preferences()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store, recipe = out / "pairs", str(configure.RECIPES / "dpo.py")
    if not store.exists():
        # Half a pair less, so that rounding cuts where it should.
        prepare_pairs([file], store, str(model), (held_out - 0.5) / len(rows))
    questions = [row["prompt"] for row in rows[-held_out:]]
    base = measure(trained.find(model, None, common), questions, max_tokens)
    results: dict[str, list[dict[str, Any]]] = {}
    for name, knobs in arms.items():
        results[name] = []
        for seed in range(seeds):
            overrides = [
                *common, *knobs, f"--config.data.sources=('{store}',)", f"--config.seed={seed}"
            ]  # fmt: skip
            config, begin = trained.start_from(
                configure.from_file(recipe, overrides), model, overrides
            )
            workdir = out / f"{name}-{seed}"
            with jax.set_mesh(make_mesh(config.mesh)):
                loop.train(config, workdir, begin)
            tuned = measure(trained.find(workdir), questions, max_tokens)
            result = compare(base, tuned, config.model.context)
            print(f"{name}, seed {seed}: {result}", *tuned.answers[:3], sep="\n  ", flush=True)
            results[name].append(result)
            replace_file(out / "results.json", strict_json(results).encode())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/dpo"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    common = [
        "--config.model.context=128", "--config.train.steps=40", "--config.data.batch_size=8",
        "--config.optim.peak_lr=5e-6", "--config.optim.warmup_steps=5",
        "--config.train.eval_every=20", "--config.train.checkpoint_every=40",
        "--config.train.keep_checkpoints=1", "--config.eval.batch_size=8",
    ]  # fmt: skip
    arms = {
        "beta-0.1": ["--config.train.beta=0.1"],
        "beta-0.01": ["--config.train.beta=0.01"],
        "simpo": ["--config.train.objective=simpo", "--config.train.beta=2.0"],
    }
    results = study(arguments.model, arguments.out, arguments.seeds, arms, common)
    for name, of_seeds in results.items():
        for number in ("habit", "win_rate", "loss"):
            values = [result[number] for result in of_seeds]
            print(f"{name}: {number} {statistics.mean(values):.3f} (seeds: {values})")


if __name__ == "__main__":
    main()
