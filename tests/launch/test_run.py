"""One job on this machine: its exit codes and restarts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.jobs import ROOT, children, job
from tests.launch.runs import start_steps
from tests.refusals import refused_field

MOONS = ("train", "--config=configs/moons.py")
SHORT = ("--config.train.steps=5", "--config.optimizer.warmup=2", "--config.train.log_every=1")
LONG = ("--config.train.steps=1000000", "--config.train.log_every=10", "--config.checkpoint.every=100")


def launch(*words):
    return subprocess.Popen([sys.executable, "-m", "launch.run", *words], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"})  # fmt: skip


def wait_until(running, condition, limit=90):
    began = time.monotonic()
    while not condition():
        assert running.poll() is None and time.monotonic() - began < limit, running.communicate()[0]
        time.sleep(0.05)


def logged(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ([], "--"),
        (["--", "trian"], "--"),
        (["--", *MOONS], "--workdir"),
        (["--", *MOONS, "--workdir=/"], "--name"),
        (["--", *MOONS, "--workdir=runs/..", *SHORT], "--name"),
        (["--name=a b", "--", *MOONS, "--workdir=x"], "--name"),
        (["--dry_run", "--", *MOONS, "--workdir=runs/a b"], "--name"),
        (["--retries=-1", "--", *MOONS, "--workdir=x"], "--retries"),
        (["--launcher=locla", "--", *MOONS, "--workdir=x"], "--launcher"),
        (["--", *MOONS, "--workdir=x", "--config.train.stepz=3"], "--config.train.stepz"),
        (["train"], "train"),
    ],
)
def test_invalid_command_lines_are_refused(words, field):
    assert refused_field(job("launch.run", *words)).lstrip("-") == field.lstrip("-")


def test_dry_run_prints_the_command():
    done = job("launch.run", "--dry_run", "--launcher=local:num_processes=2:gpus=4", "--", *MOONS, "--workdir=runs/a",
               "--compiled=$(x) 'y'")  # fmt: skip
    assert done.stdout.startswith(
        "$ CUDA_VISIBLE_DEVICES=0,1,2,3 python -m experiments.train --config=configs/moons.py --workdir=runs/a "
        "'--compiled=$(x) '\"'\"'y'\"'\"'' --coordinator=127.0.0.1:PORT --num_processes=2 --process_id=0  # "
    ), done.stderr


def test_the_workdir_may_begin_with_the_home_folder():
    words = ["--dry_run", "--", *MOONS, "--workdir=~/runs/a"]
    done = job("launch.run", *words, HOME="/home/user")
    assert done.stdout == "$ python -m experiments.train --config=configs/moons.py --workdir=/home/user/runs/a\n"


@pytest.mark.slow
def test_exit_codes_of_real_trainings(tmp_path):
    impatient, hung = tmp_path / "impatient.py", tmp_path / "hung.py"
    for path, line in ((impatient, "train.patience = 2"), (hung, "train.hang_timeout = 0.00001")):
        path.write_text("from configs import moons\n\n\ndef get_config():\n    config = moons.get_config()\n"
                        f"    config.{line}\n    return config\n")  # fmt: skip
    codes = {
        0: (*MOONS, *SHORT, f"--workdir={tmp_path}/done"),
        2: (*MOONS, "--config.train.steps=0", f"--workdir={tmp_path}/refused"),
        3: (
            "train",
            f"--config={impatient}",
            "--config.optimizer.learning_rate=1e30",
            f"--workdir={tmp_path}/diverged",
        ),
    }
    for code, words in codes.items():
        running = launch("--retries=2", "--", *words)
        output = running.communicate(timeout=120)[0]
        assert running.returncode == code, output
        assert (f"exit code {code}" in output) == (code > 0) and output.count("error:") == (code > 0)
    # 75: on SIGTERM the training saves and exits.
    workdir = tmp_path / "stopped"
    running = launch("--", *MOONS, *LONG, f"--workdir={workdir}")
    wait_until(running, lambda: logged(workdir))
    running.send_signal(signal.SIGTERM)
    output = running.communicate(timeout=60)[0]
    assert running.returncode == 75, output
    assert list((workdir / "checkpoints").glob("[0-9]*"))
    # 70: the training hangs, and no retries are allowed.
    running = launch("--retries=0", "--", "train", f"--config={hung}", f"--workdir={tmp_path}/hung")
    output = running.communicate(timeout=120)[0]
    assert running.returncode == 70, output


@pytest.mark.slow
def test_job_resumes_after_one_of_two_processes_is_killed(tmp_path):
    workdir = tmp_path / "two"
    steps = ("--config.train.steps=400", "--config.train.log_every=10", "--config.checkpoint.every=50")
    running = launch("--launcher=local:num_processes=2", "--", *MOONS, *steps, f"--workdir={workdir}")
    wait_until(running, lambda: any(step >= 150 for step in logged(workdir)))
    both = children(running.pid)
    assert len(both) == 2
    os.kill(both[1], signal.SIGKILL)
    output = running.communicate(timeout=200)[0]
    assert running.returncode == 0, output
    assert "exit code 137" in output
    first, second = start_steps(workdir)
    assert first == 0 and second >= 100
    assert logged(workdir) == list(range(10, 401, 10))
