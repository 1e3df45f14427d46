"""A command that several processes run, and what all targets do with it."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import yaml

from gptjax.config import UserError
from gptjax.storage import BucketPath, expand, on_hub

# What names folders of runs in the words of a command, and how many words follow it.
FOLDERS = {"--workdir": 1, "--store": 1, "--branch": 1, "--config.train.branch": 1, "--compare": 2}


class Job(NamedTuple):
    """What is to run.

    Attributes:
        words: of the user's command, "train", "--config=...", as they were given.
        processes: that run it, above 0.
        together: whether they are one jax program. Else each works for itself.
        folder: of the run, or of a study's runs; "" if there is none.
    """

    words: tuple[str, ...]
    processes: int
    together: bool
    folder: str = ""

    @property
    def name(self) -> str:
        return f"gptjax-{self.words[0]}"

    @property
    def digest(self) -> str:
        """Of all that it is: the same command has the same."""
        return hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:8]

    def command(self, program: Sequence[str], meet: str = "--distributed") -> list[str]:
        """What one process runs: `meet` tells those of one jax program where the others are."""
        return [*program, *self.words, meet if self.together else "--worker"]


def in_bucket(job: Job, bucket: str) -> Job:
    """The job with the folders of runs in a bucket, but for whole paths, URLs and names on the hub.

    Raises:
        UserError: if one leads out of it, or is all of it.
    """

    def moved(folder: str, name: str) -> str:
        path = expand(folder)
        off = name == "--config.train.branch" and folder == "None"
        if off or isinstance(path, BucketPath) or path.is_absolute() or on_hub(folder):
            return folder
        if not path.parts:
            raise UserError(f"{folder!r} would be all of the site's bucket {bucket}: name a folder")
        if ".." in path.parts:
            raise UserError(f"{folder} leads out of the site's bucket {bucket}: write it whole")
        return str(expand(bucket) / path)

    words: list[str] = []
    awaited: list[str] = []  # the name of each folder that follows as a word
    for word in job.words:
        name, equals, folder = word.partition("=")
        if awaited:
            words.append(moved(word, awaited.pop()))
        elif name in FOLDERS and equals:
            words.append(f"{name}={moved(folder, name)}")
        else:
            words.append(word)
            awaited = [name] * FOLDERS.get(name, 0)
    return job._replace(words=tuple(words), folder=job.folder and moved(job.folder, ""))


def check_site(site: Any, **least: int) -> None:
    """Refuses what no cluster takes: an empty text, one with a NUL, numbers below those given, a
    bucket that is neither "" nor one or a folder in it, an environment that no shell knows."""
    for name, value in vars(site).items():
        for text in value if isinstance(value, tuple) else (value,):
            if text == "" and name not in ("bucket", "setup"):
                raise UserError(f"{name} holds an empty text: write one, or leave the key out")
            if isinstance(text, str) and "\0" in text:
                raise UserError(f"{name}: {text!r} holds a NUL, which no program can be given")
    for name, number in least.items():
        if getattr(site, name) < number:
            raise UserError(f"{name} must be at least {number}, got {getattr(site, name)}")
    variables(site.environment)
    if site.bucket and not isinstance(expand(site.bucket), BucketPath):
        raise UserError(f"bucket={site.bucket!r} must be such as gs://BUCKET or s3://BUCKET/FOLDER")


def this_program() -> tuple[str, ...]:
    """The interpreter and the script that run now."""
    return sys.executable, os.path.abspath(sys.argv[0])


def pairs(entries: Sequence[str], field: str) -> dict[str, str]:
    """{name: value} of a site's ["NAME=VALUE"].

    Raises:
        UserError: if one is no such pair.
    """
    for entry in entries:
        if not entry.partition("=")[0] or "=" not in entry:
            raise UserError(f"{field}: {entry!r} is no NAME=VALUE")
    named = dict(entry.split("=", 1) for entry in entries)
    if len(named) < len(entries):
        raise UserError(f"{field} names one twice: {', '.join(entries)}")
    return named


def variables(entries: Sequence[str]) -> dict[str, str]:
    """A site's environment; as `pairs`, of names that a shell knows."""
    named = pairs(entries, "environment")
    for name in named:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UserError(f"environment: {name!r} is no name of a variable")
    return named


def _quoted(value: Any) -> str:
    """A YAML text or flow list that any reader takes for just this value."""
    dumped = yaml.safe_dump(value, default_style='"', default_flow_style=True, width=2**31)
    return dumped.removesuffix("\n")


JINJA = jinja2.Environment(
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
JINJA.filters |= {"words": shlex.join, "word": shlex.quote, "yaml": _quoted}


def render(template: str, **values: Any) -> str:
    """A jinja2 template filled in; `words`, `word` and `yaml` quote what they are given."""
    return JINJA.from_string(template).render(values)


def give(command: Sequence[str], text: str = "") -> int:
    """Runs a program of the cluster's, which reads `text`; returns its exit status.

    Raises:
        UserError: if there is no such program.
    """
    if shutil.which(command[0]) is None:
        raise UserError(
            f"no {command[0]} here: start this where the cluster's jobs are submitted; "
            "--dry_run prints what would be"
        )
    given = text.encode() if text else None
    stdin = None if text else subprocess.DEVNULL
    return subprocess.run(command, input=given, stdin=stdin, check=False).returncode
