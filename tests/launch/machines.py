"""Stand-ins for Google Cloud and its machines: the scripts of a job run here, in folders."""

import os
import shutil

import pytest

from launch import vm
from launch.jobs import code_here, submit
from tests.launch.fakes import checkout, parses, program

# `storage cp` and `scp` copy, `ssh` runs, `describe` tells of the states in a file; everything else is noted down.
GCLOUD = """
def place(path):
    return str(HERE.parent / "bucket" / path.removeprefix("gs://")) if path.startswith("gs://") else path
words = [word for word in sys.argv[1:] if not word.startswith("--")]
machine = HERE.parent / "machine"
if "cp" in words:
    source, target = map(place, words[-2:])
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    shutil.copy(source, target)
elif "scp" in words:
    shutil.copy(words[-2], machine / words[-1].partition(":")[2])
elif "ssh" in words:
    command = next(word.partition("=")[2] for word in sys.argv if word.startswith("--command="))
    sys.exit(subprocess.run(["bash", "-c", command], cwd=machine).returncode)
elif "describe" in words:
    states = (HERE / "states").read_text().split()
    later = HERE / f"states.{os.getpid()}"  # the scripts of two jobs ask at once: the file is never half-written
    later.write_text(" ".join(states[1:] or states))
    later.rename(HERE / "states")
    asked = (HERE / "gcloud.calls").read_text().count("describe")
    state = states[0] if asked < 30 else "ACTIVE"  # no test waits forever
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
# Stands for pip and uv: what it is asked to make is a Python that runs `job`.
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
    """The folder of the stand-ins, on the PATH; the current folder is a checkout. `job` is to be given a body."""
    for name in ("bin", "checkout", "machine", "bucket"):
        (tmp_path / name).mkdir()
    for name, body in {"gcloud": GCLOUD, "sudo": SUDO, "systemd-run": SYSTEMD_RUN, "python3": PYTHON3}.items():
        program(tmp_path / "bin", name, body)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(vm, "HOME", str(tmp_path / "machine"))
    monkeypatch.chdir(checkout(tmp_path / "checkout"))
    (tmp_path / "bin" / "states").write_text("WAITING_FOR_RESOURCES FAILS ACTIVE")
    return tmp_path / "bin"


def launch(launcher, jobs, retries=1):
    """Submits; returns the paths of the scripts."""
    submission = launcher.submission(jobs, code_here(), "gs://bucket/s", retries)
    assert all(parses(text) for text in submission.files.values())
    submit(submission, launcher.tools)
    return list(submission.files)


def restart(cloud):
    """A machine whose disk is as new."""
    shutil.rmtree(cloud.parent / "machine")
    (cloud.parent / "machine").mkdir()
