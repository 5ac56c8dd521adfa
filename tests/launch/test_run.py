"""One job, started here: its exit codes, and what is done about them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.jobs import ROOT, children, job, one_line

MOONS = ("train", "--config=configs/moons.py")
SHORT = ("--config.train.steps=5", "--config.optimizer.warmup=2", "--config.train.log_every=1")
LONG = ("--config.train.steps=1000000", "--config.train.log_every=10", "--config.checkpoint.every=100")


def run(*words):
    return subprocess.Popen([sys.executable, "-m", "launch.run", *words], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"})  # fmt: skip


def until(running, condition, limit=90):
    began = time.monotonic()
    while not condition():
        assert running.poll() is None and time.monotonic() - began < limit, running.communicate()[0]
        time.sleep(0.05)


def logged(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--: must come before the job and its flags"),
        (["--", "trian"], "--: no job 'trian'; one of: .*train"),
        (["--", "train", "--config=configs/moons.py"], "--workdir: is missing among the job's flags"),
        (["--", "train", "--config=configs/moons.py", "--workdir=/"], "--name: '': wants letters"),
        (["--", *MOONS, "--workdir=runs/..", *SHORT], r"--name: '\\.\\.': wants letters"),
        (["--name=a b", "--", *MOONS, "--workdir=x"], "--name: 'a b': wants letters"),
        (["--retries=-1", "--", *MOONS, "--workdir=x"], "--retries: must be at least 0"),
        (["--launcher=locla", "--", *MOONS, "--workdir=x"], "--launcher: no 'locla'; one of: gke, local"),
        (["--", *MOONS, "--workdir=x", "--config.train.stepz=3"], "--config.train.stepz: the config has no 'stepz'"),
        (["--", *MOONS, "--workdir=x", "--config.train.steps=many"], "--config: flag --config.train.steps=many: "),
        (["train"], "train: is no flag"),
    ],
)
def test_what_is_refused(words, message):
    assert re.search(message.replace("\\\\", "\\"), one_line(job("launch.run", *words)))


def test_a_dry_run_prints_the_command():
    done = job("launch.run", "--dry_run", "--launcher=local:num_processes=2:gpus=4", "--", *MOONS, "--workdir=runs/a b")
    assert done.returncode == 2 and "--name: 'a b'" in done.stderr
    done = job("launch.run", "--dry_run", "--launcher=local:num_processes=2:gpus=4", "--", *MOONS, "--workdir=runs/a",
               "--config.data.name=$(x) 'y'")  # fmt: skip
    assert done.stdout == (
        "$ CUDA_VISIBLE_DEVICES=0,1,2,3 python -m experiments.train --config=configs/moons.py --workdir=runs/a "
        "'--config.data.name=$(x) '\"'\"'y'\"'\"'' --coordinator=127.0.0.1:PORT --num_processes=2 --process_id=0"
        "  # and on to 1\n"
    )


@pytest.mark.slow
def test_the_exit_codes_of_real_runs(tmp_path):
    impatient, stuck = tmp_path / "impatient.py", tmp_path / "stuck.py"
    for path, line in ((impatient, "train.patience = 2"), (stuck, "train.hang_timeout = 0.00001")):
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
        running = run("--retries=2", "--", *words)
        told = running.communicate(timeout=120)[0]
        assert running.returncode == code, told
        assert (f"exit code {code}" in told) == (code > 0) and told.count("error:") == (code > 0)
    # 75: told to stop, it saves; started again, it goes on.
    workdir = tmp_path / "stopped"
    running = run("--", *MOONS, *LONG, f"--workdir={workdir}")
    until(running, lambda: logged(workdir))
    running.send_signal(signal.SIGTERM)
    told = running.communicate(timeout=60)[0]
    assert running.returncode == 75 and "start it again to go on" in told
    # 70: stuck is started again, as often as it is allowed to be.
    running = run("--retries=0", "--", "train", f"--config={stuck}", f"--workdir={tmp_path}/stuck")
    told = running.communicate(timeout=120)[0]
    assert running.returncode == 70, told


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed(tmp_path):
    workdir = tmp_path / "two"
    steps = ("--config.train.steps=400", "--config.train.log_every=10", "--config.checkpoint.every=50")
    running = run("--launcher=local:num_processes=2", "--", *MOONS, *steps, f"--workdir={workdir}")
    until(running, lambda: any(step >= 150 for step in logged(workdir)))
    both = children(running.pid)
    assert len(both) == 2
    os.kill(both[1], signal.SIGKILL)
    told = running.communicate(timeout=200)[0]
    assert running.returncode == 0, told
    assert "exit code 137" in told and "2 devices" in told
    again = [line for line in told.splitlines() if "going on from step" in line]
    assert len(again) == 1 and int(again[0].rpartition(" ")[2].replace(",", "")) >= 100
    assert logged(workdir) == list(range(10, 401, 10))
