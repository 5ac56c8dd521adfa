"""TPU virtual machines: what is asked for, and the scripts, run by stand-ins for gcloud and systemd."""

import os
import time

import pytest

from diffusion.core.types import InputError
from launch import tpu_vm
from launch.jobs import build_launcher
from tests.launch.fakes import AWKWARD, CODE, EXITS, WAITS, awkward_job, calls, codes, golden, program, sweep, telling
from tests.launch.machines import cloud, launch

__all__ = ["cloud"]  # a fixture
POD = "tpu_vm:type=v5litepod-16:zone=z:runtime=r"
ONE = "tpu_vm:type=v5litepod-8:zone=z:runtime=r"


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(tpu_vm, "POLL", 0)


def test_a_sweep_on_pods():
    text = f"{POD}:project=me:spot=true:again=true:delete=true:network=n:service_account=a@b"
    tpu_vm.POLL = 30
    golden("tpu_vm_pods.txt", build_launcher(text).submission(sweep("gs://b/lr"), CODE, "gs://b/lr", 3))


def test_one_host():
    golden("tpu_vm_one.txt", build_launcher(ONE).submission(sweep("gs://b/lr")[:1], CODE, "gs://b/lr", 0))


@pytest.mark.parametrize(("type", "hosts"), [
    ("v2-8", 1), ("v3-32", 4), ("v4-8", 1), ("v4-16", 2), ("v5p-8", 1), ("v5p-128", 16), ("v5litepod-1", 1),
    ("v5litepod-8", 1), ("v5litepod-16", 4), ("v5litepod-256", 64), ("v6e-8", 1), ("v6e-64", 16),
])  # fmt: skip
def test_hosts_of_a_slice(type, hosts):
    assert tpu_vm.hosts(type) == hosts


@pytest.mark.parametrize("type", ["", "v4", "v4-", "v4-0", "v4-x", "v1-8", "-8", "v4-8-8"])
def test_types_that_are_none(type):
    with pytest.raises(InputError, match=r"^type: wants one of"):
        tpu_vm.hosts(type)


@pytest.mark.parametrize(("text", "more"), [(POD, ["--distributed"]), (ONE, [])])
def test_arguments_arrive_as_they_were_given(cloud, text, more):
    program(cloud, "job", "sys.exit(0)")
    job = awkward_job("gs://bucket/s/it's $(touch canary)")
    launch(build_launcher(text), [job])
    assert calls(cloud, "job") == [["-m", *job.command, *more]] and AWKWARD[0] in job.command
    assert not [file for _, _, files in os.walk(cloud.parent) for file in files if "canary" in file]
    logs = [path for path in (cloud.parent / "bucket").rglob("*.log")]
    assert len(logs) == 1 and "ended with exit code 0" in logs[0].read_text()
    assert logs[0].parent == cloud.parent / "bucket" / "bucket/s/it's $(touch canary)/launch"


def test_every_job_has_a_resource_of_its_own(cloud):
    program(cloud, "job", "sys.exit(0)")
    launch(build_launcher(POD), sweep("gs://bucket/s"))
    asked = [call for call in calls(cloud, "gcloud") if "create" in call]
    names = [call[call.index("create") + 1] for call in asked]
    assert len(set(names)) == 2 and all(f"--node-id={name}" in call for name, call in zip(names, asked, strict=True))
    assert sorted(call[-1] for call in calls(cloud, "job")) == ["--distributed"] * 2


@pytest.mark.parametrize("wanted", [[0], [2], [3], [75, 75, 0]])
def test_a_resource_deletes_itself_if_asked_to(cloud, wanted):
    program(cloud, "job", EXITS)
    for option, count in (("", 0), (":delete=true", 1)):
        codes(cloud, *wanted)
        launch(build_launcher(f"{ONE}{option}"), sweep("gs://bucket/s")[:1])
        assert (cloud / "ended").read_text() == str(wanted[-1])
        assert len([call for call in calls(cloud, "gcloud") if "delete" in call]) == count


def test_preparing_may_fail_and_is_tried_again(cloud, monkeypatch):
    monkeypatch.setattr("launch.jobs.PAUSE", 0)
    monkeypatch.setattr("launch.jobs.until_done.__defaults__", (0,))
    program(cloud, "job", "sys.exit(0)")
    (cloud / "fails").touch()  # with 2, which is no exit code of a job here
    launch(build_launcher(ONE), sweep("gs://bucket/s")[:1])
    assert (cloud / "ended").read_text() == "0" and len(calls(cloud, "job")) == 1


def test_a_machine_that_is_taken_away_lets_the_job_save_and_deletes_nothing(cloud):
    program(cloud, "job", WAITS)
    teller = telling(cloud, "unit.pid")  # as systemd does with KillMode=mixed
    launch(build_launcher(f"{ONE}:delete=true"), sweep("gs://bucket/s")[:1])
    assert teller.wait(timeout=20) == 0 and (cloud / "told").read_text() == "told\n"
    assert (cloud / "ended").read_text() == "75" and not [call for call in calls(cloud, "gcloud") if "delete" in call]
    assert "--property=KillMode=mixed" in calls(cloud, "systemd-run")[0]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_resource_that_is_gone_is_told_of(cloud, state, capfd):
    (cloud / "states").write_text(f"ACCEPTED {state}")
    with pytest.raises(InputError, match=f"is {state}; launch it again with again=true"):
        launch(build_launcher(ONE), sweep("gs://bucket/s")[:1])
    assert not [call for call in calls(cloud, "gcloud") if "ssh" in call]


def test_a_resource_that_nobody_knows_is_not_waited_for_forever(cloud):
    (cloud / "states").write_text("FAILS")
    began = time.monotonic()
    with pytest.raises(InputError, match="failed with exit code 1"):
        launch(build_launcher(ONE), sweep("gs://bucket/s")[:1])
    assert time.monotonic() - began < 20
