"""The training state and the pure step that updates it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import model, optim, parametrisation
from gptjax.config import Config
from gptjax.layers.parameter import Spec
from gptjax.losses import Sums, cross_entropy
from gptjax.sharding import out

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """All that a run carries from one step to the next; the data's position is `step`.

    Attributes:
        step: int32 scalar, steps done so far, skipped ones included.
        params: the tree of `model.init`, float32.
        opt_state: the optimiser's.
        ema: average of the parameters, like `params`; None where `optim.ema_decay` is None.
    """

    step: jax.Array
    params: model.Params
    opt_state: optax.OptState
    ema: model.Params | None


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimiser of a run, for the parameters of its model."""
    specs = model.abstract_params(config.model)

    def multiplier(spec: Spec) -> float:
        return parametrisation.rate_multiplier(config.model, spec.kind, "L" in spec.stacks)

    scaled = parametrisation.scales_rates(config.model)
    multipliers = jax.tree.map(multiplier, specs) if scaled else None
    return optim.make_optimizer(config.optim, config.train.steps, specs, multipliers)


def create(config: Config, params: model.Params | None = None) -> TrainState:
    """The state before the first step; where a mesh is set it is born sharded.

    Args:
        config: of the run.
        params: to begin with, which the state then owns; None draws them from the seed.
    """
    params = model.init(config.model, config.seed) if params is None else params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.jit(make_optimizer(config).init)(params),
        # A copy: the state is donated, and one buffer cannot be given away twice.
        ema=None if config.optim.ema_decay is None else jax.tree.map(jnp.copy, params),
    )


def abstract(config: Config) -> TrainState:
    """Shapes, dtypes and, where a mesh is set, shardings of `create(config)`; nothing runs."""
    mesh = jax.sharding.get_mesh()

    def leaf(s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if mesh.empty:
            return jax.ShapeDtypeStruct(s.shape, s.dtype)
        spec = P() if s.sharding is None else s.sharding.spec
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, jax.eval_shape(lambda: create(config)))


def evaluation_params(state: TrainState) -> model.Params:
    """The parameters to evaluate and generate with: the average where the run keeps one."""
    if state.ema is not None:
        return state.ema
    return optim.evaluation_params(state.opt_state, state.params)


def _updates(opt_state: optax.OptState) -> jax.Array:
    """How many updates were made: the count that the learning rate follows, int32 scalar."""
    kind = optax.ScaleByScheduleState
    parts = jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, kind))
    return next(part.count for part in parts if isinstance(part, kind))


def make_train_step(config: Config) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted update; it donates the state.

    The batch holds tokens, targets, weights and positions, and segments where attention
    stays within documents, each of shape (B, A, T): A micro-batches of B rows, one after
    another. The gradient is that of the mean over all scored tokens of all micro-batches.

    Metrics, float32 scalars: loss (nats per scored token), z (mean squared log-partition),
    gradient_norm (before the clip), learning_rate, tokens (scored), and skipped, 1 where
    loss or gradient was not finite: such an update is left out whole, because one NaN under
    clip and AdamW would turn every parameter NaN. The next update takes its place in schedule
    and averages, so that only the data moves on.
    """
    optimizer, schedule = (
        make_optimizer(config),
        optim.make_schedule(config.optim, config.train.steps),
    )

    def objective(
        params: model.Params, micro: Batch, key: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, Sums]:
        x_BTD, _ = model.hidden(
            config.model,
            params,
            micro["tokens"],
            position_BT=micro.get("positions"),
            segments_BT=micro.get("segments"),
            dropout_key=key if config.model.dropout else None,
        )
        kernel, dims = model.unembedding(config.model, params)
        sums = cross_entropy(
            x_BTD,
            kernel,
            dims,
            micro["targets"],
            micro["weights"],
            chunk=config.optim.loss_vocab_chunk,
            softcap=config.model.logit_softcap,
            z_loss=config.optim.z_loss,
        )
        return sums.objective * scale, sums

    def gradient(params: model.Params, batch: Batch, key: jax.Array) -> tuple[model.Params, Sums]:
        scale = 1 / jnp.maximum(batch["weights"].sum(), 1)
        grad = jax.grad(objective, has_aux=True)
        micros = config.train.accumulation
        if micros == 1:
            return grad(params, {k: v[:, 0] for k, v in batch.items()}, key, scale)

        def add(total: Any, index: jax.Array) -> tuple[Any, None]:
            micro = {k: v.at[:, index].get(out_sharding=out("BT")) for k, v in batch.items()}
            part = grad(params, micro, jax.random.fold_in(key, index), scale)
            return jax.tree.map(jnp.add, total, part), None

        zeros = jax.tree.map(jnp.zeros_like, params), Sums(*(jnp.zeros(()),) * 4)
        return jax.lax.scan(add, zeros, jnp.arange(micros))[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        grads, sums = gradient(state.params, batch, key)
        norm = optax.global_norm(grads)
        done = _updates(state.opt_state)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema, decay = state.ema, config.optim.ema_decay
        if ema is not None and decay is not None:
            ema = optim.ema_update(ema, params, decay, done)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums.objective)
        new, old = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
        kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        weight = jnp.maximum(sums.weight, 1)
        metrics = {
            "loss": sums.nll / weight,
            "z": sums.z / weight,
            "gradient_norm": norm,
            "learning_rate": schedule(done),
            "tokens": sums.weight,
            "skipped": 1.0 - finite,
        }
        return TrainState(state.step + 1, *kept), metrics

    return jax.jit(step, donate_argnums=0)
