"""A run trained again from its folder, and proof that its numbers recur.

Verified before anything is computed: config.json against the sha256 that the run's last start
recorded; the tokenizer and every byte of both splits of the data against the recorded
fingerprints. Then the run is trained from its beginning, in one go and in a temporary folder, on
the mesh that it had where so many devices are here; and each number of metrics.jsonl that is a
result is compared with the new one.

Where versions, code, devices and settings are those of the run, numbers must recur bit for bit.
Where they are not, sums may be rounded in another order, which training amplifies from step to
step. Then the numbers may differ by `BOUNDS`, and what differs is said. No bound holds for a run
that is close to diverging: it amplifies rounding until it is another run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax

from gptjax import loop, places, records, setup, spike, tokenizer
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.config import (
    Config,
    ConfigError,
    Mesh,
    UserError,
    flatten,
    from_dict,
    off_values,
    recorded,
    to_dict,
)
from gptjax.data.sources import open_source
from gptjax.locks import scratch
from gptjax.progress import say
from gptjax.rollouts import load_reward
from gptjax.sharding import AXES, make_mesh, section
from gptjax.storage import Place

# Of metrics.jsonl: what tells a machine's day, no result. Every other key is compared.
TIMINGS = ("tokens_per_second", "mfu", "compile_seconds", "program_bytes")
# Of environment.json: what may change how a program rounds.
FACTS = (
    *("python", "versions", "code", "cpu", "backend", "devices", "mesh", "processes"),
    *("xla_flags", "jax_settings"),
)
# How far a result may lie from its old self, relative, where the environment differs; at step
# s < GROWN it is s / GROWN of this. Measured over 400 steps of a GPT of 4 layers of width 64, one
# core against two, meshes of 1 to 8 devices, tensor splits, jax 0.10 against 0.12: at most 8e-7 in
# the loss and 8e-5 in the norm of the gradient in float32, 2e-3 and 0.4 in bfloat16. The rest is
# room for longer runs. Another seed is 6e-4 away at step 1 and 2e-2 from step 50 on (median). At
# ten times that learning rate a tensor split alone was 4e-2 away after 200 steps.
BOUNDS = {
    "float32": {"loss": 1e-3, "gradient_norm": 1e-2},
    "bfloat16": {"loss": 1e-2, "gradient_norm": 1.0},
}
GROWN = 100
# Results that rounding hardly touches, at any step.
STEADY = {"learning_rate": 1e-5, "tokens": 0.0, "skipped": 0.0}

# {step: {name: number}}, timings left out.
Numbers = dict[int, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Past:
    """What a run's folder tells, once it is verified.

    Attributes:
        config: of the start at which the log begins.
        starts: (the step it began from, its record in environment.json) of each start that made
            the log.
        logged: the log.
        saved: the step of the latest checkpoint, 0 without one: up to it the log is whole.
    """

    config: Config
    starts: list[tuple[int, dict[str, Any]]]
    logged: Numbers
    saved: int

    @property
    def ends(self) -> set[int]:
        """Where the run would have ended, had it not been extended: logged and scored once more."""
        changed = [record["changed_knobs"].get("train.steps") for _, record in self.starts[1:]]
        return {before for before, _ in filter(None, changed)}

    @property
    def last(self) -> int:
        """The step to replay up to."""
        return max(self.saved, *self.logged)

    def owes(self, step: int, name: str) -> bool:
        """Whether the log must hold a number that the run makes."""
        if self.changes("train.log_every") or self.changes("train.eval_every"):
            return False  # the new log has more lines
        # A run that was killed may have been about to evaluate.
        cut = step == max(self.logged) > self.saved and name.startswith("val_")
        return not cut

    def changes(self, knob: str) -> list[Any]:
        """What later starts set a knob to."""
        changed = [record["changed_knobs"] for _, record in self.starts[1:]]
        return [knobs[knob][1] for knobs in changed if knob in knobs]


def replay_run(workdir: Place, begin: setup.Start | None = None) -> dict[str, Any]:
    """Trains the run in `workdir` again and compares; an unfinished run up to its last step.

    Args:
        workdir: the run's folder, which is only read.
        begin: what the run was begun from (`trained.start_from`); None: from random parameters.

    Returns:
        A record that JSON can hold: "same", whether the run recurs; "reason" in a line where it
        does not, else None; "bitwise", whether each number equals its old self bit for bit;
        "differs", a line for each difference between the run's environment and this one; "bound",
        the relative one that holds for the loss where there are such, else None;
        "steps" replayed "of" all; "numbers" compared; "largest", the largest relative difference
        by "step", "name", "was", "is" and "relative", None where there is none.

    Raises:
        UserError: if config, tokenizer or data are not those of the run, by the file and knob
            or shard; if the folder holds no run; or if `begin` is not what it began from.
    """
    past = verify(workdir, begin)
    mesh = _mesh(past)
    with jax.set_mesh(mesh):
        differs = differences(past)
    say(f"{workdir}: config and data are those of the run; training to step {past.last}")
    with scratch() as folder:
        retrained = _train(past, workdir, folder, mesh, begin)
    precision = _precision(past) if differs else None
    return {"workdir": str(workdir), "differs": differs} | compare(past, retrained, precision)


def verify(workdir: Place, begin: setup.Start | None = None) -> Past:
    """The record of a run, if config, tokenizer, data and `begin` are still those of the run.

    Raises:
        UserError: as `replay_run`.
    """
    places.forget()  # every byte of the data is read
    history = records.read_environment(workdir)
    if not history:
        raise UserError(f"{workdir} holds no run: it has no {records.ENVIRONMENT}")
    if writer := Checkpoints(workdir / CHECKPOINTS).writer():
        raise UserError(f"{workdir} is being trained by {writer}: replay it after that")
    try:
        return _verify(workdir, history, begin)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{workdir / records.ENVIRONMENT} was altered, or is of another version of gptjax, "
            f"which recorded less ({error}): it cannot be replayed"
        ) from error


def _verify(workdir: Place, history: list[dict[str, Any]], begin: setup.Start | None) -> Past:
    config = _read_config(workdir, history[-1]["config_sha256"])
    if "initial" in history[-1] and begin is None:
        model = history[-1]["initial"]["model"]
        raise UserError(f"the run began with a pretrained model: name it by --from={model}")
    verify_content(config, history[-1]["fingerprints"], begin)
    logged = by_step(records.read_metrics(workdir), workdir)
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        saved = checkpoints.latest() or 0
    if not logged:
        raise UserError(f"{workdir} has logged no step: there is nothing to compare with")
    # The log begins with the last start that emptied it.
    begun = max(i for i, record in enumerate(history) if record["resume_step"] is None)
    starts = [(record["resume_step"] or 0, record) for record in history[begun:]]
    changed = [record["changed_knobs"] for _, record in starts[1:]]
    # A finished run that is started again adds a record, but trains nothing.
    starts = [starts[0], *(start for start in starts[1:] if start[0] < max(logged))]
    return Past(_before(changed, config), starts, logged, saved)


def _before(changed: list[dict[str, list[Any]]], config: Config) -> Config:
    """The config before the changes of later starts, but for those of its length."""
    tree = to_dict(config)
    for knobs in reversed(changed):
        for knob, (before, _) in knobs.items():
            section, _, name = knob.partition(".")
            if knob not in records.LENGTH:  # the last is right for all
                tree[section][name] = before
    return from_dict(tree)


def _read_config(workdir: Place, sha256: str) -> Config:
    """That of config.json, if each byte is what the last start wrote."""
    path = workdir / records.CONFIG
    if not path.is_file():
        raise UserError(f"{workdir} holds no run: it has no {records.CONFIG}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() == sha256:
        return recorded(json.loads(content))
    raise UserError(
        f"{path} is not what the run wrote: {_altered(workdir, content)}. Restore it to replay "
        "the run"
    )


def _altered(workdir: Place, content: bytes) -> str:
    """What is wrong with a config.json: by knob where a checkpoint tells what it held."""
    try:
        tree = to_dict(recorded(json.loads(content)))
    except ConfigError as error:
        return str(error)
    except (ValueError, TypeError, AttributeError):
        return "it is no config in JSON"
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            return "its sha256 is another (no checkpoint tells which knob changed)"
        saved = flatten(to_dict(recorded(checkpoints.meta(step)["config"])))
        now = flatten(tree)
    changed = [
        f"{knob} was {saved.get(knob)!r}, is {now[knob]!r}"
        for knob in now
        if saved.get(knob) != now[knob]
    ]
    return "; ".join(changed) or "each knob has its value, but is spelled in other bytes"


def verify_content(
    config: Config, fingerprints: Mapping[str, str], begin: setup.Start | None
) -> None:
    """Reads every byte of what a config only names, and compares with the run's fingerprints.

    Raises:
        UserError: naming what changed: the tokenizer, a split, a shard, the initial parameters.
    """
    tokenizer.load.cache_clear()  # what this process has read may not be what lies there now
    vocabulary = setup.load_tokenizer(config)
    _same(f"tokenizer {vocabulary.name}", fingerprints["tokenizer"], vocabulary.fingerprint)
    for source in config.data.sources:
        for name, split in (("data", "train"), ("held_out", "val")):
            store = open_source(source, vocabulary, split)  # checks each file by the manifest
            _same(f"{store.path}", fingerprints[f"{name}.{source}"], store.fingerprint)
    if (reward := config.train.reward) is not None and "reward" in fingerprints:
        _same(f"train.reward={reward}", fingerprints["reward"], load_reward(reward).sha256)
    initial = fingerprints.get("initial")
    if initial is None and begin is not None:
        raise UserError("the run began with random parameters: leave --from out")
    if initial is not None and begin is None:
        raise UserError("the run began with a pretrained model: name its folder by --from DIR")
    if initial is not None and begin is not None:
        _same("the model of --from", initial, begin.fingerprint)


def _same(name: str, was: str, current: str) -> None:
    if was != current:
        raise UserError(
            f"{name} is not what the run read: its fingerprint was {was[:12]}, is {current[:12]}. "
            "Bring the old content back to replay the run"
        )


def by_step(lines: list[dict[str, float]], folder: Place) -> Numbers:
    """The results in a log: a step's line of training and that of evaluation become one.

    Raises:
        UserError: if a number is there twice.
    """
    numbers: Numbers = {}
    for line in lines:
        step = numbers.setdefault(int(line["step"]), {})
        for name in line.keys() - {"step", *TIMINGS}:
            if name in step:
                raise UserError(
                    f"{folder / records.METRICS} was altered: step {line['step']} has {name} twice"
                )
            step[name] = line[name]
    return numbers


def _mesh(past: Past) -> jax.sharding.Mesh:
    """The mesh that the run had, where so many devices are here; else a single device."""
    devices, shape = jax.devices(), past.starts[0][1]["mesh"]
    size = math.prod(shape.values())
    if not shape or size > len(devices):
        shape, size = dict.fromkeys(AXES, 1), 1
    return make_mesh(section(shape), devices[:size])


def differences(past: Past) -> list[str]:
    """How the environment of the run differs from this one, on the current mesh; a line each."""
    current = _facts(records.environment() | {"code": records.code_fingerprint()})
    lines = []
    for start, record in past.starts:
        was = _facts(record)
        since = f" since step {start}" if start else ""
        lines += [
            f"{name} was {was.get(name)!r}{since}, is {current.get(name)!r}"
            for name in was | current
            if was.get(name) != current.get(name)
        ]
        lines += [
            f"{knob} was {after!r}{since}, is {before!r}"
            for knob, (before, after) in record["changed_knobs"].items()
            if start and knob.partition(".")[0] not in ("train", "sample")
            if knob not in records.LENGTH
        ]
    if current["backend"] == "gpu" and "xla_gpu_deterministic_ops=true" not in current["xla_flags"]:
        lines.append("a GPU adds in any order without XLA_FLAGS=--xla_gpu_deterministic_ops=true")
    return list(dict.fromkeys(lines))


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    facts = {name: record[name] for name in FACTS}
    facts["mesh"] = off_values(Mesh) | facts["mesh"]
    facts["devices"] = ", ".join(sorted(facts["devices"]))  # their kinds: the mesh has the number
    facts["code"] = facts["code"][:12]
    if record["backend"] != "cpu":
        del facts["cpu"]
    return flatten(facts)


def _train(
    past: Past, workdir: Place, folder: Place, mesh: jax.sharding.Mesh, begin: setup.Start | None
) -> Numbers:
    """The log of the run trained again, in an empty folder."""
    t = past.config.train
    # Where a start changed the rhythm, one that has all the steps of both.
    log_every = math.gcd(t.log_every, *past.changes("train.log_every"))
    eval_every = math.gcd(t.eval_every, *past.changes("train.eval_every"))
    t = dataclasses.replace(
        t, log_every=log_every, eval_every=eval_every, checkpoint_every=t.steps, keep_checkpoints=1,
        keep_every=None,
    )  # fmt: skip
    config = dataclasses.replace(past.config, train=t, mesh=section(mesh.shape))
    spike.write(folder, spike.read(workdir))  # it passes over what the run did
    try:
        with jax.set_mesh(mesh):
            loop.train(config, folder, begin, past.last)
    except loop.Stopped:
        raise KeyboardInterrupt from None
    except loop.Diverged as error:  # as the run may have done: its log tells
        say(str(error))
    return by_step(records.read_metrics(folder), folder)


def _precision(past: Past) -> str:
    """The row of `BOUNDS`: accelerators multiply float32 with fewer bits by default."""
    backends = {record["backend"] for _, record in past.starts} | {jax.default_backend()}
    return past.config.model.dtype if backends == {"cpu"} else "bfloat16"


def bound(name: str, step: int, precision: str | None) -> float:
    """How far apart a result may be at a step; 0 where the environment is the same (None)."""
    if precision is None:
        return 0.0
    if name in STEADY:
        return STEADY[name]
    row = BOUNDS[precision]
    return row.get(name, row["loss"]) * min(1.0, step / GROWN)


def compare(past: Past, retrained: Numbers, precision: str | None) -> dict[str, Any]:
    """The log against the log of the retrained run, by the bounds of a precision; see `replay_run`."""
    wrong, pairs = [], []
    for step in sorted(past.logged | retrained):
        was, new = past.logged.get(step, {}), retrained.get(step, {})
        owed = [name for name in sorted(new.keys() - was.keys()) if past.owes(step, name)]
        wrong += [f"step {step}: {records.METRICS} has no {' and no '.join(owed)}"] * bool(owed)
        for name in sorted(was):
            if name not in new and step in past.ends:
                continue
            if name not in new:
                wrong.append(f"step {step}: {name} was {was[name]!r}, is not made again")
                continue
            apart = relative(was[name], new[name])
            pairs.append((apart, step, name, was[name], new[name]))
            if apart > bound(name, step, precision):
                wrong.append(f"step {step}: {name} was {was[name]!r}, is {new[name]!r}")
    largest = max(pairs, default=(0.0, 0, "", 0.0, 0.0))
    remainder = f" (and {len(wrong) - 1} more that differ)" if len(wrong) > 1 else ""
    if precision is not None:
        remainder += ", beyond what rounding does to a steady run"
    return {
        "same": not wrong,
        "reason": wrong[0] + remainder if wrong else None,
        "bitwise": not wrong and largest[0] == 0,
        "bound": None if precision is None else BOUNDS[precision]["loss"],
        "steps": past.last,
        "of": past.config.train.steps,
        "numbers": len(pairs),
        "largest": _largest(*largest) if largest[0] > 0 else None,
    }


def _largest(apart: float, step: int, name: str, was: float, new: float) -> dict[str, Any]:
    numbers = {"relative": apart, "was": was, "is": new}
    return {"step": step, "name": name} | {k: records.portable(v) for k, v in numbers.items()}


def relative(a: float, b: float) -> float:
    """How far apart two numbers are: 0 for two NaN, infinite for one beside a number."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def show(record: Mapping[str, Any]) -> None:
    """Prints a record of `replay_run` for a person."""
    print(
        f"{record['workdir']}: trained again, {record['steps']:,} of {record['of']:,} steps; "
        f"{record['numbers']:,} numbers compared"
    )
    for difference in record["differs"]:
        print(f"  {difference}")
    largest = record["largest"]
    if largest is not None:
        print(
            f"largest difference: {float(largest['relative']):.1e} of {largest['name']} at step "
            f"{largest['step']}, which was {largest['was']}, is {largest['is']}"
        )
    if not record["same"]:
        print(f"it is not the same: {record['reason']}")
    elif record["bitwise"]:
        print("it is the same, bit for bit")
    else:
        print(f"it is the same within {record['bound']:.0e}, the bound for sums rounded otherwise")
