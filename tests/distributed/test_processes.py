"""Jobs of several processes on one machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from diffusion.data.pipeline import Batches
from diffusion.distributed import multihost
from diffusion.training.resilience.watchdog import HUNG
from tests.chaos.training import ROOT, Training, committed
from tests.data.test_pipeline import Numbers, take
from tests.jobs import job
from tests.refusals import refused_field


def together(processes, *command, slurm=False, codes=(0,)):
    """Runs a job in several processes, and returns the stdout of each.

    The processes end with one of the codes each, and all of the codes occur. If they are not 0, stderr is returned.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
        flags = []
        if slurm:
            job = {"JOB_ID": port, "STEP_NODELIST": "localhost", "NTASKS": processes, "STEP_NUM_TASKS": processes,
                   "PROCID": rank, "LOCALID": 0}  # fmt: skip
            environment |= {f"SLURM_{name}": str(value) for name, value in job.items()}
        else:
            flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={rank}"]
        running.append(subprocess.Popen(
            [sys.executable, "-m", *command, *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
    outputs = [process.communicate(timeout=180) for process in running]
    assert {process.returncode for process in running} == set(codes), outputs
    if codes != (0,):
        return [stderr for _, stderr in outputs]
    noise = re.compile(r"\[Gloo\]|^process \d+ of \d+ waits")
    return ["".join(line for line in stdout.splitlines(True) if not noise.search(line)) for stdout, _ in outputs]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run trained by two processes in the environment of Slurm."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    train = ["experiments.train", "--config=tests/chaos/config.py:denoising", f"--workdir={folder}"]
    first, second = together(2, *train, slurm=True)
    assert "2 devices" in first and not second  # the first process alone prints
    return folder


@pytest.mark.slow
def test_one_process_trains_the_same(workdir, tmp_path):
    together(1, "experiments.train", "--config=tests/chaos/config.py:denoising", f"--workdir={tmp_path}/one")
    one, two = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                for folder in (tmp_path / "one", workdir))  # fmt: skip
    assert len(one) == len(two) > 10
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-4)


BAD_IMAGE = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({"data": {"name": "folder", "path": "PATH", "size": 8, "labels": False}, "objective": "denoising",
                       "network": {"name": "mlp", "width": 8, "depth": 1}, "train": {"steps": 20, "batch_size": 4}})
"""


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_costs_no_step(tmp_path):
    """All processes save the same step, up to the batch of the image; one names it and the other can resume."""
    rng, images = np.random.default_rng(0), tmp_path / "images"
    images.mkdir()
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(images / f"{number:02d}.png")
    order = [number for batch in take(Batches(Numbers(40), batch_size=4, seed=0), 10) for number in batch]
    (images / f"{order[26]:02d}.png").write_bytes(b"")  # in the seventh batch, in the part of the second process
    (tmp_path / "config.py").write_text(BAD_IMAGE.replace("PATH", str(images)))
    first, second = together(2, "experiments.train", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run",
                             codes=(2, 75))  # fmt: skip
    assert f"{order[26]:02d}.png is empty" in second and "step 6 is saved" in second
    assert "stopped after step 6 and saved" in first and committed(tmp_path / "run") == 6


@pytest.mark.slow
def test_four_processes_resume_after_the_loss_of_one(tmp_path):
    """The loss of one ends all; after a restart, their loss curve is that of one process."""
    flags = {"case": "denoising", "compiled": tmp_path / "compiled"}
    one = Training(workdir=tmp_path / "runs" / "one", processes=1, **flags)
    assert one.wait() == [0], one.output()
    workdir = tmp_path / "runs" / "four"
    four = Training(workdir=workdir, processes=4, pace=0.05, **flags)
    assert four.until(lambda: committed(workdir)), four.output()
    four.processes[2].kill()
    began = time.monotonic()
    codes = four.wait()
    assert time.monotonic() - began < multihost.HEARTBEAT_TIMEOUT + 15
    assert codes[2] == -signal.SIGKILL, codes
    assert all(code in (HUNG, -signal.SIGABRT) for code in codes[:2] + codes[3:]), (codes, four.output())
    assert "lost another process" in four.output() or "another task died" in four.output()
    reached = committed(workdir)
    four = Training(workdir=workdir, processes=4, **flags)
    assert four.wait() == [0] * 4, four.output()
    assert f"resuming from step {reached}" in four.output()
    curves = [[json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
              for folder in (one.workdir, workdir)]  # fmt: skip
    assert len(curves[0]) == len(curves[1])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)


WAITS = """
import sys, time
import jax
from diffusion.distributed import multihost
multihost.initialize(sys.argv[1], 3, int(sys.argv[2]))
multihost.TIMEOUT = 2
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


@pytest.mark.slow
def test_processes_missing_at_a_barrier_are_named(address):
    running = [subprocess.Popen([sys.executable, "-c", WAITS, address, str(rank)], cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, text=True) for rank in range(3)]  # fmt: skip
    first, late, third = (process.communicate(timeout=60)[0] for process in running)
    assert first.startswith("process 1 did not") and "'lunch'" in first and third == first and not late


LEAVES = """
import os, sys, time
from diffusion.distributed import multihost
multihost.initialize(sys.argv[1], 2, int(sys.argv[2]))
time.sleep(float(sys.argv[3]) * int(sys.argv[2]))
multihost.LEAVE_TIMEOUT = 4
multihost.leave()
os._exit(75 + int(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("delay", "codes"), [(2, [75, 76]), (30, [75, -signal.SIGABRT])])
def test_processes_that_end_wait_for_each_other_briefly(address, delay, codes):
    """Without the wait, JAX would abort the second of two processes of which the first ends before it."""
    command = [sys.executable, "-c", LEAVES, address]
    running = [subprocess.Popen([*command, str(rank), str(delay)], cwd=ROOT, stderr=subprocess.DEVNULL)
               for rank in range(2)]  # fmt: skip
    assert [process.wait(timeout=60) for process in running] == codes


JOINS = """
from diffusion.distributed import multihost
multihost.TIMEOUT = 2
try:
    multihost.initialize()
except multihost.Missing as error:
    print(error)
"""


@pytest.mark.slow
def test_processes_missing_from_a_slurm_job_are_named(address):
    host, port = address.split(":")
    job = {"JOB_ID": "7", "STEP_NODELIST": host, "NTASKS": "3", "PROCID": "0", "LOCALID": "0"}
    environment = {**os.environ, "JAX_COORDINATOR_PORT": port, **{f"SLURM_{key}": job[key] for key in job}}
    done = subprocess.run([sys.executable, "-c", JOINS], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert done.stdout.decode().startswith("processes 1, 2 of 3 did not join"), done.stderr


@pytest.mark.slow
def test_samples_and_metrics_do_not_depend_on_the_processes(workdir, tmp_path):
    """The number of samples is not a multiple of the number of processes."""
    samples, metrics = [], []
    for count in (1, 3):
        out = tmp_path / str(count)
        first, *_ = together(
            count, "experiments.sample", f"--workdir={workdir}", "--num=31", "--steps=5", f"--out={out}"
        )
        assert "31 samples" in first
        samples.append(np.load(out / "samples.npz")["arr_0"].astype(int))
        first, *others = together(count, "experiments.evaluate", f"--workdir={workdir}", "--steps=3")
        assert "energy_distance" in first and not any(others)
        metrics.append(json.loads((workdir / "evaluation.json").read_text()))
    assert np.abs(samples[0] - samples[1]).max() <= 1
    for name, value in metrics[0].items():
        if name != "settings":
            assert metrics[1][name] == pytest.approx(value, rel=1e-2), name


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--coordinator=here:1"], "--num_processes"),
        (["--coordinator=here", "--num_processes=2", "--process_id=0"], "--coordinator"),
        (["--coordinator=here:1", "--num_processes=2", "--process_id=2"], "--process_id"),
        (["--coordinator=here:1", "--num_processes=0", "--process_id=0"], "--num_processes"),
        (["--distributed"], "--distributed"),
    ],
)
def test_bad_flags(flags, field, tmp_path):
    assert refused_field(job("sample", f"--workdir={tmp_path}", *flags)) == field


@pytest.mark.parametrize(
    ("name", "value", "announced"),
    [("SLURM_STEP_NUM_TASKS", "2", True), ("SLURM_STEP_NUM_TASKS", "1", False), ("TPU_WORKER_HOSTNAMES", "a,b", True),
     ("TPU_WORKER_HOSTNAMES", "a", False), ("MEGASCALE_NUM_SLICES", "2", True), ("OTHER", "2", False)],
)  # fmt: skip
def test_the_environment_announces_several_processes(name, value, announced, monkeypatch):
    monkeypatch.setenv(name, value)
    assert multihost.is_announced() == announced
