"""Starts one job, on this machine or on a cluster. The job and its flags follow `--`.

python -m launch.run [--launcher=local:num_processes=2] [--retries=3] [--dry_run] -- \\
    train --config=configs/digits.py --workdir=runs/digits

On this machine the job is restarted until it is done, and this command returns its exit code. On a cluster the job is
submitted, and the cluster restarts it.
"""

import os
import sys

from absl import flags

from diffusion.core import checks
from diffusion.core.types import InputError
from experiments import cli
from launch import jobs
from launch.local import Local
from launch.pool import run_until_done

LAUNCHER = flags.DEFINE_string(
    "launcher", "local", "Where the job runs: NAME:keyword=value, as in slurm:nodes=2:gpus_per_node=8."
)
RETRIES = flags.DEFINE_integer("retries", 3, "How often the job is restarted after a crash.")
NAME = flags.DEFINE_string("name", None, "Name of the job. Default: the last folder of its workdir.")
EXPERIMENTS = os.path.dirname(os.path.abspath(cli.__file__))
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print what would be written and run.")


def main(command: list[str]) -> None:
    job = parse_job(command, NAME.value)
    checks.at_least(0, **{"--retries": RETRIES.value})
    if job.command[0] == "experiments.train":  # reports an invalid config before anything is submitted
        cli.config_of(word for word in job.command if word.lstrip("-").startswith(("config=", "config.")))
    launcher = jobs.build_launcher(LAUNCHER.value)
    if not isinstance(launcher, Local):
        parent = os.path.dirname(job.workdir) or "."
        submission = launcher.submission([job], jobs.current_code(), parent, RETRIES.value)
        jobs.submit(submission, launcher.tools, DRY_RUN.value)
    elif DRY_RUN.value:
        print(launcher.format_command(job))
    else:
        sys.exit(run_until_done(launcher, [job.command], RETRIES.value))


def parse_job(command: list[str], name: str | None) -> jobs.Job:
    """Returns the job of a command line such as `train --config=... --workdir=...`.

    Args:
      command: The words of the command line.
      name: Name of the job; by default the last folder of its workdir.

    Raises:
      InputError: The job is unknown, has no workdir or has an invalid name.
    """
    if not command:
        raise InputError("--", "must precede the job and its flags, as in: -- train --config=... --workdir=...")
    known = sorted(file.removesuffix(".py") for file in os.listdir(EXPERIMENTS) if _is_job(file))
    if command[0] not in known:
        raise InputError("--", f"the job must be one of {', '.join(known)}; got {command[0]!r}")
    workdirs = [word.partition("=")[2] for word in command if word.startswith("--workdir=")]
    if not workdirs:
        raise InputError("--workdir", "is missing in the flags of the job")
    workdir = os.path.expanduser(workdirs[-1])
    command = [f"--workdir={workdir}" if word == f"--workdir={workdirs[-1]}" else word for word in command]
    name = jobs.check_name(name or os.path.basename(workdir.rstrip("/")), "--name")
    return jobs.Job(name, (f"experiments.{command[0]}", *command[1:]), workdir)


def _is_job(file: str) -> bool:
    if not file.endswith(".py"):
        return False
    with open(os.path.join(EXPERIMENTS, file), encoding="utf-8") as source:
        return '__name__ == "__main__"' in source.read()


if __name__ == "__main__":
    cli.run(main, together=False, takes_rest=True)
