"""Optimisers, learning-rate schedules and weight-decay masks: three tables over optax.

The update of step s (0-based) is

    gradient -> global-norm clip -> direction (OPTIMIZERS) -> * multiplier
             -> + weight_decay * parameter -> * -learning_rate(s)

so weight decay is decoupled and multiplied by the learning rate (Loshchilov & Hutter 2019,
arXiv:1711.05101, as in PyTorch and optax), but not by the multiplier on a parameter's rate that
muP gives it: a matrix forgets over as many steps at any width, which is what lets the decay
transfer (Wang & Aitchison 2024, arXiv:2405.13698; Microsoft's `mup` package). Which parameters
decay, and what is a matrix to Muon, is read off the `Spec` that a layer declared. Parameters are
stacked over layers, and no row lets one layer's update depend on another's, nor one expert's,
save through the global norm.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from optax import Schedule  # step, 0-based -> learning rate

from gptjax.config import ConfigError, Optim, choose
from gptjax.layers.parameter import Spec
from gptjax.sharding import parameter_spec

Tree = Any  # nested dict like the parameters


# Which parameters decay.
DECAY_MASKS: dict[str, Callable[[Spec], bool]] = {
    "matrices": lambda spec: spec.kind != "vector",  # tables and the unembedding too
    "no_embedding": lambda spec: spec.kind in ("matrix", "router", "adapter_out"),
    "all": lambda spec: True,
}


def constant(config: Optim, steps: int) -> Schedule:
    return optax.constant_schedule(1.0)


def cosine(config: Optim, steps: int) -> Schedule:
    """Half a cosine to the last step (Loshchilov & Hutter 2017, eq. 5, without restarts)."""
    length = max(steps - 1 - config.warmup_steps, 1)
    return optax.cosine_decay_schedule(1.0, length, alpha=config.final_lr_fraction)


def linear(config: Optim, steps: int) -> Schedule:
    return optax.linear_schedule(
        1.0, config.final_lr_fraction, max(steps - 1 - config.warmup_steps, 1)
    )


def wsd(config: Optim, steps: int) -> Schedule:
    """Warmup, stable, decay (Hu et al. 2024, arXiv:2404.06395, with a linear decay).

    The last round(decay_fraction * steps) updates, at least one, lie below the peak; one less
    where the warmup takes all others, as its end is the peak.
    """
    decay = max(1, round(config.decay_fraction * steps))
    if config.warmup_steps + decay > steps:
        raise ConfigError(
            f"optim.warmup_steps={config.warmup_steps} and optim.decay_fraction="
            f"{config.decay_fraction} overlap in a run of {steps} steps: lower one of them"
        )
    length = steps - 1 - config.warmup_steps  # from the peak to the last update
    start = max(0, length - decay)
    return optax.linear_schedule(
        1.0, config.final_lr_fraction, length - start, transition_begin=start
    )


# Fraction of the peak as a function of the updates since the warmup.
SCHEDULES: dict[str, Callable[[Optim, int], Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
}


def make_schedule(config: Optim, steps: int) -> Schedule:
    """The learning rate of each update of a run of `steps`.

    Where config.schedule_steps is set, it stands for `steps`, and all later updates have the last
    rate. With w = warmup_steps the rate of update s < w is peak * (s + 1) / (w + 1): linear from
    0, which it would have just before the run, so that no update is wasted, to the peak, which
    it first has at s = w. At s = steps - 1 it is peak * final_lr_fraction, unless the
    schedule is constant or the warmup ends right there.

    Raises:
        ConfigError: on an unknown schedule or a warmup that does not fit into the run.
    """
    w = config.warmup_steps
    length = "train.steps" if config.schedule_steps is None else "optim.schedule_steps"
    steps = config.schedule_steps or steps
    if w >= steps:
        raise ConfigError(
            f"optim.warmup_steps={w} never ends in a run of {length}={steps}: "
            f"set it to at most {steps - 1}"
        )
    after = choose(SCHEDULES, config.schedule, "optim.schedule")(config, steps)

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        return config.peak_lr * jnp.where(step < w, (step + 1) / (w + 1), after(step - w))

    return rate


class Rates(NamedTuple):
    """How far a step goes.

    Attributes:
        schedule: the learning rate of each update.
        multipliers: a factor on that of each parameter, like `specs`; None: all are 1.
    """

    schedule: Schedule
    multipliers: Tree | None


def _descend(
    direction: optax.GradientTransformation, config: Optim, rates: Rates, specs: Tree
) -> optax.GradientTransformation:
    mask = jax.tree.map(choose(DECAY_MASKS, config.decay_mask, "optim.decay_mask"), specs)
    if rates.multipliers is not None:
        scale = optax.stateless(lambda u, _: jax.tree.map(operator.mul, rates.multipliers, u))
        direction = optax.chain(direction, scale)
    return optax.chain(
        direction,
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(rates.schedule),
    )


def adamw(config: Optim, rates: Rates, specs: Tree) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019)."""
    direction = optax.scale_by_adam(config.b1, config.b2, config.eps)
    return _descend(direction, config, rates, specs)


def lion(config: Optim, rates: Rates, specs: Tree) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of an interpolated momentum.

    The authors advise a peak 3 to 10 times below AdamW's, and as much more weight decay.
    """
    return _descend(optax.scale_by_lion(config.b1, config.b2), config, rates, specs)


# By how many dims of a parameter are stacks; a saved state has these names.
STACKED = ("single", "stacked", "stacked twice")


def adafactor(config: Optim, rates: Rates, specs: Tree) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): factored second moments.

    No momentum, which would undo the saving, so b1, b2 and eps are unused: the decay of the
    second moment is the paper's 1 - t^-0.8. Deviations: the rate is not scaled by the
    parameter's size, so that peak_lr means what it means to the other rows; of (D, N, H)
    the two largest dims are factored, from a size of 32 on.
    """
    one = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=32), optax.clip_by_block_rms(1.0)
    )

    # Statistics and clipping are the layer's own and the expert's own, not those of the stack.
    def over(stacks: int) -> optax.GradientTransformation:
        if stacks == 0:
            return one
        inner = over(stacks - 1)
        return optax.GradientTransformation(jax.vmap(inner.init), jax.vmap(inner.update))

    depths = {0} | {len(spec.stacks) for spec in jax.tree.leaves(specs)}
    transforms: dict[Hashable, optax.GradientTransformation] = {
        STACKED[stacks]: over(stacks) for stacks in sorted(depths, reverse=True)
    }
    labels = jax.tree.map(lambda spec: STACKED[len(spec.stacks)], specs)
    direction = optax.partition(transforms, labels)
    return _descend(direction, config, rates, specs)


def muon(config: Optim, rates: Rates, specs: Tree) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for all the rest.

    Each layer's query, key and value are orthogonalised as D x (N H) matrices, `out` as
    (N H) x D: by five Newton-Schulz steps in float32, which leave singular values between
    0.7 and 1.2. The update is then multiplied by 0.2 sqrt(max(fan_in, fan_out)), which
    gives it the root mean square of a typical AdamW update (Liu et al. 2025,
    arXiv:2502.16982, eq. 4), so that both groups share one peak_lr and one weight_decay.
    `momentum` is Muon's (Nesterov); b1, b2 and eps are AdamW's.

    Deviation from Jordan's own code, which orthogonalises beta m + (1 - beta) g for a momentum m
    that starts at 0: optax corrects both terms for that start, update t = 1, 2, ... being
    beta m / (1 - beta^(t+1)) + (1 - beta) g / (1 - beta^t). At beta = 0.95 and with independent
    gradients the update is 5% from his at t = 6, 1% at 20 and 0.3% at 40.
    """
    skip, orthogonal_kinds = optax.MaskedNode(), ("matrix", "adapter_out")

    def fans(spec: Spec) -> Any:
        if spec.kind not in orthogonal_kinds:
            return skip
        places = (tuple(map(spec.dims.index, fan)) for fan in (spec.fan_in, spec.fan_out))
        return optax.contrib.MuonDimensionNumbers(*places)

    numbers = jax.tree.map(fans, specs)
    labels = jax.tree.map(lambda s: "muon" if s.kind in orthogonal_kinds else "adam", specs)

    def match_rms(updates: Tree, params: Tree) -> Tree:
        def scaled(spec: Spec, u: Any) -> Any:
            if isinstance(u, optax.MaskedNode):
                return u
            return 0.2 * math.sqrt(max(spec.size(spec.fan_in), spec.size(spec.fan_out))) * u

        return jax.tree.map(scaled, specs, updates)

    orthogonal = optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=numbers)
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(orthogonal, optax.stateless(match_rms)),
        "adam": optax.scale_by_adam(config.b1, config.b2, config.eps),
    }
    return _descend(optax.partition(transforms, labels), config, rates, specs)


def schedule_free(config: Optim, rates: Rates, specs: Tree) -> optax.GradientTransformation:
    """Schedule-Free AdamW (Defazio et al. 2024, arXiv:2405.15682).

    b1 interpolates between the average and the fast iterate; weight decay acts where the
    gradient is taken. Meant for schedule="constant" with a warmup; evaluate at
    `evaluation_params`.
    """
    if config.b1 == 0:
        raise ConfigError("optim.optimizer='schedule_free' needs optim.b1 above 0, such as 0.9")
    # Adam without momentum: schedule-free averaging takes its place.
    direction = optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)
    # Its own count starts at 1; ours at 0.
    return optax.contrib.schedule_free(
        _descend(direction, config, rates, specs),
        lambda count: rates.schedule(count - 1),
        config.b1,
    )


OPTIMIZERS: dict[str, Callable[[Optim, Rates, Tree], optax.GradientTransformation]] = {
    "adamw": adamw,
    "lion": lion,
    "adafactor": adafactor,
    "muon": muon,
    "schedule_free": schedule_free,
}

# Rows whose update has entries as large as the rate whatever the gradient's size, for which the
# multipliers of `gptjax.parametrisation` are derived.
ADAM_LIKE = ("adamw", "lion", "schedule_free")


def make_optimizer(
    config: Optim, steps: int, specs: Tree, multipliers: Tree | None = None
) -> optax.GradientTransformation:
    """The whole update: clip, optimiser, weight decay and learning rate.

    Under a mesh, new states and updates have the shardings of `state_specs` and
    `parameter_spec`, whatever the row computes in between.

    Args:
        config: names the rows.
        steps: length of the run, for the schedule.
        specs: what each parameter was declared as, in a tree like the parameters.
        multipliers: muP's factor on each parameter's rate, in a like tree; None: all are 1.

    Raises:
        ConfigError: on an unknown name, a schedule that does not fit, or multipliers for a row
            that they are not derived for.
    """
    row = choose(OPTIMIZERS, config.optimizer, "optim.optimizer")
    if multipliers is not None and config.optimizer not in ADAM_LIKE:
        raise ConfigError(
            f"optim.optimizer={config.optimizer!r} does not go with muP, whose rates are derived "
            f"for: {', '.join(ADAM_LIKE)}; or set model.parametrisation='standard'"
        )
    transformation = row(config, Rates(make_schedule(config, steps), multipliers), specs)
    if config.clip is not None:
        transformation = optax.chain(_clip(config.clip), transformation)
    return _placed(transformation, specs)


def _clip(most: float) -> optax.GradientTransformation:
    """As `optax.clip_by_global_norm`, but by one factor: of its quotients XLA for CPUs holds all at once."""

    def update(
        updates: Tree, state: optax.OptState, params: Tree | None = None
    ) -> tuple[Tree, optax.OptState]:
        norm = optax.global_norm(updates)
        factor = jnp.where(norm < most, 1.0, most / norm)
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _placed(
    transformation: optax.GradientTransformation, specs: Tree
) -> optax.GradientTransformation:
    """Lets XLA partition the update; what enters and leaves is sharded as said here.

    Reshapes and products of sharded dims (Newton-Schulz) have no one explicit sharding.
    """
    # auto_axes does nothing where no mesh is set.
    auto: Any = jax.sharding.auto_axes

    def init(params: Tree) -> optax.OptState:
        where = state_specs(jax.eval_shape(transformation.init, params), specs)
        return auto(transformation.init, out_sharding=where)(params)

    def update(
        updates: Tree, state: optax.OptState, params: Tree | None = None
    ) -> tuple[Tree, optax.OptState]:
        where = jax.tree.map(lambda s: parameter_spec(s.dims), specs), state_specs(state, specs)
        return auto(transformation.update, out_sharding=where)(updates, state, params)

    return optax.GradientTransformation(init, update)


def state_specs(state: optax.OptState, specs: Tree) -> optax.OptState:
    """The PartitionSpec of each leaf of an optimiser state, real or abstract.

    A leaf that stands at a parameter's path and has its shape (a moment, a fast iterate) is
    sharded like it. All else is small, a count or a factor of Adafactor, and replicated.
    """
    spec_of_path = {
        path: (spec.shape, parameter_spec(spec.dims))
        for path, spec in jax.tree_util.tree_leaves_with_path(specs)
    }

    def one(path: tuple[Any, ...], leaf: jax.Array) -> P:
        tails = (spec_of_path[path[i:]] for i in range(len(path)) if path[i:] in spec_of_path)
        return next((spec for shape, spec in tails if shape == leaf.shape), P())

    return jax.tree_util.tree_map_with_path(one, state)


def evaluation_params(state: optax.OptState, params: Tree) -> Tree:
    """The parameters to evaluate and generate with: schedule-free's average x, else `params`."""
    kind = optax.contrib.ScheduleFreeState
    for part in jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, kind)):
        if isinstance(part, kind):
            return optax.contrib.schedule_free_eval_params(part, params)
    return params


def ema_update(ema: Tree, params: Tree, decay: float, step: jax.typing.ArrayLike) -> Tree:
    """The debiased exponential moving average of parameters, one update further.

    Args:
        ema: the average so far; its value weighs nothing at step 0.
        params: the parameters after update number `step`.
        decay: in [0, 1).
        step: 0-based number of the update.

    Returns:
        sum_i decay^(step-i) params_i / sum_i decay^(step-i) over i = 0..step: Adam's bias
        correction (Kingma & Ba 2015, section 3) kept inside the average, so that early
        averages owe nothing to the initial parameters and need no correction on use.
    """
    log_decay = math.log(decay) if decay else -math.inf
    # expm1, because 1 - decay^(step+1) loses its digits in float32 early on.
    share = jnp.expm1(log_decay) / jnp.expm1((jnp.asarray(step) + 1) * log_decay)
    return jax.tree.map(lambda e, p: (1 - share) * e + share * p, ema, params)
