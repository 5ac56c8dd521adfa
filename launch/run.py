"""Starts one job, here or on a cluster: what stands after `--` is the job and its flags.

python -m launch.run [--launcher=local:num_processes=2] [--retries=3] [--dry_run] -- \\
    train --config=configs/digits.py --workdir=runs/digits

Here it is started again until it is done, and its exit code is that of this command. A cluster gets it, and keeps it.
"""

import os
import sys

from absl import flags

from diffusion.core.types import InputError
from experiments import cli
from launch import jobs
from launch.local import Local
from launch.pool import until_done

LAUNCHER = flags.DEFINE_string("launcher", "local", "Where: NAME:keyword=value, as in slurm:nodes=2:gpus_per_node=8.")
RETRIES = flags.DEFINE_integer("retries", 3, "How often it may crash and be started again.")
NAME = flags.DEFINE_string("name", None, "What the job is called. Default: its workdir's last folder.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be written and run, and do nothing.")


def main(command: list[str]) -> None:
    job = job_of(command, NAME.value)
    if RETRIES.value < 0:
        raise InputError("--retries", f"must be at least 0, got {RETRIES.value}")
    if job.command[0] == "experiments.train":  # what it would refuse is refused here
        cli.config_of(word for word in job.command if word.lstrip("-").startswith(("config=", "config.")))
    launcher = jobs.build_launcher(LAUNCHER.value)
    if not isinstance(launcher, Local):
        submission = launcher.submission([job], jobs.code_here(), os.path.dirname(job.workdir) or ".", RETRIES.value)
        jobs.submit(submission, launcher.tools, DRY_RUN.value)
    elif DRY_RUN.value:
        print(launcher.shown(job))
    else:
        sys.exit(until_done(launcher, [job.command], RETRIES.value))


def job_of(command: list[str], name: str | None) -> jobs.Job:
    """The job of a command line such as `train --config=... --workdir=...`."""
    if not command:
        raise InputError("--", "must come before the job and its flags, as in: -- train --config=... --workdir=...")
    there = sorted(file.removesuffix(".py") for file in os.listdir("experiments") if _is_job(file))
    if command[0] not in there:
        raise InputError("--", f"no job {command[0]!r}; one of: {', '.join(there)}")
    found = [word.partition("=")[2] for word in command if word.startswith("--workdir=")]
    if not found:
        raise InputError("--workdir", "is missing among the job's flags")
    workdir = found[-1]
    name = jobs.check_name(name or os.path.basename(workdir.rstrip("/")), "--name")
    return jobs.Job(name, (f"experiments.{command[0]}", *command[1:]), workdir)


def _is_job(file: str) -> bool:
    if not file.endswith(".py"):
        return False
    with open(os.path.join("experiments", file), encoding="utf-8") as source:
        return '__name__ == "__main__"' in source.read()


if __name__ == "__main__":
    cli.run(main, together=False, takes_rest=True)
