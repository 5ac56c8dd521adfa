"""What all launchers share: jobs, the checkout they run, and the files and commands that start them.

A launcher turns jobs into a `JobSubmission`, which is a plain value: it lists everything that will happen, and
`--dry_run` prints it. The arguments of jobs may contain any characters. They are passed as lists wherever possible and
through `quote` in scripts.
"""

import dataclasses
import hashlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from diffusion.core import files
from diffusion.core.build import call
from diffusion.core.types import InputError
from diffusion.pipelines import overrides

HERE = os.path.dirname(os.path.abspath(__file__))
MAX_NAME_LENGTH, MAX_LABEL_LENGTH, HASH_LENGTH = 120, 40, 8
LAUNCH_FOLDER = "launch"  # subfolder of a workdir for the scripts, logs and code that launchers write
# Names that a sweep uses itself, next to the folders of its runs.
RESERVED_NAMES = (LAUNCH_FOLDER, "compiled", "lock", "points.json", "results.csv", "results.html", "sweep", "sweep.csv",
                  "sweep.json", "sweep.png")  # fmt: skip
RETRY_DELAY = 30  # seconds before a crashed job is restarted
TOOLS = {
    "docker": "install Docker, or give build=false and an image with a tag",
    "gcloud": "install the Google Cloud CLI",
    "git": "install git",
    "kubectl": "install kubectl and configure it for the cluster",
    "sbatch": "log in to a node of the Slurm cluster",
    "tar": "install tar",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A job to start.

    Attributes:
      name: A name that `check_name` accepts.
      command: The words after `python -m`.
      workdir: The job's own folder, spelled as in the command.
    """

    name: str
    command: tuple[str, ...]
    workdir: str


@dataclasses.dataclass(frozen=True)
class Checkout:
    """A git checkout of the code.

    Attributes:
      root: Its folder. Relative paths refer to it.
      commit: The full hash of the checked-out commit; "" for a folder that is in no checkout.
      clean: Whether there are no uncommitted changes.
    """

    root: str
    commit: str
    clean: bool


@dataclasses.dataclass(frozen=True)
class JobSubmission:
    """The files to write (path to text) and then the commands to run, in order, that start a set of jobs."""

    files: Mapping[str, str]
    commands: tuple[tuple[str, ...], ...]


class Launcher(Protocol):
    """Starts jobs on a cluster.

    Attributes:
      tools: The programs that its submissions need.
    """

    tools: tuple[str, ...]

    def submission(self, jobs: Sequence[Job], code: Checkout, workdir: str, retries: int) -> JobSubmission:
        """Returns the submission that starts the jobs.

        Args:
          jobs: Jobs with different names.
          code: The code that they run, at its commit.
          workdir: The folder that contains the workdirs of the jobs. Scripts and code are placed there, unless it is
            in a bucket.
          retries: How often each job is restarted after a crash.

        Raises:
          InputError: The checkout has uncommitted changes, or the jobs cannot run there.
        """
        ...


def check_name(name: str, field: str) -> str:
    """Returns the name of a run, which also names its folder. Raises InputError for `field` if it is not allowed."""
    if not re.fullmatch(r"[A-Za-z0-9_=,+][A-Za-z0-9._=,+-]*", name) or len(name) > MAX_NAME_LENGTH:
        raise InputError(field, f"a name must consist of letters, digits and ._=,+- (no leading dot or dash), at most "
                         f"{MAX_NAME_LENGTH}, got {name!r}")  # fmt: skip
    if name in RESERVED_NAMES:
        raise InputError(field, f"the name {name!r} is reserved for a file of the sweep; choose another name")
    return name


def dns_label(name: str, unique: str, longest: int = MAX_LABEL_LENGTH) -> str:
    """Returns a name that Kubernetes and Google Cloud accept.

    It consists of lower-case letters, digits and dashes, starts with a letter and has at most `longest` characters. It
    ends with a hash of `unique`, so that different jobs get different labels.
    """
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not readable[:1].isalpha():
        readable = f"run-{readable}"
    digest = hashlib.sha256(unique.encode()).hexdigest()[:HASH_LENGTH]
    return f"{readable[: longest - HASH_LENGTH - 1].strip('-')}-{digest}"


def current_code(folder: str = ".") -> Checkout:
    """Returns the git checkout that contains a folder, or the folder itself, without a commit, if it is in none.

    Raises:
      InputError: See `current_checkout`.
    """
    try:
        return current_checkout(folder)
    except InputError as error:
        if "not a git repository" not in error.problem:
            raise
        return Checkout(os.path.abspath(folder), "", clean=False)


def current_checkout(folder: str = ".") -> Checkout:
    """Returns the git checkout that contains a folder. Raises InputError if there is none, or it has no commit."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True,
                                  env={**os.environ, "LC_ALL": "C"})  # fmt: skip
        except FileNotFoundError:
            raise InputError("git", f"is not installed; {TOOLS['git']}") from None
        except subprocess.CalledProcessError as error:
            problem = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
            raise InputError("git", f"cannot determine the commit ({problem}); launch from a checkout") from None
        return done.stdout

    root = git("rev-parse", "--show-toplevel").rstrip("\n")
    return Checkout(root, git("rev-parse", "HEAD").strip(), clean=not git("status", "--porcelain").strip())


def check_clean(code: Checkout) -> None:
    """Raises InputError if there is no commit, whose code a cluster receives, or if there are uncommitted changes."""
    if not code.commit:
        raise InputError(code.root, "is in no git checkout, whose code the jobs receive; launch from a checkout")
    if not code.clean:
        raise InputError(code.root, "has uncommitted changes, which the jobs would not contain; commit them first")


def build_launcher(text: str) -> Launcher:
    """Returns the launcher for `--launcher=NAME:keyword=value:keyword=value`.

    Raises:
      InputError: The launcher is unknown, or does not accept these keywords.
    """
    spec = overrides.part(text, "--launcher")
    name = spec.pop("name")
    if name not in launchers():
        raise InputError("--launcher", f"must be one of {', '.join(launchers())}; got {name!r}")
    return call(importlib.import_module(f"launch.{name}").make, spec, field="launcher")


def launchers() -> list[str]:
    """Returns the names of all launchers: the modules of this package that define `make`."""
    found = []
    for file in sorted(os.listdir(HERE)):
        if file.endswith(".py"):
            with open(os.path.join(HERE, file), encoding="utf-8") as source:
                if any(line.startswith("def make(") for line in source):
                    found.append(file.removesuffix(".py"))
    return found


def submit(submission: JobSubmission, tools: Iterable[str], dry_run: bool = False) -> None:
    """Writes the files and runs the commands, showing their output. A dry run only prints both.

    Raises:
      InputError: A tool is missing (checked before anything is written), a file cannot be written, or a command fails
        (the commands after it are not run).
    """
    if dry_run:
        print(format_submission(submission))
        return
    check_tools(tools)
    for path, text in submission.files.items():
        files.make_folder(os.path.dirname(path), "--workdir")
        with files.replace(path) as file:
            file.write(text)
    for command in submission.commands:
        _run(command)


def check_tools(tools: Iterable[str]) -> None:
    """Raises InputError if a program is not on the PATH."""
    for tool in tools:
        if shutil.which(tool) is None:
            raise InputError(tool, f"is not on the PATH; {TOOLS.get(tool, 'install it')}")


def format_submission(submission: JobSubmission) -> str:
    """Returns a submission as text: each file below a line with its path, then the commands in shell syntax."""
    texts = [f"==> {path} <==\n{text.rstrip()}\n" for path, text in submission.files.items()]
    return "\n".join([*texts, *(f"$ {shlex.join(command)}" for command in submission.commands)])


def _run(command: tuple[str, ...]) -> None:
    print(f"$ {shlex.join(command)}", flush=True)
    last = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
    if process.returncode:
        raise InputError(shlex.join(command), f"failed with exit code {process.returncode}" + f": {last}" * bool(last))


def quote(text: str) -> str:
    """Returns a single-line bash word that expands to exactly this text."""
    if text.isprintable():
        return shlex.quote(text)
    # Control characters are escaped because sbatch rejects scripts with a carriage return at the end of a line.
    escapes = {"\\": "\\\\", "'": "\\'"}
    return "$'" + "".join(escapes.get(c) or (c if c.isprintable() else _octal(c)) for c in text) + "'"


def _octal(character: str) -> str:
    if character == "\0":
        raise InputError("command", "contains a NUL character, which cannot be passed to a program")
    return "".join(f"\\{byte:03o}" for byte in character.encode(errors="surrogateescape"))


def quote_command(command: Iterable[str]) -> str:
    """Returns a command as one line of bash."""
    return " ".join(map(quote, command))


def absolute_path(path: str, code: Checkout) -> str:
    """Returns the absolute form of a path relative to the checkout. Paths in a bucket are unchanged."""
    return path if files.is_remote(path) else os.path.normpath(os.path.join(code.root, path))


def with_absolute_workdir(job: Job, code: Checkout) -> Job:
    """Returns the job with an absolute workdir, so that it may start in any folder."""
    path = absolute_path(job.workdir, code)
    command = (f"--workdir={path}" if word == f"--workdir={job.workdir}" else word for word in job.command)
    return Job(job.name, tuple(command), path)


def check_in_bucket(jobs: Iterable[Job]) -> None:
    """Raises InputError if a workdir is not in a bucket, as required where machines and their disks are temporary."""
    for job in jobs:
        if not job.workdir.startswith("gs://"):
            problem = "must be in a bucket (gs://...), since the disk is deleted together with the machine"
            raise InputError("--workdir", f"{problem}; got {job.workdir}")


def launch_folder(workdir: str, code: Checkout) -> str:
    """Returns a local folder for a launcher's files: in the workdir, or under `runs/launch` if that is in a bucket."""
    if files.is_remote(workdir):
        return os.path.join(code.root, "runs", LAUNCH_FOLDER, dns_label(workdir.partition("://")[2], workdir))
    return os.path.join(absolute_path(workdir, code), LAUNCH_FOLDER)


_STAGE = (
    'test -e "$3" || { rm -rf "$3.partial" && mkdir -p "$3.partial" && '
    'git -C "$1" archive "$2" | tar -x -C "$3.partial" && mv "$3.partial" "$3"; }'
)


def staging_command(code: Checkout, folder: str) -> tuple[str, ...]:
    """Returns the command that exports the commit to a folder, unless it exists. The folder appears only complete."""
    return ("bash", "-euo", "pipefail", "-c", _STAGE, "stage", code.root, code.commit, folder)


def archive_commands(code: Checkout, path: str) -> tuple[tuple[str, ...], ...]:
    """Returns the commands that write the commit to a .tar.gz file."""
    archive = ("git", "-C", code.root, "archive", "--format=tar.gz", f"--output={path}", code.commit)
    return ("mkdir", "-p", os.path.dirname(path)), archive


_RETRY_LOOP = """\
crashes=0 stopping=0 child= signalled= interrupted=0 code=1
stop() {
  stopping=1 interrupted=1
  if [ -n "$child" ]; then signalled=$child; kill -TERM "$child" 2>/dev/null; fi
}
trap stop TERM INT
while [ "$stopping" = 0 ]; do
  @COMMAND@ &
  child=$!
  # If a signal arrived between the last two lines, the trap did not know the child yet.
  if [ "$stopping" = 1 ] && [ "$signalled" != "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
  while true; do
    interrupted=0
    wait "$child"
    code=$?
    # A signal interrupts `wait` before the child has ended.
    if [ "$interrupted" = 0 ] || [ "$code" -le 128 ]; then break; fi
  done
  child=
  case "$code" in
    0 | 2 | 3) break ;;
    75) continue ;;
  esac
  if [ "$stopping" = 1 ]; then break; fi
  crashes=$((crashes + 1))
  if [ "$crashes" -gt @RETRIES@ ]; then
    echo "exit code $code: no retries left (limit @RETRIES@)" >&2
    break
  fi
  echo "exit code $code: restarting in @DELAY@ s (retry $crashes of @RETRIES@)" >&2
  sleep @DELAY@ &
  wait $!
done
"""


def retry_loop(command: Iterable[str], retries: int, delay: int = RETRY_DELAY) -> str:
    """Returns lines of bash, for a script with `set -u`, that run a command until it is done.

    Exit codes 0, 2 and 3 are final. After exit code 75 (preempted after saving) the command restarts at once, which
    does not count as a retry. After any other exit code it restarts after `delay` seconds, at most `retries` times.
    SIGTERM is forwarded to the command, so that it can save, and ends the loop. Afterwards `$code` is the last exit
    code, and `$stopping` is 1 if a signal ended the loop.
    """
    return fill_template(_RETRY_LOOP, command=quote_command(command), retries=str(retries), delay=str(delay))


def fill_template(template: str, **parts: str) -> str:
    """Replaces each `@PART@` of a template by the keyword `part`, in one pass: inserted text is not expanded again."""
    return re.sub("@([A-Z]+)@", lambda found: parts[found[1].lower()], template)
