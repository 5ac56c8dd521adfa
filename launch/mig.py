"""GPUs on Compute Engine: for each job a managed instance group of one machine, which brings back one that is lost.

    --launcher=mig:machine=a2-highgpu-1g:zone=us-central1-a:image_family=FAMILY:bucket=gs://BUCKET:spot=true

The code goes to the bucket; the machine's startup script fetches it, makes a Python with `requirements-gpu.txt` and
runs the job as a systemd service. A spot machine has some 30 seconds from the SIGTERM to save; the group makes another
as soon as there is one, and the run goes on. When the job is done, or has crashed too often, the machine sets its
group's size to 0; its service account must be allowed to. Its log is in /var/lib/launch/NAME/log, and at the end in
WORKDIR/launch. Workdirs must be in a bucket. To launch a job again, delete what is left of it first:

    gcloud compute instance-groups managed delete NAME --zone=ZONE
    gcloud compute instance-templates delete NAME

One job is one machine: for several, use `gke` or `slurm`. The scripts were run with stand-ins for gcloud and systemd,
never on Compute Engine.
"""

import dataclasses
import os
from collections.abc import Sequence

from diffusion.core.types import InputError
from launch import vm
from launch.jobs import Code, Job, Submission, label, packing


@dataclasses.dataclass(frozen=True)
class Mig:
    """As `make` describes it; `template` holds gcloud's options for the machine."""

    template: tuple[str, ...]
    place: tuple[str, ...]
    project: tuple[str, ...]
    bucket: str
    python: str
    tools: tuple[str, ...] = ("git", "gcloud")

    def submission(self, jobs: Sequence[Job], code: Code, workdir: str, retries: int) -> Submission:
        archive = vm.archive(jobs, code, workdir)
        folder = os.path.dirname(archive)
        staged = f"{self.bucket.rstrip('/')}/code/{code.commit}.tar.gz"
        written = {}
        commands = [*packing(code, archive), ("gcloud", "storage", "cp", archive, staged)]
        for job in jobs:
            name = label(job.name, job.workdir)
            path = os.path.join(folder, f"{name}.sh")
            written[path] = self.script(job, name, staged, retries)
            compute = ("gcloud", "compute")
            # The characters in front say what parts the pairs, since a path may hold the usual comma.
            startup = f"--metadata-from-file=^|^startup-script={path}"
            commands += [
                (*compute, "instance-templates", "create", name, *self.template, startup, *self.project, "--quiet"),
                (*compute, "instance-groups", "managed", "create", name, "--size=1", f"--template={name}", *self.place,
                 *self.project, "--quiet"),
            ]  # fmt: skip
        return Submission(written, tuple(commands))

    def script(self, job: Job, name: str, staged: str, retries: int) -> str:
        resize = vm.quoted(("gcloud", "compute", "instance-groups", "managed", "resize", name, "--size=0", *self.place,
                            *self.project, "--quiet"))  # fmt: skip
        return vm.script(job, name, retries, python=self.python, requirements="requirements-gpu.txt",
                         fetch=f"gcloud storage cp {vm.quote(staged)} code.tar.gz",
                         after=f'if [ "$stopping" = 0 ]; then {resize}; fi')  # fmt: skip


def make(
    machine: str,
    zone: str,
    image_family: str,
    bucket: str,
    image_project: str = "deeplearning-platform-release",
    gpu: str | None = None,
    gpus: int = 1,
    project: str | None = None,
    spot: bool = False,
    disk: int = 200,
    service_account: str | None = None,
    python: str = "3.12",
) -> Mig:
    """One machine a job.

    Args:
      machine: its type, as in a2-highgpu-1g.
      zone: where.
      image_family, image_project: the image; it must hold gcloud, and the GPU's driver or a way to it.
      bucket: gs://NAME/FOLDER for the code.
      gpu, gpus: kind and number of GPUs to add, where the type of machine brings none: n1 with nvidia-tesla-t4.
      project: gcloud's own if not given.
      spot: whether it is a cheap one that may be taken away.
      disk: gigabytes.
      service_account: of the machine, if not the default.
      python: the version.

    Raises:
      InputError: a bucket that is none, or a number below one.
    """
    if not bucket.startswith("gs://"):
        raise InputError("bucket", f"must be gs://NAME, got {bucket!r}")
    for key, number in {"gpus": gpus, "disk": disk}.items():
        if number < 1:
            raise InputError(key, f"must be at least 1, got {number}")
    template = {
        "machine-type": machine, "accelerator": gpu and f"type={gpu},count={gpus}", "image-family": image_family,
        "image-project": image_project, "boot-disk-size": f"{disk}GB", "maintenance-policy": "TERMINATE",
        "provisioning-model": "SPOT" if spot else None, "instance-termination-action": "STOP" if spot else None,
        "metadata": "install-nvidia-driver=True", "scopes": "cloud-platform", "service-account": service_account,
    }  # fmt: skip
    return Mig(vm.flags(template), vm.flags({"zone": zone}), vm.flags({"project": project}), bucket, python)
