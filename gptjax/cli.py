"""The command line: finds the command, and tells what went wrong in a line."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from gptjax import alive
from gptjax.commands import data, models, plans, runs, scales, studies
from gptjax.commands.command import (
    DEFAULT_RECIPE,
    EXITS,
    LAUNCH,
    OVERRIDES,
    Command,
    without_launch,
)
from gptjax.config import EXIT_STOPPED, LESS_MEMORY, UserError, out_of_memory
from gptjax.storage import Unreachable

EXIT_USER_ERROR = 2
EXIT_PIPE = 141  # 128 + SIGPIPE, as a shell tells of `yes | head -1`

COMMANDS: dict[str, Command] = {
    **runs.COMMANDS,
    **studies.COMMANDS,
    **scales.COMMANDS,
    **plans.COMMANDS,
    **models.COMMANDS,
    **data.COMMANDS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    _say_what_a_terminal_cannot()
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            if argv is None:  # this process is the command: its status stands while it shuts down
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            sys.stdout.flush()  # a reader that has gone shows here, and not after all is done
    except BrokenPipeError:  # `data show | head -1`: whoever asked has heard enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE


def _say_what_a_terminal_cannot() -> None:
    """A terminal's encoding decides how a character is shown, never whether a run ends well."""
    for stream, errors in (
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
        (sys.stdin, "replace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _run(words: list[str]) -> int:
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else " ".join(words[:1])
    if name not in COMMANDS:
        return _overview(name)
    command, program = COMMANDS[name], f"{Path(sys.argv[0]).name} {name}"
    parser = argparse.ArgumentParser(
        program,
        description=f"{command.summary}\n\n{command.details}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    own, overrides = _apart(words[len(name.split()) :])
    try:
        arguments, rest = parser.parse_known_args(own)
        if getattr(arguments, "on", None) is not None:
            return _launch(command, arguments, words, overrides, rest)
        _refuse_launch(name, arguments, own)
        return command.run(arguments, [*overrides, *rest]) or 0
    except BaseException as error:
        status, message = _explain(error)
        ours = isinstance(error, Exception) and not isinstance(error, BrokenPipeError)
        if message or (status is None and ours):
            if status is not None and "--debug" in own:
                traceback.print_exc()
            alive.leave(status, message or f"{type(error).__name__}: {error}".partition("\n")[0])
        if status is None or "--debug" in own:
            raise
        print(f"gptjax: {message}" if message else "", file=sys.stderr, end="\n" * bool(message))
        return status


def _launch(
    command: Command,
    arguments: argparse.Namespace,
    words: Sequence[str],
    overrides: list[str],
    rest: list[str],
) -> int:
    """The command that `words` are, where --on says; what is wrong with it is told now, not there."""
    from gptjax import configure
    from gptjax.cluster.job import Job
    from gptjax.cluster.launch import launch

    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; see --help")
    recipe = getattr(arguments, "config", None)
    if recipe is None and getattr(arguments, "branch", "") is None:  # of `train`, without a trunk
        recipe = DEFAULT_RECIPE
    if command.check is not None:
        command.check(arguments, overrides)
    elif recipe is not None:
        configure.from_file(recipe, overrides)
    else:
        configure.check(overrides)
    if getattr(arguments, "distributed", None) is not None or getattr(arguments, "worker", False):
        raise UserError("--on tells processes what they are: leave --distributed and --worker out")
    given, folder = without_launch(words), getattr(arguments, "workdir", None)
    if "default_folder" in arguments:
        name, folder = arguments.default_folder(arguments, recipe)
        if not any(word.partition("=")[0] == name for word in given):
            given += (f"{name}={folder}",)
    job = Job(
        given,
        arguments.processes,
        "distributed" in arguments,
        "" if folder is None else str(folder),
    )
    return launch(job, arguments.on, arguments.site, "--dry_run" in words)


def _refuse_launch(name: str, arguments: argparse.Namespace, own: Sequence[str]) -> None:
    """Refuses, without --on, what would have no effect."""
    # `plan --on` names hardware, not a place to run.
    others = LAUNCH if "hardware" not in arguments else LAUNCH[1:]
    alone = [word for word in own if word.partition("=")[0] in others]
    if getattr(arguments, "dry_launch", False):
        alone.append("--dry_run")
    if alone and "on" in arguments:
        raise UserError(f"{alone[0]} is of a launch: say where by --on, see --help")
    if alone:
        raise UserError(f"{name} runs in one process, here: leave {alone[0]} out")


def _apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and the overrides: --config.seed=1, or its two halves.

    argparse takes a value that stands apart, or a word with a space in it, for a file or question.
    """
    own: list[str] = []
    overrides: list[str] = []
    wants_value = False
    for word in words:
        override = word.startswith("--config.")
        if override or (wants_value and not word.startswith("--")):
            overrides.append(word)
        else:
            own.append(word)
        wants_value = override and "=" not in word
    return own, overrides


def _overview(name: str) -> int:
    """Help without a command; an unknown one is an error."""
    asked_for_help = name in ("", "-h", "--help", "help")
    lines = [f"  {n:<16}{c.summary}" for n, c in COMMANDS.items()]
    text = "\n".join(
        [
            "gptjax: a JAX/Flax GPT research codebase.",
            "",
            f"usage: {Path(sys.argv[0]).name} COMMAND [--help] ...",
            "",
            *lines,
            "",
            f"{OVERRIDES}{EXITS}",
        ]
    )
    if asked_for_help:
        print(text)
        return 0 if name else EXIT_USER_ERROR
    print(f"gptjax: no command {name!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
    return EXIT_USER_ERROR


def _explain(error: BaseException) -> tuple[int | None, str]:
    """Exit status and one line for what a user can mend; None for what is ours to mend."""
    # Not imported here: jax, which it imports, may be what has failed.
    loop = sys.modules.get("gptjax.loop")
    if loop is not None and isinstance(error, loop.Stopped):
        return EXIT_STOPPED, ""
    match error:
        case UserError():
            return EXIT_USER_ERROR, str(error)
        case KeyboardInterrupt():
            return 130, "interrupted"
        case BrokenPipeError():
            return None, ""
        case Unreachable():
            return EXIT_STOPPED, (
                f"{error.filename} is out of reach ({error.strerror}): the same command goes on "
                "once it answers"
            )
        case OSError():
            return EXIT_USER_ERROR, f"{error.filename or 'a file'}: {error.strerror or error}"
    if words := out_of_memory(error):
        return EXIT_USER_ERROR, f"{words}: {LESS_MEMORY}"
    return None, ""
