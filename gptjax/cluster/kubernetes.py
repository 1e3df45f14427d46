"""Kubernetes: an Indexed Job whose pods meet at the DNS name of the first, or a JobSet."""

from __future__ import annotations

import dataclasses

from gptjax.cluster.job import Job, check_site, give, pairs, render, variables
from gptjax.config import UserError, choose

PORT = 8476  # at which the processes of a jax program meet, on the first pod


@dataclasses.dataclass(frozen=True)
class Site:
    """A cluster, as a site file tells it.

    Attributes:
        image: of the container; holds gptjax.
        kind: a row of KINDS. A JobSet, where the cluster has it, starts all pods anew when one
            fails; a Job each pod for itself.
        namespace, service_account: of the pods; None is the cluster's default.
        queue: of Kueue; None without.
        folder: where the command runs; None is the image's own.
        program: what runs gptjax in the image.
        bucket: where folders of runs lie that are no whole paths; "" leaves them as they are.
        environment: "NAME=VALUE".
        limits: of a pod, "nvidia.com/gpu=8", "google.com/tpu=4", "memory=64Gi".
        node_selector: "cloud.google.com/gke-tpu-topology=4x4".
        volumes: "CLAIM=/path", persistent volume claims and where they are mounted.
        notice: seconds from SIGTERM to SIGKILL, to save in.
        restarts: of the whole, or of each worker, before the job counts as failed.
    """

    image: str
    kind: str = "job"
    namespace: str | None = None
    service_account: str | None = None
    queue: str | None = None
    folder: str | None = None
    program: tuple[str, ...] = ("python", "launch.py")
    bucket: str = ""
    environment: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    node_selector: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    notice: int = 120
    restarts: int = 20

    def __post_init__(self) -> None:
        check_site(self, notice=1, restarts=0)
        if not self.program:
            raise UserError('program must name what runs gptjax, such as ["python", "launch.py"]')
        choose(KINDS, self.kind, "kind")
        for field in ("limits", "node_selector", "volumes"):
            pairs(getattr(self, field), field)
        paths = [*pairs(self.volumes, "volumes").values()]
        if len(set(paths)) < len(paths):
            raise UserError(f"volumes has two at one path: {', '.join(self.volumes)}")


JOB_SPEC = """\
parallelism: {{ processes }}
completions: {{ processes }}
completionMode: Indexed
{{ backoff }}
podFailurePolicy:
  rules:
    # What its message explains stays a mistake, however often it is tried.
    - action: {{ "FailJob" if together else "FailIndex" }}
      onExitCodes: {operator: In, values: [1, 2]}
    # Moved away by the cluster, which is nobody's failure.
    - action: Ignore
      onPodConditions: [{type: DisruptionTarget, status: "True"}]
template:
  spec:
    restartPolicy: Never
    terminationGracePeriodSeconds: {{ site.notice }}
{% if together and site.kind == "job" %}
    subdomain: {{ name | yaml }}
{% endif %}
{% if site.service_account is not none %}
    serviceAccountName: {{ site.service_account | yaml }}
{% endif %}
{% if node_selector %}
    nodeSelector: {{ node_selector | yaml }}
{% endif %}
    containers:
      - name: gptjax
        image: {{ site.image | yaml }}
        command: {{ command | yaml }}
{% if site.folder is not none %}
        workingDir: {{ site.folder | yaml }}
{% endif %}
        env:
          # So that the last words reach the log.
          - {name: PYTHONUNBUFFERED, value: "1"}
{% for variable, value in environment.items() %}
          - {name: {{ variable | yaml }}, value: {{ value | yaml }}}
{% endfor %}
{% if limits %}
        resources: {limits: {{ limits | yaml }}}
{% endif %}
{% if volumes %}
        volumeMounts:
{% for path in volumes.values() %}
          - {name: volume-{{ loop.index0 }}, mountPath: {{ path | yaml }}}
{% endfor %}
    volumes:
{% for claim in volumes %}
      - name: volume-{{ loop.index0 }}
        persistentVolumeClaim: {claimName: {{ claim | yaml }}}
{% endfor %}
{% endif %}
"""

METADATA = """\
metadata:
  name: {{ name | yaml }}
{% if site.namespace is not none %}
  namespace: {{ site.namespace | yaml }}
{% endif %}
"""

QUEUE = """\
{% if site.queue is not none %}
  labels: {kueue.x-k8s.io/queue-name: {{ site.queue | yaml }}}
{% endif %}
"""

JOB = f"""\
{{% if together %}}
apiVersion: v1
kind: Service
{METADATA}spec:
  clusterIP: None
  # They meet before any of them is ready.
  publishNotReadyAddresses: true
  selector: {{batch.kubernetes.io/job-name: {{{{ name | yaml }}}}}}
  ports: [{{name: jax, port: {PORT}}}]
---
{{% endif %}}
apiVersion: batch/v1
kind: Job
{METADATA}{QUEUE}spec:
  {{{{ job_spec | indent(2) }}}}
"""

JOBSET = f"""\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
{METADATA}{QUEUE}spec:
  network: {{enableDNSHostnames: true, publishNotReadyAddresses: true}}
  failurePolicy:
    maxRestarts: {{{{ site.restarts if together else 0 }}}}
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: gptjax
      replicas: 1
      template:
        spec:
          {{{{ job_spec | indent(10) }}}}
"""

# The template, and the DNS name of the pod with index 0, which the names of job and service make.
KINDS = {"job": (JOB, "{0}-0.{0}"), "jobset": (JOBSET, "{0}-gptjax-0-0.{0}")}


def manifest(job: Job, site: Site) -> str:
    """What `kubectl create` takes. The same command has the same name, and does not run twice."""
    template, first = KINDS[site.kind]
    name = f"{job.name}-{job.digest}"
    meet = f"--distributed={first.format(name)}:{PORT},{job.processes},"
    command = [*map(_literal, job.command(site.program, meet))]
    if job.together:
        command[-1] += "$(JOB_COMPLETION_INDEX)"
        restarts = 0 if site.kind == "jobset" else site.restarts * job.processes
    values = {
        "site": site,
        "name": name,
        "processes": job.processes,
        "together": job.together,
        "command": command,
        # Pods of one program end together, each counts.
        "backoff": f"backoffLimit: {restarts}"
        if job.together
        else f"backoffLimitPerIndex: {site.restarts}",
        "environment": {n: _literal(v) for n, v in variables(site.environment).items()},
        "limits": pairs(site.limits, "limits"),
        "node_selector": pairs(site.node_selector, "node_selector"),
        "volumes": pairs(site.volumes, "volumes"),
    }
    return render(template, job_spec=render(JOB_SPEC, **values).rstrip("\n"), **values)


def _literal(word: str) -> str:
    """A word in which Kubernetes puts no variable, as it does for $(NAME)."""
    return word.replace("$", "$$")


def submit(job: Job, site: Site) -> int:
    return give(["kubectl", "create", "--filename=-"], manifest(job, site))
