"""The training state and the pure step that updates it."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import model, optim, parametrisation
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, UserError, choose
from gptjax.data.batches import Batch
from gptjax.layers.parameter import Spec
from gptjax.objectives import OBJECTIVE, Totals
from gptjax.sharding import alone_on, like, out
from gptjax.trainable import trainable

Metrics = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """All that a run carries from one step to the next; the data's position is `step`.

    Attributes:
        step: int32 scalar, steps done so far, skipped ones included.
        params: what is trained (`trainable`), float32.
        opt_state: the optimiser's.
        ema: average of the parameters, like `params`; None where `optim.ema_decay` is None.
        frozen: the parameters that are not trained, or not by a gradient; None where there are none.
    """

    step: jax.Array
    params: model.Params
    opt_state: optax.OptState
    ema: model.Params | None
    frozen: model.Params | None = None


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimiser of a run, for the parameters that it trains."""
    specs = trainable(config).specs

    def multiplier(spec: Spec) -> float:
        return parametrisation.rate_multiplier(config.model, spec.kind, "L" in spec.stacks)

    scaled = parametrisation.scales_rates(config.model)
    multipliers = jax.tree.map(multiplier, specs) if scaled else None
    return optim.make_optimizer(config.optim, config.train.steps, specs, multipliers)


def create(config: Config, params: model.Params | None = None) -> TrainState:
    """The state before the first step; where a mesh is set it is born sharded.

    Args:
        config: of the run.
        params: of the whole model to begin with, which the state then owns; None draws them
            from the seed.
    """
    params = model.init(config.model, config.seed) if params is None else params
    params, frozen = trainable(config).split(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=_init_optimizer(dataclasses.replace(config, seed=0), params),
        # A copy: the state is donated, and one buffer cannot be given away twice.
        ema=None if config.optim.ema_decay is None else jax.tree.map(jnp.copy, params),
        frozen=frozen,
    )


@functools.partial(jax.jit, static_argnums=0)
def _init_optimizer(config: Config, params: model.Params) -> optax.OptState:
    return make_optimizer(config).init(params)


def abstract(config: Config) -> TrainState:
    """Shapes, dtypes and, where a mesh is set, shardings of `create(config)`; nothing runs."""
    mesh = jax.sharding.get_mesh()

    def leaf(s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if mesh.empty:
            return jax.ShapeDtypeStruct(s.shape, s.dtype)
        spec = P() if s.sharding is None else s.sharding.spec
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, jax.eval_shape(lambda: create(config)))


BASE = "base"  # the folder beside a run's checkpoints where what is frozen is saved, once


def apart(config: Config, state: TrainState) -> tuple[TrainState, model.Params | None]:
    """What each checkpoint holds, and what is saved once: what is frozen, unless some of it moves."""
    if config.model.balance_rate is not None:
        return state, None
    return state.replace(frozen=None), state.frozen


def restore(config: Config, checkpoints: Checkpoints, step: int) -> TrainState:
    """The state that a run had after `step`, as it was saved.

    Raises:
        UserError: as `Checkpoints.restore`; if what is frozen is not there as it was.
    """
    whole = abstract(config)
    if (sha256 := checkpoints.meta(step).get(BASE)) is None:
        return checkpoints.restore(step, whole)
    with Checkpoints(checkpoints.folder.with_name(BASE)) as base:
        if base.latest() is None or base.fingerprint(0) != sha256:
            raise UserError(
                f"{base.folder} does not hold the frozen parameters that step {step} was trained "
                "with: bring it back as it was"
            )
        frozen = base.restore(0, whole.frozen)
    return checkpoints.restore(step, whole.replace(frozen=None)).replace(frozen=frozen)


def evaluation_params(config: Config, state: TrainState) -> model.Params:
    """The whole model to evaluate and generate with: the average where the run keeps one."""
    trained = state.ema
    if trained is None:
        trained = optim.evaluation_params(state.opt_state, state.params)
    return trainable(config).whole(trained, state.frozen)


def _updates(opt_state: optax.OptState) -> jax.Array:
    """How many updates were made: the count that the learning rate follows, int32 scalar."""
    kind = optax.ScaleByScheduleState
    parts = jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, kind))
    return next(part.count for part in parts if isinstance(part, kind))


def make_train_step(
    config: Config,
) -> Callable[[TrainState, Batch[jax.Array]], tuple[TrainState, Metrics]]:
    """`update` for a config, jitted; it donates the state.

    Runs in one process that differ in no number of the program share it: without dropout, those
    of all seeds.
    """
    return _jitted_update(config if _drops(config) else dataclasses.replace(config, seed=0))


def _drops(config: Config) -> bool:
    """Whether a step of training depends on the seed."""
    return config.model.dropout > 0 or trainable(config).dropout


@functools.lru_cache(maxsize=16)
def _jitted_update(config: Config) -> Callable[..., tuple[TrainState, Metrics]]:
    return jax.jit(functools.partial(update, config), donate_argnums=0)


def make_forward(config: Config) -> Callable[[TrainState, jax.Array, int], jax.Array]:
    """(state, tokens_BAT, index) -> x_BTD of that micro-batch, as `update` computes it.

    On one CPU to the last bit: what the backward pass is to read decides which operations XLA
    fuses, and so how they round. So all of that is computed, and thrown away.
    """
    forward = _jitted_forward(dataclasses.replace(config, seed=0))
    return lambda state, *batch: forward(state.params, state.frozen, *batch)[0]


@functools.lru_cache(maxsize=16)
def _jitted_forward(config: Config) -> Callable[..., tuple[jax.Array, Any]]:
    realise = trainable(config).realise

    def forward(
        params: model.Params, frozen: model.Params | None, tokens_BAT: jax.Array, index: int
    ) -> tuple[jax.Array, Any]:
        tokens_BT = tokens_BAT.at[:, index].get(out_sharding=out("BT"))
        hidden = lambda p: model.hidden(config.model, realise(p, frozen), tokens_BT).x_BTD  # noqa: E731
        return jax.vjp(hidden, params)

    return jax.jit(forward)


def update(
    config: Config, state: TrainState, batch: Batch[jax.Array]
) -> tuple[TrainState, Metrics]:
    """One step of training.

    The arrays of the batch have the shape (B, A, T): A micro-batches of B rows, one after
    another. The gradient is that of the objective's mean over all of them.

    Metrics, float32 scalars: those of the objective, gradient_norm (before the clip),
    learning_rate, tokens (the batch's weight), and skipped, 1 where objective or gradient was
    not finite, or nothing of the batch is scored: such an update is left out whole, because one NaN
    under clip and AdamW would turn every parameter NaN, and without a gradient momentum and decay
    would move them all the same. The next update takes its place in schedule and averages, so that
    only the data moves on. Of a batch of which nothing is scored the objective's metrics are 0.
    """
    optimizer = make_optimizer(config)
    schedule = optim.make_schedule(config.optim, config.train.steps)
    objective = choose(OBJECTIVE, config.train.objective, "train.objective")
    realise, drops = trainable(config).realise, _drops(config)
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def totals(
        params: model.Params, micro: Batch[jax.Array], key: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, Totals]:
        all_params = realise(params, state.frozen)
        sums = objective.totals(config, all_params, micro, key if drops else None)
        return sums.objective * scale, sums

    some = lambda weight: jnp.where(weight > 0, weight, 1)  # noqa: E731
    scale = 1 / some(objective.weight(batch))
    grads, sums = _accumulate(totals, config.train.accumulation)(state.params, batch, key, scale)
    with jax.named_scope("optimizer"):
        norm = optax.global_norm(grads)
        done = _updates(state.opt_state)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums.objective)
        accept = finite & (sums.weight > 0)

        def updated() -> tuple[model.Params, optax.OptState, model.Params | None]:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params, ema = optax.apply_updates(state.params, updates), state.ema
            if ema is not None and config.optim.ema_decay is not None:
                ema = optim.ema_update(ema, params, config.optim.ema_decay, done)
            return params, opt_state, ema

        old = state.params, state.opt_state, state.ema
        if alone_on("cpu"):
            # So XLA writes each array in its own place; to choose between two it would copy them.
            new = jax.lax.cond(accept, updated, lambda: old)
        else:
            new = jax.tree.map(lambda n, o: jnp.where(accept, n, o), updated(), old)
        params, opt_state, ema = new
        frozen = _moved(config, state.frozen, sums.moves, accept)
    weight = some(sums.weight)
    metrics = {name: value / weight for name, value in sums.metrics.items()}
    metrics |= (sums.largest or {}) | {
        "gradient_norm": norm,
        "learning_rate": schedule(done),
        "tokens": sums.weight,
        "skipped": 1.0 - accept,
    }
    return TrainState(state.step + 1, params, opt_state, ema, frozen), metrics


def _moved(
    config: Config,
    frozen: model.Params | None,
    moves: dict[str, jax.Array] | None,
    finite: jax.Array,
) -> model.Params | None:
    """The parameters that are not trained, of which some move without a gradient."""
    rate = config.model.balance_rate
    if frozen is None or not moves or rate is None:
        return frozen
    leaves = flatten_dict(frozen, sep="/")
    for path, direction in moves.items():
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in config.train.frozen):
            continue
        step = jnp.where(finite, rate * jnp.sign(direction), 0)
        where = like(leaves[path])
        leaves[path] += step if where is None else jax.reshard(step, where)
    return unflatten_dict(leaves, sep="/")


def _accumulate(totals: Callable[..., tuple[jax.Array, Totals]], micros: int) -> Callable[..., Any]:
    """The gradient of `totals` and its sums over `micros` micro-batches, one after another."""
    grad = jax.grad(totals, has_aux=True)

    def gradient(
        params: model.Params, batch: Batch[jax.Array], key: jax.Array, scale: jax.Array
    ) -> tuple[model.Params, Totals]:
        if micros == 1:
            return grad(params, jax.tree.map(lambda x: x[:, 0], batch), key, scale)

        def part(index: jax.Array) -> tuple[model.Params, Totals]:
            micro = jax.tree.map(lambda x: x.at[:, index].get(out_sharding=out("BT")), batch)
            return grad(params, micro, jax.random.fold_in(key, index), scale)

        def add(total: Any, index: jax.Array) -> tuple[Any, None]:
            (gradient, sums), (more, more_sums) = total, part(index)
            with jax.named_scope("gradients"):
                return (jax.tree.map(jnp.add, gradient, more), sums + more_sums), None

        _, sums = jax.eval_shape(part, jnp.zeros((), jnp.int32))
        no_sums = jax.tree.map(lambda s: jnp.zeros(s.shape), sums)
        zeros = jax.tree.map(jnp.zeros_like, params), no_sums
        return jax.lax.scan(add, zeros, jnp.arange(micros))[0]

    return gradient
