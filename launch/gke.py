"""Kubernetes on Google Cloud: one JobSet a job, on slices of TPUs or on nodes with GPUs.

    --launcher=gke:image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:tpu=v5e:4x4:spot=true
    --launcher=gke:image=...:gpu=nvidia-h100-80gb:gpus=8:nodes=2

The cluster needs JobSet 0.6 or newer and Kubernetes 1.31. The image is built from the code at its commit, which is its
tag, and pushed. Workdirs must be in a bucket.

A pod that is stopped and has saved (exit code 75), or that Kubernetes evicts, as on a spot node that is taken away, is
started again and does not count; so are the others of its job, since all processes save and stop together. Exit codes 2
and 3 end the JobSet. Any other starts all its pods again, `retries` times. A spot node gives its pods 15 to 25 seconds
from the SIGTERM to save, whatever `grace` is.

Arguments go to the container as a list that no shell reads. To launch a job again: kubectl delete jobset NAME. The
manifests were held against Kubernetes's schemas and JobSet's, never applied to a cluster; nor was the image built.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.core.types import InputError
from launch.jobs import Code, Job, Submission, check_clean, check_remote, folder_for, label, staging

# As GKE's node labels have them.
ACCELERATORS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
PORT = 8476  # of process 0, where the others find it
MAIN = "main"
SPOT = "cloud.google.com/gke-spot"


@dataclasses.dataclass(frozen=True)
class Gke:
    """As `make` describes it.

    Attributes:
      pods: of one slice, or of the whole job on GPUs.
      slices: that one job trains on.
      resources: of a pod's container.
      selector: the labels of the nodes to run on.
      tpu: whether the pods learn of each other from GKE.
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

    def submission(self, jobs: Sequence[Job], code: Code, workdir: str, retries: int) -> Submission:
        check_clean(code)
        check_remote(jobs)
        folder = folder_for(workdir, code)
        image = f"{self.image}:{code.commit}" if self.build else self.image
        commands = []
        if self.build:
            there = os.path.join(folder, "code", code.commit)
            requirements = "requirements-tpu.txt" if self.tpu else "requirements-gpu.txt"
            commands = [
                staging(code, there),
                ("docker", "build", f"--tag={image}", f"--file={there}/launch/Dockerfile",
                 f"--build-arg=REQUIREMENTS={requirements}", there),
                ("docker", "push", image),
            ]  # fmt: skip
        written = {}
        for job in jobs:
            manifest = self.manifest(job, image, retries)
            path = os.path.join(folder, f"{manifest['metadata']['name']}.json")
            written[path] = json.dumps(manifest, indent=2) + "\n"
            commands.append(("kubectl", "apply", f"--filename={path}"))
        return Submission(written, tuple(commands))

    def manifest(self, job: Job, image: str, retries: int) -> dict[str, Any]:
        """The JobSet of a job."""
        name = label(job.name, job.workdir)
        template = {"spec": self.job(job, image, name)}
        labels = {"kueue.x-k8s.io/queue-name": self.queue} if self.queue else {}
        # A slice is a node pool: two of them must not share one.
        annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        together = self.tpu and self.pods > 1
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {
                "name": name,
                "namespace": self.namespace,
                "labels": {"app.kubernetes.io/part-of": "diffusion", **labels},
                "annotations": {"diffusion/workdir": job.workdir, **(annotations if together else {})},
            },
            "spec": {
                # A Job fails by its podFailurePolicy for exit codes 2 and 3 alone, or else by its backoffLimit.
                "failurePolicy": {
                    "maxRestarts": retries,
                    "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
                },
                "network": {"enableDNSHostnames": True, "subdomain": name},
                "replicatedJobs": [{"name": "w", "replicas": self.slices, "template": template}],
            },
        }

    def job(self, job: Job, image: str, name: str) -> dict[str, Any]:
        """The specification of the Job of one slice."""
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
        """The specification of a pod."""
        given = [literal(word) for word in job.command]
        if not self.tpu and self.pods > 1:
            given += [f"--coordinator={name}-w-0-0.{name}:{PORT}", f"--num_processes={self.pods}",
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
                    "args": given,
                    "resources": {"requests": dict(self.resources), "limits": dict(self.resources)},
                    "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
                }
            ],
            # Batches come from the data's workers through it, and a container's own has 64 MB.
            "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
        }
        if SPOT in self.selector:
            spec["tolerations"] = [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
        if self.service_account:
            spec["serviceAccountName"] = self.service_account
        return spec


def literal(word: str) -> str:
    """An argument in which Kubernetes replaces no `$(NAME)`: it reads `$$` as `$`."""
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
    """A JobSet a job.

    Args:
      image: where to push it, without a tag; with `build=false` one that is there, with its tag.
      build: whether to build and push it, from launch/Dockerfile.
      tpu: generation and topology of a slice, as in v5e:4x4 or v5p:2x2x4.
      chips: of one host; 4, or all if a slice has fewer. (A v5e or v6e of 2x4 may be one host of 8.)
      slices: that one job trains on.
      gpu: the nodes' cloud.google.com/gke-accelerator, as in nvidia-h100-80gb.
      gpus: of one node.
      nodes: with GPUs that one job trains on, a process each.
      spot: whether the nodes are cheap ones that may be taken away.
      cpus, memory: of one pod, as in 48 and 200Gi.
      grace: seconds from SIGTERM in which a pod can save.
      namespace, service_account: of Kubernetes; the account needs the bucket.
      queue: a LocalQueue of Kueue.

    Raises:
      InputError: neither TPUs nor GPUs, or both; a topology that is none; a number below one.
    """
    numbers = {"chips": chips, "slices": slices, "gpus": gpus, "nodes": nodes, "cpus": cpus, "grace": grace}
    for key, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(key, f"must be at least 1, got {number}")
    if (tpu is None) == (gpu is None):
        raise InputError("tpu", "or gpu must be given, one of them")
    if tpu:
        accelerator, topology, count = _slice(tpu)
        chips = chips or min(count, 4)
        if count % chips:
            raise InputError("chips", f"{chips} a host do not make up the {count} of {tpu}")
        pods, resources = count // chips, {"google.com/tpu": str(chips)}
        selector = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": topology}
    else:
        pods, resources = nodes, {"nvidia.com/gpu": str(gpus)}
        selector = {"cloud.google.com/gke-accelerator": gpu}
        if slices > 1:
            raise InputError("slices", "are of TPUs; give nodes")
    resources |= {key: str(value) for key, value in {"cpu": cpus, "memory": memory}.items() if value is not None}
    tools = ("git", "tar", "docker", "kubectl") if build else ("kubectl",)
    return Gke(image, build, pods, slices, resources, selector | ({SPOT: "true"} if spot else {}), tpu is not None,
               grace, namespace, service_account, queue, tools)  # fmt: skip


def _slice(text: str) -> tuple[str, str, int]:
    generation, _, topology = text.partition(":")
    if generation not in ACCELERATORS or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", topology):
        raise InputError("tpu", f"wants one of {', '.join(ACCELERATORS)} and a topology, as in v5e:4x4; got {text!r}")
    return ACCELERATORS[generation], topology, math.prod(map(int, topology.split("x")))
