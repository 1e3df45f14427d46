"""Commands that run studies and report their results."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from gptjax.commands.command import (
    DEFAULT_RECIPE,
    EXITS,
    OVERRIDES,
    Command,
    add_dry_launch,
    add_launch,
    prepare_jax,
)
from gptjax.config import UserError
from gptjax.signals import again_on_sigterm
from gptjax.storage import expand, for_files, local, patient

if TYPE_CHECKING:
    from gptjax.study.results import Results
    from gptjax.study.spec import Study

STORE, OUT = Path("runs/cells"), Path("runs/studies")


def _check_study(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from gptjax.study import spec

    spec.check_names(study_of(arguments, overrides))


@again_on_sigterm()
@patient()
def study(arguments: argparse.Namespace, overrides: list[str]) -> None:
    prepare_jax(None)
    definition = study_of(arguments, overrides)
    from gptjax.study import plan, results, runner

    if arguments.dry_run:
        for line in plan.lines(
            results.read(definition, arguments.store, now=True), arguments.store
        ):
            print(line)
        return
    with contextlib.suppress(runner.Elsewhere):
        try:
            complete = run_all(arguments, definition, arguments.worker)
        except runner.Failed:
            with runner.reporting(definition, arguments.store):
                _report(results.read(definition, arguments.store), arguments.out)
            raise
        with runner.reporting(definition, arguments.store):
            _report(complete, arguments.out)


@patient()
def run_all(arguments: argparse.Namespace, definition: Study, worker: bool = False) -> Results:
    """Prints the plan, runs the cells without a result, and reads the results of all.

    Raises:
        Elsewhere: to a worker, when other processes have all that is left.
    """
    prepare_jax(None)
    from gptjax.progress import say
    from gptjax.study import plan, results, runner

    for line in plan.lines(results.read(definition, arguments.store, now=True), arguments.store):
        say(line)
    return runner.run_study(definition, arguments.store, worker)


def report(arguments: argparse.Namespace, overrides: list[str]) -> None:
    prepare_jax(None)
    definition = study_of(arguments, overrides)
    from gptjax.study import results

    _report(results.read(definition, arguments.store), arguments.out)


def _report(results: Results, out: Path | None) -> None:
    from gptjax.study import analysis, publish, tables

    analysed = analysis.analyse(results)
    folder = out or OUT / results.study.name
    publish.write(analysed, folder)
    tables.show(analysed)
    print(f"the report: {', '.join(sorted(str(path) for path in folder.iterdir()))}")


def study_of(arguments: argparse.Namespace, overrides: list[str]) -> Study:
    """The study in FILE, or the one that --axis makes of --config; overrides are applied to it."""
    from gptjax.study import spec

    if (arguments.file is None) == (not arguments.axis):
        raise UserError("name either a study's FILE or, with --config=RECIPE, one --axis or more")
    if arguments.file is None:
        definition = spec.of_axes(arguments.config or DEFAULT_RECIPE, arguments.axis)
    elif arguments.config is None:
        definition = spec.load(arguments.file)
    else:
        raise UserError(f"{arguments.file} names its own base: leave --config out")
    return dataclasses.replace(
        definition,
        seeds=definition.seeds if arguments.seeds is None else arguments.seeds,
        begin=definition.begin if arguments.start is None else str(arguments.start),
        overrides=(*definition.overrides, *overrides),
    )


def add_study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=local, nargs="?", metavar="FILE", help="a file with STUDY = Study(...)"
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
    _add_start(parser)
    _add_store(parser)


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="start",
        type=expand,
        metavar="DIR",
        help="begin all runs with this pretrained model, a folder or hf:ORG/NAME[@REVISION], as "
        "`train --from`",
    )


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(default_folder=lambda a, recipe: ("--store", a.store))
    parser.add_argument(
        "--store",
        type=for_files,
        default=STORE,
        metavar="DIR",
        help="where the runs of all studies lie, each in a folder named by its config (%(default)s)",
    )


def _add_worker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--worker",
        action="store_true",
        help="one of several: take runs that nobody has, and end when others have what is left; "
        "whoever ends the last one reports. --on starts such workers",
    )
    add_launch(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    add_study(parser)
    parser.add_argument(
        "--out", type=local, metavar="DIR", help=f"of the report; default: {OUT}/ and its name"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_report(parser)
    _add_worker(parser)
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="only print what would run; with --on: what would be started or submitted",
    )


def _check_noise(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from gptjax.study import spec

    spec.check_names(_noise_of(arguments, overrides))


def _noise_of(arguments: argparse.Namespace, overrides: list[str]) -> Study:
    from gptjax.study.spec import Study

    if arguments.seeds < 2:
        raise UserError(f"--seeds={arguments.seeds}: noise is measured between 2 seeds or more")
    if not 0 < arguments.effect < math.inf:
        raise UserError(f"--effect={arguments.effect:g} must be above 0 and finite")
    return Study(
        hypothesis="How much does the loss vary from seed to seed?",
        base=arguments.config,
        arms={},
        begin="" if arguments.start is None else str(arguments.start),
        seeds=arguments.seeds,
        smallest=arguments.effect,
        overrides=tuple(overrides),
        name="noise",
    )


@again_on_sigterm()
def noise(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from gptjax.study import noise, runner

    definition = _noise_of(arguments, overrides)
    with contextlib.suppress(runner.Elsewhere):
        for line in noise.lines(run_all(arguments, definition, arguments.worker)):
            print(line)


def _add_noise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", default=DEFAULT_RECIPE, help="a recipe (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs (%(default)s)")
    _add_start(parser)
    parser.add_argument(
        "--effect",
        type=float,
        default=0.01,
        help="the difference to detect, in nats/token (%(default)s)",
    )
    _add_store(parser)
    _add_worker(parser)
    add_dry_launch(parser)


COMMANDS: dict[str, Command] = {
    "study": Command(
        study,
        _add_run,
        "Does it help? Run the missing runs of an ablation, and report the verdict.",
        f"""\
A study's FILE states hypothesis, base, arms, seeds, metric, and what is equal in all arms: tokens,
FLOPs or parameters. Without a FILE, each --axis names a knob and its values, and all combinations
are compared. Runs with the same seed have the same batches and initial values, and are compared in
pairs. The store keeps each run under its config. A finished run is used again while the code still
computes the same; an interrupted run resumes. Several processes may run the same study.
--dry_run only prints the plan.

  study experiments/positions.py --seeds=5
  study --config=configs/ablation.py --axis model.position=rope,alibi --axis optim.peak_lr=5e-3,1e-2

{OVERRIDES}
{EXITS}""",
        _check_study,
    ),
    "report": Command(
        report,
        _add_report,
        "The results of a study so far, as table, page, Markdown, CSV and LaTeX.",
        f"""\
Reads the runs that have finished, at any time, and runs nothing. It refuses to compare runs of
different programs, packages or data. Give the same arguments as to `study`.

  report experiments/positions.py --out=report

{OVERRIDES}""",
    ),
    "noise": Command(
        noise,
        _add_noise,
        "How much a recipe's loss varies between seeds, and which effects that lets you detect.",
        f"""\
Runs the recipe with several seeds, or reads these runs if a study has made them already. Prints
the standard deviation between seeds, the smallest difference that several numbers of
seeds detect with 80% power, and the number of seeds that the difference --effect needs.

  noise --config=configs/ablation.py --seeds=5 --effect=0.005

{OVERRIDES}
{EXITS}""",
        _check_noise,
    ),
}
