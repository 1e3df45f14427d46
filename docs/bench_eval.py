"""Times scoring the same windows of a text by gptjax and by transformers, turn by turn.

    python docs/bench_eval.py models/smollm2 wiki.test.raw

Needs the extras `test` and `reference` (torch, transformers). Prints tokens/s of each turn, compilation left out,
and the loss of both, which must agree.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from gptjax import setup, trained
from gptjax.perplexity import batch_nll

CONTEXT, WINDOWS, ROWS, TURNS = 1024, 8, 2, 5


def main(folder: str, text: str) -> None:
    source = trained.find(Path(folder), None, [f"--config.model.context={CONTEXT}"])
    tokenizer = setup.load_tokenizer(source.config)
    with open(text, encoding="utf-8") as file:
        ids = tokenizer.encode(file.read(CONTEXT * WINDOWS * 8))[: CONTEXT * WINDOWS]
    batches = np.array(ids, np.int32).reshape(-1, ROWS, CONTEXT)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def theirs() -> float:
        losses = [
            reference(torch.tensor(b, dtype=torch.long), labels=torch.tensor(b).long()).loss
            for b in batches
        ]
        return float(torch.stack(losses).mean())

    with trained.opened(source) as model:

        def ours() -> float:
            nlls = [
                batch_nll(
                    model.config.model,
                    None,
                    model.params,
                    {"tokens": b, "targets": np.roll(b, -1, 1)},
                )
                for b in batches
            ]
            return float(np.mean([np.asarray(nll)[:, :-1].mean(dtype=np.float64) for nll in nlls]))

        report({"gptjax": ours, "transformers": theirs})


def report(sides: dict[str, Callable[[], float]]) -> None:
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(TURNS + 1):  # the first, which compiles, does not count
        for name, run in sides.items():
            begin = time.perf_counter()
            loss = run()
            rate = CONTEXT * WINDOWS / (time.perf_counter() - begin)
            print(f"turn {turn}  {name:<13} {rate:8.0f} tokens/s  loss {loss:.6f}", flush=True)
            if turn:
                rates[name].append(rate)
    a, b = (statistics.median(rates_of_side) for rates_of_side in rates.values())
    pairs = [x / y for x, y in zip(*rates.values(), strict=True)]
    print(f"medians: {a:.0f} and {b:.0f} tokens/s; ratio {statistics.median(pairs):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
