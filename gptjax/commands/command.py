"""What a command is, and what several have in common."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gptjax.config import Config, UserError

EXIT_FAILED = 1  # the command did its work, and what it checks does not hold
DEFAULT_RECIPE = "configs/shakespeare.py"

WORKDIR = "a run's folder, or a pretrained model's (a Hugging Face folder)"
RECIPE = "a recipe; default: the run's own config, or configs/base.py's settings"

OVERRIDES = """\
Any knob of the config can be set by its path: --config.optim.peak_lr=6e-4
--config.model.windows="(None,256)" --config.optim.clip=None. `config` lists them all;
configs/base.py explains each.
"""
EXITS = """\
Exit status: 0 done, 1 a check that failed (replay, coord-check), 2 a mistake that the message
explains (--debug shows where), 75 stopped by SIGTERM or Ctrl-C after saving: the same command
goes on.
"""


class Command(NamedTuple):
    """A row of a table of commands.

    Attributes:
        run: takes what was parsed, and the other words, which are overrides (`--config.*`);
            returns the exit status, None for 0.
        summary: a line of the overview.
        details: the rest of `--help`: what it does, and how it is used.
    """

    run: Callable[[argparse.Namespace, list[str]], int | None]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    summary: str
    details: str


def prepare_jax(distributed: str | None) -> None:
    """Compiled programs are kept between runs; several processes find each other."""
    import jax

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("GPTJAX_CACHE") or Path.home() / ".cache" / "gptjax")
        jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if distributed == "auto":
        jax.distributed.initialize()
    elif distributed:
        try:
            address, processes, index = distributed.split(",")
            jax.distributed.initialize(address, int(processes), int(index))
        except ValueError as error:
            raise UserError(
                f"--distributed={distributed} is neither 'auto' nor HOST:PORT,PROCESSES,INDEX"
            ) from error


def config_of(arguments: argparse.Namespace, overrides: list[str]) -> Config:
    """The config of --config, or of the model in --workdir."""
    from gptjax import trained

    return trained.config_of(arguments.workdir, arguments.config, overrides)


def add_run(parser: argparse.ArgumentParser) -> None:
    """What every command has that works on a model."""
    parser.add_argument("--workdir", type=Path, required=True, help=WORKDIR)
    parser.add_argument("--config", metavar="FILE[:ARG]", help=RECIPE)
    add_distributed(parser)


def add_distributed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,N,I",
        help="this is process I of N, which meet at HOST:PORT; without a value the cluster "
        "(Slurm, TPU pod, Kubernetes, MPI) tells. Run the same command on every host",
    )


def no_more(overrides: list[str]) -> None:
    if overrides:
        raise UserError(f"unexpected argument {overrides[0]!r}; see --help")
