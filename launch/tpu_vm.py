"""Cloud TPU virtual machines by queued resources, one resource a job.

    --launcher=tpu_vm:type=v5litepod-16:zone=us-west4-a:runtime=v2-alpha-tpuv5-lite:project=NAME:spot=true

Each job's resource is asked for, and when it is there (which may take hours; the launcher waits) every host of the
slice gets the code, a Python with `requirements-tpu.txt`, and the job as a systemd service. Its log is in
/var/lib/launch/NAME/log on every host, and at the end in WORKDIR/launch too. Workdirs must be in a bucket.

A spot resource that is preempted becomes SUSPENDED: its machines are deleted, and nobody brings them back. The same
command with `:again=true` deletes the resource and asks anew, and the run goes on from its last checkpoint.
`delete=true` has a resource delete itself when its job is done, so that nothing is left to pay for; the machine's
service account must be allowed to. Without it:

    gcloud compute tpus queued-resources delete NAME --zone=ZONE --force

The scripts were run with stand-ins for gcloud and systemd, never on a TPU.
"""

import dataclasses
import os
import re
from collections.abc import Sequence

from diffusion.core.types import InputError
from launch import vm
from launch.jobs import Code, Job, Submission, fill, label, packing, quote

# What the number in a type counts, for one host of a slice that has several; up to 8 there is one.
PER_HOST = {"v2": 8, "v3": 8, "v4": 8, "v5litepod": 4, "v5p": 8, "v6e": 4}
POLL = 30  # seconds

_START = """\
#!/usr/bin/env bash
# Waits for every resource, and starts its job as soon as it is there.
set -u
start() {
  unknown=0
  while true; do
    if state=$(gcloud compute tpus queued-resources describe "$1" --format='value(state.state)' @PLACE@); then
      unknown=0
    else
      state= unknown=$((unknown + 1))
    fi
    case "$state" in
      ACTIVE) break ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "$1 is $state; launch it again with again=true" >&2
        return 1
        ;;
    esac
    if [ "$unknown" -ge 10 ]; then return 1; fi
    sleep @POLL@
  done
  gcloud compute tpus tpu-vm scp @ARCHIVE@ "$1:$1.tar.gz" --worker=all --quiet @PLACE@ &&
    gcloud compute tpus tpu-vm scp @FOLDER@/"$1.sh" "$1:$1.sh" --worker=all --quiet @PLACE@ &&
    gcloud compute tpus tpu-vm ssh "$1" --command="sudo bash $1.sh" --worker=all --quiet @PLACE@
}
failed=0 starts=()
for name in @NAMES@; do
  start "$name" &
  starts+=($!)
done
for pid in "${starts[@]}"; do wait "$pid" || failed=1; done
exit "$failed"
"""


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """As `make` describes it."""

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

    def submission(self, jobs: Sequence[Job], code: Code, workdir: str, retries: int) -> Submission:
        archive = vm.archive(jobs, code, workdir)
        folder = os.path.dirname(archive)
        names = [label(job.name, job.workdir) for job in jobs]
        written, asked = {}, []
        for job, name in zip(jobs, names, strict=True):
            together = ("--distributed",) if hosts(self.type) > 1 else ()
            job = dataclasses.replace(job, command=(*job.command, *together))
            written[os.path.join(folder, f"{name}.sh")] = self.script(job, name, retries)
            if self.again:
                asked.append((*_RESOURCES, "delete", name, "--force", "--quiet", *vm.flags(self._place)))
            asked.append((*_RESOURCES, "create", name, *vm.flags(self._wanted | {"node-id": name} | self._place)))
        start = os.path.join(folder, f"start-{label(jobs[0].name, ' '.join(names))}.sh")
        written[start] = fill(_START, place=vm.shell(self._place), poll=str(POLL), archive=quote(archive),
                              folder=quote(folder), names=" ".join(names))  # fmt: skip
        return Submission(written, (*packing(code, archive), *asked, ("bash", start)))

    def script(self, job: Job, name: str, retries: int) -> str:
        # Several hosts ask for it; one of them is enough, and the others' requests fail.
        delete = (f'if [ "$stopping" = 0 ]; then\n  gcloud {" ".join(_RESOURCES[1:])} delete {name} --force --async '
                  f'--quiet {vm.shell(self._place)}\nfi')  # fmt: skip
        return vm.script(job, name, retries, python=self.python, requirements="requirements-tpu.txt",
                         brought='cp "${0%.sh}.tar.gz" "$folder/code.tar.gz"',
                         after=delete if self.delete else ":")  # fmt: skip

    @property
    def _place(self) -> dict[str, object]:
        return {"zone": self.zone, "project": self.project}

    @property
    def _wanted(self) -> dict[str, object]:
        return {"accelerator-type": self.type, "runtime-version": self.runtime, "spot": self.spot,
                "service-account": self.service_account, "network": self.network, "quiet": True}  # fmt: skip


_RESOURCES = ("gcloud", "compute", "tpus", "queued-resources")


def hosts(type: str) -> int:
    """How many machines a slice has. Raises InputError for a type that is not known."""
    family, _, number = type.rpartition("-")
    if family not in PER_HOST or not re.fullmatch("[1-9][0-9]{0,4}", number):
        raise InputError("type", f"wants one of {', '.join(PER_HOST)} and a number, as in v5litepod-16; got {type!r}")
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
    """One slice a job.

    Args:
      type: of the slice, as Google has it: v4-32, v5litepod-16, v5p-8, v6e-256.
      zone: where.
      runtime: the machines' software: v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, tpu-ubuntu2204-base, ...
      project: gcloud's own if not given.
      spot: whether it is a cheap one that may be taken away.
      service_account: of the machines, if not the default; it needs the bucket.
      network: theirs.
      again: delete the resources of these jobs first, as after a preemption.
      delete: have a resource delete itself when its job is done.
      python: the version.

    Raises:
      InputError: a type of slice that is not known.
    """
    hosts(type)
    return TpuVm(type, zone, runtime, project, spot, service_account, network, again, delete, python)
