"""The batch script for Slurm, run with substitutes for sbatch, srun, scontrol and scancel.

`test_real_slurm.py` uses the real programs.
"""

import json
import os
import pathlib
import re
import time

import pytest

from launch.jobs import Job, build_launcher, current_checkout, submit
from tests.launch.fakes import (
    AWKWARD,
    CODE,
    EXITS,
    WAITS,
    awkward_job,
    calls,
    check_golden,
    make_checkout,
    make_program,
    parses,
    set_exit_codes,
    signal_when_ready,
    sweep_jobs,
)
from tests.tiers import slow_except

# Runs the script like Slurm, except that the tasks of an array run one after the other. Requeued tasks run again.
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
    """Puts the substitutes on the PATH, changes to a checkout and returns the folder of the substitutes."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "checkout").mkdir()
    for name, body in {"sbatch": SBATCH, "scontrol": SCONTROL, "scancel": SCANCEL, "srun": EXITS}.items():
        make_program(tmp_path / "bin", name, body)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(make_checkout(tmp_path / "checkout"))
    return tmp_path / "bin"


def launch(jobs, retries=2, options=""):
    launcher = build_launcher(f"slurm{options}")
    submission = launcher.submission(jobs, current_checkout(), "runs/s", retries)
    for path, text in submission.files.items():
        assert path.endswith(".sh") and parses(text)
    submit(submission, launcher.tools)


def job_named(name):
    return Job(name, ("experiments.train", f"--workdir=runs/s/{name}"), f"runs/s/{name}")


def test_submission_of_an_array():
    text = "slurm:partition=gpu:account=me:nodes=2:tasks_per_node=4:gpus_per_node=4:cpus_per_task=12:memory=200G"
    text += ":time=24:00:00:at_once=3:setup=module load cuda:python=/venv/bin/python:options=('--exclusive',)"
    check_golden("slurm_array.txt", build_launcher(text).submission(sweep_jobs("runs/lr"), CODE, "runs/lr", 3))


def test_submission_of_one_job():
    jobs = sweep_jobs("runs/100 %")[:1]
    check_golden("slurm_one.txt", build_launcher("slurm").submission(jobs, CODE, "runs/100 %", 0))


def test_arguments_are_passed_unchanged(cluster):
    set_exit_codes(cluster, 0, 0)
    launch([job_named("a"), awkward_job("runs/s/it's $(touch canary)")])
    workdir = os.path.realpath("runs/s/it's $(touch canary)")
    srun = ["--kill-on-bad-exit=0", "python", "-m"]
    assert calls(cluster, "srun")[1] == [*srun, "experiments.train", *AWKWARD, f"--workdir={workdir}"]
    assert calls(cluster, "srun")[0] == [*srun, "experiments.train", f"--workdir={os.path.realpath('runs/s/a')}"]
    assert not [file for _, _, files in os.walk(".") for file in files if "canary" in file]


def test_code_is_exported_once_and_to_a_folder_with_any_name(cluster):
    (cluster / "srun").write_text(f"#!/bin/bash\npwd >{cluster}/where; ls >>{cluster}/where\n")
    odd = "runs/it's $(touch canary) 100 %"
    launcher = build_launcher("slurm")
    for _ in range(2):
        submit(launcher.submission([job_named("a")], current_checkout(), odd, 0), launcher.tools)
    folder = os.path.realpath(odd)
    assert (cluster / "where").read_text() == f"{folder}/launch/code/{current_checkout().commit}\nexperiments\n"
    assert calls(cluster, "sbatch")[0][1] == f"--output={folder.replace('%', '%%')}/launch/%j.log"
    assert os.listdir(f"{folder}/launch/code") == [current_checkout().commit]


@pytest.mark.parametrize(
    ("exit_codes", "retries"),
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
@pytest.mark.parametrize("others", slow_except((1,), (0, 1)))
def test_requeue_by_exit_code(cluster, exit_codes, retries, others):
    set_exit_codes(cluster, *exit_codes, *[0] * others)
    launch([job_named(name) for name in "ab"[: 1 + others]], retries)
    assert len(calls(cluster, "srun")) == len(exit_codes) + others
    requeued = [call[1] for call in calls(cluster, "scontrol") if call[0] == "requeue"]
    assert requeued == ["7_0" if others else "7"] * (len(exit_codes) - 1)
    if not others:
        assert (cluster / "ended").read_text() == f"{exit_codes[-1]}\n"
    assert not [name for name in os.listdir("runs/s/launch") if "crashes" in name]


@pytest.mark.parametrize(("exit_codes", "state"), [([75, 2], "RUNNING"), ([1, 1], "RUNNING"), ([75], "CANCELLED")])
def test_events_of_a_run_are_recorded(cluster, exit_codes, state):
    (cluster / "state").write_text(state)
    run = pathlib.Path("runs/s/a")
    run.mkdir(parents=True)
    (run / "launch.json").touch()
    set_exit_codes(cluster, *exit_codes, 0)
    launch([job_named("a"), job_named("b")], retries=1)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["submitted"] * len(exit_codes) + ["ended"]
    assert events[-1]["code"] == exit_codes[-1] and abs(events[-1]["time"] - time.time()) < 60
    assert not (run.parent / "b").exists()


@pytest.mark.parametrize("state", ["CANCELLED", "PREEMPTED", "COMPLETING"])
@pytest.mark.parametrize("code", [75, 1])
def test_job_ended_by_slurm_is_not_requeued(cluster, state, code):
    (cluster / "state").write_text(state)
    set_exit_codes(cluster, code, 0)
    launch([job_named("a")])
    assert (cluster / "ended").read_text() == f"{code}\n" and len(calls(cluster, "srun")) == 1


def test_sigterm_is_forwarded_once_and_the_job_is_requeued(cluster):
    make_program(cluster, "srun", f"if (HERE / 'signals').exists():\n    sys.exit(0)\n{WAITS}")
    # Like Slurm before the time limit, signals only the script.
    signaller = signal_when_ready(cluster, "job.pid")
    launch([job_named("a")], retries=0)
    assert signaller.wait(timeout=20) == 0
    assert (cluster / "signals").read_text() == "SIGTERM\n" and (cluster / "ended").read_text() == "0\n"
    assert calls(cluster, "scancel") == [["--signal=TERM", "7"]]
    assert len(calls(cluster, "srun")) == 2


def test_setup_runs_first(cluster):
    set_exit_codes(cluster, 0)
    launch([job_named("a")], options=f":setup=touch {cluster}/set-$UNSET.up")
    assert (cluster / "set-.up").exists()


def test_options_are_passed_to_sbatch_before_the_script(cluster):
    set_exit_codes(cluster, 0)
    launch([job_named("a")], options=":options=('--qos=a b',):notice=60")
    (arguments,) = calls(cluster, "sbatch")
    assert {"--qos=a b", "--signal=B:TERM@60", "--requeue", "--open-mode=append"} <= set(arguments)
    assert re.fullmatch(r".*/runs/s/launch/a-[0-9a-f]{8}\.sh", arguments[-1])
