"""What all launchers share: a job, the code it runs, what is written and run to start it, and how that is done.

A launcher turns jobs into a `Submission`, a pure value: `--dry_run` prints it, and all that happens is in it.
Arguments of jobs may hold anything; they go through `quote` into scripts, and as lists everywhere else.
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
LONGEST_NAME, LONGEST_LABEL, HASH = 120, 40, 8
FOLDER = "launch"  # in the workdir of several runs: what launchers write
# Beside the folders of a sweep's runs.
TAKEN = (FOLDER, "compiled", "lock", "points.json", "results.csv", "results.html", "sweep", "sweep.csv", "sweep.json",
         "sweep.png")  # fmt: skip
PAUSE = 30  # seconds before a job that crashed is started again
TOOLS = {
    "docker": "install Docker, or give build=false and an image with a tag",
    "gcloud": "install the Google Cloud CLI",
    "git": "install git",
    "kubectl": "install kubectl, and point it at the cluster",
    "sbatch": "log in to a node of the Slurm cluster",
    "tar": "install tar",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
      name: as `check_name` has it.
      command: what follows `python -m`.
      workdir: its own folder, as it stands in the command.
    """

    name: str
    command: tuple[str, ...]
    workdir: str


@dataclasses.dataclass(frozen=True)
class Code:
    """The code at hand.

    Attributes:
      root: the checkout; relative paths start there.
      commit: that is checked out, in full.
      clean: whether nothing was changed since.
    """

    root: str
    commit: str
    clean: bool


@dataclasses.dataclass(frozen=True)
class Submission:
    """All that starting some jobs does: `files`, from path to text, are written, then `commands` are run in order."""

    files: Mapping[str, str]
    commands: tuple[tuple[str, ...], ...]


class Launcher(Protocol):
    """Attributes: `tools`, the programs that its submissions need."""

    tools: tuple[str, ...]

    def submission(self, jobs: Sequence[Job], code: Code, workdir: str, retries: int) -> Submission:
        """What would start the jobs.

        Args:
          jobs: of different names.
          code: what they run; it is staged at its commit.
          workdir: the folder that theirs are in; scripts and code go there, unless it is in a bucket.
          retries: how often each may crash and be started again.

        Raises:
          InputError: the code has changes that no commit has, or the jobs cannot run there.
        """
        ...


def check_name(name: str, field: str) -> str:
    """The name of a run, which is a folder's and a part of others' names. Raises InputError naming `field`."""
    if not re.fullmatch(r"[A-Za-z0-9_=,+][A-Za-z0-9._=,+-]*", name) or len(name) > LONGEST_NAME:
        raise InputError(field, f"{name!r}: wants letters, digits and ._=,+- alone, {LONGEST_NAME} at most, and not . "
                         "or - in front")  # fmt: skip
    if name in TAKEN:
        raise InputError(field, f"{name!r} is a sweep's own; give another")
    return name


def label(name: str, unique: str, longest: int = LONGEST_LABEL) -> str:
    """A name for Kubernetes and Google Cloud: lower-case letters, digits and dashes, a letter first, `longest` at most.

    It ends with a hash of `unique`, so two jobs share one only if they are the same.
    """
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not readable[:1].isalpha():
        readable = f"run-{readable}"
    digest = hashlib.sha256(unique.encode()).hexdigest()[:HASH]
    return f"{readable[: longest - HASH - 1].strip('-')}-{digest}"


def code_here(folder: str = ".") -> Code:
    """The checkout that a folder is in. Raises InputError if there is none, or no commit in it."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise InputError("git", f"is not installed; {TOOLS['git']}") from None
        except subprocess.CalledProcessError as error:
            problem = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
            raise InputError("git", f"cannot tell which code this is ({problem}); launch from a checkout") from None
        return done.stdout

    root = git("rev-parse", "--show-toplevel").rstrip("\n")
    return Code(root, git("rev-parse", "HEAD").strip(), clean=not git("status", "--porcelain").strip())


def check_clean(code: Code) -> None:
    """Raises InputError if there are changes: a cluster gets the code as it was committed."""
    if not code.clean:
        raise InputError(code.root, "has changes that are in no commit, so no job would run them; commit first")


def build_launcher(text: str) -> Launcher:
    """The launcher of `--launcher=NAME:keyword=value:keyword=value`. Raises InputError if there is none, or it takes no
    such keywords."""
    spec = overrides.part(text, "--launcher")
    name = spec.pop("name")
    if name not in launchers():
        raise InputError("--launcher", f"no {name!r}; one of: {', '.join(launchers())}")
    return call(importlib.import_module(f"launch.{name}").make, spec, field="launcher")


def launchers() -> list[str]:
    """Their names: of the files beside this one that hold a `make`."""
    found = []
    for file in sorted(os.listdir(HERE)):
        if file.endswith(".py"):
            with open(os.path.join(HERE, file), encoding="utf-8") as source:
                if any(line.startswith("def make(") for line in source):
                    found.append(file.removesuffix(".py"))
    return found


def submit(submission: Submission, tools: Iterable[str], dry_run: bool = False) -> None:
    """Writes the files and runs the commands, whose output is shown; a dry run prints both and does nothing.

    Raises:
      InputError: a tool is missing, before anything is written; a file cannot be written; a command fails: those
        after it are not run.
    """
    if dry_run:
        print(shown(submission))
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


def shown(submission: Submission) -> str:
    """A submission for people to read: every file under a line with its path, then the commands as a shell has them."""
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
    """A word of bash that stands for exactly this text, on one line."""
    if text.isprintable():
        return shlex.quote(text)
    # Control characters are spelled out: sbatch takes no script with a carriage return before a line's end.
    spelled = {"\\": "\\\\", "'": "\\'"}
    return "$'" + "".join(spelled.get(c) or (c if c.isprintable() else _octal(c)) for c in text) + "'"


def _octal(character: str) -> str:
    if character == "\0":
        raise InputError("command", "holds a NUL character, which no program can be given")
    return "".join(f"\\{byte:03o}" for byte in character.encode(errors="surrogateescape"))


def quoted(command: Iterable[str]) -> str:
    """A command as one line of bash."""
    return " ".join(map(quote, command))


def absolute(path: str, code: Code) -> str:
    """A path that means the same from every folder; those in a bucket do already."""
    return path if files.is_remote(path) else os.path.normpath(os.path.join(code.root, path))


def settled(job: Job, code: Code) -> Job:
    """A job that does not depend on the folder it is started in, as far as its workdir goes."""
    there = absolute(job.workdir, code)
    command = (f"--workdir={there}" if word == f"--workdir={job.workdir}" else word for word in job.command)
    return Job(job.name, tuple(command), there)


def check_remote(jobs: Iterable[Job]) -> None:
    """Raises InputError for a workdir that is not in a bucket, where machines and their disks come and go."""
    for job in jobs:
        if not job.workdir.startswith("gs://"):
            raise InputError("--workdir", f"must be in a bucket, gs://..., since the machine's disk goes with it; "
                             f"got {job.workdir}")  # fmt: skip


def folder_for(workdir: str, code: Code) -> str:
    """A folder here for what a launcher writes: in the workdir, or, if that is in a bucket, under `runs/launch`."""
    if files.is_remote(workdir):
        return os.path.join(code.root, "runs", FOLDER, label(workdir.partition("://")[2], workdir))
    return os.path.join(absolute(workdir, code), FOLDER)


_STAGE = (
    'test -e "$3" || { rm -rf "$3.partial" && mkdir -p "$3.partial" && '
    'git -C "$1" archive "$2" | tar -x -C "$3.partial" && mv "$3.partial" "$3"; }'
)


def staging(code: Code, folder: str) -> tuple[str, ...]:
    """The command that lays the code out in a folder, unless it is there already: no job finds half of it."""
    return ("bash", "-euo", "pipefail", "-c", _STAGE, "stage", code.root, code.commit, folder)


def packing(code: Code, path: str) -> tuple[tuple[str, ...], ...]:
    """The commands that write the code to a .tar.gz."""
    archive = ("git", "-C", code.root, "archive", "--format=tar.gz", f"--output={path}", code.commit)
    return ("mkdir", "-p", os.path.dirname(path)), archive


_UNTIL_DONE = """\
crashes=0 stopping=0 child= told= interrupted=0 code=1
stop() {
  stopping=1 interrupted=1
  if [ -n "$child" ]; then told=$child; kill -TERM "$child" 2>/dev/null; fi
}
trap stop TERM INT
while [ "$stopping" = 0 ]; do
  @COMMAND@ &
  child=$!
  # Told between the last two lines, the trap did not know whom to tell.
  if [ "$stopping" = 1 ] && [ "$told" != "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
  while true; do
    interrupted=0
    wait "$child"
    code=$?
    # A signal ends `wait` before the child has ended.
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
    echo "exit code $code: crashed $crashes times, and is not started again" >&2
    break
  fi
  echo "exit code $code: starts again in @PAUSE@ s ($crashes of @RETRIES@ times)" >&2
  sleep @PAUSE@ &
  wait $!
done
"""


def until_done(command: Iterable[str], retries: int, pause: int = PAUSE) -> str:
    """Lines of bash, for a script with `set -u`, that run a command until it is done.

    Exit codes 0, 2 and 3 are final. 75, stopped and saved, starts it again at once and does not count; any other does
    so after `pause` seconds, at most `retries` times. SIGTERM goes on to the command, so that it can save, and then it
    is not started again. Afterwards `$code` is its last exit code, and `$stopping` is 1 if it was told to stop.
    """
    return fill(_UNTIL_DONE, command=quoted(command), retries=str(retries), pause=str(pause))


def fill(template: str, **parts: str) -> str:
    """A text with `@PART@` replaced by `part`, all at once: what a part holds is left as it is."""
    return re.sub("@([A-Z]+)@", lambda found: parts[found[1].lower()], template)
