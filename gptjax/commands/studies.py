"""Commands that run studies and print their results."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gptjax.commands.command import (
    DEFAULT_RECIPE,
    EXITS,
    OVERRIDES,
    Command,
    prepare_jax,
)
from gptjax.config import UserError
from gptjax.places import expand

if TYPE_CHECKING:
    from gptjax.study.results import Results
    from gptjax.study.spec import Study

STORE, OUT = Path("runs/cells"), Path("runs/studies")
SEEDS_SHOWN = (3, 5, 10, 20)  # of `noise`


def study(arguments: argparse.Namespace, overrides: list[str]) -> None:
    prepare_jax(None)
    plan = study_of(arguments, overrides)
    from gptjax.study import results, run

    if arguments.dry_run:
        tell(results.read(plan, arguments.store, now=True), arguments.store, print)
        return
    try:
        complete = run_all(arguments, plan)
    except run.Failed:
        _report(results.read(plan, arguments.store), arguments.out)
        raise
    _report(complete, arguments.out)


def run_all(arguments: argparse.Namespace, plan: Study) -> Results:
    """Prints the plan, runs the cells that are missing, and reads all results."""
    if arguments.together < 1:
        raise UserError(f"--together={arguments.together} must be above 0")
    prepare_jax(None)
    from gptjax.progress import say
    from gptjax.study import results, run

    tell(results.read(plan, arguments.store, now=True), arguments.store, say)
    return run.run(plan, arguments.store, arguments.together)


def report(arguments: argparse.Namespace, overrides: list[str]) -> None:
    prepare_jax(None)
    plan = study_of(arguments, overrides)
    from gptjax.study import results

    _report(results.read(plan, arguments.store), arguments.out)


def _report(results: Results, out: Path | None) -> None:
    from gptjax.study import analysis, publish, tables

    analysed = analysis.analyse(results)
    folder = out or OUT / results.study.name
    publish.write(analysed, folder)
    tables.show(analysed)
    print(f"the report: {', '.join(sorted(str(path) for path in folder.iterdir()))}")


def study_of(arguments: argparse.Namespace, overrides: list[str]) -> Study:
    """The study of FILE, or of --axis over --config, changed by the command line."""
    from gptjax.study import spec

    if (arguments.file is None) == (not arguments.axis):
        raise UserError("name either a study's FILE or, with --config=RECIPE, one --axis or more")
    if arguments.file is None:
        plan = spec.of_axes(arguments.config or DEFAULT_RECIPE, arguments.axis)
    elif arguments.config is None:
        plan = spec.load(arguments.file)
    else:
        raise UserError(f"{arguments.file} names its own base: leave --config out")
    seeds = plan.seeds if arguments.seeds is None else arguments.seeds
    return dataclasses.replace(plan, seeds=seeds, overrides=(*plan.overrides, *overrides))


def add_study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=expand, nargs="?", metavar="FILE", help="a file with STUDY = Study(...)"
    )
    parser.add_argument(
        "--config",
        metavar="FILE[:ARG]",
        help=f"instead of FILE: the recipe that --axis changes ({DEFAULT_RECIPE})",
    )
    parser.add_argument(
        "--axis",
        action="append",
        default=[],
        metavar="KNOB=V1,V2",
        help="a knob and its values, the first the baseline's; several axes are crossed",
    )
    parser.add_argument("--seeds", type=int, help="runs of each arm; default: the study's")
    _add_store(parser)


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        type=expand,
        default=STORE,
        metavar="DIR",
        help="where the runs of all studies lie, each in a folder named by its config (%(default)s)",
    )


def add_together(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--together",
        type=int,
        default=1,
        metavar="N",
        help="train up to N runs in one program, where seed or numbers of the optimiser are all "
        "they differ in: for small models on a GPU or TPU (%(default)s)",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    add_study(parser)
    parser.add_argument(
        "--out", type=expand, metavar="DIR", help=f"of the report; default: {OUT}/ and its name"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_report(parser)
    add_together(parser)
    parser.add_argument("--dry_run", action="store_true", help="only say what would be run")


def tell(results: Results, store: Path, say: Callable[[str], None]) -> None:
    """Says what a study asks, what its arms are, and how many of its runs have ended."""
    from gptjax.study.equalise import EQUAL
    from gptjax.study.tables import settings, stated

    plan, measure = results.study, EQUAL[results.study.equal].measure
    shared = filter(None, (plan.base, settings(plan.settings), *plan.overrides))
    for line in (f"{plan.name}: {plan.hypothesis}", *stated(plan), f"Base: {' '.join(shared)}"):
        say(line)
    outcomes = [*results.outcomes, *(outcome for outcome, _ in results.tuning)]
    # Before tuning has chosen, a tuning run shows what was solved for.
    cell_of = {(o.cell.scale, o.cell.arm): o.cell for o in reversed(outcomes)}
    cells = {(scale, arm): cell_of[scale, arm] for scale in plan.scales for arm in plan.all_arms}
    names = [", ".join(filter(None, place)) for place in cells]
    for name, (scale, arm) in zip(names, cells, strict=True):
        cell = cells[scale, arm]
        parts = [settings({**plan.scales[scale], **plan.all_arms[arm]})]
        if cell.solved:
            parts.append(f"solved for: {settings(cell.solved)}")
        if plan.equal != "nothing":
            parts.append(f"{measure(cell.config):,.0f} {plan.equal}")
        say(f"  {name:<{max(map(len, names))}}  {'; '.join(filter(None, parts))}")
    say(f"{counted(results)}, in {store}")


def counted(results: Results) -> str:
    """How many runs there are, and of what status."""
    from gptjax.study.results import ENDED

    plan = results.study
    outcomes = [*results.outcomes, *(outcome for outcome, _ in results.tuning)]
    status = {o.cell.address: o.status for o in outcomes}  # arms may share runs
    # What tuning has not chosen yet has no address.
    chosen = {(o.cell.scale, o.cell.arm) for o in results.outcomes}
    arms = len(plan.scales) * len(plan.all_arms)
    unknown = (arms - len(chosen)) * plan.seeds
    ended = sum(s in ENDED for s in status.values())
    lost = [f"{n} {s}" for s in ("diverged", "failed") if (n := [*status.values()].count(s))]
    note = f" ({', '.join(lost)})" if lost else ""
    count = len(status) + unknown
    return f"{count} runs: {ended} there, {count - ended} to run{note}"


def noise(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from gptjax.study.spec import Study

    if arguments.seeds < 2:
        raise UserError(f"--seeds={arguments.seeds}: noise is measured between 2 seeds or more")
    if not 0 < arguments.effect < math.inf:
        raise UserError(f"--effect={arguments.effect:g} must be above 0 and finite")
    plan = Study(
        hypothesis="How much does the loss vary from seed to seed?",
        base=arguments.config,
        arms={},
        seeds=arguments.seeds,
        smallest=arguments.effect,
        overrides=tuple(overrides),
        name="noise",
    )
    for line in _noise(run_all(arguments, plan)):
        print(line)


def _noise(results: Results) -> Iterator[str]:
    """The noise floor and what can be seen above it, for a person."""
    import numpy as np

    from gptjax.study import statistics

    plan = results.study
    finished = [o for o in results.outcomes if o.status == "finished"]
    for o in results.outcomes:
        if o.status != "finished":
            yield f"left out, {o.status}: {o.cell.label} ({o.reason})"
    measured = statistics.noise(np.array([o.metric for o in finished]))
    low, high = measured.interval
    yield f"{plan.base}: {plan.metric} {measured.mean:.4f} {plan.unit}, {measured.seeds} seeds"
    yield f"sd between seeds: {measured.sd:.2g} (95%: {low:.2g} to {high:.2g})"
    # As if pairs were independent: only a study with arms can show how far they are not.
    one, most = (statistics.difference_sd(sd, 0.0) for sd in (measured.sd, high))
    yield (
        "A study of one arm sees a difference with 80% power at the sd above (at the interval's "
        "upper end), if pairing gains nothing:"
    )
    for seeds in SEEDS_SHOWN:
        smallest, largest = (statistics.smallest_effect(seeds, sd) for sd in (one, most))
        yield f"  {seeds:>3} seeds: from {smallest:.2g} ({largest:.2g})"
    needed, at_most = (statistics.seeds_to_see(plan.smallest, sd) for sd in (one, most))
    yield f"  a difference of {plan.smallest:g}: {_seeds(needed)} seeds ({_seeds(at_most)})"


def _seeds(count: int | None) -> str:
    from gptjax.study.statistics import MOST_SEEDS

    return f"more than {MOST_SEEDS:,}" if count is None else f"{count:,}"


def _add_noise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", default=DEFAULT_RECIPE, help="a recipe (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs (%(default)s)")
    parser.add_argument(
        "--effect",
        type=float,
        default=0.01,
        help="the difference to see, in nats/token (%(default)s)",
    )
    _add_store(parser)
    add_together(parser)


COMMANDS: dict[str, Command] = {
    "study": Command(
        study,
        _add_run,
        "Does it help? Run what an ablation lacks, and give the answer.",
        f"""\
A study's FILE states hypothesis, base, arms, seeds, metric, and what is held equal: tokens, FLOPs
or parameters. Or cross axes on the spot. Arms with the same seed share batches and initial values
and are compared in pairs. Every run lies in the store under its config: none runs twice as long
as the code computes the same, what broke goes on, and several processes may run the same study.
--dry_run tells the plan alone.

  study experiments/positions.py --seeds=5
  study --config=configs/ablation.py --axis model.position=rope,alibi --axis optim.peak_lr=5e-3,1e-2

{OVERRIDES}
{EXITS}""",
    ),
    "report": Command(
        report,
        _add_report,
        "The answer of a study so far, as table, page, Markdown, CSV and LaTeX.",
        f"""\
Reads whatever has finished, at any time, and runs nothing. Runs of different programs, packages
or data are refused in one table. Give the same words as to `study`.

  report experiments/positions.py --out=report

{OVERRIDES}""",
    ),
    "noise": Command(
        noise,
        _add_noise,
        "How much a recipe's loss varies between seeds, and what can be seen above it.",
        f"""\
Runs the recipe with several seeds, or reads the runs where a study made them, and prints the
standard deviation, the smallest difference that some numbers of seeds see with 80% power, and
the seeds that --effect needs.

  noise --config=configs/ablation.py --seeds=5 --effect=0.005

{OVERRIDES}
{EXITS}""",
    ),
}
