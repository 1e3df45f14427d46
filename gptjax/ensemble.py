"""Many runs in one compiled program: `vmap` over stacked states, the members split over devices.

Runs go together when their configs differ in nothing but the numbers of `VARIED`. Each keeps an
ordinary folder, as `loop.train` would write it, and beside that

    WORKDIR/ensemble.json    {"member": 1, "members": 4, "varied": {"seed": [0, 1, 2, 3]}}
    WORKDIR/diverged.json    {"step": 40, "reason": "..."}, of a member that diverged

A member's numbers are those of the run alone to rounding: XLA sums a batched product in another
order, and a varied number is rounded to float32 before it enters the update instead of after. The
same group on as many devices gives the same bits, so a group is resumed whole: its members are
part of each run's identity. Members share no value: what one does changes no bit of another.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import ledger, loop, sharding, state
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.config import Config, UserError, choose, flatten, recorded, to_dict
from gptjax.data.batches import Batch
from gptjax.objectives import OBJECTIVE
from gptjax.progress import Progress, say
from gptjax.records import CONFIG, DIVERGED, ENSEMBLE, open_run
from gptjax.setup import Setup, describe, read_rows, set_up
from gptjax.storage import Place, disk, replace_file

# The knobs in which members may differ. Those of the first line enter the program as arguments;
# the second acts on initial values alone.
TRACED = (
    *("seed", "optim.peak_lr", "optim.final_lr_fraction", "optim.weight_decay"),
    *("optim.b1", "optim.b2", "optim.eps", "optim.momentum"),
)
VARIED = (*TRACED, "model.init_scale")


def key(config: Config) -> str:
    """Runs with equal keys train together; no two keys of runs that cannot are equal."""
    knobs = flatten(to_dict(config))
    t = config.train
    alone = config.mesh.splits or jax.process_count() > 1 or t.watch or t.branch or t.spike
    alone = alone or choose(OBJECTIVE, t.objective, "train.objective").alone
    if not alone:
        knobs = {name: value for name, value in knobs.items() if name not in VARIED}
    return hashlib.sha256(json.dumps(knobs, sort_keys=True).encode()).hexdigest()


def check_together(configs: Sequence[Config]) -> None:
    """Refuses runs that cannot train together.

    Raises:
        UserError: naming the knob that keeps them apart.
    """
    if jax.process_count() > 1:
        raise UserError("runs train together in one process only: start them one after another")
    for name, size in configs[0].mesh.splits.items():
        raise UserError(
            f"{name}={size} splits a model over devices, and runs that train together are split "
            "over them whole: set it to 1, or start them one after another"
        )
    first, *others = (flatten(to_dict(config)) for config in configs)
    if first["train.watch"]:
        raise UserError("runs that train together are not watched: set train.watch=()")
    alone = [name for name in ("train.branch", "train.spike") if first[name]]
    if OBJECTIVE[objective := first["train.objective"]].alone:
        alone.append(f"train.objective={objective!r}")
    if alone:
        raise UserError(f"a run with {alone[0]} trains alone: start such runs one after another")
    for other in others:
        differ = [name for name in first if first[name] != other[name] and name not in VARIED]
        if differ:
            name = differ[0]
            raise UserError(
                f"runs that differ in {name} ({first[name]!r} and {other[name]!r}) cannot train "
                f"together: start them one after another; what may differ: {', '.join(VARIED)}"
            )


def varied(configs: Sequence[Config]) -> dict[str, list[Any]]:
    """The knobs in which the members differ, each with all members' values."""
    knobs = [flatten(to_dict(config)) for config in configs]
    values = {name: [k[name] for k in knobs] for name in VARIED}
    return {name: v for name, v in values.items() if v.count(v[0]) < len(v)}


def group_of(workdir: Place) -> tuple[list[Config], int]:
    """The configs of the group that a run was trained in, and which of them is its own.

    Raises:
        UserError: if the folder holds no run that was trained with others.
    """
    try:
        config = json.loads((workdir / CONFIG).read_bytes())
        membership = json.loads((workdir / ENSEMBLE).read_bytes())
    except (FileNotFoundError, ValueError):
        raise UserError(f"{workdir} holds no run that was trained with others") from None
    configs: list[Config] = []
    for member in range(membership["members"]):
        tree = copy.deepcopy(config)
        for name, values in membership["varied"].items():
            section, _, field = name.rpartition(".")
            (tree[section] if section else tree)[field] = values[member]
        configs.append(recorded(tree))
    return configs, membership["member"]


def train_together(
    configs: Sequence[Config],
    workdirs: Sequence[Place],
    devices: Sequence[jax.Device] | None = None,
    until: int | None = None,
) -> list[dict[str, Any] | None]:
    """Trains all runs to `train.steps`, each in its folder, from the latest step that all have.

    No mesh may be set: steps run on one of their own, and each member is saved and scored on that
    of its config, as alone. A member that diverges leaves the group, its folder says so, and the
    others go on.

    Args:
        configs: of the members, which `check_together` lets train together.
        workdirs: their folders.
        devices: to use; None takes all.
        until: an earlier step to end at, as in `loop.train`.

    Returns:
        For each member None if it finished, or what its diverged.json holds.

    Raises:
        Stopped: on SIGTERM or Ctrl-C, once all members are saved.
        UserError: on whatever the user can mend.
    """
    check_together(configs)
    mesh = sharding.make_mesh(configs[0].mesh, devices)
    steps = configs[0].train.steps
    # Members are saved one after another: with two checkpoints each, one step is common to all.
    keep, keep_every = max(2, configs[0].train.keep_checkpoints), configs[0].train.keep_every
    with ExitStack() as stack:
        with jax.set_mesh(mesh):
            setups = [set_up(config) for config in configs]
            saved = {
                r: stack.enter_context(Checkpoints(workdir / CHECKPOINTS, keep, keep_every))
                for r, workdir in enumerate(workdirs)
                if diverged(workdir) is None
            }
            _claim(configs, workdirs)
            start = _common_step(saved.values())
            members = [
                _Member(r, setups[r], to_dict(configs[r]), workdirs[r], checkpoints, start, stack)
                for r, checkpoints in saved.items()
            ]
            where = "new" if start is None else f"at step {start} of {steps}"
            differ = ", ".join(varied(configs)) or "nothing"
            say(f"{len(setups)} runs that differ in {differ}: {where}, {len(members)} to go on")
            if not members or start == steps:
                return [diverged(workdir) for workdir in workdirs]
            say(f"each: {describe(setups[0].config)}")
            group = _Group(configs, setups, members, mesh, start)
        # That of the last member to leave, when none is left.
        with contextlib.suppress(loop.Diverged):
            _go_on(group, setups[0].config, start or 0, until)
    if until is None:  # they took the same steps: one stands for all
        for workdir in [w for w in workdirs if diverged(w) is None][:1]:
            ledger.ended(workdir)
    return [diverged(workdir) for workdir in workdirs]


def _go_on(group: _Group, config: Config, start: int, until: int | None) -> None:
    """The loop of `loop.train` for all members, from step `start` on."""
    steps = config.train.steps
    with Progress(group.title, steps, start) as progress, ExitStack() as stack:
        group.compile(start)
        stop = stack.enter_context(loop.Stop())
        meter = loop.Meter(config, group.devices, progress, group.write)
        for step in range(start + 1, (steps if until is None else until) + 1):
            meter.add(step, group.step(step - 1))
            due = loop.due_at(step, config.train, stop.requested(step))
            if due.evaluate or due.save:
                meter.catch_up()
            if due.evaluate:
                group.evaluate(step, progress)
            if due.save:
                group.save(step, wait=due.end)
            group.check()
            if due.evaluate or due.save:
                meter.restart()
            if due.end and step < steps:
                raise loop.stopped(step)
        meter.catch_up()


def diverged(workdir: Place) -> dict[str, Any] | None:
    """{"step", "reason"} of a run that diverged."""
    file = workdir / DIVERGED
    return json.loads(file.read_bytes()) if file.exists() else None


def _claim(configs: Sequence[Config], workdirs: Sequence[Place]) -> None:
    """Writes each folder's ensemble.json; refuses folders of other runs before that."""
    members, knobs = len(configs), varied(configs)
    memberships = [{"member": r, "members": members, "varied": knobs} for r in range(members)]
    for workdir, membership in zip(workdirs, memberships, strict=True):
        if not (workdir / CONFIG).exists():
            continue  # no run begun, whatever group was killed just before
        if not (workdir / ENSEMBLE).exists():
            raise UserError(f"{workdir} holds a run begun alone: finish it so, or use another one")
        before = json.loads((workdir / ENSEMBLE).read_bytes())
        if before != membership:
            raise UserError(
                f"{workdir} holds a run of another group, member {before['member']} of "
                f"{before['members']} with {before['varied']}: train it with the same members, "
                "in the same order, or use another folder"
            )
    for workdir, membership in zip(workdirs, memberships, strict=True):
        with disk(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            replace_file(workdir / ENSEMBLE, json.dumps(membership).encode())


def _common_step(saved: Iterable[Checkpoints]) -> int | None:
    """The latest step that all have saved."""
    steps = [set(checkpoints.steps()) for checkpoints in saved]
    return max(set.intersection(*steps), default=None) if steps else None


class _Member:
    """A run that goes on: its records and checkpoints, opened after step `start`."""

    def __init__(
        self,
        index: int,
        setup: Setup,
        record: dict[str, Any],
        workdir: Place,
        checkpoints: Checkpoints,
        start: int | None,
        stack: ExitStack,
    ) -> None:
        self.index, self.setup, self.checkpoints = index, setup, checkpoints
        self.meta = {"config": record, "fingerprints": setup.fingerprints}
        before = None if start is None else checkpoints.meta(start)
        self.run = stack.enter_context(
            open_run(workdir, record, setup.fingerprints, start, saved=before)
        )
        checkpoints.drop_after(start or 0)


class _Group:
    """Runs that take each step together; members that diverged ride along unheard."""

    def __init__(
        self,
        configs: Sequence[Config],
        setups: Sequence[Setup],
        members: list[_Member],
        mesh: Mesh,
        start: int | None,
    ) -> None:
        self.title = f"training {len(setups)} runs"
        self._setups, self._left, self._mesh = setups, members, mesh
        self.devices = devices_for(len(setups), mesh)
        self._split = over_members(self.devices)
        self._knobs = self._place(stack_knobs(configs))
        settled = setups[0].config
        self._shardings = jax.tree.map(lambda leaf: leaf.sharding, state.abstract(settled))
        states = [jax.device_get(state.create(s.config)) for s in setups]
        if start is not None:
            for m in members:
                restored = m.checkpoints.restore(start, state.abstract(settled))
                states[m.index] = jax.device_get(restored)
        self._states = self._place(_stack(states))

    def _place(self, stacked: Any) -> Any:
        return jax.device_put(stacked, self._split)

    def _batch(self, index: int) -> Batch[jax.Array]:
        c = self._setups[0].config
        rows = c.data.batch_size // c.train.accumulation
        return self._place(_stack([read_rows(s, index, 0, rows) for s in self._setups]))

    def compile(self, start: int) -> None:
        step = make_step(self._setups[0].config, self._split)
        arguments = self._states, self._batch(start), self._knobs
        self._step, cost = loop.compile_step(step, *arguments)
        if "program_bytes" in cost:  # of a device; a member's share adds up to the whole
            cost["program_bytes"] *= len(self.devices) / len(self._setups)
        self._logs = {
            m.index: loop.Log(m.setup.config, m.run, start, cost, m.setup.batches, [], [])
            for m in self._left
        }

    def step(self, index: int) -> loop.Measured:
        self._states, metrics = self._step(self._states, self._batch(index), self._knobs)
        return metrics, {}

    def write(
        self, step: int, measured: loop.Measured, speed: dict[str, float]
    ) -> tuple[dict[str, float], bool]:
        """As `loop.Log.write`, for the members that are left; those that diverge leave."""
        (metrics, _), any_recorded, losses = measured, False, []
        for m in list(self._left):
            metrics_of_member = {name: values[m.index] for name, values in metrics.items()}
            losses.append(float(metrics_of_member["loss"]))
            try:
                _, recorded = self._logs[m.index].write(step, (metrics_of_member, {}), speed)
                any_recorded |= recorded
            except loop.Diverged as error:
                error.write(m.run.folder)
                say(f"{m.run.folder}: {error}. The other runs go on")
                self._left.remove(m)
                if not self._left:
                    raise
        total_speed = {name: value * len(self._setups) for name, value in speed.items()}
        return {"loss": float(np.mean(losses))} | total_speed, any_recorded

    def evaluate(self, step: int, progress: Progress) -> None:
        total = sum(loop.count(m.setup.evaluators) for m in self._left)
        with progress.task("evaluating", total) as advance, jax.set_mesh(self._mesh):
            for m, train_state in self._each():
                params = state.evaluation_params(m.setup.config, train_state)
                scores = loop.score(m.setup.evaluators, params, advance)
                loop.log_scores(m.run, step, scores, f"member {m.index}, ")

    def save(self, step: int, wait: bool) -> None:
        for m in self._left:
            m.checkpoints.wait()  # so that none is ever two steps behind another
        with jax.set_mesh(self._mesh):
            for m, train_state in self._each():
                m.checkpoints.save(step, train_state, m.meta | {"step": step})
        if wait:
            for m in self._left:
                m.checkpoints.wait()

    def check(self) -> None:
        for m in self._left:
            m.checkpoints.check()

    def _each(self) -> Iterator[tuple[_Member, state.TrainState]]:
        """Each member with its state on the mesh that it would have alone."""
        host = jax.device_get(self._states)
        for m in self._left:
            member_state = jax.tree.map(lambda leaf, r=m.index: np.array(leaf[r]), host)
            yield m, jax.device_put(member_state, self._shardings)


def devices_for(members: int, mesh: Mesh) -> list[jax.Device]:
    """As many of the mesh's devices as can have equally many members."""
    ways = max(n for n in range(1, mesh.devices.size + 1) if members % n == 0)
    return mesh.devices.flatten()[:ways].tolist()


def lower(configs: Sequence[Config], mesh: Mesh) -> jax.stages.Lowered:
    """The program in which a group takes its steps; nothing is computed."""
    with jax.set_mesh(mesh):
        setup = set_up(configs[0])
        rows = setup.config.data.batch_size // setup.config.train.accumulation
        one = state.abstract(setup.config), read_rows(setup, 0, 0, rows)
    split = over_members(devices_for(len(configs), mesh))

    def abstract(shape: tuple[int, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=split)

    members = jax.tree.map(lambda leaf: abstract((len(configs), *leaf.shape), leaf), one)
    knobs = jax.tree.map(lambda leaf: abstract(leaf.shape, leaf), stack_knobs(configs))
    step: Any = make_step(setup.config, split)
    return step.lower(*members, knobs)


def over_members(devices: Sequence[jax.Device]) -> NamedSharding:
    """The leading dim split over `devices`, of whatever is stacked over members."""
    mesh = Mesh(np.array(devices), ("member",), (AxisType.Auto,))
    return NamedSharding(mesh, P("member"))


@functools.lru_cache(maxsize=16)
def make_step(
    config: Config, split: NamedSharding
) -> Callable[..., tuple[state.TrainState, state.Metrics]]:
    """The jitted update of all members; it donates their states.

    On a CPU the members of a device take the step one after another, within the one program. All
    at once was measured slower than runs alone (docs/bench_ensemble.py), most likely because each
    operation sweeps over all members and finds nothing of its input in the cache. Accelerators
    take them at once.

    Args:
        config: of any member.
        split: of `over_members`, where the arguments lie and the results shall.

    Returns:
        (states, batches, knobs) -> (states, metrics): those of `state.update` and of
        `stack_knobs`, each with a leading dim of members.
    """

    every = functools.partial(_update_all, config, split)
    return jax.jit(every, donate_argnums=0, out_shardings=split)


def _update_all(config: Config, split: NamedSharding, *members: Any) -> Any:
    def one(
        train_state: state.TrainState, batch: Batch[jax.Array], knobs: dict[str, jax.Array]
    ) -> tuple[state.TrainState, state.Metrics]:
        update = functools.partial(state.update, _with(config, knobs))
        # A function of its own in the program, by whose text finished groups are known.
        return jax.jit(update)(train_state, batch)

    cpu = split.mesh.devices.flat[0].platform == "cpu"
    return (_in_turn(one, split.mesh.size) if cpu else jax.vmap(one))(*members)


def _in_turn(one: Callable[..., Any], ways: int) -> Callable[..., Any]:
    """As `jax.vmap(one)`, with the members of each of `ways` devices one after another."""

    def every(*members: Any) -> Any:
        by_device = jax.tree.map(lambda x: x.reshape(ways, -1, *x.shape[1:]), members)
        results = jax.vmap(lambda xs: jax.lax.map(lambda x: one(*x), xs))(by_device)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)

    return every


def stack_knobs(configs: Sequence[Config]) -> dict[str, np.ndarray]:
    """The numbers in which members differ as they enter the step, each of shape (members,)."""
    kinds = {"seed": np.int32}
    return {
        # int64 first: seeds of 2^31 and more keep their 32 bits, which is what jax.random.key reads.
        name: np.asarray(values).astype(kinds.get(name, np.float32))
        for name, values in varied(configs).items()
        if name in TRACED
    }


def _with(config: Config, knobs: Mapping[str, Any]) -> Config:
    """`config` with some numbers traced, which the checks of `dataclasses.replace` cannot bear."""
    config = copy.copy(config)
    for name, value in knobs.items():
        section, _, field = name.rpartition(".")
        owner = copy.copy(getattr(config, section)) if section else config
        object.__setattr__(owner, field, value)
        if section:
            object.__setattr__(config, section, owner)
    return config


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
