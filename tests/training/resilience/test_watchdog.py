"""Real processes that hang, and others that only seem to."""

import concurrent.futures
import os
import pathlib
import subprocess
import sys

import pytest

from diffusion.training.resilience.watchdog import Watchdog
from tests.refusals import refused
from tests.tiers import slow_except

ROOT = pathlib.Path(__file__).parents[3]
# The wall clock of all these processes runs backwards. PyDLL holds the GIL during a call.
BEFORE = """
import ctypes, multiprocessing, os, signal, subprocess, sys, threading, time
import functools
from diffusion.training.resilience import watchdog
Watchdog = functools.partial(watchdog.Watchdog, end_process=os._exit)
watchdog.REPORT_SECONDS = 1.5
time.time = lambda: -time.monotonic()
path, lock, hold = sys.argv[1], threading.Lock(), ctypes.PyDLL(None).usleep
lock.acquire()
def hang_here(wait, *args):
    with Watchdog(0.4, path) as dog:
        dog.beat("step 7")
        wait(*args)
"""
CASES = {
    "sleep": "hang_here(time.sleep, 30)",
    "lock": "hang_here(lock.acquire)",
    "gil": "hang_here(hold, 30_000_000)",
    "no folder": "path = '/nowhere/at/all'; hang_here(time.sleep, 30)",
    "full pipe": """
read, write = os.pipe()
os.set_blocking(write, False)
try:
    while os.write(write, bytes(1000)): pass
except BlockingIOError:
    os.set_blocking(write, True)
os.dup2(write, 2)
hang_here(time.sleep, 30)
""",
    "worker": """
multiprocessing.get_context("spawn").Process(target=time.sleep, args=(30,)).start()
hang_here(time.sleep, 30)
""",
    "limit": """
with Watchdog(0.4, path) as dog:
    dog.beat("compile", limit=20)
    hold(2_500_000)  # longer than the timer runs for 0.4 s
    time.sleep(1)  # and the thread waits
    print("compiled", flush=True)
    dog.beat("step 8")
    time.sleep(30)
""",
    "beats": """
watchdog.REPORT_SECONDS = 0.0
with Watchdog(0.8, path) as dog:
    for _ in range(24):
        dog.beat("step")
        time.sleep(0.1)
""",
    "over": """
watchdog.REPORT_SECONDS = 0.0
with Watchdog(0.4, path):
    pass
time.sleep(1.2)
""",
    "stopped": """
watchdog.REPORT_SECONDS = 9.0
subprocess.Popen(["sh", "-c", f"sleep 1.5; kill -CONT {os.getpid()}"])
with Watchdog(0.8, path) as dog:
    for _ in range(2):
        dog.beat("step")
        time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.3)
""",
    "off": """
with Watchdog(0, path) as dog:
    dog.beat("step", limit=0.1)
    time.sleep(0.5)
    print(threading.active_count())
""",
}


DEFAULT = ("sleep", "gil", "worker", "limit", "beats")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Returns the result of each case and the text of its report or None: `{name: (result, report)}`."""
    return run_all(DEFAULT, tmp_path_factory.mktemp("watchdog"))


@pytest.fixture(scope="module")
def others_ended(tmp_path_factory):
    return run_all(CASES.keys() - set(DEFAULT), tmp_path_factory.mktemp("watchdog"))


def run_all(names, folder):
    """Runs cases in parallel, since they mostly wait."""

    def run(name):
        path = folder / name
        command = [sys.executable, "-c", BEFORE + CASES[name], str(path)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(command, None, "", "was not ended")
        return name, (done, path.read_text() if path.exists() else None)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        return dict(pool.map(run, names))


@pytest.mark.parametrize("name", slow_except(DEFAULT, ("sleep", "lock")))
def test_reports_where_and_ends_the_process(name, request):
    done, report = result(request, name)
    assert done.returncode == 70, done.stderr
    for text in (done.stderr, report):
        assert "s (limit 0.4 s), since: step 7\n" in text and "in hang_here" in text


def result(request, name):
    return request.getfixturevalue("ended" if name in DEFAULT else "others_ended")[name]


def test_ends_while_the_gil_is_held(ended):
    done, _ = ended["gil"]
    assert done.returncode == 1 and "in hang_here" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_report_that_cannot_be_written_does_not_delay_the_end(others_ended):
    done, report = others_ended["no folder"]
    assert done.returncode == 70 and report is None and "in hang_here" in done.stderr
    assert "Traceback" not in done.stderr
    done, report = others_ended["full pipe"]
    assert done.returncode == 70 and "in hang_here" in report


def test_kills_the_workers(ended):
    """They keep the pipes open that `run` reads to the end."""
    assert ended["worker"][0].returncode == 70


def test_an_activity_has_its_own_limit(ended):
    done, report = ended["limit"]
    assert done.stdout == "compiled\n" and done.returncode == 70 and "since: step 8\n" in report, done.stderr


@pytest.mark.parametrize("name", slow_except(DEFAULT, ("beats", "over", "stopped", "off")))
def test_does_not_end_a_run_that_is_alive(name, request):
    done, report = result(request, name)
    assert done.returncode == 0 and not done.stderr and report is None, done.stderr
    assert name != "off" or done.stdout == "1\n"


@pytest.mark.parametrize("limit", [-1, float("inf"), float("nan")])
def test_refuses_other_limits(limit):
    with refused("limit"):
        Watchdog(limit, "", os._exit)
