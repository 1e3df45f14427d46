"""What a step of training minimises: a table of functions of (config, parameters, micro-batch).

A row returns sums that add up over micro-batches. The step divides them by the batch's whole
weight and differentiates the first, whatever row it is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax import model
from gptjax.config import Config, ConfigError, Train
from gptjax.data.batches import Batch
from gptjax.layers import linear
from gptjax.layers.context import LOSS, METRIC, MOVE
from gptjax.losses import cross_entropy, token_nll
from gptjax.trainable import without_adapters


class Totals(NamedTuple):
    """Sums over what a micro-batch weighs, float32 scalars.

    Attributes:
        objective: what is minimised, once divided by the weight of the whole batch.
        metrics: what is reported beside it, divided likewise; "loss" is the one that is plotted.
        weight: of the micro-batch.
        moves: path of a parameter without gradient -> where it is to move, see `Tap.move`.
        largest: what is reported of the whole batch by its largest value, at least 0.
    """

    objective: jax.Array
    metrics: dict[str, jax.Array]
    weight: jax.Array
    moves: dict[str, jax.Array] | None = None
    largest: dict[str, jax.Array] | None = None

    def __add__(self, other: Totals) -> Totals:  # type: ignore[override]
        """Those of both micro-batches."""
        largest = jax.tree.map(jnp.maximum, self.largest, other.largest)
        sums: Totals = jax.tree.map(jnp.add, self, other)
        return sums._replace(largest=largest)


class Objective(NamedTuple):
    """A row.

    Attributes:
        weight: batch -> the weight of all of it, which the sums are divided by.
        totals: (config, the model's parameters, a micro-batch, dropout key or None) -> sums.
        check: refuses a config that it does not go with.
        reference: whether it reads `Batch.reference`.
        rollouts: whether it learns from what the model answers to prompts, `Batch.advantages`.
    """

    weight: Callable[[Batch[jax.Array]], jax.Array]
    totals: Callable[[Config, model.Params, Batch[jax.Array], jax.Array | None], Totals]
    check: Callable[[Config], None] = lambda config: None
    reference: bool = False
    rollouts: bool = False


def next_token(
    config: Config, params: model.Params, batch: Batch[jax.Array], dropout_key: jax.Array | None
) -> Totals:
    """Cross-entropy of the next token, z-loss, and what layers add by `Tap.loss`.

    Metrics: loss (nats per scored token), z (mean squared log-partition), each auxiliary loss
    under "loss/NAME", summed over layers, and what layers report, a mean over layers; both are means
    over micro-batches by their weight.
    """
    x_BTD, heard = _hidden(config, params, batch, dropout_key)
    x_BTD, kernel, dims = model.unembedding(config.model, params, x_BTD)
    with jax.named_scope("loss"):
        sums = cross_entropy(
            x_BTD,
            kernel,
            dims,
            batch.targets,
            batch.weights,
            chunk=config.optim.loss_vocab_chunk,
            softcap=config.model.logit_softcap,
            z_loss=config.optim.z_loss,
        )
    metrics = {"loss": sums.nll, "z": sums.z}
    return _with_layers(Totals(sums.objective, metrics, sums.weight), heard)


def _check_next_token(config: Config) -> None:
    if config.data.packing == "pairs":
        raise ConfigError(
            "data.packing='pairs' holds rejected texts too: set train.objective to dpo, ipo or simpo"
        )
    if config.data.packing == "prompts":
        raise ConfigError(
            "data.packing='prompts' holds no answers to learn: set train.objective='grpo'"
        )
    _check_no_group(config)


def _check_no_group(config: Config) -> None:
    if config.data.group > 1:
        raise ConfigError(
            f"data.group={config.data.group} repeats each row, which train.objective="
            f"{config.train.objective!r} has no use for: set it to 1"
        )


def _hidden(
    config: Config, params: model.Params, batch: Batch[jax.Array], dropout_key: jax.Array | None
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """The stream of a micro-batch, and what its layers said."""
    x_BTD, _, heard = model.hidden(
        config.model,
        params,
        batch.tokens,
        position_BT=batch.positions,
        segments_BT=batch.segments,
        dropout_key=dropout_key,
    )
    return x_BTD, heard


def _with_layers(totals: Totals, heard: Mapping[str, jax.Array]) -> Totals:
    """With what layers add, report and move."""
    objective, metrics, weight, _, largest = totals
    auxiliary = {n: weight * x.sum() for n, x in heard.items() if n.startswith(LOSS)}
    reported = {
        n.removeprefix(METRIC): weight * x.mean() for n, x in heard.items() if n.startswith(METRIC)
    }
    moves = {
        f"blocks/{n.removeprefix(MOVE)}": weight * x for n, x in heard.items() if n.startswith(MOVE)
    }
    objective = sum(auxiliary.values(), start=objective)
    return Totals(objective, metrics | auxiliary | reported, weight, moves, largest)


class Text(NamedTuple):
    """One text of each pair, sums over its scored tokens, float32 (B,).

    Attributes:
        log_likelihood: under the model, nats.
        ratio: that less the log-likelihood under the reference.
        tokens: scored, by their weights; 1 where none is.
    """

    log_likelihood: jax.Array
    ratio: jax.Array
    tokens: jax.Array


# (knobs, chosen, rejected) -> each pair's loss, and the rewards of both texts.
PairLoss = Callable[[Train, Text, Text], tuple[jax.Array, jax.Array, jax.Array]]


def dpo(knobs: Train, chosen: Text, rejected: Text) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rafailov et al. 2023 (arXiv:2305.18290), eq. 7: ln 2 where the model is the reference."""
    chosen_B, rejected_B = knobs.beta * chosen.ratio, knobs.beta * rejected.ratio
    return -jax.nn.log_sigmoid(chosen_B - rejected_B), chosen_B, rejected_B


def ipo(knobs: Train, chosen: Text, rejected: Text) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Azar et al. 2023 (arXiv:2310.12036), eq. 17, beta being its tau.

    Of log-ratios per token, as in TRL, whose authors confirmed it with the paper's: by sums, as it
    is printed, the loss would grow with the square of the length.
    """
    chosen_B, rejected_B = chosen.ratio / chosen.tokens, rejected.ratio / rejected.tokens
    loss_B = jnp.square(chosen_B - rejected_B - 1 / (2 * knobs.beta))
    return loss_B, knobs.beta * chosen_B, knobs.beta * rejected_B


def simpo(knobs: Train, chosen: Text, rejected: Text) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Meng et al. 2024 (arXiv:2405.14734), eq. 6; it has no reference."""
    chosen_B, rejected_B = (
        knobs.beta * text.log_likelihood / text.tokens for text in (chosen, rejected)
    )
    return -jax.nn.log_sigmoid(chosen_B - rejected_B - knobs.gamma), chosen_B, rejected_B


def is_pair(batch: Batch[jax.Array]) -> jax.Array:
    """Which rows hold a pair of which something is scored; others are padding. Bool, without T."""
    return ((batch.segments == 1) & (batch.weights > 0)).any(-1)


def count_pairs(batch: Batch[jax.Array]) -> jax.Array:
    return is_pair(batch).sum().astype(jnp.float32)


def _preference(
    loss_of_pair: PairLoss,
    reference: bool,
    config: Config,
    params: model.Params,
    batch: Batch[jax.Array],
    dropout_key: jax.Array | None,
) -> Totals:
    """A loss over pairs, and what layers add by `Tap.loss`: their weight counts pairs.

    Metrics, means over pairs: loss; accuracy, the share whose chosen text has the higher reward;
    margin, the reward of the chosen less that of the rejected; and with a reference drift_chosen
    and drift_rejected, by how many nats a text is likelier than under it.
    """
    assert batch.segments is not None
    x_BTD, heard = _hidden(config, params, batch, dropout_key)
    x_BTD, kernel, dims = model.unembedding(config.model, params, x_BTD)
    chunk, softcap = config.optim.loss_vocab_chunk, config.model.logit_softcap
    with jax.named_scope("loss"):
        targets_BT = jnp.where(batch.weights > 0, batch.targets, 0)
        nll_BT, _ = token_nll(x_BTD, kernel, dims, targets_BT, chunk=chunk, softcap=softcap)
        reference_BT = jnp.nan if batch.reference is None else batch.reference

        def text(segment: int) -> Text:
            weights_BT = jnp.where(batch.segments == segment, batch.weights, 0)
            return Text(
                -(weights_BT * nll_BT).sum(-1),
                # Token by token, so that the same model has a ratio of 0.
                (weights_BT * (reference_BT - nll_BT)).sum(-1),
                jnp.where((weights_BT > 0).any(-1), weights_BT.sum(-1), 1),
            )

        chosen, rejected = text(0), text(1)
        loss_B, chosen_B, rejected_B = loss_of_pair(config.train, chosen, rejected)
        values = {
            "loss": loss_B,
            "accuracy": (chosen_B > rejected_B).astype(jnp.float32),
            "margin": chosen_B - rejected_B,
        }
        if reference:
            values |= {"drift_chosen": chosen.ratio, "drift_rejected": rejected.ratio}
        metrics = {name: x_B.sum(where=is_pair(batch)) for name, x_B in values.items()}
    return _with_layers(Totals(metrics["loss"], metrics, count_pairs(batch)), heard)


def _check_preference(config: Config) -> None:
    objective = f"train.objective={config.train.objective!r}"
    if config.data.packing != "pairs":
        raise ConfigError(f"{objective} compares two texts: set data.packing='pairs'")
    if not config.train.beta:
        raise ConfigError(f"train.beta must be above 0 for {objective}")
    _check_no_group(config)
    _check_no_noise(config, "with dropout a model differs from itself, and is no longer compared "
                    "with its reference")  # fmt: skip


def _check_no_noise(config: Config, why: str) -> None:
    objective = f"train.objective={config.train.objective!r}"
    if config.model.dropout or config.train.lora_dropout:
        raise ConfigError(
            f"{objective} goes with model.dropout=0 and train.lora_dropout=0 only: {why}"
        )
    if config.optim.z_loss:
        raise ConfigError(f"{objective} has no z-loss: set optim.z_loss=0")


def preference(loss_of_pair: PairLoss, reference: bool = True) -> Objective:
    """A row that compares the two texts of each pair."""
    totals = functools.partial(_preference, loss_of_pair, reference)
    return Objective(count_pairs, totals, _check_preference, reference)


CLIP = 0.2  # by how much a token may have become likelier or less likely, as in PPO


def grpo(
    config: Config, params: model.Params, batch: Batch[jax.Array], dropout_key: jax.Array | None
) -> Totals:
    """Group relative policy optimisation: Shao et al. 2024 (arXiv:2402.03300), eq. 3, from answers
    with their advantages (`rollouts.advantages`), one update for each batch of them.

    What is drawn and what is trained is the model's own distribution, at temperature 1. The sum is
    over all scored tokens of the batch and divided by their number, as in DAPO (Yu et al. 2025,
    arXiv:2503.14476, eq. 8). The paper divides each answer by its own length first, which makes the
    tokens of a long wrong answer count less; and so micro-batches add up to the same.

    With adapters and `train.beta` above 0, beta times the paper's estimator of the divergence from
    the base (eq. 4) is added, which takes one more forward pass.

    Metrics, means over scored tokens: loss; clipped, the share whose ratio the clip holds back; with
    beta kl, nats; sampler_gap_mean, how far the log-likelihood is from what it was when the token
    was drawn, by the same parameters, nats; and sampler_gap, the largest of these.
    """
    assert batch.sampled is not None
    assert batch.advantages is not None

    def said(params: model.Params) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Each target's log-likelihood."""
        x_BTD, heard = _hidden(config, params, batch, dropout_key)
        x_BTD, kernel, dims = model.unembedding(config.model, params, x_BTD)
        chunk, softcap = config.optim.loss_vocab_chunk, config.model.logit_softcap
        nll_BT, _ = token_nll(x_BTD, kernel, dims, batch.targets, chunk=chunk, softcap=softcap)
        return -nll_BT, heard

    with jax.named_scope("loss"):
        said_BT, heard = said(params)
        scored_BT = batch.weights > 0
        log_ratio_BT = jnp.where(scored_BT, said_BT - batch.sampled, 0)
        gain_BT = jnp.exp(log_ratio_BT) * batch.advantages
        held_BT = jnp.clip(jnp.exp(log_ratio_BT), 1 - CLIP, 1 + CLIP) * batch.advantages
        values = {
            "loss": -jnp.minimum(gain_BT, held_BT),
            "clipped": (held_BT < gain_BT).astype(jnp.float32),
            "sampler_gap_mean": jnp.abs(log_ratio_BT),
        }
        if config.train.beta:
            base_BT = jax.lax.stop_gradient(said(without_adapters(params))[0])
            apart_BT = jnp.where(scored_BT, base_BT - said_BT, 0)
            values["kl"] = jnp.exp(apart_BT) - apart_BT - 1
            values["loss"] += config.train.beta * values["kl"]
        metrics = {name: (batch.weights * x_BT).sum() for name, x_BT in values.items()}
        largest = {"sampler_gap": linear.largest(jnp.abs(log_ratio_BT))}
    totals = Totals(metrics["loss"], metrics, batch.weights.sum(), largest=largest)
    return _with_layers(totals, heard)


def _check_grpo(config: Config) -> None:
    t, d = config.train, config.data
    if d.packing != "prompts":
        raise ConfigError("train.objective='grpo' answers prompts: set data.packing='prompts'")
    if t.reward is None:
        raise ConfigError(
            "train.objective='grpo' learns by a reward: set train.reward='FILE.py:FUNCTION'"
        )
    if d.group < 2:
        raise ConfigError(
            "train.objective='grpo' compares the answers to a prompt with each other: set data.group "
            "to 2 or more"
        )
    if d.batch_size % d.group:
        raise ConfigError(
            f"data.batch_size={d.batch_size} is not divisible by data.group={d.group}: the answers to "
            "a prompt are rows of one batch"
        )
    if t.beta and t.trainable not in ("lora", "qlora"):
        raise ConfigError(
            f"train.beta={t.beta} holds the model near its base, which only adapters leave as it was: "
            "set train.trainable to lora or qlora, or train.beta=0"
        )
    _check_no_noise(config, "with dropout the model that answers is not the one that is trained")


def scored_tokens(batch: Batch[jax.Array]) -> jax.Array:
    return batch.weights.sum()


OBJECTIVE: dict[str, Objective] = {
    "next_token": Objective(scored_tokens, next_token, _check_next_token),
    "dpo": preference(dpo),
    "ipo": preference(ipo),
    "simpo": preference(simpo, reference=False),
    "grpo": Objective(scored_tokens, grpo, _check_grpo, rollouts=True),
}
