"""Commands that plan: what would be needed, taken and paid on hardware that is not here."""

from __future__ import annotations

import argparse
import math
import os
from typing import TYPE_CHECKING, Any

from gptjax.commands.command import (
    DEFAULT_RECIPE,
    EXIT_FAILED,
    EXITS,
    OVERRIDES,
    Command,
    check_outputs,
    prepare_jax,
)
from gptjax.config import UserError
from gptjax.storage import expand, local

if TYPE_CHECKING:
    from gptjax.plan.hardware import Hardware


def plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    check_outputs(arguments)
    # The compilers that the extras bring are not for this process, which needs no device of theirs.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    prepare_jax(None)
    from gptjax import configure, ledger
    from gptjax.plan import hardware, summary
    from gptjax.plan import plan as plans
    from gptjax.records import strict_json
    from gptjax.report.page import write

    target = hardware.parse(arguments.hardware)
    for name in ("dollars", "budget", "jobs"):
        number = getattr(arguments, name)
        if number is not None and not (math.isfinite(number) and number > 0):
            raise UserError(f"--{name}={number} must be above 0")
    if arguments.search or arguments.budget is not None:
        return _search(arguments, overrides, target)
    if arguments.axis or arguments.points is not None:
        raise UserError("--axis and --points are of a search: give --search or --budget")
    config = configure.from_file(arguments.config, overrides)
    calibration = None if arguments.calibrate is None else ledger.measure(arguments.calibrate)
    if calibration is not None and not target.chip.covers(calibration.kind):
        raise UserError(
            f"{arguments.calibrate} was trained on {calibration.kind}, which foretells nothing of "
            f"{target.name}: calibrate by a run on {target.chip.kind}"
        )
    record = plans.make(config, target, arguments.dollars, calibration)
    if arguments.html is not None:
        write(arguments.html, summary.page(record))
    if arguments.json:
        print(strict_json(record))
    else:
        summary.show(record)
    return 0 if record["fits"]["fits"] else EXIT_FAILED


def _search(arguments: argparse.Namespace, overrides: list[str], target: Hardware) -> int:
    from gptjax import configure, setup
    from gptjax.plan import search, summary
    from gptjax.progress import say
    from gptjax.records import strict_json
    from gptjax.study import spec

    if arguments.calibrate is not None or arguments.html is not None:
        raise UserError("--calibrate and --html are of one plan: leave --search and --budget out")
    law = None if arguments.budget is None else _law(arguments, target)
    candidates = {"": configure.from_file(arguments.config, overrides)}
    if arguments.axis:
        study = spec.of_axes(arguments.config, arguments.axis)
        candidates = {
            name: configure.from_file(
                arguments.config,
                [*overrides, *(f"--config.{k}={v}" for k, v in {**study.settings, **own}.items())],
            )
            for name, own in study.all_arms.items()
        }
    for config in candidates.values():
        setup.check_names(config)  # a name that is none is of the user, not of a candidate
    if not any(axis.startswith("mesh.") for axis in arguments.axis):
        candidates = search.over_meshes(candidates, target)
    say(f"{len(candidates)} candidates on {target.name}")
    found = search.search(candidates, target, arguments.dollars, arguments.jobs, say)
    bought = None
    if law is not None:
        from gptjax.sizes import budget

        bought = budget.spend(found, arguments.budget, *law)
    if arguments.json:
        plans = [{"name": f.name, "refused": f.refused, "plan": f.plan} for f in found]
        print(strict_json({"plans": plans, "budget": bought}))
    else:
        summary.show_search(found, target)
        if bought is not None:
            summary.show_budget(bought, arguments.budget)
    return 0 if any(f.plan is not None and f.plan["fits"]["fits"] for f in found) else EXIT_FAILED


def _law(arguments: argparse.Namespace, target: Hardware) -> tuple[Any, Any, Any]:
    """The points of --points, the law through them, and its bootstrap."""
    from gptjax.sizes import scaling

    if arguments.points is None:
        raise UserError(
            "--budget wants a law of scale: --points=FILE, the table that `scaling` fits"
        )
    if arguments.dollars is None and target.chip.dollars is None:
        raise UserError(
            f"no price of {target.name} is on file: give --dollars, of an hour of a device"
        )
    points = scaling.points_from_csv(arguments.points)
    law = scaling.fit(points)
    if len(law.terms) < 2:
        raise UserError("a budget is shared out only by a law of both sizes: see `scaling`")
    return points, law, scaling.bootstrap(points, law)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", default=DEFAULT_RECIPE, help="a recipe (%(default)s)"
    )
    parser.add_argument(
        "--on",
        dest="hardware",
        required=True,
        metavar="HARDWARE",
        help="v5e-256, 2xv4-128 (two slices), h100-8, cpu-1: of other commands --on says where "
        "they run, while a plan is made here, for this",
    )
    parser.add_argument(
        "--dollars", type=float, metavar="D", help="an hour of a device, in place of the table's"
    )
    parser.add_argument(
        "--calibrate",
        type=expand,
        metavar="RUN",
        help="forecast from this finished run, in place of those that were recorded",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="plan for every crossing of --axis, on every mesh unless an axis is of the mesh",
    )
    parser.add_argument(
        "--axis",
        action="append",
        default=[],
        metavar="KNOB=V1,V2",
        help="of a search: a knob and its values, such as model.remat=full,dots",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="D",
        help="a search for the least loss that so many dollars buy, by the law of --points",
    )
    parser.add_argument(
        "--points", type=local, metavar="FILE", help="a CSV table: parameters, tokens, loss"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="compile so many at once (%(default)s)"
    )
    parser.add_argument("--html", type=local, metavar="FILE", help="also a self-contained page")
    parser.add_argument("--json", action="store_true", help="one JSON object")


COMMANDS: dict[str, Command] = {
    "plan": Command(
        plan,
        _add_plan,
        "What a config needs, takes and costs on hardware that is not here.",
        f"""\
Compiles the real training step for TPUs or GPUs that this machine does not have, and prints the
memory of a device by purpose and whether it fits, the collectives of a step with the bytes that a
device sends, FLOPs, a range for the time of a step, MFU, days and dollars, and every array with
the mesh axes that split it. Each figure says whether it is the compiler's, arithmetic or an
estimate. Without the extras `plan` and `plan-cuda`, which bring the compilers, closed forms stand
in, and the plan says so. The exit status is 1 where nothing fits.

  plan --config=configs/gpt2.py:124m --on=v5e-16 --config.train.accumulation=1
  plan --config=configs/gpt2.py:124m --on=h100-8 --calibrate=runs/mine --html=plan.html
  plan --on=v5e-8 --search --axis model.remat=none,dots,full --axis train.accumulation=1,2
  plan --on=v5e-8 --budget=100 --points=ladder.csv --axis model.width=256,512,768

{OVERRIDES}
{EXITS}""",
    ),
}
