"""TPU VMs: gcloud runs the command on every host of a slice, where jax finds the others itself."""

from __future__ import annotations

import dataclasses
import shlex

from gptjax.cluster.job import Job, check_site, give, render, variables
from gptjax.config import UserError


@dataclasses.dataclass(frozen=True)
class Site:
    """A slice, as a site file tells it.

    Attributes:
        name, zone, project: of the TPU VM; without a project, gcloud's own.
        hosts: of the slice; each runs one process.
        folder: on each host, where the command runs; what is not absolute lies in the home, as ~/x.
        setup: shell, run there first, such as the installation.
        bucket: where folders of runs lie that are no whole paths; "" leaves them as they are.
        environment: "NAME=VALUE".
        program: what runs gptjax there.
    """

    name: str
    zone: str
    hosts: int
    project: str | None = None
    folder: str = "."
    setup: str = ""
    bucket: str = ""
    environment: tuple[str, ...] = ()
    program: tuple[str, ...] = ("python3", "launch.py")

    def __post_init__(self) -> None:
        check_site(self, hosts=1)
        if not self.program:
            raise UserError('program must name what runs gptjax, such as ["python", "launch.py"]')
        if self.folder.startswith("~") and not self.folder.startswith("~/"):
            raise UserError(f"folder={self.folder!r} must be such as ~/gptjax or /home/me/gptjax")


TEMPLATE = """\
cd {{ home }}{{ folder | word }} || exit
{% for name, value in environment.items() %}
export {{ name }}={{ value | word }}
{% endfor %}
{{ line }}
"""


def commands(job: Job, site: Site) -> list[list[str]]:
    """The gcloud commands, to run one after the other."""
    if not job.together:
        raise UserError(
            f"{job.words[0]}'s workers are programs of their own, and a slice runs one: "
            "use --on=local on each of several TPU VMs"
        )
    if job.processes != site.hosts:
        raise UserError(f"--processes={job.processes}, but {site.name} has {site.hosts} hosts")
    where = [site.name, f"--zone={site.zone}"]
    if site.project is not None:
        where.append(f"--project={site.project}")
    lines = [site.setup] if site.setup else []
    lines.append(f"exec {shlex.join(job.command(site.program))}")
    home = "~/" if site.folder.startswith("~/") else ""  # which the shell reads where it is bare
    remote = [
        render(
            TEMPLATE,
            home=home,
            folder=site.folder.removeprefix(home),
            environment=variables(site.environment),
            line=line,
        )
        for line in lines
    ]
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
    return [[*ssh, *where, "--worker=all", f"--command={line}"] for line in remote]


def script(job: Job, site: Site) -> str:
    return "".join(f"{shlex.join(command)}\n" for command in commands(job, site))


def submit(job: Job, site: Site) -> int:
    for command in commands(job, site):
        if status := give(command):
            return status
    return 0
