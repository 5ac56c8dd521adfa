"""Supervision of processes: starts, exits and restarts of a job whose exit codes are given."""

import os
import signal
import subprocess
import sys
import time

import pytest

from diffusion.core import locks
from launch import pool, processes
from launch.local import make
from launch.processes import SupervisedJob, combined_exit_code
from tests.jobs import ROOT

STUB = "tests.launch.stub"


@pytest.fixture(autouse=True)
def restart_quickly(monkeypatch):
    monkeypatch.setattr(processes, "RETRY_DELAY", 0.1)
    monkeypatch.chdir(ROOT)


def supervised(folder, *words, retries=2, launcher=None, lock=None):
    events, launcher = [], launcher or make()
    log = str(folder / "log.txt")
    job = SupervisedJob([(STUB, str(folder), *words)], lambda command: launcher.start(command, 0, log, lock), retries,
                     events.append)  # fmt: skip
    return job, events


def wait_until(condition, limit=20.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit
        time.sleep(0.02)


def starts(folder, rank=0):
    path = folder / f"starts.{rank}"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("codes", "ends", "number"),
    [(["0"], 0, 1), (["2"], 2, 1), (["3"], 3, 1), (["75", "75", "75", "75", "0"], 0, 5), (["1", "70", "0"], 0, 3),
     (["1"], 1, 3), (["killed", "3"], 3, 2), (["70", "killed", "75", "0"], 0, 4)],
)  # fmt: skip
def test_restart_by_exit_code(codes, ends, number, tmp_path, monkeypatch):
    """0, 2 and 3 are final, 75 is not counted as a retry, and other codes allow two retries."""
    monkeypatch.setattr(processes, "PREEMPTED_DELAY", 0.05)
    job, events = supervised(tmp_path, *codes)
    wait_until(job.advance)
    assert job.code == ends and len(starts(tmp_path)) == number
    ended = [event["code"] for event in events if event["event"] == "ended"]
    assert len(ended) == number and ended[-1] == ends
    message = [event["message"] for event in events if event["event"] == "ended"][-1]
    assert message == (f"error: stub exits with {codes[-1]}" if ends else "")


def test_commands_run_one_after_the_other(tmp_path):
    events = []
    commands = [(STUB, str(tmp_path), "1", "0", "0"), (STUB, str(tmp_path), "5", "5", "0")]
    job = SupervisedJob(commands, make().start, 1, events.append)
    wait_until(job.advance)
    assert job.code == 0 and len(starts(tmp_path)) == 3
    assert [event["event"] for event in events] == ["started", "ended", "started", "next", "started", "ended"]


def test_stopped_job_is_not_restarted(tmp_path):
    job, events = supervised(tmp_path, "sleep")
    wait_until(lambda: job.advance() or (tmp_path / "ready.0").exists())
    job.stop()
    wait_until(job.advance)
    assert job.code == 75 and len(starts(tmp_path)) == 1 and events[-1]["code"] == 75


def test_signal_during_a_start_is_forwarded(tmp_path):
    """The signal arrives when the process exists but is not yet supervised."""

    class Launcher:
        def start(self, command, **keywords):
            started = make().start(command)
            wait_until(lambda: (tmp_path / "ready.0").exists())
            os.kill(os.getpid(), signal.SIGTERM)
            return started

    assert pool.run_until_done(Launcher(), [(STUB, str(tmp_path), "sleep")], 0) == 75
    assert len(starts(tmp_path)) == 1


def test_second_signal_kills_a_process_that_ignores_the_first(tmp_path):
    job, _ = supervised(tmp_path, "hang")
    wait_until(lambda: job.advance() or (tmp_path / "ready.0").exists())
    job.stop()
    time.sleep(0.2)
    assert not job.advance()
    job.stop(signal.SIGKILL)
    wait_until(job.advance)
    assert job.code == 137


@pytest.mark.parametrize(("other", "kill_timeout"), [("hang", 0.2), ("sleep", 60.0)])
def test_lost_process_ends_the_others(other, kill_timeout, tmp_path, monkeypatch):
    """The others receive SIGTERM, and SIGKILL if they ignore it."""
    monkeypatch.setattr(processes, "PEER_TIMEOUT", 0.2)
    monkeypatch.setattr(processes, "KILL_TIMEOUT", kill_timeout)
    job, events = supervised(tmp_path, f"killed/{other}", "0", launcher=make(num_processes=2))
    wait_until(job.advance)
    assert job.code == 0 and len(starts(tmp_path, 0)) == len(starts(tmp_path, 1)) == 2
    assert [event["code"] for event in events if event["event"] == "ended"] == [137, 0]
    flags = [line.split()[-3:] for rank in (0, 1) for line in starts(tmp_path, rank)[:1]]
    assert flags[0][0] == flags[1][0] and flags[0][0].startswith("--coordinator=127.0.0.1:")
    assert [words[1:] for words in flags] == [["--num_processes=2", f"--process_id={rank}"] for rank in (0, 1)]


@pytest.mark.parametrize(
    ("codes", "combined"),
    [([0, 0], 0), ([0, 75], 75), ([75, 75], 75), ([2, -9], 2), ([70, 3], 3), ([70, -9, 70], 137), ([134, 70], 134),
     ([-6, 0], 134)],
)  # fmt: skip
def test_combined_exit_code(codes, combined):
    assert combined_exit_code(codes) == combined


def test_processes_and_slots_have_different_gpus(tmp_path):
    launcher = make(num_processes=2, gpus=2)
    for slot in (0, 1):
        start = launcher.start((STUB, str(tmp_path), "0"), slot)
        wait_until(lambda start=start: start.poll() is not None)
    seen = [line.split()[1] for rank in (0, 1) for line in starts(tmp_path, rank)]
    assert seen == ["0,1", "4,5", "2,3", "6,7"]


def test_processes_end_with_their_killed_parent(tmp_path):
    """A killed parent cannot signal its processes; the operating system does."""
    program = f"""
import time
from launch.local import make
from diffusion.core import locks
with locks.hold({str(tmp_path)!r}, "workdir") as lock:
    make().start(({STUB!r}, {str(tmp_path)!r}, "sleep"), 0, {str(tmp_path / "log.txt")!r}, lock)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_until(lambda: (tmp_path / "ready.0").exists())
    assert locks.is_held(str(tmp_path))
    parent.kill()
    parent.wait()
    wait_until(lambda: not locks.is_held(str(tmp_path)))
