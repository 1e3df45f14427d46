"""The configuration: frozen dataclasses inside, one strict crossing from the edge.

A run is described by one `Config`. Files and command-line overrides live in
ml_collections at the edge (`gptjax/configure.py`); `from_dict` is the only way in. It
refuses unknown, missing and ill-typed keys and combinations that cannot work,
each with one line that names what would be valid.

No field has a default here: `configs/base.py` states every knob once, with its
unit and consequence. Choices that are rows of a table ("rope", "adamw", ...) are
checked by `choose` where the table lives, so that adding a row touches one file.

A knob that comes later states its off-value, `off(...)`, at which a run computes what it did
before the knob existed. What was recorded without the knob reads as off (`recorded`), and
`fingerprint` passes over what is off: no new knob outlaws an old run.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T")

# Exit status after SIGTERM or Ctrl-C, which save, or where a process was lost or a bucket is out of
# reach: run the same command to go on (EX_TEMPFAIL).
EXIT_STOPPED = 75


class UserError(Exception):
    """A mistake of the user's, told in one line that says what to do.

    The command line prints the message alone and exits with status 2.
    """


LESS_MEMORY = (
    "raise train.accumulation, lower data.batch_size or eval.batch_size, set model.remat or "
    "optim.loss_vocab_chunk, or split the model by the section mesh"
)


def out_of_memory(error: BaseException) -> str:
    """How the host or a device tells that it has too little memory; "" of another error.

    Jax makes no type of its own of it, and an array that could not be made tells so with another
    status once it is read, in the same words.
    """
    words = "RESOURCE_EXHAUSTED", "Out of memory"
    if isinstance(error, (UserError, OSError)):  # tensorstore says the same of a full disk
        return ""
    if isinstance(error, MemoryError) or any(word in str(error) for word in words):
        return f"out of memory ({(str(error).strip().splitlines() or ['the host'])[0]})"
    return ""


class ConfigError(UserError):
    """A configuration that is mistyped, incomplete or impossible."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_seed(seed: int) -> int:
    """`seed`, if initial values, data order, dropout and samples all use the whole of it.

    jax.random.key reads 32 bits: 2^32 would have the initial values of 0 and another data order.
    A traced seed is passed through.

    Raises:
        ConfigError: outside of [0, 2^32).
    """
    if isinstance(seed, numbers.Integral) and not 0 <= seed < 2**32:
        raise ConfigError(f"seed must lie in [0, 2^32), got {seed}")
    return seed


def _numbers(section: Any) -> None:
    """Refuses what no computation can use: inf and nan, and numbers beyond a device's integers."""
    for knob in dataclasses.fields(section):
        value = getattr(section, knob.name)
        path = f"{type(section).__name__.lower()}.{knob.name}"
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, float):
                _require(math.isfinite(item), f"{path} must be finite, got {value}")
            elif isinstance(item, int):
                _require(-(2**31) <= item < 2**31, f"{path} must be below 2^31, got {value}")


def _positive(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        path = f"{type(section).__name__.lower()}.{name}"
        _require(value is None or value > 0, f"{path} must be above 0, got {value}")


def _fraction(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        path = f"{type(section).__name__.lower()}.{name}"
        _require(value is None or 0 <= value < 1, f"{path} must lie in [0, 1), got {value}")


def off(value: Any) -> dict[str, Any]:
    """Of a field: the value that a config means which does not know the knob.

    It never changes, because fingerprints of runs that were recorded rest on it.
    """
    return {"off": value}


# Which projections of the attention have a bias; None: all or none, as `Model.bias` says.
ATTENTION_BIAS: dict[str, tuple[str, ...] | None] = {
    "same": None,
    "all": ("query", "key", "value", "out"),
    "qkv": ("query", "key", "value"),
    "none": (),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """The architecture: each field is one orthogonal choice."""

    vocab_size: int
    context: int
    layers: int
    width: int
    heads: int
    kv_heads: int | None = field(metadata=off(None))
    head_dim: int | None = field(metadata=off(None))
    feedforward: str
    ff_dim: int | None = field(metadata=off(None))
    experts: int = field(metadata=off(8))
    experts_per_token: int = field(metadata=off(2))
    shared_experts: int = field(metadata=off(0))
    normalise_gates: bool = field(metadata=off(True))
    capacity_factor: float | None = field(metadata=off(None))
    balance_loss: float = field(metadata=off(0.01))
    router_z_loss: float = field(metadata=off(0.0))
    balance_rate: float | None = field(metadata=off(None))
    position: str
    rope_base: float = field(metadata=off(1e4))
    rope_scaling: str = field(metadata=off("none"))
    rope_factor: float = field(metadata=off(1.0))
    rope_original_context: int | None = field(metadata=off(None))
    rope_rotations: tuple[float, ...] = field(metadata=off((1.0, 32.0)))
    norm: str
    norm_placement: str = field(metadata=off("pre"))
    norm_eps: float
    bias: bool = field(metadata=off(False))
    attention_bias: str = field(metadata=off("same"))
    parallel_block: bool = field(metadata=off(False))
    qk_norm: bool = field(metadata=off(False))
    windows: tuple[int | None, ...] = field(metadata=off((None,)))
    attention_softcap: float | None = field(metadata=off(None))
    logit_softcap: float | None = field(metadata=off(None))
    value_residual: bool = field(metadata=off(False))
    tied: bool
    dropout: float = field(metadata=off(0.0))
    init: str = field(metadata=off("gpt2"))
    init_scale: float = field(metadata=off(1.0))
    parametrisation: str = field(metadata=off("standard"))
    mup_base_width: int | None = field(metadata=off(None))
    mup_base_heads: int | None = field(metadata=off(None))
    mup_base_layers: int | None = field(metadata=off(None))
    attention: str = field(metadata=off("auto"))
    scan_layers: bool = field(metadata=off(False))
    remat: str = field(metadata=off("none"))
    dtype: str = field(metadata=off("float32"))
    products: str = field(metadata=off("dtype"))

    def __post_init__(self) -> None:
        _numbers(self)
        _positive(self, "vocab_size", "context", "layers", "width", "heads", "kv_heads")
        _positive(self, "head_dim", "ff_dim", "norm_eps")
        _positive(self, "experts", "experts_per_token", "capacity_factor", "balance_rate")
        _positive(self, "rope_base", "rope_factor", "rope_original_context")
        _positive(self, "attention_softcap", "logit_softcap", "init_scale")
        _positive(self, "mup_base_width", "mup_base_heads", "mup_base_layers")
        _fraction(self, "dropout")
        _require(
            self.head_dim is not None or self.width % self.heads == 0,
            f"model.width={self.width} is not divisible by model.heads={self.heads}: "
            "change one, or set model.head_dim",
        )
        _require(
            self.heads % self.K == 0,
            f"model.heads={self.heads} is not a multiple of model.kv_heads={self.K}",
        )
        _require(
            bool(self.windows) and all(w is None or w > 0 for w in self.windows),
            "model.windows must hold a width above 0, or None for full attention, for each "
            f"layer of the repeating pattern; got {self.windows}",
        )
        _require(
            len(self.rope_rotations) == 2 and 0 < self.rope_rotations[0] < self.rope_rotations[1],
            "model.rope_rotations must hold a low and a higher number of turns, both above 0; "
            f"got {self.rope_rotations}",
        )
        _require(
            self.experts_per_token <= self.experts,
            f"model.experts_per_token={self.experts_per_token} exceeds model.experts={self.experts}",
        )
        for name in ("shared_experts", "balance_loss", "router_z_loss"):
            _require(getattr(self, name) >= 0, f"model.{name} must not be negative")
        _require(
            self.dtype in ("float32", "bfloat16"),
            f"model.dtype={self.dtype!r} is not one of: float32, bfloat16",
        )

    @property
    def K(self) -> int:
        """Key-value heads: `heads` is multi-head, 1 is multi-query, between is grouped."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def H(self) -> int:
        """Width of a head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def biased(self) -> frozenset[str]:
        """Which projections of the attention have a bias: query, key, value, out."""
        kind = choose(ATTENTION_BIAS, self.attention_bias, "model.attention_bias")
        if kind is None:
            kind = ("query", "key", "value", "out") if self.bias else ()
        return frozenset(kind)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer: the pattern repeated; None sees the whole context."""
        return tuple(self.windows[i % len(self.windows)] for i in range(self.layers))


@dataclasses.dataclass(frozen=True)
class Optim:
    """The optimiser, its schedule and what surrounds the update."""

    optimizer: str
    peak_lr: float
    schedule: str
    warmup_steps: int
    decay_fraction: float
    final_lr_fraction: float
    schedule_steps: int | None = field(metadata=off(None))
    b1: float
    b2: float
    eps: float
    momentum: float
    weight_decay: float
    decay_mask: str
    clip: float | None
    ema_decay: float | None
    z_loss: float
    loss_vocab_chunk: int | None

    def __post_init__(self) -> None:
        _numbers(self)
        _positive(self, "peak_lr", "eps", "clip", "loss_vocab_chunk", "schedule_steps")
        _fraction(self, "b1", "b2", "momentum", "ema_decay")
        _require(self.warmup_steps >= 0, "optim.warmup_steps must not be negative")
        _require(self.weight_decay >= 0, "optim.weight_decay must not be negative")
        _require(self.z_loss >= 0, "optim.z_loss must not be negative")
        _require(0 < self.decay_fraction <= 1, "optim.decay_fraction must lie in (0, 1]")
        _require(0 <= self.final_lr_fraction <= 1, "optim.final_lr_fraction must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read, and how documents become rows of tokens."""

    sources: tuple[str, ...]
    weights: tuple[float, ...] | None
    tokenizer: str
    packing: str
    batch_size: int
    group: int = field(metadata=off(1))

    def __post_init__(self) -> None:
        _numbers(self)
        _positive(self, "batch_size", "group")
        _require(bool(self.sources), "data.sources is empty: name a token store or a built-in text")
        if self.weights is not None:
            _require(
                len(self.weights) == len(self.sources) and all(w > 0 for w in self.weights),
                f"data.weights must hold one weight above 0 for each of the {len(self.sources)} "
                f"data.sources, got {self.weights}",
            )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How many devices each mesh axis has; `data=None` takes all that remain."""

    data: int | None
    fsdp: int
    expert: int = field(metadata=off(1))
    sequence: int = field(metadata=off(1))
    tensor: int

    def __post_init__(self) -> None:
        _numbers(self)
        _positive(self, *self._axes())

    @property
    def splits(self) -> dict[str, int]:
        """The knobs that split a model over devices, and over how many."""
        sizes = {f"mesh.{axis}": getattr(self, axis) for axis in self._axes() if axis != "data"}
        return {name: size for name, size in sizes.items() if size > 1}

    @classmethod
    def _axes(cls) -> list[str]:
        return [axis.name for axis in dataclasses.fields(cls)]


# Each device has a whole model.
BATCH_PARALLEL = Mesh(data=None, fsdp=1, expert=1, sequence=1, tensor=1)


@dataclasses.dataclass(frozen=True)
class Train:
    """The length of a run and the rhythm of its side effects, in optimiser steps."""

    steps: int
    objective: str = field(metadata=off("next_token"))
    beta: float = field(metadata=off(0.1))
    gamma: float = field(metadata=off(0.5))
    reward: str | None = field(metadata=off(None))
    answer_tokens: int = field(metadata=off(128))
    trainable: str = field(metadata=off("all"))
    frozen: tuple[str, ...] = field(metadata=off(()))
    last_layers: int = field(metadata=off(1))
    lora_rank: int = field(metadata=off(8))
    lora_alpha: float = field(metadata=off(16.0))
    lora_matrices: tuple[str, ...] = field(metadata=off(()))
    lora_dropout: float = field(metadata=off(0.0))
    accumulation: int
    log_every: int
    watch: tuple[str, ...] = field(metadata=off(()))
    watch_every: int = field(metadata=off(100))
    eval_every: int
    checkpoint_every: int
    keep_checkpoints: int
    keep_every: int | None = field(metadata=off(None))
    branch: str | None = field(metadata=off(None))
    spike: float | None = field(metadata=off(None))
    hang_seconds: float = field(metadata=off(600.0))

    def __post_init__(self) -> None:
        _numbers(self)
        _positive(self, "steps", "accumulation", "log_every", "eval_every", "checkpoint_every")
        _positive(self, "keep_checkpoints", "keep_every", "watch_every", "spike", "hang_seconds")
        _positive(self, "last_layers", "lora_rank", "lora_alpha", "answer_tokens")
        _fraction(self, "lora_dropout")
        _require(self.beta >= 0, f"train.beta must not be negative, got {self.beta}")
        _require(
            (self.keep_every or 0) % self.checkpoint_every == 0,
            f"train.keep_every={self.keep_every} is not a multiple of train.checkpoint_every="
            f"{self.checkpoint_every}, so that not all of these steps are saved: make it one",
        )


@dataclasses.dataclass(frozen=True)
class Eval:
    """The perplexity convention; all of it is printed beside the number."""

    context: int | None
    stride: int | None
    prefix: str
    documents: str | None
    batch_size: int
    max_tokens: int | None

    def __post_init__(self) -> None:
        _numbers(self)
        _positive(self, "context", "stride", "batch_size", "max_tokens")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text generation."""

    prompt: str
    batch_size: int
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    stop: str | None

    def __post_init__(self) -> None:
        _numbers(self)
        _positive(self, "batch_size", "max_new_tokens", "top_k", "repetition_penalty")
        _require(self.temperature >= 0, "sample.temperature must not be negative; 0 is greedy")
        _require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"sample.top_p must lie in (0, 1], got {self.top_p}",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    seed: int
    model: Model
    optim: Optim
    data: Data
    mesh: Mesh
    train: Train
    eval: Eval
    sample: Sample

    def __post_init__(self) -> None:
        check_seed(self.seed)
        rows, micro = self.data.batch_size, self.train.accumulation
        _require(
            rows % micro == 0,
            f"data.batch_size={rows} is not divisible by train.accumulation={micro}",
        )
        context = self.eval.context or self.model.context
        stride = self.eval.stride or context
        _require(
            stride <= context,
            f"eval.stride={stride} exceeds the evaluation context of {context} tokens: "
            "tokens between the windows would go unscored",
        )


def choose(table: Mapping[str, T], name: str, knob: str) -> T:
    """The row `name` of a table of variants, or a ConfigError that lists the rows."""
    if name not in table:
        raise ConfigError(f"{knob}={name!r} is not one of: {', '.join(table)}{_hint(name, table)}")
    return table[name]


def from_dict(tree: Mapping[str, Any], cls: type[T] = Config, path: str = "") -> T:  # type: ignore[assignment]
    """Builds a config dataclass from nested mappings, strictly.

    Args:
        tree: nested mappings with exactly the fields of `cls`; lists count as tuples.
        cls: the dataclass to build.
        path: where in the config `tree` stands, for messages ("model").

    Raises:
        ConfigError: on an unknown, missing or ill-typed key, or an impossible combination.
    """
    hints = typing.get_type_hints(cls)
    prefix = f"{path}." if path else ""
    for key in tree:
        if key not in hints:
            raise ConfigError(unknown_key(f"{prefix}{key}", [prefix + name for name in hints]))
    missing = [f"{prefix}{name}" for name in hints if name not in tree]
    _require(not missing, f"missing config keys: {', '.join(missing)}")
    return cls(**{name: _typed(tree[name], hint, prefix + name) for name, hint in hints.items()})


def recorded(tree: Mapping[str, Any], cls: type[T] = Config) -> T:  # type: ignore[assignment]
    """As `from_dict`, of what a run recorded, perhaps before some knob existed: that one is off.

    Raises:
        ConfigError: as `from_dict`; a missing key is one of a knob without an off-value.
    """
    return from_dict(_with_off(tree, cls), cls)


def _with_off(tree: Mapping[str, Any], cls: Any) -> dict[str, Any]:
    filled = {**off_values(cls), **tree}
    for name, hint in typing.get_type_hints(cls).items():
        section = filled.get(name, {})
        if dataclasses.is_dataclass(hint) and isinstance(section, Mapping):
            filled[name] = _with_off(section, hint)
    return filled


def off_values(cls: Any) -> dict[str, Any]:
    """{field: its off-value} of those fields of a section that have one."""
    return {f.name: f.metadata["off"] for f in dataclasses.fields(cls) if "off" in f.metadata}


def to_dict(config: Any) -> dict[str, Any]:
    """The plain nested dict of a config dataclass; `from_dict(to_dict(c)) == c`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def fingerprint(config: Any) -> str:
    """A sha256 over the canonical JSON of what is not off: equal configs, equal fingerprints."""
    return hashlib.sha256(json.dumps(_on(config), sort_keys=True).encode()).hexdigest()


def _on(section: Any) -> dict[str, Any]:
    """The knobs that are not off, without sections where all are."""
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    off = off_values(section)
    on = {name: v for name, v in values.items() if name not in off or v != off[name]}
    nested = {name: _on(v) if dataclasses.is_dataclass(v) else v for name, v in on.items()}
    return {name: v for name, v in nested.items() if v != {}}


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys, in the order given."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        flat.update(flatten(value, name) if isinstance(value, Mapping) else {name: value})
    return flat


def unknown_key(name: str, knobs: Iterable[str]) -> str:
    """What to say of a dotted key that is none of `knobs`: the nearest, and its section's keys."""
    knobs = list(knobs)
    if keys := [k.removeprefix(f"{name}.") for k in knobs if k.startswith(f"{name}.")]:
        return f"'{name}' is a section of the config; its keys: {', '.join(keys)}"
    section = name.rpartition(".")[0]
    inside = [k.removeprefix(f"{section}.") for k in knobs if k.rpartition(".")[0] == section]
    valid = inside or sorted({k.partition(".")[0] for k in knobs})
    return f"unknown config key '{name}'{_hint(name, knobs)}; valid keys: {', '.join(valid)}"


def _hint(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _typed(value: Any, hint: Any, path: str) -> Any:
    """`value` checked against a type hint; int passes for float, list for tuple."""
    if dataclasses.is_dataclass(hint):
        _require(isinstance(value, Mapping), f"{path} must be a section, got {value!r}")
        return from_dict(value, hint, path)  # type: ignore[arg-type]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            inner = typing.get_args(option)[0]
            return tuple(_typed(item, inner, f"{path}[{i}]") for i, item in enumerate(value))
        # bool is an int to Python; to a researcher `layers=True` is a mistake.
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise ConfigError(f"{path} must be finite, got a number too large") from None
        if option in (int, str, bool) and type(value) is option:
            return value
    expected = " or ".join(
        "None" if o is type(None) else getattr(o, "__name__", str(o)) for o in options
    )
    raise ConfigError(f"{path} must be {expected}, got {value!r} ({type(value).__name__})")
