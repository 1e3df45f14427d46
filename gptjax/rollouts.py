"""Answers and their rewards: what a step of GRPO learns from, and how held-out prompts fare.

A step draws `data.group` answers to each of its prompts, by the parameters that it is about to change,
in the same process and on the same mesh. A function of the user's, `train.reward`, says what each is
worth; an answer's advantage is by how much it is worth more than the others of its group.

Answers are drawn from what training computes, to its last bit on one CPU (`answer_as_trained`): they are
written with a cache, which rounds otherwise, and mended where the step's own forward pass draws another token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import alive, decode, model, sharding, state
from gptjax.config import Config, UserError
from gptjax.data.batches import Batch, Batches, Prompts
from gptjax.data.store import Store
from gptjax.perplexity import RowEvaluator
from gptjax.preferences import Means
from gptjax.storage import local
from gptjax.tokenizer import Tokenizer
from gptjax.trainable import trainable

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
            given = self.function(row, answer)
            value = float(given)
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(
                f"train.reward={self.name} failed on {place}: {type(error).__name__}: {reason}"
            ) from error
        if isinstance(given, str) or not abs(value) < MOST:
            raise UserError(
                f"train.reward={self.name} gave {given!r} on {place}: a reward is a number below "
                f"{MOST:g}"
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


class Drawn(NamedTuple):
    """An answer.

    Attributes:
        ids: with the token that ends it, unless it is cut.
        log_likelihood: of each, nats.
    """

    ids: list[int]
    log_likelihood: list[float]


def lay(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Drawn],
    advantages_B: np.ndarray,
    context: int,
    eot: int,
) -> Batch[np.ndarray]:
    """Prompts and answers as rows, (B, context): scored is what was drawn, with the token that ends it."""
    shape = (len(prompts), context)
    tokens, targets = np.full(shape, eot, np.int32), np.full(shape, eot, np.int32)
    weights, sampled, advantages_BT = np.zeros((3, *shape), np.float32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = [*prompt, *answer.ids]
        tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        here = slice(len(prompt) - 1, len(ids) - 1)
        weights[row, here], advantages_BT[row, here] = 1, advantages_B[row]
        sampled[row, here] = answer.log_likelihood
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
        self, now: state.TrainState, step: int
    ) -> tuple[Batch[jax.Array], dict[str, float]]:
        """The batch of a step, (B, A, T) on the mesh, with answers by the model as it is `now`, and
        its metrics.

        Metrics: reward, the mean; reward_std, the mean of the groups' standard deviations;
        flat_groups, the share of the groups whose rewards are all equal, which teach nothing;
        answer_tokens, drawn an answer; and passes, as `answer_as_trained` counts them.
        """
        alive.moves("answering prompts", step)
        config, tokenizer = self._config, self._tokenizer
        prompts = prompts_of(self._batches.rows(step, 0, config.data.batch_size))
        seed = seed_of(config.seed, step)
        answers, passes = answer_as_trained(config, now, tokenizer, prompts, seed)
        said = [[i for i in answer.ids if i not in tokenizer.stops] for answer in answers]
        rewards_B = np.array(
            [
                self.reward(row, tokenizer.decode(ids), place)
                for (place, row), ids in zip(self._batches.prompts(step), said, strict=True)
            ]
        )
        spread = in_groups(rewards_B, config.data.group).std(1, ddof=1)
        told = {
            "reward": rewards_B.mean(),
            "reward_std": spread.mean(),
            "flat_groups": (spread == 0).mean(),
            "answer_tokens": np.mean([len(answer.ids) for answer in answers]),
            "passes": passes,
        }
        worth = advantages(rewards_B, config.data.group)
        laid = lay(prompts, answers, worth, config.model.context, tokenizer.eot)
        return place_rows(config, laid), {name: float(value) for name, value in told.items()}


def place_rows(config: Config, rows: Any) -> Any:
    """Arrays (B, T) of a step as (B, A, T) on the mesh: row r is of micro-batch r % A."""
    A = config.train.accumulation
    rows = jax.tree.map(lambda x: x.reshape(-1, A, x.shape[-1]), rows)
    read = lambda start, stop: jax.tree.map(lambda x: x[start:stop], rows)  # noqa: E731
    return sharding.place(read, config.data.batch_size // A, "BAT")


def answer_as_trained(
    config: Config,
    now: state.TrainState,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    seed: int,
) -> tuple[list[Drawn], int]:
    """An answer to each prompt of a step, drawn by what its update computes of these rows.

    What `answer` writes is a draft. A forward pass of the step draws again after each of its tokens,
    by the same key; the first token that differs takes the place of the draft's, which is then
    written on from there. So a draft decides how long it takes, and nothing of the answers: as in
    speculative decoding (Leviathan et al. 2023, arXiv:2211.17192), but with one noise for both.

    Returns:
        The answers, and how many forward passes they took: 1 where no draft was changed.
    """
    forward, context = state.make_forward(config), config.model.context
    params = trainable(config).whole(now.params, now.frozen)
    texts = [list(prompt) for prompt in prompts]
    ends = [min(len(text) + config.train.answer_tokens, context) for text in texts]
    A, passes = config.train.accumulation, 0
    shape = (len(texts), context)
    ids_BT, said_BT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)

    def goes_on(row: int) -> bool:
        text = texts[row]
        return len(text) < ends[row] and (
            len(text) == len(prompts[row]) or text[-1] not in tokenizer.stops
        )

    while going := [row for row in range(len(texts)) if goes_on(row)]:
        drafts = answer(config, params, tokenizer, texts, seed)
        for row in going:
            texts[row] = (texts[row] + drafts[row].ids)[: ends[row]]
        tokens_BT = np.full(shape, tokenizer.eot, np.int32)
        for row, text in enumerate(texts):
            tokens_BT[row, : len(text)] = text
        tokens_BAT = place_rows(config, tokens_BT)
        for micro in range(A):
            x_BTD = forward(now, tokens_BAT, micro)
            row_B = np.arange(micro, len(texts), A)
            again = decode.draw_again(
                config.model, tokenizer.vocab_size, params, x_BTD, row_B, jax.random.key(seed)
            )
            ids_BT[row_B], said_BT[row_B] = jax.device_get(again)
        passes += 1
        for row in going:
            for i in range(len(prompts[row]), ends[row]):
                right = int(ids_BT[row, i - 1])
                if texts[row][i : i + 1] != [right]:  # the draft's is another, or it ended
                    texts[row][i:] = [right]
                    break
                if right in tokenizer.stops:
                    break
    answers = []
    for prompt, text, said_T in zip(prompts, texts, said_BT, strict=True):
        n = len(prompt)
        answers.append(Drawn(text[n:], said_T[n - 1 : len(text) - 1].tolist()))
    return answers, passes


def seed_of(*numbers: int) -> int:
    """One seed for the numbers that a draw depends on."""
    (seed,) = np.random.SeedSequence(numbers).generate_state(1).tolist()
    return int(seed)


def answer(
    config: Config,
    params: model.Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    seed: int,
) -> list[decode.Text]:
    """An answer to each prompt, of `train.answer_tokens` at most, ended as in a chat.

    It is drawn from the model's own distribution.
    """
    sample = dataclasses.replace(
        config.sample, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0,
        max_new_tokens=config.train.answer_tokens,
    )  # fmt: skip
    return decode.generate(
        config.model, params, prompts, sample, seed=seed, vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.eot, stop_ids=tokenizer.stops,
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
            seed = seed_of(HELD_OUT, first)
            texts = answer(self._config, params, self._tokenizer, prompts, seed)
            for document, text in zip(self.rows.kept[index].tolist(), texts, strict=False):
                said = self._tokenizer.decode(text.ids)
                place, row = self.rows.source(document)
                rewards += self._reward(row, said, place)
                tokens += len(text.ids) + (text.ended == "stop")
            advance(len(index) * self.rows.context)
        # Subtracted from 0: of no reward at all, -rewards is a negative zero.
        sums = {"loss": 0.0 - rewards, "reward": rewards, "answer_tokens": float(tokens)}
        return Means(sums, float(self._count), "answers")
