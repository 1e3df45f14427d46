"""Tasks that ask how likely a text goes on as it should: LAMBADA and multiple choice.

Contexts and continuations become tokens as EleutherAI's lm-evaluation-harness makes them, so
that its `acc`, `perplexity` and `acc_bytes` are what is measured here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax.sharding import PartitionSpec as P

from gptjax import model, sharding
from gptjax.config import Model, UserError
from gptjax.evaluation import audit, summary
from gptjax.evaluation.bootstrap import interval
from gptjax.interop import pretrained
from gptjax.layers.attention import ATTENTION, kernel_for
from gptjax.progress import Progress, say
from gptjax.report.interval import CONFIDENCE
from gptjax.report.terminal import number
from gptjax.tokenizer import Tokenizer
from gptjax.trained import Opened, Trained

AT_ONCE = 4096  # tokens of a batch on each of the devices that share its rows


class Request(NamedTuple):
    """Token ids; the context, whose own likelihood does not count, has at least one."""

    context: list[int]
    continuation: list[int]


class Likelihood(NamedTuple):
    """Of a continuation, given its context."""

    nats: float  # log-likelihood: never above 0
    greedy: bool  # each of its tokens is the likeliest one


def encode(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """The tokens of a context and its continuation.

    As in the harness: spaces that end the context begin the continuation, whose tokens are
    those of both as one text, less as many as the context has alone. An empty context is the
    begin token, or end-of-text where there is none.

    Raises:
        UserError: on a continuation that is left with no token of its own.
    """
    ids = tokenizer.encode(context.rstrip())
    whole = tokenizer.encode(context + continuation)
    if len(whole) <= len(ids):
        raise UserError(
            f"continuation {continuation!r} has no token of its own after {context[-40:]!r}: let "
            "it begin with a space"
        )
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    return Request((begin + ids) or [tokenizer.eot], whole[len(ids) :])


def loglikelihoods(
    config: Model,
    params: model.Params,
    requests: Sequence[Request],
    advance: Callable[[int], None] = lambda requests: None,
) -> list[Likelihood]:
    """How likely each continuation is after its context, on the current mesh.

    Requests of like length share a batch. Of one longer than `config.context` + 1 tokens the
    first are cut off, as the harness does.

    Args:
        config: the architecture, attention settled.
        params: the tree of `init`.
        requests: in any order.
        advance: hears of every so many requests done.

    Raises:
        UserError: on a continuation that is longer than the context of the model, or a context
            that does not divide over the mesh.
        ValueError: on a request without context.
    """
    for index, request in enumerate(requests):
        if not request.context:
            raise ValueError(f"request {index} has no token that its continuation can follow")
        if len(request.continuation) > config.context:
            raise UserError(
                f"continuation {index} has {len(request.continuation)} tokens, more than the "
                f"context of {config.context}: shorten it"
            )
    likelihoods = [Likelihood(0.0, True)] * len(requests)
    pending: list[tuple[np.ndarray, tuple[jax.Array, jax.Array]]] = []

    def collect() -> None:
        chosen, scores = pending.pop(0)
        for index, logp_S, likeliest_S in zip(chosen, *jax.device_get(scores), strict=False):
            n = len(requests[index].continuation)
            total = float(logp_S[:n].sum(dtype=np.float64))
            likelihoods[index] = Likelihood(total, bool(likeliest_S[:n].all()))
        advance(len(chosen))

    lengths = [len(r.context) + len(r.continuation) - 1 for r in requests]
    for chosen, rows, width in _batches(np.array(lengths), config):
        batch = sharding.place(_loader([requests[i] for i in chosen], width), rows, "BT")
        pending.append((chosen, _score(config, params, batch)))
        if len(pending) > 1:  # one batch runs while the one before is read
            collect()
    while pending:
        collect()
    return likelihoods


def _batches(lengths: np.ndarray, config: Model) -> Iterator[tuple[np.ndarray, int, int]]:
    """The requests of each batch, longest first, its rows and their width.

    Widths are few, four from one power of two to the next, because each is a program to compile.
    """
    sharding.check_context("model.context", config.context)
    multiple = math.lcm(16, ATTENTION[kernel_for(config, config.context)].multiple)
    multiple *= sharding.round_up(1, "T")
    remaining = np.argsort(-lengths, kind="stable")
    while len(remaining):
        units = max(1, -(-int(lengths[remaining[0]]) // multiple))
        width = min(_round_up(units) * multiple, config.context)
        rows = min(max(1, AT_ONCE // width), _round_up(len(remaining)))
        rows = sharding.round_up(1, "B") * rows
        yield remaining[:rows], rows, width
        remaining = remaining[rows:]


def _round_up(count: int) -> int:
    """To a number of three binary digits and zeros: by a quarter at most."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


def _loader(requests: Sequence[Request], width: int) -> Callable[[int, int], dict[str, np.ndarray]]:
    """Rows of a batch for `sharding.place`; those beyond the requests are padding.

    Targets stand at the beginning of their row; "places" says which token predicts each.
    """
    longest = max(len(request.continuation) for request in requests)
    # A power of four, likewise to have few programs.
    scored = 4 ** max(1, -(-(longest - 1).bit_length() // 2))
    scored = min(sharding.round_up(scored, "T"), width)

    def load(start: int, stop: int) -> dict[str, np.ndarray]:
        tokens_BT = np.zeros((stop - start, width), np.int32)
        places_BS, targets_BS = np.zeros((2, stop - start, scored), np.int32)
        for row, (context, continuation) in enumerate(requests[start:stop]):
            read_tokens = (context + continuation)[:-1][-width:]
            n = len(continuation)
            tokens_BT[row, : len(read_tokens)] = read_tokens
            places_BS[row, :n] = range(len(read_tokens) - n, len(read_tokens))
            targets_BS[row, :n] = continuation
        return {"tokens": tokens_BT, "places": places_BS, "targets": targets_BS}

    return load


@functools.partial(jax.jit, static_argnums=0)
def _score(
    config: Model, params: model.Params, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Log-likelihood and whether it is the likeliest, of each target; S counts targets."""
    x_BTD = model.hidden(config, params, batch["tokens"]).x_BTD
    x_BTD = sharding.shard(x_BTD, "BSD")  # whole rows, where they were split
    # The unembedding is a large part of a small model: only what predicts a target goes there.
    place_BST = batch["places"][:, :, None] == jnp.arange(x_BTD.shape[1])
    x_BSD = jnp.einsum(
        "BST,BTD->BSD",
        place_BST.astype(x_BTD.dtype),
        x_BTD,
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=sharding.out("BTD"),
    )
    logits_BSV = model.logits(config, params, x_BSD)
    target_BSV = batch["targets"][:, :, None] == jnp.arange(logits_BSV.shape[-1])
    target_BS = jnp.sum(logits_BSV, axis=-1, where=target_BSV)
    logp_BS = target_BS - jax.nn.logsumexp(logits_BSV, axis=-1)
    likeliest_BS = jnp.argmax(logits_BSV, axis=-1) == batch["targets"]
    # Whole on every device, so that every process of a cluster can read it.
    scores = logp_BS, likeliest_BS
    return scores if sharding.out("B") is None else jax.reshard(scores, P())


class Figure(NamedTuple):
    """A measure and its 95% interval; NaN where there is none."""

    value: float
    low: float
    high: float


class Task(NamedTuple):
    """A kind of jsonl file.

    Attributes:
        form: what an object in it must have.
        valid: whether one has; it may raise instead.
        requests: what an object asks, as (context, continuation).
        figures: of all objects and the likelihoods of each one's continuations.
        convention: what the figures mean.
    """

    form: str
    valid: Callable[[Any], bool]
    requests: Callable[[Any], list[tuple[str, str]]]
    figures: Callable[[list[Any], list[list[Likelihood]]], dict[str, Figure]]
    convention: str


def last_word(line: Any) -> list[tuple[str, str]]:
    """LAMBADA (Paperno et al. 2016) in OpenAI's version: all but the last word, and that one."""
    context, _, word = line["text"].rpartition(" ")
    return [(context, f" {word}")]


def last_word_figures(lines: list[Any], likelihoods: list[list[Likelihood]]) -> dict[str, Figure]:
    nats_U = -np.array([word.nats for (word,) in likelihoods])
    ends = (nats_U.mean(), *interval(nats_U, np.ones(len(nats_U))))
    return {
        "accuracy": share(word.greedy for (word,) in likelihoods),
        "perplexity": Figure(*(math.exp(x) if not x > 700 else math.inf for x in ends)),
    }


def choices(line: Any) -> list[tuple[str, str]]:
    return [(line["query"], f" {choice}") for choice in line["choices"]]


def choices_figures(lines: list[Any], likelihoods: list[list[Likelihood]]) -> dict[str, Figure]:
    def right(line: Any, answers: list[Likelihood], by_bytes: bool) -> bool:
        sizes = [len(choice.encode()) if by_bytes else 1 for choice in line["choices"]]
        nats = [answer.nats / size for answer, size in zip(answers, sizes, strict=True)]
        # Of NaN argmax takes the first, which is no choice.
        return not np.isnan(nats).any() and int(np.argmax(nats)) == line["gold"]

    return {
        name: share(right(*pair, by_bytes) for pair in zip(lines, likelihoods, strict=True))
        for name, by_bytes in (("accuracy", False), ("accuracy_bytes", True))
    }


def share(right: Iterable[bool]) -> Figure:
    """How many of them, with Wilson's interval (1927)."""
    answers = list(right)
    ends = scipy.stats.binomtest(sum(answers), len(answers)).proportion_ci(CONFIDENCE, "wilson")
    return Figure(sum(answers) / len(answers), float(ends.low), float(ends.high))


def valid_choices(line: Any) -> bool:
    texts, gold = line["choices"], line["gold"]
    return (
        type(line["query"]) is str
        and all(type(text) is str and text for text in texts)
        and type(gold) is int
        and 0 <= gold < len(texts)
    )


TASKS: dict[str, Task] = {
    "lambada": Task(
        '"text": a text',
        lambda line: type(line["text"]) is str,
        last_word,
        last_word_figures,
        "the last word with the space before it is the target; accuracy: greedy decoding gives "
        "all its tokens (Wilson interval); perplexity: exp of the mean over documents of the "
        "nats of the whole word (bootstrap over documents); harness: lambada_openai",
    ),
    "choices": Task(
        '"query": a text, "choices": a list of texts, "gold": the index of the right one from 0',
        valid_choices,
        choices,
        choices_figures,
        "each choice follows the query and a space; accuracy: the likeliest choice is right; "
        "accuracy_bytes: the same with log-likelihoods by the choice's UTF-8 bytes, without the "
        "space (Wilson intervals); harness: acc and acc_bytes (its acc_norm divides by "
        "characters)",
    ),
}


def read_lines(task: Task, file: Path, limit: int | None) -> list[Any]:
    """The objects in the first `limit` lines of a jsonl file.

    Raises:
        UserError: naming the line that is not what the task takes, or on an empty file.
    """
    lines: list[Any] = []
    with file.open("rb") as stream:
        for place, text in enumerate(stream, 1):
            if len(lines) == limit:
                break
            try:
                line = json.loads(text)
                valid = task.valid(line)
            except (ValueError, TypeError, KeyError):
                valid = False
            if not valid:
                raise UserError(f"{file}, line {place}: this is no JSON object with {task.form}")
            lines.append(line)
    if not lines:
        raise UserError(f"{file} is empty: each line is to be a JSON object with {task.form}")
    return lines


def read_files(files: Mapping[str, Path], limit: int | None) -> dict[str, list[Any]]:
    """`read_lines` of {row of TASKS: its jsonl file}, by the row."""
    return {name: read_lines(TASKS[name], file, limit) for name, file in files.items()}


def evaluate(
    found: Trained, model: Opened, files: Mapping[str, Path], lines: Mapping[str, list[Any]]
) -> dict[str, Any]:
    """Measures a model by tasks, on the mesh that is set.

    Args:
        found: the model as it lies there.
        model: the same, at hand.
        files: {row of TASKS: its jsonl file}.
        lines: of each, by `read_files`.

    Returns:
        The model's identity, and for each task its figures, counts and convention, as JSON holds
        them.
    """
    config, step, params, tokenizer = model
    return {
        "workdir": str(found.folder),
        **({} if found.source is None else {"files": pretrained.files(found.source)}),
        "step": step,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "model_sha256": audit.fingerprint(params),
        "numerics": audit.numerics(config.model),
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.fingerprint,
        "context": config.model.context,
        "tasks": {
            name: _measure(name, files[name], lines[name], config.model, params, tokenizer)
            for name in files
        },
    }


def _measure(
    name: str,
    file: Path,
    lines: list[Any],
    config: Model,
    params: model.Params,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    task = TASKS[name]
    requests_of_lines = [
        [encode(tokenizer, *pair) for pair in task.requests(line)] for line in lines
    ]
    flat = [request for requests in requests_of_lines for request in requests]
    tokens, began = sum(len(r.context) + len(r.continuation) for r in flat), time.perf_counter()
    with Progress(name, len(flat), transient=True) as progress:
        likelihoods = iter(loglikelihoods(config, params, flat, progress.advance))
    seconds = time.perf_counter() - began
    say(f"{name}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
    figures = task.figures(
        lines, [[next(likelihoods) for _ in requests] for requests in requests_of_lines]
    )
    finite_or_none = lambda x: x if math.isfinite(x) else None  # noqa: E731
    return {
        "file": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "documents": len(lines),
        "requests": len(flat),
        "tokens": tokens,
        "scored_tokens": sum(len(r.continuation) for r in flat),
        **{figure: finite_or_none(f.value) for figure, f in figures.items()},
        "interval": {
            figure: [finite_or_none(f.low), finite_or_none(f.high)] for figure, f in figures.items()
        },
        "convention": task.convention,
    }


def show(record: dict[str, Any]) -> None:
    """Prints what `evaluate` returns."""
    print(
        f"{record['workdir']}, step {record['step']:,}, {record['parameters']:,} parameters, "
        f"sha256 {record['model_sha256'][:16]}; {record['numerics']}; "
        f"tokenizer {record['tokenizer']}, "
        f"sha256 {record['tokenizer_sha256'][:16]}; context {record['context']:,}"
    )
    for name, t in record["tasks"].items():
        print(
            f"{name}: {t['file']}, sha256 {t['sha256'][:16]}; {t['documents']:,} documents, "
            f"{t['requests']:,} continuations of {t['scored_tokens']:,} tokens"
        )
        for figure, ends in t["interval"].items():
            print(f"  {figure} {number(t[figure])}, 95% {summary.interval(ends)}")
        print(f"  {t['convention']}")
