"""Helpers of the launcher tests: a checkout, jobs with difficult arguments, golden files and substitute programs."""

import json
import os
import pathlib
import subprocess
import sys

from launch.jobs import Checkout, Job, format_submission

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "launch"
CODE = Checkout("/checkout", "0123456789abcdef0123456789abcdef01234567", clean=True)
# If a script executed a part of one of these arguments, a file named `canary` would appear.
AWKWARD = (
    "--config.note=two words",
    "--config.note=it's",
    '--config.note="quoted"',
    "--config.note=$(touch canary) $HOME ${PATH} $$ $(JOB_COMPLETION_INDEX) $$(A)",
    "--config.note=`touch canary`",
    "--config.note=a\nb\r\n1\ttouch canary",
    "--config.note='; touch canary; '",
    "--config.note=back\\slash \\n",
    "--config.note=*?[a] ~ !! # & | < > é \u00a0 \x7f \u2028",
    "--config.note=@RETRIES@ @COMMAND@ %A %j",
    "",
)


def awkward_job(workdir):
    return Job("awkward", ("experiments.train", *AWKWARD, f"--workdir={workdir}"), workdir)


def sweep_jobs(root):
    """Returns two jobs like those of a sweep."""
    return [
        Job(
            f"lr={value}",
            ("experiments.train", "--config=configs/digits.py", f"--config.optimizer.learning_rate={value}",
             f"--workdir={root}/lr={value}"),
            f"{root}/lr={value}",
        )
        for value in ("0.001", "0.01")
    ]  # fmt: skip


def check_golden(name, submission):
    """Compares a submission with a golden file. With GOLDEN=write in the environment, the file is written first."""
    path, text = GOLDEN / name, format_submission(submission) + "\n"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


def parses(text):
    """Checks that bash can parse a script."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return True


def make_program(folder, name, body):
    """Creates a Python program that appends its arguments to NAME.calls and then runs `body`."""
    path = folder / name
    path.write_text(
        f"#!{sys.executable} -S\nimport json, os, pathlib, shutil, signal, subprocess, sys, time\n"
        f"HERE = pathlib.Path({str(folder)!r})\n"
        f"with open(HERE / {f'{name}.calls'!r}, 'a') as calls:\n"
        f"    calls.write(json.dumps(sys.argv[1:]) + '\\n')\n{body}\n"
    )
    path.chmod(0o755)
    return path


def calls(folder, name):
    """Returns the arguments of each call of a program."""
    path = folder / f"{name}.calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def set_exit_codes(folder, *codes):
    """Sets the exit codes of the next calls of a program whose body is EXITS."""
    (folder / "codes").write_text(json.dumps(codes))


EXITS = """
codes = json.loads((HERE / "codes").read_text())
(HERE / "codes").write_text(json.dumps(codes[1:]))
sys.exit(codes[0])
"""

# Waits for SIGTERM, takes a moment to save, and exits as preempted.
WAITS = """
def stop(*_):
    with open(HERE / "signals", "a") as file:
        file.write("SIGTERM\\n")
    time.sleep(0.3)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(HERE / "ready").write_text(str(os.getpid()))
time.sleep(20)
"""


def signal_when_ready(folder, pid_file):
    """Starts a process that sends SIGTERM to the process ID in `pid_file` once a job that WAITS is ready."""
    waiting = f"until [ -s {folder}/ready ] && [ -s {folder}/{pid_file} ]; do sleep 0.05; done"
    return subprocess.Popen(["bash", "-c", f"{waiting}; kill -TERM $(cat {folder}/{pid_file})"])


def make_checkout(folder):
    """Creates a git repository with one commit in an existing folder."""
    (folder / "experiments").mkdir()
    (folder / "experiments" / "train.py").write_text("print('a file of the code')\n")
    (folder / ".gitignore").write_text("runs/\n")
    git = ["git", "-C", str(folder), "-c", "user.name=name", "-c", "user.email=mail"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=first"]):
        subprocess.run([*git, *command], check=True)
    return folder
