"""Launches jobs on GPU machines of Compute Engine, one managed instance group of a single machine per job.

    --launcher=mig:machine=a2-highgpu-1g:zone=us-central1-a:image_family=FAMILY:bucket=gs://BUCKET:spot=true

The instance group recreates the machine after a preemption or failure. The code is uploaded to the bucket. The startup
script of the machine downloads it, creates a Python environment with `requirements-gpu.txt` and runs the job as a
systemd service. A spot machine has about 30 seconds from SIGTERM to save; the group recreates it when capacity is
available, and the run resumes. When the job is done, or has crashed too often, the machine resizes its group to 0, for
which its service account needs permission. The log is in /var/lib/launch/NAME/log, and is copied to WORKDIR/launch at
the end. Workdirs must be in a bucket. Before launching a job again, delete what remains of it:

    gcloud compute instance-groups managed delete NAME --zone=ZONE
    gcloud compute instance-templates delete NAME

A job runs on a single machine; for several machines use `gke` or `slurm`. The scripts were tested with substitutes for
gcloud and systemd, but never on Compute Engine.
"""

import dataclasses
import os
from collections.abc import Sequence

from diffusion.core import checks
from diffusion.core.types import InputError
from launch import vm
from launch.jobs import Checkout, Job, JobSubmission, archive_commands, dns_label, quote, quote_command


@dataclasses.dataclass(frozen=True)
class Mig:
    """A launcher for managed instance groups; see `make`.

    Attributes:
      template: gcloud flags that describe the machine.
      location: gcloud flags that select the zone.
      project: gcloud flags that select the project.
      bucket: Folder in a bucket for the code.
      python: Python version.
    """

    template: tuple[str, ...]
    location: tuple[str, ...]
    project: tuple[str, ...]
    bucket: str
    python: str
    tools: tuple[str, ...] = ("git", "gcloud")

    def submission(self, jobs: Sequence[Job], code: Checkout, workdir: str, retries: int) -> JobSubmission:
        archive = vm.archive_path(jobs, code, workdir)
        folder = os.path.dirname(archive)
        uploaded = f"{self.bucket.rstrip('/')}/code/{code.commit}.tar.gz"
        written = {}
        commands = [*archive_commands(code, archive), ("gcloud", "storage", "cp", archive, uploaded)]
        for job in jobs:
            name = dns_label(job.name, job.workdir)
            path = os.path.join(folder, f"{name}.sh")
            written[path] = self.script(job, name, uploaded, retries)
            compute = ("gcloud", "compute")
            # The prefix ^|^ changes the separator of the pairs, because a path may contain the default comma.
            startup = f"--metadata-from-file=^|^startup-script={path}"
            commands += [
                (*compute, "instance-templates", "create", name, *self.template, startup, *self.project, "--quiet"),
                (*compute, "instance-groups", "managed", "create", name, "--size=1", f"--template={name}",
                 *self.location, *self.project, "--quiet"),
            ]  # fmt: skip
        return JobSubmission(written, tuple(commands))

    def script(self, job: Job, name: str, uploaded: str, retries: int) -> str:
        """Returns the startup script of a job's machine, which downloads the code from `uploaded`."""
        resize = quote_command(("gcloud", "compute", "instance-groups", "managed", "resize", name, "--size=0",
                                *self.location, *self.project, "--quiet"))  # fmt: skip
        return vm.script(job, name, retries, python=self.python, requirements="requirements-gpu.txt",
                         fetch_code=f"gcloud storage cp {quote(uploaded)} code.tar.gz",
                         cleanup=f'if [ "$stopping" = 0 ]; then {resize}; fi')  # fmt: skip


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
    """Returns a launcher that starts each job on one machine.

    Args:
      machine: Machine type, as in a2-highgpu-1g.
      zone: Zone of the machine.
      image_family, image_project: The machine's image. It must contain gcloud, and the GPU driver or an installer
        for it.
      bucket: Folder for the code, gs://NAME/FOLDER.
      gpu, gpus: Type and number of GPUs to attach to a machine type without GPUs, as in n1 with nvidia-tesla-t4.
      project: Project; gcloud's default if not given.
      spot: Whether to use a cheaper machine that may be preempted.
      disk: Size of the disk in gigabytes.
      service_account: Service account of the machine; the project's default if not given.
      python: Python version.

    Raises:
      InputError: The bucket is invalid, or a number is below 1.
    """
    if not bucket.startswith("gs://"):
        raise InputError("bucket", f"must be gs://NAME, got {bucket!r}")
    checks.at_least(1, gpus=gpus, disk=disk)
    template = {
        "machine-type": machine, "accelerator": gpu and f"type={gpu},count={gpus}", "image-family": image_family,
        "image-project": image_project, "boot-disk-size": f"{disk}GB", "maintenance-policy": "TERMINATE",
        "provisioning-model": "SPOT" if spot else None, "instance-termination-action": "STOP" if spot else None,
        "metadata": "install-nvidia-driver=True", "scopes": "cloud-platform", "service-account": service_account,
    }  # fmt: skip
    return Mig(vm.flags(template), vm.flags({"zone": zone}), vm.flags({"project": project}), bucket, python)
