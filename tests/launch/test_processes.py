"""Processes that are started, watched and started again, with a job that does as it is told."""

import os
import signal
import subprocess
import sys
import time

import pytest

from launch import locks, pool, processes
from launch.local import make
from launch.processes import Supervised, together
from tests.jobs import ROOT

STUB = "tests.launch.stub"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(processes, "PAUSE", 0.1)
    monkeypatch.chdir(ROOT)


def supervised(folder, *words, retries=2, launcher=None, lock=None):
    events, launcher = [], launcher or make()
    log = str(folder / "log.txt")
    job = Supervised([(STUB, str(folder), *words)], lambda command: launcher.start(command, 0, log, lock), retries,
                     events.append)  # fmt: skip
    return job, events


def until(condition, limit=20.0):
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
def test_what_is_started_again(codes, ends, number, tmp_path, monkeypatch):
    """Codes 0, 2 and 3 end it, 75 does not count, any other does so twice."""
    monkeypatch.setattr(processes, "STOPPED_PAUSE", 0.05)
    job, events = supervised(tmp_path, *codes)
    until(job.advance)
    assert job.code == ends and len(starts(tmp_path)) == number
    ended = [event["code"] for event in events if event["event"] == "ended"]
    assert len(ended) == number and ended[-1] == ends
    told = [event["told"] for event in events if event["event"] == "ended"][-1]
    assert told == (f"error: told to end with {codes[-1]}" if ends else "")


def test_one_command_after_the_other(tmp_path):
    events = []
    commands = [(STUB, str(tmp_path), "1", "0", "0"), (STUB, str(tmp_path), "5", "5", "0")]
    job = Supervised(commands, make().start, 1, events.append)
    until(job.advance)
    assert job.code == 0 and len(starts(tmp_path)) == 3
    assert [event["event"] for event in events] == ["started", "ended", "started", "next", "started", "ended"]


def test_told_to_stop(tmp_path):
    job, events = supervised(tmp_path, "sleep")
    until(lambda: job.advance() or (tmp_path / "ready.0").exists())
    job.stop()
    until(job.advance)
    assert job.code == 75 and len(starts(tmp_path)) == 1 and events[-1]["code"] == 75


def test_a_signal_while_a_job_is_starting_is_passed_on(tmp_path):
    """The process that was just being started did not hear of it."""

    class Launcher:
        def start(self, command, **keywords):
            started = make().start(command)
            until(lambda: (tmp_path / "ready.0").exists())
            os.kill(os.getpid(), signal.SIGTERM)
            return started

    assert pool.until_done(Launcher(), [(STUB, str(tmp_path), "sleep")], 0) == 75
    assert len(starts(tmp_path)) == 1


def test_one_that_does_not_end_is_killed_by_the_second_signal(tmp_path):
    job, _ = supervised(tmp_path, "hang")
    until(lambda: job.advance() or (tmp_path / "ready.0").exists())
    job.stop()
    time.sleep(0.2)
    assert not job.advance()
    job.stop(signal.SIGKILL)
    until(job.advance)
    assert job.code == 137


@pytest.mark.parametrize(("other", "last"), [("hang", 0.2), ("sleep", 60.0)])
def test_a_process_that_is_lost_takes_the_others_with_it(other, last, tmp_path, monkeypatch):
    """Who does not end when it is told to is killed."""
    monkeypatch.setattr(processes, "LOSS", 0.2)
    monkeypatch.setattr(processes, "LAST", last)
    job, events = supervised(tmp_path, f"killed/{other}", "0", launcher=make(num_processes=2))
    until(job.advance)
    assert job.code == 0 and len(starts(tmp_path, 0)) == len(starts(tmp_path, 1)) == 2
    assert [event["code"] for event in events if event["event"] == "ended"] == [137, 0]
    flags = [line.split()[-3:] for rank in (0, 1) for line in starts(tmp_path, rank)[:1]]
    assert flags[0][0] == flags[1][0] and flags[0][0].startswith("--coordinator=127.0.0.1:")
    assert [words[1:] for words in flags] == [["--num_processes=2", f"--process_id={rank}"] for rank in (0, 1)]


@pytest.mark.parametrize(
    ("codes", "all_of_them"),
    [([0, 0], 0), ([0, 75], 75), ([75, 75], 75), ([2, -9], 2), ([70, 3], 3), ([70, -9, 70], 137), ([134, 70], 134),
     ([-6, 0], 134)],
)  # fmt: skip
def test_the_code_of_several(codes, all_of_them):
    assert together(codes) == all_of_them


def test_every_process_has_gpus_of_its_own(tmp_path):
    launcher = make(num_processes=2, gpus=2)
    for slot in (0, 1):
        start = launcher.start((STUB, str(tmp_path), "0"), slot)
        until(lambda start=start: start.poll() is not None)
    seen = [line.split()[1] for rank in (0, 1) for line in starts(tmp_path, rank)]
    assert seen == ["0,1", "4,5", "2,3", "6,7"]


def test_no_process_outlives_who_started_it(tmp_path):
    """Killed, it cannot tell its processes to end: the system does."""
    program = f"""
import time
from launch.local import make
from launch import locks
with locks.hold({str(tmp_path)!r}, "workdir") as lock:
    make().start(({STUB!r}, {str(tmp_path)!r}, "sleep"), 0, {str(tmp_path / "log.txt")!r}, lock)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    until(lambda: (tmp_path / "ready.0").exists())
    assert locks.is_held(str(tmp_path))
    parent.kill()
    parent.wait()
    until(lambda: not locks.is_held(str(tmp_path)))
