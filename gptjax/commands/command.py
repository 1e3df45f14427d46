"""What a command is, and what several have in common."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gptjax import alive, heap
from gptjax.config import UserError
from gptjax.places import cache
from gptjax.storage import expand

if TYPE_CHECKING:
    from gptjax.trained import Trained

EXIT_FAILED = 1  # the command did its work, and what it checks does not hold
DEFAULT_RECIPE = "configs/shakespeare.py"

WORKDIR = "a run's folder, a pretrained model's (a Hugging Face folder), or its name, hf:ORG/NAME"
RECIPE = "a recipe; default: the run's own config, or configs/base.py's settings"

OVERRIDES = """\
Any knob of the config can be set by its path: --config.optim.peak_lr=6e-4
--config.model.windows="(None,256)" --config.optim.clip=None. `config` lists them all;
configs/base.py explains each.
"""
EXITS = """\
Exit status: 0 done, 1 a check that failed (replay, coord-check, doctor, plan), 2 a mistake that the
message explains (--debug shows where), 75 stopped by SIGTERM or Ctrl-C after saving, or because
another process was lost or a bucket is out of reach: the same command goes on. What can be made
again is kept in ~/.cache/gptjax, or where GPTJAX_CACHE says.
"""


class Command(NamedTuple):
    """A row of a table of commands.

    Attributes:
        run: takes what was parsed, and the other words, which are overrides (`--config.*`);
            returns the exit status, None for 0.
        summary: a line of the overview.
        details: the rest of `--help`: what it does, and how it is used.
        check: takes what `run` takes, and refuses what can be told without a device, data or the
            folder of a run, which may be there only where --on says; None: the overrides alone.
    """

    run: Callable[[argparse.Namespace, list[str]], int | None]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    summary: str
    details: str
    check: Callable[[argparse.Namespace, list[str]], object] | None = None


def prepare_jax(distributed: str | None) -> None:
    """Starts jax: compiled programs are kept between runs; several processes find each other.

    Raises:
        UserError: if it cannot start, which is told in a line.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    heap.share()
    try:
        import jax

        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            _keep_programs()
        if distributed is not None:
            alive.meet(distributed)
        jax.devices()
    except UserError:
        raise
    except Exception as error:  # ValueError, RuntimeError and a bare AssertionError
        reason = str(error).strip().splitlines() or [type(error).__name__]
        settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("JAX_")]
        raise UserError(
            f"jax cannot start: {reason[0]}; it was told {' '.join(settings) or 'nothing'}"
            f"{'' if distributed is None else f' --distributed={distributed}'}"
        ) from error


def _keep_programs() -> None:
    import jax

    try:
        folder = cache() / "compiled"
    except UserError as error:
        logging.getLogger(__name__).warning("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def model_of(arguments: argparse.Namespace, overrides: list[str]) -> Trained:
    """The model in --workdir, by its own config or by --config."""
    from gptjax import trained

    return trained.find(arguments.workdir, arguments.config, overrides)


def check_model(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Refuses a mistake in the words that `model_of` takes; the model may be elsewhere."""
    from gptjax import configure

    if arguments.config is None:
        configure.check(overrides)
    else:
        configure.from_file(arguments.config, overrides)


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuses, before any work is done, a picture or page that could not be written."""
    for flag, suffixes in (("png", (".png", ".svg", ".pdf")), ("html", (".html",))):
        path = getattr(arguments, flag, None)
        if path is not None and path.suffix not in suffixes:
            raise UserError(f"--{flag}={path} must end in {' or '.join(suffixes)}")
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"--{flag}={path}: no folder {path.parent}, make it first")


def add_run(parser: argparse.ArgumentParser) -> None:
    """What every command has that works on a model."""
    parser.add_argument("--workdir", type=expand, required=True, help=WORKDIR)
    parser.add_argument("--config", metavar="FILE[:ARG]", help=RECIPE)
    add_distributed(parser)


# What says where a command runs, and is no part of it; beside --on, --dry_run is such as well.
LAUNCH = ("--on", "--processes", "--site")


def add_launch(parser: argparse.ArgumentParser) -> None:
    """`gptjax/cluster/launch.py` reads them."""
    group = parser.add_argument_group(
        "on several processes", "The same command, here or on a cluster: docs/clusters.md."
    )
    group.add_argument(
        "--on", metavar="TARGET", help="run this command on: local, slurm, kubernetes, tpu-vm"
    )
    group.add_argument(
        "--processes", type=int, default=1, metavar="N", help="so many run it (%(default)s)"
    )
    group.add_argument(
        "--site",
        metavar="FILE",
        help="particulars of the cluster, such as configs/sites/slurm.toml",
    )


def add_dry_launch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry_run",
        action="store_true",
        dest="dry_launch",
        help="with --on: only print what would be started or submitted",
    )


def without_launch(words: Sequence[str]) -> tuple[str, ...]:
    """The words of a command but for those that say where it runs."""
    kept: list[str] = []
    wants_value = False
    for word in words:
        name, equals, _ = word.partition("=")
        if wants_value or name in LAUNCH:
            wants_value = not wants_value and not equals
        elif word != "--dry_run":
            kept.append(word)
    return tuple(kept)


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """Of commands that several processes run as one jax program."""
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,N,I",
        help="this is process I of N, which meet at HOST:PORT; without a value the cluster "
        "(Slurm, TPU pod, Kubernetes, MPI) tells. Run the same command on every host",
    )
    add_launch(parser)
    add_dry_launch(parser)


def no_more(overrides: list[str]) -> None:
    if overrides:
        raise UserError(f"unexpected argument {overrides[0]!r}; see --help")
