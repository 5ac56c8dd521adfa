"""Launches jobs on Google Kubernetes Engine, one JobSet per job, on TPU slices or on nodes with GPUs.

    --launcher=gke:image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:tpu=v5e:4x4:spot=true
    --launcher=gke:image=...:gpu=nvidia-h100-80gb:gpus=8:nodes=2

Requires JobSet 0.6 or newer and Kubernetes 1.31. The image is built from the committed code, tagged with the commit and
pushed. Workdirs must be in a bucket.

A pod that exits with code 75 (preempted after saving), or that Kubernetes evicts, for example because its spot node is
reclaimed, is recreated without counting as a retry. The other pods of the job are recreated as well, since all
processes save and stop together. Exit codes 2 and 3 fail the JobSet. Any other exit code restarts all pods, at most
`retries` times. On a spot node a pod has 15 to 25 seconds from SIGTERM to save, whatever `grace` is.

Arguments are passed to the container as a list that no shell parses. To launch a job again, first run `kubectl delete
jobset NAME`. The manifests were validated against the schemas of Kubernetes and JobSet, but never applied to a cluster,
and the image was never built.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.core import checks
from diffusion.core.types import InputError
from launch.jobs import (
    Checkout,
    Job,
    JobSubmission,
    check_clean,
    check_in_bucket,
    dns_label,
    launch_folder,
    staging_command,
)

# Values of GKE's node label for the accelerator.
ACCELERATORS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
PORT = 8476  # on which process 0 listens for the others
MAIN = "main"
SPOT = "cloud.google.com/gke-spot"


@dataclasses.dataclass(frozen=True)
class Gke:
    """A launcher for Google Kubernetes Engine; see `make` for the other attributes.

    Attributes:
      pods: Number of pods per TPU slice, or of the whole job on GPUs.
      slices: Number of TPU slices per job.
      resources: Resources of a pod's container.
      selector: Labels of the nodes to run on.
      tpu: Whether the job runs on TPUs, where GKE provides the addresses of the other pods.
    """

    image: str
    build: bool
    pods: int
    slices: int
    resources: Mapping[str, str]
    selector: Mapping[str, str]
    tpu: bool
    grace: int
    namespace: str
    service_account: str | None
    queue: str | None
    tools: tuple[str, ...]

    def submission(self, jobs: Sequence[Job], code: Checkout, workdir: str, retries: int) -> JobSubmission:
        check_clean(code)
        check_in_bucket(jobs)
        folder = launch_folder(workdir, code)
        image = f"{self.image}:{code.commit}" if self.build else self.image
        commands = []
        if self.build:
            context = os.path.join(folder, "code", code.commit)
            requirements = "requirements-tpu.txt" if self.tpu else "requirements-gpu.txt"
            commands = [
                staging_command(code, context),
                ("docker", "build", f"--tag={image}", f"--file={context}/launch/Dockerfile",
                 f"--build-arg=REQUIREMENTS={requirements}", context),
                ("docker", "push", image),
            ]  # fmt: skip
        written = {}
        for job in jobs:
            manifest = self.manifest(job, image, retries)
            path = os.path.join(folder, f"{manifest['metadata']['name']}.json")
            written[path] = json.dumps(manifest, indent=2) + "\n"
            commands.append(("kubectl", "apply", f"--filename={path}"))
        return JobSubmission(written, tuple(commands))

    def manifest(self, job: Job, image: str, retries: int) -> dict[str, Any]:
        """Returns the JobSet manifest of a job."""
        name = dns_label(job.name, job.workdir)
        template = {"spec": self.job(job, image, name)}
        labels = {"kueue.x-k8s.io/queue-name": self.queue} if self.queue else {}
        # Each slice is a node pool, and two slices must not be placed in the same one.
        exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {
                "name": name,
                "namespace": self.namespace,
                "labels": {"app.kubernetes.io/part-of": "diffusion", **labels},
                "annotations": {"diffusion/workdir": job.workdir, **(exclusive if self.tpu and self.pods > 1 else {})},
            },
            "spec": {
                # Only exit codes 2 and 3 fail a Job by its podFailurePolicy; the others fail it by its backoffLimit.
                "failurePolicy": {
                    "maxRestarts": retries,
                    "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
                },
                "network": {"enableDNSHostnames": True, "subdomain": name},
                "replicatedJobs": [{"name": "w", "replicas": self.slices, "template": template}],
            },
        }

    def job(self, job: Job, image: str, name: str) -> dict[str, Any]:
        """Returns the specification of the Kubernetes Job of one slice."""
        return {
            "parallelism": self.pods,
            "completions": self.pods,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onExitCodes": {"containerName": MAIN, "operator": "In", "values": [2, 3]}},
                    {"action": "Ignore", "onExitCodes": {"containerName": MAIN, "operator": "In", "values": [75]}},
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {"spec": self.pod(job, image, name)},
        }

    def pod(self, job: Job, image: str, name: str) -> dict[str, Any]:
        """Returns the specification of a pod."""
        args = [escape(word) for word in job.command]
        if not self.tpu and self.pods > 1:
            args += [f"--coordinator={name}-w-0-0.{name}:{PORT}", f"--num_processes={self.pods}",
                     "--process_id=$(JOB_COMPLETION_INDEX)"]  # fmt: skip
        spec = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": self.grace,
            "nodeSelector": dict(self.selector),
            "containers": [
                {
                    "name": MAIN,
                    "image": image,
                    "command": ["python", "-m"],
                    "args": args,
                    "resources": {"requests": dict(self.resources), "limits": dict(self.resources)},
                    "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
                }
            ],
            # The data workers pass batches through shared memory, of which a container has only 64 MB by default.
            "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
        }
        if SPOT in self.selector:
            spec["tolerations"] = [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
        if self.service_account:
            spec["serviceAccountName"] = self.service_account
        return spec


def escape(word: str) -> str:
    """Escapes an argument so that Kubernetes does not expand `$(NAME)`: it reads `$$` as `$`."""
    return word.replace("$", "$$")


def make(
    image: str,
    build: bool = True,
    tpu: str | None = None,
    chips: int | None = None,
    slices: int = 1,
    gpu: str | None = None,
    gpus: int = 1,
    nodes: int = 1,
    spot: bool = False,
    cpus: int | None = None,
    memory: str | None = None,
    grace: int = 120,
    namespace: str = "default",
    service_account: str | None = None,
    queue: str | None = None,
) -> Gke:
    """Returns a launcher that starts each job as a JobSet.

    Args:
      image: Repository for the image, without a tag; with `build=false` an existing image with its tag.
      build: Whether to build the image from launch/Dockerfile and push it.
      tpu: TPU generation and topology of a slice, as in v5e:4x4 or v5p:2x2x4.
      chips: Number of chips per host; by default 4, or all chips of a smaller slice. (A v5e or v6e of 2x4 may be one
        host of 8.)
      slices: Number of TPU slices per job.
      gpu: Value of the nodes' label cloud.google.com/gke-accelerator, as in nvidia-h100-80gb.
      gpus: Number of GPUs per node.
      nodes: Number of GPU nodes per job, with one process each.
      spot: Whether to use cheaper nodes that may be preempted.
      cpus, memory: Resources per pod, as in 48 and 200Gi.
      grace: Seconds from SIGTERM that a pod has to save.
      namespace, service_account: Kubernetes namespace and service account. The account needs access to the bucket.
      queue: Name of a Kueue LocalQueue.

    Raises:
      InputError: Not exactly one of `tpu` and `gpu` is given, the topology is invalid, or a number is below 1.
    """
    checks.at_least(1, chips=chips, slices=slices, gpus=gpus, nodes=nodes, cpus=cpus, grace=grace)
    if (tpu is None) == (gpu is None):
        raise InputError("tpu", "exactly one of tpu and gpu must be given")
    if tpu:
        accelerator, topology, count = _slice(tpu)
        chips = chips or min(count, 4)
        if count % chips:
            raise InputError("chips", f"must divide the {count} chips of {tpu}, got {chips}")
        pods, resources = count // chips, {"google.com/tpu": str(chips)}
        selector = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": topology}
    else:
        pods, resources = nodes, {"nvidia.com/gpu": str(gpus)}
        selector = {"cloud.google.com/gke-accelerator": gpu}
        if slices > 1:
            raise InputError("slices", "applies only to TPUs; set nodes for GPUs")
    resources |= {key: str(value) for key, value in {"cpu": cpus, "memory": memory}.items() if value is not None}
    tools = ("git", "tar", "docker", "kubectl") if build else ("kubectl",)
    return Gke(image, build, pods, slices, resources, selector | ({SPOT: "true"} if spot else {}), tpu is not None,
               grace, namespace, service_account, queue, tools)  # fmt: skip


def _slice(text: str) -> tuple[str, str, int]:
    generation, _, topology = text.partition(":")
    if generation not in ACCELERATORS or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", topology):
        raise InputError("tpu", f"must be one of {', '.join(ACCELERATORS)} and a topology, as in v5e:4x4; got {text!r}")
    return ACCELERATORS[generation], topology, math.prod(map(int, topology.split("x")))
