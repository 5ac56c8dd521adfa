"""A training that is told to stop, or gets stuck, as whoever started it sees it."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.experiments.test_jobs import ROOT, job

STEPS = 60
CONFIG = """
import itertools
import runpy
import time
from diffusion.data import digits

def get_config():
    config = runpy.run_path({digits!r})["get_config"]()
    config.train.update(steps={steps}, batch_size=16, log_every=1, preview_every=0, prefetch=1, {train})
    config.network.update(width=8, head_width=8)
    config.optimizer.warmup = 1
    config.checkpoint.every = 1000
    return config

original, seen = digits.Digits.__getitem__, itertools.count()
def slowly(self, index):
    if next(seen) >= {until}:
        time.sleep({pause})
    return original(self, index)
digits.Digits.__getitem__ = slowly
"""


@pytest.fixture
def start(tmp_path):
    """Starts a training, of which each example takes `pause` seconds after the first `until`."""

    def run(workdir, *, pause=0.01, until=0, train=""):
        config = tmp_path / "config.py"
        digits = str(ROOT / "configs/digits.py")
        config.write_text(CONFIG.format(digits=digits, steps=STEPS, pause=pause, until=until, train=train))
        command = [sys.executable, "-m", "experiments.train", f"--config={config}", f"--workdir={workdir}"]
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    return run


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until_step(workdir, step, process):
    while len(lines(workdir)) < step:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_saves_and_goes_on_as_if_never_stopped(start, tmp_path, number):
    process = start(tmp_path / "run")
    until_step(tmp_path / "run", 3, process)
    process.send_signal(number)
    told = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75 and time.monotonic() - told < 20, stderr
    assert f"{number.name}: saving after this step" in stderr and "Traceback" not in stderr
    stopped = int(re.search(r"stopped at step (\d+), and saved; start it again", stderr)[1])
    assert 3 <= stopped < STEPS and os.listdir(tmp_path / "run/checkpoints") == [str(stopped)]
    for workdir in ("run", "whole"):
        process = start(tmp_path / workdir, pause=0)
        assert process.wait(timeout=300) == 0, process.stderr.read()
    one, other = (
        [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines(tmp_path / name)]
        for name in ("run", "whole")
    )
    assert one == other and len(one) == STEPS


def test_told_twice_it_ends_at_once(start, tmp_path):
    process = start(tmp_path / "run", pause=3600, until=100)  # a step that does not end
    until_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


def test_stuck_it_says_where_and_ends(start, tmp_path):
    process = start(tmp_path / "run", pause=3600, until=100, train="stuck_after=0.05")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 70, stderr
    report = (tmp_path / "run/stuck.txt").read_text()
    for text in (report, stderr):
        assert re.search(r"no sign of life for .* since: the data of step \d", text) and "slowly" in text
    done = job("goodput", f"--workdir={tmp_path}/run")
    assert done.returncode == 0 and "1 start" in done.stdout
