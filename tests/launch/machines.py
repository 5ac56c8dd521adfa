"""Substitutes for Google Cloud and its machines: the scripts of a job run locally, in folders."""

import os
import shutil

import pytest

from launch import vm
from launch.jobs import current_checkout, submit
from tests.launch.fakes import make_checkout, make_program, parses

# `storage cp` and `scp` copy files, `ssh` runs a command, and `describe` prints the states listed in a file. Other
# calls are only recorded.
GCLOUD = """
def local_path(path):
    return str(HERE.parent / "bucket" / path.removeprefix("gs://")) if path.startswith("gs://") else path
words = [word for word in sys.argv[1:] if not word.startswith("--")]
machine = HERE.parent / "machine"
if "cp" in words:
    source, target = map(local_path, words[-2:])
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    shutil.copy(source, target)
elif "scp" in words:
    shutil.copy(words[-2], machine / words[-1].partition(":")[2])
elif "ssh" in words:
    command = next(word.partition("=")[2] for word in sys.argv if word.startswith("--command="))
    sys.exit(subprocess.run(["bash", "-c", command], cwd=machine).returncode)
elif "describe" in words:
    states = (HERE / "states").read_text().split()
    later = HERE / f"states.{os.getpid()}"  # two jobs may ask at once: the file is replaced atomically
    later.write_text(" ".join(states[1:] or states))
    later.rename(HERE / "states")
    num_calls = (HERE / "gcloud.calls").read_text().count("describe")
    state = states[0] if num_calls < 30 else "ACTIVE"  # tests never wait forever
    if state == "FAILS":
        sys.exit(1)
    print(state)
"""
SUDO = "sys.exit(subprocess.run(sys.argv[1:]).returncode)"
SYSTEMD_RUN = """
command = sys.argv[sys.argv.index("bash"):]
log = next(word.partition("append:")[2] for word in sys.argv if word.startswith("--property=StandardOutput="))
with open(log, "a") as file:
    done = subprocess.Popen(command, stdout=file, stderr=file)
    (HERE / "unit.pid").write_text(str(done.pid))
    done.wait()
(HERE / "ended").write_text(str(done.returncode))
"""
# Replaces pip and uv: the environment that it creates contains a Python that runs `job`.
PYTHON3 = """
if (HERE / "fails").exists():
    (HERE / "fails").unlink()
    sys.exit(2)
if "venv" in sys.argv:
    os.makedirs("venv/bin")
    os.symlink(HERE / "job", "venv/bin/python")
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Puts the substitutes on the PATH, changes to a checkout and returns the folder of the substitutes.

    A test has to create the program `job`.
    """
    for name in ("bin", "checkout", "machine", "bucket"):
        (tmp_path / name).mkdir()
    for name, body in {"gcloud": GCLOUD, "sudo": SUDO, "systemd-run": SYSTEMD_RUN, "python3": PYTHON3}.items():
        make_program(tmp_path / "bin", name, body)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(vm, "HOME", str(tmp_path / "machine"))
    monkeypatch.chdir(make_checkout(tmp_path / "checkout"))
    (tmp_path / "bin" / "states").write_text("WAITING_FOR_RESOURCES FAILS ACTIVE")
    return tmp_path / "bin"


def launch(launcher, jobs, retries=1):
    """Submits the jobs and returns the paths of the scripts."""
    submission = launcher.submission(jobs, current_checkout(), "gs://bucket/s", retries)
    assert all(parses(text) for text in submission.files.values())
    submit(submission, launcher.tools)
    return list(submission.files)


def replace_machine(cloud):
    """Replaces the machine by one with an empty disk."""
    shutil.rmtree(cloud.parent / "machine")
    (cloud.parent / "machine").mkdir()
