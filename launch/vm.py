"""The script of a job on a virtual machine made for it: it hands itself over to systemd, sets Python up, and runs the
job until it is done."""

import os
from collections.abc import Sequence

from launch.jobs import Code, Job, check_clean, check_remote, fill, folder_for, quote, quoted, until_done

HOME = "/var/lib/launch"
SAVING = 90  # seconds between systemd's SIGTERM and its SIGKILL, where the machine has them left

# systemd signals the script alone (KillMode=mixed), which tells the job: one that is told twice ends without saving.
_SCRIPT = """\
#!/usr/bin/env bash
set -u
export HOME="${HOME:-/root}"
folder=@HOME@/@NAME@
if [ "${1:-}" != run ]; then
  mkdir -p "$folder"
  cp "$0" "$folder/job.sh"
  @BROUGHT@
  exec systemd-run --collect --unit=@NAME@ --property=KillMode=mixed --property=TimeoutStopSec=@SAVING@ \\
    --property="StandardOutput=append:$folder/log" --property="StandardError=append:$folder/log" \\
    bash "$folder/job.sh" run
fi
cd "$folder" || exit 1
# Becomes the job, and so is what SIGTERM is sent to. What it makes once is kept for the next start; uv brings a Python,
# as the image's may be too old. If any of it fails it is tried again, whatever the exit code.
begin() {
  if ! test -e ready; then
    @FETCH@ &&
      rm -rf code venv tools &&
      mkdir code &&
      tar -xzf code.tar.gz -C code &&
      python3 -m pip install --quiet --target=tools uv &&
      PYTHONPATH=tools python3 -m uv venv --quiet --python=@PYTHON@ venv &&
      PYTHONPATH=tools python3 -m uv pip install --quiet --python=venv/bin/python -r code/@REQUIREMENTS@ gcsfs &&
      touch ready || exit 1
  fi
  cd code || exit 1
  exec ../venv/bin/python -m "$@"
}
@LOOP@
echo "ended with exit code $code"
gcloud storage cp "$folder/log" @LOG@"-$(hostname).log"
@AFTER@
exit "$code"
"""


def archive(jobs: Sequence[Job], code: Code, workdir: str) -> str:
    """Where the code's archive is to be, in the folder here for what is written.

    Raises:
      InputError: the code is not committed, or a job's workdir not in a bucket.
    """
    check_clean(code)
    check_remote(jobs)
    return os.path.join(folder_for(workdir, code), f"{code.commit}.tar.gz")


def script(
    job: Job, name: str, retries: int, *, python: str, requirements: str, brought: str = ":", fetch: str = ":",
    after: str = ":",
) -> str:  # fmt: skip
    """The script, for root; run without arguments it returns once the job is under way.

    Args:
      job: with its workdir in a bucket; the log is put beside it at the end.
      name: of letters, digits and dashes, for the service and its folder.
      python: the version, as in 3.12.
      requirements: the file of the code that lists them.
      brought: a line that puts the code at `$folder/code.tar.gz` at once; or else
      fetch: one that puts it at `code.tar.gz` when the job first starts.
      after: lines for the end, with the exit code in `$code`; `$stopping` is 1 if the machine was being shut down.
    """
    log = f"{job.workdir.rstrip('/')}/launch/{name}"
    loop = until_done(("begin", *job.command), retries)
    return fill(_SCRIPT, home=HOME, name=name, saving=str(SAVING), brought=brought, fetch=fetch, python=quote(python),
                requirements=quote(requirements), loop=loop, log=quote(log), after=after)  # fmt: skip


def flags(options: dict[str, object]) -> tuple[str, ...]:
    """`{"zone": "z", "spot": True, "project": None}` as `--zone=z --spot`, for gcloud."""
    given = {key: value for key, value in options.items() if value is not None and value is not False}
    return tuple(f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items())


def shell(options: dict[str, object]) -> str:
    """The same as words of bash."""
    return quoted(flags(options))
