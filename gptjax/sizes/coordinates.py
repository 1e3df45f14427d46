"""The coordinate check of a parametrisation: do updates keep their size as the model grows?

A few steps are trained at each of several widths (Yang et al. 2022, appendix D.1) or depths,
at a constant rate, and after each the change of every activation since initialisation is
measured on tokens that were not trained on. Under muP the change is as large at any width.
Where it grows, the largest model is the first to diverge at a shared learning rate; where it
shrinks, that layer stops learning.

    slope = d log2(rms change) / d log2(width), least squares, mean over seeds

At initialisation activations may shrink (muP's logits fall as 1/sqrt(width)) but not grow.
The change of the logits is made of x's change under the initial table W_0, most of which is the
random sum that shrinks, and of x (W - W_0), which does not: "readout". The authors see the latter
alone, for they begin with W_0 = 0; here it is measured apart, and of the logits only growth counts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import model, state
from gptjax.config import Config, ConfigError, UserError, check_seed, to_dict
from gptjax.config import Model as ModelConfig
from gptjax.data.batches import Batch, Batches
from gptjax.layers.attention import resolve
from gptjax.setup import load_tokenizer
from gptjax.tokenizer import Tokenizer

Record = dict[str, Any]
Sizes = dict[str, dict[str, list[float]]]  # place -> "size", "change" -> at each step

# What is measured -> the point at which it is heard (`layers.context.POINTS`).
PLACES = {
    "embedding": "embedding",
    "attention": "attention_out",
    "feedforward": "feedforward_out",
    "stream": "stream",
}
# Knob -> places whose change must neither grow nor shrink; of the others only growth counts.
KEPT = {
    "model.width": ("embedding", "attention", "feedforward", "stream", "readout"),
    # A branch's own weights move by 1/sqrt(depth), what it reads by as much at any depth: by
    # which of the two its output changes depends on the initial scale.
    "model.layers": ("embedding", "stream", "readout"),
}
# On slopes: half of 1/2, the smallest power that a wrong rule is off by.
TOLERANCE = 0.25
PROBE_TOKENS = 2048  # on which activations are measured


def coordinate_check(
    config: Config,
    widths: Sequence[int] = (),
    depths: Sequence[int] = (),
    steps: int = 4,
    seeds: int = 2,
) -> Record:
    """Checks `config` over widths, heads staying as many, and over depths; on one device.

    No mesh may be set. The schedule is constant at `optim.peak_lr` from the first step.

    Args:
        config: a recipe of any parametrisation; its own width or depth gives way.
        widths: at least two of `model.width`, or none.
        depths: at least two of `model.layers`, or none.
        steps: updates; the change after the last is judged, for that after the first is little
            more than the signs of a few noisy gradients.
        seeds: of initial values and data, from `config.seed` on.

    Returns:
        A record that JSON can hold: "passed", and for each knob of "sweeps" its "values",
        "faults" and "places": of each "size" and "change", their "rms" by (seed, value, step)
        and "slopes" by step; None where a number is not finite.

    Raises:
        UserError: on a sweep that cannot be made.
    """
    swept = {"model.width": list(widths), "model.layers": list(depths)}
    swept = {knob: sorted(set(values)) for knob, values in swept.items() if values}
    if not swept or any(len(values) < 2 for values in swept.values()):
        raise UserError("coord-check needs two or more different --widths, or --depths, or both")
    if steps < 1 or seeds < 1:
        raise UserError(f"--steps={steps} and --seeds={seeds} must both be above 0")
    check_seed(config.seed + seeds - 1)
    for name in ("ff_dim", "head_dim"):
        if widths and getattr(config.model, name) is not None:
            raise ConfigError(f"model.{name} must be None, so that it grows with the width")
    config = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, schedule="constant", warmup_steps=0),
        train=dataclasses.replace(config.train, steps=steps),
    )
    vocabulary = load_tokenizer(config)
    sweeps = {knob: sweep(config, vocabulary, knob, v, seeds) for knob, v in swept.items()}
    return {
        "config": to_dict(config),
        "steps": steps,
        "seeds": seeds,
        "tolerance": TOLERANCE,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "sweeps": sweeps,
        "passed": not any(one["faults"] for one in sweeps.values()),
    }


def sweep(
    config: Config, vocabulary: Tokenizer, knob: str, values: Sequence[int], seeds: int
) -> Record:
    """One knob's part of the record."""
    sizes: list[list[Sizes]] = []  # value, seed
    for value in values:
        field: Any = {knob.removeprefix("model."): value}
        shape = dataclasses.replace(config.model, **field)
        shape = resolve(shape, jax.devices()[0].platform)
        sizes.append(measure(dataclasses.replace(config, model=shape), vocabulary, seeds))
    places: dict[str, Any] = {}
    for name, kinds in sizes[0][0].items():
        places[name] = {}
        for kind in kinds:
            rms = np.array([[one[name][kind] for one in row] for row in sizes]).swapaxes(0, 1)
            places[name][kind] = {"rms": rms, "slopes": slopes(values, rms)}
    failures = list(faults(knob, places))
    return {"values": list(values), "places": jax.tree.map(_plain, places), "faults": failures}


def slopes(values: Sequence[int], rms: np.ndarray) -> np.ndarray:
    """The power of the value that each step follows; rms has (seeds, values, steps)."""
    x = np.log2(values) - np.log2(values).mean()
    # What starts at zero (model.init="zero_out") does so at any width.
    y = np.log2(np.maximum(rms, 1e-30)).mean(axis=0)
    return x @ y / (x @ x)


def _plain(array: np.ndarray) -> list[Any]:
    return jax.tree.map(lambda x: x if np.isfinite(x) else None, array.tolist())


def faults(knob: str, places: dict[str, Any]) -> Iterator[str]:
    """What grows or shrinks with the knob though it should not, each in a line."""
    what = knob.removeprefix("model.")
    for name, kinds in places.items():
        first, changes = kinds["size"]["slopes"][0], kinds["change"]["slopes"]
        if not np.isfinite(changes).all():
            yield f"{name} is not finite: lower optim.peak_lr"
            continue
        if first > TOLERANCE:
            yield f"{name} grows with the {what} at initialisation: slope {first:+.2f}"
        slope = changes[-1]
        if slope > TOLERANCE or (slope < -TOLERANCE and name in KEPT[knob]):
            way = "grows" if slope > 0 else "shrinks"
            yield f"{name}: its change {way} with the {what}: slope {slope:+.2f}"


def measure(config: Config, vocabulary: Tokenizer, seeds: int) -> list[Sizes]:
    """Trains each seed; "size" at steps 0 to `train.steps`, "change" since 0 at steps 1 on."""
    train = state.make_train_step(config)
    look = functools.partial(activations, config.model)
    rows, micro, steps = config.data.batch_size, config.train.accumulation, config.train.steps
    measured: list[Sizes] = []
    for seed in range(config.seed, config.seed + seeds):
        batches = Batches(config.data, config.model.context, seed, "train", vocabulary)
        probe = batch(batches, steps, max(1, min(rows, PROBE_TOKENS // config.model.context)))
        train_state = _create(config, np.uint32(seed))
        first = jax.tree.map(jnp.copy, train_state.params)  # the state is donated
        before = look(first, first, probe)
        history = [_compare(before, before)]
        for step in range(steps):
            drawn = batch(batches, step, rows)
            micros = jax.tree.map(lambda x: x.reshape(rows // micro, micro, -1), drawn)
            train_state, _ = train(train_state, micros)
            history.append(_compare(before, look(first, train_state.params, probe)))
        measured.append(
            {
                name: {
                    "size": [float(one[name][0]) for one in history],
                    "change": [float(one[name][1]) for one in history[1:]],
                }
                for name in history[0]
            }
        )
    return measured


def batch(batches: Batches, step: int, rows: int) -> Batch[jax.Array]:
    drawn = batches.rows(step, 0, rows)
    return jax.tree.map(jnp.asarray, drawn if batches.segmented else drawn._replace(segments=None))


@functools.partial(jax.jit, static_argnums=0)
def _create(config: Config, seed: Any) -> state.TrainState:
    return state.create(config, model.init(config.model, seed))


@jax.jit
def _compare(
    before: dict[str, jax.Array], after: dict[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {name: (_rms(x), _rms(x - before[name])) for name, x in after.items()}


@functools.partial(jax.jit, static_argnums=0)
def activations(
    config: ModelConfig, first: model.Params, params: model.Params, probe: Batch[jax.Array]
) -> dict[str, jax.Array]:
    """What each place computes with `params`, float32, the blocks' with a leading dim L.

    "stream" is the last block's; "readout" the logits by what the table learned since `first`.
    """
    x_BTD, _, heard = model.hidden(
        config,
        params,
        probe.tokens,
        position_BT=probe.positions,
        segments_BT=probe.segments,
        listen=tuple(PLACES.values()),
    )
    learned = jax.tree.map(jnp.subtract, params, first)
    uncapped = dataclasses.replace(config, logit_softcap=None)
    places = {name: heard[point] for name, point in PLACES.items()} | {
        "stream": heard["stream"][-1:],
        "readout": model.logits(uncapped, learned, x_BTD),
        "logits": model.logits(config, params, x_BTD),
    }
    return {name: x.astype(jnp.float32) for name, x in places.items()}


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x).mean())
