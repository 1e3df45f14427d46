"""The training loop: the one place where a run has effects.

Everything below this floor is a function of its arguments. Here batches are placed, steps
dispatched, numbers written, checkpoints saved and signals heeded, in that order of reading.
The host runs one step ahead of the numbers: step s + 1 is dispatched before the metrics of
step s are fetched, so that a device never waits for the host. Rows are read meanwhile, which
is why nothing is prefetched.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import FrameType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from gptjax import accounting, alive, branch, heap, ledger, model, preferences, spike, state
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.config import LESS_MEMORY, Config, Train, UserError, choose, out_of_memory, to_dict
from gptjax.data.batches import Batches
from gptjax.objectives import OBJECTIVE
from gptjax.perplexity import Evaluator, RowEvaluator, Score
from gptjax.preferences import Means, PairEvaluator
from gptjax.profile import NOTHING, Profiler
from gptjax.progress import Progress, from_process_0, readable, say
from gptjax.records import DIVERGED, Run, open_run, read_metrics
from gptjax.setup import Setup, Start, answered, describe, load_batch, set_up, settle
from gptjax.storage import Place, patient, replace_file
from gptjax.trainable import trainable
from gptjax.watch import make_watch

TOLD = 8  # rows of a batch that was skipped
MAX_SKIPPED = 20  # so many updates in a row without a finite gradient end the run


class Stopped(Exception):
    """The run was asked to stop, has saved, and goes on when it is started again."""


class Diverged(UserError):
    """Going on is no use: so many updates had no finite gradient, or the end has no finite loss."""

    def __init__(self, step: int, reason: str) -> None:
        self.step, self.reason = step, reason
        super().__init__(
            f"the run has diverged: {self.reason}. Lower optim.peak_lr, or set optim.clip or "
            "model.qk_norm"
        )

    def write(self, workdir: Place) -> None:
        """Records it in the run's folder."""
        record = {"step": self.step, "reason": self.reason}
        replace_file(workdir / DIVERGED, json.dumps(record).encode())


@patient()
def train(
    config: Config,
    workdir: Place,
    begin: Start | None = None,
    until: int | None = None,
    profile: range = NOTHING,
) -> model.Params | None:
    """Trains to `train.steps`, from the latest checkpoint in `workdir` where there is one.

    A mesh must be set (`sharding.make_mesh`, `jax.set_mesh`). A new run begins with the
    parameters of `begin`, with the state that `train.branch` names, or with parameters that the
    seed gives. An earlier step to end at, `until`, changes nothing before it, and saves nothing by
    itself. The steps of `profile` are traced. Where `train.spike` finds a spike of the loss, the
    run goes on from its last checkpoint with the batches that follow.

    Returns:
        The parameters to evaluate and generate with; None where the run was done before.

    Raises:
        Stopped: on SIGTERM or Ctrl-C, once the state is saved.
        UserError: on whatever the user can mend: config, data, disk, memory, divergence.
    """
    while True:
        try:
            params = _attempt(config, workdir, begin, until, profile)
        except spike.Spiked as spiked:
            _go_back(config, workdir, spiked)
        except Exception as error:
            if words := out_of_memory(error):
                shape = jax.sharding.get_mesh().shape
                held = accounting.memory(settle(config), shape)
                raise UserError(f"{words}. A device holds {held}: {LESS_MEMORY}") from error
            raise
        else:
            if params is not None and until is None:
                ledger.ended(workdir)
            return params


def _go_back(config: Config, workdir: Place, spiked: spike.Spiked) -> None:
    """Records a spike: what is started next begins at the last checkpoint, with other batches."""
    before = spike.read(workdir)
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        # All processes meet here: each has read the record before it is written anew.
        back = checkpoints.latest() or branch.first_step(config)
    spikes = [*before, spike.Spike(spiked.step, spiked.loss, back)]
    if sum(s.checkpoint == back for s in spikes) > spike.MOST:
        raise Diverged(spiked.step, f"its loss spiked {spike.MOST + 1} times behind step {back}")
    if jax.process_index() == 0:
        spike.write(workdir, spikes)
    from_process_0("")  # nobody reads the record before it is there
    say(f"{workdir}: {spiked}: back to step {back}, {spiked.step - back} batches are passed over")


def _attempt(
    config: Config, workdir: Place, begin: Start | None, until: int | None, profile: range
) -> model.Params | None:
    """`train`, up to a loss that is a spike.

    Raises:
        Spiked: at such a one.
    """
    alive.moves("setting up", slow=True)
    setup, record, given = set_up(config), to_dict(config), config
    config, fingerprints = setup.config, setup.fingerprints
    if begin is not None:
        fingerprints["initial"] = begin.fingerprint
    with ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir / CHECKPOINTS, config.train.keep_checkpoints, config.train.keep_every
            )
        )
        saved = checkpoints.latest()
        start, steps = saved or branch.first_step(config), config.train.steps
        profiler = stack.enter_context(Profiler(profile, start, steps, workdir))
        train_state = lineage = None
        before = carried = {} if saved is None else checkpoints.meta(saved)
        if saved is None and config.train.branch is not None:
            # Before anything is recorded: a branch that cannot begin leaves no run behind.
            train_state, lineage, carried = branch.begin(given, fingerprints)
        spikes = spike.read(workdir) or spike.parse(carried.get("spikes", []))  # a trunk's
        recent: list[float] = carried.get("recent_losses", [])
        initial = None if begin is None else begin.record
        run = stack.enter_context(
            open_run(workdir, record, fingerprints, saved, lineage, initial, before)
        )
        if spikes and jax.process_index() == 0:
            spike.write(workdir, spikes)
        if saved == config.train.steps:
            say(f"{workdir} is done: {saved} of {saved} steps")
            for line in [line for line in read_metrics(workdir) if "val_loss" in line][-1:]:
                _check_end(saved, line)
            return None
        if saved is not None:
            train_state = state.restore(config, checkpoints, saved)
        elif train_state is None:
            train_state = state.create(config, None if begin is None else begin.load())
        where = "new run" if saved is None else f"resumed at step {saved}"
        say(f"{workdir}: {where}, {describe(config)}")
        meta: dict[str, Any] = {"config": record, "fingerprints": fingerprints}
        meta |= _save_base(config, workdir, train_state, anew=saved is None)
        progress = stack.enter_context(Progress("training", steps, start))
        if choose(OBJECTIVE, config.train.objective, "train.objective").reference:
            sha256, place = carried.get("reference"), workdir
            if saved is None and (trunk := branch.of(config)) is not None:
                place = trunk.run
            begun: dict[str, Any] = {"seed": config.seed} if begin is None else {}
            begun |= {} if lineage is None else {"trunk": lineage["manifest_sha256"]}
            begun |= fingerprints
            meta["reference"] = _refer(setup, workdir, place, sha256, begun, train_state, progress)
        train_step, cost = compile_step(
            state.make_train_step(config), train_state,
            load_batch(setup, spike.batch(spikes, start + 1)),
            traced=bool(profile),
        )  # fmt: skip
        stop = stack.enter_context(Stop())
        log = Log(config, run, start, cost, setup.batches, spikes, recent)
        meter = Meter(config, progress, log)
        watch = make_watch(config) if config.train.watch else None
        held_out: Mapping[str, float] = {}
        for step in range(start + 1, (steps if until is None else until) + 1):
            profiler.start(step, train_state)
            alive.moves("reading the batch", step)
            batch = load_batch(setup, spike.batch(spikes, step))
            batch, answers = answered(setup, train_state, spike.batch(spikes, step), batch)
            alive.moves("training", step)
            watching = watch is not None and step % config.train.watch_every == 0
            before = jax.tree.map(jnp.copy, train_state.params) if watching else {}
            train_state, metrics = train_step(train_state, batch)  # donates the state
            watched = watch(before, train_state, batch) if watch and watching else {}
            meter.add(step, (metrics | answers, watched))
            due = due_at(step, config.train, stop.requested(step))
            pause = due.evaluate or due.save or profiler.ends(step)
            if pause:
                meter.catch_up()
                alive.moves("evaluating or saving", step, slow=True)
            profiler.stop(step, train_step)
            if due.evaluate:
                # Records of a step precede its checkpoint, which stands for having written them.
                params = state.evaluation_params(config, train_state)
                with progress.task("evaluating", count(setup.evaluators)) as advance:
                    held_out = log_scores(run, step, score(setup.evaluators, params, advance))
                del params  # with some optimisers a copy
            if due.save:
                if spikes or config.train.spike is not None:
                    meta |= {"spikes": spike.plain(spikes), "recent_losses": list(recent)}
                run.sync()
                changing, _ = state.apart(config, train_state)
                checkpoints.save(step, changing, meta | {"step": step}, wait=due.end)
            checkpoints.check()
            if pause:
                meter.restart()
            if due.end and step < steps:
                say(f"stopped at step {step}, saved: run the same command to go on")
                raise Stopped
        meter.catch_up()
        if until is None:
            _check_end(steps, held_out)
        return state.evaluation_params(config, train_state)


def _refer(
    setup: Setup, workdir: Place, place: Place, sha256: str | None, begun: Mapping[str, Any],
    now: state.TrainState, progress: Progress,
) -> str:  # fmt: skip
    """Gives all pairs their reference, and returns the sha256 of it.

    Args:
        place: the folder of the run that has it, this one or its trunk.
        sha256: of that; None: the reference is the model as it is now.
        begun: what tells that model and the pairs, as `preferences.cached_reference` takes it.
    """
    pairs = setup.pairs
    targets = {name: rows.targets for name, rows in pairs.items()}
    if sha256 is None:
        alive.moves("scoring by the reference", slow=True)
        params = trainable(setup.config).realise(now.params, now.frozen)
        with progress.task("reference", sum(targets.values())) as advance:
            values = preferences.cached_reference(setup.config, params, pairs, begun, advance)
    else:
        values = preferences.read(place, sha256)
        if {name: len(scored) for name, scored in values.items()} != targets:
            raise UserError(
                f"{place} has a reference for other pairs: with other data begin by --from, not by "
                "--branch"
            )
    for name, rows in pairs.items():
        rows.reference = values[name]
    if sha256 is not None and place == workdir:
        return sha256  # it lies there
    return preferences.write(workdir, values)


def _save_base(
    config: Config, workdir: Place, train_state: state.TrainState, anew: bool
) -> dict[str, str]:
    """Saves what is frozen, where it is not yet, and says in a checkpoint's words which it is."""
    _, frozen = state.apart(config, train_state)
    if frozen is None:
        return {}
    with Checkpoints(workdir / state.BASE, keep=1) as base:
        if anew and jax.process_index() == 0:
            base.drop_after(-1)  # of a start that was killed before it saved a step
        if base.latest() is None:
            base.save(0, frozen, {}, wait=True)
        sha256 = base.fingerprint(0) if jax.process_index() == 0 else ""
        return {state.BASE: from_process_0(sha256)}


def _check_end(step: int, held_out: Mapping[str, float]) -> None:
    """Refuses to call a run done whose model says nothing."""
    if not math.isfinite(loss := held_out["val_loss"]):
        raise Diverged(step, f"the held-out loss after the last step, {step}, is {loss}")


class Due(NamedTuple):
    """What is to be done after a step."""

    evaluate: bool
    save: bool
    end: bool  # it is the last one, or the run was asked to stop: a save must be complete


def due_at(step: int, config: Train, stopping: bool) -> Due:
    last = step == config.steps
    return Due(
        evaluate=last or step % config.eval_every == 0,
        save=last or stopping or step % config.checkpoint_every == 0,
        end=last or stopping,
    )


# What XLA is told of a training step, by platform; a user's XLA_FLAGS come first. docs/gpu.md has
# the effects, measured.
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {
        # Products by cuBLAS alone: as fast or faster, and sooner compiled.
        "xla_gpu_enable_triton_gemm": False,
        # XLA would make one product of those of query, key and value, and cut it for cuDNN again.
        "xla_gpu_dot_merger_threshold_mb": 0,
    }
}
# And of one that is traced: kernels of a CUDA graph do not say which operation they are.
TRACED: dict[str, dict[str, Any]] = {"gpu": {"xla_gpu_enable_command_buffer": ""}}


def compiler_options(platform: str, traced: bool = False) -> dict[str, Any]:
    """Of a platform, those that XLA_FLAGS does not name."""
    options = COMPILER_OPTIONS.get(platform, {}) | (TRACED.get(platform, {}) if traced else {})
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags}


def compile_step(
    train_step: Any, *arguments: Any, traced: bool = False
) -> tuple[Callable[..., tuple[state.TrainState, state.Metrics]], dict[str, float]]:
    """A jitted step compiled for arguments like these, and what that cost.

    The compiled step refuses arguments of another shape or sharding, where the jitted one would
    silently compile again. The cost is compile_seconds, tracing included, and program_bytes of a
    device: arguments, outputs and temporaries, what is donated counted once; absent where the
    backend does not tell. On CPUs memory is kept from here on, as `heap.keep` says.
    """
    begin = time.perf_counter()
    options = compiler_options(jax.default_backend(), traced)
    compiled = train_step.lower(*arguments).compile(compiler_options=options)
    cost = {"compile_seconds": time.perf_counter() - begin}
    if (memory := compiled.memory_analysis()) is not None:
        cost["program_bytes"] = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
        temporaries = memory.temp_size_in_bytes
        on_cpu = jax.default_backend() == "cpu"
        if on_cpu and heap.keep(temporaries) and temporaries > heap.MOST:
            compiled = Unhurried(compiled, temporaries)
    return compiled, cost


class Unhurried:
    """A compiled step that begins when what it reads is computed, and the memory for that is back."""

    def __init__(self, compiled: Any, temporaries: int) -> None:
        self._compiled, self._meter = compiled, heap.Meter(temporaries)

    def __call__(self, *arguments: Any) -> Any:
        jax.block_until_ready(arguments)
        self._meter.wait()
        return self._compiled(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


def count(evaluators: Mapping[str, Evaluator | RowEvaluator | PairEvaluator]) -> int:
    """Tokens scored by all together."""
    return sum(e.tokens for e in evaluators.values())


def score(
    evaluators: Mapping[str, Evaluator | RowEvaluator | PairEvaluator],
    params: model.Params,
    advance: Callable[[int], None],
) -> dict[str, Score] | dict[str, Means]:
    """The score of each source, and their sum as "all" where there are several."""
    scores: dict[str, Any] = {name: e(params, advance) for name, e in evaluators.items()}
    if len(scores) > 1:
        first, *rest = scores.values()
        scores["all"] = sum(rest, start=first)
    return scores


def log_scores(run: Run, step: int, scores: Mapping[str, Score | Means]) -> dict[str, float]:
    """Writes, says and returns held-out scores; "val_loss" is that of all sources together."""
    *_, overall = scores.values()
    values = {f"val_{name}": value for name, value in overall.values.items()}
    if len(scores) > 1:
        values |= {f"val_loss/{name}": s.loss for name, s in scores.items() if name != "all"}
    run.log(step, values)
    for name, s in scores.items():
        say(f"step {step}: held-out {name}: {s}")
    return values


# Metrics of a step, and what `watch` saw after it: on the device, or fetched from there.
Measured = tuple[Mapping[str, Any], Mapping[str, Any]]


class Log:
    """Writes the steps of a run in their rhythm, and tells when it has diverged.

    The first record of a start holds `cost` as well.

    Args:
        batches: that the steps read.
        spikes: past which they have gone.
        recent: the losses before `start`, to which those of the steps are added.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        start: int,
        cost: Mapping[str, float],
        batches: Batches,
        spikes: Sequence[spike.Spike],
        recent: list[float],
    ) -> None:
        self._train, self._run, self._cost = config.train, run, dict(cost)
        self._batches, self._spikes, self._recent = batches, spikes, recent
        # Every skipped step has a record, so that a run that was interrupted diverges where one
        # that was not does.
        lines = read_metrics(run.folder) if start else []
        skipped = {line["step"] for line in lines if line.get("skipped") and line["tokens"]}
        self._skipped = next(n for n in itertools.count() if start - n not in skipped)

    def write(
        self, step: int, measured: Measured, speed: Mapping[str, float]
    ) -> tuple[dict[str, float], bool]:
        """Takes the numbers of a step; returns the metrics, and whether they have a record.

        Raises:
            Diverged: if this is one skipped update too many.
            Spiked: if the loss is a spike, which `train.spike` decides.
        """
        t, (metrics, watched) = self._train, measured
        values = {name: float(value) for name, value in metrics.items()} | dict(speed)
        empty = values["tokens"] == 0  # nothing of the batch is scored
        if t.spike is not None and not empty:
            if spike.is_spike(values["loss"], self._recent, t.spike):
                raise spike.Spiked(step, values["loss"])
            spike.remember(values["loss"], self._recent)
        self._skipped = self._skipped + 1 if values["skipped"] and not empty else 0
        recorded = step % t.log_every == 0 or step in (1, t.steps) or values["skipped"] > 0
        if recorded:
            self._run.log(step, values | self._cost)
            self._cost = {}
        if values["skipped"]:
            read = spike.batch(self._spikes, step)
            why = "nothing scored" if empty else "no finite gradient"
            say(f"{self._run.folder}: {skipped(step, read, why, self._batches, self._run.folder)}")
        if self._skipped >= MAX_SKIPPED or self._skipped == step == t.steps:
            updates = f"{self._skipped} update{'s in a row' * (self._skipped > 1)}"
            raise Diverged(step, f"{updates}, the last at step {step}, had no finite gradient")
        if watched:
            self._run.log(step, watched)
        return values, recorded


def skipped(step: int, batch: int, has: str, batches: Batches, workdir: Place) -> str:
    """What to say of an update that was left out: which rows it had read."""
    origins = batches.origins(batch)
    more = f", and {len(origins) - TOLD} more" if len(origins) > TOLD else ""
    return (
        f"step {step} has {has} and is skipped; it read "
        f"{', '.join(map(str, origins[:TOLD]))}{more}. All of it: data show --workdir={workdir} "
        f"--step={batch}"
    )


class Meter:
    """Turns the metrics of each step, one step late, into records and what the bar shows.

    Rates count the time of training alone: not compilation, evaluation or saving. MFU is a share
    of the peak of all devices of the current mesh.
    """

    def __init__(self, config: Config, progress: Progress, log: Log) -> None:
        self._config, self._progress, self._log = config, progress, log
        self._pending: tuple[int, Measured] | None = None
        devices = jax.sharding.get_mesh().devices.flatten()
        peak, source = accounting.peak_flops(devices[0])
        self._peak = None if peak is None else peak * len(devices)
        try:
            parts = accounting.flops_by_part(config, causal=True)
            self._flops, self._routed = sum(parts.values()), parts.get("experts", 0.0)
        except accounting.Uncountable as error:
            self._peak = None
            say(f"MFU is left out, FLOPs are not counted: {error}")
        else:
            say(f"MFU counts {self._flops / 1e6:,.1f} MFLOP/token (causal) against: {source}")
        self.restart()

    def restart(self) -> None:
        """Begins a new interval of measuring once the next step has run."""
        self._since: float | None = None
        self._steps = 0
        self._rate = math.nan

    def add(self, step: int, measured: Measured) -> None:
        """Takes what a step gave, still being computed; records that of the step before."""
        self.catch_up()
        self._pending = (step, measured)

    def catch_up(self) -> None:
        """Waits for the step that was added last, and records it."""
        if self._pending is None:
            return
        (step, measured), self._pending = self._pending, None
        measured = jax.device_get(measured)
        self._measure()
        shown, recorded = self._log.write(step, measured, self._speed(measured[0]))
        if recorded:
            steps = self._config.train.steps
            self._progress.line(f"step {step:>{len(str(steps))}}  {readable(shown)}")
        self._progress.status(readable(shown))
        self._progress.advance(1)

    def _measure(self) -> None:
        now = time.perf_counter()
        if self._since is None:
            self._since = now  # the interval begins where its first step ends
            return
        self._steps += 1
        self._rate = self._steps / (now - self._since)

    def _speed(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        if math.isnan(self._rate):
            return {}
        tokens = self._rate * self._config.data.batch_size * self._config.model.context
        if self._peak is None:
            return {"tokens_per_second": tokens}
        # What was dropped was not computed.
        flops = self._flops - self._routed * float(metrics.get("dropped_share", 0.0))
        share = accounting.mfu(tokens, flops, self._peak)
        return {"tokens_per_second": tokens, "mfu": share}


class Stop:
    """Hears SIGTERM and Ctrl-C; a second Ctrl-C interrupts at once.

    Among several processes, jax's own service hears SIGTERM on any of them and makes all agree
    on the step at which to stop; Ctrl-C is told to it as SIGTERM.
    """

    def __init__(self) -> None:
        self._heard = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        alone = jax.process_count() == 1
        for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step: the same answer on every process."""
        if jax.process_count() == 1:
            return self._heard
        return multihost_utils.reached_preemption_sync_point(step)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._heard and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._heard = True
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)
        say(f"{signal.Signals(number).name}: saving, then stopping")
