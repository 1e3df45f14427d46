"""What a step of training minimises: a table of functions of (config, parameters, micro-batch).

A row returns sums that add up over micro-batches. The step divides them by the batch's whole
weight and differentiates the first, whatever row it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from gptjax import model
from gptjax.config import Config
from gptjax.data.batches import Batch
from gptjax.layers.context import LOSS, METRIC, MOVE
from gptjax.losses import cross_entropy


class Totals(NamedTuple):
    """Sums over what a micro-batch weighs, float32 scalars.

    Attributes:
        objective: what is minimised, once divided by the weight of the whole batch.
        metrics: what is reported beside it, divided likewise; "loss" is the one that is plotted.
        weight: of the micro-batch.
        moves: path of a parameter without gradient -> where it is to move, see `Tap.move`.
    """

    objective: jax.Array
    metrics: dict[str, jax.Array]
    weight: jax.Array
    moves: dict[str, jax.Array] | None = None


class Objective(NamedTuple):
    """A row.

    Attributes:
        weight: batch -> the weight of all of it, which the sums are divided by.
        totals: (config, the model's parameters, a micro-batch, dropout key or None) -> sums.
    """

    weight: Callable[[Batch[jax.Array]], jax.Array]
    totals: Callable[[Config, model.Params, Batch[jax.Array], jax.Array | None], Totals]


def next_token(
    config: Config, params: model.Params, batch: Batch[jax.Array], dropout_key: jax.Array | None
) -> Totals:
    """Cross-entropy of the next token, z-loss, and what layers add by `Tap.loss`.

    Metrics: loss (nats per scored token), z (mean squared log-partition), each auxiliary loss
    under "loss/NAME", summed over layers, and what layers report, a mean over layers; both are means
    over micro-batches by their weight.
    """
    x_BTD, _, heard = model.hidden(
        config.model,
        params,
        batch.tokens,
        position_BT=batch.positions,
        segments_BT=batch.segments,
        dropout_key=dropout_key,
    )
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
    auxiliary = {n: sums.weight * x.sum() for n, x in heard.items() if n.startswith(LOSS)}
    reported = {
        n.removeprefix(METRIC): sums.weight * x.mean()
        for n, x in heard.items()
        if n.startswith(METRIC)
    }
    objective = sum(auxiliary.values(), start=sums.objective)
    metrics = {"loss": sums.nll, "z": sums.z} | auxiliary | reported
    moves = {
        f"blocks/{n.removeprefix(MOVE)}": sums.weight * x
        for n, x in heard.items()
        if n.startswith(MOVE)
    }
    return Totals(objective, metrics, sums.weight, moves)


OBJECTIVE: dict[str, Objective] = {
    "next_token": Objective(lambda batch: batch.weights.sum(), next_token),
}
