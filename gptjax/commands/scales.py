"""Commands that look across sizes of a model."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from gptjax.commands.command import (
    DEFAULT_RECIPE,
    EXIT_FAILED,
    EXITS,
    OVERRIDES,
    Command,
    check_outputs,
    prepare_jax,
)
from gptjax.commands.studies import add_study, run_all, study_of
from gptjax.config import UserError
from gptjax.storage import local

if TYPE_CHECKING:
    from gptjax.sizes.scaling import Points


def scaling(arguments: argparse.Namespace, overrides: list[str]) -> None:
    check_outputs(arguments)
    points = _read(arguments, overrides)
    from gptjax.sizes import scaling, scaling_report

    law = scaling.fit(points)
    resampled_laws = scaling.bootstrap(points, law)
    record = scaling.record(points, law, resampled_laws, arguments.flops)
    if arguments.png is not None:
        scaling_report.figure(points, law, resampled_laws).savefig(arguments.png, dpi=150)
    if arguments.json:
        from gptjax.records import strict_json

        print(strict_json(record))
    else:
        scaling_report.show(record)


def _read(arguments: argparse.Namespace, overrides: list[str]) -> Points:
    """The points of --points, or of the runs of a study, which are made where they lack."""
    if arguments.points is not None:
        if arguments.file is not None or arguments.axis or overrides:
            raise UserError("--points has all the numbers: leave FILE, --axis and overrides out")
        from gptjax.sizes.scaling import points_from_csv

        return points_from_csv(arguments.points)
    prepare_jax(None)
    ladder = study_of(arguments, overrides)
    if arguments.file is None:
        ladder = dataclasses.replace(ladder, equal="nothing")  # train.steps may be an axis
    from gptjax.sizes.ladder import points_of

    return points_of(run_all(arguments, ladder))


def _add_scaling(parser: argparse.ArgumentParser) -> None:
    add_study(parser)
    parser.add_argument(
        "--points",
        type=local,
        metavar="FILE",
        help="instead of runs: a CSV table with the columns parameters, tokens, loss",
    )
    parser.add_argument(
        "--flops",
        type=float,
        nargs="+",
        default=[],
        help="budgets to share out between parameters and tokens",
    )
    parser.add_argument("--png", type=local, metavar="FILE", help="also a picture")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def coord_check(arguments: argparse.Namespace, overrides: list[str]) -> int:
    check_outputs(arguments)
    widths, depths = (_sizes(arguments, flag) for flag in ("widths", "depths"))
    prepare_jax(None)
    from gptjax import configure

    config = configure.from_file(arguments.config, overrides)
    from gptjax.report.page import write
    from gptjax.sizes import coordinates, coordinates_report

    record = coordinates.coordinate_check(config, widths, depths, arguments.steps, arguments.seeds)
    if arguments.png is not None:
        coordinates_report.figure(record).savefig(arguments.png, dpi=150)
    if arguments.html is not None:
        write(arguments.html, coordinates_report.page(record))
    if arguments.json:
        from gptjax.records import strict_json

        print(strict_json(record))
    else:
        coordinates_report.show(record)
    return 0 if record["passed"] else EXIT_FAILED


def _sizes(arguments: argparse.Namespace, flag: str) -> list[int]:
    """The numbers of --widths=64,128."""
    text = getattr(arguments, flag)
    try:
        return [int(word) for word in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"--{flag}={text}: write whole numbers, such as 64,128,256") from None


def _add_coord_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", default=DEFAULT_RECIPE, help="a recipe (%(default)s)"
    )
    parser.add_argument("--widths", metavar="W1,W2", help="of model.width, two or more")
    parser.add_argument("--depths", metavar="L1,L2", help="of model.layers, two or more")
    parser.add_argument("--steps", type=int, default=4, help="of training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each size (%(default)s)")
    parser.add_argument("--png", type=local, metavar="FILE", help="also a picture")
    parser.add_argument("--html", type=local, metavar="FILE", help="also a self-contained page")
    parser.add_argument("--json", action="store_true", help="one JSON object")


COMMANDS: dict[str, Command] = {
    "scaling": Command(
        scaling,
        _add_scaling,
        "A law of scale through a ladder of sizes: loss = E + A/N^a + B/D^b.",
        f"""\
Runs every arm of a study's FILE, or every crossing of axes of size, as a rung of a ladder (its
loss is the mean over seeds), or reads a table; and prints the law's constants with 95% intervals,
how well the smaller sizes foretell the largest, and the best sizes for a budget. Refuses where
the sizes do not exceed the constants.

  scaling --points=ladder.csv --flops 1e18 1e19 --png=law.png
  scaling --config=configs/ablation.py --seeds=1 --axis model.width=32,48,64,96

{OVERRIDES}
{EXITS}""",
    ),
    "coord-check": Command(
        coord_check,
        _add_coord_check,
        "Do updates keep their size as the model grows, as muP promises?",
        f"""\
Trains a few steps at each size and prints the slope, in powers of the width or depth, of every
activation's size at the start and of its change since. Fails where a change grows, or shrinks
where it must not.

  coord-check --config.model.parametrisation=mup --config.model.mup_base_width=64 --widths=64,128

{OVERRIDES}
{EXITS}""",
    ),
}
