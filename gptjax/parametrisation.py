"""How initial values, rates and multipliers change with the shape: a table of powers.

A parametrisation lets what was tuned at a small base shape serve at a larger one. With

    m = width / model.mup_base_width
    h = head width / head width at the base shape
    d = layers / model.mup_base_layers

a row states powers of m, h and d. Where a row reads a ratio not at all, that ratio is 1: its
base shape is the model's own, and the knob of the base is not needed. At m = h = d = 1 all
rows are the same model and the same training.

Not scaled: Adam's eps. Gradients of the matrices fall as 1 / m, and eps = 1e-8 stays far below
them up to widths of some ten thousand.
"""

from __future__ import annotations

from typing import NamedTuple

from gptjax.config import ConfigError, Model, choose


class Powers(NamedTuple):
    std: float  # of m, on the initial standard deviation at the base shape
    rate: float  # of m, on the learning rate


class Rules(NamedTuple):
    """A parametrisation.

    Attributes:
        kinds: the powers of each kind of parameter, see `gptjax.layers.parameter.KIND`.
        logits: power of m, on the logits, and on a router's scores.
        scores: power of h, on attention scores that were divided by sqrt(head width).
        branch: power of d, on what attention and feed-forward add to the residual stream.
        block_rate: power of d, on the learning rate of the blocks' parameters.
    """

    kinds: dict[str, Powers]
    logits: float
    scores: float
    branch: float
    block_rate: float


STANDARD = Rules(
    kinds={
        "embedding": Powers(std=0, rate=0),
        "matrix": Powers(std=0, rate=0),
        "router": Powers(std=0, rate=0),
        "unembedding": Powers(std=0, rate=0),
        "vector": Powers(std=0, rate=0),
        "adapter_out": Powers(std=0, rate=0),  # from a rank, which does not grow with the width
    },
    logits=0,
    scores=0,
    branch=0,
    block_rate=0,
)

# Yang et al. 2022 (arXiv:2203.03466), table 8, Adam: the form in which the logits have a
# multiplier, so that a tied table has one std and one rate; scores fall as 1/H (definition 4.1).
MUP = STANDARD._replace(
    kinds=STANDARD.kinds | {"matrix": Powers(std=-1 / 2, rate=-1)}, logits=-1, scores=-1 / 2
)

PARAMETRISATION: dict[str, Rules] = {
    "standard": STANDARD,
    "mup": MUP,
    # Yang et al. 2023 (arXiv:2310.02244), table 1, Adam; for gains and biases of the blocks as
    # for their matrices (Dey et al. 2025, arXiv:2505.01618, table 1, alpha = 1/2).
    "mup_depth": MUP._replace(branch=-1 / 2, block_rate=-1 / 2),
}


def rules(config: Model) -> Rules:
    return choose(PARAMETRISATION, config.parametrisation, "model.parametrisation")


def width_ratio(config: Model) -> float:
    """m; 1 where the rules read no width.

    Raises:
        ConfigError: where they do and `model.mup_base_width` is None.
    """
    powers = rules(config)
    if not any((*sum(powers.kinds.values(), ()), powers.logits, powers.scores)):
        return 1.0
    return config.width / _base(config, "width")


def head_ratio(config: Model) -> float:
    """h; 1 where the rules read no width. Heads x H is taken to grow as the width does.

    Raises:
        ConfigError: where the base's number of heads cannot be told.
    """
    if rules(config).scores and config.head_dim is not None:
        _base(config, "heads")
    heads = config.heads if config.mup_base_heads is None else config.mup_base_heads
    return width_ratio(config) * heads / config.heads


def depth_ratio(config: Model) -> float:
    """d; 1 where the rules read no depth.

    Raises:
        ConfigError: where they do and `model.mup_base_layers` is None.
    """
    powers = rules(config)
    return config.layers / _base(config, "layers") if powers.branch or powers.block_rate else 1.0


def _base(config: Model, name: str) -> int:
    value = getattr(config, f"mup_base_{name}")
    if value is None:
        raise ConfigError(
            f"model.parametrisation={config.parametrisation!r} needs model.mup_base_{name}, the "
            f"{name} of the model at which model.init and optim.peak_lr were chosen"
        )
    return value


def init_std(config: Model, kind: str) -> float:
    """The factor on the initial standard deviation that `model.init` gives at the base shape."""
    return width_ratio(config) ** rules(config).kinds[kind].std


def logit_multiplier(config: Model) -> float:
    return width_ratio(config) ** rules(config).logits


def score_multiplier(config: Model) -> float:
    return head_ratio(config) ** rules(config).scores


def branch_multiplier(config: Model) -> float:
    return depth_ratio(config) ** rules(config).branch


def scales_rates(config: Model) -> bool:
    """Whether the rules may give parameters of one model different learning rates."""
    powers = rules(config)
    return any((*(p.rate for p in powers.kinds.values()), powers.block_rate))


def rate_multiplier(config: Model, kind: str, in_block: bool) -> float:
    """The factor on the learning rate of a parameter, which is one of each layer or not."""
    m, d, powers = width_ratio(config), depth_ratio(config), rules(config)
    return m ** powers.kinds[kind].rate * d ** (powers.block_rate if in_block else 0)
