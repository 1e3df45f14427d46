"""One measurement of one side, in a process of its own: what `run.py` and `gpu.py` start.

    python experiments/peers/measure.py '{"task": "train", "side": "gptjax", ...}'

The last line of standard output is the result as JSON: numbers, and lists of one number for each
of several turns within the process. Each side imports only what it needs, when it starts, so that
memory and time to the first step are its own. `MEASURES` says which sides a task has. A job names
its device, "cpu" or "cuda", and its dtype: in "bfloat16" gptjax computes in it, PyTorch under
autocast; parameters, their updates and the losses are float32 on every side.
"""

from __future__ import annotations

import contextlib
import dataclasses
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


def peak_memory(job: Job) -> float | None:
    """The most memory of the job so far, MB; None where nothing tells.

    On a GPU what its arrays held there, else what of this process was resident.
    """
    if job["device"] == "cuda" and job["side"] == "gptjax":
        import jax

        return 1e-6 * jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    if job["device"] == "cuda":
        import torch

        return 1e-6 * torch.cuda.max_memory_allocated()
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

    The model is the one named by the job, or GPT-2 of the shape with gptjax's initial weights,
    unless "weights" is false: then only gptjax trains, which has its own.
    """
    import jax

    from gptjax import accounting, model, tokenizer, trained
    from gptjax.interop import hf, pretrained

    folder = Path(job["folder"])
    out, text = folder / "model", Path(job["text"]).read_text(encoding="utf-8")
    if job["model"]:
        pretrained.import_(job["model"], out)
        if str(job["model"]).endswith(".gguf"):
            pretrained.import_(job["model"], folder / "blocks", quantised=True)
        config = trained.find(out).config.model
        name = pretrained.read(out).tokenizer
        if name is None:
            raise Absent(f"{job['model']} has no tokenizer")
        # So much text as a few batches need.
        ids = np.array(tokenizer.load(name).encode(text[:500_000]))
        assert len(ids) > 10_000, "the text is too short"
    else:
        config = gptjax_config(job).model
        if job.get("weights", True):
            # As GPT-2 has biases, so does what transformers is given.
            biased = gptjax_config(job, "--config.model.bias=True").model
            hf.export(out, biased, model.init(biased, 0), None)
        ids = encode(text, config.vocab_size)
    np.save(folder / "tokens.npy", ids.astype(np.uint16))
    weights = sum(math.prod(s.shape) for s in jax.tree.leaves(model.abstract_params(config)))
    return {
        "flops_per_token": accounting.train_flops_per_token(config, causal=True),
        "parameters": weights,
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
    """The recipe of a shape: AdamW at a constant rate, no biases, as nanoGPT trains.

    Other words for it, those of the job and then `overrides`, come last.
    """
    from gptjax import configure

    s = job["shape"]
    knobs = {
        "model.vocab_size": s["vocab_size"], "model.context": s["context"],
        "model.layers": s["layers"], "model.width": s["width"], "model.heads": s["heads"],
        "model.bias": False, "model.dtype": job["dtype"], "data.batch_size": s["rows"],
        "train.accumulation": 1, "optim.peak_lr": s["rate"], "optim.schedule": "constant",
        "optim.warmup_steps": 0, "optim.b2": 0.99,
    }  # fmt: skip
    words = [f"--config.{knob}={value}" for knob, value in knobs.items()]
    recipe = str(configure.RECIPES / s.get("recipe", "base.py"))
    return configure.from_file(recipe, [*words, *job.get("overrides", ()), *overrides])


@contextlib.contextmanager
def gptjax_started(mesh: Any) -> Iterator[None]:
    """jax as gptjax's commands start it, on the mesh of a config."""
    import jax

    from gptjax import sharding
    from gptjax.commands import command

    command.prepare_jax(None)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        yield


def gptjax_batch(
    tokens: np.ndarray,
    targets: np.ndarray,
    dims: str,
    accumulation: int = 1,
    documents: int | None = None,
) -> Any:
    """The batch on the mesh; each row is one document, or so many that do not see each other."""
    from gptjax import sharding
    from gptjax.data.batches import Batch

    rows, micro = len(tokens) // accumulation, [accumulation] * dims.count("A")
    shape = (rows, *micro, tokens.shape[1])
    arrays = [tokens.astype(np.int32), targets.astype(np.int32), np.ones(tokens.shape, np.float32)]
    if documents is not None:
        index = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        arrays += divmod(index, np.int32(tokens.shape[1] // documents))
    whole = Batch(*(array.reshape(shape) for array in arrays))
    return sharding.place(
        lambda start, stop: whole._make(a if a is None else a[start:stop] for a in whole),
        rows,
        dims,
    )


@contextlib.contextmanager
def gptjax_model(job: Job) -> Iterator[tuple[Any, Any]]:
    """The settled config and the parameters of the prepared model, which computes in the dtype."""
    from gptjax import setup, trained
    from gptjax.interop import pretrained

    blocks = job.get("blocks", False)
    source = trained.find(Path(job["folder"], "blocks" if blocks else "model"))
    assert source.source is not None
    with gptjax_started(source.config.mesh):
        knobs = {"dtype": job["dtype"], "products": job.get("products", "dtype")}
        config = dataclasses.replace(setup.settle(source.config).model, **knobs)
        yield config, pretrained.load(source.source, blocks).params


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
            micros, documents = config.train.accumulation, job.get("documents")
            batch = gptjax_batch(*next(data), "BAT", micros, documents)
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
        "peak memory, MB": peak_memory(job),
        "loss, first step": losses[0],
        "loss, last equal step": losses[-1],
        **({"losses": losses} if job.get("curve") else {}),
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
    return {**result, "peak memory, MB": peak_memory(job)}


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
        "peak memory, MB": peak_memory(job),
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
    model = GPT(config).to(torch_device(job))
    optimizer = model.configure_optimizers(0.1, s["rate"], (0.9, 0.99), job["device"])
    return train_torch(job, model, optimizer)


def train_plain(job: Job) -> Result:
    import torch
    from plain import GPT

    s = job["shape"]
    model = GPT(s["vocab_size"], s["context"], s["layers"], s["width"], s["heads"])
    model.to(torch_device(job))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s["rate"], betas=(0.9, 0.99), fused=True)
    return train_torch(job, model, optimizer)


def torch_device(job: Job) -> Any:
    """The device of a job.

    Raises:
        Absent: if PyTorch does not see it.
    """
    import torch

    if job["device"] == "cuda" and not torch.cuda.is_available():
        raise Absent("PyTorch sees no GPU")
    return torch.device(job["device"])


def torch_wait(job: Job) -> None:
    """Returns when all that was asked of the device is done."""
    import torch

    if job["device"] == "cuda":
        torch.cuda.synchronize()


def train_torch(job: Job, model: Any, optimizer: Any) -> Result:
    import torch
    from plain import load_gpt2
    from safetensors.torch import load_file

    load_gpt2(model, load_file(Path(job["folder"], "model", "model.safetensors")))
    compiled, data = torch.compile(model, disable=job.get("smoke", False)), batches(job)
    narrow = torch.autocast(job["device"], torch.bfloat16, enabled=job["dtype"] == "bfloat16")

    def place(ids: np.ndarray) -> Any:
        """As nanoGPT's train.py does: pinned, so that the copy does not wait."""
        tensor = torch.from_numpy(ids)
        if job["device"] == "cuda":
            tensor = tensor.pin_memory().to("cuda", non_blocking=True)
        return tensor

    def step() -> Any:
        tokens, targets = map(place, next(data))
        with narrow:
            _, loss = compiled(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return train(job, step, lambda: torch_wait(job))


def transformers_model(job: Job) -> Any:
    import torch
    import transformers

    folder, dtype = Path(job["folder"], "model"), getattr(torch, job["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(torch_device(job))


def decode_transformers(job: Job) -> Result:
    import torch

    model, new = transformers_model(job), job["new_tokens"]
    model.generation_config.eos_token_id = None

    def write(prompts: list[list[int]]) -> int:
        ids = torch.tensor(prompts, device=model.device)
        options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options).cpu()
        return out.numel() - ids.numel()

    return decode(job, write)


def score_transformers(job: Job) -> Result:
    import torch

    model = transformers_model(job)

    @torch.inference_mode()
    def score(tokens: np.ndarray, targets: np.ndarray) -> float:
        ids, wanted = (torch.from_numpy(a).to(model.device) for a in (tokens, targets))
        logits_RV = model(ids).logits.flatten(0, 1).float()
        return float(torch.nn.functional.cross_entropy(logits_RV, wanted.flatten()))

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


def limits_jax(job: Job) -> Result:
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(jnp.matmul)
    a, m, v = (
        jax.random.normal(jax.random.key(0), shape, job["dtype"]) for shape in limit_shapes(job)
    )
    return limits(
        job, lambda: multiply(a, a).block_until_ready(), lambda: multiply(m, v).block_until_ready()
    )


def limits_torch(job: Job) -> Result:
    import torch

    device, dtype = torch_device(job), getattr(torch, job["dtype"])
    a, m, v = (torch.randn(shape, dtype=dtype, device=device) for shape in limit_shapes(job))

    def product() -> None:
        a @ a
        torch_wait(job)

    def read() -> None:
        m @ v
        torch_wait(job)

    return limits(job, product, read)


def limit_shapes(job: Job) -> tuple[tuple[int, ...], ...]:
    """Of a large square matrix, of a longer one that caches do not hold, and of a vector for it."""
    side = job["matrix_side"]
    return (side, side), (4 * side, 2 * side), (2 * side,)


def limits(job: Job, product: Callable[[], object], read: Callable[[], object]) -> Result:
    """FLOP/s of a large product, and bytes/s of a matrix times a vector, which reads it.

    The numbers are random: on ones or zeros processors draw less power, and some run faster.
    """
    product(), read()
    square, matrix, _ = limit_shapes(job)
    flops = 2 * square[0] ** 3
    size = math.prod(matrix) * (2 if job["dtype"] == "bfloat16" else 4)
    seconds, nothing = job["seconds"] / 2, lambda: None
    return {
        f"{job['dtype']} product, GFLOP/s": rates(1e-9 * flops, turns(product, nothing, seconds)),
        "memory read, GB/s": rates(1e-9 * size, turns(read, nothing, seconds)),
    }


# --- of a GPU -----------------------------------------------------------------------------------


def device_gptjax(job: Job) -> Result:
    """What jax runs on, in words, and its published peak of bf16 products, or None."""
    import jax

    from gptjax import accounting

    device = jax.devices()[0]
    peak, source = accounting.peak_flops(device)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "peak, GFLOP/s": None if peak is None else 1e-9 * peak,
        "peak from": source,
    }


def in_blocks(measure: Callable[[Job], Result]) -> Callable[[Job], Result]:
    """The weights as the .gguf file has them."""

    def of_file(job: Job) -> Result:
        if not str(job["model"]).endswith(".gguf"):
            raise Absent("reads .gguf files: --model=FILE.gguf")
        return measure(job | {"blocks": True})

    return of_file


def in_int8(measure: Callable[[Job], Result]) -> Callable[[Job], Result]:
    return lambda job: measure(job | {"products": "int8"})


MEASURES: dict[str, dict[str, Callable[[Job], Result]]] = {
    "device": {"gptjax": device_gptjax},
    "limits": {"jax": limits_jax, "PyTorch": limits_torch},
    "prepare": {"gptjax": prepare},
    "train": {"gptjax": train_gptjax, "nanoGPT": train_nanogpt, "plain PyTorch": train_plain},
    "decode": {
        "gptjax": decode_gptjax,
        "gptjax int8": in_int8(decode_gptjax),
        "gptjax blocks": in_blocks(decode_gptjax),
        "transformers": decode_transformers,
        "llama.cpp": decode_llamacpp,
    },
    "score": {
        "gptjax": score_gptjax,
        "gptjax int8": in_int8(score_gptjax),
        "transformers": score_transformers,
    },
    "tokenise": {"gptjax": tokenise_gptjax, "tiktoken": tokenise_tiktoken},
}


def answer(job: Job) -> Result:
    try:
        return MEASURES[job["task"]][job["side"]](job)
    except Absent as reason:
        return {"absent": str(reason)}
    except ModuleNotFoundError as error:
        return {"absent": f"{error.name} is not installed"}


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
