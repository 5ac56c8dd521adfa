"""The script of a job on a virtual machine that is created for it.

The script installs itself as a systemd service, sets up Python and runs the job until it is done.
"""

import os
from collections.abc import Sequence

from launch.jobs import (
    Checkout,
    Job,
    check_clean,
    check_in_bucket,
    fill_template,
    launch_folder,
    quote,
    quote_command,
    retry_loop,
)

HOME = "/var/lib/launch"
STOP_TIMEOUT = 90  # seconds between systemd's SIGTERM and SIGKILL, if the machine has that long

# With KillMode=mixed, systemd signals only the script, which forwards the signal to the job. Otherwise the job would
# receive two signals, and the second one makes it exit without saving.
_SCRIPT = """\
#!/usr/bin/env bash
set -u
export HOME="${HOME:-/root}"
folder=@HOME@/@NAME@
if [ "${1:-}" != run ]; then
  mkdir -p "$folder"
  cp "$0" "$folder/job.sh"
  @COPYCODE@
  exec systemd-run --collect --unit=@NAME@ --property=KillMode=mixed --property=TimeoutStopSec=@STOPTIMEOUT@ \\
    --property="StandardOutput=append:$folder/log" --property="StandardError=append:$folder/log" \\
    bash "$folder/job.sh" run
fi
cd "$folder" || exit 1
# Replaces itself with the job, which then receives SIGTERM directly. The environment is set up once and reused by later
# starts. uv installs Python, because the version of the machine's image may be too old. If the setup fails, the exit
# code is 1, so that it is retried.
start_job() {
  if ! test -e ready; then
    @FETCHCODE@ &&
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
@CLEANUP@
exit "$code"
"""


def archive_path(jobs: Sequence[Job], code: Checkout, workdir: str) -> str:
    """Returns the local path for the archive of the code. The other files of the launcher go to the same folder.

    Raises:
      InputError: The code has uncommitted changes, or the workdir of a job is not in a bucket.
    """
    check_clean(code)
    check_in_bucket(jobs)
    return os.path.join(launch_folder(workdir, code), f"{code.commit}.tar.gz")


def script(
    job: Job, name: str, retries: int, *, python: str, requirements: str, copy_code: str = ":", fetch_code: str = ":",
    cleanup: str = ":",
) -> str:  # fmt: skip
    """Returns the script, to be run as root. Without arguments it returns once the service has started.

    Args:
      job: A job with its workdir in a bucket. The log is copied next to the workdir at the end.
      name: Name of the service and its folder. It consists of letters, digits and dashes.
      retries: How often the job is restarted after a crash.
      python: Python version, as in 3.12.
      requirements: Name of the requirements file in the checkout.
      copy_code: A line that copies the code to `$folder/code.tar.gz` when the service is installed; alternatively,
      fetch_code: a line that downloads the code to `code.tar.gz` when the job first starts.
      cleanup: Lines that run at the end, with the exit code in `$code`. `$stopping` is 1 if the machine is shutting
        down.
    """
    log = f"{job.workdir.rstrip('/')}/launch/{name}"
    loop = retry_loop(("start_job", *job.command), retries)
    return fill_template(
        _SCRIPT, home=HOME, name=name, stoptimeout=str(STOP_TIMEOUT), copycode=copy_code, fetchcode=fetch_code,
        python=quote(python), requirements=quote(requirements), loop=loop, log=quote(log), cleanup=cleanup,
    )  # fmt: skip


def flags(options: dict[str, object]) -> tuple[str, ...]:
    """Returns gcloud flags: `{"zone": "z", "spot": True, "project": None}` becomes `--zone=z --spot`."""
    given = {key: value for key, value in options.items() if value is not None and value is not False}
    return tuple(f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items())


def shell_flags(options: dict[str, object]) -> str:
    """Returns gcloud flags as bash words."""
    return quote_command(flags(options))
