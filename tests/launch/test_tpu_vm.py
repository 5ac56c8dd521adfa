"""TPU virtual machines: the gcloud commands, and the scripts run with substitutes for gcloud and systemd."""

import os
import time

import pytest

from diffusion.core.types import InputError
from launch import tpu_vm
from launch.jobs import build_launcher
from tests.launch.fakes import (
    AWKWARD,
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
from tests.launch.machines import cloud, launch
from tests.refusals import refused
from tests.tiers import slow_except

__all__ = ["cloud"]  # a fixture
POD = "tpu_vm:type=v5litepod-16:zone=z:runtime=r"
ONE = "tpu_vm:type=v5litepod-8:zone=z:runtime=r"


@pytest.fixture(autouse=True)
def poll_without_delay(monkeypatch):
    monkeypatch.setattr(tpu_vm, "POLL_INTERVAL", 0)


def test_submission_of_a_sweep_on_pods(monkeypatch):
    text = f"{POD}:project=me:spot=true:again=true:delete=true:network=n:service_account=a@b"
    monkeypatch.setattr(tpu_vm, "POLL_INTERVAL", 30)
    check_golden("tpu_vm_pods.txt", build_launcher(text).submission(sweep_jobs("gs://b/lr"), CODE, "gs://b/lr", 3))


def test_submission_of_a_job_on_one_host():
    check_golden("tpu_vm_one.txt", build_launcher(ONE).submission(sweep_jobs("gs://b/lr")[:1], CODE, "gs://b/lr", 0))


@pytest.mark.parametrize(("type", "num_hosts"), [
    ("v2-8", 1), ("v3-32", 4), ("v4-8", 1), ("v4-16", 2), ("v5p-8", 1), ("v5p-128", 16), ("v5litepod-1", 1),
    ("v5litepod-8", 1), ("v5litepod-16", 4), ("v5litepod-256", 64), ("v6e-8", 1), ("v6e-64", 16),
])  # fmt: skip
def test_number_of_hosts(type, num_hosts):
    assert tpu_vm.num_hosts(type) == num_hosts


@pytest.mark.parametrize("type", ["", "v4", "v4-", "v4-0", "v4-x", "v1-8", "-8", "v4-8-8"])
def test_unknown_types_are_refused(type):
    with refused("type"):
        tpu_vm.num_hosts(type)


@pytest.mark.parametrize(("text", "more"), [(POD, ["--distributed"]), (ONE, [])])
def test_arguments_are_passed_unchanged(cloud, text, more):
    make_program(cloud, "job", "sys.exit(0)")
    job = awkward_job("gs://bucket/s/it's $(touch canary)")
    launch(build_launcher(text), [job])
    assert calls(cloud, "job") == [["-m", *job.command, *more]] and AWKWARD[0] in job.command
    assert not [file for _, _, files in os.walk(cloud.parent) for file in files if "canary" in file]
    logs = [path for path in (cloud.parent / "bucket").rglob("*.log")]
    assert len(logs) == 1 and "ended with exit code 0" in logs[0].read_text()
    assert logs[0].parent == cloud.parent / "bucket" / "bucket/s/it's $(touch canary)/launch"


def test_each_job_has_a_separate_resource(cloud):
    make_program(cloud, "job", "sys.exit(0)")
    launch(build_launcher(POD), sweep_jobs("gs://bucket/s"))
    creations = [call for call in calls(cloud, "gcloud") if "create" in call]
    names = [call[call.index("create") + 1] for call in creations]
    assert len(set(names)) == 2 and all(
        f"--node-id={name}" in call for name, call in zip(names, creations, strict=True)
    )
    assert sorted(call[-1] for call in calls(cloud, "job")) == ["--distributed"] * 2


@pytest.mark.parametrize("codes", slow_except([[75, 75, 0]], [[0], [2], [3], [75, 75, 0]]))
def test_resource_deletes_itself_on_request(cloud, codes):
    make_program(cloud, "job", EXITS)
    for option, count in (("", 0), (":delete=true", 1)):
        set_exit_codes(cloud, *codes)
        launch(build_launcher(f"{ONE}{option}"), sweep_jobs("gs://bucket/s")[:1])
        assert (cloud / "ended").read_text() == str(codes[-1])
        assert len([call for call in calls(cloud, "gcloud") if "delete" in call]) == count


def test_failed_setup_is_retried(cloud, monkeypatch):
    monkeypatch.setattr("launch.jobs.retry_loop.__defaults__", (0,))
    make_program(cloud, "job", "sys.exit(0)")
    (cloud / "fails").touch()  # exits with 2, which must not be taken for the job's exit code
    launch(build_launcher(ONE), sweep_jobs("gs://bucket/s")[:1])
    assert (cloud / "ended").read_text() == "0" and len(calls(cloud, "job")) == 1


def test_shutdown_of_the_machine_lets_the_job_save_and_deletes_nothing(cloud):
    make_program(cloud, "job", WAITS)
    signaller = signal_when_ready(cloud, "unit.pid")  # like systemd with KillMode=mixed
    launch(build_launcher(f"{ONE}:delete=true"), sweep_jobs("gs://bucket/s")[:1])
    assert signaller.wait(timeout=20) == 0 and (cloud / "signals").read_text() == "SIGTERM\n"
    assert (cloud / "ended").read_text() == "75" and not [call for call in calls(cloud, "gcloud") if "delete" in call]
    assert "--property=KillMode=mixed" in calls(cloud, "systemd-run")[0]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_preempted_or_failed_resource_is_reported(cloud, state):
    (cloud / "states").write_text(f"ACCEPTED {state}")
    with pytest.raises(InputError, match=f"is {state}"):
        launch(build_launcher(ONE), sweep_jobs("gs://bucket/s")[:1])
    assert not [call for call in calls(cloud, "gcloud") if "ssh" in call]


def test_waiting_ends_if_the_resource_cannot_be_queried(cloud):
    (cloud / "states").write_text("FAILS")
    began = time.monotonic()
    with pytest.raises(InputError, match="exit code 1"):
        launch(build_launcher(ONE), sweep_jobs("gs://bucket/s")[:1])
    assert time.monotonic() - began < 20
