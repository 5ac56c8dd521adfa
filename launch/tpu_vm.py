"""Launches jobs on Cloud TPU virtual machines, one queued resource per job.

    --launcher=tpu_vm:type=v5litepod-16:zone=us-west4-a:runtime=v2-alpha-tpuv5-lite:project=NAME:spot=true

The launcher requests a queued resource for each job and waits for it, which may take hours. It then sets up every host
of the slice with the code, a Python environment with `requirements-tpu.txt` and the job as a systemd service. The log
is in /var/lib/launch/NAME/log on every host, and is copied to WORKDIR/launch at the end. Workdirs must be in a bucket.

A preempted spot resource becomes SUSPENDED: its machines are deleted and do not come back. The same command with
`:again=true` deletes the resource and requests a new one; the run then resumes from its last checkpoint. With
`delete=true` a resource deletes itself when its job is done, so that it costs nothing afterwards. This requires
permission for the service account of the machine. Otherwise delete it with:

    gcloud compute tpus queued-resources delete NAME --zone=ZONE --force

The scripts were tested with substitutes for gcloud and systemd, but never on a TPU.
"""

import dataclasses
import os
import re
from collections.abc import Sequence

from diffusion.core.types import InputError
from launch import vm
from launch.jobs import Checkout, Job, JobSubmission, archive_commands, dns_label, fill_template, quote

# How much of the number in a slice's type belongs to one host. Slices with a number of up to 8 have a single host.
PER_HOST = {"v2": 8, "v3": 8, "v4": 8, "v5litepod": 4, "v5p": 8, "v6e": 4}
POLL_INTERVAL = 30  # seconds

_START = """\
#!/usr/bin/env bash
# Waits for every resource and starts its job as soon as it is active.
set -u
start() {
  failures=0
  while true; do
    if state=$(gcloud compute tpus queued-resources describe "$1" --format='value(state.state)' @LOCATION@); then
      failures=0
    else
      state= failures=$((failures + 1))
    fi
    case "$state" in
      ACTIVE) break ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "$1 is $state; launch it again with again=true" >&2
        return 1
        ;;
    esac
    if [ "$failures" -ge 10 ]; then return 1; fi
    sleep @INTERVAL@
  done
  gcloud compute tpus tpu-vm scp @ARCHIVE@ "$1:$1.tar.gz" --worker=all --quiet @LOCATION@ &&
    gcloud compute tpus tpu-vm scp @FOLDER@/"$1.sh" "$1:$1.sh" --worker=all --quiet @LOCATION@ &&
    gcloud compute tpus tpu-vm ssh "$1" --command="sudo bash $1.sh" --worker=all --quiet @LOCATION@
}
failed=0 starts=()
for name in @NAMES@; do
  start "$name" &
  starts+=($!)
done
for pid in "${starts[@]}"; do wait "$pid" || failed=1; done
exit "$failed"
"""

_RESOURCES = ("gcloud", "compute", "tpus", "queued-resources")


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """A launcher for TPU virtual machines; see `make` for the attributes."""

    type: str
    zone: str
    runtime: str
    project: str | None
    spot: bool
    service_account: str | None
    network: str | None
    again: bool
    delete: bool
    python: str
    tools: tuple[str, ...] = ("git", "gcloud")

    def submission(self, jobs: Sequence[Job], code: Checkout, workdir: str, retries: int) -> JobSubmission:
        archive = vm.archive_path(jobs, code, workdir)
        folder = os.path.dirname(archive)
        names = [dns_label(job.name, job.workdir) for job in jobs]
        written, requests = {}, []
        for job, name in zip(jobs, names, strict=True):
            distributed = ("--distributed",) if num_hosts(self.type) > 1 else ()
            job = dataclasses.replace(job, command=(*job.command, *distributed))
            written[os.path.join(folder, f"{name}.sh")] = self.script(job, name, retries)
            if self.again:
                requests.append((*_RESOURCES, "delete", name, "--force", "--quiet", *vm.flags(self._location)))
            requests.append(
                (*_RESOURCES, "create", name, *vm.flags(self._machine | {"node-id": name} | self._location))
            )
        start = os.path.join(folder, f"start-{dns_label(jobs[0].name, ' '.join(names))}.sh")
        written[start] = fill_template(
            _START, location=vm.shell_flags(self._location), interval=str(POLL_INTERVAL), archive=quote(archive),
            folder=quote(folder), names=" ".join(names),
        )  # fmt: skip
        return JobSubmission(written, (*archive_commands(code, archive), *requests, ("bash", start)))

    def script(self, job: Job, name: str, retries: int) -> str:
        """Returns the script that every host of a slice runs."""
        # Every host requests the deletion. The first request suffices, and the others fail.
        delete = (f'if [ "$stopping" = 0 ]; then\n  gcloud {" ".join(_RESOURCES[1:])} delete {name} --force --async '
                  f'--quiet {vm.shell_flags(self._location)}\nfi')  # fmt: skip
        return vm.script(job, name, retries, python=self.python, requirements="requirements-tpu.txt",
                         copy_code='cp "${0%.sh}.tar.gz" "$folder/code.tar.gz"',
                         cleanup=delete if self.delete else ":")  # fmt: skip

    @property
    def _location(self) -> dict[str, object]:
        return {"zone": self.zone, "project": self.project}

    @property
    def _machine(self) -> dict[str, object]:
        return {"accelerator-type": self.type, "runtime-version": self.runtime, "spot": self.spot,
                "service-account": self.service_account, "network": self.network, "quiet": True}  # fmt: skip


def num_hosts(type: str) -> int:
    """Returns the number of hosts of a slice. Raises InputError for an unknown type."""
    family, _, number = type.rpartition("-")
    if family not in PER_HOST or not re.fullmatch("[1-9][0-9]{0,4}", number):
        raise InputError("type", f"must be one of {', '.join(PER_HOST)} and a number, as in v5litepod-16; got {type!r}")
    return 1 if int(number) <= 8 else -(-int(number) // PER_HOST[family])


def make(
    type: str,
    zone: str,
    runtime: str,
    project: str | None = None,
    spot: bool = False,
    service_account: str | None = None,
    network: str | None = None,
    again: bool = False,
    delete: bool = False,
    python: str = "3.12",
) -> TpuVm:
    """Returns a launcher that starts each job on one TPU slice.

    Args:
      type: Type of the slice, as Google Cloud spells it: v4-32, v5litepod-16, v5p-8, v6e-256.
      zone: Zone of the slice.
      runtime: Software version of the hosts: v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, tpu-ubuntu2204-base, ...
      project: Project; gcloud's default if not given.
      spot: Whether to use a cheaper slice that may be preempted.
      service_account: Service account of the hosts, which needs access to the bucket; the project's default if not
        given.
      network: Network of the hosts.
      again: Whether to delete the resources of these jobs first, as after a preemption.
      delete: Whether a resource deletes itself when its job is done.
      python: Python version.

    Raises:
      InputError: The type of slice is unknown.
    """
    num_hosts(type)
    return TpuVm(type, zone, runtime, project, spot, service_account, network, again, delete, python)
