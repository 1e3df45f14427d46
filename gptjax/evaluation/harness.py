"""Our models as EleutherAI's lm-evaluation-harness asks for them (the extra `harness`).

Log-likelihoods are those of the harness's own Hugging Face backend, without torch. Two things
differ. A begin token, where the tokenizer has one, stands before every text, but the rolling
likelihood does not score it as a token of the text. The name of a special token in a text is
plain text.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from gptjax import decode, model
from gptjax.config import Config, Sample, UserError
from gptjax.evaluation.tasks import Likelihood, Request, encode, loglikelihoods
from gptjax.progress import Progress
from gptjax.tokenizer import Tokenizer
from gptjax.trained import Opened

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ModuleNotFoundError as error:
    raise UserError(
        f"the harness lacks module {error.name!r}: pip install 'gptjax[harness]'"
    ) from error

__all__ = ["Harness", "evaluate", "make_table", "manager_of"]

CHUNK = 16  # tokens made between two looks for a stop text
# What a task may say of sampling, beside `do_sample`; what it leaves open is off.
SAMPLING = {"temperature": 0.0, "top_k": None, "top_p": None, "repetition_penalty": 1.0}


class Harness(LM):
    """One model; the mesh that its parameters lie on must be set while it is asked.

    Args:
        config: `model` with attention settled; `eval.batch_size` texts are generated at once,
            from `seed`.
        params: the tree of `init`.
        tokenizer: the model's.
    """

    def __init__(self, config: Config, params: model.Params, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._config, self._params, self._tokenizer = config, params, tokenizer
        self._begin = [] if tokenizer.bos is None else [tokenizer.bos]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): nats, never above 0, and whether it is greedy."""
        encoded = [encode(self._tokenizer, *request.args) for request in requests]
        return [
            (likelihood.nats, likelihood.greedy)
            for likelihood in self._score("loglikelihood", encoded)
        ]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of each (text,) all tokens, each scored once: nats, never above 0.

        Windows of `model.context` do not overlap, but for the last, which is as long as they.
        """
        windows = [self._windows(*request.args) for request in requests]
        scores = iter(
            self._score(
                "loglikelihood_rolling", [w for windows_of_text in windows for w in windows_of_text]
            )
        )
        return [
            sum((next(scores).nats for _ in windows_of_text), 0.0) for windows_of_text in windows
        ]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continues each (text, settings) up to the first of its stop texts.

        Raises:
            UserError: on settings that are not ours, or that leave no room for a prompt.
        """
        texts = [""] * len(requests)
        # Texts of one batch are drawn alike; the longest come first.
        prompts = [self._begin + self._tokenizer.encode(request.args[0]) for request in requests]
        key = lambda i: (repr(requests[i].args[1]), -len(prompts[i]))  # noqa: E731
        order = sorted(range(len(requests)), key=key)
        with Progress("generate_until", len(requests), transient=True) as progress:
            for _, group in itertools.groupby(order, key=lambda i: key(i)[0]):
                for batch in _cut(list(group), self._config.eval.batch_size):
                    settings = requests[batch[0]].args[1]
                    # A prompt asked twice is drawn twice.
                    seed = (self._config.seed + batch[0]) % 2**32
                    continuations = self._write([prompts[i] for i in batch], settings, seed)
                    for i, text in zip(batch, continuations, strict=True):
                        texts[i] = text
                    progress.advance(len(batch))
        return texts

    @functools.cached_property
    def _weights(self) -> decode.Weights:
        return decode.cast(self._config.model, self._params)

    def _score(self, description: str, requests: Sequence[Request]) -> list[Likelihood]:
        with Progress(description, len(requests), transient=True) as progress:
            return loglikelihoods(self._config.model, self._params, requests, progress.advance)

    def _windows(self, text: str) -> list[Request]:
        prefix = (self._begin or [self._tokenizer.eot])[0]
        ids, context = self._tokenizer.encode(text), self._config.model.context
        windows = get_rolling_token_windows(ids, prefix, max_seq_len=context, context_len=1)
        return [Request(*make_disjoint_window(window)) for window in windows]

    def _write(
        self,
        prompts: list[list[int]],
        settings: dict[str, Any],
        seed: int,
    ) -> list[str]:
        """What follows each prompt, of which the last tokens that fit the context are read."""
        until, sample = _sample(settings, len(prompts))
        room = self._config.model.context - sample.max_new_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks={sample.max_new_tokens} leaves no room for a prompt in "
                f"model.context={self._config.model.context}: let the task set less"
            )
        tokenizer = self._tokenizer
        ids: list[list[int]] = [[] for _ in prompts]
        specials = set(tokenizer.specials.values())
        for news in decode.stream(
            self._config.model,
            self._weights,
            [prompt[-room:] for prompt in prompts],
            sample,
            seed=seed,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.eot,
            stop_ids=tokenizer.stops,
            chunk=CHUNK,
        ):
            for row, new in zip(ids, news, strict=True):
                row += [i for i in new.ids if i not in specials]
            texts = [tokenizer.decode(row) for row in ids]
            if all(new.ended or _before(t, until) != t for new, t in zip(news, texts, strict=True)):
                break
        return [_before(text, until) for text in texts]


def _sample(settings: dict[str, Any], rows: int) -> tuple[list[str], Sample]:
    """The stop texts and the way to draw that a task's settings mean."""
    knobs_of_task: dict[str, Any] = {**normalize_gen_kwargs(settings)}
    until, most, draw = (knobs_of_task.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
    if unknown := knobs_of_task.keys() - SAMPLING.keys():
        raise UserError(
            f"generation setting {sorted(unknown)[0]!r} is not ours: until, max_gen_toks, "
            f"do_sample, {', '.join(SAMPLING)} are"
        )
    knobs = SAMPLING | knobs_of_task if draw else SAMPLING
    return until, Sample(prompt="", batch_size=rows, max_new_tokens=most, stop=None, **knobs)


def _before(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the stop texts."""
    stop_places = [text.find(stop) for stop in until if stop]
    return text[: min((at for at in stop_places if at >= 0), default=len(text))]


def _cut(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def manager_of(names: Sequence[str], include_path: Path | None = None) -> TaskManager:
    """The harness's tasks, before a model is opened for some of them.

    Args:
        names: tasks, groups or tags of the harness.
        include_path: a folder with further tasks.

    Raises:
        UserError: on an unknown task.
    """
    manager = TaskManager(include_path=include_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(f"the harness knows no task {unknown[0]!r}: see `lm_eval ls tasks`")
    return manager


def evaluate(
    model: Opened, names: Sequence[str], manager: TaskManager, limit: int | None = None
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` says of a model, on the mesh that is set.

    Args:
        names: tasks, groups or tags that `manager` knows.
        limit: only the first so many documents of each task.
    """
    # Its bootstrap would fork, which the threads of jax may not survive.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with redirect_stdout(sys.stderr):
        return lm_eval.simple_evaluate(
            Harness(model.config, model.params, model.tokenizer),
            tasks=list(names),
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
        )


def figures(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of each task in what `evaluate` returns, as JSON holds them: None for NaN."""

    def finite_or_none(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        name: {key: finite_or_none(value) for key, value in values.items()}
        for name, values in results["results"].items()
    }
