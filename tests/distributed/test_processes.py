"""Jobs of several processes on one machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from diffusion.distributed import multihost
from diffusion.training.resilience.watchdog import STUCK
from tests.chaos.training import ROOT, Training, committed
from tests.jobs import job, one_line


def together(processes, *command, slurm=False):
    """Runs a job in several processes; what each has said on stdout."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
        flags = []
        if slurm:
            told = {"JOB_ID": port, "STEP_NODELIST": "localhost", "NTASKS": processes, "STEP_NUM_TASKS": processes,
                    "PROCID": rank, "LOCALID": 0}  # fmt: skip
            environment |= {f"SLURM_{name}": str(value) for name, value in told.items()}
        else:
            flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={rank}"]
        running.append(subprocess.Popen(
            [sys.executable, "-m", *command, *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
    told = [process.communicate(timeout=180) for process in running]
    assert [process.returncode for process in running] == [0] * processes, told
    return ["".join(line for line in stdout.splitlines(True) if "[Gloo]" not in line) for stdout, _ in told]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that two processes have trained, together as Slurm has started them."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    train = ["experiments.train", "--config=tests/chaos/config.py:ddpm", f"--workdir={folder}"]
    first, second = together(2, *train, slurm=True)
    assert "2 devices" in first and not second  # one speaks for all
    return folder


@pytest.mark.slow
def test_one_process_trains_the_same(workdir, tmp_path):
    together(1, "experiments.train", "--config=tests/chaos/config.py:ddpm", f"--workdir={tmp_path}/one")
    one, two = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                for folder in (tmp_path / "one", workdir))  # fmt: skip
    assert len(one) == len(two) > 10
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-4)


@pytest.mark.slow
def test_four_are_killed_and_go_on_as_one_would_have(tmp_path):
    """One is lost, and with it all; started again, their curve is that of one process."""
    flags = {"case": "ddpm", "compiled": tmp_path / "compiled"}
    one = Training(workdir=tmp_path / "runs" / "one", processes=1, **flags)
    assert one.wait() == [0], one.told()
    workdir = tmp_path / "runs" / "four"
    four = Training(workdir=workdir, processes=4, pace=0.05, **flags)
    assert four.until(lambda: committed(workdir)), four.told()
    four.processes[2].kill()
    began = time.monotonic()
    codes = four.wait()
    assert time.monotonic() - began < multihost.HEARTBEAT + 15
    assert codes[2] == -signal.SIGKILL, codes
    assert all(code in (STUCK, -signal.SIGABRT) for code in codes[:2] + codes[3:]), (codes, four.told())
    assert "lost another process" in four.told() or "another task died" in four.told()
    reached = committed(workdir)
    four = Training(workdir=workdir, processes=4, **flags)
    assert four.wait() == [0] * 4, four.told()
    assert f"going on from step {reached}" in four.told()
    curves = [[json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
              for folder in (one.workdir, workdir)]  # fmt: skip
    assert len(curves[0]) == len(curves[1])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)


WAITS = """
import sys, time
import jax
from diffusion.distributed import multihost
multihost.initialize(sys.argv[1], 3, int(sys.argv[2]))
multihost.TOGETHER = 2
multihost.wait_for_all("breakfast")
try:
    if sys.argv[2] != "1":
        multihost.wait_for_all("lunch")
except multihost.Missing as error:
    print(error)
time.sleep(4)
"""


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_who_does_not_come_to_a_barrier_is_named(address):
    running = [subprocess.Popen([sys.executable, "-c", WAITS, address, str(rank)], cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, text=True) for rank in range(3)]  # fmt: skip
    told = [process.communicate(timeout=60)[0] for process in running]
    assert told == ["process 1 did not come to 'lunch' within 2 s\n", "", told[0]]


COMES = """
from diffusion.distributed import multihost
multihost.TOGETHER = 2
try:
    multihost.initialize()
except multihost.Missing as error:
    print(error)
"""


def test_where_slurm_tells_who_is_who_those_that_do_not_come_are_named(address):
    host, port = address.split(":")
    told = {"JOB_ID": "7", "STEP_NODELIST": host, "NTASKS": "3", "PROCID": "0", "LOCALID": "0"}
    environment = {**os.environ, "JAX_COORDINATOR_PORT": port, **{f"SLURM_{key}": told[key] for key in told}}
    done = subprocess.run([sys.executable, "-c", COMES], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert done.stdout.decode() == f"processes 1, 2 of 3 did not come to {address} within 2 s\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_same_samples_and_figures(workdir, tmp_path, processes):
    samples, figures = [], []
    for count in (1, processes):
        out = tmp_path / str(count)
        told = together(count, "experiments.sample", f"--workdir={workdir}", "--num=30", "--steps=5", f"--out={out}")
        assert "30 samples" in told[0]
        samples.append(np.load(out / "samples.npz")["samples"].astype(int))
        told = together(count, "experiments.evaluate", f"--workdir={workdir}", "--steps=3")
        assert "energy_distance" in told[0] and not any(told[1:])
        figures.append(json.loads((workdir / "evaluation.json").read_text()))
    assert np.abs(samples[0] - samples[1]).max() <= 1
    for name, value in figures[0].items():
        if name != "settings":
            assert figures[1][name] == pytest.approx(value, rel=1e-2), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--coordinator=here:1"],
            "--num_processes: is missing; --coordinator, --num_processes, --process_id go together",
        ),
        (["--coordinator=here", "--num_processes=2", "--process_id=0"], "--coordinator: must be HOST:PORT"),
        (["--coordinator=here:1", "--num_processes=2", "--process_id=2"], "--process_id: must be from 0 to 1, got 2"),
        (["--coordinator=here:1", "--num_processes=0", "--process_id=0"], "--num_processes: must be at least 1, got 0"),
        (["--distributed"], "--distributed: the environment does not tell of other processes"),
    ],
)
def test_bad_flags(flags, message, tmp_path):
    done = job("sample", f"--workdir={tmp_path}", *flags)
    assert message in one_line(done)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("SLURM_STEP_NUM_TASKS", "2", True), ("SLURM_STEP_NUM_TASKS", "1", False), ("TPU_WORKER_HOSTNAMES", "a,b", True),
     ("TPU_WORKER_HOSTNAMES", "a", False), ("MEGASCALE_NUM_SLICES", "2", True), ("OTHER", "2", False)],
)  # fmt: skip
def test_what_the_environment_tells(name, value, told, monkeypatch):
    monkeypatch.setenv(name, value)
    assert multihost.is_announced() == told
