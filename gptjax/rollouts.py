"""Answers and their rewards: what a step of GRPO learns from, and how held-out prompts fare.

A step draws `data.group` answers to each of its prompts, by the parameters that it is about to change,
in the same process and on the same mesh. A function of the user's, `train.reward`, says what each is
worth; an answer's advantage is by how much it is worth more than the others of its group.
"""

from __future__ import annotations

import dataclasses
import hashlib
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax import alive, decode, model
from gptjax.config import Config, UserError
from gptjax.data.batches import Batch, Batches, Prompts
from gptjax.data.store import Store
from gptjax.perplexity import RowEvaluator
from gptjax.preferences import Means
from gptjax.storage import local
from gptjax.tokenizer import Tokenizer

Row = Mapping[str, Any]
MOST = 1e100  # of a reward, so that the squares of a group's can be added
HELD_OUT = 2**32  # in place of a seed, which is below that: all runs are scored by the same draws


class Reward(NamedTuple):
    """A function of the user's, (row of the data, answer) -> number, the same each time.

    Attributes:
        name: FILE.py:FUNCTION.
        sha256: of the file.
    """

    name: str
    sha256: str
    function: Callable[[Row, str], float]

    def __call__(self, row: Row, answer: str, place: str) -> float:
        """What the answer is worth.

        Args:
            place: of the row, in words.

        Raises:
            UserError: if the function fails, or gives no finite number.
        """
        try:
            value = float(self.function(row, answer))
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(
                f"train.reward={self.name} failed on {place}: {type(error).__name__}: {reason}"
            ) from error
        if not abs(value) < MOST:
            raise UserError(
                f"train.reward={self.name} gave {value} on {place}: a reward is a number below {MOST:g}"
            )
        return value


def load_reward(name: str) -> Reward:
    """The reward FILE.py:FUNCTION; the file may import its neighbours.

    Raises:
        UserError: if there is no such file or function, or the file cannot be run.
    """
    path, _, function = name.rpartition(":")
    file = local(path or name).absolute()
    if not path or not file.is_file():
        raise UserError(f"train.reward={name}: no file {file}; it is FILE.py:FUNCTION")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    # For good: it may import its neighbours when it is called, too.
    sys.path += [f for f in map(str, file.parents[:2]) if f not in sys.path]
    try:
        names = runpy.run_path(str(file))
    except (Exception, SystemExit) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(f"train.reward={name}: the file cannot be run: {reason}") from error
    if not callable(names.get(function)):
        raise UserError(f"train.reward={name}: the file has no function {function}")
    return Reward(name, sha256, names[function])


def advantages(rewards_B: np.ndarray, group: int) -> np.ndarray:
    """(r - mean) / (standard deviation + 1e-4) within each group of consecutive rows, float64 (B,).

    Shao et al. 2024, section 4.1.2. The deviation is that of a sample, with group - 1 below, as TRL
    has it; 1e-4 is TRL's too.
    """
    groups = in_groups(rewards_B, group)
    above = groups - groups.mean(1, keepdims=True)
    return (above / (groups.std(1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)


def in_groups(rewards_B: np.ndarray, group: int) -> np.ndarray:
    """By how much each reward is above the first of its group, a row: 0 where all are equal."""
    groups = rewards_B.reshape(-1, group)
    return groups - groups[:, :1]


def prompts_of(read: Batch[np.ndarray]) -> list[list[int]]:
    """The tokens of each row's prompt."""
    assert read.segments is not None
    return [t[s == 0].tolist() for t, s in zip(read.tokens, read.segments, strict=True)]


def lay(
    prompts: Sequence[Sequence[int]],
    texts: Sequence[decode.Text],
    advantages_B: np.ndarray,
    context: int,
    eot: int,
) -> Batch[np.ndarray]:
    """Prompts and answers as rows, (B, context): scored is what was drawn, with the token that ends it."""
    shape = (len(prompts), context)
    tokens, targets = np.full(shape, eot, np.int32), np.full(shape, eot, np.int32)
    weights, sampled, advantages_BT = np.zeros((3, *shape), np.float32)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids = [*prompt, *text.drawn]
        tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        here = slice(len(prompt) - 1, len(ids) - 1)
        weights[row, here], advantages_BT[row, here] = 1, advantages_B[row]
        sampled[row, here] = text.log_likelihood
    return Batch(tokens, targets, weights, sampled=sampled, advantages=advantages_BT)


class Rollouts:
    """Draws the answers of each step.

    Args:
        config: settled.
        batches: of prompts.
        tokenizer: theirs.
        reward: of the answers.
    """

    def __init__(
        self, config: Config, batches: Batches, tokenizer: Tokenizer, reward: Reward
    ) -> None:
        self._config, self._batches, self._tokenizer = config, batches, tokenizer
        self.reward = reward

    def __call__(
        self, params: model.Params, step: int
    ) -> tuple[Batch[np.ndarray], dict[str, float]]:
        """The rows of a step with answers, drawn by the whole model's `params`, and its metrics.

        Metrics: reward, the mean; reward_std, the mean of the groups' standard deviations;
        flat_groups, the share of the groups whose rewards are all equal, which teach nothing; and
        answer_tokens, drawn an answer.
        """
        alive.moves("answering prompts", step)
        config = self._config
        read = self._batches.rows(step, 0, config.data.batch_size)
        prompts = prompts_of(read)
        texts = answer(config, params, self._tokenizer, prompts, (config.seed, step))
        rewards_B = np.array(
            [
                self.reward(row, self._tokenizer.decode(text.ids), place)
                for (place, row), text in zip(self._batches.prompts(step), texts, strict=True)
            ]
        )
        spread = in_groups(rewards_B, config.data.group).std(1, ddof=1)
        told = {
            "reward": rewards_B.mean(),
            "reward_std": spread.mean(),
            "flat_groups": (spread == 0).mean(),
            "answer_tokens": np.mean([len(text.drawn) for text in texts]),
        }
        worth = advantages(rewards_B, config.data.group)
        laid = lay(prompts, texts, worth, config.model.context, self._tokenizer.eot)
        return laid, {name: float(value) for name, value in told.items()}


def answer(
    config: Config,
    params: model.Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    draw: tuple[int, int],
) -> list[decode.Text]:
    """An answer to each prompt, of `train.answer_tokens` at most, ended as in a chat.

    It is drawn from the model's own distribution, by a key of the numbers `draw`.
    """
    (seed,) = np.random.SeedSequence(draw).generate_state(1).tolist()
    sample = dataclasses.replace(
        config.sample, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0,
        max_new_tokens=config.train.answer_tokens,
    )  # fmt: skip
    return decode.generate(
        config.model, params, prompts, sample, seed=seed, vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.eot, stop_ids=tokenizer.stops, scored=True,
    )  # fmt: skip


class RewardEvaluator(RowEvaluator):
    """The mean reward of answers to the prompts of one store, drawn by the same key each time.

    Args:
        config: settled.
        store: of prompts.
        tokenizer: the store's.
        reward: of the answers.
    """

    rows: Prompts

    def __init__(self, config: Config, store: Store, tokenizer: Tokenizer, reward: Reward) -> None:
        super().__init__(config, store, tokenizer)
        self._config, self._reward = config, reward

    def __call__(
        self, params: model.Params, advance: Callable[[int], None] = lambda tokens: None
    ) -> Any:
        """The `Means` of all rows: loss is minus the reward."""
        rewards, tokens = 0.0, 0
        for first in range(0, self._count, self._at_once):
            index = np.arange(first, min(first + self._at_once, self._count))
            prompts = prompts_of(self.rows.rows(index))
            # As many each time, which is one program.
            prompts += prompts[:1] * (self._at_once - len(index))
            texts = answer(self._config, params, self._tokenizer, prompts, (HELD_OUT, first))
            for document, text in zip(self.rows.kept[index].tolist(), texts, strict=False):
                said = self._tokenizer.decode(text.ids)
                place, row = self.rows.source(document)
                rewards += self._reward(row, said, place)
                tokens += len(text.drawn)
            advance(len(index) * self.rows.context)
        sums = {"loss": -rewards, "reward": rewards, "answer_tokens": float(tokens)}
        return Means(sums, float(self._count), "answers")
