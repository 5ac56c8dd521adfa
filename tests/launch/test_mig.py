"""Managed instance groups: what is asked for, and the startup script, run by stand-ins for gcloud and systemd."""

import os
import subprocess

import pytest

from launch.jobs import build_launcher
from tests.launch.fakes import CODE, EXITS, WAITS, awkward_job, calls, codes, golden, program, sweep, telling
from tests.launch.machines import cloud, launch, restart

__all__ = ["cloud"]  # a fixture
TEXT = "mig:machine=a2-highgpu-1g:zone=z:image_family=f:bucket=gs://code/x"


def boot(path):
    """The machine starts, and runs its startup script from a file of another name."""
    with open(path) as script:
        subprocess.run(["bash", "-c", 'cat >startup && bash startup; code=$?; rm startup; exit "$code"'], stdin=script)


def started(cloud, text, jobs, **options):
    (path,) = launch(build_launcher(text), jobs, **options)
    startup = next(word for call in calls(cloud, "gcloud") for word in call if word.startswith("--metadata-from-file"))
    assert startup == f"--metadata-from-file=^|^startup-script={path}"
    boot(path)
    return path


def resizes(cloud):
    return [call for call in calls(cloud, "gcloud") if "resize" in call]


def test_a_sweep():
    text = f"{TEXT}:project=me:spot=true:gpu=nvidia-tesla-t4:gpus=2:service_account=a@b"
    golden("mig.txt", build_launcher(text).submission(sweep("gs://b/lr"), CODE, "gs://b/lr", 3))


def test_arguments_arrive_as_they_were_given(cloud):
    program(cloud, "job", "sys.exit(0)")
    job = awkward_job("gs://bucket/s/it's $(touch canary)")
    started(cloud, TEXT, [job])
    assert calls(cloud, "job") == [["-m", *job.command]]
    assert not [file for _, _, files in os.walk(cloud.parent) for file in files if "canary" in file]
    assert len(list((cloud.parent / "bucket" / "bucket/s/it's $(touch canary)/launch").glob("*.log"))) == 1
    assert list((cloud.parent / "bucket" / "code" / "x" / "code").glob("*.tar.gz"))


@pytest.mark.parametrize("wanted", [[0], [2], [3], [75, 0], [1]])
def test_when_all_is_done_the_group_is_emptied(cloud, wanted):
    program(cloud, "job", EXITS)
    codes(cloud, *wanted)
    started(cloud, TEXT, sweep("gs://bucket/s")[:1], retries=0)
    (resize,) = resizes(cloud)
    created = next(call for call in calls(cloud, "gcloud") if "managed" in call and "create" in call)
    name = created[created.index("create") + 1]
    assert resize == [*"compute instance-groups managed resize".split(), name, "--size=0", "--zone=z", "--quiet"]
    assert (cloud / "ended").read_text() == str(wanted[-1])


@pytest.mark.parametrize("lost", [False, True])
def test_a_machine_that_is_taken_away_comes_back_and_goes_on(cloud, lost):
    program(cloud, "job", f"if (HERE / 'told').exists():\n    sys.exit(0)\n{WAITS}")
    teller = telling(cloud, "unit.pid")
    path = started(cloud, TEXT, sweep("gs://bucket/s")[:1])
    assert teller.wait(timeout=20) == 0 and (cloud / "told").read_text() == "told\n"
    assert (cloud / "ended").read_text() == "75" and not resizes(cloud)
    made = len(calls(cloud, "python3"))
    if lost:
        restart(cloud)
    boot(path)
    assert (cloud / "ended").read_text() == "0" and len(resizes(cloud)) == 1
    assert len(calls(cloud, "python3")) == made * (1 + lost)  # a disk that is still there has all that it needs
