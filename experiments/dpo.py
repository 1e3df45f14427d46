"""Which way of teaching a habit costs least? Answers of at most eight words that end in "!".

Arms: supervised fine-tuning on the chosen answers, DPO at beta 0.1 and 0.01, DPO at beta 0.1 with
adapters of rank 4, and SimPO. All see the same prompts, as many a step for as many steps, at one rate:
the first that was tried, at which a run of DPO of another seed learned the habit. Adapters have ten
times that rate. It is tuned for none of them. (Added after the first seed, in which adapters hardly
learned at that: adapters at a hundred times the rate, which is that of configs/lora.py.)

Hypotheses, written before the runs:
1. Each arm has the habit on most prompts that it never saw.
2. DPO at beta 0.1 does not hurt: the general loss rises by less than 0.01 nats a token.
3. Beta 0.01, which holds the model less near to where it began, SimPO, which does not hold it at all,
   and fine-tuning, which raises the likelihood of single texts, each cost more than beta 0.1.
4. Rank 4 suffices: with adapters the win rate is less than 0.1 below that of all weights.
5. Fine-tuning keeps more answers right than DPO, whose rejected texts hold the same right word. (That
   first run of DPO answered "HIMAN!" for Cairo.)

The preferences are made here: of each question the chosen answer is a short one that ends in "!",
the rejected one a sentence that ends in ".". Questions of one kind are held out as a whole, beside
a fifth of the others. The habit is measured on greedy answers. A win over the model that training
began with is a prompt on which the run alone has the habit, a tie counts half. Beside it stand the
share of answers that hold the right word, and the loss on a text that nobody preferred, in nats a
token: the held-out play, or --text=FILE, such as wiki.test.raw. There are two intervals, for two
questions: one of prompts, or of windows of the text (paired, seeds averaged: another test set), and
one of seeds (Student's t: another order of the pairs). Verdicts are those of studies, by seeds, with
0.01 nats a token as the smallest difference that matters.

    python experiments/dpo.py --model=models/smollm2 --out=runs/dpo --seeds=3

What is in --out is read and not run again, and what was broken off goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from gptjax import chat, configure, decode, loop, trained
from gptjax.config import fingerprint
from gptjax.data import open_source
from gptjax.dialogues import prepare_dialogues, prepare_pairs
from gptjax.evaluation.bootstrap import interval
from gptjax.evaluation.texts import Reading, open_text
from gptjax.perplexity import Evaluator
from gptjax.records import strict_json
from gptjax.sharding import make_mesh
from gptjax.storage import replace_file
from gptjax.study import statistics

WORDS = 8  # of an answer with the habit, at most
WINDOW = 256  # tokens of the general text that are read at once
SMALLEST = 0.01  # nats a token that matter

Row = dict[str, str]

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

    rows: list[Row]
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


def holds(answer: str, chosen: str) -> float:
    """1 if an answer holds the word that a chosen one consists of, else 0."""
    word = chosen.rstrip("!").lower()
    return float(re.search(rf"\b{word}\b", answer.lower()) is not None)


class Measured(NamedTuple):
    """Of a model: its answers to the held-out prompts, and its loss on each token of the text."""

    answers: list[str]
    nats: np.ndarray

    @property
    def habit(self) -> np.ndarray:
        """1 for each answer that has it, else 0."""
        return np.array([has_habit(answer) for answer in self.answers], float)

    def right(self, rows: Sequence[Row]) -> np.ndarray:
        """1 for each answer that holds the word of its row's chosen one, else 0."""
        return np.array(
            [holds(a, row["chosen"]) for a, row in zip(self.answers, rows, strict=True)]
        )


def measure(
    model: trained.Trained, questions: Sequence[str], text: Path | None, tokens: int
) -> Measured:
    """What a model answers, and its loss on the first `tokens` of `text`; None: the held-out play."""
    with (
        trained.opened(model) as (config, _, params, tokenizer),
        tempfile.TemporaryDirectory() as t,
    ):
        prompts = [chat.encode(tokenizer, [{"role": "user", "content": q}]) for q in questions]
        sample = dataclasses.replace(config.sample, temperature=0.0, max_new_tokens=40)
        said = decode.generate(
            config.model, params, prompts, sample, seed=0, vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.eot, stop_ids=tokenizer.stops,
        )  # fmt: skip
        general = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, packing="stream"),
            eval=dataclasses.replace(config.eval, max_tokens=tokens, batch_size=4),
        )
        if text is None:
            store = open_source("shakespeare", tokenizer, "val")
        else:
            store = open_text("text", str(text), tokenizer, Path(t) / "store", Reading()).store
        nats = Evaluator(general, store, tokenizer).token_nats(params)
        return Measured([tokenizer.decode(answer.ids) for answer in said], nats)


def kept(file: Path, make: Callable[[], Measured]) -> Measured:
    """What `file` holds; where it is not there, what `make` measures, which is written there."""
    if not file.exists():
        answers, nats = make()
        replace_file(file, strict_json({"answers": answers, "nats": nats.tolist()}).encode())
    record = json.loads(file.read_text(encoding="utf-8"))
    return Measured(record["answers"], np.array(record["nats"], np.float32))


def compare(base: Measured, runs: Sequence[Measured], rows: Sequence[Row]) -> dict[str, Any]:
    """What an arm won and lost against the model that its runs, one for each seed, began with."""
    wins = np.array([(1 + run.habit - base.habit) / 2 for run in runs])
    right, right_more = base.right(rows), np.array([r.right(rows) for r in runs]) - base.right(rows)
    more = np.array([run.nats - base.nats for run in runs], np.float64)
    starts, before = np.arange(0, len(base.nats), WINDOW), float(base.nats.mean(dtype=np.float64))
    sizes = np.add.reduceat(np.ones(len(base.nats)), starts)
    win_rate_S, more_S = wins.mean(1), more.mean(1)
    return {
        "habit_before": base.habit.mean(),
        "habit": [run.habit.mean() for run in runs],
        "win_rate": list(win_rate_S),
        "win_rate_by_prompts": interval(wins.mean(0), np.ones(wins.shape[1])),
        "win_rate_by_seeds": statistics.t_interval(win_rate_S),
        "right_before": right.mean(),
        "right_more": list(right_more.mean(1)),
        "right_more_by_prompts": interval(right_more.mean(0), np.ones(len(right))),
        "right_more_by_seeds": statistics.t_interval(right_more.mean(1)),
        "loss_before": before,
        "loss_more": list(more_S),
        "loss_more_by_windows": interval(np.add.reduceat(more.mean(0), starts), sizes),
        "loss_more_by_seeds": statistics.t_interval(more_S),
        "perplexity_before": math.exp(before),
        "perplexity": math.exp(before + more_S.mean()),
    }


# Recipe -> what makes rows its data, and a row as it reads it.
PREPARE: dict[str, tuple[Callable[..., Any], Callable[[Row], Row]]] = {
    "dpo": (prepare_pairs, lambda row: row),
    "sft": (
        prepare_dialogues,
        lambda row: {"prompt": row["prompt"], "completion": row["chosen"]},
    ),
}


class Arm(NamedTuple):
    """A recipe of `PREPARE`, and the overrides by which arms differ."""

    recipe: str
    overrides: tuple[str, ...] = ()


def prepared(out: Path, model: Path, recipe: str) -> Path:
    """The store of a recipe's data."""
    prepare, read = PREPARE[recipe]
    (rows, held_out), file, store = preferences(), out / f"{recipe}.jsonl", out / recipe
    if not store.exists():
        file.write_text("".join(json.dumps(read(row)) + "\n" for row in rows), encoding="utf-8")
        # Half a row less, so that rounding cuts where it should.
        prepare([file], store, str(model), (held_out - 0.5) / len(rows))
    return store


def study(
    model: Path, out: Path, seeds: int, arms: Mapping[str, Arm], common: Sequence[str],
    text: Path | None = None, tokens: int = 8192,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Trains each arm with each seed from `model`, in folders below `out`, and compares.

    Args:
        common: overrides of all arms.
        text, tokens: as of `measure`.

    Returns:
        arm -> what `compare` says; also, of the runs that are done, in `out`/results.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows, held_out = preferences()
    questions = [row["prompt"] for row in rows[-held_out:]]
    measured_on = f"{text.stem if text else 'plays'}-{tokens}.json"

    def measured(file: Path, folder: Path) -> Measured:
        window = [f"--config.model.context={WINDOW}"]
        find = functools.partial(trained.find, folder, None, window)
        return kept(file, lambda: measure(find(), questions, text, tokens))

    base = measured(out / f"{trained.start_of(model).fingerprint[:8]}-{measured_on}", model)
    runs: dict[str, list[Measured]] = {name: [] for name in arms}
    for number, (seed, name) in enumerate(itertools.product(range(seeds), arms), 1):
        recipe, of_arm = arms[name]
        store = prepared(out, model, recipe)
        overrides = [
            *common, *of_arm, f"--config.data.sources=('{store}',)", f"--config.seed={seed}"
        ]  # fmt: skip
        path = str(configure.RECIPES / f"{recipe}.py")
        config, begin = trained.start_from(configure.from_file(path, overrides), model, overrides)
        of = hashlib.sha256((fingerprint(config) + begin.fingerprint).encode()).hexdigest()
        workdir = out / f"{name}-{seed}-{of[:8]}"
        print(f"[{number}/{seeds * len(arms)}] {workdir}", flush=True)
        if not (workdir / measured_on).exists():
            with jax.set_mesh(make_mesh(config.mesh)):
                loop.train(config, workdir, begin)
        runs[name].append(measured(workdir / measured_on, workdir))
        print(*runs[name][-1].answers[:3], sep="\n", flush=True)
        results = {
            name: compare(base, done, rows[-held_out:]) for name, done in runs.items() if done
        }
        replace_file(out / "results.json", strict_json(results).encode())
    return results


def lines(results: Mapping[str, Mapping[str, Any]], reference: str) -> Iterator[str]:
    """The results for a person; the general loss also against the arm `reference`."""
    more = {name: np.array(result["loss_more"]) for name, result in results.items()}
    others = {name: more_S - more[reference] for name, more_S in more.items() if name != reference}
    against = {
        "the beginning": statistics.compare(more, SMALLEST),
        reference: statistics.compare(others, SMALLEST),
    }
    for name, r in results.items():
        for number in ("win_rate", "right_more", "loss_more"):
            ends = {k.removeprefix(number): r[k] for k in r if k.startswith(f"{number}_by_")}
            told = [
                f"{low:+.4f} to {high:+.4f}{by.replace('_', ' ')}"
                for by, (low, high) in ends.items()
                if low <= high  # not where all seeds have the same
            ]
            yield f"{name}: {number} {np.mean(r[number]):+.4f} ({', '.join(told)})"
        yield (
            f"{name}: habit {r['habit_before']:.3f} -> {np.mean(r['habit']):.3f}, right "
            f"{r['right_before']:.3f} -> {r['right_before'] + np.mean(r['right_more']):.3f}, perplexity "
            f"{r['perplexity_before']:.2f} -> {r['perplexity']:.2f}"
        )
        for other, comparisons in against.items():
            if name in comparisons:
                yield f"{name}: loss beside {other}: {comparisons[name].words}"


COMMON = (
    "--config.train.steps=20", "--config.data.batch_size=4", "--config.optim.peak_lr=1e-5",
    "--config.optim.schedule=linear", "--config.optim.warmup_steps=5",
    "--config.optim.final_lr_fraction=0.0", "--config.optim.weight_decay=0.0",
    "--config.train.eval_every=20", "--config.train.checkpoint_every=20",
    "--config.train.keep_checkpoints=1", "--config.eval.batch_size=4", "--config.train.log_every=5",
)  # fmt: skip
# A row of 48 tokens holds one dialogue, and one of 104 a pair.
PAIR = "--config.model.context=104"
LORA = (
    "--config.train.trainable=lora", "--config.train.lora_rank=4", "--config.train.lora_alpha=8",
    "--config.optim.peak_lr=1e-4",
)  # fmt: skip
ARMS = {
    "sft": Arm("sft", ("--config.model.context=48",)),
    "dpo-0.1": Arm("dpo", (PAIR, "--config.train.beta=0.1")),
    "dpo-0.01": Arm("dpo", (PAIR, "--config.train.beta=0.01")),
    "dpo-0.1-rank-4": Arm("dpo", (PAIR, "--config.train.beta=0.1", *LORA)),
    "dpo-0.1-rank-4-hot": Arm(
        "dpo", (PAIR, "--config.train.beta=0.1", *LORA, "--config.optim.peak_lr=1e-3")
    ),
    "simpo": Arm("dpo", (PAIR, "--config.train.objective=simpo", "--config.train.beta=2.0")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/dpo"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--text", type=Path, help="what nobody preferred; default: the held-out play"
    )
    arguments = parser.parse_args()
    results = study(arguments.model, arguments.out, arguments.seeds, ARMS, COMMON, arguments.text)
    print(*lines(results, "dpo-0.1"), sep="\n")


if __name__ == "__main__":
    main()
