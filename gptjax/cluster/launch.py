"""Runs a command somewhere: a table of targets, and a file of each site's particulars."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gptjax import storage
from gptjax.cluster import kubernetes, local, slurm, tpu_vm
from gptjax.cluster.job import Job, in_bucket
from gptjax.config import UserError, choose, from_dict
from gptjax.configure import RECIPES


class Target(NamedTuple):
    """A row of the table of targets.

    Attributes:
        site: a frozen dataclass, the particulars that a site file states.
        text: exactly what `submit` would start or hand over.
        submit: does it; returns the exit status.
    """

    site: type
    text: Callable[[Job, Any], str]
    submit: Callable[[Job, Any], int]


TARGETS = {
    "local": Target(local.Site, local.script, local.run),
    "slurm": Target(slurm.Site, slurm.script, slurm.submit),
    "kubernetes": Target(kubernetes.Site, kubernetes.manifest, kubernetes.submit),
    "tpu-vm": Target(tpu_vm.Site, tpu_vm.script, tpu_vm.submit),
}


def launch(job: Job, on: str, site: str | None, dry_run: bool) -> int:
    """Runs `job` on a row of TARGETS, or prints what that would be; returns the exit status.

    Raises:
        UserError: on what a person can mend: the site file, a number, a program that is not there.
    """
    target = choose(TARGETS, on, "--on")
    if job.processes < 1:
        raise UserError(f"--processes={job.processes} must be above 0")
    particulars = read_site(site, on)
    if bucket := getattr(particulars, "bucket", ""):  # this host has none
        job = in_bucket(job, bucket)
    try:
        "".join(job.words).encode()
    except UnicodeEncodeError:
        raise UserError("a word of the command is no UTF-8: name it otherwise") from None
    if any("\0" in word for word in job.words):
        raise UserError("a word of the command holds a NUL, which no program can be given")
    if dry_run:
        print(target.text(job, particulars), end="")
        return 0
    return target.submit(job, particulars)


def read_site(name: str | None, on: str) -> Any:
    """The particulars that a TOML file states for a target; without a file, its defaults.

    configs/sites/NAME.toml is the one that comes with the package where there is no such file.
    """
    cls = TARGETS[on].site
    fields = dataclasses.fields(cls)
    if name is not None and not fields:
        raise UserError(f"--on={on} has no particulars: leave --site out")
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    try:
        stated = {} if name is None else tomllib.loads(_find(name).read_text(encoding="utf-8"))
        return from_dict({**defaults, **stated}, cls)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, UserError) as error:
        where = f"--on={on} needs a site" if name is None else f"site {name}"
        raise UserError(f"{where}: {error}; configs/sites/{on}.toml explains each key") from error


def _find(name: str) -> Path:
    path = storage.local(name)
    if not path.is_file() and path == Path("configs/sites", path.name):
        path = RECIPES / "sites" / path.name
    if not path.is_file():
        shipped = sorted(
            f"configs/sites/{file.name}" for file in (RECIPES / "sites").glob("*.toml")
        )
        raise UserError(f"no such file; name one, such as {', '.join(shipped)}")
    return path
