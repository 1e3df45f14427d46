"""Slurm: a batch script, of which `srun` starts a task for each process."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from gptjax.cluster.job import (
    Job,
    check_site,
    give,
    render,
    this_program,
    variables,
)
from gptjax.config import EXIT_STOPPED, UserError
from gptjax.storage import whole

COMMENT = "gptjax "  # in the comment of a job, before the folder of its run
SQUEUE_SECONDS = 10.0
TOLD = 3  # jobs of one folder
ENDING = {"COMPLETING", "STAGE_OUT"}  # states of a job whose processes have ended


@dataclasses.dataclass(frozen=True)
class Site:
    """A cluster, as a site file tells it.

    Attributes:
        partition, account: of sbatch; None leaves it to the cluster.
        time: limit of one start, as sbatch takes it; None is the partition's.
        notice: seconds before the limit at which the tasks are told to save, up to a minute earlier.
        restarts: so often a job that saved and stopped is put into the queue again.
        gpus_per_node, tasks_per_node: one task takes all GPUs of its node, or each has one.
        options: more of sbatch, "--qos=high".
        srun_options: of srun, "--container-image=...".
        environment: "NAME=VALUE".
        setup: shell, before the tasks start, "module load cuda".
        bucket: where folders of runs lie that are no whole paths; "" leaves them as they are.
        program: what runs gptjax on a node; empty is the interpreter and script that submit.
    """

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    notice: int = 120
    restarts: int = 100
    gpus_per_node: int = 0
    tasks_per_node: int = 1
    options: tuple[str, ...] = ()
    srun_options: tuple[str, ...] = ()
    bucket: str = ""
    environment: tuple[str, ...] = ()
    setup: str = ""
    program: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_site(self, notice=1, restarts=0, gpus_per_node=0, tasks_per_node=1)
        if self.gpus_per_node and self.tasks_per_node not in (1, self.gpus_per_node):
            raise UserError(
                f"tasks_per_node={self.tasks_per_node} must be 1, or one for each of the "
                f"gpus_per_node={self.gpus_per_node}"
            )
        for option in (self.partition, self.account, self.time, *self.options):
            if option is not None and not option.isprintable():
                raise UserError(f"{option!r} is not one line of an #SBATCH option")
        limit = None if self.time is None else seconds(self.time)
        if limit is not None and self.notice >= limit:
            raise UserError(
                f"notice={self.notice} seconds is no less than the limit time={self.time!r} of a start, "
                f"which is {limit} seconds: lower notice, or raise time"
            )


def seconds(time: str) -> int | None:
    """Of a limit as sbatch takes it: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, or any of
    DAYS-HOURS[:MINUTES[:SECONDS]]. None where it is no limit, or nothing that is known here."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        return None
    days, *parts = match.groups()
    units = (3600, 60, 1) if days is not None or parts[2] is not None else (60, 1, 0)
    told = (int(part or 0) * unit for part, unit in zip(parts, units, strict=True))
    return (86400 * int(days or 0) + sum(told)) or None


TEMPLATE = """\
#!/bin/bash
{% for option in options %}
#SBATCH {{ option | word }}
{% endfor %}
{% for name, value in environment.items() %}
export {{ name }}={{ value | word }}
{% endfor %}
{% if setup %}
{{ setup }}
{% endif %}
# A task that has saved and stopped ({{ stopped }}) stays for a moment: srun ends the others when one
# ends so, and they have saved as well, but are a little behind.
status=0
srun {{ srun | words }} bash -c '
    trap : TERM
    "$@"
    status=$?
    [ "$status" -ne {{ stopped }} ] || sleep 5
    exit "$status"
' gptjax {{ command | words }} || status=$?
# The same command goes on from there.
if [ "$status" -eq {{ stopped }} ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt {{ restarts }} ]; then
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "gptjax: restarted {{ restarts }} times, as often as the site allows" >&2
    fi
fi
exit "$status"
"""


def script(job: Job, site: Site) -> str:
    """The batch script; of workers each is a job of an array."""
    environment = variables(site.environment)
    tasks = job.processes if job.together else 1
    per_node = min(site.tasks_per_node, tasks)
    if tasks % per_node:
        raise UserError(
            f"--processes={tasks} is no multiple of the site's tasks_per_node={per_node}"
        )
    gpus = site.gpus_per_node // site.tasks_per_node  # of a task
    if job.together and gpus > 1:  # of which jax would take one a task
        environment |= {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(gpus)))}
    comment = COMMENT + whole(job.folder) if job.folder else None
    options = {
        "job-name": job.name,
        # By which `queued` knows it; a name in several lines is none of an option.
        "comment": comment if comment and comment.isprintable() else None,
        "partition": site.partition,
        "account": site.account,
        "time": site.time,
        "array": None if job.together else f"0-{job.processes - 1}",
        "nodes": tasks // per_node,
        "ntasks": tasks,
        "ntasks-per-node": per_node,
        "gpus-per-node": gpus * per_node or None,
        "signal": f"TERM@{site.notice}",
        "open-mode": "append",
    }
    return render(
        TEMPLATE,
        options=[
            *(f"--{name}={value}" for name, value in options.items() if value is not None),
            "--requeue",
            *site.options,
        ],
        environment=environment,
        setup=site.setup,
        srun=["--kill-on-bad-exit=1", *site.srun_options],
        command=job.command(site.program or this_program()),
        stopped=EXIT_STOPPED,
        restarts=site.restarts,
    )


def submit(job: Job, site: Site) -> int:
    return give(["sbatch"], script(job, site))


class Jobs(NamedTuple):
    """Those of one folder.

    Attributes:
        state: "running" if one does, else "queued" if one waits, else "".
        words: "Slurm job 17: pending, Priority", of the first.
    """

    state: str
    words: str


def queued() -> dict[str, Jobs]:
    """{folder of a run or of a study's runs: the jobs of this user that wait or run there}.

    Nothing where there is no squeue; where it does not answer, that is told.
    """
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--me", "--noheader", "--format=%i|%T|%R|%k"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",  # of a comment or a folder, as Python takes a file's name
            timeout=SQUEUE_SECONDS,
            check=False,
        )
        told = done.stderr.strip() or f"squeue ended with status {done.returncode}"
        failure = told if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure:
        print(f"Slurm's queue is not known: {failure.splitlines()[-1]}", file=sys.stderr)
        return {}
    jobs = defaultdict(list)
    for line in done.stdout.split("\n"):
        # What has other parts is of a comment in several lines, which is none of ours.
        match line.split("|", 3):
            case number, state, reason, comment if comment.startswith(COMMENT):
                jobs[comment.removeprefix(COMMENT)].append((number, state, reason.strip("()")))
    return {folder: _jobs(of_it) for folder, of_it in jobs.items()}


def _jobs(each: Sequence[tuple[str, str, str]]) -> Jobs:
    states = {state for _, state, _ in each} - ENDING
    words = [f"Slurm job {number}: {state.lower()}, {reason}" for number, state, reason in each]
    return Jobs(
        "running" if "RUNNING" in states else "queued" if states else "",
        "; ".join(words[:TOLD]) + f"; {len(words) - TOLD} more" * (len(words) > TOLD),
    )
