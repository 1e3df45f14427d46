"""From a config to a run on the current mesh: names resolved, data opened, batches placed."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import accounting, model, sharding, state, tokenizer
from gptjax.config import Config, ConfigError, choose
from gptjax.data.batches import PACKING, Batch, Batches, Pairs
from gptjax.data.sources import open_source
from gptjax.layers import attention
from gptjax.objectives import OBJECTIVE
from gptjax.perplexity import DOCUMENTS, PREFIX, Evaluator, RowEvaluator
from gptjax.preferences import PairEvaluator
from gptjax.rollouts import Reward, RewardEvaluator, Rollouts, load_reward
from gptjax.watch import STATISTICS


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a config means on the current mesh."""

    config: Config  # with model.attention settled for the devices
    tokenizer: tokenizer.Tokenizer
    batches: Batches
    evaluators: dict[str, Evaluator | RowEvaluator | PairEvaluator]  # by source
    rollouts: Rollouts | None = None  # of an objective that learns from them

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the tokenizer, both splits of each source and the reward: what the config only names."""
        data = {f"data.{name}": value for name, value in self.batches.fingerprint.items()}
        held_out = {f"held_out.{name}": e.fingerprint for name, e in self.evaluators.items()}
        reward = {} if self.rollouts is None else {"reward": self.rollouts.reward.sha256}
        return {"tokenizer": self.tokenizer.fingerprint} | data | held_out | reward

    @property
    def pairs(self) -> dict[str, Pairs]:
        """What a reference has to score, by source and split."""
        read = zip(self.batches.names, self.batches.sources, strict=True)
        train = {f"train {name}": rows for name, rows in read if isinstance(rows, Pairs)}
        evaluators = self.evaluators.items()
        held_out = {f"val {n}": e.rows for n, e in evaluators if isinstance(e, PairEvaluator)}
        return train | held_out


class Start(NamedTuple):
    """Parameters to begin with in place of random ones.

    Attributes:
        fingerprint: of the files that hold them.
        record: where they came from: the model, and the sha256 of each of its files.
    """

    load: Callable[[], model.Params]
    fingerprint: str
    record: dict[str, Any]


def settle(config: Config) -> Config:
    """`config` with model.attention "auto" settled for the devices of the current mesh.

    Raises:
        ConfigError: on a kernel that does not run there.
    """
    platform = jax.sharding.get_mesh().devices.flat[0].platform
    attention.check(config.model, platform)
    return dataclasses.replace(config, model=attention.resolve(config.model, platform))


def check_names(config: Config, folders: bool = True) -> None:
    """Refuses names that are not rows of their tables, before anything is compiled or read.

    Args:
        folders: also a tokenizer that is a folder, or on the hub, and is not here.

    Raises:
        ConfigError: naming the knob and the rows that there are.
    """
    m = config.model
    choose(attention.choices(), m.attention, "model.attention")
    choose(model.REMAT, m.remat, "model.remat")
    choose(OBJECTIVE, config.train.objective, "train.objective").check(config)
    for name in config.train.watch:
        choose(STATISTICS, name, "train.watch")
    # All others of the sections model, optim and train. Traced: a launch starts no device.
    jax.eval_shape(lambda: (state.make_optimizer(config), 0)[1])
    choose(PACKING, config.data.packing, "data.packing")
    if folders or not re.search("[/:]", config.data.tokenizer):
        tokenizer.folder_of(config.data.tokenizer)
    choose(PREFIX, config.eval.prefix, "eval.prefix")
    if config.eval.documents is not None:
        choose(DOCUMENTS, config.eval.documents, "eval.documents")


def load_tokenizer(config: Config) -> tokenizer.Tokenizer:
    """The run's tokenizer, which must fit the model's vocabulary."""
    vocabulary = tokenizer.load(config.data.tokenizer)
    if vocabulary.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"tokenizer {vocabulary.name!r} has {vocabulary.vocab_size} tokens, more than "
            f"model.vocab_size={config.model.vocab_size}: raise model.vocab_size"
        )
    return vocabulary


def make_evaluators(
    config: Config, vocabulary: tokenizer.Tokenizer, reward: Reward | None = None
) -> dict[str, Evaluator | RowEvaluator | PairEvaluator]:
    """One for the held-out split of each source: pairs are scored by the objective, answers to prompts
    by their reward."""
    packing = PACKING[config.data.packing]
    kind: Callable[..., Evaluator | RowEvaluator | PairEvaluator] = Evaluator
    if reward is not None:
        kind = functools.partial(RewardEvaluator, reward=reward)
    elif packing.whole:
        kind = PairEvaluator if issubclass(packing, Pairs) else RowEvaluator
    return {
        source: kind(config, open_source(source, vocabulary, "val"), vocabulary)
        for source in config.data.sources
    }


def set_up(config: Config) -> Setup:
    """Opens the data of a run and checks that it fits the model."""
    check_names(config)
    config = settle(config)
    attention.kernel_for(config.model, config.model.context)  # refuses what it cannot do
    specs = model.abstract_params(config.model)
    sharding.check_divisible(config, specs, jax.sharding.get_mesh().shape)
    vocabulary = load_tokenizer(config)
    batches = Batches(config.data, config.model.context, config.seed, "train", vocabulary)
    reward = rollouts = None
    if OBJECTIVE[config.train.objective].rollouts and config.train.reward is not None:
        reward = load_reward(config.train.reward)
        rollouts = Rollouts(config, batches, vocabulary, reward)
    return Setup(config, vocabulary, batches, make_evaluators(config, vocabulary, reward), rollouts)


def load_batch(setup: Setup, step: int) -> Batch[jax.Array]:
    """The batch of a step on the mesh, (B, A, T): row r of the step is micro-batch r % A."""
    rows = setup.config.data.batch_size // setup.config.train.accumulation
    return sharding.place(functools.partial(read_rows, setup, step), rows, "BAT")


def answered(
    setup: Setup, now: state.TrainState, step: int, batch: Batch[jax.Array]
) -> tuple[Batch[jax.Array], dict[str, float]]:
    """The batch of a step with what the model as it is `now` answers, and metrics of the answers.

    Where the objective does not learn from answers the batch is as it was.
    """
    if setup.rollouts is None:
        return batch, {}
    return setup.rollouts(now, step)


def read_rows(setup: Setup, step: int, start: int, stop: int) -> Batch[np.ndarray]:
    """Rows [start, stop) of what `load_batch` places."""
    A = setup.config.train.accumulation
    rows = setup.batches.rows(step, start * A, stop * A)
    if not setup.batches.segmented:
        rows = rows._replace(segments=None, positions=None)
    return jax.tree.map(lambda x: x.reshape(stop - start, A, -1), rows)


def describe(config: Config) -> str:
    """Size and cost of a run: one line of its size, then the lines of `accounting.costs`."""
    parameters = accounting.parameters(config.model)["total"]
    mesh = jax.sharding.get_mesh()
    tokens = config.train.steps * config.data.batch_size * config.model.context
    devices = mesh.devices
    size = (
        f"{parameters / 1e6:,.1f}M parameters, {config.train.steps:,} steps of "
        f"{config.data.batch_size * config.model.context:,} tokens ({tokens / 1e6:,.1f}M), "
        f"{devices.size} {devices.flat[0].device_kind} device{'s' * (devices.size > 1)}, "
        f"attention {attention.kernel_for(config.model, config.model.context)}, {config.model.dtype}"
    )
    return "\n  ".join([size, *accounting.costs(config, mesh.shape)])
