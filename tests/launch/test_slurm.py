"""Slurm's batch script, run by stand-ins for sbatch, srun, scontrol and scancel; test_real_slurm.py has them real."""

import json
import os
import pathlib
import re
import time

import pytest

from launch.jobs import Job, build_launcher, code_here, submit
from tests.launch.fakes import (
    AWKWARD,
    CODE,
    EXITS,
    WAITS,
    awkward_job,
    calls,
    checkout,
    codes,
    golden,
    parses,
    program,
    sweep,
    telling,
)

# Runs the script as Slurm would: the tasks of an array one after the other, again whenever one was requeued.
SBATCH = """
tasks = [word.partition("=")[2] for word in sys.argv if word.startswith("--array=")]
last = int(tasks[0].partition("%")[0].partition("-")[2]) if tasks else 0
for task in range(last + 1):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)} if tasks else {}
    mark = HERE / ("requeued-7" + f"_{task}" * bool(tasks))
    while True:
        mark.unlink(missing_ok=True)
        environment = {**os.environ, "SLURM_JOB_ID": str(7 + last - task), **array}
        job = subprocess.Popen(["bash", sys.argv[-1]], env=environment)
        (HERE / "job.pid").write_text(str(job.pid))
        code = job.wait()
        if not mark.exists():
            break
with open(HERE / "ended", "a") as file:
    file.write(f"{code}\\n")
"""
SCONTROL = """
state = (HERE / "state").read_text() if (HERE / "state").exists() else "RUNNING"
if sys.argv[1] == "show":
    print(f"JobId=7 JobName=x JobState={state} Reason=None")
else:
    (HERE / f"requeued-{sys.argv[2]}").touch()
"""
SCANCEL = "os.kill(int((HERE / 'ready').read_text()), signal.SIGTERM)"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of stand-ins on the PATH; the current folder is a checkout."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "checkout").mkdir()
    for name, body in {"sbatch": SBATCH, "scontrol": SCONTROL, "scancel": SCANCEL, "srun": EXITS}.items():
        program(tmp_path / "bin", name, body)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(checkout(tmp_path / "checkout"))
    return tmp_path / "bin"


def launch(jobs, retries=2, options=""):
    launcher = build_launcher(f"slurm{options}")
    submission = launcher.submission(jobs, code_here(), "runs/s", retries)
    for path, text in submission.files.items():
        assert path.endswith(".sh") and parses(text)
    submit(submission, launcher.tools)


def run_of(name):
    return Job(name, ("experiments.train", f"--workdir=runs/s/{name}"), f"runs/s/{name}")


def test_an_array_of_jobs():
    text = "slurm:partition=gpu:account=me:nodes=2:tasks_per_node=4:gpus_per_node=4:cpus_per_task=12:memory=200G"
    text += ":time=24:00:00:at_once=3:setup=module load cuda:python=/venv/bin/python:options=('--exclusive',)"
    golden("slurm_array.txt", build_launcher(text).submission(sweep("runs/lr"), CODE, "runs/lr", 3))


def test_one_job():
    golden("slurm_one.txt", build_launcher("slurm").submission(sweep("runs/100 %")[:1], CODE, "runs/100 %", 0))


def test_arguments_arrive_as_they_were_given(cluster):
    codes(cluster, 0, 0)
    launch([run_of("a"), awkward_job("runs/s/it's $(touch canary)")])
    there = os.path.realpath("runs/s/it's $(touch canary)")
    srun = ["--kill-on-bad-exit=0", "python", "-m"]
    assert calls(cluster, "srun")[1] == [*srun, "experiments.train", *AWKWARD, f"--workdir={there}"]
    assert calls(cluster, "srun")[0] == [*srun, "experiments.train", f"--workdir={os.path.realpath('runs/s/a')}"]
    assert not [file for _, _, files in os.walk(".") for file in files if "canary" in file]


def test_jobs_run_from_the_commit_in_a_folder_of_any_name(cluster, monkeypatch):
    (cluster / "srun").write_text(f"#!/bin/bash\npwd >{cluster}/where; ls >>{cluster}/where\n")
    odd = "runs/it's $(touch canary) 100 %"
    launcher = build_launcher("slurm")
    for _ in range(2):  # laid out once
        submit(launcher.submission([run_of("a")], code_here(), odd, 0), launcher.tools)
    folder = os.path.realpath(odd)
    assert (cluster / "where").read_text() == f"{folder}/launch/code/{code_here().commit}\nexperiments\n"
    assert calls(cluster, "sbatch")[0][1] == f"--output={folder.replace('%', '%%')}/launch/%j.log"
    assert os.listdir(f"{folder}/launch/code") == [code_here().commit]


@pytest.mark.parametrize(
    ("wanted", "retries"),
    [
        ([0], 2),
        ([2], 2),
        ([3], 2),
        ([75, 75, 75, 0], 0),
        ([1, 0], 1),
        ([75, 1, 75, 134, 75, 3], 2),
        ([1, 70, 1], 2),
        ([1], 0),
    ],
)
@pytest.mark.parametrize("beside", [0, 1])
def test_exit_codes(cluster, wanted, retries, beside):
    codes(cluster, *wanted, *[0] * beside)
    launch([run_of(name) for name in "ab"[: 1 + beside]], retries)
    assert len(calls(cluster, "srun")) == len(wanted) + beside
    requeued = [call[1] for call in calls(cluster, "scontrol") if call[0] == "requeue"]
    assert requeued == ["7_0" if beside else "7"] * (len(wanted) - 1)
    if not beside:
        assert (cluster / "ended").read_text() == f"{wanted[-1]}\n"
    assert not [name for name in os.listdir("runs/s/launch") if "crashes" in name]


@pytest.mark.parametrize(("wanted", "state"), [([75, 2], "RUNNING"), ([1, 1], "RUNNING"), ([75], "CANCELLED")])
def test_what_has_become_of_a_run_is_told_to_its_sweep(cluster, wanted, state):
    (cluster / "state").write_text(state)
    run = pathlib.Path("runs/s/a")
    run.mkdir(parents=True)
    (run / "launch.json").touch()
    codes(cluster, *wanted, 0)
    launch([run_of("a"), run_of("b")], retries=1)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["submitted"] * len(wanted) + ["ended"]
    assert events[-1]["code"] == wanted[-1] and abs(events[-1]["time"] - time.time()) < 60
    assert not (run.parent / "b").exists()


@pytest.mark.parametrize("state", ["CANCELLED", "PREEMPTED", "COMPLETING"])
@pytest.mark.parametrize("code", [75, 1])
def test_a_job_that_slurm_has_ended_is_not_requeued(cluster, state, code):
    (cluster / "state").write_text(state)
    codes(cluster, code, 0)
    launch([run_of("a")])
    assert (cluster / "ended").read_text() == f"{code}\n" and len(calls(cluster, "srun")) == 1


def test_told_to_stop_the_tasks_are_told_once_and_the_job_is_requeued(cluster):
    program(cluster, "srun", f"if (HERE / 'told').exists():\n    sys.exit(0)\n{WAITS}")
    # As Slurm does `notice` seconds before the end: the script is told, and nothing else.
    teller = telling(cluster, "job.pid")
    launch([run_of("a")], retries=0)
    assert teller.wait(timeout=20) == 0
    assert (cluster / "told").read_text() == "told\n" and (cluster / "ended").read_text() == "0\n"
    assert calls(cluster, "scancel") == [["--signal=TERM", "7"]]
    assert len(calls(cluster, "srun")) == 2


def test_lines_of_setup_come_first(cluster):
    codes(cluster, 0)
    launch([run_of("a")], options=f":setup=touch {cluster}/set-$UNSET.up")
    assert (cluster / "set-.up").exists()


def test_options_go_to_sbatch_before_the_script(cluster):
    codes(cluster, 0)
    launch([run_of("a")], options=":options=('--qos=a b',):notice=60")
    (given,) = calls(cluster, "sbatch")
    assert {"--qos=a b", "--signal=B:TERM@60", "--requeue", "--open-mode=append"} <= set(given)
    assert re.fullmatch(r".*/runs/s/launch/a-[0-9a-f]{8}\.sh", given[-1])
