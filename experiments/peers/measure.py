"""One measurement of one side, in a process of its own: what `run.py` starts.

    python experiments/peers/measure.py '{"task": "train", "side": "gptjax", ...}'

The last line of standard output is the result as JSON: numbers, and lists of one number for each
of several turns within the process. Each side imports only what it needs, when it starts, so that
memory and time to the first step are its own. `MEASURES` says which sides a task has.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = 16  # tokens
Job = dict[str, Any]
Result = dict[str, Any]


class Absent(Exception):
    """A side that cannot run here, and why."""


def turns(run: Callable[[], object], wait: Callable[[], object], seconds: float) -> list[float]:
    """Seconds a run, of turns of about a second each, at least three; `run` has run before.

    Args:
        run: may return before its work is done.
        wait: returns when the work of all runs is done.
        seconds: that all turns take together, about.
    """

    def turn(runs: int) -> float:
        begin = time.perf_counter()
        for _ in range(runs):
            run()
        wait()
        return (time.perf_counter() - begin) / runs

    runs, end = math.ceil(min(1, seconds / 3) / turn(1)), time.perf_counter() + seconds
    taken: list[float] = []
    while len(taken) < 3 or time.perf_counter() < end:
        taken.append(turn(runs))
    return taken


def rates(amount: float, seconds: list[float]) -> list[float]:
    return [amount / s for s in seconds]


def peak_memory() -> float | None:
    """The largest resident memory of this process so far, MB; None where /proc does not tell."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1.024e-3 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return None


def batches(job: Job) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same batches for every side: inputs and targets, int64 (rows, context)."""
    shape, tokens = job["shape"], np.load(Path(job["folder"], "tokens.npy"))
    rng, T = np.random.default_rng(0), shape["context"]
    while True:
        starts = rng.integers(len(tokens) - T, size=shape["rows"])
        rows = np.stack([tokens[s : s + T + 1] for s in starts]).astype(np.int64)
        yield rows[:, :-1].copy(), rows[:, 1:].copy()  # nanoGPT wants contiguous targets


# --- what the sides share: a model folder, a text, and what they cost --------------------------


def prepare(job: Job) -> Result:
    """Writes tokens.npy and a Hugging Face folder, "model", to the job's folder.

    The model is the one named by the job, or GPT-2 of the shape with gptjax's initial weights.
    """
    import jax

    from gptjax import accounting, model, tokenizer, trained
    from gptjax.interop import hf, pretrained

    folder = Path(job["folder"])
    out, text = folder / "model", Path(job["text"]).read_text(encoding="utf-8")
    if job["model"]:
        pretrained.import_(job["model"], out)
        config = trained.find(out).config.model
        name = pretrained.read(out).tokenizer
        if name is None:
            raise Absent(f"{job['model']} has no tokenizer")
        # So much text as a few batches need.
        ids = np.array(tokenizer.load(name).encode(text[:500_000]))
        assert len(ids) > 10_000, "the text is too short"
    else:
        config = gptjax_config(job).model
        biased = gptjax_config(job, "--config.model.bias=True").model  # as GPT-2, for transformers
        hf.export(out, biased, model.init(biased, 0), None)
        ids = encode(text, config.vocab_size)
    np.save(folder / "tokens.npy", ids.astype(np.uint16))
    weights = sum(math.prod(s.shape) for s in jax.tree.leaves(model.abstract_params(config)))
    return {
        "flops_per_token": accounting.train_flops_per_token(config, causal=True),
        "float32_bytes": 4 * weights,
    }


def encode(text: str, vocab_size: int) -> np.ndarray:
    """GPT-2's tokens; with a small vocabulary the commonest characters, all others as one."""
    from gptjax import tokenizer

    if vocab_size > 50256:
        return np.array(tokenizer.load("gpt2").encode(text))
    kinds, characters = np.unique(list(text), return_inverse=True)
    commonest = np.argsort(-np.bincount(characters, minlength=len(kinds)))
    rank = np.empty(len(kinds), np.int64)
    rank[commonest] = np.arange(len(kinds))
    return np.minimum(rank[characters], vocab_size - 1)


# --- gptjax ------------------------------------------------------------------------------------


def gptjax_config(job: Job, *overrides: str) -> Any:
    """The recipe of a shape: AdamW at a constant rate, no biases, as nanoGPT trains."""
    from gptjax import configure

    s = job["shape"]
    knobs = {
        "model.vocab_size": s["vocab_size"], "model.context": s["context"],
        "model.layers": s["layers"], "model.width": s["width"], "model.heads": s["heads"],
        "model.bias": False, "data.batch_size": s["rows"], "optim.peak_lr": s["rate"],
        "optim.schedule": "constant", "optim.warmup_steps": 0, "optim.b2": 0.99,
    }  # fmt: skip
    words = [f"--config.{knob}={value}" for knob, value in knobs.items()]
    return configure.from_file(str(configure.RECIPES / "base.py"), [*words, *overrides])


@contextlib.contextmanager
def gptjax_started(mesh: Any) -> Iterator[None]:
    """jax as gptjax's commands start it, on the mesh of a config."""
    import jax

    from gptjax import sharding
    from gptjax.commands import command

    command.prepare_jax(None)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        yield


def gptjax_batch(tokens: np.ndarray, targets: np.ndarray, dims: str) -> Any:
    from gptjax import sharding
    from gptjax.data.batches import Batch

    shape = (len(tokens), *(1 for _ in dims[1:-1]), -1)  # one micro-batch, where dims have one
    arrays = [tokens.astype(np.int32), targets.astype(np.int32), np.ones(tokens.shape, np.float32)]
    whole = Batch(*(array.reshape(shape) for array in arrays))
    return sharding.place(
        lambda start, stop: whole._make(a if a is None else a[start:stop] for a in whole),
        len(tokens),
        dims,
    )


@contextlib.contextmanager
def gptjax_model(job: Job) -> Iterator[tuple[Any, Any]]:
    """The settled config and the parameters of the prepared model."""
    from gptjax import setup, trained
    from gptjax.interop import pretrained

    source = trained.find(Path(job["folder"], "model"))
    assert source.source is not None
    with gptjax_started(source.config.mesh):
        yield setup.settle(source.config).model, pretrained.load(source.source).params


def train_gptjax(job: Job) -> Result:
    import jax

    from gptjax import loop, setup, state

    config = gptjax_config(job)
    with gptjax_started(config.mesh):
        config = setup.settle(config)
        train_state, data = state.create(config), batches(job)
        compiled: Any = None

        def step() -> Any:
            nonlocal train_state, compiled
            batch = gptjax_batch(*next(data), "BAT")
            if compiled is None:
                step = state.make_train_step(config)
                compiled, _ = loop.compile_step(step, train_state, batch)
            train_state, metrics = compiled(train_state, batch)
            return metrics["loss"]

        return train(job, step, lambda: jax.block_until_ready(train_state))


def train(job: Job, step: Callable[[], Any], wait: Callable[[], object]) -> Result:
    """What every side's training is asked; `step` makes one and returns its loss."""
    losses = [float(step())]
    wait()
    first = time.time() - job["started"]
    losses += [float(step()) for _ in range(job["shape"]["steps"] - 1)]
    taken = turns(step, wait, job["seconds"])
    tokens = job["shape"]["rows"] * job["shape"]["context"]
    return {
        "tokens/s": rates(tokens, taken),
        "first step, s": first,
        "peak memory, MB": peak_memory(),
        "loss, first step": losses[0],
        "loss, last equal step": losses[-1],
    }


def decode_gptjax(job: Job) -> Result:
    from gptjax import configure
    from gptjax import decode as gptjax_decode

    with gptjax_model(job) as (config, params):
        weights = gptjax_decode.cast(config, params)
        del params
        knobs = {"max_new_tokens": job["new_tokens"], "temperature": 0.0}
        words = [f"--config.sample.{knob}={value}" for knob, value in knobs.items()]
        sample = configure.from_file(str(configure.RECIPES / "base.py"), words).sample

        def write(prompts: list[list[int]]) -> int:
            texts = gptjax_decode.stream(
                config, weights, prompts, sample, seed=0, vocab_size=config.vocab_size,
                end_of_text=-1, chunk=sample.max_new_tokens,
            )  # fmt: skip
            return sum(len(text.ids) for text in next(texts))

        return decode(job, write)


def decode(job: Job, write: Callable[[list[list[int]]], int]) -> Result:
    """What every side's decoding is asked; `write` continues prompts and counts the new tokens."""
    tokens = np.load(Path(job["folder"], "tokens.npy"))
    result: Result = {}
    for rows in (1, 8):
        prompts = tokens[: rows * PROMPT].reshape(rows, PROMPT).tolist()
        made = write(prompts)  # compiles
        assert made == rows * job["new_tokens"], f"{made} tokens made"
        taken = turns(lambda p=prompts: write(p), lambda: None, job["seconds"] / 2)
        result[f"tokens/s, batch {rows}"] = rates(made, taken)
    return {**result, "peak memory, MB": peak_memory()}


def score_gptjax(job: Job) -> Result:
    from gptjax.perplexity import batch_nll

    with gptjax_model(job) as (config, params):

        def score(tokens: np.ndarray, targets: np.ndarray) -> float:
            batch = gptjax_batch(tokens, targets, "BT")
            return float(np.asarray(batch_nll(config, None, params, batch)).mean())

        return scored(job, score)


def scored(job: Job, score: Callable[[np.ndarray, np.ndarray], float]) -> Result:
    """What every side's scoring is asked; `score` returns the mean loss of a batch."""
    data = batches(job)
    losses = [score(*next(data)) for _ in range(4)]
    taken = turns(lambda: score(*next(data)), lambda: None, job["seconds"])
    tokens = job["shape"]["rows"] * job["shape"]["context"]
    return {
        "tokens/s": rates(tokens, taken),
        "loss": statistics.fmean(losses),
        "peak memory, MB": peak_memory(),
    }


def tokenise_gptjax(job: Job) -> Result:
    """A whole token store: the text read, counted, encoded, checked and written."""
    import shutil

    from gptjax.data.prepare import prepare as write_store

    out = Path(job["folder"], "store")

    def store() -> None:
        write_store([Path(job["text"])], out, "gpt2")
        shutil.rmtree(out)

    store()
    taken = turns(store, lambda: None, job["seconds"])
    return {"MB/s": rates(Path(job["text"]).stat().st_size / 1e6, taken)}


# --- PyTorch -----------------------------------------------------------------------------------


def train_nanogpt(job: Job) -> Result:
    """nanoGPT's model and optimiser from the checkout, and the loop of its train.py."""
    if not job["nanogpt"]:
        raise Absent("no checkout: --nanogpt=PATH")
    sys.path.insert(0, job["nanogpt"])
    from model import GPT, GPTConfig

    s = job["shape"]
    config = GPTConfig(
        block_size=s["context"], vocab_size=s["vocab_size"], n_layer=s["layers"],
        n_head=s["heads"], n_embd=s["width"], dropout=0.0, bias=False,
    )  # fmt: skip
    model = GPT(config)
    optimizer = model.configure_optimizers(0.1, s["rate"], (0.9, 0.99), "cpu")
    return train_torch(job, model, optimizer)


def train_plain(job: Job) -> Result:
    import torch
    from plain import GPT

    s = job["shape"]
    model = GPT(s["vocab_size"], s["context"], s["layers"], s["width"], s["heads"])
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s["rate"], betas=(0.9, 0.99), fused=True)
    return train_torch(job, model, optimizer)


def train_torch(job: Job, model: Any, optimizer: Any) -> Result:
    import torch
    from plain import load_gpt2
    from safetensors.torch import load_file

    load_gpt2(model, load_file(Path(job["folder"], "model", "model.safetensors")))
    compiled, data = torch.compile(model), batches(job)

    def step() -> Any:
        tokens, targets = map(torch.from_numpy, next(data))
        _, loss = compiled(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return train(job, step, lambda: None)


def transformers_model(job: Job) -> Any:
    import torch
    import transformers

    folder = Path(job["folder"], "model")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def decode_transformers(job: Job) -> Result:
    import torch

    model, new = transformers_model(job), job["new_tokens"]
    model.generation_config.eos_token_id = None

    def write(prompts: list[list[int]]) -> int:
        ids = torch.tensor(prompts)
        options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return out.numel() - ids.numel()

    return decode(job, write)


def score_transformers(job: Job) -> Result:
    import torch

    model = transformers_model(job)

    @torch.inference_mode()
    def score(tokens: np.ndarray, targets: np.ndarray) -> float:
        logits = model(torch.from_numpy(tokens)).logits
        cross_entropy = torch.nn.functional.cross_entropy
        return float(cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten()))

    return scored(job, score)


# --- others ------------------------------------------------------------------------------------


def decode_llamacpp(job: Job) -> Result:
    """llama.cpp on the .gguf file itself, with the file's own quantisation."""
    if not str(job["model"]).endswith(".gguf"):
        raise Absent("reads .gguf files: --model=FILE.gguf")
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity = str(job["model"]), -1
    params.n_parallel, params.n_ctx = 8, 8 * 512
    server = xllamacpp.Server(params)

    def write(prompts: list[list[int]]) -> int:
        options = {"n_predict": job["new_tokens"], "temperature": 0.0, "ignore_eos": True}
        reply = server.handle_completions({"prompt": prompts, "cache_prompt": False, **options})
        if len(reply["choices"]) != len(prompts):
            raise RuntimeError(f"llama.cpp: {reply}")
        return job["new_tokens"] * len(prompts)

    return decode(job, write)


def tokenise_tiktoken(job: Job) -> Result:
    """One thread, in memory; the ranks and the pattern are those of gptjax's "gpt2"."""
    import tiktoken

    from gptjax.tokenizer import TOKENIZERS

    encoding = tiktoken.Encoding("gpt2", **TOKENIZERS["gpt2"]())
    text = Path(job["text"]).read_text(encoding="utf-8")
    encoding.encode_ordinary(text)
    taken = turns(lambda: encoding.encode_ordinary(text), lambda: None, job["seconds"])
    return {"MB/s": rates(Path(job["text"]).stat().st_size / 1e6, taken)}


# --- the bare limits ---------------------------------------------------------------------------

SIDE = 4096  # of the large matrix; a product with it is 137 GFLOP
LONG = (16_384, 8_192)  # 512 MiB, more than caches hold


def limits_jax(job: Job) -> Result:
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(jnp.matmul)
    a, m, v = jnp.ones((SIDE, SIDE)), jnp.ones(LONG), jnp.ones(LONG[1])
    return limits(
        job, lambda: multiply(a, a).block_until_ready(), lambda: multiply(m, v).block_until_ready()
    )


def limits_torch(job: Job) -> Result:
    import torch

    a, m, v = torch.ones(SIDE, SIDE), torch.ones(LONG), torch.ones(LONG[1])
    return limits(job, lambda: a @ a, lambda: m @ v)


def limits(job: Job, product: Callable[[], object], read: Callable[[], object]) -> Result:
    """FLOP/s of a large float32 product, and bytes/s of a matrix times a vector, which reads it."""
    product(), read()
    seconds = job["seconds"] / 2
    return {
        "float32 product, GFLOP/s": rates(2e-9 * SIDE**3, turns(product, lambda: None, seconds)),
        "memory read, GB/s": rates(4e-9 * math.prod(LONG), turns(read, lambda: None, seconds)),
    }


MEASURES: dict[str, dict[str, Callable[[Job], Result]]] = {
    "limits": {"jax": limits_jax, "PyTorch": limits_torch},
    "prepare": {"gptjax": prepare},
    "train": {"gptjax": train_gptjax, "nanoGPT": train_nanogpt, "plain PyTorch": train_plain},
    "decode": {
        "gptjax": decode_gptjax,
        "transformers": decode_transformers,
        "llama.cpp": decode_llamacpp,
    },
    "score": {"gptjax": score_gptjax, "transformers": score_transformers},
    "tokenise": {"gptjax": tokenise_gptjax, "tiktoken": tokenise_tiktoken},
}


def main(job: Job) -> None:
    try:
        result = MEASURES[job["task"]][job["side"]](job)
    except Absent as reason:
        result = {"absent": str(reason)}
    except ModuleNotFoundError as error:
        result = {"absent": f"{error.name} is not installed"}
    print(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
