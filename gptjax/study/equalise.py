"""What the arms of a study have in common: each one's length or width is solved for it."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from gptjax import accounting, branch
from gptjax.config import Config, ConfigError, Model, choose
from gptjax.configure import difference
from gptjax.layers.feedforward import hidden_width

TOLERANCE = 0.01  # a budget further from the baseline's than this share is refused


def tokens(config: Config) -> float:
    """Tokens that a run trains on; what its trunk did before it branched is not its own."""
    steps = config.train.steps - branch.first_step(config)
    return float(steps * config.data.batch_size * config.model.context)


def flops(config: Config) -> float:
    """FLOPs of a run, causal, by `accounting.train_flops_per_token`."""
    return tokens(config) * accounting.train_flops_per_token(config, causal=True)


def parameters(config: Config) -> float:
    return float(accounting.parameters(config.model)["total"])


def _length(config: Config, cost: Callable[[Config], float], target: float) -> Config:
    """`config` with the number of steps that costs nearest to `target`."""
    before = branch.first_step(config)
    steps = max(1, round(target / cost(config) * (config.train.steps - before)))
    train = dataclasses.replace(config.train, steps=before + steps)
    return dataclasses.replace(config, train=train)


def _width(config: Config, target: float, fixed: Collection[str]) -> Config:
    """`config` with about `target` parameters: the nearest width, then a feed-forward to match.

    The width moves in multiples of 2 x heads, so that heads stay whole and, for RoPE, even;
    the feed-forward's width then makes up what is left, to a fraction of a percent.
    """
    m = config.model

    def miss(model: Model) -> float:
        return accounting.parameters(model)["total"] - target

    if "model.width" not in fixed and m.head_dim is None:
        unit = 2 * m.heads
        shapes = [dataclasses.replace(m, width=w) for w in range(unit, 4 * m.width + 1, unit)]
        # More width is never fewer parameters: the nearest are on either side of the target.
        above = bisect.bisect_left(shapes, 0.0, key=miss)
        m = min([m, *shapes[max(above - 1, 0) : above + 1]], key=lambda m: abs(miss(m)))
    if "model.ff_dim" not in fixed and miss(m):
        F = hidden_width(m)
        a_unit = miss(dataclasses.replace(m, ff_dim=F + 1)) - miss(m)
        m = dataclasses.replace(m, ff_dim=max(1, F - round(miss(m) / a_unit)))
    return dataclasses.replace(config, model=m)


def _equal_tokens(config: Config, base: Config, fixed: Collection[str]) -> Config:
    return _length(config, tokens, tokens(base))


def _equal_flops(config: Config, base: Config, fixed: Collection[str]) -> Config:
    return _length(config, flops, flops(base))


def _equal_parameters(config: Config, base: Config, fixed: Collection[str]) -> Config:
    return _width(config, parameters(base), fixed)


def nothing(config: Config) -> float:
    """Arms are as they say: the rungs of a ladder of sizes, which no table of verdicts holds."""
    return 0.0


def _as_it_is(config: Config, base: Config, fixed: Collection[str]) -> Config:
    return config


class Equal(NamedTuple):
    """What may be held equal.

    Attributes:
        description: after "Held equal: ".
        solved: the knobs that it sets and so no arm may.
        measure: of a config.
        solve: (an arm's config, the baseline's, knobs that the arm sets) -> the arm's at the
            baseline's measure.
    """

    description: str
    solved: tuple[str, ...]
    measure: Callable[[Config], float]
    solve: Callable[[Config, Config, Collection[str]], Config]


STEPS = ("train.steps",)
EQUAL: dict[str, Equal] = {
    "tokens": Equal("tokens, so arms train on the same batches", STEPS, tokens, _equal_tokens),
    "flops": Equal("training FLOPs (steps are solved for)", STEPS, flops, _equal_flops),
    "parameters": Equal("parameters (widths are solved for)", (), parameters, _equal_parameters),
    "nothing": Equal("nothing: arms may differ in size and length", (), nothing, _as_it_is),
}


def equalise(
    config: Config, base: Config, equal: str, fixed: Collection[str]
) -> tuple[Config, dict[str, Any]]:
    """An arm's config with the base's budget, and the knobs that were solved for.

    Args:
        config: the arm's.
        base: the baseline's.
        equal: a row of EQUAL. With "parameters" the arm trains as many steps as it says.
        fixed: knobs that the arm sets, which are not solved for.

    Raises:
        ConfigError: where the budget cannot be met to 1%, or the arm sets what would be solved.
    """
    row = choose(EQUAL, equal, "equal")
    if knobs := [knob for knob in row.solved if knob in fixed]:
        raise ConfigError(f"it sets {knobs[0]}, which equal={equal!r} solves for: leave it out")
    equal_config = row.solve(config, base, fixed)
    target, reached = row.measure(base), row.measure(equal_config)
    if abs(reached - target) > TOLERANCE * target:
        raise ConfigError(
            f"{equal} cannot be made equal: {reached:,.0f} is the nearest to the baseline's "
            f"{target:,.0f}; change the arm, or hold something else equal: {', '.join(EQUAL)}"
        )
    return equal_config, {knob: new for knob, (_, new) in difference(config, equal_config).items()}
