"""Managed instance groups: the gcloud commands, and the startup script run with substitutes for gcloud and systemd."""

import os
import subprocess

import pytest

from launch.jobs import build_launcher
from tests.launch.fakes import (
    CODE,
    EXITS,
    WAITS,
    awkward_job,
    calls,
    check_golden,
    make_program,
    set_exit_codes,
    signal_when_ready,
    sweep_jobs,
)
from tests.launch.machines import cloud, launch, replace_machine
from tests.tiers import slow_except

__all__ = ["cloud"]  # a fixture
TEXT = "mig:machine=a2-highgpu-1g:zone=z:image_family=f:bucket=gs://code/x"


def boot(path):
    """Boots the machine, which runs its startup script from a file with another name."""
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


def test_submission_of_a_sweep():
    text = f"{TEXT}:project=me:spot=true:gpu=nvidia-tesla-t4:gpus=2:service_account=a@b"
    check_golden("mig.txt", build_launcher(text).submission(sweep_jobs("gs://b/lr"), CODE, "gs://b/lr", 3))


def test_arguments_are_passed_unchanged(cloud):
    make_program(cloud, "job", "sys.exit(0)")
    job = awkward_job("gs://bucket/s/it's $(touch canary)")
    started(cloud, TEXT, [job])
    assert calls(cloud, "job") == [["-m", *job.command]]
    assert not [file for _, _, files in os.walk(cloud.parent) for file in files if "canary" in file]
    assert len(list((cloud.parent / "bucket" / "bucket/s/it's $(touch canary)/launch").glob("*.log"))) == 1
    assert list((cloud.parent / "bucket" / "code" / "x" / "code").glob("*.tar.gz"))


@pytest.mark.parametrize("codes", slow_except([[75, 0]], [[0], [2], [3], [75, 0], [1]]))
def test_group_is_resized_to_zero_at_the_end(cloud, codes):
    make_program(cloud, "job", EXITS)
    set_exit_codes(cloud, *codes)
    started(cloud, TEXT, sweep_jobs("gs://bucket/s")[:1], retries=0)
    (resize,) = resizes(cloud)
    created = next(call for call in calls(cloud, "gcloud") if "managed" in call and "create" in call)
    name = created[created.index("create") + 1]
    assert resize == [*"compute instance-groups managed resize".split(), name, "--size=0", "--zone=z", "--quiet"]
    assert (cloud / "ended").read_text() == str(codes[-1])


@pytest.mark.parametrize("disk_lost", slow_except((True,), (False, True)))
def test_run_resumes_on_the_machine_that_replaces_a_preempted_one(cloud, disk_lost):
    make_program(cloud, "job", f"if (HERE / 'signals').exists():\n    sys.exit(0)\n{WAITS}")
    signaller = signal_when_ready(cloud, "unit.pid")
    path = started(cloud, TEXT, sweep_jobs("gs://bucket/s")[:1])
    assert signaller.wait(timeout=20) == 0 and (cloud / "signals").read_text() == "SIGTERM\n"
    assert (cloud / "ended").read_text() == "75" and not resizes(cloud)
    made = len(calls(cloud, "python3"))
    if disk_lost:
        replace_machine(cloud)
    boot(path)
    assert (cloud / "ended").read_text() == "0" and len(resizes(cloud)) == 1
    assert len(calls(cloud, "python3")) == made * (1 + disk_lost)  # a disk that still exists needs no setup
